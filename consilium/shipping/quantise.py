"""Weights and activations of an ONNX file in 8 bits, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from consilium.shipping.check import CPU, on_images
from consilium.shipping.formats import load_onnx, quiet
from consilium.shipping.graph import Shipped, Spec
from shared.config import Job
from shared.errors import UserError
from shared.imaging.dataset import Dataset
from shared.tasks import load_task

FILE = "model.int8.onnx"
METHOD = "dynamic, by onnxruntime: weights uint8, activations scaled anew for each input; no image took part"


def write_int8(source: Path, target: Path) -> None:
    """Dynamic quantisation of convolutions, matrix products and LSTMs; all else stays float32.

    uint8 weights, because onnxruntime's convolution of int8 weights exists for no CPU.

    Raises:
        UserError: onnxruntime cannot quantise this network.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_name(".prepared.onnx")
    try:
        with quiet():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_dynamic(str(prepared), str(target), weight_type=QuantType.QUInt8)
    except Exception as error:  # onnxruntime raises what it likes
        raise UserError(f"--int8: onnxruntime cannot quantise this network: {str(error).splitlines()[0]}") from None
    finally:
        prepared.unlink(missing_ok=True)


def loss_of(
    source: Path, target: Path, model: nn.Module, job: Job, spec: Spec, data: Dataset | None, labelled: bool
) -> dict[str, Any]:
    """What int8 costs: size, how far outputs move, and the metrics of both on labelled images, if there are some."""
    facts: dict[str, Any] = {
        "method": METHOD,
        "bytes_float32": source.stat().st_size,
        "bytes_int8": target.stat().st_size,
    }
    run = load_onnx(target, job, spec)
    if data is None:
        return facts | {"metric_loss": "not measured: no images were given (--images SITE.toml has labels)"}
    moved = on_images(model, run, job, spec, data)
    facts |= {"images": moved.inputs}
    if job.task != "detection":  # boxes that differ in number have no difference
        facts |= {"largest_difference": moved.difference}
    if job.task in ("classification", "sequence", "segmentation"):
        facts["same_decision"] = moved.alike
    if not labelled:
        return facts | {"metric_loss": "not measured: the images have no labels (--images SITE.toml has labels)"}
    before, after = (_metrics(network, data, job) for network in (model, Shipped(run, job, spec)))
    rows = {
        name: {"float32": value, "int8": after[name], "change": after[name] - value}
        for name, value in before.items()
        if name in after
    }
    return facts | {"metric_loss": rows or "not measured: no metric can be had of these images"}


def _metrics(network: nn.Module, data: Dataset, job: Job) -> dict[str, float]:
    """The task's own metrics of a network on a data set; of those there are any cases for."""
    task = load_task(job.task)
    with torch.inference_mode():
        sums = task.collect(network, data, job, CPU)
    return {name: float(found.value) for name, found in task.summarise(sums, job).items() if found.n}
