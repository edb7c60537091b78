"""Cohorts of phantom chest radiographs as real DICOM files: one folder per hospital, each with its own scanner.

Every random number comes from a stream named by (seed, hospital, patient, purpose). So the same seed gives the
same bytes, a hospital does not depend on how many others there are, and more patients leave the earlier ones as
they were. The label decides on one thing only: whether `anatomy.draw_chest` is handed an opacity.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from scipy.ndimage import gaussian_filter, uniform_filter  # type: ignore[import-untyped,unused-ignore]

from simulations.cohorts.anatomy import Canvas, Habitus, Pose, draw_chest, draw_opacity, draw_patient
from simulations.cohorts.folder import Progress, check_arguments, write_cohort
from simulations.cohorts.texture import Image

GENERATOR = "chest phantom 1"  # goes into README.txt and the headers; raise it when the pictures change
_BUILD, _LABEL, _FINDING, _EXPOSURE, _HEADER, _SCANNER = range(6)  # purposes of the random streams
_REPEATS = 0.12  # share of patients with a second exposure
_GERMAN = {"opacity": "Verschattung", "normal": "unauffällig"}


@dataclass(frozen=True)
class Scanner:
    """A hospital: its X-ray machine, its patients, and how often and how clearly they have an opacity."""

    name: str
    model: str
    rows: int
    columns: int
    spacing: float  # mm per pixel
    bits: int
    inverted: bool  # MONOCHROME1
    syntax: str  # transfer syntax UID
    gamma: float  # tone curve
    span: tuple[float, float]  # attenuation shown darkest and brightest
    swing: float  # spread of the exposure from image to image, in attenuation
    noise: float  # in attenuation, where the beam is unweakened
    grain: float  # mm: correlation of the noise
    blur: float  # mm: standard deviation of the point spread
    edge: float  # strength of the edge enhancement
    grid: float  # amplitude of the grid lines, of the full range
    border: float  # mm: mean width of the collimated margin
    border_white: bool
    marker: tuple[float, float]  # column and row of the side marker, as shares of the picture
    prevalence: float
    strength: tuple[float, float]  # of the opacities, share of the air replaced
    size: float  # mm: of the opacities
    labels: dict[str, str] = field(default_factory=dict)  # own names for the labels
    group: Habitus = field(default_factory=Habitus)


_NORTH = Scanner(
    name="hospital-north", model="Aurora DR 12", rows=272, columns=272, spacing=1.40, bits=12, inverted=False,
    syntax=ExplicitVRLittleEndian, gamma=1.0, span=(0.10, 0.92), swing=0.02, noise=0.008, grain=0.0, blur=0.7,
    edge=0.0, grid=0.0, border=4.0, border_white=False, marker=(0.90, 0.10), prevalence=0.5, strength=(0.45, 1.0),
    size=22.0,
)  # fmt: skip
_RIVER = Scanner(
    name="hospital-river", model="Fluvia CR 10", rows=272, columns=240, spacing=1.48, bits=10, inverted=True,
    syntax=JPEG2000Lossless, gamma=1.45, span=(0.0, 1.02), swing=0.04, noise=0.016, grain=1.3, blur=1.8,
    edge=0.0, grid=0.0, border=13.0, border_white=True, marker=(0.86, 0.88), prevalence=0.3, strength=(0.40, 1.0),
    size=20.0, labels=_GERMAN,
    group=Habitus(width=1.06, thickness=1.18, heart=1.08, inspiration=-4.0, markings=0.8, age=64.0),
)  # fmt: skip
_HILL = Scanner(
    name="hospital-hill", model="Monticola Mobile 14", rows=256, columns=288, spacing=1.50, bits=14, inverted=False,
    syntax=JPEGLSLossless, gamma=0.72, span=(0.10, 0.84), swing=0.05, noise=0.016, grain=0.0, blur=1.0,
    edge=1.0, grid=0.020, border=9.0, border_white=False, marker=(0.82, 0.30), prevalence=0.65,
    strength=(0.45, 1.0), size=22.0,
    group=Habitus(width=0.97, thickness=0.92, heart=1.16, inspiration=-14.0, markings=1.35, leads=0.45, age=47.0),
)  # fmt: skip


def scanner(number: int, seed: int) -> Scanner:
    """The hospital with this number, from 0: three are fixed, those after them are drawn from the seed."""
    if number < 3:
        return (_NORTH, _RIVER, _HILL)[number]
    rng = _stream(seed, number, 0, _SCANNER)
    syntaxes = (RLELossless, JPEG2000Lossless, ExplicitVRLittleEndian, JPEGLSLossless)
    low = rng.uniform(-0.05, 0.15)
    return Scanner(
        name=f"hospital-{number + 1:02d}",
        model=f"Varia {number + 1:02d}",
        rows=int(rng.integers(16, 20)) * 16,
        columns=int(rng.integers(16, 20)) * 16,
        spacing=round(rng.uniform(1.30, 1.48), 2),
        bits=int(rng.choice([8, 10, 12, 14, 16])),
        inverted=bool(rng.random() < 0.25),
        syntax=syntaxes[(number - 3) % len(syntaxes)],
        gamma=rng.uniform(0.65, 1.7),
        span=(low, low + rng.uniform(0.7, 1.05)),
        swing=rng.uniform(0.02, 0.05),
        noise=rng.uniform(0.006, 0.028),
        grain=rng.choice([0.0, rng.uniform(0.8, 1.5)]),
        blur=rng.uniform(0.6, 2.0),
        edge=rng.choice([0.0, 0.0, rng.uniform(0.5, 1.2)]),
        grid=rng.choice([0.0, 0.0, rng.uniform(0.01, 0.03)]),
        border=rng.uniform(3.0, 14.0),
        border_white=bool(rng.random() < 0.3),
        marker=(rng.uniform(0.80, 0.90), float(rng.choice([0.10, 0.30, 0.88]))),
        prevalence=rng.uniform(0.25, 0.65),
        strength=(rng.uniform(0.4, 0.5), 1.0),
        size=rng.uniform(19.0, 23.0),
        group=Habitus(
            width=rng.uniform(0.95, 1.08),
            thickness=rng.uniform(0.9, 1.2),
            heart=rng.uniform(0.95, 1.16),
            inspiration=rng.uniform(-14.0, 4.0),
            markings=rng.uniform(0.75, 1.35),
            leads=rng.choice([0.0, rng.uniform(0.1, 0.5)]),
            age=rng.uniform(42.0, 66.0),
        ),
    )


def make(
    directory: Path,
    sites: int = 3,
    patients: int = 60,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a cohort of `patients` per hospital and give back the hospitals' folders.

    The whole cohort appears at once or not at all. A cohort that is there already from the same arguments is left
    as it is; any other non-empty folder is refused with a ValueError. `progress` hears (patients done, of all).
    """
    check_arguments(sites, patients, seed)
    writers = {
        machine.name: partial(_write_site, machine=machine, number=number, patients=patients, seed=seed)
        for number, machine in enumerate(scanner(number, seed) for number in range(sites))
    }
    return write_cohort(directory, _readme(sites, patients, seed), writers, sites * patients, progress)


def _readme(sites: int, patients: int, seed: int) -> str:
    """What README.txt says; also the mark by which the same arguments are known again."""
    return (
        "Synthetic chest radiographs. No patient is behind any of these images: they are drawn by a program, and\n"
        "names, dates and hospitals are invented. They are for tests and demonstrations, not for medical use.\n\n"
        f"command:   consilium cohort make DIR --sites {sites} --patients {patients} --seed {seed}\n"
        f"seed:      {seed}\n"
        f"generator: {GENERATOR}\n\n"
        "One folder per hospital: images/*.dcm, labels.csv (path,label,patient,sex,age) and site.toml. The\n"
        "hospitals differ in scanner, file format, patients, share of opacities and names of the labels.\n"
        "The label says whether a consolidation was drawn into the lungs: opacity or normal. Some are faint.\n"
    )


def _stream(seed: int, site: int, patient: int, purpose: int) -> np.random.Generator:
    """The random numbers for one purpose of one patient."""
    return np.random.default_rng([seed, site, patient, purpose])


def _write_site(folder: Path, machine: Scanner, number: int, patients: int, seed: int) -> Iterator[None]:
    """Write one hospital's folder; a generator, so that the caller can report each patient."""
    (folder / "images").mkdir(parents=True)
    table = [["path", "label", "patient", "sex", "age"]]
    for patient in range(patients):
        table += _write_patient(folder, machine, number, patient, seed)
        yield
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    lines = [f'name = "{machine.name}"', "[data]", 'format = "csv"', 'csv = "labels.csv"']
    if machine.labels:
        lines += ["[label_map]", *(f'"{own}" = "{label}"' for label, own in sorted(machine.labels.items())[::-1])]
    (folder / "site.toml").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _write_patient(folder: Path, machine: Scanner, number: int, patient: int, seed: int) -> list[list[str]]:
    """Write one patient's image or two; the rows for labels.csv come back."""
    key = (seed, number, patient)
    build = _stream(*key, _BUILD)
    female, repeat = bool(build.random() < 0.5), bool(build.random() < _REPEATS)
    age = int(np.clip(build.normal(machine.group.age, 14.0), 19, 92))
    person = draw_patient(build, machine.group, female)
    label = "opacity" if _stream(*key, _LABEL).random() < machine.prevalence else "normal"
    opacity = None
    if label == "opacity":
        opacity = draw_opacity(_stream(*key, _FINDING), person, machine.strength, machine.size)
    identity, sex = f"P{number + 1}-{patient + 1:04d}", "F" if female else "M"
    rows = []
    for exposure in range(2 if repeat else 1):
        rng = np.random.default_rng([*key, _EXPOSURE, exposure])
        pose = Pose((rng.normal(0.0, 6.0), rng.normal(4.0, 6.0)), rng.normal(0.0, 0.025), rng.normal(0.0, 4.0))
        canvas = Canvas(machine.rows, machine.columns, machine.spacing, person, pose)
        pixels, window = _expose(rng, machine, draw_chest(canvas, opacity))
        header = _header(machine, key, exposure, identity, sex, age)
        path = f"images/{identity}_{exposure + 1}.dcm"
        _save(folder / path, header, pixels, window, machine)
        rows.append([path, machine.labels.get(label, label), identity, sex, str(age)])
    return rows


def _expose(rng: np.random.Generator, machine: Scanner, image: Image) -> tuple[NDArray[np.uint16], tuple[int, int]]:
    """What the machine stores of an attenuation image: pixel values, and the window (centre, width) to show them."""
    mottle = rng.standard_normal(image.shape, np.float32)
    if machine.grain:
        grain = machine.grain / machine.spacing
        mottle = gaussian_filter(mottle, grain, truncate=3.0) * np.float32(2 * np.sqrt(np.pi) * max(grain, 0.3))
    # fewer photons arrive behind dense tissue, and the logarithm of the signal turns that into more noise
    mottle *= np.float32(machine.noise) * (0.55 + 0.9 * image)
    seen: Image = gaussian_filter(image, machine.blur / machine.spacing, truncate=3.0) + mottle
    if machine.edge:
        seen += np.float32(machine.edge) * (seen - uniform_filter(seen, round(14.0 / machine.spacing)))
    low, high = machine.span
    low, high = low + rng.normal(0.0, machine.swing), high + rng.normal(0.0, machine.swing)
    tone: Image = np.clip((seen - np.float32(low)) / np.float32(high - low), 0.0, 1.0) ** np.float32(machine.gamma)
    if machine.grid:
        phase, period = rng.uniform(0, 2 * np.pi), rng.normal(3.1, 0.05)  # px: the grid beats with the pixels
        lines = np.sin(np.arange(machine.columns) * (2 * np.pi / period) + phase)
        tone += np.float32(machine.grid) * lines.astype(np.float32)[None, :]
    _collimate(rng, machine, tone)
    top = 2**machine.bits - 1
    # a processed image leaves some of the range free at either end
    stored = np.clip(np.rint(top * (0.06 + 0.86 * tone)), 0, top)
    centre, width = round(top * 0.49), round(top * 0.86)
    if machine.inverted:
        stored, centre = top - stored, top - centre
    return stored.astype(np.uint16), (centre, width)


def _collimate(rng: np.random.Generator, machine: Scanner, tone: Image) -> None:
    """Blank what the collimator shields, and burn in the side marker, near the patient's left."""
    margins = np.clip(rng.normal(machine.border, 0.4 * machine.border, 4), 0, 3 * machine.border) / machine.spacing
    top, bottom, left, right = (int(margin) for margin in margins)
    blank = np.float32(0.97 if machine.border_white else 0.0)
    for edge in (np.s_[:top], np.s_[machine.rows - bottom :], np.s_[:, :left], np.s_[:, machine.columns - right :]):
        tone[edge] = blank
    size = round(13.0 / machine.spacing)
    column = int(machine.marker[0] * machine.columns + rng.normal(0, 4))
    row = int(machine.marker[1] * machine.rows + rng.normal(0, 4))
    column = min(max(column, 0), machine.columns - size)
    row = min(max(row, 0), machine.rows - size)
    tone[row : row + size, column : column + 2] = 1.0
    tone[row + size - 2 : row + size, column : column + int(0.62 * size)] = 1.0


def _header(machine: Scanner, key: tuple[int, int, int], exposure: int, identity: str, sex: str, age: int) -> Dataset:
    """A complete header for a digital X-ray image, without its pixels; all invented, none of it from the label."""
    rng = _stream(*key, _HEADER)
    day = date(2019, 1, 1) + timedelta(days=int(rng.integers(0, 1800)))
    born = day - timedelta(days=int(age * 365.25 + rng.integers(1, 360)))
    minute = int(rng.integers(7 * 60, 19 * 60))
    entropy = [GENERATOR, *map(str, key)]
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.SOPClassUID = DigitalXRayImageStorageForPresentation
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[*entropy, "image", str(exposure)])
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[*entropy, "study"])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[*entropy, "series"])
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = day.strftime("%Y%m%d")
    ds.StudyTime = f"{minute // 60:02d}{minute % 60:02d}00"
    ds.AcquisitionTime = ds.ContentTime = f"{minute // 60:02d}{minute % 60:02d}{20 * exposure + 10:02d}"
    ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = identity, 1, exposure + 1
    ds.Modality, ds.PresentationIntentType = "DX", "FOR PRESENTATION"
    ds.Manufacturer, ds.ManufacturerModelName = "Phantom Works (fictitious)", machine.model
    ds.SoftwareVersions, ds.InstitutionName = GENERATOR, machine.name
    ds.StudyDescription = "Synthetic chest radiograph"
    ds.PatientName, ds.PatientID = f"Phantom^{identity}", identity
    ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = born.strftime("%Y%m%d"), sex, f"{age:03d}Y"
    ds.BodyPartExamined, ds.ViewPosition, ds.PatientOrientation = "CHEST", "PA", ["L", "F"]
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "51185008", "SCT", "Chest"
    ds.AnatomicRegionSequence, ds.ImageLaterality = [region], "U"
    ds.AcquisitionContextSequence = []
    ds.DetectorType, ds.KVP = "SCINTILLATOR", "110"
    ds.ImagerPixelSpacing = ds.PixelSpacing = [f"{machine.spacing:.2f}"] * 2
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    return ds


def _save(path: Path, ds: Dataset, pixels: NDArray[np.uint16], window: tuple[int, int], machine: Scanner) -> None:
    """Add pixels and how to read them to the header, compress as the hospital does, write the file."""
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.PhotometricInterpretation = "MONOCHROME1" if machine.inverted else "MONOCHROME2"
    ds.PresentationLUTShape = "INVERSE" if machine.inverted else "IDENTITY"
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", 1 if machine.inverted else -1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated = 8 if machine.bits <= 8 else 16
    ds.BitsStored, ds.HighBit = machine.bits, machine.bits - 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.WindowCenter, ds.WindowWidth = (str(value) for value in window)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PixelData = pixels.astype(np.uint8 if machine.bits <= 8 else "<u2").tobytes()
    ds["PixelData"].VR = "OB" if machine.bits <= 8 else "OW"
    if machine.syntax != ExplicitVRLittleEndian:
        ds.compress(machine.syntax, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
