"""`maisi qc`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Force, Json, Quiet, Verbose, examples

if TYPE_CHECKING:
    from ..judging import Judged, Terms
    from ..memorisation import Audit

PAIRS = 8
"""How many of the nearest pairs are drawn."""


def qc(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Folders, images with their label map beside them, or label maps alone.")],
    label_dir: Annotated[Path | None, typer.Option("--label-dir", metavar="DIR", help="Folder of the label maps, each named like its image.", show_default=False)] = None,
    labels: Annotated[str, typer.Option("--labels", metavar="NAME|FILE", help="Vocabulary of the label maps.")] = "maisi",
    anatomy: Annotated[str | None, typer.Option("--anatomy", metavar="A,B", help="Organs that every mask must contain.", show_default=False)] = None,
    modality: Annotated[str | None, typer.Option("--modality", metavar="NAME", help="Modality of the images [default: the record's, else ct].", show_default=False)] = None,
    checks: Annotated[str | None, typer.Option("--checks", metavar="A,B", help="Run these checks alone.", show_default=False)] = None,
    compat: Annotated[str | None, typer.Option("--compat", metavar="reference", help="The reference's own numerics where they differ.", show_default=False)] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write a table with one row per finding.", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with a picture and the findings of every case.", show_default=False)] = None,
    memorization: Annotated[bool, typer.Option("--memorization", help="Look for cases that are copies of those in --reference.")] = False,
    reference: Annotated[Path | None, typer.Option("--reference", metavar="DIR", help="Folder of the real cases.", show_default=False)] = None,
    spaces: Annotated[str, typer.Option("--spaces", metavar="A,B", help="Where copies are looked for: mask, latent, intensity.")] = "mask,latent",
    model: Annotated[str, typer.Option("--model", metavar="NAME|FILE", help="Model whose VAE makes the latents.")] = "nano-ct",
    threshold: Annotated[float | None, typer.Option("--threshold", metavar="Z", help="The z above which a case counts as a copy [default: 4].", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write a picture of each of the nearest pairs.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=0, help="Processes (0: one per core).")] = 0,
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Check images and label maps: HU, volumes, sides and pieces of organs, seams. Exit code 1 when one fails.

    Folders of maisi, nnU-Net (imagesTr, labelsTr) and TotalSegmentator (ct, segmentations) are understood. Of a label map
    without an image only its labels are checked.
    """
    from ..cases import find_cases
    from ..errors import UsageError
    from ..files import refuse_overwriting, write_atomic
    from ..judging import Terms, as_csv, judge_all, with_findings

    _require_audit(memorization, {"--reference": reference, "--threshold": threshold, "--out": out})
    if compat not in (None, "reference"):
        raise UsageError(f"--compat {compat!r} is not known", hint="use --compat reference")
    for file in filter(None, (csv_file, html)):
        refuse_overwriting(file, force=force)
    terms = Terms(
        labels=labels, modality=modality, required=_list(anatomy), checks=_list(checks) if checks is not None else None,
        compat=compat == "reference", picture=html is not None,
    )  # fmt: skip
    cases = find_cases(paths, label_dir=label_dir)
    real = find_cases([reference]) if memorization and reference is not None else []
    _require_known(terms)
    judged: list[Judged] = []
    with output.events() as listen:
        for one in judge_all(cases, terms, jobs=jobs, on_event=listen if len(cases) >= PAIRS else _silent):
            judged.append(one)
            if not as_json and not memorization:
                _show(one)
            for note in one.notes:
                output.say(f"{one.case.id}: {note}")
        audit = None
        if memorization:
            from ..memorisation import THRESHOLD
            from ..memorisation import audit as look_for_copies

            limit = THRESHOLD if threshold is None else threshold
            audit = look_for_copies(cases, real, terms, spaces=_list(spaces), model=model, threshold=limit, on_event=listen)
    if audit is not None:
        judged = [with_findings(one, [each.finding(audit.threshold) for each in audit.of(one.case.id)]) for one in judged]
        if not as_json:
            for one in judged:
                _show(one)
    if csv_file is not None:
        write_atomic(csv_file, as_csv(judged).encode())
    _write_pictures(judged, audit, terms, html, out, force=force)
    passed = all(one.passed for one in judged)
    if as_json:
        found = {"memorization": audit.as_dict()} if audit is not None else {}
        output.json_out({"schema": "maisi.qc/1", "cases": [one.as_dict() for one in judged], **found, "passed": passed})
    else:
        output.say(f"{sum(one.passed for one in judged)} of {len(judged)} passed" + (f"; {audit.summary()}" if audit else ""))
    if not passed:
        raise typer.Exit(1)


def _list(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _silent(event: Any) -> None:
    """Say nothing of the steps of a few cases."""


def _require_audit(memorization: bool, only: dict[str, Any]) -> None:
    """Refuse the options of the search for copies without it, and it without a reference."""
    from ..errors import UsageError

    if memorization and only["--reference"] is None:
        raise UsageError("--memorization needs real cases to compare with", hint="add --reference DIR")
    for flag, value in only.items():
        if not memorization and value is not None:
            raise UsageError(f"{flag} belongs to the search for copies", hint="add --memorization, or leave it out")


def _require_known(terms: Terms) -> None:
    """Refuse names that do not exist before a file is read."""
    from ..anatomy import maisi, remap_table
    from ..catalog import modality as find_modality
    from ..plugins import plugins

    if terms.modality is not None:
        find_modality(terms.modality)
    for name in terms.required:
        maisi().id(name)
    remap_table(terms.labels)
    for name in terms.checks or ():
        plugins().registry("checks").entry(name)


def _show(one: Judged) -> None:
    output.data(f"{'none' if not one.verdict.findings else 'pass' if one.passed else 'FAIL'}  {one.case.id}")
    for finding in one.verdict.failures():
        output.data(f"      {finding.text}")


def _write_pictures(judged: list[Judged], audit: Audit | None, terms: Terms, html: Path | None, out: Path | None, *, force: bool) -> None:
    """Write the page and the pictures of the nearest pairs."""
    if html is None and (out is None or audit is None):
        return
    from ..files import refuse_overwriting, write_atomic
    from ..qc_page import page

    pairs = []
    if audit is not None:
        from ..memorisation import pair_name, pair_picture

        nearest = {(one.id, one.nearest): one for one in reversed(audit.neighbours)}
        chosen = sorted(nearest.values(), key=lambda one: -one.z)[:PAIRS]
        if out is not None:
            for one in chosen:
                refuse_overwriting(out / pair_name(one), force=force)
        pairs = [(one, pair_picture(one, audit.cases, terms)) for one in chosen]
        if out is not None:
            for one, picture in pairs:
                write_atomic(out / pair_name(one), picture)
                output.say(f"wrote {out / pair_name(one)}")
    if html is not None:
        write_atomic(html, page(judged, audit=audit, pairs=pairs).encode())
        output.say(f"wrote {html}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "qc",
        epilog=examples(
            "maisi qc run/",
            "maisi qc run/ --anatomy liver,spleen --json",
            "maisi qc run/ --memorization --reference real/ --spaces mask --html qc.html",
        ),
    )(qc)
