"""The last gate: whatever a reply holds beside what is on the list, nothing of it leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client import app as client_app
from client.app import app
from client.egress import KINDS, Asked, Refused, checked, release
from client.egress_log import verify
from client.workspace import open_workspace
from shared import __version__
from shared.config import Job, job_from_flat
from shared.tasks import load_task
from shared.weights import exchanged

MARK = "Doe^Jane"
KIND_OF = {"query": "query", "survey": "query", "train": "train", "evaluate": "evaluate"}


class Reply(NamedTuple):
    kind: str
    content: RecordDict
    asked: Asked


@pytest.fixture(autouse=True)
def _sender() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def context(site: Path, job: Job) -> Context:
    return Context(7, 2, {"site": str(site / "site.toml")}, RecordDict(), dict(job.flat()))


def message(what: str, job: Job, round_: int = 1) -> Message:
    config: dict[str, Any] = {"round": round_, "split": "test", "class-weights": [1.0, 1.0], "survey": what == "survey"}
    content = RecordDict({"config": ConfigRecord(config)})
    if what in ("train", "evaluate"):
        arrays = exchanged(load_task(job.task).build_model(job), job)
        content["arrays"] = ArrayRecord(arrays)  # type: ignore[arg-type]
    return Message(content, 2, KIND_OF[what])


def ask(what: str, site: Path, job: Job) -> Message:
    return app(message(what, job), context(site, job))


def rules(site: Path, text: str) -> None:
    file = site / "site.toml"
    file.write_text(f"{file.read_text()}\n[privacy]\n{text}\n")


def good(what: str, site: Path, job: Job) -> Reply:
    """A reply that passes, without its status, and what it is held against."""
    sent = message(what, job)
    content = app(sent, context(site, job)).content
    del content["status"]
    where = context(site, job)
    asked = Asked(job, open_workspace(where.node_config, where.run_config, job), sent.content)
    return Reply({"survey": "query.survey"}.get(what, what), content, asked)


@pytest.fixture(params=KIND_OF)
def reply(request: pytest.FixtureRequest, three_sites: Path, tiny_job: Job) -> Reply:
    return good(request.param, three_sites / "a", tiny_job)


def test_a_reply_in_order_passes_unchanged(reply: Reply) -> None:
    out = checked(reply.kind, reply.content, "", "a", reply.asked)
    for name in reply.content:
        assert out[name] == reply.content[name]
    assert dict(out["status"]) == {"site": "a", "ok": True, "code": "", "version": __version__}


def test_every_kind_of_message_is_tried_here() -> None:
    assert {"query", "query.survey", "train", "evaluate"} <= set(KINDS)


# Ways in which anything at all may get into a reply.
Change = Callable[[RecordDict], None]
WRONG_NUMBERS = st.sampled_from([math.nan, math.inf, -math.inf])


def _set(content: RecordDict, record: str, key: str, value: Any) -> None:
    content[record].__dict__["_data"][key] = value  # past Flower's own checks


@st.composite
def changes(draw: st.DrawFn, content: RecordDict) -> Change:
    """One change to a reply that it may not have."""
    records = sorted(content)
    record = draw(st.sampled_from(records))
    keys = sorted(content[record])
    key = draw(st.sampled_from(keys))
    value = content[record][key]
    more: list[Change] = [
        lambda c: c.__setitem__("more", ConfigRecord({"text": MARK})),
        lambda c: c.__setitem__("more", MetricRecord({"n": 1})),
        lambda c: c.__setitem__("more", ArrayRecord([np.zeros(2, np.float32)])),
        lambda c: c.__delitem__(record),
        lambda c: _set(c, record, MARK, value),
        lambda c: c[record].__delitem__(key),
        lambda c: _set(c, record, key, MARK),
        lambda c: _set(c, record, key, MARK.encode()),
        lambda c: c.__setitem__(record, ConfigRecord({"text": MARK})),
    ]
    if isinstance(content[record], ArrayRecord):
        array = content[record][key].numpy()
        more += [
            lambda c: _set(c, record, key, Array(array.astype(np.float64))),
            lambda c: _set(c, record, key, Array(array.astype(">f4"))),
            lambda c: _set(c, record, key, Array(array[None])),
            lambda c: _set(c, record, key, Array(np.full_like(array, draw(WRONG_NUMBERS)))),
            lambda c: _set(c, record, key, Array(MARK, array.shape, "numpy.ndarray", c[record][key].data)),
            lambda c: _set(c, record, key, Array("float32", array.shape, MARK, b"x" + c[record][key].data)),
        ]
    elif isinstance(content[record], MetricRecord) and isinstance(value, list):
        more += [
            lambda c: _set(c, record, key, [*value, 0]),
            lambda c: _set(c, record, key, value[:-1]),
            lambda c: _set(c, record, key, [-1, *value[1:]]),
            lambda c: _set(c, record, key, [draw(WRONG_NUMBERS), *value[1:]]),
            lambda c: _set(c, record, key, [MARK, *value[1:]]),
            lambda c: _set(c, record, key, [True, *value[1:]]),
            lambda c: _set(c, record, key, sum(value)),
        ]
    elif isinstance(content[record], MetricRecord) and key != "loss":
        more += [
            lambda c: _set(c, record, key, -1),
            lambda c: _set(c, record, key, True),
            lambda c: _set(c, record, key, draw(WRONG_NUMBERS)),
            lambda c: _set(c, record, key, [value]),
        ]
    elif record == "facts":
        more.append(lambda c: _set(c, record, key, sha256(MARK.encode()).hexdigest()[:-1]))
    chosen: Change = draw(st.sampled_from(more))
    # A training reply may do without what is optional.
    if chosen is more[5] and key in ("loss", "images", "seconds"):
        chosen = more[0]
    return chosen


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_of_any_other_reply_nothing_leaves(data: st.DataObject, one_site: OneSite) -> None:
    what = data.draw(st.sampled_from(sorted(one_site.replies)))
    reply = one_site.replies[what]
    content = RecordDict({name: type(record)(dict(record)) for name, record in reply.content.items()})  # type: ignore[call-arg]
    data.draw(changes(reply.content))(content)
    where = context(one_site.folder, one_site.job)
    out = release(reply.kind, content, "", message(what, one_site.job), where, reply.asked)
    assert set(out) == {"status"}
    assert dict(out["status"]) == {"site": "a", "ok": False, "code": "egress-refused", "version": __version__}
    out = release(reply.kind, reply.content, "", message(what, one_site.job), where, reply.asked)
    assert out["status"]["ok"]  # it was the change


class OneSite:
    """A site of a few images, a job, and a good reply of each kind."""

    def __init__(self, folder: Path) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        small_site(folder)
        flat = {"data.classes": "left,right", "data.size": 16, "model.width": 4, "train.local_steps": 2}
        self.folder, self.job = folder, job_from_flat(flat)
        self.replies = {what: good(what, folder, self.job) for what in KIND_OF}


@pytest.fixture(scope="module")
def one_site(tmp_path_factory: pytest.TempPathFactory) -> OneSite:
    return OneSite(tmp_path_factory.mktemp("gate") / "a")


def small_site(folder: Path) -> None:
    folder.mkdir()
    rows = ["path,label,patient,split"]
    for number in range(24):
        picture = np.random.default_rng(number).integers(0, 255, (16, 16)).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        rows.append(
            f"{number}.png,{('left', 'right')[number % 2]},p{number},{('train', 'val', 'test')[number // 2 % 3]}"
        )
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "site.toml").write_text('name = "a"\n')


def test_bytes_behind_the_numbers_and_words_beside_them_do_not_leave(three_sites: Path, tiny_job: Job) -> None:
    reply = good("train", three_sites / "a", tiny_job)
    record = reply.content["arrays"]
    for name, array in list(record.items()):
        changed = Array("float32", array.shape, "numpy.ndarray", array.data + MARK.encode())
        changed.__dict__["note"] = MARK
        _set(reply.content, "arrays", name, changed)
    out = checked("train", reply.content, "", "a", reply.asked)
    assert MARK.encode() not in recorddict_to_proto(out).SerializeToString()
    assert not any("note" in array.__dict__ for array in out["arrays"].values())
    assert all(np.array_equal(out["arrays"][name].numpy(), array.numpy()) for name, array in record.items())


@pytest.mark.parametrize(
    ("code", "name"), [(MARK, "a"), ("jane", "a"), ("no-data", MARK), ("no-data", "a" * 65), ("no-data", "a\nb")]
)
def test_no_other_code_and_no_other_name_leaves(code: str, name: str) -> None:
    with pytest.raises(Refused):
        checked("query", RecordDict(), code, name, None)


def test_a_reply_of_a_kind_that_is_not_on_the_list_does_not_leave(reply: Reply) -> None:
    with pytest.raises(Refused, match="no reply of the kind"):
        checked("gossip", reply.content, "", "a", reply.asked)


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("train.keys", {"mask": b"m" * 32, "seal": b"s" * 32, "commitment": b"c" * 32}),
        ("train.shares", {"sealed": [b"", b"s" * 60, b"t" * 60]}),
        ("train.unmask", {"shares": [b"s" * 16, b""]}),
    ],
)
def test_of_secure_aggregation_byte_strings_of_fixed_lengths_leave(
    kind: str, record: dict[str, Any], three_sites: Path, tiny_job: Job
) -> None:
    told = {"peers": ConfigRecord({"names": ["a", "b", "c"]}), "unmask": ConfigRecord({"senders": ["b"]})}
    asked = replace(good("query", three_sites / "a", tiny_job).asked, content=RecordDict(told))  # type: ignore[arg-type]
    (name,) = KINDS[kind]
    out = checked(kind, RecordDict({name: ConfigRecord(record)}), "", "a", asked)
    assert dict(out[name]) == record
    for key, value in record.items():
        longer = [*value, b"x"] if isinstance(value, list) else value + b"x"
        one_more = [*value, value[0]] if isinstance(value, list) else [value]  # for a site that nobody told of
        for wrong in (longer, one_more, MARK, [MARK], 1):
            with pytest.raises(Refused):
                checked(kind, RecordDict({name: ConfigRecord(record | {key: wrong})}), "", "a", asked)
    with pytest.raises(Refused):
        checked(kind, RecordDict({name: ConfigRecord(record | {"more": b"x" * 32})}), "", "a", asked)


def scaffold_reply(site: Path, job: Job) -> Reply:
    """A reply of SCAFFOLD that passes, from the real app."""
    job = job.replace(federation__strategy="scaffold")
    sent = message("train", job)
    model = load_task(job.task).build_model(job)
    zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    sent.content["control"] = ArrayRecord(zeros)  # type: ignore[arg-type]
    where = context(site, job)
    content = app(sent, where).content
    del content["status"]
    return Reply(
        "train.scaffold", content, Asked(job, open_workspace(where.node_config, where.run_config, job), sent.content)
    )


def test_a_control_variate_leaves_as_it_is_and_in_no_other_form(three_sites: Path, tiny_job: Job) -> None:
    kind, content, asked = scaffold_reply(three_sites / "a", tiny_job)
    assert checked(kind, content, "", "a", asked)["control"] == content["control"]
    arrays = {name: array.numpy() for name, array in content["control"].items()}
    first = next(iter(arrays))
    wrong = {
        "missing": dict(list(arrays.items())[1:]),
        "more": arrays | {MARK: arrays[first]},
        "other order": dict(reversed(arrays.items())),
        "shape": arrays | {first: arrays[first].reshape(-1)},
        "kind": arrays | {first: arrays[first].astype(np.float64)},
        "not finite": arrays | {first: np.full_like(arrays[first], np.nan)},
    }
    for what, values in wrong.items():
        content["control"] = ArrayRecord({name: Array(np.asarray(value)) for name, value in values.items()})
        with pytest.raises(Refused) as refused:
            checked(kind, content, "", "a", asked)
        assert MARK not in str(refused.value), what
    del content["control"]
    with pytest.raises(Refused, match="instead of"):
        checked(kind, content, "", "a", asked)


def test_a_control_variate_without_the_correction_does_not_leave(three_sites: Path, tiny_job: Job) -> None:
    _, content, _ = scaffold_reply(three_sites / "a", tiny_job)
    kind, plain, asked = good("train", three_sites / "a", tiny_job)
    plain["control"] = content["control"]
    with pytest.raises(Refused, match="instead of"):
        checked(kind, plain, "", "a", asked)


def test_the_sites_bound_holds_for_what_a_control_variate_is_worth(three_sites: Path, tiny_job: Job) -> None:
    kind, content, asked = scaffold_reply(three_sites / "a", tiny_job)
    norm = math.sqrt(sum(float(np.square(array.numpy().astype(float)).sum()) for array in content["control"].values()))
    worth = norm * tiny_job.train.learning_rate * tiny_job.train.local_steps
    moved = 10.0  # more than the model's own change
    for factor, passes in ((moved * 0.99, False), (moved * 1.01, True)):
        bound = replace(asked.workspace.policy, max_update_norm=factor)
        scaled = {name: Array(array.numpy() * np.float32(moved / worth)) for name, array in content["control"].items()}
        larger = RecordDict({**content, "control": ArrayRecord(scaled)})
        held = replace(asked, workspace=replace(asked.workspace, policy=bound))
        if passes:
            checked(kind, larger, "", "a", held)
        else:
            with pytest.raises(Refused, match="is worth a change of"):
                checked(kind, larger, "", "a", held)


def test_a_masked_model_is_one_vector_as_long_as_the_model(three_sites: Path, tiny_job: Job) -> None:
    asked = good("query", three_sites / "a", tiny_job).asked
    length = sum(
        array.numel() for array in exchanged(load_task("classification").build_model(tiny_job), tiny_job).values()
    )

    def passes(values: np.ndarray) -> bool:
        try:
            content = RecordDict({"arrays": ArrayRecord({"masked": Array(values)})})
            return np.array_equal(checked("train.masked", content, "", "a", asked)["arrays"]["masked"].numpy(), values)
        except Refused:
            return False

    assert passes(np.arange(length + 4, dtype=np.uint32))
    assert passes(np.arange(length, dtype=np.uint32))
    assert passes(np.arange(length + 32, dtype=np.uint32))
    assert not passes(np.arange(length + 33, dtype=np.uint32))
    assert not passes(np.arange(length - 1, dtype=np.uint32))
    assert not passes(np.arange(2 * length, dtype=np.uint32))
    assert not passes(np.zeros(length + 4, np.float32))
    assert not passes(np.zeros((1, length + 4), np.uint32))


def test_facts_are_the_jobs_hash_and_one_of_frozen_weights(three_sites: Path, tiny_job: Job) -> None:
    kind, content, asked = good("query", three_sites / "a", tiny_job)
    for frozen, passes in (
        ("", True),
        ("0123456789abcdef" * 4, True),
        ("A" * 64, False),
        ("0" * 63, False),
        (7, False),
    ):
        content["facts"] = ConfigRecord({"job": tiny_job.sha256, "frozen": frozen})
        if passes:
            assert checked(kind, content, "", "a", asked)["facts"]["frozen"] == frozen
        else:
            with pytest.raises(Refused, match="no SHA-256"):
                checked(kind, content, "", "a", asked)


# ---------------------------------------------------------------------- through the ClientApp


def twist(monkeypatch: pytest.MonkeyPatch, what: str, change: Change) -> None:
    """Let the client's own code do something it should not."""
    name = f"_{what}"
    real = getattr(client_app, name)

    def other(*args: Any) -> RecordDict:
        content: RecordDict = real(*args)
        change(content)
        return content

    monkeypatch.setattr(client_app, name, other)


@pytest.mark.parametrize("what", KIND_OF)
def test_of_unknown_content_a_bare_code_leaves_and_the_reason_stays(
    what: str, three_sites: Path, tiny_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    twist(monkeypatch, what, lambda content: content.__setitem__("more", ConfigRecord({"name": MARK})))
    site = three_sites / "a"
    content = ask(what, site, tiny_job).content
    assert set(content) == {"status"}
    assert dict(content["status"]) == {"site": "a", "ok": False, "code": "egress-refused", "version": __version__}
    assert "records ['" in (site / "site.log").read_text()
    (entry,) = verify(site).entries
    assert entry["declined"] == "egress-refused"
    assert set(entry["records"]) == {"status"}


@pytest.mark.parametrize("part", ["client.egress.checked", "client.egress.note"])
def test_a_failure_of_the_gate_itself_fails_closed(
    part: str, three_sites: Path, tiny_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError(MARK)

    monkeypatch.setattr(part, explode)
    content = ask("train", three_sites / "a", tiny_job).content
    assert set(content) == {"status"}
    assert content["status"]["code"] == "egress-refused"
    assert MARK not in str(content)


def test_where_the_log_cannot_be_written_nothing_leaves(three_sites: Path, tiny_job: Job) -> None:
    site = three_sites / "a"
    assert ask("query", site, tiny_job).content["status"]["ok"]
    log = site / ".consilium" / "egress.log"
    log.write_bytes(log.read_bytes()[:-40])
    content = ask("train", site, tiny_job).content
    assert (set(content), content["status"]["code"]) == ({"status"}, "egress-refused")
    assert "egress.log is shorter than egress.head says" in (site / "site.log").read_text()


def test_a_change_beyond_the_sites_bound_does_not_leave(three_sites: Path, tiny_job: Job) -> None:
    site = three_sites / "a"
    sent = message("train", tiny_job)
    before = sent.content.array_records["arrays"].to_torch_state_dict()
    content = app(sent, context(site, tiny_job)).content
    after = content.array_records["arrays"].to_torch_state_dict()
    change = torch.sqrt(sum(((after[name] - before[name]).double() ** 2).sum() for name in after)).item()  # type: ignore[arg-type]
    text = (site / "site.toml").read_text()
    for factor, ok in ((1.001, True), (0.999, False)):
        (site / "site.toml").write_text(f"{text}\n[privacy]\nmax_update_norm = {factor * change}\n")
        (site / ".consilium" / "state").rename(site / f"state-{factor}")  # so that it trains from the same start
        assert ask("train", site, tiny_job).content["status"]["code"] == ("" if ok else "egress-refused")
    assert "max_update_norm" in (site / "site.log").read_text()


def test_under_dp_a_loss_that_the_client_would_send_does_not_leave(
    three_sites: Path, tiny_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tiny_job.replace(privacy__dp="local", privacy__epsilon=8.0, train__class_weights="none")
    reply = good("train", three_sites / "a", tiny_job)
    asked = Asked(private, reply.asked.workspace, reply.asked.content)
    reply.content["metrics"] = MetricRecord({"num-examples": 12, "steps": 2})
    checked("train", reply.content, "", "a", asked)
    for name in ("loss", "losses", "images"):
        reply.content["metrics"] = MetricRecord({"num-examples": 12, "steps": 2, name: 1})
        with pytest.raises(Refused, match="not on the list"):
            checked("train", reply.content, "", "a", asked)


def test_under_dp_statistics_of_a_normalisation_leave_as_they_came_only(
    three_sites: Path, tiny_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a network slip through whose BatchNorm was not replaced."""
    job = tiny_job.replace(model__name="resnet18")
    reply = good("train", three_sites / "a", job)
    reply.content["metrics"] = MetricRecord({"num-examples": 12, "steps": 2})
    model = load_task(job.task).build_model(job)
    monkeypatch.setattr("client.egress.open_model", lambda _: model)
    asked = Asked(
        job.replace(privacy__dp="local", privacy__epsilon=8.0, train__class_weights="none"),
        reply.asked.workspace,
        reply.asked.content,
    )
    with pytest.raises(Refused, match="running_mean are statistics of images"):
        checked("train", reply.content, "", "a", asked)
    came = reply.asked.content["arrays"]
    for name in came:
        if "running" in name or "num_batches" in name:
            reply.content["arrays"][name] = came[name]
    checked("train", reply.content, "", "a", asked)


def test_under_dp_a_generators_average_of_itself_leaves(three_sites: Path, tiny_job: Job) -> None:
    """It is a buffer, too, but made of noised weights only."""
    flat = {"task": "generation", "model.name": "dcgan", "data.size": 16, "data.classes": "left,right"}
    job = job_from_flat(flat | {"model.width": 4, "train.local_steps": 1, "train.batch_size": 4})
    reply = good("train", three_sites / "a", job)
    reply.content["metrics"] = MetricRecord({"num-examples": 12, "steps": 1})
    assert reply.content["arrays"]["updates"] != reply.asked.content["arrays"]["updates"]
    private = job.replace(privacy__dp="local", privacy__epsilon=8.0, train__class_weights="none")
    checked("train", reply.content, "", "a", Asked(private, reply.asked.workspace, reply.asked.content))


def test_the_log_says_what_left(three_sites: Path, tiny_job: Job) -> None:
    site = three_sites / "b"
    replies = [ask(what, site, tiny_job).content for what in ("query", "train", "evaluate", "train")]
    entries = verify(site).entries
    assert [entry["kind"] for entry in entries] == ["query", "train", "evaluate", "train"]
    assert all((entry["run"], entry["site"], entry["declined"]) == ("7", "b", "") for entry in entries)
    arrays = replies[1]["arrays"]
    trained = entries[1]["records"]["arrays"]
    assert trained["list"] == [f"{name}: float32 {'x'.join(map(str, array.shape))}" for name, array in arrays.items()]
    assert "list" not in entries[3]["records"]["arrays"]  # once a run
    assert entries[3]["records"]["arrays"]["names"] == trained["names"]
    digest = sha256()  # as the docs say it is to be computed
    for name in ("arrays", "metrics", "status"):
        digest.update(f"{name}\n".encode())
        if name == "arrays":
            for key, array in arrays.items():
                digest.update(key.encode() + array.data)
        else:
            digest.update(json.dumps(dict(replies[1][name]), sort_keys=True).encode())
    assert entries[1]["content"] == digest.hexdigest()
