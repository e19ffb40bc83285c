"""`train vae`: the image autoencoder, on random patches of CT volumes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..catalog import model as find_model
from ..errors import UsageError
from ..networks import build
from ..volumes import read_image
from ..weights import load_state
from . import TrainSettings
from .data import intensity, read_list, split
from .losses import distance, edge_distance, kl_divergence, window


class VaeTask:
    """Reconstruction (L1 or L2) + KL, with an L1 in the soft-tissue window and one on edges (reference.md 5.1)."""

    name = "vae"

    def __init__(self, settings: TrainSettings, data: Path) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.network: nn.Module = build(find_model(settings.model).networks["vae"])
        # start with a narrow posterior (sigma = exp(-3)): learning does not begin under noise as strong as the latent
        nn.init.constant_(self.network.quant_conv_log_sigma.conv.bias, -6.0)  # type: ignore[union-attr, arg-type]
        if settings.init:
            self.network.load_state_dict({key: value.float() for key, value in load_state(Path(settings.init)).tensors.items()})
        training, held = split(read_list(data))
        self.volumes = [_load(case.image, case.id) for case in training]
        self.held = [_load(case.image, case.id) for case in held[:2]]

    def to(self, device: torch.device) -> None:
        """Nothing frozen to move."""

    def batch(self, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Draw random patches of one of `crops`, flipped at random; patches of air alone are drawn again, up to four times."""
        patches = []
        for _ in range(self.settings.batch_size):
            size = self.settings.crops[int(rng.integers(len(self.settings.crops)))]
            for _attempt in range(4):
                patch = _crop(self.volumes[int(rng.integers(len(self.volumes)))], size, rng)
                if (patch > 0.25).mean() > 0.15:
                    break
            for axis in range(3):
                if rng.random() < 0.5:
                    patch = np.flip(patch, axis)
            patches.append(intensity(np.ascontiguousarray(patch))[None])
        return {"image": torch.from_numpy(np.stack(patches))}

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the weighted sum and its parts."""
        image = batch["image"]
        reconstruction, mean, sigma = network(image)
        parts = {"recon": distance(reconstruction, image, self.settings.loss), "kl": kl_divergence(mean, sigma)}
        total = parts["recon"] + self.settings.kl_weight * parts["kl"]
        if self.settings.window_weight:
            parts["window"] = distance(window(reconstruction.float()), window(image), "l1")
            total = total + self.settings.window_weight * parts["window"]
        if self.settings.edge_weight:
            parts["edge"] = edge_distance(reconstruction, image)
            total = total + self.settings.edge_weight * parts["edge"]
        return total, {key: value.detach() for key, value in parts.items()}

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return PSNR (dB, range 1), the mean absolute error in the soft-tissue window (HU), and 1 / std of the latent."""
        device = next(network.parameters()).device
        squared, soft, spread = [], [], []
        for volume in self.held:
            whole = volume[tuple(slice(0, n // 4 * 4) for n in volume.shape)]
            image = torch.from_numpy(intensity(whole.astype(np.float32)))[None, None].to(device)
            mean, _ = network.encode(image)  # type: ignore[operator]
            made = network.decode(mean).float()  # type: ignore[operator]
            squared.append(float((made - image).square().mean()))
            inside = (image > 0.4) & (image < 0.65)
            soft.append(float(((made - image).abs()[inside]).mean()) * 2000)
            spread.append(float(mean.float().std()))
        psnr = -10 * math.log10(float(np.mean(squared)))
        return {"score": float(np.mean(soft)) - psnr, "psnr_db": psnr, "soft_mae_hu": float(np.mean(soft)),
                "inverse_std": 1 / float(np.mean(spread))}  # fmt: skip

    def metadata(self) -> dict[str, str]:
        """Name the part."""
        return {"part": "vae"}


def _load(path: Path | None, name: str) -> NDArray[np.int16]:
    if path is None:
        raise UsageError(f"case {name} has no image", hint="give every case of the list an image")
    return np.clip(read_image(path).array, -1024, 3000).astype(np.int16)


def _crop(volume: NDArray[np.int16], size: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.int16]:
    if any(n < want for n, want in zip(volume.shape, size, strict=True)):
        widths = [(0, max(0, want - n)) for n, want in zip(volume.shape, size, strict=True)]
        volume = np.pad(volume, widths, constant_values=-1000)
    start = [int(rng.integers(n - want + 1)) for n, want in zip(volume.shape, size, strict=True)]
    return volume[tuple(slice(s, s + want) for s, want in zip(start, size, strict=True))]


def task(settings: TrainSettings, data: Path) -> VaeTask:
    """Return the task of `train vae`."""
    return VaeTask(settings, data)
