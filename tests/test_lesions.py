"""Lesions: requests, measures, moved ones and new ones; the reference's voxels under compat."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from maisi_cli import lesions
from maisi_cli.anatomy import BODY, maisi
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.lesions import Request, augment, measure, parse_request, place
from maisi_cli.repair import ring_lobe
from maisi_cli.tumors import Lesion, hosts
from maisi_cli.volumes import Mask, read_mask
from scipy import ndimage

usual = profile(max_examples=12, deadline=None)
TUMORS = (23, 24, 26, 27, 128)
GOLDEN = {"m0": None, "m1": 23, "m4": 26, "m5": 24, "m6": 27, "m7": 128}
SPACINGS = st.sampled_from([(1.0, 1.0, 1.0), (1.5, 1.5, 2.0), (0.8, 0.8, 3.0)])
SEEDS = st.integers(0, 2**62)
U8 = np.uint8


def mask(labels: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Mask:
    return Mask(array=labels, geometry=Geometry(size=labels.shape, spacing=spacing))


def ball(shape: tuple[int, int, int], centre: tuple[float, ...], radius_mm: float, spacing: tuple[float, ...] = (1, 1, 1)) -> np.ndarray:
    at = np.indices(shape).T - np.array(centre)
    return (np.linalg.norm(at * np.array(spacing), axis=-1) <= radius_mm).T


def healthy(tumor: int) -> np.ndarray:
    """A body in air with the organs of one tumour, several where it has several, and a bystander that must not change."""
    labels = np.zeros((56, 48, 40), U8)
    labels[3:53, 3:45, 2:38] = BODY
    host = hosts(tumor)[:2]
    labels[8:28, 8:40, 6:34] = host[0]
    labels[28:48, 8:40, 6:34] = host[-1]
    labels[20:24, 4:44, 18:22] = 6  # an aorta through it
    return labels


def ill(tumor: int, pieces: int = 1) -> np.ndarray:
    labels = healthy(tumor)
    for centre, radius in (((34, 24, 20), 5.3), ((14, 16, 28), 2.2), ((44, 35, 10), 1.1))[:pieces]:
        labels[ball(labels.shape, centre, radius) & np.isin(labels, hosts(tumor))] = tumor
    return labels


# --- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tumor", "host", "amount", "unit"),
    [
        ("liver:15mm", 26, (1,), 15, "mm"),
        ("lung:2.5ml", 23, (28, 29, 30, 31, 32), 2.5, "ml"),
        ("hepatic tumor=0.3", 26, (1,), 0.3, "relative"),
        ("Hepatic-Tumor: 1.5 cm", 26, (1,), 15, "mm"),
        ("liver tumor = 20MM", 26, (1,), 20, "mm"),
        ("pancreas=16.5", 24, (4,), 16.5, "relative"),
        ("colon cancer primaries:.5ml", 27, (62,), 0.5, "ml"),
        ("colon tumor:3cc", 27, (62,), 3, "ml"),
        ("bone lesion:8mm", 128, hosts(128), 8, "mm"),
        ("bone=0.2", 128, hosts(128), 0.2, "relative"),
        ("vertebrae L3:9mm", 128, (35,), 9, "mm"),
        ("right lung lower lobe:12mm", 23, (32,), 12, "mm"),
        ("right lung:12mm", 23, (30, 31, 32), 12, "mm"),
        ("left lung:1e1mm", 23, (28, 29), 10, "mm"),
        ("26:15mm", 26, (1,), 15, "mm"),
        ("liver:500mm3", 26, (1,), 0.5, "ml"),
        ("liver:1e+1mm", 26, (1,), 10, "mm"),
        ("spine:9.123456789mm", 128, (*range(33, 57), 97, 127), 9.123456789, "mm"),
    ],
)
def test_a_request_is_read(text, tumor, host, amount, unit):
    assert parse_request(text) == Request(tumor=tumor, hosts=host, amount=amount, unit=unit)
    assert parse_request(str(parse_request(text))) == parse_request(text)  # what is recorded can be asked for again


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("livr:15mm", "did you mean 'liver'"),
        ("hepatic tumr:15mm", "did you mean 'hepatic tumor'"),
        ("spleen:15mm", "has no class for it"),
        ("kidney:15mm", "has no class for it"),
        ("kidney mass:15mm", "has no class for it"),
        ("left kidney cyst:15mm", "has no class for it"),
        ("brain:15mm", "has no class for it"),
        ("3:15mm", "has no class for it"),
        ("999:15mm", "no tumour or organ"),
        ("dummy6:15mm", "no tumour or organ"),
        ("liver", "has no size"),
        ("", "has no size"),
        (":15mm", "has no size"),
        ("liver:15", "has no unit.*liver:15mm"),
        ("liver:0.3", "has no unit.*liver=0.3"),
        ("liver=15", "beyond 6.25.*liver:15mm"),
        ("lung=5.7", "beyond 5.61"),
        ("liver:15in", "'in' .* is no unit"),
        ("liver:big", "is not a size"),
        ("liver:1.2.3mm", "is not a size"),
        ("liver:1,5mm", "is not a size"),
        ("liver:0mm", "no positive size"),
        ("liver=-1", "no positive size.*leave the tumour out"),
        ("liver:nanmm", "is not a size"),
        ("liver:1e999mm", "no positive size"),
        ("liver:201mm", "at most 200 mm"),
        ("liver:5000ml", "at most 4189 ml"),
        ("liver:15mm,lung:5mm", "several tumours"),
        ("liver:15mm + lung:5mm", "several tumours"),
        ("liver, lung:5mm", "several tumours"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_the_way_out(text, says):
    with pytest.raises(UsageError, match=says) as caught:
        parse_request(text)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@given(
    st.one_of(
        st.text(max_size=20),
        st.tuples(
            st.sampled_from(["liver", "lung", "bone", "26", "spleen", "ribs", "Left_Lung"]),
            st.sampled_from([":", "=", " : ", "::", ""]),
            st.floats(allow_nan=True).map(repr),
            st.sampled_from(["", "mm", " cm", "ml", "%", "mm²"]),
        ).map("".join),
    )
)
def test_any_text_is_read_or_refused(text):
    try:
        request = parse_request(text)
    except UsageError:
        return
    assert request.hosts
    assert 0 < request.amount <= 4189
    assert parse_request(str(request)) == request


def test_what_was_made_is_held_against_what_was_asked():
    lesion = Lesion(tumor=26, volume_ml=2.0, diameter_mm=15.0, components=1, host=1, overlap=1.0)
    assert parse_request("liver:12mm").miss(lesion) == pytest.approx(0.25)
    assert parse_request("liver:2.5ml").miss(lesion) == pytest.approx(0.2)
    assert parse_request("liver=0.5").miss(lesion) is None
    nothing = Lesion(tumor=26, volume_ml=0.0, diameter_mm=0.0, components=0, host=None, overlap=0.0)
    assert parse_request("liver:12mm").miss(nothing) == 1
    assert parse_request("liver:12mm").met(lesion)
    assert not parse_request("liver:12mm").met(lesion, tolerance=0.2)
    assert not parse_request("lung:15mm").met(lesion)
    assert parse_request("liver=0.5").met(lesion)
    assert not parse_request("liver=0.5").met(nothing)
    assert parse_request("liver:10mm").volume_ml == pytest.approx(math.pi / 6)
    assert parse_request("liver=0.5").volume_ml is None


# --- measures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 2.0)])
def test_a_ball_measures_what_it_is(spacing):
    labels = np.full((48, 40, 32), 1, U8)
    labels[ball(labels.shape, (24, 20, 16), 10, spacing)] = 26
    lesion = measure(mask(labels, spacing), 26)
    assert lesion.volume_ml == pytest.approx(4 / 3 * math.pi, rel=0.02)
    assert lesion.diameter_mm == pytest.approx(20, rel=0.01)
    assert (lesion.components, lesion.host, lesion.overlap) == (1, 1, 1.0)


def test_the_diameter_is_that_of_the_largest_piece_and_the_volume_of_all():
    labels = np.full((30, 20, 20), 4, U8)
    labels[2:6, 2:6, 2:6] = 24
    labels[12:14, 12:14, 12:14] = 24
    labels[14, 14, 14] = 24  # touches by a corner
    labels[20, 2, 2] = 24
    lesion = measure(mask(labels), 24)
    assert lesion.components == 3
    assert lesion.volume_ml == pytest.approx(0.074)
    assert lesion.diameter_mm == pytest.approx((6 * 64 / math.pi) ** (1 / 3))


def test_the_host_is_what_surrounds_the_lesion_and_the_overlap_how_much_lies_in_it():
    labels = np.full((20, 20, 20), BODY, U8)
    labels[10:] = 32
    labels[6:14, 6:14, 6:14] = 23
    lesion = measure(mask(labels), 23)
    assert lesion.host == 32
    assert lesion.overlap == pytest.approx(0.5, abs=0.05)
    labels[labels == 32] = 1
    assert measure(mask(labels), 23).host == 1  # a lung tumour in the liver says so
    assert measure(mask(labels), 23).overlap == 0
    labels[labels == 1] = BODY
    assert measure(mask(labels), 23).host == BODY
    assert measure(mask(np.full((4, 4, 4), 23, U8)), 23).host is None


@usual
@given(st.integers(0, 999))
def test_the_overlap_is_the_share_whose_nearest_other_voxel_is_host(seed):
    """By the distance transform of the whole volume, ties to either side."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((3, 24, 20, 16)), (0, 2, 2, 2))
    labels = np.where(smooth[0] > 0, U8(1), U8(BODY))
    labels[smooth[1] > 0.05] = 26
    spacing = (1.0, 1.1, 2.3)
    lesion = labels == 26
    to_host, to_other = (ndimage.distance_transform_edt(~(labels == value), sampling=spacing)[lesion] for value in (1, BODY))
    made = measure(mask(labels, spacing), 26).overlap
    assert np.mean(to_host < to_other - 1e-9) - 1e-9 <= made <= np.mean(to_host <= to_other + 1e-9) + 1e-9


def test_a_lesion_that_is_not_there_measures_nothing_and_an_organ_is_refused():
    assert measure(mask(healthy(26)), 26) == Lesion(tumor=26, volume_ml=0.0, diameter_mm=0.0, components=0, host=None, overlap=0.0)
    with pytest.raises(UsageError, match="is no tumour"):
        measure(mask(healthy(26)), 1)


# --- as the reference --------------------------------------------------------------------------------


def check_golden(shared, name, seed):
    labels = read_mask(shared(f"golden/datasets/all_masks_small/{name}.nii.gz")).array
    with np.load(shared("golden/u03_augmentation/arrays.npz")) as arrays:
        wanted = arrays[f"{name}_seed{seed}"]
    before = labels.copy()
    made = augment(labels, seed=seed, compat=True)
    assert np.array_equal(made.labels, wanted)
    assert np.array_equal(labels, before)
    tumor = GOLDEN[name]
    assert made.moved == ((tumor,) if tumor else ())
    assert tumor is None or np.count_nonzero(wanted != labels) > 50
    return made


@pytest.mark.parametrize(("name", "seed", "tries"), [("m0", 0, 0), ("m0", 1, 0), ("m4", 0, 2), ("m6", 0, 2), ("m6", 1, 2),
                                                     ("m7", 0, 5), ("m7", 1, 9)])  # fmt: skip
def test_compat_is_the_reference_voxel_for_voxel(shared, name, seed, tries):
    made = check_golden(shared, name, seed)
    assert made.tries == tries
    if name == "m0":
        assert made.zoom == pytest.approx({0: 1.0043037873274483, 1: 1.0044064898688432}[seed], abs=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed", "tries"), [("m1", 0, 11), ("m1", 1, 10), ("m4", 1, 6), ("m5", 0, 106), ("m5", 1, 55)])
def test_compat_is_the_reference_where_it_tries_often(shared, name, seed, tries):
    assert check_golden(shared, name, seed).tries == tries


def test_compat_ends_where_the_reference_loops_for_ever():
    """Row 54: a lesion that fills most of the volume is never kept."""
    labels = np.full((16, 16, 16), BODY, U8)
    labels[2:5, 2:5, 2:5] = 26  # turned about a far centre it leaves its organ, which is itself
    made = augment(labels, seed=3, max_tries=2, compat=True)
    assert made.tries <= 2
    assert made.stayed == (26,)
    assert np.array_equal(made.labels, labels)


def test_compat_gives_up_on_the_colon_tumour_as_the_reference_does(monkeypatch):
    labels = ill(27)
    monkeypatch.setattr(lesions, "_reference_transform", lambda tumor: _Nowhere())
    made = augment(labels, seed=0, compat=True)
    assert (made.tries, made.moved) == (21, (27,))
    assert ((labels == 27) <= (made.labels == 27)).all()  # as it was, but closed
    bone = augment(ill(128), seed=0, compat=True, max_tries=50)
    assert (bone.tries, bone.stayed) == (50, (128,))


def test_compat_has_a_lobe_for_a_lung_tumour_without_lung_around_it(monkeypatch):
    """Row 54: the reference takes the mode of nothing."""
    labels = np.full((30, 20, 20), BODY, U8)
    labels[19:21, 9:11, 9:11] = 23
    made = augment(labels, seed=0, compat=True, max_tries=1)
    assert (made.tries, made.stayed) == (1, (23,))
    labels[12:16, 4:16, 4:16] = 31
    monkeypatch.setattr(lesions, "_reference_transform", lambda tumor: _Shifted())
    moved = augment(labels, seed=0, compat=True).labels
    assert (moved[19:21, 9:11, 9:11] == 31).all()
    assert np.array_equal(np.argwhere(moved == 23), np.argwhere(labels == 23) - [6, 0, 0])


class _Shifted:
    """A transform that shifts by six voxels along the first axis."""

    def set_random_state(self, seed):
        pass

    def __call__(self, image):
        return image.roll(-6, dims=1)


class _Nowhere:
    """A transform that moves everything out of the volume."""

    def set_random_state(self, seed):
        pass

    def __call__(self, image):
        return image * 0


# --- moved ---------------------------------------------------------------------------------------------


@usual
@given(st.sampled_from(TUMORS), st.integers(1, 3), SEEDS, SPACINGS)
def test_a_moved_tumour_stays_in_its_organ_and_changes_nothing_else(tumor, pieces, seed, spacing):
    labels = ill(tumor, pieces)
    before = labels.copy()
    made = augment(labels, seed=seed, spacing_mm=spacing)
    assert np.array_equal(labels, before)
    lesion, was = made.labels == tumor, labels == tumor
    assert made.moved == (tumor,)
    assert not np.array_equal(lesion, was)
    assert np.isin(labels[lesion], (tumor, *hosts(tumor))).all()
    changed = made.labels != labels
    assert (lesion | was)[changed].all()  # labels elsewhere are the same
    assert np.isin(made.labels[was & ~lesion], hosts(tumor)).all()  # what it left is organ
    assert 0.5 <= lesion.sum() / was.sum() <= 2
    assert 0 < made.tries <= 100 * pieces


@usual
@given(st.sampled_from(TUMORS), SEEDS)
def test_the_same_seed_gives_the_same_mask_and_another_another(tumor, seed):
    """Row 21: the reference moves the tumour alike in each sample of a run."""
    labels = ill(tumor)
    assert np.array_equal(augment(labels, seed=seed).labels, augment(labels, seed=seed).labels)
    assert not np.array_equal(augment(labels, seed=seed).labels, augment(labels, seed=seed + 1).labels)


@pytest.mark.parametrize("tumor", TUMORS)
def test_a_tumour_that_cannot_move_stays_as_it_was(tumor):
    """Row 54, and no lesion is lost: here nothing of its organ is left around it."""
    alone = np.zeros((9, 9, 9), U8)
    alone[4, 4, 4] = tumor
    stuck = augment(alone, seed=0)
    assert (stuck.moved, stuck.stayed, stuck.tries) == ((), (tumor,), 100)
    assert np.array_equal(stuck.labels, alone)


@usual
@given(st.sampled_from(TUMORS), SEEDS, SPACINGS)
def test_a_bar_is_deformed_whole_whichever_way_it_is_turned(tumor, seed, spacing):
    move, mm, bar = lesions._MOVES[tumor], np.array(spacing), np.ones((24, 6, 4), bool)
    padded = np.pad(bar, [(n, n) for n in lesions._room(bar, mm, move)])
    made = lesions._deformed(padded, mm, move, np.random.default_rng(seed))
    inner = made[1:-1, 1:-1, 1:-1]
    assert inner.sum() == made.sum()  # nothing is cut off
    assert (1 - move.scale) ** 3 * 0.7 < made.sum() / bar.sum() < (1 + move.scale) ** 3 * 1.3


@pytest.mark.parametrize("seed", range(4))
def test_what_a_lung_tumour_leaves_becomes_the_lobe_around_it(seed):
    """Row 33: lung at the border of the volume, which touches nothing, does not win; in compatibility it does."""
    labels = np.full((40, 40, 40), BODY, U8)
    labels[6:34, 6:34, 6:34] = 28
    labels[0], labels[-1] = 32, 32
    labels[17:22, 17:22, 17:22] = 23
    was = labels == 23
    made = augment(labels, seed=seed)
    left = made.labels[was & (made.labels != 23)]
    assert made.moved == (23,)
    assert left.size
    assert (left == 28).all()
    assert ring_lobe(labels, was) == 32


def test_each_kind_of_tumour_moves_and_none_appears():
    labels = ill(26)
    labels[40:50, 4:7, 30:36] = 36
    labels[42:44, 4:6, 32:34] = 128
    made = augment(labels, seed=5)
    assert set(made.moved) | set(made.stayed) == {26, 128}
    assert 26 in made.moved
    assert set(np.unique(made.labels)) == set(np.unique(labels))


@usual
@given(SEEDS)
def test_a_mask_without_a_tumour_is_zoomed_a_little_and_gets_none(seed):
    """Row 22: on its own grid."""
    labels = healthy(26)
    made = augment(labels, seed=seed)
    assert 0.99 <= made.zoom <= 1.01
    assert (made.moved, made.stayed, made.tries) == ((), (), 0)
    assert made.labels.shape == labels.shape
    assert set(np.unique(made.labels)) == set(np.unique(labels))
    assert np.mean(made.labels != labels) < 0.1


def test_the_zoom_is_about_the_centre():
    labels = np.zeros((101, 101, 101), U8)
    labels[ball(labels.shape, (50, 50, 50), 30)] = 1
    big = lesions._zoomed(labels, 1.1)
    assert np.allclose(np.argwhere(big).mean(axis=0), 50)
    assert np.count_nonzero(big) == pytest.approx(1.1**3 * np.count_nonzero(labels), rel=0.02)


@usual
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_turns_are_rotations_about_x_then_y_then_z(angles):
    turn = lesions._rotation(np.array(angles))
    assert np.allclose(turn @ turn.T, np.eye(3))
    assert np.linalg.det(turn) == pytest.approx(1)
    assert np.allclose(lesions._rotation(np.array([0, 0, math.pi / 2])) @ [1, 0, 0], [0, 1, 0])
    assert np.allclose(lesions._rotation(np.array([math.pi / 2, 0, math.pi / 2])) @ [0, 1, 0], [0, 0, 1])


# --- new ones --------------------------------------------------------------------------------------------


@usual
@given(st.sampled_from(TUMORS), st.floats(3, 18), SEEDS, SPACINGS)
def test_a_placed_lesion_has_the_size_that_was_asked_for(tumor, diameter, seed, spacing):
    labels = healthy(tumor)
    before = labels.copy()
    request = Request(tumor=tumor, hosts=hosts(tumor), amount=diameter, unit="mm")
    made = place(labels, request, seed=seed, spacing_mm=spacing)
    assert np.array_equal(labels, before)
    new = made == tumor
    assert np.isin(labels[new], hosts(tumor)).all()
    assert np.array_equal(made[~new], labels[~new])
    lesion = measure(mask(made, spacing), tumor)
    voxel = math.prod(spacing) / 1000
    assert abs(lesion.volume_ml - request.volume_ml) <= voxel / 2 + 1e-9
    assert lesion.components == 1
    assert lesion.host in hosts(tumor)
    far = np.linalg.norm((np.argwhere(new) - np.argwhere(new).mean(axis=0)) * spacing, axis=1).max()
    assert far <= 1.2 * diameter + max(spacing)  # a lump, not a layer
    assert np.array_equal(made, place(labels, request, seed=seed, spacing_mm=spacing))


def test_a_lesion_is_placed_in_the_part_that_was_named():
    labels = healthy(23)
    labels[28:48, 8:40, 6:34] = 32
    for seed in range(5):
        made = place(labels, parse_request("right lung lower lobe:8mm"), seed=seed, spacing_mm=(1, 1, 1))
        assert (labels[made == 23] == 32).all()


def test_places_differ_with_the_seed_and_are_all_over_the_organ():
    labels = healthy(26)
    request = parse_request("liver:6mm")
    centres = np.array([np.argwhere(place(labels, request, seed=seed, spacing_mm=(1, 1, 1)) == 26).mean(axis=0) for seed in range(20)])
    assert (np.ptp(centres, axis=0) > (15, 12, 10)).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("liver:60mm", "fits nowhere in its organ.*smaller"),
        ("liver:28mm", "fits nowhere in its organ.*smaller"),
        ("liver:190mm", "fits nowhere"),
        ("liver:0.5mm", "smaller than one voxel.*1.2mm"),
        ("liver=0.3", "relative size"),
        ("pancreas:5mm", "no organ for.*pancreas"),
    ],
)
def test_a_lesion_that_cannot_be_placed_is_refused_and_the_search_ends(text, says):
    labels = np.zeros((40, 40, 40), U8)
    labels[10:30, 10:30, 10:30] = 1
    with pytest.raises(UsageError, match=says) as caught:
        place(labels, parse_request(text), seed=0, spacing_mm=(1.0, 1.0, 1.0), max_tries=30)
    assert caught.value.hint


def test_every_tumour_of_the_vocabulary_can_be_asked_for_placed_measured_and_moved():
    for label in maisi().tumors():
        request = parse_request(f"{label.name}:7mm")
        made = place(healthy(label.id), request, seed=1, spacing_mm=(1.0, 1.0, 1.0))
        lesion = measure(mask(made), label.id)
        assert request.miss(lesion) < 0.05
        assert lesion.overlap > 0.5
        assert augment(made, seed=2).moved == (label.id,)
