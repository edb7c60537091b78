"""Two models held against each other on the same sums: those of the test images of the sites that tested both.

Of every such site the sums of both models are added up, so both figures are of the same sites. They are of the same
images, too, where each site told the same number of them for both; where not, the comparison says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shared.config import Job
from shared.intervals import Estimate
from shared.tasks import TASKS, Sums, add_sums, load_task


def compare(new: Mapping[str, Sums], old: Mapping[str, Sums], job: Job, old_job: Job) -> dict[str, Any]:
    """The metrics of both on the sites that tested both, and the difference, new minus old.

    Args:
        new, old: the test sums of each site.

    Returns:
        ``sites`` (that count), ``left_out`` (that only one was tested at), ``changed`` (sites whose number of test
        images is another), ``images`` of both, ``metrics``: {name: {new, old, difference, better}}, each of new, old
        and difference {value, low, high, n}; ``why_not`` in words where the two cannot be compared, else "".

    The interval of the difference is that of two independent samples (square and add: Newcombe 1998, method 10; Zou and
    Donner 2008). On the same images the two are paired, and it is wider than it need be, never narrower.
    """
    found: dict[str, Any] = {"sites": [], "left_out": [], "changed": [], "metrics": {}, "why_not": ""}
    found["why_not"] = _differ(job, old_job)
    if found["why_not"]:
        return found
    both = sorted(set(new) & set(old))
    found |= {"sites": both, "left_out": sorted(set(new) ^ set(old))}
    if not both:
        return found | {"why_not": "no site has tested both"}
    found["changed"] = [site for site in both if new[site]["n"] != old[site]["n"]]
    task = load_task(job.task)
    sums = [add_sums(own[site] for site in both) for own in (new, old)]
    found["images"] = {"new": sums[0]["n"], "old": sums[1]["n"]}
    ours, theirs = task.summarise(sums[0], job), task.summarise(sums[1], old_job)
    for name in ours:
        if name in theirs:
            found["metrics"][name] = _row(ours[name], theirs[name], direction(job, name))
    return found


def direction(job: Job, metric: str) -> int:
    """1 where more of the metric is better, -1 where less is."""
    return TASKS[job.task].metrics.get(metric.partition(":")[0], 1)


def _differ(job: Job, old: Job) -> str:
    """Why the sums of two jobs are not of one kind; "" where they are."""
    for what, one, other in (
        ("task", job.task, old.task),
        ("classes", ", ".join(job.classes), ", ".join(old.classes)),
        ("labels of whole images", ", ".join(job.labels), ", ".join(old.labels)),
        ("number of labels an image may have", job.data.multilabel, old.data.multilabel),
    ):
        if one != other:
            return f"the two have not the same {what}: {one} and {other}"
    return ""


def difference(new: Estimate, old: Estimate) -> Estimate:
    """New minus old with its 95 % interval, as if from different cases."""
    if not (new.n and old.n):
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = new.value - old.value
    below = math.hypot(new.value - new.low, old.high - old.value)
    above = math.hypot(new.high - new.value, old.value - old.low)
    return Estimate(value, value - below, value + above, min(new.n, old.n))


def _row(new: Estimate, old: Estimate, sign: int) -> dict[str, Any]:
    change = difference(new, old)
    better = "unclear"
    if sign * (change.low if sign > 0 else change.high) > 0:
        better = "new"
    elif sign * (change.high if sign > 0 else change.low) < 0:
        better = "old"
    rows = {"new": new, "old": old, "difference": change}
    return {name: _plain(one) for name, one in rows.items()} | {"better": better}


def _plain(one: Estimate) -> dict[str, Any]:
    return {name: None if math.isnan(value) else value for name, value in vars(one).items()}
