"""The models: listing and showing them, and their weights: fetching, checking, removing, and moving between machines."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Force, Json, Offline, Quiet, Verbose, examples
from .wording import facts, number, triple, words, yes

if TYPE_CHECKING:
    from ..catalog import Limits, ModelSpec

app = typer.Typer(help="The models that are known, and their weights.", no_args_is_help=True)

Row = dict[str, Any]
ModelName = Annotated[str, typer.Argument(metavar="NAME|FILE.toml", help="A model, or a model file.")]
ModelNames = Annotated[list[str], typer.Argument(metavar="NAME|FILE.toml...", help="Models, or model files.")]
Accept = Annotated[bool, typer.Option("--accept-license", help="Accept the licence of the weights, which is shown.")]
Commercial = Annotated[bool, typer.Option("--commercial", help="Refuse weights that do not allow commercial use.")]
Again = Annotated[bool, typer.Option("--force", help="Fetch files anew that are there.")]


@app.command("list", epilog=examples("maisi models list", "maisi models list --json", "maisi models list --features"))
def models_list(
    features: Annotated[bool, typer.Option("--features", help="List the feature extractors of `maisi fid` instead.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the models: installed or not, what they make, up to which size, and their licence."""
    if features:
        _list_features(as_json)
        return
    from ..catalog import models

    shown = (
        "name",
        "summary",
        "modality",
        "modes",
        "installed",
        "bundled",
        "max_volume",
        "limits",
        "licence",
    )
    rows: list[Row] = []
    for spec in models():
        about = facts_of(spec)
        rows.append({key: about[key] for key in shown})
    if as_json:
        output.json_out({"schema": "maisi.models/1", "models": rows})
        return
    cells = [
        [row["name"], yes(row["installed"]), row["modality"], ",".join(row["modes"]), row["max_volume"],
         row["licence"]["name"], yes(row["licence"]["commercial"])]
        for row in rows
    ]  # fmt: skip
    output.table(["model", "installed", "modality", "modes", "up to", "licence", "commercial"], cells)


@app.command(
    "show",
    epilog=examples("maisi models show nano-ct", "maisi models show rflow-ct --json", "maisi models show nano-ct --toml"),
)
def models_show(
    name: ModelName,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print the model's file as it is.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show a model: networks, weight files and where they belong, licence, and what it can make."""
    from ..catalog import model
    from ..errors import UsageError

    if as_toml and as_json:
        raise UsageError("--toml and --json exclude each other", hint="leave one out")
    spec = model(name)
    if as_toml:
        output.data(spec.path.read_text("utf-8").rstrip("\n"))
    elif as_json:
        output.json_out({"schema": "maisi.model-show/1", **facts_of(spec)})
    else:
        print_model(spec)


def _list_features(as_json: bool) -> None:
    """List every extractor that is registered; what is not of the catalogue looks after its own weights."""
    from ..catalog import extractors
    from ..plugins import plugins

    specs = {spec.name: spec for spec in extractors()}
    rows: list[Row] = []
    for entry in plugins().registry("features"):
        spec = specs.get(entry.name)
        licence = dataclasses.asdict(spec.licence) if spec else None
        rows.append({"name": entry.name, "summary": spec.summary if spec else entry.summary, "owner": entry.owner,
                     "installed": spec.installed("features") if spec else None, "bundled": bool(spec and spec.bundled), "licence": licence})  # fmt: skip
    if as_json:
        output.json_out({"schema": "maisi.features/1", "features": rows})
        return
    cells = [[row["name"], "" if row["installed"] is None else yes(row["installed"]), row["licence"]["name"] if row["licence"] else "",
              row["summary"]] for row in rows]  # fmt: skip
    output.table(["extractor", "installed", "licence", "what it is"], cells)


def facts_of(spec: ModelSpec) -> Row:
    from ..record import plain

    weights = []
    for weight in spec.weights:
        file = spec.weight_path(weight)
        weights.append({**dataclasses.asdict(weight), "file": str(file), "installed": file.is_file()})
    return {
        "name": spec.name,
        "summary": spec.summary,
        "path": str(spec.path),
        "bundled": spec.bundled,
        "installed": spec.installed(spec.modes[0]),
        "modality": spec.modality,
        "modalities": list(spec.modalities),
        "modes": list(spec.modes),
        "licence": dataclasses.asdict(spec.licence),
        "limits": plain(spec.limits),
        "max_volume": spec.max_volume or None,
        "scheduler": plain(spec.scheduler),
        "defaults": plain(spec.defaults),
        "networks": {part: {"kind": network.kind, **plain(network.arguments)} for part, network in spec.networks.items()},
        "weights": weights,
    }


def print_model(spec: ModelSpec) -> None:
    about = facts_of(spec)
    licence = f"{spec.licence.name}, commercial use {'' if spec.licence.commercial else 'not '}allowed"
    defaults = words(f"{key} {value}" for key, value in spec.defaults.items())
    networks = words(f"{part} ({network.kind})" for part, network in spec.networks.items())
    facts([
        ("model", spec.name),
        ("summary", spec.summary),
        ("file", spec.path),
        ("installed", yes(about["installed"])),
        ("licence", f"{licence}  {spec.licence.url}"),
        ("modes", words(spec.modes)),
        *([("modalities", words(spec.modalities))] if spec.modalities else ()),
        *(() if spec.extracts else _limit_facts(spec.limits)),
        *(() if spec.extracts else [("scheduler", f"{spec.scheduler.get('name', 'rflow')}{f'; {defaults}' if defaults else ''}")]),
        ("networks", networks),
    ])  # fmt: skip
    output.data("")
    cells = [
        [row["part"], number(row["mib"]), yes(row["installed"]), row["source"] or row["repo"], row["file"]] for row in about["weights"]
    ]
    output.table(["part", "MiB", "installed", "from", "file"], cells, right=("MiB",))


def _limit_facts(limits: Limits) -> list[tuple[str, str]]:
    if limits.sizes:
        sizes = words(triple(size) for size in limits.sizes)
    elif limits.size_xy:
        equal = " (equal)" if limits.square else ""
        sizes = f"x and y {words(limits.size_xy)}{equal}; z {words(limits.size_z)}"
    else:
        sizes = f"any that divides by {limits.multiple}, {limits.size_min} to {limits.size_max} an axis"
    in_plane, along = ("{:g} to {:g}".format(*span) for span in (limits.spacing_xy_mm, limits.spacing_z_mm))
    rows = [("sizes", sizes), ("spacing", f"x and y {in_plane} mm; z {along} mm")]
    if limits.fov_xy_min_mm:
        good = f", {limits.fov_xy_good_mm:g} mm for the body"
        rows.append(("fov", f"at least {limits.fov_xy_min_mm:g} mm across{good if limits.fov_xy_good_mm else ''}"))
    return rows


@app.command("path", epilog=examples("maisi models path nano-ct", "maisi models path rflow-ct --json"))
def models_path(name: ModelName, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Print where the weight files of a model lie, or belong, one a line."""
    from ..catalog import model

    about = facts_of(model(name))
    files = [{key: row[key] for key in ("part", "file", "installed")} for row in about["weights"]]
    if as_json:
        top = {"name": about["name"], "installed": about["installed"]}
        output.json_out({"schema": "maisi.model-path/1", **top, "files": files})
        return
    missing = [row["part"] for row in files if not row["installed"]]
    if missing:
        output.say(f"{len(missing)} of {len(files)} files are not there: {words(missing)}")
    for row in files:
        output.data(row["file"])


@app.command(
    "pull",
    epilog=examples(
        "maisi models pull rflow-ct --accept-license",
        "maisi models pull rflow-ct --accept-license --commercial --mask-database",
        "maisi models pull rflow-mr --accept-license --from downloads/ --json",
    ),
)
def models_pull(
    names: ModelNames,
    accept: Accept = False,
    commercial: Commercial = False,
    database: Annotated[bool, typer.Option("--mask-database", help="Also fetch the mask database (CT: 11 GiB).")] = False,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Take the released files from a folder; no network.", show_default=False)
    ] = None,
    offline: Offline = False,
    force: Again = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Install weights: fetched at a pinned revision, checked, and converted once to safetensors.

    What is there already is not fetched again, and an interrupted fetch goes on where it stopped. HF_TOKEN, HF_ENDPOINT,
    HTTPS_PROXY and MAISI_HOME are respected; nothing else is sent or asked.
    """
    if offline or source is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library
    from ..catalog import model
    from ..store import check_commercial, licence_text

    specs = [model(name) for name in names]
    for spec in specs:
        check_commercial(spec.name, spec.licence, commercial=commercial)
    from ..weights import pull

    done = []
    for spec in specs:
        output.say(f"{spec.name}: {licence_text(spec.licence)}")
        with output.events() as listener:
            found = pull(spec, accept_license=accept, commercial=commercial, offline=offline, database=database, force=force,
                         source=source, on_event=listener)  # fmt: skip
        files = [{**dataclasses.asdict(each), "file": str(each.file)} for each in found]
        done.append({"name": spec.name, "licence": dataclasses.asdict(spec.licence), "files": files})
        if not as_json:
            for each in found:
                output.data(str(each.file))
    if as_json:
        output.json_out({"schema": "maisi.models-pull/1", "models": done})


@app.command("verify", epilog=examples("maisi models verify nano-ct", "maisi models verify rflow-ct rflow-mr --json"))
def models_verify(names: ModelNames, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Hash installed files anew and check that they fit their networks. Exit code 1 when one is not as it was installed."""
    from ..catalog import model
    from ..weights import verify

    specs = [model(name) for name in names]
    rows: list[Row] = []
    for spec in specs:
        with output.events() as listener:
            checks = verify(spec, on_event=listener)
        rows.append({
            "name": spec.name,
            "passed": all(check.status == "ok" for check in checks),
            "files": [{**dataclasses.asdict(check), "file": str(check.file)} for check in checks],
        })  # fmt: skip
    passed = all(row["passed"] for row in rows)
    if as_json:
        output.json_out({"schema": "maisi.models-verify/1", "passed": passed, "models": rows})
    else:
        cells = [[row["name"], each["part"], each["status"], each["file"], each["detail"]] for row in rows for each in row["files"]]
        output.table(["model", "part", "status", "file", "detail"], cells)
    if not passed:
        bad = words(row["name"] for row in rows if not row["passed"])
        output.say(f"not as it was installed: {bad}; see  maisi models pull --force")
        raise typer.Exit(1)


@app.command("remove", epilog=examples("maisi models remove rflow-ct", "maisi models remove rflow-ct --json"))
def models_remove(names: ModelNames, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Remove installed weights; files that another installed model uses stay."""
    from ..catalog import model
    from ..store import remove

    rows: list[Row] = []
    for spec in [model(name) for name in names]:
        gone, kept = remove(spec)
        rows.append({"name": spec.name, "removed": [str(file) for file in gone], "kept": [str(file) for file in kept]})
        if not as_json:
            for file in gone:
                output.data(str(file))
        if not gone and not kept:
            output.say(f"{spec.name} is not installed")
        if kept:
            output.say(f"{len(kept)} files stay: other models use them")
    if as_json:
        output.json_out({"schema": "maisi.models-remove/1", "models": rows})


@app.command("export", epilog=examples("maisi models export rflow-ct", "maisi models export rflow-ct rflow-mr --out weights.tar --json"))
def models_export(
    names: ModelNames,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="The bundle; NAME.tar by default.", show_default=False)
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write installed weights to one file, for machines without a network: `maisi models import` installs it there."""
    from ..catalog import model
    from ..store import export_bundle

    specs = [model(name) for name in names]
    path = out or Path(f"{specs[0].name}.tar")
    with output.events() as listener:
        bundle = export_bundle(specs, path, force=force, on_event=listener)
    if as_json:
        files = [str(file) for file in bundle.files]
        about = {"path": str(path), "bytes": bundle.bytes, "models": list(bundle.models), "files": files}
        output.json_out({"schema": "maisi.models-export/1", **about})
    else:
        output.data(str(path))


@app.command(
    "import",
    epilog=examples("maisi models import rflow-ct.tar --accept-license", "maisi models import weights.tar --accept-license --json"),
)
def models_import(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A file that `maisi models export` wrote.")],
    accept: Accept = False,
    commercial: Commercial = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Install weights from a bundle: all of its files, each checked against its hash, or none. No network is used."""
    from ..store import import_bundle

    with output.events() as listener:
        done = import_bundle(bundle, accept_license=accept, commercial=commercial, force=force, on_event=listener)
    if as_json:
        about = {"models": list(done.models), "files": [str(file) for file in done.files], "present": [str(file) for file in done.present]}
        output.json_out({"schema": "maisi.models-import/1", **about})
        return
    for file in (*done.files, *done.present):
        output.data(str(file))


def register(root: typer.Typer) -> None:
    """Add the group."""
    root.add_typer(app, name="models")
