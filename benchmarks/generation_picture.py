"""The picture of docs/tasks/generation.md: images of a cohort of phantoms, and what a federated generator made of them.

consilium cohort make /tmp/cohort --patients 240
consilium simulate simulations/jobs/pneumonia-gan.toml --data /tmp/cohort --out /tmp/run --set data.format=auto \
    --set data.classes=normal,opacity --set data.size=32 --set data.partition=site
python -m benchmarks.generation_picture /tmp/run /tmp/cohort docs/pictures/generation.png

Left the phantoms, a site in each pair of columns, right the samples of the run's best round; a class in each half of
the rows.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from consilium.trained import open_run
from shared.config import Job
from shared.imaging.dataset import load_dataset, to_float
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks.generation import generate
from simulations.sites import find_sites

ROWS, PAIRS, ENLARGED, GAP = 4, 3, 2, 12


def real(data: Path, job: Job) -> np.ndarray:
    """uint8 (rows, columns, size, size): two training images of each of the first sites in each row."""
    columns = []
    with tempfile.TemporaryDirectory() as name:
        for file in find_sites(data, job, Path(name))[:PAIRS]:
            site = read_site(file)
            known = load_dataset(read_samples(site, job), site, job).subset("train")
            chosen = []
            for kind in range(2):
                chosen += [k for k, sample in enumerate(known.samples) if sample.target == (kind,)][:ROWS]
            images = to_float(known.columns["image"].take(chosen))[:, 0]
            columns.append((images * 255).round().byte().numpy().reshape(ROWS, 2, *images.shape[1:]))
    return np.concatenate(columns, 1)


def sheet(cells: np.ndarray) -> np.ndarray:
    """(rows, columns, size, size) as one picture with white lines between."""
    large = cells.repeat(ENLARGED, 2).repeat(ENLARGED, 3)
    framed = np.pad(large, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=255)
    return framed.transpose(0, 2, 1, 3).reshape(framed.shape[0] * framed.shape[2], -1)


def main(run: str, data: str, out: str) -> None:
    """Write the picture."""
    torch.set_num_threads(1)
    trained = open_run(Path(run), device="cpu")
    made = list(generate(trained.model, trained.job, ROWS * PAIRS * 2, seed=0))
    kinds = [[picture for name, picture in made if name == kind] for kind in trained.job.classes]
    cells = np.stack([picture for kind in kinds for picture in kind]).reshape(ROWS, PAIRS * 2, *made[0][1].shape)
    left, right = sheet(real(Path(data), trained.job)), sheet(cells)
    gap = np.full((len(left), GAP), 255, np.uint8)
    Image.fromarray(np.concatenate([left, gap, right], 1)).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
