"""Series are read back by ITK and GDCM with the values and the affine of the NIfTI files; tags are those of a real CT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.volumes import Sample, Volume, save_nifti
from maisi_dicom.formats import save_ct, save_dicom
from maisi_dicom.planes import planes_of, stack
from pydicom.uid import CTImageStorage, MRImageStorage

SAME = ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns", "BitsAllocated", "SamplesPerPixel",
        "PhotometricInterpretation", "Modality", "PatientPosition", "RescaleSlope", "RescaleType")  # fmt: skip
"""What a CT of ours and the scanner's have in common."""


def read_with_itk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return array (i, j, k) and RAS affine of a series as GDCM sorts and places it."""
    reader = SimpleITK.ImageSeriesReader()
    (series,) = reader.GetGDCMSeriesIDs(str(folder))
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).T, np.diag([-1, -1, 1, 1]) @ affine


def closest_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
    return np.asarray(image.dataobj), image.affine


def slices_of(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"))]


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "AIL"])
def test_itk_reads_what_nibabel_reads(sample: Sample, axcodes: str, tmp_path: Path) -> None:
    assert sample.image is not None
    sample = replace(sample, mask=None, image=replace(sample.image, geometry=replace(sample.image.geometry, axcodes=axcodes)))
    nifti = nibabel.load(save_nifti(sample, tmp_path)["image"])
    wanted, where = closest_ras(np.asarray(nifti.dataobj), nifti.affine)
    found, there = closest_ras(*read_with_itk(save_dicom(sample, tmp_path)["series"]))
    assert np.array_equal(found, wanted)
    assert found.min() == -1000
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in wanted.shape])).reshape(3, -1).T
    assert np.allclose(nibabel.affines.apply_affine(there, corners), nibabel.affines.apply_affine(where, corners), atol=1e-3)


def test_slices_lie_and_look_as_radiology_has_them(phantoms: Any, tmp_path: Path) -> None:
    """Columns run to the patient's left, rows to the back, slices up: by hand for one voxel."""
    array = np.full((4, 3, 2), -1000, dtype=np.int16)
    array[0, 2, 1] = 700  # leftmost, most anterior, upper; a RAS grid of 10x20x30 mm from the origin
    image = Volume(array=array, geometry=phantoms.grid((4, 3, 2), (10.0, 20.0, 30.0)))
    made = save_ct(Sample(index=0, seed=0, id="one", image=image, mask=None), tmp_path)["series"]
    low, high = slices_of(made)
    assert (low.Rows, low.Columns, list(low.PixelSpacing)) == (3, 4, [20, 10])
    assert list(low.ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]
    assert (list(low.ImagePositionPatient), list(high.ImagePositionPatient)) == ([-30, -40, 0], [-30, -40, 30])
    assert (low.pixel_array == -1000).all()
    assert list(map(int, np.argwhere(high.pixel_array == 700)[0])) == [0, 3]
    assert (high.SliceThickness, high.SpacingBetweenSlices) == (30, 30)


angles = st.tuples(*[st.floats(-0.5, 0.5)] * 3)
spacings = st.tuples(*[st.floats(0.3, 9)] * 3)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(angles, spacings, st.integers(0, 2**32))
def test_every_voxel_stays_where_it_is(phantoms: Any, about: tuple[float, ...], spacing: tuple[float, ...], seed: int) -> None:
    geometry = phantoms.grid((5, 6, 7), spacing, phantoms.oblique(spacing, about=about))
    planes = planes_of(geometry)
    tags = np.random.default_rng(seed).permutation(5 * 6 * 7).reshape(5, 6, 7)
    stacked = stack(tags)
    for plane in range(7):
        rows, columns = np.mgrid[:6, :5]
        world = planes.points(plane, np.column_stack([columns.ravel(), rows.ravel()])) * (-1, -1, 1)
        voxels = np.stack([np.argwhere(tags == tag)[0] for tag in stacked[plane].ravel()])
        assert np.allclose(world, nibabel.affines.apply_affine(np.array(geometry.affine), voxels), atol=1e-6)


def test_a_slight_shear_is_straightened_and_a_large_one_refused(phantoms: Any, tmp_path: Path) -> None:
    for shear, fine in ((0.001, True), (0.1, False)):
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        affine[0, 1] = shear * 2
        geometry = phantoms.grid((16, 16, 4), (2.0, 2.0, 2.0), affine)
        if fine:
            planes = planes_of(geometry)
            assert abs(planes.along_row @ planes.along_column) < 1e-12
        else:
            with pytest.raises(UsageError, match="sheared"):
                planes_of(geometry)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[1, 2] = 1.0  # gantry tilt: planes are square, and each lies where it lay
    planes = planes_of(phantoms.grid((16, 16, 4), (2.0, 2.0, 2.0), affine))
    assert np.allclose(planes.position(1) - planes.position(0), (0, -1, 2))
    assert planes.slice_spacing == pytest.approx(2.0)


def test_the_files_say_that_they_are_synthetic(phantoms: Any, tmp_path: Path) -> None:
    slices = slices_of(save_ct(phantoms.make(phantoms.grids["plain"], id="c1"), tmp_path)["series"])
    for each in slices:
        assert each.ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert each.SyntheticData == "YES"
        assert each.BurnedInAnnotation == "NO"
        for keyword in ("PatientName", "PatientID", "SeriesDescription", "StudyDescription"):
            assert "SYNTHETIC" in str(each[keyword].value)
        assert "c1" in str(each.PatientName)
        assert "c1" in each.PatientID
        assert each.RescaleType == "HU"
    assert len({each.SOPInstanceUID for each in slices}) == len(slices)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID", "StudyDate", "StudyTime"):
        assert len({str(each[keyword].value) for each in slices}) == 1
    assert [int(each.InstanceNumber) for each in slices] == list(range(1, len(slices) + 1))


def test_names_that_dicom_cannot_hold_are_shortened_and_cleaned(phantoms: Any, tmp_path: Path) -> None:
    made = save_ct(phantoms.make(phantoms.grids["plain"], id="Müller^x=y " + "n" * 90), tmp_path)["series"]
    first = pydicom.dcmread(made / "0001.dcm")
    assert str(first.PatientName).startswith("SYNTHETIC^Müller_x_y nn")
    assert len(first.PatientID.encode()) == 64
    assert first.PatientID.startswith("SYNTHETIC-Müller")


def test_an_mr_is_an_mr(phantoms: Any, tmp_path: Path) -> None:
    sample = replace(phantoms.make(phantoms.grids["plain"], modality="mri-t1"), mask=None)
    assert sample.image is not None
    first = slices_of(save_dicom(sample, tmp_path)["series"])[0]
    assert (first.SOPClassUID, first.Modality) == (MRImageStorage, "MR")
    assert "RescaleType" not in first
    found, _ = read_with_itk(tmp_path / "case_dicom")
    assert np.array_equal(closest_ras(found, np.diag([-1, -1, 1, 1]))[0], np.rint(sample.image.array))
    with pytest.raises(UsageError, match="dicom-ct holds no mri-t1"):
        save_ct(sample, tmp_path / "other")


def test_a_real_ct_written_again_has_the_scanners_geometry(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """The planes of 20 real slices, read with pydicom, go through a RAS volume and come back tag by tag."""
    real = sorted((pydicom.dcmread(path) for path in shared("data/ct_dicom").glob("*.dcm")), key=lambda each: each.ImagePositionPatient[2])
    hu = np.stack([each.pixel_array.astype(np.int16) + np.int16(each.RescaleIntercept) for each in real])
    row, column = real[0].PixelSpacing
    step = real[1].ImagePositionPatient[2] - real[0].ImagePositionPatient[2]
    x, y, z = real[0].ImagePositionPatient
    columns, rows = real[0].Columns, real[0].Rows
    affine = np.diag([column, row, step, 1.0])
    affine[:3, 3] = -(x + column * (columns - 1)), -(y + row * (rows - 1)), z
    geometry = Geometry(size=(columns, rows, len(real)), spacing=(column, row, step), affine_rows=tuple(map(tuple, affine.tolist())))
    image = Volume(array=np.ascontiguousarray(hu.transpose(2, 1, 0)[::-1, ::-1]), geometry=geometry)
    made = slices_of(save_ct(Sample(index=0, seed=0, id="real", image=image, mask=None), tmp_path)["series"])
    assert len(made) == 20
    for ours, theirs, plane in zip(made, real, hu, strict=True):
        for keyword in SAME:
            assert ours[keyword].value == theirs[keyword].value, keyword
        assert np.array_equal(ours.pixel_array * ours.RescaleSlope + ours.RescaleIntercept, plane)
        assert ours.SOPClassUID == CTImageStorage
    only_here = {"SyntheticData", "PatientComments", "DerivationDescription", "BurnedInAnnotation", "LossyImageCompression",
                 "InstanceCreationDate", "InstanceCreationTime", "Laterality", "SpacingBetweenSlices", "PixelData"}  # fmt: skip
    assert {each.keyword for each in made[0]} - {each.keyword for each in real[0]} <= only_here
    for each in made[0]:
        if each.keyword in real[0] and each.keyword != "PixelData":  # theirs is compressed
            assert each.VR == real[0][each.keyword].VR
