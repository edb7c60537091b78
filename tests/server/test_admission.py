"""Records beside the model, and the steps that weigh: what is not in order does not enter the aggregate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from server.admission import Dropped, admit, admit_form
from shared.codecs import CHANGE, coding, encode
from shared.config import Job

MODEL = {"w": torch.zeros(3), "b": torch.zeros(1), "seen": torch.tensor(0)}
CONTROL = {"w": torch.zeros(3), "b": torch.zeros(1)}
GOOD = {"w": torch.full((3,), 0.1), "b": torch.ones(1)}


def reply(control: Mapping[str, Tensor] | None, steps: int = 4) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    content = RecordDict({"arrays": ArrayRecord(MODEL), "metrics": MetricRecord({"num-examples": 8, "steps": steps})})  # type: ignore[arg-type]
    if control is not None:
        content["control"] = ArrayRecord(dict(control))  # type: ignore[arg-type]
    return Message(content, 2, "train")


def job_of(**more: Any) -> Job:
    return Job().replace(federation__correction="scaffold", train__local_steps=4, train__learning_rate=0.5, **more)


def test_a_control_in_order_comes_with_the_update() -> None:
    update = admit(reply(GOOD), MODEL, job_of(), 8, {"control": CONTROL})
    assert all(torch.equal(update.beside["control"][name], value) for name, value in GOOD.items())


WRONG: dict[str, tuple[Mapping[str, Tensor] | None, str]] = {
    "none": (None, "wrong-records"),
    "names": ({"w": GOOD["w"]}, "wrong-names"),
    "other names": (GOOD | {"seen": torch.tensor(0)}, "wrong-names"),
    "shape": (GOOD | {"b": torch.ones(2)}, "wrong-shape"),
    "kind": (GOOD | {"b": torch.ones(1, dtype=torch.float64)}, "wrong-dtype"),
    "not finite": (GOOD | {"b": torch.tensor([torch.inf])}, "not-finite"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_control_that_is_not_in_order_drops_the_reply(what: str) -> None:
    control, reason = WRONG[what]
    with pytest.raises(Dropped, match=reason):
        admit(reply(control), MODEL, job_of(), 8, {"control": CONTROL})


def test_a_control_that_nobody_asked_for_drops_the_reply() -> None:
    with pytest.raises(Dropped, match="wrong-records"):
        admit(reply(GOOD), MODEL, Job(), 8)


def test_the_bound_on_a_change_holds_for_what_the_control_is_worth() -> None:
    """Four steps of 0.5 along a control of norm 1 go 2 far."""
    unit = {"w": torch.tensor([0.6, 0.8, 0.0]), "b": torch.zeros(1)}
    admit(reply(unit), MODEL, job_of(federation__max_update_norm=2.001), 8, {"control": CONTROL})
    with pytest.raises(Dropped, match="too-far"):
        admit(reply(unit), MODEL, job_of(federation__max_update_norm=1.999), 8, {"control": CONTROL})


@pytest.mark.parametrize(("steps", "passes"), [(1, True), (4, True), (0, False), (5, False), (10**9, False)])
def test_fednova_takes_no_more_steps_than_the_job_has(steps: int, passes: bool) -> None:
    job = Job().replace(federation__correction="fednova", train__local_steps=4)
    run: Callable[[], object] = lambda: admit(reply(None, steps), MODEL, job, 8)  # noqa: E731
    if passes:
        run()
    else:
        with pytest.raises(Dropped, match="bad-weight"):
            run()


@pytest.mark.parametrize(("variance", "passes"), [(0.0, True), (-1e-6, False)])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_a_negative_variance_drops_the_reply_coded_or_not(codec: str, variance: float, passes: bool) -> None:
    before = {"w": torch.zeros(3), "norm.running_mean": torch.zeros(2), "norm.running_var": torch.ones(2)}
    after = before | {"norm.running_var": torch.tensor([1.0, variance])}
    job = Job().replace(federation__codec=codec)
    how, message = coding(job), reply(None)
    arrays = after if how is None else {CHANGE: torch.from_numpy(encode(before, after, how, 0))}
    message.content["arrays"] = ArrayRecord(arrays)  # type: ignore[arg-type]
    if passes:
        assert torch.equal(admit(message, before, job, 8).arrays["norm.running_var"], after["norm.running_var"])
    else:
        with pytest.raises(Dropped, match="bad-variance"):
            admit(message, before, job, 8)


def figures(**more: float) -> Message:
    answer = reply(None)
    answer.content["metrics"] = MetricRecord({"num-examples": 8, "images": 8, "steps": 1, **more})
    return answer


def test_a_loss_beyond_all_reason_weighs_like_the_largest_that_is_believed() -> None:
    job = Job().replace(federation__weighting="loss", federation__fairness=2.0)
    weights = [admit(figures(loss=loss), MODEL, job, 8).weight for loss in (8e3, 8e9, 1e200, 1e308)]
    assert weights == [8 * 1000.0**2] * 4
    with pytest.raises(Dropped, match="no-loss"):
        admit(figures(loss=math.inf), MODEL, job, 8)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -1.0])
def test_an_epsilon_or_a_time_that_is_none_is_not_told(value: float) -> None:
    told = admit(figures(loss=1.0, epsilon=value, seconds=value), MODEL, Job(), 8).told([])
    assert "epsilon" not in told
    assert "train_seconds" not in told


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        ({"n": 3, "loss": 4.5}, ""),
        ({"n": 2**63 - 1, "loss": 4.5}, "wrong-sums"),
        ({"n": 3, "loss": 1e200}, "wrong-sums"),
        ({"n": 3, "loss": math.inf}, "not-finite"),
        ({"n": -1, "loss": 4.5}, "not-finite"),
    ],
)
def test_sums_that_would_overflow_with_those_of_others_are_dropped(sums: Mapping[str, Any], reason: str) -> None:
    answer = reply(None)
    answer.content = RecordDict({"metrics": MetricRecord(dict(sums))})
    if not reason:
        assert admit_form(answer, {"n": 0, "loss": 0.0}) == sums
        return
    with pytest.raises(Dropped, match=reason):
        admit_form(answer, {"n": 0, "loss": 0.0})
