"""Sanity of MR images: magnitudes over a dark background."""

from __future__ import annotations

import numpy as np

from ..volumes import Mask, Volume
from .findings import Context, Finding, judged
from .hu import is_ct
from .table import ct_table

CORNER = 0.08
"""The share of each axis that a corner block takes."""


def mr_background(image: Volume, mask: Mask | None, context: Context) -> list[Finding]:
    """Look whether the corners of an MR image are dark and nothing is clearly below 0; MR only."""
    if is_ct(image):
        return []
    row, values = ct_table()["mr"], image.array
    top = float(np.percentile(values, 99.5))
    widths = [max(1, round(n * CORNER)) for n in values.shape]
    ends = [(slice(0, w), slice(-w, None)) for w in widths]
    corners = [float(np.median(values[x, y, z])) for x in ends[0] for y in ends[1] for z in ends[2]]
    level = float(np.median(corners)) / top if top > 0 else 1.0
    negative = float(np.count_nonzero(values < row["negative_level"] * abs(top))) / values.size
    return [
        judged("mr-background", "corners", level, f"the corners are at {level:.1%} of the brightest tissue", high=row["background"],
               tell=context.compat),
        judged("mr-background", "negative", negative, f"{negative:.2%} of the voxels are clearly negative", high=row["negative_share"],
               tell=context.compat),
    ]  # fmt: skip


def mr_contrast(image: Volume, mask: Mask | None, context: Context) -> list[Finding]:
    """Look whether the tissue of an MR image has contrast and is not cut off at the top; MR only.

    Tissue is what is brighter than a tenth of the 99.5 percentile.
    """
    if is_ct(image):
        return []
    row, values = ct_table()["mr"], image.array
    top = float(np.percentile(values, 99.5))
    tissue = values[values > 0.1 * top] if top > 0 else values[:0]
    if tissue.size:
        low, high = (float(v) for v in np.percentile(tissue, (5, 95)))
        contrast, ceiling = (high - low) / top, float(tissue.max())
        cut = float(np.count_nonzero(tissue >= ceiling)) / tissue.size
    else:
        contrast, cut = 0.0, 0.0
    return [
        judged(
            "mr-contrast", "tissue", contrast, f"tissue spans {contrast:.1%} of the brightest", low=row["contrast"], tell=context.compat
        ),
        judged("mr-contrast", "clipped", cut, f"{cut:.2%} of the tissue at the largest value", high=row["top_share"], tell=context.compat),
    ]
