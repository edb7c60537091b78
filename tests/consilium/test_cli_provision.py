"""`consilium provision`, `consilium site keygen` and `site fingerprint` as they are typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TEXT = 'name = "council"\n[server]\nhost = "fl.example.org"\n[sites.north]\n[sites.south]\nkey = "south.pub"\n'


def consilium(folder: Path, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "consilium", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("width", [80, 118])
def test_what_provision_says_fits_the_terminal_and_paths_stand_alone(
    width: int, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    (tmp_path / "federation.toml").write_text(
        'name = "council"\n[server]\nhost = "consilium.example.org"\nalso = ["fl.example.org", "10.0.0.5"]\n'
        "[sites.hospital-north]\n[sites.hospital-hill]\n"
    )
    for _ in range(2):
        done = consilium(tmp_path, root, "provision", "federation.toml", "--out", "try/federation")
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert "  try/federation/kits/hospital-north.zip" in lines


def test_a_federation_from_the_sites_key_to_revoking(tmp_path: Path, root: Path) -> None:
    made = consilium(tmp_path, root, "site", "keygen", "--out", "south.key", "--name", "south")
    assert made.returncode == 0, made.stderr
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "south.key": 0o600,
        "south.pub": 0o644,
    }
    shown = subprocess.run(
        ["ssh-keygen", "-lf", "south.pub"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert shown[1] in made.stdout
    assert shown[2] == "south"
    words = re.findall(r"by phone:\n((?: +(?:[a-z]+ ){5}[a-z]+\n){2})", made.stdout)
    assert len(words) == 1

    (tmp_path / "federation.toml").write_text(TEXT)
    done = consilium(tmp_path, root, "provision", "federation.toml", "--out", "fed")
    assert done.returncode == 0, done.stderr
    assert words[0] in done.stdout  # what the site reads out is what the coordinator sees
    assert "PRIVATE" not in done.stdout + made.stdout
    names = zipfile.ZipFile(tmp_path / "fed" / "kits" / "south.zip").namelist()
    assert "node.key" not in names

    told = consilium(tmp_path, root, "site", "fingerprint", "fed/ca/ca.crt", "south.key", "south.pub")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count(words[0]) == 2
    assert all(block in done.stdout for block in re.findall(r"by phone:\n.*\n.*\n", told.stdout))

    gone = consilium(tmp_path, root, "provision", "--out", "fed", "--revoke", "north")
    assert gone.returncode == 0, gone.stderr
    assert gone.stdout.startswith("north: revoked")
    again = consilium(tmp_path, root, "provision", "--out", "fed")
    assert "north: revoked on" in again.stdout
    assert [path.name for path in (tmp_path / "fed" / "sites").iterdir()] == ["south"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["provision", "none.toml", "--out", "fed"], "none.toml: no such file"),
        (["provision", "--out", "fed"], "no federation was set up here"),
        (["provision", "--out", "fed", "--revoke", "x"], "no such site"),
        (["provision", "none.toml", "--out", "fed", "--revoke", "x"], "--revoke stands alone"),
        (["provision", "none.toml"], "--out"),
        (["site", "keygen", "--out", "there.key"], "would lock this site out"),
        (["site", "keygen", "--out", "a.pub"], "names the private key"),
        (["site", "keygen", "--name", "a b"], "one word"),
        (["site", "fingerprint", "none"], "none: cannot be read"),
        (["site", "fingerprint", "there.key"], "there.key"),
    ],
)
def test_a_mistake_is_exit_code_2_and_one_line_that_says_what_to_do(
    tmp_path: Path, root: Path, words: list[str], told: str
) -> None:
    (tmp_path / "there.key").write_text("mine")
    done = consilium(tmp_path, root, *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {"there.key"}
    assert (tmp_path / "there.key").read_text() == "mine"


def test_provisioning_loads_neither_torch_nor_flower(tmp_path: Path, root: Path) -> None:
    (tmp_path / "federation.toml").write_text('name = "council"\n[server]\nhost = "fl.example.org"\n[sites.north]\n')
    program = (
        "import sys; from click.testing import CliRunner; from consilium.cli import commands\n"
        "done = CliRunner().invoke(commands, ['provision', 'federation.toml', '--out', 'fed'])\n"
        "assert done.exit_code == 0, done.output\n"
        "assert not {'torch', 'flwr', 'ray'} & set(sys.modules), 'loaded'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_a_dashboard_of_no_federation_is_told_so(tmp_path: Path, root: Path) -> None:
    done = consilium(tmp_path, root, "dashboard", "--federation", "fedration")
    assert done.returncode
    assert "fedration: no federation was set up here" in done.stderr
    assert "store" not in done.stderr
    (tmp_path / "federation.toml").write_text(TEXT.replace('key = "south.pub"\n', ""))
    assert consilium(tmp_path, root, "provision", "federation.toml", "--out", "f").returncode == 0
    done = consilium(tmp_path, root, "dashboard", "--federation", "f")
    assert done.returncode
    assert "f: no run yet; `consilium run JOB.toml --federation f` begins one" in done.stderr
