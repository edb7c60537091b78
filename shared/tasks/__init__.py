"""The registry of tasks. Every task is a folder with the same files and gives the same few names.

    check(job), raising UserError                              models.py
    build_model(job) -> nn.Module                              models.py
    parts(job) -> (Part, …)                                    models.py
    head_prefix(job) -> str or (str, …)                        models.py
    example(job) -> (Tensor, …), a network's input of one case models.py
    read_samples(site, job) -> list[Sample]                    data.py
    decode(sample, site, job) -> {column: array}               data.py
    decoded_by(job) -> str                                     data.py
    batch(data, indices, job, device, train) -> Batch          data.py
    count_classes(data, job) -> [int]                          learning.py
    class_weights(counts of all sites, job) -> [float]         learning.py
    step(model, batch, job, class_weights, part) -> loss       learning.py
    collect(model, data, job, device) -> sums                  learning.py
    consistent(sums, job) -> bool                              metrics.py
    summarise(sums, job) -> {name: Estimate}                   metrics.py
    predict(model, data, job, device) -> one Prediction each   predict.py
    write(predictions, site, job, out) -> list[Path]           predict.py

``MODELS`` in models.py is the registry: each entry has ``build(job)`` and ``no_export``, why torch.export cannot take
the network, or "" where it can.

Some verbs a task has only where they mean something:

    notices(sums, job) -> [str]  what the cases of a site lack or what was left out of them, in words; metrics.py
    build_like(job, names) -> nn.Module      the network that arrays of these names are of, where the job alone does
                                 not say: its normalisation may be that of the weights it started from; models.py
    reference(job) -> Job        a job whose model is trained first and is the measure of this one; models.py
    blank(count, job, device) -> Batch       a batch without images, for a part that sees none; data.py
    show(model, job) -> {name: picture}      what the server can draw from the model alone; learning.py
    generate(…)                  instead of a prediction; predict.py
    find(path, job) -> [Sample]  the unlabelled cases in a folder or file, where a case is not one image file, paths
                                 relative to the folder, or to that of the file; predict.py, see samples.find_images
    explainable(model, data, job, device, name) -> Explainable   the score of class ``name``, or of the likeliest, for
                                 the first case of ``data``; explain.py
    draw(picture, prediction, job) -> picture    where a prediction is best seen in the image itself; predict.py

``sums`` is a flat dict of ints, floats and lists of them, none negative, that adds up over sites (see ``add_sums``);
its ``n`` is the number of samples.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from shared.config import Job

Sums = dict[str, int | float | list[int] | list[float]]


class Facts(NamedTuple):
    """What is known of a task without importing it.

    ``metrics`` holds +1 where more is better, -1 where less is better; the first picks the best round unless the job
    says otherwise. ``classes`` is the least number of classes a job must name. ``case`` is what a report calls one
    sample, ``counted`` what ``count_classes`` counts. ``only_if`` says of a metric that not every job of the task has
    which jobs have it: a site that forbids a figure declines those alone.
    """

    about: str
    metrics: dict[str, int]
    classes: int
    formats: tuple[str, ...]
    case: str = "image"
    counted: str = "images"
    only_if: Mapping[str, Callable[[Job], bool]] = {}

    def computed(self, job: Job) -> tuple[str, ...]:
        """Those of ``metrics`` that a job of this task has."""
        return tuple(name for name in self.metrics if name not in self.only_if or self.only_if[name](job))


_LABELLED = ("auto", "csv", "folder", "npz", "coco-crops")
_LABELS = {"auroc": 1, "balanced_accuracy": 1, "accuracy": 1, "loss": -1}
_LABELS_OF_IMAGE = {f"image_{name}": sign for name, sign in _LABELS.items() if name != "loss"}
_MASKS = {"dice": 1, "iou": 1, "dice_pooled": 1, "iou_pooled": 1, "hd95": -1, "instance_f1": 1, "aji": 1, "loss": -1}

TASKS: dict[str, Facts] = {
    "classification": Facts("one or several labels per image, or per case of several images", _LABELS, 2, _LABELLED),
    "segmentation": Facts(
        "the class of every pixel or voxel",
        _MASKS | _LABELS_OF_IMAGE,
        1,
        ("auto", "csv", "masks"),
        only_if=dict.fromkeys(_LABELS_OF_IMAGE, lambda job: bool(job.labels))
        | dict.fromkeys(("instance_f1", "aji"), lambda job: job.data.masks == "instances"),
    ),
    "detection": Facts(
        "boxes around objects",
        {"map50": 1, "map": 1, "map75": 1, "sensitivity_1fp": 1},
        1,
        ("auto", "csv", "coco", "voc"),
        counted="boxes",
    ),
    "generation": Facts(
        "invented images that look like the real ones",
        {"frechet": -1, "synthetic_accuracy": 1, "memorised": -1},
        1,
        _LABELLED,
        only_if={
            "synthetic_accuracy": lambda job: job.model.conditional,
            # It looks at training images, which the noise of their site's own is there to hide.
            "memorised": lambda job: job.privacy.dp not in ("local", "distributed"),
        },
    ),
    "sequence": Facts(
        "one label per film, scan series or signal",
        _LABELS,
        2,
        ("auto", "csv", "folder", "npz"),
        case="sequence",
        counted="sequences",
    ),
    "reconstruction": Facts(
        "the image itself; what comes out badly is unlike the training images",
        {"mse": -1, "psnr": 1, "ssim": 1, "auroc": 1},
        1,
        _LABELLED,
        only_if={"auroc": lambda job: len(job.classes) > 1},
    ),
}


class Part(NamedTuple):
    """A part of a model that is trained by a loss of its own: the parameters whose names start with ``prefix``.

    ``rate`` multiplies the job's learning rate; ``betas`` are AdamW's. ``sees_data`` is False for a part whose loss
    needs no image of the site, only the other parts: a generator.
    """

    prefix: str = ""
    rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    sees_data: bool = True


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
