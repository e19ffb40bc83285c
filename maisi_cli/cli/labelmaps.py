"""`maisi labels map|check|add-body`: label maps of one's own, made fit to condition a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .labels import Row, app
from .options import Force, Json, Quiet, Verbose, examples
from .wording import verdict, words

if TYPE_CHECKING:
    from ..anatomy import Remap
    from ..volumes import Mask

Source = Annotated[Path, typer.Argument(metavar="IN", help="Label map to read.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="Label map to write.")]


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
    """Map a label map from one vocabulary to another, and say which labels have no partner, or share one.

    Into maisi, what has no partner becomes body (200); out of maisi it becomes background.
    """
    from ..anatomy import BODY, remap_table
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
    has_body = remap.has_body(mask.ids()) if to == "maisi" else remap_table(to).has_body(made.ids())
    _warn_of_names(target, to)
    if as_json:
        files = {"input": str(source), "output": str(target), "from": from_, "to": to}
        output.json_out({"schema": "maisi.labels-map/1", **files, **report, "body_envelope": has_body})
        return
    output.say(f"{len(report['mapped'])} labels mapped from {from_} to {to}")
    lost, became = report["without_partner"], "body (200)" if to == "maisi" else "background"
    if lost:
        names = words(f"{row['id']} {row['name']}" for row in lost)
        output.warn(f"no partner in {to}, now {became}: {names}")
    for row in report["merged"]:
        output.warn(f"{words(row['ids'])} became {row['to_id']} {row['to_name']}: this cannot be mapped back")
    for row in report["ambiguous"]:
        output.warn(f"{row['id']} {row['name']} became {row['to_id']} {row['to_name']}, the lowest of {words(row['to_ids'])} in {to}")
    if to == "maisi" and not has_body:
        output.say(f"it has no body envelope (label {BODY}) yet; add it:  maisi labels add-body {target} NEW.nii.gz --ct CT.nii.gz")
    output.data(str(target))


def _warn_of_names(target: Path, vocabulary: str) -> None:
    """Warn where a `labels.json` lies beside the new file and speaks of other labels."""
    from ..labelfile import NAME, read_labels

    beside = read_labels(target.parent)
    if beside is not None and beside.get("vocabulary") != vocabulary:
        output.warn(f"{target.parent / NAME} names labels of {beside.get('vocabulary')}, not those of {target.name} ({vocabulary})")


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
        elif not (target == "maisi" and value == BODY and BODY not in remap.names):
            lost.append({"id": value, "name": names(value), "became": BODY if target == "maisi" else 0})
    for to, ids in shared.items():
        if len(ids) > 1:
            to_name = maisi().name_of(to) if back is None else back.get(to, f"id {to}")
            merged.append({"to_id": to, "to_name": to_name, "ids": ids})
    shares = {} if target == "maisi" else remap_table(target).many_to_one()
    ambiguous = [{**row, "to_ids": sorted(shares[row["id"]])} for row in mapped if row["id"] in shares]
    return {"mapped": mapped, "without_partner": lost, "merged": merged, "ambiguous": ambiguous}


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
    said: list[Any] = []
    with output.events():
        from ..volumes import read_mask

        mask = read_mask(file, on_event=said.append)
    stored: list[Row] = [{"check": "stored-type", "level": "note", "id": None, "voxels": None, "text": event.text} for event in said]
    findings = [*stored, *_findings(file, mask, remap, labels)]
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
        elif value not in remap.pairs and value in remap.names:
            text = f"{value} {remap.names[value]} has no partner in maisi and becomes body (200)"
            find("no-partner", value, text, "note")
        elif label is not None and label.group == "dummy":
            text = f"{value} {label.name} is a free id, which the released models never saw"
            find("free-id", value, text, "note")
    odd = any(each["check"] in ("unknown-id", "free-id") for each in found)
    if odd and labels == "maisi":
        sets = _fitting(present)
        if sets:
            find("other-set", None, f"every id is one of {' and '.join(sets)} too; if it is of such a set, add  --labels NAME", "note")
    if not remap.has_body(present):
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


def register(root: typer.Typer) -> None:
    """Add the group `labels`, the rest of which lies in its own module."""
    root.add_typer(app, name="labels")
