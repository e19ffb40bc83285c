"""The one tumour of a mask: whether it is asked for, how close several tries come to it, and what the record says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..anatomy import maisi
from ..errors import UsageError
from ..lesions import measure
from ..settings import GenerateSettings
from ..tumors import Lesion, Request, parse_request
from ..volumes import Mask
from .sizes import ABSENT, SLOTS, TUMORS

TOLERANCE = 0.25
"""How far, relative to what is asked for, the diameter or volume of a tumour may be and count as reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """The tumour that masks shall have: its label, the request with its size when there is one, and how that was typed."""

    tumor: int
    request: Request | None = None
    text: str = ""

    def miss(self, lesion: Lesion) -> float:
        """Return how far a lesion is from what was asked for; one in another organ than asked for is 1 further away."""
        if self.request is None:
            return 0.0
        elsewhere = lesion.host not in self.request.hosts
        return (self.request.miss(lesion) or 0.0) + elsewhere

    def reached(self, lesion: Lesion) -> bool:
        """Say whether a lesion is within the tolerance, in the organ that was asked for."""
        return self.request.met(lesion, tolerance=TOLERANCE) if self.request else lesion.components > 0


def aim_of(settings: GenerateSettings, sizes: Mapping[int, float] | None = None) -> Aim | None:
    """Return the tumour that is asked for by `--tumor`, by a name in `--anatomy`, or by a size; None for no tumour.

    Raises `UsageError` for more than one.
    """
    request = parse_request(settings.tumor) if settings.tumor else None
    ids = [maisi().id(name) for name in settings.anatomy]
    asked = {label.id for label in maisi().tumors() if label.id in ids}
    asked |= {maisi().id(SLOTS[slot]) for slot in TUMORS if (sizes or {}).get(slot, ABSENT) != ABSENT}
    if request is not None and request.name in (SLOTS[slot] for slot in sizes or ()):
        raise UsageError(f"--tumor and --anatomy-size both give the size of the {request.name}", hint="leave one of them out")
    asked |= {request.tumor} if request else set()
    if len(asked) > 1:
        names = " and ".join(maisi().name_of(label) for label in sorted(asked))
        raise UsageError(f"{names} are asked for, and the networks know masks with one tumour", hint="ask for one of them")
    return Aim(tumor=asked.pop(), request=request, text=settings.tumor or "") if asked else None


@dataclass(slots=True, kw_only=True)
class Best:
    """The best of the masks that were tried for one sample, and how many there were."""

    aim: Aim | None
    mask: Mask | None = None
    about: Mapping[str, Any] | None = None
    lesion: Lesion | None = None
    tries: int = 0

    def offer(self, mask: Mask, about: Mapping[str, Any]) -> bool:
        """Keep a mask if it is the best so far; say whether it is good enough to stop."""
        self.tries += 1
        if self.aim is None:
            self.mask, self.about = mask, about
            return True
        lesion = measure(mask, self.aim.tumor)
        if self.lesion is None or self.aim.miss(lesion) < self.aim.miss(self.lesion):
            self.mask, self.about, self.lesion = mask, about, lesion
        return self.aim.reached(lesion)

    def record(self) -> dict[str, Any]:
        """Return what the record says: how the mask was made, and what became of the tumour that was asked for."""
        found = dict(self.about or {})
        if self.aim is not None and self.lesion is not None:
            lesion, request = self.lesion, self.aim.request
            found["tumor"] = {
                "requested": self.aim.text or maisi().name_of(self.aim.tumor), "name": maisi().name_of(self.aim.tumor), "id": lesion.tumor,
                "volume_ml": round(lesion.volume_ml, 4), "diameter_mm": round(lesion.diameter_mm, 3), "components": lesion.components,
                "host": maisi().name_of(lesion.host) if lesion.host is not None else None, "overlap": round(lesion.overlap, 4),
                "miss": None if request is None or request.unit == "relative" else round(self.aim.miss(lesion), 4),
                "reached": self.aim.reached(lesion), "tries": self.tries,
            }  # fmt: skip
        return found

    def shortfall(self) -> str | None:
        """Say what is not as it was asked for, None when all is."""
        if self.aim is None or self.aim.request is None or self.lesion is None or self.aim.reached(self.lesion):
            return None
        host = maisi().name_of(self.lesion.host) if self.lesion.host is not None else "no organ"
        return (f"{self.aim.text} was asked for, and the best of {self.tries} masks has {self.lesion.diameter_mm:.1f} mm, "
                f"{self.lesion.volume_ml:.2f} ml in {host}")  # fmt: skip
