"""Fixtures and readers of the tests: samples on several grids, and ways to read files that share nothing with the writers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from maisi_cli import phantom
from maisi_cli.geometry import Geometry
from maisi_cli.volumes import Mask, Sample, Volume

SHARED = Path(__file__).resolve().parents[4] / "shared"


def oblique_affine(spacing: tuple[float, float, float], *, about: tuple[float, float, float] = (0.2, -0.3, 0.25)) -> np.ndarray:
    """An affine turned by three angles (radians), with its first voxel somewhere."""
    turn = np.eye(3)
    for axis, angle in enumerate(about):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[one, one] = step[other, other] = np.cos(angle)
        step[one, other], step[other, one] = -np.sin(angle), np.sin(angle)
        turn = turn @ step
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = (-123.4, 56.7, -890.1)
    return affine


def grid(size: tuple[int, int, int], spacing: tuple[float, float, float], affine: np.ndarray | None = None) -> Geometry:
    rows = None if affine is None else tuple(tuple(map(float, row)) for row in affine)
    return Geometry(size=size, spacing=spacing, affine_rows=rows)


GRIDS = {
    "plain": grid((24, 24, 20), (16.0, 16.0, 16.0)),
    "anisotropic": grid((30, 22, 13), (14.0, 15.5, 33.3)),
    "oblique": grid((26, 24, 18), (15.0, 13.7, 21.0), oblique_affine((15.0, 13.7, 21.0))),
}


def make_sample(geometry: Geometry, *, id: str = "case", modality: str = "ct") -> Sample:
    """A phantom with noise, so that every slice and direction differs."""
    body = phantom.body(Geometry(size=geometry.size, spacing=geometry.spacing), 7).array
    noise = np.random.default_rng(0).normal(0, 40, geometry.size)
    hu = np.clip(np.where(body > 0, body.astype(np.float32) * 5 - 300 + noise, -1000), -1000, 1000).astype(np.float32)
    if modality != "ct":
        hu += 1000
    return Sample(
        index=0, seed=7, id=id, image=Volume(array=hu, geometry=geometry, modality=modality), mask=Mask(array=body, geometry=geometry)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantoms:
    """What makes samples, for tests that need one of their own."""

    grids: Mapping[str, Geometry]
    make: Callable[..., Sample]
    grid: Callable[..., Geometry]
    oblique: Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def phantoms() -> Phantoms:
    return Phantoms(grids=GRIDS, make=make_sample, grid=grid, oblique=oblique_affine)


@pytest.fixture(params=sorted(GRIDS))
def sample(request: pytest.FixtureRequest) -> Sample:
    return make_sample(GRIDS[request.param])


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Return a path below the folder of real data; skip, or fail in CI, where it is absent."""

    def find(relative: str) -> Path:
        path = SHARED / relative
        if not path.exists():
            message = f"needs shared/{relative}, which is not beside this checkout"
            if os.environ.get("CI") == "true":
                pytest.fail(message)
            pytest.skip(message)
        return path

    return find
