"""Optimisers of the server: what they step, their schedule, and that a resumed run goes on to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.algorithm import Algorithm
from server.checkpoint import Best, Checkpoint, State
from server.optimizers import OPTIMIZERS, server_rate
from shared.strategies import SERVER_OPTIMIZERS
from tests.server.algorithms import Arrays, job, replies, start, trained


def test_every_name_has_its_function() -> None:
    assert set(OPTIMIZERS) == set(SERVER_OPTIMIZERS) - {"none"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_statistics_and_counters_are_the_mean_and_weights_are_stepped(name: str) -> None:
    before, merged = replies(0, 2)
    algorithm = Algorithm(job(server_optimizer=name, server_learning_rate=0.5), ["conv.weight"])
    after = algorithm.step(before, merged, 1)
    assert list(after) == list(merged)
    for key in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
        assert torch.equal(after[key], merged[key])
    assert not torch.equal(after["conv.weight"], merged["conv.weight"])
    assert not torch.equal(after["conv.weight"], before["conv.weight"])
    assert {key for kind in algorithm.held.values() for key in kind} == {"conv.weight"}


def test_without_an_optimiser_the_aggregate_is_the_model_and_nothing_is_held() -> None:
    before, merged = replies(0, 2)
    algorithm = Algorithm(job(), list(before))
    assert algorithm.step(before, merged, 1) is merged
    assert algorithm.held == {}


def test_momentum_without_momentum_at_rate_one_is_the_aggregate() -> None:
    before, merged = start(), trained(start(), 1)
    asked = job(server_optimizer="momentum", server_momentum=0.0, server_learning_rate=1.0)
    after = Algorithm(asked, list(before)).step(before, merged, 1)
    for key in merged:
        torch.testing.assert_close(after[key], merged[key])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_change_of_the_sites_moves_nothing_at_first(name: str) -> None:
    before = start()
    after = Algorithm(job(server_optimizer=name), list(before)).step(before, before, 1)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_half_precision_weights_keep_their_dtype(name: str) -> None:
    before = {"w": torch.ones(4, dtype=torch.float16)}
    after = Algorithm(job(server_optimizer=name), ["w"]).step(before, {"w": before["w"] * 1.5}, 1)
    assert after["w"].dtype == torch.float16
    assert (after["w"] > before["w"]).all()


def test_the_rate_is_the_optimisers_own_the_jobs_or_a_cosine() -> None:
    assert server_rate(job(server_optimizer="momentum"), 1) == 0.1
    assert server_rate(job(server_optimizer="yogi"), 7) == 0.001
    assert server_rate(job(server_optimizer="adam", server_learning_rate=0.3), 5) == 0.3
    cosine = job(server_optimizer="adam", server_learning_rate=0.4, server_schedule="cosine", rounds=10)
    rates = [server_rate(cosine, number) for number in range(1, 11)]
    assert rates[0] == 0.4
    assert rates[5] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_go_through_the_checkpoint_to_the_bit(name: str, tmp_path: Path) -> None:
    asked = job(server_optimizer=name)

    def rounds(algorithm: Algorithm, model: Arrays, numbers: range) -> Arrays:
        for number in numbers:
            model = algorithm.merge([(1.0, trained(model, site)) for site in range(3)], model, number)
        return model

    whole = rounds(Algorithm(asked, list(start())), start(), range(1, 7))
    first = Algorithm(asked, list(start()))
    half = rounds(first, start(), range(1, 4))
    Checkpoint(tmp_path).save(State(3, half, Best(), {}, first.held), {})
    state = Checkpoint(tmp_path).load(list(half))
    assert state is not None
    second = Algorithm(asked, list(start()))
    second.held.update(state.held)
    resumed = rounds(second, state.arrays, range(4, 7))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
