"""A run in other people's tools, read back by the tools themselves: every figure is that of the store."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from consilium.cli import commands
from server.dashboard.app import create_app
from server.dashboard.guard import Access
from server.database import read
from server.database.engine import open_database
from server.tracking.follow import track
from server.tracking.points import Point, points
from server.tracking.tensorboard import TensorBoard
from shared.config import job_from_flat
from shared.errors import UserError
from simulations.simulate import run
from tests.conftest import write_site

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    for name, images in {"a": 24, "b": 32}.items():
        write_site(folder / "data" / name, name, images)
    small = {"name": "tiny", "data.classes": "left,right", "data.size": 16, "model.width": 4, "train.batch_size": 8}
    job = job_from_flat(small | {"federation.rounds": 2, "evaluation.every": 1})
    run(job, folder / "data", folder / "runs" / "run", workers=1)
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def db(finished: Path) -> Iterator[Engine]:
    found = open_database(finished.parent / "consilium.sqlite")
    yield found
    found.dispose()


@pytest.fixture(scope="module")
def told(db: Engine, finished: Path) -> list[Point]:
    id = read.find(db, finished)
    assert id is not None
    return points(db, id)


def test_the_points_are_those_of_result_json(told: list[Point], finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())["federated"]
    found = {(point.name, point.step): point.value for point in told}
    assert len(found) == len(told)
    best = result["best_round"]
    for metric, (low, high) in result["intervals"].items():
        assert found[f"test/{metric}", best] == result[metric]
        assert [found[f"test/{metric}/low", best], found[f"test/{metric}/high", best]] == [low, high]
        assert found[f"test/{metric}/site/a", best] == result["sites"]["a"][metric]
    assert sum(found[f"seconds/{part}", 1] for part in ("train", "transfer", "wait")) == pytest.approx(
        found["seconds/round", 1], abs=0.02
    )
    assert {name for name, _ in found} >= {"train/loss", "sites/used", "bytes/to_sites", "val/auroc"}


# ---------------------------------------------------------------------- TensorBoard


def test_tensorboard_reads_back_every_figure(told: list[Point], finished: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # a second time the files are written anew, not twice
        done = CliRunner().invoke(commands, ["track", str(finished), "--tensorboard", str(tmp_path)])
        assert done.exit_code == 0, done.output
    [folder] = tmp_path.iterdir()
    reader = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    reader.Reload()
    from tensorboard.util import tensor_util

    shown = {
        (name, event.step): (float(tensor_util.make_ndarray(event.tensor_proto)), event.wall_time)
        for name in reader.Tags()["tensors"]
        if not name.startswith("job/")
        for event in reader.Tensors(name)
    }
    assert {key: value for key, (value, _) in shown.items()} == {(p.name, p.step): p.value for p in told}
    assert all(shown[p.name, p.step][1] == pytest.approx(p.time) for p in told)
    assert any(name.startswith("job/") for name in reader.Tags()["tensors"])


def test_a_run_that_goes_on_is_followed_to_its_end(finished: Path, tmp_path: Path) -> None:
    """The journal grows behind the reader's back: each figure is written once, and it ends with the run."""
    folder = tmp_path / "runs" / "run"
    shutil.copytree(finished, folder)
    lines = (folder / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    half = next(k for k, line in enumerate(lines) if b'"event": "round"' in line) + 1
    (folder / "rounds.jsonl").write_bytes(b"".join(lines[:half]))
    written: list[list[Point]] = []
    ended: list[str] = []

    class Heard:
        def write(self, news: list[Point]) -> None:
            written.append(list(news))
            if len(written) == 1:
                (folder / "rounds.jsonl").write_bytes(b"".join(lines))

        def end(self, row: dict[str, object]) -> None:
            ended.append(str(row["status"]))

    count = track(folder, "", lambda row: [Heard()], True, lambda text: None)
    assert ended == ["finished"]
    assert len(written) == 2
    first, second = ({(p.name, p.step) for p in news} for news in written)
    assert first
    assert second
    assert not first & second
    assert count == len(first | second)


def test_without_a_place_or_a_run_it_says_what_to_do(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--mlflow"):
        CliRunner().invoke(commands, ["track", str(finished)], catch_exceptions=False)
    with pytest.raises(UserError, match="no run folder"):
        track(tmp_path, "", lambda row: [TensorBoard(tmp_path, row)], False, print)


# ---------------------------------------------------------------------- Prometheus


@pytest.fixture(scope="module")
def client(finished: Path) -> Iterator[TestClient]:
    app = create_app(finished.parent / "consilium.sqlite", Access(TOKEN))
    with TestClient(app, base_url="http://127.0.0.1:8600") as found:
        yield found


def test_prometheus_parser_reads_the_figures_of_the_store(client: TestClient, finished: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    assert client.get("/metrics").status_code == 401
    answer = client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family.samples for family in text_string_to_metric_families(answer.text)}
    result = json.loads((finished / "result.json").read_text())["federated"]
    figures = {
        (one.labels["split"], one.labels["site"]): one.value
        for one in families["consilium_run_metric"]
        if one.labels["metric"] == "auroc"
    }
    assert figures["test", ""] == result["auroc"]
    assert figures["test", "b"] == result["sites"]["b"]["auroc"]
    assert [one.value for one in families["consilium_run_round"]] == [2]
    assert {one.labels["status"]: one.value for one in families["consilium_runs"]} == {
        "running": 0, "finished": 1, "failed": 0, "stopped": 0,
    }  # fmt: skip
    spent = {one.labels["part"]: one.value for one in families["consilium_run_time_seconds"]}
    assert spent == pytest.approx(result["time"], abs=0.01)


def test_the_grafana_dashboard_asks_only_for_what_there_is(client: TestClient, root: Path) -> None:
    text = client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
    there = set(re.findall(r"^# TYPE (\w+) gauge$", text, re.MULTILINE))
    federation = {"consilium_site_online", "consilium_certificate_days"}  # with --federation only
    board = json.loads((root / "deploy" / "grafana" / "consilium.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bconsilium_\w+", target["expr"])
    }
    assert asked <= there | federation
    labels = {name for sample in re.findall(r"\{(.*?)\}", text) for name in re.findall(r"(\w+)=", sample)}
    used = {n for p in board["panels"] for t in p["targets"] for n in re.findall(r"\{\{(\w+)\}\}", t["legendFormat"])}
    assert used <= labels
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)


# ---------------------------------------------------------------------- MLflow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own server on a free port of this machine, with its own database."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=os.environ | quiet, start_new_session=True
        )
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 600
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < until, (folder / "log").read_text()[-2000:]
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait(20)


@pytest.mark.slow
def test_mlflow_has_every_figure_setting_and_the_report(
    mlflow_server: str, told: list[Point], finished: Path, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    for _ in range(2):  # the second time it is the same run there, not another
        done = CliRunner().invoke(commands, ["track", str(finished), "--mlflow", mlflow_server])
        assert done.exit_code == 0, done.output
    client = MlflowClient(tracking_uri=mlflow_server)
    experiment = client.get_experiment_by_name("consilium")
    assert experiment is not None
    [shown] = client.search_runs([experiment.experiment_id])
    assert shown.info.status == "FINISHED"
    assert shown.data.params["federation.rounds"] == "2"
    assert shown.data.params["job_sha256"] == json.loads((finished / "result.json").read_text())["job_sha256"]
    by_name: dict[str, dict[int, float]] = {}
    for point in told:
        by_name.setdefault(point.name, {})[point.step] = point.value
    assert set(shown.data.metrics) == set(by_name)
    for name in ("val/auroc", "train/loss", "test/loss/site/a", "seconds/train"):
        assert {one.step: one.value for one in client.get_metric_history(shown.info.run_id, name)} == by_name[name]
    path = client.download_artifacts(shown.info.run_id, "report.html", str(tmp_path))
    assert Path(path).read_bytes() == (finished / "report.html").read_bytes()


def test_a_server_that_is_not_there_is_one_line(finished: Path) -> None:
    with pytest.raises(UserError, match=r"^--mlflow http://127\.0\.0\.1:\d+: .{5,200}$"):
        CliRunner().invoke(
            commands, ["track", str(finished), "--mlflow", f"http://127.0.0.1:{free_port()}"], catch_exceptions=False
        )
