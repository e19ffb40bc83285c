"""The shell: the only place that parses a command line, prints and exits.

Commands import the engine when they run, so that `maisi --help` costs no more than Typer.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from ..errors import CannotRun, MaisiError, nearest
from . import output

BUG, INTERRUPTED, PIPE_CLOSED = 70, 130, 141

ROOMS = (
    "generate", "train", "data", "fid", "evaluate", "report", "spacing", "hardware", "export", "presets", "labelmaps", "models", "plugins",
    "info", "doctor",
)  # fmt: skip
"""The modules whose commands there are, in the order of the help."""
HELP = """Synthetic 3D CT and MR volumes with paired segmentation masks.

maisi generate --preset chest-abdomen makes a CT and its label map with the small model that comes along; nothing is downloaded."""


def build(*, rich_help: bool = False) -> typer.Typer:
    """Return the application with all commands, those of plugins included."""
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
    for name in ROOMS:
        import_module(f".{name}", __name__).register(app)
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
        rich_help = bool(words) and not words[0].startswith("-") and output.on_terminal()
        command = typer.main.get_command(build(rich_help=rich_help))
        if rich_help:
            _keep_brackets(command)
        if not {"-q", "--quiet"} & set(words):
            _report_plugins()
        code = int(command.main(args=words, prog_name="maisi", standalone_mode=False) or 0)
        return _interrupted() if code == INTERRUPTED else code  # Typer makes this code of Ctrl-C
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
        return _interrupted()
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            output.say(error.format_message())  # type: ignore[attr-defined]
            return 2
        if hasattr(error, "format_message"):  # wrong use, found by Typer
            output.fail(_one_line(error), _usage_hint(error))
            return 2
        if os.environ.get("MAISI_DEBUG") == "1":
            raise
        what = (str(error).splitlines() or [""])[0]
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
            output.fail(
                f"out of memory{f': {what}' if what else ''}", "see  maisi gpu-plan --help; use a smaller --size, or --decoder window"
            )
            return CannotRun.exit_code
        output.fail(f"a bug in maisi: {type(error).__name__}: {what}", "see the traceback with MAISI_DEBUG=1, and report it")
        return BUG


def _interrupted() -> int:
    output.fail("interrupted; finished files are complete, unfinished ones were removed")
    return INTERRUPTED


def _one_line(error: Any) -> str:
    if hasattr(error, "possibilities"):  # Typer's guesses at an option are looser than ours
        return f"no such option: {error.option_name}"
    text = " ".join(str(error.format_message()).split())
    return (text[:1].lower() + text[1:]).rstrip(".")


def _usage_hint(error: Any) -> str:
    context = getattr(error, "ctx", None)
    see = f"see  {context.command_path if context else 'maisi'} --help"
    if context is None or not hasattr(error, "possibilities"):
        return see
    known = {name.lstrip("-"): name for each in context.command.params for name in each.opts if name.startswith("--")}
    close = [known[name] for name in nearest(error.option_name.lstrip("-"), known, at_most=2)]
    return f"did you mean {' or '.join(close)}? {see}" if close else see


def _keep_brackets(command: Any) -> None:
    """Keep `[default: x]` in the help of options, which rich would take for markup."""
    for each in command.params:
        if getattr(each, "help", None):
            each.help = re.sub(r"\[(?=[a-z])", r"\\[", each.help)
    for each in getattr(command, "commands", {}).values():
        _keep_brackets(each)


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
