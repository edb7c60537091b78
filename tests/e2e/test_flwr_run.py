"""The same apps under Flower's own simulation engine (Ray), started with `flwr run`, without a network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from server.store import read_events
from shared.config import Job
from simulations.simulate import run

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def flwr(*args: str, home: Path, root: Path, port: int) -> str:
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # it starts flower-superlink by name
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([BIN / "flwr", *args], cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stop_daemons(home: Path) -> None:
    """End what `flwr run` left behind, found by this test's own FLWR_HOME."""
    mine = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home) and process.pid != os.getpid():
                mine.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    for process in mine:
        process.kill()
    psutil.wait_procs(mine, timeout=20)


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure aggregation"])
def test_flwr_run_gives_the_same_model_as_our_engine(
    secure: bool, three_sites: Path, tiny_job: Job, tmp_path: Path, root: Path
) -> None:
    tiny_job = tiny_job.replace(privacy__secure_aggregation=secure, federation__max_update_norm=20.0)
    ours = run(tiny_job, three_sites, tmp_path / "ours").folder
    out, home, port = tmp_path / "theirs", tmp_path / "flwr-home", free_port()
    settings = tiny_job.flat() | {"run.out": str(out), "run.sites": str(three_sites)}
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    federation = "num-supernodes=3 client-resources-num-cpus=1"
    try:
        flwr(
            "run",
            ".",
            "--stream",
            "--run-config",
            config,
            "--federation-config",
            federation,
            home=home,
            root=root,
            port=port,
        )
        deadline = time.monotonic() + 60
        while (
            status := json.loads(flwr("list", "--format", "json", home=home, root=root, port=port))["runs"][0]["status"]
        ) == "running":
            assert time.monotonic() < deadline, status
            time.sleep(1)
    finally:
        stop_daemons(home)
    log = "\n".join(path.read_text(errors="replace")[-4000:] for path in home.rglob("*.log"))
    assert status == "finished:completed", log  # `flwr run` itself exits 0 even if the run failed
    assert [event["event"] for event in read_events(out)][-1] == "finish"
    theirs = load_file(out / "last.safetensors")
    for name, value in load_file(ours / "last.safetensors").items():
        np.testing.assert_allclose(theirs[name].numpy(), value.numpy(), atol=1e-6)
