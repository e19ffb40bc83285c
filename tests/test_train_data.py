"""Data for training: lists in JSON and CSV, every finding of `data check`, and latents that are tied to what they were made of."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maisi_cli import cli, streaming
from maisi_cli.catalog import model as find_model
from maisi_cli.errors import Rejected, UsageError
from maisi_cli.events import Note
from maisi_cli.networks import build
from maisi_cli.testing import tiny_model
from maisi_cli.train import TrainSettings, diffusion, vae
from maisi_cli.train.checking import check_lists, patient_of, unet_multiple
from maisi_cli.train.data import Case, data_hashes, encode, intensity, read_list, read_lists, split
from maisi_cli.train.encoding import Encoding, encode_lists, prepared, rounded
from maisi_cli.train.importing import import_latents
from maisi_cli.volumes import read_image
from nibabel import orientations
from numpy.typing import NDArray

SPACING = (2.0, 2.5, 3.0)
BODY, BRAIN = 200, 22


def ct(seed: int, size: tuple[int, int, int] = (16, 16, 16)) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-1000, 900, size).astype(np.int16)


def labels(seed: int, size: tuple[int, int, int] = (16, 16, 16)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).choice(np.array([0, BODY, BRAIN], dtype=np.uint8), size)


def save_affine(spacing: tuple[float, ...] = SPACING) -> NDArray[np.float64]:
    """Return the affine of a file in RAS order."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-20, 30, 7)
    return affine


def save(array: NDArray[Any], path: Path, spacing: tuple[float, ...] = SPACING, axcodes: str = "RAS") -> Path:
    """Write an array that is in RAS order as a file in another order."""
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(axcodes))
    affine = save_affine(spacing)
    stored = orientations.apply_orientation(array, turn)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(stored, affine @ orientations.inv_ornt_aff(turn, array.shape)), path)
    return path


def write(path: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    path.write_text(json.dumps({"training": rows, **more}), "utf-8")
    return path


def images(folder: Path, count: int = 3) -> list[dict[str, Any]]:
    """Write sound cases, the last of them held out, and return their entries."""
    rows = []
    for k in range(count):
        save(ct(k), folder / f"p{k}.nii.gz")
        save(labels(k), folder / f"p{k}_seg.nii.gz")
        rows.append({"id": f"p{k}", "image": f"p{k}.nii.gz", "label": f"p{k}_seg.nii.gz", "spacing": list(SPACING), "modality": "ct",
                     "fold": int(k < count - 1)})  # fmt: skip
    return rows


def latents(folder: Path, count: int = 3) -> list[dict[str, Any]]:
    """Write sound latents, the last of them held out, and return their entries."""
    rows = []
    for k in range(count):
        np.save(folder / f"p{k}_latent.npy", np.random.default_rng(k).normal(size=(4, 4, 4, 4)).astype(np.float16))
        np.save(folder / f"p{k}_labels.npy", labels(k))
        rows.append({"id": f"p{k}", "latent": f"p{k}_latent.npy", "label": f"p{k}_labels.npy", "spacing": list(SPACING), "modality": "ct",
                     "dim": [16, 16, 16], "fold": int(k < count - 1), "vae_sha256": "a" * 64})  # fmt: skip
    return rows


# --- lists --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    for name in ("a.nii.gz", "b.nii", "c d.nii.gz", "l,1.npy", "z.npy"):
        (folder / name).touch()
    return folder


mm = st.floats(0.01, 20).map(lambda value: float(f"{value:.6g}"))
one_hot = st.integers(0, 3).map(lambda k: [int(k == n) for n in range(4)])
text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), min_size=1, max_size=12)


@st.composite
def entry(draw: st.DrawFn) -> dict[str, Any]:
    """Draw an entry of a list with some of the keys that it may have."""
    row: dict[str, Any] = {"image": draw(st.sampled_from(["a.nii.gz", "b.nii", "c d.nii.gz"])), "spacing": [draw(mm), draw(mm), draw(mm)]}
    row[draw(st.sampled_from(["modality", "class"]))] = draw(st.sampled_from(["ct", "mri", "mri_t1"]))
    for key, values in (("label", st.just("l,1.npy")), ("latent", st.just("z.npy")), ("fold", st.integers(-1, 5)),
                        ("dim", st.lists(st.integers(1, 800), min_size=3, max_size=3)), ("vae_sha256", st.just("0a" * 32)),
                        ("patient", text), ("site", text)):  # fmt: skip
        if draw(st.booleans()):
            row[key] = draw(values)
    if draw(st.booleans()):
        row |= {"top_region_index": draw(one_hot), "bottom_region_index": draw(one_hot)}
    return row


def cell(key: str, value: Any, form: int) -> dict[str, str]:
    """Return a value as a cell of a CSV, in one of the forms that it may have."""
    if not isinstance(value, list):
        return {key: str(value)}
    if key in ("spacing", "dim") and form == 0:
        return {f"{key}_{axis}": str(each) for axis, each in zip("xyz", value, strict=True)}
    return {key: ("x", " ", ", ")[form].join(map(str, value))}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(entry(), min_size=1, max_size=4), form=st.integers(0, 2), testing=st.integers(0, 2))
def test_csv_and_json_say_the_same(files: Path, rows: list[dict[str, Any]], form: int, testing: int) -> None:
    rows = [{"id": f"case{k}", **row} for k, row in enumerate(rows)]
    held = rows[:testing]
    (files / "one.json").write_text(json.dumps({"training": rows[testing:], "testing": held}), "utf-8")
    cells = [{key: text for name, value in row.items() for key, text in cell(name, value, form).items()} for row in rows[testing:] + held]
    cells = [{**each, "split": "training" if k < len(rows) - len(held) else "testing"} for k, each in enumerate(cells)]
    with (files / "two.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, sorted({key for each in cells for key in each}), restval="")
        table.writeheader()
        table.writerows(cells)
    one, two = (read_list(files / name, sections=("training", "testing")) for name in ("one.json", "two.csv"))
    assert one == two
    assert [case.section for case in one] == ["training"] * (len(rows) - len(held)) + ["testing"] * len(held)
    for case, row in zip(one, rows[testing:] + held, strict=True):
        assert case.spacing_mm == tuple(row["spacing"])
        assert case.modality == row.get("modality", row.get("class"))
        assert case.fold == row.get("fold", 1)
        assert case.regions == ((tuple(row["top_region_index"]), tuple(row["bottom_region_index"])) if "top_region_index" in row else None)
        assert dict(case.extra) == {key: row[key] for key in ("patient", "site") if key in row}


def test_without_ids_cases_are_named_after_their_files(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "s/b.x.nii", "z.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows = [{"image": "a.nii.gz"}, {"image": "s/b.x.nii"}, {"latent": "./z.npy"}]
    listed = write(tmp_path / "list.json", [{**row, "spacing": [1, 1, 1], "modality": "ct"} for row in rows])
    assert [case.id for case in read_list(listed)] == ["a", "s_b.x", "z"]


def test_spacing_that_a_list_leaves_out_is_the_headers_in_ras_order(tmp_path: Path) -> None:
    save(ct(0), tmp_path / "a.nii.gz", axcodes="SPL")
    listed = write(tmp_path / "list.json", [{"image": "a.nii.gz", "class": "ct"}])
    assert read_list(listed)[0].spacing_mm == SPACING


def test_several_lists_with_folders_of_their_own_are_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(ct(0), tmp_path / name / "data" / f"{name}.nii.gz")
        write(tmp_path / f"{name}.json", [{"image": f"{name}.nii.gz", "modality": "ct"}])
    paths, folders = [tmp_path / "one.json", tmp_path / "two.json"], [tmp_path / "one" / "data", tmp_path / "two" / "data"]
    cases = read_lists(paths, bases=folders)
    assert [case.id for case in cases] == ["one", "two"]
    both = [{"list": "one.json", "base": "one/data"}, {"list": "two.json", "base": "two/data"}]
    (tmp_path / "both.json").write_text(json.dumps({"lists": both}), "utf-8")
    assert read_list(tmp_path / "both.json") == cases
    with pytest.raises(UsageError, match="2 lists and 3 base folders"):
        read_lists(paths, bases=[*folders, tmp_path])
    with pytest.raises(UsageError, match=r"one.json, training\[0\]: the id 'one' is there already"):
        read_lists([paths[0], paths[0]], bases=[folders[0]])
    (tmp_path / "loop.json").write_text(json.dumps({"lists": [{"list": "loop.json"}]}), "utf-8")
    with pytest.raises(UsageError, match="not a data list"):
        read_list(tmp_path / "loop.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"spacing": "1.5x2"}, "no spacing of three positive numbers"), ({"spacing": [1, 1, 0]}, "no spacing"),
     ({"spacing": [1, True, 1]}, "no spacing"), ({"spacing": [1, 1, "nan"]}, "no spacing"), ({"modality": None}, "no modality"),
     ({"fold": "first"}, "fold 'first' is not a whole number"),
     ({"fold": 0.5}, "fold 0.5"), ({"dim": [1, 2]}, "dim"), ({"top_region_index": [0, 1, 0, 0]}, "needs both"),
     ({"top_region_index": [1, 0, 0], "bottom_region_index": [0, 0, 1]}, "four numbers"),
     ({"id": "../a"}, "no file name"), ({"id": ".a"}, "no file name"),
     ({"id": "a\nb"}, "no file name"), ({"image": 3}, "no path"), ({"label": "gone.nii.gz"}, "gone.nii.gz, which does not exist")],
)  # fmt: skip
def test_a_wrong_entry_is_refused_in_one_line_with_its_row(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "a.npy").touch()
    good = {"id": "a", "latent": "a.npy", "spacing": [1, 1, 1], "modality": "ct"}
    listed = write(tmp_path / "list.json", [good, {**good, "id": "b", **change}])
    with pytest.raises(UsageError, match=message) as caught:
        read_list(listed)
    assert str(caught.value).startswith(f"{listed}, training[1]")
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [("image,modality\na.npy\n", "line 2 has another number of cells"), ("image,modality\na.npy,ct,5\n", "line 2 has another number"),
     ("name,modality\na,ct\n", "no column image, label or latent"),
     ("latent,modality,spacing\na.npy,ct,1x1x1\na.npy,ct,1xx1\n", "line 3 has no spacing"),
     ("latent,modality,spacing_x,spacing_y,spacing_z\na.npy,ct,1,,1\n", "line 2 has no spacing"),
     ("latent,modality,spacing,split\na.npy,ct,1x1x1,held\n", "line 2: the split 'held'"), ("", "no column"),
     ('latent,modality,spacing\n"a.npy,ct,1x1x1\n', "not CSV"), ("latent,modality,spacing\n", "lists no cases")],
)  # fmt: skip
def test_a_wrong_table_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.npy").touch()
    (tmp_path / "list.csv").write_text(content, "utf-8")
    with pytest.raises(UsageError, match=message):
        read_list(tmp_path / "list.csv")


def test_the_hashes_of_the_data_follow_the_list_and_the_vae(tmp_path: Path) -> None:
    listed = write(tmp_path / "latents.json", latents(tmp_path))
    found = data_hashes(listed, read_list(listed))
    assert found["vae"] == "a" * 64
    write(tmp_path / "latents.json", latents(tmp_path)[:2])
    again = data_hashes(listed, read_list(listed))
    assert again["list"] != found["list"]
    assert again["vae"] == found["vae"]


# --- data check: each finding from a list that has nothing else wrong ---------------------------

Break = Callable[[Path, list[dict[str, Any]]], None]


def check(listed: Path, **more: Any) -> list[tuple[str, str, str | None]]:
    return [(each.check, each.severity, each.case) for each in check_lists([listed], jobs=1, **more).findings]


def test_sound_lists_have_no_finding(tmp_path: Path) -> None:
    assert check(write(tmp_path / "list.json", images(tmp_path))) == []
    assert check(write(tmp_path / "latents.json", latents(tmp_path))) == []


def set_(k: int, **values: Any) -> Break:
    return lambda _folder, rows: rows[k].update(values)


def image(array: Callable[[], NDArray[Any]], name: str = "p1.nii.gz", **how: Any) -> Break:
    return lambda folder, _rows: void(save(array(), folder / name, **how))


def void(_value: Any) -> None:
    """Return nothing."""


def damage(name: str) -> Break:
    return lambda folder, _rows: void((folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 2]))


def remove(name: str) -> Break:
    return lambda folder, _rows: (folder / name).unlink()


def copy(source: str, target: str) -> Break:
    return lambda folder, _rows: void((folder / target).write_bytes((folder / source).read_bytes()))


def not_finite() -> NDArray[np.float32]:
    array = ct(1).astype(np.float32)
    array[3, 4, 5] = np.nan
    return array


def mirrored() -> NDArray[np.uint8]:
    """Return a map whose right kidney lies left (x grows to the right) of the left one."""
    array = np.full((16, 16, 16), BODY, dtype=np.uint8)
    array[:5], array[-5:] = 5, 14
    return array


def add(**values: Any) -> Break:
    return lambda _folder, rows: rows.append({**rows[0], **values})


def two_patients(folder: Path, rows: list[dict[str, Any]]) -> None:
    rows[0]["id"], rows[2]["id"] = "case_0007_t1", "case_0007_t2"


def thick(folder: Path, _rows: Any) -> None:
    save(ct(1, (16, 16, 20)), folder / "p1.nii.gz")
    save(labels(1, (16, 16, 20)), folder / "p1_seg.nii.gz")


def change_header(name: str, **forms: tuple[NDArray[Any] | None, int]) -> Break:
    def change(folder: Path, _rows: Any) -> None:
        path = folder / name
        found: Any = nib.load(path)
        image = nib.Nifti1Image(np.asarray(found.dataobj), found.affine)
        for form, (affine, code) in forms.items():
            getattr(image, f"set_{form}")(affine, code)
        nib.save(image, path)

    return change


MIRRORED = np.diag([-2.0, 2.5, 3.0, 1.0])

IMAGES: dict[str, tuple[Break, tuple[str, str, str | None], str]] = {
    "missing image": (remove("p1.nii.gz"), ("image", "error", "p1"), "does not exist"),
    "damaged image": (damage("p1.nii.gz"), ("image", "error", "p1"), "damaged"),
    "no NIfTI": (lambda folder, _: void((folder / "p1.nii.gz").write_text("x")), ("image", "error", "p1"), "not a NIfTI"),
    "not finite": (image(not_finite), ("image", "error", "p1"), "not finite"),
    "missing label": (remove("p1_seg.nii.gz"), ("label", "error", "p1"), "does not exist"),
    "damaged label": (damage("p1_seg.nii.gz"), ("label", "error", "p1"), "damaged"),
    "fractions": (image(lambda: labels(1) / 3, "p1_seg.nii.gz"), ("label", "error", "p1"), "not whole"),
    "labels above 255": (image(lambda: labels(1).astype(np.int16) * 2, "p1_seg.nii.gz"), ("label", "error", "p1"), "400"),
    "float labels": (image(lambda: labels(1).astype(np.float32), "p1_seg.nii.gz"), ("label-type", "warning", "p1"), "float32"),
    "unknown labels": (image(lambda: np.where(labels(1) == BRAIN, 140, labels(1)).astype(np.uint8), "p1_seg.nii.gz"),
                       ("labels-known", "error", "p1"), "140"),
    "no label": (image(lambda: 0 * labels(1), "p1_seg.nii.gz"), ("labels-known", "error", "p1"), "no label at all"),
    "another shape": (image(lambda: labels(1, (16, 16, 12)), "p1_seg.nii.gz"), ("grid", "error", "p1"), "different grids"),
    "another affine": (image(lambda: labels(1), "p1_seg.nii.gz", spacing=(2.0, 2.5, 3.1)), ("grid", "error", "p1"), "different grids"),
    "two places": (change_header("p1.nii.gz", qform=(MIRRORED, 1), sform=(save_affine(), 1)), ("orientation", "warning", "p1"), "disagree"),
    "two places of a label": (change_header("p1_seg.nii.gz", qform=(MIRRORED, 1), sform=(save_affine(), 1)),
                              ("orientation", "warning", "p1"), "p1_seg"),
    "mirrored map": (image(mirrored, "p1_seg.nii.gz"), ("orientation", "error", "p1"), "look exchanged"),
    "another spacing": (set_(1, spacing=[2, 2.5, 3.2]), ("spacing", "error", "p1"), "header"),
    "spacing in another order": (set_(1, spacing=[3, 2.5, 2]), ("spacing", "error", "p1"), "another order of axes"),
    "no spacing": (set_(1, spacing=[1, 2]), ("list", "error", "p1"), "no spacing"),
    "no modality": (set_(1, modality=None), ("list", "error", "p1"), "no modality"),
    "no fold": (lambda _, rows: void(rows[1].update(fold="x")), ("list", "error", "p1"), "fold 'x'"),
    "no image": (lambda _, rows: void((rows[1].pop("image"), rows[1].pop("label"))), ("list", "error", "p1"), "neither image nor latent"),
    "a label of another kind": (lambda folder, rows: void((copy("p1_seg.nii.gz", "p1.mha")(folder, rows), rows[1].update(label="p1.mha"))),
                                ("label", "error", "p1"), "not named .nii.gz"),
    "damaged image without a listed spacing": (lambda folder, rows: void((damage("p1.nii.gz")(folder, rows), rows[1].pop("spacing"))),
                                               ("image", "error", "p1"), "damaged"),
    "missing image without a listed spacing": (lambda folder, rows: void((remove("p1.nii.gz")(folder, rows), rows[1].pop("spacing"))),
                                               ("image", "error", "p1"), "does not exist"),
    "strange modality": (set_(1, modality="pet"), ("modality", "error", "p1"), "pet"),
    "unknown modality": (set_(1, modality="unknown"), ("modality", "error", "p1"), "unknown"),
    "CT called MR": (set_(1, modality="mri_t1"), ("modality", "error", "p1"), "look like HU"),
    "CT without offset": (image(lambda: ct(1) + 1024), ("modality", "error", "p1"), "no air"),
    "values far beyond HU": (image(lambda: ct(1).astype(np.float32) * 100), ("modality", "warning", "p1"), "no HU"),
    "size": (thick, ("size", "warning", "p1"), "16x16x32"),
    "duplicate": (copy("p0.nii.gz", "p1.nii.gz"), ("duplicate", "warning", "p1"), "same image as p0"),
    "leak": (copy("p0.nii.gz", "p2.nii.gz"), ("leakage", "error", "p2"), "p0, which is trained on; this one is held out"),
    "one patient on both sides": (two_patients, ("leakage", "warning", "case_0007_t2"), "case_0007"),
    "one patient by the list's own word": (lambda _, rows: void((rows[0].update(patient="x"), rows[2].update(patient="x"))),
                                           ("leakage", "warning", "p2"), "x looks like one patient"),
    "nothing held out": (set_(2, fold=3), ("fold", "error", None), "no case is held out"),
    "nothing trained on": (lambda _, rows: void([row.update(fold=0) for row in rows]), ("fold", "error", None), "every case"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_each_finding_on_images_is_found_alone(tmp_path: Path, name: str) -> None:
    break_, wanted, words = IMAGES[name]
    rows = images(tmp_path)
    break_(tmp_path, rows)
    report = check_lists([write(tmp_path / "list.json", rows)], jobs=1)
    assert [(each.check, each.severity, each.case) for each in report.findings] == [wanted]
    assert words in report.findings[0].text + report.findings[0].fix
    assert report.findings[0].fix
    assert not report.passed


def store(array: Callable[[], NDArray[Any]], name: str) -> Break:
    return lambda folder, _rows: np.save(folder / name, array())


def bad_latent() -> NDArray[np.float16]:
    array = np.ones((4, 4, 4, 4), dtype=np.float16)
    array[0, 0, 0, 0] = np.inf
    return array


def nifti_label(folder: Path, rows: list[dict[str, Any]]) -> None:
    save(labels(1, (16, 16, 12)), folder / "p1_seg.nii.gz")
    rows[1]["label"] = "p1_seg.nii.gz"


LATENTS: dict[str, tuple[Break, str, str]] = {
    "damaged": (damage("p1_latent.npy"), "latent", "damaged"),
    "pickled": (lambda folder, _: np.save(folder / "p1_latent.npy", np.array([{}], dtype=object), allow_pickle=True), "latent", "damaged"),
    "channel last": (store(lambda: np.ones((4, 4, 4), dtype=np.float16), "p1_latent.npy"), "latent", "shape 4x4x4"),
    "float32": (store(lambda: np.ones((4, 4, 4, 4), dtype=np.float32), "p1_latent.npy"), "latent", "float32"),
    "not finite": (store(bad_latent, "p1_latent.npy"), "latent", "not finite"),
    "labels of another size": (store(lambda: labels(1, (16, 16, 12)), "p1_labels.npy"), "latent", "not 4 times"),
    "labels of another type": (store(lambda: labels(1).astype(np.int64), "p1_labels.npy"), "latent", "int64"),
    "unknown labels": (store(lambda: np.where(labels(1) == BRAIN, 140, labels(1)).astype("u1"), "p1_labels.npy"), "labels-known", "140"),
    "no label": (store(lambda: 0 * labels(1), "p1_labels.npy"), "labels-known", "no label at all"),
    "a label map of another size": (nifti_label, "latent", "not 4 times"),
    "another size than listed": (set_(1, dim=[16, 16, 32]), "latent", "the list says 16x16x32"),
    "another VAE": (set_(1, vae_sha256="b" * 64), "latent", "bbbbbbbbbbbb, not aaaaaaaaaaaa"),
    "a VAE without a name": (set_(1, vae_sha256=None), "latent", "not named"),
    "another number of channels": (store(lambda: np.ones((8, 4, 4, 4), dtype=np.float16), "p1_latent.npy"), "latent", "number of channels"),
    "size": (lambda folder, rows: void((np.save(folder / "p1_latent.npy", np.ones((4, 4, 4, 5), dtype=np.float16)), rows[1].pop("dim"),
                                        np.save(folder / "p1_labels.npy", labels(1, (16, 16, 20))))), "size", "whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATENTS)
def test_each_finding_on_latents_is_found_alone(tmp_path: Path, name: str) -> None:
    break_, wanted, words = LATENTS[name]
    rows = latents(tmp_path)
    break_(tmp_path, rows)
    report = check_lists([write(tmp_path / "latents.json", rows)], jobs=1)
    assert [(each.check, each.case) for each in report.findings] == [(wanted, "p1")]
    assert words in report.findings[0].text


def test_the_check_does_not_stop_at_the_first(tmp_path: Path) -> None:
    rows = images(tmp_path)
    remove("p0.nii.gz")(tmp_path, rows)
    set_(1, spacing=[9, 9, 9])(tmp_path, rows)
    copy("p1.nii.gz", "p2.nii.gz")(tmp_path, rows)
    rows += [{**rows[1]}, {"id": "a/b"}]
    found = check(write(tmp_path / "list.json", rows, testing=[{**rows[1], "id": "t9"}]))
    assert {each[0] for each in found} == {"image", "spacing", "list", "leakage"}
    assert ("leakage", "error", "t9") in found
    assert sum(each[0] == "spacing" for each in found) == 3


def test_all_that_is_wrong_with_one_case_is_told(tmp_path: Path) -> None:
    rows = images(tmp_path)
    rows[1].update(fold="x", modality=None, dim=[1])
    image(lambda: labels(1).astype(np.float32), "p1_seg.nii.gz", spacing=(2.0, 2.5, 3.1))(tmp_path, rows)
    found = check(write(tmp_path / "list.json", rows))
    assert sorted(each[0] for each in found) == ["grid", "label-type", "list", "list", "list"]
    assert {each[2] for each in found} == {"p1"}


def test_another_fold_may_be_held_out(tmp_path: Path) -> None:
    rows = images(tmp_path)
    for k, row in enumerate(rows):
        row["fold"] = k + 5
    listed = write(tmp_path / "list.json", rows)
    assert check(listed) == [("fold", "error", None)]
    assert check(listed, held_out=6) == []
    assert [case.id for case in split(read_list(listed), 6)[1]] == ["p1"]


def test_a_header_without_an_orientation_is_told_for_image_and_label(tmp_path: Path) -> None:
    rows = images(tmp_path)
    for name in ("p1.nii.gz", "p1_seg.nii.gz"):
        change_header(name, qform=(None, 0), sform=(None, 0))(tmp_path, rows)
    findings = check_lists([write(tmp_path / "list.json", rows)], jobs=1).findings
    assert [(each.check, each.case) for each in findings] == [("orientation", "p1")] * 2
    assert all("left and right are a guess" in each.text for each in findings)


def test_labels_that_a_labels_json_names_are_known(tmp_path: Path) -> None:
    rows = images(tmp_path)
    image(lambda: np.full((16, 16, 16), 140, dtype=np.uint8), "p1_seg.nii.gz")(tmp_path, rows)
    named = [{"id": 140, "name": "cyst of mine"}]
    (tmp_path / "labels.json").write_text(json.dumps({"schema": "maisi.labels/1", "vocabulary": "maisi", "labels": named}), "utf-8")
    assert check(write(tmp_path / "list.json", rows)) == []


def test_the_page_on_data_names_every_check_with_its_severity() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text("utf-8")
    section = page.partition("## `maisi data check`")[2].partition("\nWho a patient")[0]
    table = re.findall(r"^\| (`[^|]+) \| ([a-z, ]+) \| ", section, flags=re.M)
    told = {name: set(severities.split(", ")) for names, severities in table for name in re.findall(r"`([a-z-]+)`", names)}
    made: dict[str, set[str]] = {"duplicate": set(), "latent": {"error"}}
    for _, (check, severity, _case), _words in IMAGES.values():
        made.setdefault(check, set()).add(severity)
    assert told == made


@pytest.mark.parametrize(
    ("name", "patient"),
    [("case_0001_t2", "case_0001"), ("LUNG1-001_a", "LUNG1-001"), ("phantom0004", "phantom0004"),
     ("sub-07_ses-0001_ct", "sub-07"), ("anna", "anna"),
     ("a1_b1", "a1_b1")],
)  # fmt: skip
def test_whose_image_a_case_is(name: str, patient: str) -> None:
    case = Case(id=name, image=None, label=None, latent=None, spacing_mm=(1, 1, 1), modality="ct", fold=1)
    assert patient_of(case) == patient


def test_sizes_are_judged_by_the_networks_of_the_model() -> None:
    assert unet_multiple(find_model("nano-ct")) == 16
    assert unet_multiple(find_model("rflow-ct")) == 32


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    rows = images(tmp_path)
    remove("p0.nii.gz")(tmp_path, rows)
    listed = write(tmp_path / "list.json", rows)
    assert check_lists([listed], jobs=2) == check_lists([listed], jobs=1)


def test_the_command_prints_all_findings_with_their_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = images(tmp_path)
    listed = write(tmp_path / "list.json", rows)
    assert cli.run(["data", "check", str(listed)]) == 0
    assert capsys.readouterr().out == "pass  3 cases\n"
    set_(1, spacing=[9, 9, 9])(tmp_path, rows)
    set_(2, fold=1)(tmp_path, rows)
    write(listed, rows)
    assert cli.run(["data", "check", str(listed)]) == 1
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].startswith("error   p1: spacing: the list says 9x9x9 mm")
    assert lines[2] == "error   the list: fold: no case is held out (fold 0)"
    assert lines[3].strip() == 'give some cases  "fold": 0, about one in ten'
    assert "2 errors and 0 warnings in 1 of 3 cases" in shown.err
    assert cli.run(["data", "check", str(listed), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["cases"], found["passed"]) == ("maisi.data-check/1", 3, False)
    assert [set(each) for each in found["findings"]] == [{"check", "severity", "case", "text", "fix"}] * 2


def test_real_images_are_judged_rightly(shared: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("ct_torso", "mr_slab"):
        shared(f"data/{name}.nii.gz")
    rows = [
        {"image": str(shared("data/ct_torso.nii.gz")), "modality": "ct", "fold": 0},
        {"image": str(shared("data/mr_slab.nii.gz")), "modality": "mri"},
    ]
    assert {each[0] for each in check(write(tmp_path / "list.json", rows))} == {"size"}  # 122x101x112 and 117x91x20
    rows[0]["modality"], rows[1]["modality"] = "mri", "ct"
    assert {each[2] for each in check(write(tmp_path / "list.json", rows)) if each[0] == "modality"} == {"ct_torso", "mr_slab"}


# --- encoding -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def encoded(folder: Path, tiny: Path, **more: Any) -> Path:
    return encode(folder / "list.json", out=folder / "out", model=str(tiny), device="cpu", **more)


def test_how_a_volume_is_stored_does_not_matter(tiny: Path, tmp_path: Path) -> None:
    rows = []
    for axcodes in ("RAS", "LPS", "PSR", "IAL"):
        save(ct(1, (18, 16, 12)), tmp_path / f"{axcodes}.nii.gz", axcodes=axcodes)
        save(labels(1, (18, 16, 12)), tmp_path / f"{axcodes}_seg.nii.gz", axcodes=axcodes)
        rows.append({"id": axcodes, "image": f"{axcodes}.nii.gz", "label": f"{axcodes}_seg.nii.gz", "modality": "ct"})
    write(tmp_path / "list.json", rows)
    for size, voxels in (("original", (20, 16, 12)), ("24x20x16", (24, 20, 16))):
        cases = read_list(encode(tmp_path / "list.json", out=tmp_path / size, model=str(tiny), device="cpu", size=size))
        first = (np.load(cases[0].latent), np.load(cases[0].label), cases[0].spacing_mm)
        assert first[0].dtype == np.float16
        assert first[1].shape == voxels == cases[0].dim
        for case in cases[1:]:
            assert np.array_equal(np.load(case.latent), first[0])
            assert np.array_equal(np.load(case.label), first[1])
            assert case.spacing_mm == first[2]


def test_sizes_are_rounded_as_the_reference_rounds_them() -> None:
    assert [rounded((n, n, n))[0] for n in (1, 64, 192, 320, 448, 576, 100, 200)] == [128, 128, 256, 256, 512, 512, 128, 256]
    assert Encoding.chosen(find_model("rflow-ct"), None, "mean", 0).size == "auto"
    assert Encoding.chosen(find_model("nano-ct"), None, "mean", 0).size == "original"


def test_resampled_images_are_those_that_the_reference_encodes(shared: Callable[[str], Path]) -> None:
    at = shared("golden/t65_create_training_data")
    arrays, figures = np.load(at / "arrays.npz"), json.loads((at / "case.json").read_text("utf-8"))["scalars"]
    for k in range(2):
        path = at / f"ct{k}.nii.gz"
        spacing = read_image(path).geometry.spacing
        case = Case(id="a", image=path, label=None, latent=None, spacing_mm=spacing, modality="ct", fold=1)
        ready = prepared(case, Encoding(size="auto"))
        assert ready.image.shape == (128, 128, 128)
        assert list(ready.geometry.spacing) == pytest.approx(figures[f"embedding_{k}"]["affine_diag"][:3])
        for axis, name in enumerate("xyz"):
            assert np.allclose(ready.image.take(64, axis), arrays[f"encoder_input_{k}__{name}64"], atol=2e-6)


def test_labels_are_resampled_with_the_image(tmp_path: Path) -> None:
    """Along the middle of a labelled bright block, the border of the labels stays where the image is half way up its step."""
    array = np.full((20, 16, 16), -1000, dtype=np.int16)
    array[5:15, 4:12, 3:13] = 1000
    save(array, tmp_path / "a.nii.gz")
    save((array > 0).astype(np.uint8) * BODY, tmp_path / "b.nii.gz")
    case = Case(id="a", image=tmp_path / "a.nii.gz", label=tmp_path / "b.nii.gz", latent=None, spacing_mm=SPACING, modality="ct", fold=1)
    ready = prepared(case, Encoding(size=(60, 48, 48)))
    assert ready.labels is not None
    for line in ((slice(None), 24, 24), (30, slice(None), 24), (30, 24, slice(None))):
        assert np.array_equal(ready.labels[line] == BODY, ready.image[line] > 0.5)
        assert sorted({round(float(value), 3) for value in ready.image[line]}) == [0, 0.333, 0.667, 1]  # centres lie a third apart
    assert ready.geometry.spacing == pytest.approx([mm / 3 for mm in SPACING])


@pytest.mark.parametrize("name", ["ct", "mri_t1"])
def test_values_are_scaled_by_the_modality_that_is_declared(tmp_path: Path, name: str) -> None:
    import monai.transforms as transforms

    values = (np.random.default_rng(0).gamma(2, 200, (16, 16, 16)) - 1000 * (name == "ct")).astype(np.float32)
    scale: Any = {"ct": transforms.ScaleIntensityRange(-1000, 1000, 0, 1, clip=True),
                  "mri_t1": transforms.ScaleIntensityRangePercentiles(0, 99.5, 0, 1, clip=False)}[name]  # fmt: skip
    save(values, tmp_path / "a.nii.gz")
    case = Case(id="a", image=tmp_path / "a.nii.gz", label=None, latent=None, spacing_mm=SPACING, modality=name, fold=1)
    assert np.allclose(prepared(case, Encoding()).image, scale(values), atol=1e-5)
    assert intensity(np.array([-3000, 0, 3000])).tolist() == [0, 0.5, 1]


def test_a_sample_is_drawn_from_the_posterior_by_seed_and_id(tiny: Path, tmp_path: Path) -> None:
    spec = find_model(str(tiny))
    network = build(spec.networks["vae"]).eval()
    from maisi_cli.weights import load_state

    network.load_state_dict({key: value.float() for key, value in load_state(tiny.parent / "vae.safetensors").tensors.items()})
    image = torch.from_numpy(intensity(ct(3)))[None, None]
    with torch.no_grad():
        mean, sigma = network.encode(image)  # type: ignore[operator]
    ours = streaming.posterior(network, image)
    assert torch.allclose(ours[0], mean, atol=1e-5)
    assert torch.allclose(ours[1], sigma, rtol=1e-4)
    rows = images(tmp_path)
    save(ct(3), tmp_path / "p0.nii.gz")
    write(tmp_path / "list.json", rows)
    found = {}
    for seed, order in ((0, rows), (0, rows[::-1]), (1, rows)):
        write(tmp_path / "list.json", order)
        case = next(case for case in read_list(encoded(tmp_path, tiny, latent="sample", seed=seed, force=True)) if case.id == "p0")
        assert case.latent is not None
        found[seed, order[0]["id"]] = np.load(case.latent)
    assert np.array_equal(found[0, "p0"], found[0, "p2"])
    noise = (found[0, "p0"] - mean[0].numpy()) / sigma[0].numpy()
    assert abs(float(noise.mean())) < 4 / math.sqrt(noise.size)
    assert float(noise.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * noise.size))
    other = (found[1, "p0"] - mean[0].numpy()) / sigma[0].numpy()
    assert abs(float(np.corrcoef(noise.ravel(), other.ravel())[0, 1])) < 4 / math.sqrt(noise.size)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


def test_what_is_encoded_already_is_kept(tiny: Path, tmp_path: Path) -> None:
    write(tmp_path / "list.json", images(tmp_path))
    listed = encoded(tmp_path, tiny)
    row = json.loads(listed.read_text("utf-8"))["training"][0]
    assert {"vae_sha256", "image_sha256", "dim", "spacing", "modality", "fold"} <= set(row)
    before, text = times(tmp_path / "out"), listed.read_text("utf-8")
    done = encode_lists([tmp_path / "list.json"], out=tmp_path / "out", model=str(tiny), device="cpu")
    assert (done.encoded, done.kept) == ((), ("p0", "p1", "p2"))
    assert times(tmp_path / "out") == before
    assert listed.read_text("utf-8") == text
    listed.unlink()  # as if it had been interrupted before its end
    assert encoded(tmp_path, tiny).read_text("utf-8") == text
    assert times(tmp_path / "out") == before
    save(ct(77), tmp_path / "p1.nii.gz")  # another image
    (tmp_path / "out" / "p2_latent.npy").write_bytes(b"damaged")
    done = encode_lists([tmp_path / "list.json"], out=tmp_path / "out", model=str(tiny), device="cpu")
    assert (done.encoded, done.kept) == (("p1", "p2"), ("p0",))
    rows = json.loads((tmp_path / "list.json").read_text("utf-8"))["training"]
    rows[0]["fold"] = 5  # what the networks do not see is taken from the list
    write(tmp_path / "list.json", rows)
    assert read_list(encoded(tmp_path, tiny))[0].fold == 5
    before = times(tmp_path / "out")
    encoded(tmp_path, tiny, force=True)
    assert all(value != before[name] for name, value in times(tmp_path / "out").items())


def test_a_precision_that_is_asked_for_is_computed_in_and_recorded(tiny: Path, tmp_path: Path) -> None:
    write(tmp_path / "list.json", images(tmp_path)[:1])
    encoded(tmp_path, tiny)
    whole = np.load(tmp_path / "out" / "p0_latent.npy").astype(np.float32)
    encoded(tmp_path, tiny, dtype="bf16", force=True)
    half = np.load(tmp_path / "out" / "p0_latent.npy").astype(np.float32)
    assert json.loads((tmp_path / "out" / "p0_latent.json").read_text())["precision"] == "bf16"
    assert 0 < np.abs(half - whole).max() < 0.05 * np.abs(whole).max()


def test_latents_of_another_vae_or_other_settings_are_not_replaced(tiny: Path, tmp_path: Path) -> None:
    rows = images(tmp_path)
    write(tmp_path / "list.json", rows)
    encoded(tmp_path, tiny)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    other = tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="encoded by another VAE"):
        encode(tmp_path / "list.json", out=tmp_path / "out", model=str(other), device="cpu")
    with pytest.raises(UsageError, match="encoded with size original, latent mean"):
        encoded(tmp_path, tiny, size="32x32x32")
    with pytest.raises(UsageError, match="encoded in fp32, not bf16"):
        encoded(tmp_path, tiny, dtype="bf16")
    with pytest.raises(UsageError, match="no precision 'half'"):
        encoded(tmp_path, tiny, dtype="half")
    encoded(tmp_path, tiny, dtype="fp32")
    write(tmp_path / "list.json", rows[:2])
    with pytest.raises(UsageError, match="lists 1 cases more, such as p2"):
        encoded(tmp_path, tiny)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "p0_labels.npy").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"p0_labels\.npy already exists"):
        encode(tmp_path / "list.json", out=tmp_path / "mine", model=str(tiny), device="cpu")


def test_what_fails_is_told_and_all_else_is_encoded(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = images(tmp_path, 6)
    damage("p0.nii.gz")(tmp_path, rows)
    image(lambda: labels(1, (16, 16, 12)), "p1_seg.nii.gz")(tmp_path, rows)
    set_(2, spacing=[9, 9, 9])(tmp_path, rows)
    image(lambda: np.full((16, 16, 16), 140, dtype=np.uint8), "p3_seg.nii.gz")(tmp_path, rows)
    write(tmp_path / "list.json", rows)
    said: list[str] = []
    with pytest.raises(Rejected, match="4 of 6 cases were not encoded: p0, p1, p2, p3"):
        encoded(tmp_path, tiny, on_event=lambda event: void(said.append(event.text) if isinstance(event, Note) else None))
    assert [next(text for text in said if f"case {name} " in text) for name in ("p0", "p1", "p2", "p3")]
    assert [case.id for case in read_list(tmp_path / "out" / "latents.json")] == ["p4", "p5"]
    command = ["data", "encode", str(tmp_path / "list.json"), "--out", str(tmp_path / "out"), "--model", str(tiny), "--json", "-q"]
    assert cli.run(command) == 1
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["encoded"], found["kept"], list(found["failed"])) == (0, 2, ["p0", "p1", "p2", "p3"])
    assert "4 of 6 cases were not encoded" in shown.err
    images(tmp_path, 6)
    rows[2]["spacing"] = list(SPACING)
    write(tmp_path / "list.json", rows)
    done = encode_lists([tmp_path / "list.json"], out=tmp_path / "out", model=str(tiny), device="cpu")
    assert (done.encoded, done.kept, dict(done.failed)) == (("p0", "p1", "p2", "p3"), ("p4", "p5"), {})


def test_where_all_fail_nothing_is_left(tiny: Path, tmp_path: Path) -> None:
    rows = images(tmp_path, 2)
    for name in ("p0", "p1"):
        damage(f"{name}.nii.gz")(tmp_path, rows)
    write(tmp_path / "list.json", rows)
    with pytest.raises(Rejected, match="2 of 2"):
        encoded(tmp_path, tiny)
    assert not (tmp_path / "out").exists()


def test_images_without_labels_and_testing_cases_are_encoded_too(tiny: Path, tmp_path: Path) -> None:
    rows = images(tmp_path)
    for row in rows:
        del row["label"]
    rows[1]["patient"] = "x"
    rows[0] |= {"top_region_index": [0, 1, 0, 0], "bottom_region_index": [0, 0, 1, 0]}
    write(tmp_path / "list.json", rows[:2], testing=rows[2:])
    listed = encoded(tmp_path, tiny)
    cases = read_list(listed, sections=("training", "testing"))
    assert [(case.id, case.section, case.label) for case in cases] == [
        ("p0", "training", None),
        ("p1", "training", None),
        ("p2", "testing", None),
    ]
    assert cases[0].regions == ((0, 1, 0, 0), (0, 0, 1, 0))
    assert cases[1].extra["patient"] == "x"
    assert cases[0].vae_sha256 == cases[2].vae_sha256
    assert check(listed) == [("fold", "error", None)]


TASKS: dict[str, Any] = {"vae": vae.task, "dm": diffusion.task}


@pytest.mark.parametrize("kind", TASKS)
def test_training_holds_out_the_fold_that_is_set(tiny: Path, tmp_path: Path, kind: str) -> None:
    rows = images(tmp_path)
    for k, row in enumerate(rows):
        row["fold"] = k
    data = write(tmp_path / "list.json", rows)
    if kind == "dm":
        data = encoded(tmp_path, tiny)
    one, two = (TASKS[kind](
        TrainSettings(kind=kind, model=str(tiny), fold=fold, crops=((4, 4, 4),)), data) for fold in (1, 2))  # fmt: skip
    sizes = [[len(task.held), len(task.volumes if kind == "vae" else task.cases)] for task in (one, two)]
    assert sizes == [[1, 2], [1, 2]]
    held = [task.held[0] if kind == "vae" else task.held[0].latent for task in (one, two)]
    assert not np.array_equal(*held)
    with pytest.raises(UsageError, match=r"no case of the list is held out .fold 7."):
        TASKS[kind](TrainSettings(kind=kind, model=str(tiny), fold=7), data)


def test_latents_open_by_memory_map(tiny: Path, tmp_path: Path) -> None:
    write(tmp_path / "list.json", images(tmp_path))
    case = read_list(encoded(tmp_path, tiny))[0]
    assert case.latent is not None
    latent = np.load(case.latent, mmap_mode="r")
    assert isinstance(latent, np.memmap)
    assert os.path.getsize(case.latent) == latent.offset + latent.nbytes  # noqa: PTH202


# --- embeddings of the reference ----------------------------------------------------------------


def test_embeddings_of_the_reference_become_latents(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(4, 4, 6, 4)).astype(np.float32)
    (tmp_path / "s").mkdir()
    nib.save(nib.Nifti1Image(array, np.diag([*SPACING, 1])), tmp_path / "s" / "a_emb.nii.gz")
    nib.save(nib.Nifti1Image(array[::-1], np.diag([-2.0, 2.5, 3.0, 1])), tmp_path / "b_emb.nii.gz")
    side = {
        "dim": [4, 4, 6],
        "spacing": list(SPACING),
        "modality": "ct",
        "top_region_index": [0, 1, 0, 0],
        "bottom_region_index": [0, 0, 1, 0],
    }
    (tmp_path / "s" / "a_emb.nii.gz.json").write_text(json.dumps(side), "utf-8")
    save(labels(0, (16, 16, 24)), tmp_path / "m.nii.gz", axcodes="LPS")
    rows = [{"image": "s/a.nii.gz", "label": "m.nii.gz", "fold": 0}, {"image": "b_emb.nii.gz", "modality": "mri", "spacing": "2x2.5x3"}]
    (tmp_path / "vae.safetensors").write_bytes(b"weights")
    arguments = ["--vae", str(tmp_path / "vae.safetensors"), "--out", str(tmp_path / "out"), "-q"]
    assert cli.run(["data", "import-latents", str(write(tmp_path / "list.json", rows)), *arguments]) == 0
    one, two = read_list(tmp_path / "out" / "latents.json")
    assert (one.id, one.fold, one.dim, one.modality, one.regions) == ("s_a", 0, (16, 16, 24), "ct", ((0, 1, 0, 0), (0, 0, 1, 0)))
    assert (two.id, two.fold, two.label, two.modality, two.vae_sha256) == ("b", 1, None, "mri", one.vae_sha256)
    for case in (one, two):
        assert case.latent is not None
        assert case.spacing_mm == SPACING
        assert np.array_equal(np.load(case.latent), np.moveaxis(array, -1, 0).astype(np.float16))
    assert one.label is not None
    assert np.array_equal(np.load(one.label), labels(0, (16, 16, 24)))


@pytest.mark.parametrize(
    ("row", "message"),
    [({"image": "b.nii.gz", "spacing": [1, 1, 1], "modality": "ct"}, r"training\[1\] has no embedding"),
     ({"image": "a.nii.gz", "id": "x", "modality": "ct"}, r"training\[1\] has no spacing"),
     ({"image": "a.nii.gz", "id": "x", "modality": "ct", "spacing": [1, 1, 1], "label": "m.nii.gz"}, "not 4 times the latent: 16x16x16"),
     ({"image": "a.nii.gz", "modality": "ct", "spacing": [1, 1, 1]}, "the id 'a' is there already"),
     ({"image": "flat.nii.gz", "modality": "ct", "spacing": [1, 1, 1]}, "no embedding")],
)  # fmt: skip
def test_embeddings_that_do_not_fit_leave_nothing_behind(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 4), np.float32), np.eye(4)), tmp_path / "a_emb.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "flat_emb.nii.gz")
    save(labels(0, (16, 16, 12)), tmp_path / "m.nii.gz")
    good = {"image": "a.nii.gz", "spacing": [1, 1, 1], "modality": "ct"}
    with pytest.raises(UsageError, match=message):
        import_latents([write(tmp_path / "list.json", [good, row])], out=tmp_path / "out")
    assert list(tmp_path.glob("out/*")) == []
