"""The ClientApp on its own: what it answers, what it writes down, and what it keeps to itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import workspace
from client.app import app
from shared.config import Job
from shared.packing import DATA, pack
from shared.sitefile import OWN_FOLDER
from shared.tasks import load_task
from shared.weights import exchanged


@pytest.fixture(autouse=True)
def _sender() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def ask(kind: str, site: Path, job: Job, arrays: dict[str, torch.Tensor] | None = None, **config: object) -> Message:
    context = Context(7, 2, {"site": str(site / "site.toml")}, RecordDict(), dict(job.flat()))
    content = RecordDict({"config": ConfigRecord({"round": 1, **config})})  # type: ignore[arg-type]
    if kind != "query":
        arrays = arrays or exchanged(load_task(job.task).build_model(job), job)
        content["arrays"] = ArrayRecord(arrays)  # type: ignore[arg-type]
    return app(Message(content, 2, kind), context)


def test_the_survey_counts_what_the_table_says(three_sites: Path, tiny_job: Job) -> None:
    lines = (three_sites / "c" / "labels.csv").read_text().splitlines()[1:]
    reply = ask("query", three_sites / "c", tiny_job).content
    for split in ("train", "val", "test"):
        assert reply["metrics"][f"images-{split}"] == sum(line.endswith(f",{split}") for line in lines)
    train = [line for line in lines if line.endswith(",train")]
    assert reply["metrics"]["classes"] == [sum(f",{name}," in line for line in train) for name in ("left", "right")]
    assert dict(reply["status"]) == {"site": "c", "ok": True, "code": "", "version": reply["status"]["version"]}


def test_unreadable_files_are_counted_and_named_in_the_sites_log_only(three_sites: Path, tiny_job: Job) -> None:
    site = three_sites / "c"
    (site / "images" / "5.png").write_bytes(b"Doe^Jane broken")
    reply = ask("query", site, tiny_job)
    assert reply.content["metrics"]["skipped"] == 1
    assert "5.png" in (site / "site.log").read_text()
    assert "5.png" not in str(reply.content)
    assert (site / "site.log").read_text().count("5.png") == 1


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_site_that_cannot_take_part_sends_a_code_and_keeps_the_text(
    kind: str, three_sites: Path, tiny_job: Job
) -> None:
    site = three_sites / "a"
    table = site / "labels.csv"
    table.write_text(table.read_text().replace(",left,", ",Doe^Jane,", 1))
    reply = ask(kind, site, tiny_job, split="test")
    assert set(reply.content) == {"status"}
    assert (reply.content["status"]["ok"], reply.content["status"]["code"]) == (False, "unknown-label")
    assert reply.content["status"]["site"] == "a"
    assert "Doe^Jane" not in str(reply.content)
    assert "Doe^Jane" in (site / "site.log").read_text()


def test_a_site_without_its_file_still_answers(tmp_path: Path, tiny_job: Job) -> None:
    reply = ask("query", tmp_path, tiny_job)
    assert reply.content["status"]["code"] == "bad-configuration"


def test_weights_of_another_model_are_an_internal_error_with_the_text_in_the_log(
    three_sites: Path, tiny_job: Job
) -> None:
    reply = ask("evaluate", three_sites / "a", tiny_job, {"w": torch.zeros(2)}, split="test")
    assert reply.content["status"]["code"] == "internal-error"
    assert "exchanged names differ" in (three_sites / "a" / "site.log").read_text()


def test_a_model_that_is_not_packed_as_it_says_is_declined_and_the_refusal_written_down(
    three_sites: Path, tiny_job: Job
) -> None:
    site = three_sites / "a"
    arrays = ArrayRecord(exchanged(load_task(tiny_job.task).build_model(tiny_job), tiny_job))  # type: ignore[arg-type]
    content = pack(RecordDict({"arrays": arrays, "config": ConfigRecord({"round": 1, "class-weights": [1.0, 1.0]})}))
    content["arrays"][DATA].data = content["arrays"][DATA].data[:-1]
    context = Context(7, 2, {"site": str(site / "site.toml")}, RecordDict(), dict(tiny_job.flat()))
    reply = app(Message(content, 2, "train"), context)
    assert set(reply.content) == {"status"}
    assert reply.content["status"]["code"] == "bad-configuration"
    assert "the message is not in order: an array's bytes are not there" in (site / "site.log").read_text()
    lines = [json.loads(line) for line in (site / OWN_FOLDER / "egress.log").read_text().splitlines()]
    assert [line["declined"] for line in lines] == ["bad-configuration"]


def test_groups_of_patients_are_told_of_the_test_images_alone(three_sites: Path, tiny_job: Job) -> None:
    job = tiny_job.replace(evaluation__subgroups="sex")
    reply = ask("evaluate.subgroups", three_sites / "a", job, split="val")
    assert reply.content["status"]["code"] == "split-forbidden"
    assert set(reply.content) == {"status"}


def test_an_unmapped_failure_of_the_code_is_not_shown(
    three_sites: Path, tiny_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("/home/doe/jane.dcm")

    monkeypatch.setattr("client.app.exchanged", explode)
    reply = ask("train", three_sites / "a", tiny_job, **{"class-weights": [1.0, 1.0]})
    assert reply.content["status"]["code"] == "internal-error"
    assert "jane" not in str(reply.content)
    assert "jane.dcm" in (three_sites / "a" / "site.log").read_text()


def test_a_new_run_forgets_the_moments_of_an_earlier_one_and_a_repeated_round_repeats_itself(
    three_sites: Path, tiny_job: Job
) -> None:
    site = three_sites / "a"

    def weights(round_: int) -> torch.Tensor:
        reply = ask("train", site, tiny_job, round=round_, **{"class-weights": [1.0, 1.0]})
        arrays = reply.content.array_records["arrays"].to_torch_state_dict()
        return torch.cat([array.flatten() for array in arrays.values()])

    ask("query", site, tiny_job, round=0)
    first, second = weights(1), weights(2)
    assert torch.equal(weights(2), second)  # a crash between: the round is done again from the same moments
    ask("query", site, tiny_job, round=0)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


def test_after_the_first_round_nothing_is_read_built_or_imported_again(
    three_sites: Path, tiny_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(owner: object, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (calls.append(name), real(*args))[1])

    counted(load_task(tiny_job.task), "build_model")
    counted(workspace, "read_samples")
    counted(workspace, "load_dataset")
    arrays = exchanged(load_task(tiny_job.task).build_model(tiny_job), tiny_job)
    calls.clear()

    def round_(number: int) -> None:
        for kind, more in (("train", {"class-weights": [1.0, 1.0]}), ("evaluate", {"split": "val"})):
            reply = ask(kind, three_sites / "b", tiny_job, arrays, round=number, **more)
            assert reply.content["status"]["ok"] is True

    workspace.open_model.cache_clear()  # of another test with the same job
    round_(1)
    assert sorted(calls) == ["build_model", "load_dataset", "read_samples"]
    modules = set(sys.modules)
    round_(2)
    round_(3)
    assert len(calls) == 3
    assert set(sys.modules) == modules


def test_a_new_run_sees_who_was_taken_out_of_the_table_since_the_last(three_sites: Path, tiny_job: Job) -> None:
    site = three_sites / "c"
    before = ask("query", site, tiny_job).content["metrics"]["images-train"]
    lines = (site / "labels.csv").read_text().splitlines()
    gone = next(line for line in lines if line.endswith(",train"))
    (site / "labels.csv").write_text("\n".join(line for line in lines if line != gone) + "\n")
    (site / gone.split(",")[0]).unlink()
    assert ask("query", site, tiny_job).content["metrics"]["images-train"] == before - 1
    told = ask("train", site, tiny_job, **{"class-weights": [1.0, 1.0]}).content["metrics"]["num-examples"]
    assert told == before - 1
