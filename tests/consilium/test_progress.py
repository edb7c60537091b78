"""The progress display, on a terminal and in a log."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

import consilium
from consilium.progress import showing
from shared.config import Job

EVENTS = [
    {
        "event": "survey",
        "sites": [{"name": "a", "images": {"train": 5, "val": 2, "test": 3}, "skipped": 1}],
        "dropped": [{"site": "b", "reason": "site-declined: no-data"}],
    },
    {
        "event": "round",
        "round": 3,
        "trained": [{"site": "a", "steps": 7}],
        "dropped": [{"site": "c", "reason": "no-reply"}],
    },
    {"event": "evaluation", "round": 3, "split": "val", "metrics": {"auroc": {"value": 0.875, "n": 9}}, "dropped": []},
    {"event": "warning", "text": "something to know"},
]


def shown(job: Job, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, no_color=True)
    with showing(job, console=console) as observe:
        assert observe is not None
        for event in EVENTS:
            observe("federated", event)
    return text.getvalue()


def test_a_log_gets_plain_lines_with_every_remark_and_the_metric(tiny_job: Job) -> None:
    lines = shown(tiny_job, terminal=False).splitlines()
    assert "\x1b" not in "".join(lines)
    assert "a: 5 training, 2 validation, 3 test images, 1 unreadable" in lines
    assert "federated: survey 0: b not used: site-declined: no-data" in lines
    assert "federated: round 3: c not used: no-reply" in lines
    assert any(
        "round 3/3" in line and "7 steps" in line and "1/2 sites" in line and "auroc 0.875" in line for line in lines
    )
    assert "federated: something to know" in lines


def test_a_terminal_gets_a_bar_with_rounds_steps_and_metric(tiny_job: Job) -> None:
    text = shown(tiny_job, terminal=True)
    for word in ("3/3", "7 steps", "1/2 sites", "auroc 0.875", "c not used: no-reply"):
        assert word in text, word


def test_run_and_its_tables_are_at_the_top_of_the_package(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    result = consilium.run(tiny_job, three_sites, tmp_path / "o", progress=False)
    table = result.table()
    assert list(table.columns) == ["model", "tested on", "metric", "value", "low", "high", "n"]  # type: ignore[union-attr]
    assert set(table["tested on"]) == {"all sites", "a", "b", "c"}  # type: ignore[call-overload]
    assert "participation" in result.figures()
    assert consilium.load_job(tmp_path / "o" / "job.toml").sha256 == tiny_job.sha256
