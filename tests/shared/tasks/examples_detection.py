"""Small detection jobs, data and sites: bright and dark rectangles on noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from shared.cases import Sample
from shared.config import Job
from shared.imaging.dataset import Dataset

COMMON = {
    "data.classes": "bright,dark",
    "data.size": 64,
    "train.batch_size": 2,
    "train.local_steps": 1,
    "train.learning_rate": 0.001,
    "evaluation.batch_size": 4,
}
JOBS: dict[str, dict[str, object]] = {
    "fasterrcnn_small": COMMON | {"model.width": 8},
    "fasterrcnn_mobilenet": COMMON | {"train.learning_rate": 0.0001},
    "fasterrcnn_resnet50": COMMON | {"train.learning_rate": 0.0001},
    "retinanet": COMMON | {"train.learning_rate": 0.0001},
}

Boxes = tuple[tuple[int, float, float, float, float], ...]


def picture(size: int, number: int, seed: int) -> tuple[np.ndarray, Boxes]:
    """uint8 (size, size) with up to two rectangles, and their boxes; every fourth picture shows none."""
    generator = np.random.default_rng([seed, number])
    pixels = generator.integers(100, 130, (size, size)).astype(np.uint8)
    boxes = []
    for k in range(0 if number % 4 == 3 else 1 + number % 2):
        width, height = generator.integers(size // 4, size // 2, 2)
        x, y = generator.integers(0, size - width), generator.integers(0, size - height)
        kind = (number + k) % 2
        pixels[y : y + height, x : x + width] = (230, 20)[kind]
        boxes.append((kind, float(x), float(y), float(width), float(height)))
    return pixels, tuple(boxes)


def split(number: int) -> str:
    """Two train, one val, one test, by turns of two."""
    return ("train", "train", "val", "test")[number // 2 % 4]


def make(job: Job, n: int, seed: int = 0) -> Dataset:
    """``n`` cases in memory."""
    size = job.data.size
    made = [picture(size, number, seed) for number in range(n)]
    images = np.stack([pixels for pixels, _ in made]).astype(np.uint16)[:, None] * 257
    samples = [Sample(str(k), (), str(k), split(k), boxes=boxes) for k, (_, boxes) in enumerate(made)]
    return Dataset.of(
        samples,
        image=np.repeat(images, job.data.channels, 1),
        shape=np.full((n, 2), size, np.int64),
        dropped=np.zeros((n, 1), np.int64),
    )


def site(folder: Path, job: Job, name: str, n: int, seed: int = 0) -> Path:
    """``n`` PNG files with a COCO file; gives the site.toml."""
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number in range(n):
        pixels, boxes = picture(job.data.size, number, seed)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "split": split(number)})
        annotations += [
            {"id": number * 10 + k, "image_id": number, "category_id": kind, "bbox": box}
            for k, (kind, *box) in enumerate(boxes)
        ]
    categories = [{"id": k, "name": name} for k, name in enumerate(job.classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "site.toml").write_text(f'name = "{name}"\n')
    return folder / "site.toml"
