"""A real federation on loopback: gateway, SuperLink, executor, three sites with TLS, keys and policies of their own.

The tests share one federation and run in their order; each leaves it as it found it. Where a test asks for the same
model to the bit, it is that of the first test's run, which nothing disturbed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.fab import Fab
from safetensors.torch import load_file

from client.egress_log import verify
from server.control import Control
from server.database import read
from server.database.engine import STORE, open_database
from server.federation import Folder
from server.store import read_events
from shared.bundle import release
from shared.config import job_from_flat, load_job
from simulations.simulate import run as simulate
from tests.conftest import write_site
from tests.e2e.live import Live, until

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="the gateway needs nginx, which is not installed here"),
]
MARK = "DOE^JOHN"  # what a site must never tell


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    base = tmp_path_factory.mktemp("federation")
    for name in "abc":
        write_site(base / "hospitals" / name, name)
    federation = Live(base / "dir", {name: base / "hospitals" / name for name in "abc"})
    federation.provision()
    try:
        federation.start_server()
        for name in federation.sites:
            federation.start_site(name)
        yield federation
    finally:
        federation.end_all()


@pytest.fixture(scope="module")
def job(live: Live) -> Path:
    flat = {
        "name": "tiny",
        "data.classes": "left,right",
        "data.size": 16,
        "model.width": 4,
        "train.local_steps": 2,
        "train.batch_size": 8,
        "train.keep_optimizer": True,
        "federation.rounds": 4,
        "federation.min_sites": 1,
        "evaluation.every": 2,
    }
    path = live.path.parent / "tiny.toml"
    path.write_text(job_from_flat(flat).toml())
    return path


@pytest.fixture(scope="module")
def undisturbed(live: Live, job: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    name = live.submit(job)
    said = live.follow(name)
    assert "balanced accuracy" in said
    return live.folder(name)


def same(one: Path, other: Path) -> None:
    for name in ("model", "last"):
        a, b = load_file(one / f"{name}.safetensors"), load_file(other / f"{name}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def stored(folder: Path, quiet: bool = True) -> None:
    """The store of the federation has the whole run; ``quiet``: without a word of complaint on the way."""
    db = open_database(folder.parent / STORE, create=False)
    id = read.find(db, folder)
    assert id is not None
    assert read.events(db, id) == read_events(folder)
    assert read.run(db, id)["status"] == "finished"
    complaints = [row for row in read.warnings(db, id) if "store" in row.get("text", "")]
    db.dispose()
    assert not (quiet and complaints)
    db.dispose()


def test_the_model_is_that_of_the_simulation(live: Live, job: Path, undisturbed: Path, tmp_path: Path) -> None:
    simulate(load_job(job), live.path.parent / "hospitals", tmp_path / "simulated")
    for name in ("model", "last"):
        real, played = (
            load_file(undisturbed / f"{name}.safetensors"),
            load_file(tmp_path / f"simulated/{name}.safetensors"),
        )
        assert real.keys() == played.keys()
        for key in real:
            torch.testing.assert_close(real[key].double(), played[key].double(), rtol=0, atol=1e-6)
    for folder in live.sites.values():
        found = verify(folder)
        assert found.faults == []
        assert {entry["kind"] for entry in found.entries} == {"query", "train", "evaluate"}
    assert "3 of 3" in live.consilium("server", "status", live.path)


def test_the_server_app_is_killed_and_the_run_resumed(live: Live, job: Path, undisturbed: Path) -> None:
    name = live.submit(job)
    # The second, because a round is told before it is saved: after the first there may be nothing to go on from.
    until(lambda: len(live.events(name, "round")) >= 2, 120, "second round")
    for process in live.children("server", "flwr-serverapp"):
        process.kill()
    said = live.follow(name, code=1)
    assert f"--resume {name}" in said
    live.consilium("run", "--federation", live.path, "--resume", name)
    assert live.events(name, "start")[1]["resumed_after"] in (1, 2, 3)
    same(undisturbed, live.folder(name))
    stored(live.folder(name))
    assert f"{name}  tiny: finished 4/4 rounds, 3 sites" in live.consilium("runs", "list", live.path)
    assert "complete" in live.consilium("run", "--federation", live.path, "--resume", name, code=2)


def test_superlink_is_killed_in_the_middle_of_a_round(live: Live, job: Path, undisturbed: Path) -> None:
    name = live.submit(job)
    until(lambda: live.events(name, "round"), 120, "first round")
    for process in live.children("server", "server.superlink"):
        process.kill()
    live.follow(name)
    same(undisturbed, live.folder(name))


def test_a_site_is_killed_and_joins_again(live: Live, job: Path) -> None:
    name = live.submit(job, "federation.rounds=2000", "evaluation.every=2000")

    def rounds(with_b: bool) -> list[int]:
        events = live.events(name, "round")
        return [event["round"] for event in events if ("b" in {item["site"] for item in event["trained"]}) == with_b]

    until(lambda: rounds(with_b=True), 120, "first round")
    process = live.processes.pop("b")
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=60)[1], "the site's processes outlive their supervisor"
    live.start_site("b")  # at first the server still takes it for connected
    until(lambda: rounds(with_b=False), 150, "a round without b")
    lost = rounds(with_b=False)[0]
    until(lambda: rounds(with_b=True)[-1] > lost, 120, "a round with b again")
    live.consilium("run", "--federation", live.path, "--stop", name)
    assert live.events(name, "failed")[-1]["reason"] == "stopped by the coordinator"
    said = live.follow(name, code=1)
    assert "b not used: site-gone" in said
    (event,) = [event for event in live.events(name, "round") if event["round"] == lost]
    assert [item["site"] for item in event["trained"]] == ["a", "c"]
    assert "site-gone" in (live.folder(name) / "report.html").read_text()


def test_a_site_that_stands_still_holds_nobody_up(live: Live, job: Path) -> None:
    """Buffered rounds: they go on without it, and what it did counts in the round in which it comes."""
    name = live.submit(job, "federation.strategy=fedbuff", "federation.rounds=14", "evaluation.every=14")
    until(lambda: live.events(name, "round"), 120, "the first round")
    site = psutil.Process(live.processes["c"].pid)
    family = [site, *site.children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        seen = len(live.events(name, "round"))
        until(lambda: len(live.events(name, "round")) >= seen + 5, 120, "five rounds without it")
    finally:
        for process in reversed(family):
            process.resume()
    live.follow(name)
    rounds = live.events(name, "round")
    assert len(rounds) == 14
    assert all(event["dropped"] == [] for event in rounds)
    behind = {row["site"]: row["behind"] for event in rounds for row in event["trained"] if row["behind"] >= 3}
    assert set(behind) == {"c"}
    stored(live.folder(name))


def test_no_text_of_a_site_reaches_the_server(live: Live, job: Path) -> None:
    table = live.sites["c"] / "labels.csv"
    before = table.read_text()
    table.write_text(before + f"images/{MARK}.png,left,{MARK},train\n")
    try:
        said = live.follow(live.submit(job, "federation.rounds=1"))
    finally:
        table.write_text(before)
    assert "c not used: site-declined: missing-files" in said
    assert MARK in (live.sites["c"] / "site.log").read_text()  # its own people are told
    for path in [*live.path.rglob("*"), live.output("server")]:
        if path.is_file():
            assert MARK.encode() not in path.read_bytes(), path


def test_a_job_with_other_classes_is_refused_by_name(live: Live, job: Path) -> None:
    said = live.follow(live.submit(job, "data.classes=left,other"), code=1)
    for site in live.sites:
        assert f"{site}: site-declined: unknown-label" in said


def test_an_altered_program_is_not_run(live: Live, job: Path) -> None:
    proof = live.path.parent / "ran"
    line = f"\nimport pathlib; pathlib.Path({str(proof)!r}).open('a').write('x')\n"
    altered = dict(release()) | {"client/app.py": release()["client/app.py"] + line.encode()}
    content, _ = build_fab_from_files(altered)
    digest = hashlib.sha256(content).hexdigest()

    def submit(name: str) -> Path:
        folder = live.folder(name)
        folder.mkdir(parents=True)
        config = load_job(job, ["federation.rounds=1"]).flat() | {"run.out": str(folder), "run.id": name}
        with Control(Folder(live.path)) as control:
            fab = fab_to_proto(Fab(digest, content, {}))
            number = control._client.StartRun(
                StartRunRequest(fab=fab, override_config=user_config_to_proto(config))
            ).run_id
            until(lambda: control.status(number).over, 120, "end of the run")
        return folder

    submit("altered-1")
    (survey,) = live.events("altered-1", "survey")
    assert {item["site"]: item["reason"] for item in survey["dropped"]} == dict.fromkeys(
        live.sites, "site-declined: bundle-refused"
    )
    assert not proof.exists()
    assert "consilium site approve" in (live.sites["a"] / "site.log").read_text()

    file = live.sites["a"] / "site.toml"
    assert digest[:12] in live.consilium("site", "approve", file)
    said = live.consilium("site", "approve", file, digest[:12], "--full", "--yes")
    assert "changed  client/app.py  (+2 -0 lines)" in said
    assert "import pathlib" in said
    submit("altered-2")
    trained = [item["site"] for event in live.events("altered-2", "round") for item in event["trained"]]
    assert trained == ["a"]
    assert proof.exists()


def fill(path: Path) -> None:
    """Grow a file until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)


def test_a_full_disk_at_the_server_loses_nothing(live: Live, job: Path, undisturbed: Path, tmp_path: Path) -> None:
    kept = tmp_path / "undisturbed"
    shutil.copytree(undisturbed, kept)  # the small disk will hide it
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", live.path / "runs"]).returncode:
        pytest.skip("mounting a small disk needs root")
    filler = live.path / "runs" / "filler"
    try:
        name = live.submit(job)
        until(lambda: len(live.events(name, "round")) >= 2, 120, "second round")
        fill(filler)
        assert "No space left" in live.consilium("run", "--federation", live.path, "--attach", name, code=1)
        filler.unlink()
        live.consilium("run", "--federation", live.path, "--resume", name)
        same(kept, live.folder(name))
        stored(live.folder(name), quiet=False)  # the store may be the first to find no room, and says so
    finally:
        subprocess.run(["umount", live.path / "runs"], check=True)


def test_a_revoked_site_is_out_and_the_others_go_on(live: Live, job: Path) -> None:
    live.consilium("provision", "--out", live.path, "--revoke", "b")
    until(lambda: "b: its key is no longer accepted" in live.said("server"), 30, "revocation")
    until(lambda: "the coordinator has taken this site out" in live.said("b"), 120, "words at the revoked site")
    name = live.submit(job, "federation.rounds=1")
    live.follow(name)
    (event,) = live.events(name, "round")
    assert {item["site"] for item in event["trained"]} == {"a", "c"}


def test_sigterm_leaves_no_process(live: Live) -> None:
    for name in list(live.processes):
        family = psutil.Process(live.processes[name].pid).children(recursive=True)
        assert family
        live.processes[name].send_signal(signal.SIGTERM)
        live.processes.pop(name).wait(30)
        assert not psutil.wait_procs(family, timeout=10)[1]
