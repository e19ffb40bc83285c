"""Anatomy sizes: what the mask diffusion is told about a body, ten numbers, -1 for what is not there.

Where the user names some of them, the others come from a patient of the training data (`all_anatomy_size_conditions.json`)
whose named organs are about as large.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..anatomy import maisi
from ..errors import UsageError, unknown

SLOTS = (
    "gallbladder", "liver", "stomach", "pancreas", "colon",
    "lung tumor", "pancreatic tumor", "hepatic tumor", "colon cancer primaries", "bone lesion",
)  # fmt: skip
FILE = "all_anatomy_size_conditions.json"
TUMORS = range(5, 10)
ABSENT = -1.0
NEIGHBOURS = 5
"""How many of the nearest patients a sample is drawn from; the reference always takes the nearest."""

Vector = tuple[float, ...]


def parse(texts: Sequence[str]) -> dict[int, float]:
    """Return sizes by slot from texts like `liver=0.5`; -1 says that the organ is absent.

    Raises `UsageError` for a name without a slot, one that is given twice, or more than one tumour.
    """
    sizes: dict[int, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        slot = slot_of(name)
        if slot in sizes:
            raise UsageError(f"--anatomy-size gives {SLOTS[slot]} twice", hint="give it once")
        sizes[slot] = float(number)
    tumors = [SLOTS[slot] for slot in sizes if slot in TUMORS and sizes[slot] != ABSENT]
    if len(tumors) > 1:
        raise UsageError(f"--anatomy-size asks for {' and '.join(tumors)}", hint="ask for one tumour at most")
    return sizes


def slot_of(name: str) -> int:
    """Return the slot of an organ or tumour. Raises `UsageError` with near matches."""
    label = maisi().name_of(maisi().id(name))
    if label not in SLOTS:
        raise unknown("anatomy size", name.strip(), SLOTS, see="the ten that the networks know: " + ", ".join(SLOTS))
    return SLOTS.index(label)


def read_vectors(path: Path) -> list[Vector]:
    """Read the sizes of the patients. Raises `UsageError` for another file."""
    try:
        rows = [tuple(map(float, row["organ_size"])) for row in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"the anatomy sizes {path} cannot be read: {error}", hint="give the released all_anatomy_size_conditions.json"
        ) from error
    if not rows or any(len(row) != len(SLOTS) for row in rows):
        raise UsageError(f"{path} does not hold {len(SLOTS)} sizes for every patient",
                         hint=f"give the released {FILE}")  # fmt: skip
    return rows


def condition(
    vectors: Sequence[Vector], sizes: Mapping[int, float], seed: int = 0, *, present: Collection[int] = (), compat: bool = False
) -> Vector:  # fmt: skip
    """Return the ten sizes for one sample: those that are asked for, the others from a patient who is like them.

    The patient is drawn, by `seed`, from the `NEIGHBOURS` nearest (L1 over the sizes asked for; with none, from all) who
    have what lies in the slots `present`. No tumour is taken over that was not asked for: patients without one come first,
    and only when there is none is the patient's tumour left out. With `compat` the nearest patient is taken, tumours
    included, as the reference does. Raises `UsageError` when no patient has what must be present.
    """

    def far(vector: Vector) -> float:
        return sum(abs(vector[slot] - size) for slot, size in sizes.items())

    if compat and sizes:
        return _with(min(vectors, key=far), sizes)
    asked = {slot for slot in TUMORS if slot in present or sizes.get(slot, ABSENT) != ABSENT}
    having = [vector for vector in vectors if all(vector[slot] != ABSENT for slot in present if slot not in sizes)]
    if not having:
        raise UsageError(f"none of the {len(vectors)} patients has {', '.join(SLOTS[slot] for slot in sorted(present))}",
                         hint="give its size with --anatomy-size")  # fmt: skip
    usable = [vector for vector in having if all(vector[slot] == ABSENT for slot in TUMORS if slot not in asked)]
    ranked = sorted(usable or having, key=far)
    chosen = random.Random(seed).choice(ranked[:NEIGHBOURS] if sizes else ranked)
    return _with(tuple(ABSENT if slot in TUMORS and slot not in asked else size for slot, size in enumerate(chosen)), sizes)


def _with(vector: Vector, sizes: Mapping[int, float]) -> Vector:
    return tuple(sizes.get(slot, size) for slot, size in enumerate(vector))


def target_tumor(vector: Vector, asked: Mapping[int, float] | None = None) -> int | None:
    """Return the label of the tumour that the mask will be mended around: the one asked for.

    Without `asked`, as the reference takes it: the last one in the vector.
    """
    source = dict(enumerate(vector)) if asked is None else asked
    found = [slot for slot in TUMORS if source.get(slot, ABSENT) != ABSENT]
    return maisi().id(SLOTS[found[-1]]) if found else None


def required(sizes: Mapping[int, float]) -> frozenset[int]:
    """Return the labels that a mask with these sizes must hold; what is asked to be absent is not among them."""
    return frozenset(maisi().id(SLOTS[slot]) for slot, size in sizes.items() if size != ABSENT)


def slots_of(labels: Collection[int]) -> frozenset[int]:
    """Return the slots of those of the labels that have one."""
    names = {maisi().name_of(label) for label in labels}
    return frozenset(slot for slot, name in enumerate(SLOTS) if name in names)


def typical(vectors: Sequence[Vector], slot: int) -> float:
    """Return the median size among the patients who have what lies in a slot. Raises `UsageError` when none has."""
    found = sorted(vector[slot] for vector in vectors if vector[slot] != ABSENT)
    if not found:
        raise UsageError(f"none of the {len(vectors)} patients has a {SLOTS[slot]}", hint="use the released anatomy sizes")
    return found[len(found) // 2]


def check_known(vectors: Sequence[Vector], slot: int, size: float) -> None:
    """Refuse a size above 1 that is larger than any which the networks saw."""
    largest = max(1.0, *(vector[slot] for vector in vectors))
    if size > largest:
        raise UsageError(f"--anatomy-size {SLOTS[slot]}={size:g} is larger than any of {len(vectors)} patients",
                         hint=f"use at most {largest:g}")  # fmt: skip
