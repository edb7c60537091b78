"""A whole study on invented data: what it leaves, that a failing cell stops nothing, that it goes on where it was."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from scipy import stats

from tests.conftest import called
from tests.consilium.study.conftest import STUDY, write_study


@pytest.fixture(scope="session")
def whole(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished study."""
    out = tmp_path_factory.mktemp("whole") / "out"
    words = [sys.executable, "-m", "consilium", "study", str(study_file), "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr  # a cell failed
    (out / "said.txt").write_text(done.stdout)
    return out


def rows(out: Path, name: str = "study.csv") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / name).read_text())))


def results(out: Path, kind: str) -> dict[int, dict[str, Any]]:
    """result.json of the finished cells whose folder names a kind, by seed."""
    found = {}
    for path in out.glob(f"cells/study-{kind}-seed-*/run/result.json"):
        content = json.loads(path.read_text())
        found[content["seed"]] = content
    return found


def test_the_table_is_what_the_cells_reached(whole: Path) -> None:
    """Read again from the run folders of `simulate`, and the statistics from SciPy and the standard library."""
    cells, table = results(whole, "plain"), rows(whole)
    alone = results(whole, "baselines")
    assert set(cells) == set(alone) == {0, 1}
    for line in table:
        if line["method"] == "plain":
            own = cells[int(line["seed"])]["federated"]
            assert float(line["value"]) == pytest.approx(own["auroc"], rel=1e-5)
            assert [int(line[key]) for key in ("gradient_steps", "rounds", "examples")] == [
                own["gradient_steps"],
                own["rounds"],
                own["images_seen"],
            ]
            events = [json.loads(text) for text in _journal(whole, "plain", int(line["seed"]))]
            sent = sum(sum(pair) for event in events for pair in event.get("bytes", {}).values())
            assert int(line["bytes"]) == sent > 0
            assert float(line["worst_value"]) == pytest.approx(min(s["auroc"] for s in own["sites"].values()), rel=1e-5)
    gained = {}
    for site in ("a", "b"):
        pairs = [
            (cells[s]["federated"]["sites"][site]["auroc"], alone[s]["local"][site]["sites"][site]["auroc"])
            for s in (0, 1)
        ]
        gained[site] = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
    content = json.loads((whole / "study.json").read_text())
    told = next(item for item in content["methods"] if item["method"] == "plain")
    for site, interval in gained.items():
        if told["gains_over_alone"][site]["sd"] > 1e-9:
            own = told["gains_over_alone"][site]
            assert (own["low"], own["high"]) == pytest.approx((interval.low, interval.high), abs=1e-9)
    values = [cells[seed]["federated"]["auroc"] for seed in (0, 1)]
    assert told["test"]["mean"] == pytest.approx(statistics.mean(values))
    assert told["test"]["sd"] == pytest.approx(statistics.stdev(values))


def _journal(out: Path, kind: str, seed: int) -> list[str]:
    (folder,) = out.glob(f"cells/study-{kind}-seed-{seed}-*")
    return (folder / "run" / "rounds.jsonl").read_text().splitlines()


def test_every_model_has_the_same_steps_and_the_trivial_one_stands_beside(whole: Path) -> None:
    table = rows(whole)
    methods = {line["method"] for line in table}
    assert methods == {"trivial", "pooled", "alone", "plain", "equal"}
    assert {line["gradient_steps"] for line in table if line["method"] != "trivial"} == {str(2 * 2 * 2)}
    assert all(float(line["value"]) > 0.9 for line in table if line["method"] == "trivial")  # halves are easily told


def test_a_failing_cell_is_shown_with_its_reason_and_stops_nothing(whole: Path) -> None:
    content = json.loads((whole / "study.json").read_text())
    assert [item["title"] for item in content["failed"]] == ["broken, seed 0", "broken, seed 1"]
    assert all("federation.min_sites" in item["reason"] for item in content["failed"])
    assert not any(line["method"] == "broken" for line in rows(whole))
    said = (whole / "said.txt").read_text()
    assert re.search(r"\[\d+/9\] broken, seed 0: FAILED: .*too-far", said)
    page = (whole / "study.html").read_text()
    assert "Failed: broken, seed 1:" in page


def test_the_page_needs_no_network_and_says_the_answer_first(whole: Path) -> None:
    page = (whole / "study.html").read_text()
    assert "default-src 'none'" in page
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # Plotly names its makers in its own text
    assert not re.search(r"(?:https?:)?//", own)
    head = page[page.index("<header>") : page.index("</header>")]
    assert "is best (by validation, 2 seeds): AUROC" in head
    for part in ("What was reached", "At what cost", "Each hospital alone, and what it gains"):
        assert part in page
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert len(figures["figures"]) == 3


def test_every_ended_cell_is_told_with_what_it_reached_and_sentences_fit_the_terminal(
    whole: Path, study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [line for line in (whole / "said.txt").read_text().splitlines() if line.startswith("[")]
    assert any(re.fullmatch(r"\[\d/9\] trivial: done \(\d+ s\)", line) for line in first)
    assert not any(re.search(r": \(|: study|study: ", line) for line in first)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    monkeypatch.setenv("COLUMNS", "80")
    _, said, _ = called(capsys, "study", study_file, "--out", out)
    sentences = said[said.index("is best") :].splitlines()
    assert max(len(line) for line in sentences if "/" not in line) <= 80


@pytest.mark.slow
def test_a_quick_study_says_first_that_it_was_quick_and_concludes_nothing(tmp_path: Path) -> None:
    file = write_study(tmp_path, STUDY.replace("broken", "slow").replace('"federation.max_update_norm" = 1e-9', ""))
    words = [sys.executable, "-m", "consilium", "study", str(file), "--quick"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    caution = "quick: 2 seeds, 2 rounds; shows that it runs, nothing else"
    told = [line for line in done.stdout.splitlines() if not line.startswith("[")]
    assert told[0] == f"ATTENTION: {caution}"
    page = (tmp_path / "studies" / "study-quick" / "study.html").read_text()
    page = re.sub(r"<script.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert caution in page
    assert page.index(caution[1:]) < page.index("What was reached")
    for conclusion in ("best (", "better, by more", "worse off", "Not beaten", "cannot be told", "Cannot be told"):
        assert conclusion not in page + done.stdout
    content = json.loads((tmp_path / "studies" / "study-quick" / "study.json").read_text())
    assert (content["quick"], content["recommendations"]) == (True, [])


def test_what_is_finished_is_not_run_again_and_gives_the_same_table(
    whole: Path, study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One cell as a crash leaves it: without word of how it ended."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (broken_off,) = out.glob("cells/study-plain-seed-1-*")
    (broken_off / "cell.json").unlink()
    untouched = {path: path.stat().st_mtime_ns for path in out.glob("cells/study-equal-*/run/rounds.jsonl")}
    code, said, _ = called(capsys, "study", study_file, "--out", out)
    assert code == 1
    assert said.count("finished before") == 6
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    for name in ("study.csv", "sites.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_folder_of_something_else_is_refused(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("")
    code, _, errors = called(capsys, "study", study_file, "--out", tmp_path)
    assert code == 2
    assert "not a study of ours" in errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_it_leaves_no_process_and_goes_on_to_the_same_table(
    whole: Path, study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "consilium", "study", str(study_file), "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    assert _until(lambda: list(out.glob("cells/*/cell.json"))), "no cell came to an end"
    assert _until(lambda: len(psutil.Process(process.pid).children(recursive=True)) > 3)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    assert process.wait(60) == (130 if number == signal.SIGINT else -number)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    if number == signal.SIGKILL:
        return
    done = len(list(out.glob("cells/*/cell.json")))
    code, said, _ = called(capsys, "study", study_file, "--out", out)
    assert code == 1
    assert 1 <= said.count("finished before") <= done
    assert (out / "study.csv").read_bytes() == (whole / "study.csv").read_bytes()


def _until(wanted: Any, seconds: float = 240.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if wanted():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path) -> Iterator[None]:
    """Nothing is written beside the tests."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield
    os.chdir(before)
