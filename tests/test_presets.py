"""Presets: the published tables, key sets that compose, what is inherited or hidden, and how a volume is judged."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from maisi_cli import catalog, plugins, presets
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.hookspecs import hookimpl
from maisi_cli.presets import judge, preset, rank, validate
from maisi_cli.settings import KEYS, resolve

usual = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# published medians of the CT training data: share in percent, size, spacing in mm
CT = {
    "chest-abdomen": (58.55, (512, 512, 128), (0.781, 0.781, 2.981)),
    "chest": (38.35, (512, 512, 128), (0.684, 0.684, 2.422)),
    "chest-abdomen-lower": (1.42, (512, 512, 256), (0.793, 0.793, 1.826)),
    "lower": (0.61, (512, 512, 384), (0.839, 0.839, 0.728)),
    "abdomen-lower": (0.37, (512, 512, 384), (0.808, 0.808, 0.729)),
    "head-chest-abdomen": (0.33, (512, 512, 384), (0.977, 0.977, 2.103)),
    "abdomen": (0.13, (512, 512, 128), (0.723, 0.723, 1.182)),
    "head-chest-abdomen-lower": (0.13, (512, 512, 384), (1.367, 1.367, 4.603)),
    "head-chest": (0.10, (512, 512, 128), (0.645, 0.645, 2.219)),
}
# rflow-mr: modality, scans, median field of view in mm
MR = {
    "brain-t1": ("mri-t1", 4659, (160, 256, 256)),
    "brain-t2": ("mri-t2", 577, (240, 240, 162.5)),
    "brain-flair": ("mri-flair", 152, (199.9, 250, 250)),
    "prostate-t2": ("mri-t2", 898, (170, 170, 90)),
    "breast-t1": ("mri-t1", 2162, (174, 200, 200)),
    "abdomen-t1": ("mri-t1", 715, (380, 308.8, 288)),
    "abdomen-t2": ("mri-t2", 78, (350, 350, 245.6)),
}
# rflow-mr-brain v1: median field of view in mm and scans, of axial, sagittal and coronal series
MR_BRAIN = {
    "t1": (((240, 240, 174), 98_769), ((176, 250, 250), 142_290), ((240, 200, 240), 80_970)),
    "t2": (((240, 240, 158), 379), ((162, 240, 240), 1_091), ((200, 180, 200), 250)),
    "flair": (((250, 250, 175), 59_105), ((176, 250, 250), 118_946), ((250, 200, 250), 58_654)),
    "swi": (((230, 230, 145), 95_805), ((140, 230, 230), 4), ((230, 155, 230), 9)),
    "mra": (((220, 220, 158), 77), ((158, 250, 250), 195), ((240, 179, 240), 21)),
}
PLANES = {"axial": (256, 256, 128), "sagittal": (128, 256, 256), "coronal": (256, 128, 256)}
# A100 80 GB: preset, size, window in latent voxels, windows, overlap, splits, peak GiB, seconds of the VAE, ddpm and rflow
MEASURED = [
    ("16g", (256, 256, 128), (64, 64, 32), 1, 0.25, 2, 15.0, 1, 57, 2),
    ("16g", (256, 256, 256), (48, 48, 64), 4, 0.6666, 4, 15.4, 5, 81, 3),
    ("16g", (512, 512, 128), (64, 64, 32), 9, 0.5, 2, 15.7, 8, 138, 5),
    ("24g", (256, 256, 256), (64, 64, 64), 1, 0.25, 4, 22.7, 2, 81, 3),
    ("24g", (512, 512, 128), (80, 80, 32), 4, 0.4, 2, 21.0, 6, 138, 5),
    ("24g", (512, 512, 512), (64, 64, 48), 36, 0.4, 2, 22.8, 29, 569, 19),
    ("32g", (512, 512, 512), (80, 80, 48), 16, 0.4, 4, 28.4, 30, 569, 19),
    ("80g", (512, 512, 512), (80, 80, 80), 8, 0.4, 2, 45.3, 32, 569, 19),
    ("80g", (512, 512, 768), (80, 80, 96), 12, 0.4, 4, 49.7, 57, 904, 30),
]
COLUMNS = ("size", "window", "windows", "overlap", "splits", "peak_gib", "vae_seconds", "ddpm_seconds", "rflow_seconds")

REGION_NAMES = [each.stem for each in sorted((presets.shipped() / "regions").glob("*.toml"))]
GPU_NAMES = [each.stem for each in sorted((presets.shipped() / "gpus").glob("*.toml"))]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, away from the user's own presets and settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


HEAD = 'schema = "maisi.preset/1"\nkind = "{}"\n'
REGION, GPU = HEAD.format("region"), HEAD.format("gpu")
VOLUME = "[volume]\nsize = [512, 512, 128]\nspacing = [1.0, 1.0, 2.0]\n"
EXECUTION = "[execution]\nmemory_gib = 12\n"
ROW = """[[measured]]
size = [512, 512, 128]
window = [64, 64, 32]
windows = 9
overlap = 0.5
splits = 2
peak_gib = 11.5
vae_seconds = 8
ddpm_seconds = 138
rflow_seconds = 5
device = "a card"
source = "a log"
"""

# --- the published tables ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CT)
def test_ct_rows_are_the_published_medians(name):
    share, size, spacing = CT[name]
    found = preset(name, "region")
    assert (found.geometry.size, found.geometry.spacing) == (size, spacing)
    assert "-".join(found.regions) == name
    assert found.evidence["share_percent"] == share
    assert (found.modality, found.values["volume"]["model"]) == ("ct", "rflow-ct")


def test_ct_shares_add_up_to_the_whole_training_data():
    assert sum(share for share, _, _ in CT.values()) == pytest.approx(100, abs=0.05)


@pytest.mark.parametrize("name", MR)
def test_mr_rows_have_the_published_field_of_view(name):
    modality, scans, fov = MR[name]
    found = preset(name, "region")
    assert found.geometry.fov_mm == fov
    assert (found.modality, found.evidence["scans"], found.values["volume"]["model"]) == (modality, scans, "rflow-mr")
    assert sorted(found.geometry.size) == [128, 256, 256]
    thin = found.geometry.size.index(128)
    assert fov[thin] == min(fov) or name == "brain-t1"
    assert found.regions == ({"brain": "head", "prostate": "lower", "breast": "chest", "abdomen": "abdomen"}[name.split("-")[0]],)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("sequence", MR_BRAIN)
def test_mr_brain_rows_stack_slices_along_their_plane(sequence, plane):
    fov, scans = MR_BRAIN[sequence][[*PLANES].index(plane)]
    found = preset(f"brain-{sequence}-{plane}", "region")
    assert (found.geometry.size, found.geometry.fov_mm) == (PLANES[plane], fov)
    assert (found.modality, found.values["volume"]["model"], found.regions) == (f"mri-{sequence}", "rflow-mr-brain", ("head",))
    assert (found.evidence["plane"], found.evidence["scans"]) == (plane, scans)
    poor = sequence == "mra" or (sequence, plane) in (("swi", "sagittal"), ("swi", "coronal"))
    assert ("quality not promised" in found.summary) is poor


def test_there_is_one_region_preset_for_each_published_row():
    brain = {f"brain-{sequence}-{plane}" for sequence in MR_BRAIN for plane in PLANES}
    assert set(REGION_NAMES) == {*CT, *MR, *brain}


def test_measured_rows_are_the_published_table():
    found = [
        (each.name, *(tuple(v) if isinstance(v, list) else v for v in (row[column] for column in COLUMNS)))
        for each in presets.presets("gpu")
        for row in each.values.get("measured", ())
    ]
    assert sorted(found) == sorted(MEASURED)
    rows = [row for each in presets.presets("gpu") for row in each.values.get("measured", ())]
    assert {row["device"] for row in rows} == {"NVIDIA A100 80 GB"}


@pytest.mark.parametrize("name", GPU_NAMES)
def test_a_gpu_preset_is_named_after_its_memory_and_never_measured_above_it(name):
    found = preset(name, "gpu")
    if name == "cpu":
        assert found.values == {"execution": {"device": "cpu", "decoder": "exact"}}
        return
    execution = found.values["execution"]
    assert f"{execution['memory_gib']}g" == name
    assert execution["device"] == "cuda"
    assert all(row["peak_gib"] <= execution["memory_gib"] for row in found.values.get("measured", ()))
    assert len(execution["window"]) == 3
    assert all(n % 16 == 0 for n in execution["window"])


def test_there_is_a_preset_for_every_class_of_gpu():
    assert set(GPU_NAMES) == {"cpu", "16g", "24g", "32g", "40g", "80g", "141g"}


# --- key sets ----------------------------------------------------------------------------------


def test_region_and_gpu_presets_set_different_keys():
    region = {key for table in ("volume", "anatomy") for key in presets.TABLES["region"][table]}
    gpu = set(presets.TABLES["gpu"]["execution"])
    assert region.isdisjoint(gpu)
    assert set(presets.TABLES["region"]).isdisjoint(presets.TABLES["gpu"])
    assert region <= set(KEYS)
    assert gpu - {"memory_gib"} <= set(KEYS)
    for kind, keys in (("region", region), ("gpu", gpu)):
        used = {key for each in presets.presets(kind) for name, table in each.values.items() if name != "measured" for key in table}
        assert used <= keys


@pytest.mark.parametrize("name", REGION_NAMES)
def test_any_region_composes_with_any_gpu(name):
    region = preset(name, "region")
    execution = ("decoder", "window", "overlap", "dtype", "device")
    model = region.values["volume"]["model"]
    alone = resolve({"preset": name, "mode": "image", "model": model}).settings
    assert (alone.size, alone.spacing) == (region.geometry.size, region.geometry.spacing)
    assert (alone.regions, alone.modality, alone.model) == (region.regions, region.modality, model)
    for gpu in GPU_NAMES:
        both = resolve({"preset": name, "mode": "image", "gpu": gpu, "model": model}).settings
        assert {key: getattr(both, key) for key in KEYS if key not in ("gpu", *execution)} == {
            key: getattr(alone, key) for key in KEYS if key not in ("gpu", *execution)
        }
        wanted = preset(gpu, "gpu").values["execution"]
        for key in set(execution) & set(wanted):
            value = getattr(both, key)
            assert (list(value) if isinstance(value, tuple) else value) == wanted[key]


@pytest.mark.parametrize(("name", "steps"), [("rflow-ct", 30), ("ddpm-ct", 1000)])
def test_steps_are_the_models_whatever_the_presets(name, steps):
    """Two of the reference's presets ship the steps of DDPM for both (number 47)."""
    for gpu in GPU_NAMES:
        found = resolve({"preset": "chest", "gpu": gpu, "model": name})
        assert (found.settings.steps, found.origins["steps"].origin) == (steps, f"model {name}")
    assert "steps" not in {key for kind in ("region", "gpu") for table in presets.TABLES[kind].values() for key in table}


@pytest.mark.parametrize("kind", presets.FOLDERS)
def test_every_shipped_preset_has_no_problem_and_says_what_it_is(kind):
    for path in sorted((presets.shipped() / presets.FOLDERS[kind]).glob("*.toml")):
        assert validate(path) == [], path
        found = preset(path.stem, kind)
        assert (found.name, found.kind) == (path.stem, kind)
        assert found.summary


@pytest.mark.parametrize("name", REGION_NAMES)
def test_every_region_preset_passes_its_models_strict_check(name):
    found = preset(name, "region")
    spec = catalog.model(found.values["volume"]["model"])
    head = "head" in found.regions
    assert spec.check(found.geometry, modality=found.modality, mode="image", head=head) == []


def test_only_evidence_tells_how_much_was_seen_in_training():
    for each in presets.presets("region"):
        assert "evidence" not in each.values
        assert {"share_percent", "scans"} & set(each.evidence)
        assert each.evidence["source"]


# --- validation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GPU, "execution.memory_gib is None"),
        (GPU + "[execution]\nmemory_gib = true\n", "execution.memory_gib is True"),
        (GPU + "[execution]\nmemory_gib = 0\n", "execution.memory_gib is 0"),
        (GPU + "[execution]\nmemry_gib = 12\n", "did you mean execution.memory_gib"),
        (GPU + EXECUTION + "measured = 3\n", "execution.measured"),
        (GPU + "measured = 3\n" + EXECUTION, "measured is not a list of tables"),
        (GPU + EXECUTION + ROW.replace("peak_gib = 11.5\n", ""), "[[measured]] 1 has no peak_gib"),
        (GPU + EXECUTION + ROW + ROW.replace("peak_gib", "peak_gb"), "measured.peak_gb, did you mean measured.peak_gib"),
        (GPU + EXECUTION + ROW.replace("windows = 9", 'windows = "9"'), "[[measured]] 1 has windows '9'"),
        (GPU + EXECUTION + ROW.replace("[512, 512, 128]", "[512, 512]"), "[[measured]] 1: size"),
        (REGION + VOLUME + '[anatomy]\nanatomy = ["livr"]\n', "there is no label named 'livr'"),
        (REGION + VOLUME + '[anatomy]\nregions = "chest"\n', "anatomy.regions is 'chest', not a list"),
        (REGION + VOLUME + "[anatomy]\nregions = [3]\n", "there is no body region '3'"),
        (REGION + "extends = 3\n" + VOLUME, "no preset named '3'"),
        (REGION + 'extends = "mine"\n' + VOLUME, "extends itself"),
    ],
)
def test_validation_names(text, problem, alone):
    path = write(alone / "maisi-presets" / "mine.toml", text)
    problems = validate(path)
    assert any(problem in each for each in problems), problems


def test_right_presets_of_ones_own_have_no_problem(alone):
    assert validate(write(alone / "a.toml", REGION + VOLUME + '[anatomy]\nregions = ["thorax"]\nanatomy = ["liver"]\n')) == []
    assert validate(write(alone / "b.toml", GPU + EXECUTION + ROW + ROW)) == []
    assert validate(write(alone / "c.toml", GPU + '[execution]\ndevice = "cpu"\n')) == []


# --- inheritance and precedence of sources ---------------------------------------------------


def test_a_preset_inherits_all_but_the_evidence(alone):
    write(alone / "maisi-presets" / "mine.toml", REGION + 'extends = "chest"\n[volume]\nspacing = [0.7, 0.7, 2.0]\n')
    mine, chest = preset("mine", "region"), preset("chest", "region")
    assert mine.geometry == Geometry(size=chest.geometry.size, spacing=(0.7, 0.7, 2.0))
    assert (mine.regions, mine.modality, mine.values["volume"]["model"]) == (chest.regions, "ct", "rflow-ct")
    assert (mine.evidence, mine.summary) == ({}, chest.summary)
    write(alone / "maisi-presets" / "ours.toml", REGION + 'extends = "mine"\nsummary = "Ours"\n')
    assert (preset("ours", "region").geometry, preset("ours", "region").summary) == (mine.geometry, "Ours")


@pytest.mark.parametrize("names", [("one", "two", "one"), ("one", "two", "three", "one")])
def test_a_circle_of_presets_is_refused(names, alone):
    for name, below in pairwise(names):
        write(alone / "maisi-presets" / f"{name}.toml", REGION + f'extends = "{below}"\n' + VOLUME)
    with pytest.raises(UsageError, match="extends itself"):
        preset("one", "region")


def test_the_project_hides_the_user_hides_a_plugin_hides_what_is_shipped(alone, monkeypatch):
    def text(z: float) -> str:
        return REGION + VOLUME.replace("2.0]", f"{z}]")

    seen = [preset("chest", "region").geometry.spacing[2]]
    path = write(alone / "theirs.toml", text(1.1))

    class Acme:
        @hookimpl
        def register_presets(self, register: Any) -> None:
            register("chest", path)

    loaded = plugins.load("", extra={"acme": Acme()})
    monkeypatch.setattr(plugins, "plugins", lambda: loaded)
    seen.append(preset("chest", "region").geometry.spacing[2])
    write(alone / "xdg" / "maisi" / "presets" / "chest.toml", text(1.2))
    seen.append(preset("chest", "region").geometry.spacing[2])
    write(alone / "maisi-presets" / "chest.toml", text(1.3))
    seen.append(preset("chest", "region").geometry.spacing[2])
    assert seen == [2.422, 1.1, 1.2, 1.3]
    assert [each.name for each in presets.presets("region")].count("chest") == 1
    shutil.rmtree(alone / "maisi-presets")
    assert preset("chest", "region").geometry.spacing[2] == 1.2


@pytest.mark.parametrize(
    ("text", "says"),
    [("kind = ", "is not TOML"), (REGION.replace("region", "regoin"), "kind is 'regoin'"), (GPU + EXECUTION, "is a gpu preset")],
)
def test_a_file_of_that_name_that_is_no_such_preset_says_why(text, says, alone):
    write(alone / "maisi-presets" / "mine.toml", text)
    with pytest.raises(UsageError, match=says):
        preset("mine", "region")
    assert "mine" not in [each.name for each in presets.presets("region")]


def test_a_preset_is_read_from_a_file_and_must_be_of_its_kind(alone):
    path = write(alone / "mine.toml", REGION + VOLUME)
    assert preset(str(path), "region").name == "mine"
    with pytest.raises(UsageError, match="is a region preset, not a gpu preset"):
        preset(str(path), "gpu")
    with pytest.raises(UsageError, match="no preset file absent"):
        preset("absent.toml", "region")


def test_a_preset_is_read_again_when_its_file_or_the_folder_changes(alone, monkeypatch):
    path = Path("maisi-presets") / "mine.toml"
    write(path, REGION + VOLUME)
    assert preset("mine", "region").geometry.size == preset(str(path), "region").geometry.size == (512, 512, 128)
    write(path, REGION + VOLUME.replace("128", "256"))
    assert preset("mine", "region").geometry.size == preset(str(path), "region").geometry.size == (512, 512, 256)
    (alone / "elsewhere").mkdir()
    monkeypatch.chdir(alone / "elsewhere")
    write(path, REGION + VOLUME.replace("128", "384"))
    assert preset("mine", "region").geometry.size == preset(str(path), "region").geometry.size == (512, 512, 384)
    assert preset("chest", "region") is preset("chest", "region")


@pytest.mark.parametrize(
    ("wrong", "kind", "right"), [("chst", "region", "'chest'"), ("25g", "gpu", "'24g'"), ("nano-va", "train", "'nano-vae'")]
)
def test_unknown_presets_get_near_matches(wrong, kind, right):
    with pytest.raises(UsageError, match=right):
        preset(wrong, kind)


# --- how a volume is judged ------------------------------------------------------------------


@usual
@given(st.sampled_from(REGION_NAMES), st.integers(0, 2), st.floats(0.5, 1.6))
def test_the_verdict_follows_the_field_of_view(name, axis, factor):
    off = abs(factor - 1)
    assume(min(abs(off - 0.15), abs(off - 0.40)) > 1e-3)
    found = preset(name, "region")
    spec = catalog.model(found.values["volume"]["model"])
    spacing = [
        mm * (factor if k == axis or (spec.limits.square and axis < 2 and k < 2) else 1) for k, mm in enumerate(found.geometry.spacing)
    ]
    geometry = Geometry(size=found.geometry.size, spacing=tuple(spacing))  # type: ignore[arg-type]
    long = max(spacing) / min(spacing)
    assume(min(abs(long - 4), abs(long - 8)) > 1e-3)
    low, high = spec.limits.spacing_xy_mm
    inside = all(low <= mm <= high for mm in spacing[:2]) and spec.limits.spacing_z_mm[0] <= spacing[2] <= spec.limits.spacing_z_mm[1]
    verdict, reason = judge(geometry, found)
    if not inside or off > 0.40 or long > 8:
        assert verdict == "ood"
    else:
        assert verdict == ("ok" if off <= 0.15 and long <= 4 else "marginal")
    assert reason


def test_a_size_that_the_model_cannot_make_is_out_of_distribution_whatever_its_field_of_view():
    found = preset("chest", "region")
    verdict, reason = judge(found.geometry.resized((500, 500, 128)), found)
    assert verdict == "ood"
    assert "512x512x128" in reason


def test_rows_come_with_the_most_common_training_data_first():
    rows = rank()
    assert [row["preset"] for row in rows[: len(CT)]] == [*[*CT][:6], "abdomen", "head-chest-abdomen-lower", "head-chest"]
    scans = [row["scans"] for row in rows[len(CT) :]]
    assert scans == sorted(scans, reverse=True)
    assert len(rows) == len(REGION_NAMES)


def test_regions_go_by_their_usual_names_whatever_a_file_calls_them(alone):
    text = REGION + VOLUME + '[anatomy]\nregions = ["Thorax", "pelvis"]\n'
    assert preset(str(write(alone / "mine.toml", text)), "region").regions == ("chest", "lower")


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({"regions": ["abdomen", "thorax"]}, {"chest-abdomen"}),
        ({"modality": "mri-swi"}, {"brain-swi-axial", "brain-swi-sagittal", "brain-swi-coronal"}),
        ({"regions": ["lower"], "modality": "mri"}, {"prostate-t2"}),
        ({"modality": "mri-t2-skull-stripped"}, {"brain-t2-axial", "brain-t2-sagittal", "brain-t2-coronal"}),
        ({"modality": "mri-dwi"}, set()),
        ({"regions": ["chest"], "modality": "ct"}, {"chest"}),
    ],
)
def test_rows_are_narrowed_by_region_and_modality(wanted, names):
    assert {row["preset"] for row in rank(**wanted)} == names


@usual
@given(st.tuples(*[st.sampled_from([128, 256, 384, 512])] * 3))
def test_a_size_keeps_the_field_of_view_of_each_row(size):
    for row, plain in zip(rank(modality="ct", size=size), rank(modality="ct"), strict=True):
        assert row["size"] == list(size)
        assert row["fov_mm"] == plain["fov_mm"]
