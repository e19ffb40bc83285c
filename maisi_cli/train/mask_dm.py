"""`train mask-dm`: the diffusion model of label maps, told ten anatomy sizes (DDPM, Ho et al. 2020).

Beside the weights it writes `all_anatomy_size_conditions.json`, the sizes of the bodies that it was trained on, from which
`generate` completes what the user names, and `model.toml`, a model file of it all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import streaming
from ..catalog import model as find_model
from ..errors import UsageError
from ..files import write_atomic
from ..masks.denoising import likeliest, to_labels
from ..masks.sizes import ABSENT, FILE, SLOTS
from ..networks import binarise, build, frozen
from ..volumes import Mask, Volume
from ..weights import load_state
from . import bodies, mask_model, previews
from .diffusion import VALIDATED, diffuse, scale_factor, start_from
from .lists import data_hashes, read_list, split
from .losses import distance
from .settings import TrainSettings

HELD = 4
LARGEST = "largest_ml"
"""The key of an exported file for the volumes that the sizes are shares of."""

Latent = NDArray[np.float16]


class MaskDiffusionTask:
    """Regression of the noise in the latents of bodies; a share `size_dropout` of the sizes is told as absent.

    The bodies are encoded once the device is known (`to`), and only their latents stay; the autoencoder too where previews
    are asked for.
    """

    name = "mask_unet"
    parts = ("mask_unet",)

    def __init__(self, settings: TrainSettings, data: Path) -> None:
        if not settings.vae:
            raise UsageError("train mask-dm needs the mask autoencoder's weights", hint="add --vae FILE")
        self.settings = settings
        self.spec = find_model(settings.model)
        self.grid = bodies.cube(self.spec)
        torch.manual_seed(settings.seed)
        self.network: nn.Module = build(self.spec.networks["mask_unet"])
        path = Path(settings.vae)
        vae, state = frozen(self.spec.networks["mask_vae"], path)
        self.vae: nn.Module | None = vae
        training, held = split(read_list(data), settings.fold)
        self.data_hashes = {**data_hashes(data, [*training, *held]), "mask vae": state.sha256}
        self.ids, self.held_ids = [case.id for case in training], [case.id for case in held[:HELD]]
        self.packed = list(bodies.read_bodies([*training, *held[:HELD]], self.spec))
        volumes = [body.volumes_ml for body in self.packed]
        seen, unseen = volumes[: len(training)], volumes[len(training) :]
        self.notes = bodies.told_of_lost(self.packed)
        self.scale, self.largest = 0.0, bodies.largest_of(seen)
        if settings.init:
            self._start_from(Path(settings.init))
        self.vectors, self.held_vectors = bodies.vectors(seen, self.largest), bodies.vectors(unseen, self.largest)
        self.latents: list[Latent] = []
        self.held: list[Latent] = []

    def _start_from(self, init: Path) -> None:
        """Take over weights, and the scales with which they were trained: of latents and, where the file tells them, of sizes."""
        state = load_state(init)
        self.notes += start_from(self.network, state.tensors, init, partial=self.settings.init_partial)
        self.scale = state.scale_factor or 0.0
        known = largest_in(init)
        if known:
            self.largest = known
        else:
            self.notes.append(f"{init} does not tell what its sizes are shares of: they are of these bodies' largest")

    def to(self, device: torch.device) -> None:
        """Encode the bodies."""
        if self.latents:
            return
        assert self.vae is not None
        vae = self.vae.to(device)
        latents = [encoded(vae, body, device) for body in self.packed]
        self.latents, self.held = latents[: len(self.ids)], latents[len(self.ids) :]
        self.vae, self.packed = vae if self.settings.preview_every else None, []
        kept = "as in the weights it starts from"
        if not self.scale:
            self.scale, kept = scale_factor(self.latents), f"over {len(self.latents)} bodies"
        self.notes.append(f"scale factor {self.scale:.4f} {kept}")

    def batch(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Draw whole bodies with their sizes."""
        chosen = [int(rng.integers(len(self.latents))) for _ in range(self.settings.batch_size)]
        sizes = np.array([self.vectors[k] for k in chosen], np.float32)
        sizes[rng.random(sizes.shape) < self.settings.size_dropout] = ABSENT
        return {
            "latent": self._scaled([self.latents[k] for k in chosen]),
            "sizes": torch.from_numpy(sizes),
            "ids": [self.ids[k] for k in chosen],
        }

    def _scaled(self, latents: Sequence[Latent]) -> Tensor:
        return torch.from_numpy(np.stack(latents).astype(np.float32)) * self.scale

    def loss(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the distance between predicted and true noise."""
        latent = batch["latent"]
        times = torch.randint(0, 1000, (len(latent),)).to(latent.device)
        noise = torch.randn(latent.shape).to(latent.device)
        return distance(self.predict(network, diffuse(latent, noise, times), times, batch["sizes"]), noise, self.settings.loss), {}

    @staticmethod
    def predict(network: nn.Module, x: Tensor, times: Tensor, sizes: Tensor) -> Tensor:
        """Return the network's noise for bodies of these sizes, (B, 10)."""
        return network(x, timesteps=times.float(), context=sizes[:, None])  # type: ignore[no-any-return]

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return the loss at four fixed times with fixed noise, on held-out bodies."""
        device = next(network.parameters()).device
        losses: dict[float, list[float]] = {}
        for index, (latent, sizes) in enumerate(zip(self.held, self.held_vectors, strict=True)):
            x = self._scaled([latent]).to(device)
            told = torch.tensor([sizes], dtype=torch.float32, device=device)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index)).to(device)
            for time in VALIDATED:
                at = torch.tensor([int(time)], device=device)
                losses.setdefault(time, []).append(float(distance(self.predict(network, diffuse(x, noise, at), at, told), noise, "l2")))
        means = {f"t{int(time)}": float(np.mean(values)) for time, values in losses.items()}
        return {"score": float(np.mean(list(means.values()))), **means}

    def preview(self, network: nn.Module) -> dict[str, Volume | Mask]:
        """Return the bodies that are made of fixed noise, told the sizes of held-out ones."""
        shown: dict[str, Volume | Mask] = {}
        device = next(network.parameters()).device
        for seed, (name, sizes) in enumerate(zip(self.held_ids[: previews.CASES], self.held_vectors, strict=False)):
            told = torch.tensor([sizes], dtype=torch.float32, device=device)

            def denoise(x: Tensor, times: Tensor, told: Tensor = told) -> Tensor:
                return self.predict(network, x, times, told)

            latent = previews.sampled(denoise, (1, *self.held[seed].shape), seed=seed, ddpm=True, device=device) / self.scale
            labels = to_labels(likeliest(self.vae, latent).cpu().numpy())
            shown[f"noise of seed {seed}, with the sizes of {name}"] = previews.mask_of(labels, self.grid.spacing)
        return shown

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the one part."""
        return {"mask_unet": dict(tensors)}

    def metadata(self, part: str) -> dict[str, str]:
        """Name the part, its latent scale, and the volumes in ml that the sizes are shares of."""
        return {"part": part, "scale_factor": repr(self.scale), LARGEST: json.dumps([round(ml, 3) for ml in self.largest])}

    @staticmethod
    def beside(folder: Path) -> tuple[Path, Path]:
        """Return the files that `write_beside` writes: sizes, and model file."""
        return folder / FILE, folder / mask_model.NAME

    def write_beside(self, folder: Path) -> tuple[Path, Path]:
        """Write the sizes of the bodies, as `generate` reads them, and a model file of the networks that were trained."""
        sizes, model = self.beside(folder)
        write_atomic(sizes, json.dumps([{"organ_size": list(vector)} for vector in self.vectors], indent=1).encode())
        assert self.settings.vae is not None
        mask_model.write(
            model, self.spec, {"mask_vae": Path(self.settings.vae), "mask_unet": folder / "mask_unet.safetensors", "data": sizes}
        )
        return sizes, model


def encoded(vae: Any, body: bodies.Body, device: torch.device) -> Latent:
    """Return the mean of a body's latent, (4, x, y, z) float16, slab by slab."""
    mean = streaming.encoded(vae, binarise(torch.from_numpy(body.labels)[None, None].to(device)))
    found: Latent = mean[0].to(torch.float16).cpu().numpy()
    return found


def largest_in(path: Path) -> tuple[float, ...] | None:
    """Return the volumes in ml that the sizes of exported weights are shares of; None for a file that does not tell."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(LARGEST)
    if text is None:
        return None
    try:
        found = tuple(float(ml) for ml in json.loads(text))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} tells {LARGEST} that are no numbers", hint="use weights that  maisi train mask-dm  wrote") from error
    if len(found) != len(SLOTS):
        raise UsageError(f"{path} tells {len(found)} {LARGEST}, not {len(SLOTS)}", hint="use weights that  maisi train mask-dm  wrote")
    return found


def task(settings: TrainSettings, data: Path) -> MaskDiffusionTask:
    """Return the task of `train mask-dm`."""
    return MaskDiffusionTask(settings, data)
