"""Phantom cases: procedural CT volumes with their label maps, and their list."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..events import OnEvent, Saved, Stage, Step, ignore
from ..files import refuse_overwriting
from ..geometry import Geometry
from ..labelfile import require_labels, write_labels
from ..volumes import write_image, write_mask
from .lists import HELD_OUT, LIST_NAME, write_list

# views of the phantom: regions, z field of view in mm, share
_VIEWS: tuple[tuple[tuple[str, ...], tuple[float, float], float], ...] = (
    (("chest", "abdomen"), (330, 420), 0.40), (("chest",), (250, 330), 0.12), (("abdomen",), (240, 340), 0.12),
    (("abdomen", "lower"), (300, 400), 0.22), (("chest", "abdomen", "lower"), (400, 560), 0.14),
)  # fmt: skip


def make_phantoms(
    out: str | Path, count: int, *, seed: int = 0, force: bool = False, size: int = 128, workers: int = 0, on_event: OnEvent = ignore
) -> Path:  # fmt: skip
    """Write `count` procedural cases (image, label), `labels.json` and their list, and return the list's path.

    Every tenth is held out (fold 0), of two to nine the last. Case k depends on (seed, k) alone, whatever the number of
    `workers` (processes; 0: one per core). Sizes up to `size` voxels per axis, at 2.5 to 4 mm.
    """
    out = Path(out)
    refuse_overwriting(out / LIST_NAME, force=force)
    require_labels(out)
    on_event(Stage(name="phantom", detail=f"{count} cases"))
    workers = min(count, workers or os.cpu_count() or 1)
    case = functools.partial(_phantom_case, out, seed, size, force)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")))
            stack.callback(pool.shutdown, cancel_futures=True)
            made = pool.map(case, range(count))
        else:
            made = map(case, range(count))
        for row in made:
            held = len(rows) % 10 == 9 or (1 < count < 10 and len(rows) == count - 1)
            rows.append({**row, "fold": HELD_OUT if held else 1})
            on_event(Step(stage="phantom", done=len(rows), total=count))
    write_labels(out)
    write_list(out / LIST_NAME, rows)
    on_event(Saved(path=out / LIST_NAME, kind="list"))
    return out / LIST_NAME


def _phantom_case(out: Path, seed: int, size: int, force: bool, index: int) -> dict[str, Any]:
    from ..phantom import body, render

    rng = np.random.default_rng([seed, index])
    view = int(rng.choice(len(_VIEWS), p=[share for *_, share in _VIEWS]))
    regions, (low, high), _ = _VIEWS[view]
    fov_z, fov_xy = rng.uniform(low, high), rng.uniform(340, 430)
    voxels_z = int(rng.choice([size, size * 3 // 4 // 16 * 16, size // 2], p=(0.6, 0.25, 0.15)))
    geometry = Geometry(size=(size, size, voxels_z), spacing=(fov_xy / size, fov_xy / size, fov_z / voxels_z))
    case_seed = int(rng.integers(2**31))
    mask = body(geometry, case_seed, regions=regions)
    image = render(mask, case_seed)
    name = f"phantom{index:04d}"
    write_image(image, out / f"{name}_image.nii.gz", force=force)
    write_mask(mask, out / f"{name}_label.nii.gz", force=force)
    return {"id": name, "image": f"{name}_image.nii.gz", "label": f"{name}_label.nii.gz",
            "dim": list(geometry.size), "spacing": [round(s, 5) for s in geometry.spacing], "modality": "ct",
            "seed": case_seed}  # fmt: skip
