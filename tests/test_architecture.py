"""The walls of the house: import directions, and a front that starts without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "monai", "numpy", "nibabel", "rich")


def test_imports_point_inward() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    "words",
    [["--help"], ["presets", "list"], ["recommend-spacing"], ["gpu-plan", "--preset", "chest"], ["generate", "--mode", "mask", "-n"]],
)
def test_the_front_loads_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
from maisi_cli.cli import run
code = run({words!r})
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_building_the_app_loads_not_even_what_typer_parses_with() -> None:
    code = f"import sys; from maisi_cli.cli import build; build(); print([m for m in {(*HEAVY, 'pydantic')!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
