"""The picture of docs/tasks/detection.md: a detector that learnt invented blood smears, and what it finds in two more.

python -m benchmarks.detection_picture docs/pictures/detection.png
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image

from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset, to_float
from shared.tasks.detection import batch, build_model, collect, predict, step, summarise
from shared.tasks.detection.predict import draw_boxes
from shared.training import learning_rate, make_optimizer

SIZE, STEPS, IMAGES, SHOWN = 128, 240, 160, 2
# name -> (least and largest radius in pixels, colour at the rim, colour in the middle, least and largest number)
CELLS = {
    "white": ((15, 20), (0.55, 0.45, 0.75), (0.35, 0.2, 0.55), (1, 2)),
    "red": ((9, 12), (0.85, 0.5, 0.5), (0.93, 0.72, 0.7), (7, 12)),
    "platelet": ((3, 4), (0.6, 0.45, 0.7), (0.5, 0.3, 0.6), (1, 4)),
}


def smear(generator: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, float, float, float, float]]]:
    """An image float (SIZE, SIZE, 3) of round cells that may overlap, and its boxes (class, x, y, width, height)."""
    image = np.full((SIZE, SIZE, 3), (0.95, 0.9, 0.88))
    rows, columns = np.mgrid[:SIZE, :SIZE]
    boxes = []
    for kind, (radii, rim, middle, numbers) in enumerate(CELLS.values()):
        for _ in range(generator.integers(numbers[0], numbers[1] + 1)):
            radius = generator.uniform(*radii)
            x, y = generator.uniform(radius, SIZE - radius, 2)
            distance = np.hypot(columns + 0.5 - x, rows + 0.5 - y) / radius
            inside = np.clip((1 - distance) * radius, 0, 1)[..., None]
            shade = np.clip(distance, 0, 1)[..., None] ** 2
            image = image * (1 - inside) + inside * (shade * np.array(rim) + (1 - shade) * np.array(middle))
            boxes.append((kind, x - radius, y - radius, 2 * radius, 2 * radius))
    return np.clip(image + generator.normal(0, 0.03, image.shape), 0, 1), boxes


def smears(count: int, seed: int) -> Dataset:
    """Invented images in memory."""
    generator = np.random.default_rng(seed)
    made = [smear(generator) for _ in range(count)]
    images = np.stack([np.rint(np.moveaxis(image, -1, 0) * 65535).astype(np.uint16) for image, _ in made])
    samples = [Sample(str(k), (), str(k), "train", boxes=tuple(boxes)) for k, (_, boxes) in enumerate(made)]
    return Dataset.of(samples, image=images, shape=np.full((count, 2), SIZE, np.int64))


def main(out: str) -> None:
    """Train, print the figures on other images, write the picture."""
    torch.set_num_threads(1)
    job: Job = job_from_flat(
        {
            "task": "detection",
            "data.classes": ",".join(CELLS),
            "data.channels": 3,
            "data.size": SIZE,
            "model.name": "fasterrcnn_small",
            "train.learning_rate": 0.002,
            "federation.rounds": STEPS,
            "augment.flip": "both",
        }
    )
    data, device = smears(IMAGES, 0), torch.device("cpu")
    model = build_model(job).train()
    optimizer = make_optimizer(model, job)
    torch.manual_seed(0)
    for number in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, STEPS, job)
        loss = step(model, batch(data, torch.randperm(IMAGES)[:4].tolist(), job, device, train=True), job, [1.0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tests = smears(40, 1)
    figures = summarise(collect(model, tests, job, device), job)
    print(", ".join(f"{name} {estimate.value:.3f}" for name, estimate in figures.items()))
    panels = []
    for i, found in zip(range(SHOWN), predict(model, tests, job, device), strict=False):
        plain = np.moveaxis(to_float(tests.columns["image"][i]).numpy(), 0, -1)
        panels.append(np.asarray(draw_boxes(np.repeat(np.repeat(plain, 3, 0), 3, 1), found, job)))
    sheet = np.concatenate(
        [panel for pair in panels for panel in (pair, np.full((pair.shape[0], 12, 3), 255, np.uint8))], 1
    )
    Image.fromarray(sheet[:, :-12]).quantize(64, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
