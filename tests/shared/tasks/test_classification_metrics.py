"""Metrics from sums against scikit-learn on the same scores."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn import metrics as sk
from torch import nn

from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset
from shared.tasks import TASKS, Sums, add_sums
from shared.tasks.classification.learning import collect
from shared.tasks.classification.metrics import (
    BINS,
    LIMIT,
    area_from_histograms,
    confusion_matrix,
    consistent,
    histograms,
    roc_points,
    score_bins,
    summarise,
)

CPU = torch.device("cpu")


class Table(nn.Module):
    """A model that answers image k with row k of a table; the image's first pixel holds k."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits = torch.tensor(logits, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        numbers = ((images[:, 0, 0, 0] * 0.25 + 0.5) * 65535).round().long()
        return self.logits[numbers]


def job_of(classes: int, multilabel: bool = False) -> Job:
    names = ",".join(f"c{k}" for k in range(classes))
    return job_from_flat({"data.classes": names, "data.multilabel": multilabel, "evaluation.batch_size": 97})


def data_of(targets: list[tuple[int, ...]]) -> Dataset:
    images = np.zeros((len(targets), 1, 8, 8), np.uint16)
    images[:, 0, 0, 0] = np.arange(len(targets))
    return Dataset.of([Sample(str(k), target, str(k), "test") for k, target in enumerate(targets)], image=images)


def sums_of(logits: np.ndarray, targets: list[tuple[int, ...]], job: Job) -> Sums:
    return collect(Table(logits), data_of(targets), job, CPU)


def drawn(seed: int, n: int, classes: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that know something of the truth, and the truth; classes unequally often."""
    generator = np.random.default_rng(seed)
    truth = generator.choice(classes, n, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    logits = generator.normal(0, 1, (n, classes)) + 1.2 * np.eye(classes)[truth]
    return logits * scale, truth


def single(truth: np.ndarray) -> list[tuple[int, ...]]:
    return [(int(k),) for k in truth]


def many(wanted: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(k) for k in np.flatnonzero(row)) for row in wanted]


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_auroc_of_single_labels_is_within_a_thousandth_of_sklearns(classes: int, scale: float) -> None:
    """From the scores of a fresh model, hardly apart, to those of an over-confident one."""
    logits, truth = drawn(1, 3000, classes, scale)
    found = summarise(sums_of(logits, single(truth), job_of(classes)), job_of(classes))
    share = softmax(logits, 1)
    # In log-odds, for a float64 share cannot tell 1 - 1e-17 from 1.
    odds = np.stack([logits[:, k] - np.logaddexp.reduce(np.delete(logits, k, 1), 1) for k in range(classes)], 1)
    areas = [sk.roc_auc_score(truth == k, odds[:, k]) for k in range(classes)]
    assert found["auroc"].value == pytest.approx(np.mean(areas), abs=1e-3)
    if scale <= 1:
        oracle = sk.roc_auc_score(truth, share[:, 1] if classes == 2 else share, multi_class="ovr", average="macro")
        assert np.mean(areas) == pytest.approx(oracle, abs=1e-9)
    if classes > 2:
        for k, area in enumerate(areas):
            assert found[f"auroc:c{k}"].value == pytest.approx(area, abs=1e-3)


@pytest.mark.parametrize("classes", [2, 5])
def test_accuracy_balanced_accuracy_loss_and_confusion_are_sklearns(classes: int) -> None:
    logits, truth = drawn(2, 500, classes)
    job = job_of(classes)
    sums = sums_of(logits, single(truth), job)
    found = summarise(sums, job)
    answer = logits.argmax(1)
    assert found["accuracy"].value == pytest.approx(sk.accuracy_score(truth, answer), abs=1e-12)
    assert found["balanced_accuracy"].value == pytest.approx(sk.balanced_accuracy_score(truth, answer), abs=1e-12)
    assert found["loss"].value == pytest.approx(sk.log_loss(truth, softmax(logits, 1)), abs=1e-9)
    assert (confusion_matrix(sums, job) == sk.confusion_matrix(truth, answer)).all()
    losses = -np.log(softmax(logits, 1)[np.arange(500), truth])
    error = losses.std(ddof=1) / math.sqrt(500)
    assert found["loss"].high - found["loss"].value == pytest.approx(1.959964 * error, rel=1e-5)
    assert sums["n"] == found["accuracy"].n == 500


def test_metrics_of_several_labels_are_sklearns() -> None:
    generator = np.random.default_rng(3)
    wanted = (generator.random((2500, 4)) < [0.5, 0.1, 0.9, 0.3]).astype(int)
    logits = generator.normal(0, 1.5, wanted.shape) + wanted - 0.3
    job = job_of(4, multilabel=True)
    sums = sums_of(logits, many(wanted), job)
    found = summarise(sums, job)
    assert found["auroc"].value == pytest.approx(sk.roc_auc_score(wanted, logits, average="macro"), abs=1e-3)
    assert (confusion_matrix(sums, job) == sk.multilabel_confusion_matrix(wanted, logits > 0)).all()
    assert found["accuracy"].value == pytest.approx(1 - sk.hamming_loss(wanted, logits > 0), abs=1e-12)
    balanced = [sk.balanced_accuracy_score(wanted[:, k], logits[:, k] > 0) for k in range(4)]
    assert found["balanced_accuracy"].value == pytest.approx(np.mean(balanced), abs=1e-12)
    losses = [sk.log_loss(wanted[:, k], expit(logits[:, k])) for k in range(4)]
    assert found["loss"].value == pytest.approx(np.mean(losses), abs=1e-9)
    assert found["auroc:c2"].value == pytest.approx(sk.roc_auc_score(wanted[:, 2], logits[:, 2]), abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    multilabel=st.booleans(),
)
def test_sums_of_parts_add_up_to_the_sums_of_the_whole(seed: int, n: int, cuts: list[int], multilabel: bool) -> None:
    job = job_of(3, multilabel)
    logits, truth = drawn(seed, n, 3)
    targets = many(np.random.default_rng(seed).random((n, 3)) < 0.4) if multilabel else single(truth)
    whole = sums_of(logits, targets, job)
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    pieces = [slice(a, b) for a, b in pairwise(edges)]
    added = add_sums([sums_of(logits[piece], targets[piece], job) for piece in pieces])
    assert list(added) == list(whole)
    for key, value in whole.items():
        assert added[key] == (pytest.approx(value) if isinstance(value, float) else value)


def test_sums_that_do_not_match_are_refused_and_a_missing_key_counts_zero() -> None:
    assert add_sums([{"a": 1, "b": [1, 2]}, {"a": 0.5}, {"b": [3, 4], "c": 7}]) == {"a": 1.5, "b": [4, 6], "c": 7}
    assert add_sums([]) == {}
    for pair in ([{"a": [1]}, {"a": [1, 2]}], [{"a": 1}, {"a": [1]}], [{"a": [1]}, {"a": 1}]):
        with pytest.raises(ValueError):
            add_sums(pair)


def test_adding_sums_leaves_the_parts_as_they_were() -> None:
    parts: list[dict[str, Any]] = [{"a": [1, 2]}, {"a": [3, 4]}]
    add_sums(parts)["a"].append(9)  # type: ignore[union-attr]
    assert parts == [{"a": [1, 2]}, {"a": [3, 4]}]


def test_classes_without_any_image_are_left_out_of_the_means() -> None:
    logits, truth = drawn(4, 800, 4)
    truth[truth == 2] = 3
    found = summarise(sums_of(logits, single(truth), job_of(4)), job_of(4))
    share = softmax(logits, 1)
    areas = [sk.roc_auc_score(truth == k, share[:, k]) for k in (0, 1, 3)]
    assert found["auroc"].value == pytest.approx(np.mean(areas), abs=2e-3)
    assert math.isnan(found["auroc:c2"].value)
    recalls = [np.mean(logits[truth == k].argmax(1) == k) for k in (0, 1, 3)]
    assert found["balanced_accuracy"].value == pytest.approx(np.mean(recalls))


def test_one_class_alone_has_an_accuracy_but_no_auroc() -> None:
    found = summarise(sums_of(np.array([[1.0, 0.0], [0.0, 1.0]]), [(0,), (0,)], job_of(2)), job_of(2))
    assert found["accuracy"].value == found["balanced_accuracy"].value == 0.5
    assert math.isnan(found["auroc"].value)


@pytest.mark.parametrize("multilabel", [False, True])
def test_no_image_at_all_gives_nothing_and_no_error(multilabel: bool) -> None:
    job = job_of(3, multilabel)
    found = summarise(sums_of(np.zeros((0, 3)), [], job), job)
    assert set(found) >= set(TASKS["classification"].metrics)
    assert all(math.isnan(estimate.value) and estimate.n == 0 for estimate in found.values())


@pytest.mark.parametrize("multilabel", [False, True])
def test_extreme_logits_give_finite_sums_and_the_right_order(multilabel: bool) -> None:
    job = job_of(3, multilabel)
    logits = np.array([[1e4, -1e4, -1e4], [-1e4, 1e4, -1e4], [-1e4, -1e4, 1e4], [1e4, 1e4, 1e4]] * 2)
    targets: list[tuple[int, ...]] = [(0,), (1,), (2,), (1,)] * 2
    sums = sums_of(logits, targets, job)
    found = summarise(sums, job)
    assert all(np.isfinite(value).all() for value in sums.values())
    assert all(math.isfinite(estimate.value) for estimate in found.values())
    assert found["auroc"].value > 0.8


def test_a_perfect_and_a_useless_and_an_inverted_model_have_areas_1_half_and_0() -> None:
    targets: list[tuple[int, ...]] = [(0,), (1,)] * 20
    right = np.array([[2.0, -2.0], [-2.0, 2.0]] * 20)
    for logits, area in ((right, 1.0), (0 * right, 0.5), (-right, 0.0)):
        assert summarise(sums_of(logits, targets, job_of(2)), job_of(2))["auroc"].value == area


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20))
def test_every_score_has_a_bin_and_larger_scores_never_a_smaller_one(scores: list[float]) -> None:
    bins = score_bins(torch.tensor(scores, dtype=torch.float64))
    assert bins.min() >= 0
    assert bins.max() < BINS
    pairs = sorted((score, int(place)) for score, place in zip(scores, bins, strict=True) if score == score)
    assert [place for _, place in pairs] == sorted(place for _, place in pairs)


def test_roc_points_are_sklearns_for_the_binned_scores() -> None:
    logits, truth = drawn(5, 400, 2)
    job = job_of(2)
    positives, negatives = histograms(sums_of(logits, single(truth), job), job)
    odds = logits[:, 1] - logits[:, 0]
    edges = np.sinh(np.linspace(-1, 1, BINS + 1) * np.arcsinh(LIMIT / 0.5)) * 0.5
    binned = np.digitize(odds, edges)
    expected_false, expected_true, _ = sk.roc_curve(truth, binned, drop_intermediate=False)
    false, true = roc_points(positives[1], negatives[1])
    expected = {(round(a, 9), round(b, 9)) for a, b in zip(expected_false, expected_true, strict=True)}
    assert {(round(a, 9), round(b, 9)) for a, b in zip(false, true, strict=True)} == expected
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
    area = summarise(sums_of(logits, single(truth), job), job)["auroc"].value
    assert sk.auc(false, true) == pytest.approx(area, abs=1e-12)


def test_the_intervals_of_the_metrics_hold_their_estimates() -> None:
    logits, truth = drawn(6, 60, 3)
    for estimate in summarise(sums_of(logits, single(truth), job_of(3)), job_of(3)).values():
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.n > 0


def test_what_is_no_number_or_beyond_all_bounds_goes_to_the_outermost_bins() -> None:
    scores = torch.tensor([-math.inf, -1e30, -2 * LIMIT, math.nan, math.inf, 1e30, 2 * LIMIT])
    assert score_bins(scores).tolist() == [0] * 4 + [BINS - 1] * 3


def counts(**at: int) -> np.ndarray:
    """A histogram with so many images in the bins b0, b7, …"""
    found = np.zeros(BINS, np.int64)
    for name, number in at.items():
        found[int(name[1:])] = number
    return found


@pytest.mark.parametrize(
    ("with_it", "without"), [(counts(b3=5), counts()), (counts(), counts(b3=5)), (counts(), counts())]
)
def test_a_class_that_all_images_have_or_none_has_no_area(with_it: np.ndarray, without: np.ndarray) -> None:
    area = area_from_histograms(with_it, without)
    assert math.isnan(area.value)
    assert area.n == 0


def test_a_curve_begins_at_nothing_where_the_highest_score_is_taken() -> None:
    top = np.zeros(BINS, int)
    top[-1] = 1
    false, true = roc_points(positives=top, negatives=top)
    assert (false.tolist(), true.tolist()) == ([0, 1], [0, 1])


def test_a_curve_goes_from_corner_to_corner_and_has_each_point_once() -> None:
    false, true = roc_points(positives=counts(b9=1), negatives=counts(b2=1, b9=1, b20=2))
    assert list(zip(false.tolist(), true.tolist(), strict=True)) == [(0, 0), (0.5, 0), (0.75, 1), (1, 1)]


@pytest.mark.parametrize(("classes", "multilabel", "told"), [(2, False, 0), (3, False, 3), (1, True, 1), (2, True, 2)])
def test_the_area_of_each_class_is_told_where_it_is_not_that_of_the_other(
    classes: int, multilabel: bool, told: int
) -> None:
    logits, truth = drawn(1, 40, classes)
    targets = [(k,) if k else () for k in truth.tolist()] if multilabel and classes == 1 else single(truth)
    found = summarise(sums_of(logits, targets, job_of(classes, multilabel)), job_of(classes, multilabel))
    assert [name for name in found if name.startswith("auroc:")] == [f"auroc:c{k}" for k in range(told)]


@pytest.mark.parametrize("multilabel", [False, True])
def test_counts_that_disagree_are_found(multilabel: bool) -> None:
    job = job_of(3, multilabel)
    logits, truth = drawn(2, 30, 3)
    sums = sums_of(logits, single(truth), job)
    assert consistent(sums, job)
    for key in ("confusion", "positives", "negatives"):
        for place in (0, -1):
            more = list(sums[key])  # type: ignore[arg-type]
            more[place] += 1
            assert not consistent(sums | {key: more}, job), (key, place)
    assert not consistent(sums | {"n": 29}, job)
    moved = list(sums["positives"])  # type: ignore[arg-type]
    filled = next(k for k, value in enumerate(moved[:BINS]) if value)
    moved[filled], moved[BINS] = moved[filled] - 1, moved[BINS] + 1  # from one class to the next: the sum stays
    assert not consistent(sums | {"positives": moved}, job)
    assert consistent(sums | {"missing": [30, 0]}, job)
    assert not consistent(sums | {"missing": [0, 31]}, job)
