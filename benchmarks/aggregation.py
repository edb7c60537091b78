"""How fast replies are averaged, against a plain copy of the same bytes in the same run, and in what memory.

    python -m benchmarks.aggregation [--replies 64] [--millions 25] [--aggregator mean] [--runs 3]

A stream of replies of so many million float32, in ten layers, is merged by one of the job's aggregators, and as many
bytes are copied (NumPy, one thread) in between. Bandwidth counts a reply's bytes once, as for the copy. Memory is that
of the process above what it had before, in models of float32, with replies that come and go.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import torch
from torch import Tensor

from server.algorithm import aggregator
from shared.config import Job, job_from_flat
from shared.strategies import AGGREGATORS

LAYERS = 10


class Replies:
    """A stream of replies, and before each a copy of as many bytes: so both meet the same load of the machine.

    ``fresh`` makes each reply anew, as it comes from the network, instead of giving the same one again.
    """

    def __init__(self, layers: list[int], count: int, fresh: bool = False) -> None:
        self.layers, self.count, self.fresh = layers, count, fresh
        self.copied: list[float] = []  # seconds

    def __iter__(self) -> Iterator[tuple[float, dict[str, Tensor]]]:
        made = {f"layer{i}": torch.full((size,), 0.5) for i, size in enumerate(self.layers)}
        target = {} if self.fresh else {name: torch.zeros_like(array) for name, array in made.items()}
        for number in range(self.count):
            for name, array in target.items():
                begin = time.perf_counter()
                np.copyto(array.numpy(), made[name].numpy())
                self.copied.append(time.perf_counter() - begin)
            yield float(100 + number), made
            if self.fresh:
                made = {}  # it is gone before the next one comes
                made = {f"layer{i}": torch.full((size,), 0.5) for i, size in enumerate(self.layers)}


class Peak:
    """The most resident memory of this process while it runs, in bytes above the beginning."""

    def __enter__(self) -> Peak:
        self.process, self.done, self.most = psutil.Process(), threading.Event(), 0
        self.begin = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, self.process.memory_info().rss - self.begin)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def measured(name: str, job: Job, layers: list[int], count: int) -> tuple[float, float, float]:
    """Seconds of copying the replies and of merging them, and the peak in models."""
    before = {f"layer{i}": torch.zeros(size) for i, size in enumerate(layers)}
    replies = Replies(layers, count)
    begin = time.perf_counter()
    aggregator(name)(replies, before, job)
    merging = time.perf_counter() - begin - sum(replies.copied)
    with Peak() as peak:
        aggregator(name)(Replies(layers, min(count, 8), fresh=True), before, job)
    return sum(replies.copied), merging, peak.most / (4 * sum(layers))


def main() -> None:
    """Print a line a run, and the medians."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--replies", type=int, default=64)
    asked.add_argument("--millions", type=float, default=25.0)
    asked.add_argument("--aggregator", choices=tuple(AGGREGATORS), default="mean")
    asked.add_argument("--runs", type=int, default=3)
    args = asked.parse_args()
    job = job_from_flat({"federation.aggregator": args.aggregator})
    layers = [int(args.millions * 1e6) // LAYERS] * LAYERS
    size = 4 * sum(layers) * args.replies / 1e9
    shares, peaks = [], []
    for _ in range(args.runs):
        copying, merging, peak = measured(args.aggregator, job, layers, args.replies)
        shares.append(copying / merging)
        peaks.append(peak)
        speeds = f"{size / merging:.2f} GB/s, copy {size / copying:.2f} GB/s"
        print(f"{speeds}, share {shares[-1]:.2f}, peak {peak:.2f} models")
    print(
        f"median share {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}), peak {max(peaks):.2f}"
    )


if __name__ == "__main__":
    main()
