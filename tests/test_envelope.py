"""The body envelope: morphology against SciPy's, made-up patients with and without a table, and a real CT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from maisi_cli import phantom
from maisi_cli.anatomy import BODY, remap_table
from maisi_cli.envelope import add_body, close, dilate, erode, largest
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.volumes import Mask, Volume, read_image, read_mask
from scipy import ndimage

SIZE = (48, 48, 24)
GRID = Geometry(size=SIZE, spacing=(3.0, 3.0, 5.0))


def patient(*, table: bool = False, lungs: bool = True, liver: bool = True) -> tuple[Volume, Mask, np.ndarray]:
    """Return a round patient in air, the labels known so far, and where the body is."""
    x, y, _ = np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij")
    body = ((x - 24) / 18) ** 2 + ((y - 28) / 14) ** 2 < 1
    hu = np.where(body, 20.0, -1000.0)
    labels = np.zeros(SIZE, np.uint8)
    lung = (((x - 15) / 6) ** 2 + ((y - 28) / 9) ** 2 < 1) & body
    hu[lung] = -870
    if lungs:
        labels[lung] = 28
    if liver:
        labels[28:36, 22:32, 4:20] = 1
        hu[28:36, 22:32, 4:20] = 60
    if table:  # a shell of plastic filled with foam
        hu[2:46, 2:10] = -1000
        hu[4:44, 3:8] = -300
        hu[5:43, 4:7] = -950
    return Volume(array=hu.astype(np.float32), geometry=GRID), Mask(array=labels, geometry=GRID), body


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    box=st.sampled_from([1, 3, 5, 7]),
    outside=st.booleans(),
)
def test_morphology_is_that_of_scipy(seed, size, box, outside):
    bits = np.random.default_rng(seed).random(size) < 0.8
    cube = np.ones((box, box, box))
    assert np.array_equal(erode(bits, box, outside=outside), ndimage.binary_erosion(bits, cube, border_value=outside))
    assert np.array_equal(dilate(~bits, box, outside=outside), ndimage.binary_dilation(~bits, cube, border_value=outside))


def test_close_fills_gaps_and_keeps_what_touches_the_edge():
    bits = np.zeros((9, 9, 9), bool)
    bits[:4] = bits[5:] = True
    assert close(bits, 3).all()
    bits = np.zeros((9, 9, 9), bool)
    bits[0] = True
    assert np.array_equal(close(bits, 3), bits)


def test_largest_counts_corners_as_touching():
    bits = np.zeros((8, 8, 8), bool)
    bits[0, 0, 0] = bits[1, 1, 1] = bits[2, 2, 2] = True
    bits[5:7, 5, 5] = True
    kept = largest(bits)
    assert kept.sum() == 3
    assert kept[1, 1, 1]
    assert not largest(np.zeros((3, 3, 3), bool)).any()


def test_the_envelope_is_the_body_without_its_labels():
    image, mask, body = patient()
    result = add_body(mask, image)
    assert np.array_equal(result.array[mask.array > 0], mask.array[mask.array > 0])
    assert set(np.unique(result.array)) == {0, 1, 28, BODY}
    found = result.array > 0
    assert 2 * (found & body).sum() / (found.sum() + body.sum()) > 0.99
    assert not found[~ndimage.binary_dilation(body, iterations=2)].any()
    assert mask.array.max() == 28  # the mask that came in is not written to


def test_a_hollow_table_is_not_body():
    image, mask, body = patient(table=True)
    result = add_body(mask, image)
    assert not (result.array[2:46, 2:8] > 0).any()
    found = result.array > 0
    assert 2 * (found & body).sum() / (found.sum() + body.sum()) > 0.99


def on_a_table(*, gap: int, pillars: bool) -> tuple[Volume, Mask, np.ndarray, np.ndarray, np.ndarray]:
    """Return a phantom above a couch of foam in a shell, its labels without 200, and where body, couch and foam are."""
    grid = Geometry(size=(96, 96, 48), spacing=(4.5, 4.5, 6.0))
    truth = phantom.body(grid, 3, regions=("chest", "abdomen"))
    hu = phantom.render(truth, 3).array.astype(np.float32)
    body = truth.array > 0
    top = int(np.flatnonzero(body.any(axis=(0, 2)))[0]) - gap
    couch, foam = np.zeros(grid.size, bool), np.zeros(grid.size, bool)
    couch[12:84, top - 9 : top] = True
    foam[14:82, top - 7 : top - 2] = True
    hu[couch], hu[foam] = -150, -930
    if pillars:  # straps of three voxels from the couch into the back
        strap = np.zeros(grid.size, bool)
        strap[47:50, top : top + gap + 12, 10:40] = True
        couch |= strap & ~body
        hu[strap & ~body] = -150
    labels = np.where(truth.array == BODY, 0, truth.array).astype(np.uint8)
    return Volume(array=hu, geometry=grid), Mask(array=labels, geometry=grid), body, couch, foam


def dice(found: np.ndarray, body: np.ndarray) -> float:
    return float(2 * (found & body).sum() / (found.sum() + body.sum()))


@pytest.mark.parametrize("pillars", [False, True])
def test_a_couch_below_the_patient_is_let_go(pillars):
    image, mask, body, couch, foam = on_a_table(gap=6, pillars=pillars)
    found = add_body(mask, image).array > 0
    assert dice(found, body) > 0.99
    assert not found[couch & ~ndimage.binary_dilation(body, iterations=3)].any()
    if pillars:  # it is the opening that loosens it
        assert (add_body(mask, image, bed=1).array > 0)[couch & ~foam].all()


def test_the_foam_of_a_couch_that_touches_the_patient_is_taken_out():
    image, mask, body, couch, foam = on_a_table(gap=0, pillars=False)
    events = []
    found = add_body(mask, image, on_event=events.append).array > 0
    assert not found[foam].any()
    assert found[couch & ~foam].all()  # its shell is as dense as fat: it stays, as in the reference
    assert "of the envelope for the table" in events[-1].text
    left_in = add_body(mask, image, table_fraction=1.0).array > 0
    assert left_in[foam].all()
    assert dice(left_in, body) < 0.9 < dice(found, body)


@pytest.mark.parametrize(("voxels", "kept"), [(3199, True), (3200, False)])
def test_a_hollow_of_one_twentieth_of_the_envelope_is_a_table(voxels, kept):
    hu = np.full((48, 48, 48), -1000, np.float32)
    hu[4:44, 4:44, 4:44] = 20
    hollow = np.zeros((20, 20, 8), bool)
    hollow.ravel()[:voxels] = True
    hu[14:34, 14:34, 20:28][hollow] = -900
    grid = Geometry(size=hu.shape, spacing=(2, 2, 2))
    found = add_body(Mask(array=np.zeros(hu.shape, np.uint8), geometry=grid), Volume(array=hu, geometry=grid)).array == BODY
    assert found.sum() == 40**3 - (0 if kept else voxels)
    assert found[hu == -900].all() == kept


def test_lungs_without_a_label_are_kept_when_told_so():
    image, mask, body = patient(lungs=False)
    lung = body & (image.array < -800)
    events = []
    assert not (add_body(mask, image, on_event=events.append).array[lung] == BODY).mean() > 0.1
    assert [event.level for event in events] == ["info", "warning"]
    assert "lungs_labelled=False" in events[1].text
    assert (add_body(mask, image, lungs_labelled=False).array[lung] == BODY).all()


def test_a_field_of_view_inside_the_body_is_all_body():
    image = Volume(array=np.full(SIZE, 30, np.int16), geometry=GRID)
    mask = Mask(array=np.zeros(SIZE, np.uint8), geometry=GRID)
    assert (add_body(mask, image).array == BODY).all()


def test_nothing_but_air_has_no_body():
    image = Volume(array=np.full(SIZE, -1000, np.int16), geometry=GRID)
    mask = Mask(array=np.zeros(SIZE, np.uint8), geometry=GRID)
    assert not add_body(mask, image).array.any()


def test_a_real_ct(shared):
    image = read_image(shared("data/ct_torso.nii.gz"))
    mask = read_mask(shared("data/ct_torso_seg.nii.gz"))
    mask = replace(mask, array=np.array(remap_table("totalsegmentator").table(), np.uint8)[mask.array])
    result = add_body(mask, image)
    assert np.array_equal(result.array[mask.array > 0], mask.array[mask.array > 0])
    envelope = result.array == BODY
    assert 0.35 < envelope.mean() < 0.45
    # soft tissue lies inside, but for the table; the air around stays outside
    soft = (image.array > -150) & (image.array < 200)
    assert (result.array > 0)[soft].mean() > 0.99
    air = largest(image.array < -800)
    assert (result.array > 0)[air].mean() < 0.02
    # the body is one piece: the table below it was let go, which the opening loosens
    _, pieces = ndimage.label(result.array > 0, structure=np.ones((3, 3, 3)))
    assert pieces == 1
    assert 2000 < (add_body(mask, image, bed=1).array > 0).sum() - (result.array > 0).sum() < 5000


def test_wrong_use_is_refused():
    image, mask, _ = patient()
    other = replace(mask, geometry=Geometry(size=SIZE, spacing=(3.0, 3.0, 3.0)))
    with pytest.raises(UsageError, match="different grids"):
        add_body(other, image)
    with pytest.raises(UsageError, match="mri-t1"):
        add_body(mask, replace(image, modality="mri-t1"))
    with pytest.raises(UsageError, match="not odd"):
        add_body(mask, image, bed=4)
