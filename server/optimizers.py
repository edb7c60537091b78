"""Optimisers of the server: they step from the model before a round along the averaged change of the sites.

Reddi et al. 2021, algorithm 2, and for momentum Hsu et al. 2019, with the conventions of Flower's strategies of these
names: the change is a negative gradient, moments begin at 0, and only Adam's step is corrected for that. Each function
takes an array before the round, its change, its moments and the learning rate, gives the array after it, and works on
the moments in place. To add one: such a function, and a line in ``shared.strategies.SERVER_OPTIMIZERS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shared.config import Job
from shared.strategies import SERVER_OPTIMIZERS

Moments = dict[str, Tensor]  # of one array, each like it
MOMENTS = FIRST, SECOND = "server-first", "server-second"
Step = Callable[[Tensor, Tensor, Moments, float, Job, int], Tensor]


def server_rate(job: Job, number: int) -> float:
    """The server's learning rate in round ``number``, counted from 1: constant, or a cosine from all to nothing."""
    asked = job.federation
    rate = asked.server_learning_rate or SERVER_OPTIMIZERS[asked.server_optimizer][0]
    if asked.server_schedule == "constant":
        return rate
    return rate * 0.5 * (1 + math.cos(math.pi * (number - 1) / asked.rounds))


def momentum(before: Tensor, change: Tensor, moments: Moments, rate: float, job: Job, number: int) -> Tensor:
    """FedAvgM: the velocity is ``server_momentum`` times itself and the change."""
    velocity = _moment(moments, FIRST, change).mul_(job.federation.server_momentum).add_(change)
    return before + rate * velocity


def adam(before: Tensor, change: Tensor, moments: Moments, rate: float, job: Job, number: int) -> Tensor:
    """FedAdam; the correction of the first rounds counts them from 2, as Flower does."""
    beta1, beta2 = job.federation.server_momentum, job.federation.server_beta2
    first = _average(moments, change, beta1)
    second = _moment(moments, SECOND, change).mul_(beta2).addcmul_(change, change, value=1 - beta2)
    rate *= math.sqrt(1 - beta2 ** (number + 1)) / (1 - beta1 ** (number + 1))
    return before + rate * first / (second.sqrt() + job.federation.server_tau)


def yogi(before: Tensor, change: Tensor, moments: Moments, rate: float, job: Job, number: int) -> Tensor:
    """FedYogi: the second moment moves by a share of the squared change, whatever it is itself."""
    first, square = _average(moments, change, job.federation.server_momentum), change.square()
    second = _moment(moments, SECOND, change)
    second.sub_((1 - job.federation.server_beta2) * square * torch.sign(second - square))
    return before + rate * first / (second.sqrt() + job.federation.server_tau)


def adagrad(before: Tensor, change: Tensor, moments: Moments, rate: float, job: Job, number: int) -> Tensor:
    """FedAdagrad: the second moment is the sum of all squared changes; there is no first."""
    second = _moment(moments, SECOND, change).addcmul_(change, change)
    return before + rate * change / (second.sqrt() + job.federation.server_tau)


def _average(moments: Moments, change: Tensor, beta: float) -> Tensor:
    return _moment(moments, FIRST, change).mul_(beta).add_(change, alpha=1 - beta)


def _moment(moments: Moments, kind: str, like: Tensor) -> Tensor:
    return moments.setdefault(kind, torch.zeros_like(like))


OPTIMIZERS: dict[str, Step] = {"momentum": momentum, "adam": adam, "yogi": yogi, "adagrad": adagrad}
