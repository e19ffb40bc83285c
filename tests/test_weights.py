"""Weight files: every released layout is read, nothing in them is run, and what does not fit is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from maisi_cli import store
from maisi_cli.catalog import ModelSpec, model
from maisi_cli.cli import run
from maisi_cli.errors import CannotRun, MaisiError, UsageError
from maisi_cli.events import Event, Note
from maisi_cli.networks import build, load
from maisi_cli.testing import tiny_model
from maisi_cli.weights import Check, convert, load_state, locate, pull, save_state, sha256_of, verify, weights_home
from safetensors.torch import save_file
from torch import Tensor

from .fakehub import (
    FILES,
    LICENCE,
    MASKS,
    REPO,
    SCALE,
    SIZES,
    FakeHub,
    checkpoints,
    isolated,
    model_text,
    publish,
    released,
    saved,
    states,
    zipped,
)  # fmt: skip
from .golden import CPU, FP32, Shared, spec

# layout of each file of the goldens, and the scale factor that it holds
RELEASED = [
    ("autoencoder_v1.pt", "state_dict", "small_rflow_autoencoder_def"),
    ("autoencoder_v2.pt", "state_dict", "small_rflow_autoencoder_def"),
    ("diff_unet_3d_rflow-ct.pt", "unet", "small_rflow_diffusion_unet_def"),
    ("diff_unet_3d_ddpm-ct.pt", "unet", "small_ddpm_diffusion_unet_def"),
    ("controlnet_3d_rflow-ct.pt", "controlnet", "small_rflow_controlnet_def"),
    ("controlnet_3d_ddpm-ct.pt", "controlnet", "small_ddpm_controlnet_def"),
    ("mask_generation_autoencoder.pt", "state_dict", "small_rflow_mask_generation_autoencoder_def"),
    ("mask_generation_diffusion_unet.pt", "mask_unet", "small_rflow_mask_generation_diffusion_def"),
]


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout", "table"), RELEASED)
def test_every_released_layout_is_read(shared: Shared, name: str, layout: str, table: str) -> None:
    path = shared(f"golden/checkpoints/{name}")
    state = load_state(path, layout)
    wanted = json.loads(shared(f"golden/u70_state_dict_tables/{table}.json").read_text("utf-8"))
    assert {key: list(value.shape) for key, value in state.tensors.items()} == wanted
    assert (state.scale_factor is not None) == ("unet" in layout)
    assert state.sha256 == sha256_of(path)


def test_a_scale_factor_with_metadata_is_read_without_running_anything(shared: Shared) -> None:
    """The released UNets hold it as MONAI's MetaTensor."""
    state = load_state(shared("golden/u70_state_dict_tables/metatensor_scale_factor.pt"), "unet")
    assert state.scale_factor == pytest.approx(1.0946, abs=1e-6)
    assert state.tensors == {}


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, legacy: bool) -> None:
    path, mark = tmp_path / "bomb.pt", tmp_path / "ran"
    content = {"unet_state_dict": {"a": torch.zeros(2)}, "extra": Bomb(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UsageError, match="holds more than tensors"):
        load_state(path, "unet")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # the trap does work
    assert mark.exists()


def refusal(path: Path) -> UsageError | None:
    try:
        load_state(path, "state_dict")
    except UsageError as error:
        return error
    return None


@pytest.mark.parametrize("end", [".pt", ".safetensors"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), keep=st.integers(0, 1500), flip=st.integers(0, 1500))
@example(content=b"", keep=0, flip=65)  # torch warns of a pickle protocol that there is not
def test_damaged_files_are_refused(tmp_path: Path, end: str, content: bytes, keep: int, flip: int) -> None:
    """Random bytes, and the beginning of a good file with one byte changed: refused in a line, or read if nothing is lost."""
    good = tmp_path / f"good{end}"
    if not good.exists():
        tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3)}
        save_file(tensors, good, metadata={"scale_factor": "1.5"}) if end == ".safetensors" else torch.save(tensors, good)
    whole = bytearray(good.read_bytes())
    whole[flip % len(whole)] ^= 0x55
    bad = tmp_path / f"bad{end}"
    for data in (content, bytes(whole[:keep]), bytes(whole)):
        bad.write_bytes(data)
        error = refusal(bad)
        assert error is None or (str(bad) in error.message and "\n" not in error.message)


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for content in (torch.zeros(3), [torch.zeros(3)], {"epoch": 3, "unet_state_dict": {"a": torch.zeros(3)}}, {3: torch.zeros(3)}):
        torch.save(content, path)
        with pytest.raises(UsageError, match="layout 'controlnet'"):
            load_state(path, "controlnet")


@pytest.mark.parametrize("scale", ["much", torch.zeros(3), 0.0, float("nan"), -1.0])
def test_a_scale_factor_that_is_no_positive_number_is_refused(tmp_path: Path, scale: Any) -> None:
    torch.save({"unet_state_dict": {"a": torch.zeros(3)}, "scale_factor": scale}, tmp_path / "weights.pt")
    save_file({"a": torch.zeros(3)}, tmp_path / "weights.safetensors", metadata={"scale_factor": str(scale)})
    for end in ("pt", "safetensors"):
        with pytest.raises(UsageError, match="scale factor"):
            load_state(tmp_path / f"weights.{end}", "unet")


# --- writing ------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).t(), "n": torch.arange(5), "b": torch.tensor(1 / 3)}
    full = load_state(save_state(tmp_path / "full.safetensors", tensors, metadata={"scale_factor": "1.25"}, half=False))
    assert full.scale_factor == 1.25
    assert all(torch.equal(full.tensors[key], value) for key, value in tensors.items())
    half = load_state(save_state(tmp_path / "half.safetensors", tensors, metadata={}))
    assert half.scale_factor is None
    assert half.tensors["a"].dtype == torch.float16
    assert torch.equal(half.tensors["a"], tensors["a"].half())
    assert torch.equal(half.tensors["n"], tensors["n"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.safetensors", "half.safetensors"]


def test_missing_weights_name_the_command_that_fetches_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAISI_HOME", str(tmp_path))
    with pytest.raises(CannotRun, match="diff_unet_3d_rflow-mr") as caught:
        locate(model("rflow-mr"), ("unet", "vae"))
    assert caught.value.hint == "maisi models pull rflow-mr"
    with pytest.raises(UsageError, match="lists no weights for its controlnet"):
        locate(model("rflow-mr"), ("controlnet",))
    path = weights_home() / "nvidia" / "NV-Generate-MR" / "main" / "models" / "autoencoder_v2.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    assert locate(model("rflow-mr"), ("vae",)) == {"vae": path}


# --- weights into networks --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def lose(tensors: dict[str, Tensor]) -> str:
    del tensors["conv_in.conv.weight"]
    return "1 keys missing, 0 unexpected, 0 of another shape (missing conv_in.conv.weight)"


def add(tensors: dict[str, Tensor]) -> str:
    tensors["extra.weight"] = torch.zeros(3)
    return "0 keys missing, 1 unexpected, 0 of another shape (unexpected extra.weight)"


def add_projection(tensors: dict[str, Tensor]) -> str:
    """The excess keys of the ddpm-ct files belong to blocks that there are."""
    tensors["nowhere.attn.out_proj.weight"] = torch.zeros(3)
    return "0 keys missing, 1 unexpected, 0 of another shape (unexpected nowhere.attn.out_proj.weight)"


def reshape(tensors: dict[str, Tensor]) -> str:
    tensors["conv_in.conv.weight"] = torch.zeros(8, 4, 3, 3, 1)
    return "0 keys missing, 0 unexpected, 1 of another shape (conv_in.conv.weight is 8x4x3x3x1, not 8x4x3x3x3)"


@pytest.mark.parametrize("change", [lose, add, add_projection, reshape])
def test_weights_that_do_not_fit_are_refused_with_exit_code_2(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in tiny.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "unet.safetensors"
    tensors = dict(load_state(path).tensors)
    said = change(tensors)
    path.unlink()
    save_state(path, tensors, metadata={}, half=False)
    words = ["generate", "--model", str(tmp_path / "tiny.toml"), "--size", "32x32x32", "--spacing", "12x12x12", "--seed", "1", "-q"]
    assert run([*words, "--mode", "image"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"error: {path} does not fit its network: {said}", "  check that file and model belong together"]


@pytest.mark.parametrize("part", ["vae", "unet", "controlnet"])
def test_no_network_is_loaded_in_part(tiny: Path, tmp_path: Path, part: str) -> None:
    """The reference takes whatever fits of a UNet and a ControlNet, and says nothing (number 45)."""
    described = model(str(tiny))
    path = next(described.weight_path(weight) for weight in described.weights if weight.part == part)
    tensors = dict(load_state(path).tensors)
    lost = list(tensors)[-1]
    del tensors[lost]
    short = save_state(tmp_path / "short.safetensors", tensors, metadata={}, half=False)
    with pytest.raises(UsageError, match=rf"1 keys missing, .*\(missing {lost}\)"):
        load(described, [part], device=CPU, precision=FP32, files={part: short})


def test_weights_of_the_other_family_are_refused(shared: Shared) -> None:
    """The reference loads the UNet with strict=False; what it cannot load has other shapes."""
    rflow, ddpm = spec(shared, "rflow"), spec(shared, "ddpm")
    for here, other in ((rflow, ddpm), (ddpm, rflow)):
        files = {weight.part: other.weight_path(weight) for weight in other.weights}
        with pytest.raises(UsageError, match="keys missing"):
            load(here, ["unet"], device=CPU, precision=FP32, files=files)


def test_the_unused_projections_of_ddpm_ct_are_dropped(shared: Shared, tmp_path: Path) -> None:
    """The released ddpm-ct files hold output projections of the attention that were never applied (MONAI issue 7991)."""
    ddpm, rflow = spec(shared, "ddpm"), spec(shared, "rflow")
    weight = next(weight for weight in ddpm.weights if weight.part == "unet")
    content = torch.load(ddpm.weight_path(weight), weights_only=True)
    state = content["unet_state_dict"]
    queries = [key for key in state if key.endswith(".attn.to_q.weight")]
    assert queries
    for key in queries:
        stem, width = key.removesuffix("to_q.weight"), len(state[key])
        state[f"{stem}out_proj.weight"], state[f"{stem}out_proj.bias"] = torch.ones(width, width), torch.ones(width)
    torch.save(content, tmp_path / "unet.pt")
    loaded = load(ddpm, ["unet"], device=CPU, precision=FP32, files={"unet": tmp_path / "unet.pt"}).parts["unet"].state_dict()
    assert not [key for key in loaded if "out_proj" in key]
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    applied = [key for key in build(rflow.networks["unet"]).state_dict() if ".attn.out_proj." in key]
    assert len(applied) == 2 * len(queries)  # where they are applied they are wanted


def test_the_scale_factor_of_the_unet_s_file_comes_first(tiny: Path, tmp_path: Path) -> None:
    model_spec = model(str(tiny))
    files = {weight.part: model_spec.weight_path(weight) for weight in model_spec.weights}
    assert load(model_spec, ["unet"], device=CPU, precision=FP32, files=files).scale_factor == 1.0
    state = load_state(files["unet"])
    files["unet"] = save_state(tmp_path / "unet.safetensors", state.tensors, metadata={"scale_factor": "0.75"})
    loaded = load(model_spec, ["unet", "vae"], device=CPU, precision=FP32, files=files)
    assert loaded.scale_factor == 0.75
    assert loaded.hashes == {part: sha256_of(files[part]) for part in ("unet", "vae")}
    assert not any(parameter.requires_grad for network in loaded.parts.values() for parameter in network.parameters())
    assert not any(network.training for network in loaded.parts.values())
    bare = dataclasses.replace(model_spec, scale_factor=None)
    with pytest.raises(UsageError, match="no scale factor"):
        load(bare, ["vae"], device=CPU, precision=FP32, files=files)
    with pytest.raises(UsageError, match="has no mask_unet"):
        load(model_spec, ["mask_unet"], device=CPU, precision=FP32, files=files)


# --- installing ---------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Run a hub that has the model, pinned."""
    with isolated(monkeypatch, tmp_path / "home") as server:
        (tmp_path / "tiny-hub.toml").write_text(model_text(pins=publish(server)))
        yield server


@pytest.fixture
def on_hub(fake: FakeHub, tmp_path: Path) -> ModelSpec:
    return model(str(tmp_path / "tiny-hub.toml"))


def tree(folder: Path) -> list[str]:
    """Return the files of a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def refused(spec: ModelSpec, says: str, kind: type[MaisiError] = CannotRun, **flags: Any) -> MaisiError:
    """Check that a pull is refused in one line, with a way out."""
    with pytest.raises(kind, match=says) as caught:
        pull(spec, **{"accept_license": True, **flags})
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def test_a_pull_installs_what_the_networks_need_and_nothing_else(fake: FakeHub, on_hub: ModelSpec, tmp_path: Path) -> None:
    """Released checkpoints become safetensors; neither a `.pt`, nor a cache, nor the optimiser's state stays on the disk."""
    done = pull(on_hub, accept_license=True, database=True)
    assert [each.status for each in done] == ["fetched"] * 7
    below = f"home/models/{REPO}/{on_hub.weights[0].revision}"
    files = [*(path.replace(".pt", ".safetensors") for path, _ in FILES.values()), SIZES, MASKS]
    assert tree(tmp_path) == sorted(
        ["tiny-hub.toml", *(f"{below}/{file}" for file in files), *(f"{below}/{file}.origin.json" for file in files)]
    )  # fmt: skip
    assert on_hub.installed("paired")
    for part, path in locate(on_hub, tuple(FILES)).items():
        state = load_state(path)
        released_state = {key: value for key, value in states()[part].items() if ".attn.out_proj." not in key}
        assert state.tensors.keys() == released_state.keys()
        assert all(torch.equal(state.tensors[key], value) for key, value in released_state.items())
        wanted = {"unet": pytest.approx(SCALE, abs=1e-7), "mask_unet": pytest.approx(1.0055984258651733, abs=1e-7)}
        assert state.scale_factor == wanted.get(part)
        assert path.stat().st_size < len(checkpoints()[FILES[part][0]])
    assert len(fake.gets()) == 6  # the seventh file is small and comes from the hub itself
    parts = ["vae", "unet", "controlnet"]
    loaded = load(on_hub, parts, device=CPU, precision=FP32, files=locate(on_hub, parts))
    assert loaded.scale_factor == pytest.approx(SCALE, abs=1e-7)


def test_what_is_installed_is_not_fetched_again(fake: FakeHub, on_hub: ModelSpec) -> None:
    pull(on_hub, accept_license=True)
    fake.asked.clear()
    notes: list[Event] = []
    done = pull(on_hub, offline=True, on_event=notes.append)  # no licence to accept, no network
    assert {each.status for each in done} == {"present"}
    assert fake.asked == []
    assert [note.text for note in notes if isinstance(note, Note)] == [f"left out {MASKS}: add --mask-database for it"]
    pull(on_hub, accept_license=True, database=True)
    assert [each.path for each in fake.gets()] == [f"/{REPO}/{MASKS}"]
    fake.asked.clear()
    assert {each.status for each in pull(on_hub, accept_license=True, force=True)} == {"fetched"}
    assert len(fake.gets()) == 5


def test_the_origin_of_a_file_is_written_beside_it(fake: FakeHub, on_hub: ModelSpec) -> None:
    pull(on_hub, accept_license=True)
    for weight in on_hub.weights[:5]:
        file = on_hub.weight_path(weight)
        origin = store.read_origin(file)
        assert origin is not None
        assert (origin.sha256, origin.bytes) == (sha256_of(file), file.stat().st_size)
        assert (origin.source_sha256, origin.source_bytes) == (weight.sha256, len(checkpoints()[weight.path]))
        assert (origin.repo, origin.path, origin.pinned) == (REPO, weight.path, True)
        assert (origin.licence, origin.commercial) == ("Test Licence", True)


def test_the_same_checkpoint_makes_the_same_bytes(on_hub: ModelSpec, tmp_path: Path) -> None:
    """Records name the sha256 of the converted file, which must not differ from machine to machine."""
    weight = on_hub.weights[1]
    (tmp_path / "unet.pt").write_bytes(checkpoints()[weight.path])
    made = {sha256_of(convert(tmp_path / "unet.pt", tmp_path / f"{k}.safetensors", on_hub, weight)) for k in range(4)}
    assert len(made) == 1


def test_the_autoencoder_of_mr_is_a_layout_of_its_own(on_hub: ModelSpec, tmp_path: Path) -> None:
    """`autoencoder_v2.pt` holds its tensors as `unet_state_dict`."""
    (tmp_path / "v2.pt").write_bytes(saved(released("v2", states()["vae"])))
    state = load_state(convert(tmp_path / "v2.pt", tmp_path / "v2.safetensors", on_hub, on_hub.weights[0]))
    assert all(torch.equal(state.tensors[key], value) for key, value in states()["vae"].items())


@pytest.mark.parametrize("family", ["rflow", "ddpm"])
def test_the_goldens_are_converted_without_loss(shared: Shared, tmp_path: Path, family: str) -> None:
    small = spec(shared, family)
    for weight in small.weights:
        before = load_state(small.weight_path(weight), weight.layout)
        after = load_state(convert(small.weight_path(weight), tmp_path / f"{weight.part}.safetensors", small, weight))
        assert after.scale_factor == before.scale_factor
        assert all(torch.equal(value, before.tensors[key]) for key, value in after.tensors.items())
        assert set(before.tensors) == set(after.tensors)


def test_an_interrupted_pull_goes_on_where_it_stopped(fake: FakeHub, on_hub: ModelSpec, tmp_path: Path) -> None:
    path = FILES["vae"][0]
    fake.cut, fake.down = 20_500, 1
    error = refused(on_hub, "answers 503")
    assert "goes on after the" in str(error.hint)
    (hidden,) = tree(tmp_path / "home")
    assert hidden.endswith(".part")
    assert not on_hub.installed("image")
    fake.asked.clear()
    pull(on_hub, accept_license=True)
    assert next(each for each in fake.gets() if each.path.endswith(path)).headers["range"] == "bytes=20000-"
    assert [check.status for check in verify(on_hub)] == ["ok"] * 6
    assert not [name for name in tree(tmp_path / "home") if ".part" in name]


def test_a_file_that_differs_on_the_way_is_not_kept(fake: FakeHub, on_hub: ModelSpec, tmp_path: Path) -> None:
    path = FILES["vae"][0]
    fake.swap[path] = checkpoints()[path][:-1] + b"x"
    error = refused(on_hub, f"{path} of {REPO} arrived damaged")
    assert error.exit_code == 3
    assert not (tmp_path / "home").exists()
    fake.swap.clear()
    pull(on_hub, accept_license=True)


def test_a_file_that_the_publisher_replaced_is_not_fetched(fake: FakeHub, on_hub: ModelSpec, tmp_path: Path) -> None:
    fake.put(REPO, FILES["mask_unet"][0], b"another")
    assert "update maisi" in str(refused(on_hub, "the hub has another models/mask_generation_diffusion_unet.pt").hint)
    assert fake.gets() == []
    assert not (tmp_path / "home").exists()


def test_a_small_file_is_held_to_its_git_hash(fake: FakeHub, on_hub: ModelSpec) -> None:
    fake.swap[SIZES] = b'[{"organ_size": [0.6]}]'
    refused(on_hub, f"{SIZES} of {REPO} arrived damaged")


def test_without_a_pin_a_file_is_held_to_the_hub_s_own_hash(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "loose.toml").write_text(model_text())
    loose, notes = model(str(tmp_path / "loose.toml")), list[Event]()
    path = FILES["vae"][0]
    fake.swap[path] = checkpoints()[path][:-1] + b"x"
    refused(loose, "arrived damaged")
    fake.swap.clear()
    pull(loose, accept_license=True, on_event=notes.append)
    said = [note.text for note in notes if isinstance(note, Note)]
    assert f"no hash of {path} is known; it was compared with the hub's own hash" in said
    origin = store.read_origin(loose.weight_path(loose.weights[0]))
    assert origin is not None
    assert not origin.pinned


@pytest.mark.parametrize("etag", ["5d41402abc4b2a76b9719d911017c592", "z" * 64])
def test_a_mirror_without_hashes_does_for_pinned_files(fake: FakeHub, on_hub: ModelSpec, tmp_path: Path, etag: str) -> None:
    fake.says = etag
    pull(on_hub, accept_license=True)
    (tmp_path / "loose.toml").write_text(model_text())
    notes: list[Event] = []
    pull(model(str(tmp_path / "loose.toml")), accept_license=True, force=True, on_event=notes.append)
    warned = [note.text for note in notes if isinstance(note, Note) and note.level == "warning"]
    assert f"no hash of {FILES['vae'][0]} is known; it was compared with nothing" in warned


def replaced(fake: FakeHub, tmp_path: Path, part: str, content: bytes) -> ModelSpec:
    """Publish another file for a part, and return the model that is pinned to it."""
    pins = publish(fake)
    pins[FILES[part][0]] = fake.put(REPO, FILES[part][0], content)
    (tmp_path / "other.toml").write_text(model_text(pins=pins))
    return model(str(tmp_path / "other.toml"))


def test_code_in_a_published_checkpoint_is_not_run(fake: FakeHub, tmp_path: Path) -> None:
    content = saved({**released("unet", states()["unet"]), "extra": Bomb(tmp_path / "ran")})
    error = refused(
        replaced(fake, tmp_path, "unet", content), "diff_unet_3d_tiny-ct.pt of maisi-test/tiny is damaged, or holds more", UsageError
    )
    assert error.exit_code == 2
    assert not (tmp_path / "ran").exists()
    assert not [name for name in tree(tmp_path / "home") if "unet" in name]


def without(key: str) -> dict[str, Tensor]:
    return {name: value for name, value in states()["unet"].items() if name != key}


@pytest.mark.parametrize(
    ("part", "content", "says"),
    [
        ("unet", lambda: released("controlnet", states()["controlnet"]), "does not have the layout 'unet'"),
        ("unet", lambda: released("unet", states()["controlnet"]), "keys missing"),
        ("unet", lambda: released("unet", without("conv_in.conv.weight")), "1 keys missing, 0 unexpected"),
        ("unet", lambda: released("unet", {**states()["unet"], "more.weight": torch.zeros(2)}), "0 keys missing, 1 unexpected"),
        ("unet", lambda: {"unet_state_dict": states()["unet"]}, "has no scale factor"),
        ("vae", lambda: {"epoch": 3}, "does not have the layout 'state_dict'"),
        ("vae", lambda: {**states()["vae"], "encoder.blocks.0.attn.out_proj.weight": torch.zeros(2, 2)}, "0 keys missing, 1 unexpected"),
    ],
)
def test_a_published_checkpoint_that_does_not_fit_is_refused(
    fake: FakeHub, tmp_path: Path, part: str, content: Callable[[], Any], says: str
) -> None:
    other = replaced(fake, tmp_path, part, saved(content()))
    error = refused(other, says, UsageError)
    assert f"{FILES[part][0]} of {REPO}" in error.message
    assert ".part" not in error.message
    assert not [name for name in tree(tmp_path / "home") if Path(FILES[part][0]).stem in name]


@pytest.mark.parametrize("name", ["../outside.nii.gz", "/etc/outside", "a/../../outside", "..\\outside", "C:/outside"])
def test_a_mask_database_that_leads_outside_is_refused(fake: FakeHub, tmp_path: Path, name: str) -> None:
    pins = publish(fake)
    pins[MASKS] = fake.put(REPO, MASKS, zipped("all_masks/a.nii.gz", name))
    (tmp_path / "other.toml").write_text(model_text(pins=pins))
    other = model(str(tmp_path / "other.toml"))
    refused(other, "has a member that leads outside", UsageError, database=True)
    assert not other.weight_path(other.weights[-1]).exists()
    assert not [each for each in tree(tmp_path) if "outside" in each or "all_masks" in each]


def test_a_mask_database_that_is_no_zip_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    pins = publish(fake)
    pins[MASKS] = fake.put(REPO, MASKS, zipped("a")[:-10])
    (tmp_path / "other.toml").write_text(model_text(pins=pins))
    refused(model(str(tmp_path / "other.toml")), "is not a whole zip", UsageError, database=True)


def test_a_licence_comes_first(fake: FakeHub, on_hub: ModelSpec, tmp_path: Path) -> None:
    error = refused(on_hub, r"under the Test Licence \(https://example.org/licence; commercial use allowed\)", accept_license=False)
    assert error.exit_code == 3
    assert error.hint == f"read it, then  maisi models pull {on_hub.path} --accept-license"
    research = LICENCE.replace("true", "false")
    (tmp_path / "research.toml").write_text(model_text(licence=research, name="research"))
    refused(model(str(tmp_path / "research.toml")), "does not allow commercial use", commercial=True)
    assert fake.asked == []
    assert not (tmp_path / "home").exists()


def test_a_disk_without_room_is_found_before_anything_is_fetched(
    fake: FakeHub, on_hub: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(map(len, checkpoints().values())) + max(map(len, checkpoints().values())) + 23
    free = need - 1
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    assert "MAISI_HOME" in str(refused(on_hub, "MiB free").hint)
    assert fake.gets() == []
    assert not (tmp_path / "home").exists()
    free = need
    pull(on_hub, accept_license=True)


def test_a_file_that_maisi_did_not_install_is_not_replaced(fake: FakeHub, on_hub: ModelSpec) -> None:
    file = on_hub.weight_path(on_hub.weights[0])
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mine")
    assert "--force" in str(refused(on_hub, "was not installed by maisi", UsageError).hint)
    assert file.read_bytes() == b"mine"
    pull(on_hub, accept_license=True, force=True)
    assert verify(on_hub)[0].status == "ok"


def test_two_commands_do_not_write_at_once(on_hub: ModelSpec) -> None:
    with store.locked():
        refused(on_hub, "another command is changing the installed weights")


@pytest.mark.parametrize(
    ("key", "value"),
    [("path", "../unet.pt"), ("path", "/unet.pt"), ("path", "a/../../unet.pt"), ("path", "a//unet.pt"), ("path", "..\\\\unet.pt"),
     ("repo", "../tiny"), ("repo", "tiny"), ("repo", "a/b/c"), ("revision", "../main"), ("sha256", "12")],
)  # fmt: skip
def test_addresses_that_lead_outside_are_refused_in_a_model_file(tmp_path: Path, key: str, value: str) -> None:
    lines = model_text(pins={FILES["vae"][0]: "0" * 64}).splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith(f"{key} = ") and k > lines.index("[[weights]]"))
    lines[at] = f'{key} = "{value}"'
    (tmp_path / "bad.toml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=f"weights {key}"):
        model(str(tmp_path / "bad.toml"))


def downloads(folder: Path, *parts: str, flat: bool = False) -> Path:
    """Put released files in a folder, as a mirror of the hub or side by side."""
    for part in parts:
        path, _ = FILES[part]
        file = folder / (Path(path).name if flat else path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(checkpoints()[path])
    return folder


@pytest.mark.parametrize("flat", [False, True])
def test_released_files_that_are_here_already_are_taken_from_their_folder(
    fake: FakeHub, on_hub: ModelSpec, tmp_path: Path, flat: bool
) -> None:
    folder = downloads(tmp_path / "downloads", "vae", "unet", "controlnet", flat=flat)
    (folder / SIZES).parent.mkdir(exist_ok=True)
    (folder / SIZES).write_bytes(fake.read(fake.files[REPO, SIZES]))
    before, notes = tree(folder), list[Event]()
    done = pull(on_hub, accept_license=True, source=folder, offline=True, on_event=notes.append)
    assert [each.part for each in done] == ["vae", "unet", "controlnet", "data"]
    assert tree(folder) == before
    assert statuses(verify(on_hub)) == {}
    said = [note.text for note in notes if isinstance(note, Note)]
    assert said == [f"left out {FILES[part][0]}: {folder} does not have it" for part in ("mask_vae", "mask_unet")]
    assert fake.asked == []
    pull(on_hub, accept_license=True)  # what the folder lacked
    assert [Path(each.path).name for each in fake.gets()] == [Path(FILES[part][0]).name for part in ("mask_vae", "mask_unet")]


def test_a_folder_without_the_released_files_is_refused(fake: FakeHub, on_hub: ModelSpec, tmp_path: Path) -> None:
    refused(on_hub, "there is no folder", UsageError, source=tmp_path / "nowhere")
    folder = downloads(tmp_path / "downloads", "vae", "controlnet")
    refused(on_hub, f"has no {FILES['unet'][0]}", UsageError, source=folder)
    other = downloads(folder, "unet") / FILES["unet"][0]
    other.write_bytes(checkpoints()[FILES["controlnet"][0]])
    refused(on_hub, f"{other} is not the released file", UsageError, source=folder)
    assert other.is_file()
    assert not [name for name in tree(tmp_path / "home") if "unet" in name]
    refused(on_hub, "is not accepted yet", source=folder, accept_license=False)


def test_what_arrived_whole_is_kept_when_the_disk_fills_up(
    fake: FakeHub, on_hub: ModelSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file of 2 GB is not fetched twice because there was no room to convert it, or because of Ctrl-C."""
    for error in (CannotRun("no room", hint="free some"), KeyboardInterrupt()):

        def fail(*args: Any, error: BaseException = error, **kwargs: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("maisi_cli.weights.convert", fail)
            with pytest.raises(type(error)):
                pull(on_hub, accept_license=True)
        assert [Path(name).suffix for name in tree(tmp_path / "home")] == [".part"]
    fake.asked.clear()
    pull(on_hub, accept_license=True)
    assert not [each for each in fake.gets() if each.path.endswith(FILES["vae"][0])]


# --- verifying ----------------------------------------------------------------------------------


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.part: check.status for check in checks if check.status != "ok"}


def test_verify_finds_what_changed(fake: FakeHub, on_hub: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="not installed"):
        verify(on_hub)
    pull(on_hub, accept_license=True)
    assert statuses(verify(on_hub)) == {}
    files = {weight.part: on_hub.weight_path(weight) for weight in on_hub.weights[:5]}
    flipped = bytearray(files["vae"].read_bytes())
    flipped[-1] ^= 1
    files["vae"].write_bytes(flipped)
    files["controlnet"].unlink()
    store.origin_path(files["mask_vae"]).unlink()
    (tmp_path / "newer.toml").write_text(model_text(pins={FILES["unet"][0]: "0" * 64}))
    found = verify(model(str(tmp_path / "newer.toml")))
    assert statuses(found) == {"vae": "changed", "unet": "stale", "controlnet": "missing", "mask_vae": "changed"}
    fake.asked.clear()
    pull(on_hub, accept_license=True, force=True)
    assert statuses(verify(on_hub)) == {}


def test_verify_checks_the_fit_where_no_hash_is_known(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = model(str(tmp_path / "tiny.toml"))
    assert {check.detail for check in verify(own)} == {"no hash is known"}
    (tmp_path / "unet.safetensors").write_bytes((tmp_path / "vae.safetensors").read_bytes())
    assert statuses(verify(own)) == {"unet": "unfit"}
    assert statuses(verify(model("nano-ct"))) == {}


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"schema": "maisi.weight/1"}', "more", "bytes"])
def test_a_damaged_origin_is_no_origin(tmp_path: Path, damage: str) -> None:
    file, fields = tmp_path / "a.safetensors", {field.name: field.type for field in dataclasses.fields(store.Origin)}
    whole = {"schema": "maisi.weight/1", **{name: {"str": "a", "int": 1, "bool": True}[str(kind)] for name, kind in fields.items()}}
    wrong = {"more": json.dumps({**whole, "more": 1}), "bytes": json.dumps({**whole, "bytes": "1"})}.get(damage, damage)
    store.origin_path(file).write_text(json.dumps(whole))
    origin = store.read_origin(file)
    assert origin is not None
    store.write_origin(file, dataclasses.replace(origin, path="other"))
    assert store.read_origin(file) == dataclasses.replace(origin, path="other")
    store.origin_path(file).write_text(wrong)
    assert store.read_origin(file) is None


# --- full size --------------------------------------------------------------------------------------

SCALES = {"rflow-ct": 1.0311251878738403, "ddpm-ct": 1.25, "rflow-mr": 0.96240234375, "rflow-mr-brain": 0.9696779847145081}
ADAM = ("diff_unet_3d_rflow",)
"""Files that hold the optimiser's two moments for each weight, which are two thirds of them."""


def full_size(folder: Path, name: str) -> tuple[Path, dict[str, Path]]:
    """Write a released model's checkpoints at full size with random weights, and its model file without pins."""
    about = model(name)
    text = about.path.read_text("utf-8")
    kept = [row for row in text.split("[[weights]]") if 'part = "data"' not in row]
    lines = [line for line in "[[weights]]".join(kept).splitlines() if not line.startswith(("sha256", "git_sha1"))]
    (folder / f"{name}.toml").write_text("\n".join(lines))
    files: dict[str, Path] = {}
    for weight in about.weights:
        if weight.part == "data":
            continue
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in build(about.networks[weight.part]).state_dict().items()}
        tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
        if name == "ddpm-ct" and weight.part in ("unet", "controlnet"):
            for key in [key for key in tensors if key.endswith(".attn.to_q.weight")]:
                stem, width = key.removesuffix("to_q.weight"), len(tensors[key])
                tensors |= {f"{stem}out_proj.weight": torch.randn(width, width), f"{stem}out_proj.bias": torch.randn(width)}
        layout = "v2" if weight.path.endswith("_v2.pt") else weight.layout
        content = released(layout, tensors)
        if "scale_factor" in content and weight.part == "unet":
            content["scale_factor"].fill_(SCALES[name])
            content.pop("optimizer_state_dict")
            if Path(weight.path).name.startswith(ADAM):
                moments = {
                    key: {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)} for key, value in tensors.items()
                }
                content["optimizer_state_dict"] = {"state": moments}
        files[weight.path] = folder / Path(weight.path).name
        torch.save(content, files[weight.path])
        assert files[weight.path].stat().st_size / 2**20 == pytest.approx(weight.mib, rel=0.01)
    return folder / f"{name}.toml", files


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALES)
def test_the_released_checkpoints_are_installed_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Files of the released sizes, layouts and keys: 3.2 GB for rflow-ct, of which 1.8 GB stay."""
    (tmp_path / "published").mkdir()
    path, files = full_size(tmp_path / "published", name)
    with isolated(monkeypatch, tmp_path / "home") as server:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**23)
        here = model(str(path))
        for weight in here.weights:
            assert weight.repo is not None
            server.put(weight.repo, weight.path, files[weight.path])
        began = time.monotonic()
        done = pull(here, accept_license=True)
        print(f"{name}: {sum(file.stat().st_size for file in files.values()) / 2**20:.0f} MiB published, "  # noqa: T201
              f"{sum(each.bytes for each in done) / 2**20:.0f} MiB installed, {time.monotonic() - began:.0f} s, "
              f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")  # fmt: skip
        assert {check.status for check in verify(here)} == {"ok"}
        assert not list((tmp_path / "home").rglob("*.pt")) + list((tmp_path / "home").rglob("*.part"))
        for each in done:
            with torch.device("meta"):
                shapes = build(here.networks[each.part]).state_dict()
            assert each.bytes == pytest.approx(4 * sum(value.numel() for value in shapes.values()), rel=0.001)
        (unet,) = (each.file for each in done if each.part == "unet")
        assert load_state(unet).scale_factor == pytest.approx(SCALES[name], abs=1e-7)
