"""Slices and profiles: what the reference computes, MONAI's transforms, and scales that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.slices import PLANES, PROFILES, Profile, Stack, prepared, profile, stacks
from maisi_cli.volumes import Volume
from numpy.typing import NDArray

usual = settings(max_examples=30, deadline=None)
Array = NDArray[np.float32]


def volume(shape: tuple[int, int, int], *, seed: int = 0, spacing: tuple[float, float, float] = (2.0, 2.0, 3.0)) -> Volume:
    array = np.random.default_rng(seed).uniform(-1400, 1400, shape).astype(np.float32)
    return Volume(array=array, geometry=Geometry(size=shape, spacing=spacing))


def together(stack: Stack, size: int = 7) -> Array:
    return np.concatenate(list(stack.batches(size)))


# --- the reference --------------------------------------------------------------------------


def test_the_reference_profile_is_that_of_the_published_numbers() -> None:
    found = PROFILES["reference"]
    assert (found.spacing_mm, found.target_shape, found.fill, found.clip) == (None, (512, 512, 512), -1000.0, (-1000.0, 1000.0))
    assert (found.center_slices, found.scaling, found.subtract, found.order) == (None, "stack", (0.406, 0.456, 0.485), "sorted")


GOLDEN = {
    "all": {},
    "center0.4": {"center_slices": 0.4},
    "center0.7_every2": {"center_slices": 0.7, "every": 2},
    "drop_empty": {"drop_below": 30.0},  # the threshold that the case was made with
}


@pytest.mark.parametrize("case", GOLDEN)
def test_features_of_the_golden_volumes_are_those_of_the_reference(case: str, shared: Callable[[str], Path]) -> None:
    arrays = np.load(shared("golden/u50_fid_2p5d/arrays.npz"))
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3, 2, 1), torch.nn.ReLU(),
                                  torch.nn.Conv2d(16, 12, 1))  # fmt: skip
    network.load_state_dict(torch.load(shared("golden/u50_fid_2p5d/feature_net.pt"), weights_only=True))
    wanted = replace(PROFILES["reference"], **GOLDEN[case])
    for side in ("real", "syn"):
        for plane in PLANES:
            found = []
            for k in range(4):
                stack = Stack(array=arrays[f"{side}{k}"][0, 0], plane=plane, profile=wanted)
                with torch.inference_mode():
                    found += [network(torch.from_numpy(part)).mean((2, 3)).numpy() for part in stack.batches(5)]
            expected = arrays[f"{case}_{side}_{plane}"]
            np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-4, atol=1e-5 * expected.std())


@usual
@given(st.tuples(*[st.integers(3, 14)] * 3), st.tuples(*[st.integers(3, 14)] * 3))
def test_padding_and_cropping_are_those_of_monai(shape: tuple[int, int, int], target: tuple[int, int, int]) -> None:
    from monai.transforms.croppad.array import CenterSpatialCrop, SpatialPad

    image = volume(shape)
    padded = SpatialPad(target, mode="constant", value=-1000)(torch.from_numpy(image.array)[None])
    expected = CenterSpatialCrop(target)(padded)[0].numpy()
    found = prepared(image, Profile(name="x", target_shape=target, clip=(-5000.0, 5000.0)))
    np.testing.assert_array_equal(found, expected)


def test_resampling_keeps_a_ramp_and_the_field_of_view() -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None] * 10, (40, 8, 12)).copy()
    image = Volume(array=ramp, geometry=Geometry(size=(40, 8, 12), spacing=(1.5, 3.0, 2.0)))
    found = prepared(image, Profile(name="x", spacing_mm=(3.0, 3.0, 3.0)))
    assert found.shape == (20, 8, 8)
    steps = np.diff(found[1:-1, 3, 3])
    np.testing.assert_allclose(steps, 20, rtol=0.1)
    assert prepared(image, Profile(name="x", spacing_mm=(1.5, 3.0, 2.0))).shape == image.array.shape


# --- scales ---------------------------------------------------------------------------------


@usual
@given(st.integers(1, 9), st.sampled_from(PLANES), st.sampled_from([None, 0.4, 0.7]))
def test_the_size_of_a_batch_changes_nothing(size: int, plane: str, share: float | None) -> None:
    wanted = Profile(name="x", scaling="stack", center_slices=share)
    stack = stacks(volume((9, 10, 11)), wanted)[plane]
    assert all(len(part) <= size for part in stack.batches(size))
    np.testing.assert_array_equal(together(stack, size), together(stack, 1000))


def test_the_planes_are_normal_to_z_x_and_y() -> None:
    image = volume((4, 5, 6))
    found = {plane: together(stack).shape for plane, stack in stacks(image, Profile(name="x")).items()}
    assert found == {"xy": (6, 1, 4, 5), "yz": (4, 1, 5, 6), "zx": (5, 1, 4, 6)}
    first = together(stacks(image, Profile(name="x"))["zx"])[2, 0]
    np.testing.assert_allclose(first, np.clip(image.array[:, 2, :], -1000, 1000) / 1000, atol=1e-6)


def test_a_shift_of_all_values_is_seen_with_a_window_and_not_with_the_scale_of_the_stack() -> None:
    image = volume((6, 6, 6))
    image = replace(image, array=image.array * 0.3)
    shifted = replace(image, array=image.array + 200)
    for scaling, same in (("stack", True), ("window", False)):
        wanted = Profile(name="x", scaling=scaling)
        pair = [together(stacks(each, wanted)["xy"]) for each in (image, shifted)]
        assert np.allclose(*pair, atol=1e-5) == same, scaling


def test_mr_is_scaled_by_its_own_percentiles() -> None:
    image = replace(volume((12, 12, 12)), modality="mr-t1")
    found = [together(stacks(replace(image, array=gain * image.array), PROFILES["mr"])["xy"]) for gain in (1, 7)]
    np.testing.assert_allclose(*found, atol=1e-5)
    assert found[0].min() == pytest.approx(-1)
    assert found[0].max() == pytest.approx(1)


# --- profiles -------------------------------------------------------------------------------


def test_a_hash_is_that_of_the_values_and_not_of_the_name() -> None:
    base = profile("ct")
    assert replace(base, name="other").sha256 == base.sha256
    changed = base.changed(center_slices=0.4)
    assert (changed.name, changed.sha256 == base.sha256) == ("ct (changed)", False)
    assert base.changed(spacing_mm=base.spacing_mm) is base
    assert len({each.sha256 for each in PROFILES.values()}) == len(PROFILES)
    assert changed.changed(every=2).name == "ct (changed)"


def test_unknown_profiles_and_shares_are_refused() -> None:
    with pytest.raises(UsageError, match="no profile named 'refrence'") as caught:
        profile("refrence")
    assert "'reference'" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"slices 1\.4"):
        profile("ct").changed(center_slices=1.4)
