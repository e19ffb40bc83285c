"""What checks return, and what they are told: `Finding`, `Verdict`, `Context`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Planes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""For each axis the planes between voxel k and k + 1, by k."""


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
    """What a check may know besides the volumes.

    `required` holds the label ids that must occur, `chosen` those whose size (or absence) was asked for, so that it is not
    judged. `own_mask` says that the mask is the user's own: its anatomy is told, not judged. `tiles` are the planes at which
    the image was stitched and `stored` the type of the label map's file, where these are known. With `compat` the checks
    give the reference's results, faults included: the right lower lobe (32) is no lung, an organ that holds only NaN
    passes, and what the reference does not look at is told, not judged.
    """

    required: tuple[int, ...] = ()
    compat: bool = False
    chosen: tuple[int, ...] = ()
    own_mask: bool = False
    tiles: Planes | None = None
    stored: str | None = None

    @property
    def tells_anatomy(self) -> bool:
        """Whether findings on the anatomy of the mask are informative."""
        return self.compat or self.own_mask


Check = Callable[..., list[Finding]]
"""`check(image, mask, context)`; one with the attribute `needs_image` = False is run on a lone label map too, without an image."""


def judged(
    check: str, label: str | None, value: float | None, text: str, *, low: float | None = None, high: float | None = None,
    tell: bool = False,
) -> Finding:  # fmt: skip
    """Return a finding that passes when its value lies within the bounds; with `tell` it is informative, and says so."""
    within = value is not None and (low is None or value >= low) and (high is None or value <= high)
    return Finding(check=check, label=label, value=value, low=low, high=high, passed=within or tell, text=text, informative=tell)
