"""Names of strategies: what they set, and that the job's own word wins."""

from __future__ import annotations

import pytest

from shared import strategies
from shared.config import job_from_flat
from shared.settings_federation import nothing_shared
from shared.strategies import STRATEGIES, resolve


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_job_of_each_strategy_reads_back_as_itself(name: str) -> None:
    job = job_from_flat({"federation.strategy": name})
    assert job_from_flat(job.flat()) == job


def test_a_strategy_sets_what_the_job_leaves_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(strategies.STRATEGIES, "odd", {"a": 2, "b": "x"})
    assert resolve("odd", {"b": "y", "c": 0}, {"a": 1, "b": "", "c": 0}) == {"a": 2, "b": "y", "c": 0}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_held_against_the_same_plain_training(name: str) -> None:
    job = job_from_flat({"federation.strategy": name})
    assert job_from_flat(job.flat() | nothing_shared()) == job_from_flat({})
