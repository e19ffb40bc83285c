"""`train vae`: the image autoencoder, on random patches of CT volumes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..catalog import model as find_model
from ..errors import UsageError
from ..networks import build
from ..volumes import read_image
from ..weights import load_state
from .data import intensity, read_list, split
from .losses import distance, edge_distance, kl_divergence, window
from .settings import TrainSettings


class VaeTask:
    """Reconstruction (L1 or L2) + KL, with an L1 in the soft-tissue window and one on edges (reference.md 5.1)."""

    name = "vae"
    parts = ("vae",)

    def __init__(self, settings: TrainSettings, data: Path) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.network: nn.Module = build(find_model(settings.model).networks["vae"])
        if has_room_for_anchors(self.network):
            start_as_pyramid(self.network)
            hold_anchors(self.network)
        # start with a narrow posterior (sigma = exp(-4)): learning does not begin under noise as strong as the latent
        nn.init.constant_(self.network.quant_conv_log_sigma.conv.bias, -8.0)  # type: ignore[union-attr, arg-type]
        if settings.init:
            self.network.load_state_dict({key: value.float() for key, value in load_state(Path(settings.init)).tensors.items()})
        if settings.freeze_encoder:
            for part in ("encoder", "quant_conv_mu", "quant_conv_log_sigma"):
                self.network.get_submodule(part).requires_grad_(False)
        if settings.latent_noise:
            noise_latents(self.network.get_submodule("post_quant_conv"), settings.latent_noise)
        training, held = split(read_list(data), settings.fold)
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

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the one part."""
        return {"vae": dict(tensors)}

    def metadata(self, part: str) -> dict[str, str]:
        """Name the part."""
        return {"part": part}


_ANCHOR = 16.0  # far above the signal, which is of the order of one


@torch.no_grad()
def start_as_pyramid(network: nn.Module) -> None:
    """Give an autoencoder initial values with which it already reconstructs a blurred volume, with the right HU.

    A group norm divides by statistics of the whole patch: a patch with more air than the last comes out with another offset, and absolute
    intensity is lost. Here the first two channels of every group are constants, +16 and -16 (biases without weights), far above the
    signal, and nothing reads them: mean and deviation of a group hardly depend on the patch any more, and the norm, whose scale starts at
    that deviation, starts near the identity. `hold_anchors` keeps them so in training. The next channel carries the input through:
    averaged on the way down, interpolated on the way up. Second convolutions of residual branches start at zero. Network, file and
    forward pass are those of MONAI.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(_ANCHOR * math.sqrt(2 * module.num_groups / module.num_channels))
        elif isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
            if ".conv2." in name or name.startswith("quant_conv_log_sigma"):
                nn.init.zeros_(module.weight)
            elif ".conv1." not in name:
                row, column = (2 if module.out_channels >= 16 else 0), (2 if module.in_channels >= 16 else 0)
                module.weight[row] = 0
                if module.stride[0] == 2:
                    module.weight[row, column, :2, :2, :2] = 1 / 8
                else:
                    module.weight[(row, column, *(n // 2 for n in module.kernel_size))] = 1
    for parameter, entries, value in _anchors(network):
        parameter[entries] = value


def has_room_for_anchors(network: nn.Module) -> bool:
    """Say whether every group of every norm has at least eight channels, so that two of them may stay constant."""
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    return all(norm.num_channels // norm.num_groups >= 8 for norm in norms) and min(norm.num_channels for norm in norms) >= 16


def hold_anchors(network: nn.Module) -> None:
    """Keep the entries of `start_as_pyramid`'s constants out of training."""
    for parameter, entries, _ in _anchors(network):
        free = torch.ones_like(parameter)
        free[entries] = 0
        parameter.register_hook(lambda gradient, free=free: gradient * free.to(gradient.device))


def _anchors(network: nn.Module) -> Iterator[tuple[Tensor, Any, Any]]:
    """Yield (parameter, its entries, their value) of everything that makes the constant channels constant, and unread."""
    groups = next(module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm))

    def places(channels: int) -> list[int]:
        width = channels // groups
        return [first + k for first in range(0, channels, width) for k in (0, 1)]

    for name, module in network.named_modules():
        if isinstance(module, nn.GroupNorm):
            yield module.weight, places(module.num_channels), 0.0
            yield module.bias, places(module.num_channels), 0.0
        elif isinstance(module, nn.Conv3d):
            if module.in_channels >= 16:
                yield module.weight, (slice(None), places(module.in_channels)), 0.0
            if module.out_channels >= 16:
                here = places(module.out_channels)
                yield module.weight, here, 0.0
                assert module.bias is not None
                level = 0.0 if ".conv2." in name else _ANCHOR
                yield module.bias, here, torch.tensor([level, -level]).repeat(groups)


def noise_latents(decoder_input: nn.Module, share: float) -> None:
    """Let a decoder learn from latents with Gaussian noise of 0 to `share` of their deviation, drawn anew for each batch.

    What a sampler makes deviates from every true latent; a decoder that has only seen true ones shows the difference as mottle (noise-
    augmented decoding: Zheng et al. 2025, "Diffusion Transformers with Representation Autoencoders", section 4.2). An encoder that
    learns along spends its range on what the loss counts. Nothing is added outside training.
    """

    def add_noise(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if not module.training:
            return None
        (latent,) = inputs
        deviation = latent.detach().float().std() * share * torch.rand(())
        return (latent + deviation.to(latent.dtype) * torch.randn_like(latent),)

    decoder_input.register_forward_pre_hook(add_noise)


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
