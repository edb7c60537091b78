"""FedAvg, FedProx and FedAdam in plain Flower beside ours: the same network, images, loss and gradient steps.

python -m benchmarks.plain_flower simulations/jobs/pneumonia.toml DATA [--seeds 0 1 2] [--rounds N]

Plain is what its quickstart shows: Flower's own strategy on the server, and a ClientApp that puts the weights it was
sent into a network, trains it with a new optimiser and sends it back. It is run twice, with the job's short rounds and
with rounds of ten steps, a tenth of them; both take as many gradient steps as ours. Batches, augmentation, loss,
optimiser and peak learning rate are the job's; the learning rate is constant, as there. The round is picked by
validation on both sides. Messages go through this project's engine, which is faster than Flower's own; nothing else of
ours is in plain's way. Prints test figures by seed, and the difference, paired by seed, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx

from consilium.study.compare import paired
from server.wording import metric_name, number
from shared.cases import derived_seed
from shared.config import Job, job_from_flat, load_job
from shared.imaging.dataset import Dataset, concatenate, load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.strategies import STRATEGIES
from shared.tasks import TASKS, load_task
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.simulate import run
from simulations.sites import find_sites

LONG = 10  # gradient steps of a long round
app = ClientApp()


# ---------------------------------------------------------------------- the client, as in the quickstart


@lru_cache(maxsize=16)
def images(site_file: str, job: Job) -> Dataset:
    """All images of a site."""
    site = read_site(Path(site_file))
    return load_dataset(read_samples(site, job), site, job)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A few gradient steps from the weights in the message, by a new optimiser."""
    job = job_from_flat(context.run_config)
    task, cpu, config = load_task(job.task), torch.device("cpu"), message.content["config"]
    data = images(str(context.node_config["site"]), job).subset("train")
    weights = [float(weight) for weight in config["class-weights"]]  # type: ignore[union-attr]
    number, anchor_mu = int(config["server-round"]), float(config.get("proximal-mu", 0.0))  # type: ignore[arg-type]
    model = task.build_model(job)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    sent = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), job.train.learning_rate, weight_decay=job.train.weight_decay)
    torch.manual_seed(derived_seed(job.seed, "plain", context.node_id, number))
    model.train()
    for _ in range(job.train.local_steps):
        chosen = torch.randperm(len(data))[: job.train.batch_size].tolist()
        optimizer.zero_grad(set_to_none=True)
        loss = task.step(model, task.batch(data, chosen, job, cpu, train=True), job, weights)
        if anchor_mu:
            pairs = zip(model.parameters(), sent, strict=True)
            loss = loss + anchor_mu / 2 * torch.stack([(now - old).square().sum() for now, old in pairs]).sum()
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(data), "loss": loss.item()})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


# ---------------------------------------------------------------------- the server


def strategies() -> dict[str, Callable[[], FedAvg]]:
    """Flower's own, with its own defaults."""
    common: dict[str, Any] = {"fraction_evaluate": 0.0}
    return {
        "fedavg": lambda: FedAvg(**common),
        "fedprox": lambda: FedProx(**common, proximal_mu=0.1),
        "fedadam": lambda: FedAdam(**common),
    }


def plain(name: str, job: Job, files: list[Path], folder: Path) -> float:
    """The test figure of a strategy in plain Flower, of the round with the best validation figure."""
    task, cpu = load_task(job.task), torch.device("cpu")
    whole = concatenate([images(str(file), job) for file in files])
    val, test = whole.subset("val"), whole.subset("test")
    counts = task.count_classes(whole.subset("train"), job)
    model, sign = task.build_model(job), TASKS[job.task].metrics[job.best_metric]
    start = ArrayRecord(model.state_dict())
    best: tuple[float, dict[str, torch.Tensor]] = (-math.inf, {})

    def judge(number_: int, arrays: ArrayRecord) -> MetricRecord:
        nonlocal best
        if number_ % job.evaluation.every == 0 or number_ == job.federation.rounds:
            model.load_state_dict(arrays.to_torch_state_dict())
            value = sign * task.summarise(task.collect(model, val, job, cpu), job)[job.best_metric].value
            if number_ and value > best[0]:
                best = value, {key: held.clone() for key, held in model.state_dict().items()}
        return MetricRecord({})

    nodes = [{"site": str(file.resolve())} for file in files]
    with WorkerPool("benchmarks.plain_flower:app", 1) as pool:
        strategies()[name]().start(
            LocalGrid(pool, nodes, job.flat()),
            start,
            num_rounds=job.federation.rounds,
            train_config=ConfigRecord({"class-weights": [float(w) for w in task.class_weights(counts, job)]}),
            evaluate_fn=judge,
        )
    model.load_state_dict(best[1])
    return float(task.summarise(task.collect(model, test, job, cpu), job)[job.best_metric].value)


def compare(name: str, base: Job, data: Path, seeds: list[int], folder: Path) -> None:
    """Print a strategy's lines."""
    metric, sign = base.best_metric, TASKS[base.task].metrics[base.best_metric]
    rounds = base.federation.rounds
    short = base.replace(evaluation__every=max(rounds // 20, 1))
    times = min(LONG, rounds)
    long = short.replace(
        federation__rounds=rounds // times,
        train__local_steps=times * base.train.local_steps,
        evaluation__every=max(short.evaluation.every // times, 1),
    )
    found: dict[str, dict[int, float]] = {"ours": {}, "plain, short rounds": {}, "plain, long rounds": {}}
    for seed in seeds:
        job = short.replace(federation__strategy=name, seed=seed)
        out = folder / f"{name}-{seed}"
        found["ours"][seed] = float(run(job, data, out / "ours", workers=1, pages=False).scores["federated"][metric])
        for title, other in (("plain, short rounds", short), ("plain, long rounds", long)):
            files = find_sites(data, other, out / title)
            found[title][seed] = plain(name, other.replace(seed=seed), files, out / title)
    for title, values in found.items():
        line = f"{name:<10}{title:<22}{' / '.join(number(value, metric) for value in values.values()):<30}"
        if title != "ours":
            gap = paired(found["ours"], values, sign)
            line += f"ours better by {gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
        print(line, flush=True)


def main() -> None:
    """Print the table."""
    words = argparse.ArgumentParser(description="FedAvg, FedProx and FedAdam in plain Flower beside ours.")
    words.add_argument("job", type=Path)
    words.add_argument("data", type=Path)
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--rounds", type=int, default=0, help="instead of the job's")
    words.add_argument("--strategies", nargs="+", default=list(strategies()), choices=list(strategies()))
    asked = words.parse_args()
    job = load_job(asked.job, [f"federation.rounds={asked.rounds}"] if asked.rounds else [])
    steps = job.federation.rounds * job.train.local_steps
    print(
        f"{metric_name(job.best_metric)} on the test images, {steps} gradient steps at each site, seeds {asked.seeds}"
    )
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # it tells of every round
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.strategies:
            if name in STRATEGIES:
                compare(name, job, asked.data, asked.seeds, Path(folder))
            else:
                print(f"{name}: ours has no strategy of this name yet")


if __name__ == "__main__":
    main()
