"""The device path: equal to the plain loop, in order, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shared.tasks.classification as classification
import shared.tasks.segmentation as segmentation
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.devices import (
    _ahead,
    ahead,
    autocast,
    compiled,
    cut,
    fused,
    has_bfloat16,
    seed_generators,
    to_device,
    tuned,
)
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Dataset
from shared.training import put_on, train

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RUN: dict[str, Any] = {"site": "a", "first_step": 0, "steps": 3, "class_weights": [1.0, 1.0]}


def job_of(**more: Any) -> Job:
    flat = {"data.size": 16, "model.width": 8, "train.batch_size": 7, "train.local_steps": 3, "federation.rounds": 2}
    return job_from_flat(flat | {"train.device": "cpu"} | {key.replace("__", "."): v for key, v in more.items()})


def data_of(n: int = 14) -> Dataset:
    images = np.random.default_rng(0).integers(0, 65536, (n, 1, 16, 16), dtype=np.uint16)
    return Dataset.of([Sample(str(k), (k % 2,), str(k), "train") for k in range(n)], image=images)


def trained(job: Job, model: nn.Module | None = None) -> tuple[dict[str, torch.Tensor], float]:
    model = model or classification.build_model(job)
    done = train(model, classification, data_of(), job, **RUN)
    return model.state_dict(), done.loss


# ---------------------------------------------------------------------- gradient accumulation


@given(st.integers(1, 200), st.integers(1, 250))
def test_parts_are_the_batch_in_order_and_nearly_equal(size: int, count: int) -> None:
    parts = cut(list(range(size)), job_of(train__accumulate=count))
    assert [index for part in parts for index in part] == list(range(size))
    assert len(parts) == min(size, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("parts", [2, 3, 7, 100])
def test_accumulated_gradients_are_those_of_the_large_batch(parts: int, optimizer: str) -> None:
    """Seven images in unequal parts; the same weights and the same loss to float tolerance. AdamW divides by the size
    of the gradient, which magnifies rounding where that is near zero: there the rate is the tolerance's scale."""
    job = job_of(train__optimizer=optimizer, train__learning_rate=0.01)
    whole, loss = trained(job)
    accumulated, same = trained(job.replace(train__accumulate=parts))
    assert same == pytest.approx(loss, rel=1e-5)
    for name, value in whole.items():
        assert torch.allclose(accumulated[name], value, atol=2e-6 if optimizer == "sgd" else 2e-3, rtol=1e-4), name


def test_accumulation_is_right_for_masks_too() -> None:
    flat = {"task": "segmentation", "model.name": "unet", "model.depth": 2, "data.classes": "nucleus", "data.size": 16}
    flat |= {"model.width": 4, "train.batch_size": 4, "train.optimizer": "sgd", "train.device": "cpu"}
    job = job_from_flat(flat)
    draw = np.random.default_rng(1)
    masks = draw.integers(0, 2, (4, 16, 16)).astype(np.uint8)
    data = Dataset.of(
        [Sample(str(k), (), str(k), "train") for k in range(4)],
        image=draw.integers(0, 65536, (4, 1, 16, 16), dtype=np.uint16),
        mask=masks,
        places=[np.zeros((0, 2), np.int32)] * 4,
        statistics=[np.array([[0.5, 0.25]], np.float32)] * 4,
    )
    found = []
    for parts in (1, 4):
        model = segmentation.build_model(job)
        train(model, segmentation, data, job.replace(train__accumulate=parts), **RUN | {"class_weights": [1.0]})
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, atol=1e-5, rtol=1e-4), name


def test_parts_of_one_image_are_refused_where_batches_are_normalised() -> None:
    job = job_of(model__name="resnet18", data__size=32, train__batch_size=4, train__accumulate=4)
    with pytest.raises(SiteRefusal) as refusal:
        train(classification.build_model(job), classification, data_of(), job, **RUN)
    assert refusal.value.code == "too-few-images"


@pytest.mark.parametrize("setting", [{"train__accumulate": 2}, {"train__compile": True}])
def test_under_dp_sgd_both_are_refused_with_what_to_set(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="set it so"):
        job_of(privacy__dp="local", privacy__epsilon=8.0, train__class_weights="none", **setting)


# ---------------------------------------------------------------------- batches beforehand


def test_batches_come_in_order_made_by_one_thread_one_ahead() -> None:
    made: list[tuple[int, int]] = []

    def make(number: int) -> int:
        made.append((number, threading.get_ident()))
        return number * number

    stream = _ahead(make, range(5))
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert [number for number, _ in made] == [0, 1]  # one ahead, no more
    assert list(stream) == [1, 4, 9, 16]
    assert len({thread for _, thread in made}) == 1
    assert made[0][1] != threading.get_ident()
    assert list(_ahead(make, ())) == []


def test_a_batch_that_cannot_be_made_fails_where_it_is_used() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise SiteRefusal("no-data", "gone")
        return number

    stream = _ahead(make, range(4))
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(SiteRefusal):
        next(stream)


def test_on_a_cpu_batches_are_made_when_they_are_asked_for() -> None:
    made = []
    stream = ahead(lambda number: made.append(number), range(3), CPU)  # type: ignore[func-returns-value]
    next(stream)
    assert made == [0]


@pytest.mark.parametrize("model", ["cnn"])
def test_training_with_batches_made_beforehand_is_the_same_to_the_bit(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(model__name=model, augment__flip="horizontal", augment__rotate=10.0)
    plain, loss = trained(job)
    monkeypatch.setattr("shared.training.ahead", lambda make, numbers, device: _ahead(make, numbers))
    beforehand, same = trained(job)
    assert same == loss
    assert all(torch.equal(beforehand[name], value) for name, value in plain.items())


# ---------------------------------------------------------------------- the device


@pytest.mark.parametrize("same", [True, False])
def test_a_gpus_flags_are_as_the_job_says_and_then_as_they_were(same: bool) -> None:
    """The flags are the process's and can be set without a GPU."""

    def flags() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        deterministic = torch.are_deterministic_algorithms_enabled()
        return deterministic, cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = flags()
    job = job_of(train__reproducible=same)

    def fails() -> None:
        with tuned(GPU, job):
            assert flags() == ((True, False, False, "highest") if same else (False, True, True, "high"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert flags() == before
    with tuned(CPU, job):
        assert flags() == before


def test_a_tensor_for_a_cpu_is_passed_on_and_laid_out() -> None:
    tensor = torch.randn(2, 3, 4, 5)
    assert to_device(tensor, CPU) is tensor
    assert to_device(tensor, CPU, torch.channels_last).is_contiguous(memory_format=torch.channels_last)


def test_only_floats_on_a_gpu_are_updated_in_one_kernel() -> None:
    assert not fused([torch.zeros(2)])
    assert not fused([])


@pytest.mark.parametrize(
    ("units", "has"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_bfloat16_is_for_processors_that_compute_in_it(
    units: dict[str, bool], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    has_bfloat16.cache_clear()
    try:
        for precision, kind in (("bfloat16", torch.bfloat16 if has else torch.float32), ("float32", torch.float32)):
            with autocast(torch.device("cpu"), job_of(train__precision=precision)):
                assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == kind
    finally:
        has_bfloat16.cache_clear()


def test_a_network_is_compiled_once_and_only_if_asked() -> None:
    model = nn.Linear(2, 2)
    assert compiled(model, job_of())._compiled_call_impl is None
    names = list(model.state_dict())
    first = compiled(model, job_of(train__compile=True))._compiled_call_impl
    assert first is not None
    assert compiled(model, job_of(train__compile=True))._compiled_call_impl is first
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tmp_path: Path) -> None:
    """In a process of its own, whose compiler's files go to a folder of its own."""
    code = (
        "from tests.shared.test_devices import *\n"
        "plain, loss = trained(job_of())\n"
        "fast, same = trained(job_of(train__compile=True))\n"
        "assert abs(same - loss) < 1e-3 * loss, (same, loss)\n"
        "assert all(torch.allclose(fast[name], value, atol=5e-3) for name, value in plain.items())\n"
    )
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=Path(__file__).parents[2])


# ---------------------------------------------------------------------- the script for a GPU machine

ALONE = """
import sys
REFUSED = {"flwr", "opacus", "pydicom", "client", "server", "simulations", "consilium", "sqlalchemy", "click", "ray"}
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError(name)
sys.meta_path.insert(0, Gone())
import torch
from benchmarks import gpu
torch.set_num_threads(1)
for row in gpu.ROWS:
    which = gpu.case(row, True, **{"train.precision": "bfloat16"})
    model = which.task.build_model(which.job)
    before = [value.clone() for value in model.state_dict().values()]
    gpu.product(which, model, 1)
    gpu.by_hand(which, model, 1)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.state_dict().values()))
assert gpu._private_row("U-Net 512²", True, 0.0).startswith("not measured")
"""


@pytest.mark.slow
def test_the_script_for_a_gpu_needs_torch_and_the_shared_folder_alone(root: Path) -> None:
    subprocess.run([sys.executable, "-c", ALONE], check=True, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"})


# ---------------------------------------------------------------------- seeds and places


@given(st.integers(0, 2**63 - 1))
def test_the_same_random_numbers_come_as_after_torchs_own_seed(seed: int) -> None:
    seed_generators(seed, CPU)
    found = torch.rand(3), torch.randn(3), torch.randperm(5)
    torch.manual_seed(seed)
    assert all(
        torch.equal(a, b) for a, b in zip(found, (torch.rand(3), torch.randn(3), torch.randperm(5)), strict=True)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU does torch put its seed off")
def test_training_leaves_no_seed_behind_for_a_device_that_is_not_there() -> None:
    before = len(torch.cuda._queued_calls)
    for _ in range(3):
        trained(job_of())
    assert len(torch.cuda._queued_calls) == before


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_a_model_in_its_place_is_not_moved_again_and_another_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classification.build_model(job_of(model__name=name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    put_on(model, CPU)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    moved: list[Any] = []
    monkeypatch.setattr(model, "to", lambda *args, **more: moved.append(args))
    put_on(model, CPU)
    assert not moved
    put_on(model, torch.device("meta"))
    assert moved
