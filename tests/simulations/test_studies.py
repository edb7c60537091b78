"""The ready studies: every cell of them is a job that can be run, and their small version stays small."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from consilium.study.plan import BASELINES, FEDERATED, read_plan
from shared.tasks import load_task

STUDIES = sorted((Path(__file__).parents[2] / "simulations" / "studies").glob("*.toml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_every_cell_of_a_ready_study_is_a_job_that_its_task_takes(file: Path, tmp_path: Path) -> None:
    sets = tomllib.loads(file.read_text())["dataset"]
    for one in sets:
        (tmp_path / one["data"]).mkdir()  # whose images these are does not matter here
    for quick in (False, True):
        plan = read_plan(file, tmp_path, quick)
        seen = {cell.job.replace(name="x", seed=0).sha256: cell.job for cell in plan.cells}
        for job in seen.values():
            load_task(job.task).check(job)
        federated = [cell for cell in plan.cells if cell.kind == FEDERATED]
        assert len(federated) == len(plan.methods) * len(sets) * len(plan.seeds)
        # Methods are compared at one budget: one set of baselines serves them all.
        assert sum(cell.kind == BASELINES for cell in plan.cells) == len(sets) * len(plan.seeds)
        assert not quick or max(cell.job.federation.rounds for cell in plan.cells) <= 4
