"""Every ready job of simulations/jobs, as it stands but short: on the real data it names, or its generated cohort."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from shared.config import load_job
from shared.tasks import TASKS
from simulations.simulate import run

JOBS = Path(__file__).parents[2] / "simulations" / "jobs"


class Source(NamedTuple):
    """Where a job's images come from: a folder of real data, or a cohort with so many sites and patients. Not every
    image is used; but under differential privacy which ones are would itself tell of them, so that is refused."""

    real: str = ""
    cohort: str = ""
    sites: int = 0
    patients: int = 0
    shorter: bool = True


SOURCES = {
    "anomaly": Source("bloodcell_det_multisite"),
    "bloodcells": Source("bloodcell_det_multisite"),
    "bloodcells-detection": Source("bloodcell_det_multisite"),
    "chest": Source(cohort="chest", sites=3, patients=8),
    "ct-organs-3d": Source(cohort="ct", sites=3, patients=5),
    "lungs-detection": Source("cxr_lung_boxes_ccby"),
    "nuclei": Source("nuclei_dsb2018"),
    "perfusion": Source(cohort="perfusion", sites=4, patients=40),
    "pneumonia": Source("pneumoniamnist_balanced"),
    "pneumonia-gan": Source("pneumoniamnist_balanced"),
    "pneumonia-private": Source("pneumoniamnist_balanced", shorter=False),
    "two-views": Source(cohort="two-views", sites=3, patients=12),
}
SHORT = [
    "federation.rounds=2",
    "evaluation.every=2",
    "evaluation.reference_rounds=2",
    "evaluation.samples=64",
    "data.max_per_class=12",
    "train.batch_size=4",
]


def test_every_job_of_the_folder_is_run_here() -> None:
    assert {path.stem for path in JOBS.glob("*.toml")} == set(SOURCES)
    assert {load_job(path).task for path in JOBS.glob("*.toml")} == set(TASKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_a_job_runs_to_its_report(name: str, shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    source = SOURCES[name]
    if source.real:
        data = shared_data(source.real)
    else:
        data = tmp_path / "cohort"
        importlib.import_module(f"simulations.cohorts.{source.cohort.replace('-', '')}").make(
            data, sites=source.sites, patients=source.patients
        )
    job = load_job(JOBS / f"{name}.toml", SHORT if source.shorter else [*SHORT, "data.max_per_class=0"])
    result = run(job, data, tmp_path / "run", workers=2)
    scores = result.scores["federated"]
    assert scores["dropped"] == []
    assert scores["rounds"] == 2
    assert scores["images"] == sum(site["images"] for site in scores["sites"].values()) > 0
    known = [metric for metric in TASKS[job.task].metrics if math.isfinite(scores.get(metric) or math.nan)]
    assert known, "no metric of the task was found"
    for metric in known:
        low, high = scores["intervals"][metric]
        assert low <= scores[metric] <= high
    assert result.report.stat().st_size > 10_000
