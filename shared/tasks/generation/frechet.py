"""The Fréchet distance of two sets of features from their moments, and its interval."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from shared.intervals import NOTHING, Estimate, Z

# The distance is given for features scaled so that the real images' have this total variance. The scale of raw features
# is an accident of the reference's training (100-fold between two learning rates); at this one the figures compare with
# those of docs/tasks/generation.md, where the mean of all images is some 15 from real ones and a blur 1.3.
TOTAL_VARIANCE = 10.0
_DRAWS = 30


class Moments(NamedTuple):
    """Mean (d,) and covariance (d, d), divided by the number of images, of features."""

    mean: np.ndarray
    covariance: np.ndarray


def upper(square: np.ndarray) -> np.ndarray:
    """The upper triangle of a symmetric matrix (d, d), row by row."""
    return square[np.triu_indices(len(square))]


def moments(total: np.ndarray, pairs: np.ndarray, n: float) -> Moments:
    """From the sum of the features (d,) and the upper triangle of the sum of their outer products."""
    d = len(total)
    square = np.zeros((d, d))
    square[np.triu_indices(d)] = pairs
    square += np.triu(square, 1).T
    mean = total / n
    return Moments(mean, square / n - np.outer(mean, mean))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared 2-Wasserstein distance of two normal distributions (Dowson & Landau 1982; Heusel et al. 2017).

    |mean_a - mean_b|² + tr(A + B - 2 (A^½ B A^½)^½), by eigenvalues: the covariances may be singular.
    """
    root = _root(a.covariance)
    inner = root @ b.covariance @ root
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    shift = np.square(a.mean - b.mean).sum()
    return max(float(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap), 0.0)


def scaled_distance(real: Moments, made: Moments) -> float:
    """The distance where the real features have the total variance ``TOTAL_VARIANCE``; NaN where they have none."""
    variance = float(np.trace(real.covariance))
    return TOTAL_VARIANCE * frechet_distance(real, made) / variance if variance > 0 else math.nan


def estimate(real: Moments, n: int, made: Moments, m: int) -> Estimate:
    """The scaled distance with a 95 % interval by a parametric bootstrap.

    Both sets of moments are drawn anew, from normal features of ``n`` real and ``m`` made images, as the distance
    itself takes them: no single image's features are needed. The standard deviation of the draws gives the interval.
    The distance is too large at finite n (Chong & Forsyth 2020); by how much the draws show, and the lower end allows
    for it.
    """
    value = scaled_distance(real, made)
    if n < 2 or math.isnan(value):
        return NOTHING
    generator = np.random.default_rng(0)
    roots = _factor(real.covariance), _factor(made.covariance)
    draws = [
        scaled_distance(_redraw(real.mean, roots[0], n, generator), _redraw(made.mean, roots[1], m, generator))
        for _ in range(_DRAWS)
    ]
    half = Z * float(np.std(draws, ddof=1))
    excess = max(float(np.mean(draws)) - value, 0.0)
    return Estimate(value, max(value - excess - half, 0.0), value + half, n)


def _eigen(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(covariance)
    return np.sqrt(np.clip(values, 0, None)), vectors


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance."""
    scale, vectors = _eigen(covariance)
    root: np.ndarray = (vectors * scale) @ vectors.T
    return root


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A matrix F with F F' the covariance."""
    scale, vectors = _eigen(covariance)
    factor: np.ndarray = vectors * scale
    return factor


def _redraw(mean: np.ndarray, factor: np.ndarray, n: int, generator: np.random.Generator) -> Moments:
    """Moments of ``n`` draws from the normal distribution with this mean and this factor of the covariance.

    By Bartlett's decomposition (Anderson 2003, section 7.2), so at no more cost for many images than for few: scatter
    about the mean is F L L' F' with L lower triangular, normal below the diagonal, chi on it.
    """
    d, degrees = len(mean), n - 1
    lower = np.tril(generator.standard_normal((d, min(d, degrees))), -1)
    index = np.arange(lower.shape[1])
    lower[index, index] = np.sqrt(generator.chisquare(degrees - index))
    spread = factor @ lower
    shift = factor @ generator.standard_normal(d) / math.sqrt(n)
    return Moments(mean + shift, spread @ spread.T / n)
