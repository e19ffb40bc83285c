"""Engines made, checked against PyTorch, and put where a network stood.

An engine that is off is an error, never a reason to go on quietly with something else: `Rejected` names the part, the error and
what is allowed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import inference, networks, streaming
from ..catalog import ModelSpec
from ..errors import CannotRun, Rejected
from ..events import Note, OnEvent, Stage, ignore
from ..geometry import format_triple
from ..kernels import LAYOUT
from ..record import sha256_of
from ..weights import load_state, save_state
from . import TITLES, TOLERANCE, Built, Dims, Key, Wish, exporting, find, network_of, note, require, store, tensorrt, verify
from .exporting import DOWN, MIDDLE

_MODULES = {"openvino": "openvino", "aoti": "aoti", "trt": "tensorrt"}
LENIENCE, LIMIT = 2.0, 0.1
ROUNDS = 3
"""Calls that are timed of each side, in turn; the fastest counts."""

Sizes = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(slots=True, kw_only=True)
class Engine:
    """A loaded engine: it is called as the network is, by keyword, and returns what the network returns."""

    built: Built
    run: Callable[[Sequence[Tensor]], list[Tensor]]
    head: exporting.Head
    dtype: torch.dtype
    device: torch.device

    def __call__(self, x: Tensor | None = None, **inputs: Any) -> Any:
        """Return the network's result for these inputs; residuals that are not given are zero.

        Raises `CannotRun` for inputs that the engine was not made for.
        """
        given = self.head(exporting.flat({**({"x": x} if x is not None else {}), **inputs}), self.dtype)
        tensors = {name: self._fitting(name, dims, given.pop(name, None)) for name, dims in self.built.key.inputs}
        if given or not self.built.key.covers({name: tensor.shape for name, tensor in tensors.items()}):
            strange = next(iter(given), None)
            what = f"takes no {strange}" if strange else f"was made for {_shapes(self.built.key.inputs)}"
            raise CannotRun(f"the engine of the {self.built.key.part} {what}", hint="build one for this volume, or use --engine torch")
        made = self.run([*tensors.values()])
        return (made[:-1], made[-1]) if self.built.key.part == "controlnet" else made[0]

    def _fitting(self, name: str, dims: Dims, given: Tensor | None) -> Tensor:
        if given is not None:
            return given.to(dtype=self.dtype, device=self.device).contiguous()
        if not name.startswith((DOWN, MIDDLE)) or any(isinstance(n, tuple) for n in dims):
            raise CannotRun(f"the engine of the {self.built.key.part} needs {name}", hint="use --engine torch")
        return torch.zeros([int(n) for n in dims], dtype=self.dtype, device=self.device)  # type: ignore[arg-type]


def _shapes(inputs: Sequence[tuple[str, Dims]]) -> str:
    _, dims = next((each for each in inputs if len(each[1]) == 5), inputs[0])
    return " ".join(f"{n[0]}..{n[2]}" if isinstance(n, tuple) else str(n) for n in dims[2:])


# --- one engine -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an engine is wanted for: a part of a model, its weight file, a latent size, a precision and a device.

    `sizes` (smallest, best, largest) makes one for a range of latents, of which `size` is the best. `residuals`: a UNet that is
    told what its ControlNet says.
    """

    spec: ModelSpec
    part: str
    file: Path
    size: tuple[int, ...]
    backend: str
    precision: str
    device: torch.device
    residuals: bool = False
    sizes: Sizes | None = None
    sha256: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the engine's inputs are in: float32 for OpenVINO in any precision, else the dtype of the network."""
        return torch.float32 if self.backend == "openvino" else networks.DTYPES[self.precision]

    def examples(self, size: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return inputs as the network takes them."""
        return exporting.examples(self.spec, self.part, size or self.size, residuals=self.residuals, dtype=self.dtype, device=self.device)

    def shapes(self, size: Sequence[int] | None = None) -> dict[str, tuple[int, ...]]:
        """Return the shape of each input as the engine takes it: behind the head."""
        arguments = self.spec.networks[network_of(self.part)].arguments
        width = 0 if self.part == "decoder" else 4 * int(arguments["num_channels"][0])
        found = {}
        for name, shape in exporting.shapes(self.spec, self.part, size or self.size, residuals=self.residuals).items():
            layer = exporting.EMBEDDERS.get(name)
            found[layer or name] = (1, width) if layer else shape
        return found

    def inputs(self) -> tuple[tuple[str, Dims], ...]:
        """Return the extents of the engine's inputs, with a range where `sizes` differ."""
        shapes = self.shapes()
        if self.sizes is None:
            return tuple(shapes.items())
        least, most = self.shapes(self.sizes[0]), self.shapes(self.sizes[2])
        return tuple(
            (name, tuple((low, n, high) if low != high else n for low, n, high in zip(least[name], shape, most[name], strict=True)))
            for name, shape in shapes.items()
        )

    def key(self) -> Key:
        """Return the key of the engine."""
        environment = backend_of(self.backend).environment(self.device)
        return Key(backend=self.backend, part=self.part, weights=self.sha256 or sha256_of(self.file), precision=self.precision,
                   inputs=self.inputs(), environment=tuple(sorted(environment.items())))  # fmt: skip

    def dynamic(self) -> dict[str, dict[int, Any]] | None:
        """Return the axes that have a range, for `exporting.exported`; None for an engine of one shape."""
        if self.sizes is None:
            return None
        from torch.export import Dim

        return {
            name: {axis: Dim.AUTO(min=n[0], max=n[2]) for axis, n in enumerate(dims) if isinstance(n, tuple)}  # type: ignore[operator]
            for name, dims in self.inputs()
        }


def backend_of(name: str) -> Any:
    """Return the module of a backend: `environment`, `build` and `load`."""
    return import_module(f".{_MODULES[name]}", __package__)


def find_built(order: Order) -> Built | None:
    """Return the engine that an order can be met with; None where there is none.

    A UNet alone is met by one that is told of residuals, too: they are zero then.
    """
    key = order.key()
    found = find(order.backend, order.part, weights=key.weights, precision=order.precision, environment=dict(key.environment),
                 shapes=order.shapes())  # fmt: skip
    if found is None and order.part == "unet" and not order.residuals:
        found = find_built(dataclasses.replace(order, residuals=True))
    return found


def make(order: Order, *, on_event: OnEvent = ignore) -> Built:
    """Build the engine of an order, compare it with PyTorch, and keep it. Raises `Rejected` for one that is off."""
    require(order.backend, device=str(order.device), precision=order.precision)
    backend = backend_of(order.backend)
    title = f"{order.part} by {TITLES[order.backend]}, latent {format_triple(order.size)}, {order.precision}"
    on_event(Stage(name="compile", detail=title))
    key = order.key()

    def build(folder: Path) -> tuple[Sequence[float], Mapping[str, Any], Mapping[str, float]]:
        network, sha256 = exporting.plain(order.spec, order.part, order.file)
        if sha256 != key.weights:
            raise CannotRun(f"{order.file} is not the file that was loaded", hint="begin again")
        inputs = order.examples()
        reference = exact(network, inputs, order.device)
        started = time.perf_counter()
        head = exporting.split(network)
        save_state(folder / "head.safetensors", head, metadata={}, half=False)
        outcome = backend.build(network, exporting.Head(head, order.device)(inputs, order.dtype), folder, order.precision, order.device,
                                order.dynamic())  # fmt: skip
        seconds = time.perf_counter() - started
        del network
        errors = compare(_called(_loaded(key, folder, order), inputs), reference)
        return errors, {**outcome, **judge(order, errors, inputs, reference)}, {"build": round(seconds, 3)}

    return store(key, build)


def open_engine(built: Built, order: Order) -> Engine:
    """Load an engine after its files were verified."""
    verify(built)
    return dataclasses.replace(_loaded(built.key, built.folder, order), built=built)


def _loaded(key: Key, folder: Path, order: Order) -> Engine:
    head = load_state(folder / "head.safetensors").tensors if (folder / "head.safetensors").is_file() else {}
    run = backend_of(order.backend).load(folder, order.precision, order.device)
    unchecked = Built(key=key, folder=folder, files={}, errors=(), outcome={}, seconds={})
    return Engine(built=unchecked, run=run, head=exporting.Head(head, order.device), dtype=order.dtype, device=order.device)


def _called(engine: Engine, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return exporting.outputs(engine(**exporting.nested(inputs)))


# --- the check ------------------------------------------------------------------------------


def exact(network: nn.Module, inputs: Mapping[str, Tensor], device: torch.device) -> list[Tensor]:
    """Return what a plain network makes of inputs in float32, without TF32."""
    network.to(device)
    whole = {name: each.float() if each.is_floating_point() else each for name, each in inputs.items()}
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        return [each.cpu() for each in exporting.outputs(network(**exporting.nested(whole)))]


def compare(made: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """Return the relative error of each output: the root mean square of the difference over that of the reference.

    Where the reference is zero throughout, the difference itself counts; what is not finite is infinitely wrong.
    """
    if [tuple(each.shape) for each in made] != [tuple(each.shape) for each in reference]:
        return [float("inf")]
    errors = []
    for ours, theirs in zip(made, reference, strict=True):
        difference = float((ours.detach().cpu().double() - theirs.double()).square().mean().sqrt())
        size = float(theirs.double().square().mean().sqrt())
        error = difference / size if size else difference
        errors.append(error if error == error else float("inf"))
    return errors


def judge(order: Order, errors: Sequence[float], inputs: Mapping[str, Tensor], reference: Sequence[Tensor]) -> dict[str, float]:
    """Refuse an engine that is further from PyTorch in float32 than its precision explains; return what was allowed.

    That is `TOLERANCE`; where an engine exceeds it, as much as `LENIENCE` times what PyTorch is off in the same precision, up to
    `LIMIT`: networks differ in how much they amplify rounding. Raises `Rejected`.
    """
    allowed, error = TOLERANCE[order.precision], max(errors)
    found: dict[str, float] = {}
    if not error <= allowed and error <= LIMIT:
        own = max(compare(_torch_call(order, inputs)(), reference))
        allowed, found = max(allowed, min(LIMIT, LENIENCE * own)), {"torch_error": own}
    if not error <= allowed:
        raise Rejected(
            f"the {order.part} by {TITLES[order.backend]} is off: relative error {error:.2g} against PyTorch, allowed in {order.precision} "
            f"is {allowed:.2g}; it was not kept",
            hint="use --engine torch, or --dtype fp32",
        )
    return {"allowed": allowed, **found}


def _torch_call(order: Order, inputs: Mapping[str, Tensor]) -> Callable[[], list[Tensor]]:
    """Return a call of the part in PyTorch as `generate` runs it."""
    dtype = networks.DTYPES[order.precision]
    network = inference.laid_out(exporting.plain(order.spec, order.part, order.file)[0], dtype, order.device)
    laid = {}
    for name, each in inputs.items():
        each = each if name in exporting.EMBEDDERS else each.to(dtype)
        laid[name] = each.contiguous(memory_format=LAYOUT) if each.ndim == 5 else each
    known = networks.embedded(network, {name: laid.get(name) for name in networks.EMBEDDERS})

    @torch.inference_mode()
    def call() -> list[Tensor]:
        if order.part == "decoder":
            return [torch.cat([*streaming.decoded(network, laid["z"])], dim=2)]
        with networks.known_parts(network, known):
            return exporting.outputs(network(**exporting.nested(laid)))

    return call


def timed(order: Order, engine: Engine) -> dict[str, float]:
    """Return the seconds of one call of the engine and of PyTorch as `generate` runs it, the fastest of a few in turn."""
    inputs = order.examples()
    torch_call = _torch_call(order, inputs)

    def engine_call() -> None:
        engine(**exporting.nested(inputs))

    calls: dict[str, Callable[[], Any]] = {"engine": engine_call, "torch": torch_call}
    best = {"engine": float("inf"), "torch": float("inf")}
    for _ in range(ROUNDS):
        for side, call in calls.items():
            _wait(order.device)
            started = time.perf_counter()
            call()
            _wait(order.device)
            best[side] = min(best[side], time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check(order: Order, built: Built) -> Built:
    """Compare an engine with PyTorch once more, outputs and time, and note what was found.

    Raises `Rejected` for one that is off or slower than PyTorch.
    """
    engine = open_engine(built, order)
    inputs = order.examples()
    reference = exact(exporting.plain(order.spec, order.part, order.file)[0], inputs, order.device)
    errors = compare(_called(engine, inputs), reference)
    outcome = judge(order, errors, inputs, reference)
    seconds = timed(order, engine)
    found = dataclasses.replace(built, errors=tuple(errors), outcome={**built.outcome, **outcome}, seconds={**built.seconds, **seconds})
    if seconds["engine"] > seconds["torch"]:
        raise Rejected(
            f"the {order.part} by {TITLES[order.backend]} takes {seconds['engine']:.3g} s a call, PyTorch {seconds['torch']:.3g} s; "
            "it was not kept",
            hint="use --engine torch for it",
        )
    note(found)
    return found


def surveyed(order: Order) -> dict[str, Any]:
    """Return what stands in the graph of a part: inputs, operators and how often, and those that TensorRT has no layer for."""
    network, _ = exporting.plain(order.spec, order.part, order.file)
    inputs = exporting.Head(exporting.split(network), order.device)(order.examples(), order.dtype)
    network = exporting.in_dtype(network, order.dtype, order.device)
    found = exporting.operators(exporting.exported(network, inputs, dynamic=order.dynamic()))
    return {"part": order.part, "latent": list(order.size), "precision": order.precision, "inputs": len(inputs), "operators": found,
            "uncovered": tensorrt.uncovered(found)}  # fmt: skip


# --- in the place of networks ---------------------------------------------------------------


class Engines:
    """The engines of a run: each is found or made when its first sample needs it, and kept for the others of its shape."""

    def __init__(self, on_event: OnEvent = ignore) -> None:
        self.on_event = on_event
        self._held: dict[str, tuple[Key, Engine]] = {}
        self._told: set[str] = set()

    def fitted(
        self, nets: networks.Networks, parts: Mapping[str, Sequence[int]], files: Mapping[str, Path], wish: Wish,
        *, residuals: bool = False,
    ) -> networks.Networks:  # fmt: skip
        """Return the networks with engines in the place of `parts`, each for a latent of the size given; or as they are.

        OpenVINO's engines are made here on their first use; those of
        the others are made by `export-trt`, and a decoder's is used only where there is one. Raises `CannotRun` where an engine
        is required and there is none, `Rejected` for one that is off.
        """
        if wish.backend == "torch":
            return nets
        try:
            require(wish.backend, device=str(nets.device), precision=nets.precision.name)
        except CannotRun as error:
            if wish.must:
                raise
            self._tell(f"{error.message}: PyTorch runs the networks ({wish.reason})", level="warning")
            return nets
        found: dict[str, Engine] = {}
        for part, size in parts.items():
            if part == "decoder" and wish.backend == "openvino":
                continue
            name = network_of(part)
            order = Order(spec=nets.spec, part=part, file=files[name], size=tuple(size), backend=wish.backend, device=nets.device,
                          precision=nets.precision.name, residuals=residuals and part == "unet", sha256=nets.hashes.get(name))  # fmt: skip
            engine = self._engine(order, wish)
            if engine is not None:
                found[part] = engine
        return dataclasses.replace(nets, engines=found)

    def _engine(self, order: Order, wish: Wish) -> Engine | None:
        key = order.key()
        held = self._held.get(order.part)
        if held is not None and held[0] == key:
            return held[1]
        self._held.pop(order.part, None)
        built = find_built(order)
        if built is None and order.part == "decoder":
            return None
        if built is None and order.backend != "openvino":
            title = TITLES[order.backend]
            text = f"there is no {title} engine of the {order.part} for a latent of {format_triple(order.size)} in {order.precision}"
            if wish.must:
                command = f"maisi export-trt --backend {order.backend} --model {order.spec.name} --parts {order.part}"
                raise CannotRun(f"{text}, of these weights and for this machine", hint=f"{command}, with this volume")
            self._tell(f"{text}: PyTorch runs it ({wish.reason})", level="warning")
            return None
        if built is None:
            built = make(order, on_event=self.on_event)
        self._tell(f"the {order.part} runs by {TITLES[order.backend]} ({wish.reason}); relative error {built.error:.2g} against PyTorch")
        engine = open_engine(built, order)
        self._held[order.part] = (key, engine)
        return engine

    def _tell(self, text: str, *, level: Any = "info") -> None:
        if text not in self._told:
            self._told.add(text)
            self.on_event(Note(text=text, level=level))


def recorded(nets: networks.Networks, parts: Sequence[str]) -> dict[str, Any]:
    """Return what ran each part, for the record."""
    engines: Mapping[str, Any] = nets.engines
    return {part: engines[part].built.record() if part in engines else {"backend": "torch"} for part in parts}
