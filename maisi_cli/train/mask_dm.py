"""`train mask-dm`: the diffusion model of label maps, told ten anatomy sizes (DDPM, Ho et al. 2020).

Beside the weights it writes `all_anatomy_size_conditions.json`, the sizes of the bodies that it was trained on, from which
`generate` completes what the user names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..catalog import model as find_model
from ..errors import UsageError
from ..files import write_atomic
from ..masks.sizes import ABSENT, FILE
from ..networks import binarise, build, fitting
from ..weights import load_state
from . import bodies
from .diffusion import VALIDATED, diffuse, start_from
from .lists import data_hashes, read_list, split
from .losses import distance
from .settings import TrainSettings

HELD = 4


class MaskDiffusionTask:
    """Regression of the noise in the latents of bodies; a share `size_dropout` of the sizes is told as absent."""

    name = "mask_unet"
    parts = ("mask_unet",)

    def __init__(self, settings: TrainSettings, data: Path) -> None:
        if not settings.vae:
            raise UsageError("train mask-dm needs the mask autoencoder's weights", hint="add --vae FILE")
        self.settings = settings
        spec = find_model(settings.model)
        bodies.cube(spec)
        torch.manual_seed(settings.seed)
        self.network: nn.Module = build(spec.networks["mask_unet"])
        path = Path(settings.vae)
        vae, state = build(spec.networks["mask_vae"]), load_state(path)
        vae.load_state_dict({key: value.float() for key, value in fitting(vae, state.tensors, path).items()})
        training, held = split(read_list(data), settings.fold)
        self.data_hashes = {**data_hashes(data, [*training, *held]), "mask vae": state.sha256}
        seen, unseen = bodies.read_bodies(training, spec), bodies.read_bodies(held[:HELD], spec)
        self.largest = bodies.largest_of(seen)
        self.vectors, self.held_vectors = bodies.vectors(seen, self.largest), bodies.vectors(unseen, self.largest)
        self.ids = [body.id for body in seen]
        self.latents, self.held = ([encoded(vae, body) for body in group] for group in (seen, unseen))
        everything = np.stack(self.latents).astype(np.float64)
        self.scale = float(1 / everything.std())
        self.notes = [f"scale factor {self.scale:.4f} over {len(self.latents)} bodies"]
        if settings.init:
            init = Path(settings.init)
            state = load_state(init)
            self.notes += start_from(self.network, state.tensors, init, partial=settings.init_partial)
            self.scale = state.scale_factor or self.scale

    def to(self, device: torch.device) -> None:
        """Nothing frozen to move."""

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

    def _scaled(self, latents: list[np.ndarray]) -> Tensor:
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

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the one part."""
        return {"mask_unet": dict(tensors)}

    def metadata(self, part: str) -> dict[str, str]:
        """Name the part, its latent scale, and the volumes in ml that the sizes are shares of."""
        return {"part": part, "scale_factor": repr(self.scale), "largest_ml": json.dumps([round(ml, 3) for ml in self.largest])}

    def write_beside(self, folder: Path) -> Path:
        """Write the sizes of the bodies, as `generate` reads them."""
        path = folder / FILE
        write_atomic(path, json.dumps([{"organ_size": list(vector)} for vector in self.vectors], indent=1).encode())
        return path


@torch.no_grad()
def encoded(vae: Any, body: bodies.Body) -> np.ndarray:
    """Return the mean of a body's latent, (4, x, y, z) float16."""
    vae.eval()
    mean, _ = vae.encode(binarise(torch.from_numpy(body.labels)[None, None]))
    found: np.ndarray = mean[0].to(torch.float16).numpy()
    return found


def task(settings: TrainSettings, data: Path) -> MaskDiffusionTask:
    """Return the task of `train mask-dm`."""
    return MaskDiffusionTask(settings, data)
