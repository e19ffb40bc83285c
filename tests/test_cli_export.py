"""`maisi export-trt`, and `maisi generate` with engines."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from maisi_cli import cli, engines
from maisi_cli.engines import making
from maisi_cli.testing import tiny_model

from .shell import Done

VOLUME = "--size 32x32x32 --preset chest-abdomen"
HAS = {name: importlib.util.find_spec(name) is not None for name in ("openvino", "torch_tensorrt")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def maisi(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("MAISI_MODEL", str(model))
    monkeypatch.setenv("MAISI_ON_QC_FAIL", "keep")
    monkeypatch.setenv("MAISI_ALLOW_OOD", "true")

    def run(line: str) -> Done:
        code = cli.run(shlex.split(line))
        text = capsys.readouterr()
        assert "Traceback" not in text.err
        assert "bug in maisi" not in text.err
        return Done(code, text.out, text.err)

    return run


@pytest.fixture
def openvino() -> None:
    if not HAS["openvino"]:
        if os.environ.get("CI") == "true":
            pytest.fail("needs openvino, which the extra `test` brings")
        pytest.skip("needs openvino")


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("--backend tensor", 2, "there is no backend named 'tensor'"),
        ("--parts unet,controllnet", 2, "did you mean 'controlnet'"),
        ("--parts ,", 2, "--parts names nothing"),
        ("--parts mask_unet --dry-run", 2, "has no mask_unet"),
        ("--list --clean", 2, "exclude each other"),
        ("--backend openvino --profile 32x32x32,32x32x32,64x64x64", 2, "one volume each"),
        ("--profile 32x32x32,64x64x64", 2, "not three volumes"),
        ("--profile 64x64x64,32x32x32,64x64x64", 2, "not three volumes"),
        ("--profile 32x32x32,32x32x32,64x64x64 --size 32x32x32", 2, "--size and --profile exclude each other"),
        ("--size 33x32x32", 2, "33"),
        ("--backend openvino --device cpu --dtype fp16", 2, "fp32 or bf16"),
    ],
)
def test_wrong_use_is_refused_in_a_line(line: str, code: int, text: str, maisi: Callable[[str], Done], tmp_path: Path) -> None:
    done = maisi(f"export-trt {line}")
    assert (done.code, done.out) == (code, "")
    assert text in done.err
    assert not (tmp_path / "home").exists()


@pytest.mark.skipif(HAS["torch_tensorrt"], reason="TensorRT is here")
@pytest.mark.parametrize(
    "line", [f"export-trt {VOLUME}", f"generate {VOLUME} --trt require --out run", f"generate {VOLUME} --engine trt -n"]
)
def test_without_tensorrt_the_answer_is_what_is_missing(line: str, maisi: Callable[[str], Done], tmp_path: Path) -> None:
    done = maisi(line)
    assert done.code == 3
    assert "error: TensorRT is not installed: there is no package torch_tensorrt" in done.err
    assert "pip install torch-tensorrt" in done.err
    assert not (tmp_path / "run").exists()


def test_without_openvino_the_answer_is_how_to_get_it(
    maisi: Callable[[str], Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    for line in (
        f"generate {VOLUME} --engine openvino --out run",
        f"generate {VOLUME} --engine openvino -n",
        f"export-trt {VOLUME} --backend openvino",
    ):
        done = maisi(line)
        assert done.code == 3
        assert "pip install openvino" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--engine openvino --trt prefer", "--engine torch --trt require", "--engine trt --trt off"])
def test_flags_that_contradict_one_another_are_refused(flags: str, maisi: Callable[[str], Done]) -> None:
    done = maisi(f"generate {VOLUME} {flags} --out run")
    assert done.code == 2
    assert "exclude each other" in done.err


def test_a_dry_run_shows_the_operators(maisi: Callable[[str], Done], tmp_path: Path) -> None:
    done = maisi(f"export-trt {VOLUME} --parts unet,decoder --dry-run --json")
    assert done.code == 0
    shown = json.loads(done.out)
    assert shown["schema"] == "maisi.engines-plan/1"
    assert [row["part"] for row in shown["parts"]] == ["unet", "decoder"]
    assert all(row["operators"]["aten.conv3d.default"] > 5 for row in shown["parts"])
    text = maisi(f"export-trt {VOLUME} --parts decoder -n")
    assert "aten.group_norm.default" in text.out
    assert not (tmp_path / "home").exists()


def test_engines_are_made_listed_used_and_removed(maisi: Callable[[str], Done], openvino: None, tmp_path: Path, model: Path) -> None:
    command = f"export-trt {VOLUME} --backend openvino --device cpu --dtype fp32 --json"
    done = maisi(command)
    assert done.code == 0, done.err
    rows = json.loads(done.out)["engines"]
    assert [row["key"]["part"] for row in rows] == ["unet", "controlnet"]
    assert all(max(row["errors"]) <= row["outcome"]["allowed"] and row["bytes"] > 0 for row in rows)
    assert json.loads(maisi("export-trt --list --json").out)["engines"] == sorted(rows, key=lambda row: row["folder"])
    assert "is there already" in maisi(command).err
    made = maisi(f"generate {VOLUME} --seed 5 --engine openvino --dtype fp32 --device cpu --out run --name a")
    assert made.code == 0, made.err
    assert "compile" not in made.err
    assert "the unet runs by OpenVINO (--engine openvino); relative error" in made.err
    ran = json.loads(Path("run/a_record.json").read_text())["environment"]["device"]["engines"]
    assert {part: entry["backend"] for part, entry in ran.items()} == {"unet": "openvino", "controlnet": "openvino", "decoder": "torch"}
    assert [ran[part]["engine"] for part in ("unet", "controlnet")] == [Path(row["folder"]).name for row in rows]
    assert maisi(f"generate {VOLUME} --seed 5 --dtype fp32 --device cpu --out run --name b").code == 0
    other = json.loads(Path("run/b_record.json").read_text())["environment"]["device"]["engines"]
    assert {entry["backend"] for entry in other.values()} == {"torch"}  # auto compiles no small networks
    left = maisi("export-trt --clean --json")  # the tiny model is none of those that are installed
    assert sorted(json.loads(left.out)["folders"]) == sorted(row["folder"] for row in rows)
    assert json.loads(maisi("export-trt --list --json").out)["engines"] == []


def test_an_engine_that_is_off_or_slow_is_removed_and_the_answer_is_no(
    maisi: Callable[[str], Done], openvino: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "timed", lambda *_: {"engine": 3.0, "torch": 1.0})
    command = f"export-trt {VOLUME} --backend openvino --device cpu --dtype fp32 --parts controlnet"
    done = maisi(f"{command} --check")
    assert done.code == 1
    assert "takes 3 s a call, PyTorch 1 s" in done.err
    assert list(engines.built()) == []
    compare = making.compare
    monkeypatch.setattr(making, "compare", lambda *pair: [0.5 for _ in compare(*pair)])
    done = maisi(command)
    assert done.code == 1
    assert "the controlnet by OpenVINO is off: relative error 0.5" in done.err
    assert list(engines.built()) == []
    done = maisi(f"generate {VOLUME} --seed 5 --engine openvino --dtype fp32 --device cpu --out run")
    assert done.code == 1
    assert "it was not kept" in done.err
    assert not [*Path("run").glob("*_image*")]


def test_a_check_measures_both_sides(maisi: Callable[[str], Done], openvino: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = making.timed
    seen: list[dict[str, float]] = []

    def fast(*order: Any) -> dict[str, float]:
        seen.append(timed(*order))
        return {**seen[-1], "engine": seen[-1]["torch"] / 2}

    monkeypatch.setattr(making, "timed", fast)
    done = maisi(f"export-trt {VOLUME} --backend openvino --device cpu --dtype fp32 --parts controlnet --check --json")
    assert done.code == 0
    for row, measured in zip(json.loads(done.out)["engines"], seen, strict=True):
        assert all(0 < each < 60 for each in measured.values())
        assert row["seconds"]["torch"] == measured["torch"]


@pytest.mark.skipif(HAS["torch_tensorrt"], reason="TensorRT is here")
def test_tensorrt_that_is_preferred_is_said_to_be_absent(maisi: Callable[[str], Done]) -> None:
    done = maisi(f"generate {VOLUME} --seed 5 --mode image --trt prefer --device cpu --out run --name a")
    assert done.code == 0, done.err
    assert "warning: TensorRT is not installed" in done.err
    ran = json.loads(Path("run/a_record.json").read_text())["environment"]["device"]["engines"]
    assert ran == {"unet": {"backend": "torch"}, "decoder": {"backend": "torch"}}
