"""A perceptual distance of volumes: that of the maps which a 2D network makes of their slices (Zhang et al. 2018, without its weights).

Slices of three planes stand for the volume, a share of them drawn anew for each batch. LPIPS's own weights are not part of maisi:
the distance is that of the network which is named, and is not comparable to published LPIPS.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..backbones import SliceNet
from ..errors import UsageError
from ..features import OURS, open_extractor

RANDOM = "random"


class Perceptual(nn.Module):
    """The mean squared difference of maps of unit length, averaged over the layers of a frozen network."""

    def __init__(self, name: str = OURS, *, share: float = 0.2) -> None:
        super().__init__()
        self.share, self.channels = share, 1
        if name == RANDOM:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network: nn.Module = SliceNet()
            self.label = "a network of random weights, seed 0"
        else:
            extractor = open_extractor(name)
            if not isinstance(extractor.network, nn.Module):
                raise UsageError(f"{name} is no network that gradients go through", hint=f"use {OURS} or {RANDOM}")
            network, self.channels = extractor.network, extractor.channels
            self.label = f"{extractor.name} {extractor.sha256[:12]}"
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Perceptual:
        """Stay as it is: the statistics of its norms are fixed."""
        return self

    def forward(self, made: Tensor, target: Tensor) -> Tensor:
        """Return the distance of volumes (B, 1, X, Y, Z) with intensities in [0, 1], summed over the three planes."""
        total = made.new_zeros((), dtype=torch.float32)
        for axis in (2, 3, 4):
            count = max(1, round(self.share * made.shape[axis]))
            places = torch.randperm(made.shape[axis])[:count].to(made.device)
            total = total + self.of_slices(*(_slices(each.index_select(axis, places), axis) for each in (made, target)))
        return total

    def of_slices(self, made: Tensor, target: Tensor) -> Tensor:
        """Return the distance of slices (N, 1, H, W) with intensities in [0, 1]."""
        ours, theirs = self.maps(made), self.maps(target)
        each = [(_unit(ours[name]) - _unit(theirs[name])).square().sum(1).mean() for name in ours]
        return torch.stack(each).mean()

    def maps(self, slices: Tensor) -> Mapping[str, Tensor]:
        """Return what the layers of the network make of slices, by name."""
        found: dict[str, Tensor] = {}
        layers = dict(self.network.named_children())
        if len(layers) < 4:  # a trunk in one piece
            layers = {f"{name}.{key}": each for name, layer in layers.items() for key, each in layer.named_children()}

        def keep(name: str) -> object:
            def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                if isinstance(output, Tensor) and output.ndim == 4:
                    found[name] = output

            return hook

        handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]  # type: ignore[arg-type]
        try:
            self.network(slices.expand(-1, self.channels, -1, -1) * 2 - 1)
        finally:
            for handle in handles:
                handle.remove()
        return found


def _slices(volume: Tensor, axis: int) -> Tensor:
    return volume.movedim(axis, 1).flatten(0, 1)


def _unit(maps: Tensor) -> Tensor:
    maps = maps.float()
    return maps / (maps.square().sum(1, keepdim=True) + 1e-10).sqrt()
