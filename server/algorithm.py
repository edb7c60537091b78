"""The federated algorithm of a run, the server's part: what becomes of the replies, what is kept for the next round.

A reply that was admitted goes through the aggregator; the server's optimiser then steps from the model before the round
towards the aggregate. What an algorithm must remember from round to round lies in ``held`` (moments, control variates),
which the checkpoint saves: a resumed run goes on as if it had not been broken off.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from server.aggregation import AGGREGATORS
from shared.config import Job

Arrays = dict[str, Tensor]


class Algorithm:
    """How the job's federation makes a new global model of the old one and the replies of a round."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.held: dict[str, Arrays] = {}

    def outgoing(self) -> dict[str, Arrays]:
        """What goes to the sites of a round beside the model: arrays by the name of their record."""
        return {}

    def merge(self, replies: Iterable[tuple[float, Arrays]], before: Arrays, number: int) -> Arrays:
        """The global model after round ``number``, of which ``before`` was sent out.

        Raises:
            ValueError: there is no reply.
        """
        return self.step(before, AGGREGATORS[self.job.federation.aggregator](replies), number)

    def step(self, before: Arrays, merged: Arrays, number: int) -> Arrays:
        """The server's optimiser on the change from ``before`` to the aggregate ``merged``."""
        return merged
