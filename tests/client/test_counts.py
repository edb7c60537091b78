"""What a site tells of its counts, and that its rules are applied before anything else: through the ClientApp."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client.app import app
from client.counts import tell
from client.policy import Policy, read_policy
from server.rounds import Run
from server.store import read_events
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset
from shared.tasks import load_task
from shared.weights import exchanged
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.simulate import run as simulate

Counts = dict[str, dict[str, int]]  # by split, of each class
JOB = {"data.classes": "left,right,both", "data.size": 16, "model.width": 4, "train.local_steps": 1}


@pytest.fixture(autouse=True)
def _sender() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def site(folder: Path, counts: Counts, rules: str = "", patients: int = 1000) -> Path:
    """A site with so many images of each class in each split, of at most so many patients."""
    folder.mkdir(parents=True)
    number = 0
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "patient", "split"])
        for split, classes in counts.items():
            for label, count in classes.items():
                for _ in range(count):
                    pixels = np.random.default_rng(number).integers(0, 255, (16, 16)).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")
                    rows.writerow([f"{number}.png", label, f"{split}{number % patients}", split])
                    number += 1
    (folder / "site.toml").write_text(f'name = "{folder.name}"\n[privacy]\n{rules}\n')
    return folder


def ask(kind: str, folder: Path, job: Job, split: str = "test") -> RecordDict:
    context = Context(7, 2, {"site": str(folder / "site.toml")}, RecordDict(), dict(job.flat()))
    config = ConfigRecord({"round": 1, "split": split, "class-weights": [1.0] * len(job.classes)})
    content = RecordDict({"config": config})
    if kind != "query":
        content["arrays"] = ArrayRecord(exchanged(load_task(job.task).build_model(job), job))  # type: ignore[arg-type]
    return app(Message(content, 2, kind), context).content


COUNTS: Counts = {
    "train": {"left": 9, "right": 6, "both": 3},
    "val": {"left": 2, "right": 1},
    "test": {"left": 7, "right": 5},
}


def test_a_small_cell_is_zero_and_does_not_follow_from_what_is_told(tmp_path: Path) -> None:
    job, folder = job_from_flat(JOB), site(tmp_path / "a", COUNTS, "min_cell = 5")
    told = ask("query", folder, job)["metrics"]
    assert told["classes"] == [9, 6, 0]
    assert told["images-train"] == 15  # not 18: the difference would be the cell
    assert (told["images-val"], told["images-test"]) == (0, 12)
    reply = ask("train", folder, job)
    assert reply["metrics"]["num-examples"] == 15
    assert set(reply["metrics"]) == {"num-examples", "steps"}  # images seen, of so few, would be their number


def test_figures_of_a_split_with_a_small_cell_are_declined(tmp_path: Path) -> None:
    job, folder = job_from_flat(JOB), site(tmp_path / "a", COUNTS, "min_cell = 5")
    assert ask("evaluate", folder, job, "test")["status"]["ok"]
    assert ask("evaluate", folder, job, "val")["status"]["code"] == "small-cell"
    (folder / "site.toml").write_text('name = "a"\n[privacy]\nmin_cell = 6\n')
    assert ask("evaluate", folder, job, "test")["status"]["code"] == "small-cell"  # 5 of a class


@pytest.mark.parametrize("split", ["train", "", "all"])
def test_there_are_no_figures_of_images_that_are_trained_on(split: str, tmp_path: Path) -> None:
    assert (
        ask("evaluate", site(tmp_path / "a", COUNTS), job_from_flat(JOB), split)["status"]["code"] == "split-forbidden"
    )


def test_a_declared_number_stands_for_the_training_images(tmp_path: Path) -> None:
    """The same bytes leave whatever is added to the training images: neighbouring data sets look alike."""
    job, rules = job_from_flat(JOB), "exact_counts = false\ndeclared_images = 400"
    more = COUNTS | {"train": {"left": 10, "right": 6, "both": 3}}
    replies = [
        ask("query", site(tmp_path / str(k) / "a", counts, rules), job) for k, counts in enumerate((COUNTS, more))
    ]
    assert replies[0] == replies[1]
    assert replies[0]["metrics"]["images-train"] == 400
    assert replies[0]["metrics"]["classes"] == [0, 0, 0]
    trained = ask("train", tmp_path / "0" / "a", job)["metrics"]
    assert dict(trained) == {"num-examples": 400, "steps": 1}


def test_the_servers_class_weights_come_from_the_sites_that_tell(tmp_path: Path) -> None:
    task, job = load_task("classification"), job_from_flat(JOB)
    tells = ask("query", site(tmp_path / "a", COUNTS), job)["metrics"]["classes"]
    keeps = ask("query", site(tmp_path / "b", COUNTS, "exact_counts = false\ndeclared_images = 9"), job)["metrics"][
        "classes"
    ]
    both = [a + b for a, b in zip(tells, keeps, strict=True)]
    assert task.class_weights(both, job) == task.class_weights(tells, job)
    assert task.class_weights(keeps, job) == [1.0, 1.0, 1.0]


def policy(tmp_path: Path, rules: str) -> Policy:
    file = tmp_path / "site.toml"
    file.write_text(f'name = "a"\n[privacy]\n{rules}\n')
    return read_policy(file)


@settings(max_examples=200, deadline=None)
@given(targets=st.lists(st.integers(0, 3), max_size=30), least=st.integers(1, 8))
def test_what_is_told_adds_up_and_no_small_cell_is_in_it(
    targets: list[int], least: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    job = job_from_flat(JOB | {"data.classes": "a,b,c,d"})
    samples = [Sample(str(k), (target,), str(k), "val") for k, target in enumerate(targets)]
    data = Dataset.of(samples, image=np.zeros((len(samples), 1, 2, 2), np.uint16))
    told = tell(data, job, policy(tmp_path_factory.getbasetemp(), f"min_cell = {least}"))["val"]
    true = [targets.count(k) for k in range(4)]
    kept = [count if count >= least else 0 for count in true]
    assert told.classes == kept
    assert told.images == sum(kept)
    assert told.exact == (kept == true)
    assert told.small == (kept != true)


def test_an_image_with_many_boxes_of_a_class_is_one_image_of_it(tmp_path: Path) -> None:
    job = job_from_flat({"task": "detection", "data.classes": "bright,dark", "data.size": 64})
    box = (10.0, 10.0, 20.0, 20.0)
    boxes = [((0, *box),) if k < 6 else ((0, *box), *((1, *box),) * 4) for k in range(8)]
    samples = [Sample(str(k), (), str(k), "train", boxes=found) for k, found in enumerate(boxes)]
    data = Dataset.of(
        samples,
        image=np.zeros((8, 1, 64, 64), np.uint16),
        shape=np.full((8, 2), 64, np.int64),
        dropped=np.zeros((8, 1), np.int64),
    )
    told = tell(data, job, policy(tmp_path, "min_cell = 3"))["train"]
    assert told.classes == [8, 0]  # eight boxes of the second class, in two images
    assert not told.exact


# ---------------------------------------------------------------------- rules before work

REFUSED: dict[str, str] = {
    "dp-required": "require_dp = true\nmax_epsilon = 8.0",
    "too-few-patients": "min_patients = 12",
    "metric-forbidden": 'metrics = "auroc"',
    "secure-aggregation-required": "require_secure_aggregation = true",
}


@pytest.mark.parametrize("code", REFUSED)
@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_job_that_grants_too_little_is_declined_whatever_is_asked(code: str, kind: str, tmp_path: Path) -> None:
    folder = site(tmp_path / "a", COUNTS, REFUSED[code], patients=10)
    reply = ask(kind, folder, job_from_flat(JOB))
    assert set(reply) == {"status"}
    assert reply["status"]["code"] == code
    decoded = (folder / ".consilium" / "cache").exists()
    assert decoded == (code == "too-few-patients")  # that alone asks for the images


def test_patients_are_counted_not_images(tmp_path: Path) -> None:
    folder = site(tmp_path / "a", COUNTS, "min_patients = 10", patients=10)
    assert ask("query", folder, job_from_flat(JOB))["status"]["ok"]
    (folder / "site.toml").write_text('name = "a"\n[privacy]\nmin_patients = 11\n')
    assert ask("query", folder, job_from_flat(JOB))["status"]["code"] == "too-few-patients"


def test_refusals_are_named_in_the_survey_while_the_others_train_on(tmp_path: Path) -> None:
    job = job_from_flat(JOB | {"federation.rounds": 2, "evaluation.every": 1})
    for code, rules in REFUSED.items():
        site(tmp_path / "data" / code, COUNTS, rules, patients=10)
    site(tmp_path / "data" / "small", COUNTS, "min_cell = 5")
    site(tmp_path / "data" / "open", COUNTS)
    folders = sorted((tmp_path / "data").iterdir())
    nodes = [{"site": str(folder / "site.toml"), "home": str(tmp_path / "homes" / folder.name)} for folder in folders]
    with WorkerPool(app, 2) as pool:
        Run(LocalGrid(pool, nodes, job.flat()), job, tmp_path / "run").run()  # type: ignore[arg-type]
    events = read_events(tmp_path / "run")
    (survey,) = [event for event in events if event["event"] == "survey"]
    assert {item["site"]: item["reason"] for item in survey["dropped"]} == {
        code: f"site-declined: {code}" for code in REFUSED
    }
    assert {place["name"] for place in survey["sites"]} == {"open", "small"}
    rounds = [event for event in events if event["event"] == "round"]
    assert [[row["site"] for row in event["trained"]] for event in rounds] == [["open", "small"]] * 2
    weights = {row["site"]: row["weight"] for row in rounds[0]["trained"]}
    assert weights == {"open": 18, "small": 15}


def test_a_run_of_sites_that_declare_their_numbers_comes_to_its_report(tmp_path: Path) -> None:
    rules = "exact_counts = false\ndeclared_images = 50"
    for name in ("a", "b"):
        site(tmp_path / "data" / name, COUNTS, rules)
    job = job_from_flat(JOB | {"federation.rounds": 1, "evaluation.every": 1})
    result = simulate(job, tmp_path / "data", tmp_path / "run", workers=2)
    assert result.scores["federated"]["images"] == 24
    assert result.scores["federated"]["images_seen"] == 0  # nobody told
    assert "declares its number of training images" in result.report.read_text(encoding="utf-8")


def test_a_node_that_pools_sites_keeps_every_ones_rules(tmp_path: Path) -> None:
    job = job_from_flat(JOB)
    first = site(tmp_path / "a", COUNTS, "min_cell = 5")
    second = site(tmp_path / "b", COUNTS, "exact_counts = false\ndeclared_images = 100")
    node = {"site": f"{first / 'site.toml'}\n{second / 'site.toml'}", "home": str(tmp_path / "home"), "name": "pooled"}
    content = RecordDict({"config": ConfigRecord({"round": 0})})

    def asked() -> RecordDict:
        return app(Message(content, 2, "query"), Context(7, 2, node, RecordDict(), dict(job.flat()))).content  # type: ignore[arg-type]

    told = asked()["metrics"]
    assert told["images-train"] == 18 + 100
    assert told["classes"] == [0, 0, 0]
    (second / "site.toml").write_text('name = "b"\n[privacy]\nrequire_dp = true\nmax_epsilon = 1.0\n')
    assert asked()["status"]["code"] == "dp-required"
