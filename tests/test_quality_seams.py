"""The seam score, and the sanity of MR images: closed forms, a real CT and MR, rendered bodies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from maisi_cli import quality
from maisi_cli.geometry import Geometry
from maisi_cli.phantom import body, render
from maisi_cli.quality import Context, Finding, tile_planes
from maisi_cli.quality.seams import AXES, profile
from maisi_cli.volumes import Volume, read_image

GRID = Geometry(size=(48, 48, 48), spacing=(2.0, 2.0, 2.0))


def soft(noise: float = 15.0, *, geometry: Geometry = GRID) -> Volume:
    """Return a block of soft tissue with noise."""
    hu = 50 + np.random.default_rng(3).normal(0, noise, geometry.size)
    return Volume(array=hu.astype(np.float32), geometry=geometry)


def stepped(image: Volume, axis: int, k: int, hu: float) -> Volume:
    """Return an image that is brighter by `hu` beyond the plane between voxels k and k + 1."""
    array = np.moveaxis(image.array.astype(np.float32, copy=True), axis, 0)
    array[k + 1 :] += hu
    return replace(image, array=np.moveaxis(array, 0, axis))


def by_label(findings: list[Finding]) -> dict[str | None, Finding]:
    return {finding.label: finding for finding in findings}


@pytest.fixture(scope="module")
def rendered() -> Volume:
    return render(body(Geometry(size=(96, 96, 96), spacing=(4.0, 4.0, 4.0)), 5, regions=("chest", "abdomen")), 5)


@pytest.fixture
def patient(shared: Callable[[str], Path]) -> Volume:
    return read_image(shared("data/ct_torso.nii.gz"))


# --- seam --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", range(3))
def test_a_step_is_measured_where_it_is(axis: int) -> None:
    found = by_label(quality.seam(stepped(soft(5), axis, 20, 30), None, Context()))
    step = found[f"{AXES[axis]} step"]
    assert step.value == pytest.approx(30, abs=1)
    assert not step.passed
    assert "between voxels 20 and 21" in step.text
    assert sum(not finding.passed for name, finding in found.items() if str(name).endswith("step")) == 1


def test_noise_has_no_seam_and_energy_sees_a_seam_without_a_step() -> None:
    """Noise that begins anew at a plane of twice its width: no median step, larger gradients."""
    image = soft()
    assert quality.check(image, None, checks=["seam"]).passed
    image.array[24] += np.random.default_rng(4).normal(0, 40, image.array.shape[1:])
    failed = quality.check(image, None, checks=["seam"]).failures()
    assert [finding.label for finding in failed] == ["x energy"]


def test_a_ramp_is_no_seam() -> None:
    """Fat that turns into muscle over a few planes: each step is like the next."""
    image = soft(2)
    image.array[20:24] += np.array([20, 40, 60, 80], np.float32)[:, None, None]
    image.array[24:] += 80
    assert not by_label(quality.seam(stepped(image, 0, 40, 20), None, Context()))["x step"].passed
    assert by_label(quality.seam(image, None, Context()))["x step"].passed


def test_repeated_slices_are_no_seam() -> None:
    """Nearest-neighbour upsampling leaves planes without any gradient between planes with one."""
    image = soft()
    image = replace(image, array=np.repeat(image.array[:, :, ::2], 2, axis=2))
    assert quality.check(image, None, checks=["seam"]).passed


@pytest.mark.parametrize("axis", range(3))
def test_a_seam_painted_through_a_body_is_found_and_none_where_there_is_none(rendered: Volume, axis: int) -> None:
    assert quality.check(rendered, None, checks=["seam"]).passed
    for k in (40, 55):
        for hu in (30, -30):
            failed = quality.check(stepped(rendered, axis, k, hu), None, checks=["seam"]).failures()
            assert f"{AXES[axis]} step" in [finding.label for finding in failed]
            assert f"between voxels {k} and {k + 1}" in failed[0].text


@pytest.mark.parametrize("axis", range(3))
def test_a_seam_painted_through_a_real_ct_is_found_and_none_where_there_is_none(patient: Volume, axis: int) -> None:
    assert quality.check(patient, None, checks=["seam"]).passed
    half = patient.array.shape[axis] // 2
    failed = quality.check(stepped(patient, axis, half, 30), None).failures()
    assert [(finding.check, finding.label) for finding in failed] == [("seam", f"{AXES[axis]} step")]
    assert failed[0].value == pytest.approx(29, abs=2)


def test_a_band_of_one_voxel_is_found(patient: Volume) -> None:
    patient.array[:, :, 50] += 30
    assert [finding.label for finding in quality.check(patient, None, checks=["seam"]).failures()] == ["z step"]


def test_planes_far_apart_and_mr_say_nothing() -> None:
    thick = Geometry(size=(48, 48, 48), spacing=(2.0, 2.0, 6.0))
    labels = [finding.label for finding in quality.seam(soft(geometry=thick), None, Context())]
    assert labels == ["x step", "x energy", "y step", "y energy"]
    assert quality.seam(replace(soft(), modality="mri-t1"), None, Context()) == []
    limits = by_label(quality.seam(soft(geometry=Geometry(size=(48, 48, 48), spacing=(2.0, 5.0, 4.0))), None, Context()))
    assert [limits[f"{axis} step"].high for axis in AXES] == [12, 15, 12]


def test_what_was_stitched_is_held_to_its_tile_planes() -> None:
    """A step too small to be seen at one plane is seen at many that are known."""
    rng = np.random.default_rng(6)
    image = soft(8)
    planes = tile_planes(GRID.size, (4, 4, 4), 0.0)
    for k in planes[2]:
        image.array[:, :, k + 1] += rng.normal(0, 11, image.array.shape[:2])
    assert quality.check(image, None, checks=["seam"]).passed
    failed = quality.check(image, None, checks=["seam"], tiles=planes).failures()
    assert [finding.label for finding in failed] == ["z tiles"]
    named = quality.check(stepped(soft(), 1, planes[1][0], 30), None, checks=["seam"], tiles=planes).failures()
    assert "where tiles meet" in named[0].text


def test_tile_planes_are_where_windows_begin_and_end() -> None:
    """Windows of 8 latent voxels every 4 over 20: 0, 4, 8, 12; the image has 4 voxels for each."""
    planes = tile_planes((80, 32, 64), (8, 8, 16), 0.5)
    assert planes[0] == (15, 31, 47, 63)
    assert planes[1] == ()  # one window
    assert planes[2] == ()
    assert tile_planes((72, 72, 72), (8, 8, 8), 0.0)[0] == (31, 39, 63)  # the last window ends with the volume


def test_the_profile_of_nothing_is_nothing() -> None:
    air = Volume(array=np.full(GRID.size, -1000, np.float32), geometry=GRID)
    assert np.isnan(profile(air.array, 0).step).all()
    assert quality.seam(air, None, Context()) == []


def test_compat_tells_of_seams(patient: Volume) -> None:
    verdict = quality.check(stepped(patient, 2, 50, 30), None, checks=["seam"], compat=True)
    assert verdict.passed
    assert any(finding.informative and finding.value is not None and finding.value > 25 for finding in verdict.findings)


# --- MR ------------------------------------------------------------------------------------------


def head(noise: float = 5.0) -> Volume:
    """Return a bright ball of two tissues over a dark background."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in GRID.size), indexing="ij")
    radius = np.sqrt(x * x + y * y + z * z)
    values = np.where(radius < 0.4, 800.0, np.where(radius < 0.7, 400.0, 0.0))
    values = np.abs(values + np.random.default_rng(2).normal(0, noise, GRID.size))
    return Volume(array=values.astype(np.float32), geometry=GRID, modality="mri-t1")


def failing(image: Volume) -> set[tuple[str, str | None]]:
    return {(finding.check, finding.label) for finding in quality.check(image, None, checks=["mr-background", "mr-contrast"]).failures()}


def test_an_mr_image_passes_and_what_is_done_to_it_is_told_apart() -> None:
    image = head()
    assert failing(image) == set()
    standardised = (image.array - image.array.mean()) / image.array.std()
    assert ("mr-background", "negative") in failing(replace(image, array=standardised.astype(np.float32)))
    assert ("mr-background", "corners") in failing(replace(image, array=image.array + 400))
    assert ("mr-contrast", "clipped") in failing(replace(image, array=np.minimum(image.array, 600)))
    assert ("mr-contrast", "tissue") in failing(replace(image, array=np.where(image.array > 100, 500, 0).astype(np.float32)))
    assert failing(replace(image, modality="ct")) == set()


def test_a_real_mr_passes(shared: Callable[[str], Path]) -> None:
    verdict = quality.check(read_image(shared("data/mr_slab.nii.gz"), modality="mri-t1"), None)
    assert verdict.passed
    assert {"mr-background", "mr-contrast"} <= {finding.check for finding in verdict.findings}
