"""`maisi train vae|dm|controlnet|mask-vae|mask-dm`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..events import Event, Stopped
from . import output
from .options import Force, Json, Quiet, Verbose, examples

Data = Annotated[Path, typer.Option("--data", metavar="LIST|DIR", help="Data list (JSON), or the folder that holds it.")]
TrainOut = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for weights, state and log.")]
Preset = Annotated[
    str | None, typer.Option("-p", "--preset", metavar="NAME", help="Training preset.  [default: nano-KIND]", show_default=False)
]
MaskPreset = Annotated[
    str | None, typer.Option("-p", "--preset", metavar="NAME", help="Training preset.  [default: KIND]", show_default=False)
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any train.* setting, as TOML; may be repeated.", show_default=False)
]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="auto|DIR",
        help="Continue exactly where a run stopped: its last checkpoint, or the folder of one.",
        show_default=False,
    ),
]
Init = Annotated[
    Path | None, typer.Option("--init", metavar="FILE", help="Weights to start from; the file is never written.", show_default=False)
]
Gpus = Annotated[
    str, typer.Option("--gpus", metavar="auto|N", help="Train in N processes, one on each GPU (auto: all); without CUDA on the processor.")
]
Accumulate = Annotated[
    int | None,
    typer.Option(
        "--accumulate",
        metavar="N",
        min=1,
        help="Batches whose gradients are summed to one step.  [default: 1, or the preset's]",
        show_default=False,
    ),
]
KeepLast = Annotated[
    int | None,
    typer.Option("--keep-last", metavar="N", min=1, help="Checkpoints that are kept.  [default: 1, or the preset's]", show_default=False),
]
Overfit = Annotated[
    int | None,
    typer.Option(
        "--overfit", metavar="N", min=1, help="Train on the first N cases alone, to see whether it learns at all.", show_default=False
    ),
]

train_app = typer.Typer(help="Train the VAE, the diffusion model, the ControlNet and the mask generator.", no_args_is_help=True)


@train_app.command("vae", epilog=examples(
    "maisi train vae --data phantoms/ --out runs/vae --set train.steps=2",
    "maisi train vae --data phantoms/ --out runs/vae --set train.steps=4 --resume auto",
    "maisi train vae --data phantoms/ --out runs/eval --eval-only --init runs/vae/vae.safetensors"))  # fmt: skip
def vae(
    data: Data, out: TrainOut, preset: Preset = None, set_: Set = None, resume: Resume = None, init: Init = None,
    eval_only: Annotated[bool, typer.Option("--eval-only", help="Train nothing: judge the weights of --init on the held-out cases.")] = False,
    gpus: Gpus = "1", accumulate: Accumulate = None, keep_last: KeepLast = None, overfit: Overfit = None,
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Train the autoencoder that turns volumes into latents and back; or judge one."""
    if eval_only:
        _refuse_training({"--resume": resume, "--accumulate": accumulate, "--keep-last": keep_last, "--overfit": overfit,
                          "--gpus": None if gpus == "1" else gpus})  # fmt: skip
        _evaluate(data, out, preset, init, set_, force=force, as_json=as_json)
        return
    _train("vae", data, out, preset, {"init": init}, set_, resume, force, as_json, gpus,
           {"accumulate": accumulate, "keep_last": keep_last, "overfit": overfit})  # fmt: skip


@train_app.command("dm", epilog=examples(
    "maisi train dm --data latents/ --out runs/dm --set train.steps=2",
    "maisi train dm --data latents/ --out runs/dm --set train.steps=4 --resume auto",
    "maisi train dm --data latents/ --out runs/dm2 --overfit 2 --accumulate 2 --keep-last 2 --set train.steps=2"))  # fmt: skip
def dm(
    data: Data, out: TrainOut, preset: Preset = None, set_: Set = None, resume: Resume = None, init: Init = None,
    gpus: Gpus = "1", accumulate: Accumulate = None, keep_last: KeepLast = None, overfit: Overfit = None,
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Train the latent diffusion model, as a rectified flow, on encoded data."""
    _train("dm", data, out, preset, {"init": init}, set_, resume, force, as_json, gpus,
           {"accumulate": accumulate, "keep_last": keep_last, "overfit": overfit})  # fmt: skip


@train_app.command("controlnet", epilog=examples(
    "maisi train controlnet --data latents/ --unet runs/dm/unet.safetensors --out runs/controlnet --set train.steps=2",
    "maisi train controlnet --data latents/ --unet runs/dm/unet.safetensors --out runs/controlnet --set train.steps=4 --resume auto",
    "maisi train controlnet --data latents/ --unet runs/dm/unet.safetensors --out runs/controlnet2 --overfit 2 --accumulate 2 --keep-last 2 --set train.steps=2"))  # fmt: skip
def controlnet(
    data: Data, out: TrainOut,
    unet: Annotated[Path | None, typer.Option("--unet", metavar="FILE", help="Weights of the frozen diffusion model.", show_default=False)] = None,
    preset: Preset = None, set_: Set = None, resume: Resume = None, init: Init = None,
    gpus: Gpus = "1", accumulate: Accumulate = None, keep_last: KeepLast = None, overfit: Overfit = None,
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Train the ControlNet that makes a frozen diffusion model follow masks."""
    _train("controlnet", data, out, preset, {"init": init, "unet": unet}, set_, resume, force, as_json, gpus,
           {"accumulate": accumulate, "keep_last": keep_last, "overfit": overfit})  # fmt: skip


@train_app.command("mask-vae", epilog=examples(
    "maisi train mask-vae --data phantoms/ --out runs/mask-vae --preset mask-vae --set train.steps=2",
    "maisi train mask-vae --data phantoms/ --out runs/mask-vae --set train.steps=4 --resume auto"))  # fmt: skip
def mask_vae(
    data: Data, out: TrainOut, preset: MaskPreset = None, set_: Set = None, resume: Resume = None, init: Init = None,
    gpus: Gpus = "1", accumulate: Accumulate = None, keep_last: KeepLast = None, overfit: Overfit = None,
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Train the autoencoder of label maps, the first half of an anatomy generator."""
    _train("mask-vae", data, out, preset, {"init": init}, set_, resume, force, as_json, gpus,
           {"accumulate": accumulate, "keep_last": keep_last, "overfit": overfit})  # fmt: skip


@train_app.command("mask-dm", epilog=examples(
    "maisi train mask-dm --data phantoms/ --vae runs/mask-vae/mask_vae.safetensors --out runs/mask-dm --set train.steps=2",
    "maisi train mask-dm --data phantoms/ --vae runs/mask-vae/mask_vae.safetensors --out runs/mask-dm --set train.steps=4 --resume auto"))  # fmt: skip
def mask_dm(
    data: Data, out: TrainOut,
    vae: Annotated[Path | None, typer.Option("--vae", metavar="FILE", help="Weights of the mask autoencoder.", show_default=False)] = None,
    preset: MaskPreset = None, set_: Set = None, resume: Resume = None, init: Init = None,
    gpus: Gpus = "1", accumulate: Accumulate = None, keep_last: KeepLast = None, overfit: Overfit = None,
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Train the diffusion model of label maps, which is told how large ten organs and tumours are."""
    _train("mask-dm", data, out, preset, {"init": init, "vae": vae}, set_, resume, force, as_json, gpus,
           {"accumulate": accumulate, "keep_last": keep_last, "overfit": overfit})  # fmt: skip


def _refuse_training(options: Mapping[str, Any]) -> None:
    """Refuse the options of training where nothing is trained."""
    from ..errors import UsageError

    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"--eval-only trains nothing, and {' and '.join(given)} {'is' if len(given) == 1 else 'are'} for training",
                         hint=f"leave out {' and '.join(given)}, or --eval-only")  # fmt: skip


def _evaluate(
    data: Path, out: Path, preset: str | None, init: Path | None, set_: list[str] | None, *, force: bool, as_json: bool
) -> None:  # fmt: skip
    from ..errors import UsageError
    from ..files import require_folder
    from ..settings import parse_assignments

    if init is not None and not init.is_file():
        raise UsageError(f"--init {init} is not a file", hint="give the path of a .safetensors file")
    require_folder(out)
    assigned = parse_assignments(set_ or [], ("train",))
    _check_types(assigned)
    with output.events() as on_event:
        from ..train.evaluation import evaluate
        from ..train.settings import settings_from

        overrides = {**assigned, **({"init": str(init)} if init is not None else {})}
        found = evaluate(data, settings_from("vae", preset or "nano-vae", overrides), out=out, force=force, on_event=on_event)
    if as_json:
        output.json_out(found.as_dict())
        return
    columns = {"modality": "", "images": "", "perceptual": ".4f", "ssim": ".4f", "ms_ssim": ".4f", "psnr_db": ".2f", "soft_mae_hu": ".1f"}
    rows = [["" if row[name] is None else format(row[name], how) for name, how in columns.items()] for row in found.rows()]
    output.table(
        [name.replace("_", " ") for name in columns], rows, right=[name.replace("_", " ") for name in columns if name != "modality"]
    )
    organs = [[each["id"], each["label"], each["images"], f"{each['mae_hu']:.1f}"] for each in found.organs()]
    if organs:
        output.data("")
        output.table(["id", "organ", "images", "mae hu"], organs, right=("id", "images", "mae hu"))
    output.say(f"perceptual: {found.perceptual}, not LPIPS; soft and mae: mean absolute error in HU")


def _train(
    kind: str, data: Path, out: Path, preset: str | None, files: dict[str, Path | None], set_: list[str] | None,
    resume: str | None, force: bool, as_json: bool, gpus: str = "1", options: Mapping[str, int | None] | None = None,
) -> None:  # fmt: skip
    """Train, and print the path of the weights. A run that was stopped has saved its state, and ends with 130."""
    from ..errors import UsageError
    from ..files import require_folder
    from ..settings import parse_assignments

    for key, value in files.items():
        if value is not None and not value.is_file():
            raise UsageError(f"--{key} {value} is not a file", hint="give the path of a .safetensors file")
    require_folder(out)
    assigned = parse_assignments(set_ or [], ("train",))
    _check_types(assigned)
    flags = {key: value for key, value in (options or {}).items() if value is not None}
    overrides = {**assigned, **flags, **{key: str(value) for key, value in files.items() if value is not None}}
    stopped: list[Event] = []
    with output.events() as on_event:
        from .. import train

        def listen(event: Event) -> None:
            if isinstance(event, Stopped):
                stopped.append(event)
            on_event(event)

        weights = train.train(
            kind, data=data, out=out, preset=preset, overrides=overrides, resume=resume, force=force,
            gpus=int(gpus) if gpus.isdigit() else gpus, on_event=listen,
        )  # fmt: skip
    if not _is_first():
        return
    if stopped:  # the state is saved; the run is not done
        raise KeyboardInterrupt
    if as_json:
        output.json_out({"schema": "maisi.train/1", "kind": kind, "weights": str(weights), "log": str(out / "log.jsonl")})
    else:
        output.data(str(weights))


def _is_first() -> bool:
    """Say whether this process answers for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _check_types(assigned: Mapping[str, Any]) -> None:
    """Refuse values of `--set` that are of another type than the setting; names are checked where they are used."""
    from ..errors import UsageError
    from ..train import TrainSettings

    types: dict[str, tuple[type | tuple[type, ...], str]] = {
        "bool": (bool, "true or false"), "int": (int, "a whole number"), "float": ((int, float), "a number"), "str": (str, "text"),
    }  # fmt: skip
    for field in dataclasses.fields(TrainSettings):
        wanted, word = types.get(str(field.type).removesuffix(" | None"), (list, "a list, such as [[64,64,64]]"))
        value = assigned.get(field.name)
        if value is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
            raise UsageError(f"train.{field.name} {value!r} (--set) is not valid", hint=f"it must be {word}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.add_typer(train_app, name="train")
