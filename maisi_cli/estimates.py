"""Memory and work of every stage, for any size, from a table of traces; and seconds, once a device was measured.

`data/estimates.json` holds, for each network and stage, how peak memory, operations and traffic grow with the volume: linear
functions fitted to traces of the real modules (`tracing`, written by `benchmarks/trace_memory.py`). A test traces afresh.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .catalog import ModelSpec, NetworkSpec
from .geometry import Size

TABLE = Path(__file__).parent / "data" / "estimates.json"
SLAB_BYTES = {"cpu": 2**25, "cuda": 2**29}
"""How large a slab of the exact decoder is: large enough for fast convolutions, small beside a volume or in a cache."""
SWEEPS = ("store", "half", "recompute")
MARGIN = 0.05
"""The share that a plan keeps free on top of what is predicted: workspaces of convolutions are not traced."""
REFERENCE_GIB = 3.8
"""What the reference holds beside networks, labels and activations: fitted to its nine published peaks, its only fitted number."""
REFERENCE_LABEL_BYTES = 24
"""Bytes a voxel of the reference's labels: 8 for the mask, 16 for its bits in float16."""
TRAINING_GIB = 0.4
"""What training holds beside weights, states and activations: fitted to the reference's six published peaks."""
_IGNORED = ("num_splits", "dim_split", "print_info", "save_mem", "use_flash_attention", "norm_float16", "use_checkpointing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Peak memory in GiB; work in TFLOP (10^12; a product and a sum are two), of which attention; traffic in GB (10^9)."""

    peak_gib: float
    tflop: float = 0.0
    attention_tflop: float = 0.0
    moved_gb: float = 0.0

    def times(self, count: int) -> Figures:
        """Return the figures of doing it `count` times, one after another."""
        return Figures(peak_gib=self.peak_gib, tflop=self.tflop * count, attention_tflop=self.attention_tflop * count,
                       moved_gb=self.moved_gb * count)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a device was measured to do: TFLOP/s of convolutions and of attention, GB/s of copies (read and written)."""

    device: str
    dtype: str
    convolution: float
    attention: float
    copy: float

    def seconds(self, work: Figures) -> float:
        """Return how long the work takes, were every part of it to run at its measured rate and none beside another."""
        rest = work.tflop - work.attention_tflop
        return rest / self.convolution + work.attention_tflop / self.attention + work.moved_gb / self.copy


def thickness(channels: int, y: int, z: int, *, itemsize: int, device: str, mode: str = "store") -> int:
    """Return how many planes of `channels` times y times z voxels make a slab on a kind of device: a power of two.

    It has about `SLAB_BYTES`, a quarter of that where nothing is stored, and at least 2 planes.
    """
    size = SLAB_BYTES.get(device, SLAB_BYTES["cpu"]) // (4 if mode == "recompute" else 1)
    planes = size // (channels * y * z * itemsize)
    return int(max(2, 1 << (max(planes, 1).bit_length() - 1)))


def signature(network: NetworkSpec) -> str:
    """Return what stands for a network in the table: equal for equal shapes of weights and activations."""
    shape = {key: value for key, value in network.arguments.items() if key not in _IGNORED}
    return hashlib.sha256(json.dumps([network.kind, shape], sort_keys=True, default=list).encode()).hexdigest()[:12]


@cache
def table() -> Mapping[str, Any]:
    """Return the entries of the table, by key."""
    entries: Mapping[str, Any] = json.loads(TABLE.read_text("utf-8"))["entries"]
    return entries


def key(stage: str, networks: Iterable[NetworkSpec], itemsize: int) -> str:
    """Return the key of a stage of networks that hold numbers of `itemsize` bytes."""
    return f"{stage} {'+'.join(map(signature, networks))} {itemsize}"


def look_up(name: str, features: Sequence[float]) -> Figures | None:
    """Return the figures of an entry for these features (the first is 1); None for networks that were never traced."""
    entry = table().get(name)
    if entry is None:
        return None
    made = {field: max(0.0, sum(c * f for c, f in zip(coefficients, features, strict=True))) for field, coefficients in entry.items()}
    return Figures(**made)


def weights_gib(stage: str, networks: Sequence[NetworkSpec], itemsize: int) -> float:
    """Return the weights of networks: what a stage of theirs would take for nothing."""
    entry = table().get(key(stage, networks, itemsize))
    return max(0.0, float(entry["peak_gib"][0])) if entry else 0.0


# --- features of each stage -----------------------------------------------------------------------------------------


def latent_features(latent: Sequence[int]) -> list[float]:
    """Return the features of a step on a latent: 1, its voxels, and their square (attention)."""
    voxels = math.prod(latent)
    return [1.0, voxels, float(voxels) ** 2]


def volume_features(network: NetworkSpec, size: Size, *, itemsize: int, device: str, mode: str) -> list[float]:
    """Return the features of a stage that runs in slabs: 1, the voxels of the volume, of a slab, and of a plane."""
    planes = min(slab_planes(network, size, itemsize=itemsize, device=device, mode=mode), size[0])
    plane = size[1] * size[2]
    return [1.0, math.prod(size), planes * plane, plane]


def embedding_features(controlnet: NetworkSpec, size: Size, *, itemsize: int, device: str) -> list[float]:
    """Return the features of embedding a mask: 1, the voxels of the volume, of a slab, and of a plane."""
    widest = max(int(n) for n in controlnet.arguments.get("conditioning_embedding_num_channels", (8,))[:1])
    channels = max(widest, int(controlnet.arguments.get("conditioning_embedding_in_channels", 1)))
    planes = min(thickness(channels, size[1], size[2], itemsize=itemsize, device=device), size[0])
    plane = size[1] * size[2]
    return [1.0, math.prod(size), planes * plane, plane]


def slab_planes(network: NetworkSpec, size: Size, *, itemsize: int, device: str, mode: str) -> int:
    """Return how thick the slabs of a VAE's decoder or encoder are."""
    channels = [int(n) for n in network.arguments["num_channels"]]
    widest = max(channels[min(1, len(channels) - 1)], 2 * channels[0], int(network.arguments.get("out_channels", 1)))
    return thickness(widest, size[1], size[2], itemsize=itemsize, device=device, mode=mode)


# --- stages ---------------------------------------------------------------------------------------------------------


def _latent(spec: ModelSpec, size: Size) -> tuple[int, ...]:
    return tuple(n // spec.latent_factor for n in size)


def embed(spec: ModelSpec, size: Size, *, itemsize: int, device: str) -> Figures | None:
    """Return the embedding of a mask for the ControlNet, once for a sample."""
    net = spec.networks["controlnet"]
    return look_up(key(f"embed-{device}", [net], itemsize), embedding_features(net, size, itemsize=itemsize, device=device))


def denoise_step(spec: ModelSpec, size: Size, *, itemsize: int, paired: bool) -> Figures | None:
    """Return one step of the diffusion model, with its ControlNet where an image is made for a mask."""
    networks = [spec.networks["unet"], *([spec.networks["controlnet"]] if paired else [])]
    return look_up(key("denoise", networks, itemsize), latent_features(_latent(spec, size)))


def decode(spec: ModelSpec, size: Size, *, itemsize: int, device: str, mode: str) -> Figures | None:
    """Return the exact decoder in one of `SWEEPS`."""
    vae = spec.networks["vae"]
    return look_up(key(f"decode-{mode}", [vae], itemsize), volume_features(vae, size, itemsize=itemsize, device=device, mode=mode))


def mask_decode(spec: ModelSpec, mode: str, *, itemsize: int, device: str) -> Figures | None:
    """Return the decoder of the mask networks, to the most likely channel of each voxel of their cube."""
    return look_up(key(f"mask-decode-{mode}-{device}", [spec.networks["mask_vae"]], itemsize), [1.0])


def decode_window(spec: ModelSpec, size: Size, window: Sequence[int], overlap: float, *, itemsize: int) -> Figures | None:
    """Return the window decoder: one window at a time, and the volume that they are blended into."""
    latent = _latent(spec, size)
    roi = [min(w, n) for w, n in zip(window, latent, strict=True)]
    one = look_up(key("decode-window", [spec.networks["vae"]], itemsize), latent_features(roi)[:2])
    if one is None:
        return None
    count = windows(latent, roi, overlap)
    blended = 3 * 4 * math.prod(size) / 2**30  # sums, weights and the importance of a window, in float32
    return Figures(peak_gib=one.peak_gib + (blended if count > 1 else 0.0), tflop=one.tflop * count, moved_gb=one.moved_gb * count)


def windows(size: Sequence[int], roi: Sequence[int], overlap: float) -> int:
    """Return how many windows cover a latent, as MONAI's sliding windows do."""
    total = 1
    for n, r in zip(size, roi, strict=True):
        step = r if r == n else max(1, int(r * (1 - overlap)))
        total *= -(-(n - r) // step) + 1
    return total


def encode(spec: ModelSpec, size: Size, *, itemsize: int, device: str, mode: str = "store") -> Figures | None:
    """Return the exact encoder."""
    vae = spec.networks["vae"]
    return look_up(key(f"encode-{mode}", [vae], itemsize), volume_features(vae, size, itemsize=itemsize, device=device, mode=mode))


def train_step(spec: ModelSpec, kind: str, size: Size, *, batch: int = 1, checkpointing: bool = False) -> Figures | None:
    """Return a training step in mixed precision with AdamW: weights, gradients, both moments and activations.

    `size` is that of the volume, whose latent a diffusion model or ControlNet is trained on; that of a patch for a VAE.
    """
    names = {"dm": ["unet"], "controlnet": ["unet", "controlnet"], "vae": ["vae"]}[kind]
    stage = f"train-{kind}{'-checkpointing' if checkpointing else ''}"
    voxels = size if kind == "vae" else _latent(spec, size)
    made = look_up(key(stage, [spec.networks[name] for name in names], 2), latent_features((*voxels, batch)))
    return made and Figures(peak_gib=made.peak_gib + TRAINING_GIB, tflop=made.tflop, attention_tflop=made.attention_tflop,
                            moved_gb=made.moved_gb)  # fmt: skip


def reference_decode(spec: ModelSpec, size: Size, window: Sequence[int], splits: int, overlap: float = 0.4) -> Figures | None:
    """Return the peak of the reference's own run, which is that of its decoder: windows, float16 autocast, `num_splits`."""
    latent = _latent(spec, size)
    if math.prod(latent) <= math.prod(window):
        roi: Sequence[int] = latent
    else:
        roi = [min(w, n) for w, n in zip(window, latent, strict=True)]
    one = look_up(key(f"reference-{splits}", [spec.networks["vae"]], 2), latent_features(roi)[:2])
    resident = look_up(key("resident", spec.networks.values(), 4), [1.0])
    if one is None or resident is None:
        return None
    labels = REFERENCE_LABEL_BYTES * math.prod(size) / 2**30
    count = windows(latent, roi, overlap)
    return Figures(peak_gib=one.peak_gib + resident.peak_gib + labels + REFERENCE_GIB, tflop=one.tflop * count)


# --- rates of devices that were measured ----------------------------------------------------------------------------


def measured_rates(device: str, dtype: str) -> Rates | None:
    """Return what `gpu-plan --measure` found for a device and a precision; None where it was not run."""
    path = rates_path()
    try:
        rows = json.loads(path.read_text("utf-8"))["rates"]
    except (OSError, ValueError, KeyError):
        return None
    row = next((row for row in rows if (row["device"], row["dtype"]) == (device, dtype)), None)
    return Rates(**row) if row else None


def rates_path() -> Path:
    """Return the file in the user's cache that keeps what devices were measured to do."""
    from platformdirs import user_cache_path

    home = os.environ.get("MAISI_HOME")
    return (Path(home) if home else user_cache_path("maisi", appauthor=False)) / "rates.json"
