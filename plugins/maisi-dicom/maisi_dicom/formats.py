"""The output formats: what `--format dicom`, `dicom-ct`, `dicom-seg` and `rtstruct` write.

A segmentation or structure set refers to an image series; each format brings the series that it refers to, and one that
this run has written already is left as it is. So any of them can be combined, in any order, and none refers to nothing.
A sample without an image (`--mode mask`) has no series: its files lie in a frame of reference of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pydicom
from maisi_cli.catalog import modality as find_modality
from maisi_cli.errors import UsageError
from maisi_cli.files import writes
from maisi_cli.labelfile import numbering_of
from maisi_cli.volumes import Sample, read_geometry, require_same_grid
from pydicom.dataset import Dataset

from .identity import Identity, identify
from .placing import Write, place
from .planes import planes_of
from .segmentation import SEGMENTATION, segmentation_of, write_segmentation
from .series import SERIES, SOFT_TISSUE, headers, series_of, write_series
from .structures import STRUCTURES, structures_of, write_structures

if TYPE_CHECKING:
    from maisi_cli.settings import GenerateSettings

ENDS = {"series": "_dicom", "seg": "_seg.dcm", "rtstruct": "_rtstruct.dcm"}
"""How the name of each kind of thing ends."""


def _names(format: str, *needs: str) -> Callable[[str, GenerateSettings], list[str]]:
    """Return the names that a format writes; `needs` are the kinds without which it would be empty or a lie."""

    def names(id: str, settings: GenerateSettings) -> list[str]:
        has = {"paired": ("series", "seg", "rtstruct"), "image": ("series",), "mask": ("seg", "rtstruct")}[settings.mode]
        _require(format, has=has, modality=settings.modality, needs=needs)
        if "series" not in needs and "seg" in has and numbering_of(settings):
            raise UsageError(
                f"format {format} holds labels of the MAISI vocabulary, and --compat reference numbers those of --anatomy anew",
                hint="leave the format or --compat out",
            )
        if settings.mask is not None and Path(settings.mask).is_file():
            planes_of(read_geometry(settings.mask))  # a sheared grid is refused now, not when the work is done
        kinds = [kind for kind in ("series", *(needs or ("seg",))) if kind in has]
        return [f"{id}{ENDS[kind]}" for kind in dict.fromkeys(kinds)]

    return names


def _require(format: str, *, has: tuple[str, ...], modality: str, needs: tuple[str, ...]) -> None:
    if any(kind not in has for kind in needs):
        lacks, mode = ("image", "paired or image") if "series" in needs else ("mask", "paired or mask")
        raise UsageError(f"format {format} needs samples with {'an' if lacks == 'image' else 'a'} {lacks}", hint=f"use --mode {mode}")
    if format == "dicom-ct" and find_modality(modality).kind != "ct":
        raise UsageError(f"format dicom-ct holds no {modality}", hint="use --format dicom, which writes MR as MR")


@writes(_names("dicom"))
def save_dicom(sample: Sample, folder: str | Path, *, force: bool = False) -> dict[str, Path]:
    """Write the image series to `{id}_dicom` and the mask to `{id}_seg.dcm`, whichever the sample has."""
    return _save("dicom", sample, Path(folder), (), force=force)


@writes(_names("dicom-ct", "series"))
def save_ct(sample: Sample, folder: str | Path, *, force: bool = False) -> dict[str, Path]:
    """Write the CT series alone, to `{id}_dicom`. Raises `UsageError` for MR and for a sample without an image."""
    return _save("dicom-ct", sample, Path(folder), ("series",), force=force)


@writes(_names("dicom-seg", "seg"))
def save_seg(sample: Sample, folder: str | Path, *, force: bool = False) -> dict[str, Path]:
    """Write the mask to `{id}_seg.dcm`, and the image series that it refers to."""
    return _save("dicom-seg", sample, Path(folder), ("seg",), force=force)


@writes(_names("rtstruct", "rtstruct"))
def save_rtstruct(sample: Sample, folder: str | Path, *, force: bool = False) -> dict[str, Path]:
    """Write the mask's contours to `{id}_rtstruct.dcm`, and the image series that they refer to."""
    return _save("rtstruct", sample, Path(folder), ("rtstruct",), force=force)


def _save(format: str, sample: Sample, folder: Path, needs: tuple[str, ...], *, force: bool) -> dict[str, Path]:
    has = ("series",) * (sample.image is not None) + ("seg", "rtstruct") * (sample.mask is not None)
    _require(format, has=has, modality=sample.image.modality if sample.image else "ct", needs=needs)
    if sample.image is not None and sample.mask is not None:
        require_same_grid(sample.image, sample.mask)
    wanted = [kind for kind in dict.fromkeys(("series", *(needs or ("seg",)))) if kind in has]
    paths = {kind: folder / f"{sample.id}{ENDS[kind]}" for kind in wanted}
    identity = identify(sample, folder)
    missing = [kind for kind, path in paths.items() if not _is_there(kind, path, sample, identity)]
    if missing:
        slices = _slices(sample, identity)
        place({paths[kind]: _writer(kind, sample, slices, identity) for kind in missing}, force=force)
    return paths


def _slices(sample: Sample, identity: Identity) -> list[Dataset]:
    if sample.image is not None:
        return series_of(sample.image, identity)
    assert sample.mask is not None
    return headers(planes_of(sample.mask.geometry), identity, "ct", SOFT_TISSUE)


def _writer(kind: str, sample: Sample, slices: list[Dataset], identity: Identity) -> Write:
    image, mask, refers = sample.image, sample.mask, sample.image is not None
    if kind == "series":
        assert image is not None
        return lambda path: write_series(image, slices, path)
    assert mask is not None
    if kind == "seg":
        return lambda path: write_segmentation(segmentation_of(mask, slices, identity, refers=refers), path)
    return lambda path: write_structures(structures_of(mask, slices, identity, refers=refers), path)


def _is_there(kind: str, path: Path, sample: Sample, identity: Identity) -> bool:
    """Say whether this very thing, of this very run, was written already by another format."""
    files, count = [path], 1
    if kind == "series":
        assert sample.image is not None
        files, count = sorted(path.glob("*.dcm")), sample.image.geometry.size[2]
    if len(files) != count or not files[0].is_file():
        return False
    role = {"series": SERIES, "seg": SEGMENTATION, "rtstruct": STRUCTURES}[kind]
    try:
        found = pydicom.dcmread(files[0], stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
    except (pydicom.errors.InvalidDicomError, OSError):
        return False
    return bool(found.get("SeriesInstanceUID") == identity.uid(role))
