"""The picture of docs/tasks/segmentation.md: invented images, their masks as drawn, and as a network found them.

consilium cohort make /tmp/ct --kind ct --patients 20
consilium simulate simulations/jobs/ct-organs-3d.toml --data /tmp/ct --out /tmp/ct-run
    --set federation.rounds=200 --set train.local_steps=3 --set train.learning_rate=0.008
python -m benchmarks.segmentation_picture /tmp/ct-run /tmp/ct docs/pictures/segmentation.png

Left nuclei, by a small U-Net that is trained here, each object in a colour of its own; right a CT scan, by the 3D U-Net
of the run, each class in a colour of its own.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from scipy import ndimage

import shared.tasks.segmentation as task
from consilium.trained import open_run
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset, load_dataset, to_float
from shared.imaging.harmonise import harmonise
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks.segmentation.data import assemble
from shared.training import train
from simulations.sites import find_sites

SIZE, STEPS, IMAGES = 160, 160, 60
# Okabe & Ito, "Color Universal Design" (2008).
PALETTE = np.array([(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167)])


class Panel(NamedTuple):
    """A picture (h, w) in [0, 1], its mask as drawn and as found, the height of a pixel over its width, and a name."""

    picture: np.ndarray
    drawn: np.ndarray
    found: np.ndarray
    aspect: float
    name: str


# --- nuclei -----------------------------------------------------------------------------------------------------------


def nuclei(generator: np.random.Generator, stained: bool) -> tuple[np.ndarray, np.ndarray]:
    """An image float32 (SIZE, SIZE) and its objects int32: nuclei bright on a dark ground, or dark on a bright one."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(float)
    mask, brightness = np.zeros((SIZE, SIZE), np.int32), np.zeros((SIZE, SIZE))
    for number in range(1, generator.integers(24, 34)):
        y, x = generator.uniform(8, SIZE - 8, 2)
        long, short = generator.uniform(10, 13), generator.uniform(7, 9)
        angle = generator.uniform(0, np.pi)
        u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
        v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
        inside = (u / long) ** 2 + (v / short) ** 2 < 1
        if (mask[inside] > 0).mean() > 0.05:  # they may touch
            continue
        inside &= mask == 0
        mask[inside] = number
        brightness[inside] = generator.uniform(0.35, 0.8)
    texture = ndimage.gaussian_filter(generator.normal(0, 1, (SIZE, SIZE)), 2) * 0.15
    image = ndimage.gaussian_filter(brightness * (1 + texture), 1.2)
    image = 0.9 - 0.6 * image if stained else 0.08 + 0.8 * image
    return np.clip(image + generator.normal(0, 0.03, image.shape), 0, 1).astype(np.float32), mask


def dataset(images: Sequence[tuple[np.ndarray, np.ndarray]], job: Job) -> Dataset:
    """Invented images in memory, as a site would decode them."""
    rows = [
        assemble(harmonise(image, job.data.harmonise)[None], mask, np.zeros(2), mask.shape, job)
        for image, mask in images
    ]
    samples = [Sample(str(k), (), str(k), "train") for k in range(len(rows))]
    return Dataset.of(samples, **{name: [row[name] for row in rows] for name in rows[0]})


def nuclei_panels() -> list[Panel]:
    """Train, print the figures on other images, and show two of these."""
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
    generator, cpu = np.random.default_rng(0), torch.device("cpu")
    model = task.build_model(job)
    known = dataset([nuclei(generator, k % 2 == 1) for k in range(IMAGES)], job)
    train(model, task, known, job, site="here", first_step=0, steps=STEPS, class_weights=[1.0])
    fresh = [nuclei(generator, k % 2 == 1) for k in range(20)]
    found = task.summarise(task.collect(model, dataset(fresh, job), job, cpu), job)
    print("nuclei:", ", ".join(f"{name} {found[name].value:.3f}" for name in ("dice", "instance_f1", "aji")))
    answers = task.predict(model, dataset(fresh[:2], job), job, cpu)
    names = ("nuclei, bright on dark", "nuclei, dark on bright")
    panels = []
    for (image, mask), answer, name in zip(fresh[:2], answers, names, strict=True):
        found = same_numbers(answer.mask, mask)
        colours = different(mask, found)
        panels.append(Panel(image, colours[mask], colours[found], 1.0, name))
    return panels


def same_numbers(found: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Objects numbered as those they share most pixels with, so that both get one colour; others after them."""
    result = np.zeros_like(found)
    new, taken = int(drawn.max()), set()
    for number in range(1, int(found.max()) + 1):
        shared = np.bincount(drawn[found == number])
        best = int(shared[1:].argmax()) + 1 if shared[1:].any() else 0
        if not best or best in taken:
            new += 1
            best = new
        taken.add(best)
        result[found == number] = best
    return result


def different(*masks: np.ndarray) -> np.ndarray:
    """For each object number a place in the palette, from 1, that no object nearby has; 0 for the background."""
    colours = np.zeros(1 + max(int(mask.max()) for mask in masks), int)
    for number in range(1, len(colours)):
        near = [ndimage.binary_dilation(mask == number, iterations=12) for mask in masks]
        others = {colours[k] for mask, part in zip(masks, near, strict=True) for k in np.unique(mask[part])}
        free = [place for place in range(1, 1 + len(PALETTE)) if place not in others]
        colours[number] = free[number % len(free)] if free else 1 + number % len(PALETTE)
    return colours


# --- the CT scan ------------------------------------------------------------------------------------------------------


def ct_panels(run: Path, data: Path) -> tuple[list[Panel], tuple[str, ...]]:
    """The test scan with the largest lesion, cut through it across and from the front, and the names of the classes."""
    trained = open_run(run, device="cpu")
    job, lesion = trained.job, trained.job.classes.index("lesion") + 1
    with tempfile.TemporaryDirectory() as folder:
        sites = [read_site(file) for file in find_sites(data, job, Path(folder))]
        tests = [load_dataset(read_samples(site, job), site, job).subset("test") for site in sites]
        known = max(tests, key=lambda part: max(part.columns["pixels"][i][lesion] for i in range(len(part))))
        index = max(range(len(known)), key=lambda i: int(known.columns["pixels"][i][lesion]))
        answer = list(task.predict(trained.model, known, job, trained.device))[index].mask
        image = to_float(known.columns["image"][index])[0].numpy()
        drawn, spacing = np.array(known.columns["mask"][index]), known.columns["spacing"][index]
    slice_, row = (most_shown(drawn, axis, lesion) for axis in (0, 1))
    across = Panel(image[slice_], drawn[slice_], answer[slice_], spacing[1] / spacing[2], "CT, a slice")
    front = (part[::-1, row] for part in (image, drawn, answer))
    return [across, Panel(*front, spacing[0] / spacing[2], "CT, front")], job.classes


def most_shown(mask: np.ndarray, axis: int, lesion: int) -> int:
    """Where along an axis most classes show, and of these places where most of the lesion does."""
    planes = [np.bincount(plane.ravel(), minlength=lesion + 1) for plane in np.moveaxis(mask, axis, 0)]
    return max(range(len(planes)), key=lambda k: ((planes[k] > 9).sum(), planes[k][lesion]))


# --- the sheet --------------------------------------------------------------------------------------------------------


def painted(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture in grey, each value of the mask laid over it in its colour; uint8 (h, w, 3)."""
    grey = np.repeat(picture[..., None], 3, 2) * 255
    mixed: np.ndarray = np.where(mask[..., None] > 0, 0.35 * grey + 0.65 * PALETTE[mask.astype(int) - 1], grey)
    return mixed.astype(np.uint8)


def main(run: str, data: str, out: str) -> None:
    """Draw it."""
    torch.set_num_threads(1)
    left = nuclei_panels()
    right, classes = ct_panels(Path(run), Path(data))
    draw(left, right, classes, out)


def draw(left: list[Panel], right: list[Panel], classes: Sequence[str], out: str) -> None:
    """The sheet: pictures from left to right as they are, as drawn and as found."""
    figure = plt.figure(figsize=(10, 3.1), dpi=100)
    sides = figure.add_gridspec(1, 2, width_ratios=[3, 4.2], wspace=0.05, left=0, right=1, top=0.92, bottom=0.04)
    for side, panels in zip(sides, (left, right), strict=True):
        heights = [panel.picture.shape[0] * panel.aspect for panel in panels]
        grid = side.subgridspec(len(panels), 3, height_ratios=heights, wspace=0.03, hspace=0.03)
        for line, panel in enumerate(panels):
            shown = np.zeros_like(panel.drawn), panel.drawn, panel.found
            for column, (mask, title) in enumerate(zip(shown, ("image", "as drawn", "as found"), strict=True)):
                cell = figure.add_subplot(grid[line, column])
                cell.imshow(painted(panel.picture, mask), aspect=panel.aspect, interpolation="nearest")
                cell.set_xticks([])
                cell.set_yticks([])
                if not line:
                    cell.set_title(title, fontsize=10)
                if not column:
                    cell.set_ylabel(panel.name, fontsize=8)
    keys = [plt.Rectangle((0, 0), 1, 1, color=colour / 255) for colour in PALETTE[: len(classes)]]
    figure.legend(keys, classes, loc="upper right", bbox_to_anchor=(1, 0.04), ncols=len(classes), fontsize=9,
                  frameon=False, handlelength=1, columnspacing=1.2)  # fmt: skip
    figure.savefig(out, bbox_inches="tight")
    Image.open(out).convert("RGB").quantize(160, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
