"""What a run needs before it starts: device, precision, decoder, and the memory of every stage.

Memory comes from traces of the real modules (`estimates`), seconds from what was measured on the device, or nowhere. What the
reference needs is predicted too: its published figures, rows of the GPU presets, are the test of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import estimates
from .catalog import ModelSpec, NetworkSpec
from .catalog import model as find_model
from .devices import Gpu, default_dtype, gpu_of
from .errors import CannotRun
from .geometry import Geometry, Size, format_triple
from .settings import GenerateSettings, Resolved

NOT_MODELLED = "not modelled"
NOT_MEASURED = "not measured"
HEADROOM_GIB = 1.0  # what the driver and other programs take
PROGRAM_GIB = 0.5  # what torch, MONAI and what they leave behind take of a host, measured
HOST_BYTES = 11  # a voxel of the image in int16, of the label map, and what the checks take beside them, measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One choice and why it was made."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage: its predicted peak memory, and seconds where the device was measured; else None."""

    name: str
    peak_gib: float | None
    seconds: float | None
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a run is carried out. `fits` is None where memory is not known or not modelled."""

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

    def as_toml(self) -> str:
        """Return the plan as `generate --plan` reads it: the model, the volume, and how it is made."""
        import tomli_w

        names = ("device", "dtype", "decoder", "sweeps", "window", "overlap")
        chosen = {choice.name: choice.value for stage in self.stages for choice in stage.choices}
        execution = {name: chosen[name] for name in names if chosen.get(name) is not None}
        size = {"size": list(self.geometry.size)} if self.geometry else {}
        return tomli_w.dumps({"schema": "maisi.plan/1", "model": self.model, **size, "execution": execution})


def read_plan(path: Path) -> dict[str, Any]:
    """Return model, size and execution of a plan that `gpu-plan --save` wrote. Raises `UsageError` for other files."""
    import tomllib

    from .errors import UsageError

    try:
        plan = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"the plan {path} does not exist", hint="make one with  maisi gpu-plan --save plan.toml") from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the plan {path} cannot be read: {str(error).splitlines()[0]}", hint="make one with  maisi gpu-plan --save"
        ) from error
    if plan.get("schema") != "maisi.plan/1" or not isinstance(plan.get("execution"), dict):
        raise UsageError(f"{path} is no plan", hint="make one with  maisi gpu-plan --save plan.toml")
    return plan


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


def predict(
    spec: ModelSpec, geometry: Geometry | None, gpu: Gpu, *, settings: GenerateSettings, warnings: tuple[str, ...] = ()
) -> Plan:  # fmt: skip
    """Choose device, precision and decoder, and predict the peak memory of every stage of `generate`."""
    device = settings.device if settings.device != "auto" else gpu.kind
    dtype = settings.dtype if settings.dtype != "auto" else default_dtype(device.split(":")[0])
    sources = {"device": "asked for" if settings.device != "auto" else f"for {gpu.name}",
               "dtype": "asked for" if settings.dtype != "auto" else f"default on {device.split(':')[0]}"}  # fmt: skip
    execution = (Choice(name="device", value=device, reason=sources["device"]), Choice(name="dtype", value=dtype, reason=sources["dtype"]))
    work = _Work(spec=spec, geometry=geometry, gpu=gpu, kind=device.split(":")[0], dtype=dtype, settings=settings)
    decode, choices = work.decode()
    stages = [
        *([work.stage("mask", work.mask())] if settings.mode != "image" and settings.mask_source == "diffusion" else []),
        *([work.stage("denoise", work.denoise(), execution), work.stage("decode", decode, choices)] if settings.mode != "mask" else
          [StagePlan(name="denoise", peak_gib=None, seconds=None, choices=execution),
           StagePlan(name="decode", peak_gib=None, seconds=None, choices=choices)]),
        *([StagePlan(name="save", peak_gib=None, seconds=None, choices=_files(geometry, settings))] if geometry else []),
    ]  # fmt: skip
    peaks = [stage.peak_gib for stage in stages if stage.peak_gib is not None]
    fits = margin = None
    notes = [*warnings]
    if peaks and settings.mode != "mask":
        room = work.room_gib()
        if room is not None:
            margin = round(room - max(peaks), 2)
            fits = margin >= 0
    elif settings.mode != "mask":
        where = format_triple(geometry.size) if geometry else "the size of the mask"
        notes.append(f"memory of {spec.name} at {where} on {gpu.name}: {NOT_MODELLED}")
    return Plan(model=spec.name, geometry=geometry, gpu=gpu, stages=tuple(stages), fits=fits, margin_gib=margin, warnings=tuple(notes))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What a run does on a device, stage by stage."""

    spec: ModelSpec
    geometry: Geometry | None
    gpu: Gpu
    kind: str
    dtype: str
    settings: GenerateSettings

    @property
    def itemsize(self) -> int:
        """Return the bytes of a number."""
        return 4 if self.dtype == "fp32" else 2

    def room_gib(self) -> float | None:
        """Return what a stage's predicted peak may come to: the rest is for the driver, the program, and `estimates.MARGIN`."""
        if self.gpu.memory_gib is None:
            return None
        taken = HEADROOM_GIB + (PROGRAM_GIB if self.kind == "cpu" else 0.0)
        return max(0.0, self.gpu.memory_gib - taken) / (1 + estimates.MARGIN)

    def stage(self, name: str, figures: estimates.Figures | None, choices: tuple[Choice, ...] = ()) -> StagePlan:
        """Return a stage with its peak, and its seconds where the device was measured."""
        if figures is None:
            return StagePlan(name=name, peak_gib=None, seconds=None, choices=choices)
        rates = estimates.measured_rates(self.gpu.name, self.dtype)
        seconds = round(rates.seconds(figures), 1) if rates else None
        return StagePlan(name=name, peak_gib=round(figures.peak_gib, 2), seconds=seconds, choices=choices)

    def denoise(self) -> estimates.Figures | None:
        """Return all steps, and the embedding of the mask before them; the decoder's weights wait beside."""
        if self.geometry is None:
            return None
        paired = self.settings.mode == "paired"
        step = estimates.denoise_step(self.spec, self.geometry.size, itemsize=self.itemsize, paired=paired)
        if step is None:
            return None
        guided = any((self.settings.cfg_modality, self.settings.cfg_tumor, self.settings.cfg_mask))
        made = step.times(self.settings.steps * (2 if guided else 1))
        waiting = estimates.weights_gib("decode-store", [self.spec.networks["vae"]], self.itemsize)
        embed = estimates.embed(self.spec, self.geometry.size, itemsize=self.itemsize, device=self.kind) if paired else None
        peak = max(step.peak_gib, embed.peak_gib if embed else 0.0) + waiting
        return replace(made, peak_gib=peak, tflop=made.tflop + (embed.tflop if embed else 0.0))

    def decode(self) -> tuple[estimates.Figures | None, tuple[Choice, ...]]:
        """Return the decoder's figures and how it decodes: whole in the fastest mode that fits, or in windows where asked for."""
        settings = self.settings
        window = settings.window if settings.decoder == "window" else None
        if settings.decoder == "window":
            figures = None
            if self.geometry and window:
                figures = estimates.decode_window(self.spec, self.geometry.size, window, settings.overlap, itemsize=self.itemsize)
            return self._beside(figures), (
                Choice(name="decoder", value="window", reason="asked for"),
                Choice(name="window", value=list(window) if window else None, reason="latent voxels"),
                Choice(name="overlap", value=settings.overlap, reason="share of the window"),
            )
        why = "asked for" if settings.decoder == "exact" else "whole volume, without seams"
        sweeps, figures = self._sweeps()
        return figures, (Choice(name="decoder", value="exact", reason=why), *([sweeps] if self.geometry else []),
                         Choice(name="window", value=None, reason="latent voxels"),
                         Choice(name="overlap", value=None, reason="share of the window"))  # fmt: skip

    def _sweeps(self) -> tuple[Choice, estimates.Figures | None]:
        room = self.room_gib()
        found: dict[str, estimates.Figures | None] = {mode: self._beside(self._in(mode)) for mode in estimates.SWEEPS}
        asked = self.settings.sweeps
        if asked != "auto":
            return Choice(name="sweeps", value=asked, reason="asked for"), found[asked]
        if self.geometry is not None and any(figures is None for figures in found.values()):
            return sweeps_by_size(self.spec.networks["vae"], self.geometry.size, self.dtype, self.gpu), None
        known = {mode: figures for mode, figures in found.items() if figures is not None}
        mode = next((mode for mode, figures in known.items() if room is None or figures.peak_gib <= room), "recompute")
        figures = known.get(mode)
        reason = "the fastest that fits" if room is not None and figures and figures.peak_gib <= room else "the least memory"
        if room is None:
            reason = "memory not known"
        return Choice(name="sweeps", value=mode, reason=reason), figures

    def _in(self, mode: str) -> estimates.Figures | None:
        if self.geometry is None:
            return None
        return estimates.decode(self.spec, self.geometry.size, itemsize=self.itemsize, device=self.kind, mode=mode)

    def _beside(self, figures: estimates.Figures | None) -> estimates.Figures | None:
        """Add the weights of the denoising networks, which stay for the next sample."""
        if figures is None:
            return None
        names = ["unet", *(["controlnet"] if self.settings.mode == "paired" else [])]
        waiting = estimates.weights_gib(
            "denoise", [self.spec.networks[name] for name in names if name in self.spec.networks], self.itemsize
        )
        return replace(figures, peak_gib=figures.peak_gib + waiting)

    def mask(self) -> estimates.Figures | None:
        """Return the mask networks: their steps, and their decoder in the fastest mode that fits."""
        nets = self.spec.networks
        if "mask_unet" not in nets or "mask_vae" not in nets:
            return None
        step = estimates.look_up(estimates.key("mask-denoise", [nets["mask_unet"]], self.itemsize), [1.0])
        decoded = estimates.mask_decode(self.spec, mask_sweeps(self.spec, self.dtype, self.gpu), itemsize=self.itemsize, device=self.kind)
        if step is None or decoded is None:
            return None
        made = step.times(self.settings.mask_steps)
        waiting = estimates.weights_gib("mask-denoise", [nets["mask_unet"]], self.itemsize)
        return replace(made, peak_gib=max(step.peak_gib, decoded.peak_gib + min(waiting, step.peak_gib)), tflop=made.tflop + decoded.tflop)


def _files(geometry: Geometry, settings: GenerateSettings) -> tuple[Choice, ...]:
    """Return what a sample takes outside of the device: memory of the host while it is made, and disk."""
    voxels = math.prod(geometry.size)
    stored = (2 if settings.mode != "mask" else 0) + (1 if settings.mode != "image" else 0)
    disk = voxels * stored * settings.count / 2**20
    latent = 4 * 4 * voxels / 64 * settings.count / 2**20 if settings.keep_latent and settings.mode != "mask" else 0.0
    return (
        Choice(name="host_gib", value=round(HOST_BYTES * voxels / 2**30 + PROGRAM_GIB, 2), reason="arrays of a volume, and the program"),
        Choice(name="disk_mib", value=round(disk + latent, 1), reason=f"at most, before compression, for {settings.count} samples"
               if settings.count > 1 else "at most, before compression"),
    )  # fmt: skip


def mask_sweeps(spec: ModelSpec, dtype: str, gpu: Gpu) -> str:
    """Return the fastest mode in which the mask networks' decoder fits a device."""
    itemsize = 4 if dtype == "fp32" else 2
    for mode in estimates.SWEEPS:
        figures = estimates.mask_decode(spec, mode, itemsize=itemsize, device=gpu.kind)
        if figures is None:
            return str(sweeps_by_size(spec.networks["mask_vae"], (256, 256, 256), dtype, gpu).value)
        if gpu.memory_gib is None or figures.peak_gib * (1 + estimates.MARGIN) + HEADROOM_GIB <= gpu.memory_gib:
            return mode
    return "recompute"


def training(
    spec: ModelSpec, kind: str, geometry: Geometry, gpu: Gpu, *, checkpointing: bool | None = None, warnings: tuple[str, ...] = ()
) -> Plan:  # fmt: skip
    """Plan a training step in mixed precision of batch 1: `dm`, `controlnet` or `vae` (whose size is that of its patches).

    Without a wish, activations are computed again going back (`checkpointing`) only where it does not fit otherwise.
    """
    room = None if gpu.memory_gib is None else max(0.0, gpu.memory_gib - HEADROOM_GIB) / (1 + estimates.MARGIN)
    tried = {each: estimates.train_step(spec, kind, geometry.size, checkpointing=each) for each in (False, True)}
    plain = tried[False]
    chosen = checkpointing if checkpointing is not None else bool(plain and room is not None and plain.peak_gib > room)
    figures = tried[chosen]
    reason = "asked for" if checkpointing is not None else "it does not fit otherwise" if chosen else "fits without"
    choices = (
        Choice(name="device", value=gpu.kind, reason=f"for {gpu.name}"),
        Choice(name="dtype", value="bf16", reason="mixed precision"),
        Choice(name="checkpointing", value=chosen, reason=reason),
    )
    return _one_stage(spec, geometry, gpu, f"train-{kind}", figures, choices, room, warnings)


def encoding(spec: ModelSpec, geometry: Geometry, gpu: Gpu, *, dtype: str = "auto", warnings: tuple[str, ...] = ()) -> Plan:
    """Plan the encoding of one volume: whole, slab by slab."""
    name = default_dtype(gpu.kind) if dtype == "auto" else dtype
    itemsize = 4 if name == "fp32" else 2
    room = None if gpu.memory_gib is None else max(0.0, gpu.memory_gib - HEADROOM_GIB) / (1 + estimates.MARGIN)
    found = {m: estimates.encode(spec, geometry.size, itemsize=itemsize, device=gpu.kind, mode=m) for m in estimates.SWEEPS}
    mode = next((m for m, f in found.items() if f is not None and (room is None or f.peak_gib <= room)), "recompute")
    choices = (
        Choice(name="device", value=gpu.kind, reason=f"for {gpu.name}"),
        Choice(name="dtype", value=name, reason="asked for" if dtype != "auto" else f"default on {gpu.kind}"),
        Choice(name="sweeps", value=mode, reason="the least memory" if mode == "recompute" else "the fastest that fits"),
    )
    return _one_stage(spec, geometry, gpu, "encode", found[mode], choices, room, warnings)


def reference(
    spec: ModelSpec, geometry: Geometry, gpu: Gpu, *, window: Sequence[int], splits: int, overlap: float, warnings: tuple[str, ...] = ()
) -> Plan:  # fmt: skip
    """Predict what the reference's own run takes: all of its networks, labels, and its decoder's windows and splits."""
    figures = estimates.reference_decode(spec, geometry.size, window, splits, overlap)
    room = None if gpu.memory_gib is None else max(0.0, gpu.memory_gib - HEADROOM_GIB)
    row = next((row for _, row in measured_rows() if tuple(row["size"]) == geometry.size and row["window"] == list(window)
                and row["splits"] == splits), None)  # fmt: skip
    choices = (
        Choice(name="device", value="cuda", reason=f"for {gpu.name}"),
        Choice(name="dtype", value="fp16", reason="autocast"),
        Choice(name="decoder", value="window", reason="the reference's"),
        Choice(name="window", value=list(window), reason="latent voxels"),
        Choice(name="splits", value=splits, reason="num_splits of its convolutions"),
        Choice(name="overlap", value=overlap, reason="share of the window"),
    )
    if row:
        warnings = (*warnings, f"published for it: {row['peak_gib']} GiB, measured on {row['device']}")
    return _one_stage(spec, geometry, gpu, "decode", figures, choices, room, warnings)


def _one_stage(
    spec: ModelSpec, geometry: Geometry, gpu: Gpu, name: str, figures: estimates.Figures | None, choices: tuple[Choice, ...],
    room: float | None, warnings: tuple[str, ...],
) -> Plan:  # fmt: skip
    peak = round(figures.peak_gib, 2) if figures else None
    margin = round(room - peak, 2) if room is not None and peak is not None else None
    if figures is None:
        warnings = (*warnings, f"memory of {spec.name}: {NOT_MODELLED}")
    stage = StagePlan(name=name, peak_gib=peak, seconds=None, choices=choices)
    return Plan(model=spec.name, geometry=geometry, gpu=gpu, stages=(stage,), fits=None if margin is None else margin >= 0,
                margin_gib=margin, warnings=warnings)  # fmt: skip


def measured_rows() -> list[tuple[str, Mapping[str, Any]]]:
    """Return the published rows of the GPU presets with the name of their preset."""
    from . import presets

    return [(each.name, row) for each in presets.presets("gpu") for row in each.values.get("measured", ())]


def sweeps_by_size(network: NetworkSpec, size: Size, dtype: str, gpu: Gpu) -> Choice:
    """Return a mode of the exact decoder for a network that was never traced: what half of the memory can hold.

    `store` holds the channels of the finest upsampling, or twice those of the finest level, and runs every layer once; `half`
    those of the level; `recompute` what lies below, at half of the resolution.
    """
    channels = [int(n) for n in network.arguments["num_channels"]]
    finest, above = channels[0], channels[min(1, len(channels) - 1)]
    bytes_each = 4 if dtype == "fp32" else 2
    # while a sweep consumes one tensor and makes the next, a slab of each is there besides
    held = {"store": max(above, 2 * finest), "half": finest + above // 8, "recompute": above / 8}
    gib = {mode: count * math.prod(size) * bytes_each / 2**30 for mode, count in held.items()}
    if gpu.memory_gib is None:
        return Choice(name="sweeps", value="store", reason=f"holds {gib['store']:.1f} GiB at full resolution; memory not known")
    room = gpu.memory_gib / 2
    mode = next((mode for mode, need in gib.items() if need <= room), "recompute")
    return Choice(name="sweeps", value=mode, reason=f"holds {gib[mode]:.1f} GiB at full resolution, of {gpu.memory_gib:g}")


def require_fit(made: Plan) -> None:
    """Raise `CannotRun` with ways out when a plan is known not to fit."""
    if made.fits is False:
        peak = max(stage.peak_gib for stage in made.stages if stage.peak_gib is not None)
        size = format_triple(made.geometry.size) if made.geometry else "?"
        assert made.gpu.memory_gib is not None
        assert made.margin_gib is not None
        raise CannotRun(
            f"{made.model} at {size} needs {peak:g} GiB, {made.gpu.memory_gib - made.margin_gib:.2f} with a margin; "
            f"{made.gpu.name} has {made.gpu.memory_gib:g}",
            hint="use a smaller --size, or --model nano-ct",
        )
