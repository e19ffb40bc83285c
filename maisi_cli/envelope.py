"""The body envelope: label 200 for every voxel of the body that has no label of its own.

CT models are conditioned on it; segmentations from elsewhere come without. The method is the reference's
(2.10), with box-shaped morphology done by shifts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .anatomy import BODY
from .errors import UsageError
from .events import Note, OnEvent, ignore
from .volumes import Mask, Volume, require_same_grid

Bits = NDArray[np.bool_]
LUNG = (28, 29, 30, 31, 32)


def add_body(
    mask: Mask,
    image: Volume,
    *,
    hu: float = -800,
    closing: int = 3,
    bed: int = 5,
    table_fraction: float = 0.05,
    lungs_labelled: bool = True,
    on_event: OnEvent = ignore,
) -> Mask:
    """Return the mask with 200 in every unlabelled voxel of the body that the CT `image` shows; labels stay.

    Air is the largest connected region below `hu`, smoothed by a box of `closing` voxels; the body is the
    largest thing left after an opening with a box of `bed` voxels, which loosens it from the table. Hollow
    things inside it (unlabelled, below `hu`, at least `table_fraction` of the envelope) are the table and
    become 0 again; with `lungs_labelled=False` they are kept, because lungs without a label look the same.
    Raises `UsageError` when the grids differ, the image is not a CT, or a box is not of odd size.
    """
    require_same_grid(image, mask)
    if not image.modality.startswith("ct"):
        raise UsageError(f"a body envelope is found by HU, and the image is {image.modality}", hint="give its CT")
    if closing < 1 or bed < 1 or closing % 2 == 0 or bed % 2 == 0:
        raise UsageError(f"boxes of {closing} and {bed} voxels are not odd", hint="use 3 and 5")
    labelled = mask.array > 0
    dark = image.array < hu
    air = close(largest(dark), closing) & ~labelled
    body = dilate(largest(erode(~air, bed, outside=False)), bed)
    body = close(body, closing)
    labels = mask.array.copy()
    labels[body & ~labelled] = BODY
    removed = 0
    if lungs_labelled:
        hollow = _table(labels, dark, table_fraction)
        removed = int(np.count_nonzero(hollow))
        labels[hollow] = 0
    _tell(labels, removed, on_event)
    return Mask(array=labels, geometry=mask.geometry, vocabulary=mask.vocabulary)


def _table(labels: NDArray[np.uint8], dark: Bits, fraction: float) -> Bits:
    envelope = labels == BODY
    parts, number = ndimage.label(envelope & dark)
    if not number:
        return np.zeros(labels.shape, dtype=bool)
    sizes = np.bincount(parts.ravel())
    large = sizes >= fraction * np.count_nonzero(envelope)
    large[0] = False
    return large[parts]


def _tell(labels: NDArray[np.uint8], removed: int, on_event: OnEvent) -> None:
    envelope, body = int(np.count_nonzero(labels == BODY)), int(np.count_nonzero(labels))
    shares = f"{envelope / labels.size:.1%} of the volume is label 200, {body / labels.size:.1%} is body"
    on_event(Note(text=f"body envelope: {shares}"))
    if removed:
        lungs = np.isin(LUNG, labels).any()
        text = f"took {removed / max(1, removed + envelope):.1%} of the envelope for the table: dark and large"
        if not lungs:
            text += "; no lung is labelled: if it is the lungs, keep them with lungs_labelled=False"
        on_event(Note(text=text, level="info" if lungs else "warning"))


def largest(bits: Bits) -> Bits:
    """Return the largest component of `bits`, voxels touching by a corner being connected."""
    parts, number = ndimage.label(bits, structure=np.ones((3, 3, 3), dtype=bool))
    if number < 2:
        return bits
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


def dilate(bits: Bits, box: int, *, outside: bool = False) -> Bits:
    """Return the dilation of `bits` by a cube of `box` voxels (odd); beyond the volume all is `outside`."""
    return ~erode(~bits, box, outside=not outside)


def erode(bits: Bits, box: int, *, outside: bool) -> Bits:
    """Return the erosion of `bits` by a cube of `box` voxels (odd); beyond the volume all is `outside`."""
    result = bits.copy()
    for axis in range(3):
        before = result.copy()
        for shift in range(1, box // 2 + 1):
            low, high = (np.moveaxis(result, axis, 0)[part] for part in (slice(None, -shift), slice(shift, None)))
            source = np.moveaxis(before, axis, 0)
            low &= source[shift:]
            high &= source[:-shift]
            if not outside:
                np.moveaxis(result, axis, 0)[:shift] = False
                np.moveaxis(result, axis, 0)[-shift:] = False
    return result


def close(bits: Bits, box: int) -> Bits:
    """Return the closing of `bits` by a cube of `box` voxels; the faces of the volume do not count."""
    return erode(dilate(bits, box), box, outside=True)
