"""Names of strategies: what they set, and that the job's own word wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared import strategies
from shared.config import Job, job_from_flat, load_job
from shared.errors import UserError
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


def read_with(tmp_path: Path, text: str, *over: str) -> Job:
    (tmp_path / "job.toml").write_text(text)
    return load_job(tmp_path / "job.toml", over)


@pytest.mark.parametrize("before", STRATEGIES)
@pytest.mark.parametrize("after", ["fedavg", "fedadam", "fedprox", "krum"])
def test_a_strategy_set_over_a_runs_own_file_is_that_strategy(before: str, after: str, tmp_path: Path) -> None:
    base: dict[str, Any] = {"name": "x", "federation.byzantine": 1}
    resolved = job_from_flat(base | {"federation.strategy": before}).toml()
    found = read_with(tmp_path, resolved, f"federation.strategy={after}")
    assert found == job_from_flat(base | {"federation.strategy": after})
    assert found == job_from_flat(base | {"federation.strategy": before}).replace(federation__strategy=after)


def test_what_the_file_sets_beside_its_strategy_stays(tmp_path: Path) -> None:
    text = '[federation]\nstrategy = "fedadam"\nserver_optimizer = "yogi"\nlocal = "ditto"\n'
    found = read_with(tmp_path, text, "federation.strategy=fedmedian").federation
    assert (found.aggregator, found.server_optimizer, found.local) == ("median", "yogi", "ditto")


def test_a_default_that_the_strategy_would_change_unseen_is_refused(tmp_path: Path) -> None:
    text = '[federation]\nstrategy = "fedadam"\n'
    words = r'federation.server_optimizer = "none": fedadam stands for "adam"; set another strategy, or leave this out'
    with pytest.raises(UserError, match=words):
        read_with(tmp_path, text, "federation.server_optimizer=none")
    with pytest.raises(UserError, match=r'correction = "none": fedprox stands for "proximal"'):
        read_with(tmp_path, "", "federation.strategy=fedprox", "federation.correction=none")
    assert read_with(tmp_path, text, "federation.server_optimizer=yogi").federation.server_optimizer == "yogi"
    assert read_with(tmp_path, text, "train.optimizer=sgd").federation.server_optimizer == "adam"
    with pytest.raises(UserError, match="must be a text"):
        read_with(tmp_path, text, "federation.strategy=[1]")
