"""One simulated run with groups of patients and every model at every site: each figure against the pooled predictions,
and the same wherever it is shown."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, roc_auc_score

from server.dashboard.app import create_app
from server.dashboard.guard import Access
from server.record import read_record, value_of
from server.report_fair import NAMES, estimate
from server.store import read_events
from server.timing import PARTS
from shared.config import Job, job_from_flat
from shared.imaging.dataset import load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import load_task
from shared.weights import put
from simulations.simulate import run
from tests.conftest import write_site

ALLOWED = {"a": "all", "b": "sex", "c": ""}
TOKEN = "0123456789abcdef0123456789abcdef"
Cases = dict[str, dict[str, Any]]  # by site and path


@pytest.fixture(scope="module")
def job() -> Job:
    small = {"name": "fair", "data.classes": "left,right", "data.size": 16, "model.width": 4, "train.batch_size": 8}
    return job_from_flat(
        small | {"federation.rounds": 2, "evaluation.every": 1, "evaluation.subgroups": "sex, age=40|65"}
    )


@pytest.fixture(scope="module")
def folder(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("fair")
    for name, images in {"a": 160, "b": 120, "c": 80}.items():
        site = write_site(top / "data" / name, name, images)
        rows = list(csv.reader((site.parent / "labels.csv").open()))
        for number, row in enumerate(rows):
            row += ["sex", "age"] if not number else ["FM"[number // 8 % 2], str(20 + number * 7 % 60)]
        csv.writer((site.parent / "labels.csv").open("w", newline="")).writerows(rows)
        site.write_text(site.read_text() + f'[privacy]\nsubgroups = "{ALLOWED[name]}"\n')
    run(job, top / "data", top / "runs" / "run", workers=2, cross_site=True)
    return top / "runs" / "run"


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


@pytest.fixture(scope="module")
def cases(folder: Path, job: Job) -> dict[str, list[dict[str, Any]]]:
    """What the kept model says of every image of every site, one by one, with the table's row."""
    task, found = load_task(job.task), {}
    model = task.build_model(job)
    put(model, load_file(folder / "model.safetensors"), job)
    for name in ALLOWED:
        site = read_site(folder.parents[1] / "data" / name / "site.toml")
        data = load_dataset(read_samples(site, job), site, job)
        table = {row["path"]: row for row in csv.DictReader((site.root / "labels.csv").open())}
        said = task.predict(model, data, job, torch.device("cpu"))
        found[name] = [
            {**table[sample.path], "truth": sample.target[0], "p": one.probabilities[1], "split": sample.split}
            for sample, one in zip(data.samples, said, strict=True)
        ]
    return found


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    app = create_app(folder.parent / "consilium.sqlite", Access(TOKEN))
    with TestClient(app, base_url="http://127.0.0.1:8600", headers={"Authorization": f"Bearer {TOKEN}"}) as found:
        yield found


@pytest.fixture(scope="module")
def api(client: TestClient) -> str:
    return f"/api/runs/{client.get('/api/runs').json()['runs'][0]['id']}"


def of_group(cases: dict[str, list[dict[str, Any]]], name: str, sites: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and truth of the test images of a group at some sites."""
    dimension, _, label = name.partition("=")
    rows = [row for site in sites for row in cases[site] if row["split"] == "test"]
    bands = {"<40": (0, 40), "40-64": (40, 65), ">=65": (65, 200)}
    if dimension == "age":
        low, high = bands[label]
        rows = [row for row in rows if low <= int(row["age"]) < high]
    else:
        rows = [row for row in rows if row["sex"] == label]
    return np.array([row["p"] for row in rows]), np.array([row["truth"] for row in rows])


def test_groups_agree_with_scikit_learn_on_the_pooled_predictions(
    result: dict[str, Any], cases: dict[str, list[dict[str, Any]]]
) -> None:
    own = result["federated"]
    at = own["operating_point"]["classes"]["right"]["threshold"]
    assert own["subgroups"]["silent"] == ["c"]
    groups = own["subgroups"]["groups"]
    assert {"sex=F", "sex=M"} <= set(groups)
    assert any(name.startswith("age") for name in groups)
    for name, row in groups.items():
        assert row["told_by"] == (["a", "b"] if name.startswith("sex") else ["a"])
        p, truth = of_group(cases, name, row["told_by"])
        assert row["images"] == len(p)
        assert row["auroc"] == pytest.approx(roc_auc_score(truth, p), abs=1e-3)
        assert row["accuracy"] == pytest.approx(accuracy_score(truth, p > 0.5))
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, p > 0.5))
        point = row["operating_point"]["right"]
        assert point["sensitivity"]["value"] == pytest.approx(recall_score(truth, p >= at))
        assert point["specificity"]["value"] == pytest.approx(recall_score(1 - truth, p < at))


def test_the_operating_point_is_the_validations_and_its_figures_are_the_tests(
    result: dict[str, Any], cases: dict[str, list[dict[str, Any]]]
) -> None:
    point = result["federated"]["operating_point"]["classes"]["right"]
    rows = [row for own in cases.values() for row in own]
    for split, told in (("val", point["validation"]), ("test", point["test"])):
        truth = np.array([row["truth"] for row in rows if row["split"] == split])
        said = np.array([row["p"] for row in rows if row["split"] == split]) >= point["threshold"]
        assert told["sensitivity"]["value"] == pytest.approx(recall_score(truth, said))
        assert told["specificity"]["value"] == pytest.approx(recall_score(1 - truth, ~said))
        assert told["prevalence"]["n"] == len(truth)
    assert set(point["sites"]) == set(ALLOWED)


def test_result_report_card_and_pages_say_the_same(
    folder: Path, result: dict[str, Any], client: TestClient, api: str
) -> None:
    own, report = result["federated"], (folder / "report.html").read_text()
    card = (folder / "model_card.md").read_text().replace("\\", "")
    point = own["operating_point"]
    assert client.get(f"{api}/test").json()["operating_point"] == point
    for figure in NAMES:
        words = estimate(point["classes"]["right"]["test"][figure])
        assert words in report
        assert words in card
    shown = client.get(f"{api}/subgroups").json()
    for name, row in own["subgroups"]["groups"].items():
        assert shown["groups"][name]["metrics"]["auroc"]["value"] == row["auroc"]
        assert shown["groups"][name]["images"] == row["images"]
        assert value_of(row, "auroc") in card
        assert value_of(row, "auroc").split()[0] in report
    kept = client.get(f"{api}/model").json()["kept"]
    assert kept["rule"] == own["best"]["rule"]
    assert own["best"]["rule"] in card
    assert own["best"]["round"] == own["best_round"] == kept["round"]


def test_no_group_is_told_by_a_site_that_does_not_name_it(folder: Path) -> None:
    [event] = [event for event in read_events(folder) if event["event"] == "subgroups"]
    for name, row in event["groups"].items():
        assert "c" not in row["sites"]
        assert "b" not in row["sites"] or name.startswith("sex")
        assert all(images >= 5 for images in row["sites"].values())
        assert row["images"] == sum(row["sites"].values())


def test_every_model_is_tested_at_every_site(
    folder: Path, result: dict[str, Any], client: TestClient, api: str
) -> None:
    matrix = result["cross_site"]
    assert list(matrix["models"]) == ["federated", "only a", "only b", "only c"]
    assert "pooled" not in result
    shown = client.get(f"{api}/cross-site").json()["models"]
    for model, row in matrix["models"].items():
        assert list(row) == matrix["sites"] == ["a", "b", "c"]
        own = folder if model == "federated" else folder / "baselines" / f"local-{model.removeprefix('only ')}"
        test = [event for event in read_events(own) if event.get("split") == "test" and event["event"] == "evaluation"]
        for site, figures in row.items():
            found = test[-1]["sites"][site]["auroc"]
            assert figures == [found["value"], found["low"], found["high"], found["n"]]
            assert shown[model][site] == found
    assert "Every model at every site" in (folder / "report.html").read_text()


def test_the_parts_of_a_round_add_up_to_its_seconds(folder: Path, client: TestClient, api: str) -> None:
    rounds = [event for event in read_events(folder) if event["event"] == "round"]
    shown = client.get(f"{api}/rounds").json()["rounds"]
    for event, row in zip(rounds, shown, strict=True):
        assert all(row[part] >= 0 for part in PARTS)
        assert sum(row[part] for part in PARTS) == pytest.approx(event["seconds"], abs=0.02)
        trained = [one["train_seconds"] for one in event["trained"]]
        assert row["train"] == pytest.approx(sum(trained) / len(trained), abs=0.02)
    total = read_record(folder).scores["federated"]["time"]
    for part in PARTS:
        assert total[part] == pytest.approx(sum(row[part] for row in shown), abs=0.01)
