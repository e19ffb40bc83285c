"""What the largest volumes cost in memory, held on small ones by counting every byte that is alive."""

from __future__ import annotations

import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from maisi_cli import estimates
from maisi_cli.catalog import model
from maisi_cli.devices import default_dtype
from maisi_cli.networks import binarise
from maisi_cli.planning import PROGRAM_GIB
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Bytes(TorchDispatchMode):
    """Counts the bytes of all tensors that were made inside and are still alive; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive.setdefault(storage.data_ptr(), (weakref.ref(tensor), storage.nbytes()))
        self._alive = {pointer: entry for pointer, entry in self._alive.items() if entry[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


def test_every_byte_is_counted() -> None:
    with Bytes() as counted:
        kept = torch.ones(1000, dtype=torch.uint8)
        del kept
        both = torch.ones(300, dtype=torch.uint8), torch.ones(400, dtype=torch.uint8)
    assert counted.peak == 1000
    assert len(both) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_binarising_a_label_costs_little_more_than_its_channels(dtype: torch.dtype) -> None:
    """At most 1.3 times the 8 channels in half precision, the label itself included (3.2 GB at 512x512x768).

    The reference makes eight int64 copies, 64 bytes a voxel (reference.md 10, number 55); these are 16 and a little.
    """
    labels = torch.randint(0, 256, (1, 1, 64, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with Bytes() as counted:
        bits = binarise(labels, dtype=dtype)
    channels = 8 * labels.numel() * 2
    assert bits.untyped_storage().nbytes() == channels
    assert counted.peak + labels.numel() <= 1.3 * channels
    assert torch.equal((bits.to(torch.int64) * (2 ** torch.arange(8)).reshape(1, 8, 1, 1, 1)).sum(1, keepdim=True), labels.to(torch.int64))


_DECODE = """
import sys, threading, time
import torch
from maisi_cli import decoding, inference, networks
from maisi_cli.catalog import model

size, mode = [int(n) for n in sys.argv[1].split("x")], sys.argv[2]
spec, cpu = model("rflow-ct"), torch.device("cpu")
precision = networks.Precision.named("bf16", cpu)
inference.free_at_once()
vae = inference.laid_out(networks.build(spec.networks["vae"]).requires_grad_(False).eval(), precision.dtype, cpu)
nets = networks.Networks(spec=spec, parts={"vae": vae}, scale_factor=1.0, device=cpu, precision=precision, hashes={})
peak, done = 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, int(open("/proc/self/statm").read().split()[1]) * 4096)
        time.sleep(0.005)

watcher = threading.Thread(target=watch)
watcher.start()
decoding.decode(nets, torch.randn(1, 4, *[n // 4 for n in size]), sweeps=mode)
done = True
watcher.join()
print(peak / 2**30)
"""


@pytest.mark.slow
@pytest.mark.skipif(default_dtype("cpu") != "bf16", reason="without instructions for bf16 a processor takes minutes")
@pytest.mark.parametrize("mode", ["store", "recompute"])
@pytest.mark.parametrize("size", [(128, 128, 128), (192, 192, 128), (256, 256, 128)], ids=str)
def test_what_the_planner_predicts_is_what_the_system_counts(size: tuple[int, int, int], mode: str) -> None:
    """The full-width decoder on a processor: resident memory of the whole process within 20 % of what is planned."""
    predicted = estimates.decode(model("rflow-ct"), size, itemsize=2, device="cpu", mode=mode)
    assert predicted is not None
    done = subprocess.run([sys.executable, "-c", _DECODE, "x".join(map(str, size)), mode], capture_output=True, text=True, check=True)
    measured = float(done.stdout)
    sys.stdout.write(f"\n{size} {mode}: predicted {predicted.peak_gib + PROGRAM_GIB:.2f} GiB, measured {measured:.2f}")
    assert predicted.peak_gib + PROGRAM_GIB == pytest.approx(measured, rel=0.2)
