"""Images with class labels: from a CSV, class folders, a MedMNIST-style npz, or the boxes of a COCO file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.cases import SPLITS, Sample, SiteData, split_word
from shared.composed import composed, parts_of, require_parts
from shared.config import Job
from shared.devices import to_device
from shared.errors import SiteRefusal
from shared.imaging.augment import augmentation, normalise
from shared.imaging.dataset import Dataset, to_float, to_uint16
from shared.imaging.prepare import fitted, harmonised, prepared_by, spacing_kept
from shared.imaging.read import Picture, crop, is_image_name, read_image
from shared.samples import (
    class_indices,
    make_sample,
    parse_box,
    parse_frame,
    parse_split,
    patient_in,
    patient_of,
    read_rows,
)
from shared.tasks.classification.cases import images_of_cases, values_of_cases


class Batch(NamedTuple):
    """Normalised images float32 (b, channels, size, size) on the device, and the class indices of each.

    Of cases of several images, ``images`` is what ``images_of_cases`` gives; ``values`` are their numbers, if they have
    any: float32 (b, numbers), NaN where missing.
    """

    images: Tensor
    targets: list[tuple[int, ...]]
    values: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the network takes."""
        return (self.images,) if self.values is None else (self.images, self.values)


def read_samples(site: SiteData, job: Job) -> Iterator[Sample]:
    """All labelled images of a site; see ``shared.samples.read_samples``."""
    if composed(job) and site.format not in ("auto", "csv"):
        raise SiteRefusal(
            "bad-table",
            f"[data] format = {site.format!r}: the images and numbers of a case come in a table; set it to csv in "
            "site.toml and give a labels.csv",
        )
    form = "csv" if composed(job) else site.format if site.format != "auto" else _guess_format(site)
    return _READERS[form](site, job)


def decode(sample: Sample, site: SiteData, job: Job) -> dict[str, np.ndarray]:
    """``image``: uint16 (channels, size, size); of a case of several images all their channels, 0 where one is missing.

    ``spacing``: float64 (2,), mm per pixel of it, 0 where unknown, and of a case of several images.

    Raises:
        UnreadableImage: with a code that says why.
    """
    if not job.modalities:
        return _decoded(sample, site, job)
    missing = np.zeros((job.data.channels, job.data.size, job.data.size), np.uint16)
    images = [_decoded(replace(sample, path=name), site, job)["image"] if name else missing for name in sample.paths]
    return {"image": np.concatenate(images), "spacing": np.zeros(2)}


def _decoded(sample: Sample, site: SiteData, job: Job) -> dict[str, np.ndarray]:
    picture = harmonised(read_picture(sample, site), site, job)
    if sample.box:
        picture = crop(picture, sample.box)
    path = site.root / sample.path
    return {"image": to_uint16(fitted(picture, path, job)), "spacing": spacing_kept(picture, path, job)}


def read_picture(sample: Sample, site: SiteData) -> Picture:
    """The picture a sample is, or is cut out of; see ``read_image``."""
    path = site.root / sample.path
    return _picture(str(path), _changed(path), sample.frame, sample.key)


@lru_cache(maxsize=1)  # the boxes of one file come one after the other and share its decoding
def _picture(path: str, _changed: int, frame: int | str, key: str) -> Picture:
    return read_image(path, frame=frame, key=key or None)


def _changed(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def decoded_by(job: Job) -> str:
    """What ``decode`` depends on."""
    return f"{prepared_by(job)} {len(job.modalities)}"


def batch(data: Dataset, indices: Sequence[int], job: Job, device: torch.device, train: bool) -> Batch:
    """Some images, augmented if they are to be trained on, on the device, normalised."""
    images = to_float(data.columns["image"].take(indices))
    samples = [data.samples[i] for i in indices]
    if job.modalities:
        images = images_of_cases(images, samples, job, device, train)
    else:
        if train:
            images = augmentation(job)(images)
        images = normalise(to_device(images, device, torch.channels_last), job)
    values = values_of_cases(samples, device) if job.tabular else None
    return Batch(images, [sample.target for sample in samples], values)


def _guess_format(site: SiteData) -> str:
    if site.csv or (site.root / "labels.csv").is_file():
        return "csv"
    if (site.root / "annotations.json").is_file():
        return "coco-crops"
    if any(site.root.glob("*.npz")):
        return "npz"
    return "folder"


def _from_csv(site: SiteData, job: Job) -> Iterator[Sample]:
    """Columns path, label; optional patient, split, frame, key, and box as ``x y w h``.

    Of composed cases ``path:NAME`` for each of their images, and a column for each of their numbers; frame, key and box
    hold for all images of a case.
    """
    table, rows = read_rows(site, ["label"] if job.modalities else ["path", "label"])
    if composed(job):
        require_parts(site, table, rows, job)
    for line, row in enumerate(rows, start=2):
        where = f"{table} line {line}"
        more: dict[str, object] = {}
        if row.get("frame"):
            more["frame"] = parse_frame(row["frame"], where)
        if row.get("box"):
            more["box"] = parse_box(row["box"].split(), where)
        if row.get("key"):
            more["key"] = row["key"]
        more |= parts_of(row, where, site, job)
        path = str(more.pop("path"))
        split = parse_split(row.get("split") or "", where)
        patient = row.get("patient") or patient_of(site.root / path, path)
        yield make_sample(job, path, class_indices(row["label"] or "", where, site, job), patient, split, **more)


def _from_folders(site: SiteData, job: Job) -> Iterator[Sample]:
    """``class/image`` or ``split/class/image``."""
    tops = _folders(site.root)
    by_split = bool(tops) and all(split_word(top.name) for top in tops)
    for top in tops if by_split else [site.root]:
        for folder in _folders(top):
            target = class_indices(folder.name, str(folder), site, job)
            files = [path for path in sorted(folder.rglob("*")) if is_image_name(path) and _is_shown(path, folder)]
            if not files:
                raise SiteRefusal("no-data", f"{folder}: the folder of class {folder.name!r} holds no image")
            for path in files:
                name = path.relative_to(site.root).as_posix()
                yield make_sample(job, name, target, patient_of(path, name), split_word(top.name) if by_split else None)


def _is_shown(path: Path, folder: Path) -> bool:
    """Whether it is a file, neither hidden nor in a hidden folder: thumbnails, what a Mac leaves beside each file."""
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _from_npz(site: SiteData, job: Job) -> Iterator[Sample]:
    """``train_images``/``train_labels`` and so on (MedMNIST); label k is the job's k-th class unless mapped."""
    for path in sorted(site.root.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                labels = {split: arrays[f"{split}_labels"] for split in SPLITS if f"{split}_labels" in arrays}
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise SiteRefusal("bad-table", f"{path}: not an npz of labelled images: {error}") from None
        for split, values in labels.items():
            table = _labels_of(values, f"{path}: {split}_labels")
            if not job.data.multilabel and table.shape[1] != 1:
                raise SiteRefusal(
                    "bad-table", f"{path}: {split}_labels has {table.shape[1]} columns; set data.multilabel"
                )
            for index, value in enumerate(table):
                where = f"{path.name} {split}_labels[{index}]"
                numbers = [i for i, on in enumerate(value) if on] if job.data.multilabel else [int(value[0])]
                target = class_indices("|".join(_class_name(number, site, job) for number in numbers), where, site, job)
                patient = f"{path.name}:{split}:{index}"
                yield make_sample(job, path.name, target, patient, split, frame=index, key=f"{split}_images")


def _labels_of(values: np.ndarray, where: str) -> np.ndarray:
    """Labels of an npz as whole numbers, (n, columns)."""
    found = np.asarray(values)
    if found.ndim not in (1, 2):
        raise SiteRefusal("bad-table", f"{where}: one label, or one row of labels, for each image is needed")
    table = found.reshape(len(found), -1) if len(found) else np.zeros((0, 1), int)
    if table.dtype.kind not in "biuf" or (table.dtype.kind == "f" and (table != np.round(table)).any()):
        raise SiteRefusal("bad-table", f"{where}: the labels must be the numbers of classes")
    return table.astype(np.int64)


def _class_name(number: int, site: SiteData, job: Job) -> str:
    """The class with that number in the job's order, unless the site maps the number itself."""
    mapped = str(number) in site.label_map or not 0 <= number < len(job.classes)
    return str(number) if mapped else job.classes[number]


def _from_coco(site: SiteData, job: Job) -> Iterator[Sample]:
    """Every box of a COCO file as an image of its own; all boxes of an image stay on one side of the split."""
    path = site.root / "annotations.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        names = {item["id"]: item["name"] for item in content["categories"]}
        images = {item["id"]: item for item in content["images"]}
        for item in content["annotations"]:
            image = images[item["image_id"]]
            file = f"images/{image['file_name']}" if (site.root / "images").is_dir() else image["file_name"]
            target = class_indices(names[item["category_id"]], f"{path} annotation {item['id']}", site, job)
            patient = patient_in(image) or file
            where = f"{path} annotation {item['id']}"
            split, box = parse_split(image.get("split", ""), where), parse_box(item["bbox"], where)
            yield make_sample(job, file, target, patient, split, box=box)
    except FileNotFoundError:
        raise SiteRefusal("no-data", f"{path}: no such file") from None
    except (KeyError, TypeError, ValueError) as error:
        raise SiteRefusal("bad-table", f"{path}: not a COCO file: {error!r}") from None


_READERS = {"csv": _from_csv, "folder": _from_folders, "npz": _from_npz, "coco-crops": _from_coco}
