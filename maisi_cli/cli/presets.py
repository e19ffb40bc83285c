"""`maisi presets`: list, show, check and write presets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Force, Json, Quiet, Verbose, examples
from .wording import number, toml, triple, verdict

if TYPE_CHECKING:
    from ..presets import Preset

app = typer.Typer(help="List, show, check and write presets.", no_args_is_help=True)

OWN_PRESETS = Path("maisi-presets")
Row = dict[str, Any]


@app.command(
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


@app.command(
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
    found = preset(name)
    if as_json:
        output.json_out({"schema": "maisi.preset-show/1", **facts_of(found)})
    else:
        print_preset(found)


def facts_of(preset: Preset) -> Row:
    return {**_preset_row(preset), "values": preset.values, "evidence": preset.evidence}


def print_preset(preset: Preset) -> None:
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


def preset(name: str) -> Preset:
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


@app.command(
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

    paths = [_preset_file(name) if name.endswith(".toml") else preset(name).path for name in names]
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


@app.command(
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
    parent, path = preset(base), out / f"{name}.toml"
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


def register(root: typer.Typer) -> None:
    """Add the group."""
    root.add_typer(app, name="presets")
