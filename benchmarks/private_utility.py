"""What differential privacy costs in accuracy: the pneumonia job by epsilon, three seeds each.

python -m benchmarks.private_utility DATA OUT [SETTING ...]

DATA: the folder of pneumoniamnist_balanced. Each run is `consilium simulate` with one worker, into OUT/SETTING-SEED; a
run whose result.json is there is not repeated, so that what was interrupted can go on. Then prints the table of
docs/results.md. Between the schedules validation figures decide, not test figures. Noise is drawn anew each time: a
run that is repeated with its seed differs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from server.store import read_events

JOB = Path(__file__).parents[1] / "simulations" / "jobs" / "pneumonia-private.toml"
SEEDS = (0, 1, 2)
SHARED = {
    "privacy.secure_aggregation": "true", "privacy.dp": "distributed", "federation.max_update_norm": "10",
    "federation.min_sites": "4", "federation.weighting": "equal", "federation.rounds": "60",
}  # fmt: skip
SETTINGS: dict[str, dict[str, str]] = {
    "epsilon-8-constant": {"train.schedule": "constant"},
    "epsilon-8-cosine": {"train.schedule": "cosine"},
    "epsilon-3": {"privacy.epsilon": "3"},
    "epsilon-1": {"privacy.epsilon": "1", "federation.rounds": "20"},
    "epsilon-8-shared": SHARED,
}


def measure(name: str, seed: int, data: Path, out: Path) -> Path:
    """The folder of a finished run; makes the run if it is not there."""
    folder = out / f"{name}-{seed}"
    if not (folder / "result.json").is_file():
        started = time.monotonic()
        settings = [word for key, value in SETTINGS[name].items() for word in ("--set", f"{key}={value}")]
        command = ["simulate", JOB, "--data", data, "--out", folder, "--seed", seed, "--workers", 1, *settings]
        words = [sys.executable, "-m", "consilium", *map(str, command)]
        print("consilium", *words[3:], file=sys.stderr)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        print(f"{folder.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return folder


def row(name: str, folders: list[Path]) -> str:
    """A line of the table: what was trained, AUROC of each seed, their mean and deviation."""
    found: list[dict[str, Any]] = [json.loads((folder / "result.json").read_text()) for folder in folders]
    runs = [result["federated"] for result in found]
    seeds = " / ".join("{:.3f} [{:.3f}, {:.3f}]".format(run["auroc"], *run["intervals"]["auroc"]) for run in runs)
    values = [run["auroc"] for run in runs]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    checked = statistics.mean(best_validation(folder) for folder in folders)
    schedule, spent = found[0]["job"]["train.schedule"], max(run["privacy"]["epsilon"] for run in runs)
    budget = f"{schedule}, {runs[0]['rounds']} rounds, {runs[0]['gradient_steps']} steps"
    return f"| {name} | {spent:.2f} | {budget} | {seeds} | {statistics.mean(values):.3f}{spread} | {checked:.3f} |"


def best_validation(folder: Path) -> float:
    """AUROC on the validation images in the round that was picked by it; the round before the first does not count."""
    seen = [event for event in read_events(folder) if event["event"] == "evaluation" and event["split"] == "val"]
    return max(float(event["metrics"]["auroc"]["value"]) for event in seen if event["round"])


def main(data: str, out: str, *names: str) -> None:
    """Make what is missing, and print the table."""
    lines = ["| setting | epsilon | schedule, budget | test AUROC, seeds 0 / 1 / 2 | mean ± sd | validation |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in names or SETTINGS:
        lines.append(row(name, [measure(name, seed, Path(data), Path(out)) for seed in SEEDS]))
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
