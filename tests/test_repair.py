"""Repair of generated masks: the reference's voxels under compat, and what it gets wrong done right by default."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from maisi_cli.anatomy import BODY, maisi
from maisi_cli.errors import UsageError
from maisi_cli.repair import fill, lesions_of, repair, without_lesions
from maisi_cli.tumors import hosts
from maisi_cli.volumes import read_mask

usual = profile(max_examples=12, deadline=None)
TUMORS = (23, 24, 26, 27, 128)
TARGETS = (None, *TUMORS)
U8 = np.uint8


def block(labels: np.ndarray, value: int, low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
    labels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = value
    return labels


def torso() -> np.ndarray:
    """A body with a liver, a pancreas, two lungs side by side, a heart between them, a colon and a vertebra, in air."""
    labels = np.zeros((40, 40, 40), U8)
    block(labels, BODY, (2, 2, 2), (38, 38, 38))
    block(labels, 1, (20, 6, 4), (36, 20, 16))
    block(labels, 4, (8, 8, 4), (18, 16, 10))
    block(labels, 62, (6, 24, 4), (34, 32, 14))
    block(labels, 28, (4, 8, 20), (18, 30, 36))
    block(labels, 30, (21, 8, 20), (36, 30, 36))
    block(labels, 115, (18, 10, 22), (21, 20, 30))
    return block(labels, 36, (16, 32, 16), (24, 37, 24))


def noisy(seed: int) -> np.ndarray:
    """The torso with specks of every kind of label strewn over it, and lesions in its organs."""
    rng = np.random.default_rng(seed)
    labels = torso()
    for tumor, at in ((26, (26, 10, 8)), (24, (11, 11, 6)), (27, (18, 26, 8)), (23, (27, 15, 26)), (128, (19, 34, 19))):
        block(labels, tumor, at, tuple(n + 3 for n in at))
    specks = rng.random(labels.shape) < 0.01
    labels[specks] = rng.choice(np.array([0, 1, 4, 19, 23, 24, 25, 26, 27, 28, 30, 62, 128, 129, 132, BODY], U8), int(specks.sum()))
    return labels


# --- as the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("tumor", TARGETS)
def test_compat_is_the_reference_voxel_for_voxel(shared, tumor):
    with np.load(shared("golden/u02_mask_postprocess/arrays.npz")) as arrays:
        before, wanted = arrays[f"in_{tumor}"].astype(U8), arrays[f"out_{tumor}"].astype(U8)
    kept = before.copy()
    made = repair(before, tumor=tumor, compat=True)
    assert np.array_equal(made, wanted)
    assert np.array_equal(before, kept)  # the reference changes its input
    assert np.count_nonzero(made != before) > 1000
    assert not np.array_equal(repair(before, tumor=tumor), wanted)  # the default is another


@pytest.mark.parametrize("name", ["m0", "m1", "m4", "m8"])
def test_compat_takes_tumours_out_as_the_reference_does(shared, name):
    labels = read_mask(shared(f"golden/datasets/all_masks_small/{name}.nii.gz")).array
    with np.load(shared("golden/u01_labels/arrays.npz")) as arrays:
        assert np.array_equal(without_lesions(labels, compat=True), arrays[f"{name}_remove_tumors"])


def test_compat_knows_no_lobe_where_there_is_none():
    """Appendix A of the fact sheet."""
    labels = np.array([128, 129, 24, 26, 27, 116, 117, 23], U8)
    assert without_lesions(labels[:, None, None], compat=True).ravel().tolist() == [128, 129, 4, 1, 62, 14, 5, 28]


# --- right by default --------------------------------------------------------------------------------


@usual
@given(st.integers(0, 2**32 - 1), st.sampled_from((None, *TUMORS, 129)))
def test_only_the_tumour_that_is_asked_for_is_left(seed, tumor):
    labels = noisy(seed)
    made = repair(labels, tumor=tumor)
    assert set(lesions_of(made)) <= {tumor}
    assert made.dtype == U8
    assert not (made[labels == 0] != 0).any()  # nothing outside the body
    assert np.isin(made[labels == 115], (0, 115)).all()  # nothing grows over an organ that is not repaired
    assert np.array_equal(repair(labels, tumor=tumor), made)
    if tumor in TUMORS:
        assert (made == tumor).sum() >= 20  # the lesion of 27 voxels, specks of others in it


@usual
@given(st.integers(0, 2**32 - 1), st.sampled_from(TARGETS))
def test_a_repaired_mask_needs_hardly_any_more_repair(seed, tumor):
    labels = noisy(seed)
    once = repair(labels, tumor=tumor)
    changed = np.count_nonzero(repair(once, tumor=tumor) != once)
    assert changed < 0.02 * np.count_nonzero(once != labels)


@pytest.mark.parametrize(("tumor", "host"), [(23, 30), (24, 4), (26, 1), (27, 62), (128, 36), (129, 5), (116, 14)])
def test_a_lesion_nobody_asked_for_becomes_the_organ_around_it(tumor, host):
    """Rows 33 and 34: a tumour of the right lung does not become left lung, nor a bone lesion soft tissue."""
    whole = torso()
    if host in (5, 14):
        whole[whole == 4] = host
    labels = whole.copy()
    centre = np.argwhere(labels == host).mean(axis=0).astype(int)
    block(labels, tumor, tuple(centre - 1), tuple(centre + 2))
    assert np.array_equal(without_lesions(labels), whole)
    assert np.array_equal(repair(labels), repair(whole))
    assert np.array_equal(without_lesions(labels, keep=tumor), labels)


def test_by_compat_a_right_lung_tumour_becomes_left_lung_and_then_soft_tissue():
    """Row 34: a piece of left lung in the right one is a stray."""
    labels = block(torso(), 23, (27, 15, 26), (30, 18, 29))
    assert (repair(labels, compat=True)[27:30, 15:18, 26:29] == BODY).all()
    assert (repair(labels)[27:30, 15:18, 26:29] == 30).all()


def test_lung_at_the_border_of_the_volume_has_no_vote():
    """Row 33: the reference counts the faces of the volume as ring."""
    labels = np.full((24, 24, 24), BODY, U8)
    block(labels, 28, (6, 6, 6), (18, 18, 18))
    labels[0] = 32
    block(labels, 23, (11, 11, 11), (13, 13, 13))
    assert (without_lesions(labels, compat=True)[11:13, 11:13, 11:13] == 32).all()
    assert (without_lesions(labels)[11:13, 11:13, 11:13] == 28).all()


@pytest.mark.parametrize("thick", [1, 2])
def test_a_thin_liver_tumour_survives(thick):
    """Row 35: in the reference the closing of the liver takes it."""
    labels = block(torso(), 26, (22, 8, 8), (34, 18, 8 + thick))
    asked = labels == 26
    assert not (repair(labels, tumor=26, compat=True) == 26).any()
    assert np.array_equal(repair(labels, tumor=26) == 26, asked)


def test_a_liver_tumour_outside_the_liver_goes_and_those_inside_stay():
    """Row 35: the component filter does what it is for."""
    labels = block(torso(), 26, (24, 9, 7), (27, 12, 10))
    block(labels, 26, (30, 14, 9), (33, 17, 12))
    inside = labels == 26
    block(labels, 26, (6, 33, 30), (9, 36, 33))
    made = repair(labels, tumor=26)
    assert np.array_equal(made == 26, inside)
    assert (made[6:9, 33:36, 30:33] == BODY).all()


def test_a_bone_lesion_away_from_bone_goes():
    labels = block(torso(), 128, (19, 34, 19), (21, 36, 21))
    inside = labels == 128
    block(labels, 128, (6, 20, 16), (8, 22, 18))
    assert np.array_equal(repair(labels, tumor=128) == 128, inside)


def test_of_other_tumours_the_largest_piece_stays_and_the_rest_becomes_organ():
    labels = block(block(torso(), 24, (10, 10, 6), (13, 13, 9)), 24, (16, 14, 8), (17, 15, 9))
    made = repair(labels, tumor=24)
    assert (made == 24).sum() == 27
    assert made[16, 14, 8] == 4


def test_strays_become_body_and_gaps_close_without_taking_from_a_neighbour():
    labels = torso()
    block(labels, BODY, (25, 10, 8), (27, 18, 10))  # a gap two voxels wide
    block(labels, 1, (8, 34, 30), (10, 36, 32))  # a piece of liver in the back
    block(labels, 115, (30, 10, 8), (31, 18, 9))  # a sheet of another organ
    made = repair(labels)
    assert (made[25:27, 10:18, 8:10] == 1).all()
    assert (made[8:10, 34:36, 30:32] == BODY).all()
    assert (made[30:31, 10:18, 8:9] == 115).all()
    assert (repair(labels, compat=True)[30:31, 10:18, 8:9] == 1).all()


def test_what_hangs_loose_of_the_body_goes():
    labels = block(torso(), BODY, (0, 0, 0), (1, 2, 2))
    labels[38:, 20, 20] = 132  # a thread of airway
    made = repair(labels)
    assert (made[0:1, :2, :2] == 0).all()
    assert (made[38:, 20, 20] == 0).all()
    assert (repair(labels, compat=True)[38:, 20, 20] == 132).all()


def test_hepatic_vessels_become_liver_and_the_airway_stays():
    labels = block(block(torso(), 25, (22, 8, 8), (30, 9, 9)), 132, (6, 12, 24), (7, 24, 25))
    made = repair(labels)
    assert (made[22:30, 8:9, 8:9] == 1).all()
    assert np.array_equal(made == 132, labels == 132)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("tumor", TARGETS)
def test_a_mask_without_the_tumour_or_without_anything_is_no_error(tumor, compat):
    assert not repair(np.zeros((9, 8, 7), U8), tumor=tumor, compat=compat).any()
    assert np.array_equal(repair(torso(), tumor=tumor, compat=compat), torso())


def test_a_label_that_is_no_tumour_is_refused():
    for wanted, compat in ((1, False), (129, True), (77, False), (250, False)):
        with pytest.raises(UsageError, match="no tumour"):
            repair(torso(), tumor=wanted, compat=compat)
    with pytest.raises(TypeError, match="uint8"):
        repair(torso().astype(np.int16))


# --- hosts and filling -------------------------------------------------------------------------------


def test_every_tumour_has_a_host_and_no_organ_has():
    assert all(hosts(label.id) for label in maisi().tumors())
    assert hosts(23) == (28, 29, 30, 31, 32)
    assert hosts(129) == (5, 14)
    assert {33, 63, 94, 97, 114, 120, 122, 127} <= set(hosts(128))
    assert not set(hosts(128)) & {1, 57, 98, 115, 121, 128, BODY}
    assert not any(hosts(label.id) for label in maisi().labels if label.group not in ("tumor", "cyst") and label.id != 129)


def test_filling_takes_the_nearest_of_several_hosts_and_body_where_none_touches():
    labels = np.full((16, 9, 9), BODY, U8)
    labels[2:14, 2:7, 2:7] = 28
    labels[8:14, 2:7, 2:7] = 29
    where = np.zeros(labels.shape, bool)
    where[5:11, 3:6, 3:6] = True  # six planes across the border
    where[0, 0, 0] = True
    wanted = labels.copy()
    labels[where] = 23
    fill(labels, where, (28, 29))
    assert np.array_equal(labels[:, 4, 4], wanted[:, 4, 4])
    assert labels[0, 0, 0] == BODY


@pytest.mark.parametrize(
    ("code", "never"),
    [
        ("import maisi_cli.repair, maisi_cli.lesions", {"torch", "monai"}),
        ("from maisi_cli.tumors import parse_request; parse_request('liver:15mm')", {"torch", "numpy", "scipy", "nibabel"}),
    ],
)
def test_nothing_heavy_is_loaded_for_masks_and_less_for_a_request(code, never):
    code = f"import sys; {code}; print(sorted({never!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
