"""What a run needs to go on after it broke off, written after every round: ``state/`` in the run folder.

    state/best-NNNNNN.safetensors    the best round's model
    state/held-NNNNNN.safetensors    what the algorithm keeps from round to round, where it keeps anything
    state/round-NNNNNN.safetensors   the global model after that round, and in its metadata all else

The last file is renamed into place last, so a run is always after a whole round. Random numbers need no place in it:
all of a run's are derived from the job's seed and the round, but for those of privacy, which nobody may draw again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from server.store import write_model
from shared.errors import UserError

Arrays = dict[str, Tensor]


@dataclass
class Best:
    """The best round so far by the job's validation metric."""

    round: int = 0
    value: float = math.nan
    arrays: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A run after ``round`` rounds: its model, the best one, and what else is carried on.

    ``more`` are a few plain values of the loop; ``held`` the arrays of the algorithm, by kind.
    """

    round: int
    arrays: Arrays
    best: Best
    more: Mapping[str, Any]
    held: dict[str, Arrays] = field(default_factory=dict)


class Checkpoint:
    """The state of the run in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.run, self.folder = folder, folder / "state"

    def keep_best(self, best: Best, facts: Mapping[str, str]) -> None:
        """Write the best model so far, also as the run's ``model.safetensors``."""
        path = self._best(best.round)
        write_model(path, best.arrays, facts)
        self._link(path, "model.safetensors")

    def save(self, state: State, facts: Mapping[str, str]) -> None:
        """Write the state after a round, also as ``last.safetensors``; the one before it is then no longer needed."""
        value = None if math.isnan(state.best.value) else state.best.value
        carried = {"best_round": state.best.round, "best_value": value, **state.more}
        path, held = self.folder / f"round-{state.round:06}.safetensors", self._held(state.round)
        if state.held:
            flat = {f"{kind}/{name}": array for kind, arrays in state.held.items() for name, array in arrays.items()}
            write_model(held, flat, facts)
        write_model(path, state.arrays, {**facts, "state": json.dumps(carried)})
        self._link(path, "last.safetensors")
        for other in self.folder.glob("*.safetensors"):
            if other not in (path, held, self._best(state.best.round)):
                other.unlink()

    def load(self, names: Sequence[str]) -> State | None:
        """The state after the last whole round, its arrays in the order of ``names``; None if there was none.

        Raises:
            UserError: the files were damaged, or are those of another model.
        """
        found = sorted(self.folder.glob("round-*.safetensors"))
        if not found:
            return None
        try:
            with safe_open(found[-1], "pt") as file:
                facts = json.loads(json.loads(file.metadata()["consilium"])["state"])
            best = Best(facts.pop("best_round"), facts.pop("best_value"))
            best.value = math.nan if best.value is None else best.value
            best.arrays = _in_order(self._best(best.round), names) if best.round else {}
            number = int(found[-1].stem.removeprefix("round-"))
            return State(number, _in_order(found[-1], names), best, facts, self._load_held(number))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{found[-1]}: the run's state cannot be read ({error}); start the run anew") from None

    def _link(self, path: Path, name: str) -> None:
        """Give a file a second name in the run folder: the same bytes, written once."""
        link = self.run / f".{name}.writing"
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, self.run / name)

    def _load_held(self, number: int) -> dict[str, Arrays]:
        held: dict[str, Arrays] = {}
        if self._held(number).exists():
            for key, array in load_file(self._held(number)).items():
                kind, _, name = key.partition("/")
                held.setdefault(kind, {})[name] = array
        return held

    def _held(self, number: int) -> Path:
        return self.folder / f"held-{number:06}.safetensors"

    def _best(self, number: int) -> Path:
        return self.folder / f"best-{number:06}.safetensors"


def _in_order(path: Path, names: Sequence[str]) -> Arrays:
    """The arrays of a file as they are exchanged: safetensors keeps them in an order of its own."""
    arrays = load_file(path)
    if set(arrays) != set(names):
        raise ValueError("it holds another model")
    return {name: arrays[name] for name in names}
