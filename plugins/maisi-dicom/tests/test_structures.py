"""Structure sets: contours, filled again by crossing numbers, are the labels they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from maisi_cli.anatomy import maisi
from maisi_cli.volumes import Mask, Sample
from maisi_dicom.contours import outlines
from maisi_dicom.formats import save_rtstruct


def fill(polygons: list[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return which pixel centres lie inside (column, row) polygons: by the even-odd rule, and by winding number."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    crossings, winding = np.zeros(shape, int), np.zeros(shape, int)
    for polygon in polygons:
        for one, other in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            low, high = sorted((one, other), key=lambda point: (point[1], point[0]))
            between = (low[1] <= rows) & (rows < high[1])
            if between.any():
                right = between & (columns < low[0] + (rows - low[1]) * (high[0] - low[0]) / (high[1] - low[1]))
                crossings += right
                winding += right * (1 if one[1] < other[1] else -1)
    return crossings % 2 == 1, winding != 0


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_outlines_part_the_pixels_of_any_plane(mask: np.ndarray) -> None:
    odd, wound = fill(outlines(mask), mask.shape)
    assert np.array_equal(odd, mask)
    assert np.array_equal(wound, mask)


def test_an_outline_and_its_hole_are_one_polygon() -> None:
    ring = np.ones((7, 9), bool)
    ring[2:5, 3:6] = False
    (polygon,) = outlines(ring)
    x, y = polygon.T
    area = (x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    assert abs(area) == pytest.approx((9 * 7 - 0.5) - (3 * 3 - 0.5))  # an eighth of a pixel is cut off at each corner
    assert len(polygon) == 8 + 8 + 2
    assert outlines(np.zeros((3, 3), bool)) == []


def regions(file: pydicom.Dataset, mask: Mask, slices: dict[str, pydicom.Dataset]) -> dict[int, np.ndarray]:
    """Return the mask (X, Y, Z) of each label from its contours, each put on the slice that it refers to."""
    ids = {int(each.ROINumber): int(each.ROIDescription.removeprefix("MAISI label ")) for each in file.StructureSetROISequence}
    to_voxel = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ np.array(mask.geometry.affine))
    made = {}
    for region in file.ROIContourSequence:
        planes: dict[int, list[np.ndarray]] = {}
        for contour in region.ContourSequence:
            assert contour.ContourGeometricType == "CLOSED_PLANAR"
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints
            image = slices[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            orientation = np.array(image.ImageOrientationPatient, dtype=float)
            normal = np.cross(orientation[:3], orientation[3:])
            assert np.abs((points - np.array(image.ImagePositionPatient, dtype=float)) @ normal).max() < 1e-3
            voxels = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
            planes.setdefault(round(float(voxels[0, 2])), []).append(voxels[:, :2])
        filled = np.zeros(mask.geometry.size, bool)
        for plane, polygons in planes.items():
            filled[:, :, plane] = fill(polygons, mask.geometry.size[1::-1])[0].T
        made[ids[int(region.ReferencedROINumber)]] = filled
    return made


def test_contours_filled_again_are_the_labels(sample: Sample, tmp_path: Path) -> None:
    assert sample.mask is not None
    made = save_rtstruct(sample, tmp_path)
    file = pydicom.dcmread(made["rtstruct"])
    slices = {each.SOPInstanceUID: each for each in map(pydicom.dcmread, made["series"].glob("*.dcm"))}
    found = regions(file, sample.mask, slices)
    assert set(found) == set(sample.mask.ids())
    for id, filled in found.items():
        label = sample.mask.array == id
        assert 2 * (filled & label).sum() / (filled.sum() + label.sum()) > 0.999, id

    first = next(iter(slices.values()))
    frame = file.ReferencedFrameOfReferenceSequence[0]
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert (frame.FrameOfReferenceUID, series.SeriesInstanceUID) == (first.FrameOfReferenceUID, first.SeriesInstanceUID)
    assert {each.ReferencedSOPInstanceUID for each in series.ContourImageSequence} == set(slices)
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyDate", "StudyTime", "FrameOfReferenceUID"):
        assert file[keyword].value == first[keyword].value
    assert file.SeriesInstanceUID != first.SeriesInstanceUID
    assert (file.SyntheticData, file.StructureSetLabel, file.Modality) == ("YES", "SYNTHETIC", "RTSTRUCT")
    assert "SYNTHETIC" in file.SeriesDescription
    vocabulary = maisi()
    for region, contours in zip(file.StructureSetROISequence, file.ROIContourSequence, strict=True):
        label = vocabulary.get(vocabulary.id(region.ROIName))
        assert label is not None
        assert tuple(contours.ROIDisplayColor) == label.color


def test_a_long_contour_is_read_back(phantoms: Any, tmp_path: Path) -> None:
    """A plane full of holes is one contour of more than 64 KiB, which explicit VR could not hold."""
    array = np.full((52, 52, 1), 200, dtype=np.uint8)
    array[1:51:2, 1:51:2] = 0
    mask = Mask(array=array, geometry=phantoms.grid((52, 52, 1), (1.1, 0.9, 5.0)))
    made = save_rtstruct(Sample(index=0, seed=0, id="m", image=None, mask=mask), tmp_path)
    assert list(made) == ["rtstruct"]
    file = pydicom.dcmread(made["rtstruct"])
    (contour,) = file.ROIContourSequence[0].ContourSequence
    assert len("\\".join(map(str, contour.ContourData))) > 2**16
    points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
    pixels = points[:, :2] / (1.1, 0.9) * (-1, -1)
    odd, wound = fill([pixels], (52, 52))
    assert np.array_equal(odd.T, array[:, :, 0] > 0)
    assert np.array_equal(wound.T, array[:, :, 0] > 0)
    assert "RTReferencedStudySequence" not in file.ReferencedFrameOfReferenceSequence[0]
