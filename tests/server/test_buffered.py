"""FedBuff with real ClientApps: late replies count later, by the formula, and nobody waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from torch import Tensor

from client.app import app as real
from server.buffered import rebased
from server.rounds import Run
from server.store import read_events
from shared.config import Job, job_from_flat
from shared.errors import UserError
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool

from .test_rounds import nodes

Arrays = dict[str, Tensor]


@pytest.fixture
def buffered(tiny_job: Job) -> Job:
    return tiny_job.replace(federation__strategy="fedbuff", federation__order="buffered", federation__rounds=6)


class Late(LocalGrid):
    """The replies of site c are there only after ``rounds`` further rounds were begun, or never."""

    rounds = 2

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.begun = 0
        self.asked: dict[str, tuple[int, str, Arrays]] = {}  # by message: round, site, the model sent
        self.models: dict[int, Arrays] = {}  # by round: the model at its beginning
        self.told: dict[str, tuple[Arrays, float]] = {}  # by message: the model that came back, and its weight

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages, self.begun = list(messages), self.begun + 1
        names = list(super().push_messages(messages))
        for name, message in zip(names, messages, strict=True):
            site = str(self._contexts[message.metadata.dst_node_id].node_config["name"])
            arrays = message.content.array_records["arrays"].to_torch_state_dict()
            self.asked[name] = (self.begun, site, arrays)
            self.models[self.begun] = arrays
        return names

    def _held_back(self, name: str) -> bool:
        number, site, _ = self.asked[name]
        return site == "c" and self.begun < number + self.rounds

    def wait_any(self, message_ids: Iterable[str], timeout: float) -> None:
        names = [name for name in message_ids if not self._held_back(name)]
        super().wait_any(names, timeout if names else min(timeout, 0.05))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages([name for name in message_ids if not self._held_back(name)]))
        for reply in replies:
            content = reply.content
            arrays = content.array_records["arrays"].to_torch_state_dict()
            self.told[reply.metadata.reply_to_message_id] = (arrays, content.metric_records["metrics"]["num-examples"])
        return replies


class Silent(Late):
    """Site c never answers, and in round 3 the time is up that it was given in round 1."""

    rounds = 10**6
    loop: Run

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = super().push_messages(messages)
        at_work = self.loop.buffered.at_work
        for name, asked in at_work.items() if self.begun == 3 else ():
            if asked.place.name == "c":
                at_work[name] = asked._replace(since=asked.since - self.loop.job.federation.round_timeout)
        return names


def federate(
    kind: type[LocalGrid], app: ClientApp, sites: Path, job: Job, out: Path
) -> tuple[Any, list[dict[str, Any]]]:
    with WorkerPool(app, 2) as pool:
        grid = kind(pool, nodes(sites, out / "homes"), job.flat())
        loop = Run(grid, job, out)
        if isinstance(grid, Silent):
            grid.loop = loop
        loop.run()
    return grid, [event for event in read_events(out) if event["event"] == "round"]


@pytest.mark.parametrize("staleness", [0.0, 0.5])
def test_a_late_reply_counts_later_and_less(staleness: float, three_sites: Path, buffered: Job, tmp_path: Path) -> None:
    """The oracle has what was sent and what came back, and the paper's update."""
    job = buffered.replace(federation__staleness=staleness)
    grid, rounds = federate(Late, real, three_sites, job, tmp_path / "run")
    behind = {row["behind"] for event in rounds for row in event["trained"] if row["site"] == "c"}
    assert behind == {2}
    assert all(len(event["trained"]) == 2 for event in rounds)
    by_reply = {grid.asked[name][:2]: (grid.asked[name][2], *told) for name, told in grid.told.items()}
    model = grid.models[1]
    for event in rounds:
        number = event["round"]
        total, weights = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.items()}, 0.0
        for row in event["trained"]:
            sent, after, weight = by_reply[number - row["behind"], row["site"]]
            weights += weight
            for name in model:
                total[name] += weight * (after[name].double() - sent[name]) / (1 + row["behind"]) ** staleness
        model = {name: value.double() + total[name] / weights for name, value in model.items()}
        following = grid.models.get(number + 1) or load_file(tmp_path / "run" / "last.safetensors")
        for name, value in model.items():
            torch.testing.assert_close(following[name].double(), value, rtol=1e-5, atol=1e-6)
        model = following


def test_with_replies_of_all_and_nobody_late_it_is_plain_averaging(
    three_sites: Path, tiny_job: Job, buffered: Job, tmp_path: Path
) -> None:
    federate(LocalGrid, real, three_sites, buffered.replace(federation__buffer=3), tmp_path / "buffered")
    federate(LocalGrid, real, three_sites, tiny_job.replace(federation__rounds=6), tmp_path / "plain")
    plain, other = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "buffered"))
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_nobody_waits_for_a_slow_site(three_sites: Path, buffered: Job, tmp_path: Path) -> None:
    slow, app = 6.0, ClientApp()

    def handle(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_config["name"] == "c":
            time.sleep(slow)
        return real(message, context)

    app.query()(handle)
    app.train()(handle)
    app.evaluate()(handle)
    job = buffered.replace(federation__rounds=8, evaluation__every=8)
    _, rounds = federate(LocalGrid, app, three_sites, job, tmp_path / "run")
    assert sum(event["seconds"] for event in rounds) < 2 * slow  # one after another would take eight times
    assert {row["site"] for event in rounds[:2] for row in event["trained"]} == {"a", "b"}
    assert all(event["dropped"] == [] for event in rounds)


def test_who_fails_is_named_and_asked_again(three_sites: Path, buffered: Job, tmp_path: Path) -> None:
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        config = message.content["config"]
        if message.metadata.message_type == "train" and context.node_config["name"] == "b" and config["round"] < 3:
            raise RuntimeError("the disk is full")
        return real(message, context)

    app.query()(handle)
    app.train()(handle)
    app.evaluate()(handle)
    _, rounds = federate(LocalGrid, app, three_sites, buffered, tmp_path / "run")
    lost = [row["site"] for event in rounds for row in event["dropped"]]
    assert set(lost) == {"b"}
    assert len(lost) == 2
    assert "b" in {row["site"] for event in rounds for row in event["trained"]}


def test_who_does_not_answer_in_time_is_named(three_sites: Path, buffered: Job, tmp_path: Path) -> None:
    _, rounds = federate(Silent, real, three_sites, buffered, tmp_path / "run")
    assert [event["dropped"] for event in rounds] == [[], [], [{"site": "c", "reason": "no-reply"}], [], [], []]
    assert all(len(event["trained"]) == 2 for event in rounds)


class Unsent(LocalGrid):
    """The first question to site c cannot be sent."""

    failed = False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        if self.failed:
            return super().push_messages(messages)
        self.failed = True
        return [*super().push_messages(messages[:-1]), ""]


def test_a_question_that_could_not_be_sent_is_a_reply_that_did_not_come(
    three_sites: Path, buffered: Job, tmp_path: Path
) -> None:
    _, rounds = federate(Unsent, real, three_sites, buffered, tmp_path / "run")
    assert [event["dropped"] for event in rounds] == [[{"site": "c", "reason": "no-reply"}], [], [], [], [], []]
    assert "c" in {row["site"] for event in rounds for row in event["trained"]}


def test_statistics_are_as_the_site_has_them_and_weights_move_by_a_share() -> None:
    sent = {"w": torch.tensor([1.0, 2.0]), "bn.running_var": torch.tensor([1.0]), "n": torch.tensor(3)}
    now = {"w": torch.tensor([5.0, 5.0]), "bn.running_var": torch.tensor([9.0]), "n": torch.tensor(8)}
    reply = {"w": torch.tensor([2.0, 0.0]), "bn.running_var": torch.tensor([4.0]), "n": torch.tensor(4)}
    found = rebased(reply, sent, now, 0.5, {"w"})
    assert found["w"].tolist() == [5.5, 4.0]
    assert (found["bn.running_var"].item(), found["n"].item()) == (4.0, 4)
    assert rebased(reply, sent, sent, 1.0, {"w"}) is reply


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_sites": 3}, r"federation\.buffer = 2: .* use 3 or more"),
        ({"aggregator": "krum"}, r"federation\.buffer = 2: .* use 5 or more"),
        ({"codec": "int8"}, "another model than the one changed"),
        ({"correction": "scaffold"}, "replies to one model"),
        ({"max_update_norm": 1.0, "privacy.secure_aggregation": True}, "masks cancel only where all answer one model"),
    ],
)
def test_what_it_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    flat = {key if "." in key else f"federation.{key}": value for key, value in settings.items()}
    with pytest.raises(UserError, match=words):
        job_from_flat({"federation.strategy": "fedbuff"} | flat)
