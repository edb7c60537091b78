"""Deal one collection of images out to invented sites, patient by patient.

Only training and validation images are dealt unequally; test images go round evenly, so that each site's own test
figure means something even where a draw gives it one class only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from shared.cases import SPLITS, Sample
from shared.config import Job
from shared.errors import UserError

Shares = dict[int, np.ndarray]  # class -> each site's share of it


def partition(samples: Sequence[Sample], job: Job) -> list[list[int]]:
    """Indices of the samples of each of ``data.partition_sites`` sites.

    The draw depends on ``data.partition_seed`` and the data alone, not on the job's seed: it can be pinned.

    Raises:
        UserError: a site would get no training image.
    """
    count = job.data.partition_sites
    classes = sorted({_first_class(sample) for sample in samples})
    if classes == [-1] and job.data.partition == "dirichlet":
        raise UserError(f"data.partition = 'dirichlet': needs classes of whole images; {job.task} has none, use 'size'")
    shares = _SHARES[job.data.partition](classes, job, np.random.default_rng([job.data.partition_seed, 0]))
    owner: dict[str, int] = {}
    for number, split in enumerate(SPLITS, start=1):
        patients: dict[str, int] = {}  # patient -> class of the first image
        for sample in samples:
            if sample.split == split:
                patients.setdefault(sample.patient, _first_class(sample))
        generator = np.random.default_rng([job.data.partition_seed, number])
        owner |= _deal(patients, None if split == "test" else shares, count, generator)
    sites: list[list[int]] = [[] for _ in range(count)]
    for index, sample in enumerate(samples):
        sites[owner[sample.patient]].append(index)
    empty = [i + 1 for i, site in enumerate(sites) if not any(samples[k].split == "train" for k in site)]
    if empty:
        raise UserError(
            f"data.partition = {job.data.partition!r}: site {empty[0]} of {count} would get no training image; use "
            "fewer sites, a larger data.partition_alpha or another data.partition_seed"
        )
    return sites


def _first_class(sample: Sample) -> int:
    return sample.target[0] if sample.target else -1


def _deal(
    patients: dict[str, int], shares: Shares | None, count: int, generator: np.random.Generator
) -> dict[str, int]:
    """Each patient's site: class by class, shuffled, by shares; without shares one by one in turn."""
    groups: dict[int, list[str]] = defaultdict(list)
    for patient, name in patients.items():
        groups[name].append(patient)
    owner: dict[str, int] = {}
    turn = 0
    for name in sorted(groups):
        members = [groups[name][i] for i in generator.permutation(len(groups[name]))]
        if shares is None:
            owner |= {patient: (turn + k) % count for k, patient in enumerate(members)}
            turn += len(members)
        else:
            cuts = np.rint(np.cumsum(shares[name])[:-1] * len(members)).astype(int)
            for site, part in enumerate(np.split(np.arange(len(members)), cuts)):
                owner |= {members[k]: site for k in part}
    return owner


def _iid(classes: list[int], job: Job, generator: np.random.Generator) -> None:
    """No shares: one by one in turn, so that many small classes do not all favour the same site."""


def _dirichlet(classes: list[int], job: Job, generator: np.random.Generator) -> Shares:
    """Every class has its own shares, drawn from Dirichlet(alpha) (Hsu, Qi & Brown 2019): sites differ in their mix."""
    return {name: generator.dirichlet([job.data.partition_alpha] * job.data.partition_sites) for name in classes}


def _size(classes: list[int], job: Job, generator: np.random.Generator) -> Shares:
    """One draw for all classes: sites differ in size, not in their mix."""
    drawn = generator.dirichlet([job.data.partition_alpha] * job.data.partition_sites)
    return dict.fromkeys(classes, drawn)


_SHARES: dict[str, Callable[[list[int], Job, np.random.Generator], Shares | None]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "size": _size,
}
