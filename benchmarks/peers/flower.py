"""Plain Flower on a benchmark's workload: its own FedAvg and its own simulation engine (Ray), two actors.

python -m benchmarks.peers.flower FOLDER OUT

As in Flower's PyTorch quickstart, but for the training itself, which is the bare loop's.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import save_file
from torch import nn

from benchmarks.bare import built, train_site
from shared.config import Job, load_job

client_app, server_app = ClientApp(), ServerApp()


@functools.cache
def _opened() -> tuple[Job, list[Path], nn.Module]:
    torch.set_num_threads(1)
    folder = Path(os.environ["BENCH_FOLDER"])
    job = load_job(folder / "job.toml")
    return job, sorted((folder / "arrays").glob("*.npz")), built(job)[0]


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A round's steps at one site."""
    job, sites, model = _opened()
    config, number = message.content["config"], int(context.node_config["partition-id"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train_site(model, job, sites[number], int(config["server-round"]))
    metrics = MetricRecord({"loss": loss, "num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg over all sites."""
    job, sites, model = _opened()
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(sites), min_available_nodes=len(sites))
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=job.federation.rounds)
    if len(result.train_metrics_clientapp) < job.federation.rounds:
        raise SystemExit("rounds without a reply: Flower goes on without a word")
    weights = result.arrays.to_torch_state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, os.environ["BENCH_OUT"])


def play() -> None:
    """The workload in the folder of the first argument, the weights to the second."""
    os.environ["BENCH_FOLDER"], os.environ["BENCH_OUT"] = sys.argv[1:]
    count = len(list((Path(sys.argv[1]) / "arrays").glob("*.npz")))
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server_app, client_app, count, backend_config=resources)


if __name__ == "__main__":
    # Actors find what they are to run by the name of its module, and know no __main__ of ours.
    importlib.import_module("benchmarks.peers.flower").play()
