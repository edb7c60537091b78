"""The Flower ServerApp: reads the job from the run config and runs the round loop. Thin."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.heldout import load_heldout
from server.rounds import Run
from shared.config import job_from_flat

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """``run.out`` is the run folder, ``run.heldout`` the site.toml of the server's own images, if any."""
    job = job_from_flat(context.run_config)
    config = context.run_config
    heldout = load_heldout(Path(str(config["run.heldout"])), job) if config.get("run.heldout") else None
    Run(grid, job, Path(str(config.get("run.out") or "run")), heldout).run()
