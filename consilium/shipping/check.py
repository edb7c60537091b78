"""Is an exported file the network it was made of? Both are run on the same inputs and what comes out is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consilium.shipping.formats import random_inputs
from consilium.shipping.graph import Graph, Runner, Shipped, Spec
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.tasks import load_task

TOLERANCE = 1e-4
CPU = torch.device("cpu")
# (cases at once, steps of a sequence, multiples by which an image is larger than a patch) of each random input: others
# than those that were followed when the file was made, so that a size that got fixed in it shows.
SIZES = ((1, 5, 0), (3, 9, 1), (2, 1, 2))


class Compared(NamedTuple):
    """``difference``: the largest of |a - b| / max(1, |b|) over all numbers that came out, b of the PyTorch network;
    infinite where the shapes differ. ``numbers``: how many were compared, ``inputs`` on how many inputs. ``alike``: the
    share of numbers whose largest neighbour along the classes is the same: the same decision; 1 where there is none."""

    inputs: int = 0
    numbers: int = 0
    difference: float = 0.0
    alike: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether the two agree; false where nothing was compared."""
        return self.inputs > 0 and self.difference <= TOLERANCE

    def facts(self) -> dict[str, Any]:
        """For the sidecar."""
        return {"inputs": self.inputs, "numbers_compared": self.numbers, "largest_difference": self.difference}


def on_random(graph: Graph, run: Runner, job: Job, spec: Spec) -> Compared:
    """The file against the graph it was made of, on random inputs of several sizes."""
    pairs = []
    for seed, (batch, steps, more) in enumerate(SIZES):
        generator = torch.Generator().manual_seed(1 + seed)
        inputs = random_inputs(job, spec, generator, batch, steps, more)
        with torch.inference_mode():
            pairs.append((tensors(run(inputs)), tensors(graph(*inputs))))
    return compare(pairs, job)


def on_images(model: nn.Module, run: Runner, job: Job, spec: Spec, data: Dataset) -> Compared:
    """The file against the network, both as the task itself uses them, on decoded images; one at a time."""
    shipped = Shipped(run, job, spec)

    def pairs() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        for index in range(len(data)):
            inputs = network_inputs(data, index, job)
            with torch.inference_mode():
                found, expected = tensors(shipped(*inputs)), tensors(model(*inputs))
            # What an autoencoder's code costs serves training alone and is not shipped.
            yield (found[:1], expected[:1]) if job.task == "reconstruction" else (found, expected)

    return compare(pairs(), job)


def network_inputs(data: Dataset, index: int, job: Job) -> tuple[Any, ...]:
    """What the task gives its network of one case. Of an image that goes through in windows, the one in the middle."""
    task = load_task(job.task)
    if job.task == "segmentation":
        from shared.tasks.segmentation.data import whole_image
        from shared.tasks.segmentation.learning import in_one_piece

        if in_one_piece(data.columns["image"][index].shape[1:], job):
            return (whole_image(data, index, job)[None],)
        return (task.batch(data, [index], job, CPU, train=False).images,)
    found = task.batch(data, [index], job, CPU, train=False)
    if job.task == "classification":
        inputs: tuple[Any, ...] = found.inputs
        return inputs
    if job.task == "sequence":
        return found.series, found.lengths
    return ([found.images[0]],) if job.task == "detection" else (found.images,)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of what a network gives, in order."""
    if isinstance(value, Tensor):
        return [value]
    # Detectors differ in the order of their dict; by name it is boxes, labels, scores.
    parts = [value[name] for name in sorted(value)] if isinstance(value, dict) else value
    return [item for part in parts for item in tensors(part)]


def compare(pairs: Any, job: Job) -> Compared:
    """Over pairs of (what the file gave, what the network gave); boxes are compared whatever their order."""
    inputs, numbers, worst = 0, 0, 0.0
    same, of = 0, 0
    for found, expected in pairs:
        inputs += 1
        if job.task == "detection":
            found, expected = _sure_boxes(found), _sure_boxes(expected)
        if [part.shape for part in found] != [part.shape for part in expected]:
            worst = float("inf")
            continue
        for a, b in zip(found, expected, strict=True):
            a, b = a.double(), b.double()
            numbers += b.numel()
            if not bool(torch.isfinite(a).all()):
                worst = float("inf")
            elif b.numel():
                worst = max(worst, float(((a - b).abs() / b.abs().clamp(min=1)).max()))
        if job.task in ("classification", "sequence", "segmentation"):
            chosen = [part[0] > 0 if job.data.multilabel else part[0].argmax(1) for part in (found, expected)]
            same, of = same + int((chosen[0] == chosen[1]).sum()), of + chosen[1].numel()
    return Compared(inputs, numbers, worst, same / of if of else 1.0)


def _sure_boxes(found: Sequence[Tensor]) -> list[Tensor]:
    """Boxes, labels and scores sorted by label and place: of equal scores any may come first. Those whose score is the
    least that is kept, to the tolerance, are left out: rounding decides whether they are there."""
    from shared.tasks.detection.models import LEAST_SCORE

    boxes, labels, scores = (part[found[2] > LEAST_SCORE + TOLERANCE] for part in found)
    keys = torch.cat([labels[:, None].double(), boxes.double().mul(10).round()], 1).tolist()
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return [boxes[order], labels[order], scores[order]]
