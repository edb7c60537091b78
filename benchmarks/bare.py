"""The bare loops that the engine is held against: plain PyTorch, FedAvg by hand, the same gradient steps.

python -m benchmarks.bare FOLDER OUT [--processes 1|2] [--rounds R]

FOLDER is what ``benchmarks.workloads.write`` wrote. One process, or two that share the weights in memory: nothing is
checked, logged, kept or able to fail. Network, loss and the order of the images are the product's, the rest is here.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn

from shared.cases import derived_seed
from shared.config import Job, load_job
from shared.tasks import load_task
from shared.training import batch_indices


@functools.cache
def images_of(path: Path) -> tuple[Tensor, Tensor]:
    """Images of a site float32 in [0, 1] (n, channels, size, size), and classes (n,) or masks (n, size, size)."""
    with np.load(path) as arrays:
        # By way of 16 bits, as the product reads them: a last bit more or less, and another pixel is the largest.
        images = torch.from_numpy((arrays["images"].astype(np.uint16) * 257).astype(np.float32)).mul_(1 / 65535)
        return images, torch.from_numpy(arrays["targets"]).long()


def loss_of(job: Job, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The product's loss for these tasks."""
    if job.task == "segmentation":
        from shared.tasks.segmentation.learning import mask_losses

        return mask_losses(model(images), targets).mean()
    return nn.functional.cross_entropy(model(images), targets)


def train_site(model: nn.Module, job: Job, path: Path, number: int) -> float:
    """One round's steps of one site; gives the last loss."""
    images, targets = images_of(path)
    rate, momentum = job.train.learning_rate, job.train.momentum
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum, nesterov=True)
    seed, loss = derived_seed(job.seed, path.stem), torch.zeros(())
    for step in range((number - 1) * job.train.local_steps, number * job.train.local_steps):
        chosen = batch_indices(len(images), job.train.batch_size, step, seed)
        batch = ((images[chosen] - 0.5) / 0.25).to(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(job, model, batch, targets[chosen])
        loss.backward()
        optimizer.step()
    return loss.item()


def built(job: Job) -> tuple[nn.Module, list[Tensor]]:
    """The network, in training, and all that is averaged of it: parameters and statistics, but no counter."""
    model: nn.Module = load_task(job.task).build_model(job).to(memory_format=torch.channels_last).train()
    return model, [value for value in model.state_dict().values() if value.is_floating_point()]


def one(job: Job, sites: list[Path]) -> nn.Module:
    """All sites one after the other."""
    model, state = built(job)
    common, total = [value.clone() for value in state], [torch.zeros_like(value) for value in state]
    for number in range(1, job.federation.rounds + 1):
        torch._foreach_zero_(total)
        for path in sites:
            torch._foreach_copy_(state, common)
            train_site(model, job, path, number)
            torch._foreach_add_(total, state, alpha=1 / len(sites))
        torch._foreach_copy_(common, total)
    torch._foreach_copy_(state, common)
    return model


@torch.inference_mode()
def final_loss(job: Job, sites: list[Path], weights: dict[str, Tensor]) -> float:
    """The mean loss of ``weights`` over all sites' images, in training mode as they were trained."""
    model, _ = built(job)
    model.load_state_dict(weights)
    losses = []
    for path in sites:
        images, targets = images_of(path)
        for start in range(0, len(images), 32):
            batch = ((images[start : start + 32] - 0.5) / 0.25).to(memory_format=torch.channels_last)
            chosen = targets[start : start + 32]
            losses.append(loss_of(job, model, batch, chosen).item() * len(chosen))
    return sum(losses) / sum(len(images_of(path)[0]) for path in sites)


def _worker(job: Job, sites: list[Path], common: list[Tensor], total: list[Tensor], asked, done) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    model, state = built(job)
    while number := asked.get():
        torch._foreach_zero_(total)
        for path in sites:
            torch._foreach_copy_(state, common)
            train_site(model, job, path, number)
            torch._foreach_add_(total, state, alpha=1 / job.federation.max_examples)
        done.put(1)


def several(job: Job, sites: list[Path], count: int) -> nn.Module:
    """Each process has its share of the sites; sums and weights lie in shared memory."""
    import torch._dynamo

    model, state = built(job)
    common = [value.clone().share_memory_() for value in state]
    totals = [[torch.zeros_like(value).share_memory_() for value in state] for _ in range(count)]
    context = mp.get_context("fork")
    asked, done = [context.SimpleQueue() for _ in range(count)], context.SimpleQueue()
    share = job.replace(federation__max_examples=len(sites))  # carries the divisor
    workers = [
        context.Process(target=_worker, args=(share, sites[k::count], common, totals[k], asked[k], done), daemon=True)
        for k in range(count)
    ]
    for worker in workers:
        worker.start()
    for number in range(1, job.federation.rounds + 1):
        for queue in asked:
            queue.put(number)
        for _ in asked:
            done.get()
        torch._foreach_copy_(common, totals[0])
        for total in totals[1:]:
            torch._foreach_add_(common, total)
    for queue in asked:
        queue.put(0)
    for worker in workers:
        worker.join()
    torch._foreach_copy_(state, common)
    return model


def main() -> None:
    """Train; write the weights to OUT and print how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    job = load_job(given.folder / "job.toml", [f"federation.rounds={given.rounds}"] if given.rounds else [])
    sites = sorted((given.folder / "arrays").glob("*.npz"))
    started = time.monotonic()
    model = one(job, sites) if given.processes == 1 else several(job, sites, given.processes)
    print(f"{time.monotonic() - started:.2f} s")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, given.out)


if __name__ == "__main__":
    main()
