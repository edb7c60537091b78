"""The formats a network is written in, and a program that runs each."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consilium.shipping.graph import Graph, Runner, Spec
from consilium.trained import empty
from shared.config import Job
from shared.errors import UserError, how_to_install
from shared.tasks import load_task

OPSET = 17


class Format(NamedTuple):
    """How a network is written to a file, how the file is run, and the file's name."""

    write: Callable[[Graph, Job, Spec, Path], None]
    load: Callable[[Path, Job, Spec], Runner]
    file: str


def example(job: Job, spec: Spec) -> tuple[Tensor, ...]:
    """An input to follow through the network: two cases at once where several may come."""
    generator = torch.Generator().manual_seed(0)
    return random_inputs(job, spec, generator, batch=2, steps=6, more=0)


def random_inputs(
    job: Job, spec: Spec, generator: torch.Generator, batch: int, steps: int, more: int
) -> tuple[Tensor, ...]:
    """Random values for every input; segmentation: images ``more`` multiples larger than a patch."""
    sizes: dict[str, int] = {"batch": batch, "steps": steps}
    if job.task == "segmentation":
        patch = load_task(job.task).models.patch_size(job)
        names = spec.inputs[0].shape[2:]
        for name, side, unit, least in zip(names, patch, spec.multiples, spec.least, strict=True):
            sizes[str(name)] = max(least, -(-side // unit) * unit) + more * unit
    found = []
    for tensor in spec.inputs:
        shape = [sizes[side] if isinstance(side, str) else side for side in tensor.shape]
        if tensor.name == "lengths":
            lengths = torch.randint(1, steps + 1, shape, generator=generator)
            lengths[0] = steps
            found.append(lengths)
        elif tensor.name == "classes":
            found.append(torch.randint(0, len(job.classes), shape, generator=generator))
        elif tensor.name in ("noise", "values") or not spec.shift:
            found.append(torch.randn(shape, generator=generator))
        else:
            found.append(torch.rand(shape, generator=generator))
    return tuple(found)


# --- safetensors ------------------------------------------------------------------------------------------------------


def kept_tensors(graph: Graph, job: Job) -> dict[str, Tensor]:
    """The weights the graph needs, under the names they have in the task's network."""
    before = "average." if job.task == "generation" else ""
    return {before + name: value.detach().cpu().contiguous() for name, value in graph.network.state_dict().items()}


def _write_safetensors(graph: Graph, job: Job, spec: Spec, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.clone() for name, value in kept_tensors(graph, job).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _load_safetensors(path: Path, job: Job, spec: Spec) -> Runner:
    return _runs(read_network(path, job))


def read_network(path: Path, job: Job) -> nn.Module:
    """The graph of a job with the weights of a file that was exported as safetensors; every tensor must fit.

    Raises:
        UserError: the file is of another network.
    """
    from safetensors.torch import load_file

    from consilium.shipping.graph import spec_of

    given = load_file(path)
    model = empty(job.replace(model__weights="", model__freeze="none"), load_task(job.task), given).eval()
    wanted = set(kept_tensors(Graph(model, job, spec_of(job, model)), job))
    if set(given) != wanted:
        raise UserError(f"{path}: does not fit {job.model.name} of its job")
    model.load_state_dict(given, strict=False)
    return Graph(model, job, spec_of(job, model)).eval()


def _runs(module: Any) -> Runner:
    """A torch module as a runner."""

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            found = module(*inputs)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    return run


# --- TorchScript ------------------------------------------------------------------------------------------------------


class _Detector(nn.Module):
    """What ``Graph`` does for a detector, in the part of Python that TorchScript compiles: how many boxes there are
    depends on the image, so that it cannot be traced."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.network = graph.network
        shift, scale = graph.get_buffer("shift"), graph.get_buffer("scale")
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = (image - self.shift) / self.scale  # type: ignore[operator]
        found = self.network([images[0]])[1][0]  # scripted detectors give losses and detections
        return found["boxes"], found["labels"], found["scores"]


def _write_torchscript(graph: Graph, job: Job, spec: Spec, path: Path) -> None:
    with quiet(), torch.no_grad():
        if job.task == "detection":
            module = torch.jit.script(_Detector(graph).eval())
        else:
            module = torch.jit.trace(graph, example(job, spec), check_trace=False)  # type: ignore[no-untyped-call]
        facts = {"name": job.name, "task": job.task, "classes": list(job.classes), "sidecar": "model.json"}
        torch.jit.save(module, str(path), _extra_files={"metadata.json": json.dumps(facts)})  # as MONAI looks for it


def _load_torchscript(path: Path, job: Job, spec: Spec) -> Runner:
    with quiet():
        run = _runs(torch.jit.load(str(path)).eval())  # type: ignore[no-untyped-call]
        if job.task == "detection":  # torchvision's scripted detectors warn when they are first called
            run(example(job, spec))
    return run


# --- ONNX -------------------------------------------------------------------------------------------------------------


def require_onnx() -> None:
    """Raise UserError, which names what to install, where onnx or onnxruntime is not there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format onnx: onnx and onnxruntime are not installed ({error}); {how_to_install('export')}"
        ) from None


def _write_onnx(graph: Graph, job: Job, spec: Spec, path: Path) -> None:
    """By following the network with an example; what cannot be had so, by torch.export."""
    require_onnx()
    inputs = example(job, spec)
    names: dict[str, Any] = {
        "input_names": [t.name for t in spec.inputs],
        "output_names": [t.name for t in spec.outputs],
    }
    axes = {
        tensor.name: {place: side for place, side in enumerate(tensor.shape) if isinstance(side, str)}
        for tensor in (*spec.inputs, *spec.outputs)
    }
    with quiet(), torch.no_grad():
        try:
            torch.onnx.export(
                graph, inputs, str(path), dynamo=False, opset_version=OPSET, dynamic_axes=axes, **names
            )  # fmt: skip
        except (torch.onnx.OnnxExporterError, RuntimeError):
            shapes = tuple(dict.fromkeys(axes[tensor.name], torch.export.Dim.AUTO) for tensor in spec.inputs)
            torch.onnx.export(
                graph, inputs, str(path), dynamo=True, external_data=False, dynamic_shapes=shapes, **names
            )  # fmt: skip


def opset(path: Path) -> int:
    """The version of the ONNX operators a file uses."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return max(int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx"))


def load_onnx(path: Path, job: Job, spec: Spec) -> Runner:
    """The file in onnxruntime, on the CPU, in one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in spec.inputs]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        taken = {name: value.contiguous().numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run([t.name for t in spec.outputs], taken)]

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Torch's exporters warn, log and print at length, in part from C++, what their user can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                for number in kept:
                    os.dup2(nowhere.fileno(), number)
                yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        logging.disable(before)


FORMATS: dict[str, Format] = {
    "safetensors": Format(_write_safetensors, _load_safetensors, "model.safetensors"),
    "onnx": Format(_write_onnx, load_onnx, "model.onnx"),
    "torchscript": Format(_write_torchscript, _load_torchscript, "model.ts"),
}
