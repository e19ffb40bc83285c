"""`data import-latents`: the reference's embeddings as latents of this project, so that nothing need be encoded again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..events import OnEvent, Saved, Stage, Step, ignore
from ..files import refuse_overwriting, write_atomic
from ..geometry import format_triple
from ..record import sha256_of
from ..volumes import read_mask
from .encoding import FACTOR, LATENTS, SCHEMA, npy, regions_of, require_known
from .lists import Case, Row, all_rows, case_of, id_of, require_ids, write_list

EMBEDDED = "_emb.nii.gz"


def import_latents(
    lists: Sequence[str | Path], *, out: str | Path, bases: Sequence[str | Path] = (), vae: str | Path | None = None, force: bool = False,
    on_event: OnEvent = ignore,
) -> Path:  # fmt: skip
    """Copy the embeddings of the reference's lists to float16 `.npy` latents, and their masks; return the new list.

    An entry's `image` is an embedding (X/4, Y/4, Z/4, C), or an image whose embedding lies under its name with `_emb`; what the
    entry does not say (spacing, modality, regions) is taken from the sidecar `<embedding>.json`. `vae` are the weights that made
    them. Raises `UsageError`, naming the row, for what is missing and for masks that are not four times the latent.
    """
    folder = Path(out)
    refuse_overwriting(folder / LATENTS, force=force)
    listed = all_rows(lists, bases)
    found = [_found(row) for row in listed]
    require_ids(listed, [case for case, _ in found])
    made = {"vae_sha256": sha256_of(vae)} if vae is not None else {}
    on_event(Stage(name="import", detail=f"{len(found)} cases"))
    rows: dict[str, list[dict[str, Any]]] = {"training": [], "testing": []}
    written: list[Path] = []
    try:
        for done, (case, file) in enumerate(found, 1):
            rows[case.section].append({**_copied(case, file, folder, written, force=force), **made})
            on_event(Step(stage="import", done=done, total=len(found)))
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    write_list(folder / LATENTS, rows["training"], **({"testing": rows["testing"]} if rows["testing"] else {}), schema=SCHEMA)
    on_event(Saved(path=folder / LATENTS, kind="list"))
    return folder / LATENTS


def _found(row: Row) -> tuple[Case, Path]:
    """Return the case of an entry, with what the sidecar knows of it, and its embedding."""
    name = str(row.values.get("image", ""))
    file = row.base / (name if name.endswith(EMBEDDED) else name.removesuffix(".gz").removesuffix(".nii") + EMBEDDED)
    if not name or not file.is_file():
        raise UsageError(f"{row.where} has no embedding {file}", hint="name it as image, or give the folder of the embeddings as --base")
    side, known = Path(f"{file}.json"), {}
    if side.is_file():
        try:
            known = dict(json.loads(side.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{side} is no sidecar: {error}", hint="correct or remove it") from error
    values = {key: value for key, value in {**known, **row.values}.items() if key not in ("image", "dim")}
    values.setdefault("id", id_of(replace(row, values={"image": name.replace(EMBEDDED, ".nii.gz")})))
    case = case_of(replace(row, values=values))
    return replace(case, extra={**case.extra, "source": str(file)}), file


def _copied(case: Case, file: Path, folder: Path, written: list[Path], *, force: bool) -> dict[str, Any]:
    """Write the latent and the labels of a case, and return its entry."""
    latent = embedding(file)
    size = tuple(FACTOR * n for n in latent.shape[1:])
    arrays: dict[str, tuple[Path, NDArray[Any]]] = {"latent": (folder / f"{case.id}_latent.npy", latent)}
    if case.label is not None:
        mask = read_mask(case.label)
        require_known(mask, case.label)
        if mask.array.shape != size:
            ours, theirs = format_triple(mask.array.shape), format_triple(size)
            raise UsageError(f"{case.label} has {ours} voxels, not {FACTOR} times the latent: {theirs}",
                             hint="resample it, with nearest neighbour, to the grid that was encoded")  # fmt: skip
        arrays["label"] = folder / f"{case.id}_labels.npy", mask.array
    for path, _ in arrays.values():
        refuse_overwriting(path, force=force)
    for path, array in arrays.values():
        write_atomic(path, npy(array))
        written.append(path)
    files = {key: path.name for key, (path, _) in arrays.items()}
    return {**case.extra, "id": case.id, **files, "dim": list(size), "spacing": list(case.spacing_mm), "modality": case.modality,
            "fold": case.fold, **regions_of(case)}  # fmt: skip


def embedding(path: Path) -> NDArray[np.float16]:
    """Read an embedding, (X/4, Y/4, Z/4, C) in a NIfTI file of any orientation, as float16 (C, x, y, z) in RAS order."""
    import nibabel
    from nibabel import orientations

    try:
        image: Any = nibabel.load(path)
        array = np.asarray(image.dataobj, dtype=np.float32)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(
            f"{path} is damaged: {(str(error).splitlines() or [''])[0]}", hint="copy the file again, or encode it again"
        ) from error
    if array.ndim != 4:
        raise UsageError(
            f"{path} is {format_triple(array.shape)}, and no embedding (x, y, z, channels)", hint="give what the reference encoded"
        )
    turn = orientations.ornt_transform(orientations.io_orientation(image.affine), orientations.axcodes2ornt("RAS"))
    latent = np.moveaxis(orientations.apply_orientation(array, turn), -1, 0).astype(np.float16)
    if not np.isfinite(latent).all():
        raise UsageError(f"{path} holds values that are not finite in float16", hint="encode its image again")
    return np.ascontiguousarray(latent)
