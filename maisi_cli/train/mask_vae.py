"""`train mask-vae`: the autoencoder of label maps, with which a team makes an anatomy generator of its own.

It sees the eight bits of a label and gives the channels of all (reference.md 1.5). Its loss is cross-entropy and soft Dice
(Milletari et al. 2016) with a little KL; how the released one was trained is not published.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..anatomy import maisi, remap_table
from ..catalog import model as find_model
from ..networks import binarise, build
from ..weights import load_state
from .bodies import channel_table, cube, read_bodies
from .diffusion import start_from
from .lists import data_hashes, read_list, split
from .losses import kl_divergence
from .settings import TrainSettings

HELD = 4


class MaskVaeTask:
    """Patches of label maps to themselves. Nothing is flipped: left is not right."""

    name = "mask_vae"
    parts = ("mask_vae",)

    def __init__(self, settings: TrainSettings, data: Path) -> None:
        from monai.losses.dice import DiceCELoss

        self.settings = settings
        spec = find_model(settings.model)
        cube(spec)
        torch.manual_seed(settings.seed)
        self.network: nn.Module = build(spec.networks["mask_vae"])
        self.channels = int(spec.networks["mask_vae"].arguments["out_channels"])
        self.notes: list[str] = []
        if settings.init:
            path = Path(settings.init)
            self.notes += start_from(self.network, load_state(path).tensors, path, partial=settings.init_partial)
        training, held = split(read_list(data), settings.fold)
        self.data_hashes = data_hashes(data, [*training, *held])
        self.bodies, self.held = read_bodies(training, spec), read_bodies(held[:HELD], spec)
        self.table = torch.from_numpy(channel_table()).long().clamp(max=self.channels - 1)
        self.dice_and_entropy = DiceCELoss(to_onehot_y=True, softmax=True, include_background=True)

    def to(self, device: torch.device) -> None:
        """Move the table of channels."""
        self.table = self.table.to(device)

    def batch(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Draw patches of one of `crops`; of two places the one with more body in it is taken."""
        drawn, ids = [], []
        size = self.settings.crops[int(rng.integers(len(self.settings.crops)))]
        for _ in range(self.settings.batch_size):
            body = self.bodies[int(rng.integers(len(self.bodies)))]
            found = []
            for _place in range(2):
                start = [int(rng.integers(max(n - want, 0) + 1)) for n, want in zip(body.labels.shape, size, strict=True)]
                x, y, z = (slice(a, a + want) for a, want in zip(start, size, strict=True))
                found.append(body.labels[x, y, z])
            drawn.append(max(found, key=np.count_nonzero)[None])
            ids.append(body.id)
        return {"labels": torch.from_numpy(np.stack(drawn)), "ids": ids}

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
        of: dict[int, list[float]] = {}
        for body in self.held:
            wanted = self.table[torch.from_numpy(body.labels).to(device).long()]
            made = self.channels_of(network, torch.from_numpy(body.labels)[None, None].to(device))
            for channel in wanted.unique().tolist():
                if channel:
                    ours, theirs = made == channel, wanted == channel
                    of.setdefault(channel, []).append(float(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())))
        dice = {channel: float(np.mean(values)) for channel, values in of.items()}
        worst = min(dice, key=dice.__getitem__)
        self.worst = maisi().name_of(remap_table("raw125").pairs.get(worst, 0))
        mean = float(np.mean(list(dice.values())))
        return {"score": 1 - mean, "dice": mean, "worst_dice": dice[worst], "labels": float(len(dice))}

    @staticmethod
    def channels_of(network: Any, labels: Tensor) -> Tensor:
        """Return the most likely channel of each voxel (X, Y, Z), decoded slab by slab from the mean of the latent."""
        from .. import streaming

        mean, _ = network.encode(binarise(labels))
        return torch.cat([slab[0].argmax(dim=0) for slab in streaming.decoded(network, mean)])

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the one part."""
        return {"mask_vae": dict(tensors)}

    def metadata(self, part: str) -> dict[str, str]:
        """Name the part."""
        return {"part": part}


def task(settings: TrainSettings, data: Path) -> MaskVaeTask:
    """Return the task of `train mask-vae`."""
    return MaskVaeTask(settings, data)
