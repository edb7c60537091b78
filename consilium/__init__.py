"""Consilium: federated learning for medical imaging. The command is a thin layer over these functions.

from consilium import Job, load_job, run
result = run("simulations/jobs/chest.toml", data="demo/cohort", baselines=True)
result.table()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shared import __version__

if TYPE_CHECKING:
    from consilium.notebook import run
    from shared.config import Job, load_job
    from simulations.result import Result

_HOMES = {
    "run": "consilium.notebook",
    "Result": "simulations.result",
    "Job": "shared.config",
    "load_job": "shared.config",
}
__all__ = ["Job", "Result", "__version__", "load_job", "run"]


def __getattr__(name: str) -> Any:  # so that `consilium --help` does not import torch
    if name not in _HOMES:
        raise AttributeError(f"module 'consilium' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
