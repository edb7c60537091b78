"""Boxes as people keep them: COCO json, Pascal VOC xml, and a CSV with a row per box (images and films).

Every reader gives one ``Sample`` per image, with or without objects. Boxes are taken as they stand, in pixels of the
image; what is degenerate or outside is found when the image is decoded. An image whose annotation is of no use is a
sample with a ``fault``: it counts as one that cannot be read, and the others go on.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from shared.cases import SPLITS, Sample, SiteData
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.errors import UnreadableImage
from shared.imaging.read import is_image_name
from shared.imaging.video import frame_count, is_video, is_video_name
from shared.samples import (
    Row,
    class_index,
    exists,
    find_images,
    make_sample,
    parse_box,
    parse_frame,
    parse_split,
    patient_in,
    patient_of,
    read_rows,
)

Boxes = list[tuple[int, float, float, float, float]]

_PLACE = ("x", "y", "width", "height")


def read_samples(site: SiteData, job: Job) -> Iterator[Sample]:
    """All annotated images of a site; see ``shared.samples.read_samples``."""
    form = site.format if site.format != "auto" else _guess_format(site)
    return _READERS[form](site, job)


def find(path: Path, job: Job) -> list[Sample]:
    """Every image below a folder, or the one file, as a case without boxes; of a film every frame."""
    if not path.is_dir():
        return _frames(path, path.name, job) if is_video(path) else find_images(path, job)
    films = [film for film in _films(path) if is_video(path / film)]
    return [*find_images(path, job), *(sample for film in films for sample in _frames(path / film, film, job))]


def _frames(path: Path, name: str, job: Job) -> list[Sample]:
    try:
        frames = frame_count(path)
    except UnreadableImage:
        frames = 1  # decoding says what is wrong
    return [make_sample(job, name, (), name, "test", frame=k) for k in range(frames)]


def _films(root: Path) -> list[str]:
    """Films below a folder by their names, hidden ones passed over."""
    names = (path.relative_to(root) for path in sorted(root.rglob("*")) if is_video_name(path) and path.is_file())
    return [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]


def _guess_format(site: SiteData) -> str:
    if site.csv or (site.root / "labels.csv").is_file():
        return "csv"
    if (site.root / "annotations.json").is_file():
        return "coco"
    if (site.root / "Annotations").is_dir():
        return "voc"
    raise SiteRefusal(
        "no-data", f"{site.root}: holds neither labels.csv, annotations.json nor a folder Annotations; see docs/tasks"
    )


def _class(word: str, where: str, site: SiteData, job: Job) -> int:
    """The class of an object as the site writes it.

    Raises:
        UnreadableImage: "unknown-class": the image is of no use, for what it shows would count as nothing.
        SiteRefusal: the site's own label map makes it a class that the job has not.
    """
    try:
        return class_index(word, where, site, job.classes)
    except SiteRefusal as refusal:
        if word in site.label_map:
            raise
        problem = UnreadableImage("unknown-class", str(refusal))
    raise problem


# --- a CSV with a row per box -----------------------------------------------------------------------------------------


def _from_csv(site: SiteData, job: Job) -> Iterator[Sample]:
    """Columns path, label, x, y, width, height; optional frame, patient, split.

    An image has a row for each object, or one row with an empty label if it has none. Films need the column frame.
    """
    table, rows = read_rows(site, ["path", "label", *_PLACE])
    groups: dict[tuple[str, str], list[tuple[str, Row]]] = {}
    for line, row in enumerate(rows, start=2):
        groups.setdefault((row["path"], row.get("frame") or ""), []).append((f"{table} line {line}", row))
    for (path, frame), members in groups.items():
        where = members[0][0]
        if not frame and is_video_name(path):
            raise SiteRefusal("bad-table", f"{where}: {path} is a film; name the frame, from 0, in the column frame")
        more: dict[str, object] = {"frame": parse_frame(frame, where)} if frame else {}
        patient, split = _agreed("patient", members), parse_split(_agreed("split", members), where)
        patient = patient or patient_of(site.root / path, path)
        try:
            more["boxes"] = tuple(_row_boxes(members, site, job))
        except UnreadableImage as error:
            more["fault"] = (error.code, error.detail)
        yield make_sample(job, path, (), patient, split, **more)
    named = {path for path, _ in groups}
    for film in _films(site.root):
        if film not in named:
            yield make_sample(job, film, (), film, fault=("no-annotation", film))


def _agreed(column: str, members: list[tuple[str, Row]]) -> str:
    """The one value the rows of an image have in a column; '' where the column lacks."""
    words = {row.get(column) or "" for _, row in members}
    if len(words) > 1:
        where, row = members[-1]
        listed = " and ".join(sorted(map(repr, words)))
        raise SiteRefusal("bad-table", f"{where}: the rows of {row['path']} say {listed} as {column}; write one")
    return words.pop()


def _row_boxes(members: list[tuple[str, Row]], site: SiteData, job: Job) -> Boxes:
    boxes: Boxes = []
    for where, row in members:
        label, parts = (row["label"] or "").strip(), [row[key] for key in _PLACE]
        if label:
            boxes.append((_class(label, where, site, job), *parse_box(parts, where)))
        elif any(parts) or len(members) > 1:
            raise SiteRefusal(
                "bad-table", f"{where}: an empty label says that {row['path']} shows no object, but a row of it has one"
            )
    return boxes


# --- COCO -------------------------------------------------------------------------------------------------------------


def _from_coco(site: SiteData, job: Job) -> Iterator[Sample]:
    """``annotations.json``, images beside it or in the folder ``images``.

    An image may have ``split``, ``patient`` and ``frame`` (of a film). Regions of a crowd are passed over.
    """
    path = site.root / "annotations.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # programs on Windows put a mark in front
        yield from _coco_images(content, path, site, job)
    except FileNotFoundError:
        raise SiteRefusal("no-data", f"{path}: no such file") from None
    except OSError as error:
        raise SiteRefusal("bad-table", f"{path}: cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise SiteRefusal("bad-table", f"{path}: not a COCO file: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SiteRefusal("bad-table", f"{path}: not a COCO file: {error}") from None


def _coco_images(content: Any, path: Path, site: SiteData, job: Job) -> Iterator[Sample]:
    names = {item["id"]: item["name"] for item in content["categories"]}
    boxes: dict[Any, Boxes] = {}
    faults: dict[Any, tuple[str, str]] = {}
    for item in content["images"]:
        if item["id"] in boxes:  # whose are its boxes?
            raise SiteRefusal("bad-table", f"{path} image {item['file_name']}: another one has its id {item['id']!r}")
        boxes[item["id"]] = []
    for item in content["annotations"]:
        where = f"{path} annotation {item.get('id', '?')}"
        if item["image_id"] not in boxes:
            raise SiteRefusal("bad-table", f"{where}: there is no image {item['image_id']!r}")
        if item.get("iscrowd"):
            continue
        number, place = item["category_id"], parse_box(item.get("bbox") or (), where)
        try:
            if number not in names:
                raise UnreadableImage("unknown-class", f"{where}: there is no category {number!r}")
            boxes[item["image_id"]].append((_class(names[number], where, site, job), *place))
        except UnreadableImage as error:
            faults.setdefault(item["image_id"], (error.code, error.detail))
    seen: set[tuple[str, Any]] = set()
    for image in content["images"]:
        name, frame = _coco_file(site, image["file_name"]), image.get("frame")
        where = f"{path} image {name}"
        if (name, frame) in seen:
            raise SiteRefusal("bad-table", f"{where}: is listed twice")
        seen.add((name, frame))
        if frame is None and is_video_name(name):
            raise SiteRefusal("bad-table", f"{where}: is a film; give the image a 'frame', a number from 0")
        more: dict[str, object] = {} if frame is None else {"frame": parse_frame(str(frame), where)}
        size = _size(image.get("width"), image.get("height"))
        more |= {"boxes": tuple(boxes[image["id"]]), "size": size, "fault": faults.get(image["id"])}
        patient, split = patient_in(image) or name, parse_split(image.get("split", ""), where)
        yield make_sample(job, name, (), patient, split, **more)


def _size(width: Any, height: Any) -> tuple[int, int] | None:
    """Of the image that boxes were drawn in; None where it is not said, as by programs that write 0."""
    try:
        size = int(width), int(height)
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 else None


def _coco_file(site: SiteData, name: str) -> str:
    """The path of an image: seen from the folder ``images`` or from ``annotations.json``, as programs differ."""
    inner = f"images/{name}"
    return inner if exists(site.root / inner) or not exists(site.root / name) else name


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def _from_voc(site: SiteData, job: Job) -> Iterator[Sample]:
    """``Annotations/*.xml`` and ``JPEGImages``; ``ImageSets/Main/train.txt``, ``val.txt`` and ``test.txt`` if there.

    The pixel in the top left corner is (1, 1), and xmax and ymax belong to the object, as the development kit says. An
    image that an image set lists and no annotation file describes cannot be used, and is not one without objects.
    """
    annotations = sorted((site.root / "Annotations").glob("[!.]*.xml"))
    sets, stems = site.root / "ImageSets" / "Main", {path.stem for path in annotations}
    splits = {stem: split for split in SPLITS for stem in _listed(sets / f"{split}.txt", stems)}
    for stem in sorted(splits.keys() - stems):
        name = f"Annotations/{stem}.xml"
        yield make_sample(job, name, (), name, splits[stem], fault=("no-annotation", name))
    for path in annotations:
        split, name = splits.get(path.stem), f"Annotations/{path.name}"
        try:
            image, boxes, size = _voc_file(path, site, job)
        except UnreadableImage as error:
            yield make_sample(job, name, (), name, split, fault=(error.code, error.detail))
        else:
            patient = patient_of(site.root / image, image)
            yield make_sample(job, image, (), patient, split, boxes=tuple(boxes), size=size)


def _voc_file(path: Path, site: SiteData, job: Job) -> tuple[str, Boxes, tuple[int, int] | None]:
    """The image that an annotation file describes, its boxes, and the size they were drawn in.

    Raises:
        UnreadableImage: "bad-annotation", "not-found" where there is no such image, "unknown-class".
    """
    try:
        root = ElementTree.parse(path).getroot()
        boxes = [_voc_box(item, path, site, job) for item in root.iter("object")]
        return _voc_image(root, path, site), boxes, _size(root.findtext("size/width"), root.findtext("size/height"))
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        problem = UnreadableImage("bad-annotation", f"{path}: not a Pascal VOC file: {error}")
    except SiteRefusal as refusal:  # of a single box: a word where a number belongs
        if refusal.code != "bad-table":
            raise
        problem = UnreadableImage("bad-annotation", str(refusal))
    raise problem


def _listed(path: Path, stems: set[str]) -> list[str]:
    """The names in an image set, a line each; none where there is no such file.

    Those of one class write 1, 0 or -1 behind the name, which may itself hold spaces and end in a number.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if path.is_file() else []
    names = [line.strip() for line in lines if line.strip()]
    return [name if name in stems else re.sub(r"\s+(-1|0|1)$", "", name) for name in names]


def _voc_image(root: ElementTree.Element, path: Path, site: SiteData) -> str:
    """The image of an annotation: the file it names, else the one of the annotation's own name."""
    folder = site.root / "JPEGImages"
    named = (root.findtext("filename") or "").strip()
    if named and (folder / named).is_file():
        return f"JPEGImages/{named}"
    own = [file for file in sorted(folder.glob(f"{glob.escape(path.stem)}.*")) if is_image_name(file)]
    if not own:
        raise UnreadableImage("not-found", f"{path}: its image {named or path.stem!r} is not in {folder}")
    return f"JPEGImages/{own[0].name}"


def _voc_box(item: ElementTree.Element, path: Path, site: SiteData, job: Job) -> tuple[int, float, float, float, float]:
    name = (item.findtext("name") or "").strip()
    ends = [(item.findtext(f"bndbox/{key}") or "").strip() for key in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = parse_box(ends, str(path))
    return _class(name, str(path), site, job), x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1


_READERS = {"csv": _from_csv, "coco": _from_coco, "voc": _from_voc}
