"""Label maps as the mask networks see them: on their cube, as channels of the mask autoencoder, with ten anatomy sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..anatomy import BODY, maisi, remap_table
from ..catalog import ModelSpec
from ..errors import UsageError
from ..geometry import Geometry
from ..masks.diffusion import LATENT, VOXEL_MM
from ..masks.fitting import fit
from ..masks.sizes import ABSENT, SLOTS, Vector
from ..volumes import read_mask
from .lists import Case

MASK_NETWORKS = ("mask_vae", "mask_unet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A label map (X, Y, Z) uint8 on the cube of the mask networks, and the volume in ml of what lies in each anatomy slot."""

    id: str
    labels: NDArray[np.uint8]
    volumes_ml: tuple[float, ...]


def cube(spec: ModelSpec) -> Geometry:
    """Return the grid of the mask networks: 4 times their latent, at 1.5 mm. Raises `UsageError` for a model without them."""
    if any(part not in spec.networks for part in MASK_NETWORKS):
        raise UsageError(
            f"model {spec.name} has no mask networks", hint="use  --set train.model='\"rflow-ct\"', or a model file that has them"
        )
    latent = [int(n) for n in spec.mask_scheduler.get("latent_size", (LATENT,) * 3)]
    return Geometry(size=(4 * latent[0], 4 * latent[1], 4 * latent[2]), spacing=(VOXEL_MM,) * 3)


def read_bodies(cases: Sequence[Case], spec: ModelSpec) -> list[Body]:
    """Read the label maps of cases onto the cube, centres on centres. Raises `UsageError` for a case without one."""
    grid = cube(spec)
    found = []
    for case in cases:
        if case.label is None or case.label.suffix == ".npy":
            raise UsageError(f"case {case.id} has no label map", hint="give every case of the list a label in NIfTI")
        labels = fit(read_mask(case.label), grid).array
        counts = np.bincount(labels.reshape(-1), minlength=256)
        volumes = tuple(float(counts[maisi().id(name)]) * VOXEL_MM**3 / 1000 for name in SLOTS)
        found.append(Body(id=case.id, labels=labels, volumes_ml=volumes))
    return found


def channel_table() -> NDArray[np.uint8]:
    """Return the channel of the mask autoencoder for each label; what has none is body."""
    table = np.zeros(256, np.uint8)
    back = {label: channel for channel, label in remap_table("raw125").pairs.items()}
    table[1:] = back[BODY]
    for label, channel in back.items():
        table[label] = channel
    return table


def vectors(bodies: Sequence[Body], largest: Sequence[float]) -> list[Vector]:
    """Return the anatomy sizes of bodies: the volume of what lies in each slot over the `largest`, -1 where there is nothing."""
    return [
        tuple(ABSENT if ml == 0 or most == 0 else ml / most for ml, most in zip(body.volumes_ml, largest, strict=True)) for body in bodies
    ]


def largest_of(bodies: Sequence[Body]) -> tuple[float, ...]:
    """Return the largest volume in ml of each slot over some bodies."""
    return tuple(max(column) for column in zip(*(body.volumes_ml for body in bodies), strict=True))
