"""Central differential privacy: the server hides whether any one site took part at all.

DP-FedAvg with fixed clipping (McMahan et al. 2018) or clipping adapted to the median change (Andrew et al. 2021): the
change of every site is clipped to an L2 norm, Gaussian noise is added to their sum, and the sum is divided by the
number of sites that were asked, whoever answered. What the server itself sees is not hidden by this.

Written here because Flower's wrappers clip counters as if they were weights, fail on a change of zero and let NaN pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from server.gathered import TooFew
from shared.accounting import Mechanism, epsilon, job_noise
from shared.config import Job
from shared.errors import UserError
from shared.noise import secret_generator

Arrays = Mapping[str, Tensor]
_RATE, _QUANTILE = 0.2, 0.5  # of the adaptation of the bound: Andrew et al. 2021, section 3


def check(job: Job, names: Iterable[str]) -> None:
    """Raise UserError if what is exchanged cannot be noised: a variance must not become negative."""
    if job.privacy.dp == "central" and any(name.endswith("running_var") for name in names):
        raise UserError(
            f'privacy.dp = "central": {job.model.name} exchanges BatchNorm statistics, which noise would break; '
            "choose a model without, or model.freeze = 'backbone'"
        )


@dataclass
class Central:
    """The state over the rounds: the bound that changes are clipped to, and how many rounds were noised.

    ``noise`` is the standard deviation, in bounds, of all that is released in a round.
    """

    noise: float
    bound: float
    adaptive: bool
    delta: float = 1e-5
    accountant: str = "prv"
    rounds: int = 0

    @classmethod
    def of(cls, job: Job, names: Iterable[str]) -> Central:
        """At the start of a run that exchanges arrays of these names.

        Raises:
            UserError: they cannot be noised, or no noise reaches the job's epsilon.
        """
        check(job, names)
        asked = job.privacy
        adaptive = asked.central_clipping == "adaptive"
        return cls(job_noise(job), asked.clipping_norm, adaptive, asked.delta, asked.accountant)

    def facts(self) -> dict[str, float]:
        """The bound for the next round, and epsilon of the rounds so far, of a site that was in all of them."""
        spent = epsilon([Mechanism(self.noise, 1.0, self.rounds)], self.delta, self.accountant)
        return {"bound": self.bound, "epsilon": spent}

    def merge(self, replies: Iterable[tuple[float, Arrays]], reference: Arrays, asked: int) -> dict[str, Tensor]:
        """The noised mean of the clipped changes, onto the global model ``reference``; adapts the bound.

        ``asked`` is the number of sites of the round; the weights of the replies are not used, each site counts 1.
        Counters are taken where all replies agree and left as they were else.

        Raises:
            TooFew: there is no reply.
        """
        generator = secret_generator()
        sums = {k: torch.zeros(v.shape, dtype=torch.float64) for k, v in reference.items() if v.is_floating_point()}
        counters: dict[str, Tensor | None] = {}
        within = answered = 0
        for _, arrays in replies:
            answered += 1
            changes = {name: arrays[name].double() - reference[name].double() for name in sums}
            norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
            within += norm <= self.bound
            factor = min(1.0, self.bound / norm) if norm else 1.0
            for name, change in changes.items():
                sums[name].add_(change, alpha=factor)
            for name in reference:
                if name not in sums:
                    agreed = counters.setdefault(name, arrays[name])
                    counters[name] = agreed if agreed is not None and torch.equal(agreed, arrays[name]) else None
        if not answered:
            raise TooFew("no reply to aggregate")
        sd = self._noise_of_sum(asked) * self.bound
        merged: dict[str, Tensor] = {}
        for name, old in reference.items():
            if name in sums:
                noise = torch.randn(old.shape, generator=generator, dtype=torch.float64) * sd
                merged[name] = (old.double() + (sums[name] + noise) / asked).to(old.dtype)
            else:
                held = counters.get(name)
                merged[name] = old if held is None else held
        if self.adaptive:
            count = within + float(torch.randn((), generator=generator)) * self._noise_of_count(asked)
            share = min(max(count / asked, 0.0), 1.0)  # of much noise too, else the bound could run away in one round
            self.bound *= math.exp(-_RATE * (share - _QUANTILE))
        self.rounds += 1
        return merged

    def _noise_of_sum(self, asked: int) -> float:
        """Standard deviation of the sum's noise in bounds: more than ``noise`` if the bound's adaptation takes a share.

        Andrew et al. 2021, theorem 1: 1/noise² = 1/of_sum² + 1/(2 of_count)². Counting who is within the bound, centred
        at one half, changes by at most one half with a site.
        """
        if not self.adaptive or not self.noise:
            return self.noise
        rest: float = self.noise**-2 - (2 * self._noise_of_count(asked)) ** -2
        return 1 / math.sqrt(rest)

    def _noise_of_count(self, asked: int) -> float:
        """Standard deviation of the noise on the number of sites within the bound: a twentieth of them, at least one.

        No less than ``noise``, so that it takes at most a quarter of the guarantee: the sum's noise grows by 1.16.
        """
        return max(asked / 20, 1.0, self.noise)
