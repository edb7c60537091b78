"""Every client correction and every kind of local part, played with real ClientApps: what is trained, kept and told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from client.app import app as real
from client.workspace import own_start
from server.checkpoint import Checkpoint, State
from server.results import run_scores
from server.rounds import Run
from server.store import read_events
from shared.config import Job
from shared.tasks import load_task
from shared.weights import exchanged_names, home_names
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.sites import node_of
from tests.conftest import called

Arrays = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool("client.app:app", 1) as pool:
        yield pool


def play(
    pool: WorkerPool, job: Job, sites: Path, out: Path, resume: bool = False, **settings: str | float
) -> dict[str, Any]:
    """Run the job in ``out``; gives its scores."""
    job = job.replace(**settings)
    nodes = [node_of(out / "sites", file) for file in sorted(sites.glob("*/site.toml"))]
    Run(LocalGrid(pool, nodes, job.flat()), job, out, resume=resume, store=None).run()
    return run_scores(out)


def remembered(out: Path, site: str) -> dict[int, Arrays]:
    """What a site remembers, by round."""
    files = (out / "sites" / site / ".consilium" / "state").rglob("*.safetensors")
    return {int(file.stem): load_file(file) for file in files}


def own_file(out: Path, site: str) -> Path:
    (file,) = (out / "sites" / site / ".consilium" / "personal").glob("*.safetensors")
    return file


def gap(one: Path, other: Path) -> float:
    """The largest difference between two models."""
    first, second = load_file(one), load_file(other)
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "fednova", "feddyn", "dann"])
def test_a_correction_trains_and_is_not_fedavg(
    name: str, pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    settings = {"train__local_steps": 3, "federation__proximal_mu": 1.0, "federation__rounds": 2}
    play(pool, tiny_job, three_sites, tmp_path / "plain", **settings)
    scores = play(pool, tiny_job, three_sites, tmp_path / "run", federation__strategy=name, **settings)
    differs = gap(tmp_path / "plain" / "last.safetensors", tmp_path / "run" / "last.safetensors")
    assert differs < 1e-6 if name == "fednova" else differs > 1e-5  # with equal steps everywhere FedNova is FedAvg
    assert scores["dropped"] == []
    held = {key.partition("/")[0] for key in remembered(tmp_path / "run", "a")[2]}
    assert held == ({"moments", "control"} if name in ("scaffold", "feddyn") else {"moments"})


def test_fednova_is_not_fedavg_where_sites_take_different_steps(
    pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    settings = {"train__local_steps": 1, "train__local_epochs": 2.0, "federation__rounds": 2}
    play(pool, tiny_job, three_sites, tmp_path / "plain", **settings)
    scores = play(pool, tiny_job, three_sites, tmp_path / "run", federation__strategy="fednova", **settings)
    first = next(event for event in read_events(tmp_path / "run") if event["event"] == "round")
    assert [row["steps"] for row in first["trained"]] == [3, 4, 5]  # of 12, 16 and 20 training images, 8 at once
    assert scores["dropped"] == []
    assert gap(tmp_path / "plain" / "last.safetensors", tmp_path / "run" / "last.safetensors") > 1e-5


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_what_the_sites_keep_adds_up_to_what_the_server_has_though_replies_get_lost(
    name: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    """A site whose reply was not admitted goes on from its last one that was: else the two would part for good."""
    lossy = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        reply = real(message, context)
        if context.node_config["name"] == "b" and message.content["config"]["round"] == 2:
            reply.content["metrics"]["num-examples"] = -1
        return reply

    lossy.query()(real)
    lossy.evaluate()(real)
    lossy.train()(handle)
    with WorkerPool(lossy, 1) as pool:
        scores = play(pool, tiny_job, three_sites, tmp_path, federation__strategy=name, federation__rounds=4)
    assert [(item["site"], item["round"]) for item in scores["dropped"]] == [("b", 2)]
    server = load_file(next((tmp_path / "state").glob("held-*.safetensors")))
    survey = next(event for event in read_events(tmp_path) if event["event"] == "survey")
    weights = {site["name"]: site["images"]["train"] for site in survey["sites"]}
    controls = {site: remembered(tmp_path, site)[4] for site in weights}
    names = [key for key in server if key.startswith("control/")]
    assert names
    for key in names:
        expected = sum(weights[site] * controls[site][key].double() for site in weights) / sum(weights.values())
        assert torch.allclose(server[key].double(), expected, atol=1e-6), key
    assert all(int(value) == 4 for key, value in server.items() if key.startswith("heard/"))


@pytest.mark.parametrize(("name", "network"), [("fedbn", "cnn"), ("fedbn", "resnet18"), ("fedper", "cnn")])
def test_parts_that_stay_home_differ_by_site_and_the_rest_is_equal(
    name: str, network: str, pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"federation__strategy": name, "federation__rounds": 5, "model__name": network}
    play(pool, tiny_job, three_sites, tmp_path, **settings)
    job = tiny_job.replace(**settings)
    model = load_task(job.task).build_model(job)
    home, common = home_names(model, job), load_file(tmp_path / "model.safetensors")
    assert sorted(common) == sorted(exchanged_names(model, job))
    assert sorted([*common, *home]) == sorted(model.state_dict())
    models = {site: load_file(own_file(tmp_path, site)) for site in "abc"}
    for own in models.values():
        assert set(own) == set(model.state_dict())
        assert all(torch.equal(own[key], common[key]) for key in common)
    assert not all(torch.equal(models["a"][key], own_start(job)[key]) for key in home)  # they were trained
    assert not all(torch.equal(models["a"][key], models["b"][key]) for key in home)
    measured = [key for key in model.state_dict() if "running" in key]  # BatchNorm's, of each site's own images
    assert bool(measured) is (network == "resnet18")
    assert set(measured) <= set(home)
    assert not any(torch.equal(models["a"][key], models["b"][key]) for key in measured)
    best = max(event["round"] for event in read_events(tmp_path) if event["event"] == "personal")
    held = remembered(tmp_path, "b")[best]  # not of the last round: of the one whose common model was kept
    assert all(torch.equal(models["b"][key], held[f"home/{key}"]) for key in home)


def test_ditto_leaves_the_common_model_as_it_is_and_makes_one_for_each_site(
    pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    play(pool, tiny_job, three_sites, tmp_path / "plain")
    scores = play(pool, tiny_job, three_sites, tmp_path / "run", federation__strategy="ditto")
    assert gap(tmp_path / "plain" / "last.safetensors", tmp_path / "run" / "last.safetensors") == 0
    assert gap(own_file(tmp_path / "run", "a"), own_file(tmp_path / "run", "b")) > 0
    assert set(scores["personal"]["sites"]) == {"a", "b", "c"}
    assert scores["personal"]["images"] == scores["images"]


def test_a_very_strong_pull_keeps_the_personal_model_at_the_common_one(
    pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    """Of v <- v - r (g + lambda (v - w)) with r lambda = 1, every step ends at w - r g: as near as one step."""
    settings: dict[str, Any] = {"train__optimizer": "sgd", "train__momentum": 0.0, "train__weight_decay": 0.0}
    settings |= {"train__learning_rate": 0.01, "train__schedule": "constant", "train__warmup": 0.0}
    gaps = []
    for pull in (0.0, 100.0):
        out = tmp_path / str(pull)
        play(pool, tiny_job, three_sites, out, federation__strategy="ditto", federation__ditto_lambda=pull, **settings)
        gaps.append(gap(own_file(out, "a"), out / "model.safetensors"))
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fedper", "ditto"])
def test_resumed_it_is_the_same_to_the_bit(
    name: str, pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(pool, tiny_job, three_sites, tmp_path / "whole", federation__strategy=name)
    save = Checkpoint.save

    def stops(own: Checkpoint, state: State, facts: dict[str, str]) -> None:
        if state.round == 2:
            raise KeyboardInterrupt
        save(own, state, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stops)
        with pytest.raises(KeyboardInterrupt):
            play(pool, tiny_job, three_sites, tmp_path / "run", federation__strategy=name)
    play(pool, tiny_job, three_sites, tmp_path / "run", resume=True, federation__strategy=name)
    assert gap(tmp_path / "whole" / "last.safetensors", tmp_path / "run" / "last.safetensors") == 0
    if name in ("fedper", "ditto"):
        assert all(gap(own_file(tmp_path / "whole", s), own_file(tmp_path / "run", s)) == 0 for s in "abc")


def test_fine_tuning_is_told_beside_the_common_model_and_a_site_uses_its_own(
    three_sites: Path, tiny_job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job.replace(
        federation__local="norm",
        train__learning_rate=1e-4,  # so that fine-tuning, at ten times that, has something left to learn
        federation__finetune_steps=20,
        federation__finetune_rate=10.0,
    )
    (tmp_path / "job.toml").write_text(job.toml())
    out, image = tmp_path / "run", next((three_sites / "b" / "images").glob("*.png"))
    words = ("simulate", tmp_path / "job.toml", "--data", three_sites, "--out", out, "--baselines", "--workers", 1)
    code, text, _ = called(capsys, *words)
    assert code == 0
    assert "each site's own model on its test images" in text
    scores = run_scores(out)
    assert scores["personal"]["gradient_steps"] == scores["gradient_steps"] + 3 * 20
    assert "Each site’s own" in (out / "report.html").read_text()
    common, own = load_file(out / "model.safetensors"), load_file(own_file(out, "b"))
    assert not torch.equal(common["head.weight"], own["head.weight"])

    code, _, error = called(capsys, "predict", out, image, "--out", tmp_path / "one")
    assert code == 2
    assert "each site kept its own normalisation layers" in error
    for word, rest in {"predict": [image], "explain": ["--image", image], "export": []}.items():
        target = tmp_path / f"{word}.png"
        code, text, error = called(
            capsys, word, out, *rest, "--out", target, "--site-parts", own_file(out, "b"),
            *(["--format", "safetensors"] if word == "export" else []),
        )  # fmt: skip
        assert code == 0, error
        assert text.startswith("uses the site's own model")
    code, _, error = called(
        capsys, "predict", out, image, "--out", tmp_path / "two", "--site-parts", out / "last.safetensors"
    )
    assert code == 2
    assert "is no site's own model of this run" in error
