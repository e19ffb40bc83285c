"""How well an autoencoder gives volumes back: PSNR, SSIM, MS-SSIM, a perceptual distance, and the error of each organ in HU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import streaming
from ..anatomy import maisi
from ..catalog import model as find_model
from ..errors import UsageError
from ..events import OnEvent, Stage, Step, ignore
from ..files import refuse_overwriting, write_atomic
from ..geometry import Triple
from ..networks import device_named, frozen
from .lists import Case, read_list, split
from .patches import Source, labels_of, read
from .perceptual import Perceptual
from .settings import TrainSettings

HU = 2000.0
"""Hounsfield units of the intensity range [0, 1]."""
_SOFT = (0.4, 0.65)  # -200 to 300 HU


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What was found of one case: figures by name, and the mean absolute error in HU of each organ's voxels, by label id."""

    id: str
    modality: str
    figures: Mapping[str, float]
    organs: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """A case and what an autoencoder gives back of its part `where`: intensities (1, 1, X, Y, Z) float32."""

    source: Source
    where: tuple[slice, slice, slice]
    image: Tensor
    made: Tensor
    latent_std: float

    @property
    def spacing_mm(self) -> Triple:
        """Voxel size."""
        return self.source.geometry.spacing


def reconstructed(network: Any, case: Case, settings: TrainSettings) -> Reconstruction:
    """Encode a case and decode the mean of its latent: the whole volume slab by slab, a central patch, or in windows."""
    source = read(case, settings)
    where = _part(source.array.shape, settings)
    image = torch.from_numpy(source.intensities(source.array[where]))[None, None].to(next(network.parameters()).device)
    with torch.no_grad():
        made, std = _both_ways(network, image, settings)
    return Reconstruction(source=source, where=where, image=image, made=made, latent_std=std)


def judge(
    network: Any, case: Case, settings: TrainSettings, *, perceptual: Perceptual | None = None, thorough: bool = False
) -> Judged:  # fmt: skip
    """Encode and decode one case (the latent's mean) and compare: on the whole volume, a central patch, or in windows.

    `squared` is the mean squared error of intensities in [0, 1], SSIM's range is 1. `thorough` adds MS-SSIM, and the organs'
    errors where the case has a label map.
    """
    from monai.metrics.regression import SSIMMetric

    found = reconstructed(network, case, settings)
    made, image, source = found.made, found.image, found.source
    with torch.no_grad():
        figures = {"squared": float((made - image).square().mean()), "latent_std": found.latent_std}
        if min(image.shape[2:]) >= 11:
            figures["ssim"] = float(torch.as_tensor(SSIMMetric(spatial_dims=3, data_range=1.0)(made, image)).mean())
        else:
            figures["ssim"] = math.nan
        if perceptual is not None:
            figures["perceptual"] = _perceptual(perceptual, made, image)
        if source.kind == "ct":
            inside = (image > _SOFT[0]) & (image < _SOFT[1])
            if bool(inside.any()):
                figures["soft_mae_hu"] = float((made - image).abs()[inside].mean()) * HU
        if thorough:
            figures["ms_ssim"] = ms_ssim(made, image)
    organs = _organs(case, found) if thorough and source.kind == "ct" else {}
    return Judged(id=case.id, modality=case.modality, figures=figures, organs=organs)


def _part(shape: Sequence[int], settings: TrainSettings) -> tuple[slice, slice, slice]:
    wanted = settings.val_patch_size or tuple(shape)
    size = [min(n // 4 * 4, want) for n, want in zip(shape, wanted, strict=True)]
    start = [(n - each) // 2 for n, each in zip(shape, size, strict=True)] if settings.val_patch_size else [0, 0, 0]
    x, y, z = (slice(a, a + n) for a, n in zip(start, size, strict=True))
    return x, y, z


def _both_ways(network: Any, image: Tensor, settings: TrainSettings) -> tuple[Tensor, float]:
    """Return the reconstruction in float32, and the deviation of the latent."""
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    stds: list[float] = []
    sharded = hasattr(next(network.parameters()), "full_tensor")  # its own methods gather what other processes hold
    slabs = isinstance(network, AutoencoderKlMaisi) and not sharded

    def run(part: Tensor) -> Tensor:
        mean = streaming.encoded(network, part) if slabs else network.encode(part)[0]
        stds.append(float(mean.float().std()))
        made: Tensor = torch.cat(list(streaming.decoded(network, mean)), dim=2) if slabs else network.decode(mean)
        return made.float()

    if settings.val_window is None:
        return run(image), stds[0]
    from monai.inferers.utils import sliding_window_inference

    roi = [min(n, w) for n, w in zip(image.shape[2:], settings.val_window, strict=True)]
    made = sliding_window_inference(image, roi, 1, run, overlap=0.0)
    assert isinstance(made, Tensor)
    return made, float(np.mean(stds))


def _perceptual(perceptual: Perceptual, made: Tensor, image: Tensor) -> float:
    """Return the distance over all slices across z, a few at a time."""
    ours, theirs = (each.movedim(4, 1).flatten(0, 1) for each in (made, image))
    values = [float(perceptual.of_slices(a, b)) * len(a) for a, b in zip(ours.split(16), theirs.split(16), strict=True)]
    return sum(values) / len(ours)


def ms_ssim(made: Tensor, image: Tensor) -> float:
    """Return MS-SSIM (Wang et al. 2003) with as many of its five scales as volumes (1, 1, X, Y, Z) hold windows of 11 voxels."""
    from monai.metrics.regression import MultiScaleSSIMMetric

    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    scales = max(1, min(5, int(math.log2(min(image.shape[2:]) / 11)) + 1)) if min(image.shape[2:]) >= 11 else 0
    if scales == 0:
        return math.nan
    metric = MultiScaleSSIMMetric(spatial_dims=3, data_range=1.0, weights=[each / sum(weights[:scales]) for each in weights[:scales]])
    return float(torch.as_tensor(metric(made, image)).mean())


def _organs(case: Case, found: Reconstruction) -> dict[int, float]:
    labels = labels_of(case, found.source.geometry)
    if labels is None:
        return {}
    apart = (found.made - found.image)[0, 0].abs().cpu().numpy()
    inside = labels[found.where].reshape(-1)
    count = np.bincount(inside, minlength=256)
    total = np.bincount(inside, weights=apart.reshape(-1), minlength=256)
    return {int(label): float(total[label] / count[label]) * HU for label in np.flatnonzero(count) if label}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The means over cases, by modality, and over the organs of all."""

    model: str
    weights: str
    sha256: str
    perceptual: str
    cases: tuple[Judged, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each modality: images, PSNR of the mean squared error of each, SSIM, MS-SSIM, perceptual distance, HU."""
        found = []
        for modality in dict.fromkeys(case.modality for case in self.cases):
            mine = [case for case in self.cases if case.modality == modality]

            def mean(name: str, mine: Sequence[Judged] = mine) -> float | None:
                values = [case.figures[name] for case in mine if not math.isnan(case.figures.get(name, math.nan))]
                return float(np.mean(values)) if values else None

            psnr = float(np.mean([-10 * math.log10(max(case.figures["squared"], 1e-20)) for case in mine]))
            names = ("perceptual", "ssim", "ms_ssim", "soft_mae_hu", "latent_std")
            found.append({"modality": modality, "images": len(mine), "psnr_db": psnr, **{name: mean(name) for name in names}})
        return found

    def organs(self) -> list[dict[str, Any]]:
        """Return the mean absolute error of each organ over the cases that have it."""
        labels = sorted({label for case in self.cases for label in case.organs})
        return [{"id": label, "label": maisi().name_of(label), "images": len(values), "mae_hu": float(np.mean(values))}
                for label in labels if (values := [case.organs[label] for case in self.cases if label in case.organs])]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Return what `train vae --eval-only --json` prints."""
        return {"schema": "maisi.vae-evaluation/1", "model": self.model, "weights": self.weights, "sha256": self.sha256,
                "perceptual": self.perceptual, "rows": self.rows(), "organs": self.organs(),
                "cases": [{"id": case.id, "modality": case.modality, **{k: None if math.isnan(v) else v for k, v in case.figures.items()}}
                          for case in self.cases]}  # fmt: skip


def evaluate(
    data: Path, settings: TrainSettings, *, out: Path | None = None, force: bool = False, on_event: OnEvent = ignore
) -> Evaluation:  # fmt: skip
    """Judge the weights `settings.init` on the held-out cases of a list; with `out` also write `evaluation.json` there.

    Raises `UsageError` without weights, and for those that do not fit the model.
    """
    if settings.init is None:
        raise UsageError("there are no weights to judge", hint="add --init FILE")
    target = None if out is None else out / "evaluation.json"
    if target is not None:
        refuse_overwriting(target, force=force)
    path = Path(settings.init)
    network, state = frozen(find_model(settings.model).networks["vae"], path)
    device = device_named(settings.device)
    network.to(device)
    perceptual = Perceptual(settings.perceptual).to(device)
    _, held = split(read_list(data), settings.fold)
    on_event(Stage(name="evaluate", detail=f"{len(held)} held-out cases"))
    cases = []
    for done, case in enumerate(held, 1):
        cases.append(judge(network, case, settings, perceptual=perceptual, thorough=True))
        on_event(Step(stage="evaluate", done=done, total=len(held)))
    made = Evaluation(model=settings.model, weights=str(path), sha256=state.sha256, perceptual=perceptual.label, cases=tuple(cases))
    if target is not None:
        import json

        write_atomic(target, json.dumps(made.as_dict(), indent=1).encode())
    return made
