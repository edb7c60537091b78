"""The site's end of the wire: models put together, changes packed, what is kept for the next round, and the gate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from client.app import app
from client.egress import Asked, Refused, checked
from client.memory import Memory
from client.wire import LATE, _within
from client.workspace import open_workspace
from shared.codecs import CHANGE, CODECS, Coding, coding, decode, encode, length, residual, with_residual
from shared.config import Job
from shared.tasks import load_task
from shared.weights import digest, exchanged

Arrays = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _sender() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@pytest.fixture(params=["int8", "topk-int8"])
def job(request: pytest.FixtureRequest, tiny_job: Job) -> Job:
    return tiny_job.replace(federation__codec=request.param)


def how(job: Job) -> Coding:
    found = coding(job)
    assert found is not None
    return found


def start(job: Job) -> Arrays:
    return exchanged(load_task(job.task).build_model(job), job)


def ask(site: Path, job: Job, kind: str, arrays: ArrayRecord, round_: int, **wire: Any) -> RecordDict:
    config = {"round": round_, "split": "val", "class-weights": [1.0, 1.0]}
    config |= {f"codec-{name}": value for name, value in wire.items()}
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})  # type: ignore[arg-type]
    context = Context(7, 2, {"site": str(site / "site.toml")}, RecordDict(), dict(job.flat()))
    return app(Message(content, 2, kind), context).content


def whole(site: Path, job: Job, model: Arrays, version: int, kind: str = "train") -> RecordDict:
    return ask(site, job, kind, ArrayRecord(model), version + 1, version=version, digest=digest(model))


def moved(model: Arrays, seed: int) -> Arrays:
    draw = torch.Generator().manual_seed(seed)
    return {name: array + 0.01 * torch.randn(array.shape, generator=draw) for name, array in model.items()}


def test_a_model_in_changes_is_the_model_to_the_bit(job: Job, three_sites: Path) -> None:
    """A site that had the model whole, then missed a round, then had it all along, against one that gets it whole."""
    coder, models, changes = how(job), [start(job)], {}
    for number in (1, 2, 3):
        changes[number] = encode(models[-1], moved(models[-1], number), coder, number)
        models.append(decode(models[-1], changes[number], coder))
    assert whole(three_sites / "a", job, models[0], 0)["status"]["ok"]
    for base, version in ((0, 2), (2, 2), (2, 3)):
        record = ArrayRecord({str(n): Array(changes[n]) for n in range(base + 1, version + 1)})
        facts = {"version": version, "base": base, "digest": digest(models[version])}
        got = ask(three_sites / "a", job, "evaluate", record, version, **facts)
        plain = ask(three_sites / "a", job, "evaluate", ArrayRecord(models[version]), version)
        assert got["status"]["ok"]
        assert dict(got["metrics"]) == dict(plain["metrics"])


def test_a_site_without_the_model_that_a_change_is_of_says_so(job: Job, three_sites: Path) -> None:
    site, model = three_sites / "a", start(job)
    after = decode(model, change := encode(model, moved(model, 1), how(job), 1), how(job))
    facts = {"version": 1, "base": 0, "digest": digest(after)}
    sent = ArrayRecord({"1": Array(change)})

    def code() -> object:
        return ask(site, job, "evaluate", sent, 1, **facts)["status"]["code"]

    assert code() == "model-missing"  # it is new
    assert whole(site, job, model, 0)["status"]["ok"]
    assert code() == ""
    folder = next((site / ".consilium" / "state").rglob("models"))
    shutil.rmtree(folder)
    assert code() == "model-missing"  # it lost it
    assert whole(site, job, model, 0)["status"]["ok"]
    (folder / "0.safetensors").write_bytes(b"damaged")
    assert code() == "model-missing"
    assert whole(site, job, moved(model, 9), 0)["status"]["ok"]
    assert code() == "model-missing"  # it has another of that round


def reached(reply: RecordDict, model: Arrays, job: Job) -> Arrays:
    assert list(reply["arrays"]) == [CHANGE]
    return decode(model, reply["arrays"][CHANGE].numpy(), how(job))


def test_what_a_round_leaves_out_goes_with_the_next(job: Job, three_sites: Path) -> None:
    """Three rounds against plain training from the same models, with the error added up here."""
    site, twin, plain = three_sites / "a", three_sites / "b", job.replace(federation__codec="none")
    shutil.rmtree(twin)
    shutil.copytree(site, twin)
    model, late = start(job), dict[str, Tensor]()
    for version in range(3):
        got = reached(whole(site, job, model, version), model, job)
        trained = whole(twin, plain, model, version)["arrays"].to_torch_state_dict()
        target = with_residual(trained, late)
        size = max((target[name] - model[name]).abs().max().item() for name in model)
        for name in model:
            assert (got[name] - target[name]).abs().max() <= size * (0.01 if job.federation.codec == "int8" else 1)
        late = residual(target, got)
        model = got
    kept = Memory(site, "7", job, LATE)
    assert sorted(path.stem for path in kept.folder.iterdir()) == ["2", "3"]  # the last two rounds, no more
    stored = kept.exactly(LATE, 3)
    assert stored is not None
    assert all(torch.allclose(stored[name], late[name], atol=1e-6) for name in late)


def test_a_repeated_round_repeats_to_the_bit(job: Job, three_sites: Path) -> None:
    model = start(job)
    first = [whole(three_sites / "a", job, model, version)["arrays"][CHANGE].data for version in (0, 1)]
    again = whole(three_sites / "a", job, model, 1)["arrays"][CHANGE].data
    assert first[1] == again
    assert first[0] != first[1]  # what round 1 left out was in it


def test_a_fresh_start_forgets_models_and_errors(job: Job, three_sites: Path) -> None:
    site = three_sites / "a"
    for version in (0, 1):
        whole(site, job, start(job), version)
    folder = next((site / ".consilium" / "state").iterdir())
    assert {path.parent.name for path in folder.rglob("2.safetensors")} >= {"late"}
    ask(site, job, "query", ArrayRecord(), 1, version=0, digest="")
    context = Context(7, 2, {"site": str(site / "site.toml")}, RecordDict(), dict(job.flat()))
    content = RecordDict({"config": ConfigRecord({"round": 1, "fresh": True})})
    assert app(Message(content, 2, "query"), context).content["status"]["ok"]
    assert {path.stem for path in folder.rglob("*.safetensors")} == {"0", "1"}
    content["config"]["round"] = 0
    app(Message(content, 2, "query"), context)
    assert not list(folder.rglob("*.safetensors"))


# ---------------------------------------------------------------------- bounds on the change


def norm(before: Arrays, after: Arrays) -> float:
    return float(sum((after[name] - before[name]).double().square().sum() for name in before)) ** 0.5


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_late_does_not_carry_a_change_over_the_sites_bound(
    codec: str, tiny_job: Job, three_sites: Path
) -> None:
    """With as much late as a round changes: the change leaves, within the bound, and the rest waits."""
    site, job = three_sites / "a", tiny_job.replace(federation__codec=codec)
    model = start(job)
    plain = whole(three_sites / "b", job.replace(federation__codec="none"), model, 1)["arrays"].to_torch_state_dict()
    bound = 1.3 * norm(model, plain)  # b's change is about as long as a's
    workspace = open_workspace({"site": str(site / "site.toml")}, {}, job)
    Memory(workspace.home, "7", job, LATE).save(1, {LATE: residual(moved(plain, 3), model)})
    (site / "site.toml").write_text((site / "site.toml").read_text() + f"\n[privacy]\nmax_update_norm = {bound}\n")
    reply = whole(site, job, model, 1)
    assert reply["status"]["code"] == ""
    assert norm(model, reached(reply, model, job)) <= bound
    late = Memory(workspace.home, "7", job, LATE).exactly(LATE, 2)
    assert late is not None
    assert sum(float(array.square().sum()) for array in late.values()) > 0


@pytest.mark.parametrize("codec", ["bf16", "int8", "sign", "topk"])
def test_a_change_of_a_few_last_bits_is_shortened_in_the_end(codec: str, tiny_job: Job) -> None:
    """Forty of the smallest steps a float32 can take, and a bound just below: there is nothing between to go to."""
    how = coding(tiny_job.replace(federation__codec=codec))
    assert how is not None
    before = {"weight": torch.ones(4, 300)}
    target = {"weight": torch.ones(4, 300) + 40 * torch.finfo(torch.float32).eps}
    bound = 0.999 * norm(before, target)
    change, after = _within(bound, before, before, target, how, 0)
    assert norm(before, after) <= bound
    assert torch.equal(decode(before, change, how)["weight"], after["weight"])


def test_a_change_that_is_itself_beyond_the_bound_does_not_leave(job: Job, three_sites: Path) -> None:
    site = three_sites / "a"
    (site / "site.toml").write_text((site / "site.toml").read_text() + "\n[privacy]\nmax_update_norm = 0.0001\n")
    assert whole(site, job, start(job), 0)["status"]["code"] == "egress-refused"
    assert "max_update_norm" in (site / "site.log").read_text()


# ---------------------------------------------------------------------- the gate

Wrong = Callable[[np.ndarray], np.ndarray]
WRONG: dict[str, Wrong] = {
    "a byte more": lambda change: np.append(change, np.uint8(1)),
    "a byte less": lambda change: change[:-1],
    "another kind": lambda change: change.astype(np.int16),
    "a text": lambda change: np.frombuffer(b"Doe^Jane", np.uint8),
    "a scale that is no number": lambda change: np.where(np.arange(len(change)) < 200, 255, change).astype(np.uint8),
}


def gate(reply: RecordDict, job: Job, site: Path, model: Arrays) -> RecordDict:
    workspace = open_workspace({"site": str(site / "site.toml")}, {}, job)
    asked = Asked(job, workspace, RecordDict({"arrays": ArrayRecord(model)}))
    content = RecordDict({name: record for name, record in reply.items() if name != "status"})
    return checked("train", content, "", "a", asked)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_coded_change_does_not_pass(wrong: str, tiny_job: Job, three_sites: Path) -> None:
    job, site = tiny_job.replace(federation__codec="int8"), three_sites / "a"
    model = start(job)
    reply = whole(site, job, model, 0)
    change = reply["arrays"][CHANGE].numpy()
    assert len(change) == length(model, how(job))
    assert gate(reply, job, site, model)["arrays"] == reply["arrays"]
    reply["arrays"] = ArrayRecord({CHANGE: Array(WRONG[wrong](change))})
    with pytest.raises(Refused):
        gate(reply, job, site, model)


def test_under_another_name_beside_more_or_without_a_codec_nothing_passes(job: Job, three_sites: Path) -> None:
    site, model = three_sites / "a", start(job)
    reply = whole(site, job, model, 0)
    good = reply["arrays"][CHANGE]
    plain = job.replace(federation__codec="none")
    with pytest.raises(Refused, match="other names"):
        gate(reply, plain, site, model)
    for arrays in ({"changes": good}, {CHANGE: good, "more": good}):
        reply["arrays"] = ArrayRecord(arrays)
        with pytest.raises(Refused, match="other names"):
            gate(reply, job, site, model)


def test_words_beside_a_coded_change_do_not_leave(job: Job, three_sites: Path) -> None:
    site, model = three_sites / "a", start(job)
    reply = whole(site, job, model, 0)
    good = reply["arrays"][CHANGE]
    reply["arrays"] = ArrayRecord({CHANGE: Array("uint8", good.shape, "Doe^Jane", good.data)})
    try:
        out = gate(reply, job, site, model)
    except Exception:
        return
    assert "Doe^Jane" not in str(out)
    assert out["arrays"][CHANGE].data == good.data


def test_under_dp_the_change_is_coded_after_the_noise(job: Job, three_sites: Path) -> None:
    """What leaves is made of the noised model and of what earlier rounds left of theirs: post-processing."""
    moved = []
    for noise in (1.0, 100.0):  # a hundred times the noise, so nearly all of what is coded is a hundred times as much
        private = job.replace(
            privacy__dp="local", privacy__noise_multiplier=noise, train__class_weights="none", train__optimizer="sgd"
        )
        model = start(private)
        reply = whole(three_sites / "a", private, model, 0)
        assert reply["status"]["code"] == ""
        assert reply["metrics"]["epsilon"] > 0
        moved.append(norm(model, reached(reply, model, private)))
    assert 50 < moved[1] / moved[0] < 200
