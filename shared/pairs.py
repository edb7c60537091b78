"""Choices of a federation that do not go together: each is refused with the reason, and with what to set instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.errors import UserError
from shared.strategies import AGGREGATORS

if TYPE_CHECKING:
    from shared.config import Job

_SUMS_ONLY = "needs each site's own reply, which privacy.secure_aggregation hides"
_HIDDEN_LOSS = "needs each site's loss, which differential privacy does not let out"


def check_federation(job: Job) -> None:
    """Raise UserError where two choices of the federation, or one and the job's privacy, exclude each other."""
    asked, privacy = job.federation, job.privacy
    if privacy.secure_aggregation:
        summed = [name for name, facts in AGGREGATORS.items() if facts.summed]
        _only("federation.aggregator", asked.aggregator, summed, _SUMS_ONLY)
        _only("privacy.dp", privacy.dp, ["none", "local", "distributed"], _SUMS_ONLY)
        _only("federation.weighting", asked.weighting, ["examples", "equal"], _SUMS_ONLY)
        _only("federation.order", asked.order, ["parallel"], "shows each site's model to the next one")
        _only("federation.codec", asked.codec, ["none"], "under masks, changes with scales of their own do not add up")
    if privacy.dp == "central":
        why = 'privacy.dp = "central" is proven for a sum of clipped changes'
        _only("federation.aggregator", asked.aggregator, ["mean"], why)
        _only("federation.order", asked.order, ["parallel"], why)
    if privacy.dp != "none":
        _only("federation.weighting", asked.weighting, ["examples", "equal"], _HIDDEN_LOSS)
        _only("train.local_epochs", job.train.local_epochs, [0.0], "differential privacy counts train.local_steps")
    if asked.order == "cyclic":
        _only("federation.aggregator", asked.aggregator, ["mean"], 'order = "cyclic" leaves nothing to merge')
        _only("federation.weighting", asked.weighting, ["examples", "equal"], "a cycle weighs nobody")
        _only("federation.codec", asked.codec, ["none"], "a cycle sends a site another model than the one it has")
    if asked.server_optimizer == "none":
        why = 'federation.server_optimizer = "none" takes the aggregate as it is'
        _only("federation.server_learning_rate", asked.server_learning_rate, [0.0], why)
        _only("federation.server_schedule", asked.server_schedule, ["constant"], why)
    if job.train.local_epochs:
        _only("train.local_steps", job.train.local_steps, [1], "train.local_epochs is set, too; set one of them")


def fewest(job: Job) -> int:
    """How many replies the job's aggregator needs in a round."""
    return AGGREGATORS[job.federation.aggregator].least(job.federation.byzantine, job.federation.trim)


def _only(key: str, value: object, allowed: Sequence[object], why: str) -> None:
    if value not in allowed:
        raise UserError(f"{key} = {value!r}: {why}; use {' or '.join(map(str, allowed))}")
