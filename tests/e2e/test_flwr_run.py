"""The same apps under Flower's own simulation engine (Ray), started with `flwr run`, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from server.store import read_events
from shared.config import Job
from simulations.simulate import run
from tests.e2e.live import free_port, until

BIN = Path(sys.executable).parent


class Flower:
    """`flwr` with a home of its own, and the SuperLink that it keeps for simulations.

    `flwr run` would start that by itself, and give it 15 s. A machine with much to do takes longer; so it is started
    here, with the words that `flwr run` uses, and waited for.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.env = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # Flower's programs start each other by name
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.port),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Flower:
        self.home.mkdir()
        where = ("--host", "127.0.0.1", "--port", str(self.port), "--database", str(self.home / "state.db"))
        self.log = self.home / "superlink.log"
        with self.log.open("wb") as log:
            self.daemon = subprocess.Popen(
                [BIN / "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", *where],
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until(self._answers, 60, "SuperLink for simulations")
        return self

    def _answers(self) -> bool:
        assert self.daemon.poll() is None, self.log.read_text(errors="replace")
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def __exit__(self, *_: object) -> None:
        family = [*psutil.Process(self.daemon.pid).children(recursive=True), psutil.Process(self.daemon.pid)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=20)

    def __call__(self, root: Path, *args: str) -> str:
        done = subprocess.run([BIN / "flwr", *args], cwd=root, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, root: Path) -> str:
        """That of the newest run; `flwr run` ends with 0 even where the run failed."""
        return str(json.loads(self(root, "list", "--format", "json"))["runs"][0]["status"])


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    with Flower(tmp_path_factory.mktemp("flower") / "home") as flower:
        yield flower


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure aggregation"])
def test_flwr_run_gives_the_same_model_as_our_engine(
    secure: bool, flower: Flower, three_sites: Path, tiny_job: Job, tmp_path: Path, root: Path
) -> None:
    tiny_job = tiny_job.replace(privacy__secure_aggregation=secure, federation__max_update_norm=20.0)
    ours = run(tiny_job, three_sites, tmp_path / "ours").folder
    out = tmp_path / "theirs"
    settings = tiny_job.flat() | {"run.out": str(out), "run.sites": str(three_sites)}
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    federation = "num-supernodes=3 client-resources-num-cpus=1"
    flower(root, "run", ".", "--stream", "--run-config", config, "--federation-config", federation)
    until(lambda: flower.status(root).startswith("finished"), 60, "end of the run")
    assert flower.status(root) == "finished:completed", flower.log.read_text(errors="replace")[-8000:]
    assert [event["event"] for event in read_events(out)][-1] == "finish"
    theirs = load_file(out / "last.safetensors")
    for name, value in load_file(ours / "last.safetensors").items():
        np.testing.assert_allclose(theirs[name].numpy(), value.numpy(), atol=1e-6)
