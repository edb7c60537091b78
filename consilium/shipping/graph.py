"""The network as it is shipped: images in [0, 1] go in where constants normalise them, plain tensors come out.

``Graph`` is what is exported. ``Shipped`` is the way back: it makes any program that runs an exported file look like
the task's own network, so that the task's own code predicts and measures with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.composed import flagged, stacked_channels
from shared.config import Job
from shared.imaging.augment import shift_and_scale
from shared.tasks import load_task
from shared.tasks.segmentation.models import crop_to, pad_to

Runner = Callable[[Sequence[Tensor]], list[Tensor]]  # a file's inputs, in order, to its outputs


class Tensors(NamedTuple):
    """A tensor that goes in or comes out: its name, number type, sizes (a word where any will do), and meaning."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str


@dataclass(frozen=True)
class Spec:
    """What an exported file takes and gives. ``shift`` and ``scale``, one per channel, normalise within the graph;
    empty where nothing does. ``multiples``: image sides must be multiples of these; ``least``: and at least so long."""

    inputs: tuple[Tensors, ...]
    outputs: tuple[Tensors, ...]
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    multiples: tuple[int, ...] = ()
    least: tuple[int, ...] = ()


def normalisation(job: Job) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale of each channel of the network where they are constants; nothing where each image has its own.

    The planes that flag missing images are taken as they are. A missing image's pixels are to be the shift, which the
    graph makes 0, as in training.
    """
    if job.task == "generation" or job.data.normalise == "image":
        return (), ()
    if job.task == "sequence" and not load_task(job.task).models.reads_frames(job):
        return (), ()  # signals are taken in the file's own units
    one = torch.zeros(1, job.data.channels, 1, 1)
    shift, scale = (torch.as_tensor(value).expand(one.shape).flatten().tolist() for value in shift_and_scale(one, job))
    images = max(1, len(job.modalities))
    flags = stacked_channels(job) - images * job.data.channels
    return (*(shift * images), *([0.0] * flags)), (*(scale * images), *([1.0] * flags))


def spec_of(job: Job, model: nn.Module) -> Spec:
    """What the exported network of a job takes and gives."""
    shift, scale = normalisation(job)
    values = "values in [0, 1]" if shift else "normalised values"
    channels, side = stacked_channels(job), job.data.size
    image = Tensors("image", "float32", ("batch", channels, side, side), values)
    classes, logits = len(job.classes), "logits: before the softmax" if not job.data.multilabel else "logits"
    if job.task == "classification":
        inputs = [image]
        if job.tabular:
            inputs.append(Tensors("values", "float32", ("batch", len(job.tabular)), "numbers, NaN where missing"))
        return Spec(tuple(inputs), (Tensors("logits", "float32", ("batch", classes), logits),), shift, scale)
    if job.task == "sequence":
        films = load_task(job.task).models.reads_frames(job)
        shape = ("batch", "steps", channels, side, side) if films else ("batch", "steps", channels)
        what = f"frames, {values}" if films else "samples of each lead" + ("" if shift else ", " + _units(job))
        steps = Tensors("lengths", "int64", ("batch",), "how many steps of each case are valid, the first ones")
        outputs = (Tensors("logits", "float32", ("batch", classes), logits),)
        return Spec((Tensors("series", "float32", shape, what), steps), outputs, shift, scale)
    if job.task == "segmentation":
        return _spec_of_segmentation(job, model, values, shift, scale)
    if job.task == "detection":
        image = image._replace(shape=(1, *image.shape[1:]))
        found = (
            Tensors("boxes", "float32", ("boxes", 4), "x1, y1, x2, y2 in pixels of the input, best first"),
            Tensors("labels", "int64", ("boxes",), "1 + the place of the class; 0 is the background"),
            Tensors("scores", "float32", ("boxes",), "how sure"),
        )
        return Spec((image,), found, shift, scale)
    if job.task == "reconstruction":
        rebuilt = Tensors("rebuilt", "float32", image.shape, "the image as the network rebuilds it, as the input")
        return Spec((image,), (rebuilt,), shift, scale)
    noise = Tensors("noise", "float32", ("batch", job.model.latent), "standard normal numbers")
    kinds = (Tensors("classes", "int64", ("batch",), "the place of the class"),) if job.model.conditional else ()
    pictures = Tensors("pictures", "float32", ("batch", job.data.channels, side, side), "pictures in [0, 1]")
    return Spec((noise, *kinds), (pictures,))


def _units(job: Job) -> str:
    return "normalised" if job.data.normalise == "image" else "in the file's units"


def _spec_of_segmentation(
    job: Job, model: nn.Module, values: str, shift: tuple[float, ...], scale: tuple[float, ...]
) -> Spec:
    axes = load_task(job.task).models.dimensions(job)
    names = ("depth", "height", "width")[-axes:]
    shape: tuple[int | str, ...] = ("batch", stacked_channels(job), *names)
    whole: tuple[int | str, ...] = ("batch", 1 + len(job.classes), *names)
    outputs = [Tensors("logits", "float32", whole, "channel 0 is the background")]
    if job.labels:
        outputs.append(Tensors("image_logits", "float32", ("batch", len(job.labels)), "of the whole image"))
    least = tuple(model.extent([1] * axes))  # type: ignore[operator]
    multiples = tuple(getattr(model, "factors", (1,) * axes))
    return Spec((Tensors("image", "float32", shape, values),), tuple(outputs), shift, scale, multiples, least)


class Graph(nn.Module):
    """The network of a job with its constants of normalisation before it, and plain tensors behind it."""

    shift: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, job: Job, spec: Spec) -> None:
        super().__init__()
        self.task, self.constant = job.task, bool(spec.shift)
        self.network = model.get_submodule("average") if job.task == "generation" else model
        self.plain = job.task == "generation" and not job.model.conditional
        shape = (-1, *([1] * (len(spec.inputs[0].shape) - 2 - (job.task == "sequence"))))
        self.register_buffer("shift", torch.tensor(spec.shift or (0.0,)).view(shape))
        self.register_buffer("scale", torch.tensor(spec.scale or (1.0,)).view(shape))

    def forward(self, first: Tensor, second: Tensor | None = None) -> Any:
        """See ``Spec``: a tensor, or a tuple of several."""
        if self.constant:
            first = (first - self.shift) / self.scale
        if self.task == "detection":
            found = self.network([first[0]])[0]
            return found["boxes"], found["labels"], found["scores"]
        if self.task == "reconstruction":
            rebuilt = self.network(first)[0]
            return rebuilt * self.scale + self.shift if self.constant else rebuilt
        if self.plain:  # no class is asked for: there is no such input
            second = torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)
        return self.network(first) if second is None else self.network(first, second)


class Shipped(nn.Module):
    """An exported file as the task's network: takes what the network takes, gives what the network gives."""

    def __init__(self, run: Runner, job: Job, spec: Spec) -> None:
        super().__init__()
        self.run, self.job, self.spec = run, job, spec

    def raw(self, images: Tensor) -> Tensor:
        """Normalised images as the file takes them."""
        return images * self._shaped(self.spec.scale, images) + self._shaped(self.spec.shift, images)

    def _shaped(self, values: tuple[float, ...], images: Tensor) -> Tensor | float:
        if not values:
            return 1.0 if values is self.spec.scale else 0.0
        lead = 2 if self.job.task == "sequence" else 1
        return torch.tensor(values).view(*([1] * lead), -1, *([1] * (images.ndim - lead - 1)))

    def forward(self, *inputs: Any) -> Any:
        """As the network's own."""
        if self.job.task == "detection":
            return [self._detected(image) for image in inputs[0]]
        first: Tensor = inputs[0]
        taken = [self.raw(first) if self.spec.shift else first, *inputs[1 : len(self.spec.inputs)]]
        if self.job.task != "segmentation":
            found = self.run(taken)
            if self.job.task == "reconstruction":
                return self._normalised(found[0]), first.new_zeros(len(first))
            return found[0]
        size = first.shape[2:]
        logits, *of_image = self.run([self.padded(taken[0])])
        logits = crop_to(logits, size)
        return (logits, of_image[0]) if of_image else logits

    def padded(self, images: Tensor) -> Tensor:
        """Images grown to sides that the file takes, by repeating the last row and column."""
        size = images.shape[2:]
        wanted = [
            max(low, -(-side // unit) * unit)
            for side, unit, low in zip(size, self.spec.multiples, self.spec.least, strict=True)
        ]
        return pad_to(images, wanted)

    def _normalised(self, images: Tensor) -> Tensor:
        if not self.spec.shift:
            return images
        return (images - self._shaped(self.spec.shift, images)) / self._shaped(self.spec.scale, images)

    def _detected(self, image: Tensor) -> dict[str, Tensor]:
        taken = self.raw(image[None]) if self.spec.shift else image[None]
        return dict(zip(("boxes", "labels", "scores"), self.run([taken]), strict=True))


def can_be_missing(job: Job) -> bool:
    """Whether a case may lack one of its images."""
    return bool(job.modalities) and flagged(job)
