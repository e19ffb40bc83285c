"""SEG files, decoded bit by bit from the standard's tables, hold the label map; segments say what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from maisi_cli.anatomy import Label, maisi
from maisi_cli.errors import UsageError
from maisi_cli.volumes import Mask, Sample
from maisi_dicom.codes import SCHEME, SITES, TYPES, concept
from maisi_dicom.formats import save_dicom, save_rtstruct
from pydicom.sr._concepts_dict import concepts as dictionary


def decode(path: Path, mask: Mask) -> np.ndarray:
    """Return the label map of a SEG file on the grid of `mask`: bits, positions and numbers are read here, not by highdicom."""
    file = pydicom.dcmread(path)
    assert (file.BitsAllocated, file.SegmentationType, file.SOPClassUID.name) == (1, "BINARY", "Segmentation Storage")
    bits = np.unpackbits(np.frombuffer(file.PixelData, np.uint8), bitorder="little")
    frames = bits[: file.NumberOfFrames * file.Rows * file.Columns].reshape(-1, file.Rows, file.Columns)
    ids = {int(each.SegmentNumber): int(each.SegmentDescription.removeprefix("MAISI label ")) for each in file.SegmentSequence}
    common = file.SharedFunctionalGroupsSequence[0]
    orientation = np.array(common.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    row_spacing, column_spacing = common.PixelMeasuresSequence[0].PixelSpacing
    to_voxel = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ np.array(mask.geometry.affine))
    made = np.zeros(mask.geometry.size, dtype=np.uint8)
    for frame, groups in zip(frames, file.PerFrameFunctionalGroupsSequence, strict=True):
        rows, columns = np.nonzero(frame)
        position = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        world = position + np.outer(columns * column_spacing, orientation[:3]) + np.outer(rows * row_spacing, orientation[3:])
        voxels = world @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        assert np.abs(voxels - np.rint(voxels)).max(initial=0) < 1e-3
        where = tuple(np.rint(voxels).astype(int).T)
        assert not made[where].any()
        made[where] = ids[int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)]
    return made


def test_the_segments_are_the_labels(sample: Sample, tmp_path: Path) -> None:
    assert sample.mask is not None
    assert len(sample.mask.ids()) > 20
    assert np.array_equal(decode(save_dicom(sample, tmp_path)["seg"], sample.mask), sample.mask.array)


def test_a_mask_alone_lies_in_a_frame_of_its_own(phantoms: Any, tmp_path: Path) -> None:
    mask = phantoms.make(phantoms.grids["oblique"]).mask
    made = save_dicom(Sample(index=0, seed=0, id="m", image=None, mask=mask), tmp_path)
    assert list(made) == ["seg"]
    assert [path.name for path in tmp_path.iterdir()] == ["m_seg.dcm"]
    assert np.array_equal(decode(made["seg"], mask), mask.array)
    file = pydicom.dcmread(made["seg"])
    assert "ReferencedSeriesSequence" not in file
    assert not any(each.tag == pydicom.tag.Tag("ReferencedSOPInstanceUID") for each in file.iterall())


def test_segments_have_names_colours_and_codes(phantoms: Any, tmp_path: Path) -> None:
    array = np.zeros((8, 8, 4), dtype=np.uint8)
    for place, id in enumerate((1, 8, 26, 116, 200, 201)):
        array[place, 2:6, 1:3] = id
    mask = Mask(array=array, geometry=phantoms.grid((8, 8, 4), (2.0, 2.0, 3.0)))
    file = pydicom.dcmread(save_dicom(Sample(index=0, seed=0, id="m", image=None, mask=mask), tmp_path)["seg"])
    rows = [
        (each.SegmentLabel, each.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning, kind.CodeValue, kind.CodingSchemeDesignator,
         [side.CodeMeaning for side in kind.get("SegmentedPropertyTypeModifierCodeSequence", [])],
         [site.CodeMeaning for site in each.get("AnatomicRegionSequence", [])])
        for each in file.SegmentSequence for kind in each.SegmentedPropertyTypeCodeSequence
    ]  # fmt: skip
    assert rows == [
        ("liver", "Anatomical Structure", "10200004", "SCT", [], []),
        ("right adrenal gland", "Anatomical Structure", "23451007", "SCT", ["Right"], []),
        ("hepatic tumor", "Morphologically Abnormal Structure", "108369006", "SCT", [], ["Liver"]),
        ("left kidney cyst", "Morphologically Abnormal Structure", "367643001", "SCT", ["Left"], ["Kidney"]),
        ("body", "Anatomical Structure", "200", SCHEME, [], []),
        ("label 201", "Anatomical Structure", "201", SCHEME, [], []),
    ]
    assert [each.CodingSchemeDesignator for each in file.CodingSchemeIdentificationSequence] == [SCHEME]
    liver = maisi().get(1)
    assert liver is not None
    lightness, a, b = (np.array(file.SegmentSequence[0].RecommendedDisplayCIELabValue) / 65535 * (100, 255, 255)) - (0, 128, 128)
    assert np.abs(np.array(lab_to_rgb(lightness, a, b)) - liver.color).max() < 3
    for each in file.SegmentSequence:
        assert each.SegmentAlgorithmType == "AUTOMATIC"
    assert (file.SyntheticData, file.ContentLabel, file.ImageType[0]) == ("YES", "SYNTHETIC", "DERIVED")
    assert "SYNTHETIC" in file.SeriesDescription


def lab_to_rgb(lightness: float, a: float, b: float) -> list[float]:
    """CIE 1976 L*a*b* (D65 or D50: the tolerance of the test holds both apart from a wrong channel) to sRGB."""
    y = (lightness + 16) / 116
    x, z = y + a / 500, y - b / 200
    white = np.array([0.95047, 1.0, 1.08883])
    xyz = white * [t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29) for t in (x, y, z)]
    matrix = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
    linear = np.clip(matrix @ xyz, 0, 1)
    return [float(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in linear]


def test_codes_are_those_of_the_standard() -> None:
    listed = {(code, meaning) for meanings in dictionary["SCT"].values() for code, (meaning, _) in meanings.items()}
    assert set(TYPES.values()) | set(SITES.values()) <= listed


@pytest.mark.parametrize("label", maisi().labels, ids=lambda label: label.name)
def test_every_label_has_a_code_that_its_name_bears_out(label: Label) -> None:
    made = concept(label)
    if made.type.scheme_designator == SCHEME:
        assert (made.type.value, made.type.meaning) == (str(label.id), label.name)
    elif made.site is None:
        words = made.type.meaning.casefold().split()
        synonyms = {"vena": "vein", "clavicula": "clavicle", "brachiocephalic": "innominate", "trunk": "artery", "cartilages": "cartilage",
                    "bowel": "intestine", "vertebrae": "vertebra", "atrial": "auricular", "gland": "", "superior": "superior"}  # fmt: skip
        name = {synonyms.get(word, word) for word in label.name.casefold().split()}
        assert set(words) & name
        assert not {"left", "right"} & (set(words) - set(label.name.split()))
    spoken = {"left", "right"} & set(f"{made.type.meaning.casefold()} {made.side.meaning.casefold() if made.side else ''}".split())
    if made.type.scheme_designator != SCHEME and label.side:
        assert spoken == {label.side}


def test_masks_that_cannot_be_written_are_refused(phantoms: Any, tmp_path: Path) -> None:
    geometry = phantoms.grid((4, 4, 4), (2.0, 2.0, 2.0))
    empty = Mask(array=np.zeros((4, 4, 4), np.uint8), geometry=geometry)
    other = Mask(array=np.ones((4, 4, 4), np.uint8), geometry=geometry, vocabulary="totalsegmentator")
    for save in (save_dicom, save_rtstruct):
        for mask, words in ((empty, "empty"), (other, "labels of totalsegmentator")):
            with pytest.raises(UsageError, match=words):
                save(Sample(index=0, seed=0, id="m", image=None, mask=mask), tmp_path / "out")
    assert not list(tmp_path.rglob("*.*"))
