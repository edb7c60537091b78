"""Films and signals with class labels: from a CSV, class folders, or a MedMNIST-style npz."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shared.cases import Sample, SiteData, split_word
from shared.config import Job
from shared.devices import to_device
from shared.errors import SiteRefusal
from shared.imaging.augment import changes, normalise
from shared.imaging.dataset import Dataset, to_float, to_uint16
from shared.imaging.errors import UnreadableImage
from shared.imaging.read import fit, is_image_name
from shared.imaging.sequences import is_film, read_film
from shared.imaging.series import slice_files
from shared.imaging.signals import SUFFIXES, read_signal
from shared.imaging.volumes import window_ends
from shared.samples import class_indices, make_sample, parse_frame, parse_split, patient_of, read_rows
from shared.tasks.classification import read_samples as read_pictures
from shared.tasks.sequence.models import reads_frames

FRAMES, SIGNAL = "frames", "signal"


class Batch(NamedTuple):
    """Normalised films float32 (b, t, channels, size, size) or signals (b, t, leads) on the device, zero after their
    end; the steps of each, int64 (b,); and the class indices of each."""

    series: Tensor
    lengths: Tensor
    targets: list[tuple[int, ...]]


# --- which cases there are --------------------------------------------------------------------------------------------


def read_samples(site: SiteData, job: Job) -> Iterator[Sample]:
    """All labelled films or signals of a site; see ``shared.samples.read_samples``."""
    form = site.format
    if form == "auto" and (site.csv or (site.root / "labels.csv").is_file()):
        form = "csv"
    elif form == "auto":
        form = "npz" if _has_labels(site.root) else "folder"
    return _READERS[form](site, job)


def find_cases(folder: Path, job: Job) -> Iterator[Path]:
    """Every film or signal in a folder and the folders in it, hidden ones passed over.

    A film is a file of several frames, or a folder of pictures of one frame each.
    """
    singles = False
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from find_cases(path, job)
        elif not reads_frames(job):
            if path.suffix.lower() in SUFFIXES:
                yield path
        elif _is_film(path):
            yield path
        else:
            singles = singles or is_image_name(path)
    if singles:
        yield folder


def _is_film(path: Path) -> bool:
    try:
        return is_film(path)
    except UnreadableImage:
        return False  # one of the frames, broken: reading will say so


def _has_labels(root: Path) -> bool:
    """Whether an npz of the folder holds labels, so that it is many cases and not one."""
    for path in root.glob("*.npz"):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if any(name.endswith("_labels") for name in arrays.files):
                    return True
        except (OSError, ValueError, EOFError):
            continue
    return False


def _from_csv(site: SiteData, job: Job) -> Iterator[Sample]:
    """Columns path (a file, or a folder of frames) and label; optional patient, split, key, and frame: the row of an
    array of many cases."""
    table, rows = read_rows(site, ["path", "label"])
    for line, row in enumerate(rows, start=2):
        where = f"{table} line {line}"
        frame = parse_frame(row["frame"], where) if row.get("frame") else "middle"
        target = class_indices(row["label"] or "", where, site, job)
        patient = row.get("patient") or _patient(site.root / row["path"], row["path"])
        split = parse_split(row.get("split") or "", where)
        yield make_sample(job, row["path"], target, patient, split, frame=frame, key=row.get("key") or "")


def _from_folders(site: SiteData, job: Job) -> Iterator[Sample]:
    """``class/case`` or ``split/class/case``, where a case is a file, or a folder of frames."""
    tops = _folders(site.root)
    by_split = bool(tops) and all(split_word(top.name) for top in tops)
    for top in tops if by_split else [site.root]:
        for folder in _folders(top):
            target = class_indices(folder.name, str(folder), site, job)
            cases = list(find_cases(folder, job))
            what = "film" if reads_frames(job) else "signal"
            if not cases:
                raise SiteRefusal("no-data", f"{folder}: the folder of class {folder.name!r} holds no {what}")
            if folder in cases:
                raise SiteRefusal(
                    "no-data", f"{folder}: holds single pictures; give the frames of each film a folder of their own"
                )
            for path in cases:
                name = path.relative_to(site.root).as_posix()
                split = split_word(top.name) if by_split else None
                yield make_sample(job, name, target, _patient(path, name), split, frame="middle")


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _patient(path: Path, fallback: str) -> str:
    """The PatientID of a DICOM file, or of the first in a folder; else the case stands for itself."""
    files = slice_files(path)[:1] if path.is_dir() else [path]
    return patient_of(files[0], fallback) if files else fallback


def _from_npz(site: SiteData, job: Job) -> Iterator[Sample]:
    """``train_images`` (n, t, h, w), (n, t, h, w, 3) or signals (n, t, leads), ``train_labels``, and so on."""
    return read_pictures(dataclasses.replace(site, format="npz"), job)


_READERS = {"csv": _from_csv, "folder": _from_folders, "npz": _from_npz}


# --- from files to arrays ---------------------------------------------------------------------------------------------


def decode(sample: Sample, site: SiteData, job: Job) -> dict[str, np.ndarray]:
    """``frames``: uint16 (t, channels, size, size); or ``signal``: float32 (t, leads).

    Raises:
        UnreadableImage: with a code that says why.
    """
    path, most = site.root / sample.path, job.data.frames
    row = sample.frame if isinstance(sample.frame, int) else None
    if not reads_frames(job):
        return {SIGNAL: read_signal(path, job.data.channels, most, sample.key, row)}
    size, channels = job.data.size, job.data.channels
    window = window_ends(job.data.window)
    found = read_film(
        path, lambda picture: to_uint16(fit(picture, size, size, channels)), most, window, sample.key, row
    )
    return {FRAMES: np.stack(found)}


def decoded_by(job: Job) -> str:
    """What ``decode`` depends on."""
    kind = f"{job.data.size} {job.data.window}" if reads_frames(job) else SIGNAL
    return f"{kind} {job.data.channels} {job.data.frames}"


# --- batches ----------------------------------------------------------------------------------------------------------


def batch(data: Dataset, indices: Sequence[int], job: Job, device: torch.device, train: bool) -> Batch:
    """Some cases, augmented if they are to be trained on, normalised, padded to the longest, on the device."""
    if reads_frames(job):
        series = [_film(data.columns[FRAMES][i], job, train) for i in indices]
    else:
        series = [_signal(data.columns[SIGNAL][i], job, train) for i in indices]
    lengths = torch.tensor([len(one) for one in series], device=device)
    return Batch(
        to_device(pad_sequence(series, batch_first=True), device), lengths, [data.samples[i].target for i in indices]
    )


def _film(raw: np.ndarray, job: Job, train: bool) -> Tensor:
    """One film (t, channels, size, size), all its frames changed and normalised alike."""
    frames = to_float(raw)
    change = changes(job) if train else None
    if change is not None:
        frames = change(frames)
    if job.data.normalise == "image":  # the mean and deviation of the whole film
        return normalise(frames.flatten(0, 1)[None], job).view_as(frames)
    return normalise(frames, job)


def _signal(raw: np.ndarray, job: Job, train: bool) -> Tensor:
    """One signal (t, leads): as it is, or each lead with mean 0 and deviation 1; louder or softer at random."""
    signal = torch.from_numpy(np.array(raw))
    if job.data.normalise == "image":
        signal = (signal - signal.mean(0)) / (signal.std(0, correction=0) + 1e-6)
    if train and job.augment.intensity:
        signal = signal * (1 + (2 * torch.rand(()) - 1) * job.augment.intensity)
    return signal
