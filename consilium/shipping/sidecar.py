"""What must be known to run an exported model without Consilium: how an image becomes its input, what its output means.

Every number is taken from the job or from the code that trained; tests/consilium/test_export.py runs a model by these
words alone, with NumPy and Pillow, and gets what `consilium predict` gets.
"""

from __future__ import annotations

from typing import Any

from consilium.shipping.graph import Spec, can_be_missing
from consilium.shipping.harmonising import harmonising
from shared.config import Job
from shared.tasks import load_task

Step = dict[str, Any]

_READ = (
    "Decode to grey or colour in [0, 1]. 8-bit files: divide by 255. Floats within [0, 1]: as they are. All else: from "
    "the least to the largest value of the image. DICOM: modality LUT, then the file's first VOI LUT or window, else "
    "the range of the frame without padding; MONOCHROME1 inverted. EXIF orientation applied, alpha on black."
)
_FIT = (
    "Scale by min(size / height, size / width), sides rounded to whole pixels, bilinear with antialiasing, "
    "half-pixel centres; clip to [0, 1]; paste on zeros at (size - side) // 2 from top and left."
)
_SIXTEEN = "Round to multiples of 1/65535, as the training cache did (differences below 1e-5: may be left out)."


def inputs_facts(spec: Spec) -> list[dict[str, Any]]:
    """Inputs of the file by name, type and shape."""
    return [tensor._asdict() | {"shape": list(tensor.shape)} for tensor in spec.inputs]


def outputs_facts(spec: Spec) -> list[dict[str, Any]]:
    """The same of its outputs."""
    return [tensor._asdict() | {"shape": list(tensor.shape)} for tensor in spec.outputs]


def preprocessing(job: Job, spec: Spec) -> list[Step]:
    """The steps from a file to the first input, in order, with every number in them."""
    if job.task == "generation":
        return [{"step": "noise", "how": "Standard normal numbers, independent.", "count": job.model.latent}]
    signals = job.task == "sequence" and not load_task(job.task).models.reads_frames(job)
    if signals:
        steps = [_signal(job)]
    elif job.task == "segmentation" and load_task(job.task).models.dimensions(job) == 3:
        steps = _volume(job)
    else:
        steps = _picture(job)
    steps.append(_normalise(job, spec, signals))
    if job.modalities:
        steps.append(_modalities(job, spec))
    if job.tabular:
        how = "One number per column, NaN where missing; M or male 0, F or female 1, no 0, yes 1, ages in years."
        steps.append({"step": "numbers", "columns": list(job.tabular), "how": how})
    if spec.multiples:
        steps.append(_pad(job, spec))
    if job.task == "sequence":
        how = "Shorter cases of a batch are padded behind with anything; lengths holds the valid steps of each."
        steps.append({"step": "pad", "how": how})
    return steps


def _channels(job: Job) -> Step:
    if job.data.channels == 1:
        return {"step": "grey", "weights_rgb": [0.299, 0.587, 0.114], "how": "Colour becomes grey (ITU-R BT.601)."}
    return {"step": "colour", "how": "Red, green, blue; grey is repeated."}


def _picture(job: Job) -> list[Step]:
    steps: list[Step] = [{"step": "read", "how": _READ}]
    if job.task == "sequence":
        most = job.data.frames
        how = "Every frame in order of time" + (f", at most {most} evenly picked." if most else ".")
        steps = [{"step": "read", "how": f"{how} {_READ}", "window": _window(job), "frames": most}]
    steps += harmonising(job)
    steps.append(_channels(job))
    if job.task == "segmentation":
        return [*steps, *_spacing(job), {"step": "quantise", "how": _SIXTEEN}]
    size = [job.data.size, job.data.size]
    if job.data.spacing:
        how = "The middle of that size, the odd pixel left off at the bottom and the right; zeros where it is smaller."
        steps += [*_spacing(job), {"step": "middle", "size": size, "how": how}]
    else:
        steps.append({"step": "fit", "size": size, "how": _FIT})
    return [*steps, {"step": "quantise", "how": _SIXTEEN}]


def _window(job: Job) -> list[float] | None:
    return [float(word) for word in job.data.window.split()] or None


def _volume(job: Job) -> list[Step]:
    axes = "Axes: slices from feet to head, rows from front to back, columns from the patient's right to left."
    window = _window(job)
    ends = "the window's ends" if window else "the least and largest value of the volume"
    how = f"{axes} Values in the file's units (CT: HU); {ends} become 0 and 1, what lies beyond is clipped."
    read = {"step": "read", "how": how, "window": window}
    return [read, *harmonising(job), *_spacing(job), {"step": "quantise", "how": _SIXTEEN}]


def _spacing(job: Job) -> list[Step]:
    if not job.data.spacing:
        return []
    how = "Resample linearly to so many mm along every axis; before shrinking by f, Gaussian of sd max(0, (f - 1) / 2)."
    return [{"step": "resample", "mm": job.data.spacing, "how": how}]


def _signal(job: Job) -> Step:
    how = "Samples by leads, in the file's own units" + (
        f"; at most {job.data.frames} evenly picked." if job.data.frames else "."
    )
    return {"step": "read", "how": how, "leads": job.data.channels, "samples": job.data.frames}


def _normalise(job: Job, spec: Spec, signals: bool) -> Step:
    if spec.shift:
        how = "Done within the model: (value - shift) / scale, of each channel. Give it values in [0, 1]."
        return {"step": "normalise", "in_model": True, "shift": list(spec.shift), "scale": list(spec.scale), "how": how}
    if job.data.normalise != "image":
        return {"step": "normalise", "in_model": False, "how": "Nothing: signals are taken in the file's units."}
    if signals:
        how, epsilon = "Each lead: (value - mean) / (sd + epsilon), sd over n.", 1e-6
    elif job.task == "segmentation":
        how, epsilon = (
            "(value - mean) / (sd + epsilon), of the whole image before it is cut or padded, sd over n.",
            1e-3,
        )
    elif job.task == "sequence":
        how, epsilon = "(value - mean) / (sd + epsilon), of all pixels of all frames, sd over n - 1.", 1e-3
    else:
        how, epsilon = "(value - mean) / (sd + epsilon), of all values of the image, sd over n - 1.", 1e-3
    return {"step": "normalise", "in_model": False, "epsilon": epsilon, "how": how}


def _modalities(job: Job, spec: Spec) -> Step:
    step: Step = {"step": "stack", "modalities": list(job.modalities), "how": "The images of a case are the channels."}
    if can_be_missing(job):
        gap = list(spec.shift[: job.data.channels]) if spec.shift else 0.0
        how = " A plane per modality follows: 1 where the image is missing, else 0. A missing image is filled."
        step |= {"how": step["how"] + how, "fill_missing_with": gap}
    return step


def _pad(job: Job, spec: Spec) -> Step:
    patch = list(load_task(job.task).models.patch_size(job))
    how = (
        "Grow each side to a multiple, and at least to the least, by repeating the last row, column and slice; cut the "
        "output back. Images of more than so many patches' pixels: windows of a patch's size, blended by Gaussian "
        "weights (MONAI's SlidingWindowInferer gives the same)."
    )
    from shared.tasks.segmentation.learning import AT_ONCE

    step: Step = {"step": "pad", "multiples": list(spec.multiples), "least": list(spec.least), "how": how}
    return step | {"patch": patch, "whole_up_to_patches": AT_ONCE, "overlap": job.evaluation.overlap}


def postprocessing(job: Job) -> dict[str, Any]:
    """What the output means: the classes in order, and the rule by which one is chosen."""
    found: dict[str, Any] = {"classes": list(job.classes)}
    if job.task in ("classification", "sequence"):
        if job.data.multilabel:
            rule = "probability = sigmoid(logit) of each class; a class is said to be there above the threshold"
            return found | {"activation": "sigmoid", "threshold": 0.5, "rule": rule}
        rule = "probability = softmax(logits); the likeliest class is chosen: no threshold was set"
        return found | {"activation": "softmax", "threshold": None, "rule": rule}
    if job.task == "segmentation":
        rule = "the class of each pixel is the largest of softmax(logits): 0 background, k the k-th class"
        found |= {"activation": "softmax", "threshold": None, "rule": rule}
        if job.data.masks == "instances":
            found["objects"] = "connected components of what is not background, numbered from 1"
        return found | ({"image_classes": list(job.labels)} if job.labels else {})
    if job.task == "detection":
        return found | _boxes(job)
    if job.task == "reconstruction":
        rule = f"anomaly score = mean of (image - rebuilt)² over all pixels, both {_grey_again(job)}; larger: rarer"
        normal = job.data.normal or job.classes[0]
        return found | {"trained_on": normal, "threshold": None, "rule": f"{rule}; no threshold was set"}
    return found | {"conditional": job.model.conditional, "rule": "pictures in [0, 1]"}


def _boxes(job: Job) -> dict[str, Any]:
    from shared.tasks.detection.models import LEAST_SCORE, MAX_BOXES
    from shared.tasks.detection.predict import DRAWN

    rule = (
        "label k is the k-th class, 1 the first; boxes in pixels of the input: take off the border that fitting added "
        "and divide by its scale; cut at the image's edge"
    )
    return {"least_score": LEAST_SCORE, "most_boxes": MAX_BOXES, "threshold": DRAWN, "rule": rule}


def _grey_again(job: Job) -> str:
    if job.data.normalise == "image":
        return "turned back by value * (sd + 0.001) + mean and clipped to [0, 1]"
    return "clipped to [0, 1]"
