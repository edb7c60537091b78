"""Two models on the same sites' sums: the figures are those of the pooled cases; what cannot be compared says why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score

from server.compare import compare, difference
from server.releases import previous
from shared.config import Job, job_from_flat
from shared.intervals import proportion
from shared.tasks import Sums
from shared.tasks.classification.learning import sums_of_logits

JOB = job_from_flat({"data.classes": "no,yes"})
Case = tuple[np.ndarray, np.ndarray]


def drawn(n: int, seed: int, skill: float) -> Case:
    truth = np.random.default_rng(seed).random(n) < 0.5
    return np.random.default_rng(seed + 1000 * int(skill * 10)).normal(0, 1, n) + skill * (2 * truth - 1), truth


def sums_of(case: Case, job: Job = JOB) -> Sums:
    logits = torch.stack([torch.zeros(len(case[0]), dtype=torch.float64), torch.from_numpy(case[0])], 1)
    return sums_of_logits([(logits, [(int(t),) for t in case[1]])], job)


def pooled(cases: Sequence[Case]) -> Case:
    return tuple(np.concatenate(parts) for parts in zip(*cases, strict=True))  # type: ignore[return-value]


def test_both_are_of_the_sites_that_tested_both() -> None:
    new = {"a": drawn(200, 1, 2.0), "b": drawn(150, 2, 2.0), "new": drawn(90, 3, 2.0)}
    old = {"a": drawn(200, 1, 0.2), "b": drawn(140, 4, 0.2), "gone": drawn(50, 5, 0.2)}
    sums = [{site: sums_of(case) for site, case in own.items()} for own in (new, old)]
    found = compare(*sums, JOB, JOB)
    assert (found["sites"], found["left_out"], found["changed"]) == (["a", "b"], ["gone", "new"], ["b"])
    assert found["images"] == {"new": 350, "old": 340}
    for key, cases in (("new", new), ("old", old)):
        scores, truth = pooled([cases["a"], cases["b"]])
        assert found["metrics"]["auroc"][key]["value"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-3)
        assert found["metrics"]["accuracy"][key]["value"] == pytest.approx(accuracy_score(truth, scores > 0))
    assert found["metrics"]["auroc"]["better"] == "new"
    assert found["metrics"]["loss"]["better"] == "new"  # of the loss, less is better
    turned = compare(sums[1], sums[0], JOB, JOB)["metrics"]
    assert turned["auroc"]["better"] == turned["loss"]["better"] == "old"


def test_the_same_model_is_not_better_than_itself() -> None:
    sums = {"a": sums_of(drawn(80, 7, 1.0))}
    for row in compare(sums, sums, JOB, JOB)["metrics"].values():
        assert row["better"] == "unclear"
        assert row["difference"]["value"] == 0
        assert row["difference"]["low"] < 0 < row["difference"]["high"]


def test_the_interval_of_a_difference_is_newcombes_example() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:873), table II, method 10: 56/70 and 48/80."""
    found = difference(proportion(56, 70), proportion(48, 80))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"data.classes": "yes,no"}, "classes"),
        ({"task": "sequence", "data.classes": "no,yes", "model.name": "cnn_gru"}, "task"),
        ({"data.classes": "no,yes", "data.multilabel": True}, "labels"),
    ],
)
def test_other_questions_are_not_compared(other: dict[str, object], why: str) -> None:
    sums = {"a": sums_of(drawn(20, 1, 1.0))}
    assert why in compare(sums, sums, JOB, job_from_flat(other))["why_not"]


def test_without_a_site_in_common_there_is_nothing_to_say() -> None:
    sums = sums_of(drawn(20, 1, 1.0))
    assert compare({"a": sums}, {"b": sums}, JOB, JOB)["why_not"] == "no site has tested both"


def test_the_release_before_is_the_last_of_that_name_before_the_runs_own() -> None:
    def entry(name: str, version: str, key: str) -> dict[str, str]:
        return {"name": name, "version": version, "run_key": key}

    log = [entry("x", "1", "k1"), entry("y", "1", "k2"), entry("x", "2", "k3"), entry("x", "3", "k4")]
    assert previous(log, "k3") == log[0]
    assert previous(log, "unreleased") == log[3]
    assert previous(log, "k1") is None
    assert previous(log, "k3", "y") == log[1]
    assert previous(log, "k3", "x", "9") is None
