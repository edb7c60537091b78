"""Strategies in real federations: what merges, steps, weighs and orders is what the job says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

from client.app import app as real
from server.aggregation import weighted_mean
from server.central import Central
from server.rounds import Run, RunFailed
from server.store import read_events
from shared.config import Job
from shared.tasks import load_task
from shared.weights import exchanged
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.simulate import run
from simulations.sites import node_of
from tests.server.test_checkpoint import Killed, at

Arrays = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool("client.app:app", 1) as workers:
        yield workers


@pytest.fixture
def job(tiny_job: Job) -> Job:
    return tiny_job.replace(train__class_weights="none", evaluation__every=100)


def play(pool: WorkerPool, sites: Path, job: Job, out: Path, resume: bool = False) -> Arrays:
    nodes = [node_of(out / "sites", file) for file in sorted(sites.glob("*/site.toml"))]
    Run(LocalGrid(pool, nodes, job.flat()), job, out, resume=resume, store=None).run()
    return load_file(out / "last.safetensors")


def rounds(out: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(out) if event["event"] == "round"]


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_in_a_cycle_each_site_trains_on_what_the_one_before_left(
    pool: WorkerPool, three_sites: Path, job: Job, tmp_path: Path
) -> None:
    job = job.replace(federation__strategy="cyclic", federation__rounds=2)
    result = play(pool, three_sites, job, tmp_path / "run")
    assert [[item["site"] for item in event["trained"]] for event in rounds(tmp_path / "run")] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
    ]
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    model = exchanged(load_task(job.task).build_model(job), job)
    for number, order in ((1, "abc"), (2, "bca")):
        for name in order:
            node = node_of(tmp_path / "by-hand", three_sites / name / "site.toml")
            config = ConfigRecord({"round": number, "class-weights": [1.0, 1.0]})
            content = RecordDict({"arrays": ArrayRecord(model), "config": config})
            reply = real(Message(content, 2, "train"), Context(1, 2, dict(node), RecordDict(), dict(job.flat())))
            model = reply.content["arrays"].to_torch_state_dict()
    assert same(model, result)


def test_too_few_sites_for_a_robust_aggregator_end_the_run_with_a_clear_line(
    pool: WorkerPool, three_sites: Path, job: Job, tmp_path: Path
) -> None:
    with pytest.raises(RunFailed, match=r"3 sites are in order, krum with federation\.byzantine = 1 asks for 5"):
        play(pool, three_sites, job.replace(federation__strategy="krum"), tmp_path / "krum")
    with pytest.raises(
        RunFailed, match=r"trimmed_mean with federation\.byzantine = 1 and federation\.trim = 0\.2 asks"
    ):
        play(pool, three_sites, job.replace(federation__strategy="fedtrimmedavg"), tmp_path / "trimmed")


def test_a_resumed_run_has_the_moments_and_the_turns_of_the_one_that_broke_off(
    pool: WorkerPool, three_sites: Path, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job.replace(federation__strategy="fedyogi", federation__rounds=4, federation__fraction=0.3)
    whole = play(pool, three_sites, job, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at("train", 3)(patch)
        with pytest.raises(Killed):
            play(pool, three_sites, job, tmp_path / "broken")
    assert same(whole, play(pool, three_sites, job, tmp_path / "broken", resume=True))
    sites = [[item["site"] for item in event["trained"]] for event in rounds(tmp_path / "whole")]
    assert sites == [[item["site"] for item in event["trained"]] for event in rounds(tmp_path / "broken")]
    assert {name for names in sites[:3] for name in names} == {"a", "b", "c"}  # each in its turn


def test_the_server_steps_after_secure_aggregation_and_after_central_noise(
    pool: WorkerPool, three_sites: Path, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job.replace(federation__strategy="fedadam", federation__rounds=2, federation__weighting="equal")
    plain = play(pool, three_sites, job, tmp_path / "plain")
    secure = job.replace(privacy__secure_aggregation=True, federation__max_update_norm=50.0)
    masked = play(pool, three_sites, secure, tmp_path / "secure")
    for key, value in plain.items():
        torch.testing.assert_close(masked[key], value, rtol=1e-3, atol=1e-3)
    # Of the central mechanism the noise is taken out, so that what is left is the step.
    monkeypatch.setattr(Central, "merge", lambda self, replies, before, asked: weighted_mean(replies))
    central = job.replace(privacy__dp="central", privacy__noise_multiplier=1.0)
    assert same(plain, play(pool, three_sites, central, tmp_path / "central"))


def test_sites_weigh_by_their_loss_and_train_in_epochs(
    pool: WorkerPool, three_sites: Path, job: Job, tmp_path: Path
) -> None:
    job = job.replace(
        federation__strategy="qffl",
        federation__fairness=2.0,
        federation__rounds=1,
        train__local_steps=1,
        train__local_epochs=1.5,
    )
    play(pool, three_sites, job, tmp_path / "run")
    (event,) = rounds(tmp_path / "run")
    for item, images in zip(event["trained"], (12, 16, 20), strict=True):
        assert item["steps"] == -(-1.5 * images // job.train.batch_size)
        assert item["images"] == item["steps"] * job.train.batch_size
        assert item["weight"] == pytest.approx(images * (item["loss"] / item["images"]) ** 2)


def test_baselines_of_a_strategy_are_plain_training_of_as_many_steps(
    three_sites: Path, job: Job, tmp_path: Path
) -> None:
    job = job.replace(
        federation__strategy="fedmedian",
        federation__server_optimizer="adam",
        federation__server_learning_rate=0.01,
        federation__rounds=2,
        train__local_steps=1,
        train__local_epochs=1.0,
    )
    scores = run(job, three_sites, tmp_path / "run", baselines=True, workers=1, pages=False).scores
    everyone = [scores["federated"], scores["pooled"], *scores["local"].values()]
    assert {row["gradient_steps"] for row in everyone} == {2 * (2 + 2 + 3)}
