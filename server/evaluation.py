"""What the sites' answers to an evaluation come to: metrics over all of them, and of each."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from server.admission import Dropped, Place, admit_sums
from shared.config import Job
from shared.intervals import Estimate
from shared.tasks import Sums, add_sums
from shared.weights import REFERENCE

Metrics = dict[str, Estimate]


def evaluated(
    answers: Iterable[tuple[Place, Message | None]], split: str, template: Sums, task: ModuleType, job: Job
) -> tuple[dict[str, Any], Metrics]:
    """The facts of an evaluation event, and the metrics over all sites; of the test, each site's sums are kept.

    ``template`` are the sums of no image at all; what does not look like them is dropped.
    """
    sums: dict[str, Sums] = {}
    dropped: list[dict[str, str]] = []
    for place, reply in answers:
        try:
            sums[place.name] = admit_sums(reply, template, task, job, place.images[split])
        except Dropped as reason:
            dropped.append({"site": place.name, "reason": str(reason)})
    sums = {name: part for name, part in sums.items() if part["n"]}  # a site without test images has a model, too
    whole = add_sums([template, *sums.values()])
    metrics: Metrics = task.summarise(whole, job)
    facts: dict[str, Any] = {"metrics": rows(metrics), "dropped": dropped, "images": whole["n"]}
    facts["sites"] = {name: rows(task.summarise(part, job)) for name, part in sums.items()}
    facts["site_images"] = {name: part["n"] for name, part in sums.items()}
    return facts | ({"sums": sums} if split == "test" else {}), metrics


def to_judge(arrays: dict[str, Tensor], config: ConfigRecord, reference: dict[str, Tensor]) -> RecordDict:
    """A message with a model to test, and with what it is measured by, if anything."""
    content = RecordDict({"arrays": ArrayRecord(arrays), "config": config})
    if reference:
        content[REFERENCE] = ArrayRecord(reference)
    return content


def rows(metrics: Metrics) -> dict[str, dict[str, Any]]:
    """Metrics as an event holds them."""
    return {name: vars(estimate) for name, estimate in metrics.items()}
