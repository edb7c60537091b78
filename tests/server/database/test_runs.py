"""Real runs in the store: the same numbers everywhere, baselines below their run, moved, copied and resumed runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine, inspect, text

from server.database import query, read
from server.database.engine import STORE, open_database, without_password
from server.database.migrate import migrate
from server.database.mirror import bring_in, open_store, runs_folder
from server.database.schema import VERSION
from server.database.write import follow
from server.record import read_record, value_of
from server.report import write_report
from server.store import Store, read_events
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.tasks import add_sums, load_task
from simulations.simulate import run
from tests.conftest import write_site
from tests.server.database.test_property import followed_at_once, listed_by_settings


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with baselines under local differential privacy."""
    folder = tmp_path_factory.mktemp("simulated")
    for name, images in {"a": 24, "b": 32, "c": 40}.items():
        write_site(folder / "data" / name, name, images)
        with (folder / "data" / name / "site.toml").open("a") as file:
            file.write("\n[privacy]\nmin_patients = 2\n")
    flat = {"name": "told <once>", "data.classes": "left,right", "data.size": 16, "model.width": 4, "seed": 3}
    flat |= {"train.local_steps": 2, "federation.rounds": 4, "evaluation.every": 1, "train.class_weights": "none"}
    flat |= {"privacy.dp": "local", "privacy.noise_multiplier": 1.0, "privacy.sampling_rate": 0.5}
    run(job_from_flat(flat), folder / "data", folder / "out" / "run", baselines=True)
    return folder / "out"


@pytest.fixture
def db(simulated: Path) -> Engine:
    return open_database(simulated / STORE, create=False)


def figures(evaluation: dict[str, dict[str, dict[str, float]]]) -> dict[str, list[float]]:
    return {name: [row["value"], row["low"], row["high"], row["n"]] for name, row in evaluation["metrics"].items()}


def scores(found: dict[str, object]) -> dict[str, list[object]]:
    return {name: [found[name], *found["intervals"][name], n] for name, n in found["n"].items()}  # type: ignore


def test_store_result_and_report_say_the_same_numbers(simulated: Path, db: Engine) -> None:
    result = json.loads((simulated / "run" / "result.json").read_text())
    id = read.find(db, simulated / "run")
    assert id is not None
    row = read.run(db, id)
    models = {"federated": row, **{Path(child["path"]).name: child for child in row["children"]}}
    told = {"federated": result["federated"], "pooled": result["pooled"]}
    told |= {f"local-{name}": found for name, found in result["local"].items()}
    assert set(models) == set(told) == {"federated", "pooled", "local-a", "local-b", "local-c"}
    page = (simulated / "run" / "report.html").read_text()
    for name, own in models.items():
        [test] = read.evaluations(db, own["id"], "test")
        assert figures(test) == scores(told[name])
        assert (test["images"], test["round"]) == (told[name]["images"], told[name]["best_round"])
        sites = read.site_metrics(db, own["id"], "test")
        assert {site: figures(rows[0]) for site, rows in sites.items()} == {
            site: scores(found) for site, found in told[name]["sites"].items()
        }
        assert own["test_value"] == told[name]["auroc"]
        assert (own["done"], own["best_round"]) == (told[name]["rounds"], told[name]["best_round"])
        assert sum(r["images"] for r in read.rounds(db, own["id"])) == told[name]["images_seen"]
        assert value_of(told[name], "auroc") in page
    assert read.privacy(db, id)["spent"] == result["federated"]["privacy"]
    last = {site: course[-1] for site, course in read.privacy(db, id)["course"].items()}
    assert last == {site: [4, epsilon] for site, epsilon in result["federated"]["privacy"]["sites"].items()}


def test_metrics_can_be_made_again_from_the_sums_in_the_store(simulated: Path, db: Engine) -> None:
    id = read.find(db, simulated / "run")
    assert id is not None
    job = read_record(simulated / "run").job
    whole = add_sums(read.test_sums(db, id).values())
    again = {name: e.value for name, e in load_task(job.task).summarise(whole, job).items()}
    [test] = read.evaluations(db, id, "test")
    assert again == {name: row["value"] for name, row in test["metrics"].items()}


def test_the_report_reads_the_store(simulated: Path, tmp_path: Path) -> None:
    """A figure that stands in the store alone is the one that is shown."""
    shutil.copytree(simulated, tmp_path / "out")
    (tmp_path / "out" / "run" / "result.json").unlink()
    db = open_database(tmp_path / "out" / STORE)
    id = read.find(db, tmp_path / "out" / "run")
    with db.execution_options(write=True).begin() as connection:
        connection.execute(
            text(
                "INSERT INTO event (run, seq, kind, time, repeated, dropped, facts) VALUES "
                "(:run, 999999999, 'warning', 0, 0, 0, '{\"text\": \"stands in the store alone\"}')"
            ),
            {"run": id},
        )
    db.dispose()
    assert "stands in the store alone" in write_report(tmp_path / "out" / "run").read_text()
    for path in (tmp_path / "out").glob(f"{STORE}*"):
        path.unlink()
    assert "stands in the store alone" not in write_report(tmp_path / "out" / "run").read_text()


def test_what_left_and_came_is_what_the_model_weighs(simulated: Path, db: Engine) -> None:
    from safetensors.torch import load_file

    id = read.find(db, simulated / "run")
    assert id is not None
    arrays = load_file(simulated / "run" / "last.safetensors")
    least = sum(array.numel() * array.element_size() for array in arrays.values())
    for row in read.rounds(db, id):
        for way, times in (("down", 6), ("up", 3)):  # to three sites; down also for the validation before
            assert times * least <= row[way] <= times * (least + 300 * len(arrays))  # with an array's name and header


def test_baselines_are_runs_below_their_run(simulated: Path, db: Engine) -> None:
    rows, total = read.runs(db)
    assert (len(rows), total) == (1, 1)
    assert (rows[0]["path"], rows[0]["name"], rows[0]["kind"]) == ("run", "told <once>", "federated")
    children, _ = read.runs(db, filter={"parent": rows[0]["id"]}, sort="path")
    assert [child["kind"] for child in children] == ["local", "local", "local", "pooled"]
    assert [site["name"] for site in read.sites(db)] == ["a", "b", "c"]
    assert read.sites(db)[2]["epsilon"] == read.privacy(db, rows[0]["id"])["spent"]["sites"]["c"]
    with pytest.raises(UserError, match="runs have"):
        read.runs(db, sort="settings")
    with pytest.raises(UserError, match="not in the store"):
        read.rounds(db, 10**6)


def test_a_run_that_is_moved_stays_the_same_run(tmp_path: Path) -> None:
    for name in ("first", "second"):
        if (tmp_path / "run").exists():
            (tmp_path / "run").rename(tmp_path / "run.before")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "rounds.jsonl").touch()
        inner = Store(tmp_path / "run" / "baselines" / "pooled")
        inner.add("start", name=name, job="", rounds=1, version="")
        Store(tmp_path / "run").add("start", name=name, job="", rounds=1, version="")
    db = open_store(tmp_path)
    rows, _ = read.runs(db, sort="started")
    assert [(row["name"], row["path"]) for row in rows] == [("first", "run.before"), ("second", "run")]
    for row in rows:
        [child] = read.run(db, row["id"])["children"]
        assert (child["name"], child["path"]) == (row["name"], f"{row['path']}/baselines/pooled")
    (tmp_path / "run.before").rename(tmp_path / "kept")
    bring_in(db, tmp_path)
    assert {row["path"] for row in read.runs(db)[0]} == {"kept", "run"}
    shutil.copytree(tmp_path / "kept", tmp_path / "copy")
    news, wrong = bring_in(db, tmp_path)
    assert news == []
    assert any("is a copy of the run in" in line for line in wrong)
    db.dispose()


def test_a_resumed_run_goes_on_in_its_row(tmp_path: Path) -> None:
    for attempt in range(3):
        store = Store(tmp_path / "run")
        store.add("start", name="x", job="", rounds=9, version="", **({"resumed_after": attempt} if attempt else {}))
        for number in (attempt, attempt + 1):
            store.add("round", round=number, trained=[], dropped=[{"site": "a", "reason": "no-reply"}], seconds=1.0)
    db = open_store(tmp_path)
    [row], _ = read.runs(db)
    assert (row["attempts"], row["done"], row["dropped"], row["status"]) == (3, 4, 4, "running")
    assert [(r["round"], r["repeated"]) for r in read.rounds(db, row["id"])] == [(0, 0), (1, 1), (2, 1), (3, 0)]
    db.dispose()


def test_a_journal_that_was_cut_short_is_read_anew(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    for number in range(3):
        store.add("warning", text=f"{number}")
    journal = tmp_path / "run" / "rounds.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    db = open_store(tmp_path)
    bring_in(db, tmp_path)
    id = read.find(db, tmp_path / "run")
    assert id is not None
    assert read.events(db, id) == read_events(tmp_path / "run")
    db.dispose()


def test_journals_of_older_releases_are_taken_in(simulated: Path, tmp_path: Path) -> None:
    """They have no name of the run in their first event, and no bytes."""
    shutil.copytree(simulated / "run", tmp_path / "run")
    for journal in tmp_path.rglob("rounds.jsonl"):
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        old = [{k: v for k, v in event.items() if k not in ("run", "bytes")} for event in lines]
        journal.write_text("".join(json.dumps(event) + "\n" for event in old))
    db = open_store(tmp_path)
    news, wrong = bring_in(db, tmp_path)
    assert (len(news), wrong) == (5, [])
    [row], _ = read.runs(db)
    assert len(read.run(db, row["id"])["children"]) == 4
    assert read.events(db, row["id"]) == read_events(tmp_path / "run")
    assert [r["down"] for r in read.rounds(db, row["id"])] == [None] * 4
    db.dispose()


def test_a_step_that_fails_leaves_the_tables_as_they_were(tmp_path: Path) -> None:
    db = open_database(tmp_path / STORE)
    follow(db, tmp_path)

    def half(connection: object) -> None:
        connection.execute(text("ALTER TABLE site ADD COLUMN colour TEXT"))  # type: ignore[attr-defined]
        raise RuntimeError("broke off")

    def whole(connection: object) -> None:
        connection.execute(text("ALTER TABLE site ADD COLUMN colour TEXT"))  # type: ignore[attr-defined]

    with pytest.raises(RuntimeError, match="broke off"):
        migrate(db, VERSION + 1, {VERSION: half})
    assert "colour" not in {column["name"] for column in inspect(db).get_columns("site")}
    migrate(db)  # still ours
    migrate(db, VERSION + 1, {VERSION: whole})
    assert "colour" in {column["name"] for column in inspect(db).get_columns("site")}
    with pytest.raises(UserError, match="newer Consilium"):
        migrate(db)
    db.dispose()


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("mysql://x/y", "must be the path of an SQLite file"),
        ("postgresql://host:port/x", "no URL"),
        ("/nowhere/at/all.sqlite", "unable to open"),
    ],
)
def test_a_store_that_is_none_is_said_before_anything_is_trained(
    store: str, words: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        run(tiny_job, three_sites, tmp_path / "out", store=store)
    assert not (tmp_path / "out").exists()


def test_those_who_follow_at_once_write_nothing_twice(tmp_path: Path) -> None:
    """A run that writes and a dashboard that opens the store at the same moment."""
    followed_at_once(str(tmp_path / STORE), tmp_path / "run")


def test_settings_of_the_job_are_listed_and_sorted_by(tmp_path: Path) -> None:
    assert set(query.SETTINGS.values()) <= set(Job().flat())
    assert len(set(query.sortable())) == len(query.sortable())  # each is called something else
    listed_by_settings(str(tmp_path / STORE), tmp_path / "runs")


def test_a_password_is_not_written_down() -> None:
    with pytest.raises(UserError, match="leave the password out") as raised:
        without_password("postgresql://me:secret-word@host/x")
    assert "secret-word" not in str(raised.value)
    assert without_password("postgresql://me@host/x") == "postgresql+psycopg://me@host/x"
    assert without_password("x.sqlite").endswith("/x.sqlite")


def consilium(*arguments: object) -> str:
    command = [sys.executable, "-m", "consilium", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_commands(simulated: Path, tmp_path: Path) -> None:
    listed = consilium("runs", "list", str(simulated))
    assert re.search(r"run  told <once>: finished 4/4 rounds, 3 sites, best auroc 0\.\d+ in \d, test 0\.\d+", listed)
    assert consilium("runs", "list", str(simulated), "--all").count("\n") == 5
    assert consilium("runs", "list", "--store", str(simulated / "consilium.sqlite")) == listed  # from any folder
    other = tmp_path / "other.sqlite"
    assert consilium("runs", "import", str(simulated), "--store", str(other)).count("brought up to date") == 5
    assert consilium("runs", "import", str(simulated), "--store", str(other)) == "nothing new\n"


def test_a_federations_file_among_run_folders_does_not_make_them_a_federation(tmp_path: Path) -> None:
    """As docs/quickstart-federation.md leaves it: try/federation.toml beside the runs of the other tutorial in try."""
    (tmp_path / "federation.toml").write_text('name = "council"\n')
    assert runs_folder(tmp_path) == tmp_path
    federation = tmp_path / "federation"
    (federation / "ca").mkdir(parents=True)
    (federation / "federation.toml").write_text('name = "council"\n')
    assert runs_folder(federation) == federation / "runs"
