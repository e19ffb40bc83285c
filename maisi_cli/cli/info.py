"""`maisi info`: what a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from . import models, output, presets
from .options import Json, Quiet, Verbose, examples
from .wording import facts, toml, triple, words, yes


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="NIfTI file, record, model or preset file.")],
    vocabulary: Annotated[str, typer.Option("--labels", metavar="NAME|FILE", help="Vocabulary of a label map.")] = "maisi",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a file holds: an image or label map and how it was made, a record, a model, a preset."""
    from ..errors import UsageError

    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UsageError(f"the file {file} {what}", hint="give the path of a file")
    if file.name.endswith(".json"):
        _info_record(file, as_json)
    elif file.name.endswith(".toml"):
        _info_toml(file, as_json)
    elif file.name.endswith((".nii", ".nii.gz")):
        _info_volume(file, vocabulary, as_json)
    else:
        hint = "it reads .nii.gz and .nii, records (.json), models and presets (.toml)"
        raise UsageError(f"{file} is not a file that info reads", hint=hint)


def _info_toml(file: Path, as_json: bool) -> None:
    import tomllib

    from ..catalog import read_model
    from ..errors import UsageError

    try:
        schema = tomllib.loads(file.read_text("utf-8")).get("schema")
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}", hint="give a model or preset file") from error
    if schema == "maisi.model/1":
        spec = read_model(file)
        if as_json:
            _info_json(file, "model", models.facts_of(spec))
        else:
            models.print_model(spec)
    elif schema == "maisi.preset/1":
        preset = presets.preset(str(file))
        if as_json:
            _info_json(file, "preset", presets.facts_of(preset))
        else:
            presets.print_preset(preset)
    else:
        hint = "info reads the schemas maisi.model/1 and maisi.preset/1"
        raise UsageError(f"{file} has the schema {schema!r}", hint=hint)


def _info_json(file: Path, kind: str, content: dict[str, Any]) -> None:
    output.json_out({"schema": "maisi.info/1", "path": str(file), "kind": kind, kind: content})


def _info_record(file: Path, as_json: bool) -> None:
    from .. import record

    found = record.read(file)
    changed = record.changed_outputs(found, file.parent)
    if as_json:
        _info_json(file, "record", {**found, "changed_outputs": changed})
        return
    facts([("record", file), *_record_facts(found)])
    output.data("")
    cells = [
        [name, toml(entry["value"]), entry["origin"]]
        for name, entry in found["settings"].items()
        if entry["origin"] != "default" and entry["value"] is not None
    ]
    output.table(["setting", "value", "origin"], cells)
    for name in changed:
        output.warn(f"{name} is missing, or is not the file that was recorded")


def _record_facts(found: Mapping[str, Any]) -> list[tuple[str, object]]:
    tool, qc, timing = (found.get(key) or {} for key in ("tool", "qc", "timing"))
    result = "not checked" if "passed" not in qc else "passed" if qc["passed"] else "FAILED"
    return [
        ("made by", f"{tool.get('name', '?')} {tool.get('version', '?')}"),
        ("model", found["model"].get("name", "?")),
        ("seed", f"{found['seed']}, sample {found.get('index', '?')}, attempt {found.get('attempt', '?')}"),
        ("finished", timing.get("finished", "?")),
        ("qc", result),
        ("outputs", words(entry["file"] for entry in found["outputs"].values())),
    ]


def _info_volume(file: Path, vocabulary: str, as_json: bool) -> None:
    from .. import record
    from ..anatomy import remap_table
    from ..errors import MaisiError
    from ..volumes import describe

    remap_table(vocabulary)
    about = describe(file, vocabulary=vocabulary)
    found, problem = None, None
    if about["record"] is not None:
        try:
            found = record.read(about["record"])
        except MaisiError as error:
            problem = error.message
    if as_json:
        kept = ("tool", "model", "seed", "index", "attempt", "qc")
        made = None if found is None else {key: found.get(key) for key in kept}
        output.json_out({**about, "made": made, "record_problem": problem})
        return
    kind = "label map" if about["kind"] == "label" else "image"
    rows: list[tuple[str, object]] = [
        ("file", about["path"]),
        ("kind", f"{kind}, {about['dtype']}{', synthetic' if about['synthetic'] else ''}"),
        ("size", f"{triple(about['size'])} voxels"),
        ("spacing", f"{triple(about['spacing_mm'])} mm"),
        ("fov", f"{triple(about['fov_mm'])} mm"),
        ("stored as", f"{about['orientation']}, {triple(about['stored_size'])}"),
        ("description", about["description"]),
    ]
    if about["kind"] == "label":
        rows.append(("body (200)", yes(about["body_envelope"])))
    elif "intensity" in about:
        rows.append(("values", words(f"{name} {value:g}" for name, value in about["intensity"].items())))
    if about.get("not_finite"):
        rows.append(("not finite", f"{about['not_finite']} voxels"))
    if about["record"] is not None:
        rows.append(("record", about["record"]))
    facts([*rows, *(_record_facts(found) if found else [])])
    if problem is not None:
        output.warn(problem)
    if about["kind"] == "label":
        output.data("")
        cells = [[row["id"], row["name"], row["voxels"], row["ml"]] for row in about["labels"]]
        output.table(["id", "name", "voxels", "ml"], cells, right=("id", "voxels", "ml"))


def register(root: typer.Typer) -> None:
    """Add the command."""
    epilog = examples("maisi info label.nii.gz", "maisi info sample_record.json", "maisi info ct.nii.gz --json")
    root.command("info", epilog=epilog)(info)
