"""Tumours: the organ that each kind lies in, and the one that a run asks for.

Standard library only, so that a request is checked before anything is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .anatomy import TUMOR_GROUP, fold, maisi
from .errors import UsageError, unknown

Unit = Literal["mm", "ml", "relative"]

LUNG_TUMOR, PANCREATIC_TUMOR, LIVER_TUMOR, COLON_TUMOR, BONE_LESION = 23, 24, 26, 27, 128
KIDNEY_MASS = 129
"""A channel of the mask decoder that the label list calls `dummy6`."""
_KIDNEYS = (5, 14)
LARGEST_MM = 200.0
RELATIVE_MAX: Mapping[int, float] = {LUNG_TUMOR: 5.61, PANCREATIC_TUMOR: 16.5, LIVER_TUMOR: 6.25, COLON_TUMOR: 5.14, BONE_LESION: 6.31}
"""The largest relative size of each tumour among the size vectors that the mask networks were trained with (1.11)."""


def hosts(lesion: int) -> tuple[int, ...]:
    """Return the labels of the organ that a tumour, cyst or kidney mass grows in, or () when it is none of these."""
    vocabulary = maisi()
    label = vocabulary.get(lesion)
    if lesion == KIDNEY_MASS:
        return _KIDNEYS
    if label is None or label.group not in (TUMOR_GROUP, "cyst"):
        return ()
    if lesion == BONE_LESION:
        return tuple(sorted(id for group in ("spine", "rib", "bone") for id in vocabulary.ids(group)))
    host = vocabulary.get(label.host) if label.host is not None else None
    if host is None:
        return ()
    return vocabulary.ids("lung") if host.group == "lung" else (host.id,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesion:
    """What a mask holds of one tumour; all zero, and without a host, when it holds none.

    `diameter_mm` is that of a ball as large as the largest of its `components` (voxels that touch by a corner
    are connected). `host` is the label that surrounds most of it, one of its proper hosts if any does.
    `overlap` is the share of its voxels that lie in a proper host: those whose nearest other voxel is host.
    """

    tumor: int
    volume_ml: float
    diameter_mm: float
    components: int
    host: int | None
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One tumour that is asked for: its label, the labels it may lie in, and its size.

    `amount` is an equivalent diameter in mm, a volume in ml, or the mask networks' relative size (`unit`).
    """

    tumor: int
    hosts: tuple[int, ...]
    amount: float
    unit: Unit

    @property
    def name(self) -> str:
        """Return the tumour's name."""
        return maisi().name_of(self.tumor)

    @property
    def volume_ml(self) -> float | None:
        """Return the volume that is asked for, a diameter being taken as that of a ball; None for a relative size."""
        if self.unit == "relative":
            return None
        return self.amount if self.unit == "ml" else math.pi / 6 * self.amount**3 / 1000

    def miss(self, lesion: Lesion) -> float | None:
        """Return how far a lesion is from what was asked, 0.25 for a quarter too large or small; None for a relative size.

        A request in mm is held against the diameter, one in ml against the volume. A lesion that is not there is 1 away.
        """
        if self.unit == "relative":
            return None
        made = lesion.diameter_mm if self.unit == "mm" else lesion.volume_ml
        return abs(made / self.amount - 1)

    def met(self, lesion: Lesion, *, tolerance: float = 0.25) -> bool:
        """Say whether a lesion lies where it was asked for and is off by no more than `tolerance` (a relative size always is)."""
        miss = self.miss(lesion)
        return lesion.components > 0 and lesion.host in self.hosts and (miss is None or miss <= tolerance)

    def __str__(self) -> str:
        names = (name for name, target in _targets().items() if target == (self.tumor, self.hosts))
        size = f"={self.amount!r}" if self.unit == "relative" else f":{self.amount!r}{self.unit}"
        return f"{self.name if self.hosts == hosts(self.tumor) else next(names, self.name)}{size}"


def parse_request(text: str) -> Request:
    """Read a request such as `liver:15mm`, `lung:2.5ml` or `hepatic tumor=0.3` (a relative size).

    An organ stands for its tumour, and one part of it (`right lung lower lobe`, `vertebrae L3`) narrows the host.
    A number without a unit is a relative size and takes `=`. Raises `UsageError`, with near matches, for an organ
    without a tumour class, a size that cannot be, or several tumours.
    """
    example = "write it like liver:15mm, lung:2.5ml or 'hepatic tumor=0.3'"
    if re.search(r"[,;+]\s*[^\W\d]", text):
        raise UsageError(f"{text!r} asks for several tumours, and the networks know masks with one", hint=f"ask for one: {example}")
    found = re.fullmatch(r"\s*(?P<name>[^:=]+?)\s*(?P<sign>[:=])\s*(?P<size>.+?)\s*", text)
    if not found:
        raise UsageError(f"the tumour {text!r} has no size", hint=example)
    tumor, host = _target(found["name"])
    amount, unit = _size(found["size"], text, example)
    if unit == "relative":
        _check_relative(amount, tumor, found["name"], bare=found["sign"] == ":")
    return Request(tumor=tumor, hosts=host, amount=amount, unit=unit)


def _target(name: str) -> tuple[int, tuple[int, ...]]:
    vocabulary = maisi()
    targets = _targets()
    wanted = fold(name)
    wanted = fold(vocabulary.aliases.get(wanted, wanted))
    if wanted.isdecimal():
        wanted = fold(vocabulary.name_of(int(wanted)))
    if wanted in targets:
        return targets[wanted]
    known = {fold(label.name) for label in vocabulary.labels if label.group != "dummy"} | {"kidney", "kidneys", "kidney mass"}
    if wanted in known or fold(name) in known:
        raise UsageError(f"no tumour of {name.strip()!r} can be made: MAISI has no class for it",
                         hint="tumours lie in the lung, pancreas, liver, colon or bone")  # fmt: skip
    raise unknown("tumour or organ with a tumour", name.strip(), targets, see="maisi labels list")


def _targets() -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return all that can be asked for by name: tumours, their hosts, and groups of hosts."""
    vocabulary = maisi()
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for label in vocabulary.tumors():
        for host in hosts(label.id):
            found[fold(vocabulary.name_of(host))] = (label.id, (host,))
    for side in ("left", "right"):
        lobes = tuple(id for id in vocabulary.ids("lung") if vocabulary.name_of(id).startswith(side))
        found[f"{side} lung"] = (LUNG_TUMOR, lobes)
    found["lung"] = found["lungs"] = (LUNG_TUMOR, hosts(LUNG_TUMOR))
    found["bone"] = found["bones"] = (BONE_LESION, hosts(BONE_LESION))
    found["spine"] = (BONE_LESION, vocabulary.ids("spine"))
    found["ribs"] = (BONE_LESION, vocabulary.ids("rib"))
    for label in vocabulary.tumors():
        found[fold(label.name)] = (label.id, hosts(label.id))
    return found


def _size(size: str, text: str, example: str) -> tuple[float, Unit]:
    found = re.fullmatch(r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>(?:[^\W\d]\S*)?)", size)
    if not found:
        raise UsageError(f"{size!r} in {text!r} is not a size", hint=example)
    amount, unit = float(found["number"]), found["unit"].casefold()
    scale: dict[str, tuple[float, Unit]] = {"": (1, "relative"), "mm": (1, "mm"), "cm": (10, "mm"), "ml": (1, "ml"),
                                            "cc": (1, "ml"), "cm3": (1, "ml"), "cm³": (1, "ml"), "mm3": (1e-3, "ml")}  # fmt: skip
    if unit not in scale:
        raise UsageError(f"{found['unit']!r} in {text!r} is no unit of a tumour's size",
                         hint="use mm or cm for its diameter, ml for its volume, or a bare number for its relative size")  # fmt: skip
    factor, kind = scale[unit]
    amount *= factor
    if not (math.isfinite(amount) and amount > 0):
        raise UsageError(f"the tumour in {text!r} has no positive size", hint="leave the tumour out for a mask without one")
    limit = {"mm": LARGEST_MM, "ml": math.pi / 6 * LARGEST_MM**3 / 1000}.get(kind, math.inf)
    if amount > limit:
        raise UsageError(f"a tumour of {amount:g} {kind} is too large", hint=f"ask for at most {limit:.0f} {kind}")
    return amount, kind


def _check_relative(amount: float, tumor: int, name: str, *, bare: bool) -> None:
    largest = RELATIVE_MAX.get(tumor, 1.0)
    if bare:  # it might be millimetres that were meant
        raise UsageError(f"the size {amount:g} of {name!r} has no unit",
                         hint=f"write {name}:{amount:g}mm, {name}:{amount:g}ml, or the relative size {name}=0.3")  # fmt: skip
    if amount > largest:
        raise UsageError(f"a relative size of {amount:g} is beyond {largest:g}, the largest that the networks saw",
                         hint=f"write {name}:{amount:g}mm, or stay within {largest:g}")  # fmt: skip
