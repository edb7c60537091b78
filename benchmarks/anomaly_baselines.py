"""What tells anomalies without a network: the trivial scores that the reconstruction job is held against.

python -m benchmarks.anomaly_baselines simulations/jobs/anomaly.toml DATA [OUT]

Prints the AUROC, on the validation and on the test images, of each class of anomalies against the normal class: of the
area of the box in its picture (a crop rescales it away, so no network sees it), the variance of an image, its distance
from the mean of the normal training images, and its distance from their first 32 principal components. Mean and
components are of all sites' images in one place.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from shared.config import Job, load_job
from shared.imaging.dataset import Dataset, load_dataset
from shared.intervals import area_under_roc
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks.reconstruction.metrics import normal_class
from simulations.sites import find_sites

COMPONENTS = 32
Score = Callable[[Dataset, np.ndarray], np.ndarray]  # of a data set and its images (n, values) in [0, 1], one per image


def images(data: Dataset) -> np.ndarray:
    """(n, values) in [0, 1]."""
    return data.columns["image"].take(range(len(data))).reshape(len(data), -1) / np.float32(65535)


def scores(train: np.ndarray) -> dict[str, Score]:
    """The trivial scores; ``train`` are the normal training images of all sites (n, values)."""
    components = PCA(COMPONENTS, svd_solver="randomized", random_state=0).fit(train)
    mean = train.mean(0)

    def area(data: Dataset, pixels: np.ndarray) -> np.ndarray:
        return np.array([sample.box[2] * sample.box[3] if sample.box else 0.0 for sample in data.samples])

    def residual(data: Dataset, pixels: np.ndarray) -> np.ndarray:
        rebuilt = components.inverse_transform(components.transform(pixels))
        return np.asarray(np.square(pixels - rebuilt).mean(1))

    return {
        "box area": area,
        "variance": lambda data, pixels: pixels.var(1),
        "distance from the mean image": lambda data, pixels: np.square(pixels - mean).mean(1),
        f"PCA, {COMPONENTS} components": residual,
    }


def table(name: str, score: Score, parts: dict[str, Dataset], job: Job) -> str:
    """A line: AUROC of each class of anomalies, all sites together with its interval and site by site."""
    normal = normal_class(job)
    values = {site: score(data, images(data)) for site, data in parts.items()}
    classes = {site: np.array([sample.target[0] for sample in data.samples]) for site, data in parts.items()}
    cells = []
    for k, anomaly in enumerate(job.classes):
        if k == normal:
            continue
        chosen = {site: np.isin(kinds, (k, normal)) for site, kinds in classes.items()}
        truth = np.concatenate([classes[site][chosen[site]] == k for site in parts])
        area = float(roc_auc_score(truth, np.concatenate([values[site][chosen[site]] for site in parts])))
        whole = area_under_roc(area, int(truth.sum()), int((~truth).sum()))
        own = [
            f"{roc_auc_score(classes[site][chosen[site]] == k, values[site][chosen[site]]):.3f}"
            if (classes[site] == k).any()
            else "-"
            for site in parts
        ]
        cells.append(f"{anomaly} {whole.value:.3f} ({whole.low:.3f}-{whole.high:.3f}) [{' '.join(own)}]")
    return f"{name:30} {'   '.join(cells)}"


def main(job_file: Path, data: Path, out: Path) -> None:
    """Print the table of each split."""
    job = load_job(job_file)
    sites = [read_site(file) for file in find_sites(data, job, out)]
    found = {site.name: load_dataset(read_samples(site, job), site, job) for site in sites}
    train = np.concatenate([images(whole.subset("train")) for whole in found.values()])
    print(f"{len(train)} normal training images; sites: {', '.join(found)}")
    for split in ("val", "test"):
        print(split)
        parts = {name: whole.subset(split) for name, whole in found.items()}
        for name, score in scores(train).items():
            print(" ", table(name, score, parts, job))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3] if len(sys.argv) > 3 else work))
