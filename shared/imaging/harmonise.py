"""Rules by which each site, alone, makes its images look like the others'."""

from __future__ import annotations

import numpy as np

from shared.imaging.display import Picture

_ITU_R_BT601 = np.array([0.299, 0.587, 0.114], np.float32)


def harmonise(picture: Picture, rule: str) -> Picture:
    """A picture (H, W) or (H, W, 3) in [0, 1] after the job's ``data.harmonise``.

    ``polarity`` turns a picture whose grey values are skewed to the dark side (dark objects on a bright ground) into
    its negative, so that objects are bright at every site. It looks at the one picture alone. ``none`` changes nothing.

    Raises:
        ValueError: a rule that is not known.
    """
    if rule == "none":
        return picture
    if rule != "polarity":
        raise ValueError(f"no rule {rule!r}")
    return 1 - picture if skewness(grey(picture)) < 0 else picture


def grey(picture: Picture) -> Picture:
    """(H, W) of (H, W) or (H, W, 3), by the weights of ITU-R BT.601."""
    return picture @ _ITU_R_BT601 if picture.ndim == 3 else picture


def skewness(values: np.ndarray) -> float:
    """Fisher's coefficient, the third central moment over the cubed standard deviation; 0 where all are equal."""
    apart = values.astype(np.float64) - values.mean(dtype=np.float64)
    variance = float(np.mean(apart**2))
    return float(np.mean(apart**3)) / variance**1.5 if variance > 1e-12 else 0.0
