"""Masks: where they come from, how they are mapped, and that padding to a network's grid is taken back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from maisi_cli import masks
from maisi_cli.anatomy import BODY, maisi, remap_table
from maisi_cli.catalog import model
from maisi_cli.errors import UsageError
from maisi_cli.events import Event, Note
from maisi_cli.geometry import Geometry
from maisi_cli.settings import GenerateSettings
from maisi_cli.volumes import Mask, crop, write_mask

usual = profile(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NANO = model("nano-ct")
SIZES = st.tuples(*[st.integers(1, 40)] * 3)
OBLIQUE = ((2.4, -0.6, 0.0, -31.0), (0.8, 1.8, 0.0, 12.5), (0.0, 0.0, 3.0, 7.0), (0.0, 0.0, 0.0, 1.0))
OBLIQUE_MM = (float(np.hypot(2.4, 0.8)), float(np.hypot(0.6, 1.8)), 3.0)


def random_mask(size: tuple[int, int, int], seed: int, *, oblique: bool = False, ids: tuple[int, ...] = (0, BODY, 1, 28)) -> Mask:
    geometry = Geometry(size=size, spacing=OBLIQUE_MM, affine_rows=OBLIQUE) if oblique else Geometry(size=size, spacing=(3.0, 3.0, 3.0))
    return Mask(array=np.random.default_rng(seed).choice(np.array(ids, np.uint8), size), geometry=geometry)


def world(geometry: Geometry, voxel: np.ndarray) -> np.ndarray:
    return np.asarray(geometry.affine)[:3] @ np.append(voxel, 1)


# --- padding to the grid of a network -------------------------------------------------------


@usual
@given(SIZES, st.integers(0, 99), st.booleans())
def test_a_mask_is_padded_to_a_grid_that_the_model_takes_and_comes_back_bit_for_bit(size, seed, oblique):
    mask = random_mask(size, seed, oblique=oblique)
    done = masks.conditioned(mask, NANO)
    assert done.mask is mask
    assert NANO.valid_size(done.shown.geometry.size)
    back = crop(done.shown, mask.geometry)
    assert back.array.dtype == np.uint8
    assert np.array_equal(back.array, mask.array)
    assert back.geometry.close_to(mask.geometry)
    assert np.array_equal(done.shown.counts()[1:], mask.counts()[1:])  # all that is new is background
    before = np.array(mask.geometry.pad_before(done.shown.geometry.size))
    for corner in product(*((0, n - 1) for n in size)):
        assert done.shown.array[tuple(corner + before)] == mask.array[corner]
        assert np.allclose(world(done.shown.geometry, corner + before), world(mask.geometry, np.array(corner)))


@usual
@given(SIZES)
def test_no_smaller_grid_would_do(size):
    padded = masks.conditioned(random_mask(size, 0), NANO).shown.geometry.size
    limits = NANO.limits
    for old, new in zip(size, padded, strict=True):
        assert new == limits.size_min or new - old < limits.multiple


def test_a_mask_on_a_grid_that_the_model_takes_is_not_touched():
    mask = random_mask((32, 48, 64), 1)
    assert masks.conditioned(mask, NANO).shown is mask


def test_a_model_that_does_not_pad_is_shown_the_mask_on_a_grid_of_its_own():
    mask = Mask(array=random_mask((200, 190, 70), 0).array, geometry=Geometry(size=(200, 190, 70), spacing=(1.6, 1.7, 4.0)))
    done = masks.conditioned(mask, model("rflow-ct"))
    assert done.mask is mask
    assert done.shown.geometry.size == (256, 256, 128)
    assert done.shown.geometry.spacing == pytest.approx((323 / 256, 323 / 256, 280 / 128))
    for voxel in np.random.default_rng(0).integers(0, (256, 256, 128), (200, 3)):  # each has the label at its own centre
        place = np.linalg.inv(np.asarray(mask.geometry.affine)) @ np.append(world(done.shown.geometry, voxel), 1)
        source = np.floor(place[:3] + 0.5).astype(int)
        inside = bool(((source >= 0) & (source < mask.geometry.size)).all())
        assert done.shown.array[tuple(voxel)] == (mask.array[tuple(source)] if inside else 0)


def test_a_model_that_never_saw_lesions_is_shown_the_organ_instead():
    array = np.full((32, 32, 32), 1, np.uint8)
    array[10:14, 10:14, 10:14] = 26
    mask = Mask(array=array, geometry=Geometry(size=(32, 32, 32), spacing=(8.0, 8.0, 8.0)))
    done = masks.conditioned(mask, NANO)
    assert (done.hidden, done.shown.ids()) == ((26,), (1,))
    assert done.mask is mask
    seen = masks.conditioned(mask, replace(NANO, lesions=True))
    assert (seen.hidden, seen.shown is mask) == ((), True)


@pytest.mark.parametrize(
    ("ids", "top", "bottom"),
    [((1, 28), 1, 2), ((22,), 0, 0), ((93, 120), 0, 3), ((4,), 2, 2), ((62, 115), None, None)],
)
def test_the_networks_are_told_which_regions_the_mask_shows(ids, top, bottom):
    array = np.zeros((32, 32, 32), np.uint8)
    array[0, 0, : len(ids)] = ids
    done = masks.conditioned(Mask(array=array, geometry=Geometry(size=array.shape, spacing=(3.0, 3.0, 3.0))), NANO)
    assert (done.top_region, done.bottom_region) == (top, bottom)


# --- mapping ----------------------------------------------------------------------------------


@usual
@given(st.sampled_from(["totalsegmentator", "raw125"]), st.lists(st.integers(0, 255), min_size=1, max_size=27, unique=True))
def test_every_voxel_gets_its_partner_or_becomes_body_and_what_is_lost_is_said(source, ids):
    size = (len(ids), 1, 1)
    mask = Mask(array=np.array(ids, np.uint8).reshape(size), geometry=Geometry(size=size, spacing=(1.0, 1.0, 1.0)), vocabulary=source)
    said: list[Event] = []
    mapped = masks.map_labels(mask, source, on_event=said.append)
    pairs = {0: 0, BODY: BODY} | dict(remap_table(source).pairs)
    assert mapped.array.ravel().tolist() == [pairs.get(value, BODY) for value in ids]
    assert (mapped.vocabulary, mapped.geometry) == ("maisi", mask.geometry)
    lost = [value for value in ids if value not in pairs]
    assert [note.level for note in said if isinstance(note, Note)] == (["warning"] if lost else [])
    if lost:
        words = "label has no partner in maisi and becomes" if len(lost) == 1 else "labels have no partner in maisi and become"
        assert said[0].text.startswith(f"{len(lost)} {words} body (200)")  # type: ignore[union-attr]


@usual
@given(st.integers(0, 99), st.sampled_from(["totalsegmentator", "raw125"]))
def test_labels_that_have_partners_come_back_as_they_were(seed, source):
    ids = tuple(sorted(remap_table(source).pairs))
    mask = random_mask((9, 8, 7), seed, ids=(0, *ids))
    there = masks.map_labels(mask, source)
    back = masks.map_labels(there, "maisi", source)
    assert np.array_equal(back.array, mask.array)
    assert back.vocabulary == source


def test_what_another_vocabulary_has_no_word_for_becomes_background():
    mask = random_mask((4, 4, 4), 0, ids=(128,))
    said: list[Event] = []
    mapped = masks.map_labels(mask, "maisi", "totalsegmentator", on_event=said.append)
    assert mapped.ids() == ()
    assert "becomes background: 128 bone lesion" in said[0].text  # type: ignore[union-attr]


# --- sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "name"),
    [({}, "phantom"), ({"mask": "a.nii.gz"}, "file"), ({"mask_source": "phantom"}, "phantom"), ({"mask_source": "theirs"}, "theirs")],
)
def test_auto_takes_the_mask_that_is_given_or_else_the_phantom(how, name):
    assert masks.choose(GenerateSettings(**how))[0] == name


def test_a_mask_file_is_read_on_its_own_grid_and_mapped(tmp_path: Path):
    mask = random_mask((6, 7, 8), 3, oblique=True, ids=(0, 1, 5, BODY))  # TotalSegmentator: spleen, liver; and an envelope
    write_mask(mask, tmp_path / "m.nii.gz")
    found = masks.from_file(GenerateSettings(mask=str(tmp_path / "m.nii.gz"), labels="totalsegmentator"), None, 0)
    assert np.array_equal(found.array, np.choose(np.searchsorted([0, 1, 5, BODY], mask.array), [0, 3, 1, BODY]))
    assert found.geometry.close_to(mask.geometry)
    with pytest.raises(UsageError, match="add --mask FILE"):
        masks.from_file(GenerateSettings(), None, 0)


def test_a_mask_without_body_needs_leave(tmp_path: Path):
    path = tmp_path / "m.nii.gz"
    write_mask(random_mask((6, 7, 8), 3, ids=(0, 1)), path)
    with pytest.raises(UsageError, match="no body envelope"):
        masks.load_mask(path)
    assert masks.load_mask(path, allow_missing_body=True).ids() == (1,)


def test_organs_that_are_asked_for_must_be_in_ones_own_mask(tmp_path: Path):
    path = tmp_path / "m.nii.gz"
    write_mask(random_mask((6, 7, 8), 3), path)
    assert masks.own(GenerateSettings(mask=str(path), anatomy=("liver", "left lung upper lobe"))).ids() == (1, 28, BODY)
    with pytest.raises(UsageError, match="has no spleen, pancreas"):
        masks.own(GenerateSettings(mask=str(path), anatomy=("liver", "spleen", "pancreas")))


BOX = Geometry(size=(32, 32, 32), spacing=(12.0, 12.0, 12.0))


def test_the_phantom_shows_the_regions_and_organs_that_are_asked_for_on_the_grid_that_is_asked_for():
    wanted = GenerateSettings(regions=("chest", "abdomen"), anatomy=("liver", "heart"))
    mask = masks.phantom(wanted, BOX, 5).mask
    assert mask.geometry == BOX
    assert {maisi().id("liver"), maisi().id("heart"), BODY} <= set(mask.ids())
    assert all(value in maisi() for value in mask.ids())
    assert masks.conditioned(mask, NANO).top_region == 1
    assert np.array_equal(masks.phantom(wanted, BOX, 5).mask.array, mask.array)
    assert not np.array_equal(masks.phantom(wanted, BOX, 6).mask.array, mask.array)


def test_a_tumour_is_painted_into_the_organ_of_a_phantom_as_large_as_asked_and_into_no_other_voxel():
    box = Geometry(size=(64, 64, 64), spacing=(6.0, 6.0, 6.0))
    healthy = masks.phantom(GenerateSettings(regions=("abdomen",)), box, 5).mask
    made = [masks.phantom(GenerateSettings(regions=("abdomen",), tumor="liver:40mm"), box, seed) for seed in (5, 5, 6)]
    told = made[0].about["tumor"]
    assert (told["requested"], told["name"], told["host"], told["components"], told["reached"]) == (
        "liver:40mm",
        "hepatic tumor",
        "liver",
        1,
        True,
    )
    assert told["diameter_mm"] == pytest.approx(40, abs=0.5)
    changed = made[0].mask.array != healthy.array
    assert set(healthy.array[changed]) == {maisi().id("liver")}
    assert set(made[0].mask.array[changed]) == {maisi().id("hepatic tumor")}
    assert np.count_nonzero(changed) * 6**3 / 1000 == pytest.approx(told["volume_ml"])
    assert np.array_equal(made[0].mask.array, made[1].mask.array)
    assert not np.array_equal(made[0].mask.array, made[2].mask.array)


def test_a_phantom_without_room_for_the_tumour_is_no_mask_and_one_without_its_organ_is_refused():
    box = Geometry(size=(64, 64, 64), spacing=(6.0, 6.0, 6.0))
    with pytest.raises(masks.NoMask, match="fits nowhere in its organ"):
        masks.phantom(GenerateSettings(regions=("abdomen",), tumor="liver:190mm"), box, 0)
    with pytest.raises(UsageError, match="no organ for lung tumor") as caught:
        masks.phantom(GenerateSettings(regions=("head",), tumor="lung:20mm"), box, 0)
    assert not isinstance(caught.value, masks.NoMask)


def test_a_tumour_is_painted_into_ones_own_mask_that_has_none(tmp_path: Path):
    array = np.full((40, 40, 40), BODY, np.uint8)
    array[5:35, 5:35, 5:35] = 1
    write_mask(Mask(array=array, geometry=Geometry(size=(40, 40, 40), spacing=(2.0, 2.0, 2.0))), tmp_path / "healthy.nii.gz")
    settings = GenerateSettings(mask=str(tmp_path / "healthy.nii.gz"), tumor="liver:20mm")
    made = masks.painted(masks.own(settings), settings, 3)
    assert made.about["tumor"]["diameter_mm"] == pytest.approx(20, abs=0.3)
    assert set(made.mask.ids()) == {1, 26, BODY}
    write_mask(made.mask, tmp_path / "ill.nii.gz")
    with pytest.raises(UsageError, match="has a hepatic tumor already"):
        masks.own(replace(settings, mask=str(tmp_path / "ill.nii.gz")))


@pytest.mark.parametrize("name", [label.name for label in maisi().labels if label.group in ("tumor", "cyst", "dummy")])
def test_the_phantom_refuses_what_it_never_paints(name):
    with pytest.raises(UsageError, match=f"the phantom has no {name}"):
        masks.phantom(GenerateSettings(anatomy=(name,)), BOX, 0)


def test_the_phantom_refuses_organs_of_other_regions_and_a_run_without_a_volume():
    with pytest.raises(UsageError, match="no brain in this volume of abdomen"):
        masks.phantom(GenerateSettings(regions=("abdomen",), anatomy=("brain",)), BOX, 0)
    with pytest.raises(UsageError, match="needs a volume"):
        masks.phantom(GenerateSettings(), None, 0)


@usual
@given(SIZES, st.integers(0, 50))
def test_padding_twice_is_padding_once(size, seed):
    once = masks.conditioned(random_mask(size, seed), NANO).shown
    assume(once.geometry.size != size)
    assert masks.conditioned(once, NANO).shown is once
