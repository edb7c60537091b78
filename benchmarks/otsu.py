"""The trivial baseline of a segmentation job of bright or dark objects: Otsu's threshold of each image on its own.

python -m benchmarks.otsu simulations/jobs/nuclei.toml ../shared/data/nuclei_dsb2018

Nothing is learnt. The side of the threshold with fewer pixels is the foreground, its connected parts are the objects.
Prints the same metrics as a run, on the same test images, site by site.
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
from shared.tasks.segmentation.metrics import summarise
from simulations.sites import find_sites
from simulations.trivial import threshold_sums

SHOWN = ("dice", "iou", "dice_pooled", "instance_f1", "aji")


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
            found[site.name] = threshold_sums(tested, job)
    for name, one in (found | {"all": add_sums(found.values())}).items():
        metrics = summarise(one, job)
        print(f"{name:<36}{one['n']:>5}" + "".join(f"{metrics[key].value:>14.3f}" for key in SHOWN if key in metrics))


if __name__ == "__main__":
    main(*sys.argv[1:3])
