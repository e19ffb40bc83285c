"""Training data: lists of cases, phantom cases, and latents encoded ahead of time.

A list is the JSON of the reference, `{"training": [{"image", "label", "spacing", "modality", "fold", ...}], ...}`, with
paths relative to the list's folder; entries of fold 0 are held out for validation.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..events import Note, OnEvent, Saved, Stage, Step, ignore
from ..files import refuse_overwriting, write_atomic
from ..geometry import Geometry
from ..labelfile import require_labels, write_labels
from ..volumes import read_image, read_mask, write_image, write_mask

LIST_NAME = "list.json"
HELD_OUT = 0

# views of the phantom: regions, z field of view in mm, share
_VIEWS: tuple[tuple[tuple[str, ...], tuple[float, float], float], ...] = (
    (("chest", "abdomen"), (330, 420), 0.40), (("chest",), (250, 330), 0.12), (("abdomen",), (240, 340), 0.12),
    (("abdomen", "lower"), (300, 400), 0.22), (("chest", "abdomen", "lower"), (400, 560), 0.14),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One entry of a list, with absolute paths; `latent` is there after `encode`."""

    id: str
    image: Path | None
    label: Path | None
    latent: Path | None
    spacing_mm: tuple[float, float, float]
    modality: str
    fold: int


def read_list(path: str | Path) -> list[Case]:
    """Read a data list. Raises `UsageError` for a file that is none, an empty list, and missing files."""
    path = Path(path)
    if path.is_dir():
        path = path / LIST_NAME
    try:
        rows = json.loads(path.read_text("utf-8"))["training"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TypeError("training is not a list of cases")
    except FileNotFoundError as error:
        raise UsageError(f"there is no data list {path}", hint="make one:  maisi data phantom --count 32 --out DIR") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a data list", hint='it is JSON with a list under "training"') from error
    cases = []
    for number, row in enumerate(rows):
        found: dict[str, Path | None] = {}
        for key in ("image", "label", "latent"):
            found[key] = path.parent / row[key] if row.get(key) else None
            file = found[key]
            if file is not None and not file.is_file():
                raise UsageError(f"{path} names {row[key]}, which does not exist", hint="correct the list, or make the file")
        try:
            x, y, z = (float(mm) for mm in row["spacing"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"case {number} of {path} has no spacing of three numbers", hint='add  "spacing": [x, y, z]  in mm') from error
        cases.append(Case(id=row.get("id", f"case{number:04d}"), spacing_mm=(x, y, z), modality=row.get("modality", "ct"),
                          fold=int(row.get("fold", 1)), **found))  # fmt: skip
    if not cases:
        raise UsageError(f"{path} lists no cases", hint="make some:  maisi data phantom --count 32 --out DIR")
    return cases


def write_list(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a data list."""
    write_atomic(path, json.dumps({"training": list(rows)}, indent=1).encode())


def make_phantoms(
    out: str | Path, count: int, *, seed: int = 0, force: bool = False, size: int = 128, workers: int = 0, on_event: OnEvent = ignore
) -> Path:  # fmt: skip
    """Write `count` procedural cases (image, label), `labels.json` and their list; every tenth is held out (fold 0).

    Case k depends on (seed, k) alone, whatever the number of `workers` (processes; 0: one per core). Sizes up to `size`
    voxels per axis, at 2.5 to 4 mm. Returns the list's path.
    """
    out = Path(out)
    refuse_overwriting(out / LIST_NAME, force=force)
    require_labels(out)
    on_event(Stage(name="phantom", detail=f"{count} cases"))
    workers = min(count, workers or os.cpu_count() or 1)
    case = functools.partial(_phantom_case, out, seed, size, force)
    rows = []
    with contextlib.ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")))
            stack.callback(pool.shutdown, cancel_futures=True)
            made = pool.map(case, range(count))
        else:
            made = map(case, range(count))
        for row in made:
            rows.append(row)
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
            "fold": HELD_OUT if index % 10 == 9 else 1, "seed": case_seed}  # fmt: skip


def intensity(hu: NDArray[Any]) -> NDArray[np.float32]:
    """Scale CT from [-1000, 1000] HU, clipped, to [0, 1]."""
    return (np.clip(hu, -1000, 1000).astype(np.float32) + 1000) / 2000


def encode(
    data: str | Path, vae: str | Path | None = None, *, out: str | Path | None = None, model: str = "nano-ct", device: str = "auto",
    force: bool = False, on_event: OnEvent = ignore,
) -> Path:  # fmt: skip
    """Encode the images of a list with a VAE: the posterior's mean, float16, shape (C, x, y, z), one `.npy` per case.

    `vae` is a safetensors file of weights; without it the model's own are used. The list is written again as
    `latents.json` beside the latents; images whose size does not divide by 4 are padded with air. Returns the new list's path.
    """
    import torch

    from ..catalog import model as find_model
    from ..networks import Precision, device_named, load
    from ..weights import locate

    data, spec = Path(data), find_model(model)
    files = {"vae": Path(vae)} if vae is not None else locate(spec, ["vae"])
    cases = read_list(data)
    folder = Path(out) if out else (data if data.is_dir() else data.parent)
    target = folder / "latents.json"
    refuse_overwriting(target, force=force)
    where = device_named(device)
    networks = load(
        _unit_scale(spec), ["vae"], device=where, precision=Precision.named("fp32" if where.type == "cpu" else "auto", where), files=files
    )
    on_event(Stage(name="encode", detail=f"{len(cases)} cases"))
    rows = []
    for done, case in enumerate(cases, 1):
        if case.image is None or case.label is None:
            raise UsageError(f"case {case.id} has no image or no label", hint="a list for training names both")
        hu = read_image(case.image).array
        labels = read_mask(case.label).array
        widths = [(0, -n % 4) for n in hu.shape]
        hu, labels = np.pad(hu, widths, constant_values=-1000), np.pad(labels, widths)
        latent = networks.encode(torch.from_numpy(intensity(hu))[None, None])[0].cpu().numpy()
        write_atomic(folder / f"{case.id}_latent.npy", _npy(latent.astype(np.float16)))
        write_atomic(folder / f"{case.id}_labels.npy", _npy(labels))
        rows.append({"id": case.id, "latent": f"{case.id}_latent.npy", "label": f"{case.id}_labels.npy", "spacing": list(case.spacing_mm),
                     "modality": case.modality, "fold": case.fold, "vae_sha256": networks.hashes["vae"]})  # fmt: skip
        on_event(Step(stage="encode", done=done, total=len(cases)))
    write_list(target, rows)
    on_event(Saved(path=target, kind="list"))
    if len({row["fold"] == HELD_OUT for row in rows}) < 2:
        on_event(Note(text="the list holds out no case (fold 0) or trains on none", level="warning"))
    return target


def _unit_scale(spec: Any) -> Any:
    import dataclasses

    return dataclasses.replace(spec, scale_factor=1.0)


def _npy(array: NDArray[Any]) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def split(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Return (training, held out); an empty training set is an error, an empty held-out set takes the last case."""
    training = [case for case in cases if case.fold != HELD_OUT]
    held = [case for case in cases if case.fold == HELD_OUT]
    if not training:
        raise UsageError("every case of the list is held out (fold 0)", hint="give some cases another fold")
    return training, held or training[-1:]
