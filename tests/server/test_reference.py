"""A task that measures its model by another network: that one is trained first, and travels with every evaluation.

The task here is classification with a reference put beside it: in evaluation the model's logits are its own plus those
of the reference, so that a figure depends on both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from torch import Tensor, nn

import shared.tasks.classification as task
from client.app import app
from server.rounds import Run
from server.store import Event, read_events
from shared.config import Job
from shared.imaging.dataset import load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import Sums
from shared.weights import REFERENCE, digest, exchanged, exchanged_names, frozen_digest, put
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.simulate import run as simulate

plain_model = task.build_model


class Measured(nn.Module):
    """A network, and one beside it that is not trained and speaks in evaluation only."""

    def __init__(self, own: nn.Module, reference: nn.Module) -> None:
        super().__init__()
        self.own, self.reference = own, reference.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.own(images)
        return logits if self.training else logits + self.reference(images)


def reference_of(job: Job) -> Job:
    return job.replace(name="the reference", federation__rounds=job.evaluation.reference_rounds, seed=11)


def build(job: Job) -> nn.Module:
    if job.name == "the reference":
        return plain_model(job)
    return Measured(plain_model(job), plain_model(reference_of(job).replace(seed=5)))


@pytest.fixture
def job(tiny_job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The tiny job of the changed task; worker processes are forks and inherit the change."""
    monkeypatch.setattr(task, "reference", reference_of, raising=False)
    monkeypatch.setattr(task, "build_model", build)
    return tiny_job.replace(name="measured", evaluation__reference_rounds=2, federation__rounds=2)


def sums_by_hand(job: Job, site: Path, weights: Path, reference: dict[str, Tensor]) -> Sums:
    model = build(job)
    put(model, load_file(weights), job)
    model.get_submodule(REFERENCE).load_state_dict(reference)
    place = read_site(site)
    data = load_dataset(read_samples(place, job), place, job).subset("test")
    return task.collect(model, data, job, torch.device("cpu"))


def final(folder: Path) -> Event:
    return next(event for event in read_events(folder) if event.get("split") == "test")


def test_the_reference_is_trained_first_and_every_evaluation_is_measured_by_it(
    job: Job, three_sites: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    nodes: list[dict[str, Any]] = [
        {"site": str(file), "home": str(tmp_path / "homes" / file.parent.name)}
        for file in sorted(three_sites.glob("*/site.toml"))
    ]
    with WorkerPool("client.app:app", 2) as pool:
        Run(LocalGrid(pool, nodes, job.flat()), job, out).run()
        other = LocalGrid(pool, nodes, reference_of(job).flat())
        alone = Run(other, reference_of(job), tmp_path / "alone")
        alone.is_reference = True
        arrays = alone._train_all(exchanged(alone.model, alone.job))
    first, events = read_events(out / REFERENCE), read_events(out)
    assert [event["round"] for event in first if event["event"] == "round"] == [1, 2]
    assert first[-1]["event"] == "finish"
    assert first[-1]["time"] <= next(event["time"] for event in events if event["event"] == "evaluation")
    trained = load_file(out / REFERENCE / "last.safetensors")
    assert set(trained) == set(arrays)
    assert all(torch.equal(trained[name], value) for name, value in arrays.items())
    reference = load_file(out / REFERENCE / "model.safetensors")
    found, untrained = final(out)["sums"], plain_model(reference_of(job)).state_dict()
    for name in "abc":
        place = three_sites / name / "site.toml"
        assert found[name] == sums_by_hand(job, place, out / "model.safetensors", reference)
        assert found[name]["loss"] != sums_by_hand(job, place, out / "model.safetensors", untrained)["loss"]


def test_baselines_are_measured_by_the_same_reference(job: Job, three_sites: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    out = simulate(
        job, three_sites, tmp_path / "out", workers=2, baselines=True, observe=lambda name, _: heard.append(name)
    ).folder
    assert {path.parent for path in out.rglob("rounds.jsonl") if path.parent.name == REFERENCE} == {out / REFERENCE}
    assert REFERENCE in heard
    reference = load_file(out / REFERENCE / "model.safetensors")
    folders = [out, *(path for path in (out / "baselines").iterdir() if (path / "rounds.jsonl").exists())]
    assert {path.name for path in folders} == {"out", "pooled", "local-a", "local-b", "local-c"}
    for folder in folders:
        sums = final(folder)["sums"]
        for name in "abc":
            by_hand = sums_by_hand(job, three_sites / name / "site.toml", folder / "model.safetensors", reference)
            assert sums[name] == by_hand, (folder.name, name)


def test_a_reference_does_not_travel_with_the_model_nor_count_as_frozen(job: Job) -> None:
    model = build(job)
    names = exchanged_names(model, job)
    assert names == [f"own.{name}" for name in plain_model(job).state_dict()]
    assert frozen_digest(model, job) == ""
    before = digest(model.get_submodule(REFERENCE).state_dict())
    put(model, {name: value + 1 for name, value in exchanged(model, job).items()}, job)
    assert digest(model.get_submodule(REFERENCE).state_dict()) == before


@pytest.mark.parametrize("asked", [False, True])
def test_a_site_answers_for_the_job_or_for_its_reference_as_it_is_asked(
    asked: bool, job: Job, three_sites: Path
) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    context = Context(7, 2, {"site": str(three_sites / "a" / "site.toml")}, RecordDict(), dict(job.flat()))
    content = RecordDict({"config": ConfigRecord({"round": 0, "reference": asked})})
    reply = app(Message(content, 2, "query"), context).content
    assert reply["status"]["ok"]
    assert reply["facts"]["job"] == (reference_of(job) if asked else job).sha256


def test_the_moments_of_the_reference_and_of_the_model_lie_apart(job: Job, three_sites: Path, tmp_path: Path) -> None:
    out = simulate(job, three_sites, tmp_path / "out", workers=1).folder
    (state,) = (out / "sites" / "a" / ".consilium" / "state").iterdir()
    folders = {path.name for path in state.iterdir()}
    assert folders == {job.sha256[:16], reference_of(job).sha256[:16]}


def test_a_task_without_a_reference_trains_none(tiny_job: Job, three_sites: Path, tmp_path: Path) -> None:
    out = simulate(tiny_job.replace(federation__rounds=1), three_sites, tmp_path / "out", workers=1).folder
    assert not (out / REFERENCE).exists()
