"""The local training loop: some gradient steps on a site's own images.

The loop has no state of its own. Which images step k sees, and the learning rate it uses, follow from k; the
optimiser's moments are handed in and out. So a federation of one site is plain training, a resumed run repeats the
uninterrupted one, and a site that sat out a round simply goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from shared.cases import derived_seed
from shared.config import Job
from shared.corrections import Correction
from shared.devices import ahead, autocast, compiled, cut, fused, seed_generators, tuned
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Dataset
from shared.tasks import Part


@dataclass(frozen=True)
class Trained:
    """What a stretch of training did: steps, images seen, the optimiser's moments (none where the job does not keep
    them), and the sums of the images' losses.

    ``losses`` holds a sum for each part of the model, ``loss`` is all of them together.
    """

    steps: int
    images: int
    losses: tuple[float, ...]
    moments: dict[str, Tensor]

    @property
    def loss(self) -> float:
        """The sum over all parts of the model."""
        return sum(self.losses)


def pick_device(job: Job) -> torch.device:
    """The device the job asks for; ``auto`` takes a GPU where there is one."""
    name = job.train.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"train.device = {name!r}: write auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"train.device = {name!r}: write auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"train.device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def learning_rate(step: int, total: int, job: Job) -> float:
    """The learning rate of gradient step ``step`` of ``total``: one linear warm-up, then cosine to zero or constant."""
    warm = job.train.warmup * total
    if step < warm:
        return job.train.learning_rate * (step + 1) / (warm + 1)
    if job.train.schedule == "constant":
        return job.train.learning_rate
    return job.train.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def batch_indices(n: int, size: int, step: int, seed: int) -> list[int]:
    """The images of gradient step ``step``: the stream of all images, shuffled anew each epoch, cut into batches.

    Every image comes equally often whatever ``n`` and ``size``; a batch holds no image twice unless it crosses epochs.
    """
    size = min(size, n)
    picked: list[int] = []
    place = step * size
    while len(picked) < size:
        epoch, offset = divmod(place + len(picked), n)
        picked += _order(n, seed, epoch)[offset : offset + size - len(picked)].tolist()
    return picked


@lru_cache(maxsize=64)
def _order(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(derived_seed(seed, "order", epoch)))


def make_optimizer(model: nn.Module, job: Job, parts: Sequence[Part] = (Part(),)) -> torch.optim.Optimizer:
    """The job's local optimiser over what is trained, a group for each part of the model."""
    rate, decay = job.train.learning_rate, job.train.weight_decay
    groups: list[dict[str, Any]] = [
        {
            "params": [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(part.prefix)],
            "lr": rate * part.rate,
        }
        for part in parts
    ]
    # None is torch's own choice; on CPUs another would change the last bits.
    one = fused([parameter for group in groups for parameter in group["params"]]) or None
    if job.train.optimizer == "sgd":
        nesterov = job.train.momentum > 0
        return torch.optim.SGD(groups, rate, job.train.momentum, weight_decay=decay, nesterov=nesterov, fused=one)
    for group, part in zip(groups, parts, strict=True):
        group["betas"] = part.betas
    return torch.optim.AdamW(groups, rate, weight_decay=decay, fused=one)


def take_moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named ``parameter number.what``: nothing but numbers, so no pickle is needed."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for number, held in state.items()
        for key, value in held.items()
    }


def put_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Give a fresh optimiser copies of ``moments``; the settings stay those of the job."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        # Laid out in memory as the parameter, so that the update need not reorder one of them.
        copy = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        state.setdefault(int(number), {})[key] = copy.detach().copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def memory_format(parameters: Iterable[Tensor]) -> torch.memory_format:
    """Channels last: a fifth faster on CPUs, more on GPUs."""
    volumes = any(parameter.ndim == 5 for parameter in parameters)
    return torch.channels_last_3d if volumes else torch.channels_last


def put_on(model: nn.Module, device: torch.device) -> torch.device:
    """Put the model on the device, laid out as ``memory_format`` says; where it is so already this is but a look.

    Gives the device by its number: "cuda" alone is another GPU in another thread.
    """
    parameters = list(model.parameters())
    layout = memory_format(parameters)
    dimensions = 5 if layout is torch.channels_last_3d else 4
    if not all(
        held.device == device and (held.ndim != dimensions or held.is_contiguous(memory_format=layout))
        for held in parameters
    ):
        model.to(device, memory_format=layout)  # type: ignore[call-overload]
    return parameters[0].device if parameters else device


def set_mode(model: nn.Module, job: Job) -> None:
    """Train mode for what is trained; a frozen backbone stays in eval mode so that its running statistics stay put."""
    model.train()
    if job.model.freeze == "backbone":
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if not any(parameter.requires_grad for parameter in own):
                module.training = False


def _require_enough(model: nn.Module, images: int, job: Job) -> None:
    """Raise SiteRefusal where there is no image, or a layer would normalise over a batch, or a part of one, of one."""
    if not images:
        raise SiteRefusal("no-training-images", "no image of this site is in the training split")
    least = min(map(len, cut(range(min(images, job.train.batch_size)), job)))
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    if least == 1 and any(module.training for module in norms):
        raise SiteRefusal(
            "too-few-images", f"{job.model.name} normalises over a batch: one training image is not enough"
        )


def train(
    model: nn.Module,
    task: ModuleType,
    data: Dataset,
    job: Job,
    *,
    site: str,
    first_step: int,
    steps: int,
    class_weights: Sequence[float],
    moments: dict[str, Tensor] | None = None,
    correction: Correction | None = None,
    total: int = 0,
    begin: int = 0,
) -> Trained:
    """Train ``model`` in place for ``steps`` gradient steps, numbers ``first_step`` onwards of the whole run.

    Args:
        site: enters the seeds, so that sites draw independently.
        moments: the optimiser's state from an earlier call, or None to start afresh.
        correction: what is added to the loss or the gradients of each step.
        total: steps over which the learning rate goes; 0 is what the job asks for of this data.
        begin: the step with which that begins.

    Raises:
        SiteRefusal: there is nothing to train on, or the loss is no longer finite.
    """
    device, correction = pick_device(job), correction or Correction(model, {})
    device = put_on(model, device)
    parts = task.parts(job)
    optimizer = make_optimizer(model, job, parts)
    if moments is not None:
        put_moments(optimizer, moments)
    total = total or job.federation.rounds * job.local_steps(len(data))
    seed = derived_seed(job.seed, site)
    seed_generators(derived_seed(seed, first_step), device)
    set_mode(model, job)
    _require_enough(model, len(data), job)
    sums = torch.zeros(len(parts), device=device)
    compiled(model, job)

    def batches(number: int) -> list[tuple[Any, int]]:
        """Of a step: the batch, or the parts in which its gradient is added up, each with its number of images."""
        indices = batch_indices(len(data), job.train.batch_size, number, seed)
        return [(task.batch(data, part, job, device, train=True), len(part)) for part in cut(indices, job)]

    seen = 0
    numbers = range(first_step, first_step + steps)
    with tuned(device, job), correction.watching():
        for number, shown in zip(numbers, ahead(batches, numbers, device), strict=True):
            images = sum(count for _, count in shown)
            for place, (part, group) in enumerate(zip(parts, optimizer.param_groups, strict=True)):
                group["lr"] = learning_rate(number - begin, total, job) * part.rate
                # The other parts' gradients are None, and the optimiser passes over parameters without one.
                optimizer.zero_grad(set_to_none=True)
                for batch, count in shown:
                    with autocast(device, job):
                        loss = task.step(model, batch, job, class_weights, part.prefix)
                        whole = correction.completed(loss, number / total)
                    part_of = whole if count == images else whole * (count / images)
                    part_of.backward(inputs=group["params"])  # type: ignore[no-untyped-call]
                    sums[place] += loss.detach() * count  # stays on the device: no wait per step
                correction.adjust(group["params"])
                optimizer.step()
            seen += images
    optimizer.zero_grad(set_to_none=True)
    losses = tuple(sums.tolist())
    if not math.isfinite(sum(losses)):
        raise SiteRefusal("diverged", f"the training loss is {sum(losses)}; lower train.learning_rate")
    return Trained(steps, seen, losses, take_moments(optimizer) if job.train.keep_optimizer else {})
