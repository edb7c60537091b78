"""model_card.md: every figure in it is the run's, what the run does not tell is said not to be told."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from consilium.cli import main
from server.card import model_card, write_card
from server.markdown import plain
from server.record import value_of
from server.store import read_events, write_json
from shared.config import Job
from simulations.simulate import run
from tests.conftest import make_tiny_job, write_site


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three sites beside its store."""
    folder = tmp_path_factory.mktemp("first")
    for name, images in {"a": 24, "b": 32, "c": 40}.items():
        write_site(folder / "data" / name, name, images)
    run(make_tiny_job(), folder / "data", folder / "run", workers=1)
    return folder / "run"


@pytest.fixture
def finished(first: Path, tmp_path: Path) -> Path:
    """A run that was handed on: its folder, away from the store, so that the tests can change its journal."""
    shutil.copytree(first, tmp_path / "run")
    return tmp_path / "run"


def rows(card: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = re.split(r"^## ", card, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading)]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def edit(folder: Path, kind: str, change: Any) -> None:
    """Change the events of one kind in the run's journal, and take result.json away, which is made of them."""
    events = read_events(folder)
    (folder / "rounds.jsonl").write_text("")
    (folder / "result.json").unlink(missing_ok=True)
    with (folder / "rounds.jsonl").open("a") as file:
        for event in events:
            if event["event"] == kind:
                change(event)
            file.write(json.dumps(event) + "\n")


def test_a_run_ends_with_a_card_beside_its_report(finished: Path, first: Path) -> None:
    card = (finished / "model_card.md").read_text()
    assert card == model_card(finished) == model_card(first), "journal and store say the same"
    assert (finished / "report.html").is_file()
    headings = re.findall(r"^## (.*)$", card, re.MULTILINE)
    assert headings == ["Model details", "Intended use", "Training data", "Training procedure", "Evaluation", "Privacy",
                        "Limits", "Hashes and versions"]  # fmt: skip


def test_the_figures_are_those_of_result_json(finished: Path) -> None:
    own = json.loads((finished / "result.json").read_text())["federated"]
    card = model_card(finished)
    found = {row[0]: row[1:] for row in rows(card, "Evaluation")}
    names = ["auroc", *(name for name in own["n"] if name != "auroc" and ":" not in name)]
    for place, scores in {"All sites": own, **own["sites"]}.items():
        assert found[place] == [f"{scores['images']:,}", *(value_of(scores, name) for name in names)]
    auroc, (low, high) = own["auroc"], own["intervals"]["auroc"]
    shown = [f"{value:.3f}".removeprefix("0") for value in (auroc, low, high)]
    assert found["All sites"][1] == f"{shown[0]} [{shown[1]}, {shown[2]}]"
    details = dict(rows(card, "Model details"))
    assert details["Round kept"] == str(own["best_round"])
    assert f"{own['gradient_steps']:,} gradient steps" in card


def test_calibration_is_that_of_result_json(finished: Path) -> None:
    own = json.loads((finished / "result.json").read_text())["federated"]["calibration"]
    card = model_card(finished)
    assert own
    for name, row in own.items():
        shown = [[f"{value:.3f}".removeprefix("0") for value in row[key]] for key in ("calibration_error", "brier")]
        words = [f"{value} [{low}, {high}]" for value, low, high in shown]
        assert f"| {name} | {words[0]} | {words[1]} | {row['n']} |" in card


def test_the_data_are_what_the_sites_told(finished: Path) -> None:
    survey = next(event for event in read_events(finished) if event["event"] == "survey")
    found = {row[0]: row[1:] for row in rows(model_card(finished), "Training data")}
    for site in survey["sites"]:
        cases = [str(site["images"][split]) for split in ("train", "val", "test")]
        assert found[site["name"]] == [*cases, *map(str, site["classes"]), str(site["skipped"]), "yes"]


def test_a_site_that_keeps_its_classes_back_has_none_in_the_card(finished: Path) -> None:
    def keep(event: dict[str, Any]) -> None:
        event["sites"][0]["classes"] = [0, 0]
        event["sites"][0]["images"]["train"] = 1000

    edit(finished, "survey", keep)
    found = {row[0]: row[1:] for row in rows(model_card(finished), "Training data")}
    assert found["a"][0] == "1,000"
    assert found["a"][3:5] == ["not told", "not told"]


def test_hashes_are_those_of_the_files(finished: Path) -> None:
    found = {row[0].split(" ")[0]: row[1].strip("`") for row in rows(model_card(finished), "Hashes and versions")}
    for name in ("model.safetensors", "last.safetensors"):
        assert found[name] == hashlib.sha256((finished / name).read_bytes()).hexdigest()
    assert found["Job"] == json.loads((finished / "result.json").read_text())["job_sha256"]


def test_its_head_is_yaml_that_hugging_face_knows(finished: Path) -> None:
    head = yaml.safe_load(model_card(finished).split("---")[1])
    assert head["pipeline_tag"] == "image-classification"
    assert {"federated-learning", "medical-imaging"} <= set(head["tags"])
    assert head["metrics"][0] == "auroc"
    assert "license" not in head, "no run tells it"


# --- privacy ----------------------------------------------------------------------------------------------------------


def test_without_privacy_the_card_says_so(finished: Path) -> None:
    card = model_card(finished)
    assert "No differential privacy: nothing bounds" in card
    assert "No secure aggregation: the server saw each site's model." in card
    assert "no site has given figures for this card" in card


def test_what_was_spent_is_what_the_sites_ledgers_said(finished: Path, tiny_job: Job) -> None:
    job = tiny_job.replace(privacy__dp="local", privacy__noise_multiplier=1.0, train__class_weights="none")
    (finished / "job.toml").write_text(job.toml())

    def spend(event: dict[str, Any]) -> None:
        for number, row in enumerate(event["trained"]):
            row["epsilon"] = 0.5 * event["round"] + number

    edit(finished, "round", spend)
    card = model_card(finished)
    assert "epsilon 3.5 at delta 1e-05 for each image" in card
    assert "- b: epsilon 2.5 at delta 1e-05." in card
    assert yaml.safe_load(card.split("---")[1])["tags"][-1] == "differential-privacy"


def audit(folder: Path, **more: Any) -> None:
    digest = json.loads((folder / "result.json").read_text())["job_sha256"]
    row = {"attack": "loss threshold", "model": "the run's", "auc": {"value": 0.61}}
    row |= {"tpr_at_1_percent_fpr": {"value": 0.034, "low": 0.01, "high": 0.08}}
    facts = {"site": "a", "job_sha256": digest, "round": 3, "membership": [row], "inversion": []}
    write_json(folder / "audit-a.json", facts | more)


def test_an_audit_that_its_site_lets_out_is_told(finished: Path) -> None:
    audit(finished)
    found = rows(model_card(finished), "Privacy")
    assert found == [["loss threshold", "the run's", ".610", ".034 [.010, .080]"]]


@pytest.mark.parametrize("more", [{"job_sha256": "0" * 64}, {"membership": [{"attack": "x"}]}, {"membership": 3}])
def test_an_audit_of_another_job_or_a_damaged_one_is_left_out(more: dict[str, Any], finished: Path) -> None:
    audit(finished, **more)
    card = model_card(finished)
    assert ".034" not in card
    assert "its figures are left out" in card


# --- what is not there ------------------------------------------------------------------------------------------------


def test_a_run_that_broke_off_is_said_to_have(finished: Path) -> None:
    log = finished / "rounds.jsonl"
    kept = [
        line for line in log.read_text().splitlines(keepends=True) if '"finish"' not in line and '"test"' not in line
    ]
    log.write_text("".join(kept))
    (finished / "result.json").unlink()
    card = model_card(finished)
    assert "The run has not come to its end." in card
    assert "There is no test figure" in card
    assert "- Untested." in card
    assert "metrics:" not in card.split("---")[1]


def test_a_folder_with_nothing_but_its_job_gives_a_card_that_says_so(tmp_path: Path, tiny_job: Job) -> None:
    (tmp_path / "job.toml").write_text(tiny_job.toml())
    card = model_card(tmp_path)
    assert "No site has trained it." in card
    assert "No site has named its data." in card
    assert "The run's journal is not there." in card


def test_warnings_and_lost_replies_are_limits(finished: Path) -> None:
    with (finished / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"event": "warning", "time": 1.0, "text": "site c was away"}) + "\n")
    edit(finished, "round", lambda event: event["dropped"].append({"site": "c", "reason": "no-reply"}))
    card = model_card(finished)
    assert "- site c was away" in card
    assert "- c did not count in round 1–3: the site did not answer in time." in card


def test_text_from_files_stays_text(finished: Path, tmp_path: Path, tiny_job: Job) -> None:
    assert plain("a|b\n# <script>[x](y)*") == "a\\|b \\# \\<script\\>\\[x\\](y)\\*"
    name = 'evil: "|\\n# <b>'
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "job.toml").write_text(tiny_job.replace(name=name).toml())
    card = model_card(tmp_path / "copy")
    assert yaml.safe_load(card.split("---")[1])["model_name"] == name
    assert "<b>" not in card.replace("\\<b\\>", "").split("---", 2)[2]


def test_the_path_of_starting_weights_is_not_told(finished: Path, tiny_job: Job) -> None:
    (finished / "job.toml").write_text(tiny_job.replace(model__weights="/home/somebody/start.safetensors").toml())
    card = model_card(finished)
    assert "start.safetensors" in card
    assert "somebody" not in card


# --- the command ------------------------------------------------------------------------------------------------------


def called(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["consilium", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
    return code, *capsys.readouterr()


def test_the_command_writes_it(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "model_card.md").unlink()
    code, said, _ = called(capsys, "card", finished)
    assert code == 0
    assert said.strip() == str(finished / "model_card.md")
    assert write_card(finished).read_text() == model_card(finished)
    code, said, _ = called(capsys, "card", finished, "--out", tmp_path / "other.md")
    assert (tmp_path / "other.md").read_text() == model_card(finished)
    code, _, errors = called(capsys, "card", tmp_path / "data")
    assert (code, errors.count("\n")) == (2, 1)
