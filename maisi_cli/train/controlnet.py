"""`train controlnet`: the ControlNet that makes a frozen diffusion model follow a mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..networks import binarise, build
from ..weights import load_state
from . import TrainSettings
from .diffusion import DiffusionTask, latent_list


class ControlNetTask(DiffusionTask):
    """The ControlNet of a frozen diffusion model (Zhang et al. 2023): the labels' bits steer the velocity."""

    name = "controlnet"

    def __init__(self, settings: TrainSettings, data: Path) -> None:
        if not settings.unet:
            raise UsageError("train controlnet needs the diffusion model's weights", hint="add --set train.unet=FILE")
        super().__init__(settings, data, network="controlnet")
        state = load_state(Path(settings.unet))
        self.unet: nn.Module = build(self.spec.networks["unet"])
        self.unet.load_state_dict({key: value.float() for key, value in state.tensors.items()})
        self.unet.requires_grad_(False).eval()
        self.scale = state.scale_factor or self.scale
        if not settings.init:
            copy_matching(self.unet, self.network)

    def to(self, device: torch.device) -> None:
        """Move the frozen diffusion model."""
        self.unet.to(device)

    def predict(self, network: nn.Module, x: Tensor, times: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity of the frozen model with the ControlNet's residuals."""
        down, middle = network(x=x, timesteps=times, controlnet_cond=binarise(batch["labels"]), class_labels=batch["class"])
        return self.unet(  # type: ignore[no-any-return]
            x=x, timesteps=times, spacing_tensor=batch["spacing"], class_labels=batch["class"],
            down_block_additional_residuals=down, mid_block_additional_residual=middle,
        )  # fmt: skip

    def metadata(self) -> dict[str, str]:
        """Name the part."""
        return {"part": self.name}


def copy_matching(source: nn.Module, target: nn.Module) -> int:
    """Copy every tensor that has the same name and shape in both; return how many there were."""
    wanted = target.state_dict()
    same = {key: value for key, value in source.state_dict().items() if key in wanted and wanted[key].shape == value.shape}
    target.load_state_dict({**wanted, **same})
    return len(same)


def task(settings: TrainSettings, data: Path) -> ControlNetTask:
    """Return the task of `train controlnet`."""
    return ControlNetTask(settings, latent_list(data))
