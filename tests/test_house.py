"""What keeps the house in order: imports go one way, the README's commands run, versions agree, the set is pinned."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shared import __version__
from shared.errors import how_to_install

PACKAGES = ("shared", "client", "server", "simulations", "consilium")
MAY_IMPORT = {
    "shared": {"shared"},
    "client": {"shared", "client"},
    "server": {"shared", "server"},
    "simulations": {"shared", "client", "server", "simulations"},
    "consilium": set(PACKAGES),
}


def imports(path: Path) -> set[str]:
    """Top-level names a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str, root: Path) -> None:
    for path in (root / package).rglob("*.py"):
        assert imports(path) & set(PACKAGES) <= MAY_IMPORT[package], path
        if package == "shared":
            assert "flwr" not in imports(path), path


def test_no_module_is_longer_than_350_lines(root: Path) -> None:
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 350 or "Longer than 350 lines because" in path.read_text(), (
                f"{path}: {lines} lines, 350 are allowed: move a part that stands by itself to a module beside it, or "
                "say in the module's docstring 'Longer than 350 lines because …'"
            )


def test_the_version_is_one_number(root: Path) -> None:
    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_the_tested_set_is_plain_names_and_versions_and_covers_every_dependency(root: Path) -> None:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [item for extra in project["optional-dependencies"].values() for item in extra]
    names = {re.match(r"[A-Za-z0-9._-]+", item).group().lower() for item in wanted}  # type: ignore[union-attr]
    assert names - {"consilium"} <= pinned


def test_every_page_adds_packages_to_the_editable_installation_and_within_the_tested_set(root: Path) -> None:
    """A plain `pip install '.[export]'` would put a frozen copy in the place of what `make` installed."""
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = 0
    for page in (root / "README.md", *(root / "docs").rglob("*.md")):
        for before, names in re.findall(r"pip install([^`']*)'\.\[([\w,]+)\]'", page.read_text()):
            assert before.split() == ["--constraint", "constraints.txt", "--editable"], page
            assert set(names.split(",")) <= set(extras), page
            found += 1
    assert found >= 4


def test_what_a_missing_package_asks_for_exists_and_comes_from_the_source(root: Path) -> None:
    """A registry may have some other package of our name."""
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = how_to_install("export")
    assert told.startswith("in the folder of the source: pip install ")
    assert shlex.split(told.partition(": ")[2])[2:] == ["--constraint", "constraints.txt", "--editable", ".[export]"]
    sources = "".join(path.read_text() for package in PACKAGES for path in (root / package).rglob("*.py"))
    asked = set(re.findall(r"how_to_install\(['\"](\w+)['\"]\)", sources))
    assert asked >= {"export", "mlflow", "postgres", "ray", "tensorboard"}
    assert asked <= set(extras)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_what_the_pages_commands_write_is_not_committed_by_mistake(root: Path, tmp_path: Path) -> None:
    """try/federation has an authority's private key."""
    shutil.copy(root / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    written = [
        "try/federation/ca/ca.key",
        "studies/heterogeneity/study.html",
        "registry/index.jsonl",
        "demo/run/job.toml",
    ]
    done = subprocess.run(["git", "check-ignore", *written], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == written


def test_every_target_of_make_that_a_page_names_exists(root: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    for page in (root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")):
        found = re.findall(r"(?:^\$ |`)make ([a-z-]+)", page.read_text(), re.MULTILINE)
        assert set(found) <= targets, page
    for page in ("quickstart-federation", "tutorials/hospital"):  # whoever comes here first installs, and no more
        assert re.search(r"^make install$", (root / "docs" / f"{page}.md").read_text(), re.MULTILINE), page


def commands(page: Path) -> list[str]:
    """The lines of a page's ```console blocks that start with `$ `."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_every_command_of_the_readme_runs(root: Path, tmp_path: Path) -> None:
    """In order, in one folder, as written. `make` itself is what CI runs; its targets are checked by name here."""
    lines = [line.split("  #")[0].strip() for line in commands(root / "README.md")]
    assert len(lines) >= 8
    targets = set(re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE))
    data = root.parent / "shared" / "data"
    for line in lines:
        words = shlex.split(line)
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
            continue
        if words[0] in ("git", "cd"):
            continue
        assert words[0] == "consilium", line
        if any(word.startswith("../shared") for word in words) and not data.is_dir():
            continue
        # As written but short: the figures are docs/results.md's to prove, here the command is.
        short = ["--set", "federation.rounds=2", "--set", "evaluation.every=1"] if words[1] == "simulate" else []
        words = [str(data.parent.parent / word[3:]) if word.startswith("../shared") else word for word in words]
        words = [str(root / word) if word.startswith("simulations/") else word for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "consilium", *words[1:], *short],
            cwd=tmp_path,
            env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
