"""A run broken off at any moment goes on as if it had not been."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from server import rounds
from server.checkpoint import Best, Checkpoint, State
from server.rounds import Run, RunFailed
from server.store import Store, read_events
from shared.config import Job
from shared.errors import UserError
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.sites import node_of

NAMES = ["w", "n"]  # not in the order of the alphabet: safetensors would turn them round


def arrays(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 2), value), "n": torch.tensor(3)}


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.load(NAMES) is None
    best = Best(2, 0.75, arrays(2.0))
    checkpoint.keep_best(best, {"round": "2"})
    checkpoint.save(State(3, arrays(3.0), best, {"class_weights": [1.0, 2.5], "central": []}), {"round": "3"})
    state = checkpoint.load(NAMES)
    assert state is not None
    assert (state.round, state.best.round, state.best.value) == (3, 2, 0.75)
    assert list(state.arrays) == list(state.best.arrays) == NAMES
    assert state.more == {"class_weights": [1.0, 2.5], "central": []}
    for found, value in ((state.arrays, 3.0), (state.best.arrays, 2.0)):
        assert all(torch.equal(found[name], array) for name, array in arrays(value).items())
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], arrays(2.0)["w"])
    assert torch.equal(load_file(tmp_path / "last.safetensors")["w"], arrays(3.0)["w"])


def test_without_a_best_round_yet(tmp_path: Path) -> None:
    Checkpoint(tmp_path).save(State(1, arrays(1.0), Best(), {}), {})
    state = Checkpoint(tmp_path).load(NAMES)
    assert state is not None
    assert state.best.round == 0
    assert math.isnan(state.best.value)


def test_a_best_model_written_for_a_round_that_did_not_end_does_not_count(tmp_path: Path) -> None:
    """Killed after round 3's best was written, before its state: round 2 with its own best is what there is."""
    checkpoint = Checkpoint(tmp_path)
    best = Best(1, 0.5, arrays(1.0))
    checkpoint.keep_best(best, {})
    checkpoint.save(State(2, arrays(2.0), best, {}), {})
    checkpoint.keep_best(Best(3, 0.9, arrays(3.0)), {})
    state = checkpoint.load(NAMES)
    assert state is not None
    assert (state.round, state.best.round) == (2, 1)
    assert torch.equal(state.best.arrays["w"], arrays(1.0)["w"])


def test_files_do_not_pile_up(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    for number in range(1, 20):
        best = Best(number - number % 5 or 1, 0.5, arrays(1.0))
        checkpoint.keep_best(best, {})
        checkpoint.save(State(number, arrays(number), best, {}), {})
    assert len(list((tmp_path / "state").iterdir())) == 2


def test_damaged_files_are_said(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "round-000001.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="start the run anew"):
        Checkpoint(tmp_path).load(NAMES)


class Killed(BaseException):
    """Stands for the end of the process."""


def play(pool: WorkerPool, sites: Path, job: Job, out: Path, resume: bool = False) -> None:
    nodes = [node_of(out / "sites", file) for file in sorted(sites.glob("*/site.toml"))]
    Run(LocalGrid(pool, nodes, job.flat()), job, out, resume=resume).run()


def at(moment: str, number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Kill the run in round ``number``: before its training, after it, or before its state is renamed into place."""

    def arm(monkeypatch: pytest.MonkeyPatch) -> None:
        places: dict[str, tuple[object, str]] = {"train": (Run, "train_round"), "evaluate": (rounds, "evaluate")}
        if moment in places:
            whole = getattr(*places[moment])

            def stops(run: Run, first: object, count: object, *rest: object) -> object:
                if count == number:
                    raise Killed
                return whole(run, first, count, *rest)

            monkeypatch.setattr(*places[moment], stops)
        else:
            save = Checkpoint.save

            def half(own: Checkpoint, state: State, facts: dict[str, str]) -> None:
                if state.round == number:
                    raise Killed
                save(own, state, facts)

            monkeypatch.setattr(rounds.Checkpoint, "save", half)

    return arm


SECURE = {"privacy__secure_aggregation": True, "federation__max_update_norm": 50.0}


@pytest.mark.parametrize(
    ("moment", "number", "more"),
    [*((moment, number, {}) for moment in ("train", "evaluate", "save") for number in (1, 4)),
     ("evaluate", 2, SECURE), ("evaluate", 4, SECURE)],
)  # fmt: skip
def test_a_run_that_was_killed_and_resumed_is_the_same_to_the_bit(
    moment: str,
    number: int,
    more: dict[str, Any],
    three_sites: Path,
    tiny_job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sites do no round of secure aggregation twice, so there the state is written before the model is judged."""
    job = tiny_job.replace(federation__rounds=4, train__keep_optimizer=True, **more)
    with WorkerPool("client.app:app", 1) as pool:
        play(pool, three_sites, job, tmp_path / "whole")
        with monkeypatch.context() as patch:
            at(moment, number)(patch)
            with pytest.raises(Killed):
                play(pool, three_sites, job, tmp_path / "broken")
        play(pool, three_sites, job, tmp_path / "broken", resume=True)
    for name in ("model", "last"):
        whole, resumed = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "broken"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    events = read_events(tmp_path / "broken")
    assert [event["round"] for event in events if event["event"] == "round"] == [1, 2, 3, 4]
    figures = [
        {(e["round"], e["split"]): e["metrics"] for e in read_events(tmp_path / run) if e["event"] == "evaluation"}
        for run in ("whole", "broken")
    ]
    assert figures[0] == figures[1]


def test_a_line_that_broke_off_is_ended_before_the_next(tmp_path: Path) -> None:
    Store(tmp_path).add("round", round=1)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"event": "rou')
    Store(tmp_path).add("round", round=2)
    assert [event["round"] for event in read_events(tmp_path)] == [1, 2]


def test_of_a_round_done_again_the_last_counts_and_is_counted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number, seconds in ((1, 1.0), (2, 2.0), (2, 3.0), (2, 4.0)):
        store.add("round", round=number, seconds=seconds)
    events = read_events(tmp_path)
    assert [(event["round"], event["seconds"], event.get("repeated", 0)) for event in events] == [
        (1, 1.0, 0),
        (2, 4.0, 2),
    ]


def test_a_secure_round_that_was_unmasked_and_lost_is_not_done_again(
    three_sites: Path, tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job.replace(federation__rounds=3, federation__min_sites=3, **SECURE)
    with WorkerPool("client.app:app", 1) as pool:
        with monkeypatch.context() as patch:
            at("save", 2)(patch)
            with pytest.raises(Killed):
                play(pool, three_sites, job, tmp_path / "broken")
        with pytest.raises(RunFailed, match="wrong-round"):
            play(pool, three_sites, job, tmp_path / "broken", resume=True)
