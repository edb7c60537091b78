"""Every registered model of every task goes through the same checks, so that a new one needs no tests of its own.

Each task brings ``examples_<task>.py``: small settings for each of its models, data in memory, and a site with files.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.imaging.dataset import Column, Dataset, load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import TASKS, Sums, add_sums, load_task
from shared.training import make_optimizer, train
from shared.weights import digest, exchanged, exchanged_names, frozen_digest, home_names, put, trained_names
from simulations.simulate import run
from tests.conftest import by_size

HERE = Path(__file__).parent
CPU = torch.device("cpu")
# Which file of a task's folder gives which verb: the contract of shared/tasks/__init__.py.
VERBS = {
    "models.py": ("MODELS", "build_model", "check", "example", "head_prefix", "parts"),
    "data.py": ("batch", "decode", "decoded_by", "read_samples"),
    "learning.py": ("class_weights", "collect", "count_classes", "step"),
    "metrics.py": ("consistent", "summarise"),
    "predict.py": ("predict", "write"),
}


def examples(task: str) -> ModuleType:
    """The module ``examples_<task>.py`` beside this file."""
    path = HERE / f"examples_{task}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Case(NamedTuple):
    """A model with its small job, its task and the task's examples."""

    job: Job
    task: ModuleType
    examples: ModuleType

    def data(self, n: int = 6, seed: int = 0) -> Dataset:
        made: Dataset = self.examples.make(self.job, n, seed)
        return made


EVERY = [(task, name) for task in TASKS if (HERE / f"examples_{task}.py").exists() for name in load_task(task).MODELS]


def case(task: str, name: str, **more: Any) -> Case:
    module = examples(task)
    flat = {"task": task, "model.name": name, "train.device": "cpu"} | module.JOBS[name]
    job = job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})
    return Case(job, load_task(task), module)


@pytest.fixture(params=[pytest.param(one.values, marks=one.marks, id=one.id) for one in by_size(EVERY)])
def every(request: pytest.FixtureRequest) -> Case:
    return case(*request.param)


def test_every_task_has_the_same_verbs_in_the_same_files_and_every_model_an_example() -> None:
    for name in TASKS:
        task = load_task(name)
        for file, verbs in VERBS.items():
            module = importlib.import_module(f"shared.tasks.{name}.{file.removesuffix('.py')}")
            assert [verb for verb in verbs if getattr(task, verb) is not getattr(module, verb)] == [], (name, file)
        assert set(examples(name).JOBS) == set(task.MODELS), name


def test_equal_jobs_give_equal_weights_and_another_seed_gives_others(every: Case) -> None:
    first, again = (exchanged(every.task.build_model(every.job), every.job) for _ in range(2))
    assert digest(first) == digest(again)
    assert digest(exchanged(every.task.build_model(every.job.replace(seed=5)), every.job)) != digest(first)


def test_a_few_steps_lower_the_loss_on_a_fixed_batch(every: Case) -> None:
    """Each part of the model on its own: its loss must fall while the other parts stand still."""
    job, task = every.job, every.task
    data = every.data()
    weights = task.class_weights(task.count_classes(data, job), job)
    for part in task.parts(job):
        model = task.build_model(job).train()
        optimizer = make_optimizer(model, job, [part])
        for group in optimizer.param_groups:
            group["lr"] = min(1e-3, job.train.learning_rate)  # large networks overshoot
        before = fixed_loss(every, model, weights, part.prefix).item()
        for _ in range(4):
            optimizer.zero_grad()
            loss = fixed_loss(every, model, weights, part.prefix)
            loss.backward(inputs=optimizer.param_groups[0]["params"])
            optimizer.step()
        after = fixed_loss(every, model, weights, part.prefix).item()
        assert math.isfinite(before)
        assert after < before, (part, before, after)


def fixed_loss(every: Case, model: torch.nn.Module, weights: list[float], part: str) -> torch.Tensor:
    """The loss on the first images with the same patches, noise and proposals each time."""
    torch.manual_seed(1)
    batch = every.task.batch(every.data(), range(6), every.job, CPU, train=True)
    loss: torch.Tensor = every.task.step(model, batch, every.job, weights, part)
    return loss


def test_the_exchange_is_exact(every: Case) -> None:
    job = every.job
    model = every.task.build_model(job)
    train(model, every.task, every.data(), job, site="a", first_step=0, steps=1, class_weights=weights_of(every))
    sent = exchanged(model, job)
    other = every.task.build_model(job.replace(seed=9))
    put(other, sent, job)
    assert digest(exchanged(other, job)) == digest(sent)


def weights_of(every: Case) -> list[float]:
    found: list[float] = every.task.class_weights(every.task.count_classes(every.data(), every.job), every.job)
    return found


def halves(data: Dataset) -> Iterator[Dataset]:
    """The data in two parts, as two sites that know the same training images."""
    for rows in (range(len(data) // 3), range(len(data) // 3, len(data))):
        columns = {name: column.rows(list(rows)) for name, column in data.columns.items()}
        yield Dataset(columns, tuple(data.samples[i] for i in rows), origin=data)


def test_sums_of_split_data_give_the_metrics_of_the_whole(every: Case) -> None:
    job, task = every.job, every.task
    model = task.build_model(job)
    data = every.data(9)
    whole = task.collect(model, dataclasses.replace(data, origin=data), job, CPU)
    parts = [task.collect(model, half, job, CPU) for half in halves(data)]
    both = add_sums(parts)
    assert set(both) == set(whole)
    assert both["n"] == whole["n"] == len(data)
    assert all(task.consistent(sums, job) for sums in (whole, *parts))
    assert all(np.all(np.isfinite(values)) and np.all(np.asarray(values) >= 0) for values in whole.values())
    found, expected = task.summarise(both, job), task.summarise(whole, job)
    assert set(found) == set(expected)
    assert any(estimate.n for estimate in expected.values())
    for name, estimate in expected.items():
        assert found[name].n == estimate.n, name
        assert found[name].value == pytest.approx(estimate.value, rel=1e-4, abs=1e-6, nan_ok=True), name
        if estimate.n:
            assert estimate.low <= estimate.value <= estimate.high, name
    assert set(expected) >= {job.best_metric}
    known = TASKS[job.task]
    assert {name.partition(":")[0] for name in expected} <= set(known.metrics)
    # A site's own rules go by these: each is there, and what the job is said not to have has no case behind it.
    assert set(known.computed(job)) <= set(expected)
    assert all(
        not estimate.n for name, estimate in expected.items() if name in set(known.metrics) - set(known.computed(job))
    )


def test_no_data_gives_the_same_sums_all_empty(every: Case) -> None:
    job, task = every.job, every.task
    model = task.build_model(job)
    full, none = task.collect(model, every.data(), job, CPU), task.collect(model, Dataset.of(()), job, CPU)
    assert shapes(none) == shapes(full)
    assert none["n"] == 0
    assert len(task.count_classes(Dataset.of(()), job)) == len(task.count_classes(every.data(), job))
    task.summarise(none, job)


def shapes(sums: Sums) -> dict[str, tuple[object, ...]]:
    """Length and kind of number of every sum: what the server checks a reply against."""
    return {key: (np.shape(value), np.asarray(value).dtype.kind) for key, value in sums.items()}


def test_training_repeats_to_the_bit_and_depends_on_the_seed(every: Case) -> None:
    def trained(job: Job) -> str:
        model = every.task.build_model(every.job)
        train(model, every.task, every.data(), job, site="a", first_step=0, steps=1, class_weights=weights_of(every))
        return digest(exchanged(model, job))

    assert trained(every.job) == trained(every.job)
    assert trained(every.job) != trained(every.job.replace(seed=4))


def test_predictions_of_files_are_written(every: Case, tmp_path: Path) -> None:
    job, task = every.job, every.task
    site = read_site(every.examples.site(tmp_path / "site", job, "a", 4, 0))
    data = load_dataset(read_samples(site, job), site, job)
    bare = Dataset(data.columns, tuple(unlabelled(sample) for sample in data.samples))
    model = task.build_model(job)
    if hasattr(task, "generate"):
        with pytest.raises(UserError, match="consilium generate"):
            list(task.predict(model, bare, job, CPU))
        return
    (tmp_path / "out").mkdir()
    outcomes = list(zip(bare.samples, task.predict(model, bare, job, CPU), strict=True))
    written = task.write(outcomes, site, job, tmp_path / "out")
    assert written
    assert all(path.stat().st_size for path in written)


def unlabelled(sample: Sample) -> Sample:
    return dataclasses.replace(sample, target=(), boxes=(), mask="")


def test_the_network_can_be_exported_or_says_why_not(every: Case) -> None:
    entry = every.task.MODELS[every.job.model.name]
    model, inputs = every.task.build_model(every.job).eval(), every.task.example(every.job)
    assert all(isinstance(value, torch.Tensor) and len(value) == 1 for value in inputs)
    if entry.no_export:
        assert len(entry.no_export) > 20, "a reason, in words"
        return
    with torch.inference_mode():
        expected = model(*inputs)
    program = torch.export.export(model, inputs).module()
    found = program(*inputs)
    for a, b in itertools.zip_longest(flat(found), flat(expected)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for part in (value.values() if isinstance(value, dict) else value) for item in flat(part)]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), by_size(EVERY))
def test_every_model_trains_a_federated_round(task: str, name: str, tmp_path: Path) -> None:
    """Real files, real worker processes, the real server: two sites, one round, figures from both."""
    every = case(task, name, federation__rounds=1, evaluation__every=1, evaluation__reference_rounds=1)
    for number, site in enumerate(("a", "b")):
        every.examples.site(tmp_path / "data" / site, every.job, site, 12, number)
    result = run(every.job, tmp_path / "data", tmp_path / "out", workers=2)
    scores = result.scores["federated"]
    assert scores["gradient_steps"] == 2 * every.job.train.local_steps
    assert scores["dropped"] == []
    assert set(scores["sites"]) == {"a", "b"}
    assert scores["images"] == sum(part["images"] for part in scores["sites"].values()) > 0
    assert any(scores["n"].values())
    assert result.report.stat().st_size > 10_000


def test_a_column_of_a_data_set_is_what_was_put_in() -> None:
    arrays = [np.arange(6).reshape(2, 3), np.arange(4).reshape(4, 1)]
    column = Column.of(arrays)
    assert all(np.array_equal(column[i], array) for i, array in enumerate(arrays))


@pytest.mark.parametrize("local", ["norm", "head"])
def test_a_model_is_what_travels_and_what_stays_at_home(every: Case, local: str) -> None:
    """No name is lost or in both; of the layers without normalisation nothing stays under ``norm``."""
    if every.job.task == "generation":
        with pytest.raises(UserError, match="the whole generator"):
            every.job.replace(federation__local=local)
        return
    job = every.job.replace(federation__local=local)
    model = every.task.build_model(job)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.RNNBase, nn.ConvTranspose2d, nn.ConvTranspose3d)
    learns = {f"{path}.{key}" for path, m in model.named_modules() if isinstance(m, kinds) for key in m.state_dict()}
    if local == "norm" and set(model.state_dict()) <= learns:
        with pytest.raises(UserError, match="has no such layer"):
            exchanged_names(model, job)
        return
    travels, stays = exchanged_names(model, job), home_names(model, job)
    assert travels
    assert sorted([*travels, *stays]) == sorted(model.state_dict())
    assert set(trained_names(model, job)) <= set(travels)
    if local == "norm":
        assert set(stays) == set(model.state_dict()) - learns
    else:
        assert all(name.startswith(every.task.head_prefix(job)) for name in stays)
    assert frozen_digest(model, job) == ""
