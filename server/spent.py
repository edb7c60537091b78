"""What differential privacy a run gave, of its rounds and its job alone."""

from __future__ import annotations

from typing import Any

from server.store import Event
from shared.accounting import Mechanism, epsilon, job_noise, noisy_sites
from shared.config import Job
from shared.tasks import load_task


def privacy_spent(rounds: list[Event], job: Job) -> dict[str, Any]:
    """What differential privacy the rounds gave: ``epsilon`` at ``delta``, ``unit`` and ``kind``; nothing without.

    Local noise: what the sites' own ledgers said last, ``sites``, of which ``epsilon`` is the largest; earlier runs on
    the same images count in it. Under secure aggregation no site tells its own: then, and of shared and central noise,
    it is that of this run alone, with the reference that it may have trained, of a unit that was in all rounds.
    """
    asked = job.privacy
    if asked.dp == "none":
        return {}
    found: dict[str, Any] = {"kind": asked.dp, "unit": asked.unit, "delta": asked.delta}
    if asked.dp == "local" and not asked.secure_aggregation:
        rows = [row for event in rounds for row in event["trained"]]
        sites = {row["site"]: row["epsilon"] for row in rows if row.get("epsilon") is not None}
        return found | {"sites": sites, "epsilon": max(sites.values(), default=0.0)}
    times = sum(1 + event.get("repeated", 0) for event in rounds)  # the server saw also those that were done again
    history = [_mechanism(job, times)]
    task = load_task(job.task)
    if hasattr(task, "reference"):  # the same sites trained the network first that a generator is measured by
        first = task.reference(job)
        history.append(_mechanism(first, first.federation.rounds))
    found["epsilon"] = epsilon(history, asked.delta, asked.accountant)
    if asked.dp == "central":
        return found | {"unit": "site"}
    return found | ({"noisy_sites": noisy_sites(job)} if asked.dp == "distributed" else {})


def _mechanism(job: Job, rounds: int) -> Mechanism:
    """What so many rounds of a job add up to; of central noise every site counts as drawn in each."""
    if job.privacy.dp == "central":
        return Mechanism(job_noise(job), 1.0, rounds)
    return Mechanism(job_noise(job), job.privacy.sampling_rate, rounds * job.train.local_steps)
