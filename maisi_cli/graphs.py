"""Steps of a sampler as CUDA graphs: the hundreds of kernels of a step are launched as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import CannotRun

Step = Callable[[Tensor, Tensor], Tensor]


class Captured:
    """A step that is run as it is the first time, captured the second time, and replayed from then on.

    It takes tensors (x, t) of the same shapes each time, and must not depend on anything else that changes. `pool` is the
    memory that graphs share which never run at the same time. Raises `CannotRun` where a step cannot be captured.
    """

    def __init__(self, step: Step, pool: Any) -> None:
        self.step, self.pool = step, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return what the step returns for `x` at `t`, in memory of its own."""
        if not self.warm:
            self.warm = True
            return self.step(x, t)
        if self.graph is None:
            self._capture(x, t)
            assert self.graph is not None
        self.x.copy_(x)
        self.t.copy_(t)
        self.graph.replay()
        return self.made.clone()

    def _capture(self, x: Tensor, t: Tensor) -> None:
        self.x, self.t = x.clone(), t.to(x.device, copy=True)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # what the first run left in the cache would stand beside the graph's own memory
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.made = self.step(self.x, self.t)
        except RuntimeError as error:
            raise CannotRun(
                f"this step cannot be captured as a CUDA graph: {str(error).splitlines()[0]}", hint="add --set cuda_graphs=false"
            ) from error
        self.graph = graph
