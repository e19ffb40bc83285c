"""What a run needs before it starts: device, precision, decoder, and the memory of every stage where it was measured.

Figures come from the measured rows of the GPU presets; where nothing was measured the plan says so.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from .catalog import ModelSpec, NetworkSpec
from .catalog import model as find_model
from .errors import CannotRun
from .geometry import Geometry, Size, format_triple
from .settings import GenerateSettings, Resolved

NOT_MODELLED = "not modelled"
HEADROOM_GIB = 1.0  # what the driver and other programs take
# the column of the measured rows that speaks of a model, and the steps that it was measured with
MEASURED_STEPS = {"rflow-ct": ("rflow_seconds", 30), "ddpm-ct": ("ddpm_seconds", 1000)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device: `kind` is cuda or cpu, `memory_gib` its memory (None: not known)."""

    name: str
    kind: str
    memory_gib: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One choice and why it was made."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage: peak memory and time where they were measured, else None."""

    name: str
    peak_gib: float | None
    seconds: float | None
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a run is carried out. `fits` is None where nothing was measured."""

    model: str
    geometry: Geometry | None
    gpu: Gpu
    stages: tuple[StagePlan, ...]
    fits: bool | None
    margin_gib: float | None
    warnings: tuple[str, ...] = ()

    def choice(self, name: str) -> Any:
        """Return the value of a choice by its name."""
        return next(choice.value for stage in self.stages for choice in stage.choices if choice.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as `gpu-plan --json` shows it."""
        return {
            "schema": "maisi.plan/1", "model": self.model, "fits": self.fits, "margin_gib": self.margin_gib,
            "gpu": {"name": self.gpu.name, "kind": self.gpu.kind, "memory_gib": self.gpu.memory_gib},
            "size": list(self.geometry.size) if self.geometry else None,
            "stages": [
                {"name": stage.name, "peak_gib": stage.peak_gib, "seconds": stage.seconds,
                 "choices": [{"name": c.name, "value": c.value, "reason": c.reason} for c in stage.choices]}
                for stage in self.stages
            ],
            "warnings": list(self.warnings),
        }  # fmt: skip


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
    import os

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


def plan(resolved: Resolved, *, geometry: Geometry | None = None, gpu: Gpu | None = None) -> Plan:
    """Return the plan of one `generate` run; checks the volume against the model first.

    `geometry` is that of the user's mask, if there is one; memory and time are then those of the grid on which the model is
    shown it. Raises `UsageError` for what the model cannot make.
    """
    settings = resolved.settings
    spec = find_model(settings.model)
    target = geometry or (settings.geometry() if settings.mask is None else None)
    shown = spec.shown_on(geometry) if geometry and settings.mode != "mask" else target
    warnings: list[str] = []
    if geometry and settings.mode == "mask":  # the networks are not shown it
        spec.check_mode(settings.mode)
        spec.check_modality(settings.modality)
    elif shown is not None:
        warnings += spec.check(shown, modality=settings.modality, mode=settings.mode, head="head" in settings.regions,
                               allow_ood=settings.allow_ood, own_mask=geometry is not None)  # fmt: skip
    if geometry and shown and shown.spacing != geometry.spacing:
        warnings.append(f"{settings.mask} ({geometry}) is shown to {spec.name} on {shown}; its image is put back on the mask's own grid")
    made = predict(spec, shown, gpu or gpu_of(settings), settings=settings, warnings=tuple(warnings))
    return replace(made, geometry=target)


def device_of(name: str) -> Gpu:
    """Return the device that torch calls `name`, with its memory: the processor, or the GPU that is found here."""
    return detect() if name.startswith("cuda") else _processor()


def _processor() -> Gpu:
    return Gpu(name="processor", kind="cpu", memory_gib=host_memory_gib())


def gpu_of(settings: GenerateSettings) -> Gpu:
    """Return the device that the settings name: a GPU preset's, the processor, or what is found here."""
    from . import presets

    if settings.device == "cpu" or settings.gpu == "cpu":
        return _processor()
    if settings.gpu == "auto":
        return detect()
    execution = presets.preset(settings.gpu, "gpu").values["execution"]
    return Gpu(name=f"GPU preset {settings.gpu}", kind="cuda", memory_gib=float(execution["memory_gib"]))


def predict(
    spec: ModelSpec, geometry: Geometry | None, gpu: Gpu, *, settings: GenerateSettings, warnings: tuple[str, ...] = ()
) -> Plan:  # fmt: skip
    """Choose device, precision and decoder, and look the peak up in the measured rows."""
    device = settings.device if settings.device != "auto" else gpu.kind
    dtype = settings.dtype if settings.dtype != "auto" else default_dtype(device.split(":")[0])
    sources = {"device": "asked for" if settings.device != "auto" else f"for {gpu.name}",
               "dtype": "asked for" if settings.dtype != "auto" else f"default on {device.split(':')[0]}"}  # fmt: skip
    execution = (Choice(name="device", value=device, reason=sources["device"]), Choice(name="dtype", value=dtype, reason=sources["dtype"]))
    row, fits, margin, reason = None, None, None, NOT_MODELLED
    if geometry is not None and gpu.kind == "cuda" and spec.name in MEASURED_STEPS:
        row, fits, margin, reason = _measured(spec, geometry, gpu, settings)
    window = settings.window
    decoder = settings.decoder
    overlap = settings.overlap
    if decoder == "auto":
        if row is not None and row["windows"] > 1:
            decoder, why = "window", f"measured: {row['windows']} windows, peak {row['peak_gib']} GiB"
            window, overlap = tuple(row["window"]), float(row["overlap"])
        elif window is not None and settings.gpu not in ("auto", "cpu") and row is None and geometry is not None:
            decoder, why = "window", f"GPU preset {settings.gpu}; this size was not measured"
        else:
            decoder, why = "exact", "whole volume at once, without seams"
    else:
        why = "asked for"
    decode = [Choice(name="decoder", value=decoder, reason=why)]
    if decoder == "exact" and geometry is not None:
        decode.append(sweeps(spec.networks["vae"], geometry.size, dtype, gpu))
    decode += [Choice(name="window", value=list(window) if window and decoder == "window" else None, reason="latent voxels"),
               Choice(name="overlap", value=overlap if decoder == "window" else None, reason="share of the window")]  # fmt: skip
    seconds: tuple[float | None, float | None] = (None, None)
    if row is not None:
        column, steps = MEASURED_STEPS[spec.name]
        as_measured = settings.steps == steps and settings.cfg_modality == 0 and settings.scheduler == spec.scheduler["name"]
        seconds = (float(row[column]) if as_measured else None, float(row["vae_seconds"]))
    peak = float(row["peak_gib"]) if row is not None else None
    stages = [
        StagePlan(name="denoise", peak_gib=None, seconds=seconds[0], choices=execution),
        StagePlan(name="decode", peak_gib=peak, seconds=seconds[1], choices=tuple(decode)),
    ]
    notes = [*warnings]
    if row is not None:
        notes.append(f"memory and seconds were measured on {row['device']} ({row['source']})")
    if fits is None:
        where = format_triple(geometry.size) if geometry else "the size of the mask"
        notes.append(f"memory and time of {spec.name} at {where} on {gpu.name}: {reason}")
    return Plan(model=spec.name, geometry=geometry, gpu=gpu, stages=tuple(stages), fits=fits, margin_gib=margin, warnings=tuple(notes))


def sweeps(network: NetworkSpec, size: Size, dtype: str, gpu: Gpu) -> Choice:
    """Return what the exact decoder holds at full resolution (`streaming.MODES`): as much as half of the memory allows.

    `store` holds the channels of the finest upsampling, or twice those of the finest level, and runs every layer once; `half`
    those of the level; `recompute` what lies below, at half of the resolution.
    """
    channels = [int(n) for n in network.arguments["num_channels"]]
    finest, above = channels[0], channels[min(1, len(channels) - 1)]
    bytes_each = 4 if dtype == "fp32" else 2
    # while a sweep consumes one tensor and makes the next, a slab of each is there besides
    held = {"store": max(above, 2 * finest), "half": finest + above // 8, "recompute": above * 2 / 8}
    gib = {mode: count * math.prod(size) * bytes_each / 2**30 for mode, count in held.items()}
    if gpu.memory_gib is None:
        return Choice(name="sweeps", value="store", reason=f"holds {gib['store']:.1f} GiB at full resolution; memory not known")
    room = gpu.memory_gib / 2
    mode = next((mode for mode, need in gib.items() if need <= room), "recompute")
    return Choice(name="sweeps", value=mode, reason=f"holds {gib[mode]:.1f} GiB at full resolution, of {gpu.memory_gib:g}")


def _measured(
    spec: ModelSpec, geometry: Geometry, gpu: Gpu, settings: GenerateSettings
) -> tuple[Mapping[str, Any] | None, bool | None, float | None, str]:
    """Return the fastest measured row of this size that fits, whether it fits, and what is left.

    A row of the GPU preset that is asked for was published for that class: it fits where nothing else does, and then what
    is left is that of the whole memory.
    """
    from . import presets

    named = [(each.name, row) for each in presets.presets("gpu") for row in each.values.get("measured", ())
             if tuple(row["size"]) == geometry.size and _as_asked(row, settings)]  # fmt: skip
    rows = [row for _, row in named]
    if not rows:
        return None, None, None, NOT_MODELLED
    memory = (gpu.memory_gib or 0) - HEADROOM_GIB
    fitting = [row for row in rows if row["peak_gib"] <= memory]
    if not fitting:
        fitting = [row for name, row in named if name == settings.gpu and row["peak_gib"] <= (gpu.memory_gib or 0)]
        memory += HEADROOM_GIB if fitting else 0
    if not fitting:
        least = min(rows, key=lambda row: row["peak_gib"])
        return least, False, round(memory - least["peak_gib"], 2), "does not fit"
    denoise, _ = MEASURED_STEPS[spec.name]
    best = min(fitting, key=lambda row: (row[denoise] + row["vae_seconds"], row["peak_gib"]))
    return best, True, round(memory - best["peak_gib"], 2), "measured"


def _as_asked(row: Mapping[str, Any], settings: GenerateSettings) -> bool:
    """Say whether a measured row was made the way that is asked for; all rows are in fp16."""
    if settings.dtype not in ("auto", "fp16"):
        return False
    if settings.decoder == "exact":
        return bool(row["windows"] == 1)
    if settings.decoder == "window":
        return bool(row["windows"] > 1) and tuple(row["window"]) == settings.window and row["overlap"] == settings.overlap
    return True


def require_fit(made: Plan) -> None:
    """Raise `CannotRun` with ways out when a plan is known not to fit."""
    if made.fits is False:
        peak = next(stage.peak_gib for stage in made.stages if stage.peak_gib is not None)
        size = format_triple(made.geometry.size) if made.geometry else "?"
        raise CannotRun(
            f"{made.model} at {size} needs {peak:g} GiB; {made.gpu.name} has {made.gpu.memory_gib:g}",
            hint="use a smaller --size, or --model nano-ct",
        )
