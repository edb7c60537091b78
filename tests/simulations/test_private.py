"""Whole runs under differential privacy: who takes part, what is spent, what is left in the books."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from safetensors.torch import load_file

from client.ledger import Ledger, ledger_path
from server.spent import privacy_spent
from server.store import read_events
from shared.accounting import noise_for
from shared.config import Job
from simulations.simulate import run


def private(job: Job, **more: Any) -> Job:
    settings: dict[str, Any] = {
        "privacy__dp": "local",
        "privacy__noise_multiplier": 1.2,
        "privacy__sampling_rate": 0.4,
        "privacy__delta": 1e-3,
        "train__class_weights": "none",
        "train__optimizer": "sgd",
        "train__local_steps": 1,
        "train__learning_rate": 0.5,
    }
    return job.replace(**(settings | more))


def rules(site: Path, text: str) -> None:
    file = site / "site.toml"
    file.write_text(file.read_text() + f"\n[privacy]\n{text}\n")


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["event"] == "round"]


def pld(*history: tuple[float, float, int], delta: float) -> float:
    """Epsilon by another library (dp-accounting, privacy loss distributions)."""
    accountant = PLDAccountant()
    for noise, rate, steps in history:
        event: DpEvent = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
        accountant.compose(SelfComposedDpEvent(event, steps))
    return float(accountant.get_epsilon(delta))


def test_sites_whose_rules_are_not_met_are_refused_by_name_and_the_others_train(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    rules(three_sites / "a", "require_dp = true\nmax_epsilon = 8.0")
    plain = run(tiny_job, three_sites, tmp_path / "plain", workers=1, pages=False).scores["federated"]
    assert {row["site"]: row["reason"] for row in plain["dropped"]} == {"a": "site-declined: dp-required"}
    assert all({row["site"] for row in event["trained"]} == {"b", "c"} for event in rounds(tmp_path / "plain"))
    rules(three_sites / "b", "min_patients = 500")
    rules(three_sites / "c", 'metrics = "loss"')
    job = private(tiny_job, privacy__noise_multiplier=0.0, privacy__epsilon=9.0)
    with pytest.raises(Exception, match="epsilon-over-limit") as failure:
        run(job, three_sites, tmp_path / "none", workers=1)
    for reason in (
        "a: site-declined: epsilon-over-limit",
        "b: site-declined: too-few",
        "c: site-declined: metric-forb",
    ):
        assert reason in str(failure.value)


def test_the_budget_outlives_runs_and_ends_them_for_one_site_alone(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    first, second = private(tiny_job), private(tiny_job, privacy__noise_multiplier=2.0, privacy__sampling_rate=0.2)
    rates = [(1.2, 0.4, 3), (2.0, 0.2, 3)]
    whole = pld(*rates, delta=1e-3)
    rules(three_sites / "a", "max_epsilon = 100.0\nmax_delta = 1e-3")
    rules(three_sites / "b", f"max_epsilon = {pld(rates[0], (2.0, 0.2, 1), delta=1e-3) + 0.02}\nmax_delta = 1e-3")
    run(first, three_sites, tmp_path / "first", workers=2, pages=False)
    scores = run(second, three_sites, tmp_path / "second", workers=2, pages=False).scores["federated"]
    spent = {row["site"]: row["epsilon"] for row in rounds(tmp_path / "second")[-1]["trained"]}
    assert set(spent) == {"a", "c"}
    assert 0 <= spent["a"] - whole <= 0.015  # of both runs
    assert 0 <= spent["c"] - pld(rates[1], delta=1e-3) <= 0.015  # no limit: the books of this run alone
    assert scores["privacy"]["epsilon"] == spent["a"]
    dropped = [(row["round"], row["site"], row["reason"]) for row in scores["dropped"]]
    assert dropped == [(number, "b", "site-declined: budget-spent") for number in (2, 3)]
    ledger = Ledger(ledger_path(three_sites / "a" / "site.toml"))
    assert ledger.verify() == []
    assert [entry.kind for entry in ledger.history()] == ["reserve", "settle"] * 6
    assert len({entry.run for entry in ledger.history()}) == 2
    trail = [event["trained"][0]["epsilon"] for folder in ("first", "second") for event in rounds(tmp_path / folder)]
    assert trail == sorted(trail)


def test_what_a_site_tells_is_at_the_jobs_delta_and_it_decides_at_its_own(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    job = private(tiny_job)
    rules(three_sites / "a", f"max_epsilon = {pld((1.2, 0.4, 3), delta=1e-2) + 0.02}\nmax_delta = 1e-2")
    scores = run(job, three_sites, tmp_path / "run", workers=1).scores["federated"]
    assert not scores["dropped"]
    assert 0 <= scores["privacy"]["sites"]["a"] - pld((1.2, 0.4, 3), delta=1e-3) <= 0.015
    entries = Ledger(ledger_path(three_sites / "a" / "site.toml")).history()
    assert 0 <= entries[-1].epsilon - pld((1.2, 0.4, 3), delta=1e-2) <= 0.015
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Epsilon spent" in page
    assert f"<td>{scores['privacy']['sites']['a']:.2f}</td>" in page


def test_a_private_reply_tells_no_loss_no_count_and_no_statistics(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    run(private(tiny_job), three_sites, tmp_path / "run", workers=1, pages=False)
    for event in rounds(tmp_path / "run"):
        for row in event["trained"]:
            assert (row["loss"], row["images"]) == (None, 0)
    assert not [name for name in load_file(tmp_path / "run" / "model.safetensors") if "running" in name]


def test_the_noise_is_other_each_time_though_the_job_has_a_seed(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    models = []
    for name in ("one", "two"):
        run(private(tiny_job), three_sites, tmp_path / name, workers=1, pages=False)
        models.append(load_file(tmp_path / name / "last.safetensors"))
    assert not any(torch.equal(models[0][name], models[1][name]) for name in models[0] if "weight" in name)


def test_shared_noise_adds_up_to_what_was_promised(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    """An empty draw at every site: what the mean model moves by is noise alone, of the size of one site's promise."""
    job = private(
        tiny_job,
        privacy__dp="distributed",
        privacy__secure_aggregation=True,
        privacy__noise_multiplier=3.0,
        privacy__sampling_rate=1e-4,
        federation__max_update_norm=1e6,
        federation__weighting="equal",
        federation__min_sites=3,
        federation__rounds=1,
        train__learning_rate=1e-4,
        train__weight_decay=0.0,
        train__schedule="constant",
        train__warmup=0.0,
        train__momentum=0.0,
        model__width=16,
    )
    result = run(job, three_sites, tmp_path / "run", workers=2, pages=False)
    from shared.tasks import load_task

    before = load_task(job.task).build_model(job).state_dict()
    after = load_file(tmp_path / "run" / "last.safetensors")
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after])
    images = [site["images"]["train"] for site in read_events(tmp_path / "run")[1]["sites"]]
    divisor = 1e-4 * sum(images) / 3  # the same at all sites: the sampling rate times the mean number of images
    promised = (
        1e-4 * 3.0 / divisor / 3
    )  # the sum of the sites' noise has sd 3 clipping norms; a third of it is the mean
    assert len(moved) > 5000
    assert abs(float(moved.std()) / promised - 1) < 0.05
    spent = result.scores["federated"]["privacy"]
    assert spent["noisy_sites"] == 3
    assert 0 <= spent["epsilon"] - pld((3.0, 1e-4, 1), delta=1e-3) <= 0.015


@pytest.mark.parametrize("clipping", ["fixed", "adaptive"])
def test_the_server_noises_whole_sites_and_says_what_it_promised(
    clipping: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    noise = noise_for(20.0, 1e-3, 1.0, 3, "prv")
    job = tiny_job.replace(
        privacy__dp="central",
        privacy__epsilon=20.0,
        privacy__delta=1e-3,
        privacy__central_clipping=clipping,
        train__class_weights="none",
    )
    scores = run(job, three_sites, tmp_path / "run", workers=1, pages=False).scores["federated"]
    assert scores["privacy"]["unit"] == "site"
    assert 0 <= scores["privacy"]["epsilon"] - pld((noise, 1.0, 3), delta=1e-3) <= 0.015
    spent = [event["central"]["epsilon"] for event in rounds(tmp_path / "run")]
    assert spent == sorted(spent)
    assert spent[0] > 0


@pytest.mark.parametrize("task", ["generation"])
def test_a_generator_and_its_reference_are_private_too(
    task: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    job = private(
        tiny_job,
        task=task,
        model__name="dcgan",
        model__latent=4,
        evaluation__samples=8,
        evaluation__reference_rounds=2,
        privacy__sampling_rate=0.2,
    )
    run(job, three_sites, tmp_path / "run", workers=2, pages=False)
    entries = Ledger(tmp_path / "run" / "sites" / "a" / ".consilium" / "ledger.sqlite").history()
    reserved = [entry for entry in entries if entry.kind == "reserve"]
    assert [entry.round for entry in reserved] == [1, 2, 1, 2, 3]  # the reference first
    assert reserved[-1].epsilon > reserved[1].epsilon


def test_under_secure_aggregation_the_epsilon_that_no_site_tells_is_that_of_the_rounds(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    job = private(tiny_job, privacy__secure_aggregation=True, federation__max_update_norm=100.0)
    scores = run(job, three_sites, tmp_path / "run", workers=1).scores["federated"]
    assert 0 <= scores["privacy"]["epsilon"] - pld((1.2, 0.4, 3), delta=1e-3) <= 0.015
    assert "sites" not in scores["privacy"]
    assert "of this run alone" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("dp", ["central", "local"])
def test_a_generators_reference_counts_where_the_server_adds_up(dp: str, tiny_job: Job) -> None:
    job = private(
        tiny_job, task="generation", model__name="dcgan", evaluation__reference_rounds=5, privacy__dp=dp,
        privacy__secure_aggregation=dp == "local", federation__max_update_norm=9.0,
    )  # fmt: skip
    rate = {"central": 1.0, "local": 0.4}[dp]
    spent = privacy_spent([{"event": "round", "trained": []}] * 3, job)
    assert 0 <= spent["epsilon"] - pld((1.2, rate, 8), delta=1e-3) <= 0.015
