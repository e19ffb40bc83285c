"""`train vae`: the reference's losses, augmentation, the perceptual distance, and what `--eval-only` finds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from maisi_cli import cli, networks
from maisi_cli.errors import UsageError
from maisi_cli.testing import tiny_model
from maisi_cli.train import TrainSettings, adversarial, patches, train
from maisi_cli.train.data import make_phantoms, read_list, split
from maisi_cli.train.evaluation import Evaluation, Judged, evaluate, judge, ms_ssim, reconstructed
from maisi_cli.train.losses import distance, kl_divergence
from maisi_cli.train.perceptual import Perceptual
from maisi_cli.train.vae import VaeTask
from maisi_cli.volumes import read_image, read_mask
from maisi_cli.weights import load_state, save_state
from safetensors.torch import load_file
from torch import Tensor, nn

from . import golden

Shared = Callable[[str], Path]


# --- against the reference ------------------------------------------------------------------------------


def test_steps_of_the_autoencoder_and_its_discriminator_are_the_reference_s(shared: Shared) -> None:
    """Reconstruction, KL and both sides of the adversarial loss of the first step; the reconstruction with the reference's noise."""
    case = golden.case(shared, "t60_train_vae")
    spec = golden.spec(shared, "rflow")
    vae = networks.build(spec.networks["vae"])
    opponent = adversarial.discriminator(channels=8)
    opponent.load_state_dict(torch.load(shared("golden/t60_train_vae/discriminator_init.pt"), weights_only=True))
    told = case.meta["scalars"]["steps"][0]
    image, mean, sigma = case.tensor("image_0"), case.tensor("z_mu_0"), case.tensor("z_sigma_0")
    made = case.tensor("reconstruction_0")
    assert float(distance(made, image, "l1")) == pytest.approx(told["recons"], rel=1e-6)
    assert float(kl_divergence(mean, sigma)) == pytest.approx(told["kl"], rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(adversarial.judged(opponent, made), case.tensor("disc_fake_0"), rtol=1e-4, atol=1e-5)
        generator = adversarial.least_squares(adversarial.judged(opponent, made), True)
        loss, parts = adversarial.opponent_loss(opponent, made, image)
    assert float(generator) == pytest.approx(told["gen_adv"], rel=1e-5)
    assert float(parts["fake"]) == pytest.approx(told["d_fake"], rel=1e-4)
    assert float(parts["real"]) == pytest.approx(told["d_real"], rel=1e-5)
    assert float(loss) == pytest.approx(told["loss_d"], rel=1e-5)
    assert told["recons"] + 1e-7 * told["kl"] + 0.1 * float(generator) == pytest.approx(told["loss_g"], rel=1e-5)
    assert sum(each.numel() for each in vae.parameters()) == told["ae_after"]["n"]
    assert sum(each.numel() for each in adversarial.discriminator().parameters()) == pytest.approx(2.77e6, rel=0.01)


# --- closed forms -----------------------------------------------------------------------------------------


@given(st.floats(-4, 4))
def test_least_squares_of_a_constant(value: float) -> None:
    leaky = value if value > 0 else 0.05 * value
    found = torch.full((1, 1, 2, 2, 2), value)
    assert float(adversarial.least_squares(found, True)) == pytest.approx((leaky - 1) ** 2, rel=1e-4, abs=1e-6)
    assert float(adversarial.least_squares(found, False)) == pytest.approx(leaky**2, rel=1e-4, abs=1e-6)


def test_equal_volumes_have_an_ms_ssim_of_one_and_noise_lowers_it() -> None:
    image = torch.rand(1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    assert ms_ssim(image, image) == pytest.approx(1, abs=1e-5)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    values = [ms_ssim(image + size * noise, image) for size in (0.02, 0.1, 0.5)]
    assert values == sorted(values, reverse=True)
    assert math.isnan(ms_ssim(image[..., :8], image[..., :8]))


class Shifted(nn.Module):
    """An autoencoder that adds a constant to each intensity, or noise of a known deviation."""

    def __init__(self, shift: float, noise: float = 0.0) -> None:
        super().__init__()
        self.shift, self.noise = nn.Parameter(torch.tensor(shift)), noise

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image, torch.zeros_like(image)

    def decode(self, latent: Tensor) -> Tensor:
        return latent + self.shift + self.noise * torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    make_phantoms(path / "data", 3, size=32, workers=1)
    tiny_model(path / "model")
    return path


def settings_of(folder: Path, **changes: Any) -> TrainSettings:
    base = {"kind": "vae", "model": str(next((folder / "model").glob("*.toml"))), "crops": ((16, 16, 16),), "batch_size": 2, "seed": 1}
    return TrainSettings(**{**base, **changes})


def test_a_shift_is_the_error_of_every_organ_and_noise_has_its_psnr(folder: Path) -> None:
    case = read_list(folder / "data")[0]
    found = judge(Shifted(0.01), case, settings_of(folder), thorough=True)
    assert found.figures["soft_mae_hu"] == pytest.approx(20, rel=1e-3)
    assert len(found.organs) > 5
    assert all(error == pytest.approx(20, rel=1e-3) for error in found.organs.values())
    noisy = judge(Shifted(0.0, 0.1), case, settings_of(folder), perceptual=Perceptual())
    assert -10 * math.log10(noisy.figures["squared"]) == pytest.approx(20, abs=0.1)
    assert noisy.figures["ssim"] < judge(Shifted(0.0), case, settings_of(folder)).figures["ssim"] == pytest.approx(1, abs=1e-6)
    assert noisy.figures["perceptual"] > 0
    exact = judge(Shifted(0.0), case, settings_of(folder), perceptual=Perceptual())
    assert exact.figures["perceptual"] == pytest.approx(0, abs=1e-8)


def test_windows_and_patches_are_what_is_looked_at(folder: Path) -> None:
    case = read_list(folder / "data")[0]
    seen: list[tuple[int, ...]] = []

    class Looking(Shifted):
        def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(tuple(image.shape[2:]))
            return super().encode(image)

    judge(Looking(0.0), case, settings_of(folder, val_patch_size=(16, 16, 8)))
    assert seen == [(16, 16, 8)]
    seen.clear()
    judge(Looking(0.0), case, settings_of(folder, val_window=(16, 16, 8)))
    assert set(seen) == {(16, 16, 8)}
    assert len(seen) > 1


# --- the perceptual distance --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maisi-slices", "random"])
def test_the_perceptual_distance_is_named_grows_with_blur_and_teaches(name: str) -> None:
    distance_of = Perceptual(name, share=1.0)
    assert name.split("-")[0] in distance_of.label
    image = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    near, far = image.clone(), torch.nn.functional.avg_pool3d(image, 3, 1, 1)
    assert float(distance_of(near, image)) == pytest.approx(0, abs=1e-8)
    made = far.requires_grad_(True)
    loss = distance_of(made, image)
    assert float(loss.detach()) > 0.01
    loss.backward()
    assert float(made.grad.abs().max()) > 0  # type: ignore[union-attr]
    assert all(not each.requires_grad for each in distance_of.parameters())
    before = {key: value.clone() for key, value in distance_of.state_dict().items()}
    distance_of.train()
    distance_of(made, image)
    assert all(torch.equal(value, before[key]) for key, value in distance_of.state_dict().items())  # not even its statistics
    assert len(distance_of.maps(image[:, :, 0])) >= 4


def test_a_share_of_slices_is_drawn() -> None:
    counts: list[int] = []

    class Counting(Perceptual):
        def of_slices(self, made: Tensor, target: Tensor) -> Tensor:
            counts.append(len(made))
            return super().of_slices(made, target)

    image = torch.rand(2, 1, 20, 10, 5)
    Counting(share=0.2)(image, image)
    assert counts == [2 * 4, 2 * 2, 2 * 1]


# --- patches ----------------------------------------------------------------------------------------------------


@profile(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["ct", "mr"]))
def test_changes_come_from_the_generator_alone(seed: int, kind: str) -> None:
    patch = np.random.default_rng(0).random((12, 12, 8), np.float32)
    one, two = (patches.changed(patch, kind, np.random.default_rng(seed)) for _ in range(2))
    assert one.shape == patch.shape
    assert np.array_equal(one, two)
    assert np.isfinite(one).all()


def test_a_random_scale_is_within_a_tenth() -> None:
    patch = np.full((4, 4, 4), 0.5, np.float32)
    values = [float(patches.changed(patch, "ct", np.random.default_rng(seed)).mean()) for seed in range(200)]
    assert min(values) >= 0.5 * 0.9 - 0.05 - 1e-5
    assert max(values) <= 0.5 * 1.1 + 0.05 + 1e-5
    assert 0.3 < np.mean([abs(value - 0.5) > 1e-6 for value in values]) < 0.7  # 1 - 0.7^2


@pytest.mark.parametrize("cache", [0.0, 0.5, 1.0])
def test_what_is_kept_in_memory_changes_nothing(folder: Path, cache: float) -> None:
    whole = VaeTask(settings_of(folder), folder / "data")
    part = VaeTask(settings_of(folder, cache=cache), folder / "data")
    one, two = (task.batch(np.random.default_rng(5)) for task in (whole, part))
    assert torch.equal(one["image"], two["image"])
    assert one["ids"] == two["ids"]
    assert len(part.volumes._kept) == round(cache * len(part.volumes))


def test_zoomed_patches_have_the_size_that_is_asked_for(folder: Path) -> None:
    task = VaeTask(settings_of(folder, random_aug=True, spacing_type="rand_zoom", batch_size=12), folder / "data")
    batch = task.batch(np.random.default_rng(0))["image"]
    assert batch.shape == (12, 1, 16, 16, 16)
    assert torch.equal(batch, task.batch(np.random.default_rng(0))["image"])


def test_a_fixed_spacing_resamples_and_keeps_the_field_of_view(folder: Path) -> None:
    case = read_list(folder / "data")[0]
    assert case.image is not None
    before = read_image(case.image)
    spacing = tuple(2 * each for each in before.geometry.spacing)
    after = patches.read(case, settings_of(folder, spacing_type="fixed", spacing=spacing)).array
    assert after.shape == tuple(round(n / 2) for n in before.geometry.size)
    assert float(after.mean()) == pytest.approx(float(np.clip(before.array, -1024, 3000).mean()), abs=25)


def test_a_channel_of_an_mr_image_is_scaled_by_its_percentiles(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = rng.gamma(2, 100, (12, 12, 12, 2)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 2, 2, 1])), tmp_path / "mr.nii.gz")
    case = dataclasses.replace(read_list(folder / "data")[0], image=tmp_path / "mr.nii.gz", label=None, modality="mri-t1")
    for channel in (0, 1):
        source = patches.read(case, settings_of(folder, select_channel=channel))
        low, high = np.percentile(array[..., channel], (0, 99.5))
        assert source.kind == "mr"
        assert np.sort(source.array.ravel())[-1] == pytest.approx((array[..., channel].max() - low) / (high - low), rel=1e-2)  # not clipped
    with pytest.raises(UsageError, match="2 channels, and number 2"):
        patches.read(case, settings_of(folder, select_channel=2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"spacing_type": "random"}, "original, fixed or rand_zoom"), ({"spacing_type": "fixed"}, "three lengths in mm"),
        ({"spacing_type": "rand_zoom"}, "random_aug"), ({"perceptual_weight": -1.0}, "0, or more"), ({"cache": 2.0}, "between 0 and 1"),
        ({"adversarial_weight": 0.1}, "32 voxels"),
        ({"val_window": (30, 32, 32)}, "multiples of 4"), ({"val_patch_size": (32, 32)}, "three multiples"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        settings_of(folder, **changes)


# --- from end to end ---------------------------------------------------------------------------------------------


def test_all_losses_train_together_and_go_on_bit_equal(folder: Path, tmp_path: Path) -> None:
    changes = {"train.model": settings_of(folder).model, "train.crops": [[32, 32, 32]], "train.batch_size": 1, "train.max_minutes": None,
               "train.perceptual_weight": 0.3, "train.adversarial_weight": 0.1, "train.adversarial_channels": 4, "train.precision": "no",
               "train.random_aug": True, "train.spacing_type": "rand_zoom",
               "train.validate_every": 100, "train.schedule": "constant"}  # fmt: skip
    whole = train("vae", data=folder / "data", out=tmp_path / "whole", overrides={**changes, "train.steps": 4})
    train("vae", data=folder / "data", out=tmp_path / "parts", overrides={**changes, "train.steps": 2})
    parts = train("vae", data=folder / "data", out=tmp_path / "parts", overrides={**changes, "train.steps": 4}, resume="auto")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert {"recon", "kl", "perceptual", "adversarial", "opponent_loss", "fake", "real"} <= set(steps[0])
    for name in ("average", "opponent", "opponent_optimiser"):
        one, two = (
            load_file(folder_ / "checkpoints" / "step_00000004" / f"{name}.safetensors") for folder_ in (whole.parent, parts.parent)
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert (
        load_state(whole.with_name("discriminator.safetensors")).tensors.keys()
        == load_file(whole.parent / "checkpoints" / "step_00000004" / "opponent.safetensors").keys()
    )


def test_eval_only_judges_held_out_cases_and_writes_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(folder)
    weights = save_state(tmp_path / "vae.safetensors", VaeTask(settings, folder / "data").network.state_dict(), metadata={}, half=False)
    del weights
    line = ["train", "vae", "--data", str(folder / "data"), "--out", str(tmp_path / "out"), "--eval-only", "--set",
            f'train.model="{settings.model}"']  # fmt: skip
    assert cli.run([*line, "--init", str(tmp_path / "vae.safetensors"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["schema"] == "maisi.vae-evaluation/1"
    (row,) = told["rows"]
    assert (row["modality"], row["images"]) == ("ct", 1)
    assert row["psnr_db"] > 0
    assert {each["label"] for each in told["organs"]} >= {"liver", "body"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json"]
    assert cli.run([*line, "--init", str(tmp_path / "vae.safetensors")]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.run([*line, "--init", str(tmp_path / "vae.safetensors"), "--force"]) == 0
    out = capsys.readouterr()
    assert "psnr db" in out.out
    assert "not LPIPS" in out.err
    assert cli.run([*line, "--force"]) == 2
    assert "--init" in capsys.readouterr().err
    save_state(tmp_path / "other.safetensors", {"strange": torch.zeros(1)}, metadata={}, half=False)
    assert cli.run([*line, "--init", str(tmp_path / "other.safetensors"), "--force"]) == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("option", "value"), [("--resume", "auto"), ("--accumulate", "2"), ("--keep-last", "2"), ("--overfit", "1"), ("--gpus", "2")]
)
def test_eval_only_refuses_what_is_for_training(
    option: str, value: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "vae", "--data", str(folder / "data"), "--out", str(tmp_path / "out"), "--eval-only"]
    assert cli.run([*line, option, value]) == 2
    assert f"--eval-only trains nothing, and {option} is for training" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_organs_are_judged_at_the_spacing_that_is_asked_for(folder: Path) -> None:
    """Labels go with their image: the mean error of an organ is that of the resampled image inside the resampled label."""
    settings = settings_of(folder)
    case = split(read_list(folder / "data"), 0)[1][0]
    network = VaeTask(settings, folder / "data").network.eval()
    spacing = tuple(2 * mm for mm in case.spacing_mm)
    coarse = dataclasses.replace(settings, spacing_type="fixed", spacing=spacing)
    organs = judge(network, case, coarse, thorough=True).organs
    assert {1, 200} <= set(organs)
    found = reconstructed(network, case, coarse)
    assert found.spacing_mm == pytest.approx(spacing)
    labels = read_mask(case.label).array[1::2, 1::2, 1::2]
    assert labels.shape == found.source.array.shape
    apart = (found.made - found.image)[0, 0].abs().numpy()[labels == 1].mean() * 2000
    assert organs[1] == pytest.approx(float(apart), rel=1e-4)


def test_an_autoencoder_is_judged_as_if_it_ran_on_the_whole_volume(folder: Path) -> None:
    """Slabs give what `encode` and `decode` give."""
    settings = settings_of(folder)
    case = split(read_list(folder / "data"), 0)[1][0]
    network = VaeTask(settings, folder / "data").network.eval()
    found = reconstructed(network, case, settings)
    with torch.no_grad():
        mean, _ = network.encode(found.image)  # type: ignore[operator]
        whole = network.decode(mean)  # type: ignore[operator]
    assert found.latent_std == pytest.approx(float(mean.std()), rel=1e-5)
    torch.testing.assert_close(found.made, whole, rtol=0, atol=1e-4 * float(whole.max() - whole.min()))


def test_the_discriminator_learns_from_its_own_loss_alone(folder: Path) -> None:
    task = VaeTask(settings_of(folder, adversarial_weight=0.1, crops=((32, 32, 32),)), folder / "data")
    batch = task.batch(np.random.default_rng(0))
    assert task.opponent is not None
    loss, _ = task.loss(task.network, batch)
    loss.backward()
    assert all(weight.grad is None for weight in task.opponent.parameters())
    assert any(weight.grad is not None for weight in task.network.parameters())
    task.opponent_loss(task.opponent, batch)[0].backward()
    assert all(weight.grad is not None for weight in task.opponent.parameters())


def test_an_evaluation_averages_over_cases() -> None:
    figures = [{"squared": 10.0**-k, "ssim": 0.1 * k, "latent_std": 1.0} for k in (1, 3)]
    cases = tuple(Judged(id=str(k), modality="ct", figures=each, organs={1: 10.0 + 20 * k}) for k, each in enumerate(figures))
    (row,) = Evaluation(model="m", weights="w", sha256="", perceptual="p", cases=cases).rows()
    assert (row["psnr_db"], row["ssim"], row["images"]) == (pytest.approx(20), pytest.approx(0.2), 2)
    assert row["perceptual"] is None
    assert Evaluation(model="m", weights="w", sha256="", perceptual="p", cases=cases).organs()[0]["mae_hu"] == 20


def test_weights_are_needed(folder: Path) -> None:
    with pytest.raises(UsageError, match="no weights to judge"):
        evaluate(folder / "data", settings_of(folder))
