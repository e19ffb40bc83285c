"""`labels.json`: names that agree with the label maps beside it, whoever writes it, and however often."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from maisi_cli import anatomy, cli, labelfile
from maisi_cli.anatomy import BODY, Label, maisi
from maisi_cli.errors import UsageError
from maisi_cli.labelfile import document, read_labels, require_labels, write_labels
from maisi_cli.testing import tiny_model

from .shell import Done

VOLUME = "--preset abdomen --size 32x32x32 --spacing 8 --seed 5 --no-preview --out run --name s"
MASK = f"generate {VOLUME} --mode mask"
RENUMBERED = f"{MASK} --compat reference --anatomy spleen,liver"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    """Return a function that runs `maisi` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))

    def call(line: str) -> Done:
        code = cli.run(shlex.split(line))
        text = capsys.readouterr()
        return Done(code, text.out, text.err)

    return call


def voxels(path: str | Path) -> Any:
    return np.asarray(nibabel.load(path).dataobj)


def names(folder: str = "run") -> dict[int, str]:
    return {row["id"]: row["name"] for row in json.loads(Path(folder, "labels.json").read_text())["labels"]}


def test_a_run_says_what_its_labels_mean_as_labels_list_does(run):
    assert run(MASK).code == 0
    assert json.loads(Path("run/labels.json").read_text()) == run("labels list --json").json
    assert set(np.unique(voxels("run/s_label.nii.gz"))) - {0} <= names().keys()
    assert "labels" not in json.loads(Path("run/s_record.json").read_text())["outputs"]
    assert Path("run/labels.json").read_text().count("\n") == len(maisi().labels) + 2  # one line for each label


def test_a_run_without_label_maps_has_no_names(run, tmp_path):
    model = tiny_model(tmp_path / "model")
    assert run(f"generate {VOLUME} --mode image --model {model} --on-qc-fail keep").code == 0
    assert Path("run/s_image.nii.gz").is_file()
    assert not Path("run/labels.json").exists()


def test_renumbered_labels_are_named_by_the_numbers_in_the_files(run):
    assert run(MASK.replace("--out run", "--out full") + " --anatomy spleen,liver").code == 0
    assert run(RENUMBERED).code == 0
    whole, few = voxels("full/s_label.nii.gz"), voxels("run/s_label.nii.gz")
    assert names() == {1: "spleen", 2: "liver"}
    found = json.loads(Path("run/labels.json").read_text())
    assert found["vocabulary"] == "reference"
    for row in found["labels"]:
        assert (few == row["id"]).any()
        np.testing.assert_array_equal(few == row["id"], whole == row["maisi_id"])
        assert row["color"] == list(maisi().get(row["maisi_id"]).color)
    shown = run("info run/s_label.nii.gz --json").json
    assert {row["id"]: row["name"] for row in shown["labels"]} == names()
    assert shown["vocabulary"] == "reference"
    text = run("info run/s_label.nii.gz").out
    assert "spleen" in text
    assert "dummy1" not in text


def test_info_names_a_label_map_from_elsewhere_by_maisis_ids(run):
    run(RENUMBERED)
    Path("run/other.nii.gz").write_bytes(Path("run/s_label.nii.gz").read_bytes())  # no record speaks of it
    shown = run("info run/other.nii.gz --json").json
    assert {row["id"]: row["name"] for row in shown["labels"]} == {1: "liver", 2: "dummy1"}


def test_hosts_of_renumbered_labels_are_renumbered_too():
    tumor, liver = maisi().id("hepatic tumor"), maisi().id("liver")
    rows = document((tumor, liver))["labels"]
    assert [(row["id"], row["maisi_id"], row["host"], row["raw"]) for row in rows] == [(1, tumor, 2, None), (2, liver, None, None)]
    assert document((tumor,))["labels"][0]["host"] is None


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "not JSON",
        '{"labels": {"liver": 1}}',
        '{"schema": "maisi.labels/1", "labels": [1]}',
        '{"schema": "maisi.labels/1", "vocabulary": "maisi", "labels": [{"id": [1], "name": "liver"}]}',
    ],
)
def test_a_file_of_another_program_is_refused_before_the_work(text, run):
    Path("run").mkdir()
    Path("run/labels.json").write_text(text)
    done = run(f"{MASK} --force")
    assert done.code == 2
    assert "run/labels.json is not one that maisi wrote" in done.err
    assert [path.name for path in Path("run").iterdir()] == ["labels.json"]
    assert Path("run/labels.json").read_text() == text
    assert run("data phantom --count 1 --size 32 --out run").code == 2
    assert [path.name for path in Path("run").iterdir()] == ["labels.json"]


def test_label_maps_of_two_numberings_do_not_share_a_folder(run):
    assert run(RENUMBERED).code == 0
    before = Path("run/labels.json").read_bytes()
    for line, says in (
        (MASK.replace("--name s", "--name t"), "names labels of reference"),
        (RENUMBERED.replace("--name s", "--name t").replace("spleen,liver", "liver,spleen"), "1 is spleen, and in this run it is liver"),
    ):
        done = run(line)
        assert (done.code, says in done.err, "choose another --out" in done.err) == (2, True, True)
    assert Path("run/labels.json").read_bytes() == before
    assert not list(Path("run").glob("t*"))
    assert run(RENUMBERED.replace("--name s", "--name t").replace("spleen,liver", "spleen,liver,aorta")).code == 0
    assert names() == {1: "spleen", 2: "liver", 3: "aorta"}


def test_a_manifest_of_two_numberings_is_refused(run):
    Path("m.csv").write_text("id,anatomy\na,liver\nb,spleen\n")
    line = "generate --preset abdomen --size 32x32x32 --spacing 8 --seed 5 --no-preview --out run --mode mask --manifest m.csv"
    done = run(f"{line} --compat reference")
    assert done.code == 2
    assert "1 liver in some label maps and 1 spleen in others" in done.err
    assert not Path("run").exists()
    assert run(line).code == 0


def test_what_is_there_and_the_same_is_left_alone(tmp_path):
    path = write_labels(tmp_path)
    before = path.stat()
    assert write_labels(tmp_path) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_labels_of_a_plugin_are_added_and_stay(tmp_path, monkeypatch):
    own = write_labels(tmp_path).read_bytes()
    more = anatomy.Vocabulary(name="maisi", labels=(*maisi().labels, Label(id=140, name="pancreatic cyst", group="cyst")), aliases={})
    with monkeypatch.context() as patch:
        patch.setattr(labelfile, "maisi", lambda: more)
        added = write_labels(tmp_path).read_bytes()
        assert read_labels(tmp_path)["labels"] == sorted(document()["labels"], key=lambda row: row["id"])
    assert own != added
    write_labels(tmp_path)  # a run without the plugin
    assert (tmp_path / "labels.json").read_bytes() == added
    clash = anatomy.Vocabulary(name="maisi", labels=(Label(id=140, name="tooth", group="bone"),), aliases={})
    monkeypatch.setattr(labelfile, "maisi", lambda: clash)
    with pytest.raises(UsageError, match="140 is pancreatic cyst, and in this run it is tooth"):
        require_labels(tmp_path)


def test_many_writers_at_once_leave_one_whole_file(tmp_path):
    def work(_: int) -> bool:
        (tmp_path / "labels.json").unlink(missing_ok=True)
        write_labels(tmp_path)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
    assert read_labels(tmp_path) == document()
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]


def test_phantoms_for_training_come_with_names(run):
    assert run("data phantom --count 1 --size 32 --out phantoms").code == 0
    assert names("phantoms") == {label.id: label.name for label in maisi().labels}


def test_a_mapped_file_beside_names_of_another_vocabulary_is_warned_of(run):
    run(MASK)
    before = Path("run/labels.json").read_bytes()
    done = run("labels map run/s_label.nii.gz run/ts.nii.gz --from maisi --to totalsegmentator")
    assert done.code == 0
    assert "run/labels.json names labels of maisi, not those of ts.nii.gz (totalsegmentator)" in done.err
    assert Path("run/labels.json").read_bytes() == before
    assert "labels.json" not in run("labels map run/ts.nii.gz run/back.nii.gz --from totalsegmentator").err


def test_a_generated_label_goes_straight_back_in(run):
    """With the bundled networks: the label of the second run is that of the first, voxel by voxel, and on its grid."""
    fast = "--steps 2 --on-qc-fail keep --no-preview --model nano-ct"
    assert run(f"generate --preset abdomen --size 48x32x32 --spacing 6x8x8 --seed 5 --out one --name s {fast}").code == 0
    before = Path("one/s_label.nii.gz").read_bytes()
    assert run("labels check one/s_label.nii.gz").code == 0
    done = run(f"generate --mask one/s_label.nii.gz --out two --name s --seed 6 {fast}")
    assert done.code == 0, done.err
    assert Path("one/s_label.nii.gz").read_bytes() == before
    first, second = (nibabel.load(f"{folder}/s_label.nii.gz") for folder in ("one", "two"))
    assert first.get_data_dtype() == second.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    np.testing.assert_array_equal(first.affine, second.affine)
    np.testing.assert_array_equal(first.affine, nibabel.load("two/s_image.nii.gz").affine)
    assert BODY in np.asarray(first.dataobj)
    assert names("one") == names("two")
    assert (voxels("one/s_image.nii.gz") != voxels("two/s_image.nii.gz")).any()
