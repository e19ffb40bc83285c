"""The shell: the only place that parses a command line, prints and exits.

Commands import the engine when they run, so that `maisi --help` costs no more than Typer.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from ..errors import MaisiError
from . import output

BUG, INTERRUPTED, PIPE_CLOSED = 70, 130, 141

HELP = """Synthetic 3D CT and MR volumes with paired segmentation masks.

maisi generate --preset chest-abdomen makes a CT and its label map with the small model that comes along; nothing is downloaded."""


def build(*, rich_help: bool = False) -> typer.Typer:
    """Return the application with all commands, those of plugins included."""
    from . import browse, evaluate, generate, hardware, train

    app = typer.Typer(
        name="maisi",
        help=HELP,
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode="rich" if rich_help else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)] = False,
    ) -> None:
        pass

    root.__doc__ = HELP
    for module in (generate, train, evaluate, hardware, browse):
        module.register(app)
    _add_plugin_commands(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        output.data(f"maisi {__version__}")
        raise typer.Exit


def _add_plugin_commands(app: typer.Typer) -> None:
    from ..plugins import plugins

    for entry in plugins().registry("commands"):
        app.command(entry.name)(plugins().registry("commands").get(entry.name))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; every error becomes one line and, where there is one, its way out."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    output.set_mode()
    try:
        app = build(rich_help=bool(words) and not words[0].startswith("-") and output.on_terminal())
        _report_plugins()
        code = typer.main.get_command(app).main(args=words, prog_name="maisi", standalone_mode=False)
        return int(code or 0)
    except MaisiError as error:
        if os.environ.get("MAISI_DEBUG") == "1":
            raise
        output.fail(error.message, error.hint)
        return error.exit_code
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _discard_stdout()  # Typer leaves by SystemExit(1) when stdout is closed
        return PIPE_CLOSED
    except (KeyboardInterrupt, typer.Abort):
        output.fail("interrupted; finished files are complete, unfinished ones were removed")
        return INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            output.say(error.format_message())  # type: ignore[attr-defined]
            return 2
        if hasattr(error, "format_message"):  # wrong use, found by Typer
            output.fail(_one_line(error), _usage_hint(error))
            return 2
        if os.environ.get("MAISI_DEBUG") == "1":
            raise
        output.fail(f"a bug in maisi: {type(error).__name__}: {error}", "see the traceback with MAISI_DEBUG=1, and report it")
        return BUG


def _one_line(error: Any) -> str:
    text = " ".join(str(error.format_message()).split())
    return (text[:1].lower() + text[1:]).rstrip(".")


def _usage_hint(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f"see  {context.command_path if context else 'maisi'} --help"


def _report_plugins() -> None:
    from ..plugins import plugins

    for problem in plugins().problems:
        output.warn(problem)


def _discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> NoReturn:
    """Run `maisi` as a program."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(run())


def _terminated(number: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt
