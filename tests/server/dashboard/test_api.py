"""The numbers behind the pages are those of result.json; pages of a size; files by name of a run only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.dashboard.app import create_app
from server.dashboard.guard import Access
from server.store import Store, read_events

from .conftest import SIGNED_IN, TOKEN, make_job


def scores_of(figures: dict[str, Any], images: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: row["value"] for name, row in figures.items()}
    found |= {"images": images, "n": {name: row["n"] for name, row in figures.items()}}
    return found | {"intervals": {name: [row["low"], row["high"]] for name, row in figures.items()}}


def test_the_test_figures_are_those_of_result_json(
    signed_in: TestClient, ids: dict[str, int], runs_folder: Path
) -> None:
    for name, id in ids.items():
        result = json.loads((runs_folder / name / "result.json").read_text())["federated"]
        shown = signed_in.get(f"/api/runs/{id}/test").json()
        sites = {site: scores_of(row["metrics"], row["images"]) for site, row in shown["sites"].items()}
        assert sites == result["sites"]
        whole = scores_of(shown["metrics"], shown["images"])
        assert whole == {key: result[key] for key in whole}
        assert shown["round"] == result["best_round"]
        row = next(row for row in signed_in.get("/api/runs").json()["runs"] if row["id"] == id)
        assert row["test_value"] == result[row["metric"]]
        assert [row["test_low"], row["test_high"]] == result["intervals"][row["metric"]]


def test_the_course_is_that_of_the_journal(signed_in: TestClient, ids: dict[str, int], runs_folder: Path) -> None:
    events = read_events(runs_folder / "first")
    by_round = [e for e in events if e["event"] == "evaluation" and e["split"] == "val"]
    shown = signed_in.get(f"/api/runs/{ids['first']}/course", params={"metric": "accuracy"}).json()
    assert shown["val"] == [{"round": e["round"], **e["metrics"]["accuracy"]} for e in by_round]
    local = signed_in.get(f"/api/runs/{ids['first']}/sites", params={"metric": "accuracy"}).json()
    for name, points in local["sites"].items():
        assert [p[:2] for p in points] == [[e["round"], e["sites"][name]["accuracy"]["value"]] for e in by_round]


def test_worst_site_and_spread_are_those_of_result_json(
    signed_in: TestClient, ids: dict[str, int], runs_folder: Path
) -> None:
    result = json.loads((runs_folder / "first" / "result.json").read_text())["federated"]
    sites = {name: row["loss"] for name, row in result["sites"].items()}
    fair = signed_in.get(f"/api/runs/{ids['first']}/sites", params={"metric": "loss"}).json()["fairness"]
    assert fair["split"] == "test"
    assert fair["worst"]["site"] == max(sites, key=lambda name: sites[name])  # of the loss, more is worse
    assert fair["spread"] == pytest.approx(max(sites.values()) - min(sites.values()))


def test_of_whom_the_figures_are_is_told(
    signed_in: TestClient, ids: dict[str, int], runs_folder: Path, tmp_path: Path
) -> None:
    from server.dashboard import views
    from server.database import read
    from server.database.engine import open_database

    assert signed_in.get(f"/api/runs/{ids['first']}").json()["whose"] == {"val": "all sites", "test": "all sites"}
    copy = tmp_path / "consilium.sqlite"
    from_, to = sqlite3.connect(runs_folder / "consilium.sqlite"), sqlite3.connect(copy)
    with contextlib.closing(from_) as whole, contextlib.closing(to) as other:
        whole.backup(other)
        every = "UPDATE evaluation SET place = 'dropped', reason = 'site-declined: small-cell' WHERE place = 'site' "
        other.execute(every + "AND site != 'hill' AND event IN (SELECT id FROM event WHERE split = 'val')")
        other.commit()
    db = open_database(copy)
    row = read.run(db, ids["first"])
    images = read.evaluations(db, ids["first"], "val")[-1]["images"]
    assert views.whose(db, row) == {"val": f"1 of 3 sites (hill, {images} images)", "test": "all sites"}


def test_a_path_that_is_none_is_json_for_programs(signed_in: TestClient) -> None:
    answer = signed_in.get("/nothing")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    page = {"Accept": "text/html,*/*"}
    shown = signed_in.get("/nothing", headers=page)
    assert (shown.status_code, shown.headers["content-type"].partition(";")[0]) == (404, "text/html")
    assert "is not in the store" in signed_in.get("/api/runs/999", headers=page).json()["detail"]


def test_one_thing_is_counted_under_one_name(tmp_path: Path) -> None:
    """Table, page and cards agree on training replies not used, evaluations without figures, and warnings."""
    store = Store(tmp_path / "run")
    (tmp_path / "run" / "job.toml").write_text(make_job().toml())
    no, images = [{"site": "a", "reason": "no-reply"}], {"train": 8, "val": 4, "test": 4}
    sites = [{"node": 1, "name": name, "images": images, "classes": [4, 4], "skipped": 0} for name in "ab"]
    store.add("start", job="0" * 64, name="x", rounds=3, version="1")
    store.add("survey", sites=sites, dropped=[{"site": "late", "reason": "no-reply"}])
    for number in (1, 2, 3):
        store.add("round", round=number, trained=[], dropped=no if number == 2 else [], seconds=1.0)
        lost = [{"site": name, "reason": "site-declined: small-cell"} for name in "ab"]
        store.add("evaluation", round=number, split="val", metrics={}, images=0, sites={}, site_images={}, dropped=lost)
    store.add("warning", text="careful")
    app = create_app(tmp_path / "consilium.sqlite", Access(TOKEN))
    with TestClient(app, base_url="http://127.0.0.1:8600", headers=SIGNED_IN) as client:
        (row,) = client.get("/api/runs", params={"sort": "-lost_evaluations"}).json()["runs"]
        told = client.get(f"/api/runs/{row['id']}/warnings").json()
        cards = [card for card in client.get("/api/federation").json()["sites"] if card["name"] in "ab"]
    times = {step: sum(len(one["rounds"]) for one in told if one.get("step") == step) for step in ("round", "val")}
    assert row["lost_training"] == times["round"] == sum(card["dropped"] for card in cards) == 1
    assert row["lost_evaluations"] == times["val"] == sum(card["lost_evaluations"] for card in cards) == 6
    assert row["warnings"] == len([one for one in told if one["kind"] != "refused"]) == 1


def test_privacy_is_that_of_result_json(signed_in: TestClient, ids: dict[str, int], runs_folder: Path) -> None:
    result = json.loads((runs_folder / "second" / "result.json").read_text())["federated"]["privacy"]
    shown = signed_in.get(f"/api/runs/{ids['second']}/privacy").json()
    assert shown["spent"] == result
    assert shown["allowed"] == 50.0
    assert {name: rows[-1][1] for name, rows in shown["course"].items()} == result["sites"]
    cards = {row["name"]: row for row in signed_in.get("/api/federation").json()["sites"]}
    assert {name: row["epsilon"] for name, row in cards.items()} == result["sites"]
    assert {row["allowed"] for row in cards.values()} == {50.0}


def test_a_site_has_its_cases_of_each_class(signed_in: TestClient) -> None:
    cards = {row["name"]: row for row in signed_in.get("/api/federation").json()["sites"]}
    assert set(cards) == {"north", "hill", "river"}
    assert cards["hill"]["classes"] == [{"name": "left", "images": 8}, {"name": "right", "images": 8}]
    assert cards["hill"]["runs"] == 2


def test_the_cards_follow_the_store(signed_in: TestClient, store: Path, tmp_path: Path) -> None:
    from server.dashboard.views import Sites
    from server.database.engine import open_database
    from server.database.write import forget

    copy = tmp_path / "consilium.sqlite"
    with contextlib.closing(sqlite3.connect(store)) as whole, contextlib.closing(sqlite3.connect(copy)) as other:
        whole.backup(other)
    db = open_database(copy)
    sites = Sites(db)
    before = sites.rows()
    assert sites.rows() is before  # nothing new: not asked again
    forget(db, next(iter({row["last_run"] for row in before})))
    assert {row["runs"] for row in sites.rows()} == {1}


def test_the_grid_has_each_round_and_no_more_than_a_window(signed_in: TestClient, ids: dict[str, int]) -> None:
    url = f"/api/runs/{ids['first']}/grid"
    whole = signed_in.get(url).json()
    assert whole["sites"] == ["hill", "north", "river"]
    assert whole["rounds"] == [1, 2, 3, 4]
    assert all(cell[0] == -1 for row in whole["cells"] for cell in row)
    assert signed_in.get(url, params={"first": 2, "last": 3}).json()["rounds"] == [2, 3]
    wide = signed_in.get(url, params={"first": 1, "last": 10**6}).json()
    assert wide["last"] - wide["first"] + 1 == 200


def test_runs_are_sorted_filtered_and_paged(signed_in: TestClient) -> None:
    def names(**query: object) -> list[str]:
        return [row["path"] for row in signed_in.get("/api/runs", params=query).json()["runs"]]

    assert names() == ["second", "first"]
    assert names(sort="started") == ["first", "second"]
    assert names(search="PRIV") == ["second"]
    assert names(status="failed") == []
    assert names(limit=1, offset=1) == ["first"]
    for query in ({"limit": 201}, {"limit": 0}, {"offset": -1}, {"sort": "settings"}, {"search": "x" * 101}):
        assert signed_in.get("/api/runs", params=query).status_code == 422


def test_every_column_of_the_page_can_be_sorted_by(signed_in: TestClient, root: Path) -> None:
    """And whatever its cells show of a run is told."""
    script = (root / "server" / "dashboard" / "static" / "runs.js").read_text()
    columns = re.findall(r"\['[^']+', '(\w+)'\]", script.partition("const COLUMNS = [")[2].partition("];")[0])
    assert len(columns) >= 13
    for name in [*columns, "version", "attempts"]:  # the two that docs/extending.md names
        for sort in (name, f"-{name}"):
            answer = signed_in.get("/api/runs", params={"sort": sort})
            assert answer.status_code == 200, f"{sort}: {answer.text}"
    shown = re.findall(r"\brun\.(\w+)", script.partition("function row(")[2].partition("\n}\n")[0])
    assert "seed" in shown
    for row in signed_in.get("/api/runs").json()["runs"]:
        assert {*columns, *shown, "version", "attempts"} - set(row) == set()
        assert row["seed"] == 0


def test_baselines_are_named_with_their_run(signed_in: TestClient, ids: dict[str, int], runs_folder: Path) -> None:
    result = json.loads((runs_folder / "first" / "result.json").read_text())
    found = signed_in.get(f"/api/runs/{ids['first']}").json()
    pooled = next(row for row in found["children"] if row["kind"] == "pooled")
    assert pooled["test_value"] == result["pooled"][found["run"]["metric"]]
    assert sum(row["kind"] == "local" for row in found["children"]) == len(result["local"]) == 3


@pytest.mark.parametrize(("which", "file"), [("best", "model.safetensors"), ("last", "last.safetensors")])
def test_a_model_is_given_out_with_its_hash(
    signed_in: TestClient, ids: dict[str, int], runs_folder: Path, which: str, file: str
) -> None:
    content = (runs_folder / "first" / file).read_bytes()
    told = signed_in.get(f"/api/runs/{ids['first']}/model").json()["models"][which]
    assert told["sha256"] == hashlib.sha256(content).hexdigest()
    assert not told["damaged"]
    answer = signed_in.get(f"/api/runs/{ids['first']}/model/{which}/file")
    assert answer.content == content
    assert "attachment" in answer.headers["content-disposition"]


def test_a_model_card_brings_no_markup_along(signed_in: TestClient, ids: dict[str, int], runs_folder: Path) -> None:
    card = signed_in.get(f"/api/runs/{ids['first']}/model").json()["card"]
    assert "<h1>Card of <em>tiny</em></h1>" in card
    assert "<td>2</td>" in card
    assert "<script" not in card
    assert 'href="javascript' not in card
    own = signed_in.get(f"/api/runs/{ids['second']}/model").json()["card"]
    assert "<h1>" in own
    assert "library_name" not in own  # the lines that catalogues read
    (runs_folder / "second" / "model_card.md").unlink()
    assert signed_in.get(f"/api/runs/{ids['second']}/model").json()["card"] is None


def test_a_run_that_is_not_there_is_404(signed_in: TestClient) -> None:
    for path in (
        "",
        "/course",
        "/test",
        "/sites",
        "/grid",
        "/rounds",
        "/privacy",
        "/warnings",
        "/model",
        "/model/best/file",
    ):
        assert signed_in.get(f"/api/runs/999{path}").status_code == 404


def test_plotly_comes_from_the_installed_package_and_nothing_from_elsewhere(signed_in: TestClient) -> None:
    from plotly.offline import get_plotlyjs

    assert signed_in.get("/static/plotly.js").text == get_plotlyjs()
    page = signed_in.get("/").text
    assert "http://" not in page
    assert "https://" not in page
