"""The progress display, on a terminal and in a log."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

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
    assert "federated: survey 0: b not used: site-declined: no-data (the site found no labelled images)" in lines
    assert "federated: round 3: c not used: no-reply (the site did not answer in time)" in lines
    assert any(
        "round 3/3" in line and "7 steps" in line and "1/2 sites" in line and "auroc 0.875" in line for line in lines
    )
    assert "federated: something to know" in lines


def evaluation(split: str, round_: int, value: float | None, *dropped: str) -> dict[str, Any]:
    metrics = {"auroc": {"value": value, "n": 0 if value is None else 9}}
    lost = [{"site": site, "reason": "site-declined: small-cell"} for site in dropped]
    return {"event": "evaluation", "round": round_, "split": split, "metrics": metrics, "dropped": lost}


def lines_of(job: Job, events: list[dict[str, Any]]) -> list[str]:
    text = io.StringIO()
    with showing(job, console=Console(file=text, width=200)) as observe:
        assert observe is not None
        for event in events:
            observe("federated", event)
    return text.getvalue().splitlines()


def test_who_gives_no_figures_is_said_once_for_each_split_and_not_as_if_it_did_not_train(tiny_job: Job) -> None:
    lines = lines_of(
        tiny_job, [evaluation("val", 0, 0.5, "b"), evaluation("val", 3, 0.5, "b"), evaluation("test", 1, 0.5, "b")]
    )
    said = [line for line in lines if " b " in line]
    assert [line.partition(":")[2].partition(":")[0].strip() for line in said] == [
        "b gives no validation figures",
        "b gives no test figures",
    ]
    assert "small-cell" in said[0]
    assert not any("not used" in line for line in lines)


def test_the_test_is_of_the_kept_round_and_a_metric_that_is_missing_shows(tiny_job: Job) -> None:
    trained = {"event": "round", "round": 3, "trained": [{"site": "a", "steps": 7}], "dropped": []}
    lines = lines_of(tiny_job, [trained, evaluation("val", 3, None), evaluation("test", 1, 0.625)])
    assert lines[0].split() == ["federated:", "round", "3/3", "1/1", "sites", "7", "steps", "auroc", "–"]
    assert lines[1] == "federated: kept round 1 of 3: test auroc 0.625"


def test_baselines_are_heard_of_after_the_sites(tiny_job: Job) -> None:
    text = io.StringIO()
    with showing(tiny_job, console=Console(file=text, width=200)) as observe:
        assert observe is not None
        observe("pooled", evaluation("val", 0, 0.5))
        observe("federated", EVENTS[0])
        observe("pooled", evaluation("val", 3, 0.625))
    assert [line.split()[0] for line in text.getvalue().splitlines()] == ["a:", "federated:", "pooled:", "pooled:"]


def test_what_was_before_a_resumption_is_counted_and_not_shown_again(tiny_job: Job) -> None:
    before = {
        "event": "round",
        "round": 1,
        "trained": [{"site": "a", "steps": 7}],
        "dropped": [{"site": "b", "reason": "no-reply"}],
    }
    after = {"event": "round", "round": 3, "trained": [{"site": "a", "steps": 7}], "dropped": []}
    again = {"event": "start", "resumed_after": 1}
    events = [
        before | {"past": True},
        evaluation("val", 1, 0.5) | {"past": True},
        again,
        after,
        evaluation("val", 3, 0.75),
    ]
    assert [line.split() for line in lines_of(tiny_job, events)] == [
        ["federated:", "goes", "on", "after", "round", "1", "of", "3"],
        ["federated:", "round", "3/3", "1/1", "sites", "14", "steps", "auroc", "0.750"],
    ]


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
