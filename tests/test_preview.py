"""The three-plane picture: which way up, to which scale, in which window, and in which colours."""

from __future__ import annotations

import numpy as np
import pytest
from maisi_cli.anatomy import maisi
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.preview import PLANES, centre, cut, draw, preview, smooth_labels, windows_of
from maisi_cli.volumes import Mask, Volume
from PIL import Image

SIZE = (40, 30, 20)
GRID = Geometry(size=SIZE, spacing=(2.0, 2.0, 4.0))
AXIAL, CORONAL, SAGITTAL = PLANES


def body(*labels: int) -> Mask:
    """Return a body with one block for each label."""
    array = np.zeros(SIZE, np.uint8)
    array[4:36, 4:26, 1:19] = 200
    for number, label in enumerate(labels):
        array[8 + 8 * number : 14 + 8 * number, 10:20, 5:15] = label
    return Mask(array=array, geometry=GRID)


def ct(mask: Mask) -> Volume:
    """Return a CT of that body: fat, organs at 60 HU, air."""
    hu = np.where(mask.array == 0, -1000, np.where(mask.array == 200, -100, 60)).astype(np.float32)
    return Volume(array=hu, geometry=GRID)


def corner(right: bool, anterior: bool, superior: bool) -> np.ndarray:
    """Return a volume that is bright in one octant of the patient."""
    array = np.zeros(SIZE, np.float32)
    octant = tuple(slice(n // 2, None) if high else slice(None, n // 2)
                   for n, high in zip(SIZE, (right, anterior, superior), strict=True))  # fmt: skip
    array[octant] = 1
    return array


@pytest.mark.parametrize(("right", "column"), [(True, 0), (False, 1)])
@pytest.mark.parametrize(("anterior", "row"), [(True, 0), (False, 1)])
def test_axial_is_seen_from_the_feet(right, column, anterior, row):
    shown = cut(corner(right, anterior, True), AXIAL, (0, 0, 15))
    assert shown.shape == (30, 40)
    quadrants = shown.reshape(2, 15, 2, 20).mean((1, 3))
    assert quadrants[row, column] == 1
    assert quadrants.sum() == 1


def test_coronal_and_sagittal_have_the_head_up():
    shown = cut(corner(True, True, True), CORONAL, (0, 20, 0)).reshape(2, 10, 2, 20).mean((1, 3))
    assert shown.tolist() == [[1, 0], [0, 0]]  # right of the patient on the left, superior up
    shown = cut(corner(True, True, True), SAGITTAL, (30, 0, 0)).reshape(2, 10, 2, 15).mean((1, 3))
    assert shown.tolist() == [[1, 0], [0, 0]]  # anterior on the left, superior up


def test_planes_cross_in_the_organs_and_a_tumour_comes_first():
    assert centre(None, body(3)) == (10, 14, 10)  # the block 8..13, 10..19, 5..14; halves round to even
    assert centre(None, body(1, 26)) == (18, 14, 10)
    assert centre(ct(body()), None)[0] == pytest.approx(20, abs=1)
    empty = Mask(array=np.zeros(SIZE, np.uint8), geometry=GRID)
    assert centre(None, empty) == (20, 15, 10)


def test_the_lung_window_is_shown_where_there_are_lungs():
    assert [window.name for window in windows_of(ct(body(3)), body(3))] == ["soft tissue"]
    lungs = body(28)
    names = [(window.name, window.low, window.high) for window in windows_of(ct(lungs), lungs)]
    assert names == [("soft tissue", -160, 240), ("lung", -1000, 200)]
    assert windows_of(None, lungs) == []
    flat = Volume(array=np.zeros(SIZE, np.float32), geometry=GRID, modality="mri")
    (window,) = windows_of(flat, None)
    assert window.high > window.low


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_panels_are_to_scale_in_mm():
    # a bright ball in black is as wide as it is high in every panel, whatever the spacing
    grid = Geometry(size=(60, 60, 30), spacing=(2.0, 2.0, 4.0))
    mm = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(grid.size, grid.spacing, strict=True)]
    x, y, z = np.meshgrid(*mm, indexing="ij")
    ball = np.where(x**2 + y**2 + z**2 < 40**2, 240.0, -160.0).astype(np.float32)
    picture = pixels(draw(Volume(array=ball, geometry=grid), None, title=" "))
    grey = (picture.min(2) > 120) & (np.ptp(picture, axis=2) == 0)
    scale = (1320 - 36 - 20) / 360
    columns = [range(18 + n * 431, 18 + n * 431 + 421) for n in range(3)]
    for span in columns:
        panel = grey[54 + 40 : -60, span.start + 40 : span.stop - 40]
        width, height = np.ptp(np.nonzero(panel.any(0))[0]) + 1, np.ptp(np.nonzero(panel.any(1))[0]) + 1
        assert width == pytest.approx(80 * scale, abs=0.05 * 80 * scale)
        assert height == pytest.approx(80 * scale, abs=0.05 * 80 * scale)


def test_labels_are_drawn_in_their_colours():
    mask = body(1, 3)
    picture = pixels(draw(ct(mask), mask))
    for label in (1, 3):
        colour = np.array(maisi().get(label).color)
        assert (np.abs(picture - colour).max(2) <= 14).sum() > 100, label  # outlines and the legend
    plain = pixels(draw(ct(mask), None))
    assert np.ptp(plain[60:], axis=2).max() <= 8  # grey, but for the blue of the frame


@pytest.mark.parametrize("size", [(40, 30), (131, 97), (13, 11)])
def test_smooth_labels_keep_area_and_invent_nothing(size):
    labels = np.zeros((30, 40), np.uint8)
    labels[5:25, 5:20] = 7
    labels[5:25, 20:35] = 9
    shown = smooth_labels(labels, size)
    assert shown.shape == size[::-1]
    assert set(np.unique(shown)) == {0, 7, 9}
    for label in (7, 9):
        assert (shown == label).mean() == pytest.approx((labels == label).mean(), abs=0.06)
    if size == (40, 30):
        assert np.array_equal(shown, labels)


@pytest.mark.parametrize("size", [(8, 8, 300), (300, 8, 8), (64, 64, 1), (2, 2, 2)])
def test_any_shape_gives_a_picture_wide_enough(size):
    geometry = Geometry(size=size, spacing=(1.0, 1.0, 1.0))
    rng = np.random.default_rng(0)
    image = Volume(array=rng.normal(0, 100, size).astype(np.float32), geometry=geometry)
    mask = Mask(array=rng.integers(0, 6, size).astype(np.uint8), geometry=geometry)
    for picture in (draw(image, mask), draw(image, None), draw(None, mask)):
        assert picture.width >= 900
        assert picture.height < 2600


def test_the_file_is_a_png_that_is_not_overwritten(tmp_path):
    path = preview(ct(body(1)), body(1), tmp_path / "a" / "p.png", title="case7")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 900
    first = path.read_bytes()
    with pytest.raises(UsageError, match="--force"):
        preview(None, body(1), path)
    preview(ct(body(1)), body(1), path, title="case7", force=True)
    assert path.read_bytes() == first
    with pytest.raises(ValueError, match="image or a mask"):
        draw(None, None)


def test_nothing_is_cut_off_at_the_right_however_narrow_the_picture():
    geometry = Geometry(size=(12, 12, 60), spacing=(2.0, 2.0, 10.0))
    array = np.repeat(np.arange(1, 61, dtype=np.uint8), 144).reshape(60, 12, 12).transpose(1, 2, 0)
    mask = Mask(array=np.ascontiguousarray(array), geometry=geometry)
    picture = pixels(draw(None, mask, title="a title that is far too long for a picture of this width " * 3))
    assert (picture[:, -16:] == picture[0, 0]).all()


def test_lungs_are_cut_through_the_larger_lung():
    mask = body(28, 28, 32)  # two blocks of left lung, one of right lung
    _, window = windows_of(ct(mask), mask)
    assert window.through == (14, 14, 10)
