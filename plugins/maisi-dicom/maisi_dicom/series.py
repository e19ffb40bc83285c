"""An image as a series of slices: CT Image Storage in HU, or MR Image Storage."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from maisi_cli.catalog import modality as find_modality
from maisi_cli.volumes import Volume
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from pydicom.valuerep import DSfloat

from .identity import DERIVATION, Identity, mark, meta
from .planes import Planes, planes_of, stack

SERIES = "image series"
SOFT_TISSUE = (40, 400)
"""Centre and width of the window that a CT opens with, in HU."""


def headers(geometry_planes: Planes, identity: Identity, modality: str, window: tuple[float, float]) -> list[Dataset]:
    """Return the slices of a series, inferior first, without their pixels; `modality` is a name such as `ct` or `mri-t1`."""
    common = _common(geometry_planes, identity, modality, window)
    made = []
    for plane in range(geometry_planes.count):
        slice_ = copy.deepcopy(common)
        slice_.SOPInstanceUID = identity.uid(SERIES, plane)
        slice_.InstanceNumber = plane + 1
        slice_.ImagePositionPatient = decimals(geometry_planes.position(plane))
        slice_.file_meta = meta(slice_, ExplicitVRLittleEndian)
        made.append(slice_)
    return made


def series_of(image: Volume, identity: Identity) -> list[Dataset]:
    """Return the slices of a series without their pixels: what a segmentation refers to."""
    return headers(planes_of(image.geometry), identity, image.modality, _window(image))


def write_series(image: Volume, slices: list[Dataset], folder: Path) -> None:
    """Write a series into a new folder, one file a slice: `0001.dcm` is the most inferior one."""
    folder.mkdir()
    pixels = stack(stored(image.array))
    for number, (slice_, plane) in enumerate(zip(slices, pixels, strict=True), start=1):
        whole = copy.copy(slice_)
        whole.file_meta = slice_.file_meta
        whole.PixelData = np.ascontiguousarray(plane, dtype="<i2").tobytes()
        whole.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)


def stored(array: NDArray[Any]) -> NDArray[np.int16]:
    """Return an image as int16, rounded and clipped, as it is in the NIfTI file."""
    if array.dtype == np.int16:
        return array
    limits = np.iinfo(np.int16)
    return np.clip(np.rint(array), limits.min, limits.max).astype(np.int16)


def decimals(values: Iterable[float]) -> list[DSfloat]:
    """Return numbers as decimal strings of at most 16 characters, without the dust of rotations."""
    return [DSfloat(round(float(value), 12) + 0.0, auto_format=True) for value in values]


def _window(image: Volume) -> tuple[float, float]:
    if find_modality(image.modality).kind == "ct":
        return SOFT_TISSUE
    low, high = (float(value) for value in np.percentile(image.array, (1, 99)))
    return round((low + high) / 2), max(1, round(high - low))


def _common(planes: Planes, identity: Identity, modality: str, window: tuple[float, float]) -> Dataset:
    is_ct = find_modality(modality).kind == "ct"
    made = Dataset()
    made.SOPClassUID = CTImageStorage if is_ct else MRImageStorage
    kind = "CT" if is_ct else "MR"
    mark(made, identity, modality=kind, series=SERIES, number=1, description=f"{kind} ({modality})")
    made.ImageType = ["DERIVED", "SECONDARY", "AXIAL" if is_ct else "OTHER"]
    made.DerivationDescription = DERIVATION
    made.BurnedInAnnotation = "NO"
    made.LossyImageCompression = "00"
    made.PatientPosition, made.Laterality = "HFS", ""
    made.AcquisitionNumber = 1
    made.ImageOrientationPatient = decimals(planes.orientation)
    made.PixelSpacing = decimals([planes.row_spacing, planes.column_spacing])
    made.SliceThickness, made.SpacingBetweenSlices = decimals([planes.slice_spacing] * 2)
    made.Rows, made.Columns, made.SamplesPerPixel = planes.rows, planes.columns, 1
    made.PhotometricInterpretation = "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
    made.WindowCenter, made.WindowWidth = decimals(window)
    if is_ct:
        made.KVP = None
        made.RescaleIntercept, made.RescaleSlope, made.RescaleType = 0, 1, "HU"
    else:
        made.ScanningSequence, made.SequenceVariant, made.ScanOptions = "RM", "NONE", ""
        made.MRAcquisitionType, made.EchoTime, made.EchoTrainLength, made.RepetitionTime = "3D", None, None, None
    return made
