"""Which networks there are: by task, with their size and what goes in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from shared.config import Job, job_from_flat, nearest
from shared.errors import UserError
from shared.tasks import TASKS, load_task
from shared.terminal import wrapped
from shared.weights import REFERENCE


class Row(NamedTuple):
    """A network at the default settings: its trainable parameters, and the shape of one case as it goes in."""

    task: str
    model: str
    parameters: int
    shape: str


def default_job(task: str, model: str) -> Job:
    """The job that names this model and leaves all else at its default."""
    return job_from_flat({"task": task, "model.name": model})


def rows(tasks: Iterable[str] = TASKS) -> Iterator[Row]:
    """Every registered model of these tasks, in the order of the registries."""
    import torch

    for name in tasks:
        task = load_task(name)
        for model in task.MODELS:
            job = default_job(name, model)
            with torch.device("meta"):  # shapes without memory: nothing is computed
                network = task.build_model(job)
            count = sum(
                parameter.numel()
                for label, parameter in network.named_parameters()
                if parameter.requires_grad and not label.startswith(f"{REFERENCE}.")
            )
            yield Row(name, model, count, input_shape(job))


def input_shape(job: Job) -> str:
    """The shape of one case as it enters the network, such as ``1 × 64 × 64``; of several inputs, joined by ``+``.

    Where sizes are the case's own, that of an example. Numbers beside (lengths) are left out.
    """
    inputs = [value for value in load_task(job.task).example(job) if value.ndim > 1]
    return " + ".join(" × ".join(map(str, value.shape[1:])) for value in inputs)


def lines(task: str = "") -> Iterator[str]:
    """The list as a person reads it, of one task or of all.

    Raises:
        UserError: there is no such task.
    """
    if task and task not in TASKS:
        raise UserError(f"{task!r}: no such task; there are {', '.join(TASKS)}{nearest(task, TASKS)}")
    for name in [task] if task else TASKS:
        found = list(rows([name]))
        yield from wrapped(f"{name}: {TASKS[name].about}", "    ")
        width = max(len(row.model) for row in found)
        for row in found:
            yield f"  {row.model:<{width}}  {row.parameters:>11,} parameters  {row.shape}"
