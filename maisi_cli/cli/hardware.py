"""`maisi gpu-plan`: whether a volume fits a GPU, and how it is made there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Force, Json, Quiet, Verbose, examples
from .wording import triple

if TYPE_CHECKING:
    from ..devices import Gpu
    from ..geometry import Geometry
    from ..planning import Plan
    from ..settings import Resolved

MEMORY_UNITS_GIB = {
    "gib": 1.0,
    "g": 1.0,
    "": 1.0,
    "mib": 1 / 1024,
    "m": 1 / 1024,
    "gb": 1e9 / 2**30,
    "mb": 1e6 / 2**30,
}


def gpu_plan(
    preset: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--preset",
            metavar="NAME",
            help="Region preset.  [default: chest-abdomen]",
            show_default=False,
        ),
    ] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="XxYxZ", help="Voxels.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME|FILE.toml",
            help="Model.  [default: the preset's, installed or not]",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="auto (this machine), cpu, 16g, 24g, 32g, 40g, 80g, 141g.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="GIB",
            help="Memory of the GPU, such as 24GiB, instead of --gpu.",
            show_default=False,
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option("--decoder", metavar="NAME", help="auto, exact or window.", show_default=False),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            "--window",
            metavar="XxYxZ",
            help="Window of the window decoder, in latent voxels.",
            show_default=False,
        ),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option("--overlap", metavar="SHARE", help="Overlap of windows, 0 to below 1.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="NAME", help="auto, fp32, bf16 or fp16.", show_default=False),
    ] = None,
    splits: Annotated[
        int | None,
        typer.Option("--splits", metavar="N", help="num_splits of the reference's convolutions, with --compat.", show_default=False),
    ] = None,
    stage: Annotated[
        str,
        typer.Option("--stage", metavar="NAME", help="generate, encode, train, train-controlnet or train-vae."),
    ] = "generate",
    compat: Annotated[
        str | None,
        typer.Option("--compat", metavar="NAME", help="reference: what the reference's own run takes.", show_default=False),
    ] = None,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="Trace the networks afresh instead of looking the figures up; loads torch."),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure this device for half a minute, so that plans tell seconds."),
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save", metavar="FILE", help="Write the plan to a .toml, which  maisi generate  follows, or a .json.", show_default=False
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a volume needs on a GPU, whether it fits, and how it is made there the fastest.

    Memory comes from traces of the networks; seconds only from what was measured on the device (--measure).
    Exit code 3 when nothing fits.
    """
    from .. import planning
    from ..errors import UsageError
    from ..files import refuse_overwriting, write_atomic

    if gpu is not None and memory is not None:
        raise UsageError("--gpu and --memory exclude each other", hint="leave one out")
    if stage not in STAGES:
        raise UsageError(f"there is no stage {stage!r}", hint=f"use --stage {', '.join(STAGES)}")
    if compat not in (None, "reference"):
        raise UsageError(f"--compat {compat!r} is not known", hint="use --compat reference")
    if splits is not None and compat is None:
        raise UsageError("only the reference splits its convolutions", hint="add --compat reference, or leave --splits out")
    device = None if memory is None else _gpu_of_memory(memory)
    if save is not None:
        if save.suffix not in (".toml", ".json"):
            raise UsageError(f"{save} is neither .toml nor .json", hint="name the plan plan.toml")
        refuse_overwriting(save, force=force)
    flags: dict[str, Any] = {
        "preset": preset,
        "size": size,
        "model": model,
        "gpu": gpu if memory is None else "auto",
        "decoder": decoder,
        "window": window,
        "overlap": overlap,
        "dtype": dtype,
    }
    only_size = size is not None and preset is None
    if measure:
        _measure_rates(flags, device)
    made = _plan(flags, device, only_size=only_size, stage=stage, splits=splits if compat is None else splits or 2, simulate=simulate)
    if save is not None:
        text = made.as_toml() if save.suffix == ".toml" else _json(made.as_dict())
        write_atomic(save, text.encode())
    if as_json:
        output.json_out(made.as_dict())
    else:
        _show(made, only_size=only_size)
    planning.require_fit(made)


STAGES = ("generate", "encode", "train", "train-controlnet", "train-vae")


def _json(content: Mapping[str, Any]) -> str:
    import json

    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _measure_rates(flags: Mapping[str, Any], device: Gpu | None) -> None:
    from .. import devices
    from ..errors import UsageError

    chosen = _resolve(flags).settings
    here = devices.detect() if chosen.device == "auto" and chosen.gpu == "auto" and device is None else None
    if chosen.device == "cpu" or chosen.gpu == "cpu":
        here = devices.device_of("cpu")
    if here is None:
        raise UsageError("only this machine can be measured", hint="leave out --gpu and --memory, or use --gpu cpu")
    from .. import calibration

    dtype = chosen.dtype if chosen.dtype != "auto" else devices.default_dtype(here.kind)
    output.say(f"measuring {here.name} in {dtype}")
    rates = calibration.measure(here, dtype)
    calibration.keep(rates)
    output.say(f"convolutions {rates.convolution:.3g} TFLOP/s, attention {rates.attention:.3g} TFLOP/s, copies {rates.copy:.3g} GB/s")


def _plan(
    flags: Mapping[str, Any],
    device: Gpu | None,
    *,
    only_size: bool,
    stage: str = "generate",
    splits: int | None = None,
    simulate: bool = False,
) -> Plan:
    """Return the plan of these flags; where no model is named it is the preset's, installed or not.

    With a size alone (`only_size`) the spacing says nothing about memory and is not judged.
    """
    from .. import catalog, devices, planning
    from ..errors import UsageError

    resolved = _resolve(flags)
    chosen = resolved.settings
    spec = catalog.model(chosen.model)
    warnings = list(resolved.notes)
    if not spec.installed(chosen.mode):
        warnings.append(f"{spec.name} is not installed; where its files belong:  maisi models show {spec.name}")
    found = device or devices.gpu_of(chosen)
    if only_size or stage != "generate" or splits is not None:
        geometry: Geometry = chosen.geometry()
        if stage != "train-vae" and not spec.valid_size(geometry.size):
            near = " or ".join(triple(each.size) for each in spec.nearest(geometry))
            raise UsageError(
                f"model {spec.name} cannot make {triple(geometry.size)}",
                hint=f"the nearest sizes are {near}",
            )
        notes = tuple(warnings)
        if splits is not None:
            window = chosen.window or tuple(n // spec.latent_factor for n in geometry.size)
            made = planning.reference(spec, geometry, found, window=window, splits=splits, overlap=chosen.overlap, warnings=notes)
        elif stage == "encode":
            made = planning.encoding(spec, geometry, found, dtype=chosen.dtype, warnings=notes)
        elif stage != "generate":
            kind = {"train": "dm", "train-controlnet": "controlnet", "train-vae": "vae"}[stage]
            made = planning.training(spec, kind, geometry, found, warnings=notes)
        else:
            made = planning.predict(spec, geometry, found, settings=chosen, warnings=notes)
    else:
        made = planning.plan(resolved, gpu=device)
        made = dataclasses.replace(made, warnings=(*warnings, *made.warnings))
    if simulate:
        from .. import tracing

        made = tracing.simulated(made, spec, chosen)
    return made


def _resolve(flags: Mapping[str, Any]) -> Resolved:
    from .. import catalog, presets, settings

    outer: dict[str, Any] = {}
    files = ((settings.config_path(), "user config"), (Path(settings.PROJECT_FILE), settings.PROJECT_FILE))
    for layer in (
        *(settings.read_config(path, origin) for path, origin in files),
        settings.environment_layer(),
    ):
        outer.update(layer.values if layer else {})
    named = flags["model"] or outer.get("model")
    if named in (None, "auto"):
        region = presets.preset(flags["preset"] or outer.get("preset") or settings.GenerateSettings().preset, "region")
        named = str(region.values["volume"].get("model", "rflow-ct"))
    modes = catalog.model(named).modes
    mode = outer.get("mode") or ("paired" if "paired" in modes else modes[0])
    return settings.resolve({**flags, "model": named, "mode": mode})


def _gpu_of_memory(text: str) -> Gpu:
    """Return a GPU with this much memory: `24GiB`, `24` (GiB), `24GB` (10^9 bytes), `24576MiB`."""
    from ..devices import Gpu
    from ..errors import UsageError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().casefold())
    if match is None or match[2] not in MEMORY_UNITS_GIB or float(match[1]) == 0:
        raise UsageError(f"--memory {text!r} is not an amount of memory", hint="write it like 24GiB")
    amount = round(float(match[1]) * MEMORY_UNITS_GIB[match[2]], 2)
    return Gpu(name="GPU", kind="cuda", memory_gib=amount)


def _show(made: Plan, *, only_size: bool) -> None:
    from ..planning import NOT_MEASURED, NOT_MODELLED
    from ..settings import show

    def figure(value: float | None, absent: str) -> str:
        return absent if value is None else f"{value:g}"

    verdict = {True: "yes", False: "no", None: NOT_MODELLED}[made.fits]
    if made.margin_gib is not None:
        verdict += f", {made.margin_gib:g} GiB to spare" if made.fits else f", {-made.margin_gib:g} GiB short"
    size = f", {made.gpu.memory_gib:g} GiB" if made.gpu.memory_gib is not None else ""
    output.data(f"model   {made.model}")
    if made.geometry is not None:
        volume = f"{triple(made.geometry.size)} voxels" if only_size else made.geometry
        output.data(f"volume  {volume}")
    output.data(f"device  {made.gpu.name}{size}")
    output.data(f"fits    {verdict}\n")
    rows = [[stage.name, figure(stage.peak_gib, NOT_MODELLED), figure(stage.seconds, NOT_MEASURED)]
            for stage in made.stages if stage.name != "save"]  # fmt: skip
    output.table(["stage", "peak GiB", "seconds"], rows, right=("peak GiB", "seconds"))
    output.data("")
    choices = []
    for stage in made.stages:
        for choice in stage.choices:
            value = tuple(choice.value) if isinstance(choice.value, list) else choice.value
            if value is not None:
                choices.append([stage.name, choice.name, show(value), choice.reason])
    output.table(["stage", "choice", "value", "reason"], choices)
    for warning in made.warnings:
        output.say(f"note: {warning}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "gpu-plan",
        epilog=examples(
            "maisi gpu-plan --size 512x512x512 --memory 8GiB",
            "maisi gpu-plan --preset abdomen --gpu 24g --save plan.toml",
            "maisi gpu-plan --size 512x512x512 --stage train --gpu 24g --json",
        ),
    )(gpu_plan)
