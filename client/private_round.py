"""One round under differential privacy: the budget is taken, then trained with, then the books are closed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor, nn

from client.ledger import Ledger, Reservation, Terms, fingerprint, ledger_path, spent_in
from client.policy import Policy, read_policy
from client.privacy import train_privately
from client.workspace import Workspace
from shared.accounting import Mechanism, epsilon, job_noise, noisy_sites
from shared.config import Job
from shared.corrections import Correction
from shared.tasks import load_task
from shared.training import Trained


def train_on_budget(
    model: nn.Module,
    job: Job,
    workspace: Workspace,
    run: str,
    round_: int,
    class_weights: Sequence[float],
    examples: float = 0.0,
    moments: dict[str, Tensor] | None = None,
    correction: Correction | None = None,
) -> tuple[Trained, float]:
    """A round of DP-SGD, and epsilon of all that was ever spent, where most was, at the job's delta.

    The ledger lies beside the site.toml where that limits epsilon, and so outlives every run; else nothing is ever
    refused, and it lies in the node's home with the rest of the run. A node that pools several sites spends from each.

    Args:
        examples: by what the sum of gradients is divided, times the sampling rate: with shared noise the same number at
            all sites. 0 takes what the site declares, or the true number.

    Raises:
        SiteRefusal: the budget does not reach ("budget-spent"), or as ``train_privately``.
    """
    policy, data = workspace.policy, workspace.data.subset("train")
    noise = job_noise(job)
    mechanism = Mechanism(noise, job.privacy.sampling_rate, job.train.local_steps)
    paths: dict[Path, list[Policy]] = {}
    for file in workspace.files:  # without limits several files have one ledger, that of the home
        own = read_policy(file)
        paths.setdefault(ledger_path(file if own.max_epsilon else workspace.home / file.name), []).append(own)
    books = [(Ledger(path), _terms(policies, job)) for path, policies in paths.items()]
    with ExitStack() as stack:
        taken = [
            stack.enter_context(ledger.round(run, round_, mechanism, terms, fingerprint(data.samples)))
            for ledger, terms in books
        ]
        trained = train_privately(
            model,
            load_task(job.task),
            data,
            job,
            site=workspace.name,
            noise=noise * own_share(job),
            first_step=(round_ - 1) * job.train.local_steps,
            steps=job.train.local_steps,
            class_weights=class_weights,
            declared=examples or (0 if policy.exact_counts else policy.declared_images),
            cryptographic=policy.cryptographic_noise,
            moments=moments,
            correction=correction,
        )
    return trained, max(_told(*book, reservation, job) for book, reservation in zip(books, taken, strict=True))


def _told(ledger: Ledger, terms: Terms, reservation: Reservation, job: Job) -> float:
    """Epsilon at the delta that the job names, beside which the server shows it; the site decides at its own."""
    if terms.delta == job.privacy.delta:
        return reservation.epsilon
    return epsilon(spent_in(ledger.history()), job.privacy.delta, job.privacy.accountant)


def own_share(job: Job) -> float:
    """Which part of the noise's standard deviation a site adds itself.

    Shared noise is as large as promised once ``federation.min_sites`` sites have added theirs: variances add up. With
    fewer the sum is not unmasked, which each site sees to (``client.secure``).
    """
    return float(max(noisy_sites(job), 1) ** -0.5)


def _terms(policies: Sequence[Policy], job: Job) -> Terms:
    """The strictest of the rules that share a ledger."""
    delta = min((policy.max_delta for policy in policies if policy.max_delta), default=job.privacy.delta)
    most = min((policy.max_epsilon for policy in policies if policy.max_epsilon), default=0.0)
    return Terms(delta, most, job.privacy.unit, job.privacy.accountant)
