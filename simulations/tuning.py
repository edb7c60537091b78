"""What a machine can do with a job: the largest batch that fits, the fastest precision, the best number of workers.

Everything is measured by training steps of the job's own network on its own images, each setting in a process of its
own, so that one that runs out of memory takes nothing with it.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shared.config import Job
from shared.devices import has_bfloat16
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Dataset, load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import load_task
from shared.training import pick_device, train
from simulations.sites import find_sites

MOST = 4096  # images in a batch: beyond this nobody gains
SECONDS = 2.0  # for which steps are repeated, at least; after one that is not counted
LIMIT = 300.0  # seconds for one measurement; slower is as good as not fitting
Say = Callable[[str], None]


class Speed(NamedTuple):
    """Images a second of all workers together, and bytes at the peak of one."""

    images: float
    memory: int


class Advice(NamedTuple):
    """What to set: the settings by key, the workers, and the largest batch that fits."""

    settings: dict[str, Any]
    workers: int
    largest: int

    def line(self) -> str:
        """As `consilium simulate` takes it."""
        words = [f"--set {key}={str(value).lower()}" for key, value in self.settings.items()]
        return " ".join([*words, f"--workers {self.workers}"])


def tune(job: Job, data: Path, out: Path, say: Say) -> Advice:
    """Measure and advise; ``out`` takes the decoded images.

    What is learnt stays the job's: a batch that does not fit is computed in parts (``train.accumulate``).

    Raises:
        UserError: no image to train on, or not even one fits.
    """
    images = _most_images(job, data, out)
    machine = "a GPU" if pick_device(job).type == "cuda" else "the CPU"
    say(f"{len(images)} training images at the largest site; {machine}, one thread a worker")
    precision, speed = _precision(job, images, say)
    job = job.replace(train__precision=precision)
    largest = _largest(job, images, say)
    fits = largest >= min(job.train.batch_size, len(images))  # no batch is larger than what there is
    private = job.privacy.dp in ("local", "distributed")  # which computes a batch in parts of its own
    parts = 1 if fits or private else -(-job.train.batch_size // largest)
    workers = _workers(job.replace(train__accumulate=parts), images, speed, say)
    return Advice({"train.precision": precision, "train.accumulate": parts}, workers, largest)


def _most_images(job: Job, data: Path, out: Path) -> Dataset:
    """The training images of the site that has most."""
    sites = [read_site(file, out / file.parent.name) for file in find_sites(data, job, out)]
    try:
        sets = [load_dataset(read_samples(site, job), site, job).subset("train") for site in sites]
    except SiteRefusal as refusal:
        raise UserError(f"--data {data}: {refusal}") from None
    images = max(sets, key=len)
    if not len(images):
        raise UserError(f"--data {data}: no training images; nothing can be measured")
    return images


def _precision(job: Job, data: Dataset, say: Say) -> tuple[str, Speed]:
    found: dict[str, Speed] = {}
    private = job.privacy.dp in ("local", "distributed")  # which needs float32
    half = not private and has_bfloat16(pick_device(job).type)
    for precision in ("float32", "bfloat16") if half else ("float32",):
        for size in _halved(job.train.batch_size):
            parts = -(-job.train.batch_size // size)
            setting = job.replace(train__precision=precision, train__accumulate=1 if private else parts)
            if speed := measure(setting, data):
                found[precision] = speed
                say(f"{precision}: {speed.images:.1f} images a second")
                break
    if not found:
        raise UserError("not even one image of this network fits into this machine's memory; choose smaller images")
    return max(found.items(), key=lambda item: item[1].images)


def _halved(size: int) -> Iterator[int]:
    while size:
        yield size
        size //= 2


def _largest(job: Job, data: Dataset, say: Say) -> int:
    """The largest power of two, or the whole site, that is computed at once without running out of memory."""
    size = fits = min(_least(job), len(data))
    while size <= min(MOST, 2 * len(data)):
        size = min(size, len(data))
        speed = measure(job.replace(train__batch_size=size, train__accumulate=1), data)
        if speed is None:
            say(f"batch {size}: does not fit, or takes longer than {LIMIT:.0f} s")
            break
        say(f"batch {size}: {speed.images:.1f} images a second, {speed.memory / 1e9:.2f} GB")
        fits = size
        if size == len(data):
            break
        size *= 2
    return fits


def _least(job: Job) -> int:
    """The fewest images that the network can be trained on at once: two where it normalises over a batch."""
    layers = load_task(job.task).build_model(job).modules()
    return 2 if any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in layers) else 1


def _workers(job: Job, data: Dataset, one: Speed, say: Say) -> int:
    """How many workers together are fastest: twice as many as long as that is a tenth faster."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best, workers = one.images, 1
    for count in [2**k for k in range(1, 10) if 2**k <= cores] + ([cores] if cores & (cores - 1) else []):
        speed = measure(job, data, count)
        if speed is None:
            break
        say(f"{count} workers: {speed.images:.1f} images a second")
        if speed.images < 1.1 * best:
            break
        best, workers = speed.images, count
    return workers


def measure(job: Job, data: Dataset, workers: int = 1) -> Speed | None:
    """Speed of ``workers`` processes that train side by side; None if one of them fails or is too slow."""
    context: Any = multiprocessing.get_context("spawn" if pick_device(job).type == "cuda" else "fork")
    import torch._dynamo  # noqa: F401  the first optimiser step imports it (1 s): once here, not in every process

    running = []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_steps, args=(theirs, job, data), daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    found: list[Speed] = []
    for process, pipe in running:
        try:
            if pipe.poll(LIMIT):
                told = pipe.recv()
                if isinstance(told, str):
                    raise UserError(f"{job.model.name}: a training step fails: {told}")
                found.append(Speed(*told))
        except (EOFError, OSError):  # it died, out of memory
            pass
        finally:
            process.kill()
            process.join()
            pipe.close()
    if len(found) < workers:
        return None
    return Speed(sum(speed.images for speed in found), max(speed.memory for speed in found))


def _steps(pipe: Connection, job: Job, data: Dataset) -> None:
    """Train for a while; tell images a second and the peak of memory, nothing if it runs out, else what fails."""
    torch.set_num_threads(1)
    task, device = load_task(job.task), pick_device(job)
    _stay_within_memory(device)
    model = task.build_model(job)
    weights = task.class_weights(task.count_classes(data, job), job)
    number, started, images = 0, 0.0, 0
    try:
        while not started or time.monotonic() - started < SECONDS:
            done = train(model, task, data, job, site="tune", first_step=number, steps=1, class_weights=weights)
            if started:
                images += done.images
            else:  # the first step loads kernels and fills caches
                started = time.monotonic()
            number += 1
    except (MemoryError, SiteRefusal):  # no memory, or parts of one image for a network that normalises over a batch
        return
    except RuntimeError as problem:  # torch's word for a CPU, and a GPU, that runs out of memory
        if "memory" not in str(problem) and "alloc" not in str(problem):
            pipe.send(str(problem).splitlines()[0])
        return
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    pipe.send((images / (time.monotonic() - started), used))


def _stay_within_memory(device: torch.device) -> None:
    """On a CPU an allocation beyond nine tenths of what is free fails here, instead of the machine running out."""
    if device.type == "cpu" and Path("/proc/meminfo").exists():
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(facts["MemAvailable"].split()[0]) * 1024
        own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = own + int(0.9 * free)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
