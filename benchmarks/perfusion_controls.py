"""What of the perfusion cohort can be told without the order of time, and what with full knowledge of the lesion.

python -m benchmarks.perfusion_controls simulations/jobs/perfusion.toml COHORT

Trains the job's network, on all sites' films in one place, with as many gradient steps as the federation takes in all:
on whole films, on films whose frames are shuffled, on one frame (the middle one, the last one), and on the mean over
time. The weights with the best validation AUROC are tested, as in a run. The oracle is told where the lesion is and
when the agent arrived: its score is the slope of the lesion after the rise, relative to its brightness.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from shared.cases import derived_seed
from shared.config import Job, load_job
from shared.imaging.dataset import Dataset, concatenate, load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import load_task
from shared.training import train
from simulations.cohorts import perfusion
from simulations.sites import find_sites

STEPS = 100  # between validations
SETTLED = 0.4  # minutes after the arrival from which on the course is a line
CPU = torch.device("cpu")

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
CONTROLS: dict[str, Change] = {
    "whole films": lambda film, rng: film,
    "shuffled frames": lambda film, rng: film[rng.permutation(len(film))],
    "middle frame": lambda film, rng: film[len(film) // 2 :][:1],
    "last frame": lambda film, rng: film[-1:],
    "mean over time": lambda film, rng: np.rint(film.mean(0, keepdims=True)).astype(film.dtype),
}


def changed(data: Dataset, change: Change, seed: int) -> Dataset:
    """The films of a data set, each changed on its own; one case is always changed in the same way."""
    column = data.columns["frames"]
    films = [
        change(column[i], np.random.default_rng(derived_seed(seed, sample.id))) for i, sample in enumerate(data.samples)
    ]
    return Dataset.of(data.samples, frames=films)


def trained(parts: list[Dataset], job: Job) -> torch.nn.Module:
    """The network after pooled training, at its best validation."""
    task = load_task(job.task)
    whole = concatenate(parts)
    steps = job.federation.rounds * job.train.local_steps * len(parts)
    job = job.replace(federation__rounds=steps, train__local_steps=1)
    model: torch.nn.Module = task.build_model(job)
    moments: dict[str, torch.Tensor] | None = None
    best: tuple[float, dict[str, torch.Tensor]] = (-1.0, {})
    weights = task.class_weights(task.count_classes(whole.subset("train"), job), job)
    for first in range(0, steps, STEPS):
        count = min(STEPS, steps - first)
        moments = train(
            model,
            task,
            whole.subset("train"),
            job,
            site="pooled",
            first_step=first,
            steps=count,
            class_weights=weights,
            moments=moments,
        ).moments
        score = task.summarise(task.collect(model, whole.subset("val"), job, CPU), job)["auroc"].value
        if score > best[0]:
            best = score, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best[1])
    return model


def areas(parts: list[Dataset], job: Job) -> list[float]:
    """AUROC of the test cases of each site, of a network trained on all."""
    task, model = load_task(job.task), trained(parts, job)
    return [task.summarise(task.collect(model, part.subset("test"), job, CPU), job)["auroc"].value for part in parts]


def slope(exam: perfusion.Exam) -> float:
    """The oracle's score: the larger, the more the lesion washes out."""
    course = (exam.frames * exam.mask).sum((1, 2)) / exam.mask.sum()
    late = exam.times > exam.arrival + SETTLED
    rise = np.polyfit(exam.times[late], course[late], 1)[0]
    return float(-rise / (course[late].mean() - course[exam.times < exam.arrival].mean()))


def oracle(directory: Path, sites: int) -> list[float]:
    """AUROC of the slope, for the test cases of each site of the cohort in ``directory``."""
    seed, patients = perfusion.arguments(directory)
    found = []
    for number in range(sites):
        count = perfusion.counts(perfusion.scanner(number, seed), patients)["test"]
        exams = [perfusion.draw(number, "test", index, seed) for index in range(count)]
        found.append(roc_auc_score([exam.label == "washout" for exam in exams], [slope(exam) for exam in exams]))
    return found


def main(job_file: str, data: str) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    job = load_job(job_file)
    with tempfile.TemporaryDirectory() as folder:
        files = find_sites(Path(data), job, Path(folder))
        sites = [dataclasses.replace(read_site(file), cache=Path(folder) / "cache") for file in files]
        parts = [load_dataset(read_samples(site, job), site, job) for site in sites]
        print(f"{'':16} mean  [{' '.join(site.name for site in sites)}]")
        rows = {"oracle": lambda: oracle(Path(data), len(sites))} | {
            name: lambda change=change: areas([changed(part, change, job.seed) for part in parts], job)
            for name, change in CONTROLS.items()
        }
        for name, score in rows.items():
            found = score()
            print(f"{name:16} {np.mean(found):.3f} [{' '.join(f'{area:.3f}' for area in found)}]", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
