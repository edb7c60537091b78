"""The documentation keeps its word: commands of the first steps run as typed, the site builds, no link is broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def typed(page: Path) -> list[tuple[str, int]]:
    """The commands of a page's ```console blocks with the lines that continue them, and the exit code of each."""
    found: list[tuple[str, int]] = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, remark = part.replace("\n> ", "\n").rstrip("\n").partition("  # exit code ")
            found.append((command, int(remark or 0)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hospital", "researcher"])
def test_every_command_of_the_first_steps_runs_as_typed(name: str, root: Path, tmp_path: Path) -> None:
    commands = typed(root / "docs" / "tutorials" / f"{name}.md")
    assert len(commands) >= 6
    (tmp_path / "simulations").symlink_to(root / "simulations")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "consilium").write_text(f'#!/bin/sh\nexec {sys.executable} -m consilium "$@"\n')
    (tmp_path / "bin" / "consilium").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for command, expected in commands:
        rounds = re.search(r"federation\.rounds=(\d+)", command)
        if "simulate" in command and (rounds is None or int(rounds[1]) > 5):  # as written, but short
            command += " --set federation.rounds=2"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == expected, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link_and_fetches_nothing(root: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    pages = list(site.rglob("*.html"))
    assert {"architecture.html", "job.html", "server.html"} <= {page.name for page in pages}
    for page in pages:
        assert not re.search(
            r'<(script|img)[^>]*src="https?://|<link[^>]*stylesheet[^>]*https?://', page.read_text()
        ), page


def test_every_page_is_in_the_contents_of_the_site(root: Path) -> None:
    contents = (root / "mkdocs.yml").read_text()
    for page in (root / "docs").rglob("*.md"):
        assert f"- {page.relative_to(root / 'docs')}\n" in contents, page
