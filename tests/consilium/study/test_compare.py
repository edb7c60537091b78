"""The statistics of a study against SciPy and by their laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from consilium.study.compare import front, paired, spread

VALUES = st.lists(st.floats(-1, 1), min_size=2, max_size=8)


@given(VALUES)
def test_mean_sd_and_interval_are_those_of_a_t_test(values: list[float]) -> None:
    found = spread(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert found.sd == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    if found.sd > 1e-9:
        expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(VALUES, VALUES)
def test_a_paired_difference_is_the_paired_t_test(ours: list[float], theirs: list[float]) -> None:
    n = min(len(ours), len(theirs))
    found = paired(dict(enumerate(ours)), dict(enumerate(theirs)), 1)
    assert found.n == n
    if found.sd > 1e-9:
        expected = stats.ttest_rel(ours[:n], theirs[:n]).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    # Seen from the other side, and where less is better, it is the same difference with the sign changed.
    other = paired(dict(enumerate(theirs)), dict(enumerate(ours)), -1)
    assert (other.mean, other.low) == pytest.approx((found.mean, found.low), abs=1e-12)


def test_several_comparisons_hold_together() -> None:
    """Of 1,000 families of four comparisons without any difference about 5 % name one, not four times as many."""
    generator = np.random.default_rng(0)
    named = {1: 0, 4: 0}
    for _ in range(1000):
        family = generator.normal(size=(4, 5))
        for comparisons in named:
            found = [spread(list(values), comparisons) for values in family]
            named[comparisons] += any(one.above or one.below for one in found)
    assert named[4] / 1000 < 0.07
    assert named[1] / 1000 > 0.14


def test_one_value_has_no_interval_and_none_says_nothing() -> None:
    one = spread([0.5, math.nan])
    assert (one.mean, one.n) == (0.5, 1)
    assert math.isnan(one.sd)
    assert not one.above
    assert not one.below
    assert spread([]).n == 0


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_nothing_on_the_front_is_beaten_and_all_else_is(points: dict[str, tuple[int, int]]) -> None:
    found = front({name: (float(a), float(b)) for name, (a, b) in points.items()})

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] <= other[0] and one[1] <= other[1] and one != other

    assert found
    assert found == {name for name, own in points.items() if not any(beats(other, own) for other in points.values())}
