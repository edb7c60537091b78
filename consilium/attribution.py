"""Which pixels a score depends on: Grad-CAM, integrated gradients and occlusion, by Captum."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError
from shared.explaining import Explainable

STEPS = 64  # of integrated gradients
AT_ONCE = 16  # inputs in one pass, fewer if they are large:
NUMBERS = 2**20  # so many numbers go in
COARSEST = 4  # Grad-CAM wants maps of at least 4 x 4: a coarser one says next to nothing about where


class Attribution(NamedTuple):
    """``maps`` float32 (k, h, w), one for each picture of the case; above 0 speaks for the class, below against it."""

    maps: np.ndarray
    how: str
    signed: bool


def grad_cam(model: nn.Module, case: Explainable) -> Attribution:
    """Grad-CAM (Selvaraju et al., ICCV 2017) at the coarsest layer that still has a map of 4 x 4 or more.

    Raises:
        UserError: the network has no such layer.
    """
    from captum.attr import LayerGradCam

    name, layer = cam_layer(model, case)
    inputs = case.inputs.detach().clone().requires_grad_()
    coarse = LayerGradCam(case.score, layer).attribute(inputs, relu_attributions=True).detach()
    fine = enlarged(coarse, (*case.inputs.shape[2:-2], *case.pictures.shape[1:3]), case.extent)
    fine = fine.repeat(len(case.pictures) // len(fine), 1, 1)  # a map tells of all images of a case alike
    size = " x ".join(map(str, coarse.shape[2:]))
    return Attribution(fine.cpu().numpy(), f"Grad-CAM, maps of {size} of {name}", signed=False)


def enlarged(coarse: Tensor, shape: Sequence[int], extent: tuple[int, ...]) -> Tensor:
    """(k, 1, h, w) or (1, 1, d, h, w) as (k, height, width) or (depth, height, width), linearly.

    ``shape`` ends in (height, width), or in (depth, height, width) of a volume. A map covers ``extent``, if that is
    given: what lies beyond the picture, which was padded, is cut off.
    """
    height, width = shape[-2:]
    if coarse.ndim == 5:
        depth = shape[-3]
        fine = F.interpolate(coarse, extent or (depth, height, width), mode="trilinear", align_corners=False)[0, 0]
        return fine[:depth, :height, :width]
    fine = F.interpolate(coarse, extent or (height, width), mode="bilinear", align_corners=False)[:, 0]
    return fine[:, :height, :width]


def cam_layer(model: nn.Module, case: Explainable) -> tuple[str, nn.Module]:
    """The last layer that gives a map of the coarsest size that is at least ``COARSEST`` each way, and its name.

    In a classifier it is the last one before pooling, in a U-Net the bottom. The finest, if all are coarser.

    Raises:
        UserError: no layer gives a map.
    """
    maps = _maps(model, case)
    if not maps:
        raise UserError("--method gradcam: no layer of this network gives a map of the case; try integrated-gradients")
    fine = {name: size for name, size in maps.items() if min(size[-2:]) >= COARSEST}
    wanted = min(map(math.prod, fine.values())) if fine else max(map(math.prod, maps.values()))
    last = [name for name, size in (fine or maps).items() if math.prod(size) == wanted][-1]
    return last, model.get_submodule(last)


def has_maps(model: nn.Module, case: Explainable) -> bool:
    """Whether Grad-CAM can be had of this network."""
    return bool(_maps(model, case))


def _maps(model: nn.Module, case: Explainable) -> dict[str, tuple[int, ...]]:
    """The size of the map of each layer that gives one, in the order in which they are done.

    Layers that run several times in one pass are passed over, since their maps would be mixed up; so is the head.
    """
    calls: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: object, result: object) -> None:
            calls.append((name, tuple(result.shape) if isinstance(result, Tensor) else ()))

        return hook

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if name and not f"{name}.".startswith(case.head)
    ]
    try:
        with torch.no_grad():
            case.score(case.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(name for name, _ in calls)
    maps = {name: shape[2:] for name, shape in calls if times[name] == 1 and len(shape) in (4, 5)}
    return {name: size for name, size in maps.items() if min(size) > 1}


def integrated_gradients(model: nn.Module, case: Explainable) -> Attribution:
    """Integrated gradients (Sundararajan, Taly & Yan, ICML 2017) from a black picture, or from the case's own blank.

    The attributions of all pixels add up to the difference between the score of the case and of the blank one.
    """
    from captum.attr import IntegratedGradients

    found = IntegratedGradients(case.score).attribute(
        case.inputs, black(case), n_steps=STEPS, internal_batch_size=_at_once(case)
    )
    start = "black" if case.blank is None else "the median"
    return Attribution(_planes(case, found), f"integrated gradients from {start}", signed=True)


def occlusion(model: nn.Module, case: Explainable) -> Attribution:
    """How much the score falls when a window is covered in grey (Zeiler & Fergus, ECCV 2014)."""
    from captum.attr import Occlusion

    strides = tuple(max(1, side // 2) if place else side for place, side in enumerate(case.window))
    found = Occlusion(case.score).attribute(
        case.inputs, case.window, strides, grey(case), perturbations_per_eval=_at_once(case)
    )
    size = " x ".join(map(str, case.window[-2:] if len(case.window) == 3 else case.window))
    fill = "mean" if case.blank is None else "median"
    return Attribution(_planes(case, found), f"occlusion: windows of {size} set to the {fill}", signed=True)


def _at_once(case: Explainable) -> int:
    return max(1, min(AT_ONCE, NUMBERS // case.inputs.numel()))


def black(case: Explainable) -> Tensor:
    """A case's own blank, or its darkest value, which is black however it is normalised."""
    if case.blank is not None:
        return case.blank
    return case.inputs.amin((-2, -1), keepdim=True).expand_as(case.inputs)


def grey(case: Explainable) -> Tensor:
    """A case's own blank, or its mean: a black window in a bright place would be a finding of its own."""
    if case.blank is not None:
        return case.blank
    return case.inputs.mean((-2, -1), keepdim=True).expand_as(case.inputs)


def _planes(case: Explainable, values: Any) -> np.ndarray:
    result: np.ndarray = case.planes(values.detach()).float().cpu().numpy()
    return result


METHODS: dict[str, Callable[[nn.Module, Explainable], Attribution]] = {
    "gradcam": grad_cam,
    "integrated-gradients": integrated_gradients,
    "occlusion": occlusion,
}


def attribute(model: nn.Module, case: Explainable, method: str) -> Attribution:
    """The map of ``method``, one of METHODS."""
    # cuDNN cannot run a recurrent layer backward outside of training.
    with torch.backends.cudnn.flags(enabled=False), torch.enable_grad():
        return METHODS[method](model, case)
