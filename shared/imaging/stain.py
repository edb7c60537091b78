"""Stains of microscopy brought to one look: Reinhard et al. 2001 by the statistics of colour, Macenko et al. 2009 by
the absorption of two dyes.

Both bring each image to figures that stand here and are the same at every site, so no image is anybody's model and
nothing of a site's images is sent. Pictures are float32 (H, W, 3), red, green and blue in [0, 1] (sRGB).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared.imaging.display import Picture

Array = npt.NDArray[np.float64]

# --- CIELAB (CIE 15:2004) of sRGB (IEC 61966-2-1), white D65 ----------------------------------------------------------

_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = np.array([0.95047, 1.0, 1.08883])
_KNEE = 6 / 29


def lab_of(picture: npt.ArrayLike) -> Array:
    """(…, 3) of sRGB in [0, 1] as CIELAB: L from 0 to 100, a and b about -100 to 100."""
    coded = np.asarray(picture, np.float64)
    linear = np.where(coded > 0.04045, ((coded + 0.055) / 1.055) ** 2.4, coded / 12.92)
    ratio = linear @ _TO_XYZ.T / _WHITE
    x, y, z = np.moveaxis(np.where(ratio > _KNEE**3, np.cbrt(ratio), ratio / (3 * _KNEE**2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def rgb_of(lab: Array) -> Array:
    """The inverse of ``lab_of``; colours that sRGB has not are cut to [0, 1]."""
    y = (lab[..., 0] + 16) / 116
    root = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    ratio = np.where(root > _KNEE, root**3, 3 * _KNEE**2 * (root - 4 / 29))
    linear = np.clip((ratio * _WHITE) @ np.linalg.inv(_TO_XYZ).T, 0, None)
    coded: Array = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, linear * 12.92)
    return coded.clip(0, 1)


#: Mean and sd of L, a and b that Reinhard's rule brings each image to. The round figures of a pale violet stain: any
#: would do that is the same everywhere and leaves most colours within sRGB.
LAB_MEAN, LAB_SD = np.array([70.0, 12.0, -8.0]), np.array([12.0, 8.0, 6.0])


def reinhard(picture: Picture) -> Picture:
    """The picture with LAB_MEAN and LAB_SD; one of a single colour has no stain and stays as it is.

    Reinhard, Ashikhmin, Gooch, Shirley: Color transfer between images, IEEE CG&A 21 (2001), in CIELAB instead of
    their l-alpha-beta, as is usual in microscopy.
    """
    lab = lab_of(picture)
    mean, sd = lab.mean((0, 1)), lab.std((0, 1))
    if sd[0] < 1e-3:
        return picture
    # A channel without any variation (grey pictures have no colour) is moved, not spread.
    scale = np.where(sd > 1e-3, LAB_SD / np.maximum(sd, 1e-3), 1.0)
    return rgb_of((lab - mean) * scale + LAB_MEAN).astype(np.float32)


# --- optical density --------------------------------------------------------------------------------------------------

LIGHT = 240 / 255  # what the lamp alone gives in the pictures that come out
GLASS = 95  # percentile of each colour of a picture that is taken for its lamp: on real smears the paper's 240 for all
# sites drove them apart (docs/harmonisation.md), as one lamp is yellower or weaker than another
LEAST_DENSITY = 0.15  # below it, in any colour, a pixel is glass
LEAST_STAINED = 32  # pixels without which no plane of two stains can be told
#: The optical densities (red, green, blue) of haematoxylin and eosin, columns of unit length, and how much of each a
#: picture is given: the figures of the authors' own program.
STAINS = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
AMOUNTS = np.array([1.9705, 1.0308])


def light_of(picture: Picture) -> Array:
    """The light (3,) of a picture where nothing absorbs it."""
    return np.maximum(np.percentile(picture.reshape(-1, 3), GLASS, axis=0), 1 / 255)


def density(picture: npt.ArrayLike, light: npt.ArrayLike = LIGHT) -> Array:
    """Optical density (Beer and Lambert), natural logarithm; glass has 0."""
    return -np.log(np.maximum(np.asarray(picture, np.float64), 1 / 255) / light)


def stains_of(densities: Array) -> Array | None:
    """The optical densities (3, 2) of the two stains of some pixels (n, 3), unit columns; None where there are not two.

    Macenko et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009: the plane of the two
    greatest eigenvectors, and in it the directions of the 1st and the 99th percentile.
    """
    stained = densities[(densities > LEAST_DENSITY).all(1)]
    if len(stained) < LEAST_STAINED:
        return None
    values, vectors = np.linalg.eigh(np.cov(stained.T))
    if values[1] < 1e-6 * values[2] or values[2] < 1e-9:
        return None
    plane = vectors[:, [2, 1]]
    plane = plane * np.where(plane.sum(0) < 0, -1, 1)
    along = stained @ plane
    angles = np.arctan2(along[:, 1], along[:, 0])
    first, last = (plane @ np.array([np.cos(a), np.sin(a)]) for a in np.percentile(angles, [1, 99]))
    if float(first @ last) > np.cos(np.deg2rad(1)):
        return None
    return np.stack([first, last] if first[0] > last[0] else [last, first], 1)  # haematoxylin takes more red


def macenko(picture: Picture) -> Picture:
    """The picture with its two stains replaced by STAINS, as strong as AMOUNTS (99th percentile).

    One without two stains (blank glass, a single colour) stays as it is. The lamp is that of the picture, see GLASS.
    """
    densities = density(picture, light_of(picture)).reshape(-1, 3)
    stains = stains_of(densities)
    if stains is None:
        return picture
    # Of no dye is there less than none: unbounded, colours of neither stain came out green.
    amounts = np.linalg.lstsq(stains, densities.T, rcond=None)[0].clip(0, None)
    most = np.percentile(amounts, 99, axis=1)
    if (most <= 1e-3).any():
        return picture
    light = LIGHT * np.exp(-STAINS @ (amounts * (AMOUNTS / most)[:, None]))
    stained: Picture = light.T.reshape(picture.shape).clip(0, 1).astype(np.float32)
    return stained
