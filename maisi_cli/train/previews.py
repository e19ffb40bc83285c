"""Pictures of what a network makes while it learns: the three planes of every volume, one below the other.

The autoencoders show held-out cases and what they give back, the diffusion models what they make of fixed noise.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from .. import streaming
from ..catalog import ModelSpec
from ..decoding import to_hu
from ..errors import UsageError
from ..files import write_atomic
from ..geometry import Geometry, Triple
from ..networks import frozen
from ..preview import BACKGROUND, FAINT, strip
from ..sampling import adams_bashforth_2, ddim, ddpm_schedule, flow_schedule, initial_noise
from ..volumes import Mask, Volume
from .settings import TrainSettings

FOLDER = "previews"
WIDTH_PX = 768
CAPTION_PX = 20
CASES = 2
"""How many held-out cases are shown."""
STEPS = 10
"""Evaluations of a diffusion model for each image."""


def save_previews(shown: Mapping[str, Volume | Mask], out: Path, step: int) -> Path:
    """Write one PNG of named images and masks; return its path."""
    path = out / FOLDER / f"step_{step:08d}.png"
    buffer = io.BytesIO()
    montage(shown).save(buffer, format="PNG", compress_level=6)
    write_atomic(path, buffer.getvalue())
    return path


def montage(shown: Mapping[str, Volume | Mask]) -> Image.Image:
    """Return the pictures below each other, each with its name above."""
    strips = {name: _strip(each) for name, each in shown.items()}
    height = sum(picture.height + CAPTION_PX for picture in strips.values())
    made = Image.new("RGB", (max(picture.width for picture in strips.values()), height), BACKGROUND)
    pen, font, y = ImageDraw.Draw(made), ImageFont.load_default(13), 0
    for name, picture in strips.items():
        pen.text((4, y + CAPTION_PX // 2), name, font=font, fill=FAINT, anchor="lm")
        made.paste(picture, (0, y + CAPTION_PX))
        y += picture.height + CAPTION_PX
    return made


def _strip(item: Volume | Mask) -> Image.Image:
    return strip(item, None, width=WIDTH_PX) if isinstance(item, Volume) else strip(None, item, width=WIDTH_PX)


def autoencoder(settings: TrainSettings, spec: ModelSpec, encoded_by: Collection[str]) -> nn.Module:
    """Load the frozen autoencoder `train.vae`, with which a diffusion model of images shows what it makes.

    `encoded_by` are the SHA-256 of the autoencoders that made the latents, where they are known. Raises `UsageError` without
    `train.vae`, and for another than theirs.
    """
    if settings.vae is None:
        raise UsageError(
            "previews of latents need the autoencoder that made them", hint="add --set train.vae=FILE, or train.preview_every=0"
        )
    path = Path(settings.vae)
    made, state = frozen(spec.networks["vae"], path)
    if encoded_by and state.sha256 not in encoded_by:
        raise UsageError(f"the latents were not made by {path}", hint="set train.vae to the autoencoder that encoded them")
    return made


def sampled(denoise: Callable[[Tensor, Tensor], Tensor], shape: Sequence[int], *, seed: int, ddpm: bool, device: torch.device) -> Tensor:
    """Return a latent of `shape` (1, C, x, y, z), made of the noise of a seed in `STEPS` evaluations of `denoise(x, times)`.

    A flow's by second-order Adams-Bashforth, DDPM's by DDIM.
    """

    def answer(x: Tensor, t: Tensor) -> Tensor:
        return denoise(x, t.to(device).reshape(1))

    noise = initial_noise(shape, seed).to(device)
    if ddpm:
        return ddim(answer, noise, ddpm_schedule(STEPS))
    return adams_bashforth_2(answer, noise, flow_schedule(STEPS, tuple(shape[2:])))


def image_of(vae: Any, latent: Tensor, spacing_mm: Triple, modality: str) -> Volume:
    """Return the image that an autoencoder makes of a latent, slab by slab."""
    return volume_of(torch.cat([slab[0, 0].float() for slab in streaming.decoded(vae, latent)]), spacing_mm, modality)


def volume_of(intensities: Tensor, spacing_mm: Triple, modality: str) -> Volume:
    """Return intensities (X, Y, Z) as an image in HU or MR units."""
    array = to_hu(intensities[None, None], modality)
    return Volume(array=array, geometry=_grid(array.shape, spacing_mm), modality=modality)


def mask_of(labels: NDArray[np.uint8], spacing_mm: Triple) -> Mask:
    """Return labels (X, Y, Z) as a mask."""
    return Mask(array=np.asarray(labels), geometry=_grid(labels.shape, spacing_mm))


def _grid(shape: Sequence[int], spacing_mm: Triple) -> Geometry:
    x, y, z = shape
    return Geometry(size=(x, y, z), spacing=spacing_mm)
