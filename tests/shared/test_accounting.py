"""Epsilon against an independent library, the laws of composition, and noise that keeps to a target."""

from __future__ import annotations

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.accounting import Mechanism, epsilon, job_noise, merged, noise_for
from shared.config import Job, job_from_flat
from shared.errors import UserError


def oracle(history: list[Mechanism], delta: float) -> float:
    """Epsilon by dp-accounting's privacy loss distributions, nearly exact and never below the truth."""
    accountant = PLDAccountant()
    for noise, rate, steps in history:
        gaussian = dp_event.GaussianDpEvent(noise)
        event = gaussian if rate == 1 else dp_event.PoissonSampledDpEvent(rate, gaussian)
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def gaussian_delta(eps: float, noise: float, steps: int) -> float:
    """Delta of the Gaussian mechanism without sampling, in closed form (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(steps) / noise

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu)


MEASURED = [  # history, delta, then what dp-accounting's PLD said when ../shared/reference/privacy.md was written
    ([(1.0, 0.01, 1000)], 1e-5, 1.8289),
    ([(1.1, 0.0527, 190)], 1e-4, 3.4352),
    ([(0.7, 0.1, 100)], 1e-4, 12.4509),
    ([(4.0, 0.25, 400)], 1e-4, 5.1186),
    ([(0.5, 0.02, 200)], 1e-4, 10.0008),
    ([(1.0, 0.01, 500), (1.5, 0.05, 300)], 1e-5, 3.1815),
]
FURTHER = [
    ([(1.0, 1.0, 1)], 1e-5),
    ([(20.0, 1.0, 1000)], 1e-5),
    ([(1.0, 0.999999, 5)], 1e-5),
    ([(100.0, 0.01, 1)], 1e-5),
    ([(0.7, 0.1, 3)], 1e-9),
    ([(2.0, 0.3, 20), (1.2, 0.01, 400), (5.0, 1.0, 2)], 1e-6),
    ([(0.6, 0.3, 25)], 1e-5),
]


@pytest.mark.parametrize(("rows", "delta", "known"), [*MEASURED, *((rows, delta, None) for rows, delta in FURTHER)])
def test_prv_is_at_most_15_thousandths_above_an_independent_library_and_rdp_never_below(
    rows: list[tuple[float, float, int]], delta: float, known: float | None
) -> None:
    history = [Mechanism(*row) for row in rows]
    pld = oracle(history, delta)
    assert pld < 50
    assert 0 <= epsilon(history, delta, "prv") - pld <= 0.015
    assert epsilon(history, delta, "rdp") >= pld
    if known is not None:
        assert pld == pytest.approx(known, abs=0.005)


@pytest.mark.parametrize(("noise", "steps"), [(0.05, 1), (0.5, 10), (0.3, 1), (4.0, 7), (1000.0, 100), (50.0, 10**6)])
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-11])
def test_without_sampling_epsilon_is_never_below_the_closed_form(
    noise: float, steps: int, accountant: str, delta: float
) -> None:
    found = epsilon([Mechanism(noise, 1.0, steps)], delta, accountant)
    assert math.isfinite(found)
    if found < 600:  # beyond, the closed form itself overflows
        assert gaussian_delta(found, noise, steps) <= delta


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(0.3, 0.5, 100), (0.01, 0.5, 1), (1.0, 0.1, 10**6), (1e6, 0.5, 10), (2000.0, 0.2, 10**5), (20.0, 0.01, 10**7)],
)
def test_where_prv_cannot_be_had_the_value_of_rdp_stands_for_it(noise: float, rate: float, steps: int) -> None:
    history = [Mechanism(noise, rate, steps)]
    assert epsilon(history, 1e-5, "prv") == epsilon(history, 1e-5, "rdp") < math.inf


def test_a_long_history_is_counted_within_a_wider_bracket() -> None:
    long = [Mechanism(10.0, 0.01, 10**6)]
    pld = oracle(long, 1e-5)
    assert pld <= epsilon(long, 1e-5, "prv") <= pld + 0.2
    assert epsilon(long, 1e-5, "prv") < epsilon(long, 1e-5, "rdp")


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_nothing_costs_nothing_and_no_noise_costs_all(accountant: str) -> None:
    assert epsilon([], 1e-5, accountant) == 0.0
    assert epsilon([Mechanism(1.0, 0.1, 0), Mechanism(0.0, 0.0, 9)], 1e-5, accountant) == 0.0
    assert epsilon([Mechanism(1.0, 0.1, 1), Mechanism(0.0, 0.1, 1)], 1e-5, accountant) == math.inf
    assert epsilon([Mechanism(10.0, 0.1, 1)], 0.5, accountant) == 0.0  # delta alone covers it


@pytest.mark.parametrize(
    "wrong", [Mechanism(-1.0, 0.1, 1), Mechanism(math.nan, 0.1, 1), Mechanism(1.0, 1.1, 1), Mechanism(1.0, 0.1, -1)]
)
def test_what_is_no_mechanism_is_an_error_and_not_a_small_epsilon(wrong: Mechanism) -> None:
    with pytest.raises(ValueError, match="no mechanism"):
        epsilon([Mechanism(1.0, 0.1, 1), wrong], 1e-5, "rdp")
    for delta, accountant in ((0.0, "rdp"), (1.0, "rdp"), (1e-5, "gdp")):
        with pytest.raises(ValueError, match="must be"):
            epsilon([], delta, accountant)


MECHANISMS = st.builds(
    Mechanism, st.sampled_from([0.8, 1.0, 3.0]), st.sampled_from([0.01, 0.2, 1.0]), st.integers(1, 40)
)
HISTORIES = st.lists(MECHANISMS, min_size=1, max_size=4)


@settings(max_examples=6, deadline=None)
@given(history=HISTORIES, accountant=st.sampled_from(["prv", "rdp"]), data=st.data())
def test_neither_order_nor_splitting_changes_epsilon_and_more_steps_cost_more(
    history: list[Mechanism], accountant: str, data: st.DataObject
) -> None:
    whole = epsilon(history, 1e-5, accountant)
    assert epsilon(data.draw(st.permutations(history)), 1e-5, accountant) == whole
    cut = [data.draw(st.integers(0, one.steps)) for one in history]
    halves = [one._replace(steps=first) for one, first in zip(history, cut, strict=True)]
    halves += [one._replace(steps=one.steps - first) for one, first in zip(history, cut, strict=True)]
    assert merged(halves) == merged(history)
    assert epsilon(halves, 1e-5, accountant) == whole
    assert epsilon([*history, Mechanism(1.0, 0.2, 5)], 1e-5, accountant) > whole
    assert epsilon(history, 1e-6, accountant) > whole
    assert whole <= sum(epsilon([one], 1e-5 / len(history), accountant) for one in history) + 0.02


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [(3.0, 1e-4, 0.1, 200), (8.0, 1e-5, 0.25, 300), (1.0, 1e-5, 0.01, 10), (0.1, 1e-6, 1.0, 50), (40.0, 1e-5, 1.0, 9)],
)
def test_the_noise_for_a_target_keeps_to_it_and_hardly_less_would_not(
    accountant: str, target: float, delta: float, rate: float, steps: int
) -> None:
    noise = noise_for(target, delta, rate, steps, accountant)
    assert epsilon([Mechanism(noise, rate, steps)], delta, accountant) <= target
    assert epsilon([Mechanism(noise / 1.0015, rate, steps)], delta, accountant) > target
    assert noise == float(f"{noise:.5g}")


def test_the_noise_for_a_target_agrees_with_opacus() -> None:
    assert noise_for(3.0, 1e-4, 0.1, 200, "rdp") == pytest.approx(2.100, abs=0.005)
    assert noise_for(3.0, 1e-4, 0.1, 200, "prv") == pytest.approx(1.943, abs=0.005)


def test_a_target_that_no_noise_reaches_is_one_line() -> None:
    with pytest.raises(UserError, match=r"privacy\.epsilon = 0\.001: no noise is enough") as caught:
        noise_for(0.001, 1e-5, 1.0, 10, "prv")
    assert "\n" not in str(caught.value)


def private(**changes: float) -> Job:
    flat = {"privacy.dp": "local", "train.class_weights": "none", "federation.rounds": 20, "train.local_steps": 10}
    return job_from_flat(flat | {"privacy.delta": 1e-4} | {f"privacy.{key}": value for key, value in changes.items()})


def test_a_job_has_the_noise_it_names_or_the_one_that_keeps_all_its_rounds_within_its_epsilon() -> None:
    assert job_noise(private(noise_multiplier=1.25, epsilon=3.0)) == 1.25
    noise = job_noise(private(epsilon=3.0))
    assert noise == noise_for(3.0, 1e-4, 0.1, 200, "prv")
    with pytest.raises(UserError, match=r"set privacy\.epsilon or privacy\.noise_multiplier"):
        job_noise(Job())
