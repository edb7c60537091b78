"""Intervals against scipy, closed forms and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score

from shared.intervals import (
    NOTHING,
    Estimate,
    area_under_roc,
    mean_dependent,
    mean_independent,
    mean_of_values,
    proportion,
)

COUNTS = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def is_nothing(estimate: Estimate) -> bool:
    return estimate.n == 0 and all(map(math.isnan, (estimate.value, estimate.low, estimate.high)))


@given(COUNTS)
def test_a_proportion_has_scipys_wilson_interval(counts: tuple[int, int]) -> None:
    found = proportion(*counts)
    expected = binomtest(*counts).proportion_ci(0.95, method="wilson")
    assert found.value == counts[0] / counts[1]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.n == counts[1]


def test_nothing_counted_gives_nothing() -> None:
    empty = (
        proportion(0, 0),
        area_under_roc(0.5, 0, 5),
        area_under_roc(0.5, 5, 0),
        mean_independent([]),
        mean_independent([NOTHING]),
        mean_dependent([NOTHING, NOTHING]),
        mean_of_values(0.0, 0.0, 0),
    )
    assert all(map(is_nothing, empty))


# --- AUROC ------------------------------------------------------------------------------------------------------------


def newcombe_gap(theta: float, area: float, m: int, n: int) -> float:
    """Newcombe (2006), method 5: the squared distance less z² times the variance at ``theta``."""
    star = (m + n) / 2 - 1
    variance = theta * (1 - theta) * (1 + star * (1 - theta) / (2 - theta) + star * theta / (1 + theta)) / (m * n)
    return (theta - area) ** 2 - norm.ppf(0.975) ** 2 * variance


AREAS = st.tuples(st.floats(0.0, 1.0), st.integers(1, 400), st.integers(1, 400))


@given(AREAS)
def test_the_bounds_of_an_area_solve_newcombes_equation_and_hold_the_estimate(case: tuple[float, int, int]) -> None:
    area, m, n = case
    found = area_under_roc(area, m, n)
    assert 0 <= found.low <= area <= found.high <= 1
    assert found.n == m + n
    for bound, end in ((found.low, 0.0), (found.high, 1.0)):
        if abs(area - end) > 1e-6:
            assert bound != area
            inside = area + (1e-9 if end else -1e-9)
            if newcombe_gap(inside, area, m, n) < 0 < newcombe_gap(end, area, m, n):
                assert bound == pytest.approx(brentq(newcombe_gap, *sorted((inside, end)), (area, m, n)), abs=1e-8)


@given(AREAS)
def test_an_area_seen_from_the_other_class_has_the_mirrored_interval(case: tuple[float, int, int]) -> None:
    area, m, n = case
    one, other = area_under_roc(area, m, n), area_under_roc(1 - area, n, m)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-7)


@pytest.mark.parametrize("area", [0.0, 0.5, 1.0])
def test_intervals_of_areas_at_the_ends_and_the_middle_are_sane(area: float) -> None:
    widths = []
    for n in (5, 20, 100, 1000):
        found = area_under_roc(area, n, n)
        widths.append(found.high - found.low)
        if area in (0.0, 1.0):
            assert (found.high if area else found.low) == pytest.approx(area, abs=1e-12)
        else:
            assert found.high - 0.5 == pytest.approx(0.5 - found.low, abs=1e-9)
    assert 0.0 < widths[-1] < 0.06
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 0.2


@pytest.mark.parametrize("true_area", [0.8, 0.95])
@pytest.mark.parametrize(("m", "n"), [(20, 30), (12, 60)])
def test_the_interval_of_an_area_covers_the_truth_about_95_times_in_100(true_area: float, m: int, n: int) -> None:
    generator = np.random.default_rng(1)
    distance = math.sqrt(2) * norm.ppf(true_area)  # binormal with equal variances
    trials, hits = 1500, 0
    for _ in range(trials):
        positives, negatives = generator.normal(distance, 1, m), generator.normal(0, 1, n)
        area = np.mean(positives[:, None] > negatives[None])
        found = area_under_roc(float(area), m, n)
        hits += found.low <= true_area <= found.high
    assert 0.92 <= hits / trials <= 0.985


def test_the_simulated_area_is_sklearns() -> None:
    """The oracle of the simulation above against another one."""
    generator = np.random.default_rng(2)
    positives, negatives = generator.normal(1, 1, 30), generator.normal(0, 1, 40)
    pairs = np.mean(positives[:, None] > negatives[None])
    assert roc_auc_score([1] * 30 + [0] * 40, [*positives, *negatives]) == pytest.approx(pairs)


# --- means ------------------------------------------------------------------------------------------------------------

PARTS = st.lists(COUNTS.map(lambda counts: proportion(*counts)), min_size=1, max_size=6)


@given(PARTS)
def test_a_mean_of_one_estimate_is_that_estimate(parts: list[Estimate]) -> None:
    for mean in (mean_independent, mean_dependent):
        found = mean(parts[:1])
        assert (found.value, found.low, found.high) == pytest.approx((parts[0].value, parts[0].low, parts[0].high))
        assert found.n == parts[0].n


@given(PARTS)
def test_means_leave_out_what_holds_no_case(parts: list[Estimate]) -> None:
    assert mean_independent([*parts, NOTHING]) == mean_independent(parts)
    assert mean_dependent([NOTHING, *parts]) == mean_dependent(parts)


@given(PARTS)
def test_means_hold_the_plain_mean_and_the_dependent_interval_is_the_wider_one(parts: list[Estimate]) -> None:
    one, other = mean_independent(parts), mean_dependent(parts)
    expected = float(np.mean([part.value for part in parts]))
    assert one.value == pytest.approx(expected)
    assert other.value == pytest.approx(expected)
    assert other.low - 1e-12 <= one.low <= expected + 1e-12
    assert expected - 1e-12 <= one.high <= other.high + 1e-12
    assert one.n == sum(part.n for part in parts)
    assert other.n == max(part.n for part in parts)


def test_symmetric_intervals_are_squared_and_added() -> None:
    halves = [0.3, 0.4, 1.2]
    parts = [Estimate(k, k - half, k + half, 10) for k, half in enumerate(halves)]
    found = mean_independent(parts)
    assert found.high - found.value == pytest.approx(math.sqrt(0.09 + 0.16 + 1.44) / 3)
    assert found.value - found.low == pytest.approx(1.3 / 3)
    same = mean_dependent(parts)
    assert same.high - same.value == pytest.approx(sum(halves) / 3)


def test_the_mean_of_independent_recalls_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(3)
    sizes, truths = (30, 12, 80), (0.7, 0.5, 0.9)
    trials, hits = 1500, 0
    for _ in range(trials):
        drawn = [generator.binomial(n, p) for n, p in zip(sizes, truths, strict=True)]
        found = mean_independent([proportion(k, n) for k, n in zip(drawn, sizes, strict=True)])
        hits += found.low <= np.mean(truths) <= found.high
    assert 0.92 <= hits / trials <= 0.985


@settings(max_examples=60)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=50))
def test_the_mean_of_values_has_the_normal_interval_of_scipy(values: list[float]) -> None:
    found = mean_of_values(sum(values), sum(value * value for value in values), len(values))
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    expected = norm.interval(0.95, np.mean(values), error) if error > 1e-6 else (np.mean(values),) * 2
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-4)


def test_the_mean_of_a_single_value_has_no_width_and_no_nan() -> None:
    assert mean_of_values(2.5, 6.25, 1) == Estimate(2.5, 2.5, 2.5, 1)
