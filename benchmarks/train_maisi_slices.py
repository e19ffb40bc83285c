"""Train `maisi-slices`, the feature extractor that comes with maisi, on slices of phantoms.

    OMP_NUM_THREADS=1 python benchmarks/train_maisi_slices.py --out maisi_cli/data/models/maisi-slices

No data is needed: `maisi_cli.phantom` paints the bodies and renders them as CT. The network learns from a slice which
organs it shows and how large they are, which plane it lies in, and by how much it was blurred, made noisy or shifted in HU,
so that its features tell apart what differs in anatomy as well as in quality. One core needs about ten minutes; the same
seed, machine and thread count give the same file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from maisi_cli.backbones import SliceNet
from maisi_cli.geometry import Geometry
from maisi_cli.phantom import body, render
from maisi_cli.weights import save_state
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

REGIONS = (("chest",), ("abdomen",), ("chest", "abdomen"), ("abdomen", "lower"), ("head", "chest"), ("lower",))
SIDE, PER_PLANE, COMMON = 96, 24, 0.02
NOISE_HU, BLUR_VOXELS, SHIFT_HU = 120.0, 2.0, 150.0


def slices(seed: int, people: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return HU slices (N, 96, 96) int16, their labels uint8, and the plane of each (0 XY, 1 YZ, 2 ZX)."""
    images, labels, planes = [], [], []
    for person in range(people):
        rng = np.random.default_rng([seed, person])
        spacing = float(rng.uniform(3.0, 4.5))
        geometry = Geometry(size=(SIDE, SIDE, SIDE), spacing=(spacing, spacing, spacing))
        mask = body(geometry, int(rng.integers(2**31)), regions=REGIONS[person % len(REGIONS)])
        image = render(mask, int(rng.integers(2**31)))
        for plane, axis in enumerate((2, 0, 1)):
            for at in rng.choice(SIDE, PER_PLANE, replace=False):
                images.append(np.clip(np.rint(np.take(image.array, at, axis)), -1000, 1000).astype(np.int16))
                labels.append(np.take(mask.array, at, axis))
                planes.append(plane)
        if person % 10 == 9:
            print(f"{person + 1} of {people} phantoms", flush=True)
    return np.stack(images), np.stack(labels), np.array(planes)


def shares(labels: np.ndarray) -> np.ndarray:
    """Return the share of each slice that each label covers, (N, 256)."""
    return np.stack([np.bincount(each.ravel(), minlength=256) for each in labels]) / labels[0].size


def spoilt(batch: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return slices scaled to [-1, 1], half of them blurred, noisy, or shifted in HU, and by how much (0..1)."""
    out, amounts = np.empty(batch.shape, np.float32), np.zeros((len(batch), 3), np.float32)
    for k, each in enumerate(batch):
        image = each.astype(np.float32)
        if rng.random() < 0.5:
            amounts[k] = rng.random(3) * (rng.random(3) < 0.6)
            blur, noise, shift = amounts[k] * (BLUR_VOXELS, NOISE_HU, SHIFT_HU)
            sign = rng.choice((-1, 1))
            amounts[k, 2] *= sign
            if blur:
                image = ndimage.gaussian_filter(image, blur)
            if noise:
                image += rng.normal(0, noise, image.shape)
            image += sign * shift
        out[k] = np.clip(image, -1000, 1000) / 1000
    size = int(rng.integers(64, SIDE + 1))  # another field of view
    x, y = rng.integers(0, SIDE - size + 1, 2)
    return torch.from_numpy(out[:, None, x : x + size, y : y + size].copy()), torch.from_numpy(amounts)


class Heads(nn.Module):
    """What is read from the features: organs shown, their areas, the plane, and how the slice was spoilt."""

    def __init__(self, organs: int) -> None:
        super().__init__()
        self.organs, self.areas = nn.Linear(SliceNet.size, organs), nn.Linear(SliceNet.size, organs)
        self.plane, self.spoilt = nn.Linear(SliceNet.size, 3), nn.Linear(SliceNet.size, 3)


def main() -> None:
    """Make the slices, train, measure on phantoms that were held out, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--people", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    if options.people < 8:
        parser.error("one in eight phantoms is held out: use --people 8 or more")
    started = time.process_time()
    images, labels, planes = slices(options.seed, options.people)
    area = shares(labels)
    common = np.flatnonzero((area > 0).mean(0) > COMMON)
    common = common[common > 0]
    area = area[:, common].astype(np.float32)
    held = options.people // 8 * 3 * PER_PLANE  # the slices of whole people
    print(f"{len(images)} slices, {held} held out, {len(common)} organs, {time.process_time() - started:.0f} s of CPU", flush=True)

    torch.manual_seed(options.seed)
    rng = np.random.default_rng([options.seed, 1])
    network, heads = SliceNet(), Heads(len(common))
    parameters = [*network.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-3)
    steps = options.epochs * ((len(images) - held) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for epoch in range(options.epochs):
        network.train()
        order, losses = rng.permutation(np.arange(held, len(images))), []
        for start in range(0, len(order) // 64 * 64, 64):
            rows = order[start : start + 64]
            batch, amounts = spoilt(images[rows], rng)
            wanted = torch.from_numpy(area[rows])
            features = network(batch)
            loss = (F.binary_cross_entropy_with_logits(heads.organs(features), (wanted > 0).float())
                    + 10 * F.mse_loss(heads.areas(features), wanted.sqrt())
                    + 0.3 * F.cross_entropy(heads.plane(features), torch.from_numpy(planes[rows]))
                    + 2 * F.mse_loss(heads.spoilt(features), amounts))  # fmt: skip
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, {time.process_time() - started:.0f} s of CPU", flush=True)

    network.eval()
    with torch.inference_mode():
        clean = torch.from_numpy(np.clip(images, -1000, 1000).astype(np.float32) / 1000)[:, None]
        features = torch.cat([network(part) for part in clean[held:].split(64)])
        network.centre.copy_(features.mean(0))
        network.scale.copy_(features.std(0).clamp_min(0.02 * features.std(0).mean()))
        seen, truth = torch.cat([network(part) for part in clean[:held].split(64)]), torch.from_numpy(area[:held])
        raw = seen * network.scale + network.centre
        shown = ((heads.organs(raw) > 0) == (truth > 0)).float().mean().item()
        plane = (heads.plane(raw).argmax(1).numpy() == planes[:held]).mean()
        batch, amounts = spoilt(images[:held], np.random.default_rng(2))
        parts = [heads.spoilt(network(part) * network.scale + network.centre) for part in batch.split(64)]
        explained = 1 - ((torch.cat(parts) - amounts) ** 2).mean(0) / amounts.var(0)
    about = {"organs_right": round(shown, 4), "plane_right": round(float(plane), 4), "people": options.people,
             "explained": {name: round(float(each), 3) for name, each in zip(("blur", "noise", "shift"), explained, strict=True)},
             "slices": len(images), "seed": options.seed, "epochs": options.epochs,
             "cpu_seconds": round(time.process_time() - started)}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    save_state(options.out / "features.safetensors", network.state_dict(), metadata={})
    (options.out / "training.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    print(json.dumps(about), flush=True)


if __name__ == "__main__":
    main()
