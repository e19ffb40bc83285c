"""Grids: any two of size, spacing and field of view give the third, and padding moves no voxel in the world."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry, format_triple, parse_mm, parse_size

usual = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SIZES = st.tuples(*[st.integers(1, 1024)] * 3)
MM = st.integers(1, 200_000).map(lambda n: n / 10_000)  # 0.0001..20 mm
SPACINGS = st.tuples(MM, MM, MM)


@st.composite
def affines(draw: st.DrawFn) -> tuple[tuple[float, ...], ...]:
    """Draw a rotated and shifted voxel-to-world matrix."""
    a, b = draw(st.floats(-math.pi, math.pi)), draw(st.floats(-math.pi, math.pi))
    x, y, z = draw(st.tuples(*[st.floats(0.3, 5)] * 3))
    move = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    turn = [
        [math.cos(a), -math.sin(a) * math.cos(b), math.sin(a) * math.sin(b)],
        [math.sin(a), math.cos(a) * math.cos(b), -math.cos(a) * math.sin(b)],
        [0.0, math.sin(b), math.cos(b)],
    ]
    rows = [(row[0] * x, row[1] * y, row[2] * z, shift) for row, shift in zip(turn, move, strict=True)]
    return (*rows, (0.0, 0.0, 0.0, 1.0))


def world(geometry: Geometry, voxel: tuple[int, int, int]) -> list[float]:
    return [sum(m * n for m, n in zip(row, (*voxel, 1), strict=True)) for row in geometry.affine[:3]]


@usual
@given(SIZES, SPACINGS)
def test_any_two_of_size_spacing_and_fov_give_the_third(size, spacing):
    fov = tuple(n * mm for n, mm in zip(size, spacing, strict=True))
    by_both = Geometry.parse(size=size, spacing=spacing)
    by_fov = Geometry.parse(size=size, fov=fov)
    by_spacing = Geometry.parse(spacing=spacing, fov=fov)
    assert by_both.fov_mm == pytest.approx(fov, abs=1e-6)
    assert by_fov.spacing == pytest.approx(spacing)
    assert by_spacing.size == size
    assert by_both.close_to(by_fov)
    assert by_both.close_to(by_spacing)


@usual
@given(SIZES, SPACINGS, st.integers(0, 2), st.floats(0.9, 1.1))
def test_all_three_must_agree_to_half_a_percent(size, spacing, axis, factor):
    assume(abs(abs(factor - 1) - 0.005) > 1e-4)
    fov = [n * mm for n, mm in zip(size, spacing, strict=True)]
    fov[axis] *= factor
    assume(fov[axis] > 0.01)  # fields of view are kept to 0.000001 mm
    if abs(factor - 1) < 0.005 / 1.01:
        assert Geometry.parse(size=size, spacing=spacing, fov=fov).size == size
    elif abs(factor - 1) > 0.0052:
        with pytest.raises(UsageError, match="give two of the three"):
            Geometry.parse(size=size, spacing=spacing, fov=fov)


@pytest.mark.parametrize("given_one", [{}, {"size": "8"}, {"spacing": "1"}, {"fov": "300"}])
def test_one_alone_is_not_enough(given_one):
    with pytest.raises(UsageError, match="two of size, spacing and fov"):
        Geometry.parse(**given_one)


@usual
@given(SIZES)
def test_a_size_reads_back_as_it_is_written(size):
    assert parse_size(format_triple(size)) == parse_size(list(size)) == size


@usual
@given(SPACINGS)
def test_a_spacing_reads_back_as_it_is_written(spacing):
    assert parse_mm(format_triple(spacing)) == parse_mm(spacing) == spacing


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("512x512x128", (512, 512, 128)),
        (" 512X512x128 ", (512, 512, 128)),
        ("512×512×128", (512, 512, 128)),
        ("64", (64, 64, 64)),
        ("64.0x32x32", (64, 32, 32)),
    ],
)
def test_sizes_are_read_in_the_usual_spellings(text, values):
    assert parse_size(text) == values


@pytest.mark.parametrize(
    "text", ["", "x", "512x512", "1x2x3x4", "512x512x", "-1x2x3", "1e3", "0x2x3", "axbxc", "1,2,3", "nan", "infxinfxinf", [1, 2], [0, 1, 1],
             [1, None, 1], [math.nan, 1, 1], [math.inf, 1, 1]]
)  # fmt: skip
def test_what_is_not_three_positive_numbers_is_refused(text):
    for parse in (parse_size, parse_mm):
        with pytest.raises(UsageError):
            parse(text)


def test_half_a_voxel_is_refused_in_a_size_only():
    with pytest.raises(UsageError, match="whole voxels"):
        parse_size("32.5x32x32")
    assert parse_mm("32.5x32x32") == (32.5, 32, 32)


@usual
@given(SIZES, SPACINGS, SIZES)
def test_another_number_of_voxels_keeps_the_field_of_view(size, spacing, other):
    geometry = Geometry(size=size, spacing=spacing)
    resized = geometry.resized(other)
    assert resized.size == other
    assert resized.fov_mm == pytest.approx(geometry.fov_mm, abs=1e-5)
    assert resized.resized(size).spacing == pytest.approx(spacing, abs=1e-5)


@usual
@given(SIZES, affines(), st.sampled_from([1, 2, 4, 16, 24, 128]), st.tuples(*[st.integers(-5, 2000)] * 3))
def test_padding_is_the_smallest_and_leaves_every_voxel_where_it_was(size, rows, multiple, voxel):
    geometry = Geometry(size=size, spacing=(1.0, 1.0, 1.0), affine_rows=rows)
    padded = geometry.padded(multiple)
    assert all(0 <= new - old < multiple and new % multiple == 0 for new, old in zip(padded.size, size, strict=True))
    before = geometry.pad_before(padded.size)
    after = [new - old - b for new, old, b in zip(padded.size, size, before, strict=True)]
    assert all(b <= a <= b + 1 for a, b in zip(after, before, strict=True))
    moved = tuple(n + b for n, b in zip(voxel, before, strict=True))
    assert world(padded, moved) == pytest.approx(world(geometry, voxel), abs=1e-6)
    assert padded.spacing == geometry.spacing


def test_the_plain_affine_scales_and_has_no_shift_until_it_is_padded():
    geometry = Geometry(size=(10, 16, 15), spacing=(2.0, 3.0, 4.0))
    assert geometry.affine == ((2, 0, 0, 0), (0, 3, 0, 0), (0, 0, 4, 0), (0, 0, 0, 1))
    padded = geometry.padded(16)
    assert padded.size == (16, 16, 16)
    assert geometry.pad_before(padded.size) == (3, 0, 0)
    assert [row[3] for row in padded.affine] == [-6, 0, 0, 1]
    assert geometry.padded(1) == geometry


@usual
@given(SIZES, st.sampled_from([2, 4, 8]))
def test_the_latent_grid_divides_or_names_the_size_that_would(size, factor):
    geometry = Geometry(size=size, spacing=(1.0, 1.0, 1.0))
    if any(n % factor for n in size):
        with pytest.raises(UsageError) as caught:
            geometry.latent_size(factor)
        assert caught.value.hint is not None
        use = parse_size(caught.value.hint.removeprefix("use "))
        assert Geometry(size=use, spacing=(1.0, 1.0, 1.0)).latent_size(factor) == tuple(-(-n // factor) for n in size)
    else:
        assert geometry.latent_size(factor) == tuple(n // factor for n in size)


@usual
@given(SIZES, affines(), st.integers(0, 2), st.floats(-1e-7, 1e-7))
def test_grids_are_close_up_to_rounding_and_not_up_to_a_shift(size, rows, axis, noise):
    geometry = Geometry(size=size, spacing=(1.0, 1.0, 1.0), affine_rows=rows)
    for shift, close in ((noise, True), (0.01, False)):
        moved = tuple((*row[:3], row[3] + (shift if k == axis else 0)) for k, row in enumerate(rows))
        other = Geometry(size=size, spacing=(1.0, 1.0, 1.0), affine_rows=moved)
        assert geometry.close_to(other) is other.close_to(geometry) is close
    larger = Geometry(size=(size[0] + 1, size[1], size[2]), spacing=(1.0, 1.0, 1.0), affine_rows=rows)
    assert not geometry.close_to(larger)


@usual
@given(affines(), st.integers(0, 2), st.integers(0, 2))
def test_a_small_turn_counts_by_what_it_moves_at_the_far_corner(rows, row, column):
    def turned(by: float) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(v + (by if (r, c) == (row, column) else 0) for c, v in enumerate(line)) for r, line in enumerate(rows))

    grids = [Geometry(size=(512, 512, 512), spacing=(1.0, 1.0, 1.0), affine_rows=turned(by)) for by in (0, 1e-7, 1e-5)]
    assert grids[0].close_to(grids[1])  # 0.00005 mm
    assert not grids[0].close_to(grids[2])  # 0.005 mm


def test_a_geometry_is_told_in_one_line():
    geometry = Geometry(size=(512, 512, 128), spacing=(0.781, 0.781, 2.981))
    assert str(geometry) == "512x512x128 voxels at 0.781x0.781x2.981 mm = 400x400x382 mm"
    assert geometry.voxels == 512 * 512 * 128
