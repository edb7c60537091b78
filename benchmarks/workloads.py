"""The workloads that the engine is measured with: invented images, the job, and the same steps for a bare loop.

A workload is a job and a number of sites with ``n`` training images each, all on the disk as files that the product
reads, and once more as plain arrays for the bare loop. There is nothing to validate or to test on.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

_JOB = """name = "{name}"
task = "{task}"
[data]
format = "{format}"
classes = "{classes}"
channels = {channels}
size = {size}
val_fraction = 0.0
test_fraction = 0.0
[model]
name = "{model}"
width = {width}
depth = {depth}
[train]
local_steps = {steps}
batch_size = {batch}
optimizer = "sgd"
learning_rate = {rate}
weight_decay = 0.0
schedule = "constant"
warmup = 0.0
keep_optimizer = false
class_weights = "none"
device = "cpu"
[federation]
rounds = {rounds}
[evaluation]
every = 1000000
"""


@dataclass(frozen=True)
class Workload:
    """A federation: sites, images of a site, the job's settings, and roughly how large the model is."""

    name: str
    sites: int
    n: int
    size: int
    channels: int
    model: str
    width: int
    rounds: int
    steps: int
    batch: int
    rate: float
    depth: int = 4

    @property
    def task(self) -> str:
        """The job's task."""
        return "segmentation" if self.model == "unet" else "classification"

    def job(self) -> str:
        """The job as TOML."""
        masks = self.task == "segmentation"
        classes = "blob" if masks else "a,b,c,d"
        return _JOB.format(**vars(self), task=self.task, format="csv" if masks else "npz", classes=classes)


W1 = Workload("w1", 8, 64, 28, 1, "cnn", 19, 20, 2, 32, 0.05)
W2 = Workload("w2", 4, 200, 64, 1, "unet", 16, 5, 10, 20, 0.05, depth=5)
W3 = Workload("w3", 8, 4, 64, 3, "resnet50", 24, 5, 1, 4, 0.0005)
W4 = Workload("w4", 200, 16, 28, 1, "cnn", 19, 3, 1, 16, 0.05)
WORKLOADS = {workload.name: workload for workload in (W1, W2, W3, W4)}


def write(workload: Workload, root: Path) -> Path:
    """The files: ``job.toml``, ``sites/`` for the product and ``arrays/`` for the bare loop. Gives ``root``."""
    root.mkdir(parents=True)
    (root / "job.toml").write_text(workload.job())
    (root / "arrays").mkdir()
    for place in range(workload.sites):
        generator = np.random.default_rng([place, workload.n])
        images, targets = _invent(workload, generator)
        folder = root / "sites" / f"s{place:04d}"
        folder.mkdir(parents=True)
        (folder / "site.toml").write_text(f'name = "{folder.name}"\n')
        if workload.task == "segmentation":
            _write_pictures(folder, images, targets)
        else:
            pictures = images[:, 0] if workload.channels == 1 else np.moveaxis(images, 1, -1)
            np.savez(folder / "site.npz", train_images=pictures, train_labels=targets)
        order = list(range(workload.n))
        if workload.task == "classification":
            order.sort(key=str)  # as the product sorts the images of a file
        np.savez(root / "arrays" / f"{folder.name}.npz", images=images[order], targets=targets[order])
    return root


def _invent(workload: Workload, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, channels, size, size) of noise with a bright square; its place is the class, or the mask."""
    n, size = workload.n, workload.size
    images = generator.integers(0, 96, (n, workload.channels, size, size), dtype=np.uint8)
    masks, half = np.zeros((n, size, size), np.uint8), size // 2
    classes = generator.integers(0, 4, n)
    for number in range(n):
        if workload.task == "segmentation":
            (top, left), side = generator.integers(0, size - 24, 2), int(generator.integers(10, 24))
        else:
            (top, left), side = divmod(int(classes[number]), 2), half
            top, left = top * half, left * half
        masks[number, top : top + side, left : left + side] = 1
    images += masks[:, None] * np.uint8(90)
    return images, masks if workload.task == "segmentation" else classes


def _write_pictures(folder: Path, images: np.ndarray, masks: np.ndarray) -> None:
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "mask", "patient", "split"])
        for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
            name = f"{number:04d}.png"
            Image.fromarray(image[0]).save(folder / "images" / name)
            Image.fromarray(mask).save(folder / "labels" / name)
            rows.writerow([f"images/{name}", f"labels/{name}", f"{folder.name}-{number}", "train"])


def write_sites(root: Path, sites: int, images: int = 64, size: int = 28) -> Path:
    """Sites of grey PNG images, two classes."""
    for place in range(sites):
        folder = root / f"s{place:03d}"
        (folder / "images").mkdir(parents=True)
        generator = np.random.default_rng(place)
        with (folder / "labels.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label", "patient", "split"])
            for number in range(images):
                pixels = generator.integers(0, 120, (size, size))
                pixels[:, slice(0, size // 2) if number % 2 else slice(size // 2, size)] += 20
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
                rows.writerow([f"images/{number}.png", ("right", "left")[number % 2], f"{place}-{number}", "train"])
        (folder / "site.toml").write_text(f'name = "{folder.name}"\n[data]\nformat = "csv"\n')
    return root
