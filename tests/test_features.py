"""Feature extractors: their networks, their files, what they tell, and what they see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maisi_cli import catalog, plugins
from maisi_cli.backbones import ResNet50, SliceNet, SqueezeNet
from maisi_cli.distances import Moments, frechet
from maisi_cli.errors import CannotRun, UsageError
from maisi_cli.features import Extractor, check_channels, features_of, open_extractor
from maisi_cli.geometry import Geometry
from maisi_cli.hookspecs import hookimpl
from maisi_cli.phantom import body, render
from maisi_cli.slices import PLANES, PROFILES, Profile
from maisi_cli.store import read_origin
from maisi_cli.volumes import Volume
from maisi_cli.weights import pull, verify
from scipy import ndimage
from torch import nn


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))


# --- networks -------------------------------------------------------------------------------


def test_the_networks_give_their_features_for_slices_of_any_size() -> None:
    for network, channels in ((SliceNet(), 1), (ResNet50(), 3), (SqueezeNet(), 3)):
        network.eval()
        with torch.inference_mode():
            for size in ((64, 64), (70, 93)):
                assert network(torch.zeros(2, channels, *size)).shape == (2, network.size)


def test_the_resnet_has_the_names_and_shapes_of_the_published_files() -> None:
    """RadImageNet's `notop` file: torchvision's names, a bias in every convolution, no classifier."""
    keras, torchvision = ResNet50().state_dict(), ResNet50(keras=False).state_dict()
    blocks = {1: 3, 2: 4, 3: 6, 4: 3}
    convolutions = ["conv1", *(f"layer{s}.{b}.conv{c}" for s, n in blocks.items() for b in range(n) for c in (1, 2, 3)),
                    *(f"layer{s}.0.downsample.0" for s in blocks)]  # fmt: skip
    assert len(convolutions) == 53
    assert {f"{name}.weight" for name in convolutions} <= set(keras)
    assert set(keras) - set(torchvision) == {f"{name}.bias" for name in convolutions}
    assert keras["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert sum(
        each.numel() for name, each in torchvision.items() if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ) == (
        25_557_032 - 2048 * 1000 - 1000  # torchvision's count, without the classifier
    )


def test_the_resnet_of_radimagenet_halves_in_its_first_convolution() -> None:
    """As Keras defines it: a position that the stride skips cannot change the output of a stage's first block."""
    torch.manual_seed(0)
    for keras, blind in ((True, True), (False, False)):
        block = ResNet50(keras=keras).layer2[0].eval()  # type: ignore[index]
        maps = torch.randn(1, 256, 8, 8)
        changed = maps.clone()
        changed[:, :, 1::2, 1::2] += 1
        with torch.inference_mode():
            assert torch.equal(block(maps), block(changed)) == blind


def test_squeezenet_has_the_number_of_weights_that_is_published() -> None:
    assert sum(each.numel() for each in SqueezeNet().parameters()) == 1_235_496
    names = set(SqueezeNet().state_dict())
    assert {"features.0.weight", "features.3.squeeze.weight", "features.12.expand3x3.bias", "classifier.1.weight"} <= names


# --- files ----------------------------------------------------------------------------------


def test_the_extractor_that_comes_along_is_small_and_says_what_it_is() -> None:
    found = open_extractor()
    spec = catalog.model("maisi-slices")
    assert spec.bundled
    assert spec.weight_path(spec.weights[0]).stat().st_size < 2**20
    assert (found.name, found.size, found.channels, found.licence) == ("maisi-slices", 128, 1, "Apache-2.0")
    assert "not comparable to published FIDs" in found.note
    assert len(found.sha256) == 64


def radimagenet(folder: Path, seed: int = 0) -> Path:
    """Write a file as RadImageNet's, with random weights."""
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    path = folder / "RadImageNet-ResNet50_notop.pth"
    torch.save(ResNet50().state_dict(), path)
    return path


def test_weights_of_ones_own_are_used_and_their_hash_is_told(tmp_path: Path) -> None:
    one, other = radimagenet(tmp_path / "a", 0), radimagenet(tmp_path / "b", 1)
    found = open_extractor(str(one))
    assert (found.name, found.size, found.channels, found.profiles["ct"]) == ("radimagenet-resnet50", 2048, 3, "reference")
    assert found.sha256 == open_extractor(f"radimagenet-resnet50={one}").sha256 != open_extractor(str(other)).sha256


def test_published_weights_are_installed_by_hand_travel_in_bundles_and_keep_the_hash_of_the_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maisi_cli.record import sha256_of
    from maisi_cli.store import export_bundle, import_bundle

    spec = catalog.model("radimagenet-resnet50")
    with pytest.raises(CannotRun, match="not installed") as caught:
        open_extractor("radimagenet-resnet50")
    assert caught.value.hint == "maisi models pull radimagenet-resnet50"
    with pytest.raises(CannotRun, match="on no hub") as caught:
        pull(spec, accept_license=True)
    assert "--from FOLDER" in str(caught.value.hint)
    file = radimagenet(tmp_path / "fetched")
    notes: list[Any] = []
    pull(spec, accept_license=True, source=file.parent, on_event=notes.append)
    assert any("no hash of RadImageNet-ResNet50_notop.pth is known" in getattr(note, "text", "") for note in notes)
    found = open_extractor("radimagenet-resnet50")
    assert found.sha256 == sha256_of(file) == open_extractor(str(file)).sha256
    assert [check.status for check in verify(spec)] == ["ok"]

    export_bundle([spec], tmp_path / "bundle.tar")
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "elsewhere"))
    import_bundle(tmp_path / "bundle.tar", accept_license=True)
    assert open_extractor("radimagenet-resnet50").sha256 == found.sha256
    origin = read_origin(spec.weight_path(spec.weights[0]))
    assert origin is not None
    assert not origin.pinned


def test_another_resnet_is_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save(ResNet50(keras=False).state_dict(), tmp_path / "photographs.pth")  # fits but for the biases
    with pytest.raises(UsageError, match=r"missing conv1\.bias"):
        open_extractor(str(tmp_path / "photographs.pth"))
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UsageError, match="more than tensors"):
        open_extractor(str(tmp_path / "evil.pth"))
    assert not Evil.ran


class Evil:
    ran = False

    def __reduce__(self) -> Any:
        return _ruin, ()


def _ruin() -> None:
    Evil.ran = True


def test_photographs_need_the_published_file(tmp_path: Path) -> None:
    """Its name holds the beginning of its hash."""
    torch.save(SqueezeNet().state_dict(), tmp_path / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(UsageError, match="is not the published squeezenet1_1"):
        open_extractor(f"imagenet-squeezenet1_1={tmp_path / 'squeezenet1_1-b8a52dc0.pth'}")


def test_unknown_extractors_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no feature extractor named 'radimagenet'") as caught:
        open_extractor("radimagenet")
    assert "radimagenet-resnet50" in str(caught.value.hint)
    with pytest.raises(UsageError, match="no file"):
        open_extractor(f"radimagenet-resnet50={tmp_path / 'none.pth'}")


def test_extractors_are_no_generators() -> None:
    assert {spec.name for spec in catalog.extractors()} == {"maisi-slices", "radimagenet-resnet50", "imagenet-squeezenet1_1"}
    assert not {spec.name for spec in catalog.extractors()} & {spec.name for spec in catalog.models()}
    with pytest.raises(UsageError, match="makes features of images") as caught:
        catalog.model("maisi-slices").check_modality("ct")
    assert caught.value.hint == "use  maisi fid --features maisi-slices"


# --- plugins --------------------------------------------------------------------------------


class Mean(nn.Module):
    """Two features: the mean of a slice, and its mean square."""

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        return torch.stack([slices.mean((1, 2, 3)), (slices**2).mean((1, 2, 3))], dim=1)


def mean_extractor(file: Path | None = None) -> Extractor:
    return Extractor(name="mean", network=Mean(), size=2, channels=1, sha256="0" * 64, licence="none")


class Plugin:
    @staticmethod
    @hookimpl
    def register_features(register: Any) -> None:
        register("mean", mean_extractor, summary="two numbers a slice")


@pytest.fixture
def with_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = plugins.load("", extra={"mean": Plugin()})
    monkeypatch.setattr("maisi_cli.features.plugins", lambda: loaded)


def test_an_extractor_of_a_plugin_is_used_by_name(with_mean: None) -> None:
    found = open_extractor("mean")
    array = np.linspace(-1000, 1000, 60, dtype=np.float32).reshape(3, 4, 5)
    image = Volume(array=array, geometry=Geometry(size=(3, 4, 5), spacing=(1.0, 1.0, 1.0)))
    rows = features_of(image, found, Profile(name="x"))
    assert {plane: each.shape for plane, each in rows.items()} == {"xy": (5, 2), "yz": (3, 2), "zx": (4, 2)}
    np.testing.assert_allclose(rows["yz"][:, 0], array.mean(axis=(1, 2)) / 1000, atol=1e-6)
    np.testing.assert_allclose(rows["zx"][:, 1], (array**2).mean(axis=(0, 2)) / 1e6, rtol=1e-5)


def test_an_extractor_that_lies_about_itself_is_refused() -> None:
    image = Volume(array=np.zeros((4, 4, 4), np.float32), geometry=Geometry(size=(4, 4, 4), spacing=(1.0, 1.0, 1.0)))
    with pytest.raises(UsageError, match="says that it gives 3 features"):
        features_of(image, replace(mean_extractor(), size=3), Profile(name="x"))
    with pytest.raises(UsageError, match="not finite"):
        features_of(image, replace(mean_extractor(), network=lambda slices: slices.mean((2, 3)).expand(-1, 2) / 0), Profile(name="x"))


def test_a_profile_of_three_channels_needs_an_extractor_of_three() -> None:
    with pytest.raises(UsageError, match="makes 3 channels, and mean takes 1") as caught:
        check_channels(mean_extractor(), PROFILES["reference"])
    assert "--profile ct" in str(caught.value.hint)
    check_channels(replace(mean_extractor(), channels=3), PROFILES["ct"])  # one channel is repeated


# --- what maisi-slices sees -----------------------------------------------------------------


@pytest.fixture(scope="module")
def people() -> list[Volume]:
    grid = Geometry(size=(56, 48, 32), spacing=(7.0, 7.0, 7.0))
    return [render(body(grid, 100 + k), k) for k in range(8)]


def moments(volumes: list[Volume]) -> dict[str, Moments]:
    parts = [features_of(each, open_extractor(), PROFILES["ct"].changed(spacing_mm=(5.0, 5.0, 5.0))) for each in volumes]
    return {plane: Moments.of(np.concatenate([part[plane] for part in parts])) for plane in PLANES}


def test_batches_change_no_feature_beyond_rounding(people: list[Volume]) -> None:
    one, other = (features_of(people[0], open_extractor(), PROFILES["ct"], batch=batch) for batch in (1, 50))
    for plane in PLANES:
        np.testing.assert_allclose(one[plane], other[plane], rtol=1e-3, atol=1e-3)


def test_worse_images_are_further_away_and_noise_alone_furthest(people: list[Volume]) -> None:
    rng = np.random.default_rng(0)

    def spoilt(blur: float = 0, noise: float = 0, shift: float = 0) -> list[Volume]:
        arrays = [ndimage.gaussian_filter(each.array, blur) + rng.normal(shift, noise, each.array.shape) for each in people[4:]]
        return [replace(each, array=array.astype(np.float32)) for each, array in zip(people[4:], arrays, strict=True)]

    empty = [replace(each, array=rng.uniform(-1000, 1000, each.array.shape).astype(np.float32)) for each in people[4:]]
    real = moments(people[:4])
    sets = {"same": people[4:], "blur 0.6": spoilt(blur=0.6), "blur 1.2": spoilt(blur=1.2), "noise 50": spoilt(noise=50),
            "noise 150": spoilt(noise=150), "shift 40": spoilt(shift=40), "shift 120": spoilt(shift=120), "only noise": empty}  # fmt: skip
    away = {
        name: np.mean([frechet(real[plane], each[plane]) for plane in PLANES]) for name, each in ((n, moments(s)) for n, s in sets.items())
    }
    assert away["same"] < away["blur 0.6"] < away["blur 1.2"] < away["only noise"], away
    assert away["same"] < away["noise 50"] < away["noise 150"] < away["only noise"], away
    assert away["same"] < away["shift 40"] < away["shift 120"] < away["only noise"], away
