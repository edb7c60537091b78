"""Stains: CIELAB against scikit-image; Reinhard and Macenko by what they promise, on pictures of known stains."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import color

from shared.imaging import stain
from shared.imaging.harmonise import harmonise
from shared.imaging.read import read_image
from shared.imaging.stain import AMOUNTS, LAB_MEAN, LAB_SD, LIGHT, STAINS, lab_of, macenko, reinhard, rgb_of, stains_of


def colours(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((20, 30, 3)).astype(np.float32)


def unit(columns: np.ndarray) -> np.ndarray:
    return columns / np.linalg.norm(columns, axis=0)


def amounts(seed: int, count: int = 3000) -> np.ndarray:
    """How much of two dyes lies at each pixel (2, n): a tenth is glass, of the rest a third each has only one."""
    generator = np.random.default_rng(seed)
    both = generator.uniform(0.4, 1.2, (2, count))
    both[0, : count // 3] = 0
    both[1, count // 3 : 2 * count // 3] = 0
    both[:, ::10] = 0
    return both


def picture_of(stains: np.ndarray, dyes: np.ndarray) -> np.ndarray:
    """A picture by Beer and Lambert's law, (50, n / 50, 3)."""
    light = LIGHT * np.exp(-stains @ dyes)
    return light.T.reshape(50, -1, 3).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_lab_is_that_of_scikit_image_and_goes_back(seed: int) -> None:
    picture = colours(seed)
    assert lab_of(picture) == pytest.approx(color.rgb2lab(picture), abs=1e-3)
    assert rgb_of(lab_of(picture)) == pytest.approx(picture, abs=1e-6)
    assert rgb_of(lab_of(picture)) == pytest.approx(color.lab2rgb(color.rgb2lab(picture)), abs=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.3, 0.9))
def test_reinhard_gives_every_picture_the_same_colour_statistics(seed: int, contrast: float) -> None:
    found = color.rgb2lab(reinhard(0.3 + contrast * 0.4 * colours(seed)))
    assert found.mean((0, 1)) == pytest.approx(LAB_MEAN, abs=1.0)
    assert found.std((0, 1)) == pytest.approx(LAB_SD, rel=0.1)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_reinhard_twice_is_reinhard(seed: int) -> None:
    once = reinhard(0.3 + 0.4 * colours(seed))
    assert reinhard(once) == pytest.approx(once, abs=0.02)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.lists(st.floats(0.7, 1.3), min_size=3, max_size=3), st.floats(-10, 10))
def test_reinhard_undoes_gain_and_shift_of_lab(seed: int, gains: list[float], shift: float) -> None:
    lab = np.array([60.0, 8.0, -5.0]) + np.random.default_rng(seed).normal(size=(20, 30, 3)) * [6, 4, 3]
    other = (lab - 60) * gains + 60 + [shift, 0, -shift]
    other[..., 1:] = lab[..., 1:] * gains[1:]
    assert reinhard(rgb_of(other)) == pytest.approx(reinhard(rgb_of(lab)), abs=0.02)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_macenko_finds_the_stains_a_picture_was_made_with(seed: int) -> None:
    found = stains_of(stain.density(picture_of(unit(STAINS), amounts(seed))).reshape(-1, 3))
    assert found is not None
    assert np.degrees(np.arccos((found * unit(STAINS)).sum(0).clip(-1, 1))).max() < 3
    assert np.linalg.norm(found, axis=0) == pytest.approx([1, 1])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.6, 1.4), st.floats(0.6, 1.4))
def test_macenko_undoes_another_stain_of_another_strength(seed: int, first: float, second: float) -> None:
    """The published property: one slide, stained in two laboratories, looks the same afterwards."""
    other = unit(np.array([[0.60, 0.30], [0.65, 0.75], [0.45, 0.58]]))
    dyes = amounts(seed)
    one = picture_of(unit(STAINS), dyes)
    another = picture_of(other, dyes * [[first], [second]]) * np.float32([1.0, 0.95, 0.9])  # a yellower lamp
    here, there = macenko(one), macenko(another)
    assert np.abs(one - another).mean() > 0.02
    assert np.abs(here - there).mean() < 0.02


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_macenko_of_the_reference_is_the_reference(seed: int) -> None:
    dyes = amounts(seed)
    dyes *= (AMOUNTS / np.percentile(dyes, 99, axis=1))[:, None]
    picture = picture_of(STAINS, dyes)
    inside = picture.min(-1) > 2 / 255  # what is darker is cut off
    assert macenko(picture)[inside] == pytest.approx(picture[inside], abs=0.03)


def test_amounts_are_those_of_scikit_image_with_the_same_stains() -> None:
    """scikit-image separates by the same law, with a third stain and in its own units."""
    stains = unit(STAINS)
    third = np.cross(stains[:, 0], stains[:, 1])
    matrix = np.linalg.inv(np.stack([stains[:, 0], stains[:, 1], third / np.linalg.norm(third)]))
    dyes = amounts(1)
    picture = picture_of(stains, dyes)
    theirs = color.separate_stains(picture / LIGHT, matrix)[..., :2].reshape(-1, 2).T * -np.log(1e-6)
    ours = np.linalg.lstsq(stains, stain.density(picture).reshape(-1, 3).T, rcond=None)[0]
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours == pytest.approx(dyes, abs=1e-3)


@pytest.mark.parametrize("rule", [macenko, reinhard])
@pytest.mark.parametrize("value", [1.0, 0.5, 0.0])
def test_a_picture_of_one_colour_stays_as_it_is(rule: Callable[[np.ndarray], np.ndarray], value: float) -> None:
    picture = np.full((20, 20, 3), value, np.float32)
    assert rule(picture) is picture


def test_one_stain_alone_and_glass_with_a_speck_stay_as_they_are() -> None:
    generator = np.random.default_rng(0)
    dye = generator.uniform(0.4, 1.2, 3000) * (np.arange(3000) % 10 > 0)
    single = picture_of(unit(STAINS), np.stack([dye, np.zeros(3000)]))
    assert macenko(single) is single
    glass = np.full((50, 50, 3), 0.95, np.float32)
    glass[:3, :3] = 0.3
    assert macenko(glass) is glass
    grey = np.repeat(generator.random((30, 30, 1)), 3, -1).astype(np.float32)
    assert macenko(grey) is grey
    assert np.isfinite(reinhard(grey)).all()


@pytest.mark.parametrize(("rule", "share"), [("reinhard", 0.1), ("macenko", 0.9)])
def test_on_real_smears_the_sites_come_nearer_to_each_other(
    rule: str, share: float, shared_data: Callable[[str], Path]
) -> None:
    """Blood smears of three laboratories: the distance of their mean colours in CIELAB."""
    folder = shared_data("bloodcell_det_multisite")
    means = defaultdict(list)
    for site in sorted(path for path in folder.iterdir() if path.is_dir()):
        names = [item["file_name"] for item in json.loads((site / "annotations.json").read_text())["images"]][:4]
        for changed in (False, True):
            looks = [harmonise(read_image(site / "images" / name), rule if changed else "none") for name in names]
            means[changed].append(np.mean([lab_of(look[::3, ::3]).mean((0, 1)) for look in looks], 0))

    def apart(places: list[np.ndarray]) -> float:
        return float(np.mean([np.linalg.norm(a - b) for a in places for b in places]))

    assert apart(means[True]) < share * apart(means[False])
