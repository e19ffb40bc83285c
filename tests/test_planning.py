"""Plans: the device that is found, why each choice was made, and memory and time where they were measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from maisi_cli import planning, presets
from maisi_cli.catalog import model
from maisi_cli.errors import CannotRun, UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.planning import Gpu, Plan, default_dtype, detect, gpu_of, predict, require_fit
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
    monkeypatch.setattr(planning.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(planning.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, answer, ""))
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

    monkeypatch.setattr(planning.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(planning.subprocess, "run", run)
    found = detect()
    assert (found.kind, found.name) == ("cpu", "processor")
    assert found.memory_gib is None or found.memory_gib > 0


@pytest.mark.parametrize(
    ("device", "flags", "dtype"),
    [("cuda", (), "fp16"), ("cpu", ("avx512_bf16",), "bf16"), ("cpu", ("amx_bf16", "avx2"), "bf16"), ("cpu", ("avx2",), "fp32"),
     ("mps", ("avx512_bf16",), "fp32")]
)  # fmt: skip
def test_the_precision_suits_the_device(device, flags, dtype, monkeypatch):
    monkeypatch.setattr(planning, "_cpu_flags", lambda: frozenset(flags))
    assert default_dtype(device) == dtype


def test_the_settings_name_the_device(monkeypatch):
    monkeypatch.setattr(planning, "detect", lambda: card(11.0))
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


def test_without_a_wish_the_whole_volume_is_decoded_at_once():
    made = plan_of((512, 512, 384), Gpu(name="processor", kind="cpu", memory_gib=64.0))
    assert (made.choice("device"), made.choice("decoder"), made.choice("window"), made.choice("overlap")) == ("cpu", "exact", None, None)
    assert made.fits is None


def test_the_window_of_a_gpu_preset_serves_sizes_that_were_not_measured():
    made = plan_of((512, 512, 384), card(24), gpu="24g")
    assert (made.choice("decoder"), made.choice("window"), made.choice("overlap")) == ("window", [64, 64, 48], 0.4)
    assert (made.fits, made.margin_gib) == (None, None)
    assert any("not modelled" in warning for warning in made.warnings)


# --- measured rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "row"), ROWS, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value["size"])))
def test_every_measured_row_fits_the_class_of_gpu_that_it_was_published_for(name, row):
    made = plan_of(tuple(row["size"]), gpu_of(GenerateSettings(gpu=name)), gpu=name)
    assert made.fits is True
    assert made.margin_gib is not None
    assert made.margin_gib >= 0
    (peak,) = [stage.peak_gib for stage in made.stages if stage.peak_gib is not None]
    assert peak <= row["peak_gib"]


@pytest.mark.parametrize("size", [(256, 256, 256), (512, 512, 128)])
def test_a_16_gib_card_is_full_but_holds_what_was_published_for_its_class_when_it_is_named(size):
    row = next(row for name, row in ROWS if name == "16g" and tuple(row["size"]) == size)
    named = plan_of(size, gpu_of(GenerateSettings(gpu="16g")), gpu="16g")
    assert named.margin_gib == pytest.approx(16 - row["peak_gib"])
    assert (named.choice("window"), named.choice("overlap")) == (row["window"], row["overlap"])
    found = plan_of(size, card(16.0))  # any card: room for the driver is kept
    assert found.fits is False
    assert found.margin_gib == pytest.approx(16 - planning.HEADROOM_GIB - row["peak_gib"])


@usual
@given(st.sampled_from([tuple(row["size"]) for _, row in ROWS]), st.floats(1, 200), st.sampled_from(["rflow-ct", "ddpm-ct"]))
def test_the_fastest_row_that_fits_is_taken(size, memory, name):
    made = plan_of(size, card(memory), name=name)
    column = "rflow_seconds" if name == "rflow-ct" else "ddpm_seconds"
    rows = [row for _, row in ROWS if tuple(row["size"]) == size]
    fitting = [row for row in rows if row["peak_gib"] + planning.HEADROOM_GIB <= memory]
    assert made.fits is bool(fitting)
    (decode,) = [stage for stage in made.stages if stage.peak_gib is not None]
    if fitting:
        assert sum(seconds(made)) == min(row[column] + row["vae_seconds"] for row in fitting)  # type: ignore[arg-type]
        assert made.margin_gib == pytest.approx(memory - planning.HEADROOM_GIB - decode.peak_gib, abs=0.006)
    else:
        assert decode.peak_gib == min(row["peak_gib"] for row in rows)
        with pytest.raises(CannotRun, match=f"needs {decode.peak_gib:g} GiB; card has"):
            require_fit(made)


@pytest.mark.parametrize(
    ("name", "how", "denoise"),
    [
        ("rflow-ct", {}, 5),
        ("ddpm-ct", {}, 138),
        ("rflow-ct", {"steps": 10}, None),
        ("ddpm-ct", {"steps": 30}, None),
        ("rflow-ct", {"cfg_modality": 2}, None),
        ("rflow-ct", {"scheduler": "ddpm"}, None),
    ],
)
def test_seconds_are_those_that_were_measured_or_none(name, how, denoise):
    made = plan_of((512, 512, 128), card(24), name=name, **how)
    assert seconds(made) == [denoise, 6]
    assert made.fits is True


@pytest.mark.parametrize("how", [{"dtype": "fp32"}, {"dtype": "bf16"}, {"decoder": "exact"}, {"window": "48x48x32"}])
def test_what_was_measured_another_way_says_nothing(how):
    made = plan_of((512, 512, 128), card(24), **how)
    assert (made.fits, made.margin_gib, seconds(made)) == (None, None, [None, None])


@pytest.mark.parametrize("window", ["64x64x32", "80x80x32"])
def test_a_window_that_was_measured_is_found(window):
    overlap = {"64x64x32": 0.5, "80x80x32": 0.4}[window]
    made = plan_of((512, 512, 128), card(24), window=window, overlap=overlap)
    row = next(row for _, row in ROWS if row["size"] == [512, 512, 128] and "x".join(map(str, row["window"])) == window)
    assert [stage.peak_gib for stage in made.stages] == [None, row["peak_gib"]]


@pytest.mark.parametrize("name", ["nano-ct", "rflow-mr", "rflow-mr-brain"])
def test_models_that_were_not_measured_are_not_judged(name):
    spec = model(name)
    made = predict(spec, Geometry(size=(256, 256, 256), spacing=(1.0, 1.0, 1.0)), card(1), settings=GenerateSettings(model=name))
    assert made.fits is None
    require_fit(made)


# --- the whole plan -------------------------------------------------------------------------------


def test_a_plan_checks_the_volume_and_keeps_what_is_let_pass_as_a_warning():
    flags = {"model": "rflow-ct", "preset": "chest", "size": "512x512x128", "spacing": "0.55x0.55x2", "device": "cpu"}
    with pytest.raises(UsageError, match="field of view 282 mm"):
        planning.plan(resolve(flags, environment={}))
    made = planning.plan(resolve({**flags, "allow_ood": True}, environment={}))
    assert any(warning.startswith("field of view 282 mm") for warning in made.warnings)
    assert planning.plan(resolve({**flags, "preset": "head-chest"}, environment={})).warnings[0].startswith("memory and time")


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
