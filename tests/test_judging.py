"""Cases on disk: which files of a folder belong together, and what `maisi qc` makes of them, in JSON, CSV and HTML."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest
from maisi_cli.anatomy import maisi as vocabulary
from maisi_cli.anatomy import remap_table
from maisi_cli.cases import Case, find_cases
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.judging import Terms, judge, judge_all
from maisi_cli.volumes import Mask, Volume, read_image, read_mask, write_image, write_mask

from .shell import Done, qc_of

GRID = Geometry(size=(12, 12, 12), spacing=(17, 17, 17))
LABELS = np.full(GRID.size, 200, np.uint8)
LABELS[0] = 0
LABELS[3:9, 3:9, 3:9] = 1
HU = np.where(LABELS == 1, 60, np.where(LABELS == 0, -1000, 20)).astype(np.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def maisi(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    return qc_of(capsys)


def image(name: str, array: np.ndarray = HU) -> None:
    write_image(Volume(array=array, geometry=GRID), name)


def label(name: str, array: np.ndarray = LABELS) -> None:
    write_mask(Mask(array=array, geometry=GRID), name)


def pairs(*paths: str, label_dir: str | None = None) -> list[tuple[str, str | None, str | None]]:
    cases = find_cases([Path(path) for path in paths], label_dir=Path(label_dir) if label_dir else None)
    return [(case.id, *(each.as_posix() if each else None for each in (case.image, case.label))) for case in cases]


# --- what belongs together -----------------------------------------------------------------------


def test_names_pair_images_and_label_maps() -> None:
    for name in ("a_image", "b_ct", "c", "d", "lone_image"):
        image(f"f/{name}.nii.gz")
    for name in ("a_label", "b_seg", "c_mask", "d_segmentation", "alone_label"):
        label(f"f/{name}.nii.gz")
    (Path("f") / ".hidden").mkdir()
    image("f/.hidden/x.nii.gz")
    assert pairs("f") == [
        ("a", "f/a_image.nii.gz", "f/a_label.nii.gz"), ("alone", None, "f/alone_label.nii.gz"), ("b", "f/b_ct.nii.gz", "f/b_seg.nii.gz"),
        ("c", "f/c.nii.gz", "f/c_mask.nii.gz"), ("d", "f/d.nii.gz", "f/d_segmentation.nii.gz"), ("lone", "f/lone_image.nii.gz", None),
    ]  # fmt: skip
    assert pairs("f/b_ct.nii.gz") == pairs("f/b_seg.nii.gz") == [("b", "f/b_ct.nii.gz", "f/b_seg.nii.gz")]


def test_nnunet_folders() -> None:
    for name in ("liver_1_0000", "liver_2_0000", "liver_2_0001"):
        image(f"Dataset/imagesTr/{name}.nii.gz")
    label("Dataset/labelsTr/liver_1.nii.gz")
    label("Dataset/labelsTr/liver_2.nii.gz")
    image("Dataset/imagesTs/liver_3_0000.nii.gz")
    both = [(f"liver_{k}", f"Dataset/imagesTr/liver_{k}_0000.nii.gz", f"Dataset/labelsTr/liver_{k}.nii.gz") for k in (1, 2)]
    assert pairs("Dataset") == [*both, ("liver_3", "Dataset/imagesTs/liver_3_0000.nii.gz", None)]
    assert pairs("Dataset/imagesTr") == both
    assert pairs("Dataset/labelsTr/liver_1.nii.gz") == both[:1]


def test_totalsegmentator_folders() -> None:
    image("data/s0001/ct.nii.gz")
    label("data/s0001/segmentations.nii.gz")
    image("data/s0002/ct.nii.gz")
    label("data/s0002/segmentations/liver.nii.gz", (LABELS == 1).astype(np.uint8))
    label("data/s0002/segmentations/spleen.nii.gz", np.zeros_like(LABELS))
    assert pairs("data") == [
        ("s0001", "data/s0001/ct.nii.gz", "data/s0001/segmentations.nii.gz"), ("s0002", "data/s0002/ct.nii.gz", "data/s0002/segmentations"),
    ]  # fmt: skip
    (case,) = find_cases([Path("data/s0002")])
    found = judge(case, Terms())
    liver = next(each for each in found.verdict.findings if each.check == "hu-median")
    assert (liver.label, liver.value) == ("liver", 60)


def test_a_folder_of_label_maps_apart() -> None:
    image("scans/a.nii.gz")
    image("scans/sub/b.nii.gz")
    image("scans/c_0000.nii.gz")
    label("maps/a.nii.gz")
    label("maps/sub/b_seg.nii.gz")
    label("maps/c.nii.gz")
    found = pairs("scans", label_dir="maps")
    assert {row[0]: row[2] for row in found} == {"a": "maps/a.nii.gz", "b": "maps/sub/b_seg.nii.gz", "c": "maps/c.nii.gz"}
    assert pairs("scans/a.nii.gz", label_dir="maps") == [("a", "scans/a.nii.gz", "maps/a.nii.gz")]


def test_cases_of_one_name_are_told_apart_by_their_folder() -> None:
    for name in ("one/a", "two/a"):
        image(f"{name}_image.nii.gz")
    assert [row[0] for row in pairs("one", "two", "one/a_image.nii.gz")] == ["one/a", "two/a"]


# --- what is said of them -------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_fails_and_the_others_go_on(maisi: Callable[[str], Done]) -> None:
    image("f/a_image.nii.gz")
    label("f/a_label.nii.gz")
    Path("f/b_image.nii.gz").write_bytes(b"no image")
    image("f/c_image.nii.gz")
    nibabel.save(nibabel.Nifti1Image(LABELS * 0.5, GRID.affine), "f/c_label.nii.gz")
    done = maisi("f --json")
    assert done.code == 1
    cases = {case["id"]: case for case in done.json["cases"]}
    assert [cases[name]["passed"] for name in "abc"] == [True, False, False]
    assert [finding["check"] for finding in cases["b"]["findings"]] == ["readable"]
    assert "not a NIfTI file" in cases["b"]["findings"][0]["text"]
    assert "not whole" in cases["c"]["findings"][0]["text"]
    named = maisi("f/b_image.nii.gz")
    assert (named.code, named.out) == (2, "")


def test_labels_stored_as_floats_are_found(maisi: Callable[[str], Done]) -> None:
    image("a_image.nii.gz")
    nibabel.save(nibabel.Nifti1Image(LABELS.astype(np.float32), read_image("a_image.nii.gz").geometry.affine), "a_label.nii.gz")
    done = maisi("a_image.nii.gz")
    assert (done.code, done.out) == (1, "FAIL  a\n      labels are stored as float32: save them as uint8\n")


def test_csv_and_json_tell_the_same(maisi: Callable[[str], Done]) -> None:
    image("a_image.nii.gz", HU + 200)
    label("a_label.nii.gz")
    done = maisi("a_image.nii.gz --json --csv qc.csv")
    rows = list(csv.DictReader(Path("qc.csv").read_text().splitlines()))
    (case,) = done.json["cases"]
    assert [(row["check"], row["label"], row["passed"], row["text"]) for row in rows] == [
        (each["check"], each["label"] or "", str(each["passed"]).lower(), each["text"]) for each in case["findings"]
    ]
    liver = next(row for row in rows if row["label"] == "liver" and row["check"] == "hu-median")
    assert (float(liver["value"]), liver["passed"]) == (260.0, "false")
    assert maisi("a_image.nii.gz --csv qc.csv").code == 2
    assert maisi("a_image.nii.gz --csv qc.csv --force").code == 1


class Page(HTMLParser):
    """The tags and the texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def test_the_page_is_one_file_with_every_case(maisi: Callable[[str], Done]) -> None:
    image("f/a_image.nii.gz")
    label("f/a_label.nii.gz")
    image("f/<b>_image.nii.gz", HU + 200)
    label("f/<b>_label.nii.gz")
    assert maisi("f --html page.html").code == 1
    text = Path("page.html").read_text("utf-8")
    page = Page(text)
    pictures = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 2
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing from outside
    assert "prefers-color-scheme: dark" in text
    assert "1 of 2 cases passed" in page.text
    assert "<b>" in page.text  # a name is text
    assert "median 260.0 HU in the liver" in page.text
    assert [attrs["class"] for tag, attrs in page.tags if tag == "section"] == ["case failed", "case passed"]


def test_the_record_says_what_was_asked_for_and_how_it_was_decoded(maisi: Callable[[str], Done]) -> None:
    image("a_image.nii.gz")
    small = LABELS.copy()
    small[3:9, 3:9, 3:9] = 200
    small[3:7, 3:7, 3:7] = 1
    label("a_label.nii.gz", small)  # a liver of 314 ml
    assert maisi("a_image.nii.gz --checks organ-volumes").code == 1
    record = {"schema": "maisi.record/1", "id": "a", "seed": 1, "modality": "ct", "model": {}, "outputs": {},
              "mask": {"source": "diffusion"}, "settings": {"anatomy_size": {"value": ["liver=0.0"], "origin": "flag"}}}  # fmt: skip
    Path("a_record.json").write_text(json.dumps(record))
    assert maisi("a_image.nii.gz --checks organ-volumes,labels-known").code == 0
    record["settings"] = {}
    record["mask"] = {"source": "file"}
    Path("a_record.json").write_text(json.dumps(record))
    told = maisi("a_image.nii.gz --checks organ-volumes --json")
    assert told.code == 0
    assert told.json["cases"][0]["findings"][0]["informative"] is True
    record["modality"] = "mri-t1"
    Path("a_record.json").write_text(json.dumps(record))
    assert "mr-background" in {each["check"] for each in maisi("a_image.nii.gz --json").json["cases"][0]["findings"]}


def test_processes_say_the_same_in_the_same_order() -> None:
    for k in range(4):
        image(f"{k}_image.nii.gz", HU + 100 * k)
        label(f"{k}_label.nii.gz")
    cases = find_cases([Path()])
    alone, many = (list(judge_all(cases, Terms(), jobs=jobs)) for jobs in (1, 2))
    assert [one.as_dict() for one in alone] == [one.as_dict() for one in many]
    assert [one.case.id for one in many] == ["0", "1", "2", "3"]


def test_a_typed_file_that_cannot_be_read_is_an_error() -> None:
    Path("x.nii.gz").write_bytes(b"no")
    with pytest.raises(UsageError):
        judge(Case(id="x", image=Path("x.nii.gz"), label=None, typed=Path("x.nii.gz")), Terms())


# --- a real patient, and what is done to it --------------------------------------------------------


@pytest.fixture
def patient(shared: Callable[[str], Path]) -> tuple[Volume, Mask]:
    mask = read_mask(shared("data/ct_torso_seg.nii.gz"))
    table = np.array(remap_table("totalsegmentator").table(), np.uint8)
    return read_image(shared("data/ct_torso.nii.gz")), replace(mask, array=table[mask.array])


def flipped(image: Volume, mask: Mask) -> tuple[Volume, Mask]:
    return replace(image, array=image.array[::-1].copy()), replace(mask, array=mask.array[::-1].copy())


def shifted(image: Volume, mask: Mask) -> tuple[Volume, Mask]:
    return replace(image, array=image.array + 200), mask


def removed(image: Volume, mask: Mask) -> tuple[Volume, Mask]:
    return image, replace(mask, array=np.where(mask.array == vocabulary().id("spleen"), 0, mask.array).astype(np.uint8))


def seamed(image: Volume, mask: Mask) -> tuple[Volume, Mask]:
    array = image.array.copy()
    array[:, :, 64:] += 30
    return replace(image, array=array), mask


def untouched(image: Volume, mask: Mask) -> tuple[Volume, Mask]:
    return image, mask


@pytest.mark.parametrize(("change", "check", "says"), [
    (untouched, None, ""), (flipped, "laterality", "18 of 18 pairs have their sides exchanged"),
    (shifted, "hu-median", "HU in the liver, outside"),
    (removed, "organs-expected", "no spleen, although"), (seamed, "seam", "across a plane of z (between voxels 63 and 64)"),
])  # fmt: skip
def test_what_is_done_to_a_real_patient_is_caught_by_the_right_check(
    change: Callable[[Volume, Mask], tuple[Volume, Mask]], check: str | None, says: str, patient: tuple[Volume, Mask],
    maisi: Callable[[str], Done],
) -> None:  # fmt: skip
    scan, mask = change(*patient)
    write_image(scan, "p_image.nii.gz")
    write_mask(mask, "p_label.nii.gz")
    done = maisi("p_image.nii.gz --json")
    failed = [each for each in done.json["cases"][0]["findings"] if not each["passed"]]
    assert {each["check"] for each in failed} == ({check} if check else set())
    assert done.code == (1 if check else 0)
    assert any(says in each["text"] for each in failed) or not check


def test_a_real_patient_passes_as_it_is_stored(shared: Callable[[str], Path], maisi: Callable[[str], Done]) -> None:
    done = maisi(f"{shared('data/ct_torso.nii.gz')} --labels totalsegmentator")
    assert (done.code, done.out) == (0, "pass  ct_torso\n")
    assert "no label map" not in done.err
