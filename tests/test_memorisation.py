"""The search for copies: distances in closed form, copies planted among bodies, and what the command says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from maisi_cli.cases import Case, find_cases
from maisi_cli.errors import UsageError
from maisi_cli.events import Event, Note
from maisi_cli.geometry import Geometry
from maisi_cli.judging import Terms
from maisi_cli.memorisation import THRESHOLD, Described, audit, coarse_image, coarse_labels, distances, neighbours, pair_picture
from maisi_cli.phantom import body, render
from maisi_cli.volumes import Mask, Volume, write_image, write_mask
from PIL import Image
from scipy import ndimage

from .shell import Done, qc_of

GRID = Geometry(size=(32, 32, 32), spacing=(12.0, 12.0, 12.0))
REFERENCES = 10


def person(seed: int) -> tuple[Volume, Mask]:
    mask = body(GRID, seed, regions=("chest", "abdomen"))
    return render(mask, seed), mask


def deformed(image: Volume, mask: Mask, mm: float) -> tuple[Volume, Mask]:
    """Return a case moved smoothly by some mm (root mean square along each axis)."""
    rng = np.random.default_rng(8)
    moves = [ndimage.zoom(rng.normal(size=(4, 4, 4)), 8, order=3) for _ in range(3)]
    rows = np.meshgrid(*map(np.arange, GRID.size), indexing="ij")
    places = [row + move / move.std() * mm / 12.0 for row, move in zip(rows, moves, strict=True)]
    hu = ndimage.map_coordinates(image.array.astype(np.float32), places, order=1, mode="nearest")
    return replace(image, array=hu), replace(mask, array=ndimage.map_coordinates(mask.array, places, order=0, mode="nearest"))


def save(case: tuple[Volume, Mask], folder: Path, name: str) -> None:
    write_image(case[0], folder / f"{name}_image.nii.gz")
    write_mask(case[1], folder / f"{name}_label.nii.gz")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `real`, bodies of some persons, and `made`: copies of two of them, and other persons."""
    folder = tmp_path_factory.mktemp("planted")
    for seed in range(REFERENCES):
        save(person(seed), folder / "real", f"r{seed:02d}")
    save(person(3), folder / "made", "exact")
    image, mask = person(5)
    save(deformed(image, mask, 4), folder / "made", "deformed")
    noise = np.random.default_rng(1).normal(10, 25, GRID.size)
    save((replace(person(7)[0], array=person(7)[0].array + noise), person(7)[1]), folder / "made", "noisy")
    for seed in (100, 101):
        save(person(seed), folder / "made", f"new{seed}")
    return folder


@pytest.fixture
def maisi(planted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    monkeypatch.chdir(planted)
    return qc_of(capsys)


# --- closed forms ---------------------------------------------------------------------------------


def test_the_distance_of_label_rows_is_one_less_dice_over_all_organs() -> None:
    one = np.array([[1, 1, 2, 0, 0, 3]], np.uint8)
    other = np.array([[1, 1, 2, 0, 0, 3], [1, 2, 2, 0, 4, 0], [0, 0, 0, 5, 5, 0], [0, 0, 0, 0, 0, 0]], np.uint8)
    assert distances(one, other)[0] == pytest.approx([0, 1 - 2 * 2 / 8, 1, 1])


def test_the_distance_of_vectors_is_one_less_their_correlation() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 50)), rng.normal(size=(4, 50))
    unit = [
        (rows - rows.mean(1, keepdims=True)) / np.linalg.norm(rows - rows.mean(1, keepdims=True), axis=1, keepdims=True) for rows in (a, b)
    ]
    assert distances(unit[0], unit[1]) == pytest.approx(1 - np.corrcoef(a, b)[:3, 3:])


def described(name: str, row: list[float]) -> Described:
    vector = np.array(row, np.float32)
    return Described(case=Case(id=name, image=None, label=None), vectors={"latent": vector / np.linalg.norm(vector)})


def test_z_and_rank_are_those_of_the_null() -> None:
    """Real cases at right angles lie 1 apart; one that shares half of another's direction is nearer than all."""
    real = [described(f"r{k}", [float(k == j) for j in range(7)]) for k in range(6)]
    made = [described("near", [0.6, 0, 0, 0, 0, 0, 0.8]), described("far", [0, 0, 0, 0, 0, 0, 1])]
    near, far = neighbours(made, real, "latent")
    assert (near.nearest, near.distance, near.usual) == ("r0", pytest.approx(0.4), pytest.approx(1))
    assert near.z == pytest.approx(-np.log(0.4) / 0.1, rel=1e-5)  # the spread of an even null counts as 0.1
    assert near.rank == pytest.approx(1 / 7)
    assert far.z == pytest.approx(0)
    assert far.rank == 1
    assert not near.finding(4).passed
    assert "too near for chance at this threshold (4)" in near.finding(4).text
    assert "no copy found at this threshold (10)" in near.finding(10).text
    with pytest.raises(UsageError, match="the null needs 5"):
        neighbours(made, real[:4], "latent")


def test_coarse_grids_are_those_of_the_body() -> None:
    """Padding and resampling of a case leave its description nearly as it is."""
    image, mask = person(2)
    box = ndimage.find_objects((mask.array > 0).astype(np.uint8))[0]
    wide = Geometry(size=(40, 44, 48), spacing=GRID.spacing)
    padded = replace(mask, array=np.pad(mask.array, ((3, 5), (2, 10), (8, 8))), geometry=wide)
    again = ndimage.find_objects((padded.array > 0).astype(np.uint8))[0]
    assert np.array_equal(coarse_labels(mask, box), coarse_labels(padded, again))
    flat = replace(image, array=np.full(GRID.size, 0, np.float32))
    assert coarse_image(flat, box, 16) == pytest.approx(0.5)
    assert coarse_image(flat, box, 16).shape == (16, 16, 16)


# --- planted copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["mask", "intensity"])
def test_copies_are_found_and_other_persons_are_not(planted: Path, space: str) -> None:
    made, real = find_cases([planted / "made"]), find_cases([planted / "real"])
    said: list[Event] = []
    found = audit(made, real, Terms(), spaces=[space], on_event=said.append)
    z = {each.id: each.z for each in found.neighbours}
    nearest = {each.id: each.nearest for each in found.neighbours}
    assert {"exact", "noisy", "deformed"} == {name for name in z if z[name] > THRESHOLD}, z
    assert (nearest["exact"], nearest["deformed"], nearest["noisy"]) == ("r03", "r05", "r07")
    assert max(value for name, value in z.items() if name.startswith("new")) < THRESHOLD - 0.5
    assert found.neighbours[0].id in ("exact", "noisy")
    assert not found.passed
    assert any(isinstance(event, Note) and "rough null" in event.text for event in said)


def test_copies_are_found_in_the_latents_of_the_bundled_vae(planted: Path) -> None:
    real = [case for case in find_cases([planted / "real"]) if case.id in ("r01", "r03", "r04", "r05", "r06", "r07")]
    made = [case for case in find_cases([planted / "made"]) if case.id != "new101"]
    found = audit(made, real, Terms(), spaces=["latent"])
    assert {"exact", "noisy", "deformed"} == {each.id for each in found.neighbours if each.z > THRESHOLD}


def test_real_cases_that_are_twins_are_said(planted: Path) -> None:
    real = find_cases([planted / "real"])
    twin = replace(real[0], id="again")
    said: list[Event] = []
    found = audit(find_cases([planted / "made"]), [*real, twin], Terms(), spaces=["mask"], on_event=said.append)
    assert found.twins == {"mask": 2}
    assert any(isinstance(event, Note) and "repeated scans" in event.text for event in said)
    assert {"exact", "noisy", "deformed"} == {each.id for each in found.neighbours if each.z > THRESHOLD}


def test_pairs_are_drawn_side_by_side(planted: Path) -> None:
    found = audit(find_cases([planted / "made"]), find_cases([planted / "real"]), Terms(), spaces=["mask"])
    (planted / "pair.png").write_bytes(pair_picture(found.neighbours[0], found.cases, Terms()))
    with Image.open(planted / "pair.png") as picture:
        assert picture.width == 2 * 760 + 8
        assert picture.height > 200


# --- the command -------------------------------------------------------------------------------------


def test_the_command_names_copies_and_writes_pictures(maisi: Callable[[str], Done], planted: Path) -> None:
    paths = " ".join(f"made/{name}_image.nii.gz" for name in ("exact", "deformed", "new100"))
    done = maisi(f"{paths} --memorization --reference real --spaces mask,intensity --checks labels-known --out pairs")
    assert done.code == 1
    states = dict(reversed(line.split()) for line in done.out.splitlines() if not line.startswith(" "))
    assert states == {"deformed": "FAIL", "exact": "FAIL", "new100": "pass"}
    assert f"2 cases are too near to a real case for chance among {REFERENCES} reference cases (z 4)" in done.err
    assert {"exact__r03.png", "deformed__r05.png"} <= {path.name for path in Path("pairs").iterdir()}
    assert maisi("made/exact_image.nii.gz --memorization --reference real --spaces mask --checks labels-known --out pairs").code == 2


def test_without_a_copy_nothing_is_called_safe(maisi: Callable[[str], Done]) -> None:
    line = "made/new100_image.nii.gz made/new101_image.nii.gz --memorization --reference real --spaces mask --checks labels-known"
    done = maisi(line)
    assert done.code == 0
    assert f"no copy found at this threshold among {REFERENCES} reference cases (z 4)" in done.err
    told = maisi(f"{line} --json").json
    assert told["memorization"]["references"] == REFERENCES
    assert {row["id"] for row in told["memorization"]["neighbours"]} == {"new100", "new101"}
    assert "no copy found at this threshold (4)" in told["cases"][0]["findings"][-1]["text"]
    assert "safe" not in done.out + done.err + str(told)
    assert maisi(f"{line} --threshold -5").code == 1
    assert maisi(f"{line} --html page.html").code == 0
    page = Path("page.html").read_text("utf-8")
    assert page.count("data:image/png") == 2 + 2  # two cases, two pairs
    assert "Search for copies" in page
    assert "safe" not in page
