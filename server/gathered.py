"""All replies of a round at hand, for aggregators that must see them beside each other."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.config import Job

Arrays = Mapping[str, Tensor]
BLOCK = 1 << 21  # numbers that are worked on at once, of all replies together


class TooFew(ValueError):
    """There are not as many replies as are needed; the model stays what it was."""


class Gathered:
    """The replies of a round, in their order; use it in a ``with``.

    What is more than ``federation.memory_mb`` is written to a temporary folder (``TMPDIR``) as it comes, and read where
    it lies by mapping it into memory: nothing else knows the difference, and the result is the same to the bit.

    Raises:
        TooFew: there are fewer than ``least`` replies.
    """

    def __init__(self, replies: Iterable[tuple[float, Arrays]], job: Job, least: int = 1) -> None:
        self.weights: list[float] = []
        self.arrays: list[Arrays] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        left = job.federation.memory_mb * 1_000_000
        for weight, arrays in replies:
            left -= sum(array.nbytes for array in arrays.values())
            self.weights.append(weight)
            self.arrays.append(arrays if left >= 0 else self._spilled(arrays))
        if len(self) < max(least, 1):
            self.close()
            raise TooFew(f"no reply to aggregate, or too few: {len(self)}, not {least}")

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[tuple[float, Arrays]]:
        return iter(zip(self.weights, self.arrays, strict=True))

    def __enter__(self) -> Gathered:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Forget the replies, and remove what was written of them."""
        self.arrays = []
        if self._folder is not None:
            self._folder.cleanup()

    def _spilled(self, arrays: Arrays) -> Arrays:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="consilium-replies-")
        path = Path(self._folder.name) / f"{len(self.arrays)}.safetensors"
        save_file({name: array.contiguous() for name, array in arrays.items()}, path)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in arrays}

    def blocks(self, floats: bool = False) -> Iterator[tuple[str, slice, np.ndarray]]:
        """The replies piece by piece: name, where in the flat array, and the numbers (replies, k) in their own dtype.

        ``floats`` leaves integer buffers out.
        """
        size = max(BLOCK // len(self), 1)
        for name, first in self.arrays[0].items():
            if floats and not first.is_floating_point():
                continue
            flat = [arrays[name].reshape(-1) for arrays in self.arrays]
            for start in range(0, first.numel(), size):
                place = slice(start, start + size)
                yield name, place, np.stack([array[place].numpy() for array in flat])

    def by_number(self, rule: Callable[[np.ndarray], np.ndarray]) -> dict[str, Tensor]:
        """Aggregate every number by itself: ``rule`` makes (k,) of the numbers (replies, k). Integers are rounded."""
        merged = {name: torch.empty_like(array, device="cpu") for name, array in self.arrays[0].items()}
        for name, place, numbers in self.blocks():
            values = torch.from_numpy(np.asarray(rule(numbers)))
            merged[name].reshape(-1)[place] = values if merged[name].is_floating_point() else values.round()
        return merged

    def products(self, before: Arrays) -> np.ndarray:
        """Inner products of the replies' changes from ``before``, float64 (replies, replies); integers do not count."""
        total = np.zeros((len(self), len(self)))
        for name, place, numbers in self.blocks(floats=True):
            change = numbers.astype(np.float64) - before[name].reshape(-1)[place].double().numpy()
            total += change @ change.T
        return (total + total.T) / 2

    def norms(self, before: Arrays) -> list[float]:
        """The L2 norm of each reply's change from ``before``."""
        return [math.sqrt(norm_of(arrays, before)) for arrays in self.arrays]


def norm_of(arrays: Arrays, before: Arrays) -> float:
    """The squared L2 norm of what ``arrays`` changed, without integer buffers."""
    floats = [name for name in before if before[name].is_floating_point()]
    return sum(float((arrays[name].double() - before[name].double()).square().sum()) for name in floats)
