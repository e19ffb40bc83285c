"""OpenVINO on processors: weights packed once for the processor's instructions, layers fused, bf16 where it computes in it.

The frontend is called by itself, and OpenVINO's package for telemetry is kept from loading: nothing is sent. Threads are
torch's.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CannotRun
from . import exporting, processor, version
from .exporting import quiet

Run = Callable[[Sequence[Tensor]], list[Tensor]]
_HINTS = {"fp32": "f32", "bf16": "bf16"}


def environment(_device: torch.device) -> dict[str, str]:
    """Return what compiled code depends on."""
    return {"openvino": version("openvino"), "torch": torch.__version__, "processor": processor()}


def build(
    network: nn.Module, inputs: dict[str, Tensor], folder: Path, _precision: str, _device: torch.device, _dynamic: None = None
) -> dict[str, Any]:
    """Write OpenVINO's representation of a plain network in float32 to `folder`, for the shapes of `inputs`."""
    with quiet():
        ov = library()
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

        program = exporting.exported(network, inputs)
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchFXPythonDecoder.from_exported_program(program, dynamic_shapes=False)  # must outlive the conversion
        model = frontend.convert(frontend.load(decoder))
        ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return {}


def load(folder: Path, precision: str, _device: torch.device) -> Run:
    """Compile what `build` wrote for this processor. Raises `CannotRun` where it does not compute in `precision`."""
    with quiet():
        settings = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
                    "INFERENCE_NUM_THREADS": torch.get_num_threads()}  # fmt: skip
        compiled = _core().compile_model(folder / "model.xml", "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != _HINTS[precision]:
        raise CannotRun(f"OpenVINO computes in {used} on this processor, not in {precision}", hint="use --dtype fp32, or --engine torch")
    request = compiled.create_infer_request()

    count = len(compiled.outputs)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs; several of them, a ControlNet's large residuals, hold until the next call and are not copied."""
        made = request.infer({k: each.numpy() for k, each in enumerate(tensors)}, share_inputs=True, share_outputs=count > 1)
        return [torch.from_numpy(made[k]) for k in range(count)]

    return run


@functools.cache
def _core() -> Any:
    """Return the one `Core` of this process, which is never freed.

    Its plugin gives the thread a stack for signals. Several that are freed in another order than they were made leave a stack
    that is gone, and the next signal, Ctrl-C too, ends the process.
    """
    return library().Core()


def library() -> Any:
    """Import OpenVINO without its telemetry, which it does without where the package for it is not there."""
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino
