"""Calibration from histograms against the exact figures of every single case, and scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_curve

from shared.tasks.classification.calibration import (
    GROUPS,
    at_threshold,
    bin_probabilities,
    brier,
    calibration_error,
    reliability,
    threshold,
)
from shared.tasks.classification.metrics import BINS, score_bins


def cases(n: int, slope: float = 1.0, seed: int = 0, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Predicted probabilities and truth; with a slope of 1 the probabilities are right."""
    generator = np.random.default_rng(seed)
    log_odds = generator.normal(-0.5, scale, n)
    truth = generator.random(n) < 1 / (1 + np.exp(-log_odds))
    return 1 / (1 + np.exp(-slope * log_odds)), truth


def histograms(p: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bins = score_bins(torch.logit(torch.from_numpy(p))).numpy()
    return tuple(np.bincount(bins[truth == want], minlength=BINS) for want in (True, False))  # type: ignore[return-value]


def exact_error(p: np.ndarray, truth: np.ndarray, groups: int = GROUPS) -> float:
    """The definition, case by case."""
    total = 0.0
    for group in range(groups):
        low, high = group / groups, (group + 1) / groups
        here = [k for k in range(len(p)) if low <= p[k] < high or (group == groups - 1 and p[k] == 1)]
        if here:
            total += abs(sum(float(truth[k]) - p[k] for k in here)) / len(p)
    return total


@pytest.mark.parametrize("slope", [0.3, 1.0, 3.0])
def test_agrees_with_the_exact_figures(slope: float) -> None:
    p, truth = cases(3000, slope)
    pos, neg = histograms(p, truth)
    assert brier(pos, neg).value == pytest.approx(brier_score_loss(truth, p), abs=1e-3)
    assert calibration_error(pos, neg).value == pytest.approx(exact_error(p, truth), abs=2e-3)


@pytest.mark.parametrize("slope", [0.3, 3.0])
def test_a_model_too_sure_or_too_shy_is_told_from_a_calibrated_one(slope: float) -> None:
    right, wrong = (calibration_error(*histograms(*cases(4000, s))) for s in (1.0, slope))
    assert right.value < 0.02
    assert wrong.low > right.high


def test_no_bin_is_wide() -> None:
    assert np.diff(bin_probabilities()).max() < 1.3e-3


def test_chance_alone_gives_about_what_is_said() -> None:
    found = [calibration_error(*histograms(*cases(400, seed=seed))).value for seed in range(100)]
    assert np.mean(found) == pytest.approx(math.sqrt(GROUPS / 400) / 3, rel=0.3)


def test_the_reliability_curve_is_that_of_the_cases() -> None:
    p, truth = cases(2000, 2.0)
    found = reliability(*histograms(p, truth))
    assert sum(group.n for group in found) == 2000
    inside = (p >= 0.3) & (p < 0.4)
    group = next(g for g in found if 0.3 <= g.predicted < 0.4)
    assert group.predicted == pytest.approx(p[inside].mean(), abs=5e-3)
    assert group.observed.value == pytest.approx(truth[inside].mean(), abs=0.02)
    assert group.observed.low < group.observed.value < group.observed.high


def test_intervals_hold_what_they_promise() -> None:
    """Of 200 samples of a population, about 95 % of the Brier score's intervals hold the population's score."""
    p, truth = cases(200_000, 2.0, seed=1)
    whole = brier_score_loss(truth, p)
    held = 0
    for number in range(200):
        part = slice(number * 400, (number + 1) * 400)
        found = brier(*histograms(p[part], truth[part]))
        held += found.low <= whole <= found.high
    assert 180 <= held <= 199


def test_sums_of_sites_give_the_figure_of_all_cases() -> None:
    one, other = cases(300, 1.5, 1), cases(500, 1.5, 2)
    added = [a + b for a, b in zip(histograms(*one), histograms(*other), strict=True)]
    pooled = histograms(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))
    assert calibration_error(*added) == calibration_error(*pooled)
    assert brier(*added) == brier(*pooled)


def test_nothing_gives_nothing() -> None:
    empty = np.zeros(BINS, dtype=int)
    assert calibration_error(empty, empty).n == 0
    assert math.isnan(brier(empty, empty).value)
    assert math.isnan(threshold(empty, empty))
    assert reliability(empty, empty) == []


def test_the_threshold_is_youdens() -> None:
    p, truth = cases(1500, 1.0, seed=3)
    pos, neg = histograms(p, truth)
    wrong, right, _ = roc_curve(truth, p)
    chosen = threshold(pos, neg)
    sensitivity, specificity = at_threshold(pos, neg, chosen)
    assert sensitivity.value + specificity.value - 1 == pytest.approx((right - wrong).max(), abs=5e-3)
    assert sensitivity.value == pytest.approx((p[truth] >= chosen).mean(), abs=1e-9)
    assert specificity.value == pytest.approx((p[~truth] < chosen).mean(), abs=1e-9)
    assert sensitivity.n == truth.sum()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_any_cases_keep_to_the_bounds(rows: list[tuple[float, bool]]) -> None:
    p, truth = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    pos, neg = histograms(p, truth)
    error, score = calibration_error(pos, neg), brier(pos, neg)
    assert 0 <= error.low <= error.value <= error.high
    assert error.value <= 1
    middles = bin_probabilities()[score_bins(torch.logit(torch.from_numpy(p))).numpy()]
    assert error.value == pytest.approx(exact_error(np.atleast_1d(middles), truth), abs=1e-9)
    assert 0 <= score.value <= 1
