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

from shared.config import load_job
from shared.imaging.dataset import load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import add_sums, load_task
from shared.tasks.detection.metrics import summarise
from simulations.sites import find_sites
from simulations.trivial import box_sums, mean_boxes

SHOWN = ("map50", "map75", "map", "sensitivity_1fp")


def main(job_file: str, data: str) -> None:
    """Print the table."""
    job = load_job(job_file)
    load_task(job.task).check(job)
    with tempfile.TemporaryDirectory() as folder:
        sites = {site.name: site for site in map(read_site, find_sites(Path(data), job, Path(folder)))}
        decoded = {name: load_dataset(read_samples(site, job), site, job) for name, site in sites.items()}
        constant = mean_boxes([one.subset("train") for one in decoded.values()], job)
        found = {name: box_sums(one.subset("test"), job, *constant) for name, one in decoded.items()}
    print(f"{'site':<36}{'n':>5}" + "".join(f"{name:>17}" for name in SHOWN))
    for name, one in (found | {"all": add_sums(found.values())}).items():
        metrics = summarise(one, job)
        print(f"{name:<36}{one['n']:>5}" + "".join(f"{metrics[key].value:>17.3f}" for key in SHOWN))


if __name__ == "__main__":
    main(*sys.argv[1:3])
