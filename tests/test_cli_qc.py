"""`maisi qc`: what is paired with what, what a lone label map is held to, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from maisi_cli import quality
from maisi_cli.geometry import Geometry
from maisi_cli.plugins import plugins
from maisi_cli.volumes import Mask, Volume, write_image, write_mask

from .shell import Done, qc_of

GRID = Geometry(size=(12, 12, 12), spacing=(17, 17, 17))
LABELS = np.full(GRID.size, 200, np.uint8)
LABELS[3:9, 3:9, 3:9] = 1
HU = np.where(LABELS == 1, 60, 20).astype(np.float32)
HU[0] = -1000
LABELS_ALONE = {"labels-known", "label-type", "components", "organ-volumes"}
LONE = "no image beside it, so only its labels were checked"


@pytest.fixture
def maisi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    """Return a function that runs `maisi qc` in a folder `run` beside which lies nothing else."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return qc_of(capsys)


def image(name: str, array: np.ndarray = HU) -> None:
    write_image(Volume(array=array, geometry=GRID), name)


def label(name: str, array: np.ndarray = LABELS) -> None:
    write_mask(Mask(array=array, geometry=GRID), name)


def checks(done: Done) -> list[str]:
    (found,) = done.json["cases"]
    return [finding["check"] for finding in found["findings"]]


def test_a_lone_label_map_is_checked_for_its_labels_and_that_is_said(maisi: Callable[[str], Done]) -> None:
    label("a_label.nii.gz")
    for path in ("a_label.nii.gz", "."):
        done = maisi(path)
        assert (done.code, done.out) == (0, "pass  a\n")
        assert f"a: {LONE}" in done.err
        told = maisi(f"{path} --json --anatomy liver")
        assert set(checks(told)) == {*LABELS_ALONE, "organs-present"}
        assert LONE in told.err
    done = maisi("a_label.nii.gz --anatomy liver,spleen")
    assert (done.code, done.out) == (1, "FAIL  a\n      spleen was asked for and is not in the mask\n")


@pytest.mark.parametrize(("array", "says"), [(LABELS + 10, "unknown label ids: 210"), (LABELS * 0, "the label map holds no label")])
def test_a_lone_label_map_can_fail(maisi: Callable[[str], Done], array: np.ndarray, says: str) -> None:
    label("a_label.nii.gz", array)
    done = maisi("a_label.nii.gz")
    assert (done.code, done.out.splitlines()) == (1, ["FAIL  a", f"      {says}"])


def test_a_label_map_of_any_name_is_known_for_what_it_is(maisi: Callable[[str], Done]) -> None:
    """By its header where that says so, else because no CT holds whole numbers of 0..255 alone."""
    label("seg.nii.gz")
    image("plain.nii.gz", LABELS.astype(np.int16))
    for name in ("seg", "plain"):
        done = maisi(f"{name}.nii.gz")
        assert (done.code, done.out) == (0, f"pass  {name}\n")
        assert f"{name}: {LONE}" in done.err
        assert set(checks(maisi(f"{name}.nii.gz --json"))) == LABELS_ALONE
    image("scan.nii.gz")
    image("named_image.nii.gz", LABELS.astype(np.int16))  # its name says that it is an image
    for path in ("scan.nii.gz", "named_image.nii.gz", "plain.nii.gz --modality mri-t1"):
        assert "no label map beside it" in maisi(path).err
        assert "labels-known" not in checks(maisi(f"{path} --json"))


def test_images_and_label_maps_are_paired_by_name(maisi: Callable[[str], Done]) -> None:
    image("a_image.nii.gz")
    label("a_label.nii.gz")
    image("b_image.nii.gz")
    label("c_label.nii.gz")
    image("d.nii.gz")
    label("d_label.nii.gz")
    done = maisi("a_image.nii.gz a_label.nii.gz b_image.nii.gz c_label.nii.gz d_label.nii.gz d.nii.gz --json")
    pairs = {found["id"]: {each["check"] for each in found["findings"]} for found in done.json["cases"]}
    assert list(pairs) == ["a", "b", "c", "d"]
    both = {"hu-median", "labels-known", "intensity", "clipped"}
    assert both <= pairs["a"]
    assert both <= pairs["d"]
    assert pairs["b"] == {"intensity", "clipped"}
    assert pairs["c"] == LABELS_ALONE
    assert [found["id"] for found in maisi(". --json").json["cases"]] == ["a", "b", "c", "d"]


def test_what_no_check_looked_at_did_not_pass(maisi: Callable[[str], Done], monkeypatch: pytest.MonkeyPatch) -> None:
    registry = plugins().registry("checks")
    monkeypatch.setattr(registry, "_entries", {"hu-median": registry.entry("hu-median")})
    label("a_label.nii.gz")
    done = maisi("a_label.nii.gz")
    assert (done.code, done.out) == (1, "none  a\n")
    assert "no check applies to it" in done.err
    assert "0 of 1 passed" in done.err
    told = maisi("a_label.nii.gz --json")
    assert (told.code, told.json["passed"], told.json["cases"][0]["passed"]) == (1, False, False)


def test_checks_that_need_an_image_are_left_out_without_one() -> None:
    def own(image: Volume | None, mask: Mask | None, context: quality.Context) -> list[quality.Finding]:
        assert image is not None
        return []

    mask = Mask(array=LABELS, geometry=GRID)
    assert quality.check(None, mask, checks=[own]).findings == ()
    assert {finding.check for finding in quality.check(None, mask).findings} == LABELS_ALONE - {"label-type"}  # of a file
