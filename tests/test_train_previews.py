"""Previews while training: what each trainer shows, that it is the same picture for the same weights, and that it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from maisi_cli.errors import UsageError
from maisi_cli.events import Event, Saved
from maisi_cli.sampling import ddpm_alphas, initial_noise
from maisi_cli.testing import tiny_model
from maisi_cli.train import TrainSettings, previews, train
from maisi_cli.train.controlnet import ControlNetTask
from maisi_cli.train.data import encode, make_phantoms
from maisi_cli.train.diffusion import DiffusionTask
from maisi_cli.train.mask_dm import MaskDiffusionTask
from maisi_cli.train.mask_vae import MaskVaeTask
from maisi_cli.train.vae import VaeTask
from maisi_cli.volumes import Mask, Volume
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from .test_train_masks import with_mask_networks

CPU = torch.device("cpu")
KINDS = ("vae", "dm", "controlnet", "mask-vae", "mask-dm")
TASKS: dict[str, Any] = {
    "vae": VaeTask,
    "dm": DiffusionTask,
    "controlnet": ControlNetTask,
    "mask-vae": MaskVaeTask,
    "mask-dm": MaskDiffusionTask,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and mask networks, three phantoms (one held out), and their latents."""
    root = tmp_path_factory.mktemp("previews")
    tiny_model(root)
    (root / "tiny.toml").write_text(with_mask_networks())
    rows = json.loads(make_phantoms(root / "data", 3, size=32, workers=1).read_text())
    rows["training"][2]["fold"] = 0
    (root / "data" / "list.json").write_text(json.dumps(rows))
    encode(root / "data", root / "vae.safetensors", model=str(root / "tiny.toml"), device="cpu")
    mask_vae = MaskVaeTask(TrainSettings(**settings_of(root, "mask-vae"), kind="mask-vae"), root / "data").network
    save_file(mask_vae.state_dict(), root / "mask_vae.safetensors")
    return root


def settings_of(root: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """Return settings of a short training, with the weights it starts from."""
    table: dict[str, Any] = {
        "model": str(root / "tiny.toml"), "steps": 2, "device": "cpu", "warmup_steps": 1, "lr": 1e-2, "ema_decay": 0.0, "precision": "no",
        "crops": ((4, 4, 4),) if kind in ("dm", "controlnet") else ((16, 16, 16),), "validate_every": 1000, "save_every": 1000,
    }  # fmt: skip
    if kind in ("dm", "controlnet"):
        table["vae"] = str(root / "vae.safetensors")
    if kind == "controlnet":
        table["unet"] = str(root / "unet.safetensors")
    if kind == "mask-dm":
        table["vae"] = str(root / "mask_vae.safetensors")
    return {**table, **changes}


def run(root: Path, kind: str, out: Path, **changes: Any) -> list[Event]:
    said: list[Event] = []
    preset = kind if kind.startswith("mask") else f"nano-{kind}"
    overrides = {"max_minutes": None, **settings_of(root, kind, **changes)}
    train(kind, data=root / "data", out=out, preset=preset, overrides=overrides, on_event=said.append)
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_each_training_shows_what_it_makes_and_changes_nothing(kind: str, folder: Path, tmp_path: Path) -> None:
    said = run(folder, kind, tmp_path / "with", preview_every=1)
    run(folder, kind, tmp_path / "without")
    shown = [event.path for event in said if isinstance(event, Saved) and event.kind == "preview"]
    assert [path.name for path in shown] == ["step_00000001.png", "step_00000002.png"]
    pictures = [np.asarray(Image.open(path)) for path in shown]
    assert pictures[0].shape == pictures[1].shape
    assert np.any(pictures[0] != pictures[1])
    for path in (tmp_path / "with").glob("*.safetensors"):
        other = load_file(tmp_path / "without" / path.name)
        assert all(torch.equal(value, other[key]) for key, value in load_file(path).items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_show_the_same(kind: str, folder: Path) -> None:
    task = TASKS[kind](TrainSettings(**settings_of(folder, kind, preview_every=1), kind=kind), folder / "data" / (
        "latents.json" if kind in ("dm", "controlnet") else "list.json"))  # fmt: skip
    task.to(CPU)
    with torch.no_grad():
        one, two = ({name: item.array for name, item in task.preview(task.network.eval()).items()} for _ in range(2))
        kinds = {name.partition(": ")[2]: type(item) for name, item in task.preview(task.network).items()}
    assert one.keys() == two.keys()
    assert all(np.array_equal(value, two[name]) for name, value in one.items())
    expected: dict[str, dict[str, type]] = {
        "vae": {"": Volume, "given back": Volume},
        "dm": {"made of the noise of seed 0": Volume},
        "controlnet": {"labels": Mask, "made of the noise of seed 0": Volume},
        "mask-vae": {"": Mask, "given back": Mask},
        "mask-dm": {"": Mask},
    }
    assert kinds == expected[kind]


@given(st.integers(0, 2**31), st.booleans())
def test_a_network_that_knows_the_latent_is_shown_it(seed: int, ddpm: bool) -> None:
    """The exact velocity of a straight path, and the exact noise in what DDPM sees, lead to the data."""
    data = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    noise = initial_noise(data.shape, seed)

    def velocity(_x: Tensor, _times: Tensor) -> Tensor:
        return data - noise

    def epsilon(x: Tensor, times: Tensor) -> Tensor:
        kept = ddpm_alphas()[int(times)]
        return (x - kept.sqrt() * data) / (1 - kept).sqrt()

    made = previews.sampled(epsilon if ddpm else velocity, data.shape, seed=seed, ddpm=ddpm, device=CPU)
    assert torch.allclose(made, data, atol=1e-4)


def test_previews_are_to_scale() -> None:
    shades = torch.linspace(0, 1, 8 * 8 * 8).reshape(8, 8, 8)
    flat, tall = (previews.volume_of(shades, (1.0, 1.0, mm), "ct") for mm in (1.0, 2.0))
    assert (flat.array.min(), flat.array.max()) == (-1000, 1000)
    one, two = previews.montage({"a": flat}), previews.montage({"a": tall})
    assert max(one.width, two.width) <= previews.WIDTH_PX
    assert (two.height - previews.CAPTION_PX) / two.width > 1.5 * (one.height - previews.CAPTION_PX) / one.width


@pytest.mark.parametrize("kind", ["dm", "controlnet"])
def test_previews_of_latents_need_the_autoencoder_that_made_them(kind: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="previews of latents need the autoencoder"):
        run(folder, kind, tmp_path / "a", preview_every=1, vae=None)
    other = {key: value + 1 for key, value in load_file(folder / "vae.safetensors").items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="the latents were not made by"):
        run(folder, kind, tmp_path / "a", preview_every=1, vae=str(tmp_path / "other.safetensors"))
    assert not (tmp_path / "a").exists()
