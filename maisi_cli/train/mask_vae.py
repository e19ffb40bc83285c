"""`train mask-vae`: the autoencoder of label maps, with which a team makes an anatomy generator of its own.

It sees the eight bits of a label and gives the channels of all (reference.md 1.5). Its loss is cross-entropy and soft Dice
(Milletari et al. 2016) with a little KL; how the released one was trained is not published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import streaming
from ..anatomy import maisi, remap_table
from ..catalog import model as find_model
from ..errors import UsageError
from ..masks.denoising import likeliest, to_labels
from ..networks import binarise, build
from ..volumes import Mask, Volume
from ..weights import load_state
from . import previews
from .bodies import Body, channel_shares, channel_table, channel_weights, cube, read_bodies, told_of_lost
from .diffusion import start_from
from .lists import data_hashes, read_list, split
from .losses import kl_divergence
from .settings import TrainSettings

HELD = 4


class MaskVaeTask:
    """Patches of label maps to themselves. Nothing is flipped: left is not right.

    After a validation `dice` holds the mean Dice of each label of the held-out bodies, by name.
    """

    name = "mask_vae"
    parts = ("mask_vae",)

    def __init__(self, settings: TrainSettings, data: Path) -> None:
        from monai.losses.dice import DiceCELoss

        self.settings = settings
        spec = find_model(settings.model)
        self.grid = cube(spec)
        _check_crops(settings.crops, self.grid.size)
        torch.manual_seed(settings.seed)
        self.network: nn.Module = build(spec.networks["mask_vae"])
        # start with a narrow posterior (sigma = exp(-4)): learning does not begin under noise as strong as the latent
        nn.init.constant_(self.network.quant_conv_log_sigma.conv.bias, -8.0)  # type: ignore[union-attr, arg-type]
        self.notes: list[str] = []
        training, held = split(read_list(data), settings.fold)
        self.data_hashes = data_hashes(data, [*training, *held])
        self.bodies, self.held = list(read_bodies(training, spec)), list(read_bodies(held[:HELD], spec))
        self.notes += told_of_lost([*self.bodies, *self.held])
        self.table = torch.from_numpy(channel_table()).long()
        start_at_frequencies(self.network, channel_shares(self.bodies))
        if settings.init:
            path = Path(settings.init)
            self.notes += start_from(self.network, load_state(path).tensors, path, partial=settings.init_partial)
        weights = torch.from_numpy(channel_weights(self.bodies, settings.organ_balance)) if settings.organ_balance else None
        self.dice_and_entropy = DiceCELoss(to_onehot_y=True, softmax=True, include_background=True, weight=weights)
        self.dice: dict[str, float] = {}

    def to(self, device: torch.device) -> None:
        """Move the table of channels, and their weights."""
        self.table = self.table.to(device)
        self.dice_and_entropy.to(device)

    def batch(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Draw patches of one of `crops`; of two places the one with more body in it is taken."""
        size = self.settings.crops[int(rng.integers(len(self.settings.crops)))]
        chosen = [self.bodies[int(rng.integers(len(self.bodies)))] for _ in range(self.settings.batch_size)]
        patches = [max((_patch(body, size, rng) for _place in range(2)), key=np.count_nonzero)[None] for body in chosen]
        return {"labels": torch.from_numpy(np.stack(patches)), "ids": [body.id for body in chosen]}

    def loss(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return cross-entropy + soft Dice + `kl_weight` KL, and its parts."""
        labels = batch["labels"]
        made, mean, sigma = network(binarise(labels))
        shape = self.dice_and_entropy(made.float(), self.table[labels.long()])
        kl = kl_divergence(mean, sigma)
        return shape + self.settings.kl_weight * kl, {"dice_and_entropy": shape.detach(), "kl": kl.detach()}

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return the mean Dice of the labels of held-out bodies, whole; `score` is 1 minus that."""
        device = next(network.parameters()).device
        found: dict[int, list[float]] = {}
        for body in self.held:
            labels = torch.from_numpy(body.labels)[None, None].to(device)
            for channel, dice in dice_of(self.channels_of(network, labels), self.table[labels[0, 0].long()]).items():
                found.setdefault(channel, []).append(dice)
        names = remap_table("raw125").pairs
        self.dice = {maisi().name_of(names[channel]): float(np.mean(values)) for channel, values in sorted(found.items())}
        mean = float(np.mean(list(self.dice.values())))
        return {"score": 1 - mean, "dice": mean, "worst_dice": min(self.dice.values()), "labels": float(len(self.dice))}

    def preview(self, network: nn.Module) -> dict[str, Volume | Mask]:
        """Return held-out bodies, and what is given back of them."""
        shown: dict[str, Volume | Mask] = {}
        device = next(network.parameters()).device
        for body in self.held[: previews.CASES]:
            channels = self.channels_of(network, torch.from_numpy(body.labels)[None, None].to(device))
            shown[body.id] = previews.mask_of(body.labels, self.grid.spacing)
            shown[f"{body.id}: given back"] = previews.mask_of(to_labels(channels.cpu().numpy()), self.grid.spacing)
        return shown

    @staticmethod
    def channels_of(network: Any, labels: Tensor) -> Tensor:
        """Return the most likely channel of each voxel (X, Y, Z), by way of the mean of the latent; slab by slab, both ways."""
        mean = streaming.encoded(network, binarise(labels))
        return likeliest(network, mean)

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the one part."""
        return {"mask_vae": dict(tensors)}

    def metadata(self, part: str) -> dict[str, str]:
        """Name the part, and the mean Dice of each label on the held-out bodies."""
        return {"part": part, "dice": json.dumps({name: round(value, 4) for name, value in self.dice.items()})}


@torch.no_grad()
def start_at_frequencies(network: nn.Module, shares: NDArray[np.float64]) -> None:
    """Let the last bias of an autoencoder say how frequent each channel is, so that learning begins with where organs are.

    The prior of Lin et al. 2017 ("Focal Loss for Dense Object Detection", 3.3), for channels that differ by orders of magnitude.
    """
    last = [module for module in network.get_submodule("decoder").modules() if isinstance(module, nn.Conv3d)][-1]
    assert last.bias is not None
    last.bias.copy_(torch.from_numpy(np.log(shares)))


def dice_of(made: Tensor, wanted: Tensor, channels: int = 125) -> dict[int, float]:
    """Return the Dice coefficient of each channel that `wanted` holds, but background."""
    pairs = torch.bincount((wanted * channels + made).reshape(-1), minlength=channels**2).reshape(channels, channels).double().cpu()
    ours, theirs, both = pairs.sum(0), pairs.sum(1), pairs.diagonal()
    return {k: float(2 * both[k] / (ours[k] + theirs[k])) for k in range(1, channels) if theirs[k]}


def _patch(body: Body, size: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    start = [int(rng.integers(n - want + 1)) for n, want in zip(body.size, size, strict=True)]
    x, y, z = (slice(a, a + want) for a, want in zip(start, size, strict=True))
    return body.part((x, y, z))


def _check_crops(crops: tuple[tuple[int, int, int], ...], cube_size: tuple[int, int, int]) -> None:
    for crop in crops:
        if any(want % 4 or want <= 0 or want > n for want, n in zip(crop, cube_size, strict=True)):
            raise UsageError(f"train.crops holds {list(crop)}, and patches of {'x'.join(map(str, cube_size))} voxels are cut",
                             hint="use multiples of 4 up to that, such as [[64, 64, 64]]")  # fmt: skip


def task(settings: TrainSettings, data: Path) -> MaskVaeTask:
    """Return the task of `train mask-vae`."""
    return MaskVaeTask(settings, data)
