"""Pictures of what a network makes while it learns: the three planes of every volume, one below the other."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..files import write_atomic
from ..geometry import Geometry
from ..preview import BACKGROUND, FAINT, strip
from ..volumes import Mask, Volume

FOLDER = "previews"
WIDTH_PX = 768
CAPTION_PX = 20


def save_previews(volumes: Mapping[str, NDArray[Any]], out: Path, step: int) -> Path:
    """Write one PNG of named volumes (x, y, z), images in HU or masks in uint8; return its path."""
    path = out / FOLDER / f"step_{step:08d}.png"
    buffer = io.BytesIO()
    montage(volumes).save(buffer, format="PNG", compress_level=6)
    write_atomic(path, buffer.getvalue())
    return path


def montage(volumes: Mapping[str, NDArray[Any]]) -> Image.Image:
    """Return the pictures below each other, each with its name above."""
    strips = {name: _strip(array) for name, array in volumes.items()}
    height = sum(picture.height + CAPTION_PX for picture in strips.values())
    made = Image.new("RGB", (max(picture.width for picture in strips.values()), height), BACKGROUND)
    pen, font, y = ImageDraw.Draw(made), ImageFont.load_default(13), 0
    for name, picture in strips.items():
        pen.text((4, y + CAPTION_PX // 2), name, font=font, fill=FAINT, anchor="lm")
        made.paste(picture, (0, y + CAPTION_PX))
        y += picture.height + CAPTION_PX
    return made


def _strip(array: NDArray[Any]) -> Image.Image:
    x, y, z = array.shape
    geometry = Geometry(size=(x, y, z), spacing=(1.0, 1.0, 1.0))
    if array.dtype == np.uint8:
        return strip(None, Mask(array=array, geometry=geometry), width=WIDTH_PX)
    return strip(Volume(array=array.astype(np.float32), geometry=geometry), None, width=WIDTH_PX)
