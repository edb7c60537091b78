"""The registry of tasks. Every task is a folder with the same files and gives the same few names.

    check(job), raising UserError                      models.py
    build_model(job) -> nn.Module                      models.py
    read_samples(site, job) -> list[Sample]            data.py
    load(samples, site, job) -> Dataset                data.py
    count_classes(dataset, job) -> [int]               learning.py
    class_weights(counts of all sites, job) -> [float] learning.py
    step(model, batch, job, class_weights) -> loss     learning.py
    collect(model, dataset, job) -> sums               learning.py
    consistent(sums, job) -> bool                      metrics.py
    summarise(sums, job) -> {name: Estimate}           metrics.py

``sums`` is a flat dict of ints, floats and lists of them that adds up over sites (see ``add_sums``).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType

Sums = dict[str, int | float | list[int] | list[float]]

# task -> its metrics; +1 where more is better, -1 where less is better.
METRICS: dict[str, dict[str, int]] = {
    "classification": {"auroc": 1, "balanced_accuracy": 1, "accuracy": 1, "loss": -1},
}


def load_task(name: str) -> ModuleType:
    """The task's package; importing it imports torch, so call this only where models run."""
    return importlib.import_module(f"shared.tasks.{name}")


def add_sums(parts: Iterable[Mapping[str, object]]) -> Sums:
    """Add sums key by key, lists element by element. A key that one part lacks counts as zero there.

    Raises:
        ValueError: two parts give lists of different length or a list and a number under one key.
    """
    total: Sums = {}
    for part in parts:
        for key, value in part.items():
            held = total.get(key)
            if held is None:
                total[key] = list(value) if isinstance(value, list) else value  # type: ignore[assignment]
            elif isinstance(held, list) and isinstance(value, list):
                total[key] = [a + b for a, b in zip(held, value, strict=True)]
            elif isinstance(held, (int, float)) and isinstance(value, (int, float)):
                total[key] = held + value
            else:
                raise ValueError(f"sums under {key!r} are a list here and a number there")
    return total
