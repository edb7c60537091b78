"""What differential privacy costs: a DP-SGD step against a plain one on as many images, for each family of models.

python -m benchmarks.dp_overhead [REPEATS [FAMILY ...]]

Random images; plain and private steps take turns, so that what else the machine does falls on both. Every case is in
every step (sampling rate 1), so that both see the same number. Gives the median of the ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from client.privacy import train_privately
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset
from shared.tasks import load_task
from shared.tasks.segmentation.data import assemble
from shared.tasks.segmentation.models import patch_size
from shared.training import train

COMMON = {
    "privacy.dp": "local",
    "privacy.noise_multiplier": 1.0,
    "privacy.sampling_rate": 1.0,
    "privacy.batch_norm": "group",
    "train.class_weights": "none",
    "train.device": "cpu",
}


def _images(shape: tuple[int, ...], n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, (n, *shape)).astype(np.uint16)


def _labelled(job: Job, n: int) -> Dataset:
    samples = [Sample(str(k), (k % 2,), str(k), "train") for k in range(n)]
    return Dataset.of(samples, image=_images((1, job.data.size, job.data.size), n))


def _masked(job: Job, n: int) -> Dataset:
    size, rows = patch_size(job), []
    for image in _images((1, *size), n):
        rows.append(assemble(image, (image[0] > 60000).astype(np.uint8), np.ones(len(size)), size, job))
    samples = [Sample(str(k), (), str(k), "train") for k in range(n)]
    return Dataset.of(samples, **{name: [row[name] for row in rows] for name in rows[0]})


def _boxed(job: Job, n: int) -> Dataset:
    side = job.data.size
    box = float(side // 3)
    boxes = tuple((k % 2, k * box, k * box / 2, box, box) for k in range(3))
    samples = [Sample(str(k), (), str(k), "train", boxes=boxes) for k in range(n)]
    shape, dropped = np.full((n, 2), side, np.int64), np.zeros((n, 1), np.int64)
    return Dataset.of(samples, image=_images((job.data.channels, side, side), n), shape=shape, dropped=dropped)


def _signals(job: Job, n: int) -> Dataset:
    samples = [Sample(str(k), (k % 2,), str(k), "train") for k in range(n)]
    rng = np.random.default_rng(0)
    return Dataset.of(samples, signal=[rng.normal(size=(48, job.data.channels)).astype(np.float32) for _ in range(n)])


def _films(job: Job, n: int) -> Dataset:
    samples = [Sample(str(k), (k % 2,), str(k), "train") for k in range(n)]
    return Dataset.of(samples, frames=list(_images((12, 1, job.data.size, job.data.size), n)))


Maker = Callable[[Job, int], Dataset]
FAMILIES: dict[str, tuple[dict[str, object], int, Maker]] = {
    "cnn": ({"task": "classification", "model.name": "cnn", "data.size": 64}, 32, _labelled),
    "cnn, hooks": (
        {"task": "classification", "model.name": "cnn", "data.size": 64, "privacy.gradients": "hooks"},
        32,
        _labelled,
    ),
    "resnet18": ({"task": "classification", "model.name": "resnet18", "data.size": 64}, 16, _labelled),
    "resnet50, frozen": (
        {"task": "classification", "model.name": "resnet50", "data.size": 64, "model.freeze": "backbone"},
        16,
        _labelled,
    ),
    "unet": ({"task": "segmentation", "model.name": "unet", "data.size": 64, "model.width": 16}, 16, _masked),
    "unet3d": (
        {"task": "segmentation", "model.name": "unet3d", "data.size": 32, "data.depth": 32, "model.width": 8},
        4,
        _masked,
    ),
    **{
        name: ({"task": "detection", "model.name": name, "data.size": 128, "data.channels": 3}, 4, _boxed)
        for name in ("fasterrcnn_small", "fasterrcnn_mobilenet", "fasterrcnn_resnet50", "retinanet")
    },
    "autoencoder": ({"task": "reconstruction", "model.name": "autoencoder", "data.size": 32}, 32, _labelled),
    "dcgan": ({"task": "generation", "model.name": "dcgan", "data.size": 28, "model.width": 16}, 32, _labelled),
    "cnn_gru": ({"task": "sequence", "model.name": "cnn_gru", "data.size": 16, "model.width": 8}, 16, _films),
    "gru": ({"task": "sequence", "model.name": "gru", "data.channels": 3}, 32, _signals),
    "lstm": ({"task": "sequence", "model.name": "lstm", "data.channels": 3}, 32, _signals),
}


def measure(settings: dict[str, object], n: int, make: Maker, repeats: int) -> tuple[float, float]:
    """Seconds of a plain step, and the median of the ratios private / plain."""
    job = job_from_flat(COMMON | settings | {"train.batch_size": n, "federation.rounds": 100})
    task, data = load_task(job.task), make(job, n)
    weights = task.class_weights(task.count_classes(data, job), job)
    plain, private = task.build_model(job), task.build_model(job)
    plains, ratios = [], []
    for number in range(repeats + 1):
        started = time.process_time()
        train(plain, task, data, job, site="a", first_step=number, steps=1, class_weights=weights)
        between = time.process_time()
        train_privately(
            private, task, data, job, site="a", noise=1.0, first_step=number, steps=1, class_weights=weights
        )
        if number:  # the first warms up
            plains.append(between - started)
            ratios.append((time.process_time() - between) / plains[-1])
    return statistics.median(plains), statistics.median(ratios)


def main(repeats: int = 5, *names: str) -> None:
    """Print the table, of all families or of these."""
    torch.set_num_threads(1)
    print(f"{'model':20} {'batch':>5} {'plain step':>11} {'private / plain':>16}")
    for name in names or FAMILIES:
        settings, n, make = FAMILIES[name]
        seconds, ratio = measure(settings, n, make, repeats)
        print(f"{name:20} {n:5} {seconds * 1000:8.0f} ms {ratio:16.2f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
