"""Small sequence jobs, data and sites: what is bright at first or at last. Cases differ in length."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from shared.cases import Sample
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.tasks.sequence.models import reads_frames

COMMON = {"data.classes": "falling,rising", "train.batch_size": 4, "train.local_steps": 1, "model.hidden": 8}
FILM, SIGNAL = {"data.size": 8, "model.width": 4}, {"data.channels": 3}
JOBS: dict[str, dict[str, object]] = {
    "cnn_gru": COMMON | FILM,
    "cnn_lstm": COMMON | FILM,
    "gru": COMMON | SIGNAL,
    "lstm": COMMON | SIGNAL,
}


def courses(job: Job, n: int, seed: int) -> list[np.ndarray]:
    """Arrays in [0, 1], (t, height, width) or (t, leads): even ones grow dark, odd ones bright, in 4 to 6 steps."""
    generator = np.random.default_rng(seed)
    shape = (job.data.size, job.data.size) if reads_frames(job) else (job.data.channels,)
    found = []
    for number in range(n):
        steps = 4 + number % 3
        course = np.linspace(0, 1, steps) if number % 2 else np.linspace(1, 0, steps)
        noise = generator.random((steps, *shape))
        found.append(0.5 * noise + 0.5 * course.reshape(-1, *[1] * len(shape)))
    return found


def split(number: int) -> str:
    """Two train, one val, one test, by turns of two."""
    return ("train", "train", "val", "test")[number // 2 % 4]


def make(job: Job, n: int, seed: int = 0) -> Dataset:
    """``n`` cases in memory."""
    samples = [Sample(str(k), (k % 2,), str(k), split(k)) for k in range(n)]
    found = courses(job, n, seed)
    if not reads_frames(job):
        return Dataset.of(samples, signal=[course.astype(np.float32) for course in found])
    films = [np.repeat(np.rint(course * 65535).astype(np.uint16)[:, None], job.data.channels, 1) for course in found]
    return Dataset.of(samples, frames=films)


def site(folder: Path, job: Job, name: str, n: int, seed: int = 0) -> Path:
    """``n`` folders of PNG frames, or CSV files, with a labels.csv; gives the site.toml."""
    folder.mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for number, course in enumerate(courses(job, n, seed)):
            path = f"case-{number}" if reads_frames(job) else f"case-{number}.csv"
            if reads_frames(job):
                (folder / path).mkdir()
                for step, frame in enumerate(course):
                    Image.fromarray(np.rint(frame * 255).astype(np.uint8)).save(folder / path / f"{step}.png")
            else:
                np.savetxt(folder / path, course, delimiter=",")
            rows.writerow([path, ("falling", "rising")[number % 2], split(number)])
    (folder / "site.toml").write_text(f'name = "{name}"\n')
    return folder / "site.toml"
