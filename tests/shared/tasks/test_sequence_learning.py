"""A sequence model learns order, is judged as scikit-learn would judge it, and says the same of cases in any batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, roc_auc_score

from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset
from shared.tasks import load_task
from shared.training import train

CPU = torch.device("cpu")
task = load_task("sequence")


def job(name: str, **more: Any) -> Job:
    small = {
        "task": "sequence",
        "model.name": name,
        "data.classes": "early,late",
        "data.size": 8,
        "model.width": 4,
        "model.hidden": 8,
        "train.batch_size": 16,
        "train.learning_rate": 0.01,
        "train.device": "cpu",
    }
    return job_from_flat(small | {key.replace("__", "."): value for key, value in more.items()})


def flashes(made: Job, n: int, seed: int) -> Dataset:
    """One step of each case is bright; early it is of the first class, late of the second. All steps together are
    alike in both classes, so are all numbers of steps."""
    generator = np.random.default_rng(seed)
    shape = (made.data.channels, 8, 8) if made.model.name.startswith("cnn") else (made.data.channels,)
    arrays, samples = [], []
    for number in range(n):
        steps = 6 + number // 2 % 4
        values = 0.2 * generator.random((steps, *shape))
        values[int(generator.integers(0, 2)) + (steps - 2) * (number % 2)] += 0.6
        arrays.append(values)
        samples.append(Sample(str(number), (number % 2,), str(number), "train"))
    if made.model.name.startswith("cnn"):
        return Dataset.of(samples, frames=[np.rint(65535 * values).astype(np.uint16) for values in arrays])
    return Dataset.of(samples, signal=[values.astype(np.float32) for values in arrays])


@pytest.mark.parametrize("name", ["cnn_gru", "cnn_lstm", "gru", "lstm"])
def test_the_place_in_time_is_learnt(name: str) -> None:
    made = job(name, federation__rounds=80)
    model = task.build_model(made)
    train(model, task, flashes(made, 64, 0), made, site="a", first_step=0, steps=80, class_weights=[1.0, 1.0])
    found = task.summarise(task.collect(model, flashes(made, 200, 1), made, CPU), made)
    assert found["auroc"].low > 0.95


@pytest.mark.parametrize("name", ["cnn_gru", "lstm"])
def test_figures_are_those_of_scikit_learn(name: str) -> None:
    made = job(name, evaluation__batch_size=7)
    torch.manual_seed(0)
    model, data = task.build_model(made), flashes(made, 200, 2)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # surer, so that scores spread
    found = task.summarise(task.collect(model, data, made, CPU), made)
    with torch.inference_mode():
        series, lengths, targets = task.batch(data, range(200), made, CPU, train=False)
        logits = model(series, lengths).double()
    truth, shares = [target[0] for target in targets], logits.softmax(1)[:, 1].numpy()
    assert found["auroc"].value == pytest.approx(roc_auc_score(truth, shares), abs=2e-3)
    assert found["accuracy"].value == accuracy_score(truth, logits.argmax(1))
    assert found["balanced_accuracy"].value == balanced_accuracy_score(truth, logits.argmax(1))
    assert found["loss"].value == pytest.approx(log_loss(truth, shares), rel=1e-5)
    assert found["auroc"].n == 200


def test_predictions_do_not_depend_on_the_batch() -> None:
    one, many = job("cnn_lstm", evaluation__batch_size=1), job("cnn_lstm", evaluation__batch_size=50)
    model, data = task.build_model(one), flashes(one, 12, 0)
    for alone, together in zip(task.predict(model, data, one, CPU), task.predict(model, data, many, CPU), strict=True):
        assert alone.classes == together.classes
        assert alone.probabilities == pytest.approx(together.probabilities, abs=1e-6)
        assert sum(alone.probabilities) == pytest.approx(1)


def test_a_loss_is_the_mean_over_cases_each_on_its_own() -> None:
    made = job("cnn_gru")
    model, data = task.build_model(made), flashes(made, 6, 0)
    whole = task.step(model, task.batch(data, range(6), made, CPU, train=False), made, [0.5, 2.0])
    alone = [task.step(model, task.batch(data, [k], made, CPU, train=False), made, [0.5, 2.0]) for k in range(6)]
    assert whole.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)


def test_several_labels_per_film() -> None:
    made = job("cnn_gru", data__multilabel=True, data__classes="a,b,c")
    data = flashes(made, 8, 0)
    samples = tuple(
        Sample(s.path, ((), (0,), (0, 2), (1,))[k % 4], s.patient, s.split) for k, s in enumerate(data.samples)
    )
    data = Dataset(data.columns, samples)
    model = task.build_model(made)
    weights = task.class_weights(task.count_classes(data, made), made)
    train(model, task, data, made, site="a", first_step=0, steps=2, class_weights=weights)
    found = task.summarise(task.collect(model, data, made, CPU), made)
    assert {"auroc", "auroc:a", "auroc:b", "auroc:c"} <= set(found)


def test_halved_precision_runs_and_stays_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.devices.has_bfloat16", lambda _: True)  # by way of float32, if need be
    made, half = job("cnn_gru"), job("cnn_gru", train__precision="bfloat16")
    data = flashes(made, 16, 0)
    losses = []
    for each in (made, half):
        model = task.build_model(each)
        done = train(model, task, data, each, site="a", first_step=0, steps=3, class_weights=[1.0, 1.0])
        losses.append(done.loss / done.images)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
