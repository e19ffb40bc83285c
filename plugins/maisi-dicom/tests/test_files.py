"""Files appear complete or not at all, nothing of the user's is lost, UIDs are fresh, and formats fit one another."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import maisi_dicom
import nibabel
import numpy as np
import pydicom
import pytest
from maisi_cli import synthesis
from maisi_cli.cli import run
from maisi_cli.errors import CannotRun, Rejected, UsageError
from maisi_cli.plugins import load
from maisi_cli.testing import tiny_model
from maisi_cli.volumes import Mask, Sample, Volume
from maisi_dicom import formats, placing, structures
from maisi_dicom.formats import save_ct, save_dicom, save_rtstruct, save_seg
from maisi_dicom.identity import identify

ALL = {"dicom": save_dicom, "dicom-ct": save_ct, "dicom-seg": save_seg, "rtstruct": save_rtstruct}


def tiny(phantoms: Any, *, value: int = 0, id: str = "t") -> Sample:
    """Two organs in eight slices: enough where only files are looked at."""
    geometry = phantoms.grid((10, 9, 4), (2.0, 2.5, 3.0))
    labels = np.zeros(geometry.size, np.uint8)
    labels[2:5, 2:6, 1:3], labels[6:9, 3:7, 1:4] = 1, 3
    image = Volume(array=np.full(geometry.size, value, np.int16), geometry=geometry)
    return Sample(index=0, seed=0, id=id, image=image, mask=Mask(array=labels, geometry=geometry))


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("names", list(itertools.permutations(ALL, 2)), ids=" ".join)
def test_formats_combine_in_any_order(phantoms: Any, names: tuple[str, str], tmp_path: Path) -> None:
    sample, paths = tiny(phantoms), {}
    for name in names:
        paths.update(ALL[name](sample, tmp_path, force=False))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths.values()}
    uids = {str(pydicom.dcmread(path).SOPInstanceUID) for path in paths["series"].iterdir()}
    for kind in {"seg", "rtstruct"} & set(paths):
        file = pydicom.dcmread(paths[kind])
        named = {str(each.value) for each in file.iterall() if each.keyword == "ReferencedSOPInstanceUID"}
        assert named - {file.StudyInstanceUID} == uids if kind == "rtstruct" else named <= uids
        assert named


def test_uids_are_fresh(phantoms: Any, tmp_path: Path) -> None:
    sample = tiny(phantoms)
    here = identify(sample, tmp_path).uid("study")
    assert here == identify(tiny(phantoms), tmp_path).uid("study")
    assert here != identify(sample, tmp_path / "other").uid("study")
    assert here != identify(tiny(phantoms, value=1), tmp_path).uid("study")
    assert here != identify(tiny(phantoms, id="u"), tmp_path).uid("study")
    assert here.startswith("2.25.")
    assert here.is_valid
    code = "from maisi_dicom.identity import RUN; print(RUN)"
    drawn = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(drawn) == 2


def test_nothing_is_overwritten_without_force(phantoms: Any, tmp_path: Path) -> None:
    save_dicom(tiny(phantoms), tmp_path)
    before = everything(tmp_path)
    for name in ("dicom", "dicom-seg", "rtstruct"):
        with pytest.raises(UsageError, match="already exists"):
            ALL[name](tiny(phantoms, value=5), tmp_path)
    assert everything(tmp_path) == before
    save_dicom(tiny(phantoms, value=5), tmp_path, force=True)
    after = everything(tmp_path)
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())


def test_a_folder_with_other_things_is_never_replaced(phantoms: Any, tmp_path: Path) -> None:
    (tmp_path / "t_dicom").mkdir()
    (tmp_path / "t_dicom" / "thesis.tex").write_text("all of it")
    with pytest.raises(UsageError, match=r"holds thesis\.tex"):
        save_dicom(tiny(phantoms), tmp_path, force=True)
    assert everything(tmp_path) == {"t_dicom/thesis.tex": b"all of it"}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a bug")])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_all_as_it_was(
    phantoms: Any, failure: BaseException, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exists:
        save_dicom(tiny(phantoms), tmp_path)
    before = everything(tmp_path)

    def fail(*_: Any) -> None:
        raise failure

    expected = CannotRun if isinstance(failure, OSError) else type(failure)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "write_segmentation", fail)
        with pytest.raises(expected):
            save_dicom(tiny(phantoms, value=5), tmp_path, force=True)
    assert everything(tmp_path) == before

    rename = Path.rename

    def second_fails(path: Path, target: Path) -> Path:
        if path.name == "t_seg.dcm" and target.parent == tmp_path and not target.name.startswith("old") and calls:
            calls.pop()
            raise failure
        return rename(path, target)

    calls = ["once"]
    with monkeypatch.context() as patch:
        patch.setattr(placing.Path, "rename", second_fails)
        with pytest.raises(expected):
            save_dicom(tiny(phantoms, value=5), tmp_path, force=True)
    assert not calls
    assert everything(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["t_dicom", "t_seg.dcm"] if exists else [])


def test_what_cannot_be_written_says_so(phantoms: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotRun, match="cannot write"):
        save_dicom(tiny(phantoms), tmp_path / "file")
    image_alone = Sample(index=0, seed=0, id="i", image=tiny(phantoms).image, mask=None)
    mask_alone = Sample(index=0, seed=0, id="m", image=None, mask=tiny(phantoms).mask)
    for save, sample, words in (
        (save_seg, image_alone, "a mask"),
        (save_rtstruct, image_alone, "a mask"),
        (save_ct, mask_alone, "an image"),
    ):
        with pytest.raises(UsageError, match=f"needs samples with {words}"):
            save(sample, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- with maisi generate ------------------------------------------------------------------------------------


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin, whether it is installed or only a folder, and a home of the test's own."""
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.chdir(tmp_path)
    loaded = load("", extra={"dicom": maisi_dicom})
    for module in ("synthesis", "plugins"):
        monkeypatch.setattr(f"maisi_cli.{module}.plugins", lambda: loaded)


COMMON = ["--size", "32x32x32", "--spacing", "8x8x8", "--seed", "5", "--name", "s{index}", "--out", "run", "-q"]


def test_generate_writes_masks(plugged: None, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--mode", "mask", "--format", "nifti,dicom,rtstruct", *COMMON]
    assert run(command) == 0
    out = Path("run")
    assert {f"s0_{end}" for end in ("label.nii.gz", "seg.dcm", "rtstruct.dcm", "record.json")} <= {path.name for path in out.iterdir()}
    assert "s0_seg.dcm" in capsys.readouterr().out
    before = everything(out)
    assert run(command) == 2
    assert "already exists" in capsys.readouterr().err
    assert everything(out) == before


def test_generate_writes_pairs_and_resumes(plugged: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(tiny_model(tmp_path / "model"))
    settings = {"model": model, "size": "16x16x16", "spacing": "24x24x24", "seed": 5, "out": "run", "on_qc_fail": "keep",
                "name": "s{index}", "preview": False, "format": "rtstruct,dicom,nifti"}  # fmt: skip
    (sample,) = synthesis.generate(**settings)
    assert set(sample.paths) == {"series", "seg", "rtstruct", "image", "label", "record"}
    record = json.loads(sample.paths["record"].read_text())
    assert record["outputs"]["series"]["file"] == "s0_dicom"
    assert record["outputs"]["series"]["bytes"] == sum(path.stat().st_size for path in Path("run/s0_dicom").iterdir())
    assert list(synthesis.generate(**settings, resume=True)) == []

    monkeypatch.setattr(synthesis._Run, "start", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "run" / "s0_record.json").unlink()
    with pytest.raises(UsageError, match=r"s0_(rtstruct\.dcm|dicom) already exists"):
        list(synthesis.generate(**{**settings, "format": "rtstruct"}))
    with pytest.raises(UsageError, match="rtstruct needs samples with a mask"):
        list(synthesis.generate(**{**settings, "mode": "image", "format": "dicom,rtstruct", "out": "other"}))
    assert not Path("other").exists()


@pytest.mark.parametrize("format", ["dicom", "dicom-seg", "rtstruct", "dicom-ct"])
@pytest.mark.parametrize("mode", ["paired", "mask", "image"])
def test_what_a_format_cannot_hold_is_refused_before_the_work(
    format: str, mode: str, plugged: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model(tmp_path / "model"))
    settings = {
        "model": model,
        "size": "16x16x16",
        "spacing": "24x24x24",
        "seed": 5,
        "out": "run",
        "name": "s",
        "format": format,
        "mode": mode,
    }
    begun: list[object] = []
    monkeypatch.setattr(synthesis._Run, "start", lambda *job: begun.append(job))
    fits = {"dicom": {"paired", "mask", "image"}, "dicom-ct": {"paired", "image"}}.get(format, {"paired", "mask"})
    if mode not in fits:
        with pytest.raises(UsageError, match="needs samples with"):
            list(synthesis.generate(**settings))
        assert not begun
    if mode != "image" and format != "dicom-ct":  # labels numbered 1, 2, ... are none of MAISI's
        with pytest.raises(UsageError, match="numbers those of --anatomy anew"):
            list(synthesis.generate(**settings, anatomy="liver", compat="reference"))
        assert not begun
    elif mode in fits:
        with pytest.raises(Rejected):  # nothing comes of it, but it was begun
            list(synthesis.generate(**settings))
        assert len(begun) == 1
    assert not Path("run").exists()


def test_a_sheared_mask_is_refused_before_the_work(plugged: None, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.zeros((64, 64, 32), np.uint8)
    labels[8:-8, 8:-8, 8:-8] = 200
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[0, 1] = 0.038  # small enough for the networks; 0.6 pixels over 64
    nibabel.Nifti1Image(labels, affine).to_filename("own.nii.gz")
    assert run(["generate", "--mask", "own.nii.gz", "--format", "dicom", "--out", "run"]) == 2
    assert "sheared" in capsys.readouterr().err
    assert not Path("run").exists()


def test_structures_are_written_as_implicit_vr(phantoms: Any, tmp_path: Path) -> None:
    made = save_rtstruct(tiny(phantoms), tmp_path)["rtstruct"]
    assert pydicom.dcmread(made).file_meta.TransferSyntaxUID == structures.ImplicitVRLittleEndian


@pytest.fixture
def installed() -> None:
    """Skip where the package is only a folder; `pip install ./plugins/maisi-dicom` installs it."""
    if not any(entry.value == "maisi_dicom" for entry in entry_points(group="maisi")):
        pytest.skip("maisi-dicom is not installed")


def test_maisi_finds_it(installed: None) -> None:
    found = load("dicom")
    assert [info.problem for info in found.infos if info.name == "dicom"] == [None]
    assert found.registry("formats").get("dicom") is save_dicom
    assert found.registry("formats").entry("rtstruct").owner == "maisi-dicom"
    assert "dicom" not in load("").registry("formats")
