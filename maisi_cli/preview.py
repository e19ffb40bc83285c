"""The three-plane picture of a sample: image in its windows, mask in its labels' colours, drawn to scale.

Radiological display: the patient's right is on the viewer's left, anterior and superior are up; sagittal
planes look to the left. All panels share one scale in pixels per mm.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .anatomy import BODY, Vocabulary, maisi
from .files import refuse_overwriting, write_atomic
from .volumes import Mask, Volume

SOFT_TISSUE_HU = (-160.0, 240.0)
LUNG_HU = (-1000.0, 200.0)
BACKGROUND = (13, 15, 19)
PANEL = (0, 0, 0)
TEXT = (226, 229, 234)
FAINT = (139, 146, 158)
BODY_LINE = (150, 160, 176)
WIDTH_PX = 1320
LEAST_WIDTH_PX = 960
ROW_LIMIT_PX = 620
ROWS_LIMIT_PX = 1420
MARGIN_PX = 18
GAP_PX = 10
STRIP_GAP_PX = 4
FILL_OPACITY = 0.38
LINE_OPACITY = 0.95
LUNG_SHARE = 0.02
LEGEND_ROWS = 2

Swatches = list[list[tuple[str, tuple[int, int, int]]]]
"""Rows of (name, colour)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """How one plane is cut: the axis across it, the axes of its columns and rows, and its four sides."""

    name: str
    across: int
    columns: int
    rows: int
    sides: tuple[str, str, str, str]


PLANES = (
    Plane(name="axial", across=2, columns=0, rows=1, sides=("R", "L", "A", "P")),
    Plane(name="coronal", across=1, columns=0, rows=2, sides=("R", "L", "S", "I")),
    Plane(name="sagittal", across=0, columns=1, rows=2, sides=("A", "P", "S", "I")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A range of intensities shown from black to white, in planes of its own where `through` is given."""

    name: str
    low: float
    high: float
    through: tuple[int, int, int] | None = None


def preview(image: Volume | None, mask: Mask | None, path: str | Path, *, title: str = "", force: bool = False) -> Path:
    """Write the three-plane picture of an image, a mask or both as PNG; return its path.

    Raises `UsageError` when the file exists and `force` is not set.
    """
    path = Path(path)
    refuse_overwriting(path, force=force)
    buffer = io.BytesIO()
    draw(image, mask, title=title).save(buffer, format="PNG", compress_level=6)
    write_atomic(path, buffer.getvalue())
    return path


def draw(image: Volume | None, mask: Mask | None, *, title: str = "") -> Image.Image:
    """Return the picture that `preview` writes, about 1300 pixels wide."""
    item = image if image is not None else mask
    if item is None:
        raise ValueError("a preview needs an image or a mask")
    geometry = item.geometry
    where = centre(image, mask)
    fov = geometry.fov_mm
    space = WIDTH_PX - 2 * MARGIN_PX - 2 * GAP_PX
    windows: list[Window | None] = [*windows_of(image, mask)]
    if mask is not None:
        windows.append(None)
    limit = min(ROW_LIMIT_PX, ROWS_LIMIT_PX / len(windows))
    scale = min(space / sum(fov[p.columns] for p in PLANES), limit / max(fov[p.rows] for p in PLANES))
    sizes = [(max(8, round(fov[p.columns] * scale)), max(8, round(fov[p.rows] * scale))) for p in PLANES]
    row_height = max(height for _, height in sizes)
    small, normal, large = (ImageFont.load_default(size) for size in (13, 14, 20))
    content = sum(width for width, _ in sizes) + 2 * GAP_PX
    width = max(content + 2 * MARGIN_PX, LEAST_WIDTH_PX)
    legend = _legend(mask, where, normal, width - 2 * MARGIN_PX) if mask is not None else []
    head, foot = 54, 14 + 24 * len(legend) if legend else 0
    height = head + len(windows) * (row_height + GAP_PX) - GAP_PX + foot + MARGIN_PX
    picture = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    grid = _grid(item)
    room = width - 2 * MARGIN_PX - 30 - normal.getlength(grid)
    pen.text(
        (MARGIN_PX, 27),
        _shorten(title or _name(image, mask), large, room),
        font=large,
        fill=TEXT,
        anchor="lm",
    )
    pen.text((width - MARGIN_PX, 28), grid, font=normal, fill=FAINT, anchor="rm")
    left = (width - content) // 2
    for row, window in enumerate(windows):
        x, top = left, head + row * (row_height + GAP_PX)
        for plane, size in zip(PLANES, sizes, strict=True):
            y = top + (row_height - size[1]) // 2
            through = window.through if window is not None and window.through is not None else where
            base = _image_panel(image, plane, through, size, window or windows[0])
            if window is None and mask is not None:
                base = _overlay(base, mask, plane, through, size, opaque=image is None)
            picture.paste(base, (x, y))
            number = f"{plane.name} {through[plane.across] + 1}/{geometry.size[plane.across]}"
            caption = number if plane is not PLANES[0] else f"{number}\n{_shown(window)}"
            _annotate(pen, plane, (x, y), size, small, caption)
            x += size[0] + GAP_PX
        if row == 0:
            _scale_bar(pen, left, top + (row_height + sizes[0][1]) // 2, sizes[0][0], scale, small)
    if legend:
        _draw_legend(pen, legend, (MARGIN_PX, height - MARGIN_PX - foot + 18), normal)
    return picture


def strip(image: Volume | None, mask: Mask | None, *, width: int) -> Image.Image:
    """Return the three planes side by side, to scale and without words, at most `width` pixels wide and half as high."""
    item = image if image is not None else mask
    if item is None:
        raise ValueError("a strip needs an image or a mask")
    where, fov, windows = centre(image, mask), item.geometry.fov_mm, windows_of(image, mask)
    space = width - (len(PLANES) - 1) * STRIP_GAP_PX
    scale = min(space / sum(fov[p.columns] for p in PLANES), width / 2 / max(fov[p.rows] for p in PLANES))
    sizes = [(max(4, int(fov[p.columns] * scale)), max(4, int(fov[p.rows] * scale))) for p in PLANES]
    height = max(high for _, high in sizes)
    picture = Image.new("RGB", (sum(wide for wide, _ in sizes) + (len(PLANES) - 1) * STRIP_GAP_PX, height), PANEL)
    x = 0
    for plane, size in zip(PLANES, sizes, strict=True):
        panel = _image_panel(image, plane, where, size, windows[0] if windows else None)
        if mask is not None:
            panel = _overlay(panel, mask, plane, where, size, opaque=image is None)
        picture.paste(panel, (x, (height - size[1]) // 2))
        x += size[0] + STRIP_GAP_PX
    return picture


def centre(image: Volume | None, mask: Mask | None) -> tuple[int, int, int]:
    """Return the voxel where the planes cross: the middle of a tumour, else of all organs or the body."""
    item = image if image is not None else mask
    assert item is not None
    chosen: NDArray[np.bool_] | None = None
    if mask is not None:
        present = set(mask.ids())
        tumors = present & {label.id for label in maisi().tumors()}
        if tumors:
            chosen = np.isin(mask.array, sorted(tumors))
        elif present - {BODY}:
            chosen = (mask.array > 0) & (mask.array != BODY)
        else:
            chosen = mask.array > 0
    elif image is not None:
        level = -500.0 if image.modality.startswith("ct") else float(np.percentile(image.array[::2, ::2, ::2], 75))
        chosen = image.array > level
    size = item.geometry.size
    return _middle(chosen) if chosen is not None else _middle(np.zeros(size, dtype=bool))


def _middle(chosen: NDArray[np.bool_]) -> tuple[int, int, int]:
    size = chosen.shape
    total = int(np.count_nonzero(chosen))
    if not total:
        return size[0] // 2, size[1] // 2, size[2] // 2
    middle = []
    for axis, n in enumerate(size):
        others = tuple(other for other in range(3) if other != axis)
        weights = np.count_nonzero(chosen, axis=others)
        middle.append(int(np.clip(round(float(weights @ np.arange(n)) / total), 0, n - 1)))
    return middle[0], middle[1], middle[2]


def windows_of(image: Volume | None, mask: Mask | None) -> list[Window]:
    """Return the windows in which an image is worth showing; the lung window only where lungs are in view."""
    if image is None:
        return []
    if image.modality.startswith("ct"):
        windows = [Window(name="soft tissue", low=SOFT_TISSUE_HU[0], high=SOFT_TISSUE_HU[1])]
        if mask is not None:
            counts = mask.counts()
            sides = [list(ids) for ids in ((30, 31, 32), (28, 29))]  # right, left
            if sum(counts[ids].sum() for ids in sides) > LUNG_SHARE * max(1, int(counts[1:].sum())):
                larger = max(sides, key=lambda ids: int(counts[ids].sum()))
                through = _middle(np.isin(mask.array, larger))
                windows.append(Window(name="lung", low=LUNG_HU[0], high=LUNG_HU[1], through=through))
        return windows
    values = image.array[image.array > image.array.min()]
    low, high = (float(v) for v in np.percentile(values, (1, 99.5))) if values.size else (0.0, 1.0)
    return [Window(name="percentiles 1 to 99.5:", low=low, high=max(high, low + 1e-6))]


def cut(array: NDArray[Any], plane: Plane, where: tuple[int, int, int]) -> NDArray[Any]:
    """Return the slice of a RAS+ array through `where` as rows x columns, turned as it is displayed."""
    index: list[Any] = [slice(None)] * 3
    index[plane.across] = where[plane.across]
    flat = array[tuple(index)]  # the two axes that remain are in order: columns, rows
    return np.ascontiguousarray(flat.T[::-1, ::-1])


def _image_panel(
    image: Volume | None,
    plane: Plane,
    where: tuple[int, int, int],
    size: tuple[int, int],
    window: Window | None,
) -> Image.Image:
    if image is None or window is None:
        return Image.new("RGB", size, PANEL)
    values = cut(image.array, plane, where).astype(np.float32)
    grey = np.clip((values - window.low) / (window.high - window.low), 0, 1) * 255
    return _resize(grey, size).convert("RGB")


def _resize(grey: NDArray[np.floating[Any]], size: tuple[int, int]) -> Image.Image:
    resized = Image.fromarray(grey.astype(np.float32)).resize(size, Image.Resampling.LANCZOS)
    return Image.fromarray(np.clip(np.rint(np.asarray(resized)), 0, 255).astype(np.uint8))


def _overlay(
    base: Image.Image,
    mask: Mask,
    plane: Plane,
    where: tuple[int, int, int],
    size: tuple[int, int],
    *,
    opaque: bool,
) -> Image.Image:
    labels = smooth_labels(cut(mask.array, plane, where), size)
    colors, shown = _palette()
    tint = colors[labels].astype(np.float32)
    fill = shown[labels].astype(np.float32) * (0.85 if opaque else FILL_OPACITY)
    if opaque:
        fill[labels == BODY] = 0.16
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    opacity = np.where(edge & shown[labels], LINE_OPACITY, fill)
    opacity = np.where(edge & (labels == BODY), np.maximum(opacity, 0.35), opacity)
    pixels = np.asarray(base, dtype=np.float32)
    mixed = pixels + (tint - pixels) * opacity[..., None]
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def smooth_labels(labels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a slice of labels on `size` (width, height) pixels, each with the label that covers it most."""
    best = np.full((size[1], size[0]), -1.0, dtype=np.float32)
    result = np.zeros((size[1], size[0]), dtype=np.uint8)
    for label in np.unique(labels):
        plane = Image.fromarray((labels == label).astype(np.float32))
        cover = np.asarray(plane.resize(size, Image.Resampling.BICUBIC))
        better = cover > best
        result[better] = label
        best = np.maximum(best, cover)
    return result


def _palette() -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    vocabulary: Vocabulary = maisi()
    colors = np.full((256, 3), 200, dtype=np.uint8)
    for label in vocabulary.labels:
        colors[label.id] = label.color
    colors[BODY] = BODY_LINE
    shown = np.ones(256, dtype=bool)
    shown[[0, BODY]] = False
    return colors, shown


def _annotate(
    pen: ImageDraw.ImageDraw,
    plane: Plane,
    corner: tuple[int, int],
    size: tuple[int, int],
    font: Any,
    caption: str,
) -> None:
    (x, y), (width, height) = corner, size
    for number, line in enumerate(caption.splitlines()):
        _text(pen, (x + 8, y + 7 + 18 * number), line, font, "la")
    left, right, _, bottom = plane.sides
    _text(pen, (x + 8, y + height // 2), left, font, "lm")
    _text(pen, (x + width - 8, y + height // 2), right, font, "rm")
    _text(pen, (x + width // 2, y + height - 7), bottom, font, "ms")


def _text(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, font: Any, anchor: str) -> None:
    pen.text(at, text, font=font, fill=TEXT, anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))


def _shown(window: Window | None) -> str:
    return "labels" if window is None else f"{window.name} {window.low:.0f} to {window.high:.0f}"


def _shorten(text: str, font: Any, room: float) -> str:
    while text and font.getlength(text) > room:
        text = text.removesuffix("...")[:-1].rstrip() + "..." if len(text) > 4 else ""
    return text


def _scale_bar(pen: ImageDraw.ImageDraw, left: int, bottom: int, width: int, scale: float, font: Any) -> None:
    length_mm = max((mm for mm in (5, 10, 20, 50, 100) if mm * scale <= width / 3.5), default=5)
    length = round(length_mm * scale)
    right, y = left + width - 12, bottom - 14
    pen.rectangle((right - length - 1, y - 2, right + 1, y + 2), fill=(0, 0, 0))
    pen.rectangle((right - length, y - 1, right, y + 1), fill=TEXT)
    _text(pen, (right - length // 2, y - 6), f"{length_mm} mm", font, "ms")


def _legend(mask: Mask, where: tuple[int, int, int], font: Any, room: int) -> Swatches:
    """Return rows of (name, colour): the labels that cover most of the three slices, as many as fit."""
    area = np.zeros(256, dtype=np.int64)
    for plane in PLANES:
        area += np.bincount(cut(mask.array, plane, where).ravel(), minlength=256)
    area[[0, BODY]] = 0
    vocabulary = maisi()
    tumors = {label.id for label in vocabulary.tumors()}
    order = sorted(np.flatnonzero(area), key=lambda label: (int(label) not in tumors, -int(area[label])))
    rows: Swatches = [[]]
    used = 0.0
    for value in order:
        label = vocabulary.get(int(value))
        name = vocabulary.name_of(int(value))
        need = font.getlength(name) + 40
        if used + need > room + 20:
            if len(rows) == LEGEND_ROWS:
                break
            rows.append([])
            used = 0.0
        rows[-1].append((name, label.color if label else (200, 200, 200)))
        used += need
    return rows if rows[0] else []


def _draw_legend(
    pen: ImageDraw.ImageDraw,
    rows: Swatches,
    corner: tuple[int, int],
    font: Any,
) -> None:
    x0, y = corner
    for row in rows:
        x = float(x0)
        for name, color in row:
            pen.rounded_rectangle((x, y, x + 12, y + 12), radius=3, fill=color)
            pen.text((x + 19, y + 6), name, font=font, fill=FAINT, anchor="lm")
            x += font.getlength(name) + 40
        y += 24


def _name(image: Volume | None, mask: Mask | None) -> str:
    return f"{image.modality}{' and mask' if mask is not None else ''}" if image is not None else "mask"


def _grid(item: Volume | Mask) -> str:
    geometry = item.geometry
    size = " x ".join(str(n) for n in geometry.size)
    spacing = " x ".join(f"{mm:.3g}" for mm in geometry.spacing)
    fov = " x ".join(f"{mm:.0f}" for mm in geometry.fov_mm)
    return f"{size} voxels   {spacing} mm   FOV {fov} mm"
