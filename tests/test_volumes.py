"""NIfTI in and out on the grid a file came from, padding and its inverse, and what unfit files are told."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from maisi_cli import __version__, files, volumes
from maisi_cli.errors import CannotRun, UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.volumes import (
    Mask,
    Sample,
    Volume,
    crop,
    describe,
    onto,
    pad,
    read_image,
    read_mask,
    record_beside,
    require_same_grid,
    resample_labels,
    save_nifti,
    write_image,
    write_mask,
)
from nibabel.affines import from_matvec

SIZES = st.tuples(*[st.integers(1, 40)] * 3)
CODES = ["RAS", "LPS", "LAS", "RPI", "PIR", "ASL", "SAR", "IPL"]


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """Return the rotation about x, then y, then z."""
    result = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Save an array as any NIfTI-writing tool would."""
    nibabel.Nifti1Image(array, np.diag([1.5, 1.5, 3, 1.0]) if affine is None else affine).to_filename(path)
    return path


def small_mask(size: tuple[int, int, int] = (6, 7, 8), seed: int = 0) -> Mask:
    """Return random labels."""
    labels = np.random.default_rng(seed).integers(0, 133, size).astype(np.uint8)
    return Mask(array=labels, geometry=Geometry(size=size, spacing=(1.5, 1.5, 3.0)))


def small_volume(size: tuple[int, int, int] = (6, 7, 8), seed: int = 0) -> Volume:
    """Return random HU."""
    hu = np.random.default_rng(seed).normal(0, 400, size).astype(np.float32)
    return Volume(array=hu, geometry=Geometry(size=size, spacing=(1.5, 1.5, 3.0)))


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ct_torso.nii.gz", "mr_slab.nii.gz"])
def test_real_image_returns_to_its_own_grid(name, shared, tmp_path):
    source = shared(f"data/{name}")
    written = nibabel.load(write_image(read_image(source), tmp_path / name))
    original = nibabel.load(source)
    assert np.abs(written.affine - original.affine).max() < 1e-6
    assert np.array_equal(np.asanyarray(written.dataobj), np.asanyarray(original.dataobj))
    assert nibabel.aff2axcodes(written.affine) == nibabel.aff2axcodes(original.affine)


def test_real_mask_returns_to_its_own_grid(shared, tmp_path):
    source = shared("data/ct_torso_seg.nii.gz")
    written = nibabel.load(write_mask(read_mask(source), tmp_path / "seg.nii"))
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(np.asanyarray(written.dataobj), np.asanyarray(nibabel.load(source).dataobj))


@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_is_read_as_ras_and_written_back(codes, tmp_path):
    ornt = nibabel.orientations.axcodes2ornt(codes)
    spacing = (0.7, 0.9, 2.5)
    ras = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    ras_affine = np.diag([*spacing, 1.0])
    ras_affine[:3, 3] = (-20, 30, 70)
    turn = nibabel.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), ornt)
    stored = nibabel.orientations.apply_orientation(ras, turn)
    affine = ras_affine @ nibabel.orientations.inv_ornt_aff(turn, ras.shape)
    volume = read_image(save(tmp_path / "in.nii.gz", stored, affine))
    assert volume.geometry.axcodes == codes
    assert volume.geometry.size == (4, 5, 6)
    assert np.array_equal(volume.array, ras)
    assert volume.geometry.spacing == pytest.approx(spacing)
    assert np.allclose(volume.geometry.affine, ras_affine, atol=1e-5)
    again = nibabel.load(write_image(volume, tmp_path / "out.nii.gz"))
    assert np.array_equal(np.asanyarray(again.dataobj), stored)
    assert np.abs(again.affine - nibabel.load(tmp_path / "in.nii.gz").affine).max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-40, 40)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
    flips=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    order=st.permutations(range(3)),
)
def test_oblique_affine_survives(angles, spacing, flips, order, tmp_path_factory):
    folder = tmp_path_factory.mktemp("oblique")
    matrix = (rotation(angles) * (np.array(spacing) * flips))[:, list(order)]
    affine = from_matvec(matrix, (12.5, -80.25, 41.0))
    array = np.random.default_rng(0).integers(0, 200, (3, 4, 5)).astype(np.uint8)
    mask = read_mask(save(folder / "in.nii", array, affine))
    again = nibabel.load(write_mask(mask, folder / "out.nii"))
    assert np.array_equal(np.asanyarray(again.dataobj), array)
    stored = nibabel.load(folder / "in.nii").affine
    assert np.abs(again.affine - stored).max() < 1e-5 * max(1, np.abs(stored).max())
    # a qform keeps three single-precision parts of a quaternion: near half turns that is 1e-3 radians
    assert np.abs(again.get_qform() - again.affine).max() < 2e-3 * max(spacing)
    # a world point is the same voxel in memory and on disk
    first = np.asarray(mask.geometry.affine)[:3, 3]
    voxel = np.rint(np.linalg.solve(stored, [*first, 1])[:3]).astype(int)
    assert array[tuple(voxel)] == mask.array[0, 0, 0]


def test_header_says_what_the_house_promises(tmp_path):
    image = nibabel.load(write_image(small_volume(), tmp_path / "a_image.nii.gz"))
    label = nibabel.load(write_mask(small_mask(), tmp_path / "a_label.nii.gz"))
    assert image.get_data_dtype() == np.int16
    assert label.get_data_dtype() == np.uint8
    assert label.header.get_intent()[0] == "label"
    assert image.header.get_intent()[0] == "none"
    for written in (image, label):
        header = written.header
        assert header.get_xyzt_units()[0] == "mm"
        assert header["descrip"].item().decode() == f"SYNTHETIC maisi {__version__}"
        assert int(header["qform_code"]) == int(header["sform_code"]) == 1
        assert np.allclose(header.get_qform(), header.get_sform())
        assert nibabel.aff2axcodes(written.affine) == ("R", "A", "S")


def test_hu_is_rounded_and_clipped(tmp_path):
    array = np.array([-40000.0, -0.6, 0.4, 1.5, 2.5, 99999.0], dtype=np.float32).reshape(6, 1, 1)
    volume = Volume(array=array, geometry=Geometry(size=(6, 1, 1), spacing=(1.0, 1.0, 1.0)))
    stored = np.asanyarray(nibabel.load(write_image(volume, tmp_path / "x.nii")).dataobj)
    assert stored.ravel().tolist() == [-32768, -1, 0, 2, 2, 32767]


def test_slope_and_intercept_are_applied(tmp_path):
    image = nibabel.Nifti1Image(np.arange(8, dtype=np.uint16).reshape(2, 2, 2), np.eye(4))
    image.header.set_slope_inter(2.0, -1024)
    image.to_filename(tmp_path / "scaled.nii")
    assert read_image(tmp_path / "scaled.nii").array.ravel().tolist() == [-1024 + 2 * n for n in range(8)]


def test_equal_content_gives_equal_bytes(tmp_path):
    one = write_mask(small_mask(), tmp_path / "one.nii.gz").read_bytes()
    other = write_mask(small_mask(), tmp_path / "other_name.nii.gz").read_bytes()
    assert hashlib.sha256(one).digest() == hashlib.sha256(other).digest()
    assert one[3] == 0  # no file name in the gzip header
    assert one[4:8] == bytes(4)  # no time


# --- never a half-written or lost file --------------------------------------------------------------


def test_an_existing_file_is_kept_without_force(tmp_path):
    path = write_mask(small_mask(), tmp_path / "a.nii.gz")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="--force"):
        write_mask(small_mask(seed=1), path)
    assert path.read_bytes() == before
    write_mask(small_mask(seed=1), path, force=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("full"), MemoryError()])
def test_an_interruption_leaves_nothing_behind(error, tmp_path):
    old = write_mask(small_mask(), tmp_path / "a.nii.gz").read_bytes()

    def fails_half_way(file):
        file.write(b"half")
        raise error

    for name in ("a.nii.gz", "new.nii.gz"):
        with pytest.raises(type(error)):
            files.write_atomic(tmp_path / name, fails_half_way)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]
    assert (tmp_path / "a.nii.gz").read_bytes() == old


def test_a_full_disk_is_said_in_one_line(tmp_path):
    def full(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(CannotRun, match="No space left"):
        files.write_atomic(tmp_path / "a.nii.gz", full)
    assert list(tmp_path.iterdir()) == []


def test_files_get_the_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    files.write_atomic(tmp_path / "new", b"x")
    assert (tmp_path / "new").stat().st_mode == plain.stat().st_mode


def test_save_nifti_names_both_files_and_writes_none_when_one_exists(tmp_path):
    sample = Sample(index=0, seed=1, id="case7", image=small_volume(), mask=small_mask())
    paths = save_nifti(sample, tmp_path / "run")
    assert {kind: path.name for kind, path in paths.items()} == {
        "image": "case7_image.nii.gz",
        "label": "case7_label.nii.gz",
    }
    paths["image"].unlink()
    with pytest.raises(UsageError, match="case7_label"):
        save_nifti(sample, tmp_path / "run")
    assert not paths["image"].exists()


# --- what is refused, each with its fix ---------------------------------------------------------------


def affine_with(matrix: list[list[float]]) -> np.ndarray:
    return from_matvec(np.array(matrix, dtype=float), (0, 0, 0))


REFUSED_MASKS = {
    "fractions": (np.full((2, 2, 2), 1.5, np.float32), None, "not whole", "nearest"),
    "nan": (np.full((2, 2, 2), np.nan, np.float32), None, "not whole", "nearest"),
    "above_255": (np.full((2, 2, 2), 300, np.int16), None, "label 300.*read as 44", "free id"),
    "negative": (np.full((2, 2, 2), -1, np.int16), None, "negative label -1", "set what is outside to 0"),
    "four_axes": (np.zeros((2, 2, 2, 3), np.uint8), None, "4 axes", "one 3D volume"),
    "last_axis_1": (np.zeros((2, 2, 2, 1), np.uint8), None, "4 axes", "drop the last axis"),
    "two_axes": (np.zeros((4, 4), np.uint8), None, "2 axes", "one 3D volume"),
    "complex": (np.zeros((2, 2, 2), np.complex64), None, "complex64", "uint8"),
    "shear": (
        np.zeros((2, 2, 2), np.uint8),
        affine_with([[1, 0.3, 0], [0, 1, 0], [0, 0, 1]]),
        "sheared affine.*73.3",
        "resample",
    ),
}


@pytest.mark.parametrize("case", REFUSED_MASKS)
def test_unfit_masks_are_refused_with_the_fix(case, tmp_path):
    array, affine, problem, fix = REFUSED_MASKS[case]
    path = save(tmp_path / "x.nii", array, affine)
    with pytest.raises(UsageError, match=problem) as caught:
        read_mask(path)
    assert fix in (caught.value.hint or "")
    assert "x.nii" in caught.value.message


@pytest.mark.parametrize("bad", ["zero", "nan"])
def test_an_affine_without_a_grid_is_refused(bad, tmp_path):
    path = save(tmp_path / "x.nii", np.zeros((2, 2, 2), np.uint8))
    content = bytearray(path.read_bytes())
    row = np.zeros(4, "<f4") if bad == "zero" else np.full(4, np.nan, "<f4")
    content[280:328] = row.tobytes() * 3  # srow_x, srow_y, srow_z
    path.write_bytes(content)
    with pytest.raises(UsageError, match="affine"):
        read_image(path)


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_image(tmp_path / "none.nii.gz")
    with pytest.raises(UsageError, match="is a folder"):
        read_image(tmp_path)
    (tmp_path / "x.png").write_bytes(b"png")
    with pytest.raises(UsageError, match="not named"):
        read_image(tmp_path / "x.png")
    for name in ("text.nii", "text.nii.gz", "empty.nii.gz"):
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"not a volume at all" * 40)
        with pytest.raises(UsageError, match="not a NIfTI"):
            read_image(tmp_path / name)
    whole = write_image(small_volume((30, 30, 30)), tmp_path / "whole.nii.gz").read_bytes()
    (tmp_path / "half.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="damaged"):
        read_image(tmp_path / "half.nii.gz")


@pytest.mark.parametrize(("values", "problem"), [([np.nan] * 8, "only values"), ([0.0] * 7 + [np.inf], "1 of 8 values")])
def test_images_with_values_that_are_not_finite_are_refused(values, problem, tmp_path):
    path = save(tmp_path / "x.nii", np.array(values, np.float32).reshape(2, 2, 2))
    with pytest.raises(UsageError, match=problem) as caught:
        read_image(path)
    assert "-1000 for CT" in (caught.value.hint or "")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int32, np.uint16])
def test_labels_of_any_type_are_read_when_whole(dtype, tmp_path):
    labels = small_mask().array
    events = []
    mask = read_mask(save(tmp_path / "x.nii.gz", labels.astype(dtype)), on_event=events.append)
    assert mask.array.dtype == np.uint8
    assert np.array_equal(mask.array, labels)
    assert len(events) == (np.dtype(dtype).kind == "f")


# --- arrays and geometry agree ---------------------------------------------------------------------


def test_arrays_must_fit_their_geometry():
    geometry = Geometry(size=(2, 3, 4), spacing=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="does not fit"):
        Volume(array=np.zeros((2, 3, 5), np.float32), geometry=geometry)
    with pytest.raises(TypeError, match="uint8"):
        Mask(array=np.zeros((2, 3, 4), np.int16), geometry=geometry)


@settings(max_examples=60, deadline=None)
@given(size=SIZES, multiple=st.sampled_from([4, 16, 32]))
def test_crop_undoes_pad(size, multiple):
    mask = small_mask(size)
    wider = pad(mask, mask.geometry.padded(multiple).size)
    assert all(n % multiple == 0 for n in wider.array.shape)
    assert wider.array.sum() == mask.array.sum()  # the frame is background
    back = crop(wider, mask.geometry)
    assert back.geometry == mask.geometry
    assert np.array_equal(back.array, mask.array)
    # a voxel keeps its place in the world
    before = mask.geometry.pad_before(wider.geometry.size)
    moved = np.asarray(wider.geometry.affine) @ [*before, 1]
    assert np.allclose(moved, np.asarray(mask.geometry.affine)[:, 3])


@pytest.mark.parametrize("size", [(9, 14, 20), (25, 10, 33)])
def test_a_volume_put_on_another_grid_keeps_what_is_linear_in_the_world(size):
    own = Geometry(size=size, spacing=(1.5, 0.8, 2.0), affine_rows=((0, -0.8, 0, 7), (1.5, 0, 0, -3), (0, 0, 2, 11), (0, 0, 0, 1)))
    fov = own.fov_mm
    shown = own.regridded((16, 16, 16), (fov[0] / 16, fov[1] / 16, fov[2] / 16))

    def ramp(geometry):
        at = np.stack(np.meshgrid(*(np.arange(n) for n in geometry.size), indexing="ij"), -1) @ np.asarray(geometry.affine)[:3, :3].T
        return ((at + np.asarray(geometry.affine)[:3, 3]) @ np.array([3.0, -2.0, 5.0])).astype(np.float32)

    back = onto(Volume(array=ramp(shown), geometry=shown), own)
    assert back.geometry == own
    inside = (slice(2, -2),) * 3  # the outermost voxels may lie beyond the centres of the other grid
    assert np.allclose(back.array[inside], ramp(own)[inside], atol=1e-3)
    assert back.array.min() >= ramp(shown).min()
    assert back.array.max() <= ramp(shown).max()


def test_a_volume_is_put_on_its_own_grid_without_a_copy_and_cropped_where_voxels_agree():
    own = Geometry(size=(10, 11, 12), spacing=(2.0, 2.0, 3.0))
    array = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
    wide = Volume(array=array, geometry=own.around((16, 16, 16)))
    assert onto(wide, wide.geometry) is wide
    assert np.array_equal(onto(wide, own).array, array[3:13, 2:13, 2:14])


def test_pad_fills_with_the_background_of_the_modality():
    ct = small_volume()
    mr = Volume(array=ct.array, geometry=ct.geometry, modality="mri-t1")
    assert pad(ct, (16, 16, 16)).array[0, 0, 0] == -1000
    assert pad(mr, (16, 16, 16)).array[0, 0, 0] == 0
    assert pad(ct, (16, 16, 16), fill=7).array[0, 0, 0] == 7
    with pytest.raises(ValueError, match="smaller"):
        pad(ct, (4, 16, 16))


def test_crop_refuses_another_grid():
    wide = pad(small_mask(), (16, 16, 16))
    elsewhere = Geometry(size=(6, 7, 8), spacing=(1.0, 1.5, 3.0))
    with pytest.raises(ValueError, match="does not lie around"):
        crop(wide, elsewhere)


@settings(max_examples=40, deadline=None)
@given(size=SIZES, factor=st.integers(1, 3))
def test_resampled_labels_repeat_and_return(size, factor):
    mask = small_mask(size)
    finer = resample_labels(mask, tuple(n * factor for n in size))
    expected = mask.array
    for axis in range(3):
        expected = np.repeat(expected, factor, axis=axis)
    assert np.array_equal(finer.array, expected)
    assert np.array_equal(resample_labels(finer, size).array, mask.array)
    assert finer.geometry.fov_mm == pytest.approx(mask.geometry.fov_mm)


def test_coarser_labels_are_those_at_the_voxel_centres():
    labels = np.arange(6, dtype=np.uint8).reshape(6, 1, 1)
    mask = Mask(array=labels, geometry=Geometry(size=(6, 1, 1), spacing=(1.0, 1.0, 1.0)))
    assert resample_labels(mask, (2, 1, 1)).array.ravel().tolist() == [1, 4]
    assert resample_labels(mask, (3, 1, 1)).geometry.spacing == (2.0, 1.0, 1.0)


def test_different_grids_are_shown_side_by_side():
    image, mask = small_volume(), small_mask((6, 7, 9))
    require_same_grid(image, small_mask())
    with pytest.raises(UsageError, match=r"6x7x8 voxels.*6x7x9 voxels"):
        require_same_grid(image, mask)


# --- describe --------------------------------------------------------------------------------


def test_describe_a_real_image(shared):
    facts = describe(shared("data/mr_slab.nii.gz"))
    assert facts["schema"] == "maisi.info/1"
    assert facts["kind"] == "image"
    assert facts["size"] == [117, 91, 20]
    assert facts["spacing_mm"] == [3.0, 3.0, 3.0]
    assert facts["fov_mm"] == [351.0, 273.0, 60.0]
    assert facts["orientation"] == "LPS"
    assert facts["dtype"] == "int16"
    assert facts["intensity"]["min"] == -47
    assert facts["intensity"]["max"] == 833
    assert facts["synthetic"] is False


def test_describe_labels_in_their_own_vocabulary(shared):
    facts = describe(shared("data/ct_torso_seg.nii.gz"), vocabulary="totalsegmentator")
    assert facts["kind"] == "label"
    assert len(facts["labels"]) == 61
    assert facts["body_envelope"] is False
    spleen = next(row for row in facts["labels"] if row["id"] == 1)
    assert spleen["name"] == "spleen"
    assert spleen["ml"] == pytest.approx(spleen["voxels"] * 27 / 1000)


def test_describe_a_generated_pair_and_its_record(tmp_path):
    sample = Sample(index=0, seed=1, id="case7", image=small_volume(), mask=small_mask())
    paths = save_nifti(sample, tmp_path)
    assert describe(paths["image"])["record"] is None
    record = tmp_path / "case7_record.json"
    record.write_text("{}")
    for kind in ("image", "label"):
        facts = describe(paths[kind])
        assert facts["kind"] == kind  # random labels: the header's intent decides
        assert facts["synthetic"] is True
        assert facts["record"] == str(record)
    assert record_beside(tmp_path / "case7_image.nii.gz") == record
    assert record_beside(tmp_path / "case70_image.nii.gz") is None


def test_an_eight_bit_image_is_not_taken_for_labels(tmp_path):
    noisy = np.random.default_rng(0).integers(0, 256, (20, 20, 20)).astype(np.uint8)
    assert describe(save(tmp_path / "mr.nii", noisy))["kind"] == "image"
    blocks = np.zeros((20, 20, 20), np.uint8)
    blocks[4:15, 4:15, 4:15] = 3
    facts = describe(save(tmp_path / "seg.nii", blocks))
    assert facts["kind"] == "label"
    assert facts["labels"] == [{"id": 3, "name": "spleen", "voxels": 11**3, "ml": round(11**3 * 1.5 * 1.5 * 3 / 1000, 3)}]


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3), flip=st.tuples(*[st.booleans()] * 3), dtype=st.sampled_from([np.int16, np.uint8]),
    block=st.tuples(*[st.integers(1, 5)] * 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_blocks_round_clip_and_turn_as_the_whole(
    shape: tuple[int, int, int], flip: tuple[bool, bool, bool], dtype: Any, block: tuple[int, int, int], seed: int
) -> None:
    array = np.random.default_rng(seed).normal(0, 3e4, shape).astype(np.float32)[tuple(slice(None, None, -1 if f else 1) for f in flip)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volumes, "_BLOCK", block)
        made = volumes._column_major(array, dtype)
    limits = np.iinfo(dtype)
    assert made.dtype == dtype
    assert made.flags.f_contiguous
    assert np.array_equal(made, np.clip(np.rint(array), limits.min, limits.max).astype(dtype))


def test_a_file_holds_what_nibabel_would_write(tmp_path: Path) -> None:
    """Another deflate, the same bytes inside."""
    array = np.random.default_rng(0).integers(-1000, 1000, (7, 5, 6)).astype(np.int16)
    path = write_image(
        Volume(array=array, geometry=Geometry(size=(7, 5, 6), spacing=(1.0, 1.5, 2.0)), modality="ct"), tmp_path / "a.nii.gz"
    )
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header), tmp_path / "b.nii")
    assert gzip.decompress(path.read_bytes()) == (tmp_path / "b.nii").read_bytes()
