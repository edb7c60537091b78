"""Boxes from files to the network's input and back; files made by others and files that are wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal
from shared.imaging.dataset import Dataset, load_dataset, to_float
from shared.imaging.errors import UnreadableImage
from shared.imaging.read import fit
from shared.samples import read_samples
from shared.tasks.detection import batch, count_classes, decode, find
from shared.tasks.detection.boxes import LEAST_SIDE, corners, objects_of, place, to_image, to_input
from shared.tasks.detection.data import changed, truth

CPU = torch.device("cpu")
JOB: Job = job_from_flat(
    {"task": "detection", "data.classes": "cell,dot", "data.size": 64, "model.name": "fasterrcnn_small"}
)
sides = st.integers(5, 400)


# --- places -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(height=sides, width=sides, size=st.integers(32, 300), seed=st.integers(0, 2**32))
def test_a_box_moved_to_the_input_and_back_is_the_box(height: int, width: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = corners(np.concatenate([rng.uniform(-5, width, (4, 2)), rng.uniform(0.1, height, (4, 2))], 1))
    moved = to_input(boxes, (height, width), size)
    np.testing.assert_allclose(to_image(moved, (height, width), size), boxes, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(height=sides, width=sides, size=st.integers(32, 200))
def test_the_place_is_where_fit_puts_the_image(height: int, width: int, size: int) -> None:
    fitted = fit(np.ones((height, width), np.float32), size, size, 1)[0]
    where = place((height, width), size)
    rows, columns = np.flatnonzero(fitted.any(1)), np.flatnonzero(fitted.any(0))
    assert where.corner.tolist() == [columns[0], rows[0]]
    assert where.sides.tolist() == [len(columns), len(rows)]
    whole = to_input(np.array([[0.0, 0, width, height]]), (height, width), size)[0]
    assert whole.tolist() == pytest.approx([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def test_a_rectangle_is_in_its_box_after_the_fit() -> None:
    picture = np.zeros((90, 150), np.float32)
    picture[20:50, 100:140] = 1
    fitted = fit(picture, 64, 64, 1)[0]
    x1, y1, x2, y2 = to_input(np.array([[100.0, 20, 140, 50]]), (90, 150), 64)[0]
    bright = np.argwhere(fitted > 0.5)
    assert np.abs(bright.min(0) - [y1, x1]).max() <= 1
    assert np.abs(bright.max(0) + 1 - [y2, x2]).max() <= 1


def sample(*boxes: tuple[float, ...], path: str = "a.png") -> Sample:
    return Sample(path, (), "p", "train", boxes=tuple((int(box[0]), *box[1:]) for box in boxes))  # type: ignore[misc]


def test_boxes_are_cut_at_the_edge_and_degenerate_ones_dropped_and_counted() -> None:
    found = objects_of(
        sample(
            (0, -10, -10, 30, 30),  # cut to 20 x 20
            (1, 90, 50, 40, 10),  # cut to 10 x 10
            (1, 50, 50, 3, 30),  # 1.9 pixels wide after the fit
            (0, 10, 10, 0, 5),
            (0, 10, 10, -5, 5),
        ),
        (100, 100),
        64,
    )
    np.testing.assert_allclose(found.boxes, np.array([[0, 0, 20, 20], [90, 50, 100, 60]]) * 0.64)
    assert found.classes.tolist() == [0, 1]
    assert found.dropped == 3


# --- files ------------------------------------------------------------------------------------------------------------


def write_picture(path: Path, shape: tuple[int, int] = (60, 80), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*shape, 3)).astype(np.uint8)).save(path)


def write_table(root: Path, rows: list[dict[str, object]]) -> SiteData:
    root.mkdir(parents=True, exist_ok=True)
    columns = ["path", "label", "x", "y", "width", "height", "frame", "patient", "split"]
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)
    return SiteData("a", root)


def row(path: str, label: str = "", box: tuple[float, ...] = (), **more: object) -> dict[str, object]:
    return {"path": path, "label": label} | dict(zip(("x", "y", "width", "height"), box, strict=False)) | more


def write_coco(root: Path, **changes: Any) -> SiteData:
    content = {
        "images": [{"id": 7, "file_name": "a.png", "patient": "q"}, {"id": 8, "file_name": "b.png", "split": "test"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 30, 40]},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [5, 5, 10, 10], "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 5, "bbox": [0, 0, 50, 50], "iscrowd": 1},
        ],
        "categories": [{"id": 3, "name": "dot"}, {"id": 5, "name": "zelle"}],
    }
    for name in ("a.png", "b.png"):
        write_picture(root / name)
    (root / "annotations.json").write_text(json.dumps(content | changes))
    return SiteData("a", root, label_map={"zelle": "cell"})


VOC = """<annotation><filename>{image}</filename><object><name>{label}</name><bndbox><xmin>11</xmin><ymin>21</ymin>
<xmax>30</xmax><ymax>50</ymax></bndbox></object></annotation>"""


def write_voc(root: Path, label: str = "cell", image: str = "one.png") -> SiteData:
    write_picture(root / "JPEGImages" / "one.png")
    (root / "Annotations").mkdir()
    (root / "Annotations" / "one.xml").write_text(VOC.format(image=image, label=label))
    return SiteData("a", root)


def test_a_table_with_a_row_per_box(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_picture(tmp_path / name)
    site = write_table(
        tmp_path,
        [
            row("a.png", "cell", (1, 2, 30, 40), patient="p1", split="val"),
            row("b.png"),
            row("a.png", "dot", (5.5, 6, 7, 8), patient="p1", split="val"),
            row("c.png", "dot", (0, 0, 9, 9)),
        ],
    )
    first, second, third = read_samples(site, JOB)
    assert first.boxes == ((0, 1, 2, 30, 40), (1, 5.5, 6, 7, 8))
    assert (first.patient, first.split) == ("p1", "val")
    assert (second.path, second.boxes) == ("b.png", ())
    assert third.patient == "c.png"
    data = load_dataset([first, second, third], site, JOB)
    assert count_classes(data, JOB) == [1, 2]


def test_coco_with_a_label_map_an_empty_image_and_a_crowd(tmp_path: Path) -> None:
    first, second = read_samples(write_coco(tmp_path), JOB)
    assert first.boxes == ((1, 1, 2, 30, 40), (0, 5, 5, 10, 10))
    assert first.patient == "q"
    assert (second.boxes, second.split) == ((), "test")


def test_voc_counts_pixels_from_one_and_its_image_sets_are_the_splits(tmp_path: Path) -> None:
    site = write_voc(tmp_path)
    (found,) = read_samples(site, JOB)
    assert found.boxes == ((0, 10, 20, 20, 30),)
    assert found.path == "JPEGImages/one.png"
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("one 1\n")
    assert read_samples(site, JOB)[0].split == "test"


def test_a_voc_image_goes_by_the_name_of_its_annotation_where_the_file_name_is_wrong(tmp_path: Path) -> None:
    assert read_samples(write_voc(tmp_path, image="elsewhere.jpg"), JOB)[0].path == "JPEGImages/one.png"


def test_names_of_voc_files_may_hold_spaces_and_brackets(tmp_path: Path) -> None:
    site = write_voc(tmp_path)
    for name in ("cell [2] 1", "cell 1"):
        write_picture(tmp_path / "JPEGImages" / f"{name}.png")
        (tmp_path / "Annotations" / f"{name}.xml").write_text(VOC.format(image="elsewhere.png", label="cell"))
    (tmp_path / "Annotations" / "._one.xml").write_bytes(b"\0\5\x16\7")  # as macOS leaves beside files
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("cell [2] 1\ncell 1 -1\none  1\n")
    found = read_samples(site, JOB)
    assert [case.path for case in found] == [f"JPEGImages/{name}.png" for name in ("cell 1", "cell [2] 1", "one")]
    assert {case.split for case in found} == {"test"}


def test_a_listed_voc_image_without_annotation_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    site = write_voc(tmp_path)
    write_picture(tmp_path / "JPEGImages" / "two.png")
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("one\ntwo\n")
    data = load_dataset(read_samples(site, JOB), SiteData("a", tmp_path, max_unreadable=0.5), JOB)
    assert [sample.path for sample in data.samples] == ["JPEGImages/one.png"]
    assert [(skip.path, skip.code) for skip in data.skipped] == [("Annotations/two.xml", "no-annotation")]


def test_coco_files_as_other_programs_write_them(tmp_path: Path) -> None:
    """Identifiers that are words, polygons beside the boxes, paths seen from either folder, a mark in front."""
    images = [{"id": "A", "file_name": "in.png"}, {"id": "B", "file_name": "images/a b/deep.png"}]
    boxes = [
        {"id": "x", "image_id": "A", "category_id": 3, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 4, 2, 4, 6]]},
        {
            "id": "y",
            "image_id": "B",
            "category_id": 3,
            "bbox": [5, 6, 7, 8],
            "segmentation": {"counts": "0", "size": []},
        },
    ]
    write_picture(tmp_path / "images" / "in.png")
    write_picture(tmp_path / "images" / "a b" / "deep.png")
    site = write_coco(tmp_path, images=images, annotations=boxes)
    annotations = tmp_path / "annotations.json"
    annotations.write_bytes(b"\xef\xbb\xbf" + annotations.read_bytes())
    found = read_samples(site, JOB)
    assert [(case.path, case.boxes) for case in found] == [
        ("images/a b/deep.png", ((1, 5, 6, 7, 8),)),
        ("images/in.png", ((1, 1, 2, 3, 4),)),
    ]
    assert len(load_dataset(found, site, JOB)) == 2


def test_every_real_voc_file_is_read_as_pillow_and_its_xml_say(shared_data: Callable[[str], Path]) -> None:
    root = shared_data("bccd_voc_fixture")
    site = SiteData("voc", root, label_map={"Platelets": "Platelet"})
    job = JOB.replace(data__classes="WBC,RBC,Platelet", data__channels=3, data__size=128)
    samples = read_samples(site, job)
    assert len(samples) == 60
    dropped = 0
    for found in samples:
        tree = ElementTree.parse(root / "Annotations" / f"{Path(found.path).stem}.xml")
        ends = [
            [int(item.findtext(key) or "") for key in ("xmin", "ymin", "xmax", "ymax")] for item in tree.iter("bndbox")
        ]
        assert [(x + 1, y + 1, x + w, y + h) for _, x, y, w, h in found.boxes] == [tuple(item) for item in ends]
        with Image.open(root / found.path) as image:
            shape = (image.height, image.width)
        own = objects_of(found, shape, 128)
        dropped += own.dropped
        assert len(own.boxes) + own.dropped == len(ends)
    assert dropped >= 2  # its manifest lists two of no extent


def test_real_coco_files_give_the_boxes_pycocotools_gives(shared_data: Callable[[str], Path]) -> None:
    from pycocotools.coco import COCO

    job = JOB.replace(data__classes="WBC,RBC,Platelet", data__channels=3)
    for folder in sorted(path for path in shared_data("bloodcell_det_multisite").iterdir() if path.is_dir()):
        samples = {sample.path: sample for sample in read_samples(SiteData("s", folder), job)}
        coco = COCO(str(folder / "annotations.json"))
        assert len(samples) == len(coco.imgs)
        for number, image in coco.imgs.items():
            wanted = [(item["category_id"] - 1, *item["bbox"]) for item in coco.imgToAnns[number]]
            found = samples[f"images/{image['file_name']}"]
            assert list(found.boxes) == wanted
            assert found.split == image["split"]


def test_lungs_are_one_folder_with_two_classes(shared_data: Callable[[str], Path]) -> None:
    job = JOB.replace(data__classes="Right Lung,Left Lung")
    samples = read_samples(SiteData("s", shared_data("cxr_lung_boxes_ccby")), job)
    assert [sum(found.split == split for found in samples) for split in ("train", "val", "test")] == [84, 0, 29]
    assert all(sorted(box[0] for box in found.boxes) == [0, 1] for found in samples)
    right, left = (np.mean([box[1] for found in samples for box in found.boxes if box[0] == k]) for k in (0, 1))
    assert right < left  # the patient's right is on the left of the picture


@pytest.mark.parametrize(
    ("rows", "code", "says"),
    [
        ([row("a.png", "cell", (1, 2, 3))], "bad-table", "line 2.*four numbers"),
        ([row("a.png", "cell", ("nan", 2, 3, 4))], "bad-table", "line 2.*four numbers"),  # type: ignore[arg-type]
        ([row("a.png", "", (1, 2, 3, 4))], "bad-table", "line 2.*empty label.*a.png"),
        ([row("a.png"), row("a.png", "cell", (1, 2, 3, 4))], "bad-table", "line 2.*empty label.*a.png"),
        ([row("a.png", "cell", (1, 2, 3, 4), split="nein")], "bad-table", "line 2.*'nein'.*train, val or test"),
        (
            [row("a.png", "cell", (1, 2, 3, 4), split="val"), row("a.png", "dot", (1, 2, 3, 4), split="test")],
            "bad-table",
            "line 3.*a.png.*'test' and 'val' as split",
        ),
        ([row("film.mp4", "cell", (1, 2, 3, 4))], "bad-table", "line 2.*film.mp4 is a film.*column frame"),
        ([row("a.png", "cell", (1, 2, 3, 4), frame="two")], "bad-table", "line 2.*'two'"),
        ([row("gone.png", "cell", (1, 2, 3, 4))], "missing-files", "gone.png"),
    ],
)
def test_a_table_that_is_wrong_is_refused_by_line(
    tmp_path: Path, rows: list[dict[str, object]], code: str, says: str
) -> None:
    write_picture(tmp_path / "a.png")
    (tmp_path / "film.mp4").write_bytes(b"x")
    site = write_table(tmp_path, rows)
    with pytest.raises(SiteRefusal, match=f"labels.csv {says}" if "line" in says else says) as caught:
        read_samples(site, JOB)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        (
            {"annotations": [{"id": 1, "image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1]}]},
            "bad-table",
            "no image 9",
        ),
        ({"annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0]}]}, "bad-table", "four numbers"),
        ({"annotations": [{"id": 1, "image_id": 7}]}, "bad-table", "category_id"),
        ({"annotations": [{"id": 4, "image_id": 7, "category_id": 3}]}, "bad-table", "annotation 4: box.*four numbers"),
        ({"annotations": 5}, "bad-table", "not a COCO file"),
        ({"images": [{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}]}, "bad-table", "b.png.*id 7"),
        ({"images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "a.png"}]}, "bad-table", "a.png.*twice"),
        ({"images": [{"id": 7, "file_name": "a.mp4"}], "annotations": []}, "bad-table", "a.mp4.*film.*'frame'"),
    ],
)
def test_a_coco_file_that_is_wrong_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], code: str, says: str
) -> None:
    with pytest.raises(SiteRefusal, match=f"annotations.json.*{says}") as caught:
        read_samples(write_coco(tmp_path, **changes), JOB)
    assert caught.value.code == code


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": []}', "\0", '"text"'])
def test_what_is_no_coco_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(SiteRefusal, match=r"annotations\.json: not a COCO file"):
        read_samples(SiteData("a", tmp_path), JOB)


def fault_of(site: SiteData) -> tuple[str, str]:
    """The fault of the one sample that has one."""
    (found,) = (sample for sample in read_samples(site, JOB) if sample.fault)
    with pytest.raises(UnreadableImage) as caught:
        decode(found, site, JOB)
    assert (caught.value.code, caught.value.detail) == found.fault
    assert found.fault is not None
    return found.fault


def test_an_image_with_an_object_of_an_unknown_class_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    for name in "ab":
        write_picture(tmp_path / "table" / f"{name}.png")
    rows = [row("a.png", "nerve", (1, 2, 3, 4)), row("a.png", "cell", (1, 2, 3, 4)), row("b.png", "cell", (1, 2, 9, 9))]
    table = write_table(tmp_path / "table", rows)
    code, detail = fault_of(table)
    assert code == "unknown-class"
    assert re.search(r"labels.csv line 2: label 'nerve' is not a class of the job .cell, dot.; map it", detail)
    with pytest.raises(SiteRefusal, match="'nerve' is not a class"):  # every such label would be wrong
        read_samples(dataclasses.replace(table, label_map={"nerve": "neuron"}), JOB)
    assert len(read_samples(dataclasses.replace(table, label_map={"nerve": "dot"}), JOB)) == 2
    data = load_dataset(read_samples(table, JOB), dataclasses.replace(table, max_unreadable=0.5), JOB)
    assert [(item.path, item.code) for item in data.skipped] == [("a.png", "unknown-class")]
    assert [sample.path for sample in data.samples] == ["b.png"]
    for number, (categories, says) in enumerate(
        (([{"id": 3, "name": "dot"}], "category 5"), ([{"id": 3, "name": "dot"}, {"id": 5, "name": "x"}], "'x'"))
    ):
        code, detail = fault_of(write_coco(tmp_path / f"coco{number}", categories=categories))
        assert code == "unknown-class"
        assert re.search(rf"annotations.json annotation 2: .*{says}", detail)


def test_of_a_voc_file_that_is_wrong_its_image_is_left_out_and_named(tmp_path: Path) -> None:
    site = write_voc(tmp_path)
    annotation = tmp_path / "Annotations" / "one.xml"
    good, others = annotation.read_text(), len(read_samples(site, JOB)) - 1
    for content, code, says in (
        (good[:-20], "bad-annotation", "not a Pascal VOC file"),
        (good.replace("21", "two"), "bad-annotation", "four numbers"),
        (good.replace("<xmax>30</xmax>", ""), "bad-annotation", "four numbers"),
        (good.replace("cell", "nerve"), "unknown-class", "'nerve'"),
    ):
        annotation.write_text(content)
        found, detail = fault_of(site)
        assert found == code
        assert re.search(rf"one\.xml.*{says}", detail)
        assert sum(sample.fault is None for sample in read_samples(site, JOB)) == others
    annotation.write_text(good)
    os.remove(tmp_path / "JPEGImages" / "one.png")
    code, detail = fault_of(site)
    assert code == "not-found"
    assert re.search(r"one\.xml: its image 'one\.png' is not in", detail)


def test_an_image_of_another_size_than_its_boxes_were_drawn_in_is_left_out(tmp_path: Path) -> None:
    """Shrunk after it was annotated, say: its boxes would lie beside the objects."""
    site = write_coco(tmp_path)
    annotations = json.loads((tmp_path / "annotations.json").read_text())
    width, height = Image.open(tmp_path / "a.png").size
    for said, good in (((width, height), True), ((0, 0), True), ((2 * width, 2 * height), False)):
        annotations["images"][0] |= {"width": said[0], "height": said[1]}
        (tmp_path / "annotations.json").write_text(json.dumps(annotations))
        found = next(sample for sample in read_samples(site, JOB) if sample.path.endswith("a.png"))
        if good:
            decode(found, site, JOB)
            continue
        with pytest.raises(UnreadableImage, match="annotated-size") as caught:
            decode(found, site, JOB)
        assert f"a.png is {width}x{height}, its boxes are said to lie in {said[0]}x{said[1]}" in caught.value.detail
    voc = write_voc(tmp_path / "voc")
    annotation = tmp_path / "voc" / "Annotations" / "one.xml"
    text = annotation.read_text().replace("<object>", "<size><width>7</width><height>9</height></size><object>", 1)
    annotation.write_text(text)
    found = next(sample for sample in read_samples(voc, JOB) if sample.path.endswith("one.png"))
    with pytest.raises(UnreadableImage, match="annotated-size"):
        decode(found, voc, JOB)


def test_a_folder_of_none_of_the_layouts_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(SiteRefusal, match=r"neither labels\.csv, annotations\.json nor a folder Annotations"):
        read_samples(SiteData("a", tmp_path), JOB)


def test_a_box_outside_its_image_makes_that_image_unreadable_and_the_rest_goes_on(tmp_path: Path) -> None:
    for k in range(4):
        write_picture(tmp_path / f"{k}.png")
    boxes = [(1, 1, 20, 20), (80, 10, 20, 20), (10, -30, 20, 20), (60, 40, 100, 100)]
    site = write_table(tmp_path, [row(f"{k}.png", "cell", box) for k, box in enumerate(boxes)])
    samples = read_samples(site, JOB)
    with pytest.raises(UnreadableImage) as caught:
        decode(samples[1], site, JOB)
    assert caught.value.code == "box-outside"
    assert "1.png: box 80 10 20 20 in (60, 80)" in caught.value.detail
    data = load_dataset(samples, SiteData("a", tmp_path, max_unreadable=0.5), JOB)
    assert [(skip.path, skip.code) for skip in data.skipped] == [("1.png", "box-outside"), ("2.png", "box-outside")]
    assert len(data) == 2
    with pytest.raises(SiteRefusal, match=r"2 of 4 .*1\.png \(box-outside\)"):
        load_dataset(samples, site, JOB)


def test_degenerate_boxes_are_counted_where_they_can_be_seen(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    site = write_table(tmp_path, [row("a.png", "cell", (1, 1, 20, 20)), row("a.png", "dot", (5, 5, 0, 7))])
    data = load_dataset(read_samples(site, JOB), site, JOB)
    assert data.columns["dropped"][0].tolist() == [1]
    assert count_classes(data, JOB) == [1, 0]
    assert truth(data, 0, JOB).dropped == 1


def test_every_image_of_a_folder_is_found_and_every_frame_of_a_film(tmp_path: Path) -> None:
    from shared.imaging.video import frame_count

    write_picture(tmp_path / "deep" / "a.png")
    write_picture(tmp_path / ".hidden" / "b.png")
    assert [found.path for found in find(tmp_path, JOB)] == ["deep/a.png"]
    assert [found.path for found in find(tmp_path / "deep" / "a.png", JOB)] == ["a.png"]
    film = write_film(tmp_path / "deep" / "film.avi", 5)
    assert frame_count(film) == 5
    found = [(item.path, item.frame) for item in find(tmp_path, JOB)]
    assert found == [("deep/a.png", "middle"), *(("deep/film.avi", k) for k in range(5))]
    assert [item.frame for item in find(film, JOB)] == [0, 1, 2, 3, 4]


# --- films ------------------------------------------------------------------------------------------------------------


def write_film(path: Path, frames: int) -> Path:
    """A film whose frame k is of the grey value 20 k, without loss."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 80, 60, "bgr0"
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((60, 80, 3), 20 * k, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_frames_of_a_film_have_boxes_of_their_own(tmp_path: Path) -> None:
    write_film(tmp_path / "film.avi", 6)
    site = write_table(
        tmp_path,
        [
            row("film.avi", "cell", (1, 1, 20, 20), frame=4),
            row("film.avi", "dot", (5, 5, 30, 30), frame=4),
            row("film.avi", frame=1),
            row("film.avi", "dot", (5, 5, 30, 30), frame=9),
        ],
    )
    samples = read_samples(site, JOB)
    assert [(item.frame, len(item.boxes)) for item in samples] == [(1, 0), (4, 2), (9, 1)]
    assert len({item.split for item in samples}) == 1  # a film stands for a patient
    data = load_dataset(samples, SiteData("a", tmp_path, max_unreadable=0.5), JOB)
    assert [(skip.path, skip.code) for skip in data.skipped] == [("film.avi", "frame-out-of-range")]
    assert [round(float(to_float(data.columns["image"][i]).max()) * 255) for i in range(2)] == [20, 80]


def test_a_film_without_an_annotated_frame_counts_as_one_file_that_cannot_be_used(tmp_path: Path) -> None:
    write_film(tmp_path / "film.avi", 3)
    write_film(tmp_path / "other.avi", 3)
    rows = [row("film.avi", "dot", (5, 5, 30, 30), frame=k) for k in range(3)]
    samples = read_samples(write_table(tmp_path, rows), JOB)
    data = load_dataset(samples, SiteData("a", tmp_path, max_unreadable=0.3), JOB)
    assert len(data) == 3
    assert [(skip.path, skip.code) for skip in data.skipped] == [("other.avi", "no-annotation")]


# --- batches ----------------------------------------------------------------------------------------------------------


def data_of(job: Job, *cases: tuple[np.ndarray, Sample]) -> Dataset:
    """Square images (size, size) in [0, 1] in memory."""
    images = np.stack([np.rint(image * 65535).astype(np.uint16)[None] for image, _ in cases])
    shapes = np.array([image.shape for image, _ in cases], np.int64)
    return Dataset.of([case for _, case in cases], image=images, shape=shapes)


def test_a_batch_is_normalised_and_its_labels_start_at_one() -> None:
    data = data_of(JOB, (np.full((64, 64), 0.5), sample((1, 8, 16, 24, 32))), (np.ones((64, 64)), sample()))
    found = batch(data, [0, 1], JOB, CPU, train=True)
    assert found.images.shape == (2, 1, 64, 64)
    torch.testing.assert_close(found.images[:, 0, 0, 0], torch.tensor([0.0, 2.0]), atol=1e-4, rtol=0)
    assert found.targets[0]["boxes"].tolist() == [[8, 16, 32, 48]]
    assert found.targets[0]["labels"].tolist() == [2]
    assert found.targets[1]["boxes"].shape == (0, 4)
    assert found.targets[1]["labels"].dtype == torch.int64


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    flip=st.sampled_from(["none", "horizontal", "vertical", "both"]),
    shift=st.sampled_from([0.0, 0.2]),
    zoom=st.sampled_from([0.0, 0.3]),
)
def test_boxes_go_where_their_rectangles_go(seed: int, flip: str, shift: float, zoom: float) -> None:
    """The bright pixels of a rectangle after the change lie in its box and fill it."""
    job = JOB.replace(augment__flip=flip, augment__shift=shift, augment__zoom=zoom)
    rng = np.random.default_rng(seed)
    x, y = rng.integers(16, 30, 2)
    image = torch.zeros(1, 64, 64)
    image[0, y : y + 20, x : x + 16] = 1
    torch.manual_seed(seed)
    new, boxes, labels = changed(image, torch.tensor([[x, y, x + 16, y + 20]]).float(), torch.tensor([1]), job)
    bright = np.argwhere(new[0].numpy() > 0.5)
    if not len(bright):
        assert len(boxes) == len(labels) == 0
        return
    (x1, y1, x2, y2) = boxes[0].tolist()
    assert np.abs(bright.min(0) - [y1, x1]).max() <= 1.5
    assert np.abs(bright.max(0) + 1 - [y2, x2]).max() <= 1.5


def test_boxes_left_degenerate_by_a_change_are_dropped_and_none_leaves_the_image() -> None:
    job = JOB.replace(augment__shift=0.5, augment__zoom=0.5, augment__rotate=20)
    boxes = torch.tensor([[0.0, 0, 6, 6], [30, 30, 40, 40], [58, 20, 64, 30]])
    sizes = set()
    torch.manual_seed(0)
    for _ in range(60):
        _, moved, labels = changed(torch.rand(1, 64, 64), boxes, torch.tensor([1, 2, 2]), job)
        sizes.add(len(moved))
        assert len(moved) == len(labels)
        assert (moved >= 0).all()
        assert (moved <= 64).all()
        assert (moved[:, 2:] - moved[:, :2] >= LEAST_SIDE).all()
    assert len(sizes) > 1


def test_an_image_without_boxes_can_be_changed() -> None:
    job = JOB.replace(augment__flip="both", augment__shift=0.1, augment__rotate=5, augment__intensity=0.2)
    new, boxes, labels = changed(torch.rand(1, 64, 64), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), job)
    assert new.shape == (1, 64, 64)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)


def test_nothing_changes_at_evaluation_and_the_global_seed_decides_in_training() -> None:
    job = JOB.replace(augment__flip="both", augment__shift=0.2, augment__intensity=0.3)
    data = data_of(job, (np.random.default_rng(0).random((64, 64)), sample((0, 10, 10, 20, 20))))
    still = [batch(data, [0], job, CPU, train=False).images for _ in range(2)]
    assert torch.equal(*still)
    moved = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        moved.append(batch(data, [0], job, CPU, train=True))
    assert torch.equal(moved[0].images, moved[1].images)
    assert torch.equal(moved[0].targets[0]["boxes"], moved[1].targets[0]["boxes"])
    assert not torch.equal(moved[0].images, moved[2].images)
