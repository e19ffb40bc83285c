"""The device of a run, without loading a framework: which there is, its memory, and the precision that suits it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import presets
from .settings import GenerateSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device: `kind` is cuda or cpu, `memory_gib` its memory (None: not known)."""

    name: str
    kind: str
    memory_gib: float | None


def detect() -> Gpu:
    """Return the first CUDA GPU that the driver reports, or the processor; loads no framework."""
    tool = shutil.which("nvidia-smi")
    if tool:
        try:
            done = subprocess.run([tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
                                  capture_output=True, text=True, timeout=5, check=True)  # fmt: skip
            name, memory = done.stdout.splitlines()[0].rsplit(",", 1)
            return Gpu(name=name.strip(), kind="cuda", memory_gib=round(float(memory) / 1024, 2))
        except (OSError, subprocess.SubprocessError, IndexError, ValueError):
            pass
    return _processor()


def host_memory_gib() -> float | None:
    """Return the physical memory of this machine, where the system tells."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 2)
    except (AttributeError, ValueError, OSError):
        return None


def default_dtype(device: str) -> str:
    """Return the precision that suits a kind of device: fp16 on `cuda`, bf16 on a `cpu` with instructions for it, else fp32.

    Those are AVX512-BF16 and AMX-BF16; where the system does not list the processor's flags, fp32.
    """
    if device == "cuda":
        return "fp16"
    return "bf16" if device == "cpu" and _cpu_flags() & {"avx512_bf16", "amx_bf16"} else "fp32"


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def device_of(name: str) -> Gpu:
    """Return the device that torch calls `name`, with its memory: the processor, or the GPU that is found here."""
    return detect() if name.startswith("cuda") else _processor()


def _processor() -> Gpu:
    return Gpu(name="processor", kind="cpu", memory_gib=host_memory_gib())


def gpu_of(settings: GenerateSettings) -> Gpu:
    """Return the device that the settings name: a GPU preset's, the processor, or what is found here."""
    if settings.device == "cpu" or settings.gpu == "cpu":
        return _processor()
    if settings.gpu == "auto":
        return detect()
    execution = presets.preset(settings.gpu, "gpu").values["execution"]
    return Gpu(name=f"GPU preset {settings.gpu}", kind="cuda", memory_gib=float(execution["memory_gib"]))
