"""Checks that need no table: values and labels as such."""

from __future__ import annotations

import numpy as np

from ..volumes import Mask, Volume
from .findings import Context, Finding, judged


def organs_present(image: Volume | None, mask: Mask | None, context: Context) -> list[Finding]:
    """Say for each required organ how much of it there is, in ml; none fails."""
    from ..anatomy import maisi

    shown = mask or image
    if not context.required or shown is None:
        return []
    counts = mask.counts() if mask is not None else np.zeros(256, dtype=np.int64)
    voxel_ml = float(np.prod(shown.geometry.spacing)) / 1000
    findings = []
    for label in context.required:
        name, ml = maisi().name_of(label), float(counts[label]) * voxel_ml
        text = f"{ml:.1f} ml of {name}" if counts[label] else f"{name} was asked for and is not in the mask"
        findings.append(judged("organs-present", name, ml, text, low=voxel_ml))
    return findings


organs_present.needs_image = False  # type: ignore[attr-defined]


def labels_known(image: Volume | None, mask: Mask | None, context: Context) -> list[Finding]:
    """Count the ids of the mask that its vocabulary does not know; one is too many, and no label at all too few."""
    from ..anatomy import maisi

    if mask is None or mask.vocabulary != "maisi":
        return []
    ids = mask.ids()
    unknown = [label for label in ids if label not in maisi()]
    text = f"unknown label ids: {', '.join(map(str, unknown))}" if unknown else "every label id is known"
    text = text if ids else "the label map holds no label"
    return [
        Finding(
            check="labels-known",
            label=None,
            value=float(len(unknown)),
            low=None,
            high=0.0,
            passed=bool(ids) and not unknown,
            text=text,
        )
    ]


labels_known.needs_image = False  # type: ignore[attr-defined]


def label_type(image: Volume | None, mask: Mask | None, context: Context) -> list[Finding]:
    """Look whether the label map's file stores whole numbers as such; floats invite interpolation and rounding."""
    if mask is None or context.stored is None:
        return []
    whole = np.dtype(context.stored).kind in "iub"
    text = f"labels are stored as {context.stored}" + ("" if whole else ": save them as uint8")
    return [judged("label-type", None, float(not whole), text, high=0.0, tell=context.compat)]


label_type.needs_image = False  # type: ignore[attr-defined]


def intensity(image: Volume, mask: Mask | None, context: Context) -> list[Finding]:
    """Look for values that are not finite, and for an image without contrast."""
    array = image.array
    bad = 0 if array.dtype.kind in "iu" else int(array.size - np.count_nonzero(np.isfinite(array)))
    spread = float(np.nanmax(array)) - float(np.nanmin(array)) if bad < array.size else 0.0
    return [
        judged("intensity", "finite", float(bad), f"{bad} voxels are not finite" if bad else "every voxel is finite", high=0.0),
        judged("intensity", "range", spread, f"values span {spread:.4g}", low=1.0),
    ]
