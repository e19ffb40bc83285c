"""`train controlnet`: the ControlNet that makes a diffusion model follow a mask; the model stays frozen, or learns along."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..networks import binarise, build
from ..weights import load_state
from .diffusion import DiffusionTask, latent_list
from .settings import TrainSettings


class Pair(nn.Module):
    """A ControlNet and the diffusion model that it steers, as one network."""

    def __init__(self, controlnet: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.controlnet, self.unet = controlnet, unet

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None, spacing: Tensor, classes: Tensor) -> Tensor:
        """Return the velocity; without labels that of the diffusion model alone."""
        residuals: dict[str, Any] = {}
        if labels is not None:
            down, middle = self.controlnet(x=x, timesteps=times, controlnet_cond=binarise(labels), class_labels=classes)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(x=x, timesteps=times, spacing_tensor=spacing, class_labels=classes, **residuals)  # type: ignore[no-any-return]


class ControlNetTask(DiffusionTask):
    """The ControlNet of a diffusion model (Zhang et al. 2023): the labels' bits steer the velocity.

    With `train_unet` the diffusion model learns too and is written beside the ControlNet; a share `label_dropout` of its
    batches comes without labels, so that it keeps making images on its own.
    """

    name = "controlnet"

    def __init__(self, settings: TrainSettings, data: Path) -> None:
        if not settings.unet:
            raise UsageError("train controlnet needs the diffusion model's weights", hint="add --unet FILE")
        super().__init__(settings, data, network="controlnet")
        state = load_state(Path(settings.unet))
        self.unet: nn.Module = build(self.spec.networks["unet"])
        self.unet.load_state_dict({key: value.float() for key, value in state.tensors.items()})
        self.scale = state.scale_factor or self.scale
        if not settings.init:
            copy_matching(self.unet, self.network)
        self.controlnet = self.network
        if settings.train_unet:
            add_residuals_out_of_place(self.unet)
            self.network = Pair(self.controlnet, self.unet)
        else:
            self.unet.requires_grad_(False).eval()

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that are written."""
        return ("controlnet", "unet") if self.settings.train_unet else ("controlnet",)

    def to(self, device: torch.device) -> None:
        """Move the frozen diffusion model; lay the condition's convolutions, of few channels, out as a CPU likes them."""
        self.unet.to(device)
        if device.type == "cpu":
            self.controlnet.controlnet_cond_embedding.to(memory_format=torch.channels_last_3d)  # type: ignore[operator, union-attr, call-overload]

    def batch(self, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Draw a batch; where the diffusion model learns too, some come without labels."""
        batch = dict(super().batch(rng))
        if self.settings.train_unet and rng.random() < self.settings.label_dropout:
            del batch["labels"]
        return batch

    def predict(self, network: nn.Module, x: Tensor, times: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity of the diffusion model with the ControlNet's residuals."""
        pair = network if self.settings.train_unet else Pair(network, self.unet)
        return pair(x, times, batch.get("labels"), batch["spacing"], batch["class"])  # type: ignore[no-any-return]

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each part by their names in it."""
        if not self.settings.train_unet:
            return {"controlnet": dict(tensors)}
        return {part: {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
                for part in self.parts}  # fmt: skip

    def metadata(self, part: str) -> dict[str, str]:
        """Name the part; the diffusion model carries its latent scale."""
        return {"part": part, **({"scale_factor": repr(self.scale)} if part == "unet" else {})}


def add_residuals_out_of_place(unet: nn.Module) -> None:
    """Let a diffusion model add a ControlNet's residuals to copies of its features.

    MONAI's adds in place, which fails when the gradient of those features is wanted. The last feature is also what the middle
    block reads, so there too the sum replaces it. Equal numbers.
    """
    original = unet._apply_down_blocks

    def apply_down_blocks(h: Tensor, emb: Tensor, context: Tensor | None, residuals: Any) -> tuple[Tensor, list[Tensor]]:
        h, features = original(h, emb, context, None)  # type: ignore[operator]
        if residuals is None:
            return h, features
        summed = [feature + residual for feature, residual in zip(features, residuals, strict=True)]
        return (summed[-1] if features[-1] is h else h), summed

    unet._apply_down_blocks = apply_down_blocks  # type: ignore[assignment]


def copy_matching(source: nn.Module, target: nn.Module) -> int:
    """Copy every tensor that has the same name and shape in both; return how many there were."""
    wanted = target.state_dict()
    same = {key: value for key, value in source.state_dict().items() if key in wanted and wanted[key].shape == value.shape}
    target.load_state_dict({**wanted, **same})
    return len(same)


def task(settings: TrainSettings, data: Path) -> ControlNetTask:
    """Return the task of `train controlnet`."""
    return ControlNetTask(settings, latent_list(data))
