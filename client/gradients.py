"""Gradients of single units, an image or a patient: what DP-SGD clips one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from shared.config import Job
from shared.imaging.dataset import Dataset

Unit = list[int]  # the cases of one, by their place in the data set


class SingleGradients:
    """Gradients one unit at a time: right for any model, for what one unit gives never meets another's."""

    def __init__(
        self, model: nn.Module, task: ModuleType, data: Dataset, job: Job, class_weights: Sequence[float]
    ) -> None:
        self.model, self.task, self.data, self.job, self.weights = model, task, data, job, class_weights

    def of(
        self, chosen: Sequence[Unit], parameters: Sequence[nn.Parameter], part: str
    ) -> Iterator[tuple[list[Tensor], float]]:
        """For each unit the gradient of the mean loss of its cases, with a first axis of one."""
        for unit in chosen:
            whole, loss = [torch.zeros_like(parameter) for parameter in parameters], 0.0
            for start in range(0, len(unit), self.job.train.batch_size):
                cases = unit[start : start + self.job.train.batch_size]
                batch = self.task.batch(self.data, cases, self.job, parameters[0].device, train=True)
                share = self.task.step(self.model, batch, self.job, self.weights, part)
                share = share * (len(cases) / len(unit))
                found = torch.autograd.grad(share, parameters, allow_unused=True)
                for held, gradient in zip(whole, found, strict=True):
                    if gradient is not None:
                        held += gradient
                loss += float(share.detach())
            yield [gradient[None] for gradient in whole], loss


class HookedGradients:
    """Gradients of the cases of a batch in one backward pass, by Opacus' hooks; cases of a unit are averaged."""

    def __init__(
        self, model: nn.Module, task: ModuleType, data: Dataset, job: Job, class_weights: Sequence[float]
    ) -> None:
        from opacus.grad_sample import GradSampleHooks

        self.model, self.task, self.data, self.job, self.weights = model, task, data, job, class_weights
        # Opacus' rule for convolutions reads memory as if it were laid out plainly: channels last, its gradients are
        # wrong without a word.
        model.to(memory_format=torch.contiguous_format)
        convolutions = [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)]
        self.plain = [module.register_forward_pre_hook(_contiguous) for module in convolutions]
        self.hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)

    def of(
        self, chosen: Sequence[Unit], parameters: Sequence[nn.Parameter], part: str
    ) -> Iterator[tuple[list[Tensor], float]]:
        """For some units at a time the gradients of each of them."""
        size = self.job.train.batch_size
        for start in range(0, len(chosen), size):
            some = chosen[start : start + size]
            rows = [index for unit in some for index in unit]
            owner = torch.tensor([k for k, unit in enumerate(some) for _ in unit], device=parameters[0].device)
            batch = self.task.batch(self.data, rows, self.job, owner.device, train=True)
            loss = self.task.step(self.model, batch, self.job, self.weights, part) * len(rows)
            for parameter in parameters:
                parameter.grad_sample = None  # type: ignore[attr-defined]
            loss.backward()
            share = torch.tensor([1 / len(unit) for unit in some for _ in unit], device=owner.device)
            yield [self._by_unit(p, owner, share, len(some)) for p in parameters], float(loss.detach())
            for parameter in parameters:
                parameter.grad = None

    def _by_unit(self, parameter: nn.Parameter, owner: Tensor, share: Tensor, count: int) -> Tensor:
        found = parameter.grad_sample  # type: ignore[attr-defined]
        whole = parameter.new_zeros((count, *parameter.shape))
        if found is not None:
            rows = torch.cat(found) if isinstance(found, list) else found
            whole.index_add_(0, owner, rows * share.view(-1, *[1] * parameter.ndim))
        return whole

    def close(self) -> None:
        """Take the hooks off the model."""
        self.hooks.remove_hooks()
        for handle in self.plain:
            handle.remove()


@contextmanager
def unit_gradients(
    model: nn.Module, task: ModuleType, data: Dataset, job: Job, class_weights: Sequence[float], hooked: bool
) -> Iterator[SingleGradients | HookedGradients]:
    """What gives the gradients, while the block runs; the model has its own layers and no hooks again after it, also
    where it fails: the model is used for the next message."""
    if not hooked:
        with volumes_by_onednn(model):
            yield SingleGradients(model, task, data, job, class_weights)
        return
    swapped = swap_recurrent(model)
    gradients = HookedGradients(model, task, data, job, class_weights)
    try:
        yield gradients
    finally:
        gradients.close()
        put_back(swapped)


@contextmanager
def volumes_by_onednn(model: nn.Module) -> Iterator[None]:
    """While the block runs, 3D convolutions on CPUs are oneDNN's: for a batch of one torch itself takes a plain loop,
    which is ten times slower."""
    volumes = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    handles = []
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        handles += [module.register_forward_pre_hook(_to_onednn) for module in volumes]
        handles += [module.register_forward_hook(_from_onednn) for module in volumes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to_onednn(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.to_mkldnn() if each.device.type == "cpu" else each for each in inputs)


def _from_onednn(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to_dense() if output.is_mkldnn else output


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.contiguous() for each in inputs)


def swap_recurrent(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put Opacus' recurrent layers, whose steps its hooks can follow, in place of torch's; gives what was there."""
    from opacus.layers import DPGRU, DPLSTM

    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if isinstance(old, nn.GRU | nn.LSTM):
                kind = DPGRU if isinstance(old, nn.GRU) else DPLSTM
                new = kind(old.input_size, old.hidden_size, old.num_layers, batch_first=old.batch_first)
                new.load_state_dict(old.state_dict())
                new.to(next(old.parameters()).device)
                setattr(parent, name, new)
                swapped.append((parent, name, old))
    return swapped


def put_back(swapped: Sequence[tuple[nn.Module, str, nn.Module]]) -> None:
    """Undo ``swap_recurrent``, with the weights learnt since."""
    for parent, name, old in swapped:
        old.load_state_dict(getattr(parent, name).state_dict())
        setattr(parent, name, old)
