"""Fixed point against exact sums of Python's fractions, and against the plain weighted mean."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregation import weighted_mean
from shared.fixedpoint import HALF, TAIL, change, changed, clip, decode, encode, step, worst_error


def add(vectors: list[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        total += vector
    return total


@given(
    sites=st.integers(2, 16),
    lost=st.integers(0, 8),
    bound=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
@settings(max_examples=600, deadline=None)
def test_the_mean_is_exact_within_the_stated_bound(
    sites: int, lost: int, bound: float, seed: int, data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    added = max(1, sites - lost)
    weights = data.draw(st.lists(st.integers(1, 100_000), min_size=sites, max_size=sites))
    most = max(weights)
    changes = [generator.standard_normal(7) * bound * generator.exponential() for _ in range(added)]
    for vector in changes:
        clip(vector, bound)
    shares = [weight / most for weight in weights[:added]]
    coded = [
        encode(vector.copy(), share, 10, [0.5], bound, sites) for vector, share in zip(changes, shares, strict=True)
    ]
    mean, numbers = decode(add(coded), 1, bound, sites)
    whole = sum(map(Fraction, shares))
    for place in range(7):
        exact = sum(Fraction(float(v[place])) * Fraction(w) for v, w in zip(changes, shares, strict=True)) / whole
        assert abs(Fraction(float(mean[place])) - exact) <= Fraction(
            worst_error(bound, sites, added, numbers.weight) * (1 + 1e-6)
        )
    assert numbers.images == 10 * added
    assert numbers.losses[0] == pytest.approx(0.5, abs=step(1000.0, sites))


@pytest.mark.parametrize("sites", range(2, 17))
@pytest.mark.parametrize("bound", [1e-30, 1.0, 1e30])
def test_nothing_overflows_at_the_extremes(sites: int, bound: float) -> None:
    for sign in (-1, 1):
        extreme = np.array([sign * bound, 0.0, 0.0])
        coded = [encode(extreme.copy(), 1.0, 2**40, [sign * 1e9], bound, sites) for _ in range(sites)]
        exact = sum(vector.view(np.int32).astype(np.int64) for vector in coded)
        assert np.abs(exact).max() <= HALF
        mean, numbers = decode(add(coded), 1, bound, sites)
        np.testing.assert_allclose(mean, extreme, rtol=1e-6, atol=0)
        assert numbers.weight == pytest.approx(sites, rel=1e-6)
        assert numbers.losses == pytest.approx([sign * 1000.0], rel=1e-6)


def test_blocks_are_joined_without_a_seam() -> None:
    vector = np.random.default_rng(0).uniform(-1e-3, 1e-3, 3 * 2**16 + 17)
    coded = encode(vector.copy(), 1.0, 1, [1.0], 1.0, 2)
    np.testing.assert_array_equal(coded[: len(vector)].view(np.int32), np.rint(vector / step(1.0, 2)))


def test_clipping_keeps_what_is_short_and_the_direction_of_what_is_long() -> None:
    short, long = np.array([0.3, -0.4]), np.array([3.0, -4.0])
    assert clip(short, 1.0) == pytest.approx(0.5)
    assert short.tolist() == [0.3, -0.4]
    assert clip(long, 1.0) == pytest.approx(5.0)
    np.testing.assert_allclose(long, [0.6, -0.8])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_change_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        clip(np.array([1.0, value]), 1.0)


def test_sums_that_no_sound_sites_give_are_refused() -> None:
    sound = encode(np.array([0.6, 0.8]), 1.0, 5, [0.1], 1.0, 2)
    decode(sound + sound, 1, 1.0, 2)
    for place, value in ((2, 0), (2, -5), (0, HALF), (1, -HALF)):
        total = (sound + sound).copy()
        total.view(np.int32)[place] = value
        with pytest.raises(ValueError):
            decode(total, 1, 1.0, 2)


def test_losses_that_are_not_told_leave_no_number() -> None:
    told = encode(np.zeros(2), 1.0, 4, [2.0, 1.0], 1.0, 3)
    untold = encode(np.zeros(2), 1.0, 4, [math.nan, math.nan], 1.0, 3)
    assert len(told) == 2 + TAIL + 2
    assert decode(told + untold, 2, 1.0, 3)[1].losses == pytest.approx([2.0, 1.0], abs=1e-5)
    assert all(math.isnan(loss) for loss in decode(untold + untold, 2, 1.0, 3)[1].losses)


# ---------------------------------------------------------------------- models


def networks(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    """States with BatchNorm, a counter, half and double precision."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(3, 4, generator=generator) * 0.1,
            "half": torch.randn(5, generator=generator).half(),
            "double": torch.randn(2, 2, generator=generator).double(),
            "bn.running_mean": torch.randn(6, generator=generator),
            "bn.running_var": torch.rand(6, generator=generator) + 0.1,
            "bn.num_batches_tracked": torch.randint(0, 50, (), generator=generator),
            "running_var": torch.rand(3, generator=generator),  # without a mean beside it: a number like others
        }
        for _ in range(count)
    ]


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=16), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_summed_changes_give_the_plain_weighted_mean_batchnorm_and_counters_included(
    weights: list[int], seed: int
) -> None:
    before, *after = networks(seed, 1 + len(weights))
    plain = weighted_mean(zip(map(float, weights), after, strict=True))
    most, sites, bound = max(weights), len(weights), 200.0
    vectors = [change(before, state) for state in after]
    assert max(clip(vector, bound) for vector in vectors) < bound
    coded = [
        encode(vector, weight / most, 1, [0.0], bound, sites) for vector, weight in zip(vectors, weights, strict=True)
    ]
    mean, numbers = decode(add(coded), 1, bound, sites)
    result = changed(before, mean)
    error = worst_error(bound, sites, sites, numbers.weight)
    assert list(result) == list(plain)
    for name, value in plain.items():
        assert result[name].dtype == value.dtype
        assert result[name].shape == value.shape
        if not value.is_floating_point():
            exact = sum(w * int(state[name]) for w, state in zip(weights, after, strict=True)) / sum(weights)
            if abs(exact % 1 - 0.5) > 2 * error:  # else the two may round to different sides
                assert torch.equal(result[name], value)
            continue
        moved = max(float((state["bn.running_mean"] - before["bn.running_mean"]).abs().max()) for state in after)
        gap = (
            error * (1 + 2 * moved + error) if name == "bn.running_var" else error
        )  # the mean's error, squared with it
        last_place = float(value.abs().max()) * torch.finfo(value.dtype).eps
        assert float((result[name].double() - value.double()).abs().max()) <= gap * (1 + 1e-6) + last_place


def test_identical_models_stay_what_they_are_to_the_bit() -> None:
    (state,) = networks(3, 1)
    coded = [encode(change(state, state), weight, 1, [0.0], 10.0, 3) for weight in (1.0, 0.3, 0.77)]
    result = changed(state, decode(add(coded), 1, 10.0, 3)[0])
    assert all(torch.equal(result[name], value) for name, value in state.items())
