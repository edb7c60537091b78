"""Classifiers of cases that are several images, or images and numbers: any network of ``MODELS`` put together.

Early fusion stacks a case's images as channels of one network. Late fusion gives each image a network of its own and
joins what they found. Numbers enter beside what was found, through a small network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.config import Job
from shared.pretrained import load_weights, read_weights
from shared.tasks.classification.cases import flagged

JOINT = 64  # units of the layer in which what was found in the images and the numbers meet
HEAD = "head"  # the name of that layer and all behind it
_NO_HEAD = "-"  # starts no parameter's name


class Ramps(nn.Module):
    """Numbers of any scale as values from 0 to 1: (b, n) -> (b, n x EDGES).

    The piecewise-linear encoding of Gorishniy, Rubachev & Babenko (NeurIPS 2022, section 3.2): each value climbs one
    ramp after the other. The ramps lie evenly on the scale of asinh, which is linear about 0 and logarithmic beyond,
    from -10^4 to 10^4: so 0 and 1, an age and a laboratory value all come out well spread, and no mean or standard
    deviation of anybody's data is needed. A missing number (NaN) is 0 on every ramp.
    """

    LIMIT = 10.0  # asinh(11013)
    WIDTH = 0.5  # of a ramp: a factor of 1.65
    EDGES = int(2 * LIMIT / WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        place = (torch.asinh(values.nan_to_num(nan=0.0)) + self.LIMIT) / self.WIDTH
        starts = torch.arange(self.EDGES, dtype=values.dtype, device=values.device)
        ramps = (place[..., None] - starts).clamp(0, 1)
        return torch.where(values.isnan()[..., None], 0.0, ramps).flatten(1)


class Numbers(nn.Module):
    """A small network over numbers (b, n), NaN where missing -> (b, outputs); ``flags`` tells it which are missing."""

    def __init__(self, numbers: int, outputs: int, flags: bool) -> None:
        super().__init__()
        self.flags = flags
        self.ramps = Ramps()
        self.layers = nn.Sequential(
            nn.Linear(numbers * (Ramps.EDGES + flags), outputs), nn.ReLU(), nn.Linear(outputs, outputs), nn.ReLU()
        )

    def forward(self, values: Tensor) -> Tensor:
        parts = [self.ramps(values)]
        if self.flags:
            parts.append(values.isnan().to(values.dtype))
        found: Tensor = self.layers(torch.cat(parts, 1))
        return found


class Joint(nn.Module):
    """From what was found in the images (b, features), and the numbers if there are any, to logits (b, classes)."""

    def __init__(self, features: int, numbers: int, classes: int, flags: bool) -> None:
        super().__init__()
        self.numbers = Numbers(numbers, JOINT // 2, flags) if numbers else None
        inner = features + (JOINT // 2 if numbers else 0)
        self.layers = nn.Sequential(nn.Linear(inner, JOINT), nn.ReLU(), nn.Linear(JOINT, classes))

    def forward(self, features: Tensor, values: Tensor | None = None) -> Tensor:
        if self.numbers is not None:
            features = torch.cat([features, self.numbers(values)], 1)
        logits: Tensor = self.layers(features)
        return logits


class Early(nn.Module):
    """One network over the stacked images; the numbers meet what it found."""

    def __init__(self, encoder: nn.Module, head: Joint) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([encoder])
        self.head = head

    def forward(self, images: Tensor, values: Tensor | None = None) -> Tensor:
        """(b, channels, size, size), see ``cases.images_of_cases``, and (b, numbers) -> (b, classes)."""
        logits: Tensor = self.head(self.encoders[0](images), values)
        return logits


class Late(nn.Module):
    """A network for each image of a case; what was found in an image that is missing counts as zeros."""

    def __init__(self, encoders: list[nn.Module], channels: int, flags: bool, head: Joint) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.channels, self.flags = channels, flags
        self.head = head

    def forward(self, images: Tensor, values: Tensor | None = None) -> Tensor:
        """(b, channels, size, size), see ``cases.images_of_cases``, and (b, numbers) -> (b, classes)."""
        count = len(self.encoders)
        absent = images[:, count * self.channels :, 0, 0]
        found = []
        for k, encoder in enumerate(self.encoders):
            features = encoder(images[:, k * self.channels : (k + 1) * self.channels])
            found.append(features * (1 - absent[:, k : k + 1]) if self.flags else features)
        logits: Tensor = self.head(torch.cat([*found, absent], 1), values)
        return logits


def has_joint(job: Job) -> bool:
    """Whether the network is more than one of ``MODELS`` with more channels."""
    return bool(job.tabular) or job.model.fusion == "late"


def stacked_channels(job: Job) -> int:
    """Channels that go into the network: of all images of a case, and a plane for each that may be missing."""
    count = len(job.modalities)
    if not count:
        return job.data.channels
    return count * job.data.channels + (count if flagged(job) else 0)


def fuse(job: Job, networks: list[nn.Module], last: str) -> nn.Module:
    """Networks of ``MODELS`` put together, one for early fusion, else one per image; ``last`` names the last layer."""
    features = [_without_last(network, last) for network in networks]
    flags, count = flagged(job), len(job.modalities)
    late = job.model.fusion == "late"
    inner = sum(features) + (count if late and flags else 0)
    head = Joint(inner, len(job.tabular), len(job.classes), flags)
    return Late(networks, job.data.channels, flags, head) if late else Early(networks[0], head)


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
