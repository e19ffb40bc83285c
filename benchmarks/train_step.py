"""One step of training, MONAI's modules against ours: seconds, ratios, and how far loss and gradients are from float32's.

    python benchmarks/train_step.py --quick      # two cores, minutes
    python benchmarks/train_step.py --what vae --size 64x64x64 --rounds 4
    python benchmarks/train_step.py --what unet controlnet --size 128x128x64

Networks are those of `rflow-ct` at full width with the same random weights on every side: MONAI's modules as they come in float32,
the same under autocast to bfloat16 (on CUDA as well), and what `train` uses under the same autocast: `maisi_cli.fast_training` where
it pays, which on a processor is in autoencoders alone. A step is a forward pass, a loss and a backward pass; the optimiser is the same
for all and left out. Sides take turns, so that what else the machine does falls on all of them; seconds are the least of some rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

MODEL = "rflow-ct"
SIDES = ("MONAI, fp32", "MONAI, autocast", "maisi")
QUICK = {"vae": "32x32x32", "unet": "128x128x64", "controlnet": "128x128x64"}
FULL = {"vae": "64x64x64", "unet": "128x128x128", "controlnet": "128x128x128"}
Step = Callable[[], Any]


def step(what: str, side: str, size: tuple[int, int, int], device: str) -> tuple[Step, torch.nn.Module]:
    """Return what makes a step and gives its loss, and the network whose gradients it leaves.

    `size` is that of the patch of a `vae`; of the volume whose latent a `unet` is trained on, or a `controlnet` with the frozen model.
    """
    from maisi_cli import networks
    from maisi_cli.catalog import model
    from maisi_cli.fast_training import pays, trainable
    from maisi_cli.testing import filled

    spec, ours = model(MODEL), side.startswith("maisi")
    found: dict[str, Any] = {}
    for name in ("unet", "controlnet") if what == "controlnet" else (what,):
        torch.manual_seed(0)
        described = spec.networks[name]
        if name == "vae":  # splitting convolutions costs MONAI time, and drops voxels where a patch does not divide
            described = dataclasses.replace(described, arguments={**described.arguments, "num_splits": 1, "save_mem": False})
        network = filled(networks.build(described, fast=ours)).to(device)
        found[name] = trainable(network) if ours and pays(network, torch.device(device)) else network
    if what == "controlnet":
        found["unet"].requires_grad_(False).eval()
    trained = found[what]
    half = contextlib.nullcontext() if "fp32" in side else torch.autocast(device, torch.bfloat16)
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(1, 1, *size, generator=rng).to(device)
    latent = torch.randn(1, spec.latent_channels, *(n // spec.latent_factor for n in size), generator=rng).to(device)
    labels = torch.randint(0, 133, (1, 1, *size), generator=rng, dtype=torch.uint8).to(device)
    known = {"timesteps": torch.tensor([700.0], device=device), "class_labels": torch.ones(1, dtype=torch.long, device=device)}
    spacing = torch.tensor([[100.0, 100.0, 200.0]], device=device)

    def loss() -> Any:
        if what == "vae":
            torch.manual_seed(2)
            made, mean, sigma = trained(image)
            kl = (mean.float().square() + sigma.float().square() - sigma.float().square().log() - 1).mean()
            return (made.float() - image).abs().mean() + 1e-3 * kl
        more: dict[str, Any] = {}
        if what == "controlnet":
            down, middle = found["controlnet"](x=latent, controlnet_cond=networks.binarise(labels), **known)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return (found["unet"](x=latent, spacing_tensor=spacing, **known, **more).float() - latent).square().mean()

    def run() -> Any:
        trained.zero_grad(set_to_none=True)
        with half:
            value = loss()
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return value.detach()

    return run, trained


def compared(what: str, size: tuple[int, int, int], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return by side: seconds (the least of the rounds), the loss, and the gradient's distance from float32's, relative."""
    found: dict[str, dict[str, float]] = {}
    runs, exact = {}, None
    for side in SIDES:
        run, network = step(what, side, size, device)
        value = float(run())
        gradient = torch.cat([weights.grad.float().flatten().cpu() for weights in network.parameters() if weights.grad is not None])
        exact = gradient if exact is None else exact
        found[side] = {"seconds": float("inf"), "loss": value, "gradient": float((gradient - exact).norm() / exact.norm())}
        network.zero_grad(set_to_none=True)
        runs[side] = run, network
    for _ in range(rounds):
        for side, (run, network) in runs.items():
            started = time.perf_counter()
            run()
            found[side]["seconds"] = min(found[side]["seconds"], time.perf_counter() - started)
            network.zero_grad(set_to_none=True)
    return found


def table(what: str, size: str, found: dict[str, dict[str, float]]) -> str:
    """Return the sides as Markdown."""
    ours = found["maisi"]["seconds"]
    lines = [f"**{what}, {size}**", "", "| side | seconds | of ours | loss | gradient's difference |", "|---|---|---|---|---|"]
    lines += [f"| {side} | {row['seconds']:.3f} | {row['seconds'] / ours:.2f}x | {row['loss']:.6f} | {row['gradient']:.2g} |"
              for side, row in found.items()]  # fmt: skip
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure and print."""
    from maisi_cli import inference
    from maisi_cli.geometry import parse_size

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(FULL), choices=list(FULL))
    parser.add_argument("--size", metavar="XxYxZ", help="of a patch or a volume, in voxels")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.device == "cpu":
        inference.free_at_once()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {asked.device}", file=sys.stderr)
    for what in asked.what:
        size = asked.size or (QUICK if asked.quick else FULL)[what]
        print(table(what, size, compared(what, parse_size(size), asked.device, asked.rounds)), flush=True)


if __name__ == "__main__":
    main()
