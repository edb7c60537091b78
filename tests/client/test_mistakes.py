"""The mistakes that demonstrations of federated differential privacy make, and what fails here if one is made.

``MISTAKES`` names a test for each; those that had none elsewhere follow.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from client.app import app
from client.egress import Asked, Refused, records
from client.ledger import Entry, Ledger, ledger_path
from client.workspace import open_workspace
from server.store import read_events
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.tasks import TASKS, classification, load_task
from shared.weights import exchanged
from simulations.simulate import run
from tests.client.test_privacy import CPU, Case, some
from tests.conftest import write_site

MISTAKES = {
    "the buffers of BatchNorm leave": (
        "tests/client/test_privacy.py::test_batch_norm_is_refused_or_converted_and_frozen_it_stays",
        "tests/client/test_egress.py::test_under_dp_statistics_of_a_normalisation_leave_as_they_came_only",
        "tests/simulations/test_private.py::test_a_private_reply_tells_no_loss_no_count_and_no_statistics",
    ),
    "exact numbers of images as weights": (
        "tests/client/test_mistakes.py::test_one_image_fewer_changes_nothing_that_leaves_but_the_noised_model",
        "tests/client/test_counts.py::test_a_declared_number_stands_for_the_training_images",
    ),
    "figures of training leave without noise": (
        "tests/client/test_egress.py::test_under_dp_a_loss_that_the_client_would_send_does_not_leave",
        "tests/simulations/test_private.py::test_a_private_reply_tells_no_loss_no_count_and_no_statistics",
    ),
    "normalisation or class weights from the data": (
        "tests/client/test_mistakes.py::test_how_an_image_is_normalised_and_weighed_does_not_depend_on_the_others",
        "tests/shared/test_privacy_settings.py::test_settings_that_undo_privacy_are_one_line",
    ),
    "early stopping, or a learning rate, from private data": (
        "tests/client/test_mistakes.py::test_steps_and_learning_rates_do_not_depend_on_the_images",
        "tests/client/test_mistakes.py::test_rounds_steps_and_books_of_a_run_do_not_depend_on_the_images",
        "tests/client/test_mistakes.py::test_another_number_of_steps_than_the_jobs_does_not_leave",
        "tests/client/test_mistakes.py::test_the_budget_is_taken_before_an_image_is_looked_at",
    ),
    "an image as the unit where the patient is meant": (
        "tests/client/test_privacy.py::test_all_images_of_a_patient_together_are_one_unit",
        "tests/client/test_counts.py::test_a_job_that_grants_too_little_is_declined_whatever_is_asked",
    ),
    "an accountant that forgets between rounds or runs": (
        "tests/client/test_ledger.py::test_two_runs_cost_what_one_history_of_both_costs_and_what_an_independent_library_says",
        "tests/simulations/test_private.py::test_the_budget_outlives_runs_and_ends_them_for_one_site_alone",
    ),
    "batches of a fixed size, no empty ones, the last one dropped": (
        "tests/client/test_privacy.py::test_every_unit_is_drawn_by_its_own_coin_and_empty_draws_are_a_step",
    ),
    "random changes of an image that count as images": (
        "tests/client/test_mistakes.py::test_an_image_changed_at_random_has_one_contribution_within_the_bound",
    ),
    "a loss that couples the images of a batch": (
        "tests/client/test_privacy.py::test_no_case_has_a_part_in_anothers_loss",
        "tests/client/test_privacy.py::test_one_case_more_changes_the_sum_by_no_more_than_the_bound",
    ),
    "noise that a seed repeats": (
        "tests/client/test_privacy.py::test_the_noise_is_normal_and_as_large_as_said",
        "tests/simulations/test_private.py::test_the_noise_is_other_each_time_though_the_job_has_a_seed",
    ),
    "a delta that is no small one": (
        "tests/client/test_counts.py::test_a_job_that_grants_too_little_is_declined_whatever_is_asked",
    ),
}


@pytest.fixture(autouse=True)
def _sender() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_has_its_test(mistake: str, root: Path) -> None:
    for place in MISTAKES[mistake]:
        file, _, name = place.partition("::")
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place


# --- through the ClientApp --------------------------------------------------------------------------------------------


def private(job: Job, **more: Any) -> Job:
    settings: dict[str, Any] = {
        "privacy__dp": "local",
        "privacy__noise_multiplier": 1.0,
        "privacy__sampling_rate": 0.5,
        "privacy__delta": 1e-3,
        "train__class_weights": "none",
        "train__optimizer": "sgd",
        "train__learning_rate": 0.5,
    }
    return job.replace(**(settings | more))


def ask(kind: str, site: Path, job: Job) -> RecordDict:
    context = Context(7, 2, {"site": str(site)}, RecordDict(), dict(job.flat()))
    content = RecordDict({"config": ConfigRecord({"round": 1, "split": "test", "class-weights": [1.0, 1.0]})})
    if kind != "query":
        content["arrays"] = ArrayRecord(exchanged(load_task(job.task).build_model(job), job))  # type: ignore[arg-type]
    return app(Message(content, 2, kind), context).content


def test_one_image_fewer_changes_nothing_that_leaves_but_the_noised_model(tiny_job: Job, tmp_path: Path) -> None:
    job, replies = private(tiny_job), []
    for number, drop in enumerate((False, True)):
        site = write_site(tmp_path / str(number) / "a", "a", 24)
        site.write_text(site.read_text() + "[privacy]\nexact_counts = false\ndeclared_images = 12\n")
        if drop:
            table = site.parent / "labels.csv"
            lines = table.read_text().splitlines(keepends=True)
            lines.remove(next(line for line in lines if ",train" in line))
            table.write_text("".join(lines))
        replies.append([ask(kind, site, job) for kind in ("query", "train", "evaluate")])
    for whole, fewer in zip(*replies, strict=True):
        assert whole["status"]["ok"]
        assert set(whole) == set(fewer)
        for name in set(whole) - {"arrays"}:
            assert dict(whole[name]) == dict(fewer[name]), name  # type: ignore[arg-type]
    arrays = [{key: (value.dtype, value.shape) for key, value in each[1]["arrays"].items()} for each in replies]
    assert arrays[0] == arrays[1]


class Looked(Exception):
    """An image was asked for."""


def test_the_budget_is_taken_before_an_image_is_looked_at(
    tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reservation is on the disk when training asks for its first image; without budget it never asks."""
    site = write_site(tmp_path / "a", "a", 24)
    text, job, seen = site.read_text(), private(tiny_job, privacy__sampling_rate=1.0), []
    real = classification.batch

    def watched(*args: Any, **more: Any) -> Any:
        seen.append([entry.kind for entry in Ledger(ledger_path(site)).history()])
        return real(*args, **more)

    monkeypatch.setattr(classification, "batch", watched)
    site.write_text(text + "[privacy]\nmax_epsilon = 1000.0\nmax_delta = 1e-3\n")
    assert ask("train", site, job)["status"]["ok"]
    assert seen
    assert all(kinds == ["reserve"] for kinds in seen)
    seen.clear()
    site.write_text(text + "[privacy]\nmax_epsilon = 0.01\nmax_delta = 1e-3\n")
    assert ask("train", site, job)["status"]["code"] == "budget-spent"
    assert not seen


def test_another_number_of_steps_than_the_jobs_does_not_leave(tiny_job: Job, tmp_path: Path) -> None:
    job, site = private(tiny_job, train__local_steps=4), write_site(tmp_path / "a", "a", 24)
    workspace = open_workspace({"site": str(site)}, {}, job)
    arrays = ArrayRecord(exchanged(load_task(job.task).build_model(job), job))  # type: ignore[arg-type]
    asked = Asked(job, workspace, RecordDict({"arrays": arrays}))

    def reply(steps: int) -> RecordDict:
        metrics = MetricRecord({"num-examples": workspace.told["train"].images, "steps": steps, "epsilon": 1.0})
        return RecordDict({"arrays": arrays, "metrics": metrics})

    records("train", reply(4), asked)
    with pytest.raises(Refused, match="steps"):
        records("train", reply(3), asked)


def entries_of(folder: Path) -> list[tuple[object, ...]]:
    def plain(entry: Entry) -> tuple[object, ...]:
        return entry.kind, entry.round, entry.noise_multiplier, entry.sampling_rate, entry.steps, entry.epsilon

    return [plain(entry) for entry in Ledger(folder / ".consilium" / "ledger.sqlite").history()]


def test_rounds_steps_and_books_of_a_run_do_not_depend_on_the_images(tiny_job: Job, tmp_path: Path) -> None:
    """Once classes that are learnt at once, once labels by chance: as many rounds and steps, and the same is spent."""
    job, seen = private(tiny_job, federation__rounds=6, privacy__noise_multiplier=0.3), []
    for name in ("learnable", "chance"):
        for site in ("a", "b"):
            file = write_site(tmp_path / name / site, site, 48)
            table = file.parent / "labels.csv"
            if name == "chance":
                rows = [line.split(",") for line in table.read_text().splitlines()]
                for number, row in enumerate(rows[1:]):
                    row[1] = ("left", "right")[number // 3 % 2]
                table.write_text("".join(",".join(row) + "\n" for row in rows))
        result = run(job, tmp_path / name, tmp_path / f"run-{name}", workers=1, pages=False).scores["federated"]
        events = [event for event in read_events(tmp_path / f"run-{name}") if event["event"] == "round"]
        rounds = [
            [
                (row["site"], row["steps"], row["epsilon"])
                for row in sorted(event["trained"], key=lambda row: row["site"])
            ]
            for event in events
        ]
        books = [entries_of(tmp_path / f"run-{name}" / "sites" / site) for site in ("a", "b")]
        seen.append((rounds, books, result["gradient_steps"]))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 6
    assert seen[0][2] == 6 * 2 * job.train.local_steps
    assert len(seen[0][1][0]) == 12


# --- in DP-SGD itself -------------------------------------------------------------------------------------------------


@contextmanager
def rates() -> Iterator[list[float]]:
    """The learning rate of every step that a plain SGD makes while the block runs."""
    found: list[float] = []

    def note(optimizer: Optimizer, args: object, more: object) -> None:
        if type(optimizer) is torch.optim.SGD:
            found.append(optimizer.param_groups[0]["lr"])

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def test_steps_and_learning_rates_do_not_depend_on_the_images() -> None:
    """One easy data set, one by chance, and one of a single image that is hardly ever drawn: all by the job alone."""
    more = {"federation.rounds": 8, "train.local_steps": 1, "train.schedule": "cosine", "train.learning_rate": 0.5}
    wanted = [0.5 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(2, 8)]
    for n, seed, rate in ((12, 0, 1.0), (30, 1, 0.5), (1, 0, 1e-6)):
        case = Case("classification", "cnn", n=n, **more, **{"privacy.sampling_rate": rate})
        data = Dataset(case.data.columns, tuple(case.data.samples[(k * 7 + seed) % n] for k in range(n)))
        with rates() as found:
            outcome = case.train(case.model(), data, noise=0.5, first_step=2, steps=6)
        assert outcome.steps == 6
        assert found == pytest.approx(wanted)


def flat(value: object) -> list[Tensor]:
    """All tensors in a batch; numbers as tensors."""
    if isinstance(value, Tensor):
        return [value.double()]
    if isinstance(value, dict):
        return [each for key in sorted(value) for each in flat(value[key])]
    if isinstance(value, tuple | list):
        return [each for item in value for each in flat(item)]
    return [torch.tensor(float(value))] if isinstance(value, int | float) else []


@pytest.mark.parametrize("normalise", ["fixed", "image"])
@pytest.mark.parametrize("task", TASKS)
def test_how_an_image_is_normalised_and_weighed_does_not_depend_on_the_others(task: str, normalise: str) -> None:
    case = Case(task, next(iter(load_task(task).MODELS)), n=6, data__normalise=normalise)
    batches = []
    for data in (case.data, some(case.data, [0]), some(case.data, [0, 3, 5])):
        torch.manual_seed(3)
        batches.append(flat(case.task.batch(data, [0], case.job, CPU, train=True)))
        weights = case.task.class_weights(case.task.count_classes(data, case.job), case.job)
        assert set(weights) == {1.0}
    torch.manual_seed(3)
    together = flat(case.task.batch(case.data, [0, 3], case.job, CPU, train=True))
    assert torch.equal(together[0][0], batches[0][0][0]), "in a batch with another, as hooks take it"
    for other in batches[1:]:
        assert all(torch.equal(a, b) for a, b in zip(batches[0], other, strict=True))


def test_an_image_changed_at_random_has_one_contribution_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 0.01
    more = {"flip": "both", "rotate": 90.0, "shift": 0.2, "zoom": 0.3, "intensity": 0.5}
    case = Case(
        "classification", "cnn", n=1, privacy__sampling_rate=1.0, privacy__clipping_norm=bound,
        **{f"augment__{name}": value for name, value in more.items()},
    )  # fmt: skip
    asked = []
    real = case.task.batch
    monkeypatch.setattr(
        case.task, "batch", lambda data, rows, *args, **more: asked.extend(rows) or real(data, rows, *args, **more)
    )
    model = case.model()
    for step in range(5):
        before = [p.detach().clone() for p in case.parameters(model)]
        case.train(model, declared=1.0, first_step=step)
        moved = [a - p.detach() for a, p in zip(before, case.parameters(model), strict=True)]
        change = math.sqrt(sum(float(each.double().square().sum()) for each in moved))
        assert 0.5 * bound < change <= bound * 1.001
    assert asked == [0] * 5
