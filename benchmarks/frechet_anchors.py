"""What a Fréchet distance of a generation run means: the same distance of pictures one can imagine.

python -m benchmarks.frechet_anchors RUN ../shared/data/pneumoniamnist_balanced

RUN is a run folder of a generation job; its reference network gives the features. Against the test and the validation
images of all sites: all training images, the same images blurred (mean of 3 x 3 pixels), with noise (sd .2), their
mean, and noise alone. Beside it how well a classifier fitted to the training images' features knows the test images:
the most that one fitted to samples can be expected to reach.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from shared.config import Job, load_job
from shared.imaging.augment import normalise
from shared.imaging.dataset import Dataset, concatenate, load_dataset, to_float
from shared.intervals import mean_independent, proportion
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks.generation.frechet import Moments, scaled_distance
from shared.tasks.generation.learning import features_of
from shared.tasks.generation.models import Gan, build_model
from shared.tasks.generation.separation import Separation
from shared.weights import REFERENCE
from simulations.sites import find_sites


def measured_by(run: Path) -> tuple[Gan, Job]:
    """The run's network with its trained reference, and its job."""
    job = load_job(run / "job.toml").replace(train__device="cpu")
    model = build_model(job).eval()
    model.get_submodule(REFERENCE).load_state_dict(load_file(run / REFERENCE / "model.safetensors"))
    return model, job


def all_sites(data: Path, job: Job) -> Dataset:
    """Every site's images together."""
    with tempfile.TemporaryDirectory() as name:
        sites = [read_site(file) for file in find_sites(data, job, Path(name))]
        return concatenate([load_dataset(read_samples(site, job), site, job) for site in sites])


def pictures(data: Dataset) -> Tensor:
    """All of a data set, (n, channels, height, width) in [0, 1]."""
    return to_float(data.columns["image"].take(range(len(data))))


def imagined(real: Tensor, training: Tensor) -> dict[str, Tensor]:
    """Pictures to compare with real ones."""
    generator = torch.Generator().manual_seed(0)
    return {
        "training images": training,
        "blurred (3 x 3)": F.avg_pool2d(real, 3, 1, 1, count_include_pad=False),
        "with noise (sd .2)": (real + 0.2 * torch.randn(real.shape, generator=generator)).clamp(0, 1),
        "their mean": training.mean(0, keepdim=True).expand_as(real),
        "noise alone": torch.rand(real.shape, generator=generator),
    }


@torch.inference_mode()
def main(run: str, data: str) -> None:
    """Print the table."""
    model, job = measured_by(Path(run))
    whole = all_sites(Path(data), job)
    parts = {split: whole.subset(split) for split in ("train", "val", "test")}

    def of(images: Tensor) -> np.ndarray:
        found = [features_of(model, normalise(some, job)) for some in torch.split(images, job.evaluation.batch_size)]
        return torch.cat(found).numpy()

    def moments(rows: np.ndarray) -> Moments:
        return Moments(rows.mean(0), np.cov(rows.T, bias=True))

    shown = {split: pictures(part) for split, part in parts.items()}
    known = {split: of(images) for split, images in shown.items()}
    for split in ("val", "test"):
        print(f"Fréchet distance to the {len(known[split])} {split} images")
        for name, images in imagined(shown[split], shown["train"]).items():
            print(f"  {name:20s} {scaled_distance(moments(known[split]), moments(of(images))):7.2f}")
    truth = {split: np.array([sample.target[0] for sample in part.samples]) for split, part in parts.items()}
    least = min(np.bincount(truth["train"], minlength=len(job.classes)))
    kinds = [known["train"][truth["train"] == kind][:least] for kind in range(len(job.classes))]
    right = Separation(np.stack(kinds)).classes(known["test"]) == truth["test"]
    recalls = [
        proportion(int(right[truth["test"] == k].sum()), int((truth["test"] == k).sum())) for k in range(len(kinds))
    ]
    found = mean_independent(recalls)
    print(f"balanced accuracy, fitted to training images: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
