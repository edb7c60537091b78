"""Our engine against a bare PyTorch loop that does the same gradient steps: whole processes, run in turn.

python -m benchmarks.engine [--runs 5]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).parents[1]
ROUNDS, STEPS, WIDTH = 20, 2, 19  # 19 channels: 0.10 million parameters


def write_sites(root: Path, sites: int, images: int = 64, size: int = 28) -> Path:
    """Sites of grey PNG images, two classes."""
    for place in range(sites):
        folder = root / f"s{place:03d}"
        (folder / "images").mkdir(parents=True)
        generator = np.random.default_rng(place)
        with (folder / "labels.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label", "patient", "split"])
            for number in range(images):
                pixels = generator.integers(0, 120, (size, size))
                pixels[:, slice(0, size // 2) if number % 2 else slice(size // 2, size)] += 20
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
                rows.writerow([f"images/{number}.png", ("right", "left")[number % 2], f"{place}-{number}", "train"])
        (folder / "site.toml").write_text(f'name = "{folder.name}"\n[data]\nformat = "csv"\n')
    return root


def measure(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, peak MB of the main process, peak MB of all its processes with shared pages counted once."""
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peaks = [0.0, 0.0]
    done = threading.Event()

    def watch() -> None:
        main = psutil.Process(process.pid)
        while not done.wait(0.1):
            try:
                family = [main, *main.children(recursive=True)]
                memory = [one.memory_full_info() for one in family]
            except psutil.Error:
                continue
            peaks[0] = max(peaks[0], memory[0].rss / 2**20)
            peaks[1] = max(peaks[1], sum(one.pss for one in memory) / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    wall = time.monotonic() - started
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"{command} ended with {code}")
    return wall, *peaks  # type: ignore[return-value]


def ours(sites: Path, out: Path, job: Path, workers: int = 2) -> list[str]:
    """The product's own command."""
    command = [sys.executable, "-m", "consilium", "simulate", job, "--data", sites, "--out", out, "--workers", workers]
    return [str(part) for part in command]


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        job = work / "bench.toml"
        job.write_text(
            'name = "bench"\n[data]\nclasses = "left,right"\nsize = 28\n[model]\nwidth = 19\n[train]\nlocal_steps = 2\n'
            "[federation]\nrounds = 20\n[evaluation]\nevery = 20\n"
        )
        eight, many = write_sites(work / "8", 8), write_sites(work / "64", 64)
        bare = [sys.executable, str(ROOT / "benchmarks" / "bare.py"), str(eight), str(ROUNDS), str(STEPS), str(WIDTH)]
        ratios, walls = [], []
        for number in range(runs):
            theirs = measure(bare)[0]
            mine = measure(ours(eight, work / f"o{number}", job))[0]
            walls.append((mine, theirs))
            ratios.append(mine / theirs)
            print(f"run {number + 1}: ours {mine:.1f} s, bare {theirs:.1f} s, ratio {mine / theirs:.2f}", flush=True)
        print(f"wall, ours / bare: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        small, large = measure(ours(eight, work / "m8", job)), measure(ours(many, work / "m64", job))
        print(f"peak of the server process: {small[1]:.0f} MB at 8 sites, {large[1]:.0f} MB at 64")
        print(f"peak of all processes:      {small[2]:.0f} MB at 8 sites, {large[2]:.0f} MB at 64")


if __name__ == "__main__":
    main()
