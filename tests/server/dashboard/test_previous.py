"""A run against the release before it: on the page as on the command line, and the figures are those of both runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient

from consilium.cli import commands
from server.dashboard.app import create_app
from server.dashboard.guard import Access
from server.wording import number
from shared.errors import UserError

from .conftest import SIGNED_IN, TOKEN


def test_both_figures_are_those_of_the_runs(
    registry: Path, runs_folder: Path, store: Path, ids: dict[str, int]
) -> None:
    results = [
        json.loads((runs_folder / name / "result.json").read_text())["federated"] for name in ("first", "second")
    ]
    app = create_app(store, Access(TOKEN), registry=registry)
    with TestClient(app, base_url="http://127.0.0.1:8600", headers=SIGNED_IN) as client:
        found = client.get(f"/api/runs/{ids['first']}/previous").json()
        itself = client.get(f"/api/runs/{ids['second']}/previous").json()
    assert itself is None  # there is no release but its own
    assert found["release"]["version"] == "1.0"
    assert found["why_not"] == ""
    assert found["sites"] == sorted(results[0]["sites"])
    assert found["changed"] == found["left_out"] == []
    for metric, row in found["metrics"].items():
        assert row["new"]["value"] == pytest.approx(results[0][metric])
        assert row["old"]["value"] == pytest.approx(results[1][metric])
        assert row["difference"]["value"] == pytest.approx(results[0][metric] - results[1][metric])
    done = CliRunner().invoke(
        commands, ["registry", "compare", str(runs_folder / "first"), "--registry", str(registry)]
    )
    assert done.exit_code == 0, done.output
    assert f"AUROC: {number(results[1]['auroc'])}" in done.output
    assert number(results[0]["auroc"]) in done.output


def test_without_a_registry_there_is_nothing_to_compare(ids: dict[str, int], signed_in: TestClient) -> None:
    assert signed_in.get(f"/api/runs/{ids['first']}/previous").json() is None


def test_what_is_not_there_is_one_line(registry: Path, runs_folder: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no registry"):
        create_app(store, Access(TOKEN), registry=tmp_path / "nowhere")
    ask = ["registry", "compare", str(runs_folder / "first"), "--registry", str(registry), "--version", "9"]
    with pytest.raises(UserError, match=r"no release\s+9"):
        CliRunner().invoke(commands, ask, catch_exceptions=False)
    itself = ["registry", "compare", str(runs_folder / "second"), "--registry", str(registry)]
    with pytest.raises(UserError, match="holds no release but"):
        CliRunner().invoke(commands, itself, catch_exceptions=False)
