"""Feature extractors: networks with the facts that a number from them must carry, and the features of a volume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import catalog, networks, weights
from .errors import UsageError
from .plugins import plugins
from .record import sha256_of
from .slices import PLANES, Profile, stacks
from .volumes import Volume

OURS = "maisi-slices"
_PIXELS, _BATCH = 2**21, 64
"""How much goes through a network at once: at most so many pixels, and so many slices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extractor:
    """A network that turns slices into features, and what has to be told about it.

    `network` maps (n, channels, H, W) float32 to (n, size). `sha256` is that of its weights. `profiles` names, for `ct`
    and `mr`, the preprocessing that it is used with unless another is chosen. `note` is said beside every number.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    size: int
    channels: int
    sha256: str
    licence: str
    note: str = ""
    profiles: Mapping[str, str] = field(default_factory=lambda: {"ct": "ct", "mr": "mr"})

    def as_dict(self) -> dict[str, Any]:
        """Return what stands in results and saved statistics."""
        return {"name": self.name, "sha256": self.sha256, "size": self.size, "channels": self.channels, "licence": self.licence,
                "note": self.note}  # fmt: skip

    def to(self, device: torch.device) -> None:
        """Move the network, where it is a module, to a device."""
        if isinstance(self.network, nn.Module):
            self.network.to(device)


def open_extractor(text: str = OURS) -> Extractor:
    """Return an extractor from `NAME`, `NAME=FILE` or `FILE`, a file of weights of the RadImageNet ResNet-50.

    Raises `UsageError` for unknown names and files that do not fit, `CannotRun` for weights that are not installed.
    """
    registry = plugins().registry("features")
    name, _, file = text.partition("=")
    if not file and name not in registry and Path(name).suffix in (".pth", ".pt", ".safetensors"):
        name, file = "radimagenet-resnet50", name
    path = Path(file) if file else None
    if path is not None and not path.is_file():
        raise UsageError(f"there is no file {path}", hint="give the file of weights, as  --features NAME=FILE")
    found = registry.get(name)(path)
    if not isinstance(found, Extractor):
        raise UsageError(f"the feature extractor {name!r} of {registry.entry(name).owner} is no Extractor", hint="correct the plugin")
    if isinstance(found.network, nn.Module):
        found.network.eval()
    return found


def maisi_slices(file: Path | None = None) -> Extractor:
    """Return the extractor that comes with maisi, or one of its kind trained anew."""
    note = "not comparable to published FIDs: a small network of maisi's own, trained on phantoms of CT"
    return _catalogued(OURS, file, channels=1, note=note)


def radimagenet_resnet50(file: Path | None = None) -> Extractor:
    """Return ResNet-50 of RadImageNet (Mei et al. 2022), with which the 2.5D FIDs of MAISI were computed."""
    return _catalogued("radimagenet-resnet50", file, channels=3, profiles={"ct": "reference", "mr": "reference-mr"})


def imagenet_squeezenet(file: Path | None = None) -> Extractor:
    """Return SqueezeNet 1.1 trained on photographs; its features are class scores. Another file is refused by its hash."""
    found = _catalogued("imagenet-squeezenet1_1", file, channels=3, note="class scores of a network trained on photographs",
                        profiles={"ct": "reference", "mr": "reference-mr"})  # fmt: skip
    if not found.sha256.startswith("b8a52dc0"):
        raise UsageError(f"{file or 'what is installed'} is not the published squeezenet1_1-b8a52dc0.pth: its hash is {found.sha256[:8]}",
                         hint="fetch it again; see  maisi models show imagenet-squeezenet1_1")  # fmt: skip
    return found


def _catalogued(name: str, file: Path | None, *, channels: int, note: str = "", profiles: Mapping[str, str] | None = None) -> Extractor:
    """Return an extractor whose network and licence are those of the catalogue, with a file of the user's or the installed one."""
    spec = catalog.model(name)
    network = networks.build(spec.networks["features"], fast=False)
    path = file or weights.locate(spec, ("features",))["features"]
    state = weights.load_state(path, "state_dict")
    network.load_state_dict({key: value.float() if value.is_floating_point() else value
                             for key, value in networks.fitting(network, state.tensors, path).items()})  # fmt: skip
    from .store import read_origin

    origin = read_origin(path) if file is None else None  # an installed file was converted: the published one counts
    return Extractor(
        name=name, network=network, size=int(network.size), channels=channels, licence=spec.licence.name, note=note,  # type: ignore[arg-type]
        sha256=origin.source_sha256 if origin else sha256_of(path), profiles=profiles or {"ct": "ct", "mr": "mr"},
    )  # fmt: skip


def check_channels(extractor: Extractor, profile: Profile) -> None:
    """Refuse a profile whose slices have more channels than the extractor takes. Raises `UsageError`."""
    if len(profile.subtract) not in (1, extractor.channels):
        usual = extractor.profiles["ct"]
        raise UsageError(f"profile {profile.name} makes {len(profile.subtract)} channels, and {extractor.name} takes {extractor.channels}",
                         hint=f"use --profile {usual}, or another --features")  # fmt: skip


def _exact() -> AbstractContextManager[None]:
    """Keep a GPU from rounding to TF32 and from choosing its algorithms anew, so that it gives the numbers of a CPU."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def features_of(
    volume: Volume, extractor: Extractor, profile: Profile, *, device: torch.device | None = None, batch: int | None = None
) -> dict[str, NDArray[np.float32]]:
    """Return the features of a volume's slices by plane: (n, size) float32 each.

    Slices go through the network a few at a time (`batch`, at most): memory does not grow with their number. A slice whose
    features are not finite raises `UsageError`.
    """
    device = device or torch.device("cpu")
    found: dict[str, NDArray[np.float32]] = {}
    for plane, stack in stacks(volume, profile).items():
        across = stack.array.size // stack.array.shape[("yz", "zx", "xy").index(plane)]
        size = batch or max(1, min(_BATCH, _PIXELS // across))
        rows = []
        with torch.inference_mode(), _exact():
            for slices in stack.batches(size):
                part = torch.from_numpy(slices).to(device)
                rows.append(extractor.network(part.expand(-1, extractor.channels, -1, -1)).float().cpu().numpy())
        found[plane] = np.concatenate(rows) if rows else np.zeros((0, extractor.size), np.float32)
        if found[plane].shape[1:] != (extractor.size,):
            raise UsageError(f"{extractor.name} says that it gives {extractor.size} features and gives {found[plane].shape[1:]}",
                             hint="correct the plugin")  # fmt: skip
        if not np.isfinite(found[plane]).all():
            raise UsageError(f"{extractor.name} gives features that are not finite", hint="look at the volume with  maisi info")
    return {plane: found[plane] for plane in PLANES}
