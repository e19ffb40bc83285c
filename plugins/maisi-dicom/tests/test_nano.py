"""What the bundled networks make, written as DICOM and read back by highdicom, pydicom and GDCM against the NIfTI files."""

from __future__ import annotations

from pathlib import Path

import highdicom
import maisi_dicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from maisi_cli import synthesis
from maisi_cli.plugins import load
from maisi_cli.volumes import Sample


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """One pair of nano-ct, in NIfTI and in every DICOM format."""
    folder = tmp_path_factory.mktemp("nano")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAISI_HOME", str(folder / "home"))
        patch.setenv("MAISI_CONFIG", str(folder / "none.toml"))
        loaded = load("", extra={"dicom": maisi_dicom})
        for module in ("synthesis", "plugins"):
            patch.setattr(f"maisi_cli.{module}.plugins", lambda: loaded)
        (sample,) = synthesis.generate(
            model="nano-ct", preset="abdomen", size="48x32x32", spacing="6x8x7", seed=5, steps=2, on_qc_fail="keep", preview=False,
            out=str(folder / "run"), name="s", format="nifti,dicom,rtstruct",
        )  # fmt: skip
    return sample


def lps(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the array of a NIfTI file, and its affine to DICOM's patient coordinates."""
    image = nibabel.load(path)
    return np.asarray(image.dataobj), np.diag([-1.0, -1, 1, 1]) @ image.affine


def indices(world: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return the voxels at patient coordinates of shape (..., 3), which must lie on the grid."""
    found = (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    assert np.abs(found - np.rint(found)).max() < 1e-3
    return np.rint(found).astype(int)


def test_the_series_has_the_hu_of_the_nifti_file_where_they_are(made: Sample) -> None:
    hu, affine = lps(made.paths["image"])
    assert hu.std() > 100
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(made.paths["series"])))
    series = reader.Execute()
    assert sorted(series.GetSize()) == sorted(hu.shape)
    pixels = SimpleITK.GetArrayFromImage(series).T
    direction = np.array(series.GetDirection()).reshape(3, 3) * series.GetSpacing()
    world = np.stack(np.indices(pixels.shape), axis=-1) @ direction.T + series.GetOrigin()
    np.testing.assert_array_equal(hu[tuple(np.moveaxis(indices(world, affine), -1, 0))], pixels)


def test_the_segmentation_has_the_labels_of_the_nifti_file(made: Sample) -> None:
    labels, affine = lps(made.paths["label"])
    file = highdicom.seg.segread(made.paths["seg"])
    volume = file.get_volume(combine_segments=True)
    ids = np.array([0, *(int(each.SegmentDescription.removeprefix("MAISI label ")) for each in file.SegmentSequence)])
    assert set(ids) == set(np.unique(labels))
    world = np.stack(np.indices(volume.spatial_shape), axis=-1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    found = np.zeros_like(labels)
    found[tuple(np.moveaxis(indices(world, affine), -1, 0))] = ids[volume.array]
    np.testing.assert_array_equal(found, labels)
    series = {pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in made.paths["series"].iterdir()}
    assert {str(uid) for _, _, uid in file.get_source_image_uids()} <= series


def inside(polygon: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which points lie in a polygon of (x, y): those from which a ray crosses it an odd number of times."""
    one, other = polygon, np.roll(polygon, -1, axis=0)
    crosses = (one[:, 1] <= y[:, None]) != (other[:, 1] <= y[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        at = one[:, 0] + (y[:, None] - one[:, 1]) * (other[:, 0] - one[:, 0]) / (other[:, 1] - one[:, 1])
    return np.asarray((crosses & (x[:, None] < at)).sum(axis=1) % 2 == 1)


@pytest.mark.parametrize("id", [1, 3, 200])
def test_contours_go_around_the_voxels_of_a_label(id: int, made: Sample) -> None:
    labels, affine = lps(made.paths["label"])
    file = pydicom.dcmread(made.paths["rtstruct"])
    numbers = {each.ROIDescription: each.ROINumber for each in file.StructureSetROISequence}
    (region,) = (each for each in file.ROIContourSequence if each.ReferencedROINumber == numbers[f"MAISI label {id}"])
    found = np.zeros(labels.shape, bool)
    x, y = (axis.ravel() for axis in np.indices(labels.shape[:2]))
    for contour in region.ContourSequence:
        points = (np.reshape(contour.ContourData, (-1, 3)).astype(float) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
        (plane,) = set(np.rint(points[:, 2]).astype(int))
        assert np.abs(points[:, 2] - plane).max() < 1e-3
        found[:, :, plane] ^= inside(points[:, :2], x, y).reshape(labels.shape[:2])
    assert (labels == id).sum() > 50
    np.testing.assert_array_equal(found, labels == id)
