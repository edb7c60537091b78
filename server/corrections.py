"""The server's part in the client corrections: what goes out with the model, and what is made of the mean of replies.

Each is an object with the same three verbs: ``outgoing`` before a round, ``take`` for each admitted reply, ``finish``
with the aggregate. What it must remember lies in the algorithm's ``held``, which the checkpoint saves. Statistics and
counters, which no gradient trains, are left to the aggregator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from server.admission import Place, Update
from server.wire import Content
from shared.config import Job

Arrays = dict[str, Tensor]
Held = dict[str, Arrays]
HEARD = "heard"  # the last round in which each site's reply was counted in


class Plain:
    """No correction, or one that the sites do alone (FedProx, adversarial)."""

    def __init__(self, job: Job, trained: Sequence[str], held: Held) -> None:
        """``trained`` names the arrays that gradients train."""
        self.job, self.trained, self.held = job, list(trained), held

    def outgoing(self, before: Mapping[str, Tensor]) -> dict[str, Arrays]:
        """Records of arrays beside the model ``before``."""
        return {}

    def begin(self) -> None:
        """A round begins: forget what was taken in it, if it is done again."""

    def take(self, update: Update, site: str, number: int, before: Arrays) -> tuple[float, Arrays]:
        """Weight and arrays for the aggregator, of the reply of ``site`` in round ``number``."""
        return update.weight, update.arrays

    def finish(self, before: Arrays, merged: Arrays, everyone: float) -> Arrays:
        """The model after the round; ``everyone`` is the weight of all sites that could have trained."""
        return merged

    def heard(self, site: str) -> int:
        """The last round in which the site's reply was counted in, 0 for none."""
        known = self.held.get(HEARD, {}).get(site)
        return int(known) if known is not None else 0

    def _hear(self, site: str, number: int) -> None:
        self.held.setdefault(HEARD, {})[site] = torch.tensor(number)


class Scaffold(Plain):
    """The common control variate c, the mean of all sites' own, each by its weight in the federation.

    Karimireddy et al. 2020, algorithm 1, line 17, with weights: ``c += sum of w_i (change of c_i) / sum of all w``.
    A reply that was not admitted changes neither c nor, in the end, c_i: see ``client.corrections``.
    """

    def outgoing(self, before: Mapping[str, Tensor]) -> dict[str, Arrays]:
        if "control" not in self.held:
            self.held["control"] = {name: torch.zeros_like(before[name]) for name in self.trained}
        return {"control": {name: self.held["control"][name] for name in self.trained}}  # a checkpoint has no order

    def begin(self) -> None:
        self.changes: Arrays = {}
        self.news: dict[str, int] = {}

    def take(self, update: Update, site: str, number: int, before: Arrays) -> tuple[float, Arrays]:
        for name, change in update.beside["control"].items():
            if name not in self.changes:
                self.changes[name] = torch.zeros(change.shape, dtype=torch.float64)
            self.changes[name].add_(change, alpha=update.weight)
        self.news[site] = number
        return update.weight, update.arrays

    def finish(self, before: Arrays, merged: Arrays, everyone: float) -> Arrays:
        self.held["control"] = {
            name: (value.double() + self.changes[name] / everyone).to(value.dtype)
            for name, value in self.held["control"].items()
        }
        for site, number in self.news.items():
            self._hear(site, number)
        return merged


class FedNova(Plain):
    """Changes per step are averaged, then taken as often as sites took steps on average (Wang et al. 2020, eq. 6).

    So a site that takes more steps does not pull the optimum to its own: ``x + t sum of p_i (x_i - x) / t_i`` with
    ``t = sum of p_i t_i``. t_i is how far the site's optimiser goes along a constant gradient, see ``travelled``.
    """

    def begin(self) -> None:
        self.weights = self.lengths = 0.0

    def take(self, update: Update, site: str, number: int, before: Arrays) -> tuple[float, Arrays]:
        length = travelled(update.steps, self.job)
        self.weights, self.lengths = self.weights + update.weight, self.lengths + update.weight * length
        arrays = dict(update.arrays)
        for name in self.trained:
            arrays[name] = _moved(before[name], arrays[name], 1 / length)
        return update.weight, arrays

    def finish(self, before: Arrays, merged: Arrays, everyone: float) -> Arrays:
        mean = self.lengths / self.weights
        return merged | {name: _moved(before[name], merged[name], mean) for name in self.trained}


class FedDyn(Plain):
    """The mean of the models less h / alpha, h the mean of all sites' gradient memories (Acar et al. 2021, alg. 1).

    ``h -= alpha (mean change of those who replied) (their weight / weight of all)``, so h is the weighted sum of the
    memories that the sites keep, and the optimum is that of the weighted sum of their losses.
    """

    def begin(self) -> None:
        self.weights = 0.0
        self.news: dict[str, int] = {}

    def take(self, update: Update, site: str, number: int, before: Arrays) -> tuple[float, Arrays]:
        self.weights += update.weight
        self.news[site] = number
        return update.weight, update.arrays

    def finish(self, before: Arrays, merged: Arrays, everyone: float) -> Arrays:
        alpha, share = self.job.federation.feddyn_alpha, self.weights / everyone
        memory = self.held.setdefault("control", {name: torch.zeros_like(before[name]) for name in self.trained})
        after = dict(merged)
        for name in self.trained:
            change = merged[name].double() - before[name]
            memory[name] = (memory[name].double() - alpha * share * change).to(before[name].dtype)
            after[name] = (merged[name].double() - memory[name].double() / alpha).to(before[name].dtype)
        for site, number in self.news.items():
            self._hear(site, number)
        return after


def with_own_rounds(content: Content, correction: Plain) -> Content:
    """The message of a round, or one for each place where it must be told the last round in which it was heard."""
    if not isinstance(correction, Scaffold | FedDyn) or not isinstance(content, RecordDict):
        return content  # no codec goes with these, see ``shared.pairs``: there is one content for all

    def own(place: Place) -> RecordDict:
        message = RecordDict(dict(content))
        message["config"] = ConfigRecord({**content.config_records["config"], "heard": correction.heard(place.name)})
        return message

    return own


def weight_of_all(places: Iterable[Place], job: Job) -> float:
    """The weight that all sites with training images have together."""
    each = [place.images["train"] for place in places if place.images["train"]]
    return float(sum(each) if job.federation.weighting == "examples" else len(each))


def travelled(steps: int, job: Job) -> float:
    """How far local steps go along a constant gradient, in learning rates: the norm of a_i in Wang et al. 2020.

    Momentum that is kept from round to round gives every gradient the same weight in the end, as AdamW does: then this
    is the number of steps. Momentum that starts afresh (Nesterov's) gives the last gradients of a round less.
    """
    if job.train.optimizer != "sgd" or job.train.keep_optimizer:
        return float(steps)
    rho, buffer, total = job.train.momentum, 0.0, 0.0
    for _ in range(steps):
        buffer = rho * buffer + 1
        total += 1 + rho * buffer
    return total


def _moved(before: Tensor, after: Tensor, times: float) -> Tensor:
    """``before`` plus so many times the change to ``after``."""
    return torch.lerp(before.double(), after.double(), times).to(before.dtype)


CORRECTIONS: dict[str, type[Plain]] = {
    "none": Plain,
    "proximal": Plain,
    "adversarial": Plain,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "feddyn": FedDyn,
}
