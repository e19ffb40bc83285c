"""FID of nano-ct against the number of network evaluations, for every flow sampler: the figures of docs/samplers.md.

    python benchmarks/sampler_curve.py prepare --inputs curve
    python benchmarks/sampler_curve.py run --inputs curve --out curve.jsonl --device cuda
    python benchmarks/sampler_curve.py plot curve.jsonl --out docs/sampler_curve.svg

`prepare` paints the phantoms, on a CPU: the masks that images are made of, and the features of other phantoms, rendered, that
the images are compared with; one file of a few MB that `run` needs beside this checkout. `run` makes the same images, from
the same masks and seeds, with each sampler and number of evaluations, all of one setting in one batch, and writes one JSON
line a setting; a line that is there is not made again. Its seeds and guidance are those of `maisi generate`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from maisi_cli import catalog, decoding, distances, masks, networks, sampling, weights
from maisi_cli.errors import MaisiError, UsageError
from maisi_cli.features import Extractor, features_of, open_extractor
from maisi_cli.files import refuse_overwriting
from maisi_cli.geometry import Geometry
from maisi_cli.phantom import body, render
from maisi_cli.plugins import plugins
from maisi_cli.seeds import derive
from maisi_cli.slices import PLANES, Profile
from maisi_cli.slices import profile as find_profile
from maisi_cli.volumes import AIR_HU, Mask, Volume
from torch import Tensor

SAMPLERS = ("rflow", "ab2", "heun", "dpm++", "unipc")
EVALUATIONS = (4, 6, 8, 10, 12, 15, 20, 30)
REGIONS = ("chest", "abdomen")
EXACT_STEPS = 100
HELD_OUT = 1  # added to the seed: other people

Rows = dict[str, np.ndarray]
"""Features of volumes by plane, (volumes, slices, size)."""


# --- prepare: on a CPU ----------------------------------------------------------------------------


def prepare(folder: Path, *, count: int, held_out: int, size: tuple[int, int, int], spacing: float, seed: int) -> Path:
    """Write masks, and the features of the same and of other phantoms rendered as CT, to one .npz; what is there stays."""
    path = folder / "sampler_curve.npz"
    refuse_overwriting(path, force=False)
    folder.mkdir(parents=True, exist_ok=True)
    grid = Geometry(size=size, spacing=(spacing, spacing, spacing))
    extractor, profile = open_extractor(), find_profile("ct")
    arrays: dict[str, Any] = {}
    for name, number, run in (("same", count, seed), ("held_out", held_out, seed + HELD_OUT)):
        people = [body(grid, derive(run, index, 0, "mask"), regions=REGIONS) for index in range(number)]
        found = [features_of(render(mask, derive(run, index, 0, "render")), extractor, profile) for index, mask in enumerate(people)]
        arrays |= {f"{name}_{plane}": np.stack([each[plane] for each in found]).astype(np.float16) for plane in PLANES}
        if name == "same":
            arrays["masks"] = np.stack([mask.array for mask in people])
    about = {"seed": seed, "spacing": spacing, "extractor": extractor.sha256, "profile": profile.sha256}
    np.savez_compressed(path, about=json.dumps(about), **arrays)
    return path


# --- run: where the networks are fast -------------------------------------------------------------


def load_inputs(folder: Path, extractor: Extractor, profile: Profile) -> tuple[dict[str, Any], list[Mask], Rows, Rows]:
    """Return what `prepare` wrote: what was asked for, masks, and the features of the same and of the held-out phantoms."""
    path = folder / "sampler_curve.npz"
    if not path.is_file():
        raise UsageError(f"there is no {path}", hint="write it first, with  prepare --inputs")
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(str(arrays["about"]))
        if (about["extractor"], about["profile"]) != (extractor.sha256, profile.sha256):
            raise UsageError(f"{path} was made with another feature extractor or profile", hint="prepare it anew")
        grid = Geometry(size=arrays["masks"].shape[1:], spacing=(about["spacing"],) * 3)
        people = [Mask(array=array, geometry=grid) for array in arrays["masks"]]
        same, held_out = ({plane: arrays[f"{name}_{plane}"].astype(np.float32) for plane in PLANES} for name in ("same", "held_out"))
    return about, people, same, held_out


class Maker:
    """Makes the images of all masks at once with a sampler and a number of steps, as `maisi generate` makes each."""

    def __init__(self, model: str, people: Sequence[Mask], seed: int, *, device: str, dtype: str) -> None:
        self.spec, self.people = catalog.model(model), people
        where = networks.device_named(device)
        parts = self.spec.parts_for("paired")
        self.networks = networks.load(self.spec, parts, device=where, precision=networks.Precision.named(dtype, where),
                                      files=weights.locate(self.spec, parts))  # fmt: skip
        fitted = [masks.conditioned(mask, self.spec) for mask in people]
        grid = fitted[0].shown.geometry
        if grid != people[0].geometry:
            raise UsageError(f"{self.spec.name} does not take {people[0].geometry}", hint="prepare the inputs with another --size")
        self.size = grid.latent_size(self.spec.latent_factor)
        shape = (1, self.spec.latent_channels, *self.size)
        noise = [sampling.initial_noise(shape, derive(seed, index)) for index in range(len(people))]
        self.noise = torch.cat(noise).to(where)
        condition = networks.Condition(
            spacing_mm=grid.spacing, modality=catalog.modality("ct").id, top_region=fitted[0].top_region,
            bottom_region=fitted[0].bottom_region, cfg_mask=float(self.spec.defaults.get("cfg_mask", 0)),
            labels=torch.from_numpy(np.stack([each.shown.array for each in fitted])[:, None]),
        )  # fmt: skip
        self.denoise = self.networks.denoiser(condition)

    def latents(self, sampler: sampling.Sampler, steps: int) -> Tensor:
        """Return the latents of all masks, (masks, channels, x, y, z)."""
        base = int(self.spec.scheduler.get("base_voxels", 32**3))
        return sampler(self.denoise, self.noise, sampling.flow_schedule(steps, self.size, base_voxels=base))

    def images(self, latents: Tensor) -> Iterator[Volume]:
        """Yield the image of each latent, with air outside of the body."""
        for mask, latent in zip(self.people, latents.split(1), strict=True):
            array = decoding.to_hu(decoding.decode(self.networks, latent, decoder="exact", sweeps="store"), "ct")
            yield Volume(array=np.where(mask.array == 0, np.float32(AIR_HU), np.rint(array)), geometry=mask.geometry, modality="ct")


def run(
    folder: Path, out: Path, *, samplers: Sequence[str], evaluations: Sequence[int], model: str = "nano-ct", device: str = "auto",
    dtype: str = "auto", resamples: int = 60, exact_steps: int | None = None, say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Append a line to `out` for each sampler and number of evaluations that it does not have."""
    extractor, profile = open_extractor(), find_profile("ct")
    about, people, same, held_out = load_inputs(folder, extractor, profile)
    maker = Maker(model, people, about["seed"], device=device, dtype=dtype)
    where = maker.networks.device
    extractor.to(where)
    card = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    head = {"model": maker.spec.name, "inputs": about, "size": list(people[0].geometry.size), "images": len(people),
            "held_out": len(held_out["xy"]), "dtype": maker.networks.precision.name, "device": card, "resamples": resamples,
            "features": extractor.name, "cfg_mask": float(maker.spec.defaults.get("cfg_mask", 0))}  # fmt: skip
    done = started(out, head)
    if "rendered" not in {line["sampler"] for line in done}:
        append(out, {"sampler": "rendered", **fid(held_out, same, resamples)})
    wanted_exact = EXACT_STEPS if exact_steps is None else exact_steps
    exact = maker.latents(sampling.heun, wanted_exact) if wanted_exact else None
    for wanted in sorted(evaluations, reverse=True):
        for name in samplers:
            sampler = plugins().registry("samplers").get(name)
            steps = steps_for(sampler, wanted)
            if any((line["sampler"], line.get("steps")) == (name, steps) for line in done):
                continue
            start = time.perf_counter()
            latents = maker.latents(sampler, steps)
            error = None if exact is None else float((latents - exact).square().mean().sqrt() / exact.std())
            made = [features_of(image, extractor, profile, device=where) for image in maker.images(latents)]
            found = {"sampler": name, "steps": steps, "evaluations": sampling.evaluations_of(sampler, steps), "path_error": error,
                     **fid(held_out, {plane: np.stack([each[plane] for each in made]) for plane in PLANES}, resamples)}  # fmt: skip
            append(out, found)
            done.append(found)
            say(f"{name:6} {found['evaluations']:3} evaluations  FID {found['fid']:8.2f}  {time.perf_counter() - start:.1f} s")


def steps_for(sampler: sampling.Sampler, evaluations: int) -> int:
    """Return the largest number of steps that asks the network at most so many times, and at least one."""
    return max((steps for steps in range(1, evaluations + 1) if sampling.evaluations_of(sampler, steps) <= evaluations), default=1)


def fid(real: Rows, made: Rows, resamples: int) -> dict[str, Any]:
    """Return the FID averaged over the planes and its 95 % interval from resampling the volumes of both, as `maisi fid` does.

    Equal numbers of volumes are drawn alike in every call: `resampled` of two settings differ by the setting alone.
    """
    draws = [distances.bootstrap_weights(len(each["xy"]), resamples, k) for k, each in enumerate((real, made))]
    planes, samples = {}, np.zeros((resamples, len(PLANES)))
    for column, plane in enumerate(PLANES):
        sides = [[distances.Moments.of(volume) for volume in each[plane]] for each in (real, made)]
        whole = [distances.weighted(parts, np.ones((1, len(parts))))[0] for parts in sides]
        planes[plane] = distances.frechet(*whole)
        drawn = (distances.weighted(parts, weights) for parts, weights in zip(sides, draws, strict=True))
        samples[:, column] = [distances.frechet(one, other) for one, other in zip(*drawn, strict=True)]
    value, means = float(np.mean(list(planes.values()))), samples.mean(axis=1)
    low, high = (float(each) for each in np.percentile(means, (2.5, 97.5)) - means.mean())
    drawn = [round(float(each), 4) for each in means]
    return {"fid": value, "ci95": [max(0.0, value + low), value + high], "planes": planes, "resampled": drawn}


def started(out: Path, head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a file after its head, which is written to a new file. Raises `UsageError` for another head."""
    if not out.exists():
        append(out, head)
        return []
    first, *lines = read(out)
    if first != head:
        changed = sorted(key for key in {*first, *head} if first.get(key) != head.get(key))
        raise UsageError(f"{out} was made with another {', '.join(changed)}", hint="name another --out")
    return lines


def append(out: Path, line: Mapping[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file; a last one that was cut off is left out, and taken off the file."""
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")
    return [json.loads(line) for line in whole.splitlines()]


# --- plot -----------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 320, 56, 60, 34, 40
COLOURS = {"rflow": "#666666", "ab2": "#0072b2", "heun": "#e69f00", "dpm++": "#009e73", "unipc": "#cc79a7"}


def plot(lines: Sequence[Mapping[str, Any]]) -> str:
    """Draw FID with the intervals of its differences, and the distance from the exact path, against network evaluations, as SVG."""
    head, *rest = lines
    floor = next((line for line in rest if line["sampler"] == "rendered"), None)
    points = sorted((line for line in rest if line["sampler"] != "rendered"), key=lambda line: line["evaluations"])
    if not points:
        raise UsageError("there is nothing to draw", hint="run it first")
    title = f"{head['model']}, {head['images']} images of {'x'.join(map(str, head['size']))}"
    aside = f'<tspan font-weight="normal">; phantoms, rendered: FID {floor["fid"]:.2f}</tspan>' if floor else ""
    against = rival(points)
    spans = [tuple(against["fid"] + each for each in difference(line, against)[1:]) if against else tuple(line["ci95"]) for line in points]
    what = f"of the difference from rflow with {against['evaluations']}" if against else "of each"
    left = panel(points, "fid", f"FID ({head['features']}), 95 % interval {what}", spans)
    solved = [line for line in points if line["path_error"] is not None]
    right = panel(solved, "path_error", "distance from the exact path, in standard deviations") if solved else ""
    wide = 2 * WIDTH if solved else WIDTH
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {HEIGHT + 24}" font-family="sans-serif" font-size="12">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n<text x="{LEFT}" y="16" font-weight="bold">{title}{aside}</text>\n'
            f'<g transform="translate(0 20)">\n{left}\n</g>\n<g transform="translate({WIDTH} 20)">\n{right}\n</g>\n</svg>\n')  # fmt: skip


def rival(points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the line that others are compared with: `rflow` with the most evaluations."""
    return max((line for line in points if line["sampler"] == "rflow"), key=lambda line: line["evaluations"], default=None)


def difference(line: Mapping[str, Any], against: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the difference of two FIDs with its 95 % interval, of the same resamples on both sides: what all images share falls out."""
    value = line["fid"] - against["fid"]
    drawn = np.subtract(line["resampled"], against["resampled"])
    low, high = value + np.percentile(drawn, (2.5, 97.5)) - drawn.mean()
    return value, float(low), float(high)


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines as Markdown, with the difference of each FID from that of `rflow` with the most evaluations."""
    points = [line for line in lines[1:] if line["sampler"] != "rendered"]
    against = rival(points)
    rows = ["| sampler | evaluations | FID | less that of rflow | distance from the exact path |", "|---|---|---|---|---|"]
    for line in sorted(points, key=lambda line: (line["sampler"], line["evaluations"])):
        apart = ""
        if against is not None and line is not against:
            value, low, high = difference(line, against)
            apart = f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
        low, high = line["ci95"]
        found = f"{line['fid']:.2f} ({low:.2f} to {high:.2f})"
        solved = "" if line["path_error"] is None else f"{line['path_error']:.4f}"
        rows.append(f"| `{line['sampler']}` | {line['evaluations']} | {found} | {apart} | {solved} |")
    return "\n".join(rows)


def panel(points: Sequence[Mapping[str, Any]], key: str, title: str, spans: Sequence[tuple[float, ...]] = ()) -> str:
    """Draw one quantity, both axes logarithmic; `spans` are the intervals of the points."""
    values = [line[key] for line in points] + [value for span in spans for value in span]
    known = [value for value in values if 0 < value < math.inf]
    low, high = min(known) / 1.1, max(known) * 1.1
    if not known:
        return f'<text x="{LEFT}" y="20">{title}: 0</text>'
    first, last = points[0]["evaluations"] / 1.1, points[-1]["evaluations"] * 1.1

    def across(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / first) / math.log(last / first), 1)

    def up(value: float) -> float:
        share = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    axes = f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"
    out = [f'<text x="{LEFT}" y="20">{title}</text>', f'<path d="{axes}" fill="none" stroke="black"/>',
           f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">network evaluations</text>']  # fmt: skip
    for tick in EVALUATIONS:
        if first <= tick <= last:
            out.append(f'<text x="{across(tick)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick}</text>')
    for tick in ticks(low, high):
        out.append(f'<path d="M{LEFT} {up(tick)}H{WIDTH - RIGHT}" stroke="#dddddd"/>'
                   f'<text x="{LEFT - 6}" y="{up(tick) + 4}" text-anchor="end">{tick:g}</text>')  # fmt: skip
    for k, name in enumerate(dict.fromkeys(line["sampler"] for line in points)):
        own, colour = [line for line in points if line["sampler"] == name], COLOURS.get(name, "#d55e00")
        path = " ".join(f"{across(line['evaluations'])},{up(line[key])}" for line in own)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for line, span in zip(points, spans, strict=False):
            if line["sampler"] == name:
                out.append(f'<path d="M{across(line["evaluations"])} {up(span[0])}V{up(span[1])}" stroke="{colour}" opacity="0.5"/>')
        for line in own:
            out.append(f'<circle cx="{across(line["evaluations"])}" cy="{up(line[key])}" r="3" fill="{colour}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 8}" y="{TOP + 14 + 15 * k}" fill="{colour}">{name}</text>')
    return "\n".join(out)


def ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two values, or where those are few, round numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high]
    if len(found) > 2 or not low < high:
        return found
    step = 2 * 10.0 ** math.floor(math.log10((high - low) / 2))
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    doing = parser.add_subparsers(dest="do", required=True)
    first = doing.add_parser("prepare", help="paint the phantoms, on a CPU")
    first.add_argument("--inputs", type=Path, required=True, metavar="DIR")
    first.add_argument("--count", type=int, default=24, help="images")
    first.add_argument("--held-out", type=int, default=32, help="phantoms to compare with")
    first.add_argument("--size", type=int, nargs=3, default=(128, 128, 96))
    first.add_argument("--spacing", type=float, default=3.0, help="mm; at 3 nothing is resampled for the FID")
    first.add_argument("--seed", type=int, default=0)
    second = doing.add_parser("run", help="make images and measure")
    second.add_argument("--inputs", type=Path, required=True, metavar="DIR")
    second.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    second.add_argument("--samplers", nargs="+", default=SAMPLERS)
    second.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    second.add_argument("--model", default="nano-ct")
    second.add_argument("--device", default="auto")
    second.add_argument("--dtype", default="auto")
    second.add_argument("--resamples", type=int, default=60, help="of the interval")
    second.add_argument("--exact-steps", type=int, help="of the path to measure from, 100 of heun; 0: not measured")
    third = doing.add_parser("plot", help="draw the lines as SVG, and print them as a Markdown table")
    third.add_argument("lines", type=Path)
    third.add_argument("--out", type=Path, required=True, metavar="FILE.svg")
    chosen = vars(parser.parse_args(arguments))
    do, inputs = chosen.pop("do"), chosen.pop("inputs", None)
    try:
        if do == "prepare":
            print(prepare(inputs, **{**chosen, "size": tuple(chosen["size"])}))
        elif do == "run":
            run(inputs, **chosen)
        else:
            lines = read(chosen["lines"])
            chosen["out"].write_text(plot(lines), "utf-8")
            print(table(lines))
    except MaisiError as error:
        parser.exit(error.exit_code, f"error: {error.message}\nhint: {error.hint}\n")


if __name__ == "__main__":
    main()
