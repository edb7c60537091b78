"""Networks over time. To add one: write a function that returns the network, and one line in ``MODELS``.

Every network maps a padded batch and its lengths to logits (b, classes): frames (b, t, channels, size, size) or signals
(b, t, leads), normalised, of which case i has ``lengths[i]`` valid steps, the first ones. What stands in the padding
changes nothing: recurrent layers run forwards, so padding comes after all they are asked for, and every mean, maximum
and normalisation leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.adversary import with_discriminator
from shared.cases import derived_seed
from shared.config import Job, nearest
from shared.errors import UserError
from shared.imaging.volumes import window_ends
from shared.pretrained import is_file_of_weights, load_weights
from shared.tasks import Part

_LONGEST_EXAMPLE = 16


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """Which of ``steps`` steps are valid, bool (b, steps)."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


class FilmNorm(nn.Module):
    """Group normalisation over all valid frames of a case together.

    Normalised one by one, frames would lose how bright each is against the others, which is the time course itself. As
    nn.GroupNorm applied to (1, c, t * height, width), so no other case of the batch has a part in it.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """``x`` (b * t, c, height, width), ``valid`` (b, t)."""
        (b, t), c = valid.shape, x.shape[1]
        variance, mean = torch.var_mean(x, (2, 3), correction=0)
        variance, mean = (part.view(b, t, self.groups, -1) for part in (variance, mean))
        share = (valid / valid.sum(1, keepdim=True)).to(x)[:, :, None, None] / mean.shape[3]  # of each frame's channel
        centre = (mean * share).sum((1, 3), keepdim=True)
        spread = ((variance + (mean - centre).square()) * share).sum((1, 3), keepdim=True)
        scale = torch.rsqrt(spread + self.eps).expand_as(mean).reshape(b * t, c) * self.weight
        shift = self.bias - centre.expand_as(mean).reshape(b * t, c) * scale
        return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])


class FrameEncoder(nn.Module):
    """Each frame to the mean and the maximum of its channels: (b, t, channels, size, size) -> (b, t, outputs).

    Stages of two 3x3 convolutions, each stage at half the side and twice the width of the one before, down to about
    8 pixels. Frames of 40 pixels or more are halved by the first convolution.
    """

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        stride = 2 if size >= 40 else 1
        stages = min(max(1 + math.ceil(math.log2(size / stride / 8)), 2), 4)
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for out in (width * min(2**stage, 4) for stage in range(stages)):
            for inner in (channels, out):
                step = 1 if len(self.convolutions) else stride
                self.convolutions.append(nn.Conv2d(inner, out, 3, step, padding=1, bias=False))
                self.norms.append(FilmNorm(math.gcd(8, out), out))
            channels = out
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.outputs = 2 * channels

    def forward(self, frames: Tensor, valid: Tensor) -> Tensor:
        """``valid`` (b, t)."""
        x = frames.flatten(0, 1)
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if number and number % 2 == 0:
                x = self.pool(x)
            x = norm(convolution(x), valid).relu()
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1).view(*valid.shape, -1)


class Recurrent(nn.Module):
    """A recurrent layer over features (b, t, features), and a head on its last valid output and their mean."""

    def __init__(self, layer: type[nn.GRU] | type[nn.LSTM], features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.layer = layer(features, hidden, batch_first=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Logits (b, classes)."""
        outputs = self.layer(features)[0]
        last = outputs.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, outputs.shape[2]))[:, 0]
        kept = torch.where(valid_steps(lengths, outputs.shape[1])[:, :, None], outputs, 0.0)
        return self.head(torch.cat([last, kept.sum(1) / lengths[:, None]], 1))  # type: ignore[no-any-return]


class FilmClassifier(nn.Module):
    """An encoder of every frame, and a recurrent layer over what it gives."""

    def __init__(self, encoder: FrameEncoder, recurrent: Recurrent) -> None:
        super().__init__()
        self.encoder, self.recurrent = encoder, recurrent

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """See the module."""
        features = self.encoder(frames, valid_steps(lengths, frames.shape[1]))
        return self.recurrent(features, lengths)  # type: ignore[no-any-return]


def _over_frames(layer: type[nn.GRU] | type[nn.LSTM]) -> Callable[[Job], nn.Module]:
    def build(job: Job) -> nn.Module:
        encoder = FrameEncoder(job.data.channels, job.data.size, job.model.width)
        return FilmClassifier(encoder, Recurrent(layer, encoder.outputs, job.model.hidden, len(job.classes)))

    return build


def _over_signals(layer: type[nn.GRU] | type[nn.LSTM]) -> Callable[[Job], nn.Module]:
    return lambda job: Recurrent(layer, job.data.channels, job.model.hidden, len(job.classes))


class Entry(NamedTuple):
    """How to build a model, the name of its last layer, what it reads, and why it cannot be exported."""

    build: Callable[[Job], nn.Module]
    head: str
    frames: bool
    no_export: str = ""


MODELS: dict[str, Entry] = {
    "cnn_gru": Entry(_over_frames(nn.GRU), "recurrent.head", frames=True),
    "cnn_lstm": Entry(_over_frames(nn.LSTM), "recurrent.head", frames=True),
    "gru": Entry(_over_signals(nn.GRU), "head", frames=False),
    "lstm": Entry(_over_signals(nn.LSTM), "head", frames=False),
}


def head_prefix(job: Job) -> str:
    """Parameters whose name starts with this belong to the head; all others to the backbone."""
    return _entry(job).head + "."


def parts(job: Job) -> tuple[Part, ...]:
    """One loss trains all of it."""
    return (Part(),)


def reads_frames(job: Job) -> bool:
    """Whether the job's model takes films; else it takes signals."""
    return _entry(job).frames


def example(job: Job) -> tuple[Tensor, ...]:
    """An input of the network: one case and its length."""
    steps = min(job.data.frames or _LONGEST_EXAMPLE, _LONGEST_EXAMPLE)
    shape = (job.data.channels, job.data.size, job.data.size) if reads_frames(job) else (job.data.channels,)
    return torch.zeros(1, steps, *shape), torch.tensor([steps])


def _entry(job: Job) -> Entry:
    if job.model.name not in MODELS:
        raise UserError(
            f"model.name = {job.model.name!r}: {job.task} has {', '.join(MODELS)}{nearest(job.model.name, MODELS)}"
        )
    return MODELS[job.model.name]


def check(job: Job) -> None:
    """Raise UserError if the job names a model this task has not, or settings that do not go together."""
    if reads_frames(job):
        if job.data.channels not in (1, 3):
            raise UserError(f"data.channels = {job.data.channels}: frames have 1 (grey) or 3 (colour)")
        window_ends(job.data.window)
    else:
        _check_signals(job)
    if job.model.weights and not is_file_of_weights(job.model.weights):
        raise UserError(
            f"model.weights = {job.model.weights!r}: {job.model.name} has no published weights; give a file"
        )
    for key in ("modalities", "tabular"):
        if getattr(job.data, key):
            raise UserError(f"data.{key}: a sequence task takes one series per case; leave it empty")


def _check_signals(job: Job) -> None:
    """What is meant for pictures says nothing about signals."""
    pictures = {
        "augment.flip": job.augment.flip != "none",
        **{f"augment.{key}": getattr(job.augment, key) > 0 for key in ("rotate", "shift", "zoom", "colour")},
        "data.window": bool(job.data.window),
        "data.normalise": job.data.normalise == "imagenet",
    }
    for key, given in pictures.items():
        if given:
            raise UserError(f"{key} = {job.flat()[key]!r}: is for pictures, and {job.model.name} takes signals")


def build_model(job: Job) -> nn.Module:
    """The job's network with its starting weights; equal jobs give equal weights on every machine. See the module.

    Raises:
        UserError: unknown model, settings that do not go together, or weights that do not fit.
    """
    check(job)
    entry = _entry(job)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(job.seed, "initial weights"))
        model = entry.build(job)
    if job.model.weights:
        load_weights(model, job, entry.head + ".")
    if job.model.freeze == "backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(entry.head + "."))
    return with_discriminator(model, entry.head, job)
