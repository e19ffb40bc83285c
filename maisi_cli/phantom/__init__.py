"""Procedural bodies: label volumes and HU volumes made from a seed alone, with no data.

`body` paints an anatomy in the MAISI vocabulary, head to thigh; `render` turns any mask of that vocabulary
into Hounsfield units. They are the download-free mask source of `generate` and the training data of `nano-
ct`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError
from ..geometry import Geometry
from ..volumes import Mask
from . import organs, skeleton
from .frame import REGION_Z, Canvas, Habitus
from .rendering import PHASES, render

__all__ = ["PHASES", "body", "render"]


def body(geometry: Geometry, seed: int, *, regions: Sequence[str] = ("chest", "abdomen"), sex: str | None = None) -> Mask:
    """Paint one person: a uint8 label volume in the MAISI vocabulary, 200 for body without a label, 0
    outside.

    The centre of `geometry` lies at the middle of `regions` (head, chest, abdomen, lower); its size and
    spacing decide what is visible. A seed is one person: another grid shows the same body. Equal arguments
    give equal bytes. Raises `UsageError` for an unknown region or sex.
    """
    for region in regions:
        if region not in REGION_Z:
            raise UsageError(f"the phantom has no region {region!r}", hint=f"use {', '.join(REGION_Z)}")
    if sex not in (None, "male", "female"):
        raise UsageError(f"the phantom has no sex {sex!r}", hint="use male or female, or leave it out")
    canvas = Canvas(geometry, seed, Habitus.draw(seed, sex), regions or ("chest", "abdomen"))
    wall = skeleton.Wall(canvas)
    skeleton.outline(canvas, wall)
    skeleton.bones(canvas, wall)
    organs.paint(canvas, wall)
    return Mask(array=canvas.labels, geometry=geometry)
