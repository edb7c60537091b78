"""How much privacy a history of noisy steps has cost: epsilon at a delta, counted by Opacus.

Pure functions. The adjacency is adding or removing one unit (an image, or all images of a patient), each unit is in a
step by chance of its own (Poisson sampling), and the noise is Gaussian. What was spent in several rounds or runs is
never summed as epsilons: the mechanisms are composed and epsilon is counted once, which is far less and still true.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from shared.config import Job
from shared.errors import UserError

# PRV's bracket is twice this wide. We give its upper end; a longer history takes a wider one, for its grid to fit.
EPS_ERROR, MOST_EPS_ERROR = 0.01, 0.1
MOST_POINTS = 2_000_000  # of PRV's grids of all mechanisms together: some seconds and 200 MB
LEAST_DELTA = 1e-10  # below it the rounding of PRV's Fourier transform is no longer small beside delta
MOST_EPSILON = 100.0  # PRV's grid grows with epsilon, and nobody's privacy is told apart up there
MOST_NOISE = 300.0  # the series of RDP's fractional orders grows with the noise; beyond this only whole orders are used
LEAST_NOISE, LARGEST_NOISE = 1e-3, 1e6  # between which noise is looked for


class Mechanism(NamedTuple):
    """So many steps of the Poisson-sampled Gaussian mechanism."""

    noise_multiplier: float  # sd of the noise in clipping norms, 0 or more
    sampling_rate: float  # chance of a unit to be in a step, 0 to 1
    steps: int


def merged(history: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """The same history with one entry for each pair of noise and rate, in a fixed order.

    Composition depends neither on order nor on how steps are written down, so this changes no epsilon.

    Raises:
        ValueError: noise, rate or steps that no mechanism has.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for noise, rate, number in history:
        if not (0 <= noise < math.inf and 0 <= rate <= 1 and number >= 0):
            raise ValueError(f"no mechanism: noise {noise}, sampling rate {rate}, {number} steps")
        steps[float(noise), float(rate)] += int(number)
    return tuple(Mechanism(*pair, number) for pair, number in sorted(steps.items()) if number and pair[1])


def epsilon(history: Iterable[Mechanism], delta: float, accountant: str) -> float:
    """Epsilon at ``delta`` of all steps of ``history`` together, never below the truth.

    "rdp" is Opacus' Rényi accountant (Mironov, Talwar and Zhang 2019, arXiv 1908.10530; conversion by Balle et al.
    2020, theorem 21). "prv" is its accountant of privacy loss variables (Gopi, Lee and Wutschitz 2021, arXiv
    2106.02848) with eps_error 0.01 and delta_error delta / 1000: the upper end of its bracket is given, about 0.01
    above the truth. Long histories (a million steps, or twenty kinds of step) take a wider bracket, eps_error up to
    0.1. Where PRV cannot be had in floating-point numbers (epsilon above 100, delta below 1e-10, noise multipliers
    above 300 of sampled steps) or fails, RDP's value stands for it: higher, and as true. So it does wherever it is the
    lower of the two.

    Args:
        history: any order; none is epsilon 0, and noise 0 is infinite.
        delta: above 0, below 1.
        accountant: "prv" or "rdp".

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta}: must be above 0 and below 1")
    if accountant not in ("prv", "rdp"):
        raise ValueError(f"accountant {accountant!r}: must be prv or rdp")
    return _epsilon(merged(history), float(delta), accountant)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Mechanism, ...], delta: float, accountant: str) -> float:
    if not history:
        return 0.0
    if any(one.noise_multiplier == 0 for one in history):
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "optimal order is the largest": a looser bound, not a wrong one
        found = _rdp(history, delta)
        apart = any(one.noise_multiplier > MOST_NOISE and one.sampling_rate < 1 for one in history)
        if accountant == "prv" and found <= MOST_EPSILON and delta >= LEAST_DELTA and not apart:
            found = min(found, _prv(history, delta))
    return max(0.0, found)


def _rdp(history: tuple[Mechanism, ...], delta: float) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    orders = _orders()
    total = [0.0] * len(orders)
    for noise, rate, steps in history:
        total = [sum_ + steps * one for sum_, one in zip(total, _rdp_of_a_step(noise, rate), strict=True)]
    return float(get_privacy_spent(orders=orders, rdp=total, delta=delta)[0])


@lru_cache
def _orders() -> list[float]:
    """Opacus' orders and some larger ones, which small epsilons need."""
    from opacus.accountants import RDPAccountant

    return [*RDPAccountant.DEFAULT_ALPHAS, *range(64, 128, 8), *range(128, 1025, 64)]


@lru_cache(maxsize=1024)
def _rdp_of_a_step(noise: float, rate: float) -> tuple[float, ...]:
    from opacus.accountants.analysis.rdp import compute_rdp

    slow = noise > MOST_NOISE and rate < 1
    return tuple(
        math.inf
        if slow and not float(order).is_integer()
        else float(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=float(order)))
        for order in _orders()
    )


def _prv(history: tuple[Mechanism, ...], delta: float) -> float:
    """The upper end of PRV's bracket, infinite where it cannot be had."""
    from opacus.accountants.analysis import prv

    steps = sum(one.steps for one in history)
    delta_error = delta / 1000
    # The half width of the grid: remark 5.6 of the paper, as Opacus' PRVAccountant has it, but by the Rényi orders that
    # are known already. It works them all out anew each time, which is most of its time.
    single = [_rdp((one._replace(steps=1),), delta_error / (8 * steps)) for one in history]
    reach = max(_rdp(history, delta_error / 4), *single, EPS_ERROR) + 3
    mesh = EPS_ERROR / math.sqrt(steps * math.log(12 / delta_error) / 2)
    wider = max(1.0, 2 * reach / mesh * len(history) / MOST_POINTS)
    if EPS_ERROR * wider > MOST_EPS_ERROR:
        return math.inf
    try:
        grid = prv.Domain.create_aligned(-reach, reach, mesh * wider)
        losses = [prv.PoissonSubsampledGaussianPRV(one.sampling_rate, one.noise_multiplier) for one in history]
        within = [prv.TruncatedPrivacyRandomVariable(loss, grid.t_min, grid.t_max) for loss in losses]
        composed = prv.compose_heterogeneous(
            dprvs=[prv.discretize(loss, grid) for loss in within],
            num_self_compositions=[one.steps for one in history],
        )
        found = float(composed.compute_epsilon(delta, delta_error, EPS_ERROR * wider)[2])
    except (RuntimeError, ValueError, FloatingPointError):
        return math.inf
    return found if math.isfinite(found) else math.inf


@lru_cache(maxsize=256)
def noise_for(target_epsilon: float, delta: float, sampling_rate: float, steps: int, accountant: str) -> float:
    """The smallest noise multiplier, to one in a thousand and rounded up, that keeps all steps within the target.

    Args:
        target_epsilon: above 0, of all ``steps`` together.
        delta, sampling_rate, accountant: as in ``epsilon``.

    Raises:
        UserError: no noise multiplier up to a million is enough.
    """

    def over(noise: float) -> float:
        """How far beyond the target, in logarithms, in which this is nearly a line."""
        spent = epsilon([Mechanism(noise, sampling_rate, steps)], delta, accountant)
        return math.log(max(spent, 1e-9) / target_epsilon)

    high = 1.0
    while over(high) > 0:
        high *= 4
        if high > LARGEST_NOISE:
            raise UserError(
                f"privacy.epsilon = {target_epsilon:g}: no noise is enough for {steps} steps at delta {delta:g}; "
                "take a larger epsilon"
            )
    low = high / 4
    while over(low) <= 0 and low > LEAST_NOISE:
        low, high = low / 4, low
    if over(low) > 0:
        from scipy.optimize import brentq

        found = brentq(lambda log: over(math.exp(log)), math.log(low), math.log(high), xtol=2e-4)
        high = min(high, math.exp(float(found) + 2e-4))
    noise = _rounded_up(high)
    while over(noise) > 0:
        noise = _rounded_up(noise * 1.0002)
    return noise


def _rounded_up(value: float) -> float:
    """To five significant figures."""
    place = 4 - math.floor(math.log10(value))
    return math.ceil(value * 10.0**place) / 10.0**place


def job_noise(job: Job) -> float:
    """The noise multiplier of a job with privacy.dp: as given, or chosen by privacy.epsilon.

    The target is for all planned rounds: federation.rounds x train.local_steps steps at privacy.sampling_rate; of
    central noise one step a round, in which every site counts as drawn, for a fixed number is (no amplification).

    Raises:
        UserError: the job gives neither, or the target cannot be reached.
    """
    asked = job.privacy
    if asked.noise_multiplier:
        return asked.noise_multiplier
    if not asked.epsilon:
        raise UserError(f"privacy.dp = {asked.dp!r}: set privacy.epsilon or privacy.noise_multiplier")
    rate, steps = asked.sampling_rate, job.federation.rounds * job.train.local_steps
    if asked.dp == "central":
        rate, steps = 1.0, job.federation.rounds
    return noise_for(asked.epsilon, asked.delta, rate, steps, asked.accountant)


def noisy_sites(job: Job) -> int:
    """How many sites' noise makes the promised noise where they share it; 0 where each adds all of it itself."""
    return job.federation.min_sites if job.privacy.dp == "distributed" else 0
