"""`maisi recommend-spacing`: which volume and spacing agree with what a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Json, Quiet, Verbose, examples
from .wording import triple

if TYPE_CHECKING:
    pass

VERDICTS = ("ok", "marginal", "ood")


def recommend_spacing(
    region: Annotated[
        str | None,
        typer.Option("--region", metavar="A,B", help="Body regions: head, chest, abdomen, lower.", show_default=False),
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option(
            "--modality",
            metavar="NAME",
            help="Modality, such as ct or mri-t1; mri takes all of MR.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="XxYxZ", help="Voxels to spread the field of view over.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Folder of NIfTI files whose field of view to match.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show which size and spacing agree with the training data, the most common first.

    The verdict compares the field of view with the median of the training scans: ok within 15 %, marginal
    within 40 %, else ood (out of distribution). With --from the field of view is that of your own files.
    """
    from .. import presets
    from ..geometry import parse_size

    voxels = parse_size(size) if size is not None else None
    regions = [name for name in (region or "").split(",") if name.strip()] if region is not None else None
    rows = presets.rank(regions=regions, modality=modality, size=voxels)
    if not rows:
        raise _nothing_for(region, modality)
    measured = _measure(data) if data is not None else None
    if measured is not None:
        rows = _matched(rows, measured["fov_mm"])
    if as_json:
        payload: dict[str, Any] = {"schema": "maisi.spacing/1", "rows": rows}
        output.json_out(payload if measured is None else {**payload, "data": measured})
        return
    if measured is not None:
        for skipped in measured["skipped"]:
            output.warn(f"skipped: {skipped['problem']}")
        low, high = (triple(measured[key], 1) for key in ("fov_min_mm", "fov_max_mm"))
        middle = triple(measured["fov_mm"], 1)
        output.say(f"{measured['files']} files, median field of view {middle} mm, from {low} to {high} mm")
    columns = ["preset", "region", "share %", "size", "spacing mm", "fov mm", "verdict", "reason"]
    output.table(columns, [_spacing_row(row) for row in rows], right=("share %",))


def _spacing_row(row: Mapping[str, Any]) -> list[object]:
    share = "" if row["share_percent"] is None else f"{row['share_percent']:g}"
    return [row["preset"], ",".join(row["region"]), share, triple(row["size"]), triple(row["spacing_mm"]),
            triple(row["fov_mm"]), row["verdict"], row["reason"]]  # fmt: skip


def _nothing_for(region: str | None, modality: str | None) -> Exception:
    """Return the error for regions and a modality that no preset covers, naming those that are."""
    from .. import presets
    from ..errors import UsageError

    wanted = " and ".join(text for text in (f"regions {region}" if region else "", f"modality {modality}" if modality else "") if text)
    covered = {",".join(row["region"]): row for row in presets.rank(modality=modality)}
    if covered:
        hint = f"for this modality there are --region {' | '.join(covered)}"
    else:
        kinds = dict.fromkeys(row["modality"] for row in presets.rank())
        hint = f"there are presets of --modality {', '.join(kinds)}"
    return UsageError(f"no preset covers {wanted}", hint=hint)


def _measure(folder: Path) -> dict[str, Any]:
    """Return the median field of view (mm, RAS+ order) of the NIfTI files in a folder, from their headers."""
    from ..errors import MaisiError, UsageError
    from ..files import NIFTI_ENDS
    from ..volumes import read_geometry

    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"the folder {folder} {what}", hint="give the folder that holds your .nii.gz files")
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith(NIFTI_ENDS) and path.is_file())
    grids, skipped = [], []
    for path in paths:
        try:
            grids.append(read_geometry(path))
        except MaisiError as error:
            skipped.append({"path": str(path), "problem": error.message})
    if not grids:
        found = f"none of its {len(paths)} NIfTI files can be read: {skipped[0]['problem']}" if paths else "it holds no .nii.gz or .nii"
        raise UsageError(f"{folder}: {found}", hint="give the folder that holds your .nii.gz files")
    from statistics import median

    per_axis = [[grid.fov_mm[axis] for grid in grids] for axis in range(3)]
    return {
        "path": str(folder),
        "files": len(grids),
        "skipped": skipped,
        "fov_mm": [round(median(axis), 3) for axis in per_axis],
        "fov_min_mm": [round(min(axis), 3) for axis in per_axis],
        "fov_max_mm": [round(max(axis), 3) for axis in per_axis],
    }


def _matched(rows: Sequence[Mapping[str, Any]], fov_mm: Sequence[float]) -> list[dict[str, Any]]:
    """Return the rows with the spacing that gives `fov_mm`, judged against each preset, the best first."""
    from .. import catalog, presets
    from ..geometry import Geometry

    ranked: list[tuple[int, float, int, dict[str, Any]]] = []
    for row in rows:
        against = presets.preset(row["preset"], "region")
        spec = catalog.model(str(against.values["volume"].get("model", "rflow-ct")))
        x, y, z = fov_mm
        if spec.limits.square:  # in-plane voxels are square: cover the longer side
            x = y = max(x, y)
        geometry = Geometry.parse(size=row["size"], fov=(x, y, z))
        verdict, reason = presets.judge(geometry, against)
        off = max(abs(mine / median - 1) for mine, median in zip(geometry.fov_mm, against.geometry.fov_mm, strict=True))
        made = {
            **row,
            "spacing_mm": [round(mm, 4) for mm in geometry.spacing],
            "fov_mm": [round(mm, 1) for mm in geometry.fov_mm],
            "verdict": verdict,
            "reason": reason,
        }
        ranked.append((VERDICTS.index(verdict), off, len(ranked), made))
    return [made for *_, made in sorted(ranked)]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "recommend-spacing",
        epilog=examples(
            "maisi recommend-spacing --region chest,abdomen",
            "maisi recommend-spacing --modality ct --size 512x512x256 --json",
            "maisi recommend-spacing --modality ct --from scans/",
        ),
    )(recommend_spacing)
