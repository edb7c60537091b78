"""Cohorts of dynamic contrast-enhanced scans, drawn by a program, whose two classes differ in the time course alone.

A contrast agent is given while a breast lesion is scanned again and again. In both classes it lights up between two
frames or within one, and has the same brightness halfway between then and the end; "persistent" (as benign lesions do)
goes on rising, "washout" (as malignant ones do) falls. Place, shape, size and brightness come from the same
distributions, brightness from a wide one, so one frame tells next to nothing. Neither do frames out of order: a lesion
that falls shows the same brightnesses as one that rises by as much, and the tissue around it, which could tell early
frames from late ones, rises as often as it falls.

Every random number comes from a stream named by (seed, site, split, patient): the same arguments give the same bytes, a
site does not depend on how many others there are, and more patients leave the earlier ones as they were.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    MRImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    RLELossless,
    generate_uid,
)
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped,unused-ignore]

from shared.cases import SPLITS
from simulations.cohorts.folder import README, Progress, check_arguments, write_cohort

GENERATOR = "perfusion phantom 2"  # goes into README.txt and the headers; raise it when the scans change
LABELS = ("persistent", "washout")
SIZE = 16  # pixels
FRAMES = 12
_TOP = 4095  # 12 bits
_RATE = 0.035  # mean relative change per minute after the rise, up or down by class
_SPREAD = 0.036  # its standard deviation among the patients of one class
_BRIGHTNESS = (0.08, 0.62)  # of the lesion at the middle of its course, drawn evenly in its logarithm


@dataclass(frozen=True)
class Scanner:
    """A hospital: how it scans, how it stores, how many of its patients have a lesion that washes out."""

    name: str
    interval: float  # minutes from frame to frame
    delay: float  # minutes until the agent arrives, on average
    gain: float  # brightness of everything
    noise: float  # standard deviation in either channel, of the full scale
    washout: float  # share of the patients
    share: float  # training patients, as a share of the largest site's
    storage: str  # "multiframe", "multiframe-rle", "series" or "png"


_SITES = (
    Scanner("hospital-east", 0.60, 1.0, 1.00, 0.012, 0.5, 1.0, "multiframe"),
    Scanner("hospital-lake", 0.70, 1.3, 0.85, 0.011, 0.3, 0.75, "multiframe-rle"),
    Scanner("hospital-moor", 0.55, 0.8, 1.10, 0.014, 0.6, 0.5, "series"),
    Scanner("hospital-peak", 0.80, 1.6, 0.95, 0.012, 0.2, 0.25, "png"),
)


Values = NDArray[Any]


class Exam(NamedTuple):
    """One patient's scan: ``frames`` float32 (t, 16, 16) in [0, 1] as displayed, at ``times`` in minutes; ``mask`` is
    the share of the lesion in every pixel; ``arrival`` of the agent in minutes."""

    frames: NDArray[np.float32]
    times: Values
    mask: NDArray[np.float32]
    arrival: float
    label: str


def scanner(number: int, seed: int) -> Scanner:
    """The hospital with this number, from 0: four are fixed, those after them are drawn from the seed."""
    if number < len(_SITES):
        return _SITES[number]
    rng = np.random.default_rng([seed, number])
    return Scanner(
        name=f"hospital-{number + 1:02d}",
        interval=rng.uniform(0.55, 0.8),
        delay=rng.uniform(0.8, 1.6),
        gain=rng.uniform(0.85, 1.15),
        noise=rng.uniform(0.011, 0.014),
        washout=rng.uniform(0.2, 0.6),
        share=rng.uniform(0.25, 1.0),
        storage=("multiframe", "series", "multiframe-rle", "png")[number % 4],
    )


def counts(machine: Scanner, patients: int) -> dict[str, int]:
    """Patients of each split, where the largest site trains on ``patients``: all sites test on half as many."""
    return {
        "train": max(2, round(patients * machine.share)),
        "val": max(1, round(patients / 10)),
        "test": max(2, round(patients / 2)),
    }


def draw(number: int, split: str, patient: int, seed: int) -> Exam:
    """The scan of one patient of site ``number``; the label decides on the sign of the late course and nothing else."""
    machine = scanner(number, seed)
    rng = np.random.default_rng([seed, number, SPLITS.index(split), patient])
    washes_out = bool(rng.random() < machine.washout)
    times = np.arange(FRAMES - int(rng.integers(0, 3))) * machine.interval
    arrival = machine.delay + rng.uniform(-0.3, 0.3)
    rate = (-_RATE if washes_out else _RATE) + rng.normal(0, _SPREAD)
    lesion = np.exp(rng.uniform(*np.log(_BRIGHTNESS))) * _course(times, arrival, rng.uniform(0.15, 0.35), rate)
    tissue = rng.uniform(0.03, 0.10) * _course(times, arrival, rng.uniform(0.15, 0.35), rng.normal(0, 0.02))
    mask = _lesion(rng)
    before = rng.uniform(0.10, 0.20) * _texture(rng, 2.5, 0.2)  # without the agent
    around = tissue[:, None, None] * (1 - mask) * _texture(rng, 2.0, 0.2)
    signal = before + around + lesion[:, None, None] * mask * _texture(rng, 1.0, 0.2)
    signal *= machine.gain * rng.uniform(0.9, 1.1)
    noise = rng.normal(0, machine.noise, (2, *signal.shape))
    seen = np.hypot(signal + noise[0], noise[1])  # the magnitude of a complex signal: Rician
    return Exam(np.clip(seen, 0, 1).astype(np.float32), times, mask, arrival, LABELS[washes_out])


def _course(times: Values, arrival: float, rise: float, rate: float) -> Values:
    """Brightness over time: 0 before the arrival, a straight rise of ``rise`` minutes, then a line of slope ``rate``.

    The line is 1 at the mean time of the frames on it: so slopes of r and of -r give the same brightnesses, in reverse.
    """
    lit = arrival + rise
    middle = times[times >= lit].mean()
    course: Values = np.clip((times - arrival) / rise, 0, 1) * (1 + rate * (np.maximum(times, lit) - middle))
    return course


def _lesion(rng: np.random.Generator) -> NDArray[np.float32]:
    """An ellipse of random place, size and direction with a lobed edge, as the share of each pixel it covers."""
    fine = 4
    centre = rng.uniform(4.5, SIZE - 4.5, 2)
    radii = rng.uniform(2.0, 3.8, 2)
    angle = rng.uniform(0, np.pi)
    y, x = np.meshgrid(*[(np.arange(SIZE * fine) + 0.5) / fine] * 2, indexing="ij")
    down, right = y - centre[0], x - centre[1]
    u, v = right * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - right * np.sin(angle)
    lobes = 1 + rng.uniform(0, 0.2) * np.cos(rng.integers(2, 6) * np.arctan2(v, u) + rng.uniform(0, 2 * np.pi))
    inside = np.hypot(u / radii[0], v / radii[1]) < lobes
    share: NDArray[np.float32] = inside.reshape(SIZE, fine, SIZE, fine).mean((1, 3)).astype(np.float32)
    return share


def _texture(rng: np.random.Generator, scale: float, depth: float) -> Values:
    """A smooth random field about 1, spread by ``depth``, with a grain of ``scale`` pixels."""
    field = gaussian_filter(rng.standard_normal((SIZE, SIZE)), scale, mode="reflect")
    smooth: Values = np.exp(depth * field / field.std())
    return smooth


# --- files ------------------------------------------------------------------------------------------------------------


def make(
    directory: Path,
    sites: int = 4,
    patients: int = 600,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a cohort whose largest site trains on ``patients``, and give back the hospitals' folders.

    The others train on 3/4, 1/2 and 1/4 as many; all test on half and validate on a tenth as many. The cohort appears
    at once or not at all; one that is there from the same arguments is left as it is, any other non-empty folder is
    refused with a ValueError. ``progress`` hears (patients done, of all).
    """
    check_arguments(sites, patients, seed)
    machines = [scanner(number, seed) for number in range(sites)]
    writers = {
        machine.name: partial(_write_site, number=number, patients=patients, seed=seed)
        for number, machine in enumerate(machines)
    }
    total = sum(sum(counts(machine, patients).values()) for machine in machines)
    return write_cohort(directory, _readme(sites, patients, seed), writers, total, progress)


def arguments(directory: Path) -> tuple[int, int]:
    """The seed and the patients a cohort was made with.

    Raises:
        ValueError: the folder holds none of this program's.
    """
    text = (directory / README).read_text(encoding="utf-8") if (directory / README).is_file() else ""
    found = re.search(r"--patients (\d+) --seed (\d+)\n", text)
    if GENERATOR not in text or not found:
        raise ValueError(f"{directory}: not a cohort of {GENERATOR!r}")
    return int(found[2]), int(found[1])


def _readme(sites: int, patients: int, seed: int) -> str:
    return (
        "Synthetic dynamic contrast-enhanced scans. No patient is behind any of them: they are drawn by a program,\n"
        "and names, dates and hospitals are invented. They are for tests and demonstrations, not for medical use.\n\n"
        f"command:   consilium cohort make DIR --kind perfusion --sites {sites} --patients {patients} --seed {seed}\n"
        f"seed:      {seed}\n"
        f"generator: {GENERATOR}\n\n"
        "One folder per hospital: scans/, labels.csv (path,label,patient,split) and site.toml. The hospitals differ\n"
        "in the time between frames, the agent's delay, gain, noise, file format and share of the classes. The label\n"
        "says whether the lesion, once lit, goes on rising (persistent) or falls (washout); nothing else depends on\n"
        "it.\n"
    )


def _write_site(folder: Path, number: int, patients: int, seed: int) -> Iterator[None]:
    """Write one hospital's folder; a generator, so that the caller can report each patient."""
    machine = scanner(number, seed)
    (folder / "scans").mkdir(parents=True)
    table = [["path", "label", "patient", "split"]]
    for split, count in counts(machine, patients).items():
        for index in range(count):
            exam = draw(number, split, index, seed)
            patient = f"P{number + 1}-{split}-{index + 1:04d}"
            path = f"scans/{patient}"
            if machine.storage == "png":
                _write_pictures(folder / path, exam)
            elif machine.storage == "series":
                _write_series(folder / path, exam, machine, patient, seed)
            else:
                path += ".dcm"
                _write_multiframe(folder / path, exam, machine, patient, seed)
            table.append([path, exam.label, patient, split])
            yield
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    lines = [f'name = "{machine.name}"', "[data]", 'format = "csv"', 'csv = "labels.csv"']
    (folder / "site.toml").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _write_pictures(folder: Path, exam: Exam) -> None:
    """PNG of 8 bits, numbered from 1 without leading zeros."""
    folder.mkdir()
    for number, frame in enumerate(exam.frames, start=1):
        Image.fromarray(np.rint(frame * 255).astype(np.uint8)).save(folder / f"frame-{number}.png")


def _write_series(folder: Path, exam: Exam, machine: Scanner, patient: str, seed: int) -> None:
    """One file per frame, named by its UID: the names say nothing of the order."""
    folder.mkdir()
    for number, (frame, minutes) in enumerate(zip(exam.frames, exam.times, strict=True), start=1):
        ds = _header(machine, patient, seed, minutes)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
        uid = generate_uid(entropy_srcs=[GENERATOR, str(seed), patient, str(number)])
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
        ds.InstanceNumber = ds.AcquisitionNumber = ds.TemporalPositionIdentifier = number
        ds.NumberOfTemporalPositions = len(exam.frames)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
        ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "GR", "SP", "", "2D"
        ds.EchoTime, ds.RepetitionTime, ds.EchoTrainLength = "2", "6", "1"
        ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[GENERATOR, str(seed), patient, "frame"])
        ds.ImagePositionPatient, ds.ImageOrientationPatient = ["0", "0", "0"], ["1", "0", "0", "0", "1", "0"]
        ds.SliceThickness = "3"
        _save(folder / f"{uid[-12:]}.dcm", ds, frame[None])


def _write_multiframe(file: Path, exam: Exam, machine: Scanner, patient: str, seed: int) -> None:
    """One multi-frame file with the times of its frames."""
    ds = _header(machine, patient, seed, 0.0)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    uid = generate_uid(entropy_srcs=[GENERATOR, str(seed), patient, "film"])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
    ds.ImageType, ds.ConversionType, ds.InstanceNumber = ["DERIVED", "PRIMARY"], "SYN", 1
    ds.NumberOfFrames, ds.FrameIncrementPointer = len(exam.frames), 0x00181065  # FrameTimeVector, in ms
    ds.FrameTimeVector = ["0", *(str(round(60_000 * machine.interval)) for _ in exam.frames[1:])]
    _save(file, ds, exam.frames, compress=machine.storage == "multiframe-rle")


def _header(machine: Scanner, patient: str, seed: int, minutes: float) -> Dataset:
    """What all files of a patient share, and when this one was taken; all invented, none of it from the label."""
    rng = np.random.default_rng([seed, *patient.encode()])
    start = datetime(2019, 1, 1, 8) + timedelta(days=int(rng.integers(0, 1800)), minutes=int(rng.integers(0, 600)))
    taken = start + timedelta(minutes=float(minutes))
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SpecificCharacterSet = "ISO_IR 192"
    for level in ("Study", "Series"):
        uid = generate_uid(entropy_srcs=[GENERATOR, str(seed), patient, level])
        setattr(ds, f"{level}InstanceUID", uid)
        setattr(ds, f"{level}Date", start.strftime("%Y%m%d"))
        setattr(ds, f"{level}Time", start.strftime("%H%M%S"))
    ds.AcquisitionDate = ds.ContentDate = taken.strftime("%Y%m%d")
    ds.AcquisitionTime = ds.ContentTime = taken.strftime("%H%M%S.%f")
    ds.AccessionNumber = ds.ReferringPhysicianName = ds.Laterality = ""
    ds.StudyID, ds.SeriesNumber, ds.Modality = patient[:16], 1, "MR"
    ds.Manufacturer, ds.ManufacturerModelName = "Phantom Works (fictitious)", "Perfusion 16"
    ds.SoftwareVersions, ds.InstitutionName = GENERATOR, machine.name
    ds.StudyDescription = "Synthetic dynamic contrast-enhanced scan"
    ds.PatientName, ds.PatientID = f"Phantom^{patient}", patient
    ds.PatientBirthDate, ds.PatientSex = "", "F"
    ds.BodyPartExamined, ds.PatientPosition = "BREAST", "FFP"
    ds.BurnedInAnnotation = "NO"
    return ds


def _save(file: Path, ds: Dataset, frames: NDArray[np.float32], compress: bool = False) -> None:
    """Add the pixels, of 12 bits, and write the file."""
    ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    ds.Rows, ds.Columns, ds.PixelSpacing = SIZE, SIZE, ["2", "2"]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.WindowCenter, ds.WindowWidth = str((_TOP + 1) // 2), str(_TOP + 1)
    ds.PixelData = np.rint(frames * _TOP).astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    if compress:
        ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(file, enforce_file_format=True)
