"""`consilium survey` on sites of different rules: real worker processes, the real client."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from consilium.cli import commands
from shared.config import Job


def survey(job: Job, data: Path, *more: str) -> Result:
    file = data.parent / "job.toml"
    file.write_text(job.toml())
    return CliRunner(env={"COLUMNS": "120"}).invoke(commands, ["survey", str(file), "--data", str(data), *more])


def test_sites_that_answer_are_shown_and_others_are_named(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    with (three_sites / "b" / "site.toml").open("a") as file:
        file.write("[privacy]\nrequire_dp = true\nmax_epsilon = 8.0\n")
    with (three_sites / "c" / "site.toml").open("a") as file:
        file.write("[privacy]\nmin_cell = 6\n")
    done = survey(tiny_job, three_sites, "--out", str(tmp_path / "s.json"))
    assert done.exit_code == 0, done.output
    assert "no answer from b: the site asks for differential privacy" in done.output
    assert "(site-declined: dp-required)" in done.output
    rows = [line.split() for line in done.output.splitlines()]
    assert ["a", "train", "12", "10–19", "6", "6"] in [row[:6] for row in rows]
    written = json.loads((tmp_path / "s.json").read_text())
    assert list(written["sites"]) == ["a", "c"]
    assert written["dropped"] == [{"site": "b", "reason": "site-declined: dp-required"}]
    assert written["together"]["images-train"] == 12 + 20
    assert written["together"]["classes-val"] == [3, 3]  # those of a; c has 5 and 5
    assert written["job_sha256"] == tiny_job.sha256


def test_nothing_is_left_behind_in_the_folder_of_the_sites_but_their_caches(three_sites: Path, tiny_job: Job) -> None:
    before = {path for path in three_sites.rglob("*") if ".consilium" not in path.parts}
    assert survey(tiny_job, three_sites).exit_code == 0
    assert {path for path in three_sites.rglob("*") if ".consilium" not in path.parts} == before


def test_if_no_site_answers_the_exit_code_is_1(three_sites: Path, tiny_job: Job) -> None:
    for name in "abc":
        with (three_sites / name / "site.toml").open("a") as file:
            file.write("[privacy]\nmin_patients = 1000\n")
    done = survey(tiny_job, three_sites)
    assert done.exit_code == 1
    assert done.output.count("too-few-patients") == 3


def test_a_setting_can_be_overridden(three_sites: Path, tiny_job: Job) -> None:
    done = survey(tiny_job, three_sites, "--set", "data.classes=right,left")
    assert done.exit_code == 0
    assert done.output.index("right") < done.output.index("left")
