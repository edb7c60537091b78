"""Client corrections: what is added to the gradient of each local step, so that sites do not drift apart.

Those here are one linear term: the gradient g of parameter w becomes ``g + pull (w - start) + shift``. One that adds to
the loss instead is ``shared.adversary``.

    proximal   pull mu to the common model: FedProx (Li et al. 2020)
    scaffold   shift by the common control variate less the site's own (Karimireddy et al. 2020, algorithm 1)
    feddyn     pull alpha to the common model, shift by minus the site's own gradient memory (Acar et al. 2021, eq. 2)

So they go with every loss, optimiser and kind of model, with models of several parts (each parameter belongs to one of
them), and with DP-SGD, where the term comes after the noise: it is made of what has left the site already, the common
model and noised gradients, and so costs no privacy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Correction:
    """The term for the parameters named in ``start``, and the mean of the gradients that it was added to."""

    def __init__(
        self,
        model: nn.Module,
        start: Mapping[str, Tensor],
        pull: float = 0.0,
        shift: Mapping[str, Tensor] | None = None,
        gather: bool = False,
    ) -> None:
        """``gather``: keep the mean of the gradients as they were without the term."""
        self.pull, self.gather = pull, gather
        found = {parameter: name for name, parameter in model.named_parameters() if name in start} if start else {}
        self.names = found
        self.start = {parameter: start[name] for parameter, name in found.items()}
        self.shift = {parameter: shift[name] for parameter, name in found.items()} if shift is not None else {}
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.steps: dict[nn.Parameter, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What must hold while the model trains: nothing, but see ``shared.adversary``."""
        yield

    def completed(self, loss: Tensor, progress: float) -> Tensor:
        """The loss of the batch that the model was shown last with what is added to it, ``progress`` (0 to 1) into the
        run."""
        return loss

    @torch.no_grad()
    def adjust(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the term to the gradients of ``parameters``, which are to take a step; those without one are left out."""
        known = [parameter for parameter in parameters if parameter in self.names]
        if self.gather:
            self._gather(known)
        known = [parameter for parameter in known if parameter.grad is not None]
        gradients = [parameter.grad for parameter in known if parameter.grad is not None]
        if self.pull and known:
            away = torch._foreach_sub(list(known), [_beside(self.start, parameter) for parameter in known])
            torch._foreach_add_(gradients, away, alpha=self.pull)
        if self.shift and known:
            torch._foreach_add_(gradients, [_beside(self.shift, parameter) for parameter in known])

    def _gather(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            self.steps[parameter] = self.steps.get(parameter, 0) + 1
            if parameter not in self.sums:
                self.sums[parameter] = torch.zeros_like(parameter)
            if parameter.grad is not None:
                self.sums[parameter].add_(parameter.grad)

    def mean_gradients(self) -> dict[str, Tensor]:
        """The mean over the steps of each parameter's own gradient, on the CPU; zero where it took no step.

        Of plain gradient descent this is SCAFFOLD's option II, (start - end) / (steps x rate), less the shift; it has
        the same meaning for any optimiser, schedule and weight decay.
        """
        return {
            name: (
                _home(self.sums[parameter] / self.steps[parameter])
                if parameter in self.sums
                else torch.zeros(parameter.shape, dtype=parameter.dtype)
            )
            for parameter, name in self.names.items()
        }

    def changes(self) -> dict[str, Tensor]:
        """How far each parameter is from its start now, on the CPU."""
        return {name: _home(parameter.detach()) - self.start[parameter].cpu() for parameter, name in self.names.items()}


def _beside(held: dict[nn.Parameter, Tensor], parameter: nn.Parameter) -> Tensor:
    """The tensor on the parameter's device, moved there once, laid out as it is."""
    value = held[parameter]
    if value.device != parameter.device or value.stride() != parameter.stride():
        value = held[parameter] = torch.empty_like(parameter).copy_(value)
    return value


def _home(value: Tensor) -> Tensor:
    return value.to("cpu", copy=True, memory_format=torch.contiguous_format)
