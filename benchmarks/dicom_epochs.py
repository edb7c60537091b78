"""Epochs on DICOM files after the first, against the same pictures as tensors that lie in memory.

    python -m benchmarks.dicom_epochs [--patients 300] [--epochs 7]

An invented hospital of DICOM files. Ours is a site's training as in a round, without augmentation, from the cache of
decoded images; the other is a loop by hand over float32 tensors that were normalised beforehand, with the same network,
loss, optimiser and batches. Epochs in turn; the ratio is the speed of ours to the loop's, pair by pair.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from shared.cases import derived_seed
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset, load_dataset, to_float
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import load_task
from shared.training import batch_indices, train
from simulations.cohorts.chest import make

LIMIT = 0.9  # of the loop's speed
CASES = {"cnn, 64 x 64": ("cnn", 64), "resnet18, 128 x 128": ("resnet18", 128)}


def job_of(model: str, size: int) -> Job:
    """A plain job on the cohort's images."""
    settings: dict[str, str | int | float | bool] = {"data.classes": "normal,opacity", "data.size": size}
    settings |= {"model.name": model, "train.optimizer": "sgd", "train.learning_rate": 0.01, "train.batch_size": 32}
    return job_from_flat(settings | {"train.class_weights": "none", "train.schedule": "constant"})


def ours(model: nn.Module, data: Dataset, job: Job, epoch: int, steps: int) -> None:
    """An epoch as a site trains it."""
    first = epoch * steps
    train(model, load_task(job.task), data, job, site="a", first_step=first, steps=steps, class_weights=[1.0, 1.0])


def by_hand(model: nn.Module, images: torch.Tensor, classes: torch.Tensor, job: Job, epoch: int, steps: int) -> None:
    """The same steps on tensors."""
    rate, momentum, decay = job.train.learning_rate, job.train.momentum, job.train.weight_decay
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum, weight_decay=decay, nesterov=True)
    model.to(memory_format=torch.channels_last).train()
    for step in range(epoch * steps, (epoch + 1) * steps):
        chosen = batch_indices(len(images), job.train.batch_size, step, derived_seed(job.seed, "a"))
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images[chosen]), classes[chosen]).backward()
        optimizer.step()


def seconds(work: Callable[[], None]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def compare(name: str, job: Job, folder: Path, epochs: int) -> float:
    """Print a row; gives the median ratio."""
    site = read_site(folder / "site.toml")
    samples = read_samples(site, job)
    first = seconds(lambda: len(load_dataset(samples, site, job)))
    data = load_dataset(samples, site, job).subset("train")
    steps = max(len(data) // job.train.batch_size, 1)
    images = to_float(data.columns["image"].take(range(len(data)))).sub_(0.5).div_(0.25)
    images, classes = images.to(memory_format=torch.channels_last), torch.tensor([s.target[0] for s in data.samples])
    models = [load_task(job.task).build_model(job) for _ in range(2)]
    ratios = []
    for epoch in range(epochs + 1):
        mine = seconds(lambda epoch=epoch: ours(models[0], data, job, epoch, steps))  # type: ignore[misc]
        other = seconds(lambda epoch=epoch: by_hand(models[1], images, classes, job, epoch, steps))  # type: ignore[misc]
        if epoch:  # the first of each warms up
            ratios.append(other / mine)
    median = statistics.median(ratios)
    print(f"| {name} | {len(data)} | {first:.1f} | {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |", flush=True)
    return median


def main() -> None:
    """Make the hospital, train both ways, and say whether ours keeps up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--patients", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary), sites=1, patients=given.patients)
        (file,) = Path(temporary).glob("*/site.toml")
        print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print("| network | training images | decoding all, once, s | speed, of tensors in memory |\n|---|---|---|---|")
        worst = min(compare(name, job_of(*case), file.parent, given.epochs) for name, case in CASES.items())
    raise SystemExit(worst < LIMIT)


if __name__ == "__main__":
    main()
