"""Every client correction and every kind of local part, played with real ClientApps: what is trained, kept and told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from client.workspace import own_start
from server.database.shown import events_of
from shared.config import Job
from shared.tasks import load_task
from shared.weights import exchanged_names, home_names
from simulations.result import Result
from simulations.simulate import run
from tests.conftest import called

Arrays = dict[str, torch.Tensor]
LASTING = ("moments/", "home/", "control/", "personal/", "personal-moments/")


def kept(out: Path, site: str) -> Arrays:
    """What a site remembers after the last round."""
    files = sorted((out / "sites" / site / ".consilium" / "state").rglob("*.safetensors"), key=lambda f: int(f.stem))
    return dict(load_file(files[-1]))


def own_model(out: Path, site: str) -> Arrays:
    (file,) = (out / "sites" / site / ".consilium" / "personal").glob("*.safetensors")
    return dict(load_file(file))


def play(job: Job, sites: Path, out: Path, **settings: str | float) -> Result:
    return run(job.replace(**settings), sites, out, workers=1)


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "fednova", "feddyn"])
def test_a_correction_trains_and_differs_from_fedavg(
    name: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    more = {"federation__proximal_mu": 1.0}
    plain = play(tiny_job, three_sites, tmp_path / "plain", train__local_steps=3)
    found = play(tiny_job, three_sites, tmp_path / "run", federation__strategy=name, train__local_steps=3, **more)
    models = [load_file(result.folder / "last.safetensors") for result in (plain, found)]
    gap = max(float((models[0][key] - models[1][key]).abs().max()) for key in models[0])
    assert gap == 0 if name == "fednova" else gap > 1e-5  # equal steps everywhere: FedNova is FedAvg
    assert all(torch.isfinite(value).all() for value in models[1].values())
    assert found.scores["federated"]["dropped"] == []
    held = {key.partition("/")[0] for key in kept(found.folder, "a")}
    assert held == ({"moments", "control"} if name in ("scaffold", "feddyn") else {"moments"})


def test_controls_of_the_sites_add_up_to_the_servers(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    play(tiny_job, three_sites, tmp_path / "run", federation__strategy="scaffold")
    (file,) = (tmp_path / "run" / "state").glob("held-*.safetensors")
    server = load_file(file)
    rows = {site["name"]: site["images"]["train"] for site in events_of(tmp_path / "run")[1]["sites"]}
    for name in [key for key in server if key.startswith("control/")]:
        expected = sum(rows[site] * kept(tmp_path / "run", site)[name].double() for site in rows) / sum(rows.values())
        assert torch.allclose(server[name].double(), expected, atol=1e-6)
    assert {key: int(value) for key, value in server.items() if key.startswith("heard/")} == {
        f"heard/{site}": tiny_job.federation.rounds for site in rows
    }


@pytest.mark.parametrize("name", ["fedbn", "fedper"])
def test_parts_that_stay_home_differ_by_site_and_the_rest_is_equal(
    name: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    result = play(tiny_job, three_sites, tmp_path / "run", federation__strategy=name)
    job = result.job
    model = load_task(job.task).build_model(job)
    home = home_names(model, job)
    shared = load_file(tmp_path / "run" / "model.safetensors")
    assert sorted(shared) == sorted(exchanged_names(model, job))
    assert not set(shared) & set(home) and set(shared) | set(home) == set(model.state_dict())
    models = {site: own_model(tmp_path / "run", site) for site in "abc"}
    for site in "abc":
        assert set(models[site]) == set(model.state_dict())
        assert all(torch.equal(models[site][key], shared[key]) for key in shared)
    trained = [key for key in home if not torch.equal(models["a"][key], own_start(job)[key])]
    assert trained  # they are trained at the sites
    assert all(not torch.equal(models["a"][key], models["b"][key]) for key in trained)
    assert "personal" in result.scores["federated"]


def test_what_is_kept_of_a_site_is_of_the_round_that_is_kept(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    """The first round is the best where nothing is learnt after: the parts saved are those of that round."""
    settings = {"federation__local": "head", "train__learning_rate": 0.0, "federation__rounds": 5}
    result = play(tiny_job, three_sites, tmp_path / "still", **settings)
    assert result.scores["federated"]["best_round"] == 1
    early = play(tiny_job, three_sites, tmp_path / "early", federation__local="head", federation__rounds=5)
    best = early.scores["federated"]["best_round"]
    again = play(tiny_job, three_sites, tmp_path / "again", federation__local="head", federation__rounds=5)
    folder = tmp_path / "again" / "sites" / "b" / ".consilium" / "state"
    rounds = {int(file.stem) for file in folder.rglob("*.safetensors")}
    assert max((number for number in rounds if number <= best), default=0) == best
    held = load_file(next(folder.rglob(f"{best}.safetensors")))
    own = own_model(again.folder, "b")
    assert all(torch.equal(own[key.removeprefix("home/")], value) for key, value in held.items() if "home/" in key)


def test_ditto_leaves_the_common_model_as_it_is_and_makes_one_for_each_site(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    play(tiny_job, three_sites, tmp_path / "plain")
    result = play(tiny_job, three_sites, tmp_path / "run", federation__strategy="ditto", federation__ditto_lambda=0.5)
    plain, common = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "run"))
    assert all(torch.equal(plain[key], common[key]) for key in plain)
    models = [own_model(tmp_path / "run", site) for site in "ab"]
    assert not torch.equal(models[0]["head.weight"], models[1]["head.weight"])
    scores = result.scores["federated"]
    assert set(scores["personal"]["sites"]) == {"a", "b", "c"}
    assert scores["personal"]["images"] == scores["images"]
    assert [row["model"] for row in result.rows()].count("personal") == 4 * len(scores["n"])


def test_fine_tuning_takes_its_steps_at_the_site_and_is_told_beside_the_common_model(
    three_sites: Path, tiny_job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job.replace(federation__finetune_steps=4, federation__finetune_rate=1.0)
    (tmp_path / "job.toml").write_text(job.toml())
    out = tmp_path / "run"
    code, text, _ = called(
        capsys, "simulate", tmp_path / "job.toml", "--data", three_sites, "--out", out, "--baselines"
    )
    assert code == 0
    assert "each site's own model on its test images" in text
    scores = Result(out).scores
    assert scores["federated"]["personal"]["gradient_steps"] == scores["federated"]["gradient_steps"] + 3 * 4
    assert set(scores["local"]) == {"a", "b", "c"}
    assert "Each site’s own" in (out / "report.html").read_text()
    common = load_file(out / "model.safetensors")
    assert not torch.equal(common["head.weight"], own_model(out, "a")["head.weight"])

    image = next((three_sites / "a" / "images").glob("*.png"))
    code, text, _ = called(capsys, "predict", out, image, "--out", tmp_path / "one")
    assert code == 0 and text.startswith("uses the common model; each site has one of its own")
    (own,) = (out / "sites" / "a" / ".consilium" / "personal").glob("*.safetensors")
    code, text, _ = called(capsys, "predict", out, image, "--out", tmp_path / "two", "--site-parts", own)
    assert code == 0 and text.startswith("uses the site's own model")
    first, second = ((tmp_path / name / "predictions.csv").read_text() for name in ("one", "two"))
    assert first != second


def test_a_run_whose_parts_stay_home_is_opened_with_those_of_a_site_only(
    three_sites: Path, tiny_job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    play(tiny_job, three_sites, out, federation__local="head")
    image = next((three_sites / "a" / "images").glob("*.png"))
    code, _, error = called(capsys, "predict", out, image, "--out", tmp_path / "one")
    assert code == 2 and "each site kept its own head" in error and "--site-parts" in error
    (own,) = (out / "sites" / "a" / ".consilium" / "personal").glob("*.safetensors")
    for words in (["predict", out, image], ["explain", out, "--image", image]):
        code, text, error = called(capsys, *words, "--out", tmp_path / f"{words[0]}.png", "--site-parts", own)
        assert code == 0 and "uses the site's own model" in text, error
    code, _, error = called(
        capsys, "predict", out, image, "--out", tmp_path / "two", "--site-parts", out / "last.safetensors"
    )
    assert code == 2 and "is no site's own model of this run" in error
