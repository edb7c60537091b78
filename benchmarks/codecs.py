"""What coding the model's changes costs in accuracy and saves in bytes: three jobs on real data, three seeds each.

python -m benchmarks.codecs DATA OUT [--jobs pneumonia ...] [--settings int8 ...] [--seeds 0 1 2]

DATA: the folder that holds pneumoniamnist_balanced, bloodcell_det_multisite and nuclei_dsb2018. Each run is `consilium
simulate` with one worker, into OUT/JOB-SETTING-SEED; a run whose result.json is there is not repeated, so that what was
interrupted can go on. Then prints a table per job. Bytes are of all arrays of all rounds to and from all sites, with
those that evaluations between the rounds sent, as the run's journal has them. The difference from float32 is paired by
seed; its interval is that of the mean over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from server.store import read_events

JOBS = {
    "pneumonia": "pneumoniamnist_balanced",
    "bloodcells": "bloodcell_det_multisite",
    "nuclei": "nuclei_dsb2018",
}
FLOAT32 = "none"
SETTINGS: dict[str, dict[str, str]] = {
    FLOAT32: {},
    "bf16": {"federation.codec": "bf16"},
    "int8": {"federation.codec": "int8"},
    "topk 0.1": {"federation.codec": "topk", "federation.codec_keep": "0.1"},
    "topk-int8 0.2": {"federation.codec": "topk-int8", "federation.codec_keep": "0.2"},
    "topk-int8 0.1": {"federation.codec": "topk-int8", "federation.codec_keep": "0.1"},
    "int2": {"federation.codec": "int2"},
    "sign": {"federation.codec": "sign"},
}
FOLDER = Path(__file__).parents[1] / "simulations" / "jobs"


def measure(job: str, name: str, seed: int, data: Path, out: Path, more: Sequence[str]) -> Path:
    """The folder of a finished run; makes the run if it is not there."""
    folder = out / f"{job}-{name.replace(' ', '-')}-{seed}"
    if not (folder / "result.json").is_file():
        started = time.monotonic()
        settings = [f"{key}={value}" for key, value in SETTINGS[name].items()] + list(more)
        command = ["simulate", FOLDER / f"{job}.toml", "--data", data / JOBS[job], "--out", folder, "--seed", seed]
        words = [sys.executable, "-m", "consilium", *map(str, command), "--workers", "1"]
        words += [word for setting in settings for word in ("--set", setting)]
        print("consilium", *words[3:], file=sys.stderr)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        print(f"{folder.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return folder


def moved(folder: Path) -> tuple[int, int]:
    """Bytes to and from all sites in all rounds."""
    rounds = [event["bytes"] for event in read_events(folder) if event["event"] == "round"]
    both = [sites.values() for sites in rounds]
    return sum(down for each in both for down, _ in each), sum(up for each in both for _, up in each)


def score(folder: Path) -> tuple[str, float, list[float]]:
    """The job's metric on all test images: name, value, 95 % interval."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    rounds = [event for event in read_events(folder) if event["event"] == "evaluation" and event["split"] == "test"]
    metric = result["job"]["evaluation.best_metric"] or next(iter(rounds[-1]["metrics"]))
    found = result["federated"]
    return metric, found[metric], found["intervals"][metric]


def difference(values: Sequence[float], plain: Sequence[float]) -> str:
    """Mean of the paired differences, with its 95 % interval where there are several."""
    gaps = [value - other for value, other in zip(values, plain, strict=True)]
    if len(gaps) < 2:
        return f"{gaps[0]:+.4f}"
    half = float(student.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{statistics.mean(gaps):+.4f} ± {half:.4f}"


def row(name: str, folders: Sequence[Path], plain: Sequence[Path]) -> str:
    """A line of the table."""
    sums = [tuple(map(sum, zip(*map(moved, each), strict=True))) for each in (folders, plain)]
    (down, up), (down32, up32) = sums
    scores, others = [score(folder) for folder in folders], [score(folder) for folder in plain]
    seeds = " / ".join(f"{value:.4f} [{low:.3f}, {high:.3f}]" for _, value, (low, high) in scores)
    gap = difference([value for _, value, _ in scores], [value for _, value, _ in others])
    share = f"1/{(down32 + up32) / (down + up):.1f}"
    each = f"{down / len(folders) / 1e6:.1f} + {up / len(folders) / 1e6:.1f}"
    return f"| {name} | {each} | {share} (1/{down32 / down:.1f}, 1/{up32 / up:.1f}) | {seeds} | {gap} |"


def main() -> None:
    """Make what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], help="a setting of all runs, such as a smaller job")
    asked = parser.parse_args()
    for job in asked.jobs:
        found: dict[str, list[Path]] = {}
        for name in dict.fromkeys([FLOAT32, *asked.settings]):
            found[name] = [measure(job, name, seed, asked.data, asked.out, asked.set) for seed in asked.seeds]
        metric = score(found[FLOAT32][0])[0]
        seeds = ", ".join(map(str, asked.seeds))
        print(f"\n{job}\n")
        print(f"| codec | MB to + from all sites | bytes against float32 (to, from) | {metric}, seeds {seeds} | Δ |")
        print("|---|---|---|---|---|")
        for name, folders in found.items():
            print(row(name, folders, found[FLOAT32]), flush=True)


if __name__ == "__main__":
    main()
