"""Does a long run with a large model grow? A real federation on loopback, its processes' memory round by round.

python -m benchmarks.federation_memory [--rounds 20] [--sites 3] [--model resnet50] [--keep FOLDER]

ResNet-50 (23.6 million numbers in 320 arrays, 94 MB) or a plain network 300 channels wide (25.1 million numbers in 20
arrays, 101 MB), tiny images, one gradient step a round, so that what is measured is the way of
the model: server app, SuperLink, gateway, SuperNode, worker and back. Memory is PSS (pages shared by processes counted
once, in shares), looked at twice a second; a site is the largest of the sites.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import psutil

from shared.config import job_from_flat
from tests.conftest import write_site
from tests.e2e.live import Live

# A process is the first of these whose words are in its command line.
ROLES = {
    "server app": "flwr-serverapp",
    "SuperLink": "server.superlink",
    "executor": "flower-superexec",
    "gateway": "nginx",
    "SuperNode": "client.supernode",
    "worker": "client.worker",
}
MIB = 1 << 20


def sizes(live: Live) -> dict[str, float]:
    """PSS by role in MiB, the largest of each role's processes; nginx's together; and the database on disk."""
    found: dict[str, float] = defaultdict(float)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            role = next((role for role, words in ROLES.items() if words in line), "")
            if role:
                pss = process.memory_full_info().pss / MIB
                found[role] = found[role] + pss if role == "gateway" else max(found[role], pss)
    files = list((live.path / "state").glob("superlink.db*"))
    found["database"] = sum(file.stat().st_size for file in files if file.exists()) / MIB
    return found


class Watch:
    """Looks at the processes in a thread; ``seen`` holds (time, sizes)."""

    def __init__(self, live: Live) -> None:
        self.live, self.over = live, threading.Event()
        self.seen: list[tuple[float, dict[str, float]]] = []
        self.thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self.over.wait(0.5):
            self.seen.append((time.time(), sizes(self.live)))

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def at_work(live: Live, after: Mapping[str, int] = MappingProxyType({})) -> dict[int, float]:
    """Seconds that the slowest site worked on a round's training, by its own log; ``after`` so many lines of a site."""
    found: dict[int, float] = defaultdict(float)
    for name, folder in live.sites.items():
        lines = (folder / "site.log").read_text().splitlines()[after.get(name, 0) :]
        for came, done in pairwise(lines):
            asked, took = re.search(r"round (\d+): train", came), re.search(r"done in ([\d.]+) s", done)
            if asked and took:
                found[int(asked[1])] = max(found[int(asked[1])], float(took[1]))
    return found


def measure(live: Live, job: Path, rounds: int) -> list[dict[str, float]]:
    """A line for each round: its seconds, those of the slowest site's work, and the peaks and least in MiB."""
    with Watch(live) as watch:
        name = live.submit(job)
        live.follow(name)
    lines, begin = [], 0.0
    work = at_work(live)
    for event in live.events(name, "round"):
        within = [found for when, found in watch.seen if begin < when <= event["time"]]
        begin = event["time"]
        peaks = {role: max(found.get(role, 0.0) for found in within) for role in [*ROLES, "database"]}
        least = {f"{role}, least": min(found.get(role, 0.0) for found in within) for role in ROLES}
        lines.append(
            {"round": event["round"], "seconds": event["seconds"], "work": work[event["round"]]} | peaks | least
        )
    assert len(lines) == rounds, f"{len(lines)} rounds came to an end"
    return lines


def main() -> None:
    """Measure, and print the table of benchmarks/RESULTS.md and a line of JSON a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--model", choices=["resnet50", "cnn"], default="resnet50")
    parser.add_argument("--keep", type=Path, help="the federation's folder; by default one that is removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = given.keep or Path(temporary)
        sites = {name: base / "hospitals" / name for name in "abcdefgh"[: given.sites]}
        for name, folder in sites.items():
            write_site(folder, name, images=16)
        live = Live(base / "dir", sites)
        live.provision()
        job = base / "large.toml"
        flat = {
            "name": "large",
            "data.classes": "left,right",
            "data.size": 32,
            "model.name": given.model,
            "model.width": 300,
            "train.optimizer": "sgd",
            "train.keep_optimizer": False,
            "train.batch_size": 8,
            "federation.rounds": given.rounds,
            "evaluation.every": given.rounds,
        }
        job.write_text(job_from_flat(flat).toml())
        try:
            live.start_server()
            for name in sites:
                live.start_site(name)
            lines = measure(live, job, given.rounds)
        finally:
            live.end_all()
    for line in lines:
        print(json.dumps({key: round(value, 1) for key, value in line.items()}))
    third = max(1, len(lines) // 3)
    print(f"\n| | first {third} rounds | last {third} rounds |\n|---|---|---|")
    for key in list(lines[0])[1:]:
        halves = [statistics.median(line[key] for line in part) for part in (lines[:third], lines[-third:])]
        print(f"| {key} | {halves[0]:.1f} | {halves[1]:.1f} |")


if __name__ == "__main__":
    main()
