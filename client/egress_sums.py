"""The part of the last gate that lets sums out: plain numbers of names and lengths that the job fixes, no others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord

from client.egress_base import Asked, Refused
from client.policy import least_of, tells
from client.workspace import open_model
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.statistics import template
from shared.subgroups import group_sums, groups_of, sums_of_groups
from shared.tasks import Sums, load_task


def evaluation_sums(record: Any, asked: Asked) -> MetricRecord:
    """The sums of an evaluation."""
    return MetricRecord(_as_template(record, _sums_template(asked.job)))


def subgroup_sums(record: Any, asked: Asked) -> MetricRecord:
    """Sums by group: nothing of groups that the site's rules do not name, nor of fewer images than may be told of."""
    groups, policy = groups_of(asked.job), asked.workspace.policy
    checked = _as_template(record, group_sums(dict.fromkeys(groups, _sums_template(asked.job))))
    for group, sums in sums_of_groups(checked, groups).items():
        n = int(sums["n"])  # type: ignore[arg-type]
        if n and not tells(policy, groups[group][0]):
            raise Refused(f"{group}: privacy.subgroups does not name it")
        if 0 < n < least_of(policy):
            raise Refused(f"{group}: fewer images than may be told of")
        if not n and any(np.any(np.asarray(value)) for value in sums.values()):
            raise Refused(f"{group}: figures of no image")
    return MetricRecord(checked)


def statistics(record: Any, asked: Asked) -> MetricRecord:
    """The sums of a survey."""
    return MetricRecord(_as_template(record, template(asked.job)))


@lru_cache(maxsize=8)
def _sums_template(job: Job) -> Sums:
    """The names, lengths and kinds of a task's sums, from a data set without images, as the server has them."""
    model = open_model(job)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    sums: Sums = load_task(job.task).collect(model, Dataset.of(()), job, device)
    return sums


def _as_template(record: Any, template: Sums) -> Sums:
    sums = numbers(record, {key: len(value) if isinstance(value, list) else -1 for key, value in template.items()})
    if set(sums) != set(template):
        raise Refused("some sums of the list are missing")
    for key, expected in template.items():
        values = np.asarray(sums[key])
        if np.asarray(expected).dtype.kind == "i" and values.dtype.kind != "i":
            raise Refused(f"{key} counts, and is not whole")
        if np.any(values < 0):
            raise Refused(f"{key} is negative")
    return sums


def numbers(record: Any, allowed: Mapping[str, int]) -> Sums:
    """A record of plain finite numbers, and lists of them, of allowed names and lengths (-1: one number).

    Raises:
        Refused: it holds anything else.
    """
    found: Sums = {}
    for key, value in record.items():
        values = value if isinstance(value, list) else [value]
        length = len(value) if isinstance(value, list) else -1
        if allowed.get(key) != length:
            raise Refused(f"{key!r} is not on the list, or has another length")
        if not set(map(type, values)) <= {int, float} or not all(map(math.isfinite, values)):
            raise Refused(f"{key} holds what is no finite number")
        found[key] = list(value) if isinstance(value, list) else value
    return found
