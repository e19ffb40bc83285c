"""Which labels the cases of a training hold, and how much of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..anatomy import Vocabulary
from ..errors import UsageError
from .diffusion import Encoded

Counts = Mapping[str, Mapping[int, int]]
"""Voxels by split and label id."""


def counted(splits: Mapping[str, Sequence[Encoded]]) -> Counts:
    """Return how many voxels of each label the cases of each split hold."""
    found = {}
    for name, cases in splits.items():
        total = np.zeros(256, np.int64)
        for case in cases:
            total += np.bincount(np.asarray(case.labels).reshape(-1), minlength=256)
        found[name] = {int(label): int(voxels) for label, voxels in enumerate(total) if voxels}
    return found


def told(counts: Counts, vocabulary: Vocabulary, wanted: Sequence[int] = ()) -> list[str]:
    """Return what is said of the labels before training: how many there are, and what new and wanted ones come to.

    Raises `UsageError` for a label that no training case has, though it is weighted, and for one that is not in the vocabulary.
    """
    training, held = counts["training"], counts.get("held out", {})
    strange = sorted({*training, *held} - {0} - set(vocabulary.ids()))
    if strange:
        raise UsageError(f"the labels of the cases hold {', '.join(map(str, strange))}, which the vocabulary does not",
                         hint="name them:  maisi labels add NAME --id N")  # fmt: skip
    absent = [label for label in wanted if label not in training]
    if absent:
        raise UsageError(f"no training case has a {vocabulary.name_of(absent[0])}", hint="leave it out of train.weighted_labels")
    lines = [f"{len(set(training) - {0})} labels in training, {len(set(held) - {0})} held out"]
    new = [label.id for label in vocabulary.labels if label.owner != "maisi"]
    for label in dict.fromkeys([*wanted, *(each for each in new if each in training)]):
        lines.append(f"{vocabulary.name_of(label)} ({label}): {training[label]} voxels in training, {held.get(label, 0)} held out")
        if label not in held:
            lines.append(f"no held-out case has a {vocabulary.name_of(label)}: nothing tells how well it is learned")
    return lines
