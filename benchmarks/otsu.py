"""The trivial baseline of a segmentation job of bright or dark objects: Otsu's threshold of each image on its own.

python -m benchmarks.otsu simulations/jobs/nuclei.toml ../shared/data/nuclei_dsb2018

Nothing is learnt. The side of the threshold with fewer pixels is the foreground, its connected parts are the objects.
Prints the same metrics as a run, on the same test images, site by site.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from shared.config import Job, load_job
from shared.imaging.dataset import Dataset, load_dataset, to_float
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import Sums, add_sums, load_task
from shared.tasks.segmentation.measures import find_objects, match_objects, overlap
from shared.tasks.segmentation.metrics import Tally, summarise
from simulations.sites import find_sites

SHOWN = ("dice", "iou", "dice_pooled", "instance_f1", "aji")
BINS = 256


def otsu(image: np.ndarray) -> float:
    """The threshold that parts grey values into the two classes of largest variance between them (Otsu 1979)."""
    counts, edges = np.histogram(image, BINS)
    middles = (edges[1:] + edges[:-1]) / 2
    below, mass = np.cumsum(counts), np.cumsum(counts * middles)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(edges[1:][np.argmax(np.nan_to_num(between))])


def segment(image: np.ndarray) -> np.ndarray:
    """The minority side of the threshold, bool."""
    mask: np.ndarray = image > otsu(image)
    return ~mask if mask.mean() > 0.5 else mask


def sums(data: Dataset, job: Job) -> Sums:
    """What ``collect`` gives of a network, without a loss."""
    tally = Tally(job)
    for index in range(len(data)):
        mask = np.asarray(data.columns["mask"][index])
        found = segment(to_float(data.columns["image"][index]).mean(0).numpy())
        objects = match_objects(find_objects(found), mask) if job.data.masks == "instances" else None
        tally.add(0.0, overlap(found.astype(np.int64), (mask > 0).astype(np.int64), 1), [], objects)
    return tally.sums


def main(job_file: str, data: str) -> None:
    """Print the table."""
    job = load_job(job_file)
    load_task(job.task).check(job)
    print(f"{'site':<36}{'n':>5}" + "".join(f"{name:>14}" for name in SHOWN))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for file in find_sites(Path(data), job, Path(folder)):
            site = read_site(file)
            tested = load_dataset(read_samples(site, job), site, job).subset("test")
            found[site.name] = sums(tested, job)
    for name, one in (found | {"all": add_sums(found.values())}).items():
        metrics = summarise(one, job)
        print(f"{name:<36}{one['n']:>5}" + "".join(f"{metrics[key].value:>14.3f}" for key in SHOWN if key in metrics))


if __name__ == "__main__":
    main(*sys.argv[1:3])
