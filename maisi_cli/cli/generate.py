"""`maisi generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import output
from .options import Force, Json, Offline, Quiet, Verbose, examples

EPILOG = examples(
    "maisi generate --preset chest-abdomen --seed 7 --out run/",
    "maisi generate --preset abdomen --count 4 --anatomy liver,spleen --out livers/",
    "maisi generate --preset chest-abdomen --model rflow-ct --gpu 24g --dry-run",
)
_VOLUME, _WHAT, _SAMPLING, _BATCH, _HOW = "Volume", "What to make", "Sampling", "Batch and output", "Execution"


def _option(*names: str, panel: str, metavar: str | None = None, text: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel, show_default=False)


def generate(
    preset: Annotated[str | None, _option("-p", "--preset", panel=_VOLUME, metavar="NAME", text="Region preset; see  maisi presets list.  [default: chest-abdomen]")] = None,
    size: Annotated[str | None, _option("--size", panel=_VOLUME, metavar="XxYxZ", text="Voxels.")] = None,
    spacing: Annotated[str | None, _option("--spacing", panel=_VOLUME, metavar="XxYxZ", text="Voxel spacing in mm.")] = None,
    fov: Annotated[str | None, _option("--fov", panel=_VOLUME, metavar="XxYxZ", text="Field of view in mm; two of size, spacing and fov determine the third.")] = None,
    allow_ood: Annotated[bool | None, _option("--allow-ood", panel=_VOLUME, text="Allow a field of view that the model was not trained on.")] = None,
    model: Annotated[str | None, _option("--model", panel=_WHAT, metavar="NAME|FILE.toml", text="A model; auto takes the preset's where it is installed, else nano-ct.  [default: auto]")] = None,
    mode: Annotated[str | None, _option("--mode", panel=_WHAT, metavar="paired|image|mask", text="Image and mask, image alone, or mask alone.  [default: paired]")] = None,
    modality: Annotated[str | None, _option("--modality", panel=_WHAT, metavar="NAME", text="Modality by name.  [default: the preset's]")] = None,
    anatomy: Annotated[str | None, _option("--anatomy", panel=_WHAT, metavar="A,B", text="Organs that the mask must contain.")] = None,
    mask: Annotated[Path | None, _option("--mask", panel=_WHAT, metavar="FILE|DIR", text="A label map of your own, or a folder of them; the image lies on its grid.")] = None,
    labels: Annotated[str | None, _option("--labels", panel=_WHAT, metavar="NAME|FILE", text="Vocabulary of --mask, such as totalsegmentator.  [default: maisi]")] = None,
    mask_source: Annotated[str | None, _option("--mask-source", panel=_WHAT, metavar="NAME", text="Where masks come from: auto, file, database, diffusion or phantom.")] = None,
    mask_database: Annotated[Path | None, _option("--mask-database", panel=_WHAT, metavar="INDEX.json", text="A database of masks of your own, in the released layout.")] = None,
    anatomy_size: Annotated[str | None, _option("--anatomy-size", panel=_WHAT, metavar="A=S,B=S", text="Relative sizes, such as liver=0.5; -1 is absent. By the mask diffusion.")] = None,
    tumor: Annotated[str | None, _option("--tumor", panel=_WHAT, metavar="ORGAN:SIZE", text="One tumour, such as liver:15mm or lung:2.5ml.")] = None,
    allow_missing_body: Annotated[bool | None, _option("--allow-missing-body", panel=_WHAT, text="Take a mask without label 200.")] = None,
    cfg_modality: Annotated[float | None, _option("--cfg-modality", panel=_SAMPLING, metavar="S", text="Guidance toward the modality; 0 is off.")] = None,
    cfg_tumor: Annotated[float | None, _option("--cfg-tumor", panel=_SAMPLING, metavar="S", text="Guidance toward the tumour of the mask; 0 is off.")] = None,
    cfg_mask: Annotated[float | None, _option("--cfg-mask", panel=_SAMPLING, metavar="S", text="Guidance toward the mask; 0 or 1 is off.  [default: the model's]")] = None,
    scheduler: Annotated[str | None, _option("--scheduler", panel=_SAMPLING, metavar="NAME", text="Sampler; see  maisi plugins list.  [default: the model's]")] = None,
    steps: Annotated[int | None, _option("--steps", panel=_SAMPLING, metavar="N", text="Denoising steps.  [default: the model's]")] = None,
    mask_steps: Annotated[int | None, _option("--mask-steps", panel=_SAMPLING, metavar="N", text="Steps of the mask diffusion.  [default: 1000]")] = None,
    seed: Annotated[int | None, _option("--seed", panel=_SAMPLING, metavar="S", text="Seed of the run; drawn and recorded when it is not given.")] = None,
    compat: Annotated[str | None, _option("--compat", panel=_SAMPLING, metavar="reference", text="The reference's own numerics where they differ.")] = None,
    count: Annotated[int | None, _option("--count", panel=_BATCH, metavar="N", text="Number of samples.  [default: 1]")] = None,
    manifest: Annotated[Path | None, _option("--manifest", panel=_BATCH, metavar="FILE", text="CSV or JSON lines: a row for every sample, with id and any setting.")] = None,
    name: Annotated[str | None, _option("--name", panel=_BATCH, metavar="TEMPLATE", text="File names, of {stem} {preset} {model} {mode} {seed} {index}.")] = None,
    out: Annotated[Path | None, _option("-o", "--out", panel=_BATCH, metavar="DIR", text="Folder to write to.  [default: .]")] = None,
    format: Annotated[str | None, _option("--format", panel=_BATCH, metavar="A,B", text="Output formats.  [default: nifti]")] = None,
    preview: Annotated[bool | None, typer.Option("--preview/--no-preview", help="Write a picture beside every sample.  [default: preview]", rich_help_panel=_BATCH, show_default=False)] = None,
    keep_latent: Annotated[bool | None, _option("--keep-latent", panel=_BATCH, text="Write the latent too, before it is decoded.")] = None,
    on_qc_fail: Annotated[str | None, _option("--on-qc-fail", panel=_BATCH, metavar="retry|drop|keep", text="What to do with a sample that fails the check.  [default: retry]")] = None,
    retries: Annotated[int | None, _option("--retries", panel=_BATCH, metavar="N", text="Tries after the first one.  [default: 3]")] = None,
    resume: Annotated[bool | None, _option("--resume", panel=_BATCH, text="Make only what is missing or unfinished.")] = None,
    shard: Annotated[str | None, _option("--shard", panel=_BATCH, metavar="I/N", text="Make only this share of the samples.")] = None,
    executor: Annotated[str | None, _option("--executor", panel=_BATCH, metavar="NAME", text="How samples are run.  [default: local]")] = None,
    config: Annotated[Path | None, _option("--config", panel=_BATCH, metavar="RECORD", text="Repeat the run of a *_record.json; flags change it.")] = None,
    gpu: Annotated[str | None, _option("--gpu", panel=_HOW, metavar="NAME", text="GPU preset: auto, cpu, 16g, 24g, 32g, 40g, 80g, 141g.")] = None,
    device: Annotated[str | None, _option("--device", panel=_HOW, metavar="NAME", text="auto, cpu, cuda, cuda:1 or mps.")] = None,
    dtype: Annotated[str | None, _option("--dtype", panel=_HOW, metavar="NAME", text="auto, fp32, bf16 or fp16.")] = None,
    engine: Annotated[str | None, _option("--engine", panel=_HOW, metavar="NAME", text="torch, openvino, aoti or trt: what runs the networks. OpenVINO is for processors; the last two are made by export-trt.  [default: torch]")] = None,
    trt: Annotated[str | None, _option("--trt", panel=_HOW, metavar="require|prefer|off", text="TensorRT: an error where no engine fits, or PyTorch, which is said.  [default: off]")] = None,
    decoder: Annotated[str | None, _option("--decoder", panel=_HOW, metavar="NAME", text="auto, exact (whole volume) or window (overlapping windows).")] = None,
    window: Annotated[str | None, _option("--window", panel=_HOW, metavar="XxYxZ", text="Window of the window decoder, in latent voxels.")] = None,
    overlap: Annotated[float | None, _option("--overlap", panel=_HOW, metavar="SHARE", text="Overlap of windows, 0 to below 1.")] = None,
    plan: Annotated[Path | None, _option("--plan", panel=_HOW, metavar="FILE", text="Device, precision and decoder as in a plan that  maisi gpu-plan  saved.")] = None,
    set_: Annotated[list[str] | None, _option("--set", panel=_HOW, metavar="KEY=VALUE", text="Any setting, as TOML; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("-n", "--dry-run", help="Show settings, their origins and the plan; make nothing.")] = False,
    force: Force = False,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Make CT or MR volumes with paired label maps.

    Nothing needs to be downloaded: without other weights the bundled nano-ct and a procedural body are used.
    """
    flags: dict[str, Any] = {
        "preset": preset, "size": size, "spacing": spacing, "fov": fov, "allow_ood": allow_ood, "model": model, "mode": mode,
        "modality": modality, "anatomy": anatomy, "mask": None if mask is None else str(mask), "labels": labels,
        "mask_source": mask_source, "allow_missing_body": allow_missing_body, "cfg_modality": cfg_modality, "scheduler": scheduler,
        "mask_database": None if mask_database is None else str(mask_database), "anatomy_size": anatomy_size, "tumor": tumor,
        "cfg_tumor": cfg_tumor, "cfg_mask": cfg_mask, "mask_steps": mask_steps, "steps": steps, "seed": seed, "compat": compat, "count": count,
        "manifest": None if manifest is None else str(manifest), "name": name, "out": None if out is None else str(out),
        "format": format, "preview": preview, "keep_latent": keep_latent, "on_qc_fail": on_qc_fail, "retries": retries,
        "resume": resume, "shard": shard, "executor": executor, "gpu": gpu, "device": device, "dtype": dtype, "engine": engine, "trt": trt, "decoder": decoder,
        "window": window, "overlap": overlap, "force": force or None, "offline": offline or None,
    }  # fmt: skip
    from ..manifest import resolve_all

    repeated, index = (None, None) if config is None else _recorded(config, flags)
    planned = None if plan is None else _follow(plan, flags)
    resolved = resolve_all(flags, assignments=set_ or [], config=repeated, index=index)
    if planned is not None:
        _require_planned(planned, plan, resolved)
    if dry_run:
        one = len(resolved) == 1 and resolved[0].settings.manifest is None
        raise typer.Exit(_dry_run(resolved[0], as_json=as_json) if one else _dry_run_rows(resolved, as_json=as_json))
    with output.events() as on_event:
        from .. import synthesis

        for sample in synthesis.generate(resolved, on_event=on_event):
            if as_json:
                output.json_out(synthesis.sample_json(sample))
            else:
                for path in sample.paths.values():
                    output.data(str(path))


def _follow(path: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Let the flags that are not given be what a plan chose; return the plan."""
    from .. import planning
    from ..geometry import format_triple

    made = planning.read_plan(path)
    execution = dict(made["execution"])
    if "window" in execution:
        execution["window"] = format_triple(tuple(execution["window"]))
    for key, value in execution.items():
        if key == "sweeps" or flags.get(key) is None:
            flags[key] = value
    if flags["model"] is None:
        flags["model"] = made["model"]
    return made


def _require_planned(planned: dict[str, Any], path: Path | None, resolved: list[Any]) -> None:
    """Refuse a plan that was made for another model, or for a smaller volume."""
    from ..errors import UsageError
    from ..geometry import format_triple

    for each in resolved:
        chosen = each.settings
        if chosen.model != planned["model"]:
            raise UsageError(
                f"{path} was made for {planned['model']}, not {chosen.model}", hint="make a plan for it with  maisi gpu-plan --save"
            )
        size = planned.get("size")
        if chosen.mask is None and size and tuple(size) != chosen.geometry().size:
            raise UsageError(f"{path} was made for {format_triple(tuple(size))}, not {format_triple(chosen.geometry().size)}",
                             hint="make a plan for it with  maisi gpu-plan --save")  # fmt: skip


def _recorded(config: Path, flags: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Return the settings of a record, and its index where it was a row of a manifest or folder: then that one sample is repeated.

    Not taken over is what depends on the place it ran at, the volume where another one is asked for, and what came from
    a preset or model where another one is named.
    """
    from .. import record
    from ..settings import MANIFEST_ROW, MASK_FOLDER

    made = record.read(config)
    found = record.settings_of(made)
    left_out = {"out", "force", "resume", "shard", "manifest"}
    if any(flags[key] is not None for key in ("size", "spacing", "fov", "mask")):
        left_out |= {"size", "spacing", "fov"}
    if flags["mask"] is not None:
        left_out |= {"regions", "mask_source"}
    if any(flags[key] is not None for key in ("preset", "model", "gpu")):
        given = ("command line", "--set", "environment", "maisi.toml", "user config", "drawn", "record", MANIFEST_ROW, MASK_FOLDER)
        left_out |= {key for key, entry in made["settings"].items() if not str(entry.get("origin")).startswith(given)}
    of_a_row = str(made["settings"]["name"].get("origin")).startswith((MANIFEST_ROW, MASK_FOLDER))
    index = made["index"] if of_a_row and flags["manifest"] is None else None
    return {key: value for key, value in found.items() if key not in left_out}, index


def _planned(resolved: Any) -> tuple[Any, Any]:
    """Return the plan of a run, and the `CannotRun` that stands in its way, if any."""
    from .. import catalog, planning, settings
    from ..errors import CannotRun

    chosen = resolved.settings
    geometry = None
    if chosen.mask is not None:
        from .. import masks

        geometry = masks.own(chosen, spec=catalog.model(chosen.model)).geometry
    plan = planning.plan(resolved, geometry=geometry)
    spec = catalog.model(chosen.model)
    if chosen.scheduler != spec.scheduler.get("name", "rflow"):  # torch is loaded for others alone
        from .. import sampling

        sampling.require_family(spec, chosen.scheduler, compat=chosen.compat == "reference")
    try:
        settings.require_weights(spec, chosen.mode)
        if spec.parts_for(chosen.mode):
            _require_device(chosen, plan)
            _require_engine(chosen, plan)
        planning.require_fit(plan)
        _require_masks(resolved, spec)
    except CannotRun as error:
        return plan, error
    return plan, None


def _dry_run_rows(rows: list[Any], *, as_json: bool) -> int:
    """Show what each row of a manifest would make; the first thing that stands in the way is the exit code."""
    from .. import catalog
    from ..geometry import format_triple
    from ..settings import sample_id

    shown, first = [], None
    for resolved in rows:
        plan, problem = _planned(resolved)
        first = first or problem
        chosen = resolved.settings
        volume = plan.geometry
        shown.append({
            "id": sample_id(chosen, catalog.model(chosen.model), resolved.index), "mode": chosen.mode, "model": chosen.model,
            "seed": chosen.seed, "size": format_triple(volume.size) if volume else None, "spacing": _mm(volume.spacing) if volume else None,
            "problem": str(problem) if problem else None,
        })  # fmt: skip
    if as_json:
        output.json_out({"schema": "maisi.dry-run-rows/1", "rows": shown})
    else:
        columns = ["id", "mode", "model", "seed", "size", "spacing", "problem"]
        output.table(columns, [tuple("" if row[key] is None else str(row[key]) for key in columns) for row in shown])
    if first is not None:
        output.fail(first.message, first.hint)
        return int(first.exit_code)
    return 0


def _dry_run(resolved: Any, *, as_json: bool) -> int:
    from .. import settings
    from ..geometry import format_triple

    plan, problem = _planned(resolved)
    if as_json:
        from ..record import plain

        output.json_out({
            "schema": "maisi.dry-run/1",
            "settings": {key: {"value": plain(setting.value), "origin": setting.origin,
                               "hides": [{"value": plain(value), "origin": origin} for value, origin in setting.hides]}
                         for key, setting in resolved.origins.items()},
            "plan": plan.as_dict(), "notes": list(resolved.notes), "problem": str(problem) if problem else None,
        })  # fmt: skip
    else:
        output.table(["setting", "value", "origin"], settings.explain(resolved))
        volume = plan.geometry
        if volume is not None:
            output.data(f"\nvolume {format_triple(volume.size)} voxels of {_mm(volume.spacing)} mm, field of view {_mm(volume.fov_mm)} mm")
        for stage in plan.stages:
            for choice in stage.choices:
                if choice.value is not None:
                    output.data(f"{stage.name:8} {choice.name} {settings.show(choice.value)}: {choice.reason}")
        for note in (*resolved.notes, *plan.warnings):
            output.say(note)
    if problem is not None:
        output.fail(problem.message, problem.hint)
        return problem.exit_code
    return 0


def _require_masks(resolved: Any, spec: Any) -> None:
    """Tell where masks will come from, and refuse what was asked of that source in vain; the bundled model's phantom needs no look."""
    chosen = resolved.settings
    typed = resolved.typed()
    asked = any((chosen.mask_database, chosen.anatomy_size, chosen.tumor, chosen.mask_source not in ("auto", "phantom"),
                 typed & {"mask_steps", "cfg_tumor"}, chosen.anatomy and not spec.bundled))  # fmt: skip
    if chosen.mode == "image" or (spec.bundled and not asked):
        return
    from .. import masks

    name, reason = masks.choose(chosen, spec)
    if asked:
        masks.open_source(name, chosen, spec, typed=typed)
    if reason:
        output.say(reason)


def _require_device(chosen: Any, plan: Any) -> None:
    """Refuse a device that is named and not here; a GPU preset plans for a machine that may be elsewhere."""
    from ..errors import CannotRun

    if chosen.device.startswith("cuda") and chosen.gpu == "auto" and plan.gpu.kind != "cuda":
        raise CannotRun("this machine has no GPU that the NVIDIA driver reports", hint="use --device cpu, or plan with --gpu 24g")
    if chosen.device == "mps" and sys.platform != "darwin":
        raise CannotRun("this machine has no MPS device", hint="use --device cpu")


def _require_engine(chosen: Any, plan: Any) -> None:
    """Refuse an engine that is asked for and cannot run here; a GPU preset plans for a machine that may be elsewhere."""
    from .. import engines

    wish = engines.wish(chosen.engine, chosen.trt)
    if wish.must and chosen.gpu in ("auto", "cpu"):
        engines.require(wish.backend, device=plan.choice("device"), precision=plan.choice("dtype"))


def _mm(values: Any) -> str:
    return "x".join(f"{value:.4g}" for value in values)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate", epilog=EPILOG)(generate)
