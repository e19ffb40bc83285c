"""The mask database and the mask diffusion: what is found or made, that it depends on the seed alone, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from maisi_cli import quality, synthesis
from maisi_cli.anatomy import BODY, maisi, regions_of
from maisi_cli.catalog import model
from maisi_cli.cli import run
from maisi_cli.errors import CannotRun, MaisiError, Rejected, UsageError
from maisi_cli.events import Note
from maisi_cli.geometry import Geometry
from maisi_cli.lesions import measure
from maisi_cli.masks import Made, choose, database, fitting, open_source, renumbered, sizes
from maisi_cli.masks.diffusion import Diffusion
from maisi_cli.masks.sources import Wanted
from maisi_cli.settings import GenerateSettings, explain, resolve
from maisi_cli.synthesis import generate
from maisi_cli.volumes import Mask, read_mask, resample_labels, write_mask

from .golden import Shared, model_file

SMALL = Geometry(size=(64, 64, 64), spacing=(1.5, 1.5, 2.0))
LIVER, SPLEEN, LIVER_TUMOR, LUNG_TUMOR = 1, 3, 26, 23
usual = profile(max_examples=60, deadline=None)
NANO = model("nano-ct")


def chosen(**values: Any) -> GenerateSettings:
    return GenerateSettings(**{"size": SMALL.size, "spacing": SMALL.spacing, "regions": ("chest", "abdomen"), **values})


def index(shared: Shared) -> str:
    return str(shared("golden/datasets/candidate_masks_small.json"))


def small(shared: Shared, **values: Any) -> database.Database:
    return database.Database(chosen(mask_database=index(shared), **values), NANO)


# --- fitting a grid -----------------------------------------------------------------------------


@usual
@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 99))
def test_a_mask_on_another_grid_has_the_label_at_every_centre(size, seed):
    """At one field of view it is what `resample_labels` makes; and there and back on a grid twice as fine is the same."""
    rng = np.random.default_rng(seed)
    mask = Mask(array=rng.integers(0, 255, (6, 7, 8), dtype=np.uint8), geometry=Geometry(size=(6, 7, 8), spacing=(2.0, 3.0, 1.0)))
    assert np.array_equal(fitting.fit(mask, mask.geometry.resized(size)).array, resample_labels(mask, size).array)
    fine = fitting.fit(mask, mask.geometry.resized((12, 14, 16)))
    assert np.array_equal(fine.array, mask.array.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    assert np.array_equal(fitting.fit(fine, mask.geometry).array, mask.array)


@usual
@given(st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_what_lies_outside_is_background_and_the_middle_stays(more, less, compat):
    array = np.full((6, 6, 6), 7, np.uint8)
    mask = Mask(array=array, geometry=Geometry(size=(6, 6, 6), spacing=(1.0, 1.0, 1.0)))
    wanted = Geometry(size=(6 + 2 * more, 6 - less, 6), spacing=(1.0, 1.0, 1.0))
    made = fitting.fit(mask, wanted, compat=compat)
    assert made.array.shape == wanted.size
    assert np.count_nonzero(made.array) == 6 * (6 - less) * 6
    assert (made.array[more : more + 6] == 7).all()
    assert made.geometry.close_to(wanted) or compat


def test_a_spacing_that_differs_by_rounding_is_not_resampled():
    mask = Mask(array=np.ones((4, 4, 4), np.uint8), geometry=Geometry(size=(4, 4, 4), spacing=(0.7, 0.7, 1.0)))
    near = Geometry(size=(4, 4, 4), spacing=(float(np.float32(0.7)), 0.7, 1.0004))
    made = fitting.fit(mask, near)
    assert made.array is mask.array
    assert made.geometry == near


# --- searching the database ---------------------------------------------------------------------


def test_no_tumour_comes_that_was_not_asked_for(shared: Shared) -> None:
    entries = database.read_index(Path(index(shared)))
    tumors = {tumor.id for tumor in maisi().tumors()}
    free = database.suitable(entries, Wanted(regions=(1, 2)))
    assert {each.file for each in free} == {"m0.nii.gz", "m2.nii.gz"}
    for tumor in tumors:
        found = database.suitable(entries, Wanted(organs=frozenset({tumor})))
        assert found
        assert all(each.ids & tumors == {tumor} for each in found)


def test_a_region_is_asked_of_entries_that_list_none_too(shared: Shared, tmp_path: Path) -> None:
    """The reference takes them for every region (reference.md 10, number 23)."""
    rows = json.loads(Path(index(shared)).read_text())
    for row in rows:
        del row["top_region_index"], row["bottom_region_index"]
    (tmp_path / "candidate_masks.json").write_text(json.dumps(rows))
    head = Wanted(regions=(0,))
    found = database.suitable(database.read_index(tmp_path / "candidate_masks.json"), head)
    assert [each.file for each in found] == ["m8.nii.gz"]
    as_reference = Wanted(regions=(0,), compat=True)
    entries = database.read_index(tmp_path / "candidate_masks.json", compat=True)
    assert len(database.suitable(entries, as_reference)) == 3  # all that are free of tumours


def test_a_grid_is_found_although_its_spacing_was_rounded(shared: Shared) -> None:
    """The reference compares floats for equality (number 61)."""
    entries = database.read_index(Path(index(shared)))
    rounded = Geometry(size=SMALL.size, spacing=(float(np.float32(1.5001)), 1.5, 2.0))
    assert len(database.exact(entries, rounded)) == len(database.exact(entries, SMALL)) == 6
    assert database.exact(entries, rounded, compat=True) == []


def test_the_closest_grid_comes_first_and_too_coarse_ones_not_at_all(shared: Shared) -> None:
    entries = database.read_index(Path(index(shared)))
    wanted = Geometry(size=(72, 72, 60), spacing=(1.4, 1.4, 1.8))
    ranked = database.closest(entries, wanted)
    assert ranked[0].file == "m2.nii.gz"
    assert database.distance(ranked[0], wanted) == 0
    # m8, 64 voxels of 1 mm: fields of view 36.8, 36.8 and 44 mm less; 8, 8 and 4 voxels; 0.4, 0.4 and 0.8 mm
    assert database.distance(entries[8], wanted) == pytest.approx(11.76 + 0.2 + 1.6)
    assert [database.distance(each, wanted) for each in ranked] == sorted(database.distance(each, wanted) for each in ranked)
    fine = Geometry(size=(200, 72, 60), spacing=(0.5, 1.4, 1.8))
    assert [each.file for each in database.closest(entries, fine)] == []
    assert len(database.closest(entries, Geometry(size=(191, 72, 60), spacing=(0.5, 1.4, 1.8)))) == 8  # all but m3 have 64 or more


# --- masks of the database ----------------------------------------------------------------------


def test_a_mask_depends_on_the_seed_alone_and_is_named(shared: Shared) -> None:
    source = small(shared, regions=(), anatomy=("liver",), size=(48, 48, 48), spacing=(2.0, 2.0, 2.4))
    geometry = Geometry(size=(48, 48, 48), spacing=(2.0, 2.0, 2.4))
    settings = chosen()
    made = {seed: source(settings, geometry, seed) for seed in range(12)}
    again = small(shared, regions=(), anatomy=("liver",), size=(48, 48, 48), spacing=(2.0, 2.0, 2.4))
    for seed in (11, 3, 3):
        other = again(settings, geometry, seed)
        assert np.array_equal(other.mask.array, made[seed].mask.array)
        assert other.about == made[seed].about
    assert {each.about["id"] for each in made.values()} == {"m0.nii.gz", "m2.nii.gz"}
    for each in made.values():
        assert each.mask.geometry == geometry
        assert {LIVER, BODY} <= set(each.mask.ids())
        assert not each.about["exact"]


def test_a_mask_on_the_very_grid_is_taken_as_it_is(shared: Shared) -> None:
    source = small(shared, anatomy=("liver", "spleen"))
    made = source(chosen(), SMALL, 5)
    assert made.about["id"] == "m0.nii.gz"
    assert made.about["exact"]
    assert np.array_equal(made.mask.array, read_mask(shared("golden/datasets/all_masks_small/m0.nii.gz")).array)


def copied(shared: Shared, folder: Path, change: Callable[[dict[str, Any]], None] = lambda _row: None) -> Path:
    """Copy the index to `folder`, changed, with the masks beside it."""
    rows = json.loads(Path(index(shared)).read_text())
    for row in rows:
        change(row)
    folder.mkdir(exist_ok=True)
    (folder / "candidate_masks.json").write_text(json.dumps(rows))
    masks = shared("golden/datasets/all_masks_small")
    (folder / "all_masks").mkdir()
    for path in masks.glob("*.nii.gz"):
        (folder / "all_masks" / path.name).write_bytes(path.read_bytes())
    return folder / "candidate_masks.json"


def test_where_the_index_is_wrong_the_voxels_decide(shared: Shared, tmp_path: Path) -> None:
    """An entry that promises an organ which its file does not hold, or hides a tumour, is passed over, and that is said."""
    path = copied(shared, tmp_path, lambda row: row.update(label_list=sorted({*row["label_list"], 118} - {23, 24, 26, 27, 128})))
    source = database.Database(chosen(mask_database=str(path)), NANO)
    said: list[Any] = []
    for seed in range(8):
        assert source(chosen(), SMALL, seed, on_event=said.append).about["id"] == "m0.nii.gz"
    assert any("has a hepatic tumor" in note.text for note in said if isinstance(note, Note))
    with pytest.raises(UsageError, match=r"no mask of candidate_masks\.json can be used: .* has no prostate"):
        database.Database(chosen(mask_database=str(path), anatomy=("prostate",)), NANO)(chosen(), SMALL, 0)


def test_an_organ_must_survive_the_resampling(shared: Shared) -> None:
    """A volume of 24 mm around the middle shows no upper lobe: every mask is passed over, and the first reason is told."""
    tight = {"size": (16, 16, 16), "spacing": (1.5, 1.5, 1.5), "regions": (), "anatomy": ("left lung upper lobe",)}
    source = small(shared, **tight)
    with pytest.raises(UsageError, match="has no left lung upper lobe in this volume"):
        source(chosen(**tight), Geometry(size=(16, 16, 16), spacing=(1.5, 1.5, 1.5)), 0)


def test_an_archive_is_read_without_being_unpacked(shared: Shared, tmp_path: Path) -> None:
    path = copied(shared, tmp_path)
    with zipfile.ZipFile(tmp_path / "all_masks_4000.zip", "w") as archive:
        for file in (tmp_path / "all_masks").iterdir():
            archive.write(file, f"all_masks_4000/{file.name}")
            file.unlink()
    (tmp_path / "all_masks").rmdir()
    before = sorted(tmp_path.rglob("*"))
    made = database.Database(chosen(mask_database=str(path)), NANO)(chosen(), SMALL, 1)
    assert made.about["id"] == "m0.nii.gz"
    assert np.array_equal(made.mask.array, read_mask(shared("golden/datasets/all_masks_small/m0.nii.gz")).array)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "is not the index"),
        ("[]", "is not the index"),
        ('[{"dim": [1, 1, 1]}]', "no usable pseudo_label_filename"),
        ('[{"pseudo_label_filename": "a", "dim": [64, 64], "spacing": [1, 1, 1], "label_list": [1]}]', "no usable dim or spacing"),
        ('[{"pseudo_label_filename": "a", "dim": [64, 64, 64], "spacing": [1, 1, 0], "label_list": [1]}]', "no usable dim or spacing"),
        ('[{"pseudo_label_filename": "a", "dim": [64, 64, 64], "spacing": [1, 1, 1]}]', "no usable label_list"),
        (
            '[{"pseudo_label_filename": "../../etc/a", "dim": [64, 64, 64], "spacing": [1, 1, 1], "label_list": [1]}]',
            "outside the database",
        ),
        ('[{"pseudo_label_filename": "/etc/a", "dim": [64, 64, 64], "spacing": [1, 1, 1], "label_list": [1]}]', "outside the data"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "candidate_masks.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        database.Database(chosen(mask_database=str(tmp_path / "candidate_masks.json")), NANO)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"mask_database": "nowhere.json"}, UsageError, "there is no mask database nowhere.json"),
        ({}, UsageError, "nano-ct comes without a mask database"),
        ({"model": "rflow-ct"}, CannotRun, "mask database of rflow-ct is not installed"),
        ({"anatomy": ("prostate",), "small": True}, UsageError, "none of the 9 masks .* holds prostate, and is free"),
        ({"size": (256, 64, 64), "small": True}, UsageError, "too coarse for 256x64x64"),
    ],
)
def test_a_database_that_has_nothing_is_refused_when_it_is_opened(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], kind: type[MaisiError], message: str
) -> None:  # fmt: skip
    monkeypatch.setenv("MAISI_HOME", str(tmp_path))
    if values.pop("small", False):
        values["mask_database"] = index(shared)
    settings = chosen(**values)
    with pytest.raises(kind, match=message):
        open_source("database", settings, model(settings.model if settings.model != "auto" else "nano-ct"))


def test_masks_that_are_missing_or_damaged_are_named(shared: Shared, tmp_path: Path) -> None:
    path = copied(shared, tmp_path)
    source = database.Database(chosen(mask_database=str(path)), NANO)
    (tmp_path / "all_masks" / "m0.nii.gz").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"m0\.nii\.gz"):
        source(chosen(), SMALL, 0)
    (tmp_path / "all_masks" / "m0.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"m0\.nii\.gz of candidate_masks\.json is not in"):
        source(chosen(), SMALL, 0)
    (tmp_path / "all_masks.zip").write_bytes(b"no archive")
    with pytest.raises(UsageError, match=r"all_masks\.zip cannot be read"):
        source(chosen(), SMALL, 0)


def test_a_mask_without_body_is_not_used(tmp_path: Path) -> None:
    array = np.zeros((16, 16, 16), np.uint8)
    array[4:12, 4:12, 4:12] = LIVER
    geometry = Geometry(size=array.shape, spacing=(3.0, 3.0, 3.0))
    write_mask(Mask(array=array, geometry=geometry), tmp_path / "a.nii.gz")
    row = {"pseudo_label_filename": "./a.nii.gz", "dim": [16, 16, 16], "spacing": [3.0, 3.0, 3.0], "label_list": [1]}
    (tmp_path / "masks.json").write_text(json.dumps([row]))
    settings = chosen(mask_database=str(tmp_path), size=(16, 16, 16), spacing=(3.0, 3.0, 3.0), regions=())
    with pytest.raises(UsageError, match="no body envelope"):
        database.Database(settings, NANO)(settings, geometry, 0)


# --- anatomy sizes ------------------------------------------------------------------------------

LEVEL = st.one_of(st.just(-1.0), st.floats(0, 1).map(lambda size: round(size, 3)))
VECTORS = st.lists(st.tuples(*[LEVEL] * 10), min_size=1, max_size=12)


@usual
@given(VECTORS, st.dictionaries(st.integers(0, 4), LEVEL, max_size=3), st.integers(0, 99))
def test_a_body_without_a_tumour_asked_for_is_told_of_none(vectors, asked, seed):
    """The reference takes the neighbour's over in 95 % of cases (number 17)."""
    vector = sizes.condition(vectors, asked, seed)
    assert all(vector[slot] == -1 for slot in sizes.TUMORS)
    assert all(vector[slot] == size for slot, size in asked.items())
    assert sizes.target_tumor(vector, asked) is None
    others = [slot for slot in range(5) if slot not in asked]
    assert any(all(vector[slot] == each[slot] for slot in others) for each in vectors)


@usual
@given(VECTORS, st.dictionaries(st.integers(0, 4), LEVEL, max_size=3), st.sampled_from(sizes.TUMORS), st.integers(0, 99))
def test_a_tumour_that_is_asked_for_comes_alone_and_is_the_one_mended_around(vectors, asked, slot, seed):
    """Another one in the neighbour's vector becomes the target in the reference (number 19)."""
    asked = {**asked, slot: 0.3}
    vector = sizes.condition(vectors, asked, seed)
    assert [each for each in sizes.TUMORS if vector[each] != -1] == [slot]
    assert vector[slot] == 0.3
    assert sizes.target_tumor(vector, asked) == maisi().id(sizes.SLOTS[slot])


@usual
@given(VECTORS, st.dictionaries(st.integers(0, 9), LEVEL, min_size=1, max_size=3))
def test_in_compatibility_the_nearest_patient_is_taken(vectors, asked):
    far = [sum(abs(each[slot] - size) for slot, size in asked.items()) for each in vectors]
    nearest = vectors[far.index(min(far))]
    vector = sizes.condition(vectors, asked, seed=5, compat=True)
    assert vector == tuple(asked.get(slot, size) for slot, size in enumerate(nearest))


def test_samples_of_one_request_have_bodies_of_their_own(shared: Shared) -> None:
    """The reference gives all of them one (number 18)."""
    vectors = sizes.read_vectors(shared("golden/datasets/all_anatomy_size_conditions.json"))
    made = [sizes.condition(vectors, {1: 0.6}, seed) for seed in range(20)]
    assert len(set(made)) > 1
    assert made == [sizes.condition(vectors, {1: 0.6}, seed) for seed in range(20)]
    free = [vector for vector in vectors if all(vector[slot] == -1 for slot in sizes.TUMORS)]
    assert {vector[0] for vector in made} <= {vector[0] for vector in free}


def test_an_organ_that_must_be_there_is_taken_from_patients_who_have_it() -> None:
    with_it, without = (0.5,) * 5 + (-1.0,) * 5, (-1.0,) * 10
    assert {sizes.condition([with_it, without], {}, seed, present={1}) for seed in range(20)} == {with_it}
    with pytest.raises(UsageError, match="none of the 1 patients has liver"):
        sizes.condition([without], {}, present={1})
    assert sizes.condition([without], {1: 0.4}, present={1})[1] == 0.4


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["spleen=0.3"], "no anatomy size named 'spleen'"),
        (["livr=0.3"], "no label named 'livr'"),
        (["liver=0.3", "liver=0.4"], "liver twice"),
        (["lung tumor=0.1", "bone lesion=0.2"], "lung tumor and bone lesion"),
    ],
)
def test_sizes_that_the_networks_do_not_know_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sizes.parse(texts)


def test_sizes_beyond_one_are_taken_up_to_the_largest_that_a_patient_has() -> None:
    """The reference takes 0 to 1, where the tumours of its own patients reach 16.5 (number 36)."""
    patients = [(0.3,) * 5 + (-1.0,) * 5, (0.3,) * 5 + (-1.0, 16.5, -1.0, -1.0, -1.0)]
    asked = sizes.parse(resolve({"model": "rflow-ct", "anatomy_size": "pancreatic tumor=16.5,liver=1"}).settings.anatomy_size)
    for slot, size in asked.items():
        sizes.check_known(patients, slot, size)
    assert sizes.condition(patients, asked, 0)[6] == 16.5
    with pytest.raises(UsageError, match=r"pancreatic tumor=16\.6 is larger than any of 2 patients"):
        sizes.check_known(patients, 6, 16.6)


def test_an_organ_that_is_asked_to_be_absent_is_not_required() -> None:
    """The reference then demands it, and fails (number 9)."""
    asked = sizes.parse(["liver=0.5", "gallbladder=-1", "hepatic_tumor=0.2"])
    assert asked == {1: 0.5, 0: -1.0, 7: 0.2}
    assert sizes.required(asked) == {LIVER, LIVER_TUMOR}


# --- which source -------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that pretends that parts of rflow-ct are installed."""
    monkeypatch.setenv("MAISI_HOME", str(tmp_path))
    spec = model("rflow-ct")

    def install(*, masks: bool = False, networks: bool = False) -> Any:
        for weight in spec.weights:
            wanted = networks if weight.part in ("mask_vae", "mask_unet") else masks and weight.part == "data"
            if wanted:
                spec.weight_path(weight).parent.mkdir(parents=True, exist_ok=True)
                spec.weight_path(weight).write_bytes(b"")
        return spec

    return install


@pytest.mark.parametrize(
    ("values", "masks", "networks", "name", "reason"),
    [
        ({}, True, True, "database", "mask database of rflow-ct"),
        ({}, False, True, "diffusion", "its mask database is not installed"),
        ({}, False, False, "phantom", "maisi models pull rflow-ct"),
        ({"anatomy_size": ("liver=0.5",)}, True, False, "diffusion", "it alone"),
        ({"tumor": "liver:15mm"}, True, True, "diffusion", ""),
        ({"tumor": "liver:15mm"}, True, False, "database", ""),
        ({"mask_database": "mine.json"}, False, True, "database", ""),
        ({"mask": "mine.nii.gz"}, True, True, "file", ""),
        ({"mask_source": "phantom"}, True, True, "phantom", ""),
    ],
)
def test_auto_takes_what_is_installed_and_says_so(released, values, masks, networks, name, reason):
    found, why = choose(GenerateSettings(**values), released(masks=masks, networks=networks))
    assert found == name
    assert reason.replace("its mask database", "the mask database of rflow-ct") in why


def test_an_index_without_its_masks_is_no_database(released) -> None:
    """They are fetched apart, being larger than all networks together."""
    spec = released(masks=True)
    archive = next(spec.weight_path(weight) for weight in spec.weights if weight.path.endswith(".zip"))
    archive.unlink()
    assert choose(GenerateSettings(), spec)[0] == "phantom"
    with pytest.raises(CannotRun, match=r"not installed: .*all_masks\*\.zip is missing") as caught:
        open_source("database", chosen(), spec)
    assert "maisi models pull rflow-ct --mask-database" in str(caught.value.hint)


def test_nano_takes_the_phantom_without_a_word() -> None:
    assert choose(GenerateSettings(), NANO) == ("phantom", "")


@pytest.mark.parametrize(
    ("source", "values", "flag"),
    [
        ("phantom", {"anatomy_size": ("liver=0.5",)}, "--anatomy-size"),
        ("database", {"anatomy_size": ("liver=0.5",)}, "--anatomy-size"),
        ("file", {"anatomy_size": ("liver=0.5",)}, "--anatomy-size"),
    ],
)
def test_a_source_refuses_what_it_cannot_honour_in_one_line(source, values, flag):
    with pytest.raises(UsageError) as caught:
        open_source(source, chosen(**values), NANO)
    assert f"the mask source {source} cannot honour {flag}" in caught.value.message
    assert "--mask-source " in str(caught.value.hint)
    assert "diffusion" in str(caught.value.hint)
    with pytest.raises(UsageError, match="cannot honour --mask-steps"):
        open_source("phantom", chosen(), NANO, typed=frozenset({"mask_steps"}))


def test_regions_of_what_is_drawn_are_those_asked_for(shared: Shared) -> None:
    made = small(shared)(chosen(), SMALL, 0)
    assert isinstance(made, Made)
    assert regions_of(made.mask.ids()) == (1, 2)


# --- masks of the diffusion ---------------------------------------------------------------------

TINY = Geometry(size=(32, 32, 32), spacing=(1.5, 1.5, 1.5))


@pytest.fixture(scope="module")
def diffusion(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Diffusion]:
    """Return a function that opens the source with the small networks of the goldens, on a cube of 32 voxels."""
    path = model_file(shared, "rflow", tmp_path_factory.mktemp("model"), latent=(8, 8, 8))

    def opened(**values: Any) -> Diffusion:
        settings = chosen(**{"size": TINY.size, "spacing": TINY.spacing, "mask_steps": 2, "regions": (), "model": str(path), **values})
        source = open_source("diffusion", settings, model(str(path)), typed=frozenset({"mask_steps"}))
        assert isinstance(source, Diffusion)
        source.settings = settings  # type: ignore[attr-defined]
        return source

    return opened


def make(source: Diffusion, seed: int, said: list[Any] | None = None) -> Made:
    return source(source.settings, TINY, seed, on_event=(said if said is not None else []).append)  # type: ignore[attr-defined]


def test_a_generated_mask_depends_on_the_seed_alone(diffusion) -> None:
    one, other = diffusion(), diffusion()
    made = [make(one, seed) for seed in (1, 2, 1)]
    assert np.array_equal(made[0].mask.array, made[2].mask.array)
    assert not np.array_equal(made[0].mask.array, made[1].mask.array)
    assert np.array_equal(make(other, 2).mask.array, made[1].mask.array)
    assert made[0].about == made[2].about
    assert made[0].mask.geometry == TINY


@pytest.mark.parametrize("sizes_asked", [(), ("liver=0.5",)])
def test_no_tumour_is_painted_that_was_not_asked_for(diffusion, sizes_asked: tuple[str, ...]) -> None:
    source = diffusion(anatomy_size=sizes_asked)
    tumors = {tumor.id for tumor in maisi().tumors()}
    for seed in range(4):
        made = make(source, seed)
        assert not tumors & set(made.mask.ids())
        assert all(made.about["anatomy_size"][sizes.SLOTS[slot]] == -1 for slot in sizes.TUMORS)
        assert "tumor" not in made.about


def test_in_compatibility_the_nearest_patient_s_tumour_comes_along(diffusion) -> None:
    made = make(diffusion(anatomy_size=("liver=0.5",), compat="reference"), 1)
    assert made.about["anatomy_size"]["pancreatic tumor"] == 0.6792


def test_what_the_networks_are_told_is_what_was_asked_for(diffusion) -> None:
    made = make(diffusion(anatomy_size=("liver=0.5", "gallbladder=-1")), 1)
    assert made.about["anatomy_size"]["liver"] == 0.5
    assert made.about["anatomy_size"]["gallbladder"] == -1
    assert LIVER in made.mask.ids()


class Painter:
    """Stands in for the networks: a ball of tumour whose volume grows with the size that is told."""

    def __init__(self, source: Diffusion, ml_per_size: float) -> None:
        self.told: list[float] = []
        self.ml_per_size = ml_per_size
        source.body = self  # type: ignore[method-assign, assignment]

    def __call__(self, vector: tuple[float, ...], seed: int, *, tumor: int | None, on_event: Any) -> Mask:
        self.told.append(vector[7])
        grid = np.stack(np.meshgrid(*[np.arange(32) - 15.5] * 3, indexing="ij"))
        distance = np.linalg.norm(grid, axis=0) * 1.5
        array = np.full((32, 32, 32), LIVER, np.uint8)
        array[0] = BODY
        array[distance <= (vector[7] * self.ml_per_size * 1000 * 6 / np.pi) ** (1 / 3) / 2] = tumor or LIVER
        return Mask(array=array, geometry=TINY)


@pytest.mark.parametrize("ml_per_size", [0.8, 30.0])
def test_tries_come_closer_to_the_tumour_that_is_asked_for(diffusion, ml_per_size: float) -> None:
    """15 mm are 1.77 ml; the small data's typical size makes 0.4 ml or 14 ml at first."""
    source = diffusion(tumor="liver:15mm")
    painter = Painter(source, ml_per_size)
    made = make(source, 3)
    found = made.about["tumor"]
    assert found["reached"]
    assert found["tries"] == len(painter.told) > 1
    assert (found["requested"], found["name"]) == ("liver:15mm", "hepatic tumor")
    assert 11.25 <= found["diameter_mm"] <= 18.75
    assert found["volume_ml"] == pytest.approx(np.count_nonzero(made.mask.array == LIVER_TUMOR) * 1.5**3 / 1000, abs=1e-4)
    assert (found["host"], found["overlap"], found["components"]) == ("liver", 1.0, 1)
    assert made.about["anatomy_size"]["hepatic tumor"] == painter.told[-1]


def test_a_tumour_that_cannot_be_reached_is_said_and_recorded(diffusion) -> None:
    source = diffusion(tumor="liver:40mm")
    Painter(source, 0.05)
    said: list[Any] = []
    found = make(source, 3, said).about["tumor"]
    assert not found["reached"]
    assert found["miss"] > 0.25
    warnings = [note for note in said if isinstance(note, Note) and note.level == "warning"]
    assert any("liver:40mm was asked for, and the best of 4 masks has" in note.text for note in warnings)


def test_a_relative_size_is_told_as_it_is(diffusion) -> None:
    source = diffusion(tumor="hepatic tumor=0.3")
    painter = Painter(source, 20.0)
    assert make(source, 1).about["tumor"]["tries"] == 1
    assert painter.told == [0.3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tumor": "liver:15mm", "anatomy_size": ("hepatic tumor=0.2",)}, "both give the size of the hepatic tumor"),
        ({"tumor": "liver:15mm", "anatomy": ("lung tumor",)}, "lung tumor and hepatic tumor are asked for"),
        ({"anatomy_size": ("liver=1.5",)}, "liver=1.5 is larger than any of 12 patients"),
        ({"tumor": "kidney:15mm"}, "no tumour of 'kidney' can be made"),
    ],
)
def test_what_the_diffusion_cannot_make_is_refused_when_it_is_opened(diffusion, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        diffusion(**values)


def test_mask_networks_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAISI_HOME", str(tmp_path))
    with pytest.raises(CannotRun, match="mask networks of rflow-ct are not installed"):
        open_source("diffusion", chosen(), model("rflow-ct"))
    with pytest.raises(UsageError, match="nano-ct has no mask networks"):
        open_source("diffusion", chosen(), NANO)


# --- the whole ----------------------------------------------------------------------------------


@pytest.fixture
def whole(shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the settings of a short run of the small networks, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    path = model_file(shared, "rflow", tmp_path / "model", latent=(8, 8, 8))
    return {"model": str(path), "preset": "chest-abdomen", "regions": (), "steps": 1, "mask_steps": 1, "seed": 3, "preview": False,
            "size": "32x32x32", "spacing": "1.5x1.5x1.5", "dtype": "fp32", "on_qc_fail": "keep", "allow_ood": True}  # fmt: skip


def test_a_run_records_the_mask_of_the_database(whole: dict[str, Any]) -> None:
    """One mask has the tumour that is asked for: the samples share it, which is said, and the tumour moves."""
    del whole["mask_steps"]
    whole |= {"mask_source": "database", "size": "64x64x64", "spacing": "1.5x1.5x2", "mode": "mask", "count": 2, "tumor": "liver:15mm"}
    said: list[Any] = []
    samples = list(generate(**whole, out="a", on_event=said.append))
    assert any("2 samples share 1 of the masks" in note.text for note in said if isinstance(note, Note))
    for sample in samples:
        found = sample.record["mask"]
        assert (found["source"], found["id"], found["exact"]) == ("database", "m4.nii.gz", True)
        assert sample.mask is not None
        volume = np.count_nonzero(sample.mask.array == LIVER_TUMOR) * 1.5 * 1.5 * 2 / 1000
        assert found["tumor"]["volume_ml"] == pytest.approx(volume, abs=1e-3)
        assert found["tumor"]["host"] == "liver"
        assert sample.record["settings"]["tumor"]["value"] == "liver:15mm"
    alone = list(generate(**whole, out="b", shard="2/2"))
    assert alone[0].paths["label"].read_bytes() == samples[1].paths["label"].read_bytes()
    assert samples[0].paths["label"].read_bytes() != samples[1].paths["label"].read_bytes()


def test_the_best_of_several_masks_of_the_database_is_taken(shared: Shared) -> None:
    """Both masks with a lung tumour are tried; of what was tried, none is closer than the one that is taken."""
    source = small(shared, tumor="lung:1ml", regions=(), size=(60, 60, 60), spacing=(1.6, 1.6, 1.9))
    geometry = Geometry(size=(60, 60, 60), spacing=(1.6, 1.6, 1.9))
    tried: list[float] = []
    made_one = source.varied

    def varied(*args: Any, **kwargs: Any) -> Any:
        mask, about = made_one(*args, **kwargs)
        tried.append(abs(measure(mask, LUNG_TUMOR).volume_ml / 1.0 - 1))
        return mask, about

    source.varied = varied  # type: ignore[method-assign]
    found = source(chosen(), geometry, 1).about["tumor"]
    assert found["tries"] == len(tried)
    assert found["miss"] == pytest.approx(min(tried), abs=1e-3)
    assert found["reached"] is (min(tried) <= 0.25)
    with pytest.raises(UsageError, match="knows no relative sizes such as lung tumor="):
        open_source("database", chosen(mask_database=index(shared), tumor="lung=0.3"), model("rflow-ct"))


def test_a_run_generates_mask_and_image_and_records_both(whole: dict[str, Any]) -> None:
    sample = next(iter(generate(**whole, mask_source="diffusion", anatomy_size="liver=0.5")))
    assert sample.mask is not None
    assert sample.image is not None
    assert LIVER in sample.mask.ids()
    assert sample.record["mask"]["anatomy_size"]["liver"] == 0.5
    parts = {part["part"]: part["sha256"] for part in sample.record["model"]["weights"]}
    assert set(parts) == {"vae", "unet", "controlnet", "mask_vae", "mask_unet"}
    assert all(parts.values())
    assert (sample.image.array[sample.mask.array == 0] == -1000).all()


def test_a_mask_alone_needs_the_mask_networks_only(whole: dict[str, Any]) -> None:
    sample = next(iter(generate(**whole, mode="mask", mask_source="diffusion")))
    assert {part["part"] for part in sample.record["model"]["weights"]} == {"mask_vae", "mask_unet"}
    assert sample.record["environment"]["device"]["name"] == "cpu"


def test_a_mask_that_cannot_be_made_costs_one_sample_and_not_the_run(
    whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The brain is not among what the stand-in paints: without retries the sample is left out, and a single one says why."""
    monkeypatch.setattr(Diffusion, "body", lambda _self, _vector, _seed, **_: Mask(array=np.full(TINY.size, BODY, np.uint8), geometry=TINY))
    whole |= {"mode": "mask", "mask_source": "diffusion", "anatomy": "brain"}
    with pytest.raises(Rejected, match="2 of 2 samples"):
        list(generate(**whole, count=2))
    with pytest.raises(Rejected, match="none of 4 masks could be used: the last one has no brain"):
        list(generate(**whole))
    assert not Path("run").exists()


def test_guidance_toward_the_tumour_compares_with_the_mask_without_it(tmp_path: Path, whole: dict[str, Any]) -> None:
    """It acts on bone lesions too, which the reference leaves in place (number 32); without a tumour it says that it does nothing."""
    array = np.full((32, 32, 32), BODY, np.uint8)
    array[8:24, 8:24, 8:24] = 33
    write_mask(Mask(array=array, geometry=Geometry(size=array.shape, spacing=(3.0, 3.0, 3.0))), tmp_path / "healthy.nii.gz")
    array[12:20, 12:20, 12:20] = 128
    write_mask(Mask(array=array, geometry=Geometry(size=array.shape, spacing=(3.0, 3.0, 3.0))), tmp_path / "lesion.nii.gz")
    fixed = {key: value for key, value in whole.items() if key not in ("size", "spacing", "mask_steps", "preset")}
    said: list[Any] = []

    def image(name: str, scale: float) -> np.ndarray:
        settings = {**fixed, "mask": f"{name}.nii.gz", "cfg_tumor": scale, "out": f"{name}{scale}"}
        made = next(iter(generate(**settings, on_event=said.append))).image
        assert made is not None
        return np.asarray(made.array)

    assert not np.array_equal(image("lesion", 0.0), image("lesion", 5.0))
    assert not [note for note in said if isinstance(note, Note) and "cfg-tumor" in note.text]
    assert np.array_equal(image("healthy", 0.0), image("healthy", 5.0))
    assert [note.text for note in said if isinstance(note, Note) and "--cfg-tumor does nothing here" in note.text]


@pytest.mark.parametrize("source", ["phantom", "database", "diffusion", "file"])
def test_a_sample_that_fails_is_made_again_whatever_its_mask_comes_from(
    shared: Shared, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:  # fmt: skip
    """The reference never retries with a generated mask, and moves a mask of its database alike each time (numbers 24 and 21)."""
    whole |= {"mask_source": source, "on_qc_fail": "retry"}
    if source != "diffusion":
        del whole["mask_steps"]
    if source == "database":
        whole |= {"tumor": "liver:15mm", "spacing": "3x3x4"}  # one mask has it, and moves it
    if source == "phantom":
        whole["spacing"] = "9x9x9"
    if source == "file":
        whole |= {"mask": str(shared("golden/datasets/all_masks_small/m0.nii.gz")), "mask_source": "auto"}
        del whole["size"], whole["spacing"], whole["preset"]
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def check(image: Any, mask: Mask, **_: Any) -> quality.Verdict:
        seen.append((image.array, mask.array))
        answer = quality.Finding(check="test", label=None, value=0, low=0, high=0, passed=len(seen) > 1, text="no")
        return quality.Verdict(findings=(answer,))

    monkeypatch.setattr(synthesis.quality, "check", check)
    sample = next(iter(generate(**whole)))
    assert (len(seen), sample.record["attempt"]) == (2, 1)
    (first_image, first), (second_image, second) = seen
    assert not np.array_equal(first_image, second_image)
    assert np.array_equal(first, second) is (source == "file")


def test_a_seed_that_is_typed_moves_a_tumour_as_the_number_does(shared: Shared, whole: dict[str, Any]) -> None:
    """A typed seed of the reference is text, by which MONAI moves tumours at random (number 20). Here it is typed in another process."""
    fixed = {"model": "nano-ct", "mode": "mask", "mask_database": index(shared), "size": "64x64x64", "spacing": "1.5x1.5x2",
             "allow_ood": True, "anatomy": "hepatic tumor"}  # fmt: skip
    words = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in fixed.items()]
    lines = [["generate", "-q", "--seed", "7", *words, "--out", "typed"],
             ["generate", "-q", "--seed", "7", *words, "--out", "typed-reference", "--compat", "reference"]]  # fmt: skip
    code = f"import sys; from maisi_cli.cli import run; sys.exit(max([run(line) for line in {lines!r}]))"
    subprocess.run([sys.executable, "-c", code], check=True)
    for end, compat in (("", None), ("-reference", "reference")):
        made = next(iter(generate(**fixed, seed=7, out=f"here{end}", compat=compat)))
        assert made.record["mask"]["augmented"]["moved"] == ["hepatic tumor"]
        assert (Path(f"typed{end}") / made.paths["label"].name).read_bytes() == made.paths["label"].read_bytes()


def test_the_voxels_of_a_saved_mask_are_as_large_as_was_asked_for(shared: Shared, whole: dict[str, Any]) -> None:
    """The reference zooms a body with its affine: 1.494 or 1.518 mm for 1.5 (number 22); in compatibility the affine stays too."""
    for compat in (None, "reference"):
        sample = next(iter(generate(model="nano-ct", mode="mask", mask_database=index(shared), size="64x64x64", spacing="1.5x1.5x2",
                                    allow_ood=True, seed=1, compat=compat, out=f"run{compat}")))  # fmt: skip
        assert sample.record["mask"]["augmented"]["zoom"] != 1
        assert read_mask(sample.paths["label"]).geometry.spacing == (1.5, 1.5, 2.0)


def test_compatibility_numbers_labels_as_the_reference(whole: dict[str, Any]) -> None:
    sample = next(iter(generate(**whole, mode="mask", mask_source="diffusion", anatomy_size="liver=0.5,stomach=0.4", compat="reference")))
    assert sample.mask is not None
    assert set(sample.mask.ids()) <= {1, 2}
    array = np.array([0, 1, 23, 200, 3], np.uint8).reshape(5, 1, 1)
    mask = Mask(array=array, geometry=Geometry(size=(5, 1, 1), spacing=(1.0, 1.0, 1.0)))
    for names, wanted in (
        (["lung tumor"], [0, 0, 1, 0, 0]),
        (["lung tumor", "liver"], [0, 2, 1, 0, 0]),
        (["liver", "spleen"], [0, 1, 0, 0, 2]),
    ):
        assert renumbered(mask, chosen(anatomy=tuple(names))).array.ravel().tolist() == wanted


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--anatomy-size", "liver=0.5"], 2, "the mask source phantom cannot honour --anatomy-size"),
        (["--anatomy-size", "liver"], 2, "write it like liver=0.5"),
        (["--anatomy-size", "liver=-2"], 2, "write it like liver=0.5"),
        (["--tumor", "liver:15mm"], 2, "nano-ct never saw a hepatic tumor"),
        (["--tumor", "hepatic tumor=0.3", "--mode", "mask"], 2, "phantom knows no relative sizes"),
        (["--tumor", "liver"], 2, "has no size"),
        (["--tumor", "liver:15mm", "--mode", "image"], 2, "--mode image makes no mask"),
        (["--mask-steps", "20"], 2, "the mask source phantom cannot honour --mask-steps"),
        (["--cfg-tumor", "2", "--mode", "mask"], 2, "--cfg-tumor compares two masks"),
        (["--cfg-tumor", "2"], 2, "--cfg-tumor needs masks with a tumour"),
        (["--cfg-tumor", "2", "--cfg-modality", "2"], 2, "exclude each other"),
        (["--mask-source", "database"], 2, "nano-ct comes without a mask database"),
        (["--mask-source", "diffusion"], 2, "nano-ct has no mask networks"),
        (["--mask-database", "nowhere.json"], 2, "there is no mask database nowhere.json"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_the_command_refuses_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str,
    dry: bool,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(["generate", "--model", "nano-ct", "--seed", "1", "--out", "run", *words, *(["--dry-run"] if dry else [])]) == code
    error = capsys.readouterr().err
    assert message in error
    assert not list(tmp_path.iterdir())


def test_sizes_are_shown_and_repeated_as_they_were_typed(whole: dict[str, Any]) -> None:
    resolved = resolve({**whole, "anatomy_size": "liver=0.50, gallbladder=-1", "tumor": "liver:15mm"})
    assert resolved.settings.anatomy_size == ("liver=0.5", "gallbladder=-1")
    shown = {row[0]: row[1] for row in explain(resolved)}
    assert shown["anatomy_size"] == "liver=0.5,gallbladder=-1"
    assert resolve({**whole, "anatomy_size": ["liver=0.5", "gallbladder=-1"]}).settings.anatomy_size == resolved.settings.anatomy_size
    assert resolve(whole, assignments=["anatomy_size={liver=0.5, gallbladder=-1}"]).settings.anatomy_size == resolved.settings.anatomy_size
