"""The federated algorithm of a run, the server's part: what becomes of the replies, what is kept for the next round.

A reply that was admitted goes through the aggregator; the server's optimiser then steps from the model before the round
towards the aggregate. What an algorithm must remember from round to round lies in ``held`` (moments, control variates),
which the checkpoint saves: a resumed run goes on as if it had not been broken off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from server import aggregation, robust
from server.admission import Update
from server.corrections import CORRECTIONS
from server.gathered import TooFew as TooFew
from server.optimizers import MOMENTS, OPTIMIZERS, server_rate
from shared.config import Job
from shared.strategies import AGGREGATORS

Arrays = dict[str, Tensor]


def aggregator(name: str) -> aggregation.Aggregator:
    """The aggregator of this name: what its line in the registry brings, or the function in ``server``."""
    return AGGREGATORS[name].function or vars(robust).get(name) or vars(aggregation)[name]


class Algorithm:
    """How the job's federation makes a new global model of the old one and the replies of a round.

    ``trained`` names the arrays that gradients train; others, such as BatchNorm's running statistics, are not stepped.
    """

    def __init__(self, job: Job, trained: Sequence[str] = ()) -> None:
        self.job, self.trained = job, frozenset(trained)
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
            TooFew: there is no reply, or the aggregator needs more.
        """
        self.correction.begin()
        merge = aggregator(self.job.federation.aggregator)
        merged = merge(replies, before, self.job)
        return self.step(before, self.correction.finish(before, merged, self.everyone), number)

    def step(self, before: Arrays, merged: Arrays, number: int) -> Arrays:
        """The server's optimiser on the change from ``before`` to the aggregate ``merged``.

        What is not trained is taken from ``merged``. Half-precision weights are stepped in float32.
        """
        name = self.job.federation.server_optimizer
        if name == "none":
            return merged
        rate = server_rate(self.job, number)
        stepped: Arrays = {}
        for key, new in merged.items():
            if key not in self.trained or not new.is_floating_point():
                stepped[key] = new
                continue
            wide = torch.promote_types(new.dtype, torch.float32)
            old = before[key].to(wide)
            moments = {kind: self.held[kind][key] for kind in MOMENTS if key in self.held.get(kind, {})}
            stepped[key] = OPTIMIZERS[name](old, new.to(wide) - old, moments, rate, self.job, number).to(new.dtype)
            for kind, moment in moments.items():
                self.held.setdefault(kind, {})[key] = moment
        return stepped
