"""`maisi fid`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Force, Json, Quiet, Verbose, examples

if TYPE_CHECKING:
    from ..comparison import Comparison

PLANES = ("xy", "yz", "zx", "average")


def fid(
    real: Annotated[Path, typer.Argument(metavar="REAL", help="A folder, a list file (a path a line), or saved statistics (.npz).")],
    synth: Annotated[Path | None, typer.Argument(metavar="SYNTH", help="The same, of synthetic volumes.", show_default=False)] = None,
    features: Annotated[str | None, typer.Option("--features", metavar="NAME|FILE", help="Extractor: maisi-slices, radimagenet-resnet50, imagenet-squeezenet1_1, NAME=FILE. [default: maisi-slices]", show_default=False)] = None,
    profile: Annotated[str | None, typer.Option("--profile", metavar="NAME", help="Preprocessing: ct, mr, reference, reference-mr. [default: the extractor's]", show_default=False)] = None,
    metrics: Annotated[str, typer.Option("--metrics", metavar="A,B", help="Beside fid: kid, prdc, organs.")] = "fid,kid,prdc,organs",
    baseline: Annotated[str, typer.Option("--baseline", metavar="split|none", help="Real against real: halves of REAL.")] = "split",
    spacing: Annotated[str | None, typer.Option("--spacing", metavar="MM|none", help="Resample to this spacing, 1x1x1.", show_default=False)] = None,
    target_shape: Annotated[str | None, typer.Option("--target-shape", metavar="XxYxZ|none", help="Pad and crop to this size, 512x512x512.", show_default=False)] = None,
    center_slices: Annotated[float | None, typer.Option("--center-slices", metavar="SHARE", help="Use this share of slices, in the middle of each axis.", show_default=False)] = None,
    num_images: Annotated[int | None, typer.Option("--num-images", metavar="N", help="Use N volumes of each set: a random draw, or with the profile reference the first by name.", show_default=False)] = None,
    modality: Annotated[str, typer.Option("--modality", metavar="NAME", help="Modality of the images.")] = "ct",
    cache: Annotated[Path | None, typer.Option("--cache", metavar="DIR", help="Keep the features of each volume here, for the next time.", show_default=False)] = None,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE.npz", help="Save the statistics of REAL; SYNTH may be left out.", show_default=False)] = None,
    bootstrap: Annotated[int | None, typer.Option("--bootstrap", metavar="N", help="Resamples of the interval, 0 for none. [default: 100; 20 above 512 features]", show_default=False)] = None,
    max_fid: Annotated[float | None, typer.Option("--max", metavar="X", help="Exit code 1 when the average FID is above X.", show_default=False)] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the draws.")] = 0,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1.")] = "auto",
    batch_size: Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Slices at once, at most. [default: by their size]", show_default=False)] = None,
    force: Force = False, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """How far synthetic volumes are from real ones: 2.5D FID with its interval and baseline, kernel distance, organs.

    Under torchrun or accelerate each process computes its share of the features; the numbers are the same.
    """
    from ..errors import Rejected, UsageError

    if max_fid is not None and synth is None:
        raise UsageError("--max needs a second set to compare with", hint="give SYNTH")
    from ..comparison import compare

    changes: dict[str, Any] = {}
    if spacing is not None:
        changes["spacing_mm"] = None if spacing == "none" else _spacing(spacing)
    if target_shape is not None:
        changes["target_shape"] = None if target_shape == "none" else _size(target_shape)
    if center_slices is not None:
        changes["center_slices"] = None if center_slices == 1 else center_slices
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    with output.events() as listener:
        found = compare(
            real, synth, features=features, profile=profile, changes=changes, modality=modality, metrics=names, baseline=baseline,
            bootstrap=bootstrap, num_images=num_images, seed=seed, cache=cache, device=device, batch=batch_size, save_to=save,
            force=force, on_event=listener,
        )  # fmt: skip
    if found is None:
        if save is not None and os.environ.get("RANK", "0") == "0":
            output.data(str(save))
        return
    if as_json:
        output.json_out(found.as_dict())
    else:
        show(found)
    if max_fid is not None and found.fid["average"] > max_fid:
        raise Rejected(f"the FID {found.fid['average']:.4g} is above {max_fid:g}", hint="see the warnings and the baseline before judging")


def _spacing(text: str) -> Any:
    from ..geometry import parse_mm

    return parse_mm(text)


def _size(text: str) -> Any:
    from ..geometry import parse_size

    return parse_size(text)


def show(found: Comparison) -> None:
    """Print a comparison: a table of the planes, then what a reader needs to judge it."""
    output.table(["", *PLANES], _rows(found), right=PLANES)
    output.data("")
    profile, features = found.profile, found.features
    rows = [
        ("features", f"{features['name']}, {features['size']} a slice, sha256 {features['sha256'][:12]}"),
        ("profile", f"{profile['name']}, sha256 {profile['sha256'][:12]}"),
        *((f"{side}", f"{found.n_volumes[side]} volumes, {found.n_slices[side]['total']} slices, which count as "
                      f"{found.effective_n[side]:.0f} of a plane") for side in ("real", "synth")),
    ]  # fmt: skip
    if found.prdc:
        four = "  ".join(f"{name} {found.prdc[name]:.3f}" for name in ("precision", "recall", "density", "coverage"))
        rows.append(("volumes", f"{four}  (k {found.prdc['k']})"))
    if found.organs:
        rows.append(("organs", _organs(found.organs)))
    from .wording import facts

    facts(rows)
    for warning in found.warnings:
        output.warn(warning)
    for note in found.notes:
        output.say(f"note: {note}")


def _rows(found: Comparison) -> list[list[str]]:
    rows = [["FID", *(_number(found.fid[plane]) for plane in PLANES)]]
    if found.ci95:
        rows.append(["95 % interval", *(f"{_number(low)}..{_number(high)}" for low, high in (found.ci95[plane] for plane in PLANES))])
    if found.baseline:
        at = found.baseline["at_these_sizes"]
        rows.append(["real against real", *(_number(at[plane]) for plane in PLANES)])
        rows.append([f"  halves of {found.baseline['volumes']}", *(_number(found.baseline[plane]) for plane in PLANES)])
    if found.kid:
        rows.append(["KID", *(_number(found.kid[plane]["value"]) for plane in PLANES)])
        rows.append(["  standard error", *(_number(found.kid[plane]["error"]) for plane in PLANES)])
    return rows


def _organs(organs: Mapping[str, Any]) -> str:
    per = organs["per_organ"]
    worst = sorted(per, key=lambda name: -max(per[name]["volume"], per[name]["intensity"]))[:3]
    named = ", ".join(f"{name} (volume {per[name]['volume']:.2f}, HU {per[name]['intensity']:.2f})" for name in worst)
    whole = "" if organs["frechet"] is None else f"Frechet {_number(organs['frechet'])} over {organs['frechet_of']['organs']} organs; "
    return f"{whole}furthest of {len(per)}: {named}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("fid", epilog=examples(
        "maisi fid real/ run/",
        "maisi fid real/ run/ --spacing 2x2x2 --center-slices 0.4 --cache features/ --json",
        "maisi fid real/ --save real.npz",
    ))(fid)  # fmt: skip
