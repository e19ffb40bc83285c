"""`train vae`: the image autoencoder, on random patches of CT volumes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..catalog import model as find_model
from ..networks import build
from ..volumes import Mask, Volume
from ..weights import load_state
from . import adversarial, previews
from .data import data_hashes, read_list, split
from .diffusion import start_from
from .evaluation import judge, reconstructed
from .losses import distance, edge_distance, kl_divergence, window
from .patches import Volumes
from .perceptual import Perceptual
from .settings import TrainSettings

HELD = 2
"""How many held-out cases are looked at while training."""


class VaeTask:
    """Reconstruction (L1 or L2) + KL, and on request a perceptual and an adversarial loss (reference.md 5.1), an L1 in the soft-tissue
    window and one on edges.
    """

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
        self.notes: list[str] = []
        if settings.init:
            path = Path(settings.init)
            self.notes += start_from(self.network, load_state(path).tensors, path, partial=settings.init_partial)
        if settings.freeze_encoder:
            for part in ("encoder", "quant_conv_mu", "quant_conv_log_sigma"):
                self.network.get_submodule(part).requires_grad_(False)
        if settings.latent_noise:
            noise_latents(self.network.get_submodule("post_quant_conv"), settings.latent_noise)
        training, held = split(read_list(data), settings.fold)
        self.data_hashes = data_hashes(data, [*training, *held])
        self.volumes, self.held = Volumes(training, settings), held[:HELD]
        self.perceptual = Perceptual(settings.perceptual, share=settings.perceptual_share) if settings.perceptual_weight else None
        if self.perceptual is not None:
            self.notes.append(f"the perceptual distance is that of {self.perceptual.label}, not LPIPS")
        self.opponent = adversarial.discriminator(settings.adversarial_channels) if settings.adversarial_weight else None
        self._made: Tensor | None = None

    opponent_name = "discriminator"

    def to(self, device: torch.device) -> None:
        """Move the frozen network of the perceptual distance."""
        if self.perceptual is not None:
            self.perceptual.to(device)

    def batch(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Draw random patches of one of `crops`, flipped at random; patches of air alone are drawn again, up to four times."""
        drawn = []
        for _ in range(self.settings.batch_size):
            size = self.settings.crops[int(rng.integers(len(self.settings.crops)))]
            drawn.append(self.volumes.patch(size, rng))
        return {"image": torch.from_numpy(np.stack([patch[None] for _, patch in drawn])), "ids": [name for name, _ in drawn]}

    def loss(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the weighted sum and its parts."""
        image, settings = batch["image"], self.settings
        reconstruction, mean, sigma = network(image)
        parts = {"recon": distance(reconstruction, image, settings.loss), "kl": kl_divergence(mean, sigma)}
        total = parts["recon"] + settings.kl_weight * parts["kl"]
        if settings.window_weight:
            parts["window"] = distance(window(reconstruction.float()), window(image), "l1")
            total = total + settings.window_weight * parts["window"]
        if settings.edge_weight:
            parts["edge"] = edge_distance(reconstruction, image)
            total = total + settings.edge_weight * parts["edge"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(reconstruction.float(), image)
            total = total + settings.perceptual_weight * parts["perceptual"]
        if self.opponent is not None:
            self.opponent.requires_grad_(False)  # it learns from its own loss alone
            parts["adversarial"] = adversarial.least_squares(adversarial.judged(self.opponent, reconstruction.float()), True)
            self.opponent.requires_grad_(True)
            total = total + settings.adversarial_weight * parts["adversarial"]
            self._made = reconstruction.detach().float()
        return total, {key: value.detach() for key, value in parts.items()}

    def opponent_loss(self, opponent: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the discriminator on the reconstruction of the last `loss`, and on what it was made of."""
        assert self._made is not None
        return adversarial.opponent_loss(opponent, self._made, batch["image"])

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return PSNR (dB, range 1), SSIM, the mean absolute error in the soft-tissue window (HU), and 1 / std of the latent."""
        found = [judge(network, case, self.settings) for case in self.held]
        means = {name: float(np.mean([each.figures[name] for each in found])) for name in ("squared", "ssim", "latent_std")}
        psnr = -10 * math.log10(means["squared"])
        made = {"psnr_db": psnr, "ssim": means["ssim"], "inverse_std": 1 / means["latent_std"]}
        soft = [each.figures["soft_mae_hu"] for each in found if "soft_mae_hu" in each.figures]
        if soft:
            made["soft_mae_hu"] = float(np.mean(soft))
        return {"score": made.get("soft_mae_hu", 0.0) - psnr, **made}

    def preview(self, network: nn.Module) -> dict[str, Volume | Mask]:
        """Return held-out cases, and what is given back of them."""
        shown: dict[str, Volume | Mask] = {}
        for case in self.held[: previews.CASES]:
            found = reconstructed(network, case, self.settings)
            shown[case.id] = previews.volume_of(found.image[0, 0], found.spacing_mm, case.modality)
            shown[f"{case.id}: given back"] = previews.volume_of(found.made[0, 0], found.spacing_mm, case.modality)
        return shown

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


def task(settings: TrainSettings, data: Path) -> VaeTask:
    """Return the task of `train vae`."""
    return VaeTask(settings, data)
