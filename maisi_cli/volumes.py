"""Volumes and masks: arrays with their geometry, and NIfTI in and out.

In memory an array is always in RAS+ order (axis 0 to the patient's right, 1 anterior, 2 superior). A file is
written back in the orientation and on the affine that its geometry remembers, so a result lies on the grid it
was made for.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .events import Note, OnEvent, ignore
from .files import NIFTI_ENDS, refuse_overwriting, stem, write_atomic, writes
from .geometry import Affine, Geometry, Size, format_triple
from .labelfile import RENUMBERED, Numbering, numbering_of, read_labels, require_labels, write_labels

if TYPE_CHECKING:
    import nibabel

    from .quality import Verdict
    from .settings import GenerateSettings

AIR_HU = -1000
GZIP_LEVEL = 2  # of 0 to 3: the levels of ISA-L
SHEAR_TOLERANCE = 1e-2
"""How far from zero the cosine between two axes may be; rounding in headers stays far below."""
LABEL_TOLERANCE = 1e-3
"""How far from a whole number a label stored as a float may be."""

_RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """An image: `array` of shape (X, Y, Z) in RAS+ order, float32 or int16, in HU for CT."""

    array: NDArray[Any]
    geometry: Geometry
    modality: str = "ct"

    def __post_init__(self) -> None:
        _check_shape(self.array, self.geometry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """A label volume: uint8 `array` of shape (X, Y, Z) in RAS+ order, with ids of `vocabulary`.

    `numbering` holds the MAISI ids that the numbers 1, 2, ... stand for where the vocabulary is `reference`.
    """

    array: NDArray[np.uint8]
    geometry: Geometry
    vocabulary: str = "maisi"
    numbering: Numbering = ()

    def __post_init__(self) -> None:
        _check_shape(self.array, self.geometry)
        if self.array.dtype != np.uint8:
            raise TypeError(f"a mask is uint8, not {self.array.dtype}")

    def counts(self) -> NDArray[np.int64]:
        """Return the number of voxels of each id, an array of 256 entries."""
        return np.bincount(self.array.ravel(order="K"), minlength=256)

    def ids(self) -> tuple[int, ...]:
        """Return the ids that occur, in order, without the background."""
        return tuple(int(value) for value in np.flatnonzero(self.counts()) if value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One generated case: what was made, how it was judged, and where it was written."""

    index: int
    seed: int
    id: str
    image: Volume | None
    mask: Mask | None
    verdict: Verdict | None = None
    paths: Mapping[str, Path] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


Grid = TypeVar("Grid", Volume, Mask)


def _check_shape(array: NDArray[Any], geometry: Geometry) -> None:
    if array.shape != tuple(geometry.size):
        raise ValueError(f"an array of shape {array.shape} does not fit a geometry of size {geometry.size}")


# --- reading ------------------------------------------------------------------------------------------------


def read_image(path: str | Path, *, modality: str = "ct", channel: int | None = None) -> Volume:
    """Read a 3D NIfTI image of any real type as float32, with the slope and intercept of its header applied.

    Of a 4D image `channel` is read, where one is named.

    Raises `UsageError`, with the fix, for a file that is missing, damaged, not 3D, without a usable affine,
    of complex or colour values, or with values that are not finite.
    """
    path = Path(path)
    image, geometry = _open(path, channel)
    if image.get_data_dtype().kind not in "iufb":
        raise UsageError(
            f"{path} holds {image.get_data_dtype()} values, not one real number a voxel",
            hint="save one channel as int16 or float32",
        )
    with _reading(path):
        array = np.asarray(image.dataobj, dtype=np.float32)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        share = "only values" if bad == array.size else f"{bad} of {array.size} values"
        raise UsageError(
            f"{path} holds {share} that are not finite (NaN or infinity)",
            hint=f"replace them with the background, {AIR_HU} for CT and 0 for MR",
        )
    return Volume(array=_to_ras(array, geometry.axcodes), geometry=geometry, modality=modality)


def read_mask(path: str | Path, *, vocabulary: str = "maisi", on_event: OnEvent = ignore) -> Mask:
    """Read a 3D NIfTI label map as uint8; whole numbers stored as floats are accepted and noted.

    Noted too is a header whose qform and sform put the map at different places: the sform is used. Raises
    `UsageError`, with the fix, for what `read_image` refuses, for fractions and for ids outside 0..255, which
    would be taken for other labels (the networks know a label by its eight bits).
    """
    path = Path(path)
    image, geometry = _open(path)
    if image.get_data_dtype().kind not in "iufb":
        raise UsageError(f"{path} holds {image.get_data_dtype()} values, not labels", hint="save labels as uint8")
    if _disagree(image):
        text = f"the qform and sform of {path.name} disagree: the sform is used here, and other programs may use the qform"
        on_event(Note(text=text, level="warning"))
    with _reading(path):
        array = np.asanyarray(image.dataobj)
    if array.dtype.kind == "f":
        whole = np.rint(array)
        with np.errstate(invalid="ignore"):
            apart = ~(np.abs(array - whole) <= LABEL_TOLERANCE)
        if apart.any():
            example = float(array[apart][0])
            raise UsageError(
                f"{path} holds {example:.6g} and {int(apart.sum()) - 1} more values that are not whole: it is not a label map",
                hint="resample labels with nearest neighbour and save them as uint8",
            )
        array = whole
        on_event(Note(text=f"{path.name} stores its labels as {image.get_data_dtype()}; all are whole numbers"))
    low, high = int(array.min()), int(array.max())
    if low < 0:
        raise UsageError(
            f"{path} holds the negative label {low}; labels lie in 0..255",
            hint="it may be an image and not a label map; otherwise set what is outside to 0",
        )
    if high > 255:
        raise UsageError(
            f"{path} holds label {high}; labels lie in 0..255, and {high} would be read as {high % 256}",
            hint="give classes of your own a free id in 133..199 or 201..255",
        )
    labels = np.asarray(array, dtype=np.uint8)
    return Mask(array=_to_ras(labels, geometry.axcodes), geometry=geometry, vocabulary=vocabulary)


def read_geometry(path: str | Path) -> Geometry:
    """Read the grid of a NIfTI file from its header alone. Raises `UsageError` as `read_image` does."""
    return _open(Path(path))[1]


def is_label_map(path: str | Path) -> bool:
    """Say whether the header of a NIfTI file says that it holds labels. Raises `UsageError` as `read_image` does."""
    return bool(_open(Path(path))[0].header.get_intent()[0] == "label")


def stored_type(path: str | Path) -> str:
    """Return the type in which a NIfTI file stores its values, such as `uint8`. Raises `UsageError` as `read_image` does."""
    return str(_open(Path(path))[0].get_data_dtype().name)


def orientation_doubt(path: str | Path) -> str | None:
    """Say what makes it doubtful where the header of a NIfTI file puts the volume; None where nothing does.

    Raises `UsageError` as `read_image` does.
    """
    path = Path(path)
    image, geometry = _open(path)
    if _disagree(image):
        return f"the qform and sform of {path.name} disagree: the sform is used here, and other programs may use the qform"
    if not image.header["qform_code"] and not image.header["sform_code"]:
        return f"{path.name} says nothing of its orientation: {geometry.axcodes} is assumed, and left and right are a guess"
    return None


def _open(path: Path, channel: int | None = None) -> tuple[nibabel.Nifti1Image, Geometry]:
    import nibabel

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"the file {path} {what}", hint="give the path of a .nii.gz or .nii file")
    if not path.name.endswith(NIFTI_ENDS):
        raise UsageError(f"{path} is not named .nii.gz or .nii", hint="convert it to NIfTI first, e.g. with dcm2niix")
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, *_DAMAGE) as error:
        raise UsageError(f"{path} is not a NIfTI file: {_short(error)}", hint="convert it to NIfTI first") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise UsageError(f"{path} is not a NIfTI file", hint="convert it to NIfTI first")
    if channel is not None and len(image.shape) == 4:
        if channel >= image.shape[3]:
            raise UsageError(f"{path} has {image.shape[3]} channels, and number {channel} is asked for", hint="they are counted from 0")
        image = image.slicer[..., channel]
    shape = tuple(int(n) for n in image.shape)
    if len(shape) != 3 or min(shape) < 1:
        trailing = len(shape) > 3 and all(n == 1 for n in shape[3:])
        raise UsageError(
            f"{path} has {len(shape)} axes ({format_triple(shape)}), not three",
            hint="drop the last axis of length 1 and save it again" if trailing else "save one 3D volume a file",
        )
    return image, _geometry(image.affine, (shape[0], shape[1], shape[2]), path)


_DAMAGE = (OSError, EOFError, ValueError, zlib.error)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise UsageError(f"{path} is damaged: {_short(error)}", hint="copy or convert the file again") from error


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _geometry(affine: NDArray[np.float64] | None, shape: Size, path: Path) -> Geometry:
    import nibabel

    if affine is None or not np.isfinite(affine).all():
        raise UsageError(f"{path} has an affine that is not finite", hint="set the sform of its header")
    matrix = np.asarray(affine, dtype=np.float64)[:3, :3]
    spacing = np.sqrt((matrix**2).sum(axis=0))
    if (spacing < 1e-3).any():
        raise UsageError(
            f"{path} has an affine with a spacing of {format_triple(spacing)} mm",
            hint="set the sform of its header",
        )
    unit = matrix / spacing
    cosines = np.abs(unit.T @ unit - np.eye(3))
    if cosines.max() > SHEAR_TOLERANCE:
        angle = float(np.degrees(np.arccos(np.clip(cosines.max(), 0, 1))))
        raise UsageError(
            f"{path} has a sheared affine: two axes meet at {angle:.1f} instead of 90 degrees (gantry tilt?)",
            hint="resample it to a right-angled grid first",
        )
    stored = nibabel.orientations.io_orientation(affine)
    order = np.argsort(stored[:, 0]).astype(int)
    ras = np.asarray(affine, dtype=np.float64) @ nibabel.orientations.inv_ornt_aff(stored, shape)
    x, y, z = (int(axis) for axis in order)
    return Geometry(
        size=(shape[x], shape[y], shape[z]),
        spacing=(_tidy(spacing[x]), _tidy(spacing[y]), _tidy(spacing[z])),
        affine_rows=_rows(ras),
        axcodes="".join(nibabel.orientations.ornt2axcodes(stored)),
    )


def _disagree(image: nibabel.Nifti1Image) -> bool:
    """Say whether a header has both a qform and an sform, and they lie more than half a voxel apart at some corner."""
    sform, code = image.get_sform(coded=True)
    try:
        qform, other = image.get_qform(coded=True)
    except ValueError:  # of impossible quaternions
        return bool(code)
    if not code or not other:
        return False
    corners = np.array([(x, y, z, 1) for x in (0, image.shape[0]) for y in (0, image.shape[1]) for z in (0, image.shape[2])])
    apart = np.linalg.norm(corners @ (sform - qform).T, axis=1).max()
    return not apart <= np.linalg.norm(sform[:3, :3], axis=0).min() / 2


def _tidy(mm: float) -> float:
    """Return a spacing without the dust of single precision: 0.70312501 for 0.703125."""
    return float(f"{mm:.7g}")


def _rows(matrix: NDArray[np.float64]) -> Affine:
    return tuple(tuple(float(value) + 0.0 for value in row) for row in matrix)


def _to_ras(array: NDArray[Any], axcodes: str) -> NDArray[Any]:
    from nibabel import orientations

    turn = orientations.ornt_transform(orientations.axcodes2ornt(axcodes), _RAS)
    return np.ascontiguousarray(orientations.apply_orientation(array, turn))


# --- writing ------------------------------------------------------------------------------------------------


def write_image(volume: Volume, path: str | Path, *, force: bool = False, description: str | None = None) -> Path:
    """Write an image as int16, rounded and clipped (CT: HU); everything else is as in `write_mask`."""
    return _write(volume.array, np.int16, volume.geometry, Path(path), force=force, description=description, intent="none")


def write_mask(mask: Mask, path: str | Path, *, force: bool = False, description: str | None = None) -> Path:
    """Write a label map as uint8, in the orientation and on the affine of its geometry; return the path.

    The header says mm, one affine in qform and sform, and `SYNTHETIC maisi VERSION` unless `description` (at
    most 79 ASCII characters) is given. Equal content gives equal bytes. The file appears under its name only
    when it is complete. Raises `UsageError` when it exists and `force` is not set, `CannotRun` when it cannot
    be written.
    """
    return _write(mask.array, np.uint8, mask.geometry, Path(path), force=force, description=description, intent="label")


def _nifti_names(id: str, settings: GenerateSettings) -> list[str]:
    kinds = {"paired": ("image", "label"), "image": ("image",), "mask": ("label",)}[settings.mode]
    if "label" in kinds:
        require_labels(Path(settings.out), numbering_of(settings))
    return [f"{id}_{kind}.nii.gz" for kind in kinds]


@writes(_nifti_names)
def save_nifti(sample: Sample, folder: str | Path, *, force: bool = False) -> dict[str, Path]:
    """Write a sample as `{id}_image.nii.gz` and `{id}_label.nii.gz`; the output format `nifti`.

    Beside label maps lies `labels.json`. It is the folder's, no sample's, so it is not among the paths that are returned.
    """
    wanted: dict[str, Volume | Mask] = {}
    if sample.image is not None:
        wanted["image"] = sample.image
    if sample.mask is not None:
        wanted["label"] = sample.mask
    paths = {kind: Path(folder) / f"{sample.id}_{kind}.nii.gz" for kind in wanted}
    for path in paths.values():
        refuse_overwriting(path, force=force)
    for kind, item in wanted.items():
        if isinstance(item, Mask):
            write_mask(item, paths[kind], force=force)
        else:
            write_image(item, paths[kind], force=force)
    if sample.mask is not None:
        write_labels(Path(folder), sample.mask.numbering)
    return paths


_BLOCK = (64, 16, 64)


def _column_major(array: NDArray[Any], dtype: type[np.integer[Any]]) -> NDArray[Any]:
    """Return the array rounded and clipped to a type of integers, with its first axis the fastest, as NIfTI files have it.

    Blocks stay in the processor's cache: a transposition of all at once is several times slower.
    """
    limits = np.iinfo(dtype)
    made = np.empty(array.shape[::-1], dtype)
    starts = (range(0, n, block) for n, block in zip(array.shape, _BLOCK, strict=True))
    for x, y, z in itertools.product(*starts):
        block = array[x : x + _BLOCK[0], y : y + _BLOCK[1], z : z + _BLOCK[2]]
        if array.dtype != dtype:
            block = np.rint(block)
            block = np.clip(block, limits.min, limits.max, out=block).astype(dtype)
        made[z : z + _BLOCK[2], y : y + _BLOCK[1], x : x + _BLOCK[0]] = block.T
    return made.T


def _write(
    array: NDArray[Any], dtype: type[np.integer[Any]], geometry: Geometry, path: Path, *, force: bool, description: str | None, intent: str
) -> Path:
    import nibabel
    from isal import igzip
    from nibabel import orientations

    if not path.name.endswith(NIFTI_ENDS):
        raise UsageError(f"{path} is not named .nii.gz or .nii", hint="name the output *.nii.gz")
    refuse_overwriting(path, force=force)
    turn = orientations.ornt_transform(_RAS, orientations.axcodes2ornt(geometry.axcodes))
    stored = _column_major(orientations.apply_orientation(array, turn), dtype)
    affine = np.asarray(geometry.affine, dtype=np.float64) @ orientations.inv_ornt_aff(turn, array.shape)
    image = nibabel.Nifti1Image(stored, affine)
    header = image.header
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    header.set_xyzt_units("mm", "sec")
    header.set_intent(intent)
    header["descrip"] = (description or synthetic_description()).encode("ascii", "replace")[:79]

    def fill(file: IO[bytes]) -> None:
        if path.name.endswith(".gz"):
            with igzip.IGzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=file, mtime=0) as packed:
                image.to_stream(cast(io.IOBase, packed))
        else:
            image.to_stream(cast(io.IOBase, file))

    write_atomic(path, fill)
    return path


def synthetic_description() -> str:
    """Return what the header of a generated file says."""
    from . import __version__

    return f"SYNTHETIC maisi {__version__}"


# --- fitting a grid -----------------------------------------------------------------------------------------


def pad(item: Grid, size: Size, *, fill: float | None = None) -> Grid:
    """Return a volume or mask on the larger grid `geometry.around(size)`; nothing is resampled.

    The new voxels hold `fill`: without it 0 in masks and MR, air (-1000 HU) in CT. Raises `ValueError` when
    an axis of `size` is smaller. `crop` takes it back exactly.
    """
    before = item.geometry.pad_before(size)
    widths = [(b, new - old - b) for b, new, old in zip(before, size, item.geometry.size, strict=True)]
    if any(new < old for new, old in zip(size, item.geometry.size, strict=True)):
        raise ValueError(f"{size} is smaller than {item.geometry.size}")
    if fill is None:
        fill = AIR_HU if isinstance(item, Volume) and item.modality.startswith("ct") else 0
    array = np.pad(item.array, widths, constant_values=fill)
    return replace(item, array=array, geometry=item.geometry.around(size))


def crop(item: Grid, geometry: Geometry) -> Grid:
    """Return the part of `item`, made on `geometry.around(size)`, that lies on `geometry`: the way back."""
    before = geometry.pad_before(item.geometry.size)
    if not geometry.around(item.geometry.size).close_to(item.geometry):
        raise ValueError(f"the grid {item.geometry} does not lie around {geometry}")
    window = tuple(slice(b, b + n) for b, n in zip(before, geometry.size, strict=True))
    return replace(item, array=np.ascontiguousarray(item.array[window]), geometry=geometry)


def onto(volume: Volume, geometry: Geometry) -> Volume:
    """Return a volume on another grid with the same centre and axes: cropped where the voxels are the same, else interpolated.

    Values are interpolated linearly between voxel centres, and are those of the border beyond it (half a voxel at most
    where the grid covers the same field of view).
    """
    if volume.geometry == geometry:
        return volume
    if geometry.around(volume.geometry.size).close_to(volume.geometry):
        return crop(volume, geometry)
    from scipy import ndimage

    old = volume.geometry
    ratios = [new_mm / mm for new_mm, mm in zip(geometry.spacing, old.spacing, strict=True)]
    firsts = [(n - 1) / 2 - (new - 1) / 2 * ratio for n, new, ratio in zip(old.size, geometry.size, ratios, strict=True)]
    array = ndimage.affine_transform(
        volume.array.astype(np.float32, copy=False), ratios, firsts, output_shape=geometry.size, order=1, mode="nearest"
    )
    return replace(volume, array=array if volume.array.dtype.kind == "f" else np.rint(array).astype(volume.array.dtype), geometry=geometry)


def require_same_grid(image: Volume, mask: Mask) -> None:
    """Raise `UsageError`, with both grids, unless an image and a mask agree to within 0.1 mm."""
    if image.geometry.close_to(mask.geometry, tolerance_mm=0.1):
        return
    one, other = (f"{item.geometry}, first voxel at {format_mm(row[3] for row in item.geometry.affine[:3])} mm" for item in (image, mask))
    raise UsageError(
        f"image and mask lie on different grids: {one}, against {other}",
        hint="resample the mask to the image with nearest neighbour",
    )


def format_mm(values: Iterable[float]) -> str:
    """Format coordinates as `-178.0, 11.3, 94.3`."""
    return ", ".join(f"{value:.1f}" for value in values)


def resample_labels(mask: Mask, size: Size) -> Mask:
    """Return the mask on `size` voxels over the same field of view, each with the label at its centre."""
    indices = [
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(int), old - 1) for new, old in zip(size, mask.geometry.size, strict=True)
    ]
    return replace(mask, array=mask.array[np.ix_(*indices)], geometry=mask.geometry.resized(size))


# --- describing ---------------------------------------------------------------------------------------------


def describe(path: str | Path, *, vocabulary: str = "maisi") -> dict[str, Any]:
    """Return what a NIfTI file holds: grid, type, intensities or labels with names and volumes in ml.

    A file counts as a label map when its header says so, or when it holds whole numbers in 0..255 and
    neighbouring voxels are mostly equal. Names are those of `vocabulary`, but for a label map of a run that numbered its
    labels anew: these are named as its `labels.json` says. Raises `UsageError` as `read_image` does.
    """
    path = Path(path)
    image, geometry = _open(path)
    header = image.header
    with _reading(path):
        array = np.asanyarray(image.dataobj)
    text = header["descrip"].tobytes().split(b"\0")[0].decode("ascii", "replace").strip()
    facts: dict[str, Any] = {
        "schema": "maisi.info/1",
        "path": str(path),
        "size": list(geometry.size),
        "spacing_mm": list(geometry.spacing),
        "fov_mm": [round(value, 3) for value in geometry.fov_mm],
        "orientation": geometry.axcodes,
        "stored_size": [int(n) for n in image.shape],
        "dtype": str(image.get_data_dtype()),
        "units": header.get_xyzt_units()[0],
        "affine": [[float(value) for value in row] for row in image.affine],
        "qform_code": int(header["qform_code"]),
        "sform_code": int(header["sform_code"]),
        "description": text,
        "synthetic": text.startswith("SYNTHETIC"),
        "bytes": path.stat().st_size,
    }
    if _is_label_map(array, header.get_intent()[0]):
        facts["kind"] = "label"
        names = _names(path, vocabulary)
        facts["vocabulary"] = RENUMBERED if names else vocabulary
        facts["labels"] = _labels(np.rint(array).astype(np.int64), geometry, names or _names_of(vocabulary))
        facts["body_envelope"] = any(row["id"] == 200 for row in facts["labels"])
    else:
        facts["kind"] = "image"
        finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        if array.dtype.kind in "iufb" and finite.size:
            low, first, middle, last, high = (float(v) for v in np.percentile(finite, (0, 1, 50, 99, 100)))
            facts["intensity"] = {"min": low, "p1": first, "median": middle, "p99": last, "max": high}
            facts["not_finite"] = int(array.size - finite.size)
    found = record_beside(path)
    facts["record"] = str(found) if found else None
    return facts


def record_beside(path: Path) -> Path | None:
    """Return the run record that lies beside a generated file: `{id}_record.json` for `{id}_image.nii.gz`."""
    id = stem(path).removesuffix("_image").removesuffix("_label")
    for name in (f"{id}_record.json", "record.json"):
        if (path.parent / name).is_file():
            return path.parent / name
    return None


def _is_label_map(array: NDArray[Any], intent: str) -> bool:
    if array.dtype.kind not in "iufb":
        return False
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255) or (array.dtype.kind == "f" and not np.array_equal(array, np.rint(array))):
        return False
    if intent == "label":
        return True
    here, after = array[:-1], array[1:]
    inside = (here != 0) | (after != 0)
    total = int(np.count_nonzero(inside))
    return total == 0 or bool(np.count_nonzero((here == after) & inside) > 0.5 * total)


def _names(path: Path, vocabulary: str) -> Mapping[int, str]:
    """Return the names of a label map whose run numbered its labels anew, and of no other."""
    found = read_labels(path.parent) if vocabulary == "maisi" and record_beside(path) else None
    return {row["id"]: row["name"] for row in found["labels"]} if found and found.get("vocabulary") == RENUMBERED else {}


def _names_of(vocabulary: str) -> Mapping[int, str]:
    from .anatomy import maisi, remap_table

    return {label.id: label.name for label in maisi().labels} if vocabulary == "maisi" else remap_table(vocabulary).names


def _labels(array: NDArray[np.int64], geometry: Geometry, names: Mapping[int, str]) -> list[dict[str, Any]]:
    voxel_ml = float(np.prod(geometry.spacing)) / 1000
    counts = np.bincount(array.ravel(), minlength=1)
    return [
        {
            "id": int(value),
            "name": names.get(int(value), f"label {value}"),
            "voxels": int(counts[value]),
            "ml": round(float(counts[value]) * voxel_ml, 3),
        }
        for value in np.flatnonzero(counts)
        if value
    ]
