"""Whole federations under secure aggregation in the engine: the model of a plain run, sites lost on the way."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from client.app import app as real
from server.figures import training_loss
from server.record import read_record
from server.rounds import RunFailed
from server.store import Event, read_events
from shared.config import Job
from shared.fixedpoint import worst_error
from simulations.simulate import run
from tests.server.test_rounds import federate

BOUND = 20.0
STAGES = ("keys", "shares", "masked", "unmask")


@pytest.fixture
def job(tiny_job: Job) -> Job:
    return tiny_job.replace(federation__max_update_norm=BOUND, privacy__secure_share=0.51)


def secure(job: Job) -> Job:
    return job.replace(privacy__secure_aggregation=True)


def rounds(folder: Path) -> list[Event]:
    return [event for event in read_events(folder) if event["event"] == "round"]


def largest_gap(one: Path, other: Path) -> float:
    left, right = load_file(one / "last.safetensors"), load_file(other / "last.safetensors")
    assert list(left) == list(right)
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def last_place(folder: Path) -> float:
    """By how much two float32 weights may differ that were rounded from nearly one number."""
    return max(float(value.abs().max()) for value in load_file(folder / "last.safetensors").values()) * 2**-23


def failing(victim: str, stage: str, number: int, how: str) -> ClientApp:
    """The real app; at one site, in one round, one stage ends its process, or an error, or answers with rubbish."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        reply = real(message, context)
        due = message.metadata.message_type == f"train.{stage}" and message.metadata.group_id == str(number)
        if due and context.node_config["name"] == victim:
            if how == "dies":
                os._exit(9)
            raise RuntimeError("Patient^Secret^1970")
        return reply

    for register in (app.query, app.train, app.evaluate):
        register()(handle)
    for name in STAGES:
        app.train(name)(handle)
    return app


@pytest.mark.parametrize("changes", [{}, {"federation__weighting": "equal"}])
def test_a_round_gives_the_plain_model_within_the_quantisation(
    changes: dict[str, str], three_sites: Path, job: Job, tmp_path: Path
) -> None:
    one = job.replace(federation__rounds=1, **changes)
    plain, masked = (
        run(one, three_sites, tmp_path / "plain", pages=False).folder,
        run(secure(one), three_sites, tmp_path / "s", pages=False).folder,
    )
    weights = [1.0] * 3 if changes else [12 / 20, 16 / 20, 1.0]
    assert largest_gap(plain, masked) <= worst_error(BOUND, 3, 3, sum(weights) * (1 - 1e-6)) + last_place(plain)
    (round_,) = rounds(masked)
    assert [row["site"] for row in round_["trained"]] == ["a", "b", "c"]
    assert round_["dropped"] == round_["secure"]["silent"] == []


def test_a_whole_run_gives_the_plain_models_figures(three_sites: Path, job: Job, tmp_path: Path) -> None:
    plain, masked = run(job, three_sites, tmp_path / "p"), run(secure(job), three_sites, tmp_path / "s", baselines=True)
    assert largest_gap(plain.folder, masked.folder) < 1e-5
    ours, theirs = (read_record(result.folder).scores["federated"] for result in (masked, plain))
    assert ours["auroc"] == pytest.approx(theirs["auroc"], abs=0.01)
    for key in ("images_seen", "gradient_steps", "images"):
        assert ours[key] == theirs[key]
    page = (masked.folder / "report.html").read_text()
    assert "The server saw the sum of the sites’ models only" in page
    assert "The server saw the sum" not in (plain.folder / "report.html").read_text()


def test_no_loss_of_a_single_site_is_stored_but_their_mean_is(three_sites: Path, job: Job, tmp_path: Path) -> None:
    plain, masked = (
        run(job, three_sites, tmp_path / "p", pages=False).folder,
        run(secure(job), three_sites, tmp_path / "s", pages=False).folder,
    )
    for hidden, shown in zip(rounds(masked), rounds(plain), strict=True):
        assert all(row["loss"] is None and row["images"] == 0 for row in hidden["trained"])
        total = sum(row["loss"] for row in shown["trained"]), sum(row["images"] for row in shown["trained"])
        assert hidden["secure"]["images"] == total[1]
        # The same number of images at each site: then the mean over sites is that over images.
        assert hidden["secure"]["loss"] / hidden["secure"]["images"] == pytest.approx(total[0] / total[1], rel=1e-3)
    drawn = [training_loss(read_record(folder)) for folder in (masked, plain)]
    ours, theirs = (next(np.asarray(trace.y, float) for trace in figure.data) for figure in drawn if figure)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_site_lost_in_the_middle_of_a_round_is_named_and_the_others_go_on(
    stage: str, how: str, three_sites: Path, job: Job, tmp_path: Path
) -> None:
    out, two = tmp_path / "out", secure(job).replace(federation__rounds=2)
    federate(failing("b", stage, 1, how), three_sites, two, out)
    first, second = rounds(out)
    row = {"site": "b", "reason": "site-crashed" if how == "dies" else "site-error"}
    if stage == "unmask":  # its model is in the sum already
        assert (first["dropped"], first["secure"]["silent"]) == ([], [row])
        assert len(first["trained"]) == 3
    else:
        assert (first["dropped"], first["secure"]["silent"]) == ([row], [])
        assert [item["site"] for item in first["trained"]] == ["a", "c"]
    assert [item["site"] for item in second["trained"]] == ["a", "b", "c"]
    assert read_events(out)[-1]["event"] == "finish"
    assert not any(
        b"Patient^Secret" in f.read_bytes() for f in out.rglob("*") if f.is_file() and "homes" not in f.parts
    )


def test_the_model_without_a_lost_site_is_that_of_the_others(three_sites: Path, job: Job, tmp_path: Path) -> None:
    # Seeds depend on names, not on who else is there; class weights would.
    one = secure(job).replace(federation__rounds=1, train__class_weights="none")
    federate(failing("b", "masked", 1, "dies"), three_sites, one, tmp_path / "lost")
    (three_sites / "b" / "site.toml").unlink()
    federate(real, three_sites, one.replace(privacy__secure_aggregation=False), tmp_path / "without")
    gap = largest_gap(tmp_path / "lost", tmp_path / "without")
    assert gap <= worst_error(BOUND, 3, 2, 1.6 * (1 - 1e-6)) + last_place(tmp_path / "lost")


def test_below_the_threshold_the_run_ends_and_says_why(three_sites: Path, job: Job, tmp_path: Path) -> None:
    all_ = secure(job).replace(privacy__secure_share=1.0)
    with pytest.raises(
        RunFailed,
        match=r"in round 2, 2 sites are in order, secure aggregation asks for 3 \(b: site-crashed\)",
    ):
        federate(failing("b", "masked", 2, "dies"), three_sites, all_, tmp_path / "out")
    events = read_events(tmp_path / "out")
    assert events[-1]["event"] == "failed"
    assert rounds(tmp_path / "out")[-1]["trained"] == []


def test_a_single_site_has_nobody_to_hide_among(three_sites: Path, job: Job, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (three_sites / name / "site.toml").unlink()
    with pytest.raises(RunFailed, match="in round 1, 1 sites are in order, secure aggregation asks for 2"):
        federate(real, three_sites, secure(job), tmp_path / "out")


def test_a_generator_and_the_network_it_is_measured_by_are_both_summed_masked(
    three_sites: Path, job: Job, tmp_path: Path
) -> None:
    small = {
        "task": "generation", "model.name": "dcgan", "model.latent": 8, "evaluation.samples": 20, "data.size": 16,
        "federation.rounds": 2, "evaluation.reference_rounds": 2, "federation.max_update_norm": 200.0,
    }  # fmt: skip
    both = secure(job).replace(**{key.replace(".", "__"): value for key, value in small.items()})
    out = run(both, three_sites, tmp_path / "out", pages=False).folder
    assert len(rounds(out)) == len(rounds(out / "reference")) == 2
    for event in [*rounds(out), *rounds(out / "reference")]:
        assert event["secure"]["sites"] == 3
        assert event["dropped"] == []
    losses = rounds(out)[0]["secure"]["losses"]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses.values())
