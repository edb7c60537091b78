"""The rule by which a site turns dark-on-bright pictures round: against scipy, and blind to what it should not see."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from shared.imaging.harmonise import grey, harmonise, skewness
from shared.imaging.read import read_image


def spots(seed: int, share: float = 0.2) -> np.ndarray:
    """A dark ground with some bright pixels."""
    generator = np.random.default_rng(seed)
    picture = generator.normal(0.2, 0.03, (30, 40)) + 0.5 * (generator.random((30, 40)) < share)
    return picture.clip(0, 1).astype(np.float32)


@given(st.integers(0, 1000))
def test_skewness_is_that_of_scipy(seed: int) -> None:
    values = np.random.default_rng(seed).gamma(2, 1, 500).astype(np.float32)
    assert skewness(values) == pytest.approx(stats.skew(values.astype(np.float64)), rel=1e-6)


@given(st.integers(0, 1000), st.floats(0.02, 0.4))
def test_a_picture_and_its_negative_become_the_same(seed: int, share: float) -> None:
    picture = spots(seed, share)
    bright, dark = harmonise(picture, "polarity"), harmonise(1 - picture, "polarity")
    assert np.array_equal(bright, picture)
    assert dark == pytest.approx(picture, abs=1e-6)


@given(st.integers(0, 1000), st.floats(0.3, 1.0), st.floats(0.0, 0.1))
def test_scale_and_offset_of_the_grey_values_do_not_matter(seed: int, scale: float, offset: float) -> None:
    picture = (1 - spots(seed)) * scale * 0.9 + offset
    assert harmonise(picture, "polarity") == pytest.approx(1 - picture)


def test_colour_is_decided_by_its_grey_and_turned_whole() -> None:
    dark = spots(0)
    colour = np.stack([1 - dark, 1 - dark * 0.5, 1 - dark * 0.8], -1)  # stained: dark on bright
    turned = harmonise(colour, "polarity")
    assert turned == pytest.approx(1 - colour)
    assert stats.skew(grey(turned).ravel()) > 0
    assert harmonise(turned, "polarity") is turned


def test_nothing_is_done_without_a_rule_or_to_a_picture_of_one_grey_level() -> None:
    picture = 1 - spots(0)
    assert harmonise(picture, "none") is picture
    flat = np.full((5, 5), 0.7, np.float32)
    assert np.array_equal(harmonise(flat, "polarity"), flat)
    with pytest.raises(ValueError, match="sharpen"):
        harmonise(picture, "sharpen")


def test_on_real_nuclei_the_rule_finds_the_stained_ones(shared_data: Callable[[str], Path]) -> None:
    """Fluorescence stays, bright field is turned: measured on the training images of four acquisition groups."""
    folder = shared_data("nuclei_dsb2018")
    with (folder / "sites.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    for group, turned, most in (("lab_A", False, 40), ("lab_B", False, 40), ("lab_C", False, 40), ("lab_D", True, 80)):
        files = [folder / row["image"] for row in rows if row["site"].startswith(group)][:most]
        pictures = [read_image(file) for file in files]
        share = np.mean([harmonise(picture, "polarity") is not picture for picture in pictures])
        assert share > 0.97 if turned else share == 0, group
