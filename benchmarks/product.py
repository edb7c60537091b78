"""The product on a benchmark's workload: its own ServerApp and ClientApp on the local engine, without the report.

python -m benchmarks.product FOLDER OUT [--workers 2] [--rounds R]

All else of a run is there: survey, gate, admission, checkpoints, journal and store.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from flwr.app import Context, RecordDict

from server.app import app as server_app
from shared.config import load_job
from simulations.engine import RUN_ID, LocalGrid
from simulations.pool import WorkerPool
from simulations.sites import node_of


def main() -> None:
    """Train; the run folder is OUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    job = load_job(given.folder / "job.toml", [f"federation.rounds={given.rounds}"] if given.rounds else [])
    given.out.mkdir(parents=True)
    started = time.monotonic()
    with WorkerPool("client.app:app", given.workers) as pool:
        files = sorted((given.folder / "sites").glob("*/site.toml"))
        config = job.flat() | {"run.out": str(given.out.resolve())}
        grid = LocalGrid(pool, [node_of(given.out / "homes", file) for file in files], config)
        context = Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config))
        server_app(grid, context)
    print(f"{time.monotonic() - started:.2f} s")


if __name__ == "__main__":
    main()
