"""The operating point against its definition case by case, and scikit-learn's figures at it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score

from server.operating import FIGURES, choose, chosen_before, report
from shared.config import Job, job_from_flat
from shared.tasks import Sums
from shared.tasks.classification.calibration import bin_edges
from shared.tasks.classification.learning import sums_of_logits


def job_of(rule: str = "youden", value: float = 0.9, **more: object) -> Job:
    flat = {"evaluation.operating_point": rule, "evaluation.operating_value": value, "data.classes": "no,yes"}
    return job_from_flat(flat | more)


def sums_of(p: np.ndarray, truth: np.ndarray, job: Job) -> Sums:
    logits = torch.stack([torch.zeros(len(p), dtype=torch.float64), torch.logit(torch.from_numpy(p))], 1)
    return sums_of_logits([(logits, [(int(t),) for t in truth])], job)


def drawn(n: int, seed: int, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.random(n) < 0.4
    return 1 / (1 + np.exp(-(generator.normal(0, 1.5, n) + shift * (2 * truth - 1)))), truth


def sensitivity(p: np.ndarray, truth: np.ndarray, at: float) -> float:
    return float((p[truth] >= at).mean())


def specificity(p: np.ndarray, truth: np.ndarray, at: float) -> float:
    return float((p[~truth] < at).mean())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["youden", "sensitivity", "specificity"]), st.floats(0.05, 0.99))
def test_no_other_threshold_serves_the_rule_better(seed: int, rule: str, least: float) -> None:
    p, truth = drawn(60, seed)
    if truth.all() or not truth.any():
        return
    job = job_of(rule, least)
    at = choose(sums_of(p, truth, job), job)["classes"]["yes"]["threshold"]
    tries = [(sensitivity(p, truth, edge), specificity(p, truth, edge)) for edge in bin_edges()[:-1]]
    own = sensitivity(p, truth, at), specificity(p, truth, at)
    if rule == "youden":
        assert sum(own) == pytest.approx(max(sum(one) for one in tries))
    else:
        kept, best = (0, 1) if rule == "sensitivity" else (1, 0)
        enough = [one for one in tries if one[kept] >= least - 1e-12]
        if enough:  # a specificity that no threshold reaches: the highest one is taken
            assert own[kept] >= least - 1e-12
            assert own[best] == pytest.approx(max(one[best] for one in enough))


@pytest.mark.parametrize("rule", ["youden", "sensitivity", "fixed"])
def test_the_test_figures_are_those_of_scikit_learn_at_the_threshold_of_the_validation(rule: str) -> None:
    job = job_of(rule, 0.7)
    chosen = choose(sums_of(*drawn(300, 1), job), job)
    at = chosen["classes"]["yes"]["threshold"]
    sites = {"a": drawn(200, 2), "b": drawn(150, 3, shift=0.2)}
    sums = {name: sums_of(*found, job) for name, found in sites.items()}
    p, truth = (np.concatenate(parts) for parts in zip(*sites.values(), strict=True))
    found = report(chosen, sums_of(p, truth, job), sums, job)["classes"]["yes"]
    said = p >= at
    expected = {
        "sensitivity": recall_score(truth, said),
        "specificity": recall_score(~truth, ~said),
        "ppv": precision_score(truth, said),
        "npv": precision_score(~truth, ~said),
        "prevalence": truth.mean(),
    }
    assert {name: found["test"][name]["value"] for name in FIGURES} == pytest.approx(expected)
    counts = {"sensitivity": truth, "specificity": ~truth, "ppv": said, "npv": ~said, "prevalence": truth >= 0}
    for name in FIGURES:
        row = found["test"][name]
        assert row["low"] <= row["value"] <= row["high"]
        assert row["n"] == counts[name].sum()
    assert sum(found["test"]["counts"].values()) == 350
    for name, (scores, has) in sites.items():
        assert found["sites"][name]["sensitivity"]["value"] == pytest.approx(sensitivity(scores, has, at))


def test_a_threshold_chosen_on_the_test_images_would_look_better() -> None:
    """What the rule is for: on other images the chosen point is as it is, not as it would like to be."""
    job = job_of()
    gain = lambda found: found["sensitivity"]["value"] + found["specificity"]["value"]  # noqa: E731
    for seed in range(20):
        val, test = drawn(40, seed), drawn(40, seed + 100)
        honest = report(choose(sums_of(*val, job), job), sums_of(*test, job), {}, job)["classes"]["yes"]
        own = choose(sums_of(*test, job), job)["classes"]["yes"]
        assert gain(honest["test"]) <= gain(own["validation"]) + 1e-12


def test_without_both_kinds_of_cases_there_is_no_point_but_a_fixed_one() -> None:
    p, truth = drawn(30, 0)
    for rule, there in {"youden": False, "sensitivity": False, "fixed": True}.items():
        job = job_of(rule, 0.5)
        chosen = choose(sums_of(p[truth], truth[truth], job), job)
        assert (chosen["classes"]["yes"]["threshold"] is not None) == there
        found = report(chosen, sums_of(p, truth, job), {}, job)["classes"]["yes"]
        assert ("test" in found) == there
    assert chosen["classes"]["yes"]["threshold"] == 0.5


def test_every_label_has_its_own_point_and_other_tasks_none() -> None:
    job = job_of(**{"data.classes": "a,b,c"})
    logits = torch.randn(90, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = choose(sums_of_logits([(logits, [(k % 3,) for k in range(90)])], job), job)
    assert list(chosen["classes"]) == ["a", "b", "c"]
    assert choose({"n": 3, "loss": 1.0}, job) == {}
    assert report({}, {"n": 3}, {}, job) == {}


def test_the_point_is_that_of_the_round_that_was_kept() -> None:
    def event(split: str, number: int, mark: int) -> dict[str, object]:
        return {"event": "evaluation", "split": split, "round": number, "operating_point": {"mark": mark}}

    events = [event("val", 1, 1), event("val", 2, 2), event("test", 2, 9), {"event": "round", "round": 2}]
    assert chosen_before(events, 2) == {"mark": 2}
    assert chosen_before(events, 3) == {}
