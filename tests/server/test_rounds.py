"""The round loop with real ClientApps in worker processes: sound sites, failing sites, lying sites."""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from client.app import app as real
from server.card import model_card
from server.report import write_report
from server.rounds import Run, RunFailed
from server.store import read_events
from shared.config import Job
from shared.errors import SiteRefusal
from shared.tasks import Sums, add_sums, load_task
from shared.tasks.classification.learning import sums_of_logits
from shared.weights import exchanged
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool

Twist = Callable[[Message], Message]


def nodes(sites: Path, homes: Path) -> list[dict[str, str]]:
    files = sorted(sites.glob("*/site.toml"))
    return [{"site": str(file), "home": str(homes / file.parent.name), "name": file.parent.name} for file in files]


def federate(app: ClientApp, sites: Path, job: Job, out: Path) -> dict[str, object]:
    with WorkerPool(app, 2) as pool:
        grid = LocalGrid(pool, nodes(sites, out / "homes"), job.flat())
        return Run(grid, job, out).run()


def twisted(victim: str, twist: Twist, kind: str = "train") -> ClientApp:
    """The real app, whose replies of one kind at one site are changed on their way out."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        reply = real(message, context)
        return (
            twist(reply) if context.node_config["name"] == victim and message.metadata.message_type == kind else reply
        )

    app.query()(handle)
    app.train()(handle)
    app.evaluate()(handle)
    return app


def edit_arrays(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Twist:
    def twist(reply: Message) -> Message:
        arrays = change({name: array.numpy() for name, array in reply.content["arrays"].items()})
        reply.content["arrays"] = ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})
        return reply

    return twist


def first(arrays: dict[str, np.ndarray], value: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value if number == 0 else array for number, (name, array) in enumerate(arrays.items())}


def edit_metrics(**changes: object) -> Twist:
    def twist(reply: Message) -> Message:
        values = dict(reply.content["metrics"]) | {name.replace("_", "-"): value for name, value in changes.items()}
        reply.content["metrics"] = MetricRecord(values)
        return reply

    return twist


def raises(_: Message) -> Message:
    raise RuntimeError("Patient^Secret^1970 has a fracture")


def dies(_: Message) -> Message:
    os._exit(9)


def without_arrays(reply: Message) -> Message:
    del reply.content["arrays"]
    return reply


FAULTS: dict[str, tuple[Twist, str]] = {
    "NaN weights": (edit_arrays(lambda a: first(a, next(iter(a.values())) * np.nan)), "not-finite"),
    "infinite weights": (edit_arrays(lambda a: first(a, next(iter(a.values())) + np.inf)), "not-finite"),
    "wrong shape": (edit_arrays(lambda a: first(a, np.zeros((1,), np.float32))), "wrong-shape"),
    "wrong dtype": (edit_arrays(lambda a: first(a, next(iter(a.values())).astype(np.float64))), "wrong-dtype"),
    "missing key": (edit_arrays(lambda a: dict(list(a.items())[1:])), "wrong-names"),
    "extra key": (edit_arrays(lambda a: a | {"more": np.zeros(1, np.float32)}), "wrong-names"),
    "no arrays": (without_arrays, "wrong-records"),
    "zero examples": (edit_metrics(num_examples=0), "bad-weight"),
    "negative examples": (edit_metrics(num_examples=-5), "bad-weight"),
    "a million million examples": (edit_metrics(num_examples=10**12), "bad-weight"),
    "NaN examples": (edit_metrics(num_examples=float("nan")), "bad-weight"),
    "a raising site": (raises, "site-error"),
    "a dying site": (dies, "site-crashed"),
}


def honest_average(sites: Path, job: Job, tmp_path: Path, names: set[str]) -> dict[str, np.ndarray]:
    """One round by hand: each site's reply from the real app, called here, averaged by NumPy."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    initial = exchanged(load_task(job.task).build_model(job), job)
    replies = []
    for node in nodes(sites, tmp_path / "by-hand"):
        if node["name"] in names:
            context = Context(1, 2, dict(node), RecordDict(), dict(job.flat()))
            config = {"round": 1, "class-weights": [1.0, 1.0]}
            from flwr.app import ConfigRecord

            content = RecordDict({"arrays": ArrayRecord(initial), "config": ConfigRecord(config)})  # type: ignore[arg-type]
            replies.append(real(Message(content, 2, "train"), context).content)
    weights = [reply["metrics"]["num-examples"] for reply in replies]
    return {
        name: np.average([reply["arrays"][name].numpy() for reply in replies], axis=0, weights=weights)
        for name in initial
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_site_is_named_and_the_model_is_the_average_of_the_others(
    fault: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    job = tiny_job.replace(federation__rounds=1, train__class_weights="none")
    twist, reason = FAULTS[fault]
    out = tmp_path / "out"
    federate(twisted("b", twist), three_sites, job, out)
    events = read_events(out)
    (round_,) = [event for event in events if event["event"] == "round"]
    assert round_["dropped"] == [{"site": "b", "reason": reason}]
    assert [item["site"] for item in round_["trained"]] == ["a", "c"]
    assert events[-1]["event"] == "finish"
    expected = honest_average(three_sites, job, tmp_path, {"a", "c"})
    model = load_file(out / "last.safetensors")
    for name, value in expected.items():
        np.testing.assert_allclose(model[name].numpy(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("losses", [[1.0, 2.0], [float("nan")] * 99, [], 3, [7]])
def test_losses_of_parts_that_the_model_has_not_are_passed_over(
    losses: object, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    federate(twisted("b", edit_metrics(losses=losses)), three_sites, tiny_job.replace(federation__rounds=1), out)
    (round_,) = [event for event in read_events(out) if event["event"] == "round"]
    assert round_["dropped"] == []
    told = ["site", "weight", "steps", "images", "loss", "train_seconds", "seconds"]
    assert [list(item) for item in round_["trained"]] == [told] * 3


def test_the_text_of_a_sites_exception_reaches_no_file_of_the_server(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    federate(twisted("b", raises), three_sites, tiny_job, out)
    for file in out.rglob("*"):
        if file.is_file() and "homes" not in file.parts:
            assert b"Patient^Secret" not in file.read_bytes(), file
    assert "Patient^Secret" in (out / "homes" / "b" / "site.log").read_text()


def test_below_the_quorum_the_run_ends_and_keeps_its_rounds(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    def fails_in_round_two(reply: Message) -> Message:
        return raises(reply) if reply.metadata.group_id == "2" else reply

    out = tmp_path / "out"
    job = tiny_job.replace(federation__min_sites=3)
    with pytest.raises(
        RunFailed, match=r"round 2, 2 sites are in order, federation.min_sites asks for 3 \(b: site-error\)"
    ):
        federate(twisted("b", fails_in_round_two), three_sites, job, out)
    events = read_events(out)
    assert [event["round"] for event in events if event["event"] == "round"] == [1, 2]
    assert events[-1]["event"] == "failed"
    assert (out / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": float("inf")}, "not-finite"),
        ({"loss": -3.0}, "not-finite"),
        ({"extra": 1}, "wrong-names"),
        ({"n": 10**6}, "wrong-sums"),  # more than the site named
        ({"n": 1}, "wrong-sums"),  # fewer than its own counts
        ({"n": 4.0}, "wrong-sums"),  # a count is a whole number
        ({"confusion": [5, 0, 0, 5]}, "wrong-sums"),
        ({"positives": [2**62] * 4000}, "wrong-sums"),
    ],
)
def test_a_site_whose_evaluation_is_out_of_order_is_named_and_left_out(
    changes: dict[str, object], reason: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    federate(twisted("b", edit_metrics(**changes), "evaluate"), three_sites, tiny_job, out)
    tests = [event for event in read_events(out) if event["event"] == "evaluation" and event["split"] == "test"]
    assert tests[-1]["dropped"] == [{"site": "b", "reason": reason}]
    assert set(tests[-1]["sites"]) == {"a", "c"}
    assert tests[-1]["metrics"]["loss"]["n"] == sum(site["loss"]["n"] for site in tests[-1]["sites"].values())


def edit_survey(record: str, **changes: object) -> Twist:
    def twist(reply: Message) -> Message:
        for name, value in changes.items():
            reply.content[record][name.replace("_", "-")] = value
        return reply

    return twist


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        (edit_survey("facts", job="another"), "other-job"),
        (edit_survey("facts", frozen="another"), "other-frozen-weights"),
        (edit_survey("metrics", classes=[1, 2, 3]), "wrong-records"),
        (edit_survey("metrics", images_train=-1), "bad-weight"),
        (edit_survey("metrics", images_train=10**12), "bad-weight"),
        (edit_survey("status", site="../../etc <b>"), "bad-name"),
        (raises, "site-error"),
        (dies, "site-crashed"),
    ],
)
def test_a_site_whose_survey_is_out_of_order_takes_no_part(
    twist: Twist, reason: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    federate(twisted("b", twist, "query"), three_sites, tiny_job, out)
    events = read_events(out)
    (survey,) = [event for event in events if event["event"] == "survey"]
    assert [item["reason"] for item in survey["dropped"]] == [reason]
    assert [site["name"] for site in survey["sites"]] == ["a", "c"]
    assert {item["site"] for event in events if event["event"] == "round" for item in event["trained"]} == {"a", "c"}


def test_two_sites_of_one_name_end_the_run(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        reply = real(message, context)
        reply.content["status"]["site"] = "the-same"
        return reply

    with pytest.raises(RunFailed, match="two sites call themselves 'the-same'"):
        federate(app, three_sites, tiny_job, tmp_path / "out")


def test_a_reply_too_far_from_the_global_model_is_dropped(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    far = edit_arrays(lambda arrays: {name: array + 100 for name, array in arrays.items()})
    federate(twisted("b", far), three_sites, tiny_job.replace(federation__max_update_norm=50.0), out)
    dropped = [event["dropped"] for event in read_events(out) if event["event"] == "round"]
    assert dropped == [[{"site": "b", "reason": "too-far"}]] * 3


# ---------------------------------------------------------------------- best model


class Scripted(Run):
    """A run whose validation figures are given, so that only the choice of the best round is at work."""

    script: list[float | None]

    def __init__(self, job: Job, folder: Path, script: list[float | None]) -> None:
        super().__init__(None, job, folder)  # type: ignore[arg-type]
        for number, value in enumerate(script, start=1):
            from shared.intervals import NOTHING

            metrics = {job.best_metric: type(NOTHING)(value, value, value, 1)} if value is not None else {}
            self._keep_best(number, {"w": torch.tensor([float(number)])}, metrics)


@pytest.mark.parametrize(
    ("metric", "script", "best"),
    [
        ("auroc", [0.5, 0.7, 0.6], 2),
        ("auroc", [0.5, 0.7, 0.9], 3),  # the last round counts too
        ("auroc", [0.7, 0.7, 0.7], 1),  # of equals the earliest
        ("loss", [3.0, 1.0, 2.0], 2),  # less is better
        ("auroc", [float("nan"), 0.4, float("nan")], 2),  # a round without the figure is never best
        ("loss", [2.0, float("nan"), 1.0], 3),
        ("auroc", [None, 0.3, None], 2),  # nor one in which the metric never came
        ("loss", [None, None, 4.0], 3),
        ("auroc", [0.6, 0.9, 0.9, 0.8], 2),  # of equals that are best the earlier
    ],
)
def test_the_best_round_is_kept(
    metric: str, script: list[float | None], best: int, tiny_job: Job, tmp_path: Path
) -> None:
    run = Scripted(tiny_job.replace(evaluation__best_metric=metric), tmp_path, script)
    assert run.best.round == best
    assert load_file(tmp_path / "model.safetensors")["w"].item() == best


def test_one_easy_site_does_not_pick_the_round(tiny_job: Job, tmp_path: Path) -> None:
    """The figure is that of all sites' images together: a small site that is right at last does not outvote the rest,
    as the mean of the sites' figures would let it."""
    task = load_task(tiny_job.task)

    def sums(right: int, wrong: int) -> Sums:
        scores = torch.tensor([[-2.0, 2.0]] * right + [[2.0, -2.0]] * wrong, dtype=torch.float64)
        logits = torch.cat([scores, scores.flip(1)])  # as many of the one class as of the other
        return sums_of_logits([(logits, [(1,)] * (right + wrong) + [(0,)] * (right + wrong))], tiny_job)

    by_round = [(sums(80, 20), sums(1, 3)), (sums(60, 40), sums(4, 0))]  # (the large site, the easy one)
    job = tiny_job.replace(evaluation__best_metric="accuracy")
    pooled = [task.summarise(add_sums(sites), job)["accuracy"].value for sites in by_round]
    means = [sum(task.summarise(one, job)["accuracy"].value for one in sites) / 2 for sites in by_round]
    assert means[0] < means[1]
    assert pooled[0] > pooled[1]
    assert Scripted(job, tmp_path, list(pooled)).best.round == 1


def test_what_was_kept_is_written_down_with_its_rule(tiny_job: Job, three_sites: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = federate(real, three_sites, tiny_job.replace(evaluation__best_metric="loss"), out)
    events = read_events(out)
    [kept] = [event for event in events if event["event"] == "kept"]
    values = {e["round"]: e["metrics"]["loss"]["value"] for e in events if e.get("split") == "val" and e["round"]}
    assert kept["round"] == result["best_round"] == min(values, key=lambda number: (values[number], number))
    assert kept["value"] == min(values.values())
    assert (kept["metric"], kept["direction"], kept["considered"]) == ("loss", -1, [1, 2, 3])
    assert kept["rule"].startswith("smallest loss over the validation images of all sites")


def test_a_round_that_was_chosen_without_some_sites_is_said_to_be_so_everywhere(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    """Two of three sites keep every validation back: no figure may be called that of all sites."""
    app = ClientApp()

    def evaluated(message: Message, context: Context) -> Message:
        keeps = context.node_config["name"] != "a" and message.content["config"]["split"] == "val"
        if keeps:
            raise SiteRefusal("small-cell", "fewer cases than are told")
        return real(message, context)

    app.query()(real)
    app.train()(real)
    app.evaluate()(evaluated)
    out = tmp_path / "out"
    federate(app, three_sites, tiny_job, out)
    events = read_events(out)
    [kept] = [event for event in events if event["event"] == "kept"]
    val = next(e for e in events if e.get("split") == "val" and e["round"] == kept["round"])
    assert set(val["sites"]) == {"a"}
    own = f"1 of 3 sites (a, {val['images']} images)"
    assert own in kept["rule"]
    assert val["operating_point"]["whose"] == "1 of 3 sites (a)"
    [warning] = [event["text"] for event in events if event["event"] == "warning"]
    assert own in warning
    assert "b (" in warning
    assert "c (" in warning
    page = html.unescape(write_report(out).read_text())
    assert f"The global model on the validation images of {own}" in page
    assert f"{val['images']} validation cases of 1 of 3 sites (a)" in page
    assert "So few cases" in page
    assert "Test: " in page
    assert "those of all sites" in page, "the test is of all, and is said to be"
    assert page.index(warning) < page.index("<table")
    limits = model_card(out).split("## Limits")[1]
    assert f"validation images of {own}" in limits.replace("\\", "")


def test_without_validation_images_the_last_round_is_kept_and_said(
    tiny_job: Job, three_sites: Path, tmp_path: Path
) -> None:
    for table in three_sites.glob("*/labels.csv"):
        table.write_text(table.read_text().replace(",val", ",train"))
    out = tmp_path / "out"
    result = federate(real, three_sites, tiny_job, out)
    assert result["best_round"] == 3
    kept, last = load_file(out / "model.safetensors"), load_file(out / "last.safetensors")
    assert kept.keys() == last.keys()
    assert all(torch.equal(kept[name], last[name]) for name in last)
    assert any("last round" in event.get("text", "") for event in read_events(out))


def test_a_share_of_the_sites_is_drawn_by_the_seed(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    job = tiny_job.replace(federation__fraction=0.5, federation__rounds=6)
    trained = []
    for name in ("one", "two"):
        federate(real, three_sites, job, tmp_path / name)
        events = read_events(tmp_path / name)
        trained.append([[item["site"] for item in event["trained"]] for event in events if event["event"] == "round"])
    assert trained[0] == trained[1]
    assert {len(names) for names in trained[0]} == {2}
    assert len({tuple(names) for names in trained[0]}) > 1
