"""Options that several commands share, and how examples stand in a command's help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output


def examples(*lines: str) -> str:
    r"""Return the end of a command's help: examples, one per line, kept as they are (click's `\b`)."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _quiet(value: bool) -> bool:
    if value:
        output.set_mode(quiet=True)
    return value


def _verbose(value: bool) -> bool:
    if value:
        output.set_mode(verbose=True)
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", callback=_quiet, help="Print nothing but the answer and errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", callback=_verbose, help="Say more on stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Offline = Annotated[bool, typer.Option("--offline", help="Open no network connection.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.")]
