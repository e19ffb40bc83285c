"""`maisi recommend-spacing` and `maisi gpu-plan`: the contract of their flags, JSON, text and exit codes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import typer
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from maisi_cli import catalog, cli, devices, estimates, planning, presets, settings

from .shell import Done

GPU_ROWS = [row for each in presets.presets("gpu") for row in each.values.get("measured", ())]
PLAN_KEYS = {"schema", "model", "fits", "margin_gib", "gpu", "size", "stages", "warnings"}
SPACING_KEYS = {"preset", "region", "share_percent", "size", "spacing_mm", "fov_mm", "verdict", "reason"}


@pytest.fixture
def maisi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    """Return a function that runs a command line in an empty folder, away from the user's own settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))

    def run(line: str) -> Done:
        code = cli.run(shlex.split(line))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(code, captured.out, captured.err)

    return run


def save_nifti(path: Path, size: tuple[int, int, int], affine: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros(size, np.uint8), affine), path)


def examples(*names: str) -> list[str]:
    """Return the example lines at the end of these commands' help."""
    found = []
    root = typer.main.get_command(cli.build())
    for name in names:
        lines = (root.commands[name].epilog or "").splitlines()  # type: ignore[attr-defined]
        mine = [line.strip() for line in lines if line.strip().startswith("maisi ")]
        assert 2 <= len(mine) <= 3, name
        assert all(line.startswith(f"maisi {name}") for line in mine)
        found += mine
    return found


@pytest.mark.parametrize("line", examples("recommend-spacing", "gpu-plan"))
def test_the_examples_of_the_help_run(line, maisi, tmp_path):
    (tmp_path / "scans").mkdir()
    save_nifti(tmp_path / "scans" / "a.nii.gz", (40, 40, 38), np.diag([10.0, 10, 10, 1]))
    done = maisi(line.removeprefix("maisi "))
    assert (done.code, bool(done.out)) == (0, True), done.err
    if "--json" in line:
        assert done.json["schema"] in ("maisi.spacing/1", "maisi.plan/1")
    if "--save" in line:
        assert planning.read_plan(tmp_path / "plan.toml")["model"] == "rflow-ct"


# --- recommend-spacing ----------------------------------------------------------------------


def test_spacing_has_the_keys_of_the_contract_and_the_published_row(maisi):
    done = maisi("recommend-spacing --region chest,abdomen --modality ct --json")
    assert done.json["schema"] == "maisi.spacing/1"
    (row,) = done.json["rows"]
    assert set(row) >= SPACING_KEYS
    assert row["preset"] == "chest-abdomen"
    assert row["region"] == ["chest", "abdomen"]
    assert (row["size"], row["spacing_mm"], row["share_percent"]) == (
        [512, 512, 128],
        [0.781, 0.781, 2.981],
        58.55,
    )
    assert row["fov_mm"] == [399.9, 399.9, 381.6]
    assert row["verdict"] == "ok"


def test_every_shipped_region_preset_is_recommended_and_ok(maisi):
    rows = maisi("recommend-spacing --json").json["rows"]
    verdicts = {row["preset"]: row["verdict"] for row in rows}
    assert verdicts == dict.fromkeys((each.name for each in presets.presets("region")), "ok")
    shares = [row["share_percent"] or 0 for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.1)  # of the CT scans, of which no region is left out


def test_a_size_keeps_the_field_of_view(maisi):
    rows = maisi("recommend-spacing --modality ct --size 512x512x256 --json").json["rows"]
    for row in rows:
        median = presets.preset(row["preset"], "region").geometry.fov_mm
        assert row["size"] == [512, 512, 256]
        np.testing.assert_allclose(np.multiply(row["size"], row["spacing_mm"]), median, rtol=1e-3)
    one = next(row for row in rows if row["preset"] == "chest-abdomen")
    assert one["spacing_mm"] == [0.781, 0.781, round(2.981 / 2, 4)]


def test_a_size_that_the_model_cannot_make_is_out_of_distribution(maisi):
    (row,) = maisi("recommend-spacing --region chest --modality ct --size 500x500x128 --json").json["rows"]
    assert row["verdict"] == "ood"
    assert "512x512x128" in row["reason"]


@pytest.mark.parametrize("line", ["", "--modality mri", "--region abdomen", "--modality ct --size 256x256x128"])
def test_spacing_text_and_json_agree(line, maisi):
    text, data = maisi(f"recommend-spacing {line}"), maisi(f"recommend-spacing {line} --json").json
    cells = text.cells("preset")
    assert [row[0] for row in cells] == [row["preset"] for row in data["rows"]]
    assert [row[-2] for row in cells] == [row["verdict"] for row in data["rows"]]
    assert [row[-1] for row in cells] == [row["reason"] for row in data["rows"]]


def test_a_modality_narrows_the_rows(maisi):
    def modalities(name: str) -> set[str]:
        return {row["modality"] for row in maisi(f"recommend-spacing --modality {name} --json").json["rows"]}

    assert modalities("ct") == {"ct"}
    assert modalities("MR_T1") == {"mri-t1"}
    assert modalities("mri") == {each.modality for each in presets.presets("region")} - {"ct"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--region chst", "use head, chest, abdomen, lower"),
        ("--region head,lower", "no preset covers regions head,lower"),
        ("--region head --modality ct", "for this modality there are --region"),
        ("--modality mri-t11", "did you mean 'mri-t1'"),
        ("--modality ct-wo-contrast", "there are presets of --modality"),
        ("--size 512x512", "write it like 512x512x128"),
        ("--size 0x512x128", "positive"),
        ("--from missing", "the folder missing does not exist"),
        ("--regoin chest", "--region"),
    ],
)
def test_spacing_says_what_is_wrong(line, says, maisi):
    done = maisi(f"recommend-spacing {line}")
    assert (done.code, done.out) == (2, "")
    assert says.casefold() in done.err.casefold()


def turned(size, spacing, codes: str) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return shape and affine of a grid of RAS+ `size` and `spacing` that is stored along `codes`."""
    affine, shape = np.zeros((4, 4)), [0, 0, 0]
    affine[3, 3] = 1
    for stored, code in enumerate(codes):
        axis = next(k for k, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[axis, stored] = spacing[axis] * (1 if code in "RAS" else -1)
        shape[stored] = size[axis]
    return (shape[0], shape[1], shape[2]), affine


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL", "AIR"])
def test_from_a_folder_finds_the_preset_of_that_field_of_view(codes, maisi, tmp_path):
    against = presets.preset("chest-abdomen-lower", "region").geometry
    folder = tmp_path / "scans" / "deeper"
    folder.mkdir(parents=True)
    for k, scale in enumerate((0.7, 1.0, 1.4)):  # the median is that of the preset
        spacing = [fov * scale / n for fov, n in zip(against.fov_mm, (16, 20, 24), strict=True)]
        save_nifti(folder / f"{k}.nii.gz", *turned((16, 20, 24), spacing, codes))
    done = maisi("recommend-spacing --modality ct --from scans --json").json
    assert done["data"]["files"] == 3
    np.testing.assert_allclose(done["data"]["fov_mm"], against.fov_mm, rtol=1e-5)
    np.testing.assert_allclose(done["data"]["fov_min_mm"], np.multiply(0.7, against.fov_mm), rtol=1e-5)
    first = done["rows"][0]
    assert (first["preset"], first["verdict"]) == ("chest-abdomen-lower", "ok")
    np.testing.assert_allclose(first["spacing_mm"], against.spacing, rtol=1e-3)
    order = [("ok", "marginal", "ood").index(row["verdict"]) for row in done["rows"]]
    assert order == sorted(order)
    assert order[-1] == 2


def test_from_a_folder_covers_the_longer_side_where_voxels_are_square(maisi, tmp_path):
    (tmp_path / "scans").mkdir()
    save_nifti(tmp_path / "scans" / "a.nii.gz", (122, 101, 112), np.diag([3.0, 3, 3, 1]))
    done = maisi("recommend-spacing --region chest --modality ct --from scans --json").json
    assert done["data"]["fov_mm"] == [366, 303, 336]
    (row,) = done["rows"]
    assert row["fov_mm"] == [366, 366, 336]
    assert row["spacing_mm"] == [round(366 / 512, 4), round(366 / 512, 4), round(336 / 128, 4)]


def test_from_a_folder_names_what_it_skips(maisi, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    save_nifti(folder / "good.nii.gz", (16, 16, 16), np.diag([20.0, 20, 20, 1]))
    (folder / "bad.nii.gz").write_bytes(b"no gzip")
    text, data = maisi("recommend-spacing --from scans"), maisi("recommend-spacing --from scans --json").json
    assert (data["data"]["files"], len(data["data"]["skipped"])) == (1, 1)
    assert "bad.nii.gz" in data["data"]["skipped"][0]["problem"]
    assert data["data"]["skipped"][0]["problem"] in text.err
    (folder / "good.nii.gz").unlink()
    done = maisi("recommend-spacing --from scans")
    assert (done.code, done.out) == (2, "")
    assert "none of its 1 NIfTI files can be read" in done.err


def test_a_preset_of_ones_own_does_not_speak_of_the_training_data(maisi, tmp_path):
    before = maisi("recommend-spacing --json").json
    presets.read.cache_clear()
    assert maisi("presets new my-chest --from chest").code == 0
    assert maisi("recommend-spacing --json").json == before


# --- gpu-plan -------------------------------------------------------------------------------


def test_plan_has_the_keys_of_the_contract_and_the_fastest_mode_that_fits(maisi):
    done = maisi("gpu-plan --preset chest-abdomen --gpu 24g --json")
    plan = done.json
    assert done.code == 0
    assert set(plan) == PLAN_KEYS
    assert plan["schema"] == "maisi.plan/1"
    assert (plan["model"], plan["size"], plan["gpu"]["memory_gib"]) == ("rflow-ct", [512, 512, 128], 24)
    assert plan["fits"] is True
    denoise, decode, save = plan["stages"]
    assert all({"name", "peak_gib", "seconds", "choices"} == set(stage) for stage in plan["stages"])
    assert (denoise["name"], decode["name"], save["name"]) == ("denoise", "decode", "save")
    room = (24 - planning.HEADROOM_GIB) / (1 + estimates.MARGIN)
    assert plan["margin_gib"] == pytest.approx(room - max(denoise["peak_gib"], decode["peak_gib"]), abs=0.011)
    choices = {choice["name"]: choice["value"] for stage in plan["stages"][:2] for choice in stage["choices"]}
    assert choices == {"device": "cuda", "dtype": "fp16", "decoder": "exact", "sweeps": "store", "window": None, "overlap": None}
    assert all(choice["reason"] for stage in plan["stages"] for choice in stage["choices"])


def test_what_is_known_not_to_fit_gives_the_plan_and_exit_code_3(maisi):
    done = maisi("gpu-plan --size 512x512x768 --memory 6GiB --json")
    assert done.code == 3
    assert done.json["fits"] is False
    most = max(stage["peak_gib"] for stage in done.json["stages"][:2])
    assert f"needs {most:g} GiB, " in done.err
    text = maisi("gpu-plan --size 512x512x768 --memory 6GiB")
    assert text.code == 3
    assert f"fits    no, {-done.json['margin_gib']:g} GiB short" in text.out


@pytest.mark.parametrize("row", GPU_ROWS, ids=lambda row: f"{'x'.join(map(str, row['size']))}-{row['windows']}")
def test_the_reference_s_own_run_is_predicted_and_its_published_figure_named(row, maisi):
    size, window = ("x".join(map(str, row[key])) for key in ("size", "window"))
    line = f"--size {size} --gpu 80g --compat reference --window {window} --splits {row['splits']} --overlap {row['overlap']}"
    plan = maisi(f"gpu-plan {line} --json").json
    (decode,) = plan["stages"]
    assert decode["peak_gib"] == pytest.approx(row["peak_gib"], rel=0.03)
    assert any(f"{row['peak_gib']} GiB" in warning and "A100" in warning for warning in plan["warnings"])


@pytest.mark.parametrize(
    ("line", "least", "most"),
    [
        ("--preset brain-t1-axial --gpu 24g", 0.5, 24),
        ("--preset chest-abdomen --model nano-ct --gpu 24g", 0.01, 2),
        ("--preset lower --gpu 80g", 1, 79),
        ("--preset chest-abdomen --gpu 24g --dtype fp32", 4, 24),
        ("--preset chest-abdomen --gpu 24g --decoder window --window 48x48x32", 2, 24),
        ("--size 512x512x512 --stage encode --gpu 24g", 2, 24),
        ("--size 512x512x512 --stage train --gpu 80g", 10, 60),
        ("--size 256x256x128 --stage train-controlnet --gpu 24g", 2, 24),
        ("--size 64x64x64 --stage train-vae --gpu 16g", 0.5, 16),
    ],
)
def test_every_stage_of_every_model_is_predicted(line, least, most, maisi):
    done = maisi(f"gpu-plan {line} --json")
    peaks = [stage["peak_gib"] for stage in done.json["stages"] if stage["name"] != "save"]
    assert done.code == 0
    assert done.json["fits"] is True
    assert least < max(peaks) < most


@pytest.mark.parametrize("flags", ["--preset chest-abdomen --gpu 24g", "--size 512x512x512 --memory 48GiB", "--gpu cpu"])
def test_plan_text_and_json_agree(flags, maisi):
    text, plan = maisi(f"gpu-plan {flags}"), maisi(f"gpu-plan {flags} --json").json

    def figure(value: float | None, absent: str) -> str:
        return absent if value is None else f"{value:g}"

    wanted = [[stage["name"], figure(stage["peak_gib"], planning.NOT_MODELLED), figure(stage["seconds"], planning.NOT_MEASURED)]
              for stage in plan["stages"] if stage["name"] != "save"]  # fmt: skip
    tables = text.cells("stage")
    assert tables == wanted
    choices = []
    for stage in plan["stages"]:
        for choice in stage["choices"]:
            value = tuple(choice["value"]) if isinstance(choice["value"], list) else choice["value"]
            if value is not None:
                choices.append([stage["name"], choice["name"], settings.show(value), choice["reason"]])
    after = text.out[text.out.index("stage    choice") :]
    assert Done(0, after, "").cells("stage") == choices
    assert [f"note: {warning}" for warning in plan["warnings"]] == text.err.splitlines()


@given(
    memory=st.floats(1, 200),
    more=st.floats(0, 100),
    size=st.sampled_from([tuple(row["size"]) for row in GPU_ROWS]),
)
@profile(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_more_memory_never_hurts(memory, more, size):
    spec = catalog.model("rflow-ct")
    geometry = presets.preset("chest-abdomen", "region").geometry.resized(size)

    def plan(gib: float) -> planning.Plan:
        gpu = devices.Gpu(name="GPU", kind="cuda", memory_gib=gib)
        return planning.predict(spec, geometry, gpu, settings=settings.GenerateSettings())

    small, large = plan(memory), plan(memory + more)
    assert small.fits is not None
    assert (small.margin_gib >= 0) is small.fits
    assert large.fits or not small.fits

    modes = estimates.SWEEPS
    assert modes.index(large.choice("sweeps")) <= modes.index(small.choice("sweeps"))


@pytest.mark.parametrize(
    ("text", "gib"),
    [("24GiB", 24), ("24", 24), ("24 g", 24), ("24576MiB", 24), ("80gb", 74.51), ("22.5gib", 22.5)],
)
def test_memory_is_read_in_the_usual_units(text, gib, maisi):
    assert maisi(f"gpu-plan --memory '{text}' --preset lower --json").json["gpu"]["memory_gib"] == gib


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--gpu 23g", "did you mean '32g' or '24g'"),
        ("--gpu 24g --memory 24GiB", "exclude each other"),
        ("--memory lots", "write it like 24GiB"),
        ("--memory 0", "write it like 24GiB"),
        ("--memory 24TiB", "write it like 24GiB"),
        ("--preset chest-abdomn", "did you mean 'chest-abdomen'"),
        ("--preset 24g", "no region preset named '24g'"),
        ("--size 500x512x512", "the nearest sizes are 512x512x512"),
        ("--preset chest --size 500x500x128", "the nearest sizes at this field of view are 512x512x128"),
        ("--model rflow-tc", "did you mean 'rflow-ct'"),
        ("--model mine.toml", "there is no model file mine.toml"),
        ("--decoder exat", "did you mean 'exact'"),
        ("--dtype fp8", "use auto, fp32, bf16, fp16"),
        ("--overlap 1", "it must lie in 0..1"),
        ("--overlap half", "number"),
        ("--sizes 512x512x128", "--size"),
        ("--stage trian", "use --stage generate"),
        ("--compat monai", "use --compat reference"),
        ("--splits 2", "add --compat reference"),
        ("--gpu 24g --measure", "only this machine can be measured"),
    ],
)  # fmt: skip
def test_plan_says_what_is_wrong_and_writes_nothing(line, says, maisi, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = maisi(f"gpu-plan {line} --save plan.json")
    assert (done.code, done.out) == (2, "")
    assert says.casefold() in done.err.casefold()
    assert sorted(tmp_path.rglob("*")) == before


def test_save_writes_the_same_plan_and_never_over_a_file(maisi, tmp_path):
    done = maisi("gpu-plan --gpu 24g --save plans/plan.json --json")
    saved = (tmp_path / "plans" / "plan.json").read_text()
    assert json.loads(saved) == done.json
    (tmp_path / "mine.json").write_text("mine")
    refused = maisi("gpu-plan --gpu 24g --save mine.json")
    assert (refused.code, refused.out, (tmp_path / "mine.json").read_text()) == (2, "", "mine")
    assert "--force" in refused.err
    assert maisi("gpu-plan --gpu 24g --save mine.json --force -q").err == ""
    assert (tmp_path / "mine.json").read_text() == saved


def test_the_model_is_the_presets_unless_it_is_named(maisi, tmp_path, monkeypatch):
    def model(line: str) -> str:
        return maisi(f"gpu-plan --gpu cpu --json {line}").json["model"]

    assert model("") == "rflow-ct"
    assert model("--preset brain-t1-axial") == presets.preset("brain-t1-axial", "region").values["volume"]["model"]
    assert model("--model nano-ct") == "nano-ct"
    (tmp_path / "config.toml").write_text('model = "ddpm-ct"\n')
    assert model("") == "ddpm-ct"
    monkeypatch.setenv("MAISI_MODEL", "nano-ct")
    assert model("") == "nano-ct"
    assert model("--model rflow-ct") == "rflow-ct"


def test_auto_takes_the_gpu_that_the_driver_reports(maisi, monkeypatch):
    found = devices.Gpu(name="NVIDIA Test", kind="cuda", memory_gib=23.99)
    monkeypatch.setattr(devices, "detect", lambda: found)
    plan = maisi("gpu-plan --preset chest-abdomen --gpu auto --json").json
    assert plan["gpu"] == {"name": "NVIDIA Test", "kind": "cuda", "memory_gib": 23.99}
    assert 0 < plan["margin_gib"] < 22


def test_measuring_makes_plans_tell_seconds(maisi, monkeypatch):
    from maisi_cli import calibration

    monkeypatch.setattr(calibration, "SECONDS", 0.0)
    monkeypatch.setattr(calibration, "CONVOLUTIONS", {"cpu": ((8, 2, 16),)})
    monkeypatch.setattr(calibration, "TOKENS", {"cpu": 64})
    line = "gpu-plan --gpu cpu --dtype fp32 --model nano-ct --size 128x128x128 --json"
    assert [stage["seconds"] for stage in maisi(line).json["stages"]] == [None, None, None]
    done = maisi(f"{line} --measure")
    assert "TFLOP/s" in done.err
    denoise, decode, _ = (stage["seconds"] for stage in done.json["stages"])
    assert denoise > 0
    assert decode > 0
    again = [stage["seconds"] for stage in maisi(line).json["stages"]]  # kept
    assert again[:2] == [denoise, decode]


def test_a_trace_afresh_says_what_the_table_says(maisi):
    line = "gpu-plan --model nano-ct --size 128x128x128 --memory 8GiB --json"
    looked_up, traced = maisi(line).json, maisi(f"{line} --simulate").json
    for one, two in zip(looked_up["stages"][:2], traced["stages"][:2], strict=True):
        assert two["peak_gib"] == pytest.approx(one["peak_gib"], rel=0.2)


def test_planning_and_recommending_load_no_framework(tmp_path):
    script = """
import sys
from maisi_cli import cli
cli.build()
assert "pydantic" not in sys.modules  # Typer loads it to read values
for line in (["recommend-spacing"], ["gpu-plan", "--gpu", "24g"], ["gpu-plan", "--json"]):
    assert cli.run(line) == 0, line
    heavy = {"torch", "monai", "numpy", "scipy", "nibabel", "rich"} & set(sys.modules)
    assert not heavy, (line, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MAISI_LOAD_PLUGINS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
