"""The released models at full size, with random weights, from the command line to the files: `pytest -m slow`, minutes each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from maisi_cli.anatomy import BODY, maisi, remap_table
from maisi_cli.catalog import model
from maisi_cli.networks import build
from maisi_cli.weights import save_state

from .test_weights import SCALES

pytestmark = pytest.mark.slow

MASK_SCALE = 1.0055984258651733
SMALLEST = [
    ("ddpm-ct", "256x256x128", "1.5x1.5x2", "chest-abdomen", "paired --mask-source phantom"),
    ("rflow-ct", "256x256x128", "1.5x1.5x2", "chest-abdomen", "paired --mask-source phantom"),
    ("rflow-mr", "128x128x128", "2x2x2", "prostate-t2", "image"),
    ("rflow-mr-brain", "128x128x128", "1.6x1.6x1.6", "brain-t1-axial", "image"),
]
"""Each released model with the smallest size that it takes."""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Return a folder for installed weights, which are gone when the test is over."""
    yield tmp_path / "home"
    shutil.rmtree(tmp_path / "home")


def install(home: Path, name: str, parts: Collection[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put random weights of the released shapes where the installed ones lie; what starts as zero is random too."""
    monkeypatch.setenv("MAISI_HOME", str(home))
    spec = model(name)
    torch.manual_seed(1)
    for weight in spec.weights:
        if weight.part == "data" and "anatomy_size" in weight.path:
            spec.weight_path(weight).parent.mkdir(parents=True, exist_ok=True)
            spec.weight_path(weight).write_text(json.dumps([{"organ_size": [0.5] * 5 + [-1.0] * 5}]))
        if weight.part not in parts:
            continue
        tensors = build(spec.networks[weight.part]).state_dict()
        for value in tensors.values():
            if value.ndim > 1 and not bool(value.any()):
                value.normal_(std=0.02)
        if weight.part == "mask_vae":  # of 125 channels that are equally likely the body would win almost nowhere
            (body,) = (channel for channel, label in enumerate(remap_table("raw125").table()[:125]) if label == BODY)
            (bias,) = (value for key, value in tensors.items() if key.endswith("bias") and len(value) == 125)
            bias[body] += 1
        scale = {"unet": SCALES[name], "mask_unet": MASK_SCALE}.get(weight.part)
        save_state(spec.weight_path(weight), tensors, half=False,
                   metadata={} if scale is None else {"scale_factor": str(scale)})  # fmt: skip


def generate(*words: str, folder: Path) -> dict[str, Any]:
    """Run `maisi generate` in a process of its own; return its sample, and say how long it took and what it held."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    line = [sys.executable, "-m", "maisi_cli", "generate", *words, "--seed", "1", "--on-qc-fail", "keep", "--out", "run", "--json"]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sample: dict[str, Any] = json.loads(done.stdout)
    record = json.loads((folder / sample["record"]).read_text("utf-8"))
    assert record["timing"]["seconds"] == sample["seconds"]
    seconds = ", ".join(f"{stage} {taken:.1f} s" for stage, taken in sample["seconds"].items())
    print(f"\n{' '.join(words)}: {seconds}; peak {sample['peak_gib']:.1f} GiB")  # noqa: T201
    return record | {"sample": sample}


def volume(path: Path, size: str, spacing: str) -> Any:
    """Return the voxels of a file, which lie on this grid."""
    image = nibabel.load(path)
    assert image.shape == tuple(map(int, size.split("x")))
    assert nibabel.affines.voxel_sizes(image.affine) == pytest.approx(list(map(float, spacing.split("x"))))
    assert np.array_equal(image.get_sform(coded=True)[0], image.affine)
    assert np.allclose(image.get_qform(coded=True)[0], image.affine, atol=1e-4)
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    return np.asarray(image.dataobj)


@pytest.mark.parametrize(("name", "size", "spacing", "preset", "flags"), SMALLEST, ids=[row[0] for row in SMALLEST])
def test_each_released_model_runs_at_its_smallest_size(
    name: str, size: str, spacing: str, preset: str, flags: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, *more = flags.split()
    parts = model(name).parts_for(mode)
    install(home, name, parts, monkeypatch)
    about = generate("--preset", preset, "--model", name, "--size", size, "--spacing", spacing, "--mode", mode, *more, "--steps", "2",
                     "--keep-latent", folder=tmp_path)  # fmt: skip
    sample = about["sample"]
    assert [weight["part"] for weight in about["model"]["weights"]] == list(parts)
    latent = np.load(tmp_path / sample["latent"])
    assert latent.shape == (4, *(int(n) // 4 for n in size.split("x")))
    assert np.isfinite(latent).all()
    assert latent.std() > 0.1
    image = volume(tmp_path / sample["image"], size, spacing)
    assert image.dtype == np.int16
    shown = np.ones(image.shape, bool)
    if mode == "paired":
        label = volume(tmp_path / sample["label"], size, spacing)
        assert label.dtype == np.uint8
        assert BODY in label
        shown = label > 0
        assert (image[~shown] == -1000).all()
    assert len(np.unique(image[shown])) > 100
    assert image[shown].std() > 1


def test_the_mask_networks_run_at_full_size(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(home, "rflow-ct", ("mask_vae", "mask_unet"), monkeypatch)
    about = generate("--model", "rflow-ct", "--size", "256x256x256", "--spacing", "1.5", "--mode", "mask", "--mask-source", "diffusion",
                     "--mask-steps", "2", folder=tmp_path)  # fmt: skip
    assert {weight["part"] for weight in about["model"]["weights"]} == {"mask_vae", "mask_unet"}
    label = volume(tmp_path / about["sample"]["label"], "256x256x256", "1.5x1.5x1.5")
    assert label.dtype == np.uint8
    found = set(map(int, np.unique(label)))
    assert BODY in found
    assert len(found) > 2
    assert all(value in maisi() for value in found - {0})
