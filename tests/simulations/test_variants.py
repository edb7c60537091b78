"""One short federation for each kind of job: BatchNorm, frozen backbones, several labels, other optimisers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.config import Job
from shared.tasks import load_task
from simulations.simulate import run

VARIANTS: dict[str, dict[str, str | int | float | bool]] = {
    "BatchNorm": {"model__name": "resnet18", "data__size": 32},
    "frozen backbone": {"model__name": "resnet18", "data__size": 32, "model__freeze": "backbone"},
    "several labels": {"data__multilabel": True},
    "sgd, fresh each round": {"train__optimizer": "sgd", "train__keep_optimizer": False},
    "bfloat16": {"train__precision": "bfloat16"},
    "each image normalised, colour": {"data__normalise": "image", "data__channels": 3, "augment__colour": 0.3},
    "invented sites": {"data__partition": "dirichlet", "data__partition_sites": 2, "data__partition_alpha": 5.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_federation_of_this_kind_trains_and_is_judged(
    variant: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    job = tiny_job.replace(federation__rounds=2, train__local_steps=1, **VARIANTS[variant])
    result = run(job, three_sites, tmp_path / "o")
    federated = result.scores["federated"]
    assert federated["dropped"] == []
    assert federated["rounds"] == 2
    assert 0 <= federated["auroc"] <= 1
    assert federated["n"]["accuracy"] == sum(place["n"]["accuracy"] for place in federated["sites"].values())
    assert result.report.stat().st_size > 10_000
    before = load_task(job.task).build_model(job).state_dict()
    after = load_file(tmp_path / "o" / "last.safetensors")
    trained = {name for name in after if not torch.equal(after[name], before[name])}
    if variant == "frozen backbone":
        assert set(after) == {"fc.weight", "fc.bias"} == trained
    else:
        assert set(after) == set(before)
        assert trained
    if variant == "BatchNorm":
        counters = {name: value for name, value in after.items() if name.endswith("num_batches_tracked")}
        assert {value.dtype for value in counters.values()} == {torch.int64}
        assert {value.item() for value in counters.values()} == {2}  # one batch a round at every site
        assert all((after[name] >= 0).all() for name in after if name.endswith("running_var"))
