"""Whole runs of the reference from a command line, and from Python, to files, with a model file of the golden checkpoints.

Injected are what the reference drew (the noise, the draws of DDPM, the seed that masks of the database are varied with), and
for `p23` what the mask decoder's argmax gave; everything else is ours.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import maisi_cli
import nibabel
import numpy as np
import pytest
import torch
from maisi_cli import cli
from maisi_cli.masks import database, denoising
from torch import Tensor

from .golden import Golden, Shared, case, model_file, worst

HALF_HU = 0.5
"""What rounding to int16 may add; the reference cuts fractions off, or stores float32."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One golden case: its settings as flags name them, and the files of the reference."""

    case: str
    settings: Mapping[str, str]
    image: str = "image"
    label: str | None = None
    family: str = "rflow"
    modalities: tuple[str, ...] = ("ct",)
    beyond: tuple[float, float] = (0.1, 0.05)
    """The largest and the mean deviation in HU that the reference's own numerics explain."""


COMMON = {"compat": "reference", "on_qc_fail": "keep", "decoder": "exact", "device": "cpu", "dtype": "fp32", "seed": "1", "name": "made"}
BODY = {"preset": "chest-abdomen", "size": "64x64x64", "spacing": "1.5x1.5x2"}
IMAGE = {**BODY, "mode": "image", "steps": "10"}
RUNS = [
    Run(case="p10_image_only_rflow_64", settings=IMAGE),
    Run(case="p11_image_only_ddpm_64", settings=IMAGE, family="ddpm"),
    Run(case="p12_image_only_rflow_64_cfg_mr", modalities=("ct", "mri-t1"),
        settings={**IMAGE, "spacing": "1x1.1x1.3", "steps": "6", "modality": "mri-t1", "cfg_modality": "2.5"}),
    Run(case="p20_paired_rflow_db_exact", image="image_0", label="label_0",
        settings={**BODY, "steps": "5", "mask_source": "database", "anatomy": "liver,spleen,left lung upper lobe",
                  "mask_database": "golden/datasets/candidate_masks_small.json"}),
    Run(case="p23_paired_rflow_maskgen", image="image_0", label="label_0",
        settings={**BODY, "preset": "chest", "steps": "5", "mask_source": "diffusion", "mask_steps": "5",
                  "anatomy_size": "liver=0.9,hepatic tumor=0.3"}),
    Run(case="p30_from_mask_rflow_64", settings={"steps": "5", "mask": "golden/datasets/user_mask_64.nii.gz"}),
]  # fmt: skip
HALF = Run(case="p10_image_only_rflow_64_fp16ac", settings={**IMAGE, "dtype": "fp16"}, beyond=(13, 0.9))
SHARED = ("mask", "mask_database")


def inject(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Give a run the noise and draws of the reference; return a check that all of them were taken."""
    starts = [golden.tensor(name) for name in ("mask_step00_input", "step00_input") if name in golden.arrays]
    masks = "mask_step00_input" in golden.arrays
    draws = golden.draws[1:-1] if masks else golden.draws[1:]  # the first and, with a mask diffusion, the last are the starts

    def initial_noise(shape: tuple[int, ...], _seed: int) -> Tensor:
        assert tuple(shape) == tuple(starts[0].shape)
        return starts.pop(0)

    def draw(like: Tensor, _generator: object) -> Tensor:
        assert like.shape == draws[0].shape
        return draws.pop(0)

    monkeypatch.setattr("maisi_cli.sampling.initial_noise", initial_noise)
    monkeypatch.setattr("maisi_cli.sampling._draw", draw)
    vary = database.augment
    monkeypatch.setattr(database, "augment", lambda labels, **options: vary(labels, **{**options, "seed": golden.meta["seed"]}))
    if masks:
        decode = denoising.decode

        def decoded(nets: Any, latent: Tensor, **how: Any) -> np.ndarray:
            """Where two channels are equally likely rounding decides, which no comparison should cross."""
            assert worst(latent, golden.tensor("mask_decode_input")) < 1e-4
            wanted = golden.arrays["mask_decode_argmax"][0]
            assert float((decode(nets, latent, **how) != wanted).mean()) < 1e-4
            return wanted

        monkeypatch.setattr(denoising, "decode", decoded)

    def all_taken() -> None:
        assert (starts, draws) == ([], [])

    return all_taken


def by_command(settings: Mapping[str, str]) -> None:
    words = [f"--{key.replace('_', '-')} {shlex.quote(value)}" for key, value in settings.items()]
    assert cli.run(["generate", *shlex.split(" ".join(words)), "--keep-latent", "--no-preview", "--out", "."]) == 0


def by_python(settings: Mapping[str, str]) -> None:
    (sample,) = maisi_cli.generate(**settings, keep_latent=True, preview=False, out=".")
    assert sample.paths["image"] == Path("made_image.nii.gz")


@pytest.mark.parametrize("way", [by_command, by_python])
@pytest.mark.parametrize("run", [*RUNS, pytest.param(HALF, marks=pytest.mark.slow)], ids=lambda run: run.case)
def test_files_are_the_reference_s(
    run: Run, way: Callable[[Mapping[str, str]], None], shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = case(shared, run.case)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    all_taken = inject(golden, monkeypatch)
    settings = {key: str(shared(value)) if key in SHARED else value for key, value in run.settings.items()}
    path = model_file(shared, run.family, tmp_path / "model", modalities=run.modalities)
    way({**COMMON, **settings, "model": str(path)})
    all_taken()
    latent = torch.from_numpy(np.load("made_latent.npy"))[None]
    close = 1e-4 if settings.get("dtype") != "fp16" else 3e-3
    assert worst(latent, golden.tensor("decode_input")) < close
    wanted, made = (nibabel.load(each) for each in (shared(f"golden/{run.case}/{run.image}.nii.gz"), Path("made_image.nii.gz")))
    assert np.allclose(made.affine, wanted.affine)
    values, theirs = np.asarray(made.dataobj), np.asarray(wanted.dataobj)
    assert values.dtype == np.int16
    away = np.abs(values.astype(np.float64) - theirs)
    largest, mean = run.beyond
    cut = HALF_HU * (theirs.dtype == np.int16)
    assert away.max() <= largest + HALF_HU + cut
    assert away.mean() <= mean + HALF_HU
    if run.label is None:
        return
    wanted, made = (nibabel.load(each) for each in (shared(f"golden/{run.case}/{run.label}.nii.gz"), Path("made_label.nii.gz")))
    assert np.allclose(made.affine, wanted.affine)
    assert np.array_equal(np.asarray(made.dataobj), np.asarray(wanted.dataobj))
