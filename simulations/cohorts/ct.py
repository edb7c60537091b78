"""Cohorts of phantom CT scans of the abdomen with the organs and liver lesions marked, one folder per hospital.

Known structure: the class of a voxel is what `body.draw_abdomen` painted there, before the scanner's blur and noise.
Organs cannot be told by their HU alone: vessels, bowel, muscle, ribs, heart and gall bladder share them, and HU change
with the hospital's phase of contrast agent, dose and reconstruction. Hospitals also differ in slice thickness, field of
view, patients, file format and the names of the classes, so that together they use every reader of volumes and masks:

    hospital-north    a DICOM series per patient, names against positions; DICOM SEG          portal venous phase
    hospital-river    NIfTI, axes from left, front and head; NIfTI masks with own numbers     arterial phase, low dose
    hospital-hill     an Enhanced CT of many frames; DICOM SEG with German names              without contrast agent

Every random number comes from a stream named by (seed, hospital, patient, purpose): the same arguments give the same
bytes, a hospital does not depend on how many others there are, and more patients leave the earlier ones as they were.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, uniform_filter1d  # type: ignore[import-untyped,unused-ignore]

from simulations.cohorts.body import CLASSES, Build, Field, Patient, draw_abdomen, draw_patient, grid
from simulations.cohorts.ct_files import GENERATOR, Scan, write_frames, write_nifti_pair, write_series
from simulations.cohorts.folder import Progress, check_arguments, write_cohort

_BODY, _EXPOSURE, _SCANNER = range(3)  # purposes of the random streams
_FINE = 2  # slices are drawn so many times thinner, then averaged: partial volume
#: Which split the patients are of, in turn.
SPLITS = ("train", "test", "train", "val", "train")
_GERMAN = {"liver": "Leber", "lesion": "Herd", "spleen": "Milz", "kidneys": "Nieren", "spine": "Wirbelsäule"}
#: The numbers of the classes in hospital-river's masks.
_NUMBERS = {"spine": 1, "spleen": 2, "kidneys": 3, "liver": 6, "lesion": 7}


@dataclass(frozen=True)
class Scanner:
    """A hospital: its CT, how it reconstructs and stores, and its patients."""

    name: str
    model: str
    storage: str  # "series", "nifti" or "frames"
    phase: str  # of the contrast agent, see body.PHASES
    shape: tuple[int, int, int]  # slices, rows, columns
    thickness: float  # mm, and distance of slices
    pixel: float  # mm
    blur: float  # mm: standard deviation of the point spread in the slice
    edge: float  # strength of the edge enhancement
    noise: float  # HU
    grain: float  # mm: correlation of the noise
    offset: float = 0.0  # HU: of the calibration
    cupping: float = 0.0  # HU by which the middle of the body comes out too low
    couch: bool = False
    labels: dict[str, str] = field(default_factory=dict)  # own names for the classes
    build: Build = field(default_factory=Build)


_NORTH = Scanner(
    name="hospital-north", model="Aurora CT 64", storage="series", phase="portal", shape=(38, 64, 64), thickness=5.0,
    pixel=6.0, blur=2.6, edge=0.0, noise=10.0, grain=3.5, couch=True,
)  # fmt: skip
_RIVER = Scanner(
    name="hospital-river", model="Fluvia CT 16", storage="nifti", phase="arterial", shape=(44, 60, 64), thickness=4.2,
    pixel=5.6, blur=1.2, edge=0.5, noise=22.0, grain=1.5, offset=4.0, build=Build(size=0.95, fat=13.0, meal=0.6),
)  # fmt: skip
_HILL = Scanner(
    name="hospital-hill", model="Monticola CT 4", storage="frames", phase="native", shape=(33, 62, 70), thickness=6.0,
    pixel=6.4, blur=3.2, edge=0.0, noise=9.0, grain=5.0, offset=-6.0, cupping=10.0, labels=_GERMAN,
    build=Build(size=1.06, fat=30.0, lesions=0.9),
)  # fmt: skip


class Case(NamedTuple):
    """One scan as the machine gives it: HU int16 (d, h, w), slices from feet to head, and the class of each voxel."""

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    patient: Patient


def scanner(number: int, seed: int) -> Scanner:
    """The hospital with this number, from 0: three are fixed, those after them are drawn from the seed."""
    if number < 3:
        return (_NORTH, _RIVER, _HILL)[number]
    rng = _stream(seed, number, 0, _SCANNER)
    thickness, pixel = round(rng.uniform(4.0, 6.0), 1), round(rng.uniform(5.6, 6.4), 1)
    return Scanner(
        name=f"hospital-{number + 1:02d}",
        model=f"Varia CT {number + 1:02d}",
        storage=("series", "nifti", "frames")[number % 3],
        phase=str(rng.choice(["native", "arterial", "portal"])),
        shape=(round(190 / thickness), int(rng.integers(60, 72)), int(rng.integers(62, 72))),
        thickness=thickness,
        pixel=pixel,
        blur=rng.uniform(1.2, 3.2),
        edge=float(rng.choice([0.0, rng.uniform(0.2, 0.6)])),
        noise=rng.uniform(8.0, 20.0),
        grain=rng.uniform(1.5, 5.0),
        offset=rng.uniform(-6.0, 6.0),
        cupping=rng.uniform(0.0, 10.0),
        couch=bool(rng.random() < 0.5),
        build=Build(rng.uniform(0.95, 1.06), rng.uniform(13.0, 30.0), rng.uniform(0.8, 0.95), rng.uniform(0.0, 0.6)),
    )


def make(
    directory: Path,
    sites: int = 3,
    patients: int = 40,
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
    """What README.txt says."""
    return (
        "Synthetic CT scans. No patient is behind any of these images: they are drawn by a program, and names, dates\n"
        "and hospitals are invented. They are for tests and demonstrations, not for medical use.\n\n"
        f"command:   consilium cohort make DIR --kind ct --sites {sites} --patients {patients} --seed {seed}\n"
        f"generator: {GENERATOR}\n\n"
        "One folder per hospital: scans, masks, labels.csv (path,mask,patient,split) and site.toml. The hospitals\n"
        "differ in scanner, phase of contrast agent, patients, file format and names or numbers of the classes,\n"
        f"which are {', '.join(CLASSES)}. Lesions lie in the liver; some patients have none.\n"
    )


def _stream(seed: int, site: int, patient: int, purpose: int) -> np.random.Generator:
    """The random numbers for one purpose of one patient."""
    return np.random.default_rng([seed, site, patient, purpose])


def _write_site(folder: Path, machine: Scanner, number: int, patients: int, seed: int) -> Iterator[None]:
    """Write one hospital's folder; a generator, so that the caller can report each patient."""
    folder.mkdir(parents=True)
    table = [["path", "mask", "patient", "split"]]
    for patient in range(patients):
        case = draw(number, patient, seed)
        identity = f"C{number + 1}-{patient + 1:04d}"
        spacing = (machine.thickness, machine.pixel, machine.pixel)
        scan = Scan(case.hu, case.labels, spacing, identity, machine.name, machine.model, (seed, number, patient))
        if machine.storage == "nifti":
            values = [0, *(_NUMBERS[name] for name in CLASSES)]
            path, mask = write_nifti_pair(folder, scan, np.array(values, np.uint8))
        else:
            write = write_series if machine.storage == "series" else write_frames
            path, mask = write(folder, scan, [machine.labels.get(name, name) for name in CLASSES])
        table.append([path, mask, identity, SPLITS[patient % len(SPLITS)]])
        yield
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    own = {str(_NUMBERS[name]): name for name in CLASSES} if machine.storage == "nifti" else {}
    own |= {machine.labels[name]: name for name in CLASSES if name in machine.labels}
    lines = [f'name = "{machine.name}"', "[data]", 'format = "csv"', 'csv = "labels.csv"']
    lines += ["[label_map]", *(f'"{key}" = "{name}"' for key, name in own.items())] if own else []
    (folder / "site.toml").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def draw(number: int, patient: int, seed: int) -> Case:
    """The scan of one patient of hospital ``number``."""
    machine = scanner(number, seed)
    person = draw_patient(_stream(seed, number, patient, _BODY), machine.build)
    slices, rows, columns = machine.shape
    fine = (slices * _FINE, rows, columns)
    g = grid(person, fine, (machine.thickness / _FINE, machine.pixel, machine.pixel))
    hu, labels = draw_abdomen(g, person, machine.phase)
    thick = hu.reshape(slices, _FINE, rows, columns).mean(axis=1)
    rng = _stream(seed, number, patient, _EXPOSURE)
    return Case(_reconstruct(rng, machine, thick), labels[_FINE // 2 :: _FINE].copy(), person)


def _reconstruct(rng: np.random.Generator, machine: Scanner, hu: Field) -> NDArray[np.int16]:
    """What the scanner makes of the true HU: couch, cupping, kernel, noise, and -1024 as the least value."""
    _, rows, columns = machine.shape
    body = gaussian_filter((hu > -300).astype(np.float32), (0, 6, 6))
    if machine.couch:
        top = int(rows / 2 + rng.uniform(150, 156) / machine.pixel)
        hu[:, top : top + 2, columns // 6 : -columns // 6] = 120
    blur = machine.blur / machine.pixel
    seen = gaussian_filter(hu, (0, blur, blur))
    if machine.edge:
        seen += np.float32(machine.edge) * (seen - gaussian_filter(hu, (0, 2 * blur + 0.5, 2 * blur + 0.5)))
    grain = machine.grain / machine.pixel
    noise = gaussian_filter(rng.standard_normal(hu.shape, np.float32), (0, grain, grain), mode="wrap")
    noise = uniform_filter1d(noise, 2, axis=0, mode="wrap")  # neighbouring slices share rays
    noise *= np.float32(machine.noise) / noise.std() * (0.6 + 0.6 * body)  # more, where less gets through
    seen += noise + np.float32(machine.offset) - np.float32(machine.cupping) * body
    return np.asarray(np.clip(np.rint(seen), -1024, 3071), np.int16)
