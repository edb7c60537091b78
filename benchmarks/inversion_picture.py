"""The picture of docs/audit.md: invented radiographs, and what can be rebuilt of each from its update alone.

python -m benchmarks.inversion_picture docs/pictures/inversion.png

The three radiographs of an invented hospital (`consilium cohort make --sites 1 --patients 40`) that differ most from
the mean of the others; `cnn` of width 64 at its starting weights, images of 24 pixels. The attack is that of
`consilium audit`.
Prints PSNR and correlation of each. Takes some minutes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from client import inversion
from shared.accounting import job_noise
from shared.config import Job, job_from_flat, load_job
from shared.imaging.augment import shift_and_scale
from shared.imaging.dataset import Dataset, load_dataset, to_float
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import load_task
from simulations.cohorts.chest import make

SHOWN, STEPS = 3, 1500
CPU = torch.device("cpu")
JOB = job_from_flat({"data.classes": "normal,opacity", "data.size": 24, "model.width": 64, "train.device": "cpu"})
PRIVATE = Path(__file__).parents[1] / "simulations" / "jobs" / "pneumonia-private.toml"
CLIP = 1.0


def hospital(job: Job) -> Dataset:
    """The images of one invented hospital."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), sites=1, patients=40)
        site = read_site(next(Path(folder).glob("*/site.toml")))
        return load_dataset(read_samples(site, job), site, job)


def rebuilt(data: Dataset, index: int, levels: list[float | None]) -> list[Tensor]:
    """The image as rebuilt from its gradient: raw (None), or clipped and with noise of so many clipping norms."""
    task = load_task(JOB.task)
    model = task.build_model(JOB).eval()
    batch = task.batch(data, [index], JOB, CPU, train=False)
    shift, scale = shift_and_scale(to_float(data.columns["image"].take([index])), JOB)
    gradient, found = inversion.gradient_of(model, task, batch, JOB, [1.0, 1.0]), []
    for number, noise in enumerate(levels):
        seen = gradient if noise is None else inversion.clipped(gradient, CLIP)
        if noise:
            seen = inversion.noised(seen, noise * CLIP, torch.Generator().manual_seed(number))
        low, high = -shift / scale, (1 - shift) / scale
        image = inversion.reconstruct(model, task, batch, JOB, [1.0, 1.0], seen, low=low, high=high, steps=STEPS)
        found.append((image * scale + shift).clamp(0, 1))
    return found


def main(path: str) -> None:
    """Attack, print the figures and write the picture."""
    torch.set_num_threads(1)
    noise = job_noise(load_job(PRIVATE))
    titles = ["the patient", "mean of the others", "from the update", "clipped", "noise 0.05", f"noise {noise:.2f}"]
    data = hospital(JOB)
    images = to_float(data.columns["image"].take(range(len(data))))
    means = (images.sum(0, keepdim=True) - images) / (len(images) - 1)
    alike = torch.tensor([inversion.correlation(image, mean) for image, mean in zip(images, means, strict=True)])
    figure, axes = plt.subplots(SHOWN, len(titles), figsize=(10, 5.6), dpi=100, layout="constrained")
    for row, index in enumerate(alike.argsort()[:SHOWN].tolist()):
        original = images[[index]]
        shown = [original, means[[index]], *rebuilt(data, index, [None, 0.0, 0.05, noise])]
        for axis, title, image in zip(axes[row], titles, shown, strict=True):
            axis.imshow(image[0, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_title(title if row == 0 else "", fontsize=10)
            if image is not original:
                found = inversion.psnr(image, original), inversion.correlation(image, original)
                axis.set_xlabel("{:.1f} dB, r {:.2f}".format(*found), fontsize=9)
                print(f"{row} {title:20} PSNR {found[0]:5.1f} dB, correlation {found[1]:.3f}", flush=True)
    figure.savefig(path)


if __name__ == "__main__":
    main(sys.argv[1])
