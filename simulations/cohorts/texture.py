"""What the phantom is drawn with: outline tables looked up by pixel, and random vessels and textures.

A patient's own number decides the random parts, so that a repeat exposure shows the same lungs.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d  # type: ignore[import-untyped,unused-ignore]

Image = NDArray[np.float32]
Floats = NDArray[np.float64]

STEP, REACH = 0.5, 320.0  # mm: spacing and half-length of the outline tables
AXIS: Floats = np.arange(-REACH, REACH, STEP)


def index(where: Image | Floats) -> NDArray[np.intp]:
    """Where in the outline tables each coordinate (mm) falls."""
    place = where * np.float32(1 / STEP)
    place += np.float32(REACH / STEP)
    return place.astype(np.intp)


def look(table: Image, index: NDArray[np.intp]) -> Image:
    """An outline table, read at each pixel."""
    found: Image = table.take(index, mode="clip")
    return found


def curve(knots: list[tuple[float, float]], smooth: float = 8.0) -> Floats:
    """A smooth outline (mm over mm) through a few knots."""
    x, y = zip(*knots, strict=True)
    curve: Floats = gaussian_filter1d(np.interp(AXIS, x, y), smooth / STEP, mode="nearest")
    return curve


def tree(key: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """A patient's vessels as points 1 mm apart: positions, weights, and which belong to the thick branches."""
    rng = np.random.default_rng([key, 1])
    fan = np.concatenate([np.linspace(-1.45, 1.5, 9), np.pi - np.linspace(-1.45, 1.5, 9)])
    angle = fan + rng.normal(0.0, 0.12, fan.size)
    start = np.where(np.cos(fan)[:, None] > 0, [[36.0, -4.0]], [[-34.0, 2.0]]) + rng.normal(0.0, 5.0, (fan.size, 2))
    length, weight = rng.uniform(45.0, 80.0, fan.size), np.full(fan.size, 1.0)
    found: list[tuple[Floats, Floats, NDArray[np.bool_]]] = []
    for level in range(3):
        run = np.arange(0.0, 1.0, 1.0 / 60.0)
        bend = rng.normal(0.0, 0.45, angle.size)
        heading = angle[:, None] + bend[:, None] * run[None, :]
        step = (length / run.size)[:, None]
        path = start[:, None, :] + np.cumsum(np.stack([np.cos(heading), np.sin(heading)], -1) * step[..., None], 1)
        share = weight[:, None] * (1.0 - 0.75 * run)[None, :] * step
        found.append((path.reshape(-1, 2), share.ravel(), np.full(share.size, level == 0)))
        parent = np.repeat(np.arange(angle.size), 3 if level == 0 else 2)
        at = rng.integers(12, 55, parent.size)
        start, turn = path[parent, at], rng.choice([-1.0, 1.0], parent.size) * rng.uniform(0.35, 0.8, parent.size)
        angle = heading[parent, at] + turn
        weight, length = weight[parent] * 0.62, length[parent] * rng.uniform(0.4, 0.7, parent.size)
    points, weights, thick = (np.concatenate(part) for part in zip(*found, strict=True))
    return points, weights, thick


def fields(key: int, rows: int, columns: int) -> tuple[Image, Image]:
    """Soft random fields interpolated from lattices: interstitial texture, and how aeration varies by region."""
    rng = np.random.default_rng([key, 3])
    fine, coarse, region = (_field(rng, cells, rows, columns) for cells in (47, 19, 6))
    return 0.7 * fine + 1.25 * coarse, region


def _field(rng: np.random.Generator, cells: int, rows: int, columns: int) -> Image:
    """Normal random numbers on a square lattice, smoothly interpolated."""
    noise = rng.standard_normal((cells, cells), np.float32)
    (top, down), (left, across) = _lattice(rows, cells), _lattice(columns, cells)
    lines = noise[top] + (noise[top + 1] - noise[top]) * down[:, None]
    steps = lines[:, 1:] - lines[:, :-1]
    image: Image = lines[:, left] + steps[:, left] * across[None, :]
    return image


@lru_cache(maxsize=32)
def _lattice(size: int, cells: int) -> tuple[NDArray[np.intp], Image]:
    """For each pixel of an axis: the lattice cell it lies in, and how far across, eased so that no edges show."""
    place = np.arange(size) * ((cells - 1.001) / size)
    part = place % 1.0
    return place.astype(np.intp), (part * part * (3.0 - 2.0 * part)).astype(np.float32)
