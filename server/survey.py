"""Ask every site what its images are like, before anything is trained."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from server.admission import Dropped, status
from server.exchange import replies
from shared.config import Job
from shared.sitefile import SITE_NAME
from shared.statistics import template
from shared.tasks import Sums


class Survey(NamedTuple):
    """The sums of each site that answered, by name, and the others: (site, reason)."""

    sites: dict[str, Sums]
    dropped: list[tuple[str, str]]


def survey(grid: Grid, job: Job) -> Survey:
    """The sums of ``shared.statistics.template`` of every site; a site that declines is named with its code."""
    content = RecordDict({"config": ConfigRecord({"round": 0, "survey": True})})
    nodes = sorted(grid.get_node_ids())
    messages = [Message(content, node, MessageType.QUERY, group_id="0") for node in nodes]
    sites: dict[str, Sums] = {}
    dropped: list[tuple[str, str]] = []
    for node, reply in zip(nodes, replies(grid, messages, job.federation.round_timeout), strict=True):
        name = _name(reply) or f"node {node}"
        try:
            sums = _admitted(reply, job)
            if name in sites:
                raise Dropped("bad-name")
            sites[name] = sums
        except Dropped as reason:
            dropped.append((name, str(reason)))
    return Survey(dict(sorted(sites.items())), dropped)


def _name(reply: Message | None) -> str:
    if reply is None or reply.has_error():
        return ""
    name = str(reply.content.config_records.get("status", ConfigRecord()).get("site", ""))
    return name if re.fullmatch(SITE_NAME, name) else ""


def _admitted(reply: Message | None, job: Job) -> Sums:
    status(reply)
    assert reply is not None
    if set(reply.content.metric_records) != {"metrics"}:
        raise Dropped("wrong-records")
    sums: Sums = dict(reply.content["metrics"])  # type: ignore[arg-type]
    expected = template(job)
    if set(sums) != set(expected):
        raise Dropped("wrong-names")
    for key, value in expected.items():
        if np.shape(sums[key]) != np.shape(value):
            raise Dropped("wrong-shape")
        if not np.all(np.isfinite(sums[key]) & (np.asarray(sums[key]) >= 0)):
            raise Dropped("not-finite")
    return sums
