"""What a task says of one prediction so that it can be explained: the score, and how its input is looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.config import Job, nearest
from shared.errors import UserError


@dataclass(frozen=True)
class Explainable:
    """One prediction as a function of what went into the network.

    ``inputs`` is one case as the network takes it, (1, …), normalised. ``score`` maps inputs (n, …) to (n,), the
    log-odds of the class asked about, or their mean over the place asked about; ``label`` names it and ``value`` says
    how likely it is held, 0..1. ``pictures`` float32 (k, h, w) or (k, h, w, 3) in [0, 1] is what the network sees (one
    picture, the images of a case, frames, slices) under ``names``; ``planes`` turns numbers shaped like ``inputs`` into
    (k, h, w) by adding up what belongs to one pixel. ``window`` is the part, shaped like one case, that occlusion
    covers at a time; ``head`` is the prefix of the modules whose maps Grad-CAM does not take. Where the score is that
    of a place, ``region`` bool (k, h, w) is the place and ``where`` says so. ``blank``, shaped like ``inputs``, is the
    median that stands for nothing to see; None where black and grey do. ``extent`` is the size that the network's maps
    cover where it pads its inputs, at their ends, beyond the size they have; empty where it does not.
    """

    inputs: Tensor
    score: Callable[[Tensor], Tensor]
    label: str
    value: float
    pictures: np.ndarray
    names: tuple[str, ...]
    planes: Callable[[Tensor], Tensor]
    window: tuple[int, ...]
    head: str = "head."
    where: str = ""
    region: np.ndarray | None = None
    blank: Tensor | None = None
    extent: tuple[int, ...] = ()


def log_odds(logits: Tensor, job: Job) -> Tensor:
    """log p / (1 - p) of each class from logits (n, classes, …), of softmax or, if multi-label, of the sigmoid."""
    if job.data.multilabel:
        return logits
    return log_odds_of_softmax(logits)


def log_odds_of_softmax(logits: Tensor) -> Tensor:
    """log p / (1 - p) of each class from logits (n, classes, …): the class's logit against those of all others."""
    classes = logits.shape[1]
    if classes < 2:
        return logits
    others = [torch.cat([logits[:, :k], logits[:, k + 1 :]], 1).logsumexp(1) for k in range(classes)]
    return logits - torch.stack(others, 1)


def class_number(name: str, names: tuple[str, ...]) -> int:
    """The index of a class a person names.

    Raises:
        UserError: there is none of that name.
    """
    if name not in names:
        raise UserError(f"--class {name}: the model knows {', '.join(names)}{nearest(name, names)}")
    return names.index(name)


def as_picture(image: Tensor) -> np.ndarray:
    """(1, h, w) as (h, w) and (3, h, w) as (h, w, 3)."""
    picture: np.ndarray = (image[0] if len(image) == 1 else image.movedim(0, -1)).cpu().numpy()
    return picture


def window_of(size: Sequence[int]) -> tuple[int, ...]:
    """An eighth of a picture each way, a quarter of a volume: enough to hide a finding, little enough to place it."""
    return tuple(max(1, side // (8 if len(size) == 2 else 4)) for side in size)
