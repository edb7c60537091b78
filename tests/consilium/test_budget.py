"""`consilium site budget` as a data manager meets it: words, a figure, and a broken ledger."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from client.ledger import Ledger, Terms, ledger_path
from shared.accounting import Mechanism, epsilon

KIND = Mechanism(1.5, 0.1, 10)


def budget(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "consilium", "site", "budget", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A hospital with a limit of 8 and two runs behind it; of the second two rounds never ended."""
    file = tmp_path / "hospital" / "site.toml"
    file.parent.mkdir()
    file.write_text('name = "north"\n[privacy]\nrequire_dp = true\nmax_epsilon = 8.0\n')
    ledger, terms = Ledger(ledger_path(file)), Terms(1e-5, 8.0, accountant="rdp")
    for number in range(1, 4):
        with ledger.round("7321", number, KIND, terms):
            pass
    for number in (1, 2):
        ledger.reserve("99", number, KIND, terms)
    return file


def test_the_budget_in_words_and_as_a_figure(site: Path, tmp_path: Path) -> None:
    done = budget(site, "--plot", tmp_path / "new" / "budget.html")
    assert done.returncode == 0, done.stderr
    total = epsilon([KIND._replace(steps=50)], 1e-5, "rdp")
    assert "north: most epsilon over all time 8, at delta 1e-05, per image" in done.stdout
    assert f"spent: {total:.3f} of 8, left: {8 - total:.3f}" in done.stdout
    bar = re.search(r"\[(#*)(\.*)\] (\d+)%", done.stdout)
    assert bar is not None
    assert len(bar[1]) / len(bar[1] + bar[2]) == pytest.approx(total / 8, abs=1 / 40)
    first, second = (epsilon([KIND._replace(steps=steps)], 1e-5, "rdp") for steps in (30, 20))
    assert re.search(rf"7321 +\S+ \S+ +3 +30 +{first:.3f}$", done.stdout, re.MULTILINE)
    assert re.search(rf"99 +\S+ \S+ +2 +20 +{second:.3f}  2 of them never ended, counted as spent$", done.stdout, re.M)
    more = int(re.search(r"About (\d+) more rounds", done.stdout)[1])  # type: ignore[index]
    assert epsilon([KIND._replace(steps=50 + 10 * more)], 1e-5, "rdp") <= 8
    assert epsilon([KIND._replace(steps=round(50 + 10.3 * more + 20))], 1e-5, "rdp") > 8
    page = (tmp_path / "new" / "budget.html").read_text()
    assert "run 7321" in page
    assert "limit" in page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["budget.html"]


def test_a_site_where_nothing_was_spent_and_one_without_a_limit_say_so(site: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "site.toml"
    fresh.write_text('name = "fresh"\n')
    done = budget(fresh)
    assert done.returncode == 0, done.stderr
    assert "no limit (privacy.max_epsilon = 0)" in done.stdout
    assert "spent: 0" in done.stdout
    assert list(tmp_path.glob("**/ledger.sqlite")) == [site.parent / ".consilium" / "ledger.sqlite"]
    site.write_text('name = "north"\n[privacy]\nunit = "patient"\n')
    done = budget(site)
    assert "protected single images only" in done.stdout
    assert "more rounds" not in done.stdout


def test_verify_says_whole_then_broken_with_exit_code_1(site: Path) -> None:
    done = budget(site, "--verify")
    assert done.returncode == 0, done.stderr
    assert "whole: 8 entries" in done.stdout
    seal = re.search(r"seal (\w{16}) ", done.stdout)[1]  # type: ignore[index]
    assert budget(site, "--seal", seal).returncode == 0
    path = site.parent / ".consilium" / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript("DROP TRIGGER no_delete; DELETE FROM entries WHERE id = 8")
    assert budget(site, "--verify").returncode == 0  # the last one's removal shows only by the seal
    done = budget(site, "--seal", seal)
    assert (done.returncode, seal in done.stdout) == (1, True)
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM entries WHERE id = 3")
    for args in ([], ["--verify"]):
        done = budget(site, *args)
        assert done.returncode == 1
        assert done.stdout.startswith("BROKEN: ")
        assert "before entry 4 entries are missing" in done.stdout


def test_a_wrong_question_is_one_line_and_exit_code_2(site: Path, tmp_path: Path) -> None:
    for args, named in (
        ([tmp_path / "none.toml"], "no such file"),
        ([site, "--plot", tmp_path / "budget.pdf"], ".html"),
        ([site, "--plot", "/proc/consilium/budget.html"], "cannot be written"),
    ):
        done = budget(*args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert named in done.stderr
    (site.parent / ".consilium" / "ledger.sqlite").write_bytes(b"x" * 5000)
    done = budget(site)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "ledger.sqlite" in done.stderr
