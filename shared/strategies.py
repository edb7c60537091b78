"""Names of federated algorithms: each is a point in the space of a job's four axes.

    federation.aggregator         how replies become one model: mean, median, Krum, …
    federation.server_optimizer   what steps on the averaged change: none, momentum, Adam, …
    federation.correction         what the local loss or gradient gets: none, proximal, SCAFFOLD, …
    federation.local              what stays at the site: nothing, normalisation layers, the head

A strategy sets every setting that the job leaves at its default; what the job sets itself wins. So a resolved job reads
back as itself. To add a name: one line in ``STRATEGIES``.
"""

from __future__ import annotations

from collections.abc import Mapping

Value = str | int | float | bool

STRATEGIES: dict[str, dict[str, Value]] = {
    "fedavg": {},
    "fedprox": {"federation.correction": "proximal"},  # Li et al. 2020
    "scaffold": {"federation.correction": "scaffold"},  # Karimireddy et al. 2020
    "fednova": {"federation.correction": "fednova"},  # Wang et al. 2020
    "feddyn": {"federation.correction": "feddyn"},  # Acar et al. 2021
    "fedbn": {"federation.local": "norm"},  # Li et al. 2021
    "fedper": {"federation.local": "head"},  # Arivazhagan et al. 2019
    "ditto": {"federation.local": "ditto"},  # Li et al. 2021
}


def resolve(name: str, flat: Mapping[str, Value], defaults: Mapping[str, Value]) -> dict[str, Value]:
    """``flat`` with the settings of strategy ``name`` where it still holds the default."""
    chosen = dict(flat)
    for key, value in STRATEGIES[name].items():
        if chosen.get(key, defaults[key]) == defaults[key]:
            chosen[key] = value
    return chosen
