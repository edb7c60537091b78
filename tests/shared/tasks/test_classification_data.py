"""Reading labelled images from tables, folders, arrays and COCO files, and how bad input is named."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from client.memory import Memory
from shared.cases import Sample, SiteData, split_of
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal
from shared.imaging.dataset import load_dataset
from shared.samples import read_samples


@pytest.fixture
def job() -> Job:
    return job_of()


def job_of(**more: Any) -> Job:
    flat = {"data.classes": "left,right", "data.size": 8}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def picture(path: Path, value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6), value, np.uint8)).save(path)


def dicom(path: Path, patient: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    data.PatientID, data.Modality = patient, "OT"
    data.Rows = data.Columns = 6
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = bytes(range(36))
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.save_as(path, enforce_file_format=True)


def table(folder: Path, text: str, encoding: str = "utf-8", name: str = "labels.csv") -> SiteData:
    """A site with the images a.png to f.png and a table."""
    for letter in "abcdef":
        picture(folder / f"{letter}.png")
    (folder / name).write_bytes(text.encode(encoding))
    return SiteData("s", folder)


def refusal(site: SiteData, job: Job) -> SiteRefusal:
    with pytest.raises(SiteRefusal) as caught:
        read_samples(site, job)
    assert "\n" not in str(caught.value)
    return caught.value


def by_path(samples: list[Sample]) -> dict[str, Sample]:
    return {sample.path: sample for sample in samples}


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_every_column_of_a_table_is_read(tmp_path: Path, encoding: str) -> None:
    text = (
        "path,label,patient,split,frame,box,key,remark\n"
        "b.png,right,P2,Testing,3,1 2 3.5 4,images,kept out\n"
        "a.png, left ,P1,,,,,\n"
        'c.png,left,"P,3",VAL,0,,,\n'
    )
    job = job_of()
    samples = read_samples(table(tmp_path, text, encoding), job)
    assert samples == [
        Sample("a.png", (0,), "P1", split_of("P1", 0.1, 0.2)),
        Sample("b.png", (1,), "P2", "test", 3, (1.0, 2.0, 3.5, 4.0), "images"),
        Sample("c.png", (0,), "P,3", "val", 0),
    ]


def test_images_of_one_patient_fall_on_one_side_and_a_file_without_a_patient_stands_for_itself(tmp_path: Path) -> None:
    text = (
        "path,label,patient\n" + "".join(f"{k}.png,left,P{ord(k) % 2}\n" for k in "abcd") + "e.png,left,\nf.png,left,\n"
    )
    samples = read_samples(table(tmp_path, text), job_of(data__test_fraction=0.5, data__val_fraction=0.2))
    for sample in samples:
        patient = f"P{ord(sample.path[0]) % 2}" if sample.path[0] in "abcd" else sample.path
        assert (sample.patient, sample.split) == (patient, split_of(patient, 0.2, 0.5))


def test_the_frame_of_the_job_holds_where_the_table_names_none(tmp_path: Path) -> None:
    site = table(tmp_path, "path,label,patient,frame\na.png,left,p,\nb.png,left,q,middle\n")
    found = by_path(read_samples(site, job_of(data__frame="first")))
    assert (found["a.png"].frame, found["b.png"].frame) == (0, "middle")


def test_labels_go_through_the_sites_own_map(tmp_path: Path, job: Job) -> None:
    site = table(tmp_path, "path,label,patient\na.png,links,p\nb.png,right,q\n")
    site = SiteData("s", site.root, label_map={"links": "left"})
    assert [sample.target for sample in read_samples(site, job)] == [(0,), (1,)]


def test_several_labels_are_split_at_the_bar_sorted_and_may_be_none(tmp_path: Path) -> None:
    site = table(tmp_path, "path,label,patient\na.png,c|a,p\nb.png,,q\nc.png, b ,r\nd.png,a|a|x,s\n")
    site = SiteData("s", site.root, label_map={"x": "c"})
    found = read_samples(site, job_of(data__classes="a,b,c", data__multilabel=True))
    assert [sample.target for sample in found] == [(0, 2), (), (1,), (0, 2)]


def test_a_table_may_have_another_name_or_lie_elsewhere(tmp_path: Path, job: Job) -> None:
    site = table(tmp_path / "images", "path,label,patient\na.png,left,p\n")
    for place in ("labels.csv", str((tmp_path / "images" / "labels.csv").resolve())):
        assert len(read_samples(SiteData("s", site.root, csv=place), job)) == 1


HEAD = "path,label,patient,split,box,frame\n"
FAULTS = {
    "unknown label": (HEAD + "a.png,lfet,p,,,\n", "unknown-label", ["labels.csv line 2", "'lfet'", "left, right"]),
    "empty label": (HEAD + "a.png,,p,,,\n", "unknown-label", ["labels.csv line 2"]),
    "several labels": (HEAD + "a.png,left|right,p,,,\n", "unknown-label", ["'left|right'"]),
    "absent files": (
        HEAD + "".join(f"{k}.png,left,p,,,\n" for k in "awxyz"),
        "missing-files",
        ["4 files", "w.png", "y.png"],
    ),
    "no path column": ("file,label\na.png,left\n", "bad-table", ["labels.csv", "file, label"]),
    "no label column": ("path,class\na.png,left\n", "bad-table", ["labels.csv", "path, class"]),
    "semicolons": ("path;label\na.png;left\n", "bad-table", ["labels.csv", "path;label"]),
    "bad split": (HEAD + "a.png,left,p,train,,\nb.png,left,p,holdout,,\n", "bad-table", ["line 3", "'holdout'"]),
    "three numbers": (HEAD + "a.png,left,p,,1 2 3,\n", "bad-table", ["line 2", "'1 2 3'"]),
    "words as box": (HEAD + "a.png,left,p,,a b c d,\n", "bad-table", ["line 2", "'a b c d'"]),
    "a box of NaN": (HEAD + "a.png,left,p,,nan 0 5 5,\n", "bad-table", ["line 2", "nan"]),
    "a boundless box": (HEAD + "a.png,left,p,,0 0 inf 5,\n", "bad-table", ["line 2", "inf"]),
    "an odd digit as frame": (HEAD + "a.png,left,p,,,²\n", "bad-table", ["line 2", "²"]),
    "a row without path": ("label,patient,path\nleft,p\n", "", ["labels.csv"]),
    "no row": (HEAD, "no-data", []),
    "no byte": ("", "no-data", []),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_of_a_table_is_refused_with_its_place_and_word(tmp_path: Path, job: Job, case: str) -> None:
    text, code, words = FAULTS[case]
    found = refusal(table(tmp_path, text), job)
    assert found.code == code or not code
    assert str(tmp_path) in str(found)
    for word in words:
        assert word in str(found)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_that_is_not_utf8_is_refused(tmp_path: Path, job: Job, encoding: str) -> None:
    found = refusal(table(tmp_path, "path,label\na.png,größer\n", encoding), job)
    assert found.code == "bad-table"
    assert "labels.csv" in str(found)


def test_a_table_that_is_not_there_is_named(tmp_path: Path, job: Job) -> None:
    found = refusal(SiteData("s", tmp_path, csv="mine.csv"), job)
    assert found.code == "no-data"
    assert "mine.csv" in str(found)


def test_a_folder_that_is_not_there_or_empty_is_named(tmp_path: Path, job: Job) -> None:
    for root in (tmp_path, tmp_path / "gone"):
        found = refusal(SiteData("s", root), job)
        assert found.code == "no-data"
        assert str(root) in str(found)


# --- folders ----------------------------------------------------------------------------------------------------------


def folders(root: Path, count: int = 8) -> SiteData:
    for number in range(count):
        picture(root / "left" / f"{number}.png")
        picture(root / "right" / "deeper" / f"{number}.PNG")
    return SiteData("s", root)


def test_class_folders_are_read_at_any_depth_and_other_files_passed_over(tmp_path: Path, job: Job) -> None:
    site = folders(tmp_path)
    for name in ("left/readme.txt", "left/.DS_Store", ".hidden/x.png", "loose.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    samples = read_samples(site, job)
    expected = {f"left/{k}.png": (0,) for k in range(8)} | {f"right/deeper/{k}.PNG": (1,) for k in range(8)}
    assert {sample.path: sample.target for sample in samples} == expected
    assert all(sample.split == split_of(sample.path, 0.1, 0.2) for sample in samples)
    assert [sample.path for sample in samples] == sorted(expected)


@pytest.mark.parametrize("words", [("train", "val", "test"), ("Training", "validation", "Testing")])
def test_folders_of_splits_hold_folders_of_classes(tmp_path: Path, job: Job, words: tuple[str, ...]) -> None:
    for word in words:
        folders(tmp_path / word, 2)
    samples = read_samples(SiteData("s", tmp_path), job)
    assert Counter(sample.split for sample in samples) == {"train": 4, "val": 4, "test": 4}
    assert all(sample.split[:2] == sample.path[:2].lower() for sample in samples)


def test_an_unknown_or_empty_class_folder_is_refused_by_name(tmp_path: Path, job: Job) -> None:
    site = folders(tmp_path)
    (tmp_path / "middle").mkdir()
    found = refusal(site, job)
    assert found.code == "unknown-label"
    assert "'middle'" in str(found)
    found = refusal(site, job_of(data__classes="left,middle,right"))
    assert found.code == "no-data"
    assert "'middle'" in str(found)
    assert str(tmp_path / "middle") in str(found)


def test_a_class_may_begin_like_the_folder_of_the_cache(tmp_path: Path) -> None:
    picture(tmp_path / "cachexia" / "a.png")
    picture(tmp_path / "normal" / "b.png")
    samples = read_samples(SiteData("s", tmp_path), job_of(data__classes="normal,cachexia"))
    assert {sample.path: sample.target for sample in samples} == {"cachexia/a.png": (1,), "normal/b.png": (0,)}


def test_a_site_reads_the_same_after_it_has_worked_in_its_own_folder(tmp_path: Path, job: Job) -> None:
    """Without a home of its own a client keeps cache, state and log beside the site.toml, among the images."""
    site = folders(tmp_path)
    before = read_samples(site, job)
    load_dataset(before, site, job)
    Memory(tmp_path, "1", job).save(1, {})
    (tmp_path / "site.log").write_text("a line\n")
    assert read_samples(site, job) == before


@pytest.mark.parametrize("layout", ["folder", "csv"])
def test_dicom_files_of_one_patient_stay_together(tmp_path: Path, layout: str) -> None:
    for number in range(12):
        dicom(tmp_path / ("left", "right")[number % 2] / f"{number}.dcm", f"PAT{number // 4}")
    dicom(tmp_path / "left" / "nobody.dcm", "")
    if layout == "csv":
        rows = [f"{path.relative_to(tmp_path)},{path.parent.name}\n" for path in tmp_path.glob("*/*.dcm")]
        (tmp_path / "labels.csv").write_text("path,label\n" + "".join(rows))
    samples = by_path(read_samples(SiteData("s", tmp_path), job_of(data__test_fraction=0.5)))
    assert len(samples) == 13
    for number in range(12):
        sample = samples[f"{('left', 'right')[number % 2]}/{number}.dcm"]
        assert (sample.patient, sample.split) == (f"PAT{number // 4}", split_of(f"PAT{number // 4}", 0.1, 0.5))
    assert samples["left/nobody.dcm"].patient == "left/nobody.dcm"


def test_new_files_do_not_change_the_split_of_old_ones(tmp_path: Path, job: Job) -> None:
    old = by_path(read_samples(folders(tmp_path, 8), job))
    new = by_path(read_samples(folders(tmp_path, 30), job))
    assert len(new) == 60
    assert {path: new[path] for path in old} == old


def test_so_many_images_per_class_are_kept_for_training_and_validation_and_all_for_testing(tmp_path: Path) -> None:
    many = job_of(data__val_fraction=0.3, data__test_fraction=0.3)
    everything = read_samples(folders(tmp_path, 40), many)
    kept = read_samples(SiteData("s", tmp_path), many.replace(data__max_per_class=3))
    assert set(kept) < set(everything)
    assert kept == sorted(kept, key=lambda sample: sample.path)
    counts = Counter((sample.split, sample.target) for sample in kept)
    for (split, target), number in Counter((sample.split, sample.target) for sample in everything).items():
        assert counts[split, target] == (number if split == "test" else min(number, 3))
    more = read_samples(folders(tmp_path, 42), many.replace(data__max_per_class=3))
    assert len(set(more) & {sample for sample in kept if sample.split != "test"}) >= 12 - 4  # four new files at most


# --- arrays -----------------------------------------------------------------------------------------------------------


def arrays(folder: Path, labels: Any, split: str = "train", **more: Any) -> SiteData:
    images = np.zeros((len(labels), 6, 6), np.uint8)
    np.savez(folder / "data.npz", **{f"{split}_images": images, f"{split}_labels": np.array(labels)}, **more)
    return SiteData("s", folder)


@pytest.mark.parametrize("labels", [[[1], [0], [1]], [1, 0, 1], [1.0, 0.0, 1.0]])
def test_label_k_of_an_array_is_the_jobs_class_k(tmp_path: Path, job: Job, labels: Any) -> None:
    samples = read_samples(arrays(tmp_path, labels, "val"), job)
    expected = [
        Sample("data.npz", (k,), f"data.npz:val:{i}", "val", i, None, "val_images") for i, k in enumerate((1, 0, 1))
    ]
    assert samples == expected


def test_a_number_may_be_mapped_to_a_class(tmp_path: Path, job: Job) -> None:
    site = arrays(tmp_path, [7, 0])
    found = read_samples(SiteData("s", site.root, label_map={"7": "left", "0": "right"}), job)
    assert [sample.target for sample in found] == [(0,), (1,)]


def test_several_labels_of_an_array_are_its_columns(tmp_path: Path) -> None:
    site = arrays(tmp_path, [[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    found = read_samples(site, job_of(data__classes="a,b,c", data__multilabel=True))
    assert [sample.target for sample in found] == [(0, 2), (), (1,)]


@pytest.mark.parametrize(
    "labels", [[0, 2], [0, -1], [[0, 1], [1, 0]]], ids=["too large", "negative", "several columns for one label"]
)
def test_labels_of_an_array_that_are_no_class_are_refused(tmp_path: Path, job: Job, labels: Any) -> None:
    assert "data.npz" in str(refusal(arrays(tmp_path, labels), job))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"text"])
def test_a_broken_array_file_is_refused_by_name(tmp_path: Path, job: Job, content: bytes) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    assert "data.npz" in str(refusal(SiteData("s", tmp_path), job))


def test_the_real_pneumonia_arrays_hold_what_their_source_says(shared_data: Callable[[str], Path]) -> None:
    site = SiteData("s", shared_data("pneumoniamnist_balanced"))
    counts = Counter((sample.split, sample.target[0]) for sample in read_samples(site, job_of()))
    half = {"train": 1214, "val": 135, "test": 234}
    assert counts == {(split, k): number for split, number in half.items() for k in (0, 1)}


# --- COCO -------------------------------------------------------------------------------------------------------------

COCO: dict[str, Any] = {
    "categories": [{"id": 7, "name": "left"}, {"id": 9, "name": "right"}],
    "images": [
        {"id": 1, "file_name": "a.png", "split": "train"},
        {"id": 2, "file_name": "b.png", "patient": "P"},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 9, "bbox": [0, 1, 2, 3.5]},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [1, 1, 2, 2]},
        {"id": 3, "image_id": 2, "category_id": 9, "bbox": [2, 2, 2, 2]},
    ],
}


def coco(folder: Path, place: str = "", value: Any = None, nested: str = "images") -> SiteData:
    """A COCO site; at ``place`` = "table.row.key" the content has another value."""
    content = json.loads(json.dumps(COCO))
    if place:
        head, row, key = place.split(".")
        content[head][int(row)][key] = value
    for name in "ab":
        picture(folder / nested / f"{name}.png")
    (folder / "annotations.json").write_text(json.dumps(content))
    return SiteData("s", folder)


@pytest.mark.parametrize("nested", ["images", ""])
def test_every_box_of_a_coco_file_is_an_image_of_its_own(tmp_path: Path, job: Job, nested: str) -> None:
    at = f"{nested}/" if nested else ""
    split = split_of("P", 0.1, 0.2)
    assert read_samples(coco(tmp_path, nested=nested), job) == [
        Sample(f"{at}a.png", (1,), f"{at}a.png", "train", box=(0.0, 1.0, 2.0, 3.5)),
        Sample(f"{at}b.png", (0,), "P", split, box=(1.0, 1.0, 2.0, 2.0)),
        Sample(f"{at}b.png", (1,), "P", split, box=(2.0, 2.0, 2.0, 2.0)),
    ]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("annotations.0.image_id", 5),
        ("annotations.0.category_id", 5),
        ("annotations.0.bbox", None),
        ("annotations.0.bbox", ["a", 0, 0, 0]),
        ("annotations.0.bbox", [1, 2, 3]),
        ("annotations.0.bbox", []),
        ("annotations.0.bbox", [float("nan"), 0, 3, 3]),
        ("images.0.split", "holdout"),
        ("images.0.split", 3),
    ],
)
def test_a_fault_of_a_coco_file_is_refused_by_name(tmp_path: Path, job: Job, place: str, value: Any) -> None:
    found = refusal(coco(tmp_path, place, value), job)
    assert found.code == "bad-table"
    assert "annotations.json" in str(found)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"categories": 3}', "\xff"])
def test_a_file_that_is_no_coco_file_is_refused_by_name(tmp_path: Path, job: Job, content: str) -> None:
    (tmp_path / "annotations.json").write_text(content, encoding="latin-1")
    assert "annotations.json" in str(refusal(SiteData("s", tmp_path), job))


def test_an_unknown_category_names_the_annotation(tmp_path: Path) -> None:
    found = refusal(coco(tmp_path), job_of(data__classes="left,middle"))
    assert found.code == "unknown-label"
    assert "annotation 1" in str(found)
    assert "'right'" in str(found)


@pytest.mark.parametrize(
    ("site", "images", "cells"),
    [
        ("site_barcelona_pbc", (350, 100, 50), (529, 8274, 367)),
        ("site_iran_raabin", (349, 100, 50), (516, 6289, 28)),
        ("site_bccd", (150, 44, 27), (231, 5130, 246)),
    ],
)
def test_the_real_blood_cells_are_as_many_as_their_source_says(
    shared_data: Callable[[str], Path], site: str, images: tuple[int, ...], cells: tuple[int, ...]
) -> None:
    folder = shared_data("bloodcell_det_multisite") / site
    samples = read_samples(SiteData("s", folder), job_of(data__classes="WBC,RBC,Platelet"))
    assert Counter(sample.target for sample in samples) == {(k,): number for k, number in enumerate(cells)}
    content = json.loads((folder / "annotations.json").read_text())
    with_cells = {item["image_id"] for item in content["annotations"]}
    for split, number in zip(("train", "val", "test"), images, strict=True):
        listed = {item["file_name"] for item in content["images"] if item["split"] == split}
        assert len(listed) == number
        found = {Path(sample.path).name for sample in samples if sample.split == split}
        assert found == {item["file_name"] for item in content["images"] if item["id"] in with_cells} & listed
    assert all((folder / sample.path).is_file() for sample in samples[::50])


# --- as hospitals write them ------------------------------------------------------------------------------------------


def test_a_blank_beside_a_patient_makes_no_second_one(tmp_path: Path, job: Job) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    site = table(tmp_path, "path,label,patient\na.png,left,P017\nb.png,left,P017 \nc.png,right, \n")
    assert [sample.patient for sample in read_samples(site, job)] == ["P017", "P017", "c.png"]


def test_hidden_files_and_folders_in_class_folders_are_no_images(tmp_path: Path, job: Job) -> None:
    site = folders(tmp_path, 2)
    before = read_samples(site, job)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "._0.png").write_bytes(b"what a Mac leaves")
    (folder / ".thumbnails").mkdir()
    picture(folder / ".thumbnails" / "x.png")
    assert read_samples(site, job) == before


@pytest.mark.parametrize("empty", [np.zeros(0), np.zeros((0, 1), int)])
def test_an_array_file_may_have_an_empty_split(tmp_path: Path, job: Job, empty: np.ndarray) -> None:
    images = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "data.npz", train_images=images, train_labels=[0, 1], val_images=images[:0], val_labels=empty)
    assert [sample.split for sample in read_samples(SiteData("s", tmp_path), job)] == ["train", "train"]


@pytest.mark.parametrize("labels", [["left", "right"], [0.7, 0.0], [math.nan, 0.0], [[[0]], [[1]]], 3])
def test_labels_of_an_array_that_are_no_numbers_of_classes_are_refused(tmp_path: Path, job: Job, labels: Any) -> None:
    np.savez(tmp_path / "data.npz", train_images=np.zeros((2, 4, 4), np.uint8), train_labels=np.array(labels))
    found = refusal(SiteData("s", tmp_path), job)
    assert found.code == "bad-table"
    assert "train_labels" in str(found)


def test_a_patient_of_a_coco_file_may_be_a_number_and_that_may_be_0(tmp_path: Path, job: Job) -> None:
    found = read_samples(coco(tmp_path, "images.1.patient", 0), job)
    assert {sample.patient for sample in found if "b.png" in sample.path} == {"0"}


@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_image_of_a_coco_file_without_a_patient_stands_for_itself(tmp_path: Path, job: Job, empty: Any) -> None:
    site = coco(tmp_path)
    file = tmp_path / "annotations.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["patient"] = empty
    file.write_text(json.dumps(content), encoding="utf-8-sig")  # with a mark in front, as Windows writes
    found = read_samples(site, job)
    assert {sample.patient for sample in found} == {sample.path for sample in found}
