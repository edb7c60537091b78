"""The picture of docs/tasks/reconstruction.md: an autoencoder that learnt invented red cells sees white ones.

python -m benchmarks.reconstruction_picture docs/pictures/reconstruction.png

Above the image, in the middle as the model rebuilds it, below the squared error; four red cells, then four white ones.
Prints the mean squared error of each.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

import shared.tasks.reconstruction as task
from shared.cases import Sample
from shared.config import job_from_flat
from shared.imaging.dataset import Dataset, to_uint16
from shared.training import train

SIZE, STEPS, SHOWN, ENLARGED = 32, 400, 4, 3
CPU = torch.device("cpu")


def cell(generator: np.random.Generator, white: bool) -> np.ndarray:
    """A stained cell on a bright ground, float64 (3, SIZE, SIZE) in [0, 1]."""
    y, x = (np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2) / (SIZE / 2)
    angle, stretch = generator.uniform(0, np.pi), generator.uniform(0.9, 1.1)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    radius = np.hypot(u * stretch, v / stretch) / generator.uniform(0.75, 0.9)
    ground = np.array([0.92, 0.88, 0.90]) + generator.normal(0, 0.02, 3)
    body = np.array([0.80, 0.62, 0.70]) if white else np.array([0.85, 0.45, 0.50])
    pale = 0 if white else generator.uniform(0.4, 0.8) * np.exp(-((radius / generator.uniform(0.3, 0.5)) ** 2))
    cover = (radius < 1) * (1 - pale)
    image = ground[:, None, None] * (1 - cover) + (body + generator.normal(0, 0.02, 3))[:, None, None] * cover
    if white:
        lobes = np.zeros((SIZE, SIZE), bool)
        for _ in range(generator.integers(2, 5)):
            a, b = generator.uniform(-0.4, 0.4, 2)
            lobes |= np.hypot(x - a, y - b) < generator.uniform(0.22, 0.32)
        image[:, lobes] = (np.array([0.35, 0.15, 0.50]) + generator.normal(0, 0.02, 3))[:, None]
    image = np.stack([ndimage.gaussian_filter(plane, 0.8) for plane in image])
    clipped: np.ndarray = np.clip(image + generator.normal(0, 0.02, image.shape), 0, 1)
    return clipped


def main(path: str) -> None:
    """Train on invented red cells and write the picture."""
    torch.set_num_threads(1)
    flat = {"task": "reconstruction", "data.classes": "red,white", "data.channels": 3, "data.size": SIZE}
    more = {"model.name": "autoencoder", "model.width": 16, "model.latent": 16, "train.learning_rate": 0.002}
    job = job_from_flat(flat | more | {"federation.rounds": STEPS})
    generator = np.random.default_rng(0)
    known = [to_uint16(cell(generator, white=False)) for _ in range(600)]
    data = Dataset.of([Sample(str(k), (0,), str(k), "train") for k in range(len(known))], image=known)
    model = task.build_model(job)
    train(model, task, data, job, site="a", first_step=0, steps=STEPS, class_weights=[1.0])
    new = [to_uint16(cell(generator, white)) for white in (False, True) for _ in range(SHOWN)]
    samples = [Sample(str(k), (), str(k), "test") for k in range(len(new))]
    columns = []
    for found in task.predict(model, Dataset.of(samples, image=new), job, CPU):
        error = np.square(found.image - found.rebuilt).mean(0, keepdims=True) / 0.05
        columns.append(np.concatenate([found.image, found.rebuilt, np.repeat(error.clip(0, 1), 3, 0)], 1))
        print(f"{found.score:.5f}")
    sheet = np.rint(np.concatenate(columns, 2) * 255).astype(np.uint8)
    large = sheet.repeat(ENLARGED, 1).repeat(ENLARGED, 2)
    Image.fromarray(np.moveaxis(large, 0, -1)).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
