"""Which sites train in a round, and in which order."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from server.admission import Place
from server.gathered import TooFew
from shared.cases import derived_seed
from shared.config import Job
from shared.pairs import fewest

Arrays = dict[str, Tensor]
Train = Callable[[list[Place], Arrays], Iterator[tuple[float, Arrays]]]


def sample(places: Sequence[Place], job: Job, number: int, asked: Mapping[str, int]) -> list[Place]:
    """The sites of round ``number``: all that have training images, or a share of them drawn from the job's seed, but
    as many as the job needs to end it.

    ``federation.sampling = "balanced"`` draws among those that were ``asked`` least often so far, whether they answered
    or not; so no two that were there all along differ by more than one.
    """
    able = [place for place in places if place.images["train"]]
    wanted = job.federation
    least = max(wanted.min_sites, fewest(job), wanted.buffer if wanted.order == "buffered" else 0)
    count = max(math.ceil(wanted.fraction * len(able) - 1e-9), min(least, len(able)))
    draw = random.Random(derived_seed(job.seed, "sample", number))
    if wanted.sampling == "random":
        chosen = draw.sample(range(len(able)), count)
    else:
        drawn = draw.sample(range(len(able)), len(able))
        chosen = sorted(drawn, key=lambda i: asked.get(able[i].name, 0))[:count]  # keeps the order of equals
    return [able[i] for i in sorted(chosen)]


def pass_on(train: Train, places: Sequence[Place], arrays: Arrays, number: int) -> Arrays:
    """The model after going from site to site (cyclical weight transfer, Chang et al. 2018).

    It is the same circle every round, begun one further, so that the last word goes round, too. ``train`` gives the
    replies that are in order; a site without one passes on what it got.

    Raises:
        TooFew: there was no reply at all.
    """
    begin = (number - 1) % max(len(places), 1)
    answered = False
    for place in [*places[begin:], *places[:begin]]:
        for _, passed in train([place], arrays):
            arrays, answered = passed, True
    if not answered:
        raise TooFew("no reply to pass on")
    return arrays
