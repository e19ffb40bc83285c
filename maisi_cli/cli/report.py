"""`maisi report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output
from .options import Force, Json, Quiet, Verbose, examples


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder that  maisi generate  wrote to.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="The page to write.  [default: report.html in RUN_DIR]", show_default=False)] = None,
    volumes: Annotated[int, typer.Option("--volumes", metavar="K", help="Samples to embed as volumes that can be scrolled: those that failed first.")] = 12,
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Write one HTML page that shows a run: its samples, settings, quality check, times and distances.

    The page needs no network and no server; send it as it is.
    """
    from ..report import report as write

    with output.events() as on_event:
        written = write(run, out, volumes=volumes, force=force, on_event=on_event)
    for each in written.entries:
        for note in each.notes:
            output.warn(f"{each.case.id}: {note}")
    for note in written.notes:
        output.warn(note)
    if as_json:
        output.json_out(written.as_dict())
        return
    shown = sum(each.shown_as == "volume" for each in written.entries)
    largest = max(each.bytes for each in written.entries)
    output.say(f"{len(written.entries)} samples, {shown} as volumes; {written.bytes / 1e6:.1f} MB, at most {largest / 1e6:.1f} MB a sample")
    output.data(str(written.path))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report", epilog=examples("maisi report run/", "maisi report run/ --volumes 4 --out page.html --force"))(report)
