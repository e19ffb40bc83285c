"""Label maps as the mask networks see them: on their cube, as channels of the mask autoencoder, with ten anatomy sizes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..anatomy import BODY, maisi, remap_table
from ..catalog import ModelSpec
from ..errors import UsageError
from ..geometry import Geometry
from ..masks.diffusion import LATENT, voxel_mm
from ..masks.fitting import fit
from ..masks.sizes import ABSENT, SLOTS, Vector
from ..volumes import read_mask
from .lists import Case

MASK_NETWORKS = ("mask_vae", "mask_unet")
SLAB = 32
"""Planes that are packed together: a patch needs a few slabs, not the whole map."""

Place = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A label map (X, Y, Z) uint8 on the cube of the mask networks, packed: thousands of them stay in memory.

    `counts` are the voxels of each of 256 labels, `voxel_ml` is the volume of one.
    """

    id: str
    size: tuple[int, int, int]
    slabs: tuple[bytes, ...]
    counts: NDArray[np.int64]
    voxel_ml: float

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The whole label map."""
        return self.part((slice(0, self.size[0]), slice(None), slice(None)))

    def part(self, place: Place) -> NDArray[np.uint8]:
        """Return the labels at a place; slabs that it does not touch stay packed."""
        start, stop = place[0].start, place[0].stop
        first, last = start // SLAB, -(-stop // SLAB)
        planes = np.frombuffer(b"".join(map(zlib.decompress, self.slabs[first:last])), np.uint8).reshape(-1, *self.size[1:])
        return planes[start - first * SLAB : stop - first * SLAB, *place[1:]].copy()

    @property
    def volumes_ml(self) -> tuple[float, ...]:
        """The volume of what lies in each anatomy slot."""
        return tuple(float(self.counts[maisi().id(name)]) * self.voxel_ml for name in SLOTS)

    @classmethod
    def packed(cls, name: str, labels: NDArray[np.uint8], voxel_ml: float) -> Body:
        """Pack a label map."""
        x, y, z = labels.shape
        slabs = tuple(zlib.compress(np.ascontiguousarray(labels[k : k + SLAB]).tobytes(), 1) for k in range(0, x, SLAB))
        return cls(id=name, size=(x, y, z), slabs=slabs, counts=np.bincount(labels.reshape(-1), minlength=256), voxel_ml=voxel_ml)


def cube(spec: ModelSpec) -> Geometry:
    """Return the grid of the mask networks: 4 times their latent, at their spacing.

    Raises `UsageError` for a model without them, and for an autoencoder with other channels than those of the released one.
    """
    if any(part not in spec.networks for part in MASK_NETWORKS):
        raise UsageError(
            f"model {spec.name} has no mask networks", hint="use  --set train.model='\"nano-mask\"', or a model file that has them"
        )
    channels, wanted = int(spec.networks["mask_vae"].arguments["out_channels"]), len(remap_table("raw125").pairs) + 1
    if channels != wanted:
        raise UsageError(f"the mask autoencoder of {spec.name} has {channels} channels, and labels have {wanted}",
                         hint=f"set networks.mask_vae.out_channels to {wanted} in {spec.path}")  # fmt: skip
    x, y, z = (4 * int(n) for n in spec.mask_scheduler.get("latent_size", (LATENT,) * 3))
    return Geometry(size=(x, y, z), spacing=(voxel_mm(spec),) * 3)


def read_bodies(cases: Iterable[Case], spec: ModelSpec) -> Iterator[Body]:
    """Yield the label maps of cases on the cube, centres on centres.

    Raises `UsageError` for a case without one, and for a map without the body's envelope: no mask without it can be used.
    """
    grid = cube(spec)
    for case in cases:
        if case.label is None or case.label.suffix == ".npy":
            raise UsageError(f"case {case.id} has no label map", hint="give every case of the list a label in NIfTI")
        labels = fit(read_mask(case.label), grid).array
        if not (labels == BODY).any():
            raise UsageError(f"{case.label} has no body envelope (label {BODY}), and masks without one are of no use",
                             hint=f"maisi labels add-body {case.label} NEW.nii.gz --ct CT.nii.gz")  # fmt: skip
        yield Body.packed(case.id, labels, float(np.prod(grid.spacing)) / 1000)


def channel_table() -> NDArray[np.uint8]:
    """Return the channel of the mask autoencoder for each label; what has none is body."""
    table = np.zeros(256, np.uint8)
    back = {label: channel for channel, label in remap_table("raw125").pairs.items()}
    table[1:] = back[BODY]
    for label, channel in back.items():
        table[label] = channel
    return table


def told_of_lost(bodies: Iterable[Body]) -> list[str]:
    """Return a sentence on the labels of some bodies that have no channel, and become body; none where there are none."""
    known = set(remap_table("raw125").pairs.values())
    present = {int(label) for body in bodies for label in np.flatnonzero(body.counts)}
    lost = [maisi().name_of(label) for label in sorted(present - known - {0})]
    return [f"labels without a channel become body: {', '.join(lost)}"] if lost else []


def channel_voxels(bodies: Sequence[Body]) -> NDArray[np.float64]:
    """Return the voxels of each channel over some bodies."""
    table = channel_table()
    counts: NDArray[np.int64] = np.sum([body.counts for body in bodies], axis=0)
    return np.bincount(table, weights=counts, minlength=int(table.max()) + 1).astype(np.float64)


def channel_shares(bodies: Sequence[Body]) -> NDArray[np.float64]:
    """Return the share of each channel in some bodies, not less than that of one voxel in them."""
    voxels = np.maximum(channel_voxels(bodies), 1)
    shares: NDArray[np.float64] = voxels / voxels.sum()
    return shares


def channel_weights(bodies: Sequence[Body], balance: float) -> NDArray[np.float32]:
    """Return a weight for each channel: (the median organ's voxels / its own) to the power `balance`, 0.1 to 10; 1 for what is nowhere."""
    voxels = channel_voxels(bodies)
    there = voxels > 0
    weights = np.ones(len(voxels), np.float32)
    weights[there] = np.clip((np.median(voxels[there]) / voxels[there]) ** balance, 0.1, 10)
    return weights


def vectors(volumes: Iterable[Sequence[float]], largest: Sequence[float]) -> list[Vector]:
    """Return the anatomy sizes of bodies: the volume of what lies in each slot over the `largest`, -1 where there is nothing."""
    return [tuple(ABSENT if ml == 0 or most == 0 else ml / most for ml, most in zip(each, largest, strict=True)) for each in volumes]


def largest_of(volumes: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Return the largest volume in ml of each slot over some bodies."""
    return tuple(max(column) for column in zip(*volumes, strict=True))
