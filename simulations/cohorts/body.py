"""The phantom abdomen: liver with lesions, spleen, kidneys and spine among tissues that look like them, in HU.

Coordinates are millimetres in a standard adult lying on the back: x to the patient's left, y to the back, z to the
head; the origin is in front of the spine at the level of the kidneys. Every structure is a function that is about the
distance from its surface, below 0 inside; structures are painted one over the other, so the last one decides on the HU
and on the class of a voxel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped,unused-ignore]

Field = NDArray[np.float32]
Points = NDArray[np.float64]

#: The classes, in the order of their numbers in a label map; 0 is everything else.
CLASSES = ("liver", "lesion", "spleen", "kidneys", "spine")
_LIVER, _LESION, _SPLEEN, _KIDNEY, _SPINE = range(1, 6)

#: HU by phase of the contrast agent. ``lesion`` and ``veins`` are what these differ by from the liver;
#: ``patchy`` is how unevenly the spleen fills.
PHASES: dict[str, dict[str, float]] = {
    "native": {
        "liver": 58, "lesion": -30, "spleen": 48, "cortex": 34, "marrow": 30, "aorta": 42, "cava": 40, "muscle": 54,
        "veins": -12, "patchy": 3,
    },
    "arterial": {
        "liver": 74, "lesion": -42, "spleen": 128, "cortex": 205, "marrow": 95, "aorta": 310, "cava": 95, "muscle": 58,
        "veins": 6, "patchy": 18,
    },
    "portal": {
        "liver": 112, "lesion": -58, "spleen": 124, "cortex": 182, "marrow": 172, "aorta": 158, "cava": 148,
        "muscle": 64, "veins": 40, "patchy": 3,
    },
}  # fmt: skip
_AIR, _FAT, _LUNG, _BILE, _DISC, _MARROW, _CORTEX, _RIB = -1000, -102, -840, 8, 85, 185, 380, 300


@dataclass(frozen=True)
class Build:
    """How a hospital's patients are built on average, and what they come with."""

    size: float = 1.0  # relative to the standard adult
    fat: float = 18.0  # mm under the skin
    lesions: float = 0.85  # share of patients with lesions in the liver
    meal: float = 0.0  # share of patients who drank contrast agent


class Ellipsoids(NamedTuple):
    """Some ellipsoids: centres and radii (n, 3) in mm, and a number (n,) that says how each is filled."""

    centres: Points
    radii: Points
    filling: Points


@dataclass(frozen=True)
class Patient:
    """One phantom's anatomy; all that is random about it is fixed here."""

    scale: Points  # (3,) of the whole body
    fat: float  # mm
    turn: float  # radians about the long axis
    shift: Points  # (3,) mm of the body on the table
    organs: dict[str, Points]  # how far each organ lies from where it does in the standard adult, (3,) mm
    sizes: dict[str, float]  # relative
    bowel: Ellipsoids  # filling: below 0.3 gas, above 2 contrast agent
    veins: Points  # (n, 2, 3) ends of the liver's veins
    lesions: Ellipsoids  # filling: strength, 1 is usual
    swing: float  # HU by which this patient's organs take up more agent than usual, relative to the phase
    key: int  # seeds the texture


class Grid(NamedTuple):
    """The voxels in the patient's millimetres, each (d, h, w), and the mean side of a voxel in mm."""

    x: Field
    y: Field
    z: Field
    side: float


def draw_patient(rng: np.random.Generator, build: Build) -> Patient:
    """A patient of a hospital, with the lesions, if any."""
    size = build.size * rng.normal(1.0, 0.04)
    organs = {name: rng.normal(0.0, [5.0, 4.0, 7.0]) for name in ("liver", "spleen", "left", "right", "stomach")}
    sizes = {name: float(np.exp(rng.normal(0.0, 0.08))) for name in ("liver", "spleen", "left", "right", "stomach")}
    turn, shift = rng.normal(0.0, 0.05), rng.normal(0.0, [8.0, 6.0, 6.0])
    fat = build.fat * float(np.exp(rng.normal(0.0, 0.25)))
    meal = 3.0 if rng.random() < build.meal else 1.0
    loops = 30
    bowel = Ellipsoids(
        np.stack([rng.uniform(-95, 95, loops), rng.uniform(-75, 15, loops), rng.uniform(-130, 10, loops)], axis=1),
        rng.uniform(13.0, 26.0, (loops, 3)),
        rng.uniform(0.0, meal, loops),
    )
    root = np.array([-20.0, 30.0, 62.0]) + organs["liver"]  # where the veins leave the liver
    ends = root + rng.uniform([-75, -75, -80], [10, 0, 5], (6, 3))
    veins = np.stack([np.broadcast_to(root, ends.shape), ends], axis=1)
    patient = Patient(
        scale=size * np.exp(rng.normal(0.0, 0.025, 3)),
        fat=fat,
        turn=turn,
        shift=shift,
        organs=organs,
        sizes=sizes,
        bowel=bowel,
        veins=veins,
        lesions=Ellipsoids(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0)),
        swing=rng.normal(0.0, 0.08),
        key=int(rng.integers(2**31)),
    )
    count = int(rng.integers(1, 5)) if rng.random() < build.lesions else 0
    return Patient(**{**vars(patient), "lesions": _draw_lesions(rng, patient, count)})


def _draw_lesions(rng: np.random.Generator, patient: Patient, count: int) -> Ellipsoids:
    """Lesions that lie well inside the liver and apart from each other."""
    centres: list[Points] = []
    radii: list[Points] = []
    for _ in range(400):
        if len(centres) == count:
            break
        centre, reach = rng.uniform([-140, -80, -60], [60, 80, 95]), rng.uniform(14.0, 28.0)
        x, y, z = (np.full((1, 1, 1), value, np.float32) for value in centre)
        apart = all(
            np.linalg.norm(centre - other) > reach + max(size) + 6 for other, size in zip(centres, radii, strict=True)
        )
        if apart and float(_liver(Grid(x, y, z, 1.0), patient)[0, 0, 0]) < -0.7 * reach:
            centres.append(centre)
            radii.append(reach * rng.uniform(0.75, 1.2, 3))
    strength = rng.uniform(0.75, 1.3, len(centres))
    return Ellipsoids(np.reshape(centres, (-1, 3)), np.reshape(radii, (-1, 3)), strength)


def grid(patient: Patient, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Grid:
    """The patient's millimetres at every voxel of a scan (d, h, w) centred on the table, d upwards."""
    z, y, x = np.meshgrid(
        *((np.arange(count) - (count - 1) / 2) * step for count, step in zip(shape, spacing, strict=True)),
        indexing="ij",
    )
    x, y, z = (line - offset for line, offset in zip((x, y, z), patient.shift, strict=True))
    cos, sin = np.cos(patient.turn), np.sin(patient.turn)
    x, y = cos * x + sin * y, cos * y - sin * x
    x, y, z = ((line / scale).astype(np.float32) for line, scale in zip((x, y, z), patient.scale, strict=True))
    return Grid(x, y, z, float(np.mean(spacing)))


def draw_abdomen(g: Grid, patient: Patient, phase: str) -> tuple[Field, NDArray[np.uint8]]:
    """HU without noise, float32 (d, h, w), and the label map: 0, or 1 + index in CLASSES."""
    level = {name: value * (1 + patient.swing * (value > 70)) for name, value in PHASES[phase].items()}
    scan = _Scan(g)
    wall = _cavity(g, patient)
    scan.paint(_skin(g, patient), _FAT)
    scan.paint(wall - 14, level["muscle"])
    scan.paint(wall, _FAT)
    texture = _texture(patient.key, g.x.shape)
    _paint_bowel(scan, patient, wall)
    dome = g.z - _dome(g, patient)
    scan.paint(np.maximum(wall, -dome), _LUNG + 60 * texture)
    scan.paint(np.maximum(_ellipsoid(g, (14, -26, 118), (62, 50, 52)), -dome - 3), level["cava"])  # the heart
    liver = _liver(g, patient)
    scan.paint(liver, level["liver"] + 4 * texture, _LIVER)
    for ends in patient.veins:
        scan.paint(np.maximum(_tube(g, ends, 3.6), liver), level["liver"] + level["veins"], _LIVER)
    for centre, radii, strength in zip(*patient.lesions, strict=True):
        inside = np.maximum(_ellipsoid(g, centre, radii), liver + 2)
        scan.paint(inside, level["liver"] + level["lesion"] * strength, _LESION)
    scan.paint(np.maximum(_ellipsoid(g, (-58, -52, -22), (13, 17, 24), patient.organs["liver"]), -liver), _BILE)
    _paint_organs(scan, patient, level, np.maximum(wall + 2, dome + 3), texture)
    _paint_bones(scan, patient, wall, level)
    return scan.hu, scan.labels


class _Scan:
    """HU and classes as far as painted."""

    def __init__(self, g: Grid) -> None:
        self.g = g
        self.hu = np.full(g.x.shape, _AIR, np.float32)
        self.labels = np.zeros(g.x.shape, np.uint8)

    def paint(self, surface: Field, hu: float | Field, label: int = 0, slices: slice = slice(None)) -> None:
        """Fill what is below 0 in some slices; a voxel on the surface gets its share."""
        near = surface < 0.5 * self.g.side
        share = np.clip(0.5 - surface[near] / self.g.side, 0.0, 1.0)
        value = hu[near] if isinstance(hu, np.ndarray) else np.float32(hu)
        there = self.hu[slices]
        there[near] += share * (value - there[near])
        self.labels[slices][surface < 0] = label

    def around(self, height: float, reach: float) -> tuple[Grid, slice]:
        """The slices that come within ``reach`` mm of a height; z is the same all over a slice."""
        found = np.flatnonzero(np.abs(self.g.z[:, 0, 0] - np.float32(height)) < reach + self.g.side)
        slices = slice(found[0], found[-1] + 1) if found.size else slice(0, 0)
        return Grid(self.g.x[slices], self.g.y[slices], self.g.z[slices], self.g.side), slices


# --- surfaces ---------------------------------------------------------------------------------------------------------


def _ellipsoid(g: Grid, centre: object, radii: object, offset: Points | float = 0.0, size: float = 1.0) -> Field:
    """About the distance in mm from the surface of an ellipsoid along the axes."""
    middle, axes = np.asarray(centre, float) + offset, np.asarray(radii, float) * size
    place = [(line - np.float32(m)) / np.float32(r) for line, m, r in zip(g[:3], middle, axes, strict=True)]
    return np.asarray((np.sqrt(place[0] ** 2 + place[1] ** 2 + place[2] ** 2) - 1) * np.float32(axes.min()), np.float32)


def _oval(x: Field, y: Field, wide: float, deep: float) -> Field:
    """About the distance from a cylinder along z whose section is between an ellipse and its box."""
    root = (np.abs(x / np.float32(wide)) ** 2.4 + np.abs(y / np.float32(deep)) ** 2.4) ** np.float32(1 / 2.4)
    return np.asarray((root - 1) * np.float32(min(wide, deep)), np.float32)


def _tube(g: Grid, ends: Points, radius: float) -> Field:
    """The distance from a straight tube with round ends."""
    along = ends[1] - ends[0]
    from_start = [line - np.float32(start) for line, start in zip(g[:3], ends[0], strict=True)]
    share = sum(line * np.float32(step) for line, step in zip(from_start, along, strict=True)) / np.float32(
        along @ along
    )
    share = np.clip(share, 0.0, 1.0)
    aside = sum((line - share * np.float32(step)) ** 2 for line, step in zip(from_start, along, strict=True))
    return np.asarray(np.sqrt(aside) - np.float32(radius), np.float32)


def _union(first: NDArray[Any], second: NDArray[Any], soft: float) -> Field:
    """The lower of two surfaces, joined softly over ``soft`` mm."""
    mix = np.clip(soft - np.abs(first - second), 0.0, None) ** 2 / (4 * soft)
    return np.asarray(np.minimum(first, second) - mix, np.float32)


def _cavity(g: Grid, patient: Patient) -> Field:
    """The inside of the muscles of the trunk, which are narrower at the waist."""
    waist = 1 - np.float32(0.05) * np.exp(-(((g.z + 60) / 60) ** 2))
    return _oval(g.x / waist, g.y / waist, 132, 92)


def _skin(g: Grid, patient: Patient) -> Field:
    return _oval(g.x, g.y, 150 + patient.fat, 108 + 0.8 * patient.fat)


def _dome(g: Grid, patient: Patient) -> Field:
    """The height of the diaphragm, higher over the liver; the spine's groove is lower."""
    over = np.float32(patient.organs["liver"][2])
    right = 92 + over - ((g.x + 66) ** 2 + 1.3 * g.y**2) / 150
    left = 80 - ((g.x - 62) ** 2 + 1.3 * (g.y - 10) ** 2) / 130
    return -_union(-right, -left, 10.0)


def _liver(g: Grid, patient: Patient) -> Field:
    offset, size = patient.organs["liver"], patient.sizes["liver"]
    right = _ellipsoid(g, (-72, 4, 18), (74, 84, 76), offset, size)
    left = _ellipsoid(g, (8, -44, 46), (78, 34, 36), offset, size)
    hilum = _ellipsoid(g, (-18, 22, -12), (40, 44, 40), offset, size)
    edge = np.maximum(_cavity(g, patient) + 3, g.z - _dome(g, patient) + 4)
    whole: Field = np.maximum(np.maximum(_union(right, left, 18.0), -hilum), edge)
    return whole


def _paint_bowel(scan: _Scan, patient: Patient, wall: Field) -> None:
    g = scan.g
    stomach = _ellipsoid(g, (54, -40, 30), (46, 36, 44), patient.organs["stomach"], patient.sizes["stomach"])
    shapes = [(stomach, slice(None), patient.bowel.filling[0])]
    for centre, radii, filling in zip(*patient.bowel, strict=True):
        near, slices = scan.around(centre[2], radii[2])
        shapes.append((_ellipsoid(near, centre, radii), slices, filling))
    for surface, slices, filling in shapes[::-1]:  # the stomach last
        inside = np.maximum(surface, wall[slices] + 3)
        scan.paint(inside, 45, 0, slices)
        scan.paint(inside + 4, -880 if filling < 0.3 else 240 if filling > 2 else 22, 0, slices)
    gas = np.maximum(stomach + 4, g.y - np.float32(patient.organs["stomach"][1] - 58))  # rises to the front
    scan.paint(np.maximum(gas, wall + 7), -900)


def _paint_organs(scan: _Scan, patient: Patient, level: dict[str, float], limit: Field, texture: Field) -> None:
    """Great vessels, spleen and kidneys; ``limit`` is what they stay inside of."""
    g = scan.g
    scan.paint(_oval(g.x - 8, g.y - 34, 11, 11), level["aorta"])
    scan.paint(_oval(g.x + 19, g.y - 33, 13, 10), level["cava"])
    offset, size = patient.organs["spleen"], patient.sizes["spleen"]
    spleen = _ellipsoid(g, (84, 32, 34), (44, 58, 54), offset, size)
    spleen = np.maximum(spleen, -_ellipsoid(g, (48, 8, 28), (44, 46, 66), offset, size))
    scan.paint(np.maximum(spleen, limit), level["spleen"] + level["patchy"] * texture, _SPLEEN)
    for side, sign in (("left", 1), ("right", -1)):
        offset, size = patient.organs[side], patient.sizes[side]
        leaning = g._replace(x=g.x + np.float32(0.22 * sign) * g.z, y=g.y - np.float32(0.15) * -g.z)
        height = -18 if side == "left" else -32
        kidney = np.maximum(_ellipsoid(leaning, (sign * 58, 46, height), (29, 25, 55), offset, size), limit)
        scan.paint(kidney, level["cortex"], _KIDNEY)
        scan.paint(kidney + 8, level["marrow"], _KIDNEY)
        scan.paint(_ellipsoid(leaning, (sign * 40, 42, height), (17, 9, 24), offset, size), -60)


def _paint_bones(scan: _Scan, patient: Patient, wall: Field, level: dict[str, float]) -> None:
    """Spine with discs, canal and processes, and the ribs, which no class is for."""
    g = scan.g
    for rib in range(5):
        # a rib falls from the spine to the front
        height = np.float32(18 + 27 * (rib - 1)) - np.float32(0.42) * (70 - g.y)
        ring = np.sqrt((wall - 7) ** 2 + (0.75 * (g.z - height)) ** 2) - np.float32(4.5)
        scan.paint(np.maximum(ring, -70 - g.y), _RIB)
    scan.paint(np.maximum(_oval(np.abs(g.x) - 45, g.y - 76, 26, 18), wall - 12), level["muscle"])
    body = _oval(g.x, g.y - 64, 24, 17)
    level_of = np.cos(g.z * np.float32(2 * np.pi / 34))  # 1 in the middle of a disc
    process = np.maximum(_oval(g.x, g.y - 101, 5, 16), 9 * level_of - 3)
    arch = np.maximum(_oval(g.x, g.y - 88, 17, 13), -body)
    scan.paint(arch, _RIB, _SPINE)
    scan.paint(process, _RIB, _SPINE)
    scan.paint(body, _CORTEX, _SPINE)
    scan.paint(body + 4, _MARROW, _SPINE)
    scan.paint(np.maximum(body, 3.5 - np.float32(34 / 2 / np.pi) * level_of), _DISC, _SPINE)
    scan.paint(_oval(g.x, g.y - 88, 9, 8), 28)


def _texture(key: int, shape: tuple[int, ...]) -> Field:
    """A soft random field of sd 1."""
    noise = gaussian_filter(np.random.default_rng([key, 1]).standard_normal(shape, np.float32), 1.5, mode="wrap")
    return np.asarray(noise / noise.std(), np.float32)
