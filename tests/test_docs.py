"""The pages of docs/: what they name exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from maisi_cli import cli
from maisi_cli.plugins import load, plugins
from maisi_cli.quality import ct_table
from maisi_cli.sampling import evaluations_of, family_of

ROOT = Path(__file__).resolve().parents[1]
QUALITY = (ROOT / "docs" / "quality.md").read_text("utf-8")
DIFFERENCES = (ROOT / "docs" / "differences.md").read_text("utf-8")
SILENT_ERRORS = range(16, 54)


def entries() -> dict[int, list[str]]:
    """Return the text of each numbered entry; a number that has several has several texts."""
    found: dict[int, list[str]] = {}
    for number, text in re.findall(r"^### (\d+)\. (.*?)(?=^##)", DIFFERENCES, flags=re.M | re.S):
        found.setdefault(int(number), []).append(text)
    return found


def elsewhere() -> list[int]:
    """Return the numbers in the first column of the table at the end."""
    table = DIFFERENCES.partition("## Dealt with elsewhere")[2]
    return [int(number) for cell in re.findall(r"^\|([^|]*)\|", table, flags=re.M) for number in re.findall(r"\d+", cell)]


def options() -> set[str]:
    """Return every flag of every command."""

    def walk(command: Any) -> Iterator[str]:
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)
        for below in getattr(command, "commands", {}).values():
            yield from walk(below)

    return set(walk(typer.main.get_command(cli.build())))


def defined_in(file: str) -> set[str]:
    """Return the names of the tests in a file, without importing it."""
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_silent_error_of_the_reference_has_one_place() -> None:
    numbers = [number for number, texts in entries().items() for _ in texts] + elsewhere()
    assert sorted(numbers) == list(SILENT_ERRORS)


def test_every_entry_has_its_four_lines() -> None:
    for number, texts in entries().items():
        starts = re.findall(r"^- (\S[^:]*):", texts[0], flags=re.M)
        assert starts == ["Reference", "maisi", "`--compat reference`", "Proof"], number
        assert "::test_" in texts[0].partition("- Proof:")[2], number


def test_the_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", DIFFERENCES)
    assert len(named) == DIFFERENCES.count("::")  # none is written in another way
    assert [f"{file}::{name}" for file, name in named if name not in defined_in(file)] == []


def test_the_flags_that_are_named_exist() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", DIFFERENCES)) - {"--random-seed"}  # of the reference
    assert len(named) > 8
    assert named - options() == set()


# --- quality.md -----------------------------------------------------------------------------------


def test_every_check_has_its_place_in_the_page_on_quality() -> None:
    checks, _, others = QUALITY.partition("## The checks")[2].partition("## What else")
    assert re.findall(r"^### (\S+)$", checks, flags=re.M) == sorted(plugins().registry("checks").names())
    assert re.findall(r"^### (\S+)$", others, flags=re.M) == ["readable", "memorisation"]
    for name, text in re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", checks, flags=re.M | re.S):
        assert "What to do: " in " ".join(text.split()), name
        assert (
            "Source: " in " ".join(text.split()) or "source |" in text or name in ("label-type", "organs-present", "seam", "hu-median")
        ), name


def test_the_page_on_quality_has_the_volumes_of_the_table() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \| ([\d.]+) to ([\d.]+) \| (.+) \|$", QUALITY, flags=re.M)
    assert [(name, float(low), float(high)) for name, low, high, _ in rows] == [
        (row["name"], row["low"], row["high"]) for row in ct_table()["volume"]
    ]


def test_the_page_on_quality_has_the_bounds_of_the_table() -> None:
    table, page = ct_table(), " ".join(QUALITY.split())
    for row in table["median"]:
        low, high = (f"{round(row[key], 1):g}" for key in ("low", "high"))
        assert f"{row['name']} {low} to {high}" in page
    seam = table["seam"]
    assert f"stand out by {seam['step_hu']:g} HU" in page
    assert f"{seam['energy']:g} times the second largest" in page
    assert f"held to {seam['tiles']:g}" in page
    assert f"more than {seam['step_mm']:g} mm apart; beyond {seam['most_mm']:g} mm" in page
    for row in table["piece"]:
        assert any(word in page for word in (row["name"], row["name"].split()[-1])), row["name"]
    assert {row["least"] for row in table["piece"]} == {0.95, 0.9}


def test_the_flags_on_the_page_on_quality_exist() -> None:
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", QUALITY)) - options() == set()


# --- samplers.md ----------------------------------------------------------------------------------


def test_the_table_of_samplers_is_that_of_the_program() -> None:
    """Every built-in sampler has a row with its family and how often it asks the network."""
    text = (ROOT / "docs" / "samplers.md").read_text("utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| .* \| ([^|]+) \| [^|]+ \|$", text, flags=re.M)
    registry = load("").registry("samplers")
    asked = {"n": lambda n: n, "2 n - 1": lambda n: 2 * n - 1}
    assert {name for name, *_ in rows} == set(registry.names())
    for name, family, count in rows:
        sampler = registry.get(name)
        assert family_of(sampler) == family
        assert [evaluations_of(sampler, n) for n in (1, 5)] == [asked[count](n) for n in (1, 5)], name
