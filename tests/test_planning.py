"""Plans: the device that is found, why each choice was made, and memory and time where they were measured."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from maisi_cli import devices, estimates, planning, presets
from maisi_cli.catalog import model
from maisi_cli.devices import Gpu, default_dtype, detect, gpu_of
from maisi_cli.errors import CannotRun, UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.planning import Plan, predict, require_fit
from maisi_cli.settings import GenerateSettings, resolve

usual = profile(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CHEST = presets.preset("chest", "region").geometry
ROWS = [(each.name, row) for each in presets.presets("gpu") for row in each.values.get("measured", ())]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, away from the user's own presets and settings."""
    monkeypatch.chdir(tmp_path)
    for variable in ("MAISI_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    return tmp_path


def card(memory_gib: float | None) -> Gpu:
    return Gpu(name="card", kind="cuda", memory_gib=memory_gib)


def plan_of(size: tuple[int, int, int], device: Gpu, /, *, name: str = "rflow-ct", **how: Any) -> Plan:
    settings = resolve({"model": name, "preset": "chest", "size": size, **how}, environment={}).settings
    return predict(model(name), CHEST.resized(size), device, settings=settings)


def seconds(made: Plan) -> list[float | None]:
    return [stage.seconds for stage in made.stages]


# --- the device -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "name", "memory"),
    [
        ("NVIDIA H100 80GB HBM3, 81559\n", "NVIDIA H100 80GB HBM3", 79.65),
        ("Tesla T4, 15360\nTesla T4, 15360\n", "Tesla T4", 15.0),
        ("Card, of commas, 24576\n", "Card, of commas", 24.0),
    ],
)
def test_the_first_gpu_that_the_driver_reports_is_found(answer, name, memory, monkeypatch):
    monkeypatch.setattr(devices.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, answer, ""))
    assert detect() == Gpu(name=name, kind="cuda", memory_gib=memory)


@pytest.mark.parametrize(
    "failure", ["", "no devices\n", "Card, [N/A]\n", OSError(), subprocess.TimeoutExpired("nvidia-smi", 5),
                subprocess.CalledProcessError(9, "nvidia-smi")]
)  # fmt: skip
def test_a_driver_that_does_not_answer_means_the_processor(failure, monkeypatch):
    def run(*_: Any, **__: Any) -> Any:
        if isinstance(failure, Exception):
            raise failure
        return subprocess.CompletedProcess([], 0, failure, "")

    monkeypatch.setattr(devices.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(devices.subprocess, "run", run)
    found = detect()
    assert (found.kind, found.name) == ("cpu", "processor")
    assert found.memory_gib is None or found.memory_gib > 0


@pytest.mark.parametrize(
    ("device", "flags", "dtype"),
    [("cuda", (), "fp16"), ("cpu", ("avx512_bf16",), "bf16"), ("cpu", ("amx_bf16", "avx2"), "bf16"), ("cpu", ("avx2",), "fp32"),
     ("mps", ("avx512_bf16",), "fp32")]
)  # fmt: skip
def test_the_precision_suits_the_device(device, flags, dtype, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_flags", lambda: frozenset(flags))
    assert default_dtype(device) == dtype


def test_the_settings_name_the_device(monkeypatch):
    monkeypatch.setattr(devices, "detect", lambda: card(11.0))
    assert gpu_of(GenerateSettings()) == card(11.0)
    assert gpu_of(GenerateSettings(device="cpu")).kind == "cpu"
    assert gpu_of(GenerateSettings(gpu="cpu")).kind == "cpu"
    assert gpu_of(GenerateSettings(gpu="24g")) == Gpu(name="GPU preset 24g", kind="cuda", memory_gib=24.0)


# --- choices and their reasons ------------------------------------------------------------------


def test_what_is_asked_for_is_taken_and_said():
    made = plan_of((512, 512, 128), card(24), device="cuda:1", dtype="fp32", decoder="window", window="48x48x32", overlap=0.25)
    reasons = {choice.name: (choice.value, choice.reason) for stage in made.stages for choice in stage.choices}
    assert reasons["device"] == ("cuda:1", "asked for")
    assert reasons["dtype"] == ("fp32", "asked for")
    assert reasons["decoder"] == ("window", "asked for")
    assert (made.choice("window"), made.choice("overlap")) == ([48, 48, 32], 0.25)


def test_without_a_wish_the_whole_volume_is_decoded_without_windows():
    made = plan_of((512, 512, 384), Gpu(name="processor", kind="cpu", memory_gib=64.0))
    assert (made.choice("device"), made.choice("decoder"), made.choice("window"), made.choice("overlap")) == ("cpu", "exact", None, None)
    assert made.fits is True


@pytest.mark.parametrize("sweeps", estimates.SWEEPS)
def test_what_is_held_can_be_asked_for(sweeps):
    made = plan_of((512, 512, 512), card(200.0), sweeps=sweeps)
    assert made.choice("sweeps") == sweeps
    assert [c.reason for stage in made.stages for c in stage.choices if c.name == "sweeps"] == ["asked for"]


# --- memory: the published rows, and what fits ------------------------------------------------------


@pytest.mark.parametrize(("name", "row"), ROWS, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value["size"])))
def test_the_peaks_that_the_reference_published_are_predicted_within_three_percent(name, row):
    geometry = CHEST.resized(tuple(row["size"]))
    made = planning.reference(model("rflow-ct"), geometry, card(80.0), window=row["window"], splits=row["splits"], overlap=row["overlap"])
    (stage,) = made.stages
    assert stage.peak_gib == pytest.approx(row["peak_gib"], rel=0.03)
    assert any(f"published for it: {row['peak_gib']} GiB" in note for note in made.warnings)


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ((256, 256, 128), 5),
        ((256, 256, 256), 8),
        ((512, 512, 128), 12),
        ((512, 512, 256), 21),
        ((512, 512, 512), 39),
        ((512, 512, 768), 58),
    ],
)
def test_the_training_memory_that_the_reference_published_is_predicted_within_15_percent(size, published):
    latent = estimates.latent_features([n // 4 for n in size])
    found = estimates.look_up(estimates.key("reference-train-dm", [model("rflow-ct").networks["unet"]], 2), latent)
    assert found is not None
    assert found.peak_gib + estimates.TRAINING_GIB == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(("size", "memory", "peak"), [((512, 512, 512), 8.0, 8.0), ((512, 512, 768), 12.0, 10.5)])
def test_large_volumes_fit_small_cards(size, memory, peak):
    made = plan_of(size, card(memory))
    assert made.fits is True
    assert made.choice("sweeps") == "recompute"
    assert max(stage.peak_gib for stage in made.stages if stage.peak_gib is not None) <= peak
    require_fit(made)


def test_training_at_512_cubed_takes_less_than_half_of_the_reference_s():
    """39 GiB are published for it; with fused norms 18 are enough, and 11 where blocks are computed again."""
    geometry = CHEST.resized((512, 512, 512))
    for memory, again, most in ((24.0, False, 18), (16.0, True, 11)):
        made = planning.training(model("rflow-ct"), "dm", geometry, card(memory))
        assert made.choice("checkpointing") is again
        assert made.fits is True
        assert made.stages[0].peak_gib < most


@usual
@given(st.sampled_from([tuple(row["size"]) for _, row in ROWS]), st.floats(1, 200), st.sampled_from(["rflow-ct", "ddpm-ct"]))
def test_the_fastest_mode_that_fits_is_taken(size, memory, name):
    """Every mode before the one that is taken needs more than there is; and what does not fit is said with what it needs."""
    made = plan_of(size, card(memory), name=name)
    peaks = {mode: plan_of(size, card(memory), name=name, sweeps=mode) for mode in estimates.SWEEPS}
    of = {mode: next(stage.peak_gib for stage in plan.stages if stage.name == "decode") for mode, plan in peaks.items()}
    taken = made.choice("sweeps")
    room = max(0.0, memory - planning.HEADROOM_GIB) / (1 + estimates.MARGIN)
    assert all(of[mode] > room - 0.01 for mode in estimates.SWEEPS[: estimates.SWEEPS.index(taken)])
    most = max(stage.peak_gib for stage in made.stages if stage.peak_gib is not None)
    assert made.margin_gib == pytest.approx(room - most, abs=0.011)
    assert made.fits is (made.margin_gib >= 0)
    if not made.fits:
        with pytest.raises(CannotRun, match=f"needs {most:g} GiB, [0-9.]+ with a margin; card has"):
            require_fit(made)


@pytest.mark.parametrize("name", ["nano-ct", "rflow-mr", "rflow-mr-brain", "ddpm-ct", "rflow-ct"])
def test_every_model_of_the_catalogue_is_modelled(name):
    spec = model(name)
    geometry = Geometry(size=(256, 256, 256), spacing=(1.0, 1.0, 1.0))
    mode = "paired" if "paired" in spec.modes else "image"
    made = predict(spec, geometry, card(1), settings=GenerateSettings(model=name, mode=mode))
    assert made.fits is False
    assert all(stage.peak_gib for stage in made.stages if stage.name != "save")


def test_networks_that_were_never_traced_are_not_judged():
    spec = model("nano-ct")
    wide = dataclasses.replace(spec.networks["vae"], arguments={**spec.networks["vae"].arguments, "num_channels": [24, 24, 24]})
    strange = dataclasses.replace(spec, networks={**spec.networks, "vae": wide, "unet": dataclasses.replace(
        spec.networks["unet"], arguments={**spec.networks["unet"].arguments, "num_res_blocks": 5})})  # fmt: skip
    made = predict(strange, Geometry(size=(128, 128, 128), spacing=(3.0, 3.0, 3.0)), card(1), settings=GenerateSettings(model="nano-ct"))
    assert (made.fits, made.margin_gib) == (None, None)
    assert any(note.endswith("not modelled") for note in made.warnings)
    require_fit(made)


def test_a_window_needs_less_than_the_whole_and_more_than_nothing():
    whole = plan_of((512, 512, 512), card(200.0), sweeps="store")
    window = plan_of((512, 512, 512), card(200.0), decoder="window", window="64x64x48")
    (one, two) = (next(stage.peak_gib for stage in plan.stages if stage.name == "decode") for plan in (whole, window))
    assert 2 < two < one


def test_seconds_are_absent_until_the_device_was_measured(alone):
    assert seconds(plan_of((256, 256, 256), card(80.0)))[:2] == [None, None]
    rates = {"device": "card", "dtype": "fp16", "convolution": 100.0, "attention": 50.0, "copy": 1000.0}
    estimates.rates_path().parent.mkdir(parents=True)
    estimates.rates_path().write_text(json.dumps({"rates": [rates]}))
    denoise, decode = seconds(plan_of((256, 256, 256), card(80.0)))[:2]
    figures = estimates.decode(model("rflow-ct"), (256, 256, 256), itemsize=2, device="cuda", mode="store")
    assert figures is not None
    assert decode == pytest.approx(figures.tflop / 100 + figures.moved_gb / 1000, abs=0.06)
    assert denoise is not None
    assert seconds(plan_of((256, 256, 256), card(80.0), steps=60))[0] == pytest.approx(2 * denoise, abs=0.16)


def test_the_host_and_the_disk_are_told():
    made = plan_of((512, 512, 512), card(80.0), count=3)
    assert made.choice("disk_mib") == 3 * 512**3 * 3 / 2**20
    assert made.choice("host_gib") == pytest.approx(11 / 8 + planning.PROGRAM_GIB, abs=0.01)


def test_a_plan_is_saved_and_read_back(tmp_path):
    made = plan_of((512, 512, 512), card(8.0))
    path = tmp_path / "plan.toml"
    path.write_text(made.as_toml())
    plan = planning.read_plan(path)
    assert plan["model"] == "rflow-ct"
    assert plan["size"] == [512, 512, 512]
    assert plan["execution"] == {"device": "cuda", "dtype": "fp16", "decoder": "exact", "sweeps": "recompute"}
    for content in ("[x", 'schema = "maisi.preset/1"'):
        path.write_text(content)
        with pytest.raises(UsageError, match="plan"):
            planning.read_plan(path)
    with pytest.raises(UsageError, match="does not exist"):
        planning.read_plan(tmp_path / "none.toml")


# --- the whole plan -------------------------------------------------------------------------------


def test_a_plan_checks_the_volume_and_keeps_what_is_let_pass_as_a_warning():
    flags = {"model": "rflow-ct", "preset": "chest", "size": "512x512x128", "spacing": "0.55x0.55x2", "device": "cpu"}
    with pytest.raises(UsageError, match="field of view 282 mm"):
        planning.plan(resolve(flags, environment={}))
    made = planning.plan(resolve({**flags, "allow_ood": True}, environment={}))
    assert any(warning.startswith("field of view 282 mm") for warning in made.warnings)
    assert planning.plan(resolve({**flags, "preset": "head-chest"}, environment={})).warnings == ()


def test_a_mask_of_ones_own_brings_the_geometry_or_none():
    resolved = resolve({"model": "nano-ct", "mask": "case.nii.gz", "device": "cpu"}, environment={})
    assert planning.plan(resolved).geometry is None
    grid = Geometry(size=(97, 101, 33), spacing=(3.0, 3.0, 3.0))
    made = planning.plan(resolved, geometry=grid)
    assert made.geometry == grid
    assert not any("is shown to" in warning for warning in made.warnings)  # padded, voxel by voxel


def test_a_mask_that_must_be_resampled_is_said_so_and_planned_on_the_grid_of_the_model():
    resolved = resolve({"model": "rflow-ct", "mask": "case.nii.gz", "gpu": "80g"}, environment={})
    grid = Geometry(size=(512, 512, 133), spacing=(0.7, 0.7, 2.5))
    made = planning.plan(resolved, geometry=grid)
    assert made.geometry == grid
    assert made.stages[1].peak_gib == planning.plan(resolve({"model": "rflow-ct", "size": "512x512x128", "spacing": "0.7x0.7x2.6",
                                                             "gpu": "80g"}, environment={})).stages[1].peak_gib  # fmt: skip
    (said,) = [warning for warning in made.warnings if "is shown to" in warning]
    assert "case.nii.gz (512x512x133 voxels at 0.7x0.7x2.5 mm" in said
    assert "rflow-ct on 512x512x128 voxels at 0.7x0.7x2.598 mm" in said


def test_a_plan_is_plain_data():
    made = plan_of((512, 512, 128), card(24))
    told = json.loads(json.dumps(made.as_dict()))
    assert told["schema"] == "maisi.plan/1"
    assert (told["size"], told["fits"], told["gpu"]) == ([512, 512, 128], True, {"name": "card", "kind": "cuda", "memory_gib": 24})
    choices = {choice["name"]: choice["value"] for stage in told["stages"] for choice in stage["choices"]}
    assert choices == {choice.name: choice.value for stage in made.stages for choice in stage.choices}
    with pytest.raises(StopIteration):
        made.choice("colour")
