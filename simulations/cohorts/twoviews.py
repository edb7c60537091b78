"""Cohorts of chest radiographs in two views, drawn by a program: every nodule can be seen in one of the views only.

A nodule behind the heart is lost in its shadow in the frontal view (PA) and stands free in the lateral one; a nodule
beside the spine is the other way round. So a network that sees one view misses about half of them. They are also more
frequent in the old: age tells a little, sex nothing. The last hospital has no lateral views, and its table has no
column for them.

The chest is a few ellipsoids in millimetres (x to the patient's left, y down, z to the back); each view is the length
of the rays in them. Every random number comes from a stream named by (seed, site, split, patient): the same arguments
give the same bytes, and more patients leave the earlier ones as they were.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped,unused-ignore]

from shared.cases import SPLITS
from simulations.cohorts.folder import Progress, check_arguments, write_cohort

GENERATOR = "two-view phantom 1"  # goes into README.txt and the headers; raise it when the pictures change
VIEWS = ("pa", "lateral")
LABELS = ("clear", "nodule")
SIZE, SPACING = 80, 4.8  # pixels, and mm per pixel
_AXES = {"pa": (0, 1, 2), "lateral": (2, 1, 0)}  # across, down, along the ray
_WINDOW = {"pa": (20.0, 170.0), "lateral": (60.0, 190.0)}  # mm of water shown black and white
_TOP = 4095  # 12 bits

Values = NDArray[Any]


@dataclass(frozen=True)
class Scanner:
    """A hospital: its X-ray machine, the age of its patients, and whether it takes lateral views."""

    name: str
    noise: float  # of the grey value
    gain: float  # contrast
    offset: float  # brightness
    blur: float  # pixels
    inverted: bool  # MONOCHROME1
    age: float  # mean
    lateral: bool = True


_SITES = (
    Scanner("hospital-quay", 0.020, 1.00, 0.00, 0.5, False, 58.0),
    Scanner("hospital-glen", 0.030, 0.85, 0.06, 0.8, True, 66.0),
    Scanner("hospital-fen", 0.025, 1.05, -0.02, 0.6, False, 62.0),
)


class Blob(NamedTuple):
    """An ellipsoid: centre and half-axes in mm (x, y, z), and how dense it is beyond what it lies in, water = 1."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    density: float


class Exam(NamedTuple):
    """One patient: both views float32 (SIZE, SIZE) in [0, 1], and what is known of the patient."""

    views: dict[str, NDArray[np.float32]]
    label: str
    seen_in: str  # the view in which the nodule shows; "" without one
    age: int
    sex: str


def scanner(number: int, sites: int, seed: int) -> Scanner:
    """The hospital with this number, from 0, of so many; the last of several takes no lateral views."""
    if number < len(_SITES):
        machine = _SITES[number]
    else:
        rng = np.random.default_rng([seed, number])
        machine = Scanner(
            name=f"hospital-{number + 1:02d}",
            noise=rng.uniform(0.015, 0.03),
            gain=rng.uniform(0.8, 1.1),
            offset=rng.uniform(-0.03, 0.08),
            blur=rng.uniform(0.4, 0.9),
            inverted=bool(rng.random() < 0.3),
            age=rng.uniform(55, 68),
        )
    bare = number == sites - 1 and sites > 1
    return machine if not bare else Scanner(**{**vars(machine), "lateral": False})


def counts(patients: int) -> dict[str, int]:
    """Patients of each split of a site that trains on so many."""
    return {"train": patients, "val": max(2, round(patients / 5)), "test": max(2, round(patients / 2))}


def draw(machine: Scanner, number: int, split: str, patient: int, seed: int) -> Exam:
    """One patient of site ``number``; the label decides on one blob and on nothing else."""
    rng = np.random.default_rng([seed, number, SPLITS.index(split), patient])
    age = int(np.clip(rng.normal(machine.age, 14), 20, 95))
    sex = "F" if rng.random() < 0.5 else "M"
    ill = bool(rng.random() < 1 / (1 + np.exp(-(age - 60) / 12)))
    chest = _chest(rng)
    seen_in = str(rng.choice(VIEWS))
    nodule = _nodule(rng, seen_in)
    blobs = [*chest, nodule] if ill else chest
    views = {}
    for view in VIEWS:
        shift = tuple(rng.normal(0, 5, 3))
        views[view] = _expose(np.random.default_rng([*rng.integers(0, 2**31, 2)]), machine, project(blobs, view, shift))
    return Exam(views, LABELS[ill], seen_in if ill else "", age, sex)


def _chest(rng: np.random.Generator) -> list[Blob]:
    """Body, lungs, heart, spine and shoulder blades of a patient of random build, and vessels in the lungs."""
    build, heart = rng.normal(1, 0.05), rng.normal(1, 0.08)
    blobs = [
        Blob((0, 0, 0), (155 * build, 260, 105 * build), 1.0),
        Blob((-75 * build, 0, 0), (58 * build, 125, 85 * build), -0.75),
        Blob((75 * build, 0, 0), (54 * build, 120, 85 * build), -0.75),
        Blob((18, 35, -40), (58 * heart, 55 * heart, 42 * heart), 0.35),
        Blob((0, 0, 78), (22, 400, 22), 1.4),
        Blob((0, -40, 92), (120, 190, 26), 0.55),
    ]
    for _ in range(36):
        side = rng.choice([-1.0, 1.0])
        centre = (side * rng.uniform(38, 115), rng.uniform(-85, 85), rng.uniform(-55, 60))
        radius = rng.uniform(3, 6)
        blobs.append(Blob(centre, (radius, radius * rng.uniform(1, 4), radius), 0.8))
    return blobs


def _nodule(rng: np.random.Generator, seen_in: str) -> Blob:
    """A nodule beside the spine, seen in the frontal view alone, or behind the heart, seen in the lateral alone."""
    radius = rng.uniform(13, 20)
    if seen_in == "pa":
        centre = (rng.choice([-1.0, 1.0]) * rng.uniform(60, 92), rng.uniform(-60, 60), rng.uniform(76, 84))
    else:
        centre = (rng.uniform(-14, 14), rng.uniform(-20, 60), rng.uniform(22, 38))
    return Blob(tuple(map(float, centre)), (radius, radius, radius), 0.9)  # type: ignore[arg-type]


def project(blobs: list[Blob], view: str, shift: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Values:
    """The rays' lengths in the blobs times their density, in mm of water, (SIZE, SIZE)."""
    across, down, along = _AXES[view]
    place = (np.arange(SIZE) - (SIZE - 1) / 2) * SPACING
    total = np.zeros((SIZE, SIZE))
    for blob in blobs:
        u = (place - blob.centre[across] - shift[across]) / blob.radii[across]
        v = (place - blob.centre[down] - shift[down]) / blob.radii[down]
        total += blob.density * 2 * blob.radii[along] * np.sqrt(np.maximum(1 - v[:, None] ** 2 - u[None, :] ** 2, 0))
    low, high = _WINDOW[view]
    shown: Values = np.clip((total - low) / (high - low), 0, 1)
    return shown


def _expose(rng: np.random.Generator, machine: Scanner, shown: Values) -> NDArray[np.float32]:
    """What the machine makes of it: grey values 0..1, blurred, with noise, contrast and brightness of its own."""
    grain = rng.normal(0, machine.noise, shown.shape)
    image = gaussian_filter(shown, machine.blur) * machine.gain * rng.normal(1, 0.03) + machine.offset + grain
    seen: NDArray[np.float32] = np.clip(image, 0, 1).astype(np.float32)
    return seen


# --- files ------------------------------------------------------------------------------------------------------------


def make(
    directory: Path,
    sites: int = 3,
    patients: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a cohort whose sites train on ``patients`` each, and give back the hospitals' folders.

    All validate on a fifth and test on half as many. The cohort appears at once or not at all; one that is there from
    the same arguments is left as it is, any other non-empty folder is refused with a ValueError. ``progress`` hears
    (patients done, of all).
    """
    check_arguments(sites, patients, seed)
    writers = {
        machine.name: partial(_write_site, machine=machine, number=number, patients=patients, seed=seed)
        for number, machine in enumerate(scanner(number, sites, seed) for number in range(sites))
    }
    total = sites * sum(counts(patients).values())
    return write_cohort(directory, _readme(sites, patients, seed), writers, total, progress)


def _readme(sites: int, patients: int, seed: int) -> str:
    return (
        "Synthetic chest radiographs in two views. No patient is behind any of them: they are drawn by a program, and\n"
        "names, dates and hospitals are invented. They are for tests and demonstrations, not for medical use.\n\n"
        f"command:   consilium cohort make DIR --kind two-views --sites {sites} --patients {patients} --seed {seed}\n"
        f"seed:      {seed}\n"
        f"generator: {GENERATOR}\n\n"
        "One folder per hospital: images/, labels.csv (path:pa,path:lateral,label,patient,split,age,sex) and\n"
        "site.toml. The last hospital takes no lateral views. The label says whether a nodule was drawn into the\n"
        "chest; each shows in one of the two views only, and they are more frequent in the old.\n"
    )


def _write_site(folder: Path, machine: Scanner, number: int, patients: int, seed: int) -> Iterator[None]:
    """Write one hospital's folder; a generator, so that the caller can report each patient."""
    (folder / "images").mkdir(parents=True)
    views = VIEWS if machine.lateral else VIEWS[:1]
    table = [[*(f"path:{view}" for view in views), "label", "patient", "split", "age", "sex"]]
    for split, count in counts(patients).items():
        for index in range(count):
            exam = draw(machine, number, split, index, seed)
            patient = f"T{number + 1}-{split}-{index + 1:04d}"
            paths = [f"images/{patient}_{view}.dcm" for view in views]
            for order, (view, path) in enumerate(zip(views, paths, strict=True), start=1):
                ds = _header(machine, patient, exam, seed)
                uid = generate_uid(entropy_srcs=[GENERATOR, str(seed), patient, view])
                ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
                ds.InstanceNumber, ds.ViewPosition = order, {"pa": "PA", "lateral": "LL"}[view]
                ds.PatientOrientation = ["L", "F"] if view == "pa" else ["P", "F"]
                _save(folder / path, ds, exam.views[view], machine)
            table.append([*paths, exam.label, patient, split, f"{exam.age:03d}Y", exam.sex])
            yield
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    lines = [f'name = "{machine.name}"', "[data]", 'format = "csv"', 'csv = "labels.csv"']
    (folder / "site.toml").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _header(machine: Scanner, patient: str, exam: Exam, seed: int) -> Dataset:
    """What both views of a patient share; all invented, none of it from the label."""
    rng = np.random.default_rng([seed, *patient.encode()])
    day = date(2019, 1, 1) + timedelta(days=int(rng.integers(0, 1800)))
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    ds.SpecificCharacterSet, ds.ImageType = "ISO_IR 192", ["DERIVED", "PRIMARY"]
    for level in ("Study", "Series"):
        setattr(ds, f"{level}InstanceUID", generate_uid(entropy_srcs=[GENERATOR, str(seed), patient, level]))
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = day.strftime("%Y%m%d")
    ds.StudyTime = ds.ContentTime = f"{int(rng.integers(7, 19)):02d}{int(rng.integers(0, 60)):02d}00"
    ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.StudyID, ds.SeriesNumber, ds.Modality, ds.PresentationIntentType = patient[:16], 1, "DX", "FOR PRESENTATION"
    ds.Manufacturer, ds.ManufacturerModelName = "Phantom Works (fictitious)", "Two Views 80"
    ds.SoftwareVersions, ds.InstitutionName = GENERATOR, machine.name
    ds.StudyDescription = "Synthetic chest radiograph"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = f"Phantom^{patient}", patient, ""
    ds.PatientSex, ds.PatientAge = exam.sex, f"{exam.age:03d}Y"
    ds.BodyPartExamined, ds.ImageLaterality = "CHEST", "U"
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "51185008", "SCT", "Chest"
    ds.AnatomicRegionSequence, ds.AcquisitionContextSequence = [region], []
    ds.DetectorType, ds.KVP = "SCINTILLATOR", "110"
    ds.ImagerPixelSpacing = ds.PixelSpacing = [f"{SPACING:.2f}"] * 2
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    return ds


def _save(file: Path, ds: Dataset, image: NDArray[np.float32], machine: Scanner) -> None:
    """Add the pixels, of 12 bits, and write the file."""
    stored = np.rint(image * _TOP)
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.PhotometricInterpretation = "MONOCHROME1" if machine.inverted else "MONOCHROME2"
    ds.PresentationLUTShape = "INVERSE" if machine.inverted else "IDENTITY"
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", 1 if machine.inverted else -1
    ds.Rows, ds.Columns = image.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.WindowCenter, ds.WindowWidth = str((_TOP + 1) // 2), str(_TOP + 1)
    ds.PixelData = (_TOP - stored if machine.inverted else stored).astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    ds.save_as(file, enforce_file_format=True)
