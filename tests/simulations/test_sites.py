"""Finding the hospitals in a folder, inventing some, and reading back what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.imaging.dataset import load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from simulations.partition import partition
from simulations.sites import find_sites


def job_of(**more: Any) -> Job:
    flat = {"data.classes": "left,right", "data.size": 8, "data.partition_sites": 2, "data.partition_alpha": 50.0}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def pictures(folder: Path, count: int = 10) -> None:
    """A folder per class."""
    for name in ("left", "right"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (6, 6), number * 20 + (name == "left")).save(folder / name / f"{number}.png")


def table(folder: Path, rows: list[str], files: int = 12) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        Image.new("L", (6, 6), number * 20).save(folder / f"{number}.png")
    (folder / "labels.csv").write_text("\n".join(["path,label,patient,split,frame,box,key", *rows]) + "\n", "utf-8")


def names(files: list[Path]) -> list[str]:
    return [read_site(file).name for file in files]


def samples_in(files: list[Path], job: Job) -> list[list[Sample]]:
    return [read_samples(read_site(file), job) for file in files]


# --- finding ----------------------------------------------------------------------------------------------------------


def test_folders_with_a_site_file_are_taken_as_they_are(three_sites: Path, tmp_path: Path) -> None:
    (three_sites / "notes").mkdir()
    files = find_sites(three_sites, job_of(), tmp_path / "out")
    assert files == [three_sites / name / "site.toml" for name in "abc"]
    assert not (tmp_path / "out").exists()
    assert find_sites(three_sites / "b", job_of(), tmp_path / "out") == [three_sites / "b" / "site.toml"]


def test_every_folder_is_a_site_where_none_has_a_site_file(tmp_path: Path) -> None:
    for name in ("north", "south"):
        pictures(tmp_path / "data" / name)
    (tmp_path / "data" / ".git").mkdir()
    job = job_of()
    files = find_sites(tmp_path / "data", job, tmp_path / "out")
    assert names(files) == ["north", "south"]
    assert all(tmp_path / "out" in file.parents for file in files)
    assert [len(samples) for samples in samples_in(files, job)] == [20, 20]
    assert read_site(files[0]).root == (tmp_path / "data" / "north").resolve()


def layout_classes(folder: Path) -> int:
    pictures(folder)
    return 20


def layout_splits(folder: Path) -> int:
    for word in ("train", "test"):
        pictures(folder / word)
    return 40


def layout_other_words(folder: Path) -> int:
    """As the brain tumour collections of Kaggle have it."""
    for word in ("Training", "Testing"):
        pictures(folder / word)
    return 40


def layout_table(folder: Path) -> int:
    table(folder, [f"{k}.png,left,p{k},,,," for k in range(12)])
    (folder / "extra").mkdir()
    return 12


def layout_arrays(folder: Path) -> int:
    folder.mkdir()
    np.savez(folder / "x.npz", train_images=np.zeros((5, 6, 6), np.uint8), train_labels=np.array([0, 1, 0, 1, 1]))
    return 5


def layout_coco(folder: Path) -> int:
    table(folder / "images", [])
    content = {
        "categories": [{"id": 1, "name": "left"}],
        "images": [{"id": 1, "file_name": "0.png"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 3]}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return 1


ODD_NAMES = ["St. Mary's (North)", "Klinik-München", "東京", "😀", "_x", "x" * 100, "a\\b", 'a"b', "del\x7f"]
LAYOUTS = [layout_classes, layout_splits, layout_other_words, layout_table, layout_arrays, layout_coco]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_in_a_layout_that_is_read_is_one_site(tmp_path: Path, layout: Callable[[Path], int]) -> None:
    expected = layout(tmp_path / "hospital")
    job = job_of()
    files = find_sites(tmp_path / "hospital", job, tmp_path / "out")
    assert names(files) == ["hospital"]
    assert len(samples_in(files, job)[0]) == expected


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Its site gets a short name of its own, and the invented sites find its images."""
    pictures(tmp_path / "data" / name)
    pictures(tmp_path / "data" / "other")
    for job in (job_of(), job_of(data__partition="iid")):
        files = find_sites(tmp_path / "data", job, tmp_path / "out")
        assert len(set(names(files))) == 2
        assert sum(map(len, samples_in(files, job))) == 40


def test_a_relative_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "data" / "north")
    pictures(tmp_path / "data" / "south")
    monkeypatch.chdir(tmp_path)
    job = job_of(data__partition="iid")
    files = [file.resolve() for file in find_sites(Path("data"), job, Path("out"))]
    monkeypatch.chdir("/")
    assert sum(map(len, samples_in(files, job))) == 40


def test_two_sites_of_one_name_are_refused_with_both_files(three_sites: Path, tmp_path: Path) -> None:
    for letter in "ab":
        file = three_sites / letter / "site.toml"
        file.write_text(file.read_text().replace(f'"{letter}"', '"twin"'))
    with pytest.raises(UserError, match="two sites are named 'twin'") as caught:
        find_sites(three_sites, job_of(), tmp_path / "out")
    assert all(str(three_sites / letter / "site.toml") in str(caught.value) for letter in "ab")


def test_no_folder_no_images_and_unread_sites_are_refused_in_one_line(tmp_path: Path, three_sites: Path) -> None:
    (tmp_path / "empty").mkdir()
    (three_sites / "b" / "labels.csv").unlink()
    for folder, word in ((tmp_path / "gone", "gone"), (tmp_path / "empty", "empty"), (three_sites, "site b: ")):
        with pytest.raises(UserError, match=word) as caught:
            find_sites(folder, job_of(), tmp_path / "out")
        assert "\n" not in str(caught.value)


# --- dealing out ------------------------------------------------------------------------------------------------------

ROWS = [
    "0.png,left,p0,train,,,",
    '1.png,right,"p,1",train,2,,',
    "2.png,left,p2,train,,0 0 3 3,",
    "3.png,right,p3,train,7,1.5 2.25 3 3,images",
    '4.png,left,"p""4",train,,1234.5678 20000.25 123456.5 1234567,',
    "5.png,right,p5,val,,,",
    "6.png,left,p6,test,0,,",
    "7.png,right,pß,test,middle,0.1 0.2 0.3 0.4,",
    "8.png,left,p0,train,,,",
    "9.png,right,p9,,,,",
]


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size"])
def test_invented_sites_read_back_to_the_samples_that_were_dealt(tmp_path: Path, kind: str) -> None:
    table(tmp_path / "data", ROWS)
    job = job_of(data__partition=kind)
    whole = {replace(sample, patient=f"data:{sample.patient}") for sample in samples_in_folder(tmp_path / "data", job)}
    files = find_sites(tmp_path / "data", job, tmp_path / "out")
    assert names(files) == ["site-1", "site-2"]
    parts = samples_in(files, job)
    dealt = [set(part) for part in parts]
    assert dealt[0] | dealt[1] == whole
    assert not {s.patient for s in dealt[0]} & {s.patient for s in dealt[1]}


def samples_in_folder(folder: Path, job: Job) -> list[Sample]:
    return read_samples(SiteData("data", folder), job)


def test_several_sites_are_pooled_and_dealt_as_partition_deals_them(three_sites: Path, tmp_path: Path) -> None:
    job = job_of(data__partition="iid", data__partition_sites=3)
    pool = [
        replace(sample, path=f"{name}/{sample.path}", patient=f"{name}:{sample.patient}")
        for name in "abc"
        for sample in samples_in_folder(three_sites / name, job)
    ]
    files = find_sites(three_sites, job, tmp_path / "out")
    expected = [sorted(pool[k].path for k in site) for site in partition(pool, job)]
    found = samples_in(files, job)
    assert [[sample.path for sample in part] for part in found] == expected
    assert sum(map(len, found)) == 24 + 32 + 40
    assert all((read_site(files[0]).root / sample.path).is_file() for part in found for sample in part)


def test_equal_patient_numbers_of_two_hospitals_are_two_patients(tmp_path: Path) -> None:
    for name in ("a", "b"):
        table(tmp_path / "data" / name, [f"{k}.png,left,P1,train,,," for k in range(3)])
    files = find_sites(tmp_path / "data", job_of(data__partition="iid"), tmp_path / "out")
    hospitals = [{sample.path[0] for sample in part} for part in samples_in(files, job_of())]
    assert sorted(hospitals, key=str) == [{"a"}, {"b"}]


def test_several_labels_none_and_the_sites_own_words_are_written_as_classes_of_the_job(tmp_path: Path) -> None:
    table(tmp_path / "data" / "a", ["0.png,links|right,p,train,,,", "1.png,,q,train,,,", "2.png,right,r,train,,,"])
    (tmp_path / "data" / "a" / "site.toml").write_text('name = "a"\n[label_map]\nlinks = "left"\n')
    job = job_of(data__multilabel=True, data__partition="iid", data__partition_sites=1)
    files = find_sites(tmp_path / "data", job, tmp_path / "out")
    found = {sample.path: sample.target for part in samples_in(files, job) for sample in part}
    assert found == {"a/0.png": (0, 1), "a/1.png": (), "a/2.png": (1,)}


def test_invented_sites_decode_the_same_pixels_into_caches_of_their_own(three_sites: Path, tmp_path: Path) -> None:
    job = job_of(data__partition="iid")
    before = {path.relative_to(three_sites) for path in three_sites.rglob("*")}
    files = find_sites(three_sites, job, tmp_path / "out")
    seen: dict[str, Any] = {}
    for file in files:
        site = read_site(file)
        data = load_dataset(read_samples(site, job), site, job)
        seen |= {sample.path: data.columns["image"][k] for k, sample in enumerate(data.samples)}
    assert {path.relative_to(three_sites) for path in three_sites.rglob("*")} == before
    for name in "abc":
        site = read_site(three_sites / name / "site.toml")
        data = load_dataset(read_samples(site, job), site, job)
        images = data.columns["image"]
        assert all((images[k] == seen[f"{name}/{s.path}"]).all() for k, s in enumerate(data.samples))


def test_the_same_job_writes_the_same_files_again_and_more_sites_than_patients_are_refused(
    three_sites: Path, tmp_path: Path
) -> None:
    job = job_of(data__partition="dirichlet")
    written = [
        [file.with_name("cases.csv").read_bytes() for file in find_sites(three_sites, changed, tmp_path / out)]
        for changed, out in ((job, "1"), (job.replace(seed=9), "2"), (job.replace(data__partition_seed=1), "3"))
    ]
    assert written[0] == written[1] != written[2]
    with pytest.raises(UserError, match="would get no training image"):
        find_sites(three_sites, job.replace(data__partition_sites=200), tmp_path / "4")
