"""The run record: what it holds, that it comes back, and that nothing else is taken for one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from maisi_cli import __version__, record
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.quality import Finding, Verdict

SETTINGS = {
    "model": "auto",
    "seed": 7,
    "size": (128, 128, 64),
    "anatomy": ["liver"],
    "tumor": None,
    "cfg_tumor": 1.5,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def make(folder: Path, **changes) -> dict:
    """Return the record of a sample whose image is in `folder`."""
    image = folder / "case7_image.nii.gz"
    image.write_bytes(b"voxels")
    finding = Finding(
        check="hu-median",
        label="liver",
        value=np.float32(55.5),
        low=-21.6,
        high=162.0,
        passed=True,
        text="fine",
    )
    given = {
        "id": "case7",
        "index": 6,
        "seed": 7,
        "attempt": 1,
        "derived_seed": 123456789,
        "settings": SETTINGS,
        "origins": dict.fromkeys(SETTINGS, "command line"),
        "model": {
            "name": "nano-ct",
            "licence": "Apache-2.0",
            "weights": [{"part": "vae", "file": Path("vae.safetensors"), "sha256": "ab" * 32}],
        },
        "geometry": Geometry.parse(size="128x128x64", spacing="3x3x4"),
        "modality": "ct",
        "mask": {"source": "phantom", "seed": 5},
        "verdict": Verdict(findings=(finding,)),
        "outputs": {"image": image},
        "seconds": {"denoise": 1.23456},
        "notes": ["the plan fits"],
    }
    return record.build(**{**given, **changes})


def test_a_record_comes_back_as_it_was(tmp_path):
    made = make(tmp_path)
    path = record.write(tmp_path / "case7_record.json", made)
    assert record.read(path) == json.loads(json.dumps(made))
    assert made["schema"] == "maisi.record/1"
    assert made["synthetic"] is True
    assert made["tool"] == {"name": "maisi", "version": __version__}
    assert made["settings"]["size"] == {"value": [128, 128, 64], "origin": "command line"}
    assert made["geometry"]["spacing"] == [3.0, 3.0, 4.0]
    assert made["qc"]["passed"] is True
    assert made["qc"]["findings"][0]["value"] == 55.5
    assert (made["index"], made["seed"], made["attempt"], made["derived_seed"]) == (6, 7, 1, 123456789)
    assert made["timing"]["seconds"] == {"denoise": 1.235}
    assert set(made["environment"]["packages"]) >= {"numpy", "torch", "monai"}


def test_outputs_are_hashed_and_changes_are_seen(tmp_path):
    made = make(tmp_path)
    # printf voxels | sha256sum
    assert made["outputs"]["image"] == {
        "file": "case7_image.nii.gz",
        "sha256": "38d11342e7802dc460247dcec95b945557f05a1bcc74a4db37f42d7e2b8b43de",
        "bytes": 6,
    }
    assert record.changed_outputs(made, tmp_path) == []
    (tmp_path / "case7_image.nii.gz").write_bytes(b"voxelz")
    assert record.changed_outputs(made, tmp_path) == ["case7_image.nii.gz"]
    (tmp_path / "case7_image.nii.gz").unlink()
    assert record.changed_outputs(made, tmp_path) == ["case7_image.nii.gz"]


def test_a_folder_counts_as_one_output(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "2.dcm").write_bytes(b"voxels")
    (folder / "1.dcm").write_bytes(b"")
    # (cd series; sha256sum 1.dcm 2.dcm) | sha256sum
    wanted = "269913277ce58236ea8c0753f6f5cd297354d4ba69844398eebd59f0196e9962"
    made = make(tmp_path, outputs={"series": folder})
    assert made["outputs"]["series"] == {"file": "series", "sha256": wanted, "bytes": 6}
    assert record.changed_outputs(made, tmp_path) == []
    (folder / "3.dcm").write_bytes(b"")
    assert record.changed_outputs(made, tmp_path) == ["series"]
    shutil.rmtree(folder)
    assert record.changed_outputs(made, tmp_path) == ["series"]


def test_only_the_timing_differs_between_two_runs(tmp_path):
    one, other = make(tmp_path), make(tmp_path, seconds={"denoise": 9.0}, peak_gib=3.0)
    assert one.pop("timing") != other.pop("timing")
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    for path, made in zip(paths, (one, other), strict=True):
        record.write(path, made)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    keys = list(json.loads(paths[0].read_text()))
    assert keys == sorted(keys)


def test_settings_repeat_the_run_with_the_model_that_ran(tmp_path):
    back = record.settings_of(record.read(record.write(tmp_path / "r.json", make(tmp_path))))
    assert back == {**SETTINGS, "model": "nano-ct", "size": [128, 128, 64]}
    named = make(tmp_path, settings={"model": "mine.toml"}, origins={"model": "command line"})
    assert record.settings_of(named) == {"model": "mine.toml"}


def test_every_setting_needs_an_origin(tmp_path):
    with pytest.raises(ValueError, match="without an origin: seed"):
        make(tmp_path, settings={"seed": 1}, origins={})


def test_a_record_is_not_overwritten(tmp_path):
    made = make(tmp_path)
    path = record.write(tmp_path / "r.json", made)
    with pytest.raises(UsageError, match="--force"):
        record.write(path, made)
    record.write(path, made, force=True)
    with pytest.raises(ValueError, match="not a record"):
        record.write(tmp_path / "x.json", {"schema": "maisi.plan/1"})


@pytest.mark.parametrize(
    ("content", "problem", "fix"),
    [
        (None, "does not exist", "record.json"),
        ("{", "not JSON", "record.json"),
        ("[1]", "no schema", "record.json"),
        ('{"schema": "maisi.plan/1"}', "maisi.plan/1", "record.json"),
        ('{"schema": "maisi.record/2"}', "maisi.record/2", "update maisi"),
        ('{"schema": "maisi.record/1", "seed": 1}', "lacks settings, model, outputs", "record.json"),
    ],
)
def test_other_files_are_refused(content, problem, fix, tmp_path):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=problem) as caught:
        record.read(path)
    assert fix in (caught.value.hint or "")


@given(value=JSON)
def test_plain_leaves_json_alone(value):
    assert record.plain(value) == value


def test_plain_knows_paths_numbers_and_dataclasses():
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Point:
        x: float
        where: Path

    assert record.plain(Point(x=np.float32(0.5), where=Path("a/b"))) == {"x": 0.5, "where": "a/b"}
    assert record.plain({"n": np.int64(3), 4: (1, {2, 1})}) == {"n": 3, "4": [1, [1, 2]]}
    assert record.plain([float("nan"), float("inf"), 1.0]) == [None, None, 1.0]
    with pytest.raises(TypeError, match="object"):
        record.plain(object())


def test_the_room_imports_nothing_heavy():
    heavy = "numpy", "torch", "monai", "nibabel"
    code = f"import sys, maisi_cli.record; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
