"""A round of plain training on a site's own images: how many steps, which of the run they are, by what schedule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from client.workspace import Workspace
from shared.config import Job
from shared.corrections import Correction
from shared.tasks import load_task
from shared.training import Trained, train


def train_round(
    model: nn.Module,
    job: Job,
    workspace: Workspace,
    round_: int,
    class_weights: Sequence[float],
    moments: dict[str, Tensor] | None,
    correction: Correction | None,
) -> Trained:
    """Train ``model`` in place for the steps of round ``round_``; arguments as for ``shared.training.train``.

    The number of steps follows from the images that the site tells of, as the server reckons it.
    """
    steps = job.local_steps(workspace.told["train"].images)
    return train(
        model,
        load_task(job.task),
        workspace.data.subset("train"),
        job,
        site=workspace.name,
        first_step=(round_ - 1) * steps,
        steps=steps,
        total=job.federation.rounds * steps,
        class_weights=class_weights,
        moments=moments,
        correction=correction,
    )
