"""Names of federated algorithms: each is a point in the space of a job's four axes.

    federation.aggregator         how replies become one model: mean, median, Krum, …
    federation.server_optimizer   what steps on the averaged change: none, momentum, Adam, …
    federation.correction         what the local loss or gradient gets: none, proximal, SCAFFOLD, …
    federation.local              what stays at the site: nothing, normalisation layers, the head

A strategy sets every setting that the job leaves at its default; what the job sets itself wins. So a resolved job reads
back as itself. To add a name: one line in ``STRATEGIES``.

An aggregator is one line in ``AGGREGATORS`` and one function of that name, see ``server.aggregation``; a codec is one
in ``CODEC_NAMES`` and one in ``shared.codecs``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import UserError

if TYPE_CHECKING:
    from shared.settings_federation import Federation

Value = str | int | float | bool


def _trimmed(bad: int, share: float) -> int:
    """The fewest replies of which ``share`` is ``bad`` whole ones."""
    return next(n for n in itertools.count(1) if int(share * n) >= bad)


@dataclass(frozen=True)
class Aggregator:
    """What a job may count on: ``help`` in a few words; ``summed`` if sums of replies are enough, as under masks;
    ``least`` replies that are needed where ``federation.byzantine`` sites may send anything, and ``federation.trim`` of
    them are cut off. ``function`` is the aggregator itself, if ``server`` has none of this name.
    """

    help: str
    summed: bool = False
    least: Callable[[int, float], int] = lambda bad, trim: 2 * bad + 1
    function: Callable[..., dict[str, Any]] | None = None


AGGREGATORS: dict[str, Aggregator] = {
    "mean": Aggregator("weighted mean; one bad site can move it anywhere", True, lambda bad, trim: 1),
    "clipped_mean": Aggregator("weighted mean of changes cut to federation.clip_norm, 0: to their median norm"),
    "median": Aggregator("the median of every single number"),
    "trimmed_mean": Aggregator("mean of every number without the share federation.trim at either end", least=_trimmed),
    "geometric_median": Aggregator("the point whose distances to all replies have the least weighted sum"),
    "krum": Aggregator("the one reply that lies closest to the others", least=lambda bad, trim: 2 * bad + 3),
    "multikrum": Aggregator(
        "weighted mean of the federation.selected replies closest to the others", least=lambda bad, trim: 2 * bad + 3
    ),
    "bulyan": Aggregator(
        "of the replies closest to each other, mean of the numbers near their median",
        least=lambda bad, trim: 4 * bad + 3,
    ),
}

# By name: the server's learning rate where the job's is 0, and what the optimiser does.
SERVER_OPTIMIZERS: dict[str, tuple[float, str]] = {
    "none": (1.0, "the aggregate is the new model"),
    "momentum": (0.1, "gradient descent with momentum; at 0.1 and momentum 0.9 as far in the long run as without"),
    "adam": (0.001, "Adam"),
    "yogi": (0.001, "Yogi: Adam whose second moment grows slower"),
    "adagrad": (0.01, "Adagrad: steps shrink with all changes so far"),
}

CORRECTIONS: dict[str, str] = {
    "none": "sites follow their own gradients",
    "proximal": "a pull to the common model (FedProx)",
    "scaffold": "control variates say how each site drifts, which is taken off",
    "fednova": "changes are counted per step, where sites take different numbers of them",
    "feddyn": "each site's loss is bent so that all have one optimum",
    "adversarial": "features learn to leave a discriminator no clue which site they are of (DANN)",
}

LOCAL: dict[str, str] = {
    "nothing": "one model for all",
    "norm": "normalisation layers stay at the site (FedBN)",
    "head": "the head stays at the site (FedPer)",
    "ditto": "each site trains a model of its own beside the common one",
}

STRATEGIES: dict[str, dict[str, Value]] = {
    "fedavg": {},
    "fedavgm": {"federation.server_optimizer": "momentum"},
    # Reddi et al. 2021. Sites that keep an Adam of their own beside the server's swing; by how much: docs/results.md.
    "fedadam": {"federation.server_optimizer": "adam", "train.keep_optimizer": False},
    "fedyogi": {"federation.server_optimizer": "yogi", "train.keep_optimizer": False},
    "fedadagrad": {"federation.server_optimizer": "adagrad", "train.keep_optimizer": False},
    "fedmedian": {"federation.aggregator": "median"},
    "fedtrimmedavg": {"federation.aggregator": "trimmed_mean"},
    "normclip": {"federation.aggregator": "clipped_mean"},
    "rfa": {"federation.aggregator": "geometric_median"},
    "krum": {"federation.aggregator": "krum"},
    "multikrum": {"federation.aggregator": "multikrum"},
    "bulyan": {"federation.aggregator": "bulyan"},
    "qffl": {"federation.weighting": "loss"},
    "cyclic": {"federation.order": "cyclic"},
    "fedbuff": {"federation.order": "buffered"},  # Nguyen et al. 2022
    "fedprox": {"federation.correction": "proximal"},  # Li et al. 2020
    "scaffold": {"federation.correction": "scaffold"},  # Karimireddy et al. 2020
    "fednova": {"federation.correction": "fednova"},  # Wang et al. 2020
    "feddyn": {"federation.correction": "feddyn"},  # Acar et al. 2021
    "dann": {"federation.correction": "adversarial"},  # Ganin et al. 2016
    "fedbn": {"federation.local": "norm"},  # Li et al. 2021
    "fedper": {"federation.local": "head"},  # Arivazhagan et al. 2019
    "ditto": {"federation.local": "ditto"},  # Li et al. 2021
}

#: What travels of a model's change, by the name of the codec; ``shared.codecs`` does it.
CODEC_NAMES: dict[str, str] = {
    "none": "the whole model, as it is",
    "bf16": "each number in 16 bits",
    "int8": "each number in 8 bits, a scale for each channel",
    "int2": "a bit for the sign, a bit for large or small, a scale for each channel",
    "sign": "a bit for each number, a scale for each channel",
    "topk": "the largest numbers, whole, with their places",
    "topk-int8": "the largest numbers in 8 bits, with their places",
}


def resolve(name: str, flat: Mapping[str, Value], defaults: Mapping[str, Value]) -> dict[str, Value]:
    """``flat`` with the settings of strategy ``name`` where it still holds the default."""
    chosen = dict(flat)
    for key, value in STRATEGIES[name].items():
        if chosen.get(key, defaults[key]) == defaults[key]:
            chosen[key] = value
    return chosen


def set_over(job: Mapping[str, Any], over: Mapping[str, Any], known: Mapping[str, Field[Any]]) -> dict[str, Any]:
    """A job's settings with what is set over them; ``known`` are all settings, with their defaults. A strategy that is
    set over another takes the place of what that one stands for.

    Raises:
        UserError: a setting is set over the job to its default, which the strategy would change unseen.
    """
    key = "federation.strategy"
    before = str(job.get(key, ""))
    name = str(over.get(key, before))
    theirs = STRATEGIES.get(before, {}) if name != before else {}
    for setting, value in STRATEGIES.get(name, {}).items():
        if setting in over and over[setting] == known[setting].default != value:
            raise UserError(
                f"{setting} = {json.dumps(over[setting])}: {name} stands for {json.dumps(value)}; "
                "set another strategy, or leave this out"
            )
    return {setting: value for setting, value in job.items() if theirs.get(setting, ...) != value} | dict(over)


def in_words(federation: Federation) -> str:
    """How a job's sites make one model, as a sentence begins."""
    if federation.order == "cyclic":
        how = "Training from site to site in turn"
    elif federation.order == "buffered" and federation.aggregator == "mean":
        how = "Buffered asynchronous federated averaging"
    elif federation.aggregator == "mean":
        how = "Federated averaging"
    else:
        how = f"Federated training, merged by {federation.aggregator},"
    optimizer = federation.server_optimizer
    return how if optimizer == "none" else f"{how} with {optimizer} at the server"
