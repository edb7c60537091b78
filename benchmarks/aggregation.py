"""How fast replies are averaged, against a plain copy of the same bytes in the same run, and in what memory.

    python -m benchmarks.aggregation [--replies 64] [--millions 25] [--aggregator mean] [--runs 3]

A stream of replies of so many million float32, in ten layers, is merged by one of the job's aggregators; each reply is
there when it is asked for and gone after it. Bandwidth counts a reply's bytes once, as for the copy. Memory is that of
the process above what it had before, in models of float32.
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


def models(layers: list[int], count: int) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Replies as they come: one in memory at a time; filled by a copy, whose time is taken off."""
    for number in range(count):
        yield float(100 + number), {f"layer{i}": torch.full((size,), 0.5) for i, size in enumerate(layers)}


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


def copied(layers: list[int], times: int = 10) -> float:
    """Bytes per second of copying a model's arrays by NumPy, one thread; the best of some."""
    source, target = [np.ones(size, np.float32) for size in layers], [np.zeros(size, np.float32) for size in layers]
    best = 0.0
    for _ in range(times):
        begin = time.perf_counter()
        for one, other in zip(source, target, strict=True):
            np.copyto(other, one)
        best = max(best, 4 * sum(layers) / (time.perf_counter() - begin))
    return best


def merged(name: str, job: Job, layers: list[int], count: int) -> tuple[float, float]:
    """Bytes of replies per second, and the peak in models."""
    before = {f"layer{i}": torch.zeros(size) for i, size in enumerate(layers)}
    begin = time.perf_counter()
    for _ in models(layers, count):
        pass
    made = time.perf_counter() - begin
    with Peak() as peak:
        begin = time.perf_counter()
        aggregator(name)(models(layers, count), before, job)
        spent = time.perf_counter() - begin - made
    return 4 * sum(layers) * count / spent, peak.most / (4 * sum(layers))


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
    shares, peaks = [], []
    for _ in range(args.runs):
        copy = copied(layers)
        speed, peak = merged(args.aggregator, job, layers, args.replies)
        shares.append(speed / copy)
        peaks.append(peak)
        print(f"{speed / 1e9:.2f} GB/s, copy {copy / 1e9:.2f} GB/s, share {speed / copy:.2f}, peak {peak:.2f} models")
    print(
        f"median share {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}), peak {max(peaks):.2f}"
    )


if __name__ == "__main__":
    main()
