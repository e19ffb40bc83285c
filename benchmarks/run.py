"""MONAI's own path against ours, in one run on one device: seconds, peak memory, ratios and differences, as one table.

    python benchmarks/run.py --quick                                   # two cores, small sizes, five minutes
    python benchmarks/run.py --device cuda --out benchmarks/RESULTS.md # a GPU: every published row of the reference
    python benchmarks/run.py --quick --groups decode --rows 128x128x128 # one group, a volume of one's own
    python benchmarks/run.py --quick --groups train                    # steps of training; see train_step.py for more of it
    python benchmarks/run.py --device cuda --rows 512x512x512 --memory-cap 8

Networks are those of `rflow-ct` at full width with random weights. Every line is a process of its own, so that its peak is its own:
on CUDA what torch reserved, on a processor what the resident set rose by, with a C library on both sides that gives freed tensors
back. `--memory-cap` lets torch have no more. The first line of a group is what the ratios are to. Differences are to the whole
volume in float32, as a share of its range.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "rflow-ct"
QUICK = ("128x128x64",)
GROUPS = ("decode", "denoise", "train", "latents", "write", "fid")
HEADER = "| path | seconds | times faster | peak GiB | times less | max difference | mean |"
Call = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the table: `side` of a group for a volume, and what it is run with."""

    group: str
    side: str
    size: tuple[int, int, int]
    device: str
    window: tuple[int, int, int] | None = None
    splits: int = 1
    overlap: float = 0.4
    rounds: int = 2
    cap_gib: float | None = None
    keep: bool = False


# --- which lines ------------------------------------------------------------------------------------


def cases(asked: argparse.Namespace) -> Iterator[Case]:
    """Yield the lines that are asked for, those that ratios are to first in their group."""
    from maisi_cli.geometry import parse_size

    import train_step

    for size, window, splits, overlap in rows(asked):
        common = {"size": size, "device": asked.device, "overlap": overlap, "cap_gib": asked.memory_cap, "rounds": asked.rounds}
        if "decode" in asked.groups:
            yield from decoders(common, window, splits, quick=asked.quick)
        if "denoise" in asked.groups:
            yield Case(group="denoise", side="MONAI, as it comes", keep=True, **common)
            if asked.device == "cpu":
                yield Case(group="denoise", side="MONAI, autocast", **common)
            yield Case(group="denoise", side="maisi", **common)
    if "train" in asked.groups:
        for part, size in {part: parse_size(text) for part, text in (train_step.QUICK if asked.quick else train_step.FULL).items()}.items():
            for side in train_step.SIDES:
                yield Case(group=f"train {part}", side=side, size=size, device=asked.device, cap_gib=asked.memory_cap, rounds=asked.rounds)
    if "latents" in asked.groups:
        size = (256, 256, 128) if asked.quick else (512, 512, 512)
        for side in ("nibabel, float32 .nii.gz", "maisi, float16 .npy"):
            yield Case(group="latents", side=side, size=size, device="cpu", rounds=5)
    if "write" in asked.groups:
        size = parse_size((asked.rows or ["256x256x256"])[0]) if asked.quick else (512, 512, 512)
        for side in ("nibabel, float32", "maisi, int16"):
            yield Case(group="write", side=side, size=size, device="cpu", rounds=2)
    if "fid" in asked.groups:
        yield Case(group="fid", side="MONAI", size=(128, 128, 96), device="cpu")
        yield Case(group="fid", side="maisi", size=(128, 128, 96), device="cpu")


def decoders(common: dict[str, Any], window: tuple[int, int, int], splits: int, *, quick: bool) -> Iterator[Case]:
    """Yield the decoders of one volume."""
    windows = Case(group="decode", side="MONAI, windows, autocast", window=window, splits=splits, **common)
    whole = Case(group="decode", side="MONAI, whole, autocast", **common)
    if quick:
        yield Case(group="decode", side="MONAI, whole, fp32", keep=True, **common)
        yield whole
        yield windows
    else:
        yield Case(group="decode", side="maisi, store, fp32", keep=True, **{**common, "cap_gib": None})
        yield windows
    for mode in ("store", "half", "recompute"):
        yield Case(group="decode", side=f"maisi, {mode}", **common)


def rows(asked: argparse.Namespace) -> list[tuple[tuple[int, int, int], tuple[int, int, int], int, float]]:
    """Return volumes with the window, splits and overlap that the reference has for them: published rows, or any where it is `quick`."""
    from maisi_cli.geometry import parse_size
    from maisi_cli.planning import measured_rows

    if asked.quick:
        sizes = [parse_size(text) for text in asked.rows or QUICK]
        return [(size, tuple(max(8, n // 8) for n in size), 1, 0.4) for size in sizes]  # type: ignore[misc]
    found = [(tuple(row["size"]), tuple(row["window"]), int(row["splits"]), float(row["overlap"])) for _, row in measured_rows()]
    wanted = None if asked.rows is None else {parse_size(text) for text in asked.rows}
    return [row for row in found if wanted is None or row[0] in wanted]  # type: ignore[misc]


# --- one line, in a process of its own ---------------------------------------------------------------


def measured(case: Case, kept: Path) -> dict[str, Any]:
    """Return seconds (the best of some rounds), peak GiB, and the differences from what is kept."""
    import torch

    torch.manual_seed(0)
    if case.device == "cuda" and case.cap_gib is not None:
        torch.cuda.set_per_process_memory_fraction(case.cap_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    if case.device == "cpu":
        from maisi_cli import inference

        inference.free_at_once()
    group = case.group.split()[0]
    run = {
        "decode": decoding_call,
        "denoise": denoising_call,
        "train": training_call,
        "latents": latents_call,
        "write": writing_call,
        "fid": fid_call,
    }[group](case)
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    best, peak, made = float("inf"), 0.0, None
    for _ in range(case.rounds):
        made = None
        with Watch(case.device) as watch:
            started = time.perf_counter()
            made = run()
            if case.device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        peak = max(peak, watch.peak_gib)
    found: dict[str, Any] = {"seconds": best, "peak_gib": peak}
    if isinstance(made, torch.Tensor):
        array = made.float().cpu().numpy()
        if case.keep:
            np.save(kept, array)
        elif kept.exists():
            exact = np.load(kept, mmap_mode="r")
            spread = float(exact.max() - exact.min())
            difference = np.abs(array - exact)
            found |= {"max": float(difference.max()) / spread, "mean": float(difference.mean(dtype=np.float64)) / spread}
    elif isinstance(made, float):
        found["value"] = made
        if not kept.exists():
            np.save(kept, made)
        else:
            found["max"] = abs(made - float(np.load(kept))) / abs(made)
    return found


class Watch:
    """The peak memory inside of the block: what torch reserved on CUDA, else the rise of the resident set."""

    def __init__(self, device: str) -> None:
        self.device, self.peak_gib, self._done = device, 0.0, False

    def __enter__(self) -> Watch:
        if self.device == "cpu":
            self._before = resident()
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cpu":
            self._done = True
            self._thread.join()
        else:
            import torch

            self.peak_gib = torch.cuda.max_memory_reserved() / 2**30

    def _look(self) -> None:
        while not self._done:
            self.peak_gib = max(self.peak_gib, (resident() - self._before) / 2**30)
            time.sleep(0.002)


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def decoding_call(case: Case) -> Call:
    """Return what decodes a latent of random numbers."""
    import torch
    from maisi_cli import decoding, inference, networks
    from maisi_cli.catalog import model

    spec, device = model(MODEL), torch.device(case.device)
    latent = torch.randn(1, spec.latent_channels, *[n // 4 for n in case.size], generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    if case.side.startswith("maisi"):
        name = "fp32" if case.side.endswith("fp32") else "auto"
        precision = networks.Precision.named(name, device)
        vae = inference.laid_out(networks.build(spec.networks["vae"]).requires_grad_(False).eval(), precision.dtype, device)
        nets = networks.Networks(spec=spec, parts={"vae": vae}, scale_factor=1.0, device=device, precision=precision)
        mode = case.side.split(", ")[1]
        return lambda: decoding.decode(nets, latent, decoder="exact", sweeps=mode)
    vae = monai_vae(spec, case, half_norms=device.type == "cuda").to(device)
    autocast = torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16, enabled="fp32" not in case.side)

    def decode(z: Any) -> Any:
        return vae.decode_stage_2_outputs(z)

    def run() -> Any:
        with torch.inference_mode(), autocast:
            if case.window is None or np.prod(case.window) >= np.prod(latent.shape[2:]):
                return decode(latent.to(device))
            from monai.inferers import SlidingWindowInferer

            roi = [min(w, n) for w, n in zip(case.window, latent.shape[2:], strict=True)]
            inferer = SlidingWindowInferer(roi, sw_batch_size=1, overlap=case.overlap, mode="gaussian", sw_device=device, device="cpu")
            return inferer(latent, decode)

    return run


def monai_vae(spec: Any, case: Case, *, half_norms: bool) -> Any:
    """Return MONAI's autoencoder as the reference configures it."""
    from maisi_cli import networks

    vae = networks.build(dataclasses.replace(spec.networks["vae"], arguments={**spec.networks["vae"].arguments, "num_splits": case.splits}),
                         fast=False)  # fmt: skip
    if half_norms:
        for module in vae.modules():
            if hasattr(module, "norm_float16"):
                module.norm_float16 = True
    return vae.requires_grad_(False).eval()


def denoising_call(case: Case) -> Call:
    """Return what makes one step of the diffusion model with its ControlNet; embedding of the mask and warming up are done before."""
    import torch
    from maisi_cli import inference, networks
    from maisi_cli.catalog import model
    from maisi_cli.testing import filled

    spec, device = model(MODEL), torch.device(case.device)
    rng = torch.Generator().manual_seed(1)
    latent = torch.randn(1, spec.latent_channels, *[n // 4 for n in case.size], generator=rng).to(device)
    labels = torch.randint(0, 133, (1, 1, *case.size), generator=rng, dtype=torch.uint8)
    ours = case.side == "maisi"
    parts = {}
    for name in ("unet", "controlnet"):
        torch.manual_seed(0)
        network = filled(networks.build(spec.networks[name], fast=ours)).requires_grad_(False).eval()
        parts[name] = inference.laid_out(network, networks.Precision.named("auto", device).dtype, device) if ours else network.to(device)
    if ours:
        nets = networks.Networks(
            spec=spec, parts=parts, scale_factor=1.0, device=device, precision=networks.Precision.named("auto", device)
        )
        denoise = nets.denoiser(networks.Condition(spacing_mm=(1.0, 1.0, 2.0), labels=labels))
        step = nets.capture()(denoise)
        for time_ in (900.0, 800.0):
            step(latent, torch.tensor(time_))
        return lambda: step(latent, torch.tensor(700.0))
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=device.type == "cuda" or "autocast" in case.side)
    bits = networks.binarise(labels, dtype=torch.float32).to(device)
    small = {"timesteps": torch.tensor([700.0], device=device), "class_labels": torch.ones(1, dtype=torch.long, device=device)}
    spacing = torch.tensor([[100.0, 100.0, 200.0]], device=device)

    def run() -> Any:
        with torch.inference_mode(), autocast:
            down, middle = parts["controlnet"](x=latent, controlnet_cond=bits, **small)
            return parts["unet"](x=latent, spacing_tensor=spacing, down_block_additional_residuals=down,
                                 mid_block_additional_residual=middle, **small)  # fmt: skip

    run()
    return run


def training_call(case: Case) -> Call:
    """Return what makes one step of training, whose loss is compared; warming up is done before."""
    import train_step

    run, _ = train_step.step(case.group.split()[1], case.side, case.size, case.device)
    run()
    return lambda: float(run())


def latents_call(case: Case) -> Call:
    """Return what loads the latent of a volume, as float32 from gzip with channels last, or mapped from disk as float16."""
    rng = np.random.default_rng(0)
    size = [n // 4 for n in case.size]
    latent = rng.normal(0, 1, (4, *size)).astype(np.float32)
    folder = Path(tempfile.mkdtemp())
    if case.side.startswith("nibabel"):
        import nibabel

        nibabel.save(nibabel.Nifti1Image(np.moveaxis(latent, 0, -1), np.eye(4)), folder / "latent_emb.nii.gz")
        return lambda: np.moveaxis(np.asarray(nibabel.load(folder / "latent_emb.nii.gz").dataobj, np.float32), -1, 0)
    np.save(folder / "latent.npy", latent.astype(np.float16))
    return lambda: np.array(np.load(folder / "latent.npy", mmap_mode="r"))


def writing_call(case: Case) -> Call:
    """Return what writes a CT-like volume: smooth tissue with noise."""
    from maisi_cli.geometry import Geometry
    from maisi_cli.volumes import Volume, write_image

    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 200, [n // 8 for n in case.size])
    array = np.kron(coarse, np.ones((8, 8, 8))).astype(np.float32) + rng.normal(0, 15, case.size).astype(np.float32)
    folder = Path(tempfile.mkdtemp())
    if case.side.startswith("nibabel"):
        import nibabel

        return lambda: nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / "image.nii.gz")
    volume = Volume(array=array, geometry=Geometry(size=case.size, spacing=(1.0, 1.0, 1.0)), modality="ct")
    return lambda: write_image(volume, folder / "image.nii.gz", force=True)


def fid_call(case: Case) -> Call:
    """Return what compares features of two sets of 24 volumes in three planes."""
    import torch
    from maisi_cli import distances

    rng = np.random.default_rng(0)
    sides = [rng.normal(k / 10, 1, (24, case.size[2], 128)).astype(np.float32) for k in range(2)]
    if case.side == "maisi":

        def ours() -> float:
            parts = [[distances.Moments.of(volume) for volume in side] for side in sides]
            return float(distances.frechet(*(distances.weighted(each, np.ones((1, len(each))))[0] for each in parts)))

        return ours
    from monai.metrics import FIDMetric

    stacked = [torch.from_numpy(np.concatenate(side)) for side in sides]
    return lambda: float(FIDMetric()(stacked[1], stacked[0]))


# --- the table --------------------------------------------------------------------------------------


def table(found: Sequence[tuple[Case, dict[str, Any]]], *, head: str) -> str:
    """Return the lines as Markdown, by group and volume; ratios are to the first line of MONAI's or nibabel's with a time."""
    lines = [head, ""]
    groups: dict[tuple[Any, ...], list[tuple[Case, dict[str, Any]]]] = {}
    for case, _ in found:
        groups.setdefault((case.group, case.size, case.window if case.group == "decode" and case.window else None), [])
    for case, row in found:
        next(rows for key, rows in groups.items() if key[:2] == (case.group, case.size)).append((case, row))
    for (group, size, _), members in groups.items():
        if not members:
            continue
        lines += [f"**{group}, {'x'.join(map(str, size))}**", "", HEADER, "|---|---|---|---|---|---|---|"]
        base = next((row for case, row in members if "seconds" in row and not case.side.startswith("maisi")), {})
        for case, row in members:
            if "error" in row:
                lines.append(f"| {case.side} | {row['error']} | | | | | |")
                continue
            faster = f"{base['seconds'] / row['seconds']:.2f}" if base else ""
            less = f"{base['peak_gib'] / row['peak_gib']:.2f}" if base and row["peak_gib"] > 0.001 else ""
            apart = [f"{row[key]:.2g}" if key in row else "" for key in ("max", "mean")]
            lines.append(f"| {named(case)} | {row['seconds']:.3g} | {faster} | {row['peak_gib']:.2f} | {less} | {apart[0]} | {apart[1]} |")
        lines.append("")
    return "\n".join(lines)


def named(case: Case) -> str:
    """Return the name of a line, with the window."""
    if case.window is None:
        return case.side
    return f"{case.side} ({'x'.join(map(str, case.window))}, overlap {case.overlap:g}, {case.splits} splits)"


def device_name(device: str) -> str:
    """Return what the device is called."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, for a processor")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", nargs="+", metavar="XxYxZ", help="only these volumes; with --quick any")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--memory-cap", type=float, metavar="GIB", help="what torch may have of a GPU")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="add the table to a file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        given = json.loads(asked.one)
        kept = Path(given.pop("kept"))
        lists = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        print(json.dumps(measured(Case(**lists), kept)))
        return
    if asked.device == "cpu" and not asked.quick:
        parser.error("on a processor use --quick: full sizes take hours with MONAI's path")
    found: list[tuple[Case, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(asked):
            kept = Path(folder) / f"{case.group}-{'x'.join(map(str, case.size))}.npy"
            text = json.dumps({**dataclasses.asdict(case), "kept": str(kept)})
            done = subprocess.run([sys.executable, __file__, "--one", text], capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                row: dict[str, Any] = {"error": "out of memory" if "OutOfMemory" in last else f"failed: {last[:120]}"}
            else:
                row = json.loads(done.stdout.splitlines()[-1])
            found.append((case, row))
            print(f"{case.group} {'x'.join(map(str, case.size))} {case.side}: {row}", file=sys.stderr, flush=True)
    import torch

    cap = f", torch held to {asked.memory_cap:g} GiB" if asked.memory_cap else ""
    head = f"## {datetime.datetime.now(datetime.UTC).date()}, {device_name(asked.device)}{cap}, torch {torch.__version__}"
    made = table(found, head=head)
    print(made)
    if asked.out is not None:
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(f"\n{made}\n")


if __name__ == "__main__":
    main()
