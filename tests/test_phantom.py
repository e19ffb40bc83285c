"""The phantom: anatomy that holds together on any grid, and HU that pass for a CT."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from maisi_cli.anatomy import maisi
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.phantom import PHASES, body, render
from maisi_cli.phantom.frame import LEVELS
from maisi_cli.volumes import Mask
from numpy.typing import NDArray
from scipy import ndimage

Shared = Callable[[str], Path]
SEEDS = (1, 2, 3, 4)
TORSO = ("chest", "abdomen", "lower")
WHOLE = Geometry.parse(size=(72, 64, 128), spacing=(6, 6, 6))
COARSE = Geometry.parse(size=(64, 64, 64), spacing=(6, 6, 6))
FINE = Geometry.parse(size=(128, 128, 128), spacing=(3, 3, 3))
LUNGS = (28, 29, 30, 31, 32)

# ml of adults, from thin women to obese men; the lower ends leave room for the coarse grid
VOLUMES_ML = {
    "liver": (900, 2600),
    "spleen": (80, 420),
    "left kidney": (90, 280),
    "right kidney": (90, 280),
    "heart": (350, 1050),
    "pancreas": (30, 150),
    "gallbladder": (5, 90),
    "stomach": (120, 900),
    "colon": (250, 1700),
    "small bowel": (300, 1500),
    "aorta": (90, 450),
    "left lung lower lobe": (400, 1700),
    "left hip": (180, 620),
    "left gluteus maximus": (180, 900),
}

# effective bounds of the medians of real CT, in HU: the quality check's statistics
MEDIANS_HU = {
    "liver": (-21.6, 162.0),
    "spleen": (-43.1, 184.1),
    "pancreas": (-56.6, 149.5),
    "left kidney": (-130.6, 267.3),
    "right kidney": (-130.6, 267.3),
}


@pytest.fixture(scope="module")
def people() -> dict[int, Mask]:
    """Whole torsos, one for each seed."""
    return {seed: body(WHOLE, seed, regions=TORSO) for seed in SEEDS}


@pytest.fixture(scope="module")
def fine() -> Mask:
    """One chest and abdomen at 3 mm."""
    return body(FINE, 1)


def where(mask: Mask, *names: str) -> NDArray[np.bool_]:
    return np.isin(mask.array, [maisi().id(name) for name in names])


def centre(mask: Mask, name: str) -> NDArray[np.float64]:
    """World coordinates (mm, RAS+) of a structure's centre."""
    voxels = np.argwhere(where(mask, name))
    assert len(voxels), name
    affine = np.asarray(mask.geometry.affine)
    return affine[:3, :3] @ voxels.mean(axis=0) + affine[:3, 3]


def ml(mask: Mask, name: str) -> float:
    return float(where(mask, name).sum() * np.prod(mask.geometry.spacing) / 1000)


def test_a_seed_is_one_person(people: dict[int, Mask]) -> None:
    again = body(WHOLE, 1, regions=TORSO)
    assert again.array.tobytes() == people[1].array.tobytes()
    for a, b in pairwise(SEEDS):
        assert (people[a].array != people[b].array).mean() > 0.05


def test_body_at_three_and_six_mm_is_the_same_body(fine: Mask) -> None:
    coarse = body(COARSE, 1)
    for name in ("liver", "spleen", "left kidney", "heart", "right lung upper lobe", "left lung lower lobe"):
        assert ml(coarse, name) == pytest.approx(ml(fine, name), rel=0.08), name
        assert np.abs(centre(coarse, name) - centre(fine, name)).max() < 5, name
    assert np.count_nonzero(coarse.array) * 8 == pytest.approx(np.count_nonzero(fine.array), rel=0.03)


@pytest.mark.parametrize("seed", SEEDS)
def test_right_is_at_high_x(people: dict[int, Mask], seed: int) -> None:
    mask = people[seed]
    midline = centre(mask, "spinal cord")[0]
    assert centre(mask, "liver")[0] > midline + 30
    assert centre(mask, "spleen")[0] < midline - 50
    assert centre(mask, "heart")[0] < midline - 5
    assert centre(mask, "stomach")[0] < midline - 10
    assert centre(mask, "gallbladder")[0] > midline + 20
    assert centre(mask, "inferior vena cava")[0] > centre(mask, "aorta")[0]
    for label in maisi().labels:
        if label.side and (mask.array == label.id).any():
            offset = centre(mask, label.name)[0] - midline
            assert (offset > 0) == (label.side == "right"), label.name


def test_laterality_and_height_agree_with_a_real_patient(shared: Shared, people: dict[int, Mask]) -> None:
    import nibabel

    real = nibabel.load(shared("data/ct_torso_seg.nii.gz"))
    assert nibabel.aff2axcodes(real.affine) == ("R", "A", "S")
    labels = np.asanyarray(real.dataobj)
    theirs = {
        "liver": 5,
        "spleen": 1,
        "right kidney": 2,
        "left kidney": 3,
        "gallbladder": 4,
        "aorta": 52,
        "stomach": 6,
        "inferior vena cava": 63,
        "left autochthon": 86,
        "right iliopsoas": 89,
        "left gluteus medius": 82,
    }
    origin = np.argwhere(labels == 29).mean(axis=0)  # L3
    for name, label in theirs.items():
        real_mm = (np.argwhere(labels == label).mean(axis=0) - origin) * 3
        ours_mm = np.mean([centre(m, name) - centre(m, "vertebrae L3") for m in people.values()], axis=0)
        seen = 2 if name in ("aorta", "inferior vena cava", "left autochthon", "liver") else 3  # cut off above
        assert np.abs(real_mm - ours_mm)[:seen].max() < 45, (name, real_mm, ours_mm)


@pytest.mark.parametrize("seed", SEEDS)
def test_many_classes_and_plausible_volumes(people: dict[int, Mask], seed: int) -> None:
    mask = people[seed]
    assert len(mask.ids()) >= 100
    assert all(label in maisi() for label in mask.ids())
    for name, (low, high) in VOLUMES_ML.items():
        assert low < ml(mask, name) < high, (name, ml(mask, name))
    assert where(mask, "prostate").any() == (body(COARSE, seed, regions=("lower",)).array == 118).any()


def test_default_view_reaches_from_shoulder_to_iliac_crest(fine: Mask) -> None:
    assert len(fine.ids()) >= 60
    for name in (
        "left humerus",
        "right clavicula",
        "left hip",
        "right lung upper lobe",
        "liver",
        "left kidney",
    ):
        assert where(fine, name).any(), name


@pytest.mark.parametrize("seed", SEEDS)
def test_spine_is_continuous(people: dict[int, Mask], seed: int) -> None:
    mask = people[seed]
    names = [name for name, _ in LEVELS if where(mask, name).any()]
    assert names[:18] == [name for name, _ in LEVELS[:18]]
    heights = [centre(mask, name)[2] for name in names]
    assert heights == sorted(heights)
    for below, above in pairwise(names[:18]):
        grown = ndimage.binary_dilation(where(mask, below), iterations=1)
        assert (grown & where(mask, above)).any(), (below, above)
    low, high = (np.argwhere(where(mask, name))[:, 2] for name in ("vertebrae L5", "vertebrae T1"))
    cord = where(mask, "spinal cord").any(axis=(0, 1))
    assert cord[round(low.mean()) : round(high.mean()) + 1].all()


@pytest.mark.parametrize("seed", SEEDS)
def test_organs_lie_where_they_belong(people: dict[int, Mask], seed: int) -> None:
    mask = people[seed]
    dome = np.argwhere(where(mask, "liver"))[:, 2].max() * 6
    for side in ("left", "right"):
        kidney = centre(mask, f"{side} kidney")
        assert kidney[2] < dome - 40
        assert 40 < abs(kidney[0] - centre(mask, "vertebrae L2")[0]) < 110
    assert centre(mask, "aorta")[1] > centre(mask, "vertebrae T12")[1]
    assert centre(mask, "heart")[2] > centre(mask, "liver")[2] > centre(mask, "bladder")[2]
    assert centre(mask, "left lung upper lobe")[2] > centre(mask, "left lung lower lobe")[2]
    heights = [centre(mask, f"left rib {k}")[2] for k in range(1, 13)]
    assert heights == sorted(heights, reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_ribs_lie_outside_the_lungs_and_inside_the_body(people: dict[int, Mask], seed: int) -> None:
    mask = people[seed]
    ribs = np.isin(mask.array, maisi().ids("rib"))
    assert ribs.any()
    lungs = np.isin(mask.array, LUNGS)
    inside = ndimage.binary_erosion(mask.array > 0, border_value=1)
    assert (ribs & ~inside).sum() < 0.01 * ribs.sum()
    deep = ndimage.binary_erosion(ndimage.binary_closing(lungs, iterations=1), iterations=1)
    assert (ribs & deep).sum() < 0.02 * ribs.sum()


def test_ribs_run_downward_to_the_front(fine: Mask) -> None:
    for k in range(4, 10):
        voxels = np.argwhere(where(fine, f"right rib {k}"))
        back, front = (
            voxels[voxels[:, 1] <= np.quantile(voxels[:, 1], 0.1)],
            voxels[voxels[:, 1] >= np.quantile(voxels[:, 1], 0.8)],
        )
        assert back[:, 2].mean() * 3 > front[:, 2].mean() * 3 + 30, k


@pytest.mark.parametrize("phase", PHASES)
def test_medians_pass_for_real_ct(fine: Mask, phase: str) -> None:
    hu = render(fine, 3, contrast=phase).array
    for name, (low, high) in MEDIANS_HU.items():
        assert low < np.median(hu[where(fine, name)]) < high, name
    assert -937 < np.median(hu[np.isin(fine.array, LUNGS)]) < -700
    bones = maisi().ids("spine") + maisi().ids("rib") + maisi().ids("bone")
    assert 100 < np.median(hu[np.isin(fine.array, [b for b in bones if b != maisi().id("costal cartilages")])]) < 600
    assert np.median(hu[fine.array == 0]) == pytest.approx(-1000, abs=15)
    assert 30 < np.median(hu[where(fine, "left autochthon", "right autochthon")]) < 85


def test_contrast_brightens_the_blood(fine: Mask) -> None:
    native, arterial, venous = (np.median(render(fine, 3, contrast=phase).array[where(fine, "aorta")]) for phase in PHASES)
    assert native < 70
    assert arterial > venous + 30 > native + 60


def test_render_is_deterministic_and_bounded(people: dict[int, Mask]) -> None:
    mask = people[2]
    first, again, other = (render(mask, seed).array for seed in (5, 5, 6))
    assert first.tobytes() == again.tobytes()
    assert not np.array_equal(first, other)
    assert first.dtype == np.float32
    assert first.min() >= -1024
    assert first.max() <= 1500


def test_noise_is_what_was_asked_for(fine: Mask) -> None:
    quiet, loud = (render(fine, 4, noise_hu=noise, contrast="native").array for noise in (0.0, 20.0))
    inside = ndimage.binary_erosion(where(fine, "liver"), iterations=3)
    assert (loud - quiet)[inside].std() == pytest.approx(20, rel=0.1)


def test_fat_lies_under_the_skin_and_muscle_at_the_wall(fine: Mask) -> None:
    hu = render(fine, 5, contrast="native", noise_hu=0.0).array
    rest = fine.array == 200
    assert 0.3 < (hu[rest] < -60).mean() < 0.95
    assert (hu[rest] > 20).mean() > 0.05


def test_a_patients_mask_gets_the_texture_of_that_patient(shared: Shared) -> None:
    import nibabel
    from maisi_cli.anatomy import remap_table

    image = np.asanyarray(nibabel.load(shared("data/ct_torso.nii.gz")).dataobj).astype(np.float32)
    theirs = np.asanyarray(nibabel.load(shared("data/ct_torso_seg.nii.gz")).dataobj)
    labels = np.array(remap_table("totalsegmentator").table(), dtype=np.uint8)[theirs]
    pieces, _ = ndimage.label(ndimage.binary_opening(image > -300, iterations=2))
    largest = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    trunk = np.stack([ndimage.binary_fill_holes(largest[:, :, k]) for k in range(image.shape[2])], axis=2)
    labels[(labels == 0) & trunk] = 200
    hu = render(Mask(array=labels, geometry=Geometry.parse(size=image.shape, spacing=(3, 3, 3))), 1, contrast="native").array
    rest = labels == 200
    solid = trunk & ~np.isin(labels, [maisi().id(name) for name in ("colon", "stomach")])  # gas lies where it lies
    assert np.corrcoef(hu[solid], np.clip(image[solid], -1000, 1000))[0, 1] > 0.7
    real_fat, our_fat = image[rest] < -40, hu[rest] < -40
    assert (real_fat & our_fat).mean() > 1.1 * real_fat.mean() * our_fat.mean()  # better than chance
    assert our_fat.mean() == pytest.approx(real_fat.mean(), abs=0.15)


@pytest.mark.parametrize("regions", [("head",), ("lower",), ("head", "chest")])
def test_other_regions(regions: tuple[str, ...]) -> None:
    mask = body(COARSE, 7, regions=regions)
    found = {"head": "brain", "lower": "left femur", "chest": "heart"}
    for region in regions:
        assert where(mask, found[region]).any()
    assert render(mask, 1).array.shape == COARSE.size


def test_odd_grids_and_empty_masks() -> None:
    odd = Geometry.parse(size=(41, 33, 37), spacing=(9.0, 9.5, 10.0))
    assert len(body(odd, 1).ids()) > 40
    empty = Mask(
        array=np.zeros((16, 16, 16), dtype=np.uint8),
        geometry=Geometry.parse(size=(16, 16, 16), spacing=(4, 4, 4)),
    )
    assert np.abs(render(empty, 1).array + 1000).max() < 100


def test_wrong_words_are_refused() -> None:
    with pytest.raises(UsageError, match="region 'leg'"):
        body(COARSE, 1, regions=("leg",))
    with pytest.raises(UsageError, match="sex"):
        body(COARSE, 1, sex="m")
    with pytest.raises(UsageError, match="contrast"):
        render(body(COARSE, 1), 1, contrast="late")


def test_coarse_bodies_come_fast() -> None:
    start = time.process_time()
    render(body(COARSE, 11), 11)
    assert time.process_time() - start < 4.0
