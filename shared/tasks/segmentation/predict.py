"""Masks of new images, and the files they are written to: PNG, NIfTI or DICOM SEG, as the image was."""

from __future__ import annotations

import contextlib
import csv
import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate

from shared.cases import Sample, SiteData
from shared.composed import composed, find_cases
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.imaging.dicom import dicom_frame_count
from shared.imaging.errors import UnreadableImage, only_unreadable
from shared.imaging.masks import write_nifti, write_segmentation
from shared.imaging.nifti import is_nifti_name
from shared.imaging.segments import segment_labels
from shared.imaging.volumes import is_volume, read_stack, source_files
from shared.samples import find_images, make_sample
from shared.tasks.segmentation.layouts import IMAGES, MASKS, stem
from shared.tasks.segmentation.learning import likeliest, outcomes
from shared.tasks.segmentation.measures import find_objects
from shared.tasks.segmentation.models import dimensions


class Prediction(NamedTuple):
    """The mask of one image on the file's own grid and, if the job has labels of whole images, the share of each.

    ``mask`` is int32 (*size): 0 background, k for the k-th class, or objects numbered from 1.
    """

    mask: np.ndarray
    shares: tuple[float, ...]


def predict(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Iterator[Prediction]:
    """The prediction of each image, in order."""
    for index, (logits, of_image) in enumerate(outcomes(model, data, job, device)):
        size = data.columns["size"][index].tolist()
        if list(logits.shape[1:]) != size:  # the job resamples: back to where the file's pixels are
            mode = "bilinear" if len(size) == 2 else "trilinear"
            logits = interpolate(logits[None], size, mode=mode, align_corners=False)[0]
        mask = likeliest(logits).numpy().astype(np.int32)
        if job.data.masks == "instances":
            mask = find_objects(mask > 0)
        yield Prediction(mask, () if of_image is None else tuple(of_image.double().softmax(0).tolist()))


def find(path: Path, job: Job) -> list[Sample]:
    """The unlabelled cases in a file or folder: pictures for a 2D network, volumes (NIfTI, DICOM series) for a 3D one.

    Paths are relative to the folder, or to that of the file. Of a site's own folder the masks are no cases. Cases of
    several images come in a table.
    """
    flat = dimensions(job) == 2
    if composed(job):
        return find_cases(path, job)
    if not path.is_dir() or (not flat and is_volume(path)):
        name = path.name if path.is_file() else "."
        return [make_sample(job, name, (), path.name, "test")]
    if flat:
        cases = find_images(path, job)
    else:
        cases = [make_sample(job, name, (), name, "test") for name in _volumes_below(path, path)]
    masks = _masks_below(path)
    return [case for case in cases if not _is_mask(path / case.path, masks)]


def _masks_below(root: Path) -> set[Path]:
    """What sites' layouts in a folder say are masks: the files of a table, and folders beside one of images."""
    tables, folders = set(), set()
    for table in root.rglob("*.csv"):
        with contextlib.suppress(OSError, ValueError, csv.Error), table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if {"path", "mask"} <= set(rows.fieldnames or ()):
                tables |= {table.parent / row["mask"] for row in rows if row["mask"]}
    for name in MASKS:
        folders |= {folder for folder in root.rglob(name) if (folder.parent / IMAGES).is_dir()}
    return tables | folders


def _is_mask(path: Path, masks: set[Path]) -> bool:
    """Whether a file is one of ``masks`` or lies in one; or is a DICOM segmentation, which no image is."""
    if not masks.isdisjoint((path, *path.parents)):
        return True
    try:
        return path.is_file() and _is_dicom(path) and only_unreadable(segment_labels)(path) is not None
    except (OSError, UnreadableImage):
        return False  # broken: reading will say so


def _volumes_below(folder: Path, root: Path) -> Iterator[str]:
    """Volumes in a folder and the folders in it, hidden ones passed over; a series' slices are not looked at singly."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if is_volume(path):
            yield path.relative_to(root).as_posix()
        elif path.is_dir():
            yield from _volumes_below(path, root)


def write(predictions: Iterable[tuple[Sample, Prediction]], site: SiteData, job: Job, out: Path) -> list[Path]:
    """Write each mask under the path of its image below ``out``; gives the files written.

    NIfTI gives NIfTI on the same grid; a DICOM picture or series gives a DICOM SEG of the classes; any other picture,
    and one frame of many, a PNG of 8 bits, or 16 where there are more than 255 objects. A DICOM picture whose objects
    are numbered gives that PNG too: the SEG has their class only. Where a header lacks what a SEG must repeat of it
    (a StudyInstanceUID, say) there is a PNG or NIfTI instead. The class of each whole image goes to ``labels.csv``.
    """
    written: list[Path] = []
    taken: set[Path] = set()
    table: list[list[object]] = []
    for sample, prediction in predictions:
        written += _write_mask(sample, prediction.mask, site, job, out, taken)
        if prediction.shares:
            best = job.labels[int(np.argmax(prediction.shares))]
            table.append([sample.path, best, *(f"{share:.6f}" for share in prediction.shares)])
    if table:
        written.append(out / "labels.csv")
        # A file name may hold bytes that are no UTF-8: they go out as they came in.
        with written[-1].open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["path", "label", *(f"probability:{name}" for name in job.labels)])
            rows.writerows(table)
    return written


def _write_mask(
    sample: Sample, mask: np.ndarray, site: SiteData, job: Job, out: Path, taken: set[Path]
) -> Iterator[Path]:
    """Write one mask; gives each file it wrote."""
    source = site.root / sample.path
    target = out / (sample.path if sample.path != "." else source.resolve().name)
    target.parent.mkdir(parents=True, exist_ok=True)
    nifti, volume, segmented = is_nifti_name(source), mask.ndim == 3, False
    if not nifti and (volume or (_is_dicom(source) and dicom_frame_count(source) == 1)):
        file = _free(target, ".dcm", taken)
        segmented = _write_segmentation(mask, job, source_files(source) if volume else [source], file)
        if segmented:
            yield file
    if nifti or (volume and not segmented):
        yield (file := _free(target, ".nii.gz", taken))
        affine = None if nifti else read_stack(source).affine
        write_nifti(mask, np.eye(4) if affine is None else affine, file, like=source if nifti else None)
    if not volume and (not segmented or job.data.masks == "instances"):
        yield (file := _free(target, ".png", taken))
        Image.fromarray(mask.astype(np.uint8 if mask.max(initial=0) < 256 else np.uint16)).save(file)


def _write_segmentation(mask: np.ndarray, job: Job, sources: list[Path], file: Path) -> bool:
    """Write a DICOM SEG; False where the images lack what one must have of them."""
    try:
        with warnings.catch_warnings():  # they quote names of patients
            warnings.simplefilter("ignore")
            write_segmentation(np.minimum(mask, len(job.classes)), job.classes, sources, file)
    except (ValueError, AttributeError, TypeError, KeyError, UnreadableImage):
        return False  # highdicom's own, of headers that are no good
    return True


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _free(target: Path, suffix: str, taken: set[Path]) -> Path:
    """A file name not given before: the image's with another suffix, else with that added, else with a number."""
    plain = target.with_name(stem(target.name))
    numbered = (f"{target.name}-{number}{suffix}" for number in itertools.count(2))
    names = itertools.chain((f"{plain.name}{suffix}", f"{target.name}{suffix}"), numbered)
    file = next(target.with_name(name) for name in names if target.with_name(name) not in taken)
    taken.add(file)
    return file
