"""Segmenters. To add one: write a function that returns the network, and one line in ``MODELS``.

Every network maps normalised images (b, channels, *size) of any size to logits (b, 1 + classes, *size), channel 0 the
background. If the job names ``data.labels`` it gives a pair: these, and logits (b, labels) of the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adversary import with_discriminator
from shared.cases import derived_seed
from shared.composed import composed, stacked_channels
from shared.config import Job, nearest
from shared.errors import UserError
from shared.imaging.volumes import window_ends
from shared.pretrained import is_file_of_weights, load_weights
from shared.rules import STAINS, rules_of
from shared.tasks import Part

Output = Tensor | tuple[Tensor, Tensor]

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_INSTANCE = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


Norm = Callable[[int], nn.Module]


class GroupNorm(nn.GroupNorm):
    """GroupNorm that computes in float32 whatever it is given, and gives back what it was given.

    On CPUs torch's backward pass in bfloat16 with channels last takes ten times as long (2.15: half of a U-Net's step).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b, c, *size)."""
        return super().forward(x.float()).to(x.dtype)


def normalisation(job: Job, axes: int = 2) -> Norm:
    """Makes the job's normalisation layer for some channels: none of them looks at the other images of a batch.

    GroupNorm has 8 groups, or as many as divide the channels.
    """
    if job.model.norm == "instance":
        return lambda channels: _INSTANCE[axes](channels, affine=True)
    layer = GroupNorm if job.train.precision == "bfloat16" else nn.GroupNorm
    return lambda channels: layer(math.gcd(8, channels), channels)


def _block(dimensions: int, inner: int, out: int, norm: Norm) -> nn.Module:
    """Two 3x3(x3) convolutions, each normalised and rectified."""
    layers: list[nn.Module] = []
    for channels in (inner, out):
        layers += [_CONV[dimensions](channels, out, 3, padding=1, bias=False), norm(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net (Ronneberger, Fischer & Brox, MICCAI 2015) in two or three dimensions, for images of any size.

    Args:
        channels: of the image.
        outputs: channels of the result.
        width: channels of the first stage; each stage has twice those of the one before, at most 16 times ``width``.
        pools: for each step down by how much every axis shrinks, such as ((2, 2), (2, 2)): one stage more than steps.
        norm: makes the normalisation layer for some channels.
        labels: classes of the whole image, told from the mean and maximum of the deepest stage; 0 for none.
    """

    def __init__(
        self, channels: int, outputs: int, width: int, pools: Sequence[tuple[int, ...]], norm: Norm, labels: int = 0
    ) -> None:
        super().__init__()
        n = len(pools[0])
        widths = [width * min(2**stage, 16) for stage in range(len(pools) + 1)]
        self.factors = tuple(math.prod(factors) for factors in zip(*pools, strict=True))
        self.pools = nn.ModuleList(_POOL[n](pool) for pool in pools)
        self.down = nn.ModuleList(
            _block(n, inner, out, norm) for inner, out in zip([channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            _UP[n](deeper, out, pool, pool) for deeper, out, pool in zip(widths[1:], widths, pools, strict=False)
        )
        self.join = nn.ModuleList(_block(n, 2 * out, out, norm) for out in widths[:-1])
        self.head = _CONV[n](width, outputs, 1)
        self.head_of_image = nn.Linear(2 * widths[-1], labels) if labels else None

    def extent(self, size: Sequence[int]) -> tuple[int, ...]:
        """To which size an image is padded: every axis a multiple of its factor, at least twice that.

        Twice, because InstanceNorm cannot normalise a single pixel.
        """
        return tuple(factor * max(2, -(-side // factor)) for side, factor in zip(size, self.factors, strict=True))

    def forward(self, x: Tensor) -> Output:
        """See the module."""
        size = x.shape[2:]
        x = pad_to(x, self.extent(size))
        skips = []
        for block, pool in zip(self.down, self.pools, strict=False):
            x = block(x)
            skips.append(x)
            x = pool(x)
        deepest = x = self.down[-1](x)
        for up, join, skip in zip(reversed(self.up), reversed(self.join), reversed(skips), strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        logits = crop_to(self.head(x), size)
        if self.head_of_image is None:
            return logits
        return logits, self.head_of_image(_mean_and_max(deepest))


def pad_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pad images (b, c, …) to ``size`` by repeating their edge. The image stays at the top left; see ``crop_to``."""
    missing = [wanted - side for side, wanted in zip(x.shape[2:], size, strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [side for more in reversed(missing) for side in (0, more)], mode="replicate")


def crop_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """The part of (b, c, *padded) that ``pad_to`` was given."""
    return x[(slice(None), slice(None), *(slice(0, side) for side in size))]


def _mean_and_max(x: Tensor) -> Tensor:
    """(b, c, *size) -> (b, 2c)."""
    flat = x.flatten(2)
    return torch.cat([flat.mean(2), flat.amax(2)], 1)


class Fcn(nn.Module):
    """Fully convolutional network (Long, Shelhamer & Darrell 2015) on torchvision's ResNet-50, stride 8.

    Its parameters are named as torchvision's, so that published weights fit.
    """

    def __init__(self, channels: int, outputs: int, norm: Norm, labels: int = 0) -> None:
        super().__init__()
        from torchvision.models.segmentation import fcn_resnet50

        # weights_backbone too: torchvision fetches the backbone's weights even with weights=None
        model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=outputs, aux_loss=False)
        self.backbone, self.classifier = model.backbone, model.classifier
        if channels != 3:
            self.backbone.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        for module in (self.backbone, self.classifier):
            _replace_batch_norm(module, norm)
        self.classifier_of_image = nn.Linear(2 * 2048, labels) if labels else None

    def extent(self, size: Sequence[int]) -> tuple[int, ...]:
        """To which size an image is padded: twice its stride at least, as InstanceNorm cannot normalise one pixel."""
        return tuple(max(side, 16) for side in size)

    def forward(self, x: Tensor) -> Output:
        """See the module."""
        size = x.shape[2:]
        x = pad_to(x, self.extent(size))
        features = self.backbone(x)["out"]
        logits = F.interpolate(self.classifier(features), size=x.shape[2:], mode="bilinear", align_corners=False)
        logits = crop_to(logits, size)
        if self.classifier_of_image is None:
            return logits
        return logits, self.classifier_of_image(_mean_and_max(features))


def _replace_batch_norm(module: nn.Module, norm: Norm) -> None:
    """Another layer in place of every BatchNorm: a site's running statistics do not average well."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, norm(child.num_features))
        else:
            _replace_batch_norm(child, norm)


def _unet(job: Job) -> nn.Module:
    return _u_net(job, [(2, 2)] * (job.model.depth - 1))


def _unet3d(job: Job) -> nn.Module:
    # Slices are often few and thick: their axis is halved only as long as a patch keeps four of them.
    return _u_net(
        job, [(2 if job.data.depth >= 4 * 2 ** (step + 1) else 1, 2, 2) for step in range(job.model.depth - 1)]
    )


def _u_net(job: Job, pools: Sequence[tuple[int, ...]]) -> nn.Module:
    norm = normalisation(job, len(pools[0]))
    return UNet(job.data.channels, 1 + len(job.classes), job.model.width, pools, norm, len(job.labels))


def _fcn_resnet50(job: Job) -> nn.Module:
    return Fcn(job.data.channels, 1 + len(job.classes), normalisation(job), len(job.labels))


class Entry(NamedTuple):
    """How to build a model, the start of the names of its last layers, and its dimensions.

    ``stages``: it has ``model.depth`` of them, each half as large; ``published``: torchvision has weights for it;
    ``no_export``: why torch.export cannot take it, "" where it can.
    """

    build: Callable[[Job], nn.Module]
    head: str
    dimensions: int = 2
    stages: bool = True
    published: bool = False
    no_export: str = ""


MODELS: dict[str, Entry] = {
    "unet": Entry(_unet, "head"),
    "unet3d": Entry(_unet3d, "head", dimensions=3),
    "fcn_resnet50": Entry(_fcn_resnet50, "classifier", stages=False, published=True),
}


def dimensions(job: Job) -> int:
    """2 for pictures, 3 for volumes: the model decides."""
    return _entry(job).dimensions


def patch_size(job: Job) -> tuple[int, ...]:
    """(height, width) or (depth, height, width) of a patch."""
    size = (job.data.size, job.data.size)
    return size if dimensions(job) == 2 else (job.data.depth, *size)


def example(job: Job) -> tuple[Tensor, ...]:
    """What the network takes of one case: a patch (1, channels, *patch)."""
    return (torch.zeros(1, stacked_channels(job), *patch_size(job)),)


def head_prefix(job: Job) -> str:
    """Parameters whose name starts with this belong to the head; all others to the backbone."""
    return _entry(job).head


def parts(job: Job) -> tuple[Part, ...]:
    """One loss trains all of it."""
    return (Part(),)


def _entry(job: Job) -> Entry:
    if job.model.name not in MODELS:
        raise UserError(
            f"model.name = {job.model.name!r}: {job.task} has {', '.join(MODELS)}{nearest(job.model.name, MODELS)}"
        )
    return MODELS[job.model.name]


def check(job: Job) -> None:
    """Raise UserError if the job names a model this task has not, or settings that do not go together."""
    entry = _entry(job)
    flat = entry.dimensions == 2
    if job.data.channels not in ((1, 3) if flat else (1,)):
        words = "must be 1 (grey) or 3 (colour)" if flat else f"{job.model.name} takes grey volumes; must be 1"
        raise UserError(f"data.channels = {job.data.channels}: {words}")
    deepest = 2 ** (job.model.depth - 1)
    if entry.stages and job.data.size < 2 * deepest:
        raise UserError(
            f"data.size = {job.data.size}: a {job.model.name} of {job.model.depth} stages needs patches of "
            f"{2 * deepest} pixels or more; or lower model.depth"
        )
    if job.data.masks == "instances" and len(job.classes) != 1:
        raise UserError(
            f"data.classes = {job.data.classes!r}: with data.masks = 'instances' all objects are of one class; name one"
        )
    if job.data.multilabel:
        raise UserError("data.multilabel: a pixel, and an image, has one class; set it to false for segmentation")
    if len(job.labels) == 1:
        raise UserError(f"data.labels = {job.data.labels!r}: name two or more classes of the whole image, or none")
    _check_composed(job, entry)
    _check_changes(job, flat)
    if job.model.weights and not entry.published and not is_file_of_weights(job.model.weights):
        raise UserError(f"model.weights = {job.model.weights!r}: {job.model.name} has none published; give a file")


def _check_composed(job: Job, entry: Entry) -> None:
    """Several images of a case are stacked as channels of one network."""
    if job.data.tabular:
        raise UserError("data.tabular: segmentation takes images only; leave it empty")
    if job.model.fusion == "late":
        raise UserError("model.fusion = 'late': segmentation stacks the images of a case; write early")
    if not composed(job):
        return
    if job.data.format not in ("auto", "csv", "cases"):
        raise UserError(
            f"data.format = {job.data.format!r}: the images of a case come in a table; write 'csv' or 'auto'"
        )
    if job.model.weights and entry.published and not is_file_of_weights(job.model.weights):
        raise UserError(f"model.weights = {job.model.weights!r}: published weights take one image; give a file")


def _check_changes(job: Job, flat: bool) -> None:
    """What may be done to images differs between pictures and volumes."""
    window_ends(job.data.window)
    if flat and job.data.window:
        raise UserError("data.window: pictures are read with the window of their file; leave it empty, or take unet3d")
    for key in ("rotate", "shift", "zoom", "colour"):
        if not flat and getattr(job.augment, key):
            raise UserError(f"augment.{key}: volumes are mirrored and change in intensity only; set it to 0")
    if not flat and {"polarity", *STAINS} & set(rules_of(job.data.harmonise)):
        raise UserError(
            f"data.harmonise = {job.data.harmonise!r}: polarity and stains are for pictures; volumes take none, "
            "zscore, percentiles, site-zscore, site-percentiles or nyul"
        )
    if not flat and job.data.normalise == "imagenet":
        raise UserError("data.normalise = 'imagenet': is for pictures; write fixed or image for volumes")


def build_model(job: Job) -> nn.Module:
    """The job's network with its starting weights; equal jobs give equal weights on every machine. See the module.

    Raises:
        UserError: unknown model, or weights that cannot be had or do not fit.
    """
    entry = _entry(job)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(job.seed, "initial weights"))
        model = entry.build(job.replace(data__channels=stacked_channels(job)))
    if job.model.weights:
        load_weights(model, job, entry.head)
    if job.model.freeze == "backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(entry.head))
    return with_discriminator(model, entry.head, job)
