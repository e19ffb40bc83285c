"""The report of a run: one HTML file with its samples, how they were made and how they were judged.

The page needs no network and no server: styles, script, pictures and volumes are inside. `samples` reads the run and packs its
volumes, `page` writes the HTML with the tags of `html`; `maisi_cli/data/report/` holds the template, the style and the viewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..events import OnEvent, ignore
from ..files import refuse_overwriting, write_atomic
from .page import compose
from .samples import Entry, make_entries, read_cases, read_distances

SCHEMA = "maisi.report/1"
VOLUMES = 12
"""How many samples are embedded as volumes, unless another number is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A report that was written: its file, its size and what it holds of each sample."""

    path: Path
    bytes: int
    entries: tuple[Entry, ...]
    fid: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as `maisi report --json` prints it (schema maisi.report/1)."""
        return {
            "schema": SCHEMA,
            "report": str(self.path),
            "bytes": self.bytes,
            "samples": [
                {"id": each.case.id, "passed": each.case.passed, "shown_as": each.shown_as, "bytes": each.bytes, "notes": list(each.notes)}
                for each in self.entries
            ],
            "fid": list(self.fid),
            "notes": list(self.notes),
        }


def report(
    run: str | Path, out: str | Path | None = None, *, volumes: int = VOLUMES, force: bool = False, on_event: OnEvent = ignore
) -> Report:
    """Write the page of the run in folder `run` to `out` (default: `report.html` in that folder).

    At most `volumes` samples are embedded as volumes: those that failed the quality check first, then the first ones. Equal
    runs give equal bytes. Raises `UsageError` for a folder without records, a damaged record, or a page that exists without
    `force`; an image or label map that is missing or damaged is noted in the page.
    """
    run = Path(run)
    out = run / "report.html" if out is None else Path(out)
    if volumes < 0:
        raise UsageError(f"--volumes is a number of samples from 0, not {volumes}", hint=f"leave it out for {VOLUMES}")
    cases = read_cases(run)
    if out.is_dir():
        raise UsageError(f"{out} is a folder, not a file", hint="name the page, such as --out report.html")
    refuse_overwriting(out, force=force)
    entries = make_entries(cases, volumes, on_event)
    distances, notes = read_distances(run)
    page = compose(run.resolve().name, entries, distances, notes).encode()
    write_atomic(out, page)
    return Report(path=out, bytes=len(page), entries=entries, fid=tuple(name for name, _ in distances), notes=notes)
