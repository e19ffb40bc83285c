"""`train dm`: the latent diffusion model, on latents that were made ahead.

A rectified flow (Liu et al. 2023; target: data minus noise), or DDPM (Ho et al. 2020; target: the noise), as the model samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..catalog import Modality, ModelSpec, modality
from ..catalog import model as find_model
from ..errors import UsageError
from ..networks import build, fill
from ..sampling import ddpm_alphas
from ..volumes import Mask, Volume
from ..weights import load_state
from . import previews
from .data import Case, read_list, split
from .lists import Regions, data_hashes
from .losses import distance
from .settings import TrainSettings

VALIDATED = (100.0, 350.0, 650.0, 900.0)
"""The times at which held-out cases are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One case on disk, mapped to memory: latent (C, x, y, z) float16, labels (4x, 4y, 4z) uint8, spacing in mm, modality.

    `regions` are the one-hot rows (4,) of its top and its bottom body region, where the list has them.
    """

    id: str
    latent: NDArray[np.float16]
    labels: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    modality: Modality
    regions: Regions | None = None


def load_cases(cases: Sequence[Case], *, labelled: bool = False) -> list[Encoded]:
    """Open latents and labels; a case without a label is background, where not `labelled`.

    Raises `UsageError` for a list without latents, grids that do not match, and latents of more than one VAE.
    """
    vaes = {case.vae_sha256 for case in cases if case.vae_sha256}
    if len(vaes) > 1:
        raise UsageError(f"the latents of the list are of {len(vaes)} VAEs", hint="encode all of them with one:  maisi data encode LIST")
    loaded = []
    for case in cases:
        if case.latent is None or (case.label is not None and case.label.suffix != ".npy"):
            raise UsageError(f"case {case.id} has no latent", hint="make them:  maisi data encode LIST --out DIR")
        latent = np.load(case.latent, mmap_mode="r")
        size = tuple(4 * n for n in latent.shape[1:])
        if case.label is None and labelled:
            raise UsageError(f"case {case.id} has no label", hint="a ControlNet is trained on labels: give each case one")
        labels = np.load(case.label, mmap_mode="r") if case.label is not None else np.broadcast_to(np.uint8(0), size)
        if size != labels.shape:
            raise UsageError(f"case {case.id}: labels {labels.shape} are not 4 times the latent {latent.shape[1:]}",
                             hint="encode the list again")  # fmt: skip
        loaded.append(Encoded(id=case.id, latent=latent, labels=labels, spacing_mm=case.spacing_mm, modality=modality(case.modality),
                              regions=case.regions))  # fmt: skip
    return loaded


def scale_factor(latents: Iterable[NDArray[np.float16]]) -> float:
    """Return 1 / standard deviation over all latents."""
    sums = [(each.size, float(each.sum()), float(np.square(each).sum())) for each in (np.asarray(latent, np.float64) for latent in latents)]
    count, total, squares = (sum(column) for column in zip(*sums, strict=True))
    return float(1 / np.sqrt(squares / count - (total / count) ** 2))


def spread_of_scales(cases: Sequence[Encoded]) -> tuple[float, float]:
    """Return the smallest and the largest scale factor that a single case would give."""
    each = [1 / float(np.asarray(case.latent, np.float64).std()) for case in cases]
    return min(each), max(each)


def draw_times(settings: TrainSettings, voxels: Sequence[int]) -> Tensor:
    """Draw times in [0, 1000), shifted by latent size as in sampling: r u / (1 + (r - 1) u), r = (N / 32^3)^(1/3) times `time_shift`."""
    u = torch.rand(len(voxels)) if settings.timesteps == "uniform" else torch.sigmoid(torch.randn(len(voxels)))
    return shifted(u, voxels, settings.time_shift)


def shifted(u: Tensor, voxels: Sequence[int], shift: float = 1.0) -> Tensor:
    """Return the times of a flow for uniform draws: later for larger latents."""
    ratio = shift * (torch.tensor(voxels, dtype=torch.float32) / 32768) ** (1 / 3)
    return 1000 * ratio * u / (1 + (ratio - 1) * u)


def mix(data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return x_t = (1 - t/1000) data + (t/1000) noise."""
    share = (times / 1000).view(-1, 1, 1, 1, 1)
    return (1 - share) * data + share * noise


def diffuse(data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return x_t = sqrt(a_t) data + sqrt(1 - a_t) noise, with the cumulative products `a` of DDPM's schedule at whole times."""
    kept = ddpm_alphas().to(data.device)[times.long()].view(-1, 1, 1, 1, 1)
    return kept.sqrt() * data + (1 - kept).sqrt() * noise


def generalised(modality: int, rng: np.random.Generator, *, share: float, dropout: float) -> int:
    """Return a modality, with probability `share` that of its kind (CT 1, MR 8) where it is a special one, and with `dropout` 0.

    So that the model knows images of no known contrast, and can be guided (reference.md 5.2, step 3).
    """
    kind = 1 if 2 <= modality <= 7 else 8 if modality >= 9 else modality
    found = kind if rng.random() < share else modality
    return 0 if rng.random() < dropout else found


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
    """Regression of the velocity of a flow, or of DDPM's noise, on latents; modality is dropped now and then for guidance."""

    name = "unet"
    labelled = False
    """Whether every case must have labels."""

    def __init__(self, settings: TrainSettings, data: Path, *, network: str = "unet") -> None:
        self.settings = settings
        self.generalise, self.dropout = settings.modality_generalise, settings.modality_dropout
        self.spec: ModelSpec = find_model(settings.model)
        self.ddpm = self.spec.scheduler.get("name") == "ddpm"
        self.takes_regions = bool(self.spec.networks["unet"].arguments.get("include_top_region_index_input"))
        torch.manual_seed(settings.seed)
        self.network: nn.Module = build(self.spec.networks[network])
        training, held = split(read_list(data), settings.fold)
        self.cases, self.held = (load_cases(each, labelled=self.labelled) for each in (training, held[:4]))
        if self.takes_regions:
            require_regions([*self.cases, *self.held])
        self.scale = scale_factor(case.latent for case in self.cases)
        low, high = spread_of_scales(self.cases)
        self.notes = [f"scale factor {self.scale:.4f} over {len(self.cases)} cases; of single ones {low:.4f} to {high:.4f}"]
        self.data_hashes = data_hashes(data, [*training, *held])
        if settings.init:
            state = load_state(Path(settings.init))
            self.notes += start_from(self.network, state.tensors, Path(settings.init), partial=settings.init_partial)
            if state.scale_factor is not None:  # fine-tuning keeps the scale of the weights it starts from
                self.scale = state.scale_factor
                self.notes.append(f"scale factor {self.scale:.4f} as in {settings.init}, not that of these latents")
        made_by = {case.vae_sha256 for case in [*training, *held] if case.vae_sha256}
        self.shown_by = previews.autoencoder(settings, self.spec, made_by) if settings.preview_every else None

    def to(self, device: torch.device) -> None:
        """Move the frozen autoencoder of the previews."""
        if self.shown_by is not None:
            self.shown_by.to(device)

    def batch(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Draw whole volumes of one size (a share `whole_share`) or one of `crops`, in latent voxels.

        Of two places for a crop the one with more body in it is taken: much of a volume is air, soon learned.
        """
        whole = rng.random() < self.settings.whole_share
        first = self.draw_case(rng)
        peers = [each for each in self.cases if each.latent.shape == first.latent.shape] if whole else None
        chosen = [first, *(self.draw_case(rng, peers) for _ in range(self.settings.batch_size - 1))]
        crop = None if whole else self.settings.crops[int(rng.integers(len(self.settings.crops)))]
        return self._stack(chosen, crop, rng)

    def draw_case(self, rng: np.random.Generator, among: Sequence[Encoded] | None = None) -> Encoded:
        """Draw one training case, or one of `among`."""
        cases = among or self.cases
        return cases[int(rng.integers(len(cases)))]

    def _stack(self, cases: Sequence[Encoded], crop: tuple[int, int, int] | None, rng: np.random.Generator) -> dict[str, Any]:
        latents, labels = [], []
        for case in cases:
            latent, label = _whole(case) if crop is None else max((_cut(case, crop, rng) for _ in range(2)), key=_body_voxels)
            latents.append(latent.astype(np.float32))
            labels.append(np.asarray(label)[None])
        classes = [generalised(case.modality.id, rng, share=self.generalise, dropout=self.dropout) for case in cases]
        made = {
            "ids": [case.id for case in cases],
            "latent": torch.from_numpy(np.stack(latents)) * self.scale,
            "labels": torch.from_numpy(np.stack(labels)),
            "spacing": torch.tensor([case.spacing_mm for case in cases], dtype=torch.float32) * 100,
            "class": torch.tensor(classes, dtype=torch.long),
            "voxels": torch.tensor([int(np.prod(case.latent.shape[1:])) for case in cases]),
        }
        if self.takes_regions:
            made |= {name: torch.tensor([case.regions[k] for case in cases], dtype=torch.float32) * 100  # type: ignore[index]
                     for k, name in enumerate(("top", "bottom"))}  # fmt: skip
        return made

    # --- the loss ---------------------------------------------------------------------------------

    def loss(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the distance between prediction and target."""
        latent, times, noise = self.noised(batch)
        made = self.predict(network, self.at(latent, noise, times), times, batch)
        return distance(made, self.target(latent, noise), self.settings.loss), {}

    def noised(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents, and the times and noise that are drawn for them with torch's generator."""
        latent = batch["latent"]
        count = len(batch["voxels"])
        times = torch.randint(0, 1000, (count,)) if self.ddpm else draw_times(self.settings, batch["voxels"].tolist())
        return latent, times.to(latent.device), torch.randn(latent.shape).to(latent.device)

    def at(self, latent: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return the latent with noise, at each time."""
        return diffuse(latent, noise, times) if self.ddpm else mix(latent, noise, times)

    def target(self, latent: Tensor, noise: Tensor) -> Tensor:
        """Return what is predicted: a flow's velocity, data minus noise, or DDPM's noise."""
        return noise if self.ddpm else latent - noise

    def predict(self, network: nn.Module, x: Tensor, times: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the network's prediction."""
        return network(x=x, timesteps=times, **self.inputs(batch))  # type: ignore[no-any-return]

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what a diffusion model is told beside the latent and the time."""
        arguments = self.spec.networks["unet"].arguments
        made: dict[str, Tensor] = {}
        if arguments.get("include_spacing_input"):
            made["spacing_tensor"] = batch["spacing"]
        if arguments.get("num_class_embeds"):
            made["class_labels"] = batch["class"]
        if self.takes_regions:
            made |= {"top_region_index_tensor": batch["top"], "bottom_region_index_tensor": batch["bottom"]}
        return made

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return the loss at four fixed times with fixed noise, on whole held-out volumes."""
        device = next(network.parameters()).device
        losses: dict[float, list[float]] = {}
        for index, case in enumerate(self.held):
            batch = self.held_batch(case, device)
            noise = torch.randn(batch["latent"].shape, generator=torch.Generator().manual_seed(index)).to(device)
            for time in VALIDATED:
                at = torch.tensor([time], device=device)
                made = self.predict(network, self.at(batch["latent"], noise, at), at, batch)
                losses.setdefault(time, []).append(float(distance(made, self.target(batch["latent"], noise), "l2")))
        means = {f"t{int(time)}": float(np.mean(values)) for time, values in losses.items()}
        return {"score": float(np.mean(list(means.values()))), **means}

    def held_batch(self, case: Encoded, device: torch.device) -> dict[str, Any]:
        """Return a whole held-out case as a batch, with its own modality."""
        batch = self._stack([case], None, np.random.default_rng(0))
        batch["class"] = torch.full_like(batch["class"], case.modality.id)
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def preview(self, network: nn.Module) -> dict[str, Volume | Mask]:
        """Return what is made of fixed noise, told what held-out cases are."""
        shown: dict[str, Volume | Mask] = {}
        device = next(network.parameters()).device
        for seed, case in enumerate(self.held[: previews.CASES]):
            batch = self.held_batch(case, device)

            def denoise(x: Tensor, times: Tensor, batch: Mapping[str, Any] = batch) -> Tensor:
                return self.predict(network, x, times, batch)

            latent = previews.sampled(denoise, batch["latent"].shape, seed=seed, ddpm=self.ddpm, device=device) / self.scale
            shown |= self.told(case)
            shown[f"{case.id}: made of the noise of seed {seed}"] = previews.image_of(
                self.shown_by, latent, case.spacing_mm, case.modality.name
            )
        return shown

    def told(self, case: Encoded) -> dict[str, Volume | Mask]:
        """Return what is shown beside the image of a held-out case: nothing, as the model is told no place."""
        return {}

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


def require_regions(cases: Sequence[Encoded]) -> None:
    """Raise `UsageError` for a case whose body regions the list does not tell."""
    for case in cases:
        if case.regions is None:
            raise UsageError(f"case {case.id} has no body regions, which this model is told",
                             hint="add top_region_index and bottom_region_index, such as [0, 1, 0, 0], to the list")  # fmt: skip


def start_from(network: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, partial: bool = False) -> list[str]:
    """Fill a network with weights; with `partial` those that it has in the same shape, which is told.

    Raises `UsageError` that names the keys that do not fit.
    """
    if not partial:
        fill(network, tensors, path)
        return []
    wanted = network.state_dict()
    same = {key: value.float() for key, value in tensors.items() if key in wanted and wanted[key].shape == value.shape}
    if not same:
        raise UsageError(f"{path} has no weight that fits", hint="is it of another network?")
    network.load_state_dict({**wanted, **same})
    return [f"{len(same)} of {len(wanted)} tensors are from {path}, the others start anew"]


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
