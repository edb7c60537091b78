"""Rules by which each site, alone, makes its images look like the others'.

The grey of a picture decides (ITU-R BT.601), colours are changed as it is. What comes out is in [0, 1] again, as images
are kept: the standard score z is written as 0.5 + z / 8, so that what is further than 4 sd from the mean is cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.imaging.display import Picture
from shared.imaging.errors import UnreadableImage
from shared.imaging.stain import macenko, reinhard
from shared.rules import OF_SITE, PERCENTS, STAINS, landmarks_of, rules_of

_ITU_R_BT601 = np.array([0.299, 0.587, 0.114], np.float32)
Ends = tuple[float, float]  # the grey values that become 0 and 1

SDS = 4.0  # standard deviations on either side of the mean that fit into [0, 1]
TAILS = (0.5, 99.5)  # percentiles that become 0 and 1 (nnU-Net, Isensee et al. 2021)
_LEAST = 1e-6  # grey values closer than this are one


class Given(NamedTuple):
    """What a rule knows besides the picture: Nyúl's standard scale, and the ends of the site's own."""

    landmarks: tuple[float, ...]
    scale: Ends | None


def harmonise(picture: Picture, rules: str, landmarks: str = "", scale: Ends | None = None) -> Picture:
    """A picture (H, W) or (H, W, 3) in [0, 1] after the job's ``data.harmonise``, float32 in [0, 1].

    Args:
        rules: as the job has them, applied in order; ``none`` changes nothing. See ``shared.rules``.
        landmarks: ``data.landmarks``, for ``nyul``.
        scale: the grey values that become 0 and 1 by the rules ``site-…``: see ``shared.imaging.scale``.

    Raises:
        UserError: a rule that is not known.
        UnreadableImage: "no-colour", a grey picture under a stain rule.
        ValueError: a rule that wants ``scale`` or ``landmarks``, and there is none.
    """
    given = Given(landmarks_of(landmarks), scale)
    for rule in rules_of(rules):
        if rule in STAINS and picture.ndim != 3:
            raise UnreadableImage("no-colour", f"{rule} of a grey picture")
        picture = _RULES[rule](picture, given)
    return picture


def harmonise_volume(values: Picture, rules: str, landmarks: str = "", scale: Ends | None = None) -> Picture:
    """The same of a grey volume (d, h, w): one rule for all its slices."""
    return harmonise(values.reshape(len(values), -1), rules, landmarks, scale).reshape(values.shape)


def grey(picture: Picture) -> Picture:
    """(H, W) of (H, W) or (H, W, 3), by the weights of ITU-R BT.601."""
    return picture @ _ITU_R_BT601 if picture.ndim == 3 else picture


def skewness(values: npt.NDArray[np.floating]) -> float:
    """Fisher's coefficient, the third central moment over the cubed standard deviation; 0 where all are equal."""
    apart = values.astype(np.float64) - values.mean(dtype=np.float64)
    variance = float(np.mean(apart**2))
    return float(np.mean(apart**3)) / variance**1.5 if variance > 1e-12 else 0.0


# --- the rules --------------------------------------------------------------------------------------------------------


def _polarity(picture: Picture, given: Given) -> Picture:
    """The negative of a picture whose grey values are skewed to the dark side: dark objects on a bright ground."""
    return 1 - picture if skewness(grey(picture)) < 0 else picture


def _zscore(picture: Picture, given: Given) -> Picture:
    values = grey(picture)
    return stretch(picture, ends_of_moments(float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))))


def _percentiles(picture: Picture, given: Given) -> Picture:
    values = grey(picture)
    low, high = map(float, np.percentile(values, TAILS))
    if high - low < _LEAST:  # so much of one grey that the tails are in it: objects of very few pixels
        low, high = float(values.min()), float(values.max())
    return stretch(picture, (low, high))


def _of_site(picture: Picture, given: Given) -> Picture:
    if given.scale is None:
        raise ValueError("a rule of the site without the site's scale")
    return stretch(picture, given.scale)


def ends_of_moments(mean: float, sd: float) -> Ends:
    """The grey values that lie SDS standard deviations below and above the mean."""
    return mean - SDS * sd, mean + SDS * sd


def stretch(picture: Picture, ends: Ends) -> Picture:
    """The picture with these grey values as 0 and 1, the rest in between and cut off; one of a single grey is 0.5."""
    low, high = ends
    if high - low < _LEAST:
        return np.full_like(picture, 0.5, dtype=np.float32)
    return ((picture - np.float64(low)) / (high - low)).clip(0, 1).astype(np.float32)


def _nyul(picture: Picture, given: Given) -> Picture:
    """The percentiles PERCENTS of the picture at the standard's landmarks, straight lines between them.

    Nyúl, Udupa, Zhang: New variants of a method of MRI scale standardization, IEEE TMI 19 (2000). Black (0) is no
    tissue: it counts for nothing and stays black. The brightest value becomes 1.
    """
    if not given.landmarks:
        raise ValueError("nyul without landmarks")
    values = grey(picture)
    values = values[values > 0]
    if not values.size:
        return picture
    found, standard = _knots(np.percentile(values, PERCENTS), float(values.max()), given.landmarks)
    return np.interp(picture, [0.0, *found], [0.0, *standard]).astype(np.float32)


def _knots(
    found: npt.NDArray[np.float64], most: float, landmarks: tuple[float, ...]
) -> tuple[list[float], list[float]]:
    """Grey values of the picture, growing, and what each becomes.

    Where much of a picture is of one grey, several percentiles fall together: the grey goes to the first of their
    landmarks if it is the darkest, to 1 if it is the brightest, to their mean between.
    """
    groups: list[tuple[float, list[float]]] = []
    for value, target in zip([*found.tolist(), most], [*landmarks, 1.0], strict=True):
        if groups and value - groups[-1][0] < _LEAST:
            groups[-1][1].append(target)
        else:
            groups.append((value, [target]))
    standard = [sum(targets) / len(targets) for _, targets in groups]
    if len(groups) == 1:
        return [groups[0][0]], [0.5]
    standard[0], standard[-1] = landmarks[0], 1.0
    return [value for value, _ in groups], standard


_RULES: dict[str, Callable[[Picture, Given], Picture]] = {
    "polarity": _polarity,
    "zscore": _zscore,
    "percentiles": _percentiles,
    **dict.fromkeys(OF_SITE, _of_site),
    "nyul": _nyul,
    "reinhard": lambda picture, given: reinhard(picture),
    "macenko": lambda picture, given: macenko(picture),
}
