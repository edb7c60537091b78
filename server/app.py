"""The Flower ServerApp: reads the job from the run config and runs the round loop. Thin."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import load_file

from server.heldout import load_heldout
from server.rounds import Run
from shared.config import job_from_flat

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the job of the run config.

    ``run.out`` is the run folder; ``run.heldout`` the site.toml of the server's own images, if any; ``run.reference``
    the weights of the network that the job's task measures by, where they are there already. ``run.resume`` goes on
    after the last whole round in the run folder; ``run.expected`` is how many sites to wait for at first; ``run.store``
    is the database, where it is not the file beside the run folders.
    """
    job = job_from_flat(context.run_config)
    config = context.run_config
    heldout = load_heldout(Path(str(config["run.heldout"])), job) if config.get("run.heldout") else None
    reference = load_file(str(config["run.reference"])) if config.get("run.reference") else None
    folder, resume = Path(str(config.get("run.out") or "run")), bool(config.get("run.resume"))
    expected = int(config.get("run.expected") or 0)
    store = str(config.get("run.store") or "")
    Run(grid, job, folder, heldout, reference=reference, resume=resume, expected=expected, store=store).run()
