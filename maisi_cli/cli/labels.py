"""`maisi labels`: the label vocabulary, and label maps in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Force, Json, Quiet, Verbose, examples
from .wording import facts, verdict, words

if TYPE_CHECKING:
    from ..anatomy import Label, Remap
    from ..volumes import Mask

app = typer.Typer(help="The label vocabulary, and label maps in it.", no_args_is_help=True)

Source = Annotated[Path, typer.Argument(metavar="IN", help="Label map to read.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="Label map to write.")]
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

    labels = maisi().labels
    groups = list(dict.fromkeys(label.group for label in labels))
    if group is not None and group not in groups:
        raise unknown("group of labels", group, groups, see="maisi labels list")
    place = REGIONS[region_index(region)] if region is not None else None
    rows = [_row(label) for label in labels if group in (None, label.group) and (place is None or place in label.regions)]
    if as_json:
        output.json_out({"schema": "maisi.labels/1", "vocabulary": "maisi", "labels": rows})
        return
    if not rows:
        output.say(f"no label of group {group} in the region {place}")
    cells = [[row["id"], row["name"], row["group"], ",".join(row["regions"]), row["owner"]] for row in rows]
    output.table(["id", "name", "group", "regions", "by"], cells, right=("id",))


def _row(label: Label) -> Row:
    return {**dataclasses.asdict(label), "regions": list(label.regions), "color": list(label.color)}


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

    partners = {
        source: [{"id": value, "name": remap.names.get(value, f"id {value}")} for value, to in remap.pairs.items() if to == label.id]
        for source, remap in remaps().items()
    }
    host = None if label.host is None else maisi().name_of(label.host)
    if as_json:
        output.json_out({"schema": "maisi.label/1", **_row(label), "host_name": host, "partners": partners})
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


@app.command(
    "map",
    epilog=examples(
        "maisi labels map seg.nii.gz seg_maisi.nii.gz --from totalsegmentator",
        "maisi labels map label.nii.gz label_ts.nii.gz --from maisi --to totalsegmentator --json",
    ),
)
def map_file(
    source: Source,
    target: Target,
    from_: Annotated[str, typer.Option("--from", metavar="NAME|FILE", help="Vocabulary of IN.")],
    to: Annotated[str, typer.Option("--to", metavar="NAME", help="Vocabulary of OUT.")] = "maisi",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Map a label map from one vocabulary to another, and say which labels have no partner.

    Into maisi, what has no partner becomes body (200); out of maisi it becomes background.
    """
    from ..anatomy import remap_table
    from ..errors import UsageError
    from ..files import refuse_overwriting

    if from_ == to:
        raise UsageError(f"--from and --to are both {from_}", hint="see  maisi labels list --sets")
    remap = remap_table(from_, to)
    refuse_overwriting(target, force=force)
    with output.events() as on_event:
        from ..masks import map_labels
        from ..volumes import read_mask, write_mask

        mask = read_mask(source, on_event=on_event)
        made = map_labels(mask, from_, to)
        write_mask(made, target, force=force, description=_description(source, f"labels {from_} to {to}"))
    report = _mapping(remap, mask.ids(), from_, to)
    if as_json:
        files = {"input": str(source), "output": str(target), "from": from_, "to": to}
        output.json_out({"schema": "maisi.labels-map/1", **files, **report})
        return
    output.say(f"{len(report['mapped'])} labels mapped from {from_} to {to}")
    lost, became = report["without_partner"], "body (200)" if to == "maisi" else "background"
    if lost:
        names = words(f"{row['id']} {row['name']}" for row in lost)
        output.warn(f"no partner in {to}, now {became}: {names}")
    for row in report["merged"]:
        output.warn(f"{words(row['ids'])} became {row['to_id']} {row['to_name']}: this cannot be mapped back")
    output.data(str(target))


def _mapping(remap: Remap, present: tuple[int, ...], source: str, target: str) -> dict[str, list[Row]]:
    """Return what became of each id that is present, as `masks.map_labels` does it."""
    from ..anatomy import BODY, maisi, remap_table

    names = maisi().name_of if source == "maisi" else lambda value: remap.names.get(value, f"id {value}")
    back = None if target == "maisi" else remap_table(target).names
    mapped, lost, merged = [], [], []
    shared: dict[int, list[int]] = {}
    for value in present:
        to = remap.pairs.get(value)
        if to is not None:
            to_name = maisi().name_of(to) if back is None else back.get(to, f"id {to}")
            mapped.append({"id": value, "name": names(value), "to_id": to, "to_name": to_name})
            shared.setdefault(to, []).append(value)
        elif not (target == "maisi" and value == BODY):
            lost.append({"id": value, "name": names(value), "became": BODY if target == "maisi" else 0})
    for to, ids in shared.items():
        if len(ids) > 1:
            to_name = maisi().name_of(to) if back is None else back.get(to, f"id {to}")
            merged.append({"to_id": to, "to_name": to_name, "ids": ids})
    return {"mapped": mapped, "without_partner": lost, "merged": merged}


def _description(source: Path, done: str) -> str:
    """Return what the header of a changed label map says: it stays synthetic when it was."""
    import nibabel

    from .. import __version__

    header: Any = nibabel.load(source).header
    before = header["descrip"].tobytes().split(b"\0")[0].decode("ascii", "replace").strip()
    return f"{before if before.startswith('SYNTHETIC') else f'maisi {__version__}'}; {done}"


@app.command(
    "check",
    epilog=examples(
        "maisi labels check label.nii.gz",
        "maisi labels check seg_body.nii.gz --labels totalsegmentator --json",
    ),
)
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Label map.")],
    labels: Annotated[str, typer.Option("--labels", metavar="NAME|FILE", help="Vocabulary of the file.")] = "maisi",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check that a label map can condition a model: known ids, and the body envelope.

    Exit code 1 with every finding.
    """
    from ..anatomy import maisi, remap_table

    remap = remap_table(labels)
    with output.events() as on_event:
        from ..volumes import read_mask

        mask = read_mask(file, on_event=on_event)
    findings = _findings(file, mask, remap, labels)
    counts, (x, y, z) = mask.counts(), mask.geometry.spacing
    rows = [
        {
            "id": value,
            "name": remap.names.get(value) or maisi().name_of(value),
            "voxels": int(counts[value]),
            "ml": round(float(counts[value]) * x * y * z / 1000, 3),
        }
        for value in mask.ids()
    ]
    passed = not any(finding["level"] == "error" for finding in findings)
    if as_json:
        about = {"path": str(file), "vocabulary": labels, "passed": passed}
        output.json_out({"schema": "maisi.labels-check/1", **about, "findings": findings, "labels": rows})
    else:
        texts = [f"{'note: ' if each['level'] == 'note' else ''}{each['text']}" for each in findings]
        verdict(passed, f"{file}  {len(rows)} labels of {labels}", texts)
    if not passed:
        raise typer.Exit(1)


def _findings(file: Path, mask: Mask, remap: Remap, labels: str) -> list[Row]:
    """Return what is wrong with a label map (level error), and what one should know (level note)."""
    from ..anatomy import BODY, maisi

    counts, present = mask.counts(), mask.ids()
    found: list[Row] = []

    def find(name: str, value: int | None, text: str, level: str = "error") -> None:
        voxels = None if value is None else int(counts[value])
        found.append({"check": name, "level": level, "id": value, "voxels": voxels, "text": text})

    if not present:
        find("empty", None, "it holds no label at all")
        return found
    for value in present:
        label = maisi().get(value) if labels == "maisi" else None
        if value not in remap.names and value != BODY:
            find("unknown-id", value, f"id {value} ({counts[value]} voxels) is not a label of {labels}")
        elif value not in remap.pairs and value != BODY:
            text = f"{value} {remap.names[value]} has no partner in maisi and becomes body (200)"
            find("no-partner", value, text, "note")
        elif label is not None and label.group == "dummy":
            text = f"{value} {label.name} is a free id, which the released models never saw"
            find("free-id", value, text, "note")
    odd = any(each["check"] in ("unknown-id", "free-id") for each in found)
    if odd and labels == "maisi":
        for name in _fitting(present):
            find("other-set", None, f"every id is one of {name} too; if it is, add  --labels {name}", "note")
    if BODY not in present:
        command = f"maisi labels add-body {file} NEW.nii.gz --ct CT.nii.gz"
        find("no-body", BODY, f"no body envelope (label {BODY}); add it:  {command}")
    return found


def _fitting(present: tuple[int, ...]) -> list[str]:
    """Return the label sets, but for channels of networks, that know every id that is present."""
    from ..anatomy import BODY, remaps

    ids = set(present) - {BODY}
    return [name for name, remap in remaps().items() if name != "raw125" and ids <= set(remap.names)]


@app.command(
    "add-body",
    epilog=examples(
        "maisi labels add-body seg.nii.gz seg_body.nii.gz --ct ct.nii.gz",
        "maisi labels add-body organs.nii.gz organs_body.nii.gz --ct ct.nii.gz --no-lung-labels --json",
    ),
)
def add_body_to_file(
    source: Source,
    target: Target,
    ct: Annotated[Path, typer.Option("--ct", metavar="FILE", help="CT on the same grid, in HU.")],
    lung_labels: Annotated[
        bool,
        typer.Option(
            "--lung-labels/--no-lung-labels",
            help="Whether IN labels the lungs; without, large dark parts stay in the body.",
        ),
    ] = True,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Add the body envelope: label 200 for every voxel of the body that has no label of its own."""
    from ..anatomy import BODY
    from ..files import refuse_overwriting

    refuse_overwriting(target, force=force)
    with output.events() as on_event:
        from ..envelope import add_body
        from ..volumes import read_image, read_mask, write_mask

        mask, image = read_mask(source, on_event=on_event), read_image(ct)
        made = add_body(mask, image, lungs_labelled=lung_labels, on_event=on_event)
        write_mask(made, target, force=force, description=_description(source, "body envelope added"))
    if not as_json:
        output.data(str(target))
        return
    counts, before = made.counts(), mask.counts()
    voxels = {
        "volume": int(counts.sum()),
        "body": int(counts[1:].sum()),
        "envelope": int(counts[BODY]),
        "added": int(counts[BODY]) - int(before[BODY]),
    }
    files = {"input": str(source), "ct": str(ct), "output": str(target)}
    output.json_out({"schema": "maisi.labels-add-body/1", **files, "voxels": voxels})
