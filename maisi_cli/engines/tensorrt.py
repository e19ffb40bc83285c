"""TensorRT on NVIDIA's GPUs, through Torch-TensorRT: one engine for each shape, or for a range of shapes on request.

Norms and the embeddings of constants stay in float32, as in PyTorch: the program that is compiled says so itself, so types are
strong. What TensorRT has no layer for runs in PyTorch within the engine; how many operators these are is in the manifest.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import networks
from ..errors import CannotRun
from . import exporting, version
from .aoti import gpu
from .exporting import quiet
from .openvino import Run


def environment(device: torch.device) -> dict[str, str]:
    """Return what compiled code depends on."""
    return {"torch_tensorrt": version("torch_tensorrt"), "tensorrt": version("tensorrt"), "torch": torch.__version__,
            "cuda": str(torch.version.cuda), "gpu": gpu(device)}  # fmt: skip


def build(
    network: nn.Module, inputs: dict[str, Tensor], folder: Path, precision: str, device: torch.device, dynamic: Any = None
) -> dict[str, Any]:  # fmt: skip
    """Compile a plain network, which is turned to `precision` for it, in `folder`; `dynamic` as for `exporting.exported`."""
    torch_tensorrt = library()
    network = exporting.in_dtype(network, networks.DTYPES[precision], device)
    with quiet():
        program = exporting.exported(network, inputs, dynamic=dynamic)
        try:
            timing = Path(tempfile.mkdtemp())  # by default it lies in a place that everyone can write to
            compiled = torch_tensorrt.dynamo.compile(
                program, **arguments(torch_tensorrt, inputs, dynamic), timing_cache_path=str(timing / "timing")
            )
            shutil.rmtree(timing, ignore_errors=True)
            torch_tensorrt.save(compiled, str(folder / "model.ep"), arg_inputs=tuple(inputs.values()), retrace=False)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise CannotRun(f"TensorRT cannot compile this network: {type(error).__name__}: {first}",
                            hint="see  maisi export-trt --dry-run  for its operators; use --engine torch") from error  # fmt: skip
    return {"left_to_torch": left_to_torch(compiled)}


def arguments(torch_tensorrt: Any, inputs: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, Any]] | None) -> dict[str, Any]:
    """Return the arguments of the compiler: an input for each tensor, with its range where `dynamic` has one."""
    made = []
    for name, value in inputs.items():
        ranges = (dynamic or {}).get(name, {})
        if not ranges:
            made.append(torch_tensorrt.Input(shape=tuple(value.shape), dtype=value.dtype))
            continue
        least, most = list(value.shape), list(value.shape)
        for axis, dim in ranges.items():
            least[axis], most[axis] = dim.min, dim.max
        made.append(torch_tensorrt.Input(min_shape=tuple(least), opt_shape=tuple(value.shape), max_shape=tuple(most), dtype=value.dtype))
    fixed = {"use_explicit_typing": True, "optimization_level": 5, "truncate_double": True, "min_block_size": 1}
    return {"arg_inputs": made, **fixed}


def left_to_torch(compiled: Any) -> int:
    """Return how many operators of a compiled module are not TensorRT's: calls outside of its engines, and in blocks of torch."""
    count = 0
    for name, module in compiled.named_children():
        if "_run_on_gpu" in name and hasattr(module, "graph"):
            count += sum(node.op == "call_function" for node in module.graph.nodes)
    return count


def load(folder: Path, _precision: str, _device: torch.device) -> Run:
    """Load what `build` wrote; the caller has verified it."""
    torch_tensorrt = library()
    with quiet():
        module = torch_tensorrt.load(str(folder / "model.ep")).module()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        return exporting.outputs(module(*tensors))

    return run


def library() -> Any:
    """Import Torch-TensorRT. Raises `CannotRun` that says what is missing."""
    try:
        with quiet():
            import torch_tensorrt
    except (ImportError, OSError) as error:
        raise CannotRun(f"TensorRT cannot be loaded: {error}", hint="pip install torch-tensorrt, for this torch and CUDA") from error
    return torch_tensorrt


def uncovered(operators: Mapping[str, int]) -> list[str] | None:
    """Return the operators that Torch-TensorRT has no converter for; None where it is not installed, and so not known."""
    try:
        with quiet():
            from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS
    except (ImportError, OSError):
        return None
    known = {str(target) for target in DYNAMO_CONVERTERS.unique_targets()}
    return [name for name in operators if name not in known]
