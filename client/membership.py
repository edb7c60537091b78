"""Membership inference: can it be told from a model whether an image was trained on? An attack by the site on itself.

Two attacks. *Loss threshold* (Yeom et al., CSF 2018): what is fitted better was trained on. *LiRA* (Carlini et al.,
IEEE S&P 2022): the same, but each image is compared with itself, in models that did train on it and in models that did
not; these the site trains on random halves of its own images.

All attacks rank images by one value, the higher the likelier a member; see ``memory``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from client.gradients import Unit
from client.privacy import train_privately
from shared.cases import derived_seed
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.intervals import Estimate, area_under_roc, mean_dependent, proportion
from shared.norms import is_private
from shared.training import train

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

LABELLED = ("classification", "sequence")  # tasks whose model gives logits of classes, and nothing else
RATE = 0.01  # of false alarms at which the true positive rate is read
FEW = 4  # with fewer shadow models an image is hardly ever in one and not in another: the offline attack
_SMALLEST = 1e-16  # of a loss; what a float64 beside 1 can hold


@dataclass(frozen=True)
class Attack:
    """How well an attack tells members from others: area under the ROC curve, and share of the members found at RATE.

    Guessing has an area of .5 and finds RATE of the members.
    """

    auc: Estimate
    tpr: Estimate


def judge(members: Floats, others: Floats) -> Attack:
    """An attack from its values of members (m,) and of others (n,), both not empty."""
    return Attack(area(members, others), true_positives(members, others))


def area(members: Floats, others: Floats) -> Estimate:
    """The share of all pairs whose member has the higher value, ties counting half, with Newcombe's interval."""
    from scipy.stats import rankdata

    m, n = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))[:m]
    return area_under_roc(float(ranks.sum() - m * (m + 1) / 2) / (m * n), m, n)


def true_positives(members: Floats, others: Floats, rate: float = RATE) -> Estimate:
    """The share of members above the lowest threshold that at most ``rate`` of the others exceed.

    With fewer than 1/rate others none of them may. Wilson's interval, over the members; that the threshold was found
    on these others is not in it.
    """
    allowed = int(rate * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -np.inf
    return proportion(float((members > threshold).sum()), len(members))


@torch.inference_mode()
def memory(model: nn.Module, task: ModuleType, data: Dataset, job: Job, device: torch.device) -> Floats:
    """How well a model fits each case, (n,): the higher, the likelier it was trained on.

    With one label per case the log-odds of its class, log p - log(1 - p), as Carlini et al.; else minus the logarithm
    of the case's loss. Cases are seen as in evaluation, without random changes, classes unweighted.
    """
    model.eval()
    ones = [1.0] * len(task.class_weights(task.count_classes(data, job), job))
    losses = np.array([_loss(model, task, data, index, job, ones, device) for index in range(len(data))])
    losses = np.maximum(losses, _SMALLEST)
    # The loss of one label is -log p.
    values: Floats = -losses - np.log(-np.expm1(-losses)) if by_confidence(job) else -np.log(losses)
    return values


def by_confidence(job: Job) -> bool:
    """Whether ``memory`` is the log-odds of the class, not the loss."""
    return job.task in LABELLED and not job.data.multilabel


def _loss(
    model: nn.Module, task: ModuleType, data: Dataset, index: int, job: Job, ones: Sequence[float], device: torch.device
) -> float:
    batch = task.batch(data, [index], job, device, train=False)
    # Logits in float64: in float32 the loss of every image that is learnt by heart is the same zero.
    network = _Exact(model) if job.task in LABELLED else model
    return float(task.step(network, batch, job, ones))


class _Exact(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(*inputs)
        return logits.double()


def some(data: Dataset, rows: Sequence[int]) -> Dataset:
    """Some cases as a data set of their own; nothing is copied."""
    columns = {name: column.rows(rows) for name, column in data.columns.items()}
    return Dataset(columns, tuple(data.samples[i] for i in rows))


# --- models on random halves of the site's images ---------------------------------------------------------------------


def random_halves(units: Sequence[Unit], cases: int, models: int, seed: int) -> Mask:
    """Which cases each model trains on, (models, cases): half of the units each, whatever the others have.

    The halves are independent: balanced ones, each unit in half of the models, would tell of the last what it holds.
    """
    inside = np.zeros((models, cases), dtype=bool)
    for number, row in enumerate(inside):
        generator = np.random.default_rng(derived_seed(seed, "audit", number))
        for place in generator.permutation(len(units))[: len(units) // 2]:
            row[units[place]] = True
    return inside


def train_on(
    rows: Sequence[int], task: ModuleType, data: Dataset, job: Job, *, name: str, noise: float, device: torch.device
) -> nn.Module:
    """A model trained on some cases as the job says, all its rounds at one site, from the job's starting weights.

    Args:
        noise: of DP-SGD, in clipping norms; used where the job has each site add noise.

    Raises:
        SiteRefusal: it diverges.
    """
    half = some(data, rows)
    model: nn.Module = task.build_model(job).to(device)
    weights = task.class_weights(task.count_classes(half, job), job)
    steps = job.federation.rounds * job.local_steps(len(half))
    if is_private(job):
        train_privately(
            model, task, half, job, site=name, noise=noise, first_step=0, steps=steps, class_weights=weights
        )
    else:
        train(model, task, half, job, site=name, first_step=0, steps=steps, class_weights=weights)
    return model


def threshold_attack(values: Floats, inside: Mask) -> Attack:
    """The loss threshold on each model in turn, (models, cases); the mean over the models, see ``mean_dependent``."""
    return _mean([judge(row[known], row[~known]) for row, known in zip(values, inside, strict=True)])


def lira(values: Floats, inside: Mask) -> Attack:
    """LiRA with each model in turn as the one attacked and all others as shadow models; the mean over the models.

    Each model's values are first shifted and scaled to mean 0 and deviation 1 over all cases: how confident it is of
    everything tells of none, and from model to model it differs more than by a single image.

    Args:
        values: ``memory`` of each case in each model, (models, cases).
        inside: which cases each model was trained on.
    """
    values = (values - values.mean(1, keepdims=True)) / (values.std(1, keepdims=True) + 1e-12)
    found = []
    for target, known in enumerate(inside):
        others = np.arange(len(values)) != target
        ratios = likelihood_ratios(values[target], values[others], inside[others])
        found.append(judge(ratios[known], ratios[~known]))
    return _mean(found)


def _mean(attacks: Sequence[Attack]) -> Attack:
    return Attack(
        mean_dependent([attack.auc for attack in attacks]), mean_dependent([attack.tpr for attack in attacks])
    )


def likelihood_ratios(target: Floats, shadows: Floats, inside: Mask) -> Floats:
    """How much likelier the target's values (n,) are if it was trained on each case, by its values in the shadows.

    Carlini et al. 2022, algorithm 1, with one variance for all cases, which is better with fewer than 64 shadows:
    log N(x; mean of the shadows with the case, variance) - log N(x; of those without, variance). A case that is in no
    shadow, or in all, has its missing mean from the other and the mean gap of all cases. With fewer than FEW shadows
    only those without are used (offline): (x - mean) / sd.

    Args:
        shadows, inside: (shadows, n).
    """
    with_it, has_in, var_in = _fit(shadows, inside)
    without, has_out, var_out = _fit(shadows, ~inside)
    both = has_in & has_out
    gap = float((with_it - without)[both].mean()) if both.any() else 0.0
    without = np.where(has_out, without, with_it - gap)
    if len(shadows) < FEW:
        ratios: Floats = (target - without) / np.sqrt(var_out)
        return ratios
    with_it = np.where(has_in, with_it, without + gap)
    ratios = (target - without) ** 2 / (2 * var_out) - (target - with_it) ** 2 / (2 * var_in)
    ratios += 0.5 * np.log(var_out / var_in)
    return ratios


def _fit(values: Floats, chosen: Mask) -> tuple[Floats, Mask, float]:
    """Of the chosen values the mean of each column (n,), whether it has one, and the variance within all columns.

    The variance is 1 where no column has two values.
    """
    count = chosen.sum(0)
    mean = np.where(chosen, values, 0).sum(0) / np.maximum(count, 1)
    squares = float((np.where(chosen, values - mean, 0) ** 2).sum())
    free = int(count.sum() - (count > 0).sum())
    return mean, count > 0, max(squares / free, 1e-12) if free else 1.0
