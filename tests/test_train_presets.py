"""The training presets: each can be used, and the published ones hold the published numbers (reference.md section 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from maisi_cli import estimates, presets
from maisi_cli.catalog import model
from maisi_cli.geometry import parse_size
from maisi_cli.train.settings import settings_from

FOLDER = Path(presets.__file__).parent.parent / "presets" / "train"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"vae-{n}": {"crops": ((n,) * 3,), "lr": 1e-4, "kl_weight": 1e-7, "perceptual_weight": 0.3, "perceptual_share": 0.2, "loss": "l1",
                    "adversarial_weight": 0.1, "adversarial_channels": 32, "random_aug": True, "spacing_type": "rand_zoom", "cache": 0.5,
                    "val_window": (96, 96, 64), "batch_size": 1, "optimiser": "adam", "eps": 1e-6, "select_channel": 0}
       for n in (64, 128)},
    **{f"dm-{name}": {"lr": 1e-5, "batch_size": batch, "loss": "l1", "schedule": "polynomial", "optimiser": "adam", "whole_share": 1.0,
                      "modality_dropout": 0.1, "modality_generalise": 0.1, "timesteps": "uniform", "time_shift": 1.0}
       for name, batch in (("ddpm-ct", 1), ("rflow-ct", 2), ("rflow-mr", 1), ("rflow-mr-brain", 1))},
    **{f"controlnet-{name}": {"lr": 1e-5, "batch_size": 1, "loss": "l1", "schedule": "polynomial", "optimiser": "adamw",
                              "weight_decay": 0.01, "weighted_loss": 100.0, "whole_share": 1.0, "train_unet": False}
       for name in ("ddpm-ct", "rflow-ct", "rflow-mr")},
}  # fmt: skip
PUBLISHED["controlnet-rflow-ct"] |= {"weighted_labels": ("lung tumor",), "contrastive_weight": 0.01, "contrastive_delta": 2.0}


def kind_of(name: str) -> str:
    """Return the kind of training in a preset's file."""
    return str(presets.train_preset(name)["kind"])


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_can_be_used(name: str) -> None:
    settings = settings_from(kind_of(name), name)
    spec = model(settings.model)
    parts = {"vae": ["vae"], "dm": ["unet"], "controlnet": ["unet", "controlnet"], "mask-vae": ["mask_vae"], "mask-dm": ["mask_unet"]}
    assert all(part in spec.networks for part in parts[settings.kind])


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_presets_hold_the_published_numbers(name: str) -> None:
    settings = settings_from(kind_of(name), name)
    assert {key: getattr(settings, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    assert settings.model == name.split("-", 1)[1] if kind_of(name) != "vae" else settings.model == "rflow-ct"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("finetune")])
def test_what_a_preset_says_of_its_memory_is_what_is_planned(name: str) -> None:
    summary = presets.preset(name, "train").summary
    size = summary.split("volumes to ")[1].split(",")[0]
    said = float(summary.split(", ")[-1].split(" GiB")[0])
    settings = settings_from(kind_of(name), name)
    spec, again = model(settings.model), settings.recompute
    figures = estimates.train_step(spec, settings.kind, parse_size(size), batch=settings.batch_size, checkpointing=again)
    assert figures is not None
    assert figures.peak_gib == pytest.approx(said, abs=0.06)
    assert figures.peak_gib * (1 + estimates.MARGIN) + 1 < float(name.rsplit("-", 1)[1].removesuffix("g"))
