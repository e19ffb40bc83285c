"""`maisi plugins`: what plugins add."""

from __future__ import annotations

import dataclasses

import typer

from . import output
from .options import Json, Quiet, Verbose, examples
from .wording import words

app = typer.Typer(help="What plugins add.", no_args_is_help=True)


@app.command("list", epilog=examples("maisi plugins list", "maisi plugins list --json"))
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


def register(root: typer.Typer) -> None:
    """Add the group."""
    root.add_typer(app, name="plugins")
