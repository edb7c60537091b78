"""Local training against loops written by hand, on any CUDA machine; without one in small, on the CPU.

python -m benchmarks.gpu [--seconds 5] [--small]

Needs torch, torchvision, numpy and safetensors beside the project's ``shared`` folder; with Opacus and the whole
project installed, DP-SGD too. Prints a table for benchmarks/RESULTS.md: each row the median of ratios of interleaved
runs and their range. Both sides do the same: same network, invented images, optimiser, precision, layout of memory.
Figures of a CPU say that the script works, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.devices import autocast, tuned
from shared.imaging.dataset import Dataset
from shared.tasks import load_task
from shared.training import make_optimizer, pick_device, put_on, set_mode, train

RUNS = 5
ROWS: dict[str, dict[str, Any]] = {
    "U-Net 512²": {
        "task": "segmentation", "model.name": "unet", "model.width": 32, "data.classes": "organ", "data.size": 512,
        "train.batch_size": 8,
    },
    "ResNet-50 224²": {"model.name": "resnet50", "data.channels": 3, "data.size": 224, "train.batch_size": 64},
    "Faster R-CNN 640": {
        "task": "detection", "model.name": "fasterrcnn_resnet50", "data.classes": "cell", "data.channels": 3,
        "data.size": 640, "train.batch_size": 8, "data.format": "coco",
    },
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "U-Net 512²": {"data.size": 32, "model.width": 4, "model.depth": 2, "train.batch_size": 2},
    "ResNet-50 224²": {"model.name": "resnet18", "data.size": 32, "train.batch_size": 2},
    "Faster R-CNN 640": {"model.name": "fasterrcnn_small", "data.size": 64, "train.batch_size": 2},
}


class Case(NamedTuple):
    """A network with its job and data."""

    job: Job
    task: ModuleType
    data: Dataset
    device: torch.device


def case(name: str, small: bool, **more: Any) -> Case:
    """A row of the table, ``more`` settings of its job."""
    common = {"train.class_weights": "none", "train.reproducible": False, "data.classes": "a,b", "federation.rounds": 1}
    job = job_from_flat(common | ROWS[name] | (SMALL[name] if small else {}) | more)
    return Case(job, load_task(job.task), images(job), pick_device(job))


def images(job: Job) -> Dataset:
    """Four batches of noise with what the task learns from."""
    count, side = 4 * job.train.batch_size, job.data.size
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 65536, (count, job.data.channels, side, side), dtype=np.uint16)
    if job.task == "segmentation":
        masks = draw.integers(0, 2, (count, side, side)).astype(np.uint8)
        samples = [Sample(str(k), (), str(k), "train") for k in range(count)]
        more = {
            "places": [np.zeros((0, 2), np.int32)] * count,
            "statistics": [np.array([[0.5, 0.25]], np.float32)] * count,
        }
        return Dataset.of(samples, image=pictures, mask=masks, **more)
    if job.task == "detection":
        boxed, columns = _boxed(count, side)
        return Dataset.of(boxed, image=pictures, **columns)
    return Dataset.of([Sample(str(k), (k % 2,), str(k), "train") for k in range(count)], image=pictures)


def _boxed(count: int, side: int) -> tuple[list[Sample], dict[str, Any]]:
    """Samples with eight boxes each, and the columns that go with them."""
    draw = np.random.default_rng(1)
    corners = draw.uniform(0, 0.7 * side, (count, 8, 2))
    boxes = [tuple((0, *map(float, corner), 0.25 * side, 0.25 * side) for corner in each) for each in corners]
    samples = [Sample(str(k), (), str(k), "train", boxes=each) for k, each in enumerate(boxes)]
    return samples, {"shape": [np.array([side, side])] * count, "dropped": [np.zeros(1, np.int64)] * count}


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product(which: Case, model: nn.Module, steps: int) -> None:
    """The project's own loop."""
    weights = [1.0] * len(which.job.classes)
    train(model, which.task, which.data, which.job, site="a", first_step=0, steps=steps, class_weights=weights)


def by_hand(which: Case, model: nn.Module, steps: int) -> None:
    """The loop as anyone would write it: batches in turn, made when they are needed."""
    job, device = which.job, which.device
    put_on(model, device)
    optimizer = make_optimizer(model, job, which.task.parts(job))
    set_mode(model, job)
    weights, size = [1.0] * len(job.classes), job.train.batch_size
    with tuned(device, job):  # the same kernels as ours
        for step in range(steps):
            chosen = [k % len(which.data) for k in range(step * size, (step + 1) * size)]
            batch = which.task.batch(which.data, chosen, job, device, train=True)
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, job):
                loss = which.task.step(model, batch, job, weights)
            loss.backward()
            optimizer.step()


def private(which: Case, model: nn.Module, steps: int) -> None:
    """DP-SGD, of which a step takes the same number of images on average."""
    from client.privacy import train_privately

    weights = [1.0] * len(which.job.classes)
    train_privately(
        model, which.task, which.data, which.job, site="a", noise=1.0, first_step=0, steps=steps, class_weights=weights
    )  # fmt: skip


Loop = Callable[[Case, nn.Module, int], None]


def seconds(loop: Loop, which: Case, model: nn.Module, steps: int) -> float:
    """For so many steps."""
    wait(which.device)
    started = time.perf_counter()
    loop(which, model, steps)
    wait(which.device)
    return time.perf_counter() - started


def ratios(one: tuple[Loop, Case], other: tuple[Loop, Case], least: float) -> tuple[list[float], float]:
    """Speeds of the first by those of the second in interleaved runs, and the first's images a second."""
    models = [side[1].task.build_model(side[1].job) for side in (one, other)]
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()), strict=False)
    sides = [(*one, models[0]), (*other, models[1])]
    slowest = max(seconds(*side, 2) / 2 for side in sides)  # loads kernels, and says how many steps fill the time
    steps = max(2, min(200, round(least / slowest)))
    times = [[seconds(*side, steps) for side in sides] for _ in range(RUNS)]
    speed = one[1].job.train.batch_size * steps / statistics.median(first for first, _ in times)
    return [second / first for first, second in times], speed


def told(found: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def together(small: bool, sites: int = 4) -> str:
    """Four sites on one device side by side, each a process of its own, by one process that plays them in turn."""
    context = torch.multiprocessing.get_context("spawn")
    steps = 2 if small else 40
    spans = []
    for players, each in ((sites, steps), (1, sites * steps)):
        barrier, queue = context.Barrier(players), context.Queue()
        running = [context.Process(target=_site, args=(barrier, queue, small, each)) for _ in range(players)]
        for process in running:
            process.start()
        edges = [queue.get(timeout=600) for _ in running]
        for process in running:
            process.join()
        spans.append(max(end for _, end in edges) - min(start for start, _ in edges))
    return f"{spans[1] / spans[0]:.2f}"


def _site(barrier: Any, queue: Any, small: bool, steps: int) -> None:
    torch.set_num_threads(1)
    which = case("ResNet-50 224²", small, **{"train.precision": "bfloat16"})
    model = which.task.build_model(which.job)
    product(which, model, 2)
    wait(which.device)
    barrier.wait()
    start = time.time()
    product(which, model, steps)
    wait(which.device)
    queue.put((start, time.time()))


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="least time of a run")
    parser.add_argument("--small", action="store_true", help="tiny networks; the only way without a GPU")
    asked = parser.parse_args()
    there = torch.cuda.is_available()
    small, least = asked.small or not there, asked.seconds if there else min(asked.seconds, 0.3)
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if there else "CPU, in small: no figure of a GPU is in this table"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {name}, torch {torch.__version__}\n")
    print("| network | images/s, bfloat16 | by a loop by hand | by float32 | DP-SGD step by a plain one, float32 |")
    print("|---|---|---|---|---|")
    for row in ROWS:
        half = case(row, small, **{"train.precision": "bfloat16"})
        full = case(row, small)
        hand, speed = ratios((product, half), (by_hand, half), least)
        gain, _ = ratios((product, half), (product, full), least)
        print(f"| {row} | {speed:.1f} | {told(hand)} | {told(gain)} | {_private_row(row, small, least)} |", flush=True)
    print(f"\nfour sites on one device side by side, by one after another: {together(small)}")


def _private_row(row: str, small: bool, least: float) -> str:
    """How many times longer a DP-SGD step takes; without Opacus or the client's code it is not measured."""
    try:
        import opacus  # noqa: F401

        import client.privacy  # noqa: F401
    except ImportError:
        return "not measured: needs Opacus and client/"
    dp = {"privacy.dp": "local", "privacy.noise_multiplier": 1.0, "privacy.sampling_rate": 0.25}
    try:
        which = case(row, small, **dp, **{"privacy.batch_norm": "group"})
        found, _ = ratios((product, case(row, small)), (private, which), least)
    except Exception as reason:  # a network that DP-SGD does not do, say
        return f"not possible: {type(reason).__name__}"
    return told(found)


if __name__ == "__main__":
    main()
