"""Our engine against bare PyTorch loops that do the same gradient steps: whole processes, run in turn.

python -m benchmarks.engine [--runs 5] [--workloads w1,w2,w3,w4] [--peers] [--scale] [--write]

a1 is the bare loop in one process, ap in two that share memory; ours has two workers. ``--write`` puts the tables into
benchmarks/RESULTS.md. ``--peers`` also runs the frameworks of benchmarks/peers that are installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

from benchmarks.bare import final_loss
from benchmarks.workloads import W4, WORKLOADS, Workload, write
from shared.config import load_job

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- engine: written by benchmarks/engine.py -->", "<!-- /engine -->"
# The most that ours / ap may be in wall, and ours / a1 in CPU seconds.
# How many times as long plain Flower must take at least.
TIMES_FLOWER = {"w1": 3.3, "w3": 2.2, "w4": 4.0}
PEERS = ("flower",)
TARGETS = {"w1": (1.25, 1.25), "w2": (1.05, 1.0), "w3": (1.20, 1.30), "w4": (1.15, 1.20)}


class Cost(NamedTuple):
    """What a whole process cost with all its children."""

    wall: float
    cpu: float
    main_mb: (
        float  # largest memory of the process itself, without pages of files: libraries come and go with the system
    )
    all_mb: float  # largest of all together, shared pages counted once


def measure(command: list[str]) -> Cost:
    """Run a command to its end.

    Raises:
        SystemExit: it failed; with its last words.
    """
    env = dict(os.environ, OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", FLWR_TELEMETRY_ENABLED="0")
    before, started = os.times(), time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks, done = [0.0, 0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, done))
    watcher.start()
    assert process.stderr is not None
    words = process.stderr.read()
    code = process.wait()
    wall, after = time.monotonic() - started, os.times()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"{command} ended with {code}: {words[-2000:].decode(errors='replace')}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(wall, cpu, *peaks)


def _watch(pid: int, peaks: list[float], done: threading.Event) -> None:
    main = psutil.Process(pid)
    while not done.wait(0.25):
        try:
            memory = [one.memory_full_info() for one in [main, *main.children(recursive=True)]]
        except psutil.Error:
            continue
        peaks[0] = max(peaks[0], (memory[0].rss - getattr(memory[0], "shared", 0)) / 2**20)
        peaks[1] = max(peaks[1], sum(one.pss for one in memory) / 2**20)


def command(system: str, folder: Path, out: Path) -> list[str]:
    """How a system is run on a workload."""
    modules = {"a1": "bare", "ap": "bare", "ours": "product", "flower": "peers.flower"}
    more = {"a1": ["--processes", "1"], "ap": ["--processes", "2"], "ours": ["--workers", "2"], "flower": []}
    return [sys.executable, "-m", f"benchmarks.{modules[system]}", str(folder), str(out), *more[system]]


def final_losses(workload: Workload, systems: list[str], work: Path) -> str:
    """The loss over all images that each system ends with: whether they did the same work.

    Sums of another order part in their last bits, and training carries that on: parameters need not agree, losses must.
    """
    torch.set_num_threads(1)
    job = load_job(work / workload.name / "job.toml")
    sites = sorted((work / workload.name / "arrays").glob("*.npz"))
    found = {}
    for system in systems:
        out = work / f"{workload.name}-{system}-out"
        found[system] = final_loss(job, sites, load_file(out / "last.safetensors" if out.is_dir() else out))
    return ", ".join(f"{system} {loss:.6f}" for system, loss in found.items())


def compare(workload: Workload, systems: list[str], runs: int, work: Path) -> dict[str, list[Cost]]:
    """Each system's costs, run by run in turn, the order reversed every second time."""
    folder = write(workload, work / workload.name)
    costs: dict[str, list[Cost]] = {system: [] for system in systems}
    for number in range(runs):
        for system in systems[:: -1 if number % 2 else 1]:
            out = work / f"{workload.name}-{system}-out"
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True) if out.is_file() else None
            try:
                costs[system].append(cost := measure(command(system, folder, out)))
            except SystemExit as failure:
                if system not in PEERS:
                    raise
                print(f"{workload.name} run {number + 1}: {failure}", flush=True)
                continue
            print(f"{workload.name} run {number + 1} {system}: {cost.wall:.1f} s, {cost.cpu:.1f} CPU s", flush=True)
    return {system: runs_ for system, runs_ in costs.items() if len(runs_) == runs}


def ratio(above: list[float], below: list[float]) -> str:
    """Median and range of the ratios of runs that stood side by side."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def table(results: dict[str, dict[str, list[Cost]]]) -> list[str]:
    """The comparison as Markdown."""
    lines = [
        "| workload | system | wall, s | CPU, s | all memory, MB | wall / ap | CPU / a1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, costs in results.items():
        for system, runs in costs.items():
            wall, cpu, memory = (
                statistics.median(getattr(run, key) for run in runs) for key in ("wall", "cpu", "all_mb")
            )
            by_wall = ratio([run.wall for run in runs], [run.wall for run in costs["ap"]])
            by_cpu = ratio([run.cpu for run in runs], [run.cpu for run in costs["a1"]])
            known = system not in PEERS  # Ray's processes are nobody's children when they end, and are not counted
            told, by_cpu = (f"{cpu:.1f}", by_cpu) if known else ("–", "–")
            lines.append(f"| {name} | {system} | {wall:.1f} | {told} | {memory:.0f} | {by_wall} | {by_cpu} |")
        lines.append(f"| {name} | asked for | | | | {TARGETS[name][0]} | {TARGETS[name][1]} |")
    return [*lines, *beside_flower(results)]


def beside_flower(results: dict[str, dict[str, list[Cost]]]) -> list[str]:
    """How many times as long plain Flower took in wall, where every run of it ended well."""
    told = []
    for name, costs in results.items():
        if "flower" in costs:
            times = ratio([run.wall for run in costs["flower"]], [run.wall for run in costs["ours"]])
            told.append(f"{name} {times}" + (f", asked {TIMES_FLOWER[name]}" if name in TIMES_FLOWER else ""))
    return ["", f"Plain Flower takes so many times as long as ours (wall): {'; '.join(told)}."] if told else []


def scale(counts: list[int], work: Path) -> list[str]:
    """Time and server memory by the number of sites, and how well a line fits the times."""
    seconds, lines = [], ["| sites | wall, s | CPU, s | server process, MB | all memory, MB |", "|---|---|---|---|---|"]
    for count in counts:
        folder = write(replace(W4, name=f"s{count}", sites=count, rounds=2), work / f"s{count}")
        cost = measure(command("ours", folder, work / f"s{count}-out"))
        seconds.append(cost.cpu)
        lines.append(f"| {count} | {cost.wall:.1f} | {cost.cpu:.1f} | {cost.main_mb:.0f} | {cost.all_mb:.0f} |")
        print(lines[-1], flush=True)
    fit = np.polyfit(counts, seconds, 1)
    left = np.square(np.polyval(fit, counts) - seconds).sum() / np.square(seconds - np.mean(seconds)).sum()
    lines.append("")
    lines.append(f"CPU seconds = {fit[1]:.1f} + {fit[0] * 1000:.1f} per thousand sites, R² = {1 - left:.4f}.")
    return lines


def machine() -> str:
    """Where and with what."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "flwr", "numpy"))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"{time.strftime('%d %B %Y')}, {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {versions}; load when it began {load:.1f}."
    )


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workloads", default="w1,w2,w3,w4")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    head, systems = machine(), ["a1", "ap", "ours", *(["flower"] if given.peers else [])]
    with tempfile.TemporaryDirectory() as name:
        chosen = [WORKLOADS[one] for one in given.workloads.split(",") if one]
        results: dict[str, dict[str, list[Cost]]] = {}
        losses = []
        for one in chosen:
            results[one.name] = compare(one, systems, given.runs, Path(name))
            losses.append(f"{one.name}: {final_losses(one, list(results[one.name]), Path(name))}")
            print("\n".join(table({one.name: results[one.name]})), flush=True)
        lines = [head, "", f"Medians of {given.runs} runs in turn; ratios with their range.", "", *table(results)]
        lines += ["", f"Final loss over all training images. {'; '.join(losses)}."]
        if given.scale:
            lines += ["", "Sites of 16 images, two rounds:", "", *scale([100, 300, 1000], Path(name))]
    print("\n".join(lines))
    if given.write:
        path = Path(__file__).with_name("RESULTS.md")
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        path.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]), encoding="utf-8")


if __name__ == "__main__":
    main()
