"""One training in several processes: who takes which part of a batch, and the same noise whatever their number.

Every process draws the whole batch and all of its noise from the same generators, and keeps its part. N processes with a batch
of b therefore see exactly the data and the noise of one process with a batch of N b, and their averaged gradient is its gradient.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode

from ..errors import CannotRun, UsageError
from ..networks import device_named
from ..team import Team, team
from .settings import TrainSettings

_PATIENCE = timedelta(hours=2)  # one process may write a checkpoint of many GiB while the others wait


@contextlib.contextmanager
def accelerated(settings: TrainSettings) -> Iterator[tuple[Accelerator, Team]]:
    """Give the accelerator of a run and its team of processes, as torchrun, accelerate or `launch` started them."""
    device = device_named(settings.device)
    if settings.precision == "fp16" and device.type == "cpu":
        raise CannotRun("fp16 needs a GPU to train on", hint="use train.precision=bf16, or no")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    for state in (AcceleratorState, GradientState, PartialState):  # what an earlier run of this process chose
        state._reset_state()
    already = distributed.is_initialized()
    # on a processor gradients keep memory of their own: as views of buckets their norm would depend on where a run was resumed
    together = DistributedDataParallelKwargs(
        find_unused_parameters=settings.train_unet, gradient_as_bucket_view=device.type != "cpu"
    )  # fmt: skip
    # compiled for each size: symbolic sizes fail in inductor
    compiler = TorchDynamoPlugin(backend=DynamoBackend.INDUCTOR, dynamic=False) if settings.compile else None
    accelerator = Accelerator(
        mixed_precision="no" if settings.precision == "fp32" else settings.precision, cpu=device.type == "cpu",
        dynamo_plugin=compiler, kwargs_handlers=[together, InitProcessGroupKwargs(timeout=_PATIENCE)],
    )  # fmt: skip
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not accelerator.is_fsdp2:
        raise UsageError("only FSDP 2 on GPUs is trained with", hint="accelerate launch --use_fsdp --fsdp_version 2")
    try:
        with team() as ranks:
            yield accelerator, ranks
    finally:
        if distributed.is_initialized() and not already:
            with contextlib.suppress(Exception):
                distributed.destroy_process_group()


def part_of(batch: Mapping[str, Any], ranks: Team) -> tuple[dict[str, Any], int]:
    """Return this process's part of the whole batch, and how many samples that is.

    What does not divide by the number of processes is not divided: they all compute the same, which is exact, and slow.
    """
    count = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    if count % ranks.size:
        return dict(batch), count
    each = count // ranks.size
    mine = slice(ranks.rank * each, (ranks.rank + 1) * each)

    def part(value: Any) -> Any:
        return value[mine] if isinstance(value, (Tensor, list, tuple)) and len(value) == count else value

    return {key: part(value) for key, value in batch.items()}, each


class SharedNoise(TorchFunctionMode):
    """Inside it torch draws noise for the whole batch and gives this process its part, so that no two draw the same.

    Noise is told by its first axis, the `count` samples of this process; draws of any other shape are the same everywhere.
    Dropout is not divided.
    """

    _SIZED = (torch.rand, torch.randn)
    _LIKE = (torch.rand_like, torch.randn_like, torch.randint_like)

    def __init__(self, ranks: Team, count: int, whole: int) -> None:
        super().__init__()
        self.count, self.times = count, whole // count
        self.mine = slice(ranks.rank * count, (ranks.rank + 1) * count)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call a function of torch; those that draw noise for the batch, with the size of the whole one."""
        kwargs = dict(kwargs or {})
        if self.times > 1 and func in self._SIZED:
            size = kwargs.pop("size", None) or (args[0] if args and not isinstance(args[0], int) else args)
            if len(size) and size[0] == self.count:
                return func((self.times * self.count, *size[1:]), **kwargs)[self.mine]
            return func(tuple(size), **kwargs)
        if self.times > 1 and func is torch.randint:
            *bounds, size = args if "size" not in kwargs else (*args, kwargs.pop("size"))
            draw: Any = func
            if len(size) and size[0] == self.count:
                return draw(*bounds, (self.times * self.count, *size[1:]), **kwargs)[self.mine]
            return draw(*bounds, size, **kwargs)
        if self.times > 1 and func in self._LIKE and args[0].ndim and len(args[0]) == self.count:
            return func(torch.cat([args[0].detach()] * self.times), *args[1:], **kwargs)[self.mine]
        return func(*args, **kwargs)


def whole(value: Tensor) -> Tensor:
    """Return a tensor itself, or all of one that is sharded over the processes (FSDP); all of them must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(target: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor on the device of `target`, sharded and laid out in memory as it is (fused optimisers need that)."""
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device_mesh.device_type), target.device_mesh, target.placements)
    return torch.empty_like(target, dtype=value.dtype).copy_(value)
