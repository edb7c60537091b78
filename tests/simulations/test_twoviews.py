"""The two-view cohort: reproducible to the byte, readable by other readers, every nodule in one view only."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from sklearn.metrics import roc_auc_score

from shared.config import load_job
from shared.errors import SiteRefusal
from shared.imaging.read import read_image
from shared.samples import read_samples
from shared.sitefile import read_site
from simulations.cohorts import twoviews

SITES, PATIENTS, SEED = 3, 6, 4


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cohort for the tests that only look."""
    folder = tmp_path_factory.mktemp("cohort") / "views"
    twoviews.make(folder, SITES, PATIENTS, SEED)
    return folder


def rows(site: Path) -> list[dict[str, str]]:
    with (site / "labels.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_arguments_give_the_same_bytes_and_more_patients_leave_the_earlier_ones(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    twoviews.make(tmp_path / "a", 2, 2, 1, lambda done, total: seen.append((done, total)))
    twoviews.make(tmp_path / "b", 2, 2, 1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert seen == [(done, 12) for done in range(1, 13)]
    twoviews.make(tmp_path / "more", 2, 4, 1)
    small, large = contents(tmp_path / "a"), contents(tmp_path / "more")
    images = [name for name in small if name.endswith(".dcm")]
    assert len(images) == 6 * 2 + 6  # the second hospital has no lateral views
    assert all(small[name] == large[name] for name in images)
    with pytest.raises(ValueError, match="not empty"):
        twoviews.make(tmp_path / "a", 2, 2, 2)


@pytest.mark.parametrize("view", twoviews.VIEWS)
def test_a_nodule_shows_in_one_view_and_is_lost_in_the_other(view: str) -> None:
    (other,) = set(twoviews.VIEWS) - {view}
    changes: dict[str, list[float]] = {view: [], other: []}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        chest = twoviews._chest(rng)
        with_nodule = [*chest, twoviews._nodule(rng, view)]
        for name, found in changes.items():
            found.append(float((twoviews.project(with_nodule, name) - twoviews.project(chest, name)).sum()))
    # in units of a fully black pixel that turns white; noise changes single pixels by .02 to .03
    assert np.percentile(changes[view], 5) > 2
    assert np.percentile(changes[other], 95) < 0.4


def test_the_projection_of_an_ellipsoid_holds_its_volume() -> None:
    """The oracle: the sum of the rays' lengths times the area of a pixel."""
    ball = twoviews.Blob((10.0, -5.0, 20.0), (40.0, 60.0, 30.0), 1.0)
    for view, (low, high) in twoviews._WINDOW.items():
        twoviews._WINDOW[view] = (0.0, 1000.0)
        try:
            total = twoviews.project([ball], view).sum() * 1000 * twoviews.SPACING**2
        finally:
            twoviews._WINDOW[view] = (low, high)
        assert total == pytest.approx(4 / 3 * np.pi * 40 * 60 * 30, rel=0.01)


def test_age_tells_a_little_and_sex_nothing() -> None:
    machine = twoviews.scanner(0, 3, 0)
    exams = [twoviews.draw(machine, 0, "train", k, 0) for k in range(500)]
    ill = [exam.label == "nodule" for exam in exams]
    assert 0.70 < roc_auc_score(ill, [exam.age for exam in exams]) < 0.85
    assert 0.44 < roc_auc_score(ill, [exam.sex == "F" for exam in exams]) < 0.56
    assert 0.3 < np.mean(ill) < 0.6
    seen = [exam.seen_in for exam, yes in zip(exams, ill, strict=True) if yes]
    assert 0.4 < np.mean([view == "pa" for view in seen]) < 0.6


def test_other_readers_read_the_files_and_the_inverted_scanner_looks_like_the_others(cohort: Path) -> None:
    means = {}
    for site in ("hospital-quay", "hospital-glen", "hospital-fen"):
        pictures = []
        for row in rows(cohort / site):
            for column in ("path:pa", "path:lateral"):
                if row.get(column):
                    path = cohort / site / row[column]
                    image = SimpleITK.ReadImage(str(path))
                    assert image.GetSize()[:2] == (twoviews.SIZE, twoviews.SIZE)
                    assert image.GetSpacing()[0] == pytest.approx(twoviews.SPACING)
                    assert image.GetMetaData("0010|0020").strip() == row["patient"]
                    assert image.GetMetaData("0010|1010").strip() == row["age"]
                    pictures.append(read_image(path))
        means[site] = np.mean(pictures, 0)
        assert np.mean(pictures) > 0.2
    middle, corner = np.s_[38:42, 38:42], np.s_[:4, :4]
    assert all(mean[corner].mean() < 0.1 < 0.6 < mean[middle].mean() for mean in means.values())


def test_the_job_reads_it_and_the_hospital_without_lateral_views_joins_because_the_job_fills(
    cohort: Path, root: Path
) -> None:
    job = load_job(root / "simulations" / "jobs" / "two-views.toml")
    for name in ("hospital-quay", "hospital-glen", "hospital-fen"):
        samples = read_samples(read_site(cohort / name / "site.toml"), job)
        assert len(samples) == 6 + 2 + 3
        assert all(bool(sample.paths[1]) == (name != "hospital-fen") for sample in samples)
        assert all(20 <= sample.values[0] <= 95 and sample.values[1] in (0, 1) for sample in samples)
    with pytest.raises(SiteRefusal, match="no column path:lateral"):
        read_samples(read_site(cohort / "hospital-fen" / "site.toml"), job.replace(data__missing="refuse"))
