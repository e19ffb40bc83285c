"""The vocabulary against the released label dictionary, names as people type them, regions, and remaps there and back."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maisi_cli import anatomy, plugins
from maisi_cli.anatomy import BODY, Label, Remap, Vocabulary, maisi, region_index, regions_of, remap_table, remaps
from maisi_cli.errors import UsageError
from maisi_cli.hookspecs import hookimpl

usual = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# label_dict.json of the released models: the names of ids 1, 2, 3, ... 132
NAMES = """
liver, dummy1, spleen, pancreas, right kidney, aorta, inferior vena cava, right adrenal gland, left adrenal gland, gallbladder,
esophagus, stomach, duodenum, left kidney, bladder, dummy2, portal vein and splenic vein, dummy3, small bowel, dummy4, dummy5, brain,
lung tumor, pancreatic tumor, hepatic vessel, hepatic tumor, colon cancer primaries, left lung upper lobe, left lung lower lobe,
right lung upper lobe, right lung middle lobe, right lung lower lobe, vertebrae L5, vertebrae L4, vertebrae L3, vertebrae L2,
vertebrae L1, vertebrae T12, vertebrae T11, vertebrae T10, vertebrae T9, vertebrae T8, vertebrae T7, vertebrae T6, vertebrae T5,
vertebrae T4, vertebrae T3, vertebrae T2, vertebrae T1, vertebrae C7, vertebrae C6, vertebrae C5, vertebrae C4, vertebrae C3,
vertebrae C2, vertebrae C1, trachea, left iliac artery, right iliac artery, left iliac vena, right iliac vena, colon, left rib 1,
left rib 2, left rib 3, left rib 4, left rib 5, left rib 6, left rib 7, left rib 8, left rib 9, left rib 10, left rib 11, left rib 12,
right rib 1, right rib 2, right rib 3, right rib 4, right rib 5, right rib 6, right rib 7, right rib 8, right rib 9, right rib 10,
right rib 11, right rib 12, left humerus, right humerus, left scapula, right scapula, left clavicula, right clavicula, left femur,
right femur, left hip, right hip, sacrum, left gluteus maximus, right gluteus maximus, left gluteus medius, right gluteus medius,
left gluteus minimus, right gluteus minimus, left autochthon, right autochthon, left iliopsoas, right iliopsoas, left atrial appendage,
brachiocephalic trunk, left brachiocephalic vein, right brachiocephalic vein, left common carotid artery, right common carotid artery,
costal cartilages, heart, left kidney cyst, right kidney cyst, prostate, pulmonary vein, skull, spinal cord, sternum,
left subclavian artery, right subclavian artery, superior vena cava, thyroid gland, vertebrae S1, bone lesion, dummy6, dummy7, dummy8,
airway
"""
NAME_OF = {**dict(enumerate((name.strip() for name in NAMES.replace("\n", " ").split(",")), 1)), BODY: "body"}
DUMMIES = (2, 16, 18, 20, 21, 129, 130, 131)
TUMORS = (23, 24, 26, 27, 128)
# ids that the mask autoencoder has no channel for
NOT_RAW = {2, 16, 18, 20, 21, 116, 117, 130, 131}
MARKERS = ({22, 120}, {28, 29, 30, 31, 32}, {1, 2, 3, 4, 5, 14}, {93, 94})
MAISI_IDS = sorted(NAME_OF)


@pytest.fixture
def with_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that installs a plugin with these labels, and forget them afterwards."""
    caches = (anatomy.maisi, anatomy.remaps)

    def install(**labels: Any) -> None:
        class Acme:
            @hookimpl
            def register_labels(self, register: Any) -> None:
                for name, target in labels.items():
                    register(name.replace("_", " "), target, summary="of a test")

        loaded = plugins.load("", extra={"acme": Acme()})
        monkeypatch.setattr(plugins, "plugins", lambda: loaded)
        for cached in caches:
            cached.cache_clear()

    yield install
    for cached in caches:
        cached.cache_clear()


# --- the vocabulary -------------------------------------------------------------------------


def test_ids_and_names_are_those_of_the_released_dictionary():
    assert len(NAME_OF) == 133
    assert {label.id: label.name for label in maisi().labels} == NAME_OF
    assert maisi().ids() == tuple(sorted(NAME_OF))


def test_raw_channels_count_up_over_the_ids_that_the_mask_generator_knows():
    known = [value for value in MAISI_IDS if value not in NOT_RAW]
    assert {label.id: label.raw for label in maisi().labels if label.raw is not None} == {value: k for k, value in enumerate(known, 1)}
    assert [maisi().get(value).raw for value in (1, 22, 115, 118, 129, 132, BODY)] == [1, 17, 110, 111, 122, 123, 124]


def test_groups_hold_the_dummies_tumours_and_cysts():
    assert maisi().ids("dummy") == DUMMIES
    assert tuple(label.id for label in maisi().tumors()) == TUMORS
    assert maisi().ids("cyst") == (116, 117)
    assert maisi().ids("body") == (BODY,)
    assert maisi().ids("lung") == (28, 29, 30, 31, 32)
    assert maisi().ids("rib") == tuple(range(63, 87))
    assert maisi().ids("spine") == (*range(33, 57), 97, 127)
    assert maisi().ids("muscle") == tuple(range(98, 108))
    sizes = Counter(label.group for label in maisi().labels)
    assert sizes == {
        "spine": 26, "rib": 24, "vessel": 17, "bone": 13, "organ": 11, "muscle": 10, "dummy": 8, "bowel": 5, "tumor": 5, "lung": 5,
        "nervous": 2, "airway": 2, "heart": 2, "cyst": 2, "body": 1,
    }  # fmt: skip


def test_every_label_but_dummies_and_body_lies_in_a_region():
    nowhere = [label.id for label in maisi().labels if not label.regions]
    assert nowhere == [*DUMMIES, BODY]
    assert all(region in anatomy.REGIONS for label in maisi().labels for region in label.regions)
    assert Counter(region for label in maisi().labels for region in label.regions) == {"head": 11, "chest": 69, "abdomen": 30, "lower": 21}


def test_left_and_right_come_in_pairs_of_one_kind():
    paired = {label.name.removeprefix("left ").removeprefix("right ") for label in maisi().labels if label.side}
    alone = {"atrial appendage", "lung middle lobe"}
    for name in paired - alone:
        left, right = (maisi().get(maisi().id(f"{side} {name}")) for side in ("left", "right"))
        assert (left.group, left.regions) == (right.group, right.regions)
        assert (left.side, right.side) == ("left", "right")
    assert maisi().get(1).side is None
    assert len(paired - alone) == 32


def test_lesions_lie_in_hosts_that_are_no_lesions():
    hosts = {label.name: maisi().name_of(label.host) for label in maisi().labels if label.host}
    assert hosts == {
        "lung tumor": "left lung upper lobe", "pancreatic tumor": "pancreas", "hepatic tumor": "liver", "colon cancer primaries": "colon",
        "left kidney cyst": "left kidney", "right kidney cyst": "right kidney",
    }  # fmt: skip


def test_colours_are_bytes_and_anatomy_is_told_apart_from_the_body():
    assert all(len(label.color) == 3 and all(0 <= value <= 255 for value in label.color) for label in maisi().labels)
    body = maisi().get(BODY).color
    assert all(label.color != body for label in maisi().labels if label.id != BODY)


# --- names --------------------------------------------------------------------------------


@usual
@given(st.sampled_from(MAISI_IDS), st.sampled_from(["{}", " {} ", "{}\t"]), st.sampled_from([" ", "_", "-", "  "]), st.booleans())
def test_a_label_is_found_however_it_is_spelt(value, around, joint, upper):
    name = maisi().name_of(value).replace(" ", joint)
    assert maisi().id(around.format(name.upper() if upper else name)) == value
    assert maisi().id(value) == maisi().id(str(value)) == value


@pytest.mark.parametrize(
    ("alias", "name"),
    [("IVC", "inferior vena cava"), ("urinary_bladder", "bladder"), ("liver tumor", "hepatic tumor"), ("kidney mass", "dummy6"),
     ("Body envelope", "body"), ("bone tumor", "bone lesion"), ("bowel", "small bowel")]
)  # fmt: skip
def test_other_names_people_type(alias, name):
    assert maisi().name_of(maisi().id(alias)) == name


def test_every_alias_leads_to_a_label_and_hides_none():
    names = {anatomy.fold(name) for name in NAME_OF.values()}
    for alias, name in maisi().aliases.items():
        assert alias not in names
        assert anatomy.fold(name) in names


@pytest.mark.parametrize(
    ("wrong", "suggestion"),
    [("livr", "'liver'"), ("pancreatic tumour", "'pancreatic tumor'"), ("lung", "lung"), ("left ribs 3", "'left rib 3'"), ("qqqq", None)]
)  # fmt: skip
def test_unknown_names_get_near_matches_without_dummies(wrong, suggestion):
    with pytest.raises(UsageError) as caught:
        maisi().id(wrong)
    hint = str(caught.value.hint)
    assert hint.endswith("maisi labels list")
    assert "dummy" not in hint
    assert ("did you mean" in hint) is (suggestion is not None)
    assert (suggestion or "") in hint


@pytest.mark.parametrize("number", ["0", "133", "201", "999", "²", "-1", "1.0", ""])
def test_numbers_that_are_no_label_are_refused(number):
    with pytest.raises(UsageError, match="there is no label"):
        maisi().id(number)


def test_names_of_ids_that_are_not_in_the_vocabulary():
    assert (maisi().name_of(0), maisi().name_of(140)) == ("background", "label 140")
    assert (140 in maisi(), 0 in maisi(), 132 in maisi(), BODY in maisi()) == (False, False, True, True)


def test_vocabularies_do_not_share_their_index():
    for number in range(20):  # objects that come and go may take one another's address
        own = Vocabulary(name="own", labels=(Label(id=number + 1, name=f"thing {number}", group="organ"),), aliases={})
        assert own.id(f"thing {number}") == number + 1
        assert own.get(number) is None


# --- regions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "index"),
    [("head", 0), ("chest", 1), ("thorax", 1), ("chest/thorax", 1), ("Abdomen", 2), ("pelvis", 3), ("lower", 3), (" pelvis/lower ", 3)]
)  # fmt: skip
def test_regions_have_the_indices_of_the_released_models(name, index):
    assert region_index(name) == index


def test_an_unknown_region_names_the_four():
    with pytest.raises(UsageError, match="head, chest, abdomen, lower"):
        region_index("neck")


@usual
@given(st.frozensets(st.sampled_from([0, *MAISI_IDS]), max_size=6))
def test_a_mask_shows_the_regions_of_its_marker_organs(present):
    shown = [index for index, markers in enumerate(MARKERS) if markers & present]
    assert regions_of(present) == ((shown[0], shown[-1]) if shown else None)


def test_a_neck_and_a_heart_alone_show_no_region():
    assert regions_of([maisi().id("thyroid gland"), maisi().id("vertebrae C3"), maisi().id("heart"), maisi().id("colon"), BODY]) is None


# --- remaps -------------------------------------------------------------------------------


def test_the_mask_generators_channels_become_ids_all_at_once():
    raw = remaps()["raw125"]
    assert sorted(raw.pairs) == list(range(1, 125))
    assert len(set(raw.pairs.values())) == 124
    assert set(MAISI_IDS) - set(raw.pairs.values()) == NOT_RAW
    assert [raw.table()[channel] for channel in (0, 1, 2, 121, 122, 123, 124, 125)] == [0, 1, 3, 128, 129, 132, 200, 0]


def test_totalsegmentators_117_classes_each_have_a_partner_of_the_same_words():
    remap = remaps()["totalsegmentator"]
    assert sorted(remap.pairs) == sorted(remap.names) == list(range(1, 118))
    assert remap.many_to_one() == {}
    spelt = {"urinary bladder": "bladder"}
    for source, target in remap.pairs.items():
        name = remap.names[source].replace("_", " ")
        assert sorted(spelt.get(name, name).split()) == sorted(maisi().name_of(target).split())
    without = set(MAISI_IDS) - set(remap.pairs.values()) - set(DUMMIES)
    assert without == {*TUMORS, maisi().id("hepatic vessel"), maisi().id("airway"), BODY}


@pytest.mark.parametrize(
    ("source", "name"),
    [(1, "spleen"), (2, "kidney_right"), (3, "kidney_left"), (5, "liver"), (21, "urinary_bladder"), (25, "sacrum"), (26, "vertebrae_S1"),
     (27, "vertebrae_L5"), (50, "vertebrae_C1"), (51, "heart"), (52, "aorta"), (63, "inferior_vena_cava"), (79, "spinal_cord"),
     (90, "brain"), (91, "skull"), (92, "rib_left_1"), (104, "rib_right_1"), (115, "rib_right_12"), (116, "sternum"),
     (117, "costal_cartilages")]
)  # fmt: skip
def test_totalsegmentator_ids_are_those_of_version_2(source, name):
    assert remaps()["totalsegmentator"].names[source] == name


def test_nv_segment_gives_maisis_ids_but_for_the_free_ones_and_the_envelope():
    remap = remaps()["nv-segment-ct"]
    assert sorted(remap.names) == list(range(1, 133))
    assert all(source == target for source, target in remap.pairs.items())
    without = {value: name for value, name in remap.names.items() if value not in remap.pairs}
    assert without == {2: "kidney", 16: "prostate or uterus", 18: "rectum", 20: "lung", 21: "bone", 130: "liver tumor", 131: "vertebrae L6"}
    assert without.keys() | {129} == set(DUMMIES)
    assert {remap.names[value] for value in remap.pairs if remap.names[value] != maisi().name_of(value)} == {"kidney mass"}
    assert remap.many_to_one() == {}
    back = remap_table("maisi", "nv-segment-ct")
    assert back.unmapped([1, 2, BODY]) == {2: "dummy1", BODY: "body"}


def test_what_a_round_trip_through_totalsegmentator_loses():
    there, back = remap_table("maisi", "totalsegmentator").table(), remap_table("totalsegmentator").table()
    lost = {value for value in MAISI_IDS if back[there[value]] != value}
    assert {maisi().name_of(value) for value in lost - set(DUMMIES)} == {
        "lung tumor", "pancreatic tumor", "hepatic tumor", "colon cancer primaries", "bone lesion", "hepatic vessel", "airway", "body",
    }  # fmt: skip
    assert set(DUMMIES) <= lost
    assert all(there[value] == 0 for value in lost)


@pytest.mark.parametrize(
    ("labels", "present", "has"),
    [("maisi", {1, BODY}, True), ("maisi", {1}, False), ("raw125", {124}, True), ("raw125", {1, 123}, False),
     ("totalsegmentator", {5}, False), ("totalsegmentator", {5, BODY}, True), ("totalsegmentator", {118}, False),
     ("nv-segment-ct", {2}, False), ("nv-segment-ct", {1, BODY}, True)]
)  # fmt: skip
def test_a_label_map_has_a_body_or_not(labels, present, has):
    assert remap_table(labels).has_body(present) is has


def test_200_is_no_body_where_a_set_calls_something_else_so():
    remap = Remap(source="ctmr", target="maisi", summary="", names={1: "liver", BODY: "left mandible"}, pairs={1: 1})
    assert not remap.has_body([1, BODY])


@usual
@given(st.sampled_from(["totalsegmentator", "raw125", "nv-segment-ct"]), st.frozensets(st.integers(0, 255)))
def test_a_remap_and_its_inverse_return_every_id_that_has_a_partner(name, present):
    there, back = remap_table(name).table(), remap_table("maisi", name).table()
    known = remap_table(name).pairs
    assert {value: back[there[value]] for value in present} == {value: value if value in known else 0 for value in present}
    assert remap_table(name).unmapped(present).keys() == present - known.keys() - {0}


def test_maisi_to_maisi_changes_nothing():
    assert remap_table("maisi", "maisi").pairs == {value: value for value in MAISI_IDS}


def test_what_has_no_partner_becomes_what_is_asked_and_the_background_stays():
    table = Remap(source="own", target="maisi", summary="", names={}, pairs={7: 1}).table(other=BODY)
    assert len(table) == 256
    assert (table[0], table[7], table[8]) == (0, 1, BODY)


def test_of_ids_that_share_a_target_the_lowest_is_taken_back():
    remap = Remap(source="own", target="maisi", summary="", names={}, pairs={9: 1, 4: 1, 5: 3})
    assert remap.many_to_one() == {1: (9, 4)}
    assert remap.inverse().pairs == {1: 4, 3: 5}
    assert remap.inverse().unmapped([1, 7, 3, 4]) == {4: "pancreas", 7: "inferior vena cava"}


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [("totalsegmentatr", "maisi", "'totalsegmentator'"), ("maisi", "raw12", "'raw125'"), ("raw125", "totalsegmentator", "in two steps")]
)  # fmt: skip
def test_unknown_label_sets_get_near_matches(source, target, says):
    with pytest.raises(UsageError, match=says):
        remap_table(source, target)


OWN = 'schema = "maisi.remap/1"\nname = "own"\ntarget = "maisi"\n'


def test_a_table_of_ones_own_maps_there_and_back(tmp_path: Path):
    path = tmp_path / "own.toml"
    path.write_text(OWN + '[[label]]\nid = 4\nname = "Leber"\nmaisi = "liver"\n[[label]]\nid = 5\nname = "Uhr"\n')
    assert remap_table(str(path)).pairs == {4: 1}
    assert remap_table(str(path)).unmapped([4, 5, 6]) == {5: "Uhr", 6: "id 6"}
    assert remap_table("maisi", str(path)).pairs == {1: 4}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"name = ", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (OWN.encode(), "not a remap table"),
        (OWN.encode() + b"label = 3\n", "not a remap table"),
        (OWN.encode() + b'[[label]]\nid = "x"\nname = "a"\n', "not a remap table"),
        (OWN.encode() + b'[[label]]\nid = 1\nname = "a"\nmaisi = "livr"\n', "'liver'"),
    ],
)
def test_a_wrong_table_is_refused_with_what_is_wrong(text, says, tmp_path: Path):
    (tmp_path / "own.toml").write_bytes(text)
    with pytest.raises(UsageError, match=says):
        remap_table(str(tmp_path / "own.toml"))


def test_shipped_tables_name_labels_by_their_own_name():
    for path in (files("maisi_cli") / "data" / "remaps").iterdir():
        rows = tomllib.loads(path.read_text("utf-8"))["label"]
        assert {row["maisi"] for row in rows if "maisi" in row} <= set(NAME_OF.values())
        assert len({row["id"] for row in rows}) == len(rows)


# --- labels of plugins ----------------------------------------------------------------------


def test_a_plugin_adds_a_label_and_a_label_set(with_plugin):
    with_plugin(
        pancreatic_cyst={"id": 133, "group": "cyst", "host": "pancreas", "regions": ["abdomen"]},
        own_set={"pairs": {"7": 133, "8": 0, "9": 1}},
    )
    label = maisi().get(maisi().id("pancreatic-cyst"))
    assert (label.id, label.name, label.group, label.host, label.owner) == (133, "pancreatic cyst", "cyst", 4, "acme")
    assert len(maisi().ids()) == 134
    assert remap_table("own set").pairs == {7: 133, 8: 0, 9: 1}
    assert remap_table("own set").summary == "of a test"


def test_a_plugin_adds_a_label_set_from_a_file(with_plugin, tmp_path: Path):
    path = tmp_path / "other.toml"
    path.write_text(OWN + '[[label]]\nid = 4\nname = "Leber"\nmaisi = "liver"\n')
    with_plugin(german=path)
    assert (remap_table("german").source, remap_table("german").pairs) == ("german", {4: 1})
    assert remap_table("maisi", "german").target == "german"


def test_a_label_set_with_the_name_of_a_shipped_one_names_both_owners(with_plugin):
    with pytest.raises(UsageError, match="'totalsegmentator': maisi and acme"):
        with_plugin(totalsegmentator={"pairs": {1: 1}})


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"new": {"id": 132}}, "already 'airway'"),
        ({"new": {"id": BODY}}, "already 'body'"),
        ({"new": {"id": 256}}, "free id in 133..199 or 201..255"),
        ({"new": {"id": 0}}, "free id in 133..199 or 201..255"),
        ({"new": {"id": "133"}}, "free id in 133..199 or 201..255"),
        ({"Liver": {"id": 140}}, "label 1 of maisi"),
        ({"one": {"id": 140}, "two": {"id": 140}}, "already 'one'"),
        ({"new": {"id": 140, "host": "livr"}}, "'liver'"),
        ({"new": {"idd": 140}}, "neither an id nor pairs"),
    ],
)
def test_labels_that_clash_are_refused_with_their_owner(labels, says, with_plugin):
    with_plugin(**labels)
    with pytest.raises(UsageError, match=says) as caught:
        maisi()
    assert "acme" in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"raw125": {"pairs": {1: 1}}}, "comes with maisi"),
        ({"maisi": {"pairs": {1: 1}}}, "comes with maisi"),
        ({"own": {"pairs": {1: 999}}}, "maps to 999"),
        ({"own": {"pairs": {"one": 1}}}, "not a remap table"),
        ({"own": {"pairs": [1, 2]}}, "not a remap table"),
    ],
)
def test_label_sets_that_clash_or_lead_nowhere_are_refused_with_their_owner(labels, says, with_plugin):
    with_plugin(**labels)
    with pytest.raises(UsageError, match=says) as caught:
        remaps()
    assert "acme" in str(caught.value)
