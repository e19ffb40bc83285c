"""Seeds: what a sample is made from depends on the run's seed, its index, the attempt and the purpose, and never changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from maisi_cli.seeds import derive, fresh

usual = settings(max_examples=60, deadline=None)
ARGUMENTS = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 100), st.sampled_from(["sample", "mask"]))


@pytest.mark.parametrize(
    ("arguments", "seed"),
    [
        ((0, 0), 8158966109489111272),
        ((7, 3, 2), 1249268366133152049),
        ((2**63 - 1, 1_000_000), 8042073305605871044),
        ((7, 3, 2, "mask"), 1756126783240778653),
    ],
)
def test_derived_seeds_are_those_of_every_release(arguments, seed):
    assert derive(*arguments) == seed


@usual
@given(st.lists(ARGUMENTS, unique=True, min_size=2, max_size=20))
def test_other_arguments_give_other_seeds_that_every_generator_takes(rows):
    seeds = [derive(*row) for row in rows]
    assert len(set(seeds)) == len(rows)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_fresh_seed_is_short_enough_to_type_and_another_each_time():
    drawn = {fresh() for _ in range(50)}
    assert len(drawn) >= 49
    assert all(0 <= seed < 2**31 for seed in drawn)
