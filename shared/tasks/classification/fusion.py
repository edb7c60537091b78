"""Classifiers of cases that are several images, or images and numbers: any network of ``MODELS`` put together.

Early fusion stacks a case's images as channels of one network. Late fusion gives each image a network of its own and
joins what they found. Numbers enter beside what was found, through a small network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.composed import flagged, stacked_channels
from shared.config import Job
from shared.pretrained import load_weights, read_weights

JOINT = 64  # units of the layer in which what was found in the images and the numbers meet
HEAD = "head"  # the name of that layer and all behind it
_NO_HEAD = "-"  # starts no parameter's name


class Ramps(nn.Module):
    """Numbers of any scale as values from -1 to 1: (b, n) -> (b, n x RAMPS).

    The piecewise-linear encoding of Gorishniy, Rubachev & Babenko (NeurIPS 2022, section 3.2): a value climbs one ramp
    after the other, here counted from those that 0 has climbed. The ramps lie evenly on the scale of asinh, which is
    linear about 0 and logarithmic beyond, from -10^4 to 10^4: so 0 and 1, an age and a laboratory value all come out
    well spread, and no mean or standard deviation of anybody's data is needed. A missing number (NaN) is as 0.
    """

    LIMIT = 10.0  # asinh(11013)
    WIDTH = 0.5  # of a ramp: a factor of 1.65
    RAMPS = int(2 * LIMIT / WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        """Numbers (b, n), NaN where missing, as ramps (b, n * RAMPS)."""
        starts = torch.arange(self.RAMPS, dtype=values.dtype, device=values.device)
        climbed = (torch.asinh(values.nan_to_num(nan=0.0))[..., None] + self.LIMIT) / self.WIDTH - starts
        of_zero = self.LIMIT / self.WIDTH - starts
        return (climbed.clamp(0, 1) - of_zero.clamp(0, 1)).flatten(1)


class Numbers(nn.Module):
    """A small network over numbers (b, n), NaN where missing -> (b, outputs); ``flags`` tells it which are missing."""

    def __init__(self, numbers: int, outputs: int, flags: bool) -> None:
        super().__init__()
        self.flags = flags
        self.ramps = Ramps()
        inner = numbers * (Ramps.RAMPS + flags)
        self.layers = nn.Sequential(nn.Linear(inner, outputs), nn.ReLU(), nn.Linear(outputs, outputs), nn.ReLU())

    def forward(self, values: Tensor) -> Tensor:
        """Numbers (b, n), NaN where missing, as features (b, outputs)."""
        parts = [self.ramps(values)]
        if self.flags:
            parts.append(values.isnan().to(values.dtype))
        found: Tensor = self.layers(torch.cat(parts, 1))
        return found


class Joint(nn.Module):
    """From what was found in the images, and the numbers if there are any, to logits (b, classes).

    Each part is brought to mean 0 and variance 1 over its own features (LayerNorm, so nothing depends on the other
    cases of a batch): else the part with the largest values drowns the others, and what depends on two of them is
    learnt late or not at all.
    """

    def __init__(self, features: list[int], flags: int, numbers: int, classes: int, flag_numbers: bool) -> None:
        super().__init__()
        self.numbers = Numbers(numbers, JOINT // 2, flag_numbers) if numbers else None
        sizes = [*features, JOINT // 2] if numbers else features
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes)
        self.layers = nn.Sequential(nn.Linear(sum(sizes) + flags, JOINT), nn.ReLU(), nn.Linear(JOINT, classes))

    def forward(self, found: list[Tensor], absent: Tensor, values: Tensor | None = None) -> Tensor:
        """``found`` (b, features) of each encoder; ``absent`` (b, flags), 1 where its image is missing: zeros count."""
        if self.numbers is not None:
            found = [*found, self.numbers(values)]
        parts = [norm(part) for norm, part in zip(self.norms, found, strict=True)]
        for k in range(absent.shape[1]):
            parts[k] = parts[k] * (1 - absent[:, k : k + 1])
        logits: Tensor = self.layers(torch.cat([*parts, absent], 1))
        return logits


class Fused(nn.Module):
    """One network over all images of a case (early fusion), or one for each (late), and what joins them."""

    def __init__(self, encoders: list[nn.Module], channels: int, head: Joint) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.channels = channels  # that each encoder takes
        self.head = head

    def forward(self, images: Tensor, values: Tensor | None = None) -> Tensor:
        """(b, channels, size, size), see ``cases.images_of_cases``, and (b, numbers) -> (b, classes)."""
        starts = range(0, len(self.encoders) * self.channels, self.channels)
        found = [
            encoder(images[:, start : start + self.channels])
            for encoder, start in zip(self.encoders, starts, strict=True)
        ]
        absent = images[:, len(found) * self.channels :, 0, 0]
        logits: Tensor = self.head(found, absent, values)
        return logits


def has_joint(job: Job) -> bool:
    """Whether the network is more than one of ``MODELS`` with more channels."""
    return bool(job.tabular) or job.model.fusion == "late"


def fuse(job: Job, networks: list[nn.Module], last: str) -> nn.Module:
    """Networks of ``MODELS`` put together, one for early fusion, else one per image; ``last`` names the last layer."""
    features = [_without_last(network, last) for network in networks]
    late = job.model.fusion == "late"
    flags = len(job.modalities) if late and flagged(job) else 0
    head = Joint(features, flags, len(job.tabular), len(job.classes), flagged(job))
    return Fused(networks, job.data.channels if late else stacked_channels(job), head)


def _without_last(network: nn.Module, last: str) -> int:
    """Take the last layer off; gives the number of features it took."""
    parent, _, name = last.rpartition(".")
    module = network.get_submodule(parent)
    layer = getattr(module, name)
    setattr(module, name, nn.Identity())
    return int(layer.in_features)


def load_fused(model: nn.Module, job: Job, last: str) -> None:
    """Weights of a whole network of this kind; or of a network of one image, for the encoder of each image.

    Raises:
        UserError: they cannot be had or do not fit.
    """
    given = read_weights(job)
    if not has_joint(job):
        load_weights(model, job, f"{last}.", _spread(model, given, job))
    elif any(name.startswith("encoders.") for name in given):
        load_weights(model, job, f"{HEAD}.", given)
    else:
        for encoder in model.get_submodule("encoders").children():
            load_weights(encoder, job, _NO_HEAD, _spread(encoder, given, job))


def _spread(network: nn.Module, given: dict[str, Tensor], job: Job) -> dict[str, Tensor]:
    """The weights with the first layer's shared out over the stacked images, and zeros for their flags.

    So an image shown in all places is answered as the network of one image would answer it.
    """
    path, first = next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    weight, count, channels = given.get(f"{path}.weight"), len(job.modalities), job.data.channels
    if weight is None or weight.shape == first.weight.shape or weight.shape[1] not in (3, channels) or count < 2:
        return given
    if weight.shape[1] != channels:
        weight = weight.sum(1, keepdim=True)
    spread = [weight / count] * count
    flags = first.in_channels - count * channels
    if flags < 0:  # late fusion: a network sees one image
        return given
    return given | {f"{path}.weight": torch.cat([*spread, weight.new_zeros(len(weight), flags, *weight.shape[2:])], 1)}
