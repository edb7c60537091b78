"""The trivial baseline of a detection job: in every image the mean box of each class of the training images.

python -m benchmarks.mean_box simulations/jobs/lungs-detection.toml ../shared/data/cxr_lung_boxes_ccby

Nothing is looked at. The mean is that of all sites' training boxes, in the fitted image. Its score says nothing, but
average precision needs an order of the images: it is drawn at random. Prints the same metrics as a run, on the same
test images, site by site.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from shared.config import Job, load_job
from shared.imaging.dataset import Dataset, load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import Sums, add_sums, load_task
from shared.tasks.detection.data import truth
from shared.tasks.detection.metrics import Tally, summarise
from simulations.sites import find_sites

SHOWN = ("map50", "map75", "map", "sensitivity_1fp")


def mean_boxes(data: list[Dataset], job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Mean training box (k, 4) of each class that has one, and the classes."""
    found = [truth(part, i, job) for part in data for i in range(len(part))]
    boxes = np.concatenate([item.boxes for item in found])
    classes = np.concatenate([item.classes for item in found])
    kinds = np.unique(classes)
    return np.stack([boxes[classes == k].mean(0) for k in kinds]), kinds


def sums(data: Dataset, job: Job, boxes: np.ndarray, classes: np.ndarray) -> Sums:
    """What ``collect`` gives of a network."""
    tally, generator = Tally(len(job.classes)), np.random.default_rng(0)
    for i in range(len(data)):
        own = truth(data, i, job)
        scores = np.full(len(boxes), generator.random())
        tally.add(data.samples[i].id, own.boxes, own.classes, boxes, classes, scores)
    return tally.sums()


def main(job_file: str, data: str) -> None:
    """Print the table."""
    job = load_job(job_file)
    load_task(job.task).check(job)
    with tempfile.TemporaryDirectory() as folder:
        sites = {site.name: site for site in map(read_site, find_sites(Path(data), job, Path(folder)))}
        decoded = {name: load_dataset(read_samples(site, job), site, job) for name, site in sites.items()}
        constant = mean_boxes([one.subset("train") for one in decoded.values()], job)
        found = {name: sums(one.subset("test"), job, *constant) for name, one in decoded.items()}
    print(f"{'site':<36}{'n':>5}" + "".join(f"{name:>17}" for name in SHOWN))
    for name, one in (found | {"all": add_sums(found.values())}).items():
        metrics = summarise(one, job)
        print(f"{name:<36}{one['n']:>5}" + "".join(f"{metrics[key].value:>17.3f}" for key in SHOWN))


if __name__ == "__main__":
    main(*sys.argv[1:3])
