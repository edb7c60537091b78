"""What a site carries from round to round, in its own folder; nothing of it leaves but through the gate.

    moments             of the optimiser, where ``train.keep_optimizer``
    home                what of the model stays at the site (``federation.local``)
    control             the site's control variate (SCAFFOLD), or its gradient memory (FedDyn)
    personal            the site's own model beside the common one (Ditto), and
    personal-moments    its optimiser's

and, where the job has a codec (``client.wire``), in folders of their own since they are written at another time:

    models              that the server sent
    late                what of the site's changes has not left yet

A file holds them as they were after a round. A round that is repeated after a crash reads those of the round before it,
so it repeats exactly.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.config import Job
from shared.sitefile import OWN_FOLDER

Arrays = dict[str, Tensor]


class Memory:
    """The memory of a run; ``job`` keeps apart what it trains first (a reference network) and what it trains then.

    ``apart`` is a folder of its own within it.
    """

    def __init__(self, home: Path, run: str, job: Job, apart: str = "") -> None:
        self.folder = home / OWN_FOLDER / "state" / run / job.sha256[:16] / apart

    def _rounds(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors"))

    def forget(self, after: int) -> None:
        """Drop all of rounds later than ``after``, also in folders apart; 0 starts afresh."""
        if after == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.folder.rglob("*.safetensors"):
            if int(path.stem) > after:
                path.unlink(missing_ok=True)

    def load(self, kind: str, before: int) -> Arrays | None:
        """What was kept of this kind as it was before round ``before``; None if the site was in no earlier round."""
        earlier = [number for number in self._rounds() if number < before]
        return self._read(kind, earlier[-1]) if earlier else None

    def exactly(self, kind: str, round_: int) -> Arrays | None:
        """What was kept of this kind after just this round; None if nothing is there that can be read."""
        try:
            return self._read(kind, round_)
        except (OSError, SafetensorError):
            return None

    def _read(self, kind: str, round_: int) -> Arrays:
        with safe_open(self.folder / f"{round_}.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{kind}/")]  # noqa: SIM118
            return {name.partition("/")[2]: file.get_tensor(name) for name in names}

    def save(self, round_: int, kinds: Mapping[str, Arrays], needed: Iterable[int] = ()) -> None:
        """Keep these arrays as they are after a round. The last two rounds stay, and what was last before the end of
        each round ``needed``; others go."""
        flat = {f"{kind}/{name}": array for kind, arrays in kinds.items() for name, array in arrays.items()}
        write_arrays(self.folder / f"{round_}.safetensors", flat, {})
        rounds = self._rounds()
        stay = {*rounds[-2:], *(max((r for r in rounds if r <= number), default=0) for number in needed)}
        for number in set(rounds) - stay:
            (self.folder / f"{number}.safetensors").unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all, its facts as the server writes those of a model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".writing")
    os.close(handle)
    save_file(dict(arrays), name, {"consilium": json.dumps(facts, sort_keys=True)} if facts else None)
    os.replace(name, path)
