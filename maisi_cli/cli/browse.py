"""Looking around: presets, plugins and files; labels, models and the doctor have modules of their own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import doctor, labelmaps, models, output
from .options import Force, Json, Quiet, Verbose, examples
from .wording import facts, number, toml, triple, verdict, words, yes

if TYPE_CHECKING:
    from ..presets import Preset

presets_app = typer.Typer(help="List, show, check and write presets.", no_args_is_help=True)
plugins_app = typer.Typer(help="What plugins add.", no_args_is_help=True)

OWN_PRESETS = Path("maisi-presets")
Row = dict[str, Any]


# --- presets --------------------------------------------------------------------------------


@presets_app.command(
    "list",
    epilog=examples("maisi presets list", "maisi presets list --kind gpu", "maisi presets list --modality mri-t1 --json"),
)
def presets_list(
    kind: Annotated[str | None, typer.Option("--kind", metavar="NAME", help="region, gpu or train.", show_default=False)] = None,
    modality: Annotated[
        str | None,
        typer.Option("--modality", metavar="NAME", help="Only region presets of a modality.", show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List presets: body regions, GPUs and training recipes."""
    from .. import catalog, presets
    from ..errors import UsageError, unknown

    if kind is not None and kind not in presets.FOLDERS:
        raise unknown("kind of preset", kind, presets.FOLDERS, see="maisi presets list --help")
    if modality is not None and kind not in (None, "region"):
        raise UsageError(f"{kind} presets have no modality", hint="leave out --kind or --modality")
    kinds = [kind] if kind else ["region"] if modality else list(presets.FOLDERS)
    found = [each for one in kinds for each in presets.presets(one)]
    if modality is not None:
        wanted = catalog.modality(modality).name
        found = [each for each in found if presets.agrees(each.modality, wanted)]
    rows = [_preset_row(each) for each in found]
    if as_json:
        output.json_out({"schema": "maisi.presets/1", "presets": rows})
        return
    if not rows:
        output.say(f"no preset of modality {modality}")
    cells = [
        [row["name"], row["kind"], row["modality"], triple(row["size"]), triple(row["spacing_mm"]),
         number(row["share_percent"]), row["summary"]]
        for row in rows
    ]  # fmt: skip
    columns = ["preset", "kind", "modality", "size", "spacing mm", "share %", "summary"]
    output.table(columns, cells, right=("share %",))


def _preset_row(preset: Preset) -> Row:
    """Return what listings say about a preset; the volume of a region, None elsewhere."""
    row: Row = {"name": preset.name, "kind": preset.kind, "summary": preset.summary, "path": str(preset.path)}
    if preset.kind != "region":
        empty = ("modality", "region", "size", "spacing_mm", "fov_mm", "share_percent", "scans")
        return {**row, **dict.fromkeys(empty)}
    geometry = preset.geometry
    return {
        **row,
        "modality": preset.modality,
        "region": list(preset.regions),
        "size": list(geometry.size),
        "spacing_mm": list(geometry.spacing),
        "fov_mm": [round(mm, 3) for mm in geometry.fov_mm],
        "share_percent": preset.evidence.get("share_percent"),
        "scans": preset.evidence.get("scans"),
    }


@presets_app.command(
    "show",
    epilog=examples("maisi presets show chest-abdomen", "maisi presets show 24g", "maisi presets show abdomen --json"),
)
def presets_show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset, or a preset file.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show a preset as TOML, with the evidence that its figures rest on and the path of its file."""
    preset = _preset(name)
    if as_json:
        output.json_out({"schema": "maisi.preset-show/1", **_preset_facts(preset)})
    else:
        _print_preset(preset)


def _preset_facts(preset: Preset) -> Row:
    return {**_preset_row(preset), "values": preset.values, "evidence": preset.evidence}


def _print_preset(preset: Preset) -> None:
    """Print a preset's file as it is; one that extends another is printed with all values that hold."""
    import tomllib

    text = preset.path.read_text("utf-8")
    if "extends" in tomllib.loads(text):
        import tomli_w

        head = {"schema": "maisi.preset/1", "kind": preset.kind, "summary": preset.summary}
        tail = {"evidence": preset.evidence} if preset.evidence else {}
        text = tomli_w.dumps({**head, **preset.values, **tail})
    output.data(f"# {preset.path}")
    output.data(text.rstrip("\n"))


def _every_preset() -> dict[str, Preset]:
    from .. import presets

    return {each.name: each for kind in presets.FOLDERS for each in presets.presets(kind)}


def _preset(name: str) -> Preset:
    """Return a preset of any kind by name, or from a file. Raises `UsageError` with near matches."""
    from .. import presets
    from ..errors import unknown

    if name.endswith(".toml"):
        return presets.read(_preset_file(name))
    known = _every_preset()
    if name not in known:
        raise unknown("preset", name, known, see="maisi presets list")
    return known[name]


def _preset_file(name: str) -> Path:
    from ..errors import UsageError

    if not Path(name).is_file():
        raise UsageError(f"there is no preset file {name}", hint="check the path; see  maisi presets list")
    return Path(name)


@presets_app.command(
    "validate",
    epilog=examples("maisi presets validate my-liver.toml", "maisi presets validate my-liver.toml chest-abdomen --json"),
)
def presets_validate(
    names: Annotated[list[str], typer.Argument(metavar="FILE|NAME...", help="Preset files, or presets.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check preset files: keys, values and the names they use. Exit code 1 with every problem."""
    from .. import presets

    paths = [_preset_file(name) if name.endswith(".toml") else _preset(name).path for name in names]
    found = {str(path): presets.validate(path) for path in paths}
    passed = not any(found.values())
    if as_json:
        files = [{"path": path, "passed": not each, "problems": each} for path, each in found.items()]
        output.json_out({"schema": "maisi.presets-validate/1", "passed": passed, "files": files})
    else:
        for path, problems in found.items():
            verdict(not problems, path, problems)
    if not passed:
        raise typer.Exit(1)


@presets_app.command(
    "new",
    epilog=examples("maisi presets new my-liver --from abdomen", "maisi presets new my-gpu --from 24g --out presets/"),
)
def presets_new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new preset: small letters, digits, hyphens.")],
    base: Annotated[str, typer.Option("--from", metavar="NAME", help="Preset that it extends.")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="DIR", help="Folder; in maisi-presets it is found by its name."),
    ] = OWN_PRESETS,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a preset file that extends another, with the values to change as comments."""
    from ..errors import UsageError
    from ..files import refuse_overwriting, write_atomic

    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        hint = "use small letters and digits joined by hyphens, like my-liver"
        raise UsageError(f"{name!r} is not a name for a preset", hint=hint)
    if base.endswith(".toml"):
        raise UsageError(f"--from takes the name of a preset, not {base}", hint="see  maisi presets list")
    parent, path = _preset(base), out / f"{name}.toml"
    taken = _every_preset().get(name)
    if taken is not None and (name == base or taken.path.resolve() != path.resolve()):
        raise UsageError(f"the name {name} is taken by {taken.path}", hint="choose another name")
    refuse_overwriting(path, force=force)
    write_atomic(path, _template(name, parent).encode())
    if as_json:
        about = {"name": name, "kind": parent.kind, "extends": base, "path": str(path)}
        output.json_out({"schema": "maisi.presets-new/1", **about})
        return
    output.data(str(path))
    task = parent.values.get("train", {}).get("kind", "vae")
    used = {"region": "generate --preset", "gpu": "generate --gpu", "train": f"train {task} --preset"}[parent.kind]
    output.say(f"use it with  maisi {used} {name if out == OWN_PRESETS else path}")


def _template(name: str, parent: Preset) -> str:
    lines = [
        f"# Preset {name}: what stands here replaces the value of {parent.name}.",
        "# Remove the # before a line to change it.",
        'schema = "maisi.preset/1"',
        f'kind = "{parent.kind}"',
        f"summary = {toml(f'{parent.summary}, as {name}')}",
        f'extends = "{parent.name}"',
    ]
    for table, values in parent.values.items():
        if isinstance(values, Mapping):
            lines += ["", f"[{table}]"]
            lines += [f"# {k} = {toml(v)}" for k, v in values.items() if not isinstance(v, Mapping)]
    if parent.kind == "region":
        lines += [
            "",
            "# The evidence of the extended preset is not inherited: it does not speak of other values.",
        ]
    return "\n".join([*lines, "", f"# Check it:  maisi presets validate {name}.toml", ""])


# --- plugins --------------------------------------------------------------------------------


@plugins_app.command("list", epilog=examples("maisi plugins list", "maisi plugins list --json"))
def plugins_list(as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List plugins with package, version and what each adds, or why it was skipped."""
    from ..plugins import plugins

    infos = plugins().infos
    if as_json:
        rows = [{**dataclasses.asdict(info), "adds": list(info.adds)} for info in infos]
        output.json_out({"schema": "maisi.plugins/1", "plugins": rows})
        return
    cells = [[info.name, info.package, info.version, info.problem or words(info.adds) or "nothing"] for info in infos]
    output.table(["plugin", "package", "version", "adds"], cells)


# --- info -----------------------------------------------------------------------------------


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
        preset = _preset(str(file))
        if as_json:
            _info_json(file, "preset", _preset_facts(preset))
        else:
            _print_preset(preset)
    else:
        hint = "info reads the schemas maisi.model/1 and maisi.preset/1"
        raise UsageError(f"{file} has the schema {schema!r}", hint=hint)


def _info_json(file: Path, kind: str, content: Row) -> None:
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


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(presets_app, name="presets")
    app.add_typer(labelmaps.app, name="labels")
    app.add_typer(models.models_app, name="models")
    app.add_typer(plugins_app, name="plugins")
    epilog = examples("maisi info label.nii.gz", "maisi info sample_record.json", "maisi info ct.nii.gz --json")
    app.command("info", epilog=epilog)(info)
    doctor.register(app)
