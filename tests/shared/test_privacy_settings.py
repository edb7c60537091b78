"""What a job's [privacy] asks of its other settings: each mistake is one line that says what to set."""

from __future__ import annotations

from typing import Any

import pytest

from shared.config import job_from_flat
from shared.errors import UserError
from shared.tasks import load_task

LOCAL = {"privacy.dp": "local", "privacy.epsilon": 8.0, "train.class_weights": "none"}
DISTRIBUTED = LOCAL | {
    "privacy.dp": "distributed",
    "privacy.secure_aggregation": True,
    "train.optimizer": "sgd",
    "train.local_steps": 1,
    "federation.weighting": "equal",
    "federation.max_update_norm": 1.0,
}
CENTRAL = LOCAL | {"privacy.dp": "central", "privacy.epsilon": 0.0, "privacy.noise_multiplier": 1.0}


@pytest.mark.parametrize("flat", [{}, LOCAL, DISTRIBUTED, CENTRAL, CENTRAL | {"train.precision": "bfloat16"}])
def test_settings_that_go_together_are_accepted(flat: dict[str, Any]) -> None:
    assert job_from_flat(flat).privacy.dp == flat.get("privacy.dp", "none")


@pytest.mark.parametrize(
    ("good", "change", "named"),
    [
        ({}, {"privacy.epsilon": 8.0}, 'privacy.epsilon = 8, but privacy.dp = "none" adds no noise'),
        ({}, {"privacy.noise_multiplier": 1.5}, 'privacy.noise_multiplier = 1.5, but privacy.dp = "none"'),
        (LOCAL, {"privacy.epsilon": 0.0}, "set privacy.epsilon or privacy.noise_multiplier"),
        (DISTRIBUTED, {"privacy.epsilon": 0.0}, "set privacy.epsilon or privacy.noise_multiplier"),
        (CENTRAL, {"privacy.noise_multiplier": 0.0}, "set privacy.epsilon or privacy.noise_multiplier"),
        (LOCAL, {"train.class_weights": "balanced"}, 'train.class_weights = "balanced": privacy.dp = "local" needs'),
        (CENTRAL, {"train.class_weights": "balanced"}, 'privacy.dp = "central" needs "none"'),
        (LOCAL, {"train.precision": "bfloat16"}, 'train.precision = "bfloat16"'),
        (DISTRIBUTED, {"train.precision": "bfloat16"}, 'train.precision = "bfloat16"'),
        (DISTRIBUTED, {"privacy.secure_aggregation": False}, "privacy.secure_aggregation = false"),
        (
            DISTRIBUTED,
            {"train.optimizer": "adamw"},
            'train.optimizer = "adamw": privacy.dp = "distributed" needs "sgd"',
        ),
        (DISTRIBUTED, {"train.local_steps": 2}, "train.local_steps = 2"),
        (LOCAL, {"data.max_per_class": 100}, "data.max_per_class = 100"),
        (LOCAL, {"data.harmonise": "site-zscore"}, 'data.harmonise = "site-zscore": measured on all images of a site'),
        (DISTRIBUTED, {"data.harmonise": "polarity, site-percentiles"}, 'data.harmonise = "site-percentiles"'),
        (DISTRIBUTED, {"federation.weighting": "examples"}, 'federation.weighting = "examples"'),
    ],
)
def test_settings_that_undo_privacy_are_one_line(good: dict[str, Any], change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        job_from_flat(good | change)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "set" in str(caught.value) or "take" in str(caught.value)


@pytest.mark.parametrize("flat", [LOCAL, DISTRIBUTED, CENTRAL])
def test_the_reference_network_of_a_generator_is_as_private_as_the_generator(flat: dict[str, Any]) -> None:
    job = job_from_flat(flat | {"task": "generation", "model.name": "dcgan"})
    reference = load_task("generation").reference(job)
    assert reference.privacy == job.privacy
