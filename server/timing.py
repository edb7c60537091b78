"""Where the time of a training round went: training, transfer, waiting for others.

Of every site the server knows how long the round took, and after how many seconds the site's reply was there; the site
says how many of these it trained, where its rules let it. The three parts of a site add up to the round's seconds, and
so do their means over the sites:

    train      what the sites say
    transfer   from the question to the reply, less the training: network, queues, packing; in a simulation also the
               time until a worker was free
    wait       from a site's reply to the end of the round: for slower sites, and for the aggregation
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PARTS = ("train", "transfer", "wait")


def split_time(seconds: float | None, rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """The parts of a round of so many seconds, means over the sites whose reply was used; None where it is not known.

    ``rows`` hold ``seconds`` from question to reply and ``train_seconds``. Where a site does not say how long it
    trained, only ``wait`` is known.
    """
    rows = list(rows)
    told = [(row.get("seconds"), row.get("train_seconds")) for row in rows]
    if seconds is None or not rows or any(took is None for took, _ in told):
        return dict.fromkeys(PARTS)
    took = sum(float(took or 0) for took, _ in told) / len(rows)
    wait = max(seconds - took, 0.0)
    if any(trained is None for _, trained in told):
        return {"train": None, "transfer": None, "wait": wait}
    train = min(sum(float(trained or 0) for _, trained in told) / len(rows), took)
    return {"train": train, "transfer": took - train, "wait": wait}


def total_time(parts: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The parts summed over rounds; None of a part that some round does not know."""
    found: dict[str, float | None] = dict.fromkeys(PARTS, 0.0)
    parts = list(parts)
    for name in PARTS:
        values = [part[name] for part in parts]
        found[name] = None if not values or None in values else sum(value or 0.0 for value in values)
    return found
