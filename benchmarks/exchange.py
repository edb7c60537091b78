"""What does an exchange between hospitals cost beside the training? A real federation on loopback, round by round.

python -m benchmarks.exchange [--rounds 10] [--sites 3] [--sizes small,large,resnet50]

Gateway, SuperLink, SuperNodes and workers are processes of this machine, with TLS and keys, as in a real federation.
One gradient step a round on tiny images. The overhead of a train exchange is the round's seconds at the server, from
the model in its hands to the mean of all replies, without those that the slowest site worked on its answer. Other work
on the machine is in it; so the load is printed beside it, and what the programs took of the processor. The first round
is left out: a site reads its images then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import psutil
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supernode.fleet_http_connection import http_request_response

from benchmarks.federation_memory import ROLES, at_work
from client.supernode import ASKS
from shared.config import job_from_flat
from shared.tasks import load_task
from shared.weights import exchanged
from tests.conftest import write_site
from tests.e2e.live import Live

# About 1 million numbers; 25 million in few arrays; 24 million in many.
SIZES = {
    "small": {"model.name": "cnn", "model.width": 60},
    "large": {"model.name": "cnn", "model.width": 300},
    "resnet50": {"model.name": "resnet50", "model.width": 24},
}


def processor(live: Live) -> dict[str, float]:
    """Seconds of the processor that the programs of each role have taken; the server app's are gone with its end."""
    taken: dict[str, float] = defaultdict(float)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if role := next((role for role, words in ROLES.items() if words in line), ""):
                times = process.cpu_times()
                taken[role] += times.user + times.system
    return taken


def measure(live: Live, size: str, rounds: int) -> str:
    """A line of the table for one size of model."""
    flat = {
        "name": f"exchange-{size}",
        "data.classes": "left,right",
        "data.size": 32,
        "train.optimizer": "sgd",
        "train.keep_optimizer": False,
        "train.batch_size": 8,
        "federation.rounds": rounds + 1,
        "evaluation.every": rounds + 1,
    }
    job = job_from_flat(flat | SIZES[size])
    arrays = exchanged(load_task(job.task).build_model(job), job)
    file = live.path.parent / f"{size}.toml"
    file.write_text(job.toml())
    marks = {name: len((folder / "site.log").read_text().splitlines()) for name, folder in live.sites.items()}
    before = processor(live)
    name = live.submit(file)
    live.follow(name)
    took = {role: (seconds - before[role]) / rounds for role, seconds in processor(live).items()}
    work = at_work(live, marks)
    events = live.events(name, "round")[1:]
    assert len(events) == rounds, f"{len(events)} rounds came to an end"
    moved = {sum(both) for event in events for both in event["bytes"].values()}
    over = [event["seconds"] - work[event["round"]] for event in events]
    cells = [
        f"{sum(array.numel() for array in arrays.values()) / 1e6:.1f} million in {len(arrays)} arrays",
        f"{max(moved):,}",
        f"{statistics.median(work[event['round']] for event in events):.2f}",
        f"{statistics.median(over):.2f} ({min(over):.2f} to {max(over):.2f})",
        ", ".join(f"{role} {seconds:.2f}" for role, seconds in sorted(took.items()) if seconds >= 0.005),
        f"{os.getloadavg()[0]:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def question(live: Live, site: str, times: int = 300) -> str:
    """What a site's question for work takes of the server, when there is none: asked as that site, which is stopped."""
    live.end(site)
    folder = live.sites[site]
    key = load_ssh_private_key((folder / "node.key").read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    keys, ca = (key, key.public_key()), (folder / "ca.crt").read_bytes()
    with http_request_response(f"localhost:{live.port}", False, ca, keys) as (_, receive, *_more):
        receive()
        before = processor(live)
        for _ in range(times):
            receive()
        after = processor(live)
    cost = {role: (after[role] - before[role]) / times for role in ("SuperLink", "gateway")}
    each = sum(cost.values())
    told = ", ".join(f"{role} {1000 * seconds:.1f} ms" for role, seconds in cost.items())
    shares = [f"{60 * each / pause:.0%} of a core where 60 sites ask every {pause:g} s" for pause in reversed(ASKS)]
    return f"A question for work: {told} of the processor; {' and '.join(shares)}."


def main() -> None:
    """Measure, and print the table of benchmarks/RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--keep", type=Path, help="the federation's folder; by default one that is removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = given.keep or Path(temporary)
        sites = {name: base / "hospitals" / name for name in "abcdefgh"[: given.sites]}
        for name, folder in sites.items():
            write_site(folder, name, images=16)
        live = Live(base / "dir", sites)
        live.provision()
        print(f"{given.sites} sites, {given.rounds} rounds, {os.cpu_count()} cores\n")
        print("| model | bytes, both ways, a site | training, s | all else, s (range) | processor, s a round | load |")
        print("|---|---|---|---|---|---|")
        try:
            live.start_server()
            for name in sites:
                live.start_site(name)
            for size in filter(None, given.sizes.split(",")):
                print(measure(live, size, given.rounds), flush=True)
            print(f"\n{question(live, 'a')}")
        finally:
            live.end_all()


if __name__ == "__main__":
    main()
