"""Is a machine of two cores better used by two simulations with a worker each, or by one after the other with two?

python -m benchmarks.study_workers JOB DATA [ROUNDS [REPEATS]]

Both ways run the same two cells (seeds 0 and 1, to the same bits), in turn, so that what else the machine does meets
both. Prints seconds of each and the ratio of the medians: what `consilium study` goes by.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

from shared.config import Job, load_job

PRELOADED = ["simulations.simulate", "client.app", "torch._dynamo"]


def cell(job: Job, data: Path, out: Path, workers: int) -> None:
    """One simulation, as a study runs it."""
    from simulations.simulate import run

    run(job, data, out, workers=workers, pages=False, cache=out.parents[1] / "cache")


def seconds(jobs: list[Job], data: Path, out: Path, workers: int) -> float:
    """The jobs side by side with a worker each, or in turn with several."""
    context = multiprocessing.get_context("forkserver")
    started = time.monotonic()
    processes = [context.Process(target=cell, args=(job, data, out / str(job.seed), workers)) for job in jobs]
    for process in processes:
        process.start()
        if workers > 1:
            process.join()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a cell failed")
    return time.monotonic() - started


def main(job_file: str, data: str, rounds: str = "60", repeats: str = "5") -> None:
    """Print the comparison."""
    settings = [f"federation.rounds={rounds}", f"evaluation.every={max(int(rounds) // 3, 1)}"]
    jobs = [load_job(job_file, [*settings, f"seed={seed}"]) for seed in (0, 1)]
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        seconds(jobs, Path(data), root / "warm", 1)  # images are decoded, programs imported
        found: dict[int, list[float]] = {1: [], 2: []}
        for number in range(int(repeats)):
            for workers, times in found.items():
                times.append(seconds(jobs, Path(data), root / f"{number}-{workers}", workers))
    for workers, times in found.items():
        way = "side by side, 1 worker each" if workers == 1 else "one after the other, 2 workers"
        print(f"{way}: {' '.join(f'{value:.1f}' for value in times)} s")
    print(f"ratio of medians: {statistics.median(found[1]) / statistics.median(found[2]):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:5])
