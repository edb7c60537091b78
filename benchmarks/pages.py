"""The dashboard over the store with 500 runs of 100 rounds at 50 sites: how long each page waits for its answers.

    python -m benchmarks.store --keep FOLDER; python -m benchmarks.pages FOLDER/consilium.sqlite

`consilium dashboard` as it is typed, asked over HTTP by this process for what each page asks, side by side where it
does so; pages of a run for 15 runs here and there. Drawing is the browser's and not in it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

LIMIT = 0.3  # seconds that a page may wait
OF_RUN = ("warnings", "course", "sites", "test", "privacy", "rounds", "subgroups", "cross-site")


@contextmanager
def served(store: Path) -> Iterator[tuple[httpx.Client, int]]:
    """The dashboard, signed in, and its process id."""
    command = [sys.executable, "-m", "consilium", "dashboard", "--store", str(store), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"(http://[^/]+)/\?token=(\S+)", process.stdout.readline())
    assert found is not None
    try:
        with httpx.Client(
            base_url=found[1], headers={"Authorization": f"Bearer {found[2]}"}, timeout=60, trust_env=False
        ) as client:
            yield client, process.pid
    finally:
        process.terminate()
        process.wait()


def peak(pid: int) -> float:
    """MiB that a process had in memory at most."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def row(page: str, seconds: Sequence[float]) -> float:
    """Print a line of the table; gives the median."""
    median = statistics.median(seconds)
    print(f"| {page} | {1000 * median:.0f} | {1000 * max(seconds):.0f} |", flush=True)
    return median


def measure(client: httpx.Client, threads: ThreadPoolExecutor) -> float:
    """Print the table; gives the slowest median in seconds."""

    def ask(*paths: str) -> None:
        for answer in threads.map(client.get, paths):
            answer.raise_for_status()

    def timed(*steps: Sequence[str]) -> float:
        begun = time.perf_counter()
        for paths in steps:
            ask(*paths)
        return time.perf_counter() - begun

    worst = [row("federation, the first time after a start", [timed(["/api/federation"])])]
    worst.append(row("federation", [timed(["/api/federation"]) for _ in range(5)]))
    for words, query in {"newest": "", "best first": "?sort=-test_value", "searched": "?search=job 4"}.items():
        worst.append(row(f"runs, {words}", [timed([f"/api/runs{query}"]) for _ in range(5)]))
    runs = client.get("/api/runs?limit=200").json()["runs"]
    some = [f"/api/runs/{run['id']}" for run in random.Random(0).sample(runs, 15)]
    pages: dict[str, Callable[[str], float]] = {
        "run": lambda api: timed([api], [f"{api}/{part}" for part in OF_RUN]),
        "run, its grid of sites and rounds": lambda api: timed([f"{api}/grid"]),
        "run, its model": lambda api: timed([api], [api, f"{api}/model", f"{api}/previous"]),
        "two runs compared": lambda api: timed([api, some[0]], [f"{api}/course", f"{some[0]}/course"]),
    }
    worst += [row(page, [of(api) for api in some]) for page, of in pages.items()]
    return max(worst)


def main() -> None:
    """Serve, ask, and say whether every page answers in time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("store", type=Path)
    given = parser.parse_args()
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| page | median, ms | slowest, ms |\n|---|---|---|")
    with served(given.store) as (client, pid), ThreadPoolExecutor(8) as threads:
        before = peak(pid)
        worst = measure(client, threads)
        print(f"peak memory of the server: {peak(pid):.0f} MiB; before the first question: {before:.0f}")
    print(f"slowest median: {1000 * worst:.0f} ms; allowed {1000 * LIMIT:.0f} ms")
    raise SystemExit(worst > LIMIT)


if __name__ == "__main__":
    main()
