"""`train dm`: the latent diffusion model, as a rectified flow (Liu et al. 2023; target: data minus noise)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..catalog import ModelSpec, modality
from ..catalog import model as find_model
from ..errors import UsageError
from ..networks import build
from ..weights import load_state
from .data import Case, read_list, split
from .losses import distance
from .settings import TrainSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One case in memory: latent (C, x, y, z) float16, labels (4x, 4y, 4z) uint8, spacing in mm, modality id."""

    latent: NDArray[np.float16]
    labels: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    modality: int


def load_cases(cases: Sequence[Case]) -> list[Encoded]:
    """Load latents and labels. Raises `UsageError` for a list without latents and for grids that do not match."""
    loaded = []
    for case in cases:
        if case.latent is None or case.label is None or case.label.suffix != ".npy":
            raise UsageError(f"case {case.id} has no latent", hint="make them:  maisi data encode LIST --out DIR")
        latent, labels = np.load(case.latent), np.load(case.label)
        if tuple(4 * n for n in latent.shape[1:]) != labels.shape:
            raise UsageError(f"case {case.id}: labels {labels.shape} are not 4 times the latent {latent.shape[1:]}",
                             hint="encode the list again")  # fmt: skip
        loaded.append(Encoded(latent=latent, labels=labels, spacing_mm=case.spacing_mm, modality=modality(case.modality).id))
    return loaded


def scale_factor(cases: Sequence[Encoded]) -> float:
    """Return 1 / standard deviation of the latents, over all cases."""
    count = sum(case.latent.size for case in cases)
    mean = sum(float(case.latent.sum(dtype=np.float64)) for case in cases) / count
    variance = sum(float(np.square(case.latent.astype(np.float64) - mean).sum()) for case in cases) / count
    return float(1 / np.sqrt(variance))


def draw_times(settings: TrainSettings, voxels: Sequence[int]) -> Tensor:
    """Draw times in [0, 1000), shifted by latent size as in sampling: r u / (1 + (r - 1) u), r = (N / 32^3)^(1/3) times `time_shift`."""
    size = torch.tensor(voxels, dtype=torch.float32)
    u = torch.rand(len(size)) if settings.timesteps == "uniform" else torch.sigmoid(torch.randn(len(size)))
    ratio = settings.time_shift * (size / 32768) ** (1 / 3)
    return 1000 * ratio * u / (1 + (ratio - 1) * u)


def mix(data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return x_t = (1 - t/1000) data + (t/1000) noise."""
    share = (times / 1000).view(-1, 1, 1, 1, 1)
    return (1 - share) * data + share * noise


Part = tuple[NDArray[np.float16], NDArray[np.uint8]]
"""Latent and labels of the same place."""


def _whole(case: Encoded) -> Part:
    return case.latent, case.labels


def _cut(case: Encoded, crop: tuple[int, int, int], rng: np.random.Generator) -> Part:
    size = [min(n, want) for n, want in zip(case.latent.shape[1:], crop, strict=True)]
    at = [int(rng.integers(n - want + 1)) for n, want in zip(case.latent.shape[1:], size, strict=True)]
    x, y, z = (slice(a, a + n) for a, n in zip(at, size, strict=True))
    fine_x, fine_y, fine_z = (slice(4 * a, 4 * (a + n)) for a, n in zip(at, size, strict=True))
    return case.latent[:, x, y, z], case.labels[fine_x, fine_y, fine_z]


def _body_voxels(part: Part) -> int:
    return int(np.count_nonzero(part[1]))


class DiffusionTask:
    """Velocity regression on latents; modality is dropped now and then for classifier-free guidance."""

    name = "unet"

    def __init__(self, settings: TrainSettings, data: Path, *, network: str = "unet") -> None:
        self.settings = settings
        self.spec: ModelSpec = find_model(settings.model)
        torch.manual_seed(settings.seed)
        self.network: nn.Module = build(self.spec.networks[network])
        training, held = split(read_list(data), settings.fold)
        self.cases, self.held = load_cases(training), load_cases(held[:4])
        self.scale = scale_factor(self.cases)
        if settings.init:
            state = load_state(Path(settings.init))
            self.network.load_state_dict({key: value.float() for key, value in state.tensors.items()})
            self.scale = state.scale_factor or self.scale  # fine-tuning keeps the scale of the weights it starts from

    def to(self, device: torch.device) -> None:
        """Nothing frozen to move."""

    def batch(self, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Draw whole volumes (a share `whole_share`, one at a time) or one of `crops`, in latent voxels.

        Of two places for a crop the one with more body in it is taken: much of a volume is air, soon learned.
        """
        chosen = [self.cases[int(rng.integers(len(self.cases)))] for _ in range(self.settings.batch_size)]
        if rng.random() < self.settings.whole_share:
            return self._stack(chosen[:1], None, rng)
        return self._stack(chosen, self.settings.crops[int(rng.integers(len(self.settings.crops)))], rng)

    def _stack(self, cases: Sequence[Encoded], crop: tuple[int, int, int] | None, rng: np.random.Generator) -> dict[str, Tensor]:
        latents, labels = [], []
        for case in cases:
            latent, label = _whole(case) if crop is None else max((_cut(case, crop, rng) for _ in range(2)), key=_body_voxels)
            latents.append(latent.astype(np.float32))
            labels.append(label[None])
        classes = [case.modality if rng.random() >= self.settings.modality_dropout else 0 for case in cases]
        return {
            "latent": torch.from_numpy(np.stack(latents)) * self.scale,
            "labels": torch.from_numpy(np.stack(labels)),
            "spacing": torch.tensor([case.spacing_mm for case in cases], dtype=torch.float32) * 100,
            "class": torch.tensor(classes, dtype=torch.long),
            "voxels": torch.tensor([int(np.prod(case.latent.shape[1:])) for case in cases]),
        }

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the distance between predicted and true velocity."""
        latent = batch["latent"]
        times = draw_times(self.settings, batch["voxels"].tolist()).to(latent.device)
        noise = torch.randn(latent.shape).to(latent.device)
        return distance(self.predict(network, mix(latent, noise, times), times, batch), latent - noise, self.settings.loss), {}

    def predict(self, network: nn.Module, x: Tensor, times: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the network's velocity."""
        return network(x=x, timesteps=times, spacing_tensor=batch["spacing"], class_labels=batch["class"])  # type: ignore[no-any-return]

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return the loss at four fixed times with fixed noise, on whole held-out volumes."""
        device = next(network.parameters()).device
        rng = np.random.default_rng(0)
        losses: dict[float, list[float]] = {}
        for index, case in enumerate(self.held):
            batch = {key: value.to(device) for key, value in self._stack([case], None, rng).items()}
            batch["class"] = torch.full_like(batch["class"], case.modality)
            noise = torch.randn(batch["latent"].shape, generator=torch.Generator().manual_seed(index)).to(device)
            for time in (100.0, 350.0, 650.0, 900.0):
                at = torch.tensor([time], device=device)
                made = self.predict(network, mix(batch["latent"], noise, at), at, batch)
                losses.setdefault(time, []).append(float(distance(made, batch["latent"] - noise, "l2")))
        means = {f"t{int(time)}": float(np.mean(values)) for time, values in losses.items()}
        return {"score": float(np.mean(list(means.values()))), **means}

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that are written."""
        return (self.name,)

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each part by their names in it."""
        return {self.name: dict(tensors)}

    def metadata(self, part: str) -> dict[str, str]:
        """Name the part and its latent scale."""
        return {"part": part, "scale_factor": repr(self.scale)}


def task(settings: TrainSettings, data: Path) -> DiffusionTask:
    """Return the task of `train dm`."""
    return DiffusionTask(settings, latent_list(data))


def latent_list(data: Path) -> Path:
    """Return the list of latents of a data folder, or the list that is named. Raises `UsageError` for a folder without one."""
    if not data.is_dir():
        return data
    path = data / "latents.json"
    if not path.is_file():
        raise UsageError(f"{data} holds no latents (there is no {path.name})", hint=f"make them:  maisi data encode {data}")
    return path
