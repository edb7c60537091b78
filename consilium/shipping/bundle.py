"""The folder laid out as MONAI's bundles are, so that MONAI and what is built on it can load the model.

MONAI's layout asks for configs/metadata.json, models/ and docs/README.md. The network of ``inference.json`` is the
TorchScript file, which needs nothing of ours; where only safetensors was asked for, MONAI loads it through Consilium.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from consilium.shipping.formats import FORMATS
from consilium.shipping.graph import Spec, Tensors
from shared import __version__
from shared.config import Job
from shared.tasks import TASKS

SIDECAR = "model.json"
MONAI = "1.6.1"  # the release that the tests load such folders with
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)  # fmt: skip


def metadata(job: Job, spec: Spec, facts: dict[str, Any]) -> dict[str, Any]:
    """configs/metadata.json, by MONAI's schema of bundles' metadata."""
    version = importlib.metadata.version
    image, *others = spec.inputs
    inputs = {"image": _described(job, image, patch=job.task == "segmentation")}
    inputs |= {tensor.name: _described(job, tensor) for tensor in others}
    first, *more = spec.outputs
    outputs = {"pred": _described(job, first, classes=True)} | {tensor.name: _described(job, tensor) for tensor in more}
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"round {facts['round']} of the job {job.name}"},
        "monai_version": MONAI,
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {},
        "supported_apps": {},
        "name": job.name,
        "task": TASKS[job.task].about,
        "description": f"{job.model.name}, trained by federated learning with Consilium; see docs/README.md",
        "authors": "the sites of the federation; see docs/README.md",
        "copyright": "not stated by the run",
        "data_type": "see docs/README.md",
        "intended_use": "research only; see docs/README.md",
        "network_data_format": {"inputs": inputs, "outputs": outputs},
        "consilium": {
            "version": __version__,
            "sidecar": SIDECAR,
            "job_sha256": job.sha256,
        },
    }


def _described(job: Job, tensor: Tensors, patch: bool = False, classes: bool = False) -> dict[str, Any]:
    """One input or output as the schema wants it; a side of any length is a star, of patches that of a patch."""
    channels, *spatial = tensor.shape[1:] if len(tensor.shape) > 1 else (1,)
    channels = channels if isinstance(channels, int) else 1
    facts: dict[str, Any] = {
        "type": "image" if len(spatial) > 1 else "probabilities" if classes else "tabular",
        "format": "logits" if tensor.name.endswith("logits") else tensor.name,
        "num_channels": channels,
        "spatial_shape": _patch(job, spatial)
        if patch
        else ["*" if isinstance(side, str) else side for side in spatial],
        "dtype": tensor.dtype,
        "value_range": [0, 1] if "[0, 1]" in tensor.meaning else [],
        "is_patch_data": patch,
        "channel_def": {},
    }
    if classes and job.task in ("classification", "sequence", "segmentation"):
        names = (*(("background",) if job.task == "segmentation" else ()), *job.classes)
        facts["channel_def"] = {str(place): name for place, name in enumerate(names)}
    return facts


def _patch(job: Job, spatial: list[int | str]) -> list[int]:
    from shared.tasks import load_task

    return list(load_task(job.task).models.patch_size(job))


def inference(job: Job, spec: Spec, formats: tuple[str, ...]) -> dict[str, Any]:
    """configs/inference.json: how MONAI's ConfigParser makes the network and the inferer."""
    found: dict[str, Any] = {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "device": "$torch.device('cpu')",
        "sidecar": f"$@bundle_root + '/{SIDECAR}'",
    }
    files = {name: f"$@bundle_root + '/models/{FORMATS[name].file}'" for name in formats}
    if "torchscript" in files:
        network: dict[str, Any] = {"_target_": "torch.jit.load", "f": files["torchscript"], "map_location": "@device"}
        found["network_def"] = network
    elif "safetensors" in files:
        found["network_def"] = {"_target_": "consilium.shipping.export.load_network", "folder": "@bundle_root"}
    if "onnx" in files:
        found["session"] = {
            "_target_": "onnxruntime.InferenceSession",
            "path_or_bytes": files["onnx"],
            "providers": ["CPUExecutionProvider"],
        }
    if job.task == "segmentation":
        found["inferer"] = {
            "_target_": "SlidingWindowInferer",
            "roi_size": _patch(job, []),
            "sw_batch_size": 4,
            "overlap": job.evaluation.overlap,
            "mode": "gaussian",
            "padding_mode": "replicate",
        }
    else:
        found["inferer"] = {"_target_": "SimpleInferer"}
    return found
