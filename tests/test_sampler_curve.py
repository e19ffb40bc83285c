"""The curve of docs/samplers.md, at the smallest scale: its images are those of `generate`, and a run goes on where it was cut off."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from maisi_cli import distances, generate
from maisi_cli.errors import UsageError
from maisi_cli.sampling import euler, heun
from maisi_cli.slices import PLANES
from maisi_cli.testing import tiny_model
from maisi_cli.weights import load_state, save_state

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "sampler_curve.py"


@pytest.fixture(scope="module")
def curve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sampler_curve", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.EXACT_STEPS = 3
    return module


@pytest.fixture(scope="module")
def folder(curve: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of two masks and three held-out phantoms of 32^3 voxels, and a tiny model."""
    where = tmp_path_factory.mktemp("curve")
    tiny_model(where)
    wake(where / "unet.safetensors")
    curve.main(["prepare", "--inputs", str(where), "--count", "2", "--held-out", "3", "--size", "32", "32", "32", "--spacing", "6"])
    return where


def wake(path: Path) -> None:
    """Fill the last convolution, which is 0 in a network that was never trained: its velocity would be 0 everywhere."""
    state = load_state(path).tensors
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if name.startswith("out.") and not value.any():
            state[name] = torch.randn(value.shape, generator=generator) * 0.1
    save_state(path, state, metadata={}, half=False)


def run(curve: ModuleType, folder: Path, out: Path, **values: object) -> list[dict]:  # type: ignore[type-arg]
    settings = {"samplers": ("rflow", "heun"), "evaluations": (2, 3), "model": str(folder / "tiny.toml"), "device": "cpu",
                "dtype": "fp32", "resamples": 4, "say": lambda _text: None}  # fmt: skip
    curve.run(folder, out, **{**settings, **values})
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_images_are_those_that_generate_makes(curve: ModuleType, folder: Path, tmp_path: Path) -> None:
    """All masks go through the network in one batch; seeds, guidance and what lies outside of the body are the same."""
    model = str(folder / "tiny.toml")
    made = list(generate(model=model, size="32", spacing="6", regions=("chest", "abdomen"), seed=0, count=2, steps=3, out=tmp_path,
                         mask_source="phantom", device="cpu", dtype="fp32", on_qc_fail="keep", scheduler="heun"))  # fmt: skip
    extractor, profile = curve.open_extractor(), curve.find_profile("ct")
    about, people, _, _ = curve.load_inputs(folder, extractor, profile)
    maker = curve.Maker(model, people, about["seed"], device="cpu", dtype="fp32")
    images = list(maker.images(maker.latents(heun, 3)))
    assert len(images) == len(made) == 2
    for sample, image in zip(made, images, strict=True):
        assert np.array_equal(sample.mask.array, people[sample.index].array)
        assert np.abs(np.rint(sample.image.array) - image.array).max() <= 1
    assert np.abs(images[0].array - images[1].array).max() > 10


def test_a_run_goes_on_where_it_was_cut_off_and_refuses_other_settings(curve: ModuleType, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "curve.jsonl"
    lines = run(curve, folder, out)
    assert [(line.get("sampler"), line.get("steps"), line.get("evaluations")) for line in lines[1:]] == [
        ("rendered", None, None), ("rflow", 3, 3), ("heun", 2, 3), ("rflow", 2, 2), ("heun", 1, 1)]  # fmt: skip
    errors = {(line["sampler"], line["steps"]): line["path_error"] for line in lines[2:]}
    assert errors["rflow", 2] > errors["rflow", 3] > 0
    for line in lines[1:]:
        assert line["ci95"][0] <= line["fid"] <= line["ci95"][1]
    text = out.read_text()
    out.write_text(text[: text.rfind("{") + 9])
    assert run(curve, folder, out) == lines
    assert run(curve, folder, out) == lines
    with pytest.raises(UsageError, match="another resamples"):
        run(curve, folder, out, resamples=5)
    rows = curve.table(lines).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| `heun`"] * 2 + ["| `rflow`"] * 2
    picture = ElementTree.fromstring(curve.plot(lines))
    assert [each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")].count("heun") == 2


def test_the_distance_from_the_exact_path_is_zero_on_it(curve: ModuleType, folder: Path, tmp_path: Path) -> None:
    lines = run(curve, folder, tmp_path / "exact.jsonl", samplers=("heun",), evaluations=(5,))
    assert lines[-1]["steps"] == 3 == curve.EXACT_STEPS
    assert lines[-1]["path_error"] == 0


def test_fid_is_that_of_all_slices_averaged_over_planes(curve: ModuleType) -> None:
    rng = np.random.default_rng(0)
    real, made = ({plane: rng.normal(shift, 1, (3, 20, 4)) for plane in PLANES} for shift in (0.0, 0.5))
    whole = [distances.frechet(*(distances.Moments.of(side[plane].reshape(-1, 4)) for side in (real, made))) for plane in PLANES]
    assert curve.fid(real, made, 3)["fid"] == pytest.approx(np.mean(whole))
    assert curve.fid(real, real, 3)["fid"] == pytest.approx(0, abs=1e-9)


def test_a_difference_is_of_the_same_resamples(curve: ModuleType) -> None:
    """What shifts every resample alike has a difference without spread, however wide the intervals are."""
    drawn = [3.0, 9.0, 15.0]
    lines = [{}, {"sampler": "rflow", "evaluations": 30, "fid": 10.0, "ci95": [4.0, 16.0], "path_error": 0.1, "resampled": drawn},
             {"sampler": "ab2", "evaluations": 10, "fid": 12.5, "ci95": [6.5, 18.5], "path_error": 0.1,
              "resampled": [each + 2 for each in drawn]}]  # fmt: skip
    ours, theirs = curve.table(lines).splitlines()[2:]
    assert ours == "| `ab2` | 10 | 12.50 (6.50 to 18.50) | +2.50 (+2.50 to +2.50) | 0.1000 |"
    assert theirs == "| `rflow` | 30 | 10.00 (4.00 to 16.00) |  | 0.1000 |"


def test_steps_are_as_many_as_the_evaluations_allow(curve: ModuleType) -> None:
    assert [curve.steps_for(euler, n) for n in (1, 4, 30)] == [1, 4, 30]
    assert [curve.steps_for(heun, n) for n in (1, 4, 15, 30)] == [1, 2, 8, 15]
