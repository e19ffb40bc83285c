"""Lesions in masks: how large they came out, moved ones for variety, and new ones in healthy organs.

All functions are pure and work on the lesion's own box, so that their cost does not grow with the volume. What
is random comes from a seed alone, and every search ends after `max_tries`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from .anatomy import BODY, maisi
from .envelope import dilate, erode
from .errors import UsageError
from .repair import Bits, Box, Labels, among, bounds, checked, fill, lesions_of, ring_lobe
from .tumors import BONE_LESION, COLON_TUMOR, LIVER_TUMOR, LUNG_TUMOR, PANCREATIC_TUMOR, Lesion, Request, hosts
from .tumors import parse_request as parse_request
from .volumes import Mask

if TYPE_CHECKING:
    from monai.transforms import Transform

Triple = tuple[float, float, float]

MAX_TRIES, MAX_TRIES_COMPAT = 100, 1000


# --- what is there --------------------------------------------------------------------------------------------


def measure(mask: Mask, tumor: int) -> Lesion:
    """Measure the tumour of this label in a mask. Raises `UsageError` for a label that is no lesion."""
    host = hosts(tumor)
    if not host:
        raise UsageError(f"label {tumor} ({maisi().name_of(tumor)}) is no tumour", hint="see  maisi labels list")
    lesion = mask.array == tumor
    box = bounds(lesion, margin=1)
    if box is None:
        return Lesion(tumor=tumor, volume_ml=0.0, diameter_mm=0.0, components=0, host=None, overlap=0.0)
    view, lesion = mask.array[box], lesion[box]
    parts, number = ndimage.label(lesion, structure=np.ones((3, 3, 3), dtype=bool))
    sizes = np.bincount(parts.ravel())[1:]
    voxel_ml = math.prod(mask.geometry.spacing) / 1000
    surround, overlap = _surroundings(view, lesion, host, mask.geometry.spacing)
    return Lesion(
        tumor=tumor, volume_ml=float(sizes.sum() * voxel_ml), diameter_mm=_diameter(float(sizes.max() * voxel_ml)),
        components=int(number), host=surround, overlap=overlap,
    )  # fmt: skip


def _surroundings(labels: Labels, lesion: Bits, host: Sequence[int], spacing: Triple) -> tuple[int | None, float]:
    """Return the label that surrounds most of a lesion, and the share of the lesion that lies in `host`."""
    ring = dilate(lesion, 3) & ~lesion
    if not ring.any():
        return None, 0.0
    around = labels[ring]
    counts = np.bincount(around, minlength=256)
    proper = counts[list(host)]
    surround: int | None
    if proper.any():
        surround = host[int(proper.argmax())]
    else:
        counts[0] = 0
        organs = counts.copy()
        organs[BODY] = 0
        surround = int(organs.argmax()) if organs.any() else (BODY if counts[BODY] else None)
    # the voxel nearest to a lesion's voxel, of all that are not lesion, lies in its ring
    _, nearest = KDTree(np.argwhere(ring) * np.asarray(spacing)).query(np.argwhere(lesion) * np.asarray(spacing))
    return surround, float(among(around, host)[nearest].mean())


def _diameter(volume_ml: float) -> float:
    return (6 * volume_ml * 1000 / math.pi) ** (1 / 3)


# --- moved for variety ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmented:
    """A mask changed for variety: which tumours moved, after how many tries in all, or by how much the body was zoomed.

    A tumour of `stayed` found no place and is where it was, unchanged. With `compat` the reference would also
    have changed the affine by `zoom`; the mask stays on its grid.
    """

    labels: Labels
    moved: tuple[int, ...] = ()
    stayed: tuple[int, ...] = ()
    tries: int = 0
    zoom: float = 1.0


def augment(
    labels: Labels, *, seed: int, spacing_mm: Triple = (1.0, 1.0, 1.0), max_tries: int | None = None, compat: bool = False
) -> Augmented:
    """Move and deform each tumour of a mask within its organ; zoom a mask without any by up to a hundredth.

    Each piece of a tumour is turned, scaled, bent and shifted on its own, and is kept where most of it lies in
    its organ; it then takes only voxels of the organ and its own. What it leaves becomes the organ around it.
    Volumes stay within a factor of 2. Nothing else changes, and no tumour is added. The same seed gives the
    same mask. A piece that finds no place in `max_tries` (100) stays.

    With `compat` as the reference does (2.8), on the CPU and through MONAI: one tumour of the first kind found,
    as a whole, anywhere within the closing of its organ. `seed` seeds its transforms; after `max_tries` (1000)
    the tumour stays, where the reference would loop for ever.
    """
    labels = checked(labels)
    if compat:
        return _reference(labels, seed, max_tries or MAX_TRIES_COMPAT)
    rng, tumors = np.random.default_rng(seed), {label.id for label in maisi().tumors()}
    present = [lesion for lesion in lesions_of(labels) if lesion in tumors]
    if not present:
        zoom = float(rng.uniform(0.99, 1.01))
        return Augmented(labels=_zoomed(labels, zoom), zoom=zoom)
    result, tries = labels.copy(), 0
    moved: list[int] = []
    for tumor in present:
        count, done = _move_all(result, tumor, rng, spacing_mm, max_tries or MAX_TRIES)
        tries += count
        if done:
            moved.append(tumor)
    return Augmented(labels=result, moved=tuple(moved), stayed=tuple(t for t in present if t not in moved), tries=tries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """How far a piece of a tumour is moved about its own centre, and which share must then lie in its organ.

    Each range is symmetric: shifts in mm and turns in radians along and about each axis, scales as 1 ± `scale`.
    """

    shift_mm: float
    turn: Triple
    scale: float
    inside: float


_TURN = math.pi / 36
_MOVES = {  # the ranges of the reference (2.8), where a voxel is taken for a millimetre
    LUNG_TUMOR: Move(shift_mm=20, turn=(_TURN, _TURN, math.pi), scale=0.15, inside=0.85),
    LIVER_TUMOR: Move(shift_mm=10, turn=(_TURN,) * 3, scale=0.2, inside=0.8),
    PANCREATIC_TUMOR: Move(shift_mm=15, turn=(_TURN,) * 3, scale=0.1, inside=0.8),
    COLON_TUMOR: Move(shift_mm=5, turn=(_TURN,) * 3, scale=0.1, inside=0.8),
    BONE_LESION: Move(shift_mm=5, turn=(0.0, 0.0, 0.1), scale=0.15, inside=0.8),
}
_OTHER = Move(shift_mm=10, turn=(_TURN,) * 3, scale=0.1, inside=0.8)
_BEND = (0.03, 0.10)  # root mean square of the bending, and its smoothness, in diameters of the piece
_BEND_LENGTH = 0.35


def _move_all(labels: Labels, tumor: int, rng: np.random.Generator, spacing: Triple, max_tries: int) -> tuple[int, bool]:
    """Move each piece of a tumour; return the tries that it took, and whether any piece found a place. In place."""
    box = bounds(labels == tumor)
    assert box is not None  # the caller saw it
    parts, _ = ndimage.label(labels[box] == tumor, structure=np.ones((3, 3, 3), dtype=bool))
    tries, moved = 0, False
    for number, found in enumerate(ndimage.find_objects(parts), start=1):
        corner = tuple(span.start + whole.start for span, whole in zip(found, box, strict=True))
        count, done = _move_piece(labels, parts[found] == number, corner, tumor, rng, spacing, max_tries)
        tries += count
        moved |= done
    return tries, moved


def _move_piece(
    labels: Labels, piece: Bits, corner: tuple[int, ...], tumor: int, rng: np.random.Generator, spacing: Triple, max_tries: int
) -> tuple[int, bool]:
    move, host, mm = _MOVES.get(tumor, _OTHER), hosts(tumor), np.asarray(spacing)
    room = _room(piece, mm, move)
    reach = room + np.ceil(move.shift_mm / mm).astype(int)
    area = _around(corner, piece.shape, reach, labels.shape)
    view = labels[area]
    offset = np.array([start - span.start for start, span in zip(corner, area, strict=True)])
    own = np.zeros(view.shape, dtype=bool)
    own[tuple(slice(start, start + n) for start, n in zip(offset, piece.shape, strict=True))] = piece
    free = (among(view, host) | own) & ~dilate((view == tumor) & ~own, 3)
    voxels = int(np.count_nonzero(piece))
    shape = np.pad(piece, [(int(n), int(n)) for n in room])
    for count in range(1, max_tries + 1):
        shift = np.rint(rng.uniform(-move.shift_mm, move.shift_mm, 3) / mm).astype(int)
        deformed = np.argwhere(_deformed(shape, mm, move, rng))
        place = deformed + offset - room + shift
        place = place[((place >= 0) & (place < view.shape)).all(axis=1)]  # the rest is outside the volume
        kept = place[free[tuple(place.T)]]
        if not len(deformed) or len(kept) < move.inside * len(deformed):
            continue
        new = np.zeros(view.shape, dtype=bool)
        new[tuple(kept.T)] = True
        new |= _closed(new, 3) & free
        if voxels <= 2 * np.count_nonzero(new) <= 4 * voxels and not np.array_equal(new, own):
            fill(view, own, host)
            view[new] = tumor
            return count, True
    return max_tries, False


def _room(piece: Bits, mm: NDArray[np.float64], move: Move) -> NDArray[np.int_]:
    """Return how many voxels a deformed piece can reach beyond its box on each side, whichever way it is turned."""
    voxels = np.argwhere(piece)
    away = np.abs((voxels - voxels.mean(axis=0)) * mm)
    farthest = float(np.linalg.norm(away, axis=1).max()) * (1 + move.scale) + 2.5 * _BEND[1] * _size(piece, mm)
    return np.maximum(np.ceil((farthest - away.max(axis=0)) / mm).astype(int), 0) + 2


def _size(piece: Bits, mm: NDArray[np.float64]) -> float:
    """Return the diameter in mm of a ball as large as the piece."""
    return _diameter(float(np.count_nonzero(piece) * mm.prod() / 1000))


def _deformed(piece: Bits, mm: NDArray[np.float64], move: Move, rng: np.random.Generator) -> Bits:
    """Return the piece turned, scaled and bent about its centre, by the inverse map to the nearest voxel."""
    centre, diameter = np.argwhere(piece).mean(axis=0), _size(piece, mm)
    bend = [_smooth_noise(piece.shape, _BEND_LENGTH * diameter / mm, rng) * np.float32(diameter * rng.uniform(*_BEND)) for _ in range(3)]
    turn = _rotation(rng.uniform(-1, 1, 3) * move.turn)
    inverse = (turn.T / (1 + rng.uniform(-move.scale, move.scale, 3))[:, None] / mm[:, None]).astype(np.float32)
    at = [(np.arange(n) - middle) * size for n, middle, size in zip(piece.shape, centre, mm, strict=True)]
    moved = [line.astype(np.float32).reshape(np.roll((-1, 1, 1), axis)) + bend[axis] for axis, line in enumerate(at)]
    within, index = np.ones(piece.shape, dtype=bool), []
    for row, middle, n in zip(inverse, centre, piece.shape, strict=True):
        source = np.rint(row[0] * moved[0] + row[1] * moved[1] + row[2] * moved[2] + np.float32(middle)).astype(np.int32)
        within &= (source >= 0) & (source < n)
        index.append(source.clip(0, n - 1))
    return piece[tuple(index)] & within


def _smooth_noise(shape: tuple[int, ...], sigma: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return Gaussian noise, `sigma` voxels smooth, of variance 1 and within ±2.5; made on a coarse grid and interpolated."""
    step = np.maximum(1, sigma // 3)
    noise = rng.standard_normal([int(n // s) + 2 for n, s in zip(shape, step, strict=True)], dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, sigma / step, mode="nearest", truncate=2)
    noise = (noise / max(float(np.sqrt(np.mean(noise**2))), 1e-6)).clip(-2.5, 2.5)
    return np.asarray(ndimage.affine_transform(noise, 1 / step, output_shape=shape, order=1, mode="nearest"))


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rotation about x, then y, then z by these angles in radians."""
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[first, second], [first, second]] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        result = turn @ result
    return result


def _around(corner: Sequence[int], size: Sequence[int], margin: NDArray[np.int_], shape: Sequence[int]) -> Box:
    low, middle, high = (
        slice(max(0, start - int(more)), min(n, start + length + int(more)))
        for start, length, more, n in zip(corner, size, margin, shape, strict=True)
    )
    return low, middle, high


def _closed(bits: Bits, cube: int) -> Bits:
    """Return the closing by a cube, the outside of the volume counting as true, as the reference has it here."""
    return erode(dilate(bits, cube, outside=True), cube, outside=True)


def _zoomed(labels: Labels, zoom: float) -> Labels:
    """Return the content magnified about the centre, on the same grid; edges are repeated."""
    result = labels
    for axis, n in enumerate(labels.shape):
        at = np.rint((np.arange(n) - (n - 1) / 2) / zoom + (n - 1) / 2).astype(int).clip(0, n - 1)
        result = result.take(at, axis=axis)
    return result


class NoRoom(UsageError):
    """A lesion fits nowhere in its organ as it is in one mask; in another it may."""


# --- placed in a healthy organ --------------------------------------------------------------------------------


def place(labels: Labels, request: Request, *, seed: int, spacing_mm: Triple, max_tries: int = MAX_TRIES) -> Labels:
    """Return a mask with a new lesion as large as the request, to the voxel, in one piece within its hosts.

    A blob with axes of its own and a bent surface grows from a random voxel of the host and yields where the
    host ends, but not far: what does not fit in `max_tries` places is refused. Only host voxels change.
    Raises `UsageError` for a relative size, a mask without the host, a lesion below one voxel, or one that does not fit.
    """
    labels = checked(labels)
    if request.volume_ml is None:
        raise UsageError(f"a relative size ({request}) is the mask networks' own and cannot be painted", hint="give it in mm or ml")
    mm = np.asarray(spacing_mm, dtype=float)
    voxels = round(request.volume_ml * 1000 / mm.prod())
    if voxels < 1:
        raise UsageError(f"{request} is smaller than one voxel of this mask", hint=f"ask for at least {_diameter(mm.prod() / 1000):.1f}mm")
    host = among(labels, request.hosts)
    voxels_of_host = np.flatnonzero(host)
    if not voxels_of_host.size:
        names = ", ".join(maisi().name_of(value) for value in request.hosts[:5])
        raise UsageError(f"this mask has no organ for {request} ({names})", hint="choose a mask or a preset that shows it")
    rng, radius = np.random.default_rng(seed), _diameter(request.volume_ml) / 2
    for slack in np.linspace(1.1, 1.5, max_tries) if voxels < voxels_of_host.size else ():
        at = [int(index) for index in np.unravel_index(rng.choice(voxels_of_host), labels.shape)]
        area = _around(at, (1, 1, 1), np.ceil(1.8 * slack * radius / mm).astype(int), labels.shape)
        free = host[area]
        far = _blob(free.shape, np.array(at) - [span.start for span in area], mm, radius, rng)[free]
        if far.size < voxels:
            continue
        nearest = np.argpartition(far, voxels - 1)[:voxels]
        if far[nearest].max() > slack:
            continue
        chosen = np.zeros(far.size, dtype=bool)
        chosen[nearest] = True
        new = np.zeros(free.shape, dtype=bool)
        new[free] = chosen
        if ndimage.label(new)[1] == 1:
            result = labels.copy()
            result[area][new] = request.tumor
            return result
    largest = _diameter(float(voxels_of_host.size * mm.prod() / 1000))
    raise NoRoom(f"{request} fits nowhere in its organ, which is as large as a ball of {largest:.0f} mm",
                 hint="ask for a smaller one, or another organ")  # fmt: skip


def _blob(shape: tuple[int, ...], centre: NDArray[Any], mm: NDArray[np.float64], radius: float, rng: np.random.Generator) -> NDArray[Any]:
    """Return how far each voxel lies from the centre of a bent ellipsoid as large as a ball of `radius`, where it is 1."""
    axes = np.exp(rng.normal(0, 0.15, 3))
    axes /= axes.prod() ** (1 / 3)
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    at = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    far = np.linalg.norm(((at - centre) * mm) @ turn / (axes * radius), axis=-1)
    return far * (1 + 0.1 * _smooth_noise(shape, 0.5 * radius / mm, rng))


# --- as the reference moves them ------------------------------------------------------------------------------

_REFERENCE_BONES = (*range(33, 57), *range(63, 98), 127, 114)
_REFERENCE_ORDER = (BONE_LESION, LIVER_TUMOR, LUNG_TUMOR, PANCREATIC_TUMOR, COLON_TUMOR)


def _reference(labels: Labels, seed: int, max_tries: int) -> Augmented:
    import torch

    tumor = next((value for value in _REFERENCE_ORDER if (labels == value).any()), None)
    transform = _reference_transform(tumor)
    transform.set_random_state(seed)  # type: ignore[attr-defined]
    if tumor is None:
        zoomed = transform(torch.from_numpy(labels.astype(np.float32))[None])
        return Augmented(labels=np.asarray(zoomed[0]).astype(np.uint8), zoom=float(transform._zoom[0]))  # type: ignore[attr-defined]
    lesion = labels == tumor
    lesion_in = torch.from_numpy(lesion.astype(np.float32))[None]
    host = _reference_host(labels, lesion, tumor)
    wanted = np.count_nonzero(lesion)
    for count, share in _reference_tries(tumor, max_tries):
        moved = np.asarray(transform(lesion_in)[0]) > 0.5 if share is not None else lesion
        kept = moved & host
        if np.count_nonzero(kept) >= (0.75 if share is None else share) * wanted:
            result = labels.copy()
            result[lesion] = _reference_filling(labels, lesion, tumor)
            result[_closed(kept, 5)] = tumor
            return Augmented(labels=result, moved=(tumor,), tries=count)
    return Augmented(labels=labels.copy(), stayed=(tumor,), tries=max_tries)


def _reference_tries(tumor: int, max_tries: int) -> Iterator[tuple[int, float | None]]:
    """Yield each try with the share that must be kept; None for the colon tumour as it was, which must keep 0.75."""
    share = {LUNG_TUMOR: 0.85}.get(tumor, 0.8)
    for count in range(1, max_tries + 1):
        if tumor == COLON_TUMOR and count > 20:
            yield count, None
            return  # it is tried as it was, which gives the same each time
        yield count, 0.75 if tumor == BONE_LESION and count > 40 else share


def _reference_host(labels: Labels, lesion: Bits, tumor: int) -> Bits:
    if tumor == BONE_LESION:
        return among(labels, _REFERENCE_BONES) | lesion
    return _closed(among(labels, hosts(tumor)) | (lesion if tumor != LUNG_TUMOR else False), 5)


def _reference_filling(labels: Labels, lesion: Bits, tumor: int) -> int:
    if tumor == LUNG_TUMOR:
        return ring_lobe(labels, lesion)
    return BODY if tumor == BONE_LESION else hosts(tumor)[0]


def _reference_transform(tumor: int | None) -> Transform:
    """Return the reference's random transform for a tumour, or for the whole body (2.8)."""
    from monai.transforms import Rand3DElastic, RandAffine, RandZoom

    if tumor is None:
        return RandZoom(prob=1.0, min_zoom=0.99, max_zoom=1.01, mode="nearest", keep_size=True)
    if tumor == BONE_LESION:
        return RandAffine(prob=1.0, rotate_range=(0, 0, 0.1), translate_range=(5, 5, 0), scale_range=(0.15, 0.15, 0),
                          mode="nearest", padding_mode="zeros")  # fmt: skip
    move = _MOVES[tumor]
    return Rand3DElastic(
        prob=1.0, sigma_range=(5, 8), magnitude_range=(100, 200), translate_range=(int(move.shift_mm),) * 3, rotate_range=move.turn,
        scale_range=(move.scale,) * 3, mode="nearest", padding_mode="zeros",
    )  # fmt: skip
