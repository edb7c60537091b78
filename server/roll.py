"""Calling the roll: who is behind the nodes, and who of them may take part."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from server.admission import Dropped, Place, admit_facts
from shared.config import Job
from shared.pairs import fewest
from shared.sitefile import SITE_NAME


class Roll(NamedTuple):
    """Who answered: those admitted, those not with the reason, and the nodes that said anything at all."""

    places: list[Place]
    dropped: list[dict[str, str]]
    heard: set[int]


def call(answers: Iterable[tuple[Place, Message | None]], job: Job, frozen: str, counted: int) -> Roll:
    """Read the answers of nodes to the first query; ``frozen`` and ``counted`` as for ``admit_facts``.

    The name of a node is that under which its key is registered, and then it may answer by no other; or it is empty.
    """
    roll = Roll([], [], set())
    for node, reply in answers:
        if reply is not None and not reply.has_error():
            roll.heard.add(node.node)
        try:
            place = Place(node.node, *admit_facts(reply, job, frozen, counted))
            if node.name and place.name != node.name:
                raise Dropped("bad-name")
            roll.places.append(place)
        except Dropped as reason:
            name = node.name or _site_name(reply) or f"node {node.node}"
            roll.dropped.append({"site": name, "reason": str(reason)})
    return roll


def joined(
    places: Sequence[Place], found: Sequence[Place], registered: Mapping[int, str], there: Collection[int]
) -> list[Place]:
    """``places`` and those ``found`` now, by name.

    A site that was given a new key is a new node. Where keys are registered, by the names in ``registered``, it takes
    the place of its old node unless that is ``there``, too.
    """
    renewed = {place.name for place in found if registered.get(place.node)}
    stay = [place for place in places if place.name not in renewed or place.node in there]
    return sorted([*stay, *found], key=lambda place: place.name)


def _site_name(reply: Message | None) -> str:
    if reply is None or reply.has_error():
        return ""
    name = str(reply.content.config_records.get("status", ConfigRecord()).get("site", ""))
    return name if re.fullmatch(SITE_NAME, name) else ""  # a name is all that may ride on it


def await_sites(grid: Grid, expected: int, seconds: float) -> None:
    """Wait until as many sites as are expected are connected, but no longer; a simulated site always is."""
    if hasattr(grid, "in_order"):
        return
    deadline = time.monotonic() + seconds
    while len(list(grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(1.0)


def shortfall(admitted: int, dropped: Sequence[Mapping[str, str]], job: Job, secure: int = 0) -> str:
    """What a run lacks that ``admitted`` sites are left of, in words; "" if they are enough.

    ``secure`` is how many secure aggregation needs, ``dropped`` are the others, with the reason.
    """
    asked = job.federation
    robust = f"{asked.aggregator} with federation.byzantine = {asked.byzantine}"
    if asked.aggregator == "trimmed_mean":
        robust += f" and federation.trim = {asked.trim:g}"
    needs = [(asked.min_sites, "federation.min_sites"), (secure, "secure aggregation"), (fewest(job), robust)]
    least, who = max(needs, key=lambda need: need[0])
    if admitted >= least:
        return ""
    reasons = "; ".join(f"{item['site']}: {item['reason']}" for item in dropped)
    reasons = reasons or ("no other is there" if admitted else "no site is there")
    return f"{admitted} sites are in order, {who} asks for {least} ({reasons})"
