"""CT numbers: medians inside organs, the ends of the scale, and steps across borders."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..volumes import Mask, Volume
from .findings import Context, Finding, judged
from .table import ct_table, membership


def is_ct(image: Volume) -> bool:
    """Say whether an image is in Hounsfield units."""
    return image.modality.startswith("ct")


def hu_median(image: Volume, mask: Mask | None, context: Context) -> list[Finding]:
    """Compare the median HU of each organ with the range seen in real scans (reference 3); CT only.

    NaN is left out. An organ that is not in the mask gives no finding.
    """
    if mask is None or not is_ct(image):
        return []
    rows = ct_table()["median"]
    lists = [row.get("compat", row["labels"]) if context.compat else row["labels"] for row in rows]
    group = np.zeros(256, dtype=np.uint8)
    for number, labels in enumerate(lists, start=1):
        group[list(labels)] = number
    findings = []
    for number, hu in _values_of(group, image, mask).items():
        row = rows[number - 1]
        finite = hu[~np.isnan(hu)] if hu.dtype.kind == "f" else hu
        low, high, name = float(row["low"]), float(row["high"]), row["name"]
        median = float(np.median(finite)) if finite.size else None
        if median is None:
            text = f"{name} holds no number"
            passed = context.compat
        else:
            passed = low <= median <= high
            where = "within" if passed else "outside"
            text = f"median {median:.1f} HU in the {name}, {where} {low:.1f}..{high:.1f}"
        findings.append(Finding(check="hu-median", label=name, value=median, low=low, high=high, passed=passed, text=text))
    return findings


def _values_of(group: NDArray[np.uint8], image: Volume, mask: Mask) -> dict[int, NDArray[Any]]:
    """Return the image values of each group that occurs; `group` maps a label to its group, 0 for none."""
    groups = group[mask.array.ravel()]
    where = np.flatnonzero(groups)
    members = groups[where]
    order = np.argsort(members, kind="stable")
    values = image.array.ravel()[where[order]]
    counts = np.bincount(members)
    ends = np.cumsum(counts)
    return {n: values[ends[n] - counts[n] : ends[n]] for n in range(1, len(counts)) if counts[n]}


def clipped(image: Volume, mask: Mask | None, context: Context) -> list[Finding]:
    """Measure the share of body voxels at the ends of the scale, where the decoder ran out of range; CT only.

    The low end does not count labels that hold gas. Without a mask only the high end is judged, over all
    voxels above -500 HU.
    """
    if not is_ct(image):
        return []
    row = ct_table()["clipped"]
    hu = image.array
    body = hu > -500 if mask is None else mask.array > 0
    total = int(np.count_nonzero(body))
    ends = [("high", np.count_nonzero(body & (hu >= row["high_hu"])), row["high_hu"], row["high_share"])]
    if mask is not None:
        solid = body & ~membership(row["gas"])[mask.array]
        ends.append(("low", np.count_nonzero(solid & (hu <= row["low_hu"])), row["low_hu"], row["low_share"]))
    findings = []
    for label, count, bound, limit in ends:
        share = float(count) / total if total else 0.0
        findings.append(
            Finding(
                check="clipped",
                label=label,
                value=share,
                low=None,
                high=float(limit),
                passed=share <= limit,
                text=f"{share:.2%} of the body at {bound} HU or {'above' if label == 'high' else 'below'}",
            )
        )
    return findings


def follows_mask(image: Volume, mask: Mask | None, context: Context) -> list[Finding]:
    """Compare the HU step across each organ's border with the sign anatomy gives it; CT only.

    Each step alone is informative; an image in which more than a third of four or more are off is not that of the mask.
    """
    if mask is None or not is_ct(image):
        return []
    findings = hu_steps(image, mask)
    row = ct_table()["follows"]
    if len(findings) < row["least_organs"]:
        return findings
    off = [finding for finding in findings if not _within(finding)]
    text = f"{len(off)} of {len(findings)} HU steps across borders of organs are not as anatomy makes them"
    share = len(off) / len(findings)
    return [*findings, judged("follows-mask", "all", share, text, high=row["share_off"], tell=context.compat)]


def _within(finding: Finding) -> bool:
    value = finding.value
    assert value is not None
    return (finding.low is None or value >= finding.low) and (finding.high is None or value <= finding.high)


def hu_steps(image: Volume, mask: Mask) -> list[Finding]:
    """Return, for each organ of the step table that occurs, by how many HU it differs from its neighbours.

    Inside and outside are the two voxels next to the border, taken in pairs along each axis; what lies
    outside the body (label 0) does not count. Organs with fewer than 50 such pairs are left out.
    """
    sums, counts = border_steps(image, mask)
    findings = []
    for row in ct_table()["step"]:
        inside = list(row["labels"])
        outside = list(row.get("against", sorted(set(range(1, 256)) - set(inside))))
        window = np.ix_(inside, outside)
        pairs = int(counts[window].sum())
        if pairs < 50:
            continue
        step, least = float(sums[window].sum() / pairs), float(row["least"])
        low, high = (least, None) if row["sign"] > 0 else (None, -least)
        follows = step >= least if row["sign"] > 0 else step <= -least
        expected = f"{'at least' if row['sign'] > 0 else 'at most'} {row['sign'] * least:+.0f}"
        verdict = f"as expected ({expected})" if follows else f"expected {expected}: the image may not follow the mask"
        findings.append(
            Finding(
                check="follows-mask",
                label=row["name"],
                value=step,
                low=low,
                high=high,
                passed=True,
                text=f"{step:+.0f} HU across the border of the {row['name']}, {verdict}",
                informative=True,
            )
        )
    return findings


def border_steps(image: Volume, mask: Mask) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the summed HU step and the number of voxel pairs for each ordered pair of touching labels.

    Both are 256 x 256: entry [a, b] is about voxels of label a less voxels of label b one or two steps away
    along an axis. Pairs with a value that is not finite are left out.
    """
    sums, counts = np.zeros(256 * 256), np.zeros(256 * 256, dtype=np.int64)
    labels, hu = mask.array, image.array
    for axis in range(3):
        for step in (1, 2):
            here = tuple(slice(None, -step) if a == axis else slice(None) for a in range(3))
            there = tuple(slice(step, None) if a == axis else slice(None) for a in range(3))
            border = np.nonzero(labels[here] != labels[there])
            a, b = labels[here][border].astype(np.int64), labels[there][border].astype(np.int64)
            with np.errstate(invalid="ignore"):
                difference = hu[here][border].astype(np.float64) - hu[there][border]
            good = np.isfinite(difference)
            a, b, difference = a[good], b[good], difference[good]
            for pair, sign in ((a * 256 + b, 1.0), (b * 256 + a, -1.0)):
                sums += sign * np.bincount(pair, weights=difference, minlength=256 * 256)
                counts += np.bincount(pair, minlength=256 * 256)
    return sums.reshape(256, 256), counts.reshape(256, 256)
