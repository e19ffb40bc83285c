"""`maisi labels list|show|add`: the label vocabulary and label sets; label maps have `labelmaps`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Json, Quiet, Verbose, examples
from .wording import facts, words

if TYPE_CHECKING:
    from ..anatomy import Label, Remap

app = typer.Typer(help="The label vocabulary, and label maps in it.", no_args_is_help=True)

Row = dict[str, Any]


@app.command(
    "list",
    epilog=examples(
        "maisi labels list --group organ",
        "maisi labels list --region chest --json",
        "maisi labels list --sets",
    ),
)
def list_labels(
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="NAME", help="Only one group, such as organ.", show_default=False),
    ] = None,
    region: Annotated[str | None, typer.Option("--region", metavar="NAME", help="Only one body region.", show_default=False)] = None,
    sets: Annotated[bool, typer.Option("--sets", help="List the vocabularies that can be mapped.")] = False,
    modalities: Annotated[bool, typer.Option("--modalities", help="List the imaging modalities.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the labels with ids, groups and body regions; or label sets; or modalities."""
    from ..errors import UsageError

    if sum((sets, modalities, group is not None or region is not None)) > 1:
        raise UsageError("--sets, --modalities and --group or --region exclude each other", hint="leave all but one out")
    if sets:
        _list_sets(as_json)
    elif modalities:
        _list_modalities(as_json)
    else:
        _list_labels(group, region, as_json)


def _list_labels(group: str | None, region: str | None, as_json: bool) -> None:
    from ..anatomy import REGIONS, maisi, region_index
    from ..errors import unknown
    from ..labelfile import SCHEMA, row_of

    labels = maisi().labels
    groups = list(dict.fromkeys(label.group for label in labels))
    if group is not None and group not in groups:
        raise unknown("group of labels", group, groups, see="maisi labels list")
    place = REGIONS[region_index(region)] if region is not None else None
    rows = [row_of(label) for label in labels if group in (None, label.group) and (place is None or place in label.regions)]
    if as_json:
        output.json_out({"schema": SCHEMA, "vocabulary": "maisi", "labels": rows})
        return
    if not rows:
        output.say(f"no label of group {group} in the region {place}")
    cells = [[row["id"], row["name"], row["group"], ",".join(row["regions"]), row["owner"]] for row in rows]
    output.table(["id", "name", "group", "regions", "by"], cells, right=("id",))


def _list_sets(as_json: bool) -> None:
    from ..anatomy import maisi, remaps

    count = len(maisi().labels)
    rows: list[Row] = [{"name": "maisi", "labels": count, "mapped": count, "summary": "the vocabulary of every output"}]
    for name, remap in remaps().items():
        counts = {"labels": len(remap.names), "mapped": len(remap.pairs)}
        rows.append({"name": name, **counts, "summary": remap.summary})
    if as_json:
        output.json_out({"schema": "maisi.label-sets/1", "sets": rows})
        return
    cells = [[row["name"], row["labels"], row["mapped"], row["summary"]] for row in rows]
    output.table(["set", "labels", "mapped", "summary"], cells, right=("labels", "mapped"))


def _list_modalities(as_json: bool) -> None:
    from ..catalog import modalities, models

    rows: list[Row] = []
    for each in modalities():
        known_to = [spec.name for spec in models() if each.name in spec.modalities]
        rows.append({**dataclasses.asdict(each), "models": known_to})
    if as_json:
        output.json_out({"schema": "maisi.modalities/1", "modalities": rows})
        return
    cells = [[row["name"], row["id"], row["kind"], ",".join(row["models"]), row["summary"]] for row in rows]
    output.table(["modality", "id", "kind", "models", "summary"], cells, right=("id",))


@app.command("add", epilog=examples(
    'maisi labels add "pancreatic cyst" --id 133 --group cyst --host pancreas',
    'maisi labels add stent'))  # fmt: skip
def add_label(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new label.")],
    id_: Annotated[int | None, typer.Option("--id", metavar="N", help="Its id: free in 133..199 or 201..255, or a dummy's.  [default: the first that is free]", show_default=False)] = None,
    group: Annotated[str, typer.Option("--group", metavar="NAME", help="Its group; a tumor or a cyst has a --host.")] = "own",
    host: Annotated[str | None, typer.Option("--host", metavar="ORGAN", help="The label of the organ that a lesion lies in.", show_default=False)] = None,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Add a label of your own to labels.toml in this folder, which all commands that run here know.

    A model has to be trained on it:  maisi train controlnet.
    """
    from pathlib import Path

    from ..anatomy import FREE, OWN_FILE, maisi, own_labels
    from ..errors import UsageError
    from ..files import write_atomic

    vocabulary = maisi()
    if group in ("tumor", "cyst") and host is None:
        raise UsageError(f"a {group} lies in an organ", hint="add --host, such as --host pancreas")
    owner = None if host is None else vocabulary.get(vocabulary.id(host))
    chosen = id_ if id_ is not None else next((n for n in range(133, 256) if n != 200 and n not in vocabulary), None)
    if chosen is None:
        raise UsageError("no id is free", hint=FREE)
    path = Path(OWN_FILE)
    row: Row = {"name": name.strip(), "id": chosen, "group": group, **({"host": owner.name} if owner else {})}
    before = path.read_bytes() if path.exists() else None
    write_atomic(path, _toml([*own_labels(path), row]))
    maisi.cache_clear()
    try:
        maisi()
    except UsageError:
        if before is None:
            path.unlink()
        else:
            write_atomic(path, before)
        maisi.cache_clear()
        raise
    if as_json:
        output.json_out({"schema": "maisi.label/1", "file": str(path), "label": row})
    else:
        output.data(f"{chosen}  {row['name']}")


def _toml(rows: list[Row]) -> bytes:
    import tomli_w

    return tomli_w.dumps({"label": rows}).encode()


@app.command(
    "show",
    epilog=examples(
        "maisi labels show liver",
        "maisi labels show totalsegmentator",
        'maisi labels show "hepatic tumor" --json',
    ),
)
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|SET", help="A label by name or id, a label set, or a remap file.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show one label with its partners in other vocabularies, or the table of a label set."""
    from ..anatomy import remap_table, remaps

    if name == "maisi" or name in remaps() or name.endswith(".toml"):
        _show_set(remap_table(name), as_json)
    else:
        _show_label(_label(name), as_json)


def _show_set(remap: Remap, as_json: bool) -> None:
    from ..anatomy import maisi

    rows: list[Row] = []
    for value, name in sorted(remap.names.items()):
        to = remap.pairs.get(value)
        partner = None if to is None else {"id": to, "name": maisi().name_of(to)}
        rows.append({"id": value, "name": name, "maisi": partner})
    if as_json:
        payload = {"name": remap.source, "summary": remap.summary, "labels": rows}
        output.json_out({"schema": "maisi.label-set/1", **payload})
        return
    output.say(f"{remap.source}: {remap.summary}")
    none = {"id": "", "name": "no partner"}
    cells = [[row["id"], row["name"], *(row["maisi"] or none).values()] for row in rows]
    output.table(["id", "name", "maisi id", "maisi name"], cells, right=("id", "maisi id"))


def _label(name: str) -> Label:
    """Return a label by name or id. Raises `UsageError` with near matches, label sets among them."""
    from ..anatomy import maisi, remaps
    from ..errors import UsageError, unknown

    try:
        label = maisi().get(maisi().id(name))
    except UsageError as error:
        if name.strip().isdigit():
            raise
        known = [*(each.name for each in maisi().labels if each.group != "dummy"), "maisi", *remaps()]
        raise unknown("label or label set", name, known, see="maisi labels list") from error
    assert label is not None
    return label


def _show_label(label: Label, as_json: bool) -> None:
    from ..anatomy import maisi, remaps
    from ..labelfile import row_of

    partners = {
        source: [{"id": value, "name": remap.names.get(value, f"id {value}")} for value, to in remap.pairs.items() if to == label.id]
        for source, remap in remaps().items()
    }
    host = None if label.host is None else maisi().name_of(label.host)
    if as_json:
        output.json_out({"schema": "maisi.label/1", **row_of(label), "host_name": host, "partners": partners})
        return
    rows: list[tuple[str, object]] = [
        ("id", label.id),
        ("name", label.name),
        ("group", label.group),
        ("regions", words(label.regions) or "not stated"),
        ("colour", "#{:02x}{:02x}{:02x}".format(*label.color)),
        ("by", label.owner),
    ]
    if host is not None:
        rows.append(("lies in", f"{label.host} {host}"))
    for source, found in partners.items():
        rows.append((source, words(f"{each['id']} {each['name']}" for each in found) or "no partner"))
    facts(rows)
