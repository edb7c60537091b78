"""Federations whose models travel in changes: what is sent to whom, resuming, and replies that are out of order."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from client.app import app as real
from server import rounds
from server.admission import Place
from server.database import read
from server.database.engine import open_database
from server.rounds import Run
from server.store import read_events
from server.wire import Addressed, Line
from shared.codecs import CHANGE, CODECS
from shared.config import Job, job_from_flat
from shared.errors import UserError
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.simulate import run
from simulations.sites import node_of
from tests.conftest import write_site

Event = dict[str, Any]


def nodes(sites: Path, homes: Path) -> list[dict[str, Any]]:
    return [node_of(homes, file) for file in sorted(sites.glob("*/site.toml"))]


def federate(sites: Path, job: Job, out: Path, app: ClientApp | str = "client.app:app", resume: bool = False) -> Run:
    with WorkerPool(app, 2) as pool:
        run_ = Run(LocalGrid(pool, nodes(sites, out / "homes"), job.flat() | {"run.id": "r"}), job, out, resume=resume)
        run_.run()
    return run_


def trained(out: Path) -> list[Event]:
    return [event for event in read_events(out) if event["event"] == "round"]


def same(one: Path, other: Path, name: str = "last.safetensors") -> bool:
    first, second = load_file(one / name), load_file(other / name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


LONG: dict[str, Any] = {"federation__rounds": 8, "evaluation__every": 8, "train__local_steps": 8}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Job]:
    """Sites, a run on them whose models travelled whole, and its job."""
    folder = tmp_path_factory.mktemp("plain")
    for name, images in {"a": 24, "b": 32, "c": 40}.items():
        write_site(folder / "data" / name, name, images)
    flat = {"data.classes": "left,right", "data.size": 16, "model.width": 4, "train.batch_size": 8}
    job = job_from_flat(flat).replace(**LONG)
    federate(folder / "data", job, folder / "run")
    return folder / "data", folder / "run", job


@pytest.mark.parametrize("codec", CODECS)
def test_a_coded_federation_learns_as_the_plain_one_in_fewer_bytes(
    codec: str, plain: tuple[Path, Path, Job], tmp_path: Path
) -> None:
    """The network is tiny: an array's header of 128 bytes weighs much, and a scale for every 36 numbers."""
    sites, whole, job = plain
    federate(sites, job.replace(federation__codec=codec), tmp_path)
    scores = [read_events(out)[-2]["metrics"]["auroc"]["value"] for out in (whole, tmp_path)]
    assert scores[1] >= scores[0] - 0.01
    assert not any(event["dropped"] for event in trained(tmp_path))
    few = {"bf16": 0.5, "int8": 0.26, "int2": 0.1, "sign": 0.06, "topk": 0.14, "topk-int8": 0.07}[codec]
    for before, after in zip(trained(whole)[1:], trained(tmp_path)[1:], strict=True):
        for site in ("a", "b", "c"):
            for way in (0, 1):
                assert after["bytes"][site][way] <= few * before["bytes"][site][way]


def test_a_run_broken_off_goes_on_to_the_same_bits(
    three_sites: Path, tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job.replace(federation__codec="topk-int8", federation__rounds=4)
    federate(three_sites, job, tmp_path / "whole")
    real_round, broken = Run.train_round, tmp_path / "broken"

    def breaks(self: Run, arrays: Any, number: int, weights: list[float]) -> Any:
        after = real_round(self, arrays, number, weights)
        if number == 3:  # the sites have trained and keep what they left out, the server has not saved the round
            raise KeyboardInterrupt
        return after

    monkeypatch.setattr(rounds.Run, "train_round", breaks)
    with pytest.raises(KeyboardInterrupt):
        federate(three_sites, job, broken)
    monkeypatch.undo()
    federate(three_sites, job, broken, resume=True)
    assert same(tmp_path / "whole", broken)
    assert same(tmp_path / "whole", broken, "model.safetensors")


def test_the_result_does_not_depend_on_the_number_of_workers(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    job = tiny_job.replace(federation__codec="topk-int8")
    for workers in (1, 2):
        run(job, three_sites, tmp_path / str(workers), workers=workers)
    assert same(tmp_path / "1", tmp_path / "2")
    moved = [event["bytes"].values() for event in trained(tmp_path / "1")]
    both = [tuple(map(sum, zip(*pairs, strict=True))) for pairs in moved]
    assert "as changes coded by topk-int8" in (tmp_path / "1" / "report.html").read_text()
    database = open_database(str(tmp_path / "consilium.sqlite"))
    number = read.find(database, tmp_path / "1")
    assert number is not None
    assert [(row["down"], row["up"]) for row in read.rounds(database, number)] == both
    database.dispose()


def test_sites_that_missed_rounds_get_what_they_missed(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    """Two of three sites a round, no evaluation in between: to each goes down a change for each round missed."""
    job = tiny_job.replace(federation__fraction=0.5, federation__rounds=6, evaluation__every=6)
    federate(three_sites, job.replace(federation__codec="int8"), tmp_path)
    one = min(down for event in trained(tmp_path) for down, _ in event["bytes"].values() if down)
    last = dict.fromkeys("abc", 0)  # all had model 0 in the first evaluation
    seen = set()
    for number, event in enumerate(trained(tmp_path), start=1):
        assert not event["dropped"]
        for item in event["trained"]:
            missed = number - 1 - last[item["site"]]
            down = event["bytes"][item["site"]][0]
            if number > 1:  # the first round's bytes have that evaluation in them
                assert down == pytest.approx(missed * one, abs=4 * missed) if missed <= 3 else down > 3 * one
                seen.add(missed)
            last[item["site"]] = number - 1
    assert {1, 2} <= seen


def test_a_site_that_lost_its_model_gets_it_whole_in_the_same_round(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    """b's folder of models is wiped before each of its trainings: it is in every round, and the run is as ever."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        home = Path(str(context.node_config["home"]))
        if home.name == "b" and message.metadata.message_type == "train" and message.metadata.group_id != "1":
            for folder in (home / ".consilium" / "state").rglob("models"):
                shutil.rmtree(folder)
        return real(message, context)

    for register in (app.query, app.train, app.evaluate):
        register()(handle)
    job = tiny_job.replace(federation__codec="int8")
    federate(three_sites, job, tmp_path / "wiped", app)
    federate(three_sites, job, tmp_path / "sound")
    assert all([item["site"] for item in event["trained"]] == ["a", "b", "c"] for event in trained(tmp_path / "wiped"))
    assert same(tmp_path / "wiped", tmp_path / "sound")
    second = trained(tmp_path / "wiped")[1]["bytes"]
    assert second["b"][0] > 3 * second["a"][0]
    assert "model-missing" in (tmp_path / "wiped" / "homes" / "b" / "site.log").read_text()


def test_changes_at_hand_never_outweigh_the_model(tiny_job: Job) -> None:
    line = Line(tiny_job.replace(federation__codec="int8"))
    model = {"w": torch.zeros(40, 40)}
    for number in range(1, 12):
        model = line.step(model, {"w": model["w"] + number}, number)
    assert sorted(line.changes) == [9, 10, 11]  # a fourth would be more than the model
    from flwr.app import ConfigRecord, RecordDict

    content = RecordDict({"arrays": ArrayRecord(model), "config": ConfigRecord({"round": 12})})
    line.has |= {"now": 11, "late": 9, "long": 3, "ahead": 12}
    sent = line.addressed(content, model, 11)
    assert isinstance(sent, Addressed)
    keys = {name: list(sent(Place(1, name, {}, [], 0))["arrays"]) for name in [*line.has, "new"]}
    assert keys == {"now": [], "late": ["10", "11"], "long": ["w"], "ahead": ["w"], "new": ["w"]}
    assert line.addressed(content, model, 7) is content  # the best model of an earlier round: nobody has it


def test_a_model_that_is_not_finite_is_passed_on_as_it_is(tiny_job: Job) -> None:
    line = Line(tiny_job.replace(federation__codec="int8"))
    after = line.step({"w": torch.zeros(3)}, {"w": torch.full((3,), torch.inf)}, 1)
    assert torch.isinf(after["w"]).all()
    assert not line.changes


# ---------------------------------------------------------------------- replies out of order


def changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ArrayRecord], ArrayRecord]:
    return lambda record: ArrayRecord({CHANGE: Array(np.asarray(change(record[CHANGE].numpy())))})


BOMB = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }"
FAULTS: dict[str, tuple[Callable[[ArrayRecord], ArrayRecord], str]] = {
    "another name": (lambda record: ArrayRecord({"changes": record[CHANGE]}), "wrong-names"),
    "beside more": (lambda record: ArrayRecord({CHANGE: record[CHANGE], "more": record[CHANGE]}), "wrong-names"),
    "a plain model": (lambda record: ArrayRecord({"w": Array(np.zeros(3, np.float32))}), "wrong-names"),
    "no bytes": (changed(lambda change: change[:0]), "wrong-shape"),
    "a byte more": (changed(lambda change: np.append(change, np.uint8(0))), "wrong-shape"),
    "a thousand times as many": (changed(lambda change: np.tile(change, 1000)), "wrong-shape"),
    "other numbers": (changed(lambda change: change.astype(np.int8)), "wrong-dtype"),
    "places twice": (changed(np.zeros_like), "undecodable"),
    "a bomb": (lambda _: ArrayRecord({CHANGE: Array("uint8", (2**40,), "numpy.ndarray", BOMB)}), "undecodable"),
    "no array": (lambda _: ArrayRecord({CHANGE: Array("uint8", (3,), "numpy.ndarray", b"abc")}), "undecodable"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_site_whose_change_is_out_of_order_is_named_and_left_out(
    fault: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    twist, reason = FAULTS[fault]
    job = tiny_job.replace(federation__codec="topk-int8", federation__rounds=1)
    federate(three_sites, job, tmp_path, lying(twist))
    (event,) = trained(tmp_path)
    assert event["dropped"] == [{"site": "b", "reason": reason}]
    assert [item["site"] for item in event["trained"]] == ["a", "c"]


def lying(twist: Callable[[ArrayRecord], ArrayRecord]) -> ClientApp:
    """The real app, but b's trained arrays are changed on their way out."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        reply = real(message, context)
        if Path(str(context.node_config["home"])).name == "b" and message.metadata.message_type == "train":
            reply.content["arrays"] = twist(reply.content["arrays"])
        return reply

    for register in (app.query, app.train, app.evaluate):
        register()(handle)
    return app


def test_a_scale_that_is_no_number_is_not_finite(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    job = tiny_job.replace(federation__codec="int8", federation__rounds=1)
    federate(three_sites, job, tmp_path, lying(changed(lambda change: np.full_like(change, 255))))
    assert trained(tmp_path)[0]["dropped"] == [{"site": "b", "reason": "not-finite"}]


def test_a_coded_change_that_leads_too_far_is_dropped(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    job = tiny_job.replace(federation__codec="int8", federation__rounds=1, federation__max_update_norm=50.0)
    huge = np.frombuffer(np.float32(1e4).tobytes(), np.uint8)
    federate(three_sites, job, tmp_path, lying(changed(lambda change: np.resize(huge, change.shape))))
    assert trained(tmp_path)[0]["dropped"] == [{"site": "b", "reason": "too-far"}]


def test_with_secure_aggregation_a_codec_is_refused_with_the_reason(tiny_job: Job) -> None:
    with pytest.raises(UserError, match="do not add up"):
        tiny_job.replace(federation__codec="int8", privacy__secure_aggregation=True, federation__max_update_norm=1.0)


@pytest.mark.parametrize("dp", ["local", "central"])
def test_a_codec_goes_with_differential_privacy(dp: str, three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    job = tiny_job.replace(
        federation__codec="topk-int8", privacy__dp=dp, privacy__noise_multiplier=1.0, train__class_weights="none"
    )
    federate(three_sites, job, tmp_path)
    assert [len(event["trained"]) for event in trained(tmp_path)] == [3, 3, 3]


class Silent(LocalGrid):
    """Sites that never answer; notes how long they were waited for."""

    def __init__(self) -> None:
        super().__init__(None, [], {})  # type: ignore[arg-type]  # nobody works
        self.waited: list[float | None] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        self.waited.append(timeout)
        return iter(())


@pytest.mark.parametrize(
    ("length", "times"), [({"train__local_steps": 4}, 26), ({"train__local_steps": 1, "train__local_epochs": 2.0}, 11)]
)
def test_fine_tuning_may_take_as_many_rounds_as_it_has_steps(length: dict[str, Any], times: int, tiny_job: Job) -> None:
    """The round's deadline fits its few steps; two epochs of the smaller site's 40 images in eights are ten."""
    job = tiny_job.replace(federation__finetune_steps=100, federation__round_timeout=5.0, train__batch_size=8, **length)
    places = [Place(2, "a", {"train": 40}, [], 0), Place(3, "b", {"train": 400}, [], 0)]
    grid, line = Silent(), Line(job)
    content = RecordDict({"config": ConfigRecord({"round": 3})})
    for kind in ("train", "evaluate", "evaluate.personal"):
        assert [reply for _, reply in line.exchange(grid, kind, content, places, 3)] == [None, None]
    assert grid.waited == [5.0, 5.0, 5.0 * times]
