"""Compiled networks: the key, the folder, the check against PyTorch, and the backends that a processor has."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from maisi_cli import decoding, engines, networks
from maisi_cli.catalog import ModelSpec, model
from maisi_cli.engines import Built, Key, Wish, exporting, making, tensorrt
from maisi_cli.errors import CannotRun, MaisiError, Rejected, UsageError
from maisi_cli.testing import filled, tiny_model
from maisi_cli.weights import save_state

SIZE = (16, 8, 8)
CPU = torch.device("cpu")
SPACING = (1.5, 1.5, 2.0)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Return the tiny model, no layer of which is zero."""
    found = model(str(tiny_model(tmp_path_factory.mktemp("tiny"))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for part in ("unet", "controlnet"):
            save_state(found.path.parent / f"{part}.safetensors", filled(networks.build(found.networks[part]), std=0.2).state_dict(),
                       metadata={}, half=False)  # fmt: skip
    return found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def openvino() -> None:
    """Skip, or fail in CI, where OpenVINO is not installed."""
    if importlib.util.find_spec("openvino") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("needs openvino, which the extra `test` brings")
        pytest.skip("needs openvino")


def order(spec: ModelSpec, part: str = "unet", **changes: Any) -> making.Order:
    known: dict[str, Any] = {
        "backend": "openvino",
        "precision": "fp32",
        "size": SIZE,
        "device": CPU,
        "residuals": part == "unet",
        **changes,
    }
    return making.Order(spec=spec, part=part, file=spec.path.parent / f"{engines.network_of(part)}.safetensors", **known)


def key(**changes: Any) -> Key:
    known: dict[str, Any] = {
        "backend": "trt", "part": "unet", "weights": "ab", "precision": "fp16", "inputs": (("x", (1, 4, 64, 64, 32)), ("t", (1,))),
        "environment": (("gpu", "G sm90"), ("tensorrt", "10.1")),
    }  # fmt: skip
    return Key(**{**known, **changes})


def made(home: Path, **changes: Any) -> Built:
    """Return an engine whose compiled code is a text."""

    def build(folder: Path) -> tuple[list[float], dict[str, Any], dict[str, float]]:
        (folder / "model.bin").write_text("code")
        return [1e-4, 2e-4], {}, {"build": 1.0}

    return engines.store(key(**changes), build)


# --- the key --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"backend": "aoti"}, {"part": "controlnet"}, {"weights": "ac"}, {"precision": "bf16"}, {"revision": 0},
     {"inputs": (("x", (1, 4, 64, 64, 33)), ("t", (1,)))}, {"environment": (("gpu", "G sm90"), ("tensorrt", "10.2"))}],
)  # fmt: skip
def test_anything_that_differs_makes_another_engine(change: dict[str, Any], home: Path) -> None:
    made(home)
    assert key(**change).digest() != key().digest() == key().digest()
    wanted = key(**change)
    shapes = {name: [int(n) for n in dims] for name, dims in wanted.inputs}  # type: ignore[arg-type]

    def found(each: Key) -> Built | None:
        if each.revision != engines.REVISION:
            return None
        return engines.find(each.backend, each.part, weights=each.weights, precision=each.precision, environment=dict(each.environment),
                            shapes=shapes)  # fmt: skip

    assert found(wanted) is None
    shapes = {"x": [1, 4, 64, 64, 32], "t": [1]}
    assert found(key()) is not None


def test_a_key_comes_back_from_its_manifest(home: Path) -> None:
    ranged = key(inputs=(("x", (1, 4, (16, 32, 64), 64, (8, 16, 32))),))
    for each in (key(), ranged):
        assert Key.of(json.loads(json.dumps(each.as_dict()))) == each
    assert ranged.dynamic
    assert not key().dynamic
    assert ranged.covers({"x": (1, 4, 16, 64, 32)})
    for shape in ((1, 4, 15, 64, 32), (1, 4, 65, 64, 32), (1, 4, 16, 63, 32), (1, 4, 16, 64)):
        assert not ranged.covers({"x": shape})
    assert not ranged.covers({"x": (1, 4, 16, 64, 32), "y": (1,)})


def test_an_engine_for_exactly_this_shape_comes_before_one_for_a_range(home: Path) -> None:
    made(home, inputs=(("x", (1, 4, (16, 32, 64), 64, 32)), ("t", (1,))))
    wanted = {"weights": "ab", "precision": "fp16", "environment": dict(key().environment), "shapes": {"x": (1, 4, 64, 64, 32), "t": (1,)}}
    found = engines.find("trt", "unet", **wanted)
    assert found is not None
    assert found.key.dynamic
    exact = made(home)
    assert engines.find("trt", "unet", **wanted) == exact


# --- the folder -----------------------------------------------------------------------------


def test_an_engine_is_whole_or_not_there(home: Path) -> None:
    def interrupted(folder: Path) -> Any:
        (folder / "model.bin").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engines.store(key(), interrupted)
    assert list(engines.built()) == []
    assert [*home.glob("engines/trt/*")] == []
    whole = made(home)
    assert [*engines.built()] == [whole]
    assert whole.error == 2e-4
    assert whole.folder == home / "engines" / "trt" / key().digest()


def test_a_changed_file_is_never_loaded(home: Path) -> None:
    engine = made(home)
    engines.verify(engine)
    (engine.folder / "model.bin").write_text("evil")
    with pytest.raises(CannotRun, match=r"damaged: model\.bin is not what was built"):
        engines.verify(engine)
    outside = dataclasses.replace(engine, files={"../manifest.json": "0" * 64})
    with pytest.raises(CannotRun, match="damaged"):
        engines.verify(outside)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "maisi.engine/1"}', '{"schema": "maisi.engine/1", "key": {"inputs": 3}}'])
def test_a_folder_without_a_whole_manifest_is_no_engine(text: str, home: Path) -> None:
    engine = made(home)
    (engine.folder / "manifest.json").write_text(text)
    assert list(engines.built()) == []
    assert engines.sweep() == [engine.folder]
    assert not engine.folder.exists()


def test_removal_leaves_no_empty_folders(home: Path) -> None:
    engine, other = made(home), made(home, part="controlnet")
    assert engines.remove([engine]) == [engine.folder]
    assert [*engines.built()] == [other]
    engines.remove([other])
    assert not (home / "engines").exists()


# --- what is wanted -------------------------------------------------------------------------


def test_the_wish_follows_the_settings() -> None:
    assert (engines.wish("torch", "off").backend, engines.wish("torch", "off").must) == ("torch", False)
    for backend in engines.BACKENDS:
        assert (engines.wish(backend, "off").backend, engines.wish(backend, "off").must) == (backend, True)
    assert (engines.wish("torch", "require").must, engines.wish("torch", "prefer").must) == (True, False)
    assert engines.wish("trt", "prefer") == engines.wish("torch", "prefer")
    with pytest.raises(UsageError, match="--engine openvino and --trt prefer exclude each other"):
        engines.wish("openvino", "prefer")


@pytest.mark.parametrize(
    ("backend", "device", "precision", "absent", "error", "text"),
    [
        ("openvino", "cpu", "bf16", "openvino", CannotRun, r"OpenVINO is not installed.*\(pip install openvino\)"),
        ("trt", "cuda", "fp16", "torch_tensorrt", CannotRun, r"no package torch_tensorrt.*\(pip install torch-tensorrt\)"),
        ("openvino", "cuda", "bf16", None, UsageError, "for processors"),
        ("openvino", "cpu", "fp16", None, UsageError, "fp32 or bf16"),
        ("trt", "cpu", "fp16", None, CannotRun, "needs a CUDA device"),
        ("aoti", "mps", "fp32", None, CannotRun, "mps"),
    ],
)
def test_what_a_backend_needs_is_said_in_a_line(
    backend: str, device: str, precision: str, absent: str | None, error: type[MaisiError], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == absent else object())
    with pytest.raises(error, match=text):
        engines.require(backend, device=device, precision=precision)


def test_knowing_what_is_there_loads_no_framework(tmp_path: Path) -> None:
    script = """
import sys
from maisi_cli import engines
engines.wish("torch", "off")
list(engines.built()), engines.processor()
assert not {"torch", "openvino", "numpy"} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"MAISI_HOME": str(tmp_path), "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr


# --- exported -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "controlnet", "decoder"])
def test_an_exported_part_is_the_network_to_the_bit(part: str, spec: ModelSpec) -> None:
    wanted = order(spec, part)
    network, _ = exporting.plain(spec, part, wanted.file)
    inputs = wanted.examples()
    reference = making.exact(network, inputs, CPU)
    head = exporting.split(network)
    behind = exporting.Head(head, CPU)(inputs, torch.float32)
    assert {name: tuple(each.shape) for name, each in behind.items()} == wanted.shapes()
    program = exporting.exported(network, behind)
    with torch.inference_mode():
        assert making.compare(exporting.outputs(program.module()(*behind.values())), reference) == [0.0] * len(reference)
    assert not any(word in name for name in exporting.operators(program) for word in ("sin", "embedding"))  # they stay outside
    assert max(float(each.abs().max()) for each in reference) > 1e-3


def test_one_program_serves_a_range_of_sizes(spec: ModelSpec) -> None:
    wanted = order(spec, backend="aoti", sizes=((8, 8, 8), SIZE, (32, 16, 16)))
    assert wanted.key().dynamic
    network, _ = exporting.plain(spec, "unet", wanted.file)
    other = dataclasses.replace(wanted, size=(24, 12, 8))
    reference = making.exact(network, other.examples(), CPU)
    head = exporting.Head(exporting.split(network), CPU)
    program = exporting.exported(network, head(wanted.examples(), torch.float32), dynamic=wanted.dynamic())
    with torch.inference_mode():
        result = program.module()(*head(other.examples(), torch.float32).values())
    assert max(making.compare(exporting.outputs(result), reference)) < 1e-5
    assert wanted.key().covers(other.shapes())


def test_in_another_dtype_norms_stay_in_float32(spec: ModelSpec) -> None:
    network, _ = exporting.plain(spec, "unet", order(spec).file)
    exporting.split(network)
    half = exporting.in_dtype(network, torch.bfloat16, CPU)
    dtypes = {name: value.dtype for name, value in half.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if ".part." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".part." not in name} == {torch.bfloat16}


def test_residuals_have_the_shapes_that_a_controlnet_makes(spec: ModelSpec) -> None:
    for each in (spec, model("rflow-ct")):
        of = each.networks["controlnet"]
        with torch.device("meta"):
            network = exporting.bare(networks.build(of), "controlnet")
            inputs = {name: value.to("meta") for name, value in exporting.examples(each, "controlnet", (16, 16, 8)).items()}
            down, middle = network(**inputs)
        expected = exporting.shapes(each, "unet", (16, 16, 8), residuals=True)
        assert [tuple(value.shape) for value in down] == [expected[f"{exporting.DOWN}.{k}"] for k in range(len(down))]
        assert tuple(middle.shape) == expected[exporting.MIDDLE]
        assert f"{exporting.DOWN}.{len(down)}" not in expected


def test_flat_and_nested_are_inverse() -> None:
    a, b, c = (torch.full((1,), float(n)) for n in range(3))
    call = {"x": a, "down_block_additional_residuals": [b, c], "mid_block_additional_residual": a}
    assert list(exporting.flat({**call, "class_labels": None})) == [
        "x", "down_block_additional_residuals.0", "down_block_additional_residuals.1", "mid_block_additional_residual"
    ]  # fmt: skip
    assert exporting.nested(exporting.flat(call)) == call


# --- the check ------------------------------------------------------------------------------


def test_the_error_is_relative_to_the_reference() -> None:
    reference = [torch.tensor([3.0, 4.0]), torch.zeros(2)]
    assert making.compare(reference, reference) == [0.0, 0.0]
    off = making.compare([torch.tensor([3.0, 4.5]), torch.tensor([0.1, 0.1])], reference)
    assert off == pytest.approx([0.1, 0.1])
    assert making.compare([torch.tensor([float("nan"), 4.0]), torch.zeros(2)], reference)[0] == float("inf")
    assert making.compare([torch.zeros(3), torch.zeros(2)], reference) == [float("inf")]
    assert making.compare(reference[:1], reference) == [float("inf")]


@pytest.mark.parametrize("precision", list(engines.TOLERANCE))
def test_an_engine_that_is_off_is_refused(precision: str, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, own = engines.TOLERANCE[precision], 0.0
    monkeypatch.setattr(making, "_torch_call", lambda *_: lambda: [torch.tensor([1.0 + own])])
    wanted, reference = order(spec, precision=precision), [torch.ones(1)]

    def judged(error: float) -> dict[str, float]:
        return making.judge(wanted, [error, 0.0], {}, reference)

    assert judged(limit) == {"allowed": limit}
    for error in (limit * 1.01, float("inf"), float("nan")):
        with pytest.raises(Rejected, match=r"the unet by OpenVINO is off: relative error"):
            judged(error)
    own = 0.04  # of PyTorch itself: such a network amplifies rounding
    assert judged(0.079)["allowed"] == pytest.approx(0.08)
    own = 10.0
    for error in (0.081, 0.1001):
        own = 0.04 if error < 0.1 else 10.0
        with pytest.raises(Rejected):
            judged(error)


class Crooked:
    """A backend whose engines add something to what PyTorch computes."""

    def __init__(self, offset: float) -> None:
        self.offset, self.network = offset, None

    def environment(self, _device: torch.device) -> dict[str, str]:
        return {"crooked": "1"}

    def build(self, network: Any, inputs: dict[str, Any], folder: Path, *_: Any) -> dict[str, Any]:
        (folder / "model.bin").write_text("nothing")
        self.call = exporting.Flat(network, list(inputs))
        return {"left_to_torch": 3}

    def load(self, *_: Any) -> Any:
        return lambda tensors: [each + self.offset for each in self.call(*tensors)]


def test_nothing_is_kept_of_an_engine_that_is_off(spec: ModelSpec, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "require", lambda *_, **__: None)
    backend = Crooked(0.5)
    monkeypatch.setattr(making, "backend_of", lambda _: backend)
    with pytest.raises(Rejected, match="off"):
        making.make(order(spec, backend="trt"))
    assert list(engines.built()) == []
    backend.offset = 0.0
    built = making.make(order(spec, backend="trt"))
    assert built.error == 0.0
    assert built.record()["left_to_torch"] == 3
    backend.offset = 0.5
    with pytest.raises(Rejected, match="off"):
        making.check(order(spec, backend="trt"), built)
    backend.offset = 0.0
    monkeypatch.setattr(making, "timed", lambda *_: {"engine": 2.0, "torch": 1.0})
    with pytest.raises(Rejected, match="takes 2 s a call, PyTorch 1 s"):
        making.check(order(spec, backend="trt"), built)
    monkeypatch.setattr(making, "timed", lambda *_: {"engine": 1.0, "torch": 2.0})
    assert making.check(order(spec, backend="trt"), built).seconds["torch"] == 2.0
    assert next(engines.built()).seconds == {**built.seconds, "engine": 1.0, "torch": 2.0}


# --- in the place of networks ---------------------------------------------------------------


def loaded(spec: ModelSpec, precision: str = "fp32") -> networks.Networks:
    files = {part: spec.path.parent / f"{part}.safetensors" for part in ("unet", "controlnet", "vae")}
    return networks.load(spec, tuple(files), device=CPU, precision=networks.Precision.named(precision, CPU), files=files)


def predictions(nets: networks.Networks) -> list[torch.Tensor]:
    """Return what a denoiser with and without a mask, and one with guidance, say."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, *SIZE, generator=rng)
    labels = torch.randint(0, 132, (1, 1, *(4 * n for n in SIZE)), dtype=torch.uint8, generator=rng)
    conditions = [networks.Condition(spacing_mm=SPACING), networks.Condition(spacing_mm=SPACING, labels=labels),
                  networks.Condition(spacing_mm=SPACING, labels=labels, cfg_mask=2.0)]  # fmt: skip
    return [nets.denoiser(each)(x, torch.tensor(time)) for each in conditions for time in (967.3, 33.3)]


def fitted(
    nets: networks.Networks, spec: ModelSpec, wish: Wish, *, keep: making.Engines | None = None, only: str | None = None
) -> networks.Networks:  # fmt: skip
    files = {part: spec.path.parent / f"{part}.safetensors" for part in ("unet", "controlnet", "vae")}
    parts = {part: SIZE for part in ("unet", "controlnet", "decoder") if only in (None, part)}
    return (keep or making.Engines()).fitted(nets, parts, files, wish, residuals=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_says_what_pytorch_says(precision: str, spec: ModelSpec, openvino: None) -> None:
    if precision == "bf16" and networks.Precision.named("auto", CPU).name != "bf16":
        pytest.skip("this processor does not compute in bf16")
    exact = predictions(loaded(spec))
    nets = fitted(loaded(spec, precision), spec, Wish(backend="openvino", must=True))
    assert set(nets.engines) == {"unet", "controlnet"}  # the decoder streams, in PyTorch
    torchs = max(making.compare(predictions(loaded(spec, precision)), exact))
    assert max(making.compare(predictions(nets), exact)) < max(1e-5, 2 * torchs)
    record = making.recorded(nets, ("unet", "decoder"))
    assert record["decoder"] == {"backend": "torch"}
    assert record["unet"]["backend"] == "openvino"
    assert record["unet"]["error"] <= record["unet"]["allowed"] <= making.LIMIT
    assert {"openvino", "processor", "torch"} == set(record["unet"]["environment"])


_SIGNALLED = """
import faulthandler, gc, os, pathlib, signal, sys
import torch
from maisi_cli.engines import openvino
faulthandler.enable()  # as pytest does: the main thread has a stack for signals of its own
got = []
signal.signal(signal.SIGTERM, lambda number, _frame: got.append(number))
folder, device = pathlib.Path(sys.argv[1]), torch.device("cpu")
openvino.build(torch.nn.Conv3d(1, 2, 3), {"input": torch.zeros(1, 1, 4, 4, 4)}, folder, "fp32", device)
runs = [openvino.load(folder, "fp32", device) for _ in range(3)]
for _ in range(3):
    runs.pop(0)([torch.zeros(1, 1, 4, 4, 4)])
    gc.collect()
    os.kill(os.getpid(), signal.SIGTERM)
assert len(got) == 3
"""


def test_a_signal_after_openvino_reaches_its_handler(openvino: None, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _SIGNALLED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_openvino_is_compiled_once_and_sends_nothing(spec: ModelSpec, openvino: None, tmp_path: Path) -> None:
    events: list[Any] = []
    keep = making.Engines(events.append)
    wish = Wish(backend="openvino", must=True, reason="--engine openvino")
    nets = loaded(spec)
    first = fitted(nets, spec, wish, keep=keep, only="controlnet")
    assert fitted(nets, spec, wish, keep=keep, only="controlnet").engines["controlnet"] is first.engines["controlnet"]
    again = fitted(nets, spec, wish, keep=making.Engines(events.append), only="controlnet")
    assert again.engines["controlnet"].built == first.engines["controlnet"].built
    assert [event.detail.split()[0] for event in events if hasattr(event, "detail")] == ["controlnet"]
    assert sum(getattr(event, "text", "").startswith("the controlnet runs by OpenVINO (--engine openvino)") for event in events) == 2
    assert sys.modules["openvino_telemetry"] is None
    script = "from maisi_cli.engines.openvino import library; library(); import pathlib; print(*pathlib.Path.home().iterdir())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env={"HOME": str(tmp_path / "empty")}
    )
    assert "telemetry" not in done.stdout + done.stderr
    assert not (tmp_path / "empty").exists()


def test_an_engine_refuses_what_it_was_not_made_for(spec: ModelSpec, openvino: None) -> None:
    wanted = order(spec)
    engine = making.open_engine(making.make(wanted), wanted)
    inputs = order(spec).examples()
    inputs["x"] = torch.zeros(1, 4, 8, 8, 8)
    with pytest.raises(CannotRun, match="was made for 16 8 8"):
        engine(**exporting.nested(inputs))
    with pytest.raises(CannotRun, match="takes no context"):
        engine(**exporting.nested(order(spec).examples()), context=torch.zeros(1))
    with pytest.raises(CannotRun, match="needs time_embed"):
        engine(x=torch.zeros(1, 4, *SIZE))


@pytest.mark.parametrize("backend", ["aoti", "trt"])
def test_an_engine_that_is_not_there_is_said_or_an_error(backend: str, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "require", lambda *_, **__: None)
    monkeypatch.setattr(tensorrt, "environment", lambda _: {"gpu": "none"})
    nets = loaded(spec)
    with pytest.raises(CannotRun, match=rf"there is no \w+ engine of the unet for a latent of 16x8x8 in fp32.*--backend {backend}"):
        fitted(nets, spec, Wish(backend=backend, must=True))
    events: list[Any] = []
    same = fitted(nets, spec, Wish(backend=backend, reason="--trt prefer"), keep=making.Engines(events.append))
    assert dict(same.engines) == {}
    assert [event.level for event in events] == ["warning"] * 2
    assert "PyTorch runs it (--trt prefer)" in events[0].text
    assert making.recorded(same, ("unet",)) == {"unet": {"backend": "torch"}}


@pytest.mark.skipif(importlib.util.find_spec("torch_tensorrt") is not None, reason="TensorRT is here")
def test_tensorrt_that_is_preferred_and_absent_is_said(spec: ModelSpec) -> None:
    events: list[Any] = []
    same = fitted(loaded(spec), spec, Wish(backend="trt", reason="--trt prefer"), keep=making.Engines(events.append))
    assert dict(same.engines) == {}
    assert "TensorRT is not installed" in events[0].text
    with pytest.raises(CannotRun, match="pip install torch-tensorrt"):
        fitted(loaded(spec), spec, Wish(backend="trt", must=True))


def test_a_decoder_engine_stands_in_for_the_stream(spec: ModelSpec) -> None:
    nets = loaded(spec)
    network, _ = exporting.plain(spec, "decoder", spec.path.parent / "vae.safetensors")
    latent = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(2))
    compiled = dataclasses.replace(nets, engines={"decoder": network})
    for decoder, window in (("exact", None), ("window", (8, 8, 8))):
        ours = decoding.decode(compiled, latent, decoder=decoder, window=window)
        assert torch.allclose(ours, decoding.decode(nets, latent, decoder=decoder, window=window), atol=1e-4)


# --- AOTInductor, for real ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_aot_inductor_on_this_processor(precision: str, spec: ModelSpec) -> None:
    wanted = {part: order(spec, part, backend="aoti", precision=precision) for part in ("unet", "controlnet", "decoder")}
    built = {part: making.make(each) for part, each in wanted.items()}
    nets = fitted(loaded(spec, precision), spec, Wish(backend="aoti", must=True))
    assert set(nets.engines) == set(built)
    exact = predictions(loaded(spec))
    torchs = max(making.compare(predictions(loaded(spec, precision)), exact))  # guidance makes the rounding of either larger
    errors = making.compare(predictions(nets), exact)
    assert max(errors[:4]) < engines.TOLERANCE[precision]  # without guidance
    assert max(errors) < max(engines.TOLERANCE["fp32"], 1.5 * torchs)
    (built["unet"].folder / "model.pt2").write_bytes(b"not it")
    with pytest.raises(CannotRun, match="damaged"):
        fitted(loaded(spec, precision), spec, Wish(backend="aoti", must=True))


@pytest.mark.slow
def test_aot_inductor_for_a_range_of_sizes(spec: ModelSpec) -> None:
    wanted = order(spec, "controlnet", backend="aoti", sizes=((8, 8, 8), SIZE, (32, 16, 16)))
    built = making.make(wanted)
    engine = making.open_engine(built, wanted)
    other = dataclasses.replace(wanted, size=(24, 16, 8), sizes=None)
    reference = making.exact(exporting.plain(spec, "controlnet", wanted.file)[0], other.examples(), CPU)
    assert max(making.compare(exporting.outputs(engine(**exporting.nested(other.examples()))), reference)) < 1e-4
    assert making.find_built(other) == built


# --- TensorRT, up to its compiler -----------------------------------------------------------


class Inputs:
    """What Torch-TensorRT is told of an input."""

    def __init__(self, **told: Any) -> None:
        self.told = told


def test_tensorrt_is_told_shapes_and_types(spec: ModelSpec) -> None:
    class library:
        Input = Inputs

    wanted = order(spec, backend="trt", precision="fp16", residuals=False)
    inputs = {"x": torch.zeros(1, 4, *SIZE, dtype=torch.float16), "time_embed": torch.zeros(1, 32, dtype=torch.float16)}
    told = tensorrt.arguments(library, inputs, None)
    assert [each.told for each in told["arg_inputs"]] == [
        {"shape": (1, 4, *SIZE), "dtype": torch.float16}, {"shape": (1, 32), "dtype": torch.float16}
    ]  # fmt: skip
    assert told["use_explicit_typing"]
    ranged = dataclasses.replace(wanted, sizes=((8, 8, 8), SIZE, (32, 16, 8)))
    x = tensorrt.arguments(library, inputs, ranged.dynamic())["arg_inputs"][0].told
    assert x == {"min_shape": (1, 4, 8, 8, 8), "opt_shape": (1, 4, *SIZE), "max_shape": (1, 4, 32, 16, 8), "dtype": torch.float16}


def test_operators_of_a_graph_are_counted(spec: ModelSpec) -> None:
    row = making.surveyed(order(spec, backend="trt", precision="fp16"))
    convolutions = sum(isinstance(each, torch.nn.Conv3d) for each in networks.build(spec.networks["unet"]).modules())
    assert row["operators"]["aten.conv3d.default"] == convolutions
    assert row["uncovered"] is None or isinstance(row["uncovered"], list)


@pytest.mark.slow
def test_every_part_exports_at_full_width() -> None:
    spec = model("rflow-ct")
    for part in engines.PARTS:
        with torch.device("meta"):
            network = exporting.bare(networks.build(spec.networks[engines.network_of(part)]), part)
        network = network.to_empty(device=CPU)
        head = exporting.Head(exporting.split(network), CPU)
        inputs = head(exporting.examples(spec, part, (16, 16, 8), residuals=part == "unet", dtype=torch.float16), torch.float16)
        program = exporting.exported(exporting.in_dtype(network, torch.float16, CPU), inputs)
        assert exporting.operators(program)["aten.group_norm.default"] > 10
