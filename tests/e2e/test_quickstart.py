"""The page that plays a federation on one machine, typed as it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.e2e.live import free_port, until

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason="the gateway needs nginx, which is not installed here")
def test_the_page_runs_as_it_is_typed(root: Path, tmp_path: Path) -> None:
    page = (root / "docs" / "quickstart-federation.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    script = "".join(re.sub(r"^[$>] ", "", block, flags=re.MULTILINE) for block in blocks)
    assert script.count("consilium ") >= 9
    for port in ("8443", "8444"):  # other tests, and whoever works on this machine, may have them
        script = script.replace(f"port = {port}", f"port = {free_port()}")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "consilium"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m consilium "$@"\n')
    command.chmod(0o755)
    (tmp_path / "simulations").symlink_to(root / "simulations")
    output = tmp_path / "said"
    with output.open("wb") as log:
        shell = subprocess.Popen(
            ["bash", "-e", "-u", "-o", "pipefail", "-c", script],
            cwd=tmp_path,
            env={
                **os.environ,
                "PATH": f"{command.parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(root),
                "OMP_NUM_THREADS": "1",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: shell.poll() is not None, 300, "end of the page")
    finally:
        if shell.poll() is None:
            for process in psutil.Process(shell.pid).children(recursive=True):
                process.terminate()
            shell.kill()
    said = output.read_text()
    assert shell.returncode in (0, 143), said[-4000:]  # `wait` gives the status of what was ended
    assert "FIT to join" in said
    assert "all sites' test images" in said
    assert "sites: 3 of 3 connected" in said
    assert re.search(r"\d replies, [\d,]+ bytes: .* trained model. Nothing else left", " ".join(said.split()))
    assert (tmp_path / "try" / "federation" / "runs").is_dir()
