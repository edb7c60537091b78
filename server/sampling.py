"""Which sites train in a round, and in which order."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from server.admission import Place
from shared.cases import derived_seed
from shared.config import Job
from shared.pairs import fewest


def sample(places: Sequence[Place], job: Job, number: int, asked: Mapping[str, int]) -> list[Place]:
    """The sites of round ``number``: all that have training images, or a share of them drawn from the job's seed.

    ``federation.sampling = "balanced"`` draws among those that were ``asked`` least often so far, whether they answered
    or not; so no two that were there all along differ by more than one.
    """
    able = [place for place in places if place.images["train"]]
    wanted = job.federation
    count = max(math.ceil(wanted.fraction * len(able) - 1e-9), min(max(wanted.min_sites, fewest(job)), len(able)))
    draw = random.Random(derived_seed(job.seed, "sample", number))
    if wanted.sampling == "random":
        chosen = draw.sample(range(len(able)), count)
    else:
        drawn = draw.sample(range(len(able)), len(able))
        chosen = sorted(drawn, key=lambda i: asked.get(able[i].name, 0))[:count]  # keeps the order of equals
    return [able[i] for i in sorted(chosen)]


def in_turn(places: Sequence[Place], number: int) -> list[Place]:
    """The order of a cycle: the same circle every round, begun one further, so that the last word goes round, too."""
    begin = (number - 1) % len(places) if places else 0
    return [*places[begin:], *places[:begin]]
