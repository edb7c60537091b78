"""What differential privacy buys against membership inference: the audit's figures by epsilon, on one small site.

python -m benchmarks.audit_by_epsilon ../shared/data/pneumoniamnist_balanced [SEED]

A setting that leaks on purpose: 200 radiographs at 16 x 16 pixels, no random changes, a network with room to learn them
by heart. Trained as a federation of one, without DP, with gradients clipped only, and with DP-SGD at epsilon 8 and 1
(delta 1e-4, image unit, PRV accountant). Loss threshold: the model of all 200 images, against validation images. LiRA:
as `consilium audit`, 9 models on random halves. Noise is drawn anew each time: figures with DP differ by some
hundredths.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from client import membership
from client.privacy import units
from shared.accounting import job_noise
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset, load_dataset
from shared.intervals import Estimate
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import load_task
from simulations.sites import find_sites

SHADOWS = 8
COMMON = {
    "name": "leaky", "data.format": "npz", "data.classes": "normal,pneumonia", "data.size": 16,
    "data.max_per_class": 100, "model.width": 8, "federation.rounds": 200, "train.class_weights": "none",
    "train.device": "cpu", "train.weight_decay": 0.0,
}  # fmt: skip
PRIVATE = {
    "data.max_per_class": 0,  # refused with privacy; all train on the images that COMMON reads
    "privacy.dp": "local", "privacy.delta": 1e-4, "privacy.sampling_rate": 0.25, "privacy.gradients": "hooks",
    "train.optimizer": "sgd", "train.learning_rate": 1.0, "train.momentum": 0.0, "train.batch_size": 64,
}  # fmt: skip
SETTINGS = {
    "no DP": COMMON,
    "clipping only": COMMON | PRIVATE | {"privacy.epsilon": 8.0},  # its noise is left out
    "epsilon 8": COMMON | PRIVATE | {"privacy.epsilon": 8.0},
    "epsilon 1": COMMON | PRIVATE | {"privacy.epsilon": 1.0},
}


def words(found: Estimate) -> str:
    """A figure with its interval."""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def measure(job: Job, data: Dataset, noise: float) -> list[str]:
    """The cells of a row: noise, training and test accuracy, both attacks."""
    task, cpu = load_task(job.task), torch.device("cpu")
    members, others = data.subset("train"), data.subset("val")
    whole = range(len(members))
    model = membership.train_on(whole, task, members, job, name="all", noise=noise, device=cpu)
    accuracy = [task.summarise(task.collect(model, part, job, cpu), job) for part in (members, data.subset("test"))]
    simple = membership.judge(*(membership.memory(model, task, part, job, cpu) for part in (members, others)))
    inside = membership.random_halves(units(members, job), len(members), SHADOWS + 1, job.seed)
    values = []
    for number, row in enumerate(inside):
        rows = np.flatnonzero(row).tolist()
        model = membership.train_on(rows, task, members, job, name=f"half-{number}", noise=noise, device=cpu)
        values.append(membership.memory(model, task, members, job, cpu))
    found = membership.lira(np.stack(values), inside)
    shares = " / ".join(f"{each['accuracy'].value:.2f}" for each in accuracy)
    return [f"{noise:.2f}", shares, words(simple.auc), words(found.auc), words(found.tpr)]


def main(folder: str, seed: str = "0") -> None:
    """Print the table, a row as soon as it is there."""
    torch.set_num_threads(1)
    print("| training | noise | accuracy, train / test | loss threshold, AUC | LiRA, AUC | LiRA, TPR at 1 % FPR |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        first = job_from_flat(COMMON | {"seed": int(seed)})
        site = read_site(find_sites(Path(folder), first, Path(work))[0])
        data = load_dataset(read_samples(site, first), site, first)
        for name, settings in SETTINGS.items():
            started, job = time.monotonic(), job_from_flat(settings | {"seed": int(seed)})
            noise = job_noise(job) if name.startswith("epsilon") else 0.0
            cells = measure(job, data, noise)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:3])
