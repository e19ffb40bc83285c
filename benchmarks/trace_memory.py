"""Write `maisi_cli/data/estimates.json`: traces of every stage of every model, as linear functions of the volume.

    python benchmarks/trace_memory.py                # a few minutes on one core; needs no GPU and no weights
    python benchmarks/trace_memory.py --only train-  # what is of these stages anew, the rest as it is

Each entry is fitted to traces at several sizes (least squares of the relative deviation); the largest deviation is printed and stored.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from maisi_cli import __version__, catalog, estimates, tracing
from maisi_cli.estimates import Figures

DTYPES = {2: torch.bfloat16, 4: torch.float32}
FULL = [(128, 128, 128), (256, 256, 128), (256, 256, 256), (512, 512, 128), (384, 384, 384), (512, 512, 512), (512, 512, 768)]
SMALL = [(64, 64, 64), (96, 96, 64), (128, 128, 128), (160, 160, 128), (256, 256, 256)]
PATCHES = [(32, 32, 32), (64, 64, 64), (96, 96, 96), (128, 128, 128)]
WINDOWS = [(48, 48, 64), (64, 64, 32), (64, 64, 64), (80, 80, 32), (64, 64, 48), (80, 80, 48), (80, 80, 80), (80, 80, 96)]
SPLITS = (1, 2, 4)  # more do not divide every window
FIELDS = ("peak_gib", "tflop", "attention_tflop", "moved_gb")


def fitted(name: str, features: Sequence[Sequence[float]], traces: Sequence[Figures]) -> dict[str, list[float]]:
    """Return the coefficients of each figure; print how far the worst trace is from them."""
    matrix, found, worst = np.array(features, dtype=float), {}, 0.0
    for field in FIELDS:
        values = np.array([getattr(trace, field) for trace in traces])
        if not values.any():
            found[field] = [0.0] * matrix.shape[1]
            continue
        weights = 1 / np.maximum(values, 1e-12)[:, None]
        scale = np.abs(matrix).max(axis=0)
        solved, *_ = np.linalg.lstsq(matrix / scale * weights, np.ones(len(values)), rcond=None)
        solved = solved / scale
        found[field] = [float(f"{c:.6g}") for c in solved]
        if field == "peak_gib":
            worst = float(np.abs(matrix @ solved / values - 1).max())
    print(f"{name:50} {len(traces)} traces, peak within {100 * worst:.1f} %", flush=True)
    return found


class Writer:
    """Collects entries; what is there already is not traced again."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}

    def add(self, key: str, sizes: Iterable[Any], features: Callable[[Any], Sequence[float]], trace: Callable[[Any], Figures]) -> None:
        if key not in self.entries:
            sizes = list(sizes)
            self.entries[key] = fitted(key, [features(size) for size in sizes], [trace(size) for size in sizes])


def trace_model(name: str, writer: Writer) -> None:
    spec = catalog.model(name)
    nets, factor = spec.networks, spec.latent_factor
    sizes = SMALL if name.startswith("nano") else FULL

    def latent(size: Sequence[int]) -> tuple[int, ...]:
        return tuple(n // factor for n in size)

    writer.add(estimates.key("resident", nets.values(), 4), [0], lambda _: [1.0], lambda _: Figures(peak_gib=_resident(spec)))
    for itemsize, dtype in DTYPES.items():
        for paired in (False, True) if "controlnet" in nets else (False,):
            used = [nets["unet"], *([nets["controlnet"]] if paired else [])]
            writer.add(estimates.key("denoise", used, itemsize), sizes, lambda size: estimates.latent_features(latent(size)),
                       lambda size, dtype=dtype, paired=paired: tracing.denoise_step(spec, latent(size), dtype, paired=paired))  # fmt: skip
        if "controlnet" in nets:
            net = nets["controlnet"]
            for device in ("cuda", "cpu"):
                writer.add(estimates.key(f"embed-{device}", [net], itemsize), sizes,
                           lambda size, i=itemsize, d=device, net=net: estimates.embedding_features(net, size, itemsize=i, device=d),
                           lambda size, dtype=dtype, d=device: tracing.embedding(spec, size, dtype, device=d))  # fmt: skip
        for mode in estimates.SWEEPS:
            for run in (tracing.decode, tracing.encode):
                writer.add(
                    estimates.key(f"{run.__name__}-{mode}", [nets["vae"]], itemsize),
                    [(size, device) for size in sizes for device in ("cuda", "cpu")],
                    lambda pair, i=itemsize, m=mode: estimates.volume_features(nets["vae"], pair[0], itemsize=i, device=pair[1], mode=m),
                    lambda pair, dtype=dtype, m=mode, run=run: run(spec, pair[0], dtype, device=pair[1], mode=m),
                )  # fmt: skip
            for device in ("cuda", "cpu") if "mask_vae" in nets else ():
                writer.add(estimates.key(f"mask-decode-{mode}-{device}", [nets["mask_vae"]], itemsize), [(256, 256, 256)], lambda _: [1.0],
                           lambda size, dtype=dtype, m=mode, d=device: tracing.decode(
                               spec, size, dtype, device=d, mode=m, part="mask_vae"))  # fmt: skip
        windows = WINDOWS if not name.startswith("nano") else [(8, 8, 8), (16, 16, 16), (24, 24, 24), (32, 32, 32)]
        writer.add(estimates.key("decode-window", [nets["vae"]], itemsize), windows, lambda w: estimates.latent_features(w)[:2],
                   lambda w, dtype=dtype: tracing.decode_window(spec, w, dtype))  # fmt: skip
        if "mask_unet" in nets:
            writer.add(estimates.key("mask-denoise", [nets["mask_unet"]], itemsize), [0], lambda _: [1.0],
                       lambda _, dtype=dtype: tracing.mask_step(spec, dtype))  # fmt: skip
    if not name.startswith("nano"):
        for splits in SPLITS:
            writer.add(estimates.key(f"reference-{splits}", [nets["vae"]], 2), WINDOWS, lambda w: estimates.latent_features(w)[:2],
                       lambda w, splits=splits: tracing.reference_decode(spec, w, splits))  # fmt: skip
        writer.add(estimates.key("reference-train-dm", [nets["unet"]], 2), sizes, lambda size: estimates.latent_features(latent(size)),
                   lambda size: tracing.train_step(spec, "dm", latent(size), fast=False))  # fmt: skip
    for kind, used in (("dm", ["unet"]), ("controlnet", ["unet", "controlnet"]), ("vae", ["vae"])):
        if any(part not in nets for part in used):
            continue
        for checkpointing in (False, True):
            stage = f"train-{kind}{'-checkpointing' if checkpointing else ''}"
            grid = PATCHES if kind == "vae" else sizes
            writer.add(estimates.key(stage, [nets[part] for part in used], 2), grid,
                       lambda size, kind=kind: estimates.latent_features(size if kind == "vae" else latent(size)),
                       lambda size, kind=kind, c=checkpointing: tracing.train_step(
                           spec, kind, size if kind == "vae" else latent(size), checkpointing=c))  # fmt: skip


def _resident(spec: catalog.ModelSpec) -> float:
    from maisi_cli.networks import build

    with torch.device("meta"):
        return sum(weights.numel() * 4 for net in spec.networks.values() for weights in build(net, fast=False).parameters()) / tracing.GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="those of the catalog")
    parser.add_argument("--only", metavar="PREFIX", help="trace the stages that begin so, and keep the other entries of the table")
    asked = parser.parse_args()
    writer = Writer()
    if asked.only:
        kept = json.loads(Path(estimates.TABLE).read_text("utf-8"))["entries"]
        writer.entries = {key: entry for key, entry in kept.items() if not key.startswith(asked.only)}
    for name in asked.models or ("rflow-ct", "ddpm-ct", "rflow-mr", "rflow-mr-brain", "nano-ct"):
        trace_model(name, writer)
    source = f"python benchmarks/trace_memory.py; maisi {__version__}, torch {torch.__version__}"
    text = json.dumps({"schema": "maisi.estimates/1", "source": source, "entries": writer.entries}, indent=1)
    Path(estimates.TABLE).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
