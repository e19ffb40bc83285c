"""`maisi data phantom|check|encode|import-latents`: data for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .options import Force, Json, Quiet, Verbose, examples

if TYPE_CHECKING:
    from ..train.checking import Report

data_app = typer.Typer(help="Make data for training, and check it.", no_args_is_help=True)

Lists = Annotated[list[Path], typer.Argument(metavar="LIST...", help="Data lists (JSON or CSV), or folders that hold one (list.json).")]
Base = Annotated[
    list[Path] | None,
    typer.Option(
        "--base",
        metavar="DIR",
        help="Folder that the paths in a list are seen from: one for all lists, or one for each.  [default: the list's own]",
        show_default=False,
    ),
]


@data_app.command(
    "phantom",
    epilog=examples("maisi data phantom --count 2 --out phantoms/", "maisi data phantom --count 2 --size 64 --seed 1 --out small/"),
)
def phantom(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write to.")],
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="Number of cases.")] = 32,
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0, help="Seed; case k depends on it and k alone.")] = 0,
    size: Annotated[int, typer.Option("--size", metavar="N", min=32, max=512, help="Voxels along x and y.")] = 128,
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Make procedural CT volumes with label maps, and the list that training reads.

    Every tenth case is held out, of two to nine the last.
    """
    with output.events() as on_event:
        from ..files import require_folder
        from ..train.data import make_phantoms

        require_folder(out)
        made = make_phantoms(out, count, seed=seed, size=size, force=force, on_event=on_event)
    _answer(made, as_json)


@data_app.command(
    "check",
    epilog=examples("maisi data check phantoms/", "maisi data check latents/latents.json --fold 0 --json"),
)
def check(
    lists: Lists,
    base: Base = None,
    model: Annotated[str, typer.Option("--model", metavar="NAME|FILE", help="Model that is to be trained: sizes are judged by its networks.")] = "nano-ct",
    fold: Annotated[int, typer.Option("--fold", metavar="K", help="Fold that is held out.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=0, help="Processes (0: one per core).")] = 0,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Find everything that is wrong with the data of lists before training on it. Exit code 1 when something is.

    It looks at files, grids, labels, spacings, sides, modalities, sizes, folds, latents, and for images and patients on both
    sides. Nothing is changed.
    """
    with output.events() as on_event:
        from ..train.checking import check_lists

        report = check_lists(lists, bases=base or (), model=model, held_out=fold, jobs=jobs, on_event=on_event)
    if as_json:
        output.json_out({"schema": "maisi.data-check/1", "lists": [str(each) for each in lists], **report.as_dict()})
    else:
        _show(report)
    if not report.passed:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    """Print the findings, each with its way out, and the sum of them on stderr."""
    if report.passed:
        output.data(f"pass  {report.cases} cases")
        return
    for each in report.findings:
        output.data(f"{each.severity.ljust(8)}{each.case or 'the list'}: {each.check}: {each.text}")
        output.data(f"        {each.fix}")
    wrong = len({each.case for each in report.findings if each.case})
    errors = sum(each.severity == "error" for each in report.findings)
    output.say(f"{errors} errors and {len(report.findings) - errors} warnings in {wrong} of {report.cases} cases")


@data_app.command(
    "encode",
    epilog=examples(
        "maisi data encode phantoms/list.json --out latents/",
        "maisi data encode phantoms/list.json --vae runs/vae/vae.safetensors --out latents2/",
        "maisi data encode phantoms/ --size 48x48x48 --latent sample --seed 1 --out samples/",
    ),
)
def encode(
    data: Lists,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the latents and their list.")],
    base: Base = None,
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Model whose VAE encodes.")] = "nano-ct",
    vae_file: Annotated[Path | None, typer.Option("--vae", metavar="FILE", help="Weights of the VAE, instead of the model's own.", show_default=False)] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="auto|original|XxYxZ", help="auto: resampled to multiples of 128; original: padded to a multiple of 4; or voxels.  [default: auto for models of multiples of 128, else original]", show_default=False)] = None,
    latent: Annotated[str, typer.Option("--latent", metavar="mean|sample", help="The posterior's mean, or a sample of it.")] = "mean",
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0, help="Seed of --latent sample; a case's noise depends on it and the id alone.")] = 0,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", metavar="NAME", help="fp32, bf16 or fp16; auto: fp16 on CUDA, else fp32.")] = "auto",
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Encode images to latents, which `train dm` and `train controlnet` read.

    A case that the same VAE encoded from the same files with the same settings is kept as it is. Exit code 1 when some cases
    could not be encoded: they are named, and all others are.
    """
    with output.events() as on_event:
        from ..errors import UsageError
        from ..files import require_folder
        from ..train.encoding import encode_lists

        require_folder(out)
        if vae_file is not None and not vae_file.is_file():
            raise UsageError(f"--vae {vae_file} is not a file", hint="give the path of a .safetensors file")
        done = encode_lists(
            data, vae_file, out=out, bases=base or (), model=model, size=size, latent=latent, seed=seed, device=device, dtype=dtype,
            force=force, on_event=on_event,
        )  # fmt: skip
    output.say(f"{len(done.encoded)} encoded, {len(done.kept)} kept, {len(done.failed)} failed")
    if as_json:
        failed = {name: {"text": error.message, "fix": error.hint} for name, error in done.failed.items()}
        lists = str(done.list) if done.encoded or done.kept else None
        output.json_out({"schema": "maisi.data/1", "list": lists, "encoded": len(done.encoded), "kept": len(done.kept), "failed": failed})
    elif done.encoded or done.kept:
        output.data(str(done.list))
    done.require_all()


@data_app.command(
    "import-latents",
    epilog=examples(
        "maisi data import-latents embeddings/list.json --out imported/",
        "maisi data import-latents embeddings/list.json --vae runs/vae/vae.safetensors --out imported2/",
    ),
)
def import_latents(
    data: Lists,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the latents and their list.")],
    base: Base = None,
    vae_file: Annotated[Path | None, typer.Option("--vae", metavar="FILE", help="Weights of the VAE that made them, to be named in the list.", show_default=False)] = None,
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Take over embeddings of the reference (*_emb.nii.gz with their .json) as latents, without encoding again."""
    with output.events() as on_event:
        from ..errors import UsageError
        from ..files import require_folder
        from ..train.importing import import_latents as take_over

        require_folder(out)
        if vae_file is not None and not vae_file.is_file():
            raise UsageError(f"--vae {vae_file} is not a file", hint="give the path of a .safetensors file")
        made = take_over(data, out=out, bases=base or (), vae=vae_file, force=force, on_event=on_event)
    _answer(made, as_json)


def _answer(made: Path, as_json: bool) -> None:
    if as_json:
        output.json_out({"schema": "maisi.data/1", "list": str(made)})
    else:
        output.data(str(made))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.add_typer(data_app, name="data")
