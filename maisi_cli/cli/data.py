"""`maisi data phantom|encode`: data for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output
from .options import Force, Json, Quiet, Verbose, examples

data_app = typer.Typer(help="Make data for training.", no_args_is_help=True)


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
    """Make procedural CT volumes with label maps, and the list that training reads; every tenth case is held out."""
    with output.events() as on_event:
        from ..files import require_folder
        from ..train.data import make_phantoms

        require_folder(out)
        made = make_phantoms(out, count, seed=seed, size=size, force=force, on_event=on_event)
    _answer(made, as_json)


@data_app.command(
    "encode",
    epilog=examples(
        "maisi data encode phantoms/list.json --out latents/",
        "maisi data encode phantoms/list.json --vae runs/vae/vae.safetensors --out latents2/",
    ),
)
def encode(
    data: Annotated[Path, typer.Argument(metavar="LIST", help="Data list, or the folder that holds it.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the latents and their list.")],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Model whose VAE encodes.")] = "nano-ct",
    vae_file: Annotated[Path | None, typer.Option("--vae", metavar="FILE", help="Weights of the VAE, instead of the model's own.", show_default=False)] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Encode images to latents (the posterior's mean), which `train dm` and `train controlnet` read."""
    with output.events() as on_event:
        from ..errors import UsageError
        from ..files import require_folder
        from ..train.data import encode as encode_list

        require_folder(out)
        if vae_file is not None and not vae_file.is_file():
            raise UsageError(f"--vae {vae_file} is not a file", hint="give the path of a .safetensors file")
        made = encode_list(data, out=out, model=model, vae=vae_file, device=device, force=force, on_event=on_event)
    _answer(made, as_json)


def _answer(made: Path, as_json: bool) -> None:
    if as_json:
        output.json_out({"schema": "maisi.data/1", "list": str(made)})
    else:
        output.data(str(made))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.add_typer(data_app, name="data")
