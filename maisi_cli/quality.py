"""Quality checks: plain functions that look at an image and its mask and return findings.

A check is a function `check(image, mask, context) -> list[Finding]`; the built-in ones are registered through
the hook `register_checks` like anyone else's. A verdict passes when every finding does.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .volumes import Mask, Volume, require_same_grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check saw: `value` should lie in `low`..`high` (None: no such bound); `text` says it in words.

    An `informative` finding always passes; its text tells when the value is out of bounds.
    """

    check: str
    label: str | None
    value: float | None
    low: float | None
    high: float | None
    passed: bool
    text: str
    informative: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON shows it."""
        return {
            "check": self.check,
            "label": self.label,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "passed": self.passed,
            "text": self.text,
            "informative": self.informative,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """All findings on one case."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether every finding passed."""
        return all(finding.passed for finding in self.findings)

    def failures(self) -> tuple[Finding, ...]:
        """Return the findings that did not pass."""
        return tuple(finding for finding in self.findings if not finding.passed)

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON shows it: `passed` and `findings`."""
        return {"passed": self.passed, "findings": [finding.as_dict() for finding in self.findings]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a check may know besides the volumes: label ids that must occur, and whose numerics are wanted.

    With `compat` the checks give the reference's results, faults included: the right lower lobe (32) is no
    lung, and an organ that holds only NaN passes.
    """

    required: tuple[int, ...] = ()
    compat: bool = False


Check = Callable[..., list[Finding]]
"""`check(image, mask, context)`; one with the attribute `needs_image` = False is run on a lone label map too, without an image."""


def check(
    image: Volume | None,
    mask: Mask | None,
    *,
    checks: Sequence[str | Check] | None = None,
    required: Iterable[str | int] = (),
    compat: bool = False,
) -> Verdict:
    """Run `checks`, names or functions (default: every registered one), on an image and its mask.

    `required` names the organs that must be present. HU checks say nothing about an MR image. Of a mask without an
    image only those are run that need none: a verdict without findings says nothing. Raises `UsageError` for an unknown
    check or organ, and when image and mask lie on different grids.
    """
    from .anatomy import maisi
    from .plugins import plugins

    if image is not None and mask is not None:
        require_same_grid(image, mask)
    context = Context(required=tuple(maisi().id(name) for name in required), compat=compat)
    registry = plugins().registry("checks")
    chosen = registry.names() if checks is None else checks
    functions = [registry.get(one) if isinstance(one, str) else one for one in chosen]
    if image is None:
        functions = [one for one in functions if not getattr(one, "needs_image", True)]
    return Verdict(findings=tuple(finding for run in functions for finding in run(image, mask, context)))


# --- the table -------------------------------------------------------------------


def parse_labels(entries: Iterable[int | str]) -> tuple[int, ...]:
    """Return label ids from numbers and inclusive ranges: `[1, "28-32"]`."""
    ids: list[int] = []
    for entry in entries:
        first, _, last = str(entry).partition("-")
        ids.extend(range(int(first), int(last or first) + 1))
    return tuple(ids)


@cache
def ct_table() -> dict[str, Any]:
    """Return `data/quality_ct.toml`, its label lists as tuples of ids."""
    data = tomllib.loads((files("maisi_cli") / "data" / "quality_ct.toml").read_text("utf-8"))
    for row in (*data["median"], *data["step"], data["clipped"]):
        for key in ("labels", "compat", "against", "gas"):
            if key in row:
                row[key] = parse_labels(row[key])
    return data


def _is_ct(image: Volume) -> bool:
    return image.modality.startswith("ct")


def _membership(labels: Iterable[int]) -> NDArray[np.bool_]:
    table = np.zeros(256, dtype=bool)
    table[list(labels)] = True
    return table


# --- checks -------------------------------------------------------------------


def hu_median(image: Volume, mask: Mask | None, context: Context) -> list[Finding]:
    """Compare the median HU of each organ with the range seen in real scans (reference 3); CT only.

    NaN is left out. An organ that is not in the mask gives no finding.
    """
    if mask is None or not _is_ct(image):
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


def organs_present(image: Volume | None, mask: Mask | None, context: Context) -> list[Finding]:
    """Say for each required organ how much of it there is, in ml; none fails."""
    from .anatomy import maisi

    shown = mask or image
    if not context.required or shown is None:
        return []
    counts = mask.counts() if mask is not None else np.zeros(256, dtype=np.int64)
    voxel_ml = float(np.prod(shown.geometry.spacing)) / 1000
    findings = []
    for label in context.required:
        name, ml = maisi().name_of(label), float(counts[label]) * voxel_ml
        passed = bool(counts[label])
        text = f"{ml:.1f} ml of {name}" if passed else f"{name} was asked for and is not in the mask"
        findings.append(
            Finding(
                check="organs-present",
                label=name,
                value=ml,
                low=voxel_ml,
                high=None,
                passed=bool(passed),
                text=text,
            )
        )
    return findings


organs_present.needs_image = False  # type: ignore[attr-defined]


def labels_known(image: Volume | None, mask: Mask | None, context: Context) -> list[Finding]:
    """Count the ids of the mask that its vocabulary does not know; one is too many, and no label at all too few."""
    from .anatomy import maisi

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


def intensity(image: Volume, mask: Mask | None, context: Context) -> list[Finding]:
    """Look for values that are not finite, and for an image without contrast."""
    array = image.array
    bad = 0 if array.dtype.kind in "iu" else int(array.size - np.count_nonzero(np.isfinite(array)))
    findings = [
        Finding(
            check="intensity",
            label="finite",
            value=float(bad),
            low=None,
            high=0.0,
            passed=bad == 0,
            text=f"{bad} voxels are not finite" if bad else "every voxel is finite",
        )
    ]
    spread = float(np.nanmax(array)) - float(np.nanmin(array)) if bad < array.size else 0.0
    findings.append(
        Finding(
            check="intensity",
            label="range",
            value=spread,
            low=1.0,
            high=None,
            passed=spread >= 1.0,
            text=f"values span {spread:.4g}",
        )
    )
    return findings


def clipped(image: Volume, mask: Mask | None, context: Context) -> list[Finding]:
    """Measure the share of body voxels at the ends of the scale, where the decoder ran out of range; CT only.

    The low end does not count labels that hold gas. Without a mask only the high end is judged, over all
    voxels above -500 HU.
    """
    if not _is_ct(image):
        return []
    row = ct_table()["clipped"]
    hu = image.array
    body = hu > -500 if mask is None else mask.array > 0
    total = int(np.count_nonzero(body))
    ends = [("high", np.count_nonzero(body & (hu >= row["high_hu"])), row["high_hu"], row["high_share"])]
    if mask is not None:
        solid = body & ~_membership(row["gas"])[mask.array]
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
    """Compare the HU step across each organ's border with the sign anatomy gives it; informative, CT only."""
    return hu_steps(image, mask) if mask is not None and _is_ct(image) else []


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
