"""`maisi models`: weights from a hub to this machine and on to another, with the exit codes, text and JSON of the contract."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from maisi_cli import catalog, cli, store
from maisi_cli.plugins import plugins

from .fakehub import COMMIT, FILES, LICENCE, MASKS, REPO, SIZES, FakeHub, checkpoints, isolated, model_text, publish
from .shell import Done

GET = "models pull tiny.toml --accept-license"
RESEARCH = LICENCE.replace("true", "false")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Run a hub with the files of `tiny.toml` and of `research.toml`, which does not allow commercial use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    with isolated(monkeypatch, tmp_path / "home") as server:
        pins = publish(server)
        (tmp_path / "tiny.toml").write_text(model_text(pins=pins))
        (tmp_path / "research.toml").write_text(model_text(pins=pins, licence=RESEARCH, name="research"))
        yield server


@pytest.fixture
def maisi(hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Done]:
    """Return a function that runs a command line beside the model files, without a terminal to ask anything of."""

    def run(line: str) -> Done:
        monkeypatch.setenv("HF_HUB_OFFLINE", "")  # the one before may have set it
        code = cli.run(shlex.split(line))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert "bug in maisi" not in captured.err
        return Done(code, captured.out, captured.err)

    return run


def installed(tmp_path: Path) -> list[str]:
    """Return the files below the folder of weights."""
    files = (tmp_path / "home").rglob("*")
    return sorted(path.name for path in files if path.is_file())


def examples() -> list[str]:
    """Return the examples of all commands of `models`, in an order in which they can run."""
    found: dict[str, list[str]] = {}
    for name, command in typer.main.get_command(cli.build()).commands["models"].commands.items():  # type: ignore[attr-defined]
        found[name] = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("maisi ")]
        assert 2 <= len(found[name]) <= 3, name
        assert all(line.startswith(f"maisi models {name}") for line in found[name]), name
    order = ("list", "show", "path", "pull", "verify", "export", "remove", "import")
    assert sorted(found) == sorted(order)
    return [line for name in order for line in found[name]]


def test_the_examples_of_the_help_run_one_after_the_other(maisi, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released models are the tiny one here, both with all its files."""
    models = plugins().registry("models")
    for name in ("rflow-ct", "rflow-mr"):
        (tmp_path / f"{name}.toml").write_text(model_text(name=name))
        monkeypatch.setitem(models._entries, name, dataclasses.replace(models.entry(name), target=tmp_path / f"{name}.toml"))
    catalog.models.cache_clear()
    try:
        for line in examples():
            if "--from" in line:
                for path, content in checkpoints().items():
                    (tmp_path / "downloads" / path).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / "downloads" / path).write_bytes(content)
            done = maisi(line.removeprefix("maisi "))
            assert done.code == 0, (line, done.err)
            assert done.out or line == "maisi models remove rflow-ct", line
            if "--json" in line:
                assert done.json["schema"].startswith("maisi.model"), line
    finally:
        monkeypatch.undo()
        catalog.models.cache_clear()


# --- pull ---------------------------------------------------------------------------------------


def test_pull_prints_the_paths_and_shows_the_licence(maisi, hub: FakeHub, tmp_path: Path) -> None:
    done = maisi(GET)
    assert done.code == 0, done.err
    assert [path.name for path in done.paths] == [*(Path(path).stem + ".safetensors" for path, _ in FILES.values()), Path(SIZES).name]
    assert all(path.is_file() for path in done.paths)
    assert done.err.startswith("tiny-hub: Test Licence (https://example.org/licence; commercial use allowed)\n")
    assert f"left out {MASKS}: add --mask-database for it" in done.err
    assert maisi("models path tiny.toml").out.splitlines()[:6] == done.out.splitlines()
    shown = maisi("models show tiny.toml --json").json
    assert (shown["installed"], [weight["installed"] for weight in shown["weights"]]) == (True, [True] * 6 + [False])
    asked = len(hub.asked)
    again = maisi(f"{GET} -q")
    assert (again.code, again.out, again.err) == (0, done.out, "")
    assert len(hub.asked) == asked


def test_pull_answers_in_json(maisi, hub: FakeHub) -> None:
    done = maisi(f"{GET} --mask-database --json").json
    assert done["schema"] == "maisi.models-pull/1"
    (one,) = done["models"]
    assert one["licence"] == {"name": "Test Licence", "url": "https://example.org/licence", "commercial": True}
    assert [row["part"] for row in one["files"]] == [*FILES, "data", "data"]
    for row in one["files"]:
        assert (row["status"], row["bytes"]) == ("fetched", Path(row["file"]).stat().st_size)
        assert row["sha256"] == store.hashes_of(Path(row["file"]))[0]
    again = maisi(f"{GET} --mask-database --json").json
    assert {row["status"] for row in again["models"][0]["files"]} == {"present"}


def test_the_weights_that_are_pulled_make_an_image(maisi, hub: FakeHub, tmp_path: Path) -> None:
    assert maisi(GET).code == 0
    line = "generate --model tiny.toml --mode image --size 32 --spacing 12 --seed 1 --on-qc-fail keep --offline --out made"
    done = maisi(line)
    assert done.code == 0, done.err
    (made,) = (tmp_path / "made").glob("*_record.json")
    text = made.read_text("utf-8")
    for part in ("vae", "unet"):
        file = tmp_path / "home" / "models" / REPO / COMMIT / FILES[part][0].replace(".pt", ".safetensors")
        origin = store.read_origin(file)
        assert origin is not None
        assert origin.sha256 in text


REFUSED = [
    ("models pull tiny.toml", 3, "is not accepted yet", "maisi models pull tiny.toml --accept-license"),
    ("models pull research.toml --accept-license --commercial", 3, "does not allow commercial use", "leave out --commercial"),
    (f"{GET} --offline", 3, "nothing is fetched offline", "maisi models import"),
    (f"{GET} --from nowhere", 2, "there is no folder nowhere", "give the folder"),
    ("models verify tiny.toml", 3, "is not installed", "maisi models pull tiny.toml"),
    ("models export tiny.toml", 3, "is not installed", "maisi models pull tiny.toml"),
    ("models import tiny.toml --accept-license", 2, "tiny.toml is not a whole bundle", "maisi models export"),
    ("models import tiny.tar", 2, "there is no bundle tiny.tar", "maisi models export"),
    ("models pull", 2, "missing argument", "maisi models pull --help"),
    ("models pull tiny.toml --accept-licence", 2, "no such option", "did you mean --accept-license"),
    ("models pull tiny.tom", 2, "no model named 'tiny.tom'", "maisi models list"),
    ("models pull nothing.toml", 2, "there is no model file nothing.toml", "maisi models list"),
]


@pytest.mark.parametrize(("line", "code", "says", "hint"), REFUSED)
def test_refusals_are_two_lines_and_ask_nothing(maisi, hub: FakeHub, tmp_path: Path, line: str, code: int, says: str, hint: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = maisi(f"{line} -q")
    assert (done.code, done.out) == (code, "")
    first, second = done.err.splitlines()
    assert first.startswith("error: ")
    assert says in first
    assert hint in second
    assert hub.asked == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("refuse", "says", "hint"),
    [
        ((401, "GatedRepo"), "(401): no token is set", "then set HF_TOKEN to a token of that account"),
        ((403, "GatedRepo"), "(403): no token is set", "accept the terms at http://127.0.0.1"),
        ((404, "RevisionNotFound"), "at that revision (404)", "look at http://127.0.0.1"),
        ((500, ""), "the hub answers 500", "try again later"),
    ],
)
def test_refusals_of_the_hub_have_exit_code_3(maisi, hub: FakeHub, tmp_path: Path, refuse: tuple[int, str], says: str, hint: str) -> None:
    hub.refuse = refuse
    done = maisi(f"{GET} -q")
    assert (done.code, done.out) == (3, "")
    first, second = done.err.splitlines()
    assert says in first
    assert hint in second
    assert not (tmp_path / "home").exists()


def test_an_interrupted_pull_is_repeated_by_the_same_command(maisi, hub: FakeHub, tmp_path: Path) -> None:
    hub.cut, hub.down = 20_500, 1
    done = maisi(GET)
    assert done.code == 3
    assert "run it again: it goes on after the" in done.err
    (part,) = installed(tmp_path)
    assert part.endswith(".part")
    assert maisi("models path tiny.toml --json").json["installed"] is False
    assert maisi(GET).code == 0
    assert not [name for name in installed(tmp_path) if name.endswith(".part")]


def test_a_damaged_file_is_not_installed(maisi, hub: FakeHub, tmp_path: Path) -> None:
    hub.swap[FILES["vae"][0]] = b"x" * len(hub.read(hub.files[REPO, FILES["vae"][0]]))
    done = maisi(GET)
    assert (done.code, done.out) == (3, "")
    assert "arrived damaged" in done.err
    assert not (tmp_path / "home").exists()


# --- verify, remove, export, import -----------------------------------------------------------------


def test_verify_answers_no_with_exit_code_1(maisi, hub: FakeHub, tmp_path: Path) -> None:
    assert maisi(GET).code == 0
    done = maisi("models verify tiny.toml")
    assert done.code == 0
    assert done.out.count("  ok ") == 6
    (file,) = (tmp_path / "home").rglob("autoencoder_v1.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    done = maisi("models verify tiny.toml")
    assert done.code == 1
    assert "not as it was installed: tiny-hub" in done.err
    found = maisi("models verify tiny.toml nano-ct --json")
    assert found.code == 1
    assert found.json["schema"] == "maisi.models-verify/1"
    assert [(row["name"], row["passed"]) for row in found.json["models"]] == [("tiny-hub", False), ("nano-ct", True)]
    statuses = {row["part"]: row["status"] for row in found.json["models"][0]["files"]}
    assert statuses == {**dict.fromkeys(FILES, "ok"), "vae": "changed", "data": "ok"}


def test_weights_go_to_another_machine_and_away(maisi, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert maisi(f"{GET} --mask-database").code == 0
    sent = maisi("models export tiny.toml --json").json
    assert (sent["schema"], sent["path"], len(sent["files"])) == ("maisi.models-export/1", "tiny-hub.tar", 7)
    assert sent["bytes"] == Path("tiny-hub.tar").stat().st_size
    taken = maisi("models export tiny.toml")
    assert (taken.code, "--force" in taken.err) == (2, True)
    names = installed(tmp_path)
    hub.asked.clear()
    gone = maisi("models remove tiny.toml --json").json["models"][0]
    assert (len(gone["removed"]), gone["kept"]) == (14, [])
    assert installed(tmp_path) == []
    assert "is not installed" in maisi("models remove tiny.toml").err
    refused = maisi("models import tiny-hub.tar")
    assert refused.code == 3
    assert refused.err.splitlines()[-1] == "  read it, then  maisi models import tiny-hub.tar --accept-license"
    got = maisi("models import tiny-hub.tar --accept-license --json").json
    assert (got["schema"], got["models"], len(got["files"]), got["present"]) == ("maisi.models-import/1", ["tiny-hub"], 7, [])
    assert installed(tmp_path) == names
    assert maisi("models verify tiny.toml").code == 0
    assert hub.asked == []


# --- offline ------------------------------------------------------------------------------------

OFFLINE = """
import socket, sys, json

def closed(*args, **kwargs):
    raise AssertionError("a socket was opened")

socket.socket.__init__ = closed
socket.create_connection = socket.getaddrinfo = closed
from maisi_cli import cli
codes = [cli.run(line.split()) for line in json.loads(sys.argv[1])]
hub = sys.modules.get("huggingface_hub.constants")
assert hub is None or hub.HF_HUB_OFFLINE
print(json.dumps(codes))
"""


def test_offline_opens_no_socket(maisi, hub: FakeHub, tmp_path: Path) -> None:
    assert maisi(GET).code == 0
    lines = {
        "models pull tiny.toml --offline": 0,
        "models pull tiny.toml --accept-license --mask-database --offline": 3,
        "models verify tiny.toml": 0,
        "models export tiny.toml": 0,
        "models remove tiny.toml": 0,
        "models pull tiny.toml --accept-license --offline": 3,
        "models import tiny-hub.tar --accept-license": 0,
        "generate --model tiny.toml --mode image --size 32 --spacing 12 --on-qc-fail keep --offline --out made": 0,
        "models pull rflow-ct --accept-license --offline": 3,
    }
    env = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MAISI_HOME": str(tmp_path / "home"), "MAISI_LOAD_PLUGINS": "",
        "PYTHONPATH": str(Path(cli.__file__).parents[2]), "HF_ENDPOINT": hub.address,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }  # fmt: skip
    script = [sys.executable, "-W", "ignore", "-c", OFFLINE, json.dumps(list(lines))]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == list(lines.values()), done.stderr
