"""What a setting of a job is: a field with its default, its meaning and the values it may have."""

from __future__ import annotations

from dataclasses import field
from typing import Any

Scalar = str | int | float | bool


def knob(
    default: Scalar,
    help: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    tasks: tuple[str, ...] = (),
) -> Any:
    """A setting of the job: its default, what it means, and which values are allowed.

    ``tasks``: those that read it, where others would pass over it without a word; jobs of these refuse it.
    """
    allowed = {"choices": choices, "low": low, "high": high, "tasks": tasks}
    return field(default=default, metadata={"help": help, **allowed})
