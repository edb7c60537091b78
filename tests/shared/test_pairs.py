"""Choices of a federation that exclude each other are refused with the reason, and with what to set."""

from __future__ import annotations

import pytest

from shared.config import Scalar, job_from_flat
from shared.errors import UserError
from shared.strategies import AGGREGATORS

SECURE = {"privacy.secure_aggregation": True, "federation.max_update_norm": 1.0}
CENTRAL = {"privacy.dp": "central", "privacy.epsilon": 1.0, "train.class_weights": "none"}
LOCAL = CENTRAL | {"privacy.dp": "local"}


@pytest.mark.parametrize(
    ("flat", "key", "reason"),
    [
        *[
            (SECURE | {"federation.aggregator": name}, "federation.aggregator", "each site's own reply")
            for name in AGGREGATORS
            if name != "mean"
        ],
        (CENTRAL | {"federation.aggregator": "median"}, "federation.aggregator", "sum of clipped changes"),
        (CENTRAL | {"federation.strategy": "bulyan"}, "federation.aggregator", "sum of clipped changes"),
        (SECURE | {"federation.order": "cyclic"}, "federation.order", "each site's model to the next"),
        (CENTRAL | {"federation.order": "cyclic"}, "federation.order", "sum of clipped changes"),
        (SECURE | {"federation.strategy": "qffl"}, "federation.weighting", "each site's own reply"),
        (LOCAL | {"federation.strategy": "qffl"}, "federation.weighting", "each site's loss"),
        (CENTRAL | {"federation.strategy": "qffl"}, "federation.weighting", "each site's loss"),
        (LOCAL | {"train.local_epochs": 1.0}, "train.local_epochs", "counts train.local_steps"),
        ({"federation.order": "cyclic", "federation.aggregator": "krum"}, "federation.aggregator", "nothing to merge"),
        ({"federation.order": "cyclic", "federation.weighting": "loss"}, "federation.weighting", "weighs nobody"),
        ({"federation.server_learning_rate": 0.1}, "federation.server_learning_rate", "takes the aggregate as it is"),
        ({"federation.server_schedule": "cosine"}, "federation.server_schedule", "takes the aggregate as it is"),
        ({"train.local_epochs": 1.0, "train.local_steps": 2}, "train.local_steps", "set one of them"),
        (SECURE | {"federation.codec": "int8"}, "federation.codec", "do not add up"),
        (SECURE | {"federation.strategy": "scaffold"}, "privacy.secure_aggregation", "in plain"),
        (SECURE | {"federation.strategy": "fednova"}, "privacy.secure_aggregation", "divided by its own steps"),
        (SECURE | {"federation.strategy": "feddyn"}, "privacy.secure_aggregation", "drop out unseen"),
        (CENTRAL | {"federation.strategy": "scaffold"}, "privacy.dp", "not on the control variates"),
        (CENTRAL | {"federation.strategy": "fedbn"}, "privacy.dp", "without the server's noise"),
        (LOCAL | {"federation.strategy": "ditto"}, "privacy.dp", "trained without noise"),
        (LOCAL | {"federation.finetune_steps": 3}, "privacy.dp", "trained without noise"),
        ({"federation.strategy": "scaffold", "federation.aggregator": "krum"}, "federation.aggregator", "on a mean"),
        ({"federation.strategy": "scaffold", "federation.order": "cyclic"}, "federation.correction", "mean of changes"),
        ({"federation.strategy": "scaffold", "federation.weighting": "loss"}, "federation.weighting", "stay the same"),
        ({"federation.strategy": "scaffold", "federation.local": "head"}, "federation.local", "correct nothing"),
        ({"federation.strategy": "feddyn", "federation.codec": "int8"}, "federation.codec", "round by round"),
        (
            {"federation.strategy": "feddyn", "federation.server_optimizer": "adam"},
            "federation.server_optimizer",
            "own",
        ),
        ({"federation.strategy": "ditto", "federation.finetune_steps": 3}, "federation.finetune_steps", "already"),
        ({"federation.strategy": "fedper", "model.freeze": "backbone"}, "model.freeze", "nothing would travel"),
        ({"federation.order": "cyclic", "federation.codec": "int8"}, "federation.codec", "another model"),
        (
            LOCAL | {"federation.strategy": "fedprox", "privacy.gradients": "hooks"},
            "privacy.gradients",
            "the weights that are corrected",
        ),
        (
            {"task": "generation", "data.classes": "a", "model.name": "dcgan", "train.local_epochs": 1.0},
            "train.local_epochs",
            "kept average",
        ),
        (
            {"task": "generation", "data.classes": "a", "model.name": "dcgan", "federation.strategy": "fedbn"},
            "task",
            "whole generator",
        ),
    ],
)
def test_a_pair_that_cannot_be_is_refused(flat: dict[str, Scalar], key: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        job_from_flat(flat)
    text = str(caught.value)
    assert text.startswith(f"{key} = ")
    assert reason in text
    assert "; use " in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "flat",
    [
        SECURE | {"federation.strategy": "fedadam"},
        CENTRAL | {"federation.strategy": "fedyogi"},
        LOCAL | {"federation.strategy": "fedmedian"},
        {"federation.order": "cyclic", "federation.server_optimizer": "momentum"},
        {"federation.aggregator": "krum", "federation.server_optimizer": "adam", "federation.fraction": 0.5},
    ],
)
def test_what_goes_together_is_taken(flat: dict[str, Scalar]) -> None:
    job_from_flat(flat)


def test_local_steps_follow_from_epochs_and_images() -> None:
    job = job_from_flat({"train.local_epochs": 2.0, "train.batch_size": 32})
    assert [job.local_steps(images) for images in (1, 16, 17, 320)] == [1, 1, 2, 20]
    assert job_from_flat({"train.local_steps": 5}).local_steps(1000) == 5
