"""What keeps a device at work: batches made beforehand, pinned memory, fused updates, compiled networks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from shared.config import Job

Made = TypeVar("Made")
# Whether there is a GPU is asked of its driver, not of CUDA: who has asked CUDA can fork no worker that uses one.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


@contextmanager
def tuned(device: torch.device, job: Job) -> Iterator[None]:
    """While the block runs, a GPU computes as ``train.reproducible`` says. A CPU always gives the same bits.

    Reproducible: only kernels that give the same bits every time, where there are any (torch warns where not). Else
    cuDNN tries which are fastest, and float32 matrices are multiplied in TF32.
    """
    if device.type != "cuda":
        yield
        return
    same, cudnn = job.train.reproducible, torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags, precision = (cudnn.benchmark, cudnn.allow_tf32), torch.get_float32_matmul_precision()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order
    torch.use_deterministic_algorithms(same, warn_only=True)
    cudnn.benchmark, cudnn.allow_tf32 = not same, not same
    torch.set_float32_matmul_precision("highest" if same else "high")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, cudnn.allow_tf32 = flags
        torch.set_float32_matmul_precision(precision)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the random numbers of the CPU and of the device.

    ``torch.manual_seed`` means every kind of device: where one is not in use it keeps the seed for later together with
    the whole call stack, at every call. That takes 2 ms, and the memory grows.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@lru_cache
def has_bfloat16(kind: str) -> bool:
    """Whether devices of this kind ("cpu", "cuda", "mps") compute in bfloat16 themselves, not by way of float32.

    Without units for it a processor takes longer in bfloat16 than in float32: a step of a U-Net 1.8 times as long.
    """
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return True
    units = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # an older torch cannot tell
    return any(bool(units.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last on ARM


def autocast(device: torch.device, job: Job) -> torch.autocast:
    """Networks compute in bfloat16 within it, if ``train.precision`` says so and the device gains by it."""
    wanted = job.train.precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bfloat16(device.type))


def to_device(
    tensor: Tensor, device: torch.device, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """A copy on the device; to a GPU from pinned memory, so that nobody waits for it to arrive."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, memory_format=memory_format)
    if memory_format is not torch.preserve_format:
        tensor = tensor.contiguous(memory_format=memory_format)
    return tensor.pin_memory().to(device, non_blocking=True)


def ahead(make: Callable[[int], Made], numbers: Iterable[int], device: torch.device) -> Iterator[Made]:
    """``make`` of each number in turn; on a GPU the next is made while the caller works with the last.

    One thread makes them, one after another, so random numbers of the CPU are drawn in the same order. On a CPU there
    is nothing to gain, and a network that draws random numbers of its own would take them out of turn.
    """
    return _ahead(make, numbers) if device.type == "cuda" else map(make, numbers)


def _ahead(make: Callable[[int], Made], numbers: Iterable[int]) -> Iterator[Made]:
    waiting: list[Future[Made]] = []
    with ThreadPoolExecutor(1, "batches") as thread:
        for number in numbers:
            waiting.append(thread.submit(make, number))
            if len(waiting) > 1:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def fused(parameters: Sequence[Tensor]) -> bool:
    """Whether an optimiser may update all parameters in one kernel: they are floats on a GPU."""
    return bool(parameters) and all(p.device.type == "cuda" and p.is_floating_point() for p in parameters)


def compiled(model: nn.Module, job: Job) -> nn.Module:
    """The network itself, compiled by torch at its first batch if the job says so; its weights keep their names.

    Where there is no compiler, or it cannot follow the network, that runs as it would have.
    """
    if job.train.compile and model._compiled_call_impl is None:
        import torch._dynamo

        torch._dynamo.config.suppress_errors = True
        model.compile()
    return model


def cut(indices: Sequence[int], job: Job) -> list[Sequence[int]]:
    """A batch in ``train.accumulate`` parts, as equal as can be; in fewer where it has fewer images."""
    count = max(1, min(job.train.accumulate, len(indices)))
    edges = [round(k * len(indices) / count) for k in range(count + 1)]
    return [indices[low:high] for low, high in pairwise(edges)]
