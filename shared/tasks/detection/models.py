"""Detectors. To add one: write a function that returns the network, and one line in ``MODELS``.

Every network is called as torchvision's detectors are. In training ``model(images, targets)`` gives a dict of losses,
in evaluation ``model(images)`` one dict per image with ``boxes`` (x1, y1, x2, y2 in pixels of the network's input),
``labels`` and ``scores``. Label 0 is the background, label 1 + k the job's class k. Images come fitted and normalised,
so the network's own resizing and normalisation are switched off.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.cases import derived_seed
from shared.config import Job, nearest
from shared.errors import UserError
from shared.pretrained import is_file_of_weights, load_weights, read_weights
from shared.tasks import Part

Norm = Callable[[int], nn.Module]

#: At most so many boxes are kept of an image, as in COCO's evaluation.
MAX_BOXES = 100
#: Boxes of a lower score are not looked at: they change average precision in the third decimal and cost time.
LEAST_SCORE = 0.05
_BODY = "backbone.body."
_OTHERS = ("backbone.fpn.", "rpn.", "roi_heads.", "head.")


def group_norm(channels: int) -> nn.Module:
    """GroupNorm of 8 groups, or as many as divide the channels: it trains from scratch with one image at a time."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _conv(norm: Norm, inner: int, out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inner, out, 3, stride, 1, bias=False), norm(out), nn.ReLU(inplace=True))


def _untouched(job: Job) -> dict[str, Any]:
    """Arguments by which torchvision's transform leaves an image as it is: no resizing, no shift, no padding."""
    zeros, ones = [0.0] * job.data.channels, [1.0] * job.data.channels
    side = job.data.size
    sizes = {"min_size": side, "max_size": side, "size_divisible": 1, "_skip_resize": True}
    return sizes | {"image_mean": zeros, "image_std": ones}


def _few_proposals() -> dict[str, Any]:
    """Fewer proposals than torchvision's 2000: images of a few hundred pixels hold tens of objects, not hundreds."""
    counts = dict.fromkeys(("rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test"), 300)
    return counts | dict.fromkeys(("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test"), 200)


def _rcnn(job: Job) -> dict[str, Any]:
    """What all of ours differ in from torchvision's: 128 proposals of an image are learnt from, not 512."""
    boxes = {"box_score_thresh": LEAST_SCORE, "box_detections_per_img": MAX_BOXES, "box_batch_size_per_image": 128}
    return _untouched(job) | boxes


def _small(job: Job, norm: Norm) -> nn.Module:
    """Faster R-CNN (Ren et al. 2015) on nine convolutions and a feature pyramid (Lin et al. 2017), strides 8 to 32.

    1.0 million parameters at width 24. For objects of 12 to 200 pixels.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    width, features, hidden, cells = job.model.width, 64, 128, 7
    body = nn.Sequential(
        OrderedDict(
            stem=_conv(norm, job.data.channels, width, 2),
            stage1=nn.Sequential(_conv(norm, width, 2 * width, 2), _conv(norm, 2 * width, 2 * width)),
            stage2=nn.Sequential(_conv(norm, 2 * width, 4 * width, 2), _conv(norm, 4 * width, 4 * width)),
            stage3=nn.Sequential(_conv(norm, 4 * width, 6 * width, 2), _conv(norm, 6 * width, 6 * width)),
        )
    )
    inner = [4 * width, 6 * width]
    pyramid = BackboneWithFPN(body, {"stage2": "0", "stage3": "1"}, inner, features, norm_layer=norm)
    model: nn.Module = FasterRCNN(
        pyramid,
        rpn_anchor_generator=AnchorGenerator(((18, 36), (60, 96), (150, 220)), ((0.5, 1.0, 2.0),) * 3),
        # One sample per cell of a grid about as fine as the features: a quarter of the cost of torchvision's four.
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], cells, sampling_ratio=1, canonical_scale=96),
        box_head=TwoMLPHead(features * cells**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, 1 + len(job.classes)),
        **_rcnn(job) | _few_proposals(),
    )
    return model


def _mobilenet(job: Job, norm: Norm) -> nn.Module:
    """torchvision's fasterrcnn_mobilenet_v3_large_320_fpn: strides 32 and 64, for objects of 32 pixels and more."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import mobilenet_backbone

    backbone = mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=norm, trainable_layers=6
    )
    _adapt_first(backbone.body, job.data.channels)
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),) * 3, ((0.5, 1.0, 2.0),) * 3)
    more = _rcnn(job) | _few_proposals()
    model: nn.Module = FasterRCNN(backbone, 1 + len(job.classes), rpn_anchor_generator=anchors, **more)
    return model


def _resnet50(job: Job, norm: Norm) -> nn.Module:
    """torchvision's fasterrcnn_resnet50_fpn."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=5)
    _adapt_first(backbone.body, job.data.channels)
    model: nn.Module = FasterRCNN(backbone, 1 + len(job.classes), **_rcnn(job))
    return model


def _retinanet(job: Job, norm: Norm) -> nn.Module:
    """torchvision's retinanet_resnet50_fpn (Lin et al. 2017b); from scratch its heads have GroupNorm too."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        norm_layer=norm,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    _adapt_first(backbone.body, job.data.channels)
    anchors, classes = 9, 1 + len(job.classes)
    head = RetinaNetHead(256, anchors, classes, group_norm if norm is group_norm else None)
    least = {"score_thresh": LEAST_SCORE, "detections_per_img": MAX_BOXES}
    model: nn.Module = RetinaNet(backbone, classes, head=head, **_untouched(job), **least)
    return model


def _adapt_first(body: Any, channels: int) -> None:
    """Replace the first convolution by one for so many channels."""
    path, old = next((name, module) for name, module in body.named_modules() if isinstance(module, nn.Conv2d))
    if old.in_channels != channels:
        shape: dict[str, Any] = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding")}
        new = nn.Conv2d(channels, old.out_channels, **shape, bias=old.bias is not None)
        parent, _, name = path.rpartition(".")
        setattr(body.get_submodule(parent), name, new)


Losses = Callable[[Any, Tensor, list[dict[str, Tensor]]], Tensor]


def one_by_one(model: Any, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    """The loss of each image (b,), by a forward pass each: right for every detector."""
    pairs = zip(images, targets, strict=True)
    return torch.stack([sum(model([image], [target]).values(), images.new_zeros(())) for image, target in pairs])


def shared_features(model: Any, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    """The same for a Faster R-CNN, whose features are found for all images at once: a tenth faster on a CPU.

    What comes after the features goes image by image, because torchvision's losses are means over the samples drawn
    from the whole batch, by which an image of few proposals would count less.
    """
    from torchvision.models.detection.image_list import ImageList

    features = model.backbone(images)
    losses = []
    for i, target in enumerate(targets):
        image = ImageList(images[i : i + 1], [(images.shape[-2], images.shape[-1])])
        own = OrderedDict((name, level[i : i + 1]) for name, level in features.items())
        proposals, first = model.rpn(image, own, [target])
        _, second = model.roi_heads(own, proposals, image.image_sizes, [target])
        losses.append(sum((*first.values(), *second.values()), images.new_zeros(())))
    return torch.stack(losses)


class Entry(NamedTuple):
    """How to build a model with its kind of normalisation, and how to get each image's loss.

    ``published`` are the names under which torchvision has weights of the whole detector and of its backbone;
    ``no_export`` says why torch.export cannot take the network.
    """

    build: Callable[[Job, Norm], nn.Module]
    losses: Losses = one_by_one
    published: tuple[str, ...] = ()
    no_export: str = "how many boxes there are depends on the image, which torch.export cannot follow; TorchScript can"


MODELS: dict[str, Entry] = {
    "fasterrcnn_small": Entry(_small, shared_features),
    "fasterrcnn_mobilenet": Entry(
        _mobilenet, shared_features, ("fasterrcnn_mobilenet_v3_large_320_fpn", "mobilenet_v3_large")
    ),
    "fasterrcnn_resnet50": Entry(_resnet50, shared_features, ("fasterrcnn_resnet50_fpn", "resnet50")),
    "retinanet": Entry(_retinanet, one_by_one, ("retinanet_resnet50_fpn", "resnet50")),
}


def entry_of(job: Job) -> Entry:
    """The registry line of the job's model."""
    if job.model.name not in MODELS:
        raise UserError(
            f"model.name = {job.model.name!r}: {job.task} has {', '.join(MODELS)}{nearest(job.model.name, MODELS)}"
        )
    return MODELS[job.model.name]


def head_prefix(job: Job) -> tuple[str, ...]:
    """Parameters whose name starts with one of these are the head; all others the body.

    The feature pyramid belongs to the head: weights published for a classifier have none.
    """
    return _OTHERS


def parts(job: Job) -> tuple[Part, ...]:
    """One loss trains all of it."""
    return (Part(),)


def example(job: Job) -> tuple[Tensor, ...]:
    """An input of the network in evaluation: one image (1, channels, size, size)."""
    return (torch.zeros(1, job.data.channels, job.data.size, job.data.size),)


def check(job: Job) -> None:
    """Raise UserError if the job names a model this task has not, or settings that do not go together."""
    entry = entry_of(job)
    if job.data.channels not in (1, 3):
        raise UserError(f"data.channels = {job.data.channels}: must be 1 (grey) or 3 (colour)")
    if job.data.size < 32:
        raise UserError(f"data.size = {job.data.size}: detectors take images of 32 pixels or more")
    if job.data.multilabel:
        raise UserError("data.multilabel: an object has one class; set it to false for detection")
    for key in ("modalities", "tabular", "labels"):
        if getattr(job.data, key):
            raise UserError(f"data.{key}: detection takes one image per case and its boxes; leave it empty")
    if job.model.weights and not entry.published and not is_file_of_weights(job.model.weights):
        given = job.model.weights
        raise UserError(f"model.weights = {given!r}: {job.model.name} has no published weights; give a file")


def build_model(job: Job) -> nn.Module:
    """The job's network with its starting weights; equal jobs give equal weights on every machine. See the module.

    Normalisation is GroupNorm, which trains from scratch. Where ``model.weights`` were trained with BatchNorm (their
    running statistics tell), it is BatchNorm frozen at these statistics, as torchvision has it.

    Raises:
        UserError: unknown model, or weights that cannot be had or do not fit.
    """
    entry = entry_of(job)
    given = _given(job, entry) if job.model.weights else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(job.seed, "initial weights"))
        model = build_like(job, given)
    if given:
        load_weights(model, job, _OTHERS, given)
    if job.model.freeze == "backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(_OTHERS))
    return model


def build_like(job: Job, names: Iterable[str]) -> nn.Module:
    """The job's network with the normalisation of a model whose arrays have these names, its weights drawn anew."""
    from torchvision.ops import FrozenBatchNorm2d

    norm: Norm = FrozenBatchNorm2d if any(name.endswith("running_mean") for name in names) else group_norm
    return entry_of(job).build(job, norm)


def _given(job: Job, entry: Entry) -> dict[str, Tensor]:
    """The given weights under the names of our networks: a whole detector's, or a classifier's as its body."""
    given = read_weights(job, _published(job, entry))
    if any(name.startswith("backbone.") for name in given):
        return given
    return {_BODY + name.removeprefix("features."): value for name, value in given.items()}


def _published(job: Job, entry: Entry) -> str:
    """The torchvision model that has weights of the given name: the whole detector, or its backbone; "" for a file."""
    import torchvision

    if is_file_of_weights(job.model.weights):
        return ""
    known = {model: list(torchvision.models.get_model_weights(model).__members__) for model in entry.published}
    name = job.model.weights.rpartition(".")[2]
    found = next((model for model, names in known.items() if name in names), "")
    if not found:
        listed = "; ".join(f"{model} has {', '.join(names)}" for model, names in known.items())
        raise UserError(f"model.weights = {job.model.weights!r}: no such file, and {listed}")
    return found
