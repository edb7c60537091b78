"""The check before joining: every unreadable file is named, and the decision at the limit is exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client.check import Report, check_site
from shared.config import Job
from shared.errors import UserError
from shared.imaging.errors import CODES, UnreadableImage
from shared.imaging.read import read_dicom


def site(folder: Path, good: int, bad: int, limit: str = "0.05", form: str = "csv") -> Path:
    """A site with images of both classes and as many files that are no images."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["path,label,patient,split"]
    for number in range(good + bad):
        path = folder / f"{number}.png"
        if number < good:
            Image.new("L", (4, 4), number % 256).save(path)
        else:
            path.write_bytes(b"no picture")
        rows.append(f"{path.name},{('left', 'right')[number % 2]},p{number},train")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    text = f'name = "s"\n[data]\nformat = "{form}"\n[limits]\nmax_unreadable = {limit}\n'
    (folder / "site.toml").write_text(text)
    return folder / "site.toml"


@pytest.fixture
def job_file(tiny_job: Job, tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(tiny_job.toml())
    return tmp_path / "tiny.toml"


def check(file: Path | None = None, data: Path | None = None, form: str = "auto", **more: Any) -> Report:
    return check_site(file, data, form, more.get("job_file"), more.get("limit"))


@pytest.mark.parametrize(
    ("good", "bad", "limit", "fit"),
    [
        (9, 1, "0.1", True),
        (9, 1, "0.09", False),
        (3, 0, "0", True),
        (2, 1, "0.0", False),
        (0, 3, "1", True),
        (21, 29, "0.58", True),
        (71, 29, "0.29", True),
        (71, 29, "0.28", False),
    ],
)
def test_a_site_is_fit_up_to_its_limit_and_not_beyond(
    tmp_path: Path, good: int, bad: int, limit: str, fit: bool
) -> None:
    report = check(site(tmp_path / "s", good, bad, limit))
    assert (report.read, len(report.unreadable)) == (good, bad)
    assert report.fit is fit
    assert list(report.lines())[-1].startswith("FIT" if fit else "REFUSED")


def test_the_limit_of_the_command_wins_over_the_sites(tmp_path: Path) -> None:
    file = site(tmp_path / "s", 3, 1, "0.05")
    assert not check(file).fit
    assert check(file, limit=0.25).fit
    assert not check(file, limit=0.2).fit


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 100))
def test_the_decision_is_that_of_whole_numbers(
    tmp_path_factory: pytest.TempPathFactory, good: int, bad: int, percent: int
) -> None:
    report = check(site(tmp_path_factory.mktemp("s"), good, bad), limit=percent / 100)
    assert report.fit == (good + bad > 0 and 100 * bad <= percent * (good + bad))


def test_every_unreadable_file_is_named_with_its_reason(tmp_path: Path) -> None:
    file = site(tmp_path / "s", 3, 2)
    (tmp_path / "s" / "deep").mkdir()
    (tmp_path / "s" / "deep" / "x.dcm").write_bytes(b"")
    report = check(file)
    expected = [("3.png", "unsupported-format"), ("4.png", "unsupported-format"), ("deep/x.dcm", "empty-file")]
    assert report.unreadable == expected
    lines = list(report.lines())
    assert f"{file}: 6 files looked at, 3 images can be read" == lines[0]
    for (path, code), line in zip(expected, lines[1:4], strict=True):
        assert path in line
        assert CODES[code] in line
    assert "3 of 6 images (50%)" in lines[-1]
    assert any("labels were not looked at" in line for line in list(check(file, limit=1.0).lines()))


def test_labels_and_splits_are_counted_with_a_job(tmp_path: Path, job_file: Path, three_sites: Path) -> None:
    report = check(three_sites / "a" / "site.toml", job_file=job_file)
    assert report.fit
    counts = {split: dict(counter) for split, counter in report.counts.items()}
    assert counts == {"train": {"left": 6, "right": 6}, "val": {"left": 3, "right": 3}, "test": {"left": 3, "right": 3}}
    assert "  train: 12 images (left 6, right 6)" in list(report.lines())


def test_unreadable_images_are_not_counted(tmp_path: Path, job_file: Path) -> None:
    report = check(site(tmp_path / "s", 3, 2, "1"), job_file=job_file)
    assert dict(report.counts["train"]) == {"left": 2, "right": 1}


@pytest.mark.parametrize("fault", ["label", "file", "no training", "no table", "short row", "box"])
def test_a_fault_of_the_labels_is_refused_with_its_place(tmp_path: Path, job_file: Path, fault: str) -> None:
    file = site(tmp_path / "s", 3, 0)
    table = file.with_name("labels.csv")
    match fault:
        case "label":
            table.write_text(table.read_text().replace("right", "rihgt"))
        case "file":
            (tmp_path / "s" / "1.png").unlink()
        case "no training":
            table.write_text(table.read_text().replace("train", "test"))
        case "no table":
            table.unlink()
        case "short row":
            table.write_text("label,patient,split,path\nleft\n")
        case "box":
            table.write_text("path,label,split,box\n0.png,left,train,nan 0 1 1\n")
    report = check(file, job_file=job_file)
    words = {"label": "'rihgt'", "file": "1.png", "no training": "training split", "box": "nan"}
    assert not report.fit
    assert words.get(fault, "labels.csv") in list(report.lines())[-1]


def test_boxes_outside_their_image_are_unreadable(tmp_path: Path, job_file: Path) -> None:
    file = site(tmp_path / "s", 2, 0, "0.5")
    rows = "path,label,patient,split,box\n0.png,left,p,train,0 0 2 2\n1.png,right,q,train,9 9 2 2\n"
    file.with_name("labels.csv").write_text(rows)
    report = check(file, job_file=job_file)
    assert report.unreadable == [("1.png", "bad-crop")]
    assert report.fit


def test_a_folder_is_checked_without_any_file_of_its_own(tmp_path: Path, job_file: Path) -> None:
    for name in ("left", "right"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("L", (4, 4)).save(tmp_path / "d" / name / f"{number}.png")
    assert check(data=tmp_path / "d").read == 24
    report = check(data=tmp_path / "d", form="folder", job_file=job_file)
    assert report.fit
    assert sum(sum(counter.values()) for counter in report.counts.values()) == 24


def test_arrays_are_looked_at_too(tmp_path: Path, job_file: Path) -> None:
    labels = np.array([0, 1, 0, 1])
    np.savez(tmp_path / "x.npz", train_images=np.zeros((4, 6, 6), np.uint8), train_labels=labels)
    report = check(data=tmp_path, job_file=job_file)
    assert (report.fit, report.read) == (True, 4)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    report = check(data=tmp_path)
    assert not report.fit
    assert "no image was found" in report.refused


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    file = site(tmp_path / "s", 1, 0)
    uses: list[dict[str, Any]] = [
        {},
        {"file": file, "data": tmp_path},
        {"data": tmp_path / "gone"},
        {"data": tmp_path, "form": "dicmo"},
        {"file": file, "limit": 1.5},
        {"file": file, "limit": float("nan")},
        {"file": file, "job_file": tmp_path / "gone.toml"},
        {"file": tmp_path / "gone.toml"},
    ]
    for use in uses:
        with pytest.raises(UserError) as caught:
            check(**use)
        assert "\n" not in str(caught.value)


def test_the_check_writes_nothing(tmp_path: Path, job_file: Path, three_sites: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    check(three_sites / "a" / "site.toml", job_file=job_file)
    check(three_sites / "a" / "site.toml")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_odd_and_broken_dicom_files_are_all_answered_for(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("dicom_robustness")
    report = check(data=folder, form="dicom")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unreadable = dict(report.unreadable)
    assert report.read + len(unreadable) == len(files)
    assert set(unreadable) <= files
    assert set(unreadable.values()) <= set(CODES)
    assert {"SOURCE.md", "manifest.csv"} <= set(unreadable)
    for name in sorted(files)[::15]:
        try:
            read_dicom(folder / name)
            code = None
        except UnreadableImage as error:
            code = error.code
        assert unreadable.get(name) == code
    assert all("\n" not in line for line in report.lines())
    assert json.dumps(report.unreadable)
