"""The picture of docs/tasks/segmentation.md: a small U-Net that learnt invented nuclei, and what it finds in two more.

python -m benchmarks.segmentation_picture docs/pictures/segmentation.png
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

import shared.tasks.segmentation as task
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset
from shared.imaging.harmonise import harmonise
from shared.tasks.segmentation.data import assemble
from shared.training import train

SIZE, STEPS, IMAGES = 160, 160, 60


def nuclei(generator: np.random.Generator, stained: bool) -> tuple[np.ndarray, np.ndarray]:
    """An image float32 (SIZE, SIZE) and its objects int32: bright nuclei on a dark ground, or stained ones on bright."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(float)
    mask, brightness = np.zeros((SIZE, SIZE), np.int32), np.zeros((SIZE, SIZE))
    for number in range(1, generator.integers(14, 24)):
        y, x = generator.uniform(8, SIZE - 8, 2)
        long, short = generator.uniform(9, 13), generator.uniform(6, 9)
        angle = generator.uniform(0, np.pi)
        u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
        v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
        inside = ((u / long) ** 2 + (v / short) ** 2 < 1) & (mask == 0)
        if inside.sum() < 60:
            continue
        mask[inside] = number
        brightness[inside] = generator.uniform(0.35, 0.8)
    texture = ndimage.gaussian_filter(generator.normal(0, 1, (SIZE, SIZE)), 2) * 0.15
    image = ndimage.gaussian_filter(brightness * (1 + texture), 1.2)
    image = 0.9 - 0.6 * image if stained else 0.08 + 0.8 * image
    return np.clip(image + generator.normal(0, 0.03, image.shape), 0, 1).astype(np.float32), mask


def dataset(images: list[tuple[np.ndarray, np.ndarray]], job: Job) -> Dataset:
    """Invented images in memory, as a site would decode them."""
    rows = [
        assemble(harmonise(image, job.data.harmonise)[None], mask, np.zeros(2), mask.shape, job)
        for image, mask in images
    ]
    samples = [Sample(str(k), (), str(k), "train") for k in range(len(rows))]
    return Dataset.of(samples, **{name: [row[name] for row in rows] for name in rows[0]})


def coloured(image: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """The image in grey with each object's edge in a colour of its own, uint8 (SIZE, SIZE, 3)."""
    picture = np.repeat((image * 255).astype(np.uint8)[..., None], 3, 2)
    edge = (objects > 0) & (
        (ndimage.maximum_filter(objects, 3) != objects) | (ndimage.minimum_filter(objects, 3) != objects)
    )
    # Okabe & Ito, "Color Universal Design" (2008), without black and the two darkest.
    palette = np.array([(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167)])
    picture[edge] = palette[objects[edge] % len(palette)]
    return picture


def main(out: str) -> None:
    """Train, print the figures on other images, write the picture."""
    torch.set_num_threads(1)
    job = job_from_flat(
        {
            "task": "segmentation",
            "data.classes": "nucleus",
            "data.masks": "instances",
            "data.size": 96,
            "data.normalise": "image",
            "data.harmonise": "polarity",
            "augment.flip": "both",
            "model.name": "unet",
            "model.width": 8,
            "train.batch_size": 8,
            "train.device": "cpu",
            "federation.rounds": STEPS,
        }
    )
    generator = np.random.default_rng(0)
    model = task.build_model(job)
    known = dataset([nuclei(generator, k % 2 == 1) for k in range(IMAGES)], job)
    train(model, task, known, job, site="here", first_step=0, steps=STEPS, class_weights=[1.0])
    fresh = [nuclei(generator, k % 2 == 1) for k in range(20)]
    cpu = torch.device("cpu")
    found = task.summarise(task.collect(model, dataset(fresh, job), job, cpu), job)
    print(", ".join(f"{name} {found[name].value:.3f}" for name in ("dice", "instance_f1", "aji")))
    rows = []
    for (image, mask), answer in zip(fresh[:2], task.predict(model, dataset(fresh[:2], job), job, cpu), strict=True):
        row = [np.repeat((image * 255).astype(np.uint8)[..., None], 3, 2), coloured(image, mask)]
        rows.append(np.concatenate([*row, coloured(image, answer.mask)], 1))
    picture = Image.fromarray(np.concatenate(rows, 0))
    picture.resize((picture.width * 3 // 2, picture.height * 3 // 2), Image.Resampling.LANCZOS).quantize(
        128, dither=Image.Dither.NONE
    ).save(out, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
