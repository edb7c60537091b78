"""Local differential privacy: gradient steps of which no single image, or patient, can be told from the outcome.

DP-SGD (Abadi et al. 2016): each unit (an image, or all images of a patient) is in a step by its own coin (Poisson
sampling); its gradient is clipped to an L2 norm of ``privacy.clipping_norm``; Gaussian noise of ``noise`` clipping
norms is added to their sum. Noise and scaling are Opacus' ``DPOptimizer``; epsilon is counted elsewhere, from
noise, rate and steps alone (``shared.accounting``). Coins and noise come from the operating system's randomness, never
from the job's seed, which the server knows.

Gradients of single units are had one by one, a forward and a backward pass each, which is right for every model and
costs little beside them on CPUs; or, for recurrent networks and where a job asks, by Opacus' hooks on a whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from client.gradients import Unit, unit_gradients
from shared.cases import derived_seed
from shared.config import Job
from shared.corrections import Correction
from shared.devices import seed_generators
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Dataset
from shared.noise import cryptographic_normal, secret_generator
from shared.norms import without_batch_norm
from shared.tasks import Part
from shared.training import (
    Trained,
    learning_rate,
    make_optimizer,
    pick_device,
    put_moments,
    put_on,
    set_mode,
    take_moments,
)

# Where Opacus' hooks give the gradients of single images to the last digit; a test compares every one of them.
HOOKED = frozenset(
    {
        ("classification", "cnn"),
        ("reconstruction", "autoencoder"),
        ("sequence", "gru"),
        ("sequence", "lstm"),
    }
)
_FASTER = frozenset({("sequence", "gru"), ("sequence", "lstm")})  # on CPUs too: one by one is 32 x a plain step there


def units(data: Dataset, job: Job) -> list[Unit]:
    """The cases of each protected unit: each case alone, or all of a patient together."""
    if job.privacy.unit == "image":
        return [[index] for index in range(len(data))]
    patients: dict[str, Unit] = {}
    for index, sample in enumerate(data.samples):
        patients.setdefault(sample.patient, []).append(index)
    return list(patients.values())


def check(job: Job) -> None:
    """Raise UserError if the job asks for hooks where they are not right."""
    if job.privacy.gradients == "hooks" and (job.task, job.model.name) not in HOOKED:
        raise UserError(
            f"privacy.gradients = 'hooks': not right for {job.model.name} of {job.task}; use 'auto' or 'single'"
        )
    if job.train.precision != "float32":
        raise UserError(f"train.precision = {job.train.precision!r}: privacy.dp needs 'float32'")


def train_privately(
    model: nn.Module,
    task: ModuleType,
    data: Dataset,
    job: Job,
    *,
    site: str,
    noise: float,
    first_step: int,
    steps: int,
    class_weights: Sequence[float],
    declared: float = 0.0,
    cryptographic: bool = False,
    moments: Mapping[str, Tensor] | None = None,
    correction: Correction | None = None,
) -> Trained:
    """As ``shared.training.train``, in ``steps`` DP-SGD steps.

    Args:
        noise: standard deviation of the noise, in clipping norms.
        declared: the number of units that the sum of gradients is divided by, times the sampling rate, if the true one
            is not to show; 0 takes the true one.
        cryptographic: noise from the operating system's cryptographic generator.
        moments: of the optimisers, from an earlier call; made of noised gradients alone, so they cost no privacy.
        correction: added to the gradients of each step after the noise.

    Returns:
        ``steps`` as asked for, whatever the coins gave; ``images`` and ``losses`` hold what the noise does not hide:
        they are for the site's own eyes.

    Raises:
        SiteRefusal: nothing to train on, or a gradient that is not finite.
        UserError: settings that do not go together.
    """
    check(job)
    everyone = units(data, job)
    if not everyone:
        raise SiteRefusal("no-training-images", "no image of this site is in the training split")
    device = pick_device(job)
    without_batch_norm(model, job)
    device = put_on(model, device)
    expected = job.privacy.sampling_rate * (declared or len(everyone))
    seed_generators(derived_seed(job.seed, site, first_step), device)  # of augmentation, which need not be secret
    coins = secret_generator()
    total, seen = job.federation.rounds * job.train.local_steps, 0
    with unit_gradients(model, task, data, job, class_weights, _hooks_wanted(job, correction)) as gradients:
        players = [_Player(model, job, part, noise, expected, cryptographic) for part in task.parts(job)]
        for player in players:
            player.correct_by(correction)
        _put_moments(players, moments or {})
        set_mode(model, job)
        sums = [0.0] * len(players)
        for number in range(first_step, first_step + steps):
            drawn = torch.rand(len(everyone), generator=coins, dtype=torch.float64) < job.privacy.sampling_rate
            chosen = [everyone[k] for k in drawn.nonzero().flatten().tolist()]
            for place, player in enumerate(players):
                player.base.param_groups[0]["lr"] = learning_rate(number, total, job) * player.part.rate
                if player.part.sees_data:
                    sums[place] += player.step(gradients.of(chosen, player.parameters, player.part.prefix))
                else:
                    sums[place] += player.plain_step(task, task.blank(job.train.batch_size, job, device), class_weights)
            seen += sum(map(len, chosen))
        keepers = players if job.train.keep_optimizer else ()
        kept = {f"{k}/{name}": m for k, player in enumerate(keepers) for name, m in take_moments(player.base).items()}
    if not all(map(math.isfinite, sums)):
        raise SiteRefusal("diverged", f"the training loss is {sum(sums)}; lower train.learning_rate")
    return Trained(steps, seen, tuple(sums), kept)


def _put_moments(players: Sequence[_Player], moments: Mapping[str, Tensor]) -> None:
    """Give each part's optimiser what an earlier call kept of it."""
    for place, player in enumerate(players):
        mine = {name.partition("/")[2]: m for name, m in moments.items() if name.startswith(f"{place}/")}
        if mine:
            put_moments(player.base, mine)


def _hooks_wanted(job: Job, correction: Correction | None) -> bool:
    """Hooks put layers of their own in the place of recurrent ones, whose weights a correction would then not find."""
    if job.privacy.gradients == "auto":
        return correction is None and (job.task, job.model.name) in _FASTER
    return job.privacy.gradients == "hooks"


class _Player:
    """A part of the model with its optimiser: a private one where it sees images, else a plain one."""

    def __init__(
        self, model: nn.Module, job: Job, part: Part, noise: float, expected: float, cryptographic: bool
    ) -> None:
        self.model, self.job, self.part = model, job, part
        self.base = make_optimizer(model, job, [part])
        self.parameters: list[nn.Parameter] = self.base.param_groups[0]["params"]
        if part.sees_data:
            self.private = _private_optimizer(self.base, noise, job.privacy.clipping_norm, expected, cryptographic)

    def correct_by(self, correction: Correction | None) -> None:
        """Let the correction change each gradient after it was noised and divided, before the step."""
        self.correction = correction
        if correction is not None and self.part.sees_data:
            self.private.attach_step_hook(lambda _: correction.adjust(self.parameters))

    def step(self, chunks: Iterator[tuple[list[Tensor], float]]) -> float:
        """One step from chunks of (gradients (units, *shape) of each parameter, the sum of the units' losses)."""
        self.private.zero_grad()
        total, sums = 0.0, [torch.zeros_like(parameter) for parameter in self.parameters]
        for gradients, loss in chunks:
            total += loss
            torch._foreach_add_(sums, clipped_sum(gradients, self.job.privacy.clipping_norm))
        # The step itself is one of no unit at all: so an empty draw needs no case of its own.
        for parameter, clipped in zip(self.parameters, sums, strict=True):
            parameter.summed_grad = clipped  # type: ignore[attr-defined]
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        self.private.step()
        self.private.zero_grad(set_to_none=True)
        return total

    def plain_step(self, task: ModuleType, batch: Any, class_weights: Sequence[float]) -> float:
        """One ordinary step, of a part that sees no image: what it learns comes from the private parts."""
        self.base.zero_grad(set_to_none=True)
        loss = task.step(self.model, batch, self.job, class_weights, self.part.prefix)
        loss.backward(inputs=self.parameters)
        if self.correction is not None:
            self.correction.adjust(self.parameters)
        self.base.step()
        self.base.zero_grad(set_to_none=True)
        return float(loss.detach())


def clipped_sum(gradients: Sequence[Tensor], bound: float) -> list[Tensor]:
    """The sum over the units of their gradients, each scaled down to an L2 norm of ``bound`` over all parameters.

    Opacus does the same parameter by parameter; where units come one by one that took as long as the gradients.

    Args:
        gradients: of each parameter, (units, *shape).

    Raises:
        SiteRefusal: a gradient is not finite.
    """
    if len(gradients[0]) == 1:
        norms = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))[None]
    else:
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    if not torch.isfinite(norms).all():
        raise SiteRefusal("diverged", "a gradient is not finite; lower train.learning_rate")
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)
    if len(factors) == 1:
        return [gradient[0] for gradient in torch._foreach_mul(list(gradients), factors[0])]
    return [torch.einsum("u,u...->...", factors, gradient) for gradient in gradients]


def _private_optimizer(
    base: torch.optim.Optimizer, noise: float, bound: float, expected: float, cryptographic: bool
) -> Any:
    """Opacus' optimiser: noises a sum of clipped gradients, divides it by ``expected``, then steps ``base``."""
    from opacus.optimizers import DPOptimizer

    class Cryptographic(DPOptimizer):  # type: ignore[misc]
        def add_noise(self) -> None:
            for parameter in self.params:
                drawn = cryptographic_normal(parameter.shape, self.noise_multiplier * self.max_grad_norm)
                parameter.grad = (parameter.summed_grad + drawn.to(parameter.summed_grad)).view_as(parameter)

    device = base.param_groups[0]["params"][0].device
    generator = None if cryptographic else secret_generator(device)
    kind = Cryptographic if cryptographic else DPOptimizer
    return kind(
        base,
        noise_multiplier=noise,
        max_grad_norm=bound,
        expected_batch_size=expected,
        loss_reduction="mean",
        generator=generator,
    )
