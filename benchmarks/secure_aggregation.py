"""A round under secure aggregation against a plain one: seconds and bytes, without the training, which is the same.

python -m benchmarks.secure_aggregation [--sites 8] [--runs 5]

The real round loop and the real site parts in two worker processes; a site "trains" by adding a little to each number.
The model is ResNet-18, 11.2 million numbers, with BatchNorm and its counters. Both rounds bound the change by one norm.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto

from benchmarks.workloads import write_sites
from client import app as site
from client import secure
from client.workspace import Workspace
from server.rounds import Run
from shared.config import Job, job_from_flat
from shared.weights import exchanged
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool

app = ClientApp()


def untrained(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    """What a site sends, without the gradient steps."""
    arrays = message.content.array_records["arrays"].to_torch_state_dict()
    moved = {name: array + 1e-4 if array.is_floating_point() else array + 1 for name, array in arrays.items()}
    metrics = {"num-examples": len(workspace.data.subset("train")), "steps": 1, "images": 8, "loss": 4.0}
    return RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord(metrics)})  # type: ignore[arg-type]


app.query()(site.query)
app.evaluate()(site.evaluate)
app.train()(lambda message, context: site._answer(message, context, untrained))
app.train("keys")(lambda message, context: site._answer(message, context, secure.keys))
app.train("shares")(lambda message, context: site._answer(message, context, secure.shares))
app.train("masked")(lambda message, context: site._answer(message, context, secure.masked(untrained)))
app.train("unmask")(lambda message, context: site._answer(message, context, secure.unmask))


class CountingGrid(LocalGrid):
    """Counts the bytes of all messages as Flower puts them on the wire, while ``counting``."""

    counting, count = False, 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        messages = list(messages)
        for message in messages:
            self._add(message)
        for reply in super().send_and_receive(messages, timeout=timeout):
            self._add(reply)
            yield reply

    def _add(self, message: Message) -> None:
        if self.counting:
            self.count += recorddict_to_proto(message.content).ByteSize()


def main() -> None:
    """Print seconds, bytes and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    job = job_from_flat(
        {"data.classes": "left,right", "data.size": 32, "data.format": "csv", "model.name": "resnet18"}
        | {"federation.max_update_norm": 1000.0, "train.class_weights": "none", "federation.rounds": 1000}
    )
    jobs = {"plain": job, "secure": job.replace(privacy__secure_aggregation=True)}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name, WorkerPool(app, options.workers) as pool:
        work = Path(name)
        files = sorted(write_sites(work / "sites", options.sites, 16).glob("*/site.toml"))
        nodes = [{"site": str(f), "home": str(work / "homes" / f.parent.name), "name": f.parent.name} for f in files]
        runs, grids = {}, {}
        for kind, its in jobs.items():
            grids[kind] = CountingGrid(pool, nodes, its.flat())
            runs[kind] = Run(grids[kind], its, work / kind)
            runs[kind].survey()
        arrays = exchanged(runs["plain"].model, job)
        print(f"{sum(array.numel() for array in arrays.values()) / 1e6:.1f} million numbers, {options.sites} sites")
        for number in range(1, options.runs + 2):
            for kind, run in runs.items():
                grids[kind].counting, grids[kind].count = number == 1, 0  # the first round is not timed
                started = time.perf_counter()
                run.train_round(arrays, number, [1.0, 1.0])
                if number == 1:
                    sizes[kind] = grids[kind].count
                else:
                    seconds[kind].append(time.perf_counter() - started)
    for kind in jobs:
        took = seconds[kind]
        print(f"{kind}: {statistics.median(took):.2f} s ({min(took):.2f} to {max(took):.2f}), {sizes[kind]:,} bytes")
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["secure"], strict=True)]
    print(f"secure / plain: time {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", end=", ")
    print(f"bytes {sizes['secure'] / sizes['plain']:.4f}")


if __name__ == "__main__":
    main()
