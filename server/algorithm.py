"""The federated algorithm of a run, the server's part: what becomes of the replies, what is kept for the next round.

A reply that was admitted goes through the aggregator; the server's optimiser then steps from the model before the round
towards the aggregate. What an algorithm must remember from round to round lies in ``held`` (moments, control variates),
which the checkpoint saves: a resumed run goes on as if it had not been broken off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from server.admission import Update
from server.aggregation import AGGREGATORS
from server.corrections import CORRECTIONS
from shared.config import Job

Arrays = dict[str, Tensor]


class Algorithm:
    """How the job's federation makes a new global model of the old one and the replies of a round."""

    def __init__(self, job: Job, trained: Sequence[str] = ()) -> None:
        """``trained`` names the arrays that gradients train; see ``shared.weights.trained_names``."""
        self.job = job
        self.held: dict[str, Arrays] = {}
        self.everyone = 0.0  # the weight of all sites that could train in this round
        self.correction = CORRECTIONS[job.federation.correction](job, trained, self.held)

    def outgoing(self, before: Mapping[str, Tensor]) -> dict[str, Arrays]:
        """What goes to the sites of a round beside the model ``before``: arrays by the name of their record."""
        return self.correction.outgoing(before)

    def take(self, update: Update, site: str, number: int, before: Arrays) -> tuple[float, Arrays]:
        """An admitted reply as ``merge`` takes it."""
        return self.correction.take(update, site, number, before)

    def merge(self, replies: Iterable[tuple[float, Arrays]], before: Arrays, number: int) -> Arrays:
        """The global model after round ``number``, of which ``before`` was sent out.

        Raises:
            ValueError: there is no reply.
        """
        self.correction.begin()
        merged = AGGREGATORS[self.job.federation.aggregator](replies)
        return self.step(before, self.correction.finish(before, merged, self.everyone), number)

    def step(self, before: Arrays, merged: Arrays, number: int) -> Arrays:
        """The server's optimiser on the change from ``before`` to the aggregate ``merged``."""
        return merged
