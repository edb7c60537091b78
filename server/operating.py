"""The operating point: from which probability on a model's answer is *yes*, and what that means for patients.

It is chosen on the validation sums, by the rule in the job, and only reported on the test sums: a threshold that was
picked on the test images would look better than it is. All of it comes from the score histograms that the sites send
anyway, so nothing more leaves them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from shared.config import Job
from shared.intervals import Estimate, proportion
from shared.tasks import Sums
from shared.tasks.classification.calibration import bin_edges, threshold
from shared.tasks.classification.metrics import histograms

FIGURES = ("sensitivity", "specificity", "ppv", "npv", "prevalence")
Facts = dict[str, Any]


class Scores(NamedTuple):
    """The score histograms, int (BINS,), of the cases that have a class and of those that have it not."""

    name: str
    positives: np.ndarray
    negatives: np.ndarray


def scores_of(sums: Sums, job: Job) -> list[Scores]:
    """The histograms of every class that has an operating point; of two that exclude each other only the second.

    Empty for tasks whose answer is no label. Of a segmentation job these are the labels of whole images.
    """
    prefix = "image_" if job.labels else ""
    if prefix:
        job = dataclasses.replace(job, data=dataclasses.replace(job.data, classes=job.data.labels, labels=""))
    if not sums.get(f"{prefix}positives"):
        return []
    own: Sums = {key: sums[f"{prefix}{key}"] for key in ("positives", "negatives")}
    found = [Scores(*part) for part in zip(job.classes, *histograms(own, job), strict=True)]
    return found[-1:] if len(found) == 2 and not job.data.multilabel else found


def rule_words(job: Job) -> str:
    """The job's rule as people say it."""
    least = f"{job.evaluation.operating_value:g}"
    return {
        "youden": "largest sensitivity + specificity (Youden)",
        "sensitivity": f"sensitivity of at least {least}, and then the largest specificity",
        "specificity": f"specificity of at least {least}, and then the largest sensitivity",
        "fixed": f"fixed at {least}",
    }[job.evaluation.operating_point]


def choose(sums: Sums, job: Job) -> Facts:
    """The operating point of each class by the job's rule on the validation sums of all sites; {} without classes.

    ``threshold`` is None where there are not both kinds of cases to choose it by.
    """
    found: Facts = {}
    for name, positives, negatives in scores_of(sums, job):
        chosen = _chosen(positives, negatives, job)
        found[name] = {"threshold": chosen}
        if chosen is not None:
            found[name]["validation"] = _figures(positives, negatives, chosen)
    rule = {"rule": job.evaluation.operating_point, "value": job.evaluation.operating_value, "words": rule_words(job)}
    return {**rule, "images": sums["n"], "classes": found} if found else {}


def _chosen(positives: np.ndarray, negatives: np.ndarray, job: Job) -> float | None:
    rule, least, edges = job.evaluation.operating_point, job.evaluation.operating_value, bin_edges()[:-1]
    if rule == "fixed":  # scores are known to a bin: the edge that is nearest
        return float(edges[np.abs(edges - least).argmin()])
    if not positives.sum() or not negatives.sum():
        return None
    if rule == "youden":
        return threshold(positives, negatives)
    # Saying yes from bin k on: more sensitive the lower it is, more specific the higher.
    sensitivity = np.cumsum(positives[::-1])[::-1] / positives.sum()
    specificity = 1 - np.cumsum(negatives[::-1])[::-1] / negatives.sum()
    if rule == "sensitivity":
        return float(edges[np.flatnonzero(sensitivity >= least - 1e-12)[-1]])
    enough = np.flatnonzero(specificity >= least - 1e-12)
    return float(edges[enough[0] if len(enough) else -1])


def chosen_before(events: Iterable[Mapping[str, Any]], number: int) -> Facts:
    """The operating point that was chosen on the validation images after round ``number``; {} if none was."""
    found = [
        event.get("operating_point", {})
        for event in events
        if event["event"] == "evaluation" and event["split"] == "val" and event["round"] == number
    ]
    return dict(found[-1]) if found else {}


def report(chosen: Mapping[str, Any], sums: Sums, sites: Mapping[str, Sums], job: Job) -> Facts:
    """What the chosen operating point does on the test sums, over all sites and at each: ``test`` and ``sites``.

    Sensitivity, specificity, positive and negative predictive value and the prevalence they hold for, with Wilson's
    95 % intervals; {} where nothing was chosen.
    """
    if not chosen:
        return {}
    classes: Facts = {name: dict(facts) for name, facts in chosen["classes"].items()}
    for key, part in [("", sums), *sites.items()]:
        for name, positives, negatives in scores_of(part, job):
            if (at := classes[name]["threshold"]) is None:
                continue
            figures = _figures(positives, negatives, at)
            if key:
                classes[name].setdefault("sites", {})[key] = figures
            else:
                classes[name]["test"] = figures
    return {**chosen, "classes": classes}


def _figures(positives: np.ndarray, negatives: np.ndarray, at: float) -> Facts:
    """The five figures with their intervals, and the counts they are of."""
    yes = bin_edges()[:-1] >= at - 1e-12
    tp, fn = int(positives[yes].sum()), int(positives[~yes].sum())
    fp, tn = int(negatives[yes].sum()), int(negatives[~yes].sum())
    shares = {
        "sensitivity": (tp, tp + fn),
        "specificity": (tn, tn + fp),
        "ppv": (tp, tp + fp),
        "npv": (tn, tn + fn),
        "prevalence": (tp + fn, tp + fn + fp + tn),
    }
    figures: Facts = {name: _plain(proportion(*share)) for name, share in shares.items()}
    return figures | {"counts": {"tp": tp, "fp": fp, "fn": fn, "tn": tn}}


def _plain(estimate: Estimate) -> Facts:
    """As it comes back from the journal: a figure that there is not is None."""
    return {name: None if math.isnan(value) else value for name, value in vars(estimate).items()}
