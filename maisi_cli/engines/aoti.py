"""AOTInductor: torch's own compiler ahead of time, to a package with a shared library; processors and CUDA.

A package runs code, so one is only ever loaded from the folder of engines, after its sha256 was compared with what was built.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import networks
from ..errors import CannotRun
from . import exporting, processor
from .exporting import quiet
from .openvino import Run


def environment(device: torch.device) -> dict[str, str]:
    """Return what compiled code depends on."""
    if device.type == "cuda":
        return {"torch": torch.__version__, "cuda": str(torch.version.cuda), "gpu": gpu(device)}
    return {"torch": torch.__version__, "processor": processor()}


def gpu(device: torch.device) -> str:
    """Return the name and the compute capability of a CUDA device: `NVIDIA A100 sm80`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm{major}{minor}"


def build(
    network: nn.Module, inputs: dict[str, Tensor], folder: Path, precision: str, device: torch.device, dynamic: Any = None
) -> dict[str, Any]:  # fmt: skip
    """Compile a plain network, which is turned to `precision` for it, to a package in `folder`. Raises `CannotRun`."""
    network = exporting.in_dtype(network, networks.DTYPES[precision], device)
    with quiet():
        program = exporting.exported(network, inputs, dynamic=dynamic)
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise CannotRun(f"AOTInductor cannot compile this network: {type(error).__name__}: {first}",
                            hint="it needs a C++ compiler, on CUDA Triton too; use --engine torch") from error  # fmt: skip
    return {}


def load(folder: Path, _precision: str, _device: torch.device) -> Run:
    """Load what `build` wrote; the caller has verified it."""
    with quiet():
        package = torch._inductor.aoti_load_package(str(folder / "model.pt2"))

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        made = package(*tensors)
        return exporting.outputs(made)

    return run
