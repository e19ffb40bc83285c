"""Checks of the label map: closed forms, bodies painted by the phantom, a real patient, and what is done to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from maisi_cli import quality
from maisi_cli.anatomy import maisi, remap_table
from maisi_cli.geometry import Geometry
from maisi_cli.phantom import body
from maisi_cli.presets import presets
from maisi_cli.quality import Context, Finding
from maisi_cli.volumes import Mask, read_mask

GRID = Geometry(size=(40, 40, 40), spacing=(5.0, 5.0, 5.0))
VOXEL_ML = 0.125
ANATOMY = ["organ-volumes", "components", "laterality", "organs-expected", "labels-known"]


def empty() -> Mask:
    """Return a body without organs, air around it."""
    mask = Mask(array=np.zeros(GRID.size, np.uint8), geometry=GRID)
    mask.array[1:39, 1:39, 1:39] = 200
    return mask


def block(mask: Mask, name: str, x: slice, y: slice = slice(10, 30), z: slice = slice(10, 30)) -> None:
    mask.array[x, y, z] = maisi().id(name)


def by_label(findings: list[Finding]) -> dict[str | None, Finding]:
    return {finding.label: finding for finding in findings}


def without(mask: Mask, *names: str) -> Mask:
    ids = [maisi().id(name) for name in names]
    return replace(mask, array=np.where(np.isin(mask.array, ids), 200, mask.array).astype(np.uint8))


@pytest.fixture(scope="module")
def person() -> Mask:
    """One body from chest to hip."""
    return body(Geometry(size=(96, 96, 112), spacing=(4.2, 4.2, 4.5)), 11, regions=("chest", "abdomen"))


@pytest.fixture
def patient(shared: Callable[[str], Path]) -> Mask:
    mask = read_mask(shared("data/ct_torso_seg.nii.gz"))
    return replace(mask, array=np.array(remap_table("totalsegmentator").table(), np.uint8)[mask.array])


# --- organ-volumes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("voxels", "passes", "says"), [
    (2600, False, "below"), (2700, True, "below"), (8000, True, "within"), (26000, True, "above"), (51000, False, "above"),
])  # fmt: skip
def test_a_liver_is_held_to_its_range_with_room_for_disease(voxels: int, passes: bool, says: str) -> None:
    """670..3170 ml, half and twice of which fail: 2680 and 50720 voxels of 0.125 ml."""
    mask = empty()
    inside = np.zeros((36, 36, 40), bool)
    inside.reshape(-1)[:voxels] = True  # a liver of so many voxels, wherever
    mask.array[2:38, 2:38, :][inside] = 1
    mask = replace(mask, array=np.pad(mask.array, ((0, 0), (0, 0), (2, 2)), constant_values=0),
                   geometry=Geometry(size=(40, 40, 44), spacing=GRID.spacing))  # fmt: skip
    mask.array[:, :, :2] = mask.array[:, :, -2:] = 200
    (finding,) = quality.organ_volumes(None, mask, Context())
    assert finding.value == pytest.approx(voxels * VOXEL_ML)
    assert (finding.low, finding.high) == (335, 6340)
    assert finding.passed is passes
    assert f"{says} the 670..3170 ml" in finding.text


def test_vessels_and_tumours_in_the_liver_belong_to_its_volume() -> None:
    mask = empty()
    block(mask, "liver", slice(10, 30))
    whole = quality.organ_volumes(None, mask, Context())[0].value
    block(mask, "hepatic vessel", slice(15, 20), slice(15, 20))
    block(mask, "hepatic tumor", slice(22, 26), slice(22, 26))
    assert quality.organ_volumes(None, mask, Context())[0].value == whole == pytest.approx(8000 * VOXEL_ML)


def test_an_organ_that_is_cut_says_nothing_of_its_volume() -> None:
    mask = empty()
    block(mask, "spleen", slice(10, 12), slice(10, 12))
    assert not quality.organ_volumes(None, mask, Context())[0].passed
    block(mask, "spleen", slice(10, 12), slice(10, 12), slice(10, 39))  # to the end of the body, beyond which is padding
    assert quality.organ_volumes(None, mask, Context()) == []
    block(mask, "right kidney", slice(0, 10))
    assert quality.organ_volumes(None, mask, Context()) == []


def test_a_wrong_spacing_shows_in_every_volume(person: Mask) -> None:
    assert all(finding.passed for finding in quality.organ_volumes(None, person, Context()))
    doubled = replace(person, geometry=Geometry(size=person.geometry.size, spacing=tuple(2 * mm for mm in person.geometry.spacing)))
    found = quality.organ_volumes(None, doubled, Context())
    assert len(found) >= 6
    assert sum(not finding.passed for finding in found) >= 4


def test_bounds_are_in_order_and_have_a_source_with_a_year_or_a_journal() -> None:
    for row in quality.ct_table()["volume"]:
        assert 0 < row["low"] < row["high"]
        assert len(row["source"]) > 10
        assert all(label in maisi() for label in row["labels"])


# --- components -------------------------------------------------------------------------------------


def test_the_share_of_the_largest_piece() -> None:
    mask = empty()
    block(mask, "spleen", slice(10, 19))
    block(mask, "spleen", slice(30, 31))
    (finding,) = quality.components(None, mask, Context())
    assert finding.value == pytest.approx(0.9)
    assert not finding.passed
    assert "90.0% of spleen in one piece, the rest in 1 more" in finding.text
    block(mask, "spleen", slice(30, 31), slice(10, 12))
    mask.array[30, 12:30] = 200
    assert quality.components(None, mask, Context())[0].passed


def test_pieces_at_the_border_do_not_count_against_an_organ() -> None:
    mask = empty()
    block(mask, "spleen", slice(10, 20))
    block(mask, "spleen", slice(30, 39))  # reaches the end of the body
    assert quality.components(None, mask, Context())[0].value == 1.0


def test_a_vessel_through_the_liver_does_not_divide_it() -> None:
    mask = empty()
    block(mask, "liver", slice(5, 30))
    block(mask, "hepatic vessel", slice(16, 18))
    assert quality.components(None, mask, Context())[0].value == 1.0
    block(mask, "stomach", slice(16, 18))
    found = by_label(quality.components(None, mask, Context()))
    assert found["liver"].value == pytest.approx(12 / 23)
    assert not found["liver"].passed
    assert found["stomach"].passed


# --- laterality --------------------------------------------------------------------------------------


def test_pairs_and_sides() -> None:
    """The first axis points to the patient's right."""
    mask = empty()
    block(mask, "left kidney", slice(5, 10))
    block(mask, "right kidney", slice(30, 35))
    block(mask, "spleen", slice(11, 14))
    block(mask, "liver", slice(20, 29))
    found = by_label(quality.laterality(None, mask, Context()))
    assert found["pairs"].value == 0
    assert found["spleen left of liver"].value == pytest.approx(5 * (24 - 12))
    assert all(finding.passed for finding in found.values())
    mirrored = by_label(quality.laterality(None, replace(mask, array=mask.array[::-1].copy()), Context()))
    assert mirrored["pairs"].value == 1
    assert "left kidney" in mirrored["pairs"].text
    assert mirrored["spleen left of liver"].value == pytest.approx(-5 * (24 - 12))
    assert not any(finding.passed for finding in mirrored.values())


def test_two_exchanged_kidneys_are_found_among_all_pairs(person: Mask) -> None:
    swap = np.arange(256, dtype=np.uint8)
    swap[[5, 14]] = 14, 5
    found = by_label(quality.laterality(None, replace(person, array=swap[person.array]), Context()))
    assert found["pairs"].value == 1
    assert "left kidney" in found["pairs"].text


# --- organs-expected -----------------------------------------------------------------------------------


@pytest.mark.parametrize("organ", ["liver", "spleen", "stomach", "pancreas", "left kidney", "right kidney", "aorta", "colon", "heart"])
def test_an_organ_taken_out_of_a_body_is_missed(person: Mask, organ: str) -> None:
    assert quality.check(None, person, checks=["organs-expected"]).passed
    failed = quality.check(None, without(person, organ), checks=["organs-expected"]).failures()
    assert [finding.label for finding in failed] == [organ]
    assert f"no {organ}, although" in failed[0].text
    chosen = quality.check(None, without(person, organ), checks=["organs-expected"], chosen=[organ])
    assert chosen.passed


def test_a_map_of_vertebrae_alone_is_not_blamed_for_lacking_organs(person: Mask) -> None:
    bones = np.where(np.isin(person.array, maisi().ids("spine")), person.array, 0).astype(np.uint8)
    assert quality.organs_expected(None, replace(person, array=bones), Context()) == []


def test_neighbours_stand_in_for_vertebrae_when_they_are_whole() -> None:
    mask = empty()
    for k, name in enumerate(("right kidney", "pancreas", "stomach", "left kidney", "aorta", "inferior vena cava")):
        block(mask, name, slice(30 - 4 * k, 33 - 4 * k))
    missed = {finding.label for finding in quality.organs_expected(None, mask, Context())}
    assert missed == {"liver", "spleen"}
    block(mask, "stomach", slice(22, 25), z=slice(10, 39))
    (finding,) = quality.organs_expected(None, mask, Context())
    assert finding.passed
    assert finding.text.startswith("all 2 organs")  # the vessels; the stomach, which is cut, no longer speaks for liver and spleen


# --- all of them, on bodies ------------------------------------------------------------------------------


def test_painted_bodies_of_every_region_preset_pass() -> None:
    for preset in presets("region"):
        regions = tuple(preset.values.get("anatomy", {}).get("regions", ()))
        if not regions or not preset.geometry:
            continue
        grid = preset.geometry.resized(tuple(min(40, n) for n in preset.geometry.size))
        verdict = quality.check(None, body(grid, 1, regions=regions), checks=ANATOMY)
        assert verdict.passed, (preset.name, [finding.text for finding in verdict.failures()])


def test_a_real_patient_passes_and_what_is_outside_the_healthy_range_is_told(patient: Mask) -> None:
    verdict = quality.check(None, patient)
    assert verdict.passed, [finding.text for finding in verdict.failures()]
    found = {(finding.check, finding.label): finding for finding in verdict.findings}
    assert found["laterality", "pairs"].text.startswith("0 of 18 pairs")
    assert found["organs-expected", None].text == "all 14 organs that must be in view are there"
    # the automatic segmentation found a quarter of the pancreas, in four pieces
    assert found["organ-volumes", "pancreas"].value == pytest.approx(18.8, abs=0.1)
    assert "below the 23..199 ml" in found["organ-volumes", "pancreas"].text
    assert {label for check, label in found if check == "organ-volumes"} == {
        "pancreas", "right kidney", "left kidney", "right adrenal gland", "left adrenal gland",
    }  # fmt: skip  # liver, spleen and lungs are cut


def test_the_patient_mirrored_or_without_an_organ_fails_by_the_right_check(patient: Mask) -> None:
    mirrored = quality.check(None, replace(patient, array=patient.array[::-1].copy()))
    assert {finding.check for finding in mirrored.failures()} == {"laterality"}
    assert "18 of 18 pairs" in mirrored.failures()[0].text
    for organ in ("liver", "spleen", "left kidney", "bladder"):
        failed = quality.check(None, without(patient, organ)).failures()
        assert [(finding.check, finding.label) for finding in failed] == [("organs-expected", organ)]


def test_of_a_map_of_one_s_own_the_anatomy_is_told_not_judged(patient: Mask) -> None:
    wrong = replace(without(patient, "liver"), array=without(patient, "liver").array[::-1].copy())
    for told in ({"own_mask": True}, {"compat": True}):
        verdict = quality.check(None, wrong, checks=ANATOMY, **told)
        assert verdict.passed
        assert any(finding.informative and "18 of 18" in finding.text for finding in verdict.findings)
    assert not quality.check(None, wrong, checks=ANATOMY).passed


def test_sizes_that_were_asked_for_name_labels() -> None:
    assert set(quality.chosen_organs(["liver=0.5", "hepatic tumor=-1", "colon=0.2"])) == {1, 26, 62}
    assert set(quality.chosen_organs(["pancreatic tumor=0.3"])) == {24, 4}
