"""The help of every command: it is there, it speaks of options that exist, and its examples run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import typer
from maisi_cli import catalog, cli, presets
from maisi_cli.cli import output
from maisi_cli.phantom import body, render
from maisi_cli.plugins import plugins
from maisi_cli.presets import preset
from maisi_cli.testing import TINY, tiny_model
from maisi_cli.train.data import encode, make_phantoms
from maisi_cli.volumes import write_image, write_mask

RUN_ELSEWHERE = ("presets", "labels", "models", "plugins", "info", "doctor", "recommend-spacing", "gpu-plan", "report")
"""Commands whose examples are run by test_cli_browse.py, test_cli_models.py, test_cli_hardware.py and test_report.py."""
LARGE = ("train mask-vae", "train mask-dm")
"""Commands whose networks are large: test_train_masks.py runs them with small ones."""


def commands() -> dict[str, Any]:
    """Return every command that does something, by its words: `presets list`."""
    found: dict[str, Any] = {}

    def walk(path: str, command: Any) -> None:
        below = getattr(command, "commands", None)
        if below is None:
            found[path] = command
        for name, each in (below or {}).items():
            walk(f"{path} {name}".strip(), each)

    walk("", typer.main.get_command(cli.build()))
    return found


def groups() -> list[str]:
    return ["", *dict.fromkeys(path.split()[0] for path in commands() if " " in path)]


COMMANDS = commands()


def examples(path: str) -> list[str]:
    return [line.strip() for line in (COMMANDS[path].epilog or "").splitlines() if line.strip().startswith("maisi ")]


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    presets.read.cache_clear()


# --- what it says ---------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("path", [*groups(), *COMMANDS])
def test_every_command_has_help_on_stdout(path: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*path.split(), flag]) == 0
    text = capsys.readouterr()
    assert text.err == ""
    assert text.out.startswith(f"Usage: maisi {path}".rstrip())
    assert "\x1b" not in text.out
    for line in examples(path) if path in COMMANDS else []:
        assert line in text.out  # whole, on one line, to be copied


@pytest.mark.parametrize("path", COMMANDS)
def test_a_help_ends_with_two_or_three_examples_of_its_command(path: str) -> None:
    assert 2 <= len(examples(path)) <= 3
    assert all(line.split()[1 : 1 + len(path.split())] == path.split() for line in examples(path))
    assert COMMANDS[path].help.strip().endswith(".")


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_is_explained_and_every_command_has_the_common_ones(path: str) -> None:
    flags: set[str] = set()
    for each in COMMANDS[path].params:
        flags.update(each.opts)
        assert each.help, (path, each.name)
        if not getattr(each, "is_flag", False):
            assert each.metavar, (path, each.name)
    assert {"--json", "--quiet", "-q", "--verbose", "-v"} <= flags


def test_help_names_only_commands_and_options_that_exist() -> None:
    seen = set()
    for path, command in COMMANDS.items():
        text = " ".join([command.help, *(each.help for each in command.params)])
        for named in re.findall(r"  maisi ([a-z-]+(?: [a-z-]+)?)", text):  # see  maisi presets list.
            assert named in COMMANDS, (path, named)
            seen.add(named)
        options = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)} | {"--help"}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= options, path
    assert {"presets list", "plugins list"} <= seen


@pytest.mark.parametrize("path", groups())
def test_a_group_alone_shows_its_help_and_is_wrong_use(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(path.split()) == 2
    text = capsys.readouterr()
    assert text.out == ""
    assert "Usage: maisi" in text.err


@pytest.mark.parametrize("path", ["generate", "train vae", "gpu-plan"])
def test_help_on_a_terminal_keeps_the_defaults(path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "on_terminal", lambda *_: True)
    assert cli.run([*path.split(), "--help"]) == 0
    drawn = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    defaults = {text for each in COMMANDS[path].params for text in re.findall(r"\[default: [^\]]+\]", each.help)}
    assert defaults
    for text in defaults:
        assert text in drawn
    assert "\\[" not in drawn


# --- the examples run -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all files that examples name, made once."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny_model(folder / "nano")
    (folder / "nano" / "tiny.toml").write_text(TINY.replace('name = "tiny"', 'name = "nano-ct"'))
    make_phantoms(folder / "phantoms", 3, size=32, workers=1)
    make_phantoms(folder / "real", 5, size=32, workers=1)
    encode(folder / "phantoms", folder / "nano" / "vae.safetensors", out=folder / "latents", model=str(folder / "nano" / "tiny.toml"))
    write_embeddings(folder / "embeddings", folder / "latents")
    for run, part in (("vae", "vae"), ("dm", "unet")):
        (folder / "runs" / run).mkdir(parents=True)
        shutil.copy(folder / "nano" / f"{part}.safetensors", folder / "runs" / run / f"{part}.safetensors")
    (folder / "maisi-presets").mkdir()
    for each in presets.presets("train"):  # bf16 on a processor is not exact on volumes as small as these
        text = each.path.read_text()
        assert text.count('precision = "bf16"') <= 1
        (folder / "maisi-presets" / each.path.name).write_text(text.replace('precision = "bf16"', 'precision = "no"'))
    mask = body(preset("abdomen", "region").geometry.resized((48, 48, 48)), 1, regions=("abdomen",))
    write_mask(mask, folder / "run" / "a_label.nii.gz")
    write_image(render(mask, 1), folder / "run" / "a_image.nii.gz")
    return folder


def write_embeddings(folder: Path, latents: Path) -> None:
    """Write latents as the reference lays embeddings out."""
    folder.mkdir()
    rows = json.loads((latents / "latents.json").read_text())["training"]
    for row in rows:
        array = np.moveaxis(np.load(latents / row["latent"]), 0, -1).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.diag([*row["spacing"], 1])), folder / f"{row['id']}_emb.nii.gz")
    listed = [{"image": f"{row['id']}_emb.nii.gz", "spacing": row["spacing"], "modality": "ct"} for row in rows]
    (folder / "list.json").write_text(json.dumps({"training": listed}))


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a copy of the prepared folder, where `nano-ct` is the tiny model, whose images no check would pass."""
    models = plugins().registry("models")
    entry = dataclasses.replace(models.entry("nano-ct"), target=tmp_path / "work" / "nano" / "tiny.toml")
    monkeypatch.setitem(models._entries, "nano-ct", entry)
    monkeypatch.setenv("MAISI_ON_QC_FAIL", "keep")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # no processes for two phantoms
    shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def pretend_installed(name: str) -> None:
    """Put empty files where the weights of a released model belong; enough for a plan."""
    spec = catalog.model(name)
    for weight in spec.weights:
        spec.weight_path(weight).parent.mkdir(parents=True, exist_ok=True)
        spec.weight_path(weight).touch()


TELLING = {"--dry-run", "-n", "--eval-only"}
"""Options with which a command prints what it found, not the files that it made."""


@pytest.mark.parametrize("path", [path for path in COMMANDS if path.split()[0] not in RUN_ELSEWHERE and path not in LARGE])
def test_the_examples_of_the_help_run(path: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for made in re.findall(r"--out (\S+)", "\n".join(examples(path))):  # what is there is the result of this very command
        shutil.rmtree(folder / made, ignore_errors=True)
    for line in examples(path):
        words = shlex.split(line)[1:]
        for name in ("rflow-ct", "ddpm-ct"):
            if name in words:
                pretend_installed(name)
        code = cli.run(words)
        text = capsys.readouterr()
        assert code == 0, (line, text.err)
        assert text.out
        if "--json" in words:
            assert all(json.loads(each)["schema"].startswith("maisi.") for each in text.out.splitlines())
        elif (
            path.split()[0] in ("train", "data", "generate")
            and path != "data check"
            and not {"--dry-run", "-n", "--eval-only"} & set(words)
        ):
            assert all(Path(each).is_file() for each in text.out.splitlines())


# --- start-up -------------------------------------------------------------------------------


def test_looking_around_loads_no_framework(tmp_path: Path) -> None:
    script = """
import sys
from maisi_cli import cli
for line, code in (("--help", 0), ("generate --help", 0), ("train --help", 0), ("presets list", 0), ("models list", 0), ("labels list", 0),
                   ("generate --model rflow-ct --dry-run", 3), ("generate --preset chset", 2), ("qc missing", 2)):
    found = cli.run(line.split())
    assert found == code, (line, found)
    heavy = {"torch", "monai", "scipy", "rich"} & set(sys.modules)
    assert not heavy, (line, heavy)
    if line != "qc missing":
        assert not {"numpy", "nibabel"} & set(sys.modules), line
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MAISI_LOAD_PLUGINS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
