"""The phantom chest: a frontal radiograph drawn as relative attenuation, 0 (air) to 1 (densest bone).

Coordinates are millimetres in a standard adult: u to the right of the image (the patient's left), v downwards,
origin on the midline at the level of the hila. A patient's size and the pose on the detector are one affine map
between these and pixels, so the same patient can be drawn on any detector. One-dimensional outlines (chest wall,
mediastinum, diaphragm, rib profile) are tables, looked up by pixel: that is what keeps an image at a few ms.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d  # type: ignore[import-untyped,unused-ignore]

from simulations.cohorts.texture import AXIS, REACH, STEP, Floats, Image, curve, fields, index, look, tree

_RIB_HALF_WIDTH = 5.6  # mm
_RIB_FIRST, _RIB_PITCH = -141.0, 22.5  # mm: where rib 1 leaves the spine, and the step to the next


@dataclass(frozen=True)
class Habitus:
    """How a hospital's patients are built: means of the whole group, spreads are the same everywhere."""

    width: float = 1.0  # relative to the standard adult
    thickness: float = 1.0  # soft tissue in the beam, relative
    heart: float = 1.0  # relative heart size
    inspiration: float = 0.0  # mm by which the diaphragm lies lower than standard
    markings: float = 1.0  # prominence of vessels and of the interstitial texture, relative
    leads: float = 0.0  # share of patients with monitoring electrodes
    age: float = 55.0  # years


@dataclass(frozen=True)
class Patient:
    """One phantom's anatomy; everything random about it is fixed here, so repeat exposures agree."""

    width: float
    height: float
    thickness: float
    heart: float
    inspiration: float  # mm
    markings: float
    bone: float
    rib_shift: float  # mm
    rib_slope: float  # relative
    breast: float  # relative attenuation
    nipple: float
    hilum: float
    uneven: float  # left lung fuller of air than the right, relative
    gravity: float  # more air low down, relative per 100 mm
    stomach: float
    leads: bool
    granuloma: bool
    key: int  # seeds the vessel tree and the texture


@dataclass(frozen=True)
class Opacity:
    """A consolidation: soft lobes that replace air in the lung."""

    centres: Floats  # (n, 2) mm
    sigmas: Floats  # (n, 2) mm
    weights: Floats  # (n,)
    strength: float  # share of the air replaced where the lobes are thickest


@dataclass(frozen=True)
class Pose:
    """Where the patient stands for one exposure."""

    shift: tuple[float, float] = (0.0, 0.0)  # mm
    tilt: float = 0.0  # radians
    breath: float = 0.0  # mm of further inspiration


@dataclass
class Canvas:
    """A detector with a patient in front of it: pixel grids in the patient's millimetres."""

    rows: int
    columns: int
    spacing: float  # mm per pixel
    patient: Patient
    pose: Pose
    u: Image = field(init=False)
    v: Image = field(init=False)

    def __post_init__(self) -> None:
        cos, sin = np.cos(self.pose.tilt), np.sin(self.pose.tilt)
        x = (np.arange(self.columns) - self.columns / 2) * self.spacing - self.pose.shift[0]
        y = (np.arange(self.rows) - self.rows / 2) * self.spacing - self.pose.shift[1]
        self.u = ((cos * x[None, :] + sin * y[:, None]) / self.patient.width).astype(np.float32)
        self.v = ((cos * y[:, None] - sin * x[None, :]) / self.patient.height).astype(np.float32)

    def pixels(self, points: Floats) -> tuple[Floats, Floats]:
        """Column and row of points given in mm."""
        cos, sin = np.cos(self.pose.tilt), np.sin(self.pose.tilt)
        x, y = points[..., 0] * self.patient.width, points[..., 1] * self.patient.height
        column = (cos * x - sin * y + self.pose.shift[0]) / self.spacing + self.columns / 2
        row = (sin * x + cos * y + self.pose.shift[1]) / self.spacing + self.rows / 2
        return column, row

    def blobs(self, centres: Floats, sigmas: Floats, weights: Floats) -> Image:
        """Sum of Gaussian blobs along the detector's axes (mm): separable, so two lines of exponentials for each."""
        column, row = self.pixels(np.asarray(centres, float))
        wide, high = np.asarray(sigmas, float).T / self.spacing
        across = np.exp(-0.5 * ((np.arange(self.columns)[None, :] - column[:, None]) / wide[:, None]) ** 2)
        down = np.exp(-0.5 * ((np.arange(self.rows)[None, :] - row[:, None]) / high[:, None]) ** 2)
        down *= np.asarray(weights)[:, None]
        image = np.zeros((self.rows, self.columns), np.float32)
        # sums of outer products, not a matrix product: a linear algebra library would bring threads, and other
        # last digits on another processor
        for line, share in zip(across.astype(np.float32), down.astype(np.float32), strict=True):
            near = np.flatnonzero(np.abs(share) > 1e-4 * 0.02)
            if near.size:
                image[near[0] : near[-1] + 1] += share[near[0] : near[-1] + 1, None] * line
        return image

    def strokes(self, points: Floats, weights: Floats, sigma: float) -> Image:
        """Lines given as dense points (mm), each a Gaussian ridge of width sigma (mm) and peak about its weight."""
        column, row = (np.rint(part).astype(np.int64) for part in self.pixels(points))
        inside = (column >= 0) & (column < self.columns) & (row >= 0) & (row < self.rows)
        flat = row[inside] * self.columns + column[inside]
        image = np.bincount(flat, weights[inside], self.rows * self.columns).astype(np.float32)
        width = sigma / self.spacing
        # points lie 1 mm apart, so a pixel of the line holds `spacing` of them before the blur spreads it
        image *= np.float32(np.sqrt(2 * np.pi) * width / self.spacing)
        blurred: Image = gaussian_filter(image.reshape(self.rows, self.columns), width, truncate=3.0)
        return blurred


def draw_patient(rng: np.random.Generator, group: Habitus, female: bool) -> Patient:
    """One patient's build, drawn from the hospital's group; nothing here knows of the label."""
    width = group.width * rng.normal(1.0, 0.05) * (0.95 if female else 1.0)
    return Patient(
        width=width,
        height=width**0.4 * rng.normal(1.0, 0.04),
        thickness=group.thickness * float(np.exp(rng.normal(0.0, 0.10))),
        heart=group.heart * float(np.exp(rng.normal(0.0, 0.09))),
        inspiration=group.inspiration + rng.normal(0.0, 9.0),
        markings=group.markings * float(np.exp(rng.normal(0.0, 0.25))),
        bone=float(np.exp(rng.normal(0.0, 0.15))),
        rib_shift=rng.uniform(-8.0, 8.0),
        rib_slope=rng.normal(1.0, 0.15),
        breast=rng.uniform(0.02, 0.13) if female else rng.uniform(0.0, 0.02),
        nipple=rng.uniform(0.03, 0.08) if rng.random() < 0.2 else 0.0,
        hilum=rng.uniform(0.6, 1.4),
        uneven=rng.normal(0.0, 0.07),
        gravity=rng.normal(0.0, 0.07),
        stomach=rng.uniform(0.0, 0.2),
        leads=bool(rng.random() < group.leads),
        granuloma=bool(rng.random() < 0.12),
        key=int(rng.integers(2**31)),
    )


def draw_opacity(rng: np.random.Generator, patient: Patient, strength: tuple[float, float], size: float) -> Opacity:
    """A consolidation somewhere in the lungs, ribs and heart regardless: `strength` is the range it is drawn from."""
    shape = _outlines(patient, 0.0)
    while True:
        centre = np.array([rng.choice([-1.0, 1.0]) * rng.uniform(32, 112), rng.uniform(-110, 95)])
        if float(_lung(shape, centre[:1], centre[1:])[0]) > 0.45:
            break
    count = int(rng.integers(3, 7))
    reach = size * rng.uniform(0.75, 1.3)  # mm
    return Opacity(
        centres=centre + rng.normal(0.0, 0.75 * reach, (count, 2)),
        sigmas=reach * rng.uniform(0.55, 1.05, (count, 2)),
        weights=rng.uniform(0.45, 0.9, count),
        # most are plain to see, with a tail of faint ones
        strength=strength[0] + (strength[1] - strength[0]) * rng.beta(2.2, 1.0),
    )


def draw_chest(canvas: Canvas, opacity: Opacity | None) -> Image:
    """The radiograph of one patient as relative attenuation in [0, 1], rows by columns."""
    patient, u, v = canvas.patient, canvas.u, canvas.v
    a = np.abs(u)
    shape = _outlines(patient, canvas.pose.breath)
    texture, region = fields(patient.key, canvas.rows, canvas.columns)
    air = _lung(shape, u, v)
    # lungs are not aired alike: by side, from top to bottom, and from region to region, in health as well
    uneven = np.float32(patient.uneven) * np.sign(u) + np.float32(patient.gravity / 100) * v
    air *= 1.0 + np.float32(0.12) * region + uneven
    air *= 1.0 - 0.78 * _heart(patient, u, v)
    if opacity is not None:
        lobes = canvas.blobs(opacity.centres, opacity.sigmas, opacity.weights)
        patchy = np.clip(1.0 + 0.6 * texture, 0.3, 1.7)
        air *= 1.0 - np.float32(opacity.strength) * (1.0 - np.exp(-(lobes**2) * 1.6 * patchy))
    body = _body(shape, u, v) * np.float32(patient.thickness)
    image = body - 0.60 * air * (body > 0) * np.float32(min(patient.thickness, 1.25) ** 0.5)
    image += air * (_vessels(canvas) + np.float32(0.022 * patient.markings) * texture)
    image += np.float32(patient.bone) * _bones(canvas, shape, a)
    image += _soft_parts(canvas, shape)
    drawn: Image = np.clip(image * np.float32(0.74), 0.0, 1.0)
    return drawn


@lru_cache(maxsize=1)
def _fixed() -> dict[str, Image]:
    """The outlines that all patients share, before their own size."""
    above = np.clip((60.0 - AXIS) / 208.0, 0.0, 1.0)
    cage = 131.0 * (1.0 - above**2.5) ** 0.62 + 0.04 * np.clip(AXIS - 60.0, 0.0, None)
    wall = [(-320, 52), (-196, 55), (-178, 66), (-158, 140), (-142, 178), (-118, 205), (-70, 214), (-40, 190)]
    distance = AXIS / _RIB_HALF_WIDTH
    # a rib is a tube: cortex at both edges, marrow between
    rim = np.exp(-(((np.abs(distance) - 0.8) / 0.25) ** 2))
    tube = 0.62 * np.sqrt(np.clip(1.0 - distance**2, 0.0, 1.0)) + 0.42 * rim
    run, turn = np.clip((AXIS - 18.0) / 132.0, 0.0, 1.0), 2 * np.pi * AXIS / _RIB_PITCH
    tables = {
        "cage": cage,
        "cage_normal": 1.0 / np.sqrt(1.0 + np.gradient(cage, STEP) ** 2),
        "wall": curve([*wall, (-15, 168), (40, 162), (120, 160), (320, 163)], 7.0),
        "right": curve([(-150, 18), (-100, 24), (-60, 25), (-20, 24), (10, 30), (45, 38), (75, 33), (110, 25)]),
        "left": curve([(-150, 18), (-100, 24), (-72, 27), (-55, 37), (-40, 36), (-20, 27), (20, 32), (110, 30)], 6.0),
        "rib": tube,
        "tangent": 0.8 * np.clip(AXIS / 100.0, 0.0, 1.0) ** 8,
        "clavicle": -108.0 - 36.0 * run - 9.0 * np.sin(2 * np.pi * run),
        "spine": 0.115 * np.exp(-((AXIS / 18.0) ** 4)) + 0.03 * np.exp(-(((np.abs(AXIS) - 14.0) / 3.5) ** 2)),
        "bodies": 0.84 + 0.16 * np.tanh(2.5 * np.sin(turn)),
        "process": 0.045 * np.exp(-((AXIS / 4.0) ** 2)),
        "processes": 1.0 / (1.0 + np.exp(-8.0 * (np.sin(turn + 0.8) - 0.4))),
        # front-to-back thickness: neck and shoulders thin, abdomen thick
        "depth": curve([(-200, 0.62), (-140, 0.78), (-90, 0.94), (0, 1.0), (90, 1.02), (150, 1.12)], 15.0),
    }
    return {name: table.astype(np.float32) for name, table in tables.items()}


def _outlines(patient: Patient, breath: float) -> dict[str, Image]:
    """The shared outlines and this patient's diaphragm (v in mm over u in mm; right dome higher than left)."""
    level = 84.0 + patient.inspiration + breath
    right = level + 0.0058 * (AXIS + 62.0) ** 2
    left = level + 11.0 + 0.0058 * (AXIS - 68.0) ** 2
    dome = np.where(AXIS < 0, right, left) + 26.0 * np.clip((np.abs(AXIS) - 108.0) / 22.0, 0.0, 1.5) ** 2
    dome = gaussian_filter1d(dome, 4.0 / STEP)
    steep = 1.0 / np.sqrt(1.0 + np.gradient(dome, STEP) ** 2)
    return _fixed() | {"dome": dome.astype(np.float32), "dome_normal": steep.astype(np.float32)}


def _lung(shape: dict[str, Image], u: Image | Floats, v: Image | Floats) -> Image:
    """Air in the beam, 0 to 1: falls to nothing at chest wall, mediastinum and diaphragm, as path lengths do."""
    a, across, down = np.abs(u), index(u), index(v)
    lateral = (look(shape["cage"], down) - a) * look(shape["cage_normal"], down)
    medial = a - np.where(u > 0, look(shape["left"], down), look(shape["right"], down))
    below = (look(shape["dome"], across) - v) * look(shape["dome_normal"], across)
    air = 1.0 - np.exp(-np.clip(lateral, 0.0, None) / 13.0)
    air *= 1.0 - np.exp(-np.clip(medial, 0.0, None) / 8.0)
    air *= 1.0 - 0.85 * np.exp(-np.clip(below, 0.0, None) / 14.0)
    # the recess behind the dome still holds a little air
    air *= np.where(below > 0, 1.0, 0.15 * np.exp(np.clip(below, -80.0, 0.0) / 18.0))
    return np.asarray(air, np.float32)


def _heart(patient: Patient, u: Image, v: Image) -> Image:
    """The heart shadow, 0 to 1: an ellipse leaning to the patient's left, apex low."""
    long, short = 68.0 * patient.heart, 49.0 * patient.heart
    x, y = u - np.float32(27.0 + 14.0 * (patient.heart - 1.0)), v - np.float32(52.0 + 0.4 * patient.inspiration)
    along, across = (0.80 * x + 0.60 * y) / np.float32(long), (0.80 * y - 0.60 * x) / np.float32(short)
    inside = np.clip(1.0 - along**2 - across**2, 0.0, 1.0)
    root = np.sqrt(inside)
    return np.asarray(np.sqrt(root) * (0.55 + 0.45 * root), np.float32)


def _body(shape: dict[str, Image], u: Image, v: Image) -> Image:
    """Soft tissue in the beam, about 1 on the midline: thins towards the outline and in the neck."""
    down = index(v)
    inside = np.clip(1.0 - (u / look(shape["wall"], down)) ** 2, 0.0, 1.0)
    result: Image = np.sqrt(inside) * look(shape["depth"], down)
    return result


def _bones(canvas: Canvas, shape: dict[str, Image], a: Image) -> Image:
    """Ribs, spine, clavicles, shoulders and scapulae."""
    u, v, patient = canvas.u, canvas.v, canvas.patient
    cage = look(shape["cage"], index(v)) + 3.0
    s = a / np.maximum(cage, 20.0)
    inside = np.clip((1.0 - s) * cage * 0.25, 0.0, 1.0)
    tangent = 1.0 + look(shape["tangent"], index(s * 100.0))  # at the flank the rib runs along the beam
    first, slope = _RIB_FIRST + patient.rib_shift, patient.rib_slope
    back = v - (-30.0 * s * (1.0 - s) + 26.0 * slope * s * s) - first
    ribs = 0.115 * _ribs(shape, back, 11, 0.93) * tangent * np.clip(a * 0.08 - 1.2, 0.0, 1.0)
    front = v - (26.0 * slope + 74.0 * slope * (1.0 - s)) - first
    ribs += 0.075 * _ribs(shape, front, 7, 0.80) * tangent * np.clip((s - 0.30) * 5.0, 0.0, 1.0)
    bones: Image = ribs * inside
    across, level = index(u), index(v + np.float32(patient.rib_shift))
    bones += look(shape["spine"], across) * look(shape["bodies"], level)
    bones += look(shape["process"], across) * look(shape["processes"], level)
    # clavicle: a flat S from the sternum up to the shoulder
    line = v - look(shape["clavicle"], index(a)) - np.float32(0.5 * patient.rib_shift)
    ends = np.clip((a - 14.0) / 6.0, 0.0, 1.0) * np.clip((165.0 - a) / 8.0, 0.0, 1.0)
    bones += 0.15 * look(shape["rib"], index(line * 0.85)) * ends
    top = int(np.searchsorted(v.max(1), 20.0))  # the shoulders lie above; v grows downwards
    bones[:top] += _shoulder(a[:top], v[:top])
    return bones


def _ribs(shape: dict[str, Image], height: Image, count: int, lean: float) -> Image:
    """All ribs of one slope family at once: the distance to the nearest centre line, in ribs, then the tube profile."""
    number = height * np.float32(1 / _RIB_PITCH)
    nearest = np.clip(np.rint(number), 0, count - 1)
    return look(shape["rib"], index((number - nearest) * np.float32(_RIB_PITCH * lean)))


def _shoulder(a: Image, v: Image) -> Image:
    """Humeral head, and the blade with its inner edge, outside the lungs for the most part."""
    head = np.clip(1.0 - ((a - 182.0) / 23.0) ** 2 - ((v + 118.0) / 24.0) ** 2, 0.0, 1.0)
    edge = 126.0 + 0.0016 * (v + 70.0) ** 2
    blade = np.clip((a - edge) / 3.0, 0.0, 1.0) * np.clip((172.0 - 0.42 * (v + 120.0) - a) / 6.0, 0.0, 1.0)
    blade = blade * np.clip((v + 132.0) / 10.0, 0.0, 1.0) * np.clip((2.0 - v) / 12.0, 0.0, 1.0)
    ridge = np.exp(-(((a - edge - 3.0) / 2.5) ** 2))
    shoulder: Image = 0.13 * np.sqrt(head) + blade * (0.045 + 0.05 * ridge)
    return shoulder


def _soft_parts(canvas: Canvas, shape: dict[str, Image]) -> Image:
    """Trachea, breasts, nipples, stomach bubble, granuloma, electrodes: none of them knows of the label."""
    patient, rng = canvas.patient, np.random.default_rng([canvas.patient.key, 2])
    trachea = np.clip(1.0 - ((canvas.u - 2.0) / 8.5) ** 2, 0.0, 1.0) * np.clip((-30.0 - canvas.v) / 12.0, 0.0, 1.0)
    dome = float(shape["dome"][int((60.0 + REACH) / STEP)])
    side, level = rng.uniform(66, 88), rng.uniform(52, 76)
    blobs = [(58.0, dome + 24.0, 17.0, 9.0, -patient.stomach)]
    for sign in (-1.0, 1.0):
        blobs.append((sign * side, level, 33.0, 27.0, patient.breast))
        blobs.append((sign * (side + rng.normal(4, 3)), level + rng.normal(12, 4), 3.6, 3.2, patient.nipple))
    if patient.granuloma:
        blobs.append((rng.choice([-1, 1]) * rng.uniform(45, 105), rng.uniform(-80, 50), 2.0, 1.8, 0.16))
    if patient.leads:
        spots = rng.normal(0, 9, (3, 2)) + np.array([(-88, -75), (92, -72), (84, 62)])
        blobs += [(spot[0], spot[1], 3.2, 3.2, 0.22) for spot in spots]
    table = np.array(blobs)
    parts: Image = canvas.blobs(table[:, :2], table[:, 2:4], table[:, 4]) - 0.15 * trachea
    return parts


def _vessels(canvas: Canvas) -> Image:
    """Hila and the branching lung markings, as attenuation where the lung is full of air."""
    patient = canvas.patient
    points, weights, thick = tree(patient.key)
    scale = 0.088 * patient.markings
    image = canvas.strokes(points[thick], scale * weights[thick], 2.3)
    image += canvas.strokes(points[~thick], scale * weights[~thick], 1.25)
    centres = np.array([(-37.0, 0.0), (-34.0, -16.0), (39.0, -10.0), (36.0, 6.0)])
    sigmas = np.array([(9.0, 17.0), (8.0, 9.0), (10.0, 12.0), (8.0, 13.0)])
    return image + canvas.blobs(centres, sigmas, 0.17 * patient.hilum * np.ones(4))
