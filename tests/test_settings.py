"""Settings: which layer wins, what a value hides, and how size, spacing and field of view settle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from maisi_cli.catalog import model, models
from maisi_cli.errors import CannotRun, UsageError
from maisi_cli.geometry import Geometry, format_triple
from maisi_cli.presets import preset
from maisi_cli.settings import (
    KEYS,
    GenerateSettings,
    Resolved,
    Setting,
    environment_layer,
    explain,
    flatten,
    parse_assignments,
    parse_shard,
    parse_value,
    read_config,
    require_weights,
    resolve,
    sample_id,
    show,
    toml_value,
)  # fmt: skip

usual = profile(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
HEAD = 'schema = "maisi.preset/1"\n'


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, away from the user's own presets, settings and weights."""
    monkeypatch.chdir(tmp_path)
    for variable in ("MAISI_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))


def layered(
    *, user: str = "", project: str = "", region: str = "", gpu: str = "", environment: Mapping[str, str] | None = None, **how: Any
) -> Resolved:  # fmt: skip
    """Resolve with these texts as files; the presets are named mine and box."""
    Path("config.toml").write_text(user)
    Path("maisi.toml").write_text(project)
    Path("mine.toml").write_text(HEAD + 'kind = "region"\nname = "mine"\nextends = "chest"\n' + region)
    Path("box.toml").write_text(HEAD + 'kind = "gpu"\nname = "box"\n[execution]\nmemory_gib = 24\n' + gpu)
    flags = {"preset": "mine.toml", "gpu": "box.toml", "model": "rflow-ct", **how.pop("flags", {})}
    return resolve(flags, environment=environment or {}, **how)


# --- layers -------------------------------------------------------------------------------------

# weakest first: the origin that is told, and how a value gets there
BOTTOM = ("user config", "maisi.toml")
TOP = ("environment", "record", "--set", "command line")


def arguments(given_by: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return the arguments of `layered` that give `key` in each of these layers."""
    flag = {key: given_by["command line"]} if "command line" in given_by else {}
    return {
        "user": f"{key} = {given_by['user config']}\n" if "user config" in given_by else "",
        "project": f"{key} = {given_by['maisi.toml']}\n" if "maisi.toml" in given_by else "",
        "environment": {f"MAISI_{key.upper()}": given_by["environment"]} if "environment" in given_by else {},
        "config": {key: given_by["record"]} if "record" in given_by else {},
        "assignments": [f"{key}={given_by['--set']}"] if "--set" in given_by else [],
        "flags": flag,
    }


@usual
@given(st.dictionaries(st.sampled_from([*BOTTOM, *TOP]), st.integers(2, 900)))
def test_the_strongest_layer_wins_and_hides_the_others_in_order(values):
    made = layered(**arguments({origin: str(value) for origin, value in values.items()}, "steps"))
    stack = [(30, "model rflow-ct"), *((values[origin], origin) for origin in (*BOTTOM, *TOP) if origin in values)]
    value, origin = stack.pop()
    assert made.settings.steps == value
    assert made.origins["steps"] == Setting(value=value, origin=origin, hides=tuple(reversed(stack)))


@usual
@given(st.dictionaries(st.sampled_from([*BOTTOM, "preset box", *TOP]), st.integers(1, 39).map(lambda n: n / 40)))
def test_a_gpu_preset_stands_between_the_files_and_the_environment(values):
    gpu = f"overlap = {values['preset box']}\n" if "preset box" in values else ""
    made = layered(gpu=gpu + "window = [64, 64, 48]\n", **arguments({o: str(v) for o, v in values.items()}, "overlap"))
    order = [origin for origin in (*BOTTOM, "preset box", *TOP) if origin in values]
    stack = [(0.4, "default"), *((values[origin], origin) for origin in order)]
    value, origin = stack.pop()
    hides = tuple((v, o) for v, o in reversed(stack) if o != "default" or v not in values.values())  # repeated, it is not hidden
    assert made.origins["overlap"] == Setting(value=value, origin=origin, hides=hides)


@usual
@given(st.dictionaries(st.sampled_from([*BOTTOM, "preset mine", *TOP]), st.sampled_from(["head", "chest", "abdomen", "lower", "pelvis"])))
def test_a_region_preset_stands_between_the_files_and_the_environment(values):
    how = arguments({origin: f'"{v}"' if origin in (*BOTTOM, "--set") else v for origin, v in values.items()}, "regions")
    region = f'[anatomy]\nregions = ["{values["preset mine"]}"]\n' if "preset mine" in values else ""
    made = layered(region=region, **how)
    values = {"preset mine": "chest", **values}  # what it extends
    order = [origin for origin in (*BOTTOM, "preset mine", *TOP) if origin in values]
    assert made.settings.regions == (values[order[-1]].replace("pelvis", "lower"),)
    assert made.origins["regions"].origin == order[-1]
    assert [origin for _, origin in made.origins["regions"].hides] == [*reversed(order[:-1]), "default"]


def test_a_model_default_hides_the_built_in_one_and_a_preset_hides_the_model():
    made = resolve({"model": "ddpm-ct", "preset": "chest"}, environment={})
    assert made.origins["steps"] == Setting(value=1000, origin="model ddpm-ct", hides=((30, "default"),))
    assert made.origins["scheduler"] == Setting(value="ddpm", origin="model ddpm-ct", hides=(("rflow", "default"),))
    brain = resolve({"preset": "brain-t2-axial", "mode": "image"}, environment={})
    assert brain.settings.modality == "mri-t2"
    assert brain.origins["modality"].hides == (("mri-t1", "model rflow-mr-brain"), ("ct", "default"))
    assert brain.origins["cfg_modality"] == Setting(value=2.0, origin="model rflow-mr-brain", hides=((0.0, "default"),))


def test_every_setting_has_an_origin_and_untouched_ones_are_defaults():
    made = resolve({"preset": "chest", "model": "rflow-ct"}, environment={})
    assert tuple(made.origins) == KEYS == tuple(each.name for each in dataclasses.fields(GenerateSettings))
    for key, setting in made.origins.items():
        assert getattr(made.settings, key) == setting.value
        if setting.origin == "default":
            assert setting.value == GenerateSettings.__dataclass_fields__[key].default
            assert setting.hides == ()


def test_the_names_of_presets_may_come_from_any_layer():
    assert layered(project='preset = "abdomen"\n', flags={"preset": None}).settings.preset == "abdomen"
    made = layered(project='preset = "abdomen"\n', environment={"MAISI_PRESET": "lower"}, flags={"preset": None})
    assert made.settings.preset == "lower"
    assert made.origins["preset"].hides == (("abdomen", "maisi.toml"), ("chest-abdomen", "default"))
    assert made.origins["spacing"].origin == "preset lower"
    assert resolve({"gpu": "24g", "model": "rflow-ct"}, environment={}).settings.window == (64, 64, 48)


# --- the model ----------------------------------------------------------------------------------


def test_the_presets_model_is_taken_when_it_is_installed_and_else_the_small_one_with_a_note():
    made = resolve({"preset": "chest"}, environment={})
    assert (made.settings.model, made.origins["model"].origin) == ("nano-ct", "auto")
    assert any("rflow-ct is not installed (maisi models pull rflow-ct)" in note for note in made.notes)
    spec = model("rflow-ct")
    for weight in spec.weights:
        spec.weight_path(weight).parent.mkdir(parents=True, exist_ok=True)
        spec.weight_path(weight).touch()
    made = resolve({"preset": "chest"}, environment={})
    assert (made.settings.model, made.origins["model"].origin) == ("rflow-ct", "preset chest")
    assert made.notes == ()


def test_no_model_stands_in_for_mr():
    made = resolve({"preset": "prostate-t2", "mode": "image"}, environment={})
    assert (made.settings.model, made.origins["model"].origin) == ("rflow-mr", "preset prostate-t2")
    with pytest.raises(CannotRun, match=r"autoencoder_v2\.safetensors is missing") as caught:
        require_weights(model("rflow-mr"), "image")
    assert caught.value.hint == "maisi models pull rflow-mr"


@pytest.mark.parametrize(
    ("how", "origin"),
    [
        ({"flags": {"model": "ddpm-ct"}}, "command line"),
        ({"flags": {"model": None}, "assignments": ["model=ddpm-ct"]}, "--set"),
        ({"flags": {"model": None}, "environment": {"MAISI_MODEL": "ddpm-ct"}}, "environment"),
        ({"flags": {"model": None}, "project": 'model = "ddpm-ct"\n'}, "maisi.toml"),
    ],
)
def test_a_model_that_is_named_says_where_and_hides_the_presets(how, origin):
    made = layered(**how)
    assert (made.settings.model, made.origins["model"].origin) == ("ddpm-ct", origin)
    assert ("rflow-ct", "preset mine") in made.origins["model"].hides
    assert made.notes == ()


# --- the volume ---------------------------------------------------------------------------------

SIZE, SPACING, FOV = (256, 256, 128), (1.4, 1.4, 3.0), (350.0, 350.0, 330.0)
TYPED = {"size": SIZE, "spacing": SPACING, "fov": FOV}


@pytest.mark.parametrize(
    ("typed", "size", "spacing"),
    [
        ("", (512, 512, 128), (0.684, 0.684, 2.422)),
        ("size", SIZE, (1.368, 1.368, 2.422)),  # the field of view of the preset
        ("spacing", (512, 512, 128), SPACING),
        ("fov", (512, 512, 128), (350 / 512, 350 / 512, 330 / 128)),
        ("size spacing", SIZE, SPACING),
        ("size fov", SIZE, (350 / 256, 350 / 256, 330 / 128)),
        ("spacing fov", (250, 250, 110), SPACING),
    ],
)
def test_what_is_typed_stays_and_the_rest_comes_from_the_preset(typed, size, spacing):
    flags = {key: TYPED[key] for key in typed.split()}
    made = resolve({"preset": "chest", "model": "rflow-ct", **flags}, environment={})
    settings = made.settings
    assert settings.size == size
    assert settings.spacing == pytest.approx(spacing)
    assert settings.fov == pytest.approx([n * mm for n, mm in zip(size, spacing, strict=True)], rel=1e-6)
    assert settings.geometry().size == size
    for key in flags:
        assert made.origins[key].origin == "command line"
    derived = {"": "fov", "size": "spacing fov", "spacing": "fov", "fov": "spacing", "size spacing": "fov", "size fov": "spacing",
               "spacing fov": "size"}[typed]  # fmt: skip
    assert {key for key in TYPED if made.origins[key].origin == "derived"} == set(derived.split())


@usual
@given(st.permutations(["size", "spacing", "fov"]))
def test_of_three_from_different_layers_the_weakest_gives_way(order):
    weakest, middle, strongest = order
    made = layered(
        environment={f"MAISI_{weakest.upper()}": format_triple(TYPED[weakest])}, assignments=[f"{middle}={format_triple(TYPED[middle])}"],
        flags={strongest: TYPED[strongest]},
    )  # fmt: skip
    settled = Geometry.parse(**{key: TYPED[key] for key in (middle, strongest)})
    assert made.settings.geometry().size == settled.size
    assert made.settings.spacing == pytest.approx(settled.spacing)
    assert made.origins[weakest].origin == "derived"
    assert made.origins[weakest].hides[0] == (TYPED[weakest], "environment")
    assert (made.origins[middle].origin, made.origins[strongest].origin) == ("--set", "command line")


def test_a_preset_is_stronger_than_the_volume_of_a_config_file_whichever_two_it_gives():
    for text in ('size = "256x256x128"', 'fov = "300x300x300"', 'spacing = "1x1x1"\nfov = "300x300x300"'):
        made = layered(project=text + "\n")
        assert made.settings.geometry() == preset("chest", "region").geometry
        assert all(made.origins[line.split()[0]].hides[0][1] == "maisi.toml" for line in text.splitlines())


@usual
@given(st.sampled_from(["chest", "lower", "head-chest-abdomen-lower", "chest-abdomen"]), st.booleans())
def test_a_presets_volume_is_scaled_to_the_model_and_a_typed_one_never_is(name, typed):
    volume = preset(name, "region").geometry
    flags = {"size": volume.size} if typed else {}
    made = resolve({"preset": name, "model": "nano-ct", **flags}, environment={})
    assert made.settings.geometry().fov_mm == pytest.approx(volume.fov_mm, rel=1e-6)
    if typed:
        assert made.settings.size == volume.size
        assert made.notes == ()
    else:
        assert model("nano-ct").valid_size(made.settings.size)
        assert made.origins["size"] == Setting(value=made.settings.size, origin="model nano-ct", hides=((volume.size, f"preset {name}"),))
        assert "volume scaled to nano-ct" in made.notes[0]


def test_a_mask_brings_its_own_grid():
    made = resolve({"preset": "chest", "model": "rflow-ct", "mask": "case.nii.gz"}, environment={})
    assert (made.settings.size, made.settings.spacing, made.settings.fov) == (None, None, None)
    assert made.settings.regions == ("chest",)
    for key, value in TYPED.items():
        with pytest.raises(UsageError, match=f"--{key} and --mask exclude each other"):
            resolve({"mask": "case.nii.gz", key: value}, environment={})


# --- values that belong together ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "decoder", "origin"),
    [
        ({}, "auto", "default"),
        ({"gpu": "window = [64, 64, 48]\n"}, "auto", "default"),  # the plan decides
        ({"flags": {"window": "64x64x48"}}, "window", "derived"),
        ({"project": 'window = "64x64x48"\n'}, "window", "derived"),
        ({"environment": {"MAISI_WINDOW": "64x64x48"}}, "window", "derived"),
        ({"gpu": "window = [64, 64, 48]\n", "flags": {"overlap": 0.3}}, "window", "derived"),
        ({"flags": {"window": "64x64x48", "decoder": "window"}}, "window", "command line"),
    ],
)
def test_a_window_that_is_asked_for_asks_for_its_decoder(how, decoder, origin):
    made = layered(**how)
    assert (made.settings.decoder, made.origins["decoder"].origin) == (decoder, origin)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"decoder": "exact", "window": "64x64x48"}, "--window is of the window decoder"),
        ({"decoder": "exact", "overlap": 0.3}, "--overlap is of the window decoder"),
        ({"decoder": "window"}, "needs a window"),
        ({"overlap": 0.3}, "needs a window"),
        ({"shard": "1/2"}, "--shard needs the seed"),
        ({"shard": "3/2", "seed": 1}, "not a share"),
        ({"labels": "totalsegmentator"}, "there is none"),
        ({"mask": "a.nii.gz", "mode": "image"}, "--mode image makes an image without a mask"),
        ({"mask": "a.nii.gz", "mask_source": "phantom"}, "exclude each other"),
        ({"mask_source": "file"}, "needs a mask"),
        ({"mode": "image", "anatomy": "liver"}, "no mask that could hold --anatomy"),
        ({"model": "rflow-mr", "modality": "mri-t1"}, "makes image only"),
        ({"modality": "mri-t1"}, "--model rflow-mr"),
    ],
)
def test_values_that_contradict_one_another_are_refused(flags, says):
    with pytest.raises(UsageError) as caught:
        resolve({"preset": "chest", "model": "rflow-ct", **flags}, environment={})
    assert says in str(caught.value)


# --- values alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "parsed"),
    [
        ("steps", "20", 20), ("steps", 20.0, 20), ("cfg_modality", "2", 2.0), ("anatomy", " liver, spleen ,", ("liver", "spleen")),
        ("anatomy", ["liver"], ("liver",)), ("regions", "Head,thorax, pelvis,chest", ("head", "chest", "lower")),
        ("force", "YES", True), ("force", "off", False), ("force", "", False), ("seed", 0, 0),
        ("seed", 2**63 - 1, 2**63 - 1), ("overlap", 0, 0.0), ("window", "64", (64, 64, 64)), ("device", "cuda:3", "cuda:3"),
    ],
)  # fmt: skip
def test_values_are_taken_as_people_write_them(key, value, parsed):
    found = parse_value(key, value, "here")
    assert (found, type(found)) == (parsed, type(parsed))


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 0), ("steps", 1001), ("steps", True), ("steps", "1e2"), ("steps", float("inf")), ("seed", -1), ("seed", 2**63), ("count", 0),
     ("overlap", 1), ("overlap", -0.1), ("overlap", "nan"), ("cfg_modality", float("inf")), ("cfg_modality", -1), ("retries", 101),
     ("force", "perhaps"), ("mode", "both"), ("dtype", "fp8"), ("device", "cuda:"), ("device", "gpu"), ("format", " , "), ("size", "1.5"),
     ("window", "0"), ("compat", "other")]
)  # fmt: skip
def test_values_out_of_range_are_refused_with_the_key_and_the_origin(key, value):
    with pytest.raises(UsageError) as caught:
        parse_value(key, value, "maisi.toml")
    assert "maisi.toml" in caught.value.message
    assert key.split("_")[0] in caught.value.message
    assert caught.value.hint


def test_values_of_a_file_may_stand_in_tables_or_alone():
    assert flatten({"steps": 20, "volume": {"size": [64, 64, 64]}, "keep-latent": True, "schema": "x"}, "here") == {
        "steps": 20, "size": (64, 64, 64), "keep_latent": True}  # fmt: skip
    with pytest.raises(UsageError, match=r"volume is 3, not a table"):
        flatten({"volume": 3}, "here")
    assert read_config(Path("absent.toml"), "user config") is None


def test_assignments_are_toml_with_bare_words_and_known_tables():
    assert parse_assignments(["steps=20", "volume.size=[64, 64, 64]", "name=a=b", "keep-latent = true", 'out="1"']) == {
        "steps": 20, "size": [64, 64, 64], "name": "a=b", "keep_latent": True, "out": "1"}  # fmt: skip
    assert [toml_value(raw) for raw in ("1", "1.5", "[1, 2]", "a b", "", "64x64x48")] == [1, 1.5, [1, 2], "a b", "", "64x64x48"]


def test_the_environment_gives_settings_and_a_stranger_is_refused():
    layer = environment_layer({"MAISI_STEPS": "7", "MAISI_HOME": "x", "MAISI_OFFLINE": "1", "MAISI_LOAD_PLUGINS": "", "PATH": "y"})
    assert layer.values == {"steps": 7, "offline": True}
    with pytest.raises(UsageError, match="MAISI_STPS") as caught:
        environment_layer({"MAISI_STPS": "7"})
    assert "'MAISI_STEPS'" in str(caught.value.hint)


@usual
@given(st.integers(1, 50), st.integers(1, 50))
def test_a_shard_is_one_of_as_many(index, count):
    if index <= count:
        assert parse_shard(f"{index}/{count}") == (index, count)
    else:
        with pytest.raises(UsageError):
            parse_shard(f"{index}/{count}")


@pytest.mark.parametrize("text", ["", "/", "1", "1/", "/2", "0/2", "1/2/3", "a/b", "-1/2", "1.0/2", "²/3"])
def test_other_shards_are_refused(text):
    with pytest.raises(UsageError, match="not a share"):
        parse_shard(text)


def test_names_of_samples_hold_what_the_template_asks_for():
    spec = model("rflow-ct")
    made = GenerateSettings(preset="mine/liver.toml", seed=3)
    assert sample_id(made, spec, 7) == "liver-rflow-ct-seed3-007"
    assert sample_id(dataclasses.replace(made, mask="a/case.nii.gz", name="{stem}_{preset}_{mode}"), spec, 0) == "case_liver_paired"
    for wrong in ("{index.real}", "{0}", "{", "{nothing}", "", ".{index}", "a/{index}", "a\\{index}", "a\n", "x" * 201, "é" * 101):
        with pytest.raises(UsageError):
            sample_id(dataclasses.replace(made, name=wrong), spec, 0)
    assert sample_id(dataclasses.replace(made, name="x" * 200), spec, 0) == "x" * 200


@usual
@given(st.sampled_from(["steps", "overlap", "regions", "force", "size", "seed"]), st.data())
def test_what_is_shown_can_be_typed(key, data):
    values = {"steps": st.integers(1, 1000), "overlap": st.integers(0, 99).map(lambda n: n / 100), "force": st.booleans(),
              "regions": st.permutations(["head", "chest", "lower"]).map(tuple), "seed": st.integers(0, 2**63 - 1),
              "size": st.tuples(*[st.integers(1, 900)] * 3)}  # fmt: skip
    value = data.draw(values[key])
    assert parse_value(key, show(value), "here") == value


def test_the_explanation_leaves_defaults_out_and_names_what_is_hidden():
    made = resolve({"preset": "chest", "model": "rflow-ct", "steps": 20}, environment={})
    rows = {key: (value, origin) for key, value, origin in explain(made)}
    assert rows["steps"] == ("20", "command line   hides 30 (model rflow-ct)")
    assert rows["size"] == ("512x512x128", "preset chest")
    assert "retries" not in rows
    assert ("retries", "3", "default") in explain(made, everything=True)


def test_model_defaults_are_settings_or_known_to_the_engine():
    known = {*KEYS, "cfg_tumor", "mask_steps"}
    for spec in models():
        assert set(spec.defaults) <= known, spec.name


@pytest.mark.parametrize(("name", "preset", "scale"), [("rflow-mr", "prostate-t2", 15.0), ("rflow-mr-brain", "brain-t1-axial", 2.0)])
def test_guidance_by_the_modality_and_by_a_tumour_are_two_settings(name: str, preset: str, scale: float) -> None:
    """In the reference one key means either, by the script that reads it (number 46)."""
    made = resolve({"model": name, "mode": "image", "preset": preset})
    assert (made.settings.cfg_modality, made.settings.cfg_tumor) == (scale, 0.0)
    assert made.origins["cfg_modality"].origin == f"model {name}"
    both = resolve({"model": "rflow-ct", "preset": "chest", "cfg_tumor": 3.0}).settings
    assert (both.cfg_modality, both.cfg_tumor) == (0.0, 3.0)
    with pytest.raises(UsageError, match="--cfg-tumor and --cfg-modality exclude each other"):
        resolve({"model": "rflow-ct", "preset": "chest", "cfg_tumor": 3.0, "cfg_modality": 2.0, "compat": "reference"})


def test_the_models_guidance_by_the_mask_gives_way_to_one_that_is_asked_for() -> None:
    assert resolve({"model": "nano-ct"}).settings.cfg_mask == 1.5
    changed = resolve({"model": "nano-ct", "cfg_modality": 2.0})
    assert changed.settings.cfg_mask == 0
    assert (1.5, "model nano-ct") in changed.origins["cfg_mask"].hides
    with pytest.raises(UsageError, match="--cfg-mask and --cfg-modality exclude each other"):
        resolve({"model": "nano-ct", "cfg_modality": 2.0, "cfg_mask": 1.2})
    with pytest.raises(UsageError, match="--cfg-mask guides an image"):
        resolve({"model": "nano-ct", "mode": "image", "cfg_mask": 1.2})
