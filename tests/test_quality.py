"""Quality checks against the reference's own results, closed forms, a real CT and bodies that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from maisi_cli import quality
from maisi_cli.anatomy import maisi, remap_table
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.plugins import plugins
from maisi_cli.volumes import Mask, Volume, read_image, read_mask

PLAIN = Geometry(size=(20, 20, 20), spacing=(2.0, 2.0, 2.5))
GOLDEN = ["good", "liver_high", "lung_wet", "bone_950", "with_nan", "int16", "all_nan_liver"]


def pair(labels: dict[int, float], *, modality: str = "ct") -> tuple[Volume, Mask]:
    """Return a body of slabs along x, one per label, each of one HU value, in air."""
    mask = np.zeros(PLAIN.size, np.uint8)
    image = np.full(PLAIN.size, -1000, np.float32)
    width = 16 // len(labels)
    for number, (label, hu) in enumerate(labels.items()):
        slab = slice(2 + number * width, 2 + (number + 1) * width)
        mask[slab, 2:18, 2:18] = label
        image[slab, 2:18, 2:18] = hu
    return Volume(array=image, geometry=PLAIN, modality=modality), Mask(array=mask, geometry=PLAIN)


def by_label(findings: list[quality.Finding]) -> dict[str | None, quality.Finding]:
    return {finding.label: finding for finding in findings}


# --- hu-median ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
def test_compat_gives_the_results_of_the_reference(case, shared):
    arrays = np.load(shared("golden/u40_quality_check/arrays.npz"))
    expected = json.loads(shared("golden/u40_quality_check/case.json").read_text())["scalars"]["result"][case]
    geometry = Geometry(size=arrays["label"].shape, spacing=(1.0, 1.0, 1.0))
    mask = Mask(array=arrays["label"].astype(np.uint8), geometry=geometry)
    image = Volume(array=arrays[f"image_{case}"], geometry=geometry)
    found = by_label(quality.hu_median(image, mask, quality.Context(compat=True)))
    assert set(found) <= set(expected)
    for organ, wanted in expected.items():
        if organ not in found:  # not in the mask: the reference's median is empty
            assert wanted["median_value"] is None
            assert not wanted["is_outlier"]
            continue
        finding = found[organ]
        assert finding.passed is not wanted["is_outlier"]
        assert finding.low == pytest.approx(wanted["low_thresh"])
        assert finding.high == pytest.approx(wanted["high_thresh"])
        if wanted["median_value"] is None:
            assert finding.value is None
        else:
            assert finding.value == pytest.approx(wanted["median_value"], abs=1e-4)


def test_labels_of_each_organ_are_the_reference_s_with_the_lower_lobe_added(shared):
    listed = json.loads(shared("golden/u40_quality_check/case.json").read_text())["scalars"]["label_int_dict"]
    for row in quality.ct_table()["median"]:
        assert set(row.get("compat", row["labels"])) == set(listed[row["name"]])
        assert set(row["labels"]) - set(row.get("compat", row["labels"])) == ({32} if row["name"] == "lung" else set())


def test_the_right_lower_lobe_is_a_lung():
    image, mask = pair({28: -800.0, 32: 40.0, 30: 40.0})
    mask.array[mask.array == 30] = 32
    corrected = by_label(quality.hu_median(image, mask, quality.Context()))
    compat = by_label(quality.hu_median(image, mask, quality.Context(compat=True)))
    assert not corrected["lung"].passed
    assert corrected["lung"].value == 40.0
    assert compat["lung"].passed


def test_an_organ_of_nan_fails_except_for_compatibility():
    image, mask = pair({1: np.nan, 3: 50.0})
    assert not by_label(quality.hu_median(image, mask, quality.Context()))["liver"].passed
    assert by_label(quality.hu_median(image, mask, quality.Context(compat=True)))["liver"].passed


@pytest.mark.parametrize(("hu", "passes"), [(-22.0, False), (-21.0, True), (162.0, True), (162.5, False)])
def test_liver_passes_inside_its_range_only(hu, passes):
    verdict = quality.check(*pair({1: hu}), checks=[quality.hu_median])
    assert verdict.passed is passes
    assert [finding.label for finding in verdict.failures()] == ([] if passes else ["liver"])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from([np.float32, np.int16]))
def test_medians_are_those_of_numpy(seed, kind):
    rng = np.random.default_rng(seed)
    geometry = Geometry(size=(5, 6, 7), spacing=(1.0, 1.0, 1.0))
    labels = rng.choice(np.array([0, 1, 3, 5, 14, 28, 32, 33, 127, 200], np.uint8), (5, 6, 7))
    hu = rng.normal(0, 300, (5, 6, 7)).astype(kind)
    found = by_label(quality.hu_median(Volume(array=hu, geometry=geometry), Mask(array=labels, geometry=geometry), quality.Context()))
    for row in quality.ct_table()["median"]:
        inside = hu[np.isin(labels, row["labels"])]
        assert (row["name"] in found) == bool(inside.size)
        if inside.size:
            assert found[row["name"]].value == pytest.approx(float(np.median(inside)))


def test_mr_and_a_missing_mask_say_nothing_about_hu():
    image, mask = pair({1: 900.0}, modality="mri-t1")
    assert quality.hu_median(image, mask, quality.Context()) == []
    assert quality.clipped(image, mask, quality.Context()) == []
    assert quality.follows_mask(image, mask, quality.Context()) == []
    image, mask = pair({1: 900.0})
    assert quality.hu_median(image, None, quality.Context()) == []


# --- the other checks ------------------------------------------------------------------------------


def test_required_organs_must_be_there():
    image, mask = pair({1: 60.0, 3: 50.0})
    verdict = quality.check(image, mask, checks=[quality.organs_present], required=["liver", "left kidney", 3])
    found = by_label(list(verdict.findings))
    assert found["liver"].value == pytest.approx(8 * 16 * 16 * 2 * 2 * 2.5 / 1000)
    assert [finding.label for finding in verdict.failures()] == ["left kidney"]
    assert not quality.check(image, None, checks=[quality.organs_present], required=["liver"]).passed
    with pytest.raises(UsageError, match="no label"):
        quality.check(image, mask, checks=[], required=["livr"])


def test_unknown_label_ids_are_named():
    image, mask = pair({1: 60.0, 150: 40.0, 254: 40.0})
    (finding,) = quality.labels_known(image, mask, quality.Context())
    assert not finding.passed
    assert finding.value == 2
    assert "150, 254" in finding.text
    image, mask = pair({1: 60.0, 200: 40.0, 132: -900.0})
    assert quality.labels_known(image, mask, quality.Context())[0].passed


def test_intensity_finds_nan_and_a_flat_image():
    image, _ = pair({1: 60.0})
    assert all(finding.passed for finding in quality.intensity(image, None, quality.Context()))
    image.array[3, 3, 3] = np.nan
    image.array[3, 3, 4] = np.inf
    found = by_label(quality.intensity(image, None, quality.Context()))
    assert found["finite"].value == 2
    assert not found["finite"].passed
    flat = Volume(array=np.full(PLAIN.size, -1000, np.int16), geometry=PLAIN, modality="mri")
    assert not by_label(quality.intensity(flat, None, quality.Context()))["range"].passed
    empty = Volume(array=np.full(PLAIN.size, np.nan, np.float32), geometry=PLAIN)
    assert not any(finding.passed for finding in quality.intensity(empty, None, quality.Context()))


def test_clipping_is_measured_inside_the_body_and_gas_may_be_black():
    image, mask = pair({1: 60.0, 28: -1000.0, 33: 1000.0, 200: 20.0})
    found = by_label(quality.clipped(image, mask, quality.Context()))
    assert found["high"].value == pytest.approx(0.25)
    assert not found["high"].passed
    assert found["low"].value == 0  # lung and the air around the body do not count
    mask.array[mask.array == 28] = 3
    found = by_label(quality.clipped(image, mask, quality.Context()))
    assert found["low"].value == pytest.approx(0.25)
    assert not found["low"].passed


# --- follows-mask -----------------------------------------------------------------------------------


def test_border_steps_of_two_slabs():
    image, mask = pair({1: 60.0, 200: -100.0})
    sums, counts = quality.border_steps(image, mask)
    pairs = 16 * 16 * (1 + 2)  # one voxel apart once, two voxels apart twice
    assert counts[1, 200] == counts[200, 1] == pairs
    assert sums[1, 200] == pytest.approx(160.0 * pairs)
    assert sums[200, 1] == pytest.approx(-160.0 * pairs)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_border_steps_equal_the_plain_double_loop(seed):
    rng = np.random.default_rng(seed)
    geometry = Geometry(size=(4, 3, 5), spacing=(1.0, 1.0, 1.0))
    labels = rng.integers(0, 3, (4, 3, 5)).astype(np.uint8)
    hu = rng.normal(0, 100, (4, 3, 5)).astype(np.float32)
    hu[0, 0, 0], hu[1, 1, 1], hu[2, 1, 1] = np.nan, np.inf, np.inf
    sums, counts = quality.border_steps(Volume(array=hu, geometry=geometry), Mask(array=labels, geometry=geometry))
    expected, number = np.zeros((256, 256)), np.zeros((256, 256), int)
    for here in np.ndindex(4, 3, 5):
        for axis in range(3):
            for step in (-2, -1, 1, 2):
                there = tuple(n + step * (k == axis) for k, n in enumerate(here))
                if not all(0 <= n < m for n, m in zip(there, labels.shape, strict=True)):
                    continue
                a, b = labels[here], labels[there]
                if a != b and np.isfinite(hu[here]) and np.isfinite(hu[there]):
                    expected[a, b] += float(hu[here]) - float(hu[there])
                    number[a, b] += 1
    assert np.array_equal(counts, number)
    assert np.allclose(sums, expected, atol=1e-3)


def test_a_step_of_the_wrong_sign_is_told_and_does_not_fail():
    image, mask = pair({3: -100.0, 200: 60.0})
    verdict = quality.check(image, mask, checks=[quality.follows_mask])
    (finding,) = verdict.findings
    assert finding.label == "spleen"
    assert finding.value == pytest.approx(-160)
    assert "may not follow" in finding.text
    assert finding.informative
    assert verdict.passed


def test_an_image_that_does_not_follow_the_mask_fails(shared):
    image, mask = real(shared)
    (whole,) = [f for f in quality.follows_mask(image, mask, quality.Context()) if f.label == "all"]
    assert (whole.value, whole.passed, whole.informative) == (0, True, False)
    for moved in (image.array[::-1].copy(), np.roll(image.array, (12, 12, 12), (0, 1, 2))):
        verdict = quality.check(replace(image, array=moved), mask, checks=[quality.follows_mask])
        assert [f.label for f in verdict.failures()] == ["all"]
        assert quality.check(replace(image, array=moved), mask, checks=[quality.follows_mask], compat=True).passed
    few = quality.follows_mask(*pair({3: -100.0, 200: 60.0}), quality.Context())
    assert [f.label for f in few] == ["spleen"]  # too few to judge


def real(shared) -> tuple[Volume, Mask]:
    image = read_image(shared("data/ct_torso.nii.gz"))
    mask = read_mask(shared("data/ct_torso_seg.nii.gz"))
    table = np.array(remap_table("totalsegmentator").table(), np.uint8)
    return image, replace(mask, array=table[mask.array])


def test_a_real_ct_passes_and_a_shifted_mask_does_not_fit_it(shared):
    image, mask = real(shared)
    verdict = quality.check(image, mask, required=["liver", "spleen"])
    assert verdict.passed, [finding.text for finding in verdict.failures()]
    medians = {f.label: f.value for f in verdict.findings if f.check == "hu-median"}
    assert set(medians) == {"liver", "spleen", "pancreas", "kidney", "lung", "bone"}
    steps = by_label(quality.hu_steps(image, mask))
    assert all("as expected" in finding.text for finding in steps.values())
    shifted = replace(mask, array=np.roll(mask.array, (15, 15, 15), (0, 1, 2)))
    moved = by_label(quality.hu_steps(image, shifted))
    for organ in ("lung", "bone", "liver"):
        assert abs(moved[organ].value) < 0.5 * abs(steps[organ].value)
    assert not quality.check(image, shifted, checks=[quality.hu_median]).passed


# --- registration and the table ------------------------------------------------------------------------


def test_all_built_in_checks_are_registered_and_run_by_default():
    image, mask = pair({1: 60.0, 200: -100.0})
    verdict = quality.check(image, mask, required=["liver"])
    assert {finding.check for finding in verdict.findings} == {
        "clipped", "components", "follows-mask", "hu-median", "intensity", "labels-known", "organs-present",
    }  # fmt: skip
    assert set(plugins().registry("checks").names()) == {
        "clipped", "components", "follows-mask", "hu-median", "intensity", "label-type", "labels-known", "laterality", "mr-background",
        "mr-contrast", "organ-volumes", "organs-expected", "organs-present", "seam",
    }  # fmt: skip
    assert {f.check for f in quality.check(image, mask, checks=["hu-median"]).findings} == {"hu-median"}
    with pytest.raises(UsageError, match="hu-medain"):
        quality.check(image, mask, checks=["hu-medain"])


def test_image_and_mask_on_different_grids_are_refused():
    image, mask = pair({1: 60.0})
    other = replace(mask, geometry=Geometry(size=PLAIN.size, spacing=(2.0, 2.0, 3.0)))
    with pytest.raises(UsageError, match="different grids"):
        quality.check(image, other)


def test_the_table_names_labels_of_the_vocabulary():
    table = quality.ct_table()
    for row in (*table["median"], *table["step"]):
        for label in (*row["labels"], *row.get("against", ())):
            assert label in maisi(), (row["name"], label)
    assert quality.parse_labels([1, "28-32", "5"]) == (1, 28, 29, 30, 31, 32, 5)


def test_a_verdict_is_plain_json():
    verdict = quality.check(*pair({1: np.nan}), checks=[quality.hu_median])
    back = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))
    assert back["passed"] is False
    assert {"check", "label", "value", "low", "high", "passed"} <= set(back["findings"][0])
    assert back["findings"][0]["value"] is None
