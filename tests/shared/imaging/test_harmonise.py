"""The rules on grey values, against scipy, scikit-image and closed forms; stains are in test_stain.py."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from skimage import exposure

from shared.cases import SiteData
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import load_dataset, to_float
from shared.imaging.errors import UnreadableImage
from shared.imaging.harmonise import grey, harmonise, harmonise_volume, skewness
from shared.imaging.read import fit, read_image
from shared.imaging.scale import ends_of_histogram, measure, with_scale
from shared.rules import RULES, rules_of
from shared.samples import read_samples


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
    with pytest.raises(UserError, match="sharpen"):
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


# --- a scale for each image -------------------------------------------------------------------------------------------

STANDARD = "0.02 0.1 0.16 0.22 0.3 0.38 0.46 0.55 0.65 0.8 0.95"
SCALES = ("zscore", "percentiles")


def tissue(seed: int) -> np.ndarray:
    """Smooth grey values without ties, from 0.1 to 0.9."""
    values = np.random.default_rng(seed).beta(2, 4, (40, 50))
    return (0.1 + 0.8 * values).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_zscore_is_that_of_scipy_written_about_one_half(seed: int) -> None:
    picture = tissue(seed)
    expected = 0.5 + stats.zscore(picture.astype(np.float64), axis=None) / 8
    assert harmonise(picture, "zscore") == pytest.approx(expected.clip(0, 1), abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_percentiles_are_those_of_scikit_image(seed: int) -> None:
    picture = tissue(seed)
    ends = tuple(np.percentile(picture, (0.5, 99.5)))
    expected = exposure.rescale_intensity(picture, in_range=ends, out_range=(0.0, 1.0))
    assert harmonise(picture, "percentiles") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rule", SCALES)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), scale=st.floats(0.2, 1.0), offset=st.floats(0.0, 0.09))
def test_gain_and_offset_of_the_machine_do_not_matter(rule: str, seed: int, scale: float, offset: float) -> None:
    picture = tissue(seed)
    assert harmonise(picture * np.float32(scale) + np.float32(offset), rule) == pytest.approx(
        harmonise(picture, rule), abs=2e-5
    )


@pytest.mark.parametrize("rule", [*SCALES, "nyul"])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000))
def test_a_rule_applied_twice_is_the_rule(rule: str, seed: int) -> None:
    standard = STANDARD if rule == "nyul" else ""
    once = harmonise(tissue(seed), rule, standard)
    # What was cut off once moves mean and tails a little: less than one grey level of 8 bits.
    assert harmonise(once, rule, standard) == pytest.approx(once, abs=1 / 255)
    assert once.dtype == np.float32
    assert 0 <= once.min() <= once.max() <= 1


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.3, 3.0))
def test_nyul_puts_the_landmarks_where_the_standard_has_them(seed: int, gamma: float) -> None:
    """What the method is for: after it, percentiles of tissue lie at the same grey value, whatever the curve."""
    found = harmonise(tissue(seed) ** np.float32(gamma), "nyul", STANDARD)
    marks = np.percentile(found, (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99))
    assert marks == pytest.approx([float(word) for word in STANDARD.split()], abs=2e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.3, 3.0))
def test_nyul_comes_near_a_full_matching_of_histograms(seed: int, gamma: float) -> None:
    """Against scikit-image, which matches every grey value and not eleven."""
    target = tissue(seed + 5000)
    marks = np.percentile(target, (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99))
    found = harmonise(tissue(seed) ** np.float32(gamma), "nyul", " ".join(map(str, marks)))
    expected = exposure.match_histograms(tissue(seed) ** np.float32(gamma), target)
    assert np.abs(found - expected).mean() < 0.01


def test_black_is_no_tissue_to_nyul_and_stays_black() -> None:
    picture = tissue(1)
    bars = np.pad(picture, ((0, 0), (30, 30)))
    found = harmonise(bars, "nyul", STANDARD)
    assert found[:, 30:-30] == pytest.approx(harmonise(picture, "nyul", STANDARD), abs=1e-6)
    assert not found[:, :30].any()
    assert not harmonise(np.zeros((4, 4), np.float32), "nyul", STANDARD).any()


def test_nyul_of_a_picture_of_much_of_one_grey_grows_and_stays_within() -> None:
    picture = tissue(2)
    picture[:, :30] = picture.min()  # a flat ground: most landmarks fall together
    found = harmonise(picture, "nyul", STANDARD)
    order = np.argsort(picture, axis=None)
    assert (np.diff(found.ravel()[order]) >= 0).all()
    assert found.min() == pytest.approx(0.02)
    assert harmonise(found, "nyul", STANDARD) == pytest.approx(found, abs=1e-3)


@pytest.mark.parametrize("rules", ["zscore", "percentiles", "polarity,zscore", "nyul"])
def test_a_picture_of_one_grey_is_middle_grey(rules: str) -> None:
    flat = np.full((5, 5), 0.7, np.float32)
    found = harmonise(flat, rules, STANDARD if rules == "nyul" else "")
    assert np.array_equal(found, np.full((5, 5), 0.5, np.float32))


def test_objects_of_very_few_pixels_are_not_cut_off() -> None:
    picture = np.full((100, 100), 0.2, np.float32)
    picture[3, 3] = 0.6
    found = harmonise(picture, "percentiles")
    assert (found.min(), found.max()) == (0, 1)


def test_rules_are_applied_in_their_order() -> None:
    picture = 1 - spots(3)
    assert np.array_equal(harmonise(picture, "polarity, zscore"), harmonise(harmonise(picture, "polarity"), "zscore"))
    assert harmonise(picture, "polarity,zscore").mean() == pytest.approx(0.5, abs=1e-3)


def test_colours_are_scaled_as_their_grey_is() -> None:
    picture = np.stack([tissue(1) * 0.9, tissue(1) * 0.8, tissue(1) * 0.7], -1)
    found = harmonise(picture, "zscore")
    values = grey(picture)
    assert found == pytest.approx((0.5 + (picture - values.mean()) / values.std() / 8).clip(0, 1), abs=1e-5)


def test_a_volume_has_one_rule_for_all_slices() -> None:
    volume = np.random.default_rng(0).beta(2, 4, (5, 12, 3)).astype(np.float32)
    volume[2] *= 0.5  # stays darker than the others
    expected = 0.5 + stats.zscore(volume.astype(np.float64), axis=None) / 8
    assert harmonise_volume(volume, "zscore") == pytest.approx(expected.clip(0, 1), abs=1e-6)


# --- a scale for each site --------------------------------------------------------------------------------------------


def site_of(folder: Path, gain: float, images: int = 20) -> SiteData:
    folder.mkdir()
    rows = ["path,label,patient,split"]
    for number in range(images):
        picture = (tissue(number) * (0.5 + number / images / 2) * gain * 255).round().astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{('a', 'b')[number % 2]},p{number},{'test' if number % 5 == 4 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return SiteData(folder.name, folder)


def job_of(rules: str, **changes: object) -> Job:
    return job_from_flat({"data.classes": "a,b", "data.size": 40, "data.harmonise": rules}).replace(**changes)  # type: ignore[arg-type]


def training_values(site: SiteData) -> np.ndarray:
    files = [site.root / f"{number}.png" for number in range(20) if number % 5 != 4]
    return np.concatenate([(np.asarray(Image.open(file)) / 255).ravel() for file in files])


@pytest.mark.parametrize("rule", ["site-zscore", "site-percentiles"])
def test_the_scale_of_a_site_is_that_of_its_training_images(rule: str, tmp_path: Path) -> None:
    site, job = site_of(tmp_path / "a", 1.0), job_of(rule)
    values = training_values(site)
    ends = (
        np.percentile(values, (0.5, 99.5))
        if rule == "site-percentiles"
        else values.mean() + values.std() * np.array([-4, 4])
    )
    assert measure(read_samples(site, job), site, job) == pytest.approx(tuple(ends), abs=0.004)


@pytest.mark.parametrize("rule", ["site-zscore", "site-percentiles"])
def test_two_sites_of_other_gain_look_alike_and_their_images_keep_their_order(rule: str, tmp_path: Path) -> None:
    job = job_of(rule)
    means = {}
    for name, gain in (("a", 1.0), ("b", 0.6)):
        site = site_of(tmp_path / name, gain)
        data = load_dataset(read_samples(site, job), site, job)
        by_name = {sample.path: k for k, sample in enumerate(data.samples)}
        means[name] = [float(to_float(data.columns["image"][by_name[f"{k}.png"]]).mean()) for k in range(20)]
    assert means["a"] == pytest.approx(means["b"], abs=0.01)
    assert np.corrcoef(means["a"], np.arange(20))[0, 1] > 0.9  # a scale for each image would have made them equal


def test_the_scale_is_measured_after_the_rules_before_it(tmp_path: Path) -> None:
    site = site_of(tmp_path / "a", 1.0)
    plain, turned = job_of("site-percentiles"), job_of("polarity,site-percentiles")
    for file in site.root.glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    low, high = measure(read_samples(site, plain), site, plain)
    assert measure(read_samples(site, turned), site, turned) == pytest.approx((1 - high, 1 - low), abs=0.004)


def test_the_scale_is_kept_and_changes_with_files_and_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, job = site_of(tmp_path / "a", 1.0), job_of("site-zscore")
    samples = read_samples(site, job)
    first = with_scale(samples, site, job)
    assert first == with_scale(samples, site, job)
    monkeypatch.setattr("shared.imaging.scale.measure", lambda *_: (_ for _ in ()).throw(AssertionError("measured")))
    assert with_scale(samples, site, job) == first
    with pytest.raises(AssertionError, match="measured"):
        with_scale(samples, site, job.replace(data__harmonise="polarity,site-zscore"))
    Image.fromarray(np.full((9, 9), 40, np.uint8)).save(site.root / "0.png")
    with pytest.raises(AssertionError, match="measured"):
        with_scale(samples, site, job)


def test_images_are_decoded_anew_under_another_scale(tmp_path: Path) -> None:
    """A scale may change though no image of the cache did: training images may come and go."""
    site, job = site_of(tmp_path / "a", 1.0), job_of("site-zscore")
    tested = [sample for sample in read_samples(site, job) if sample.split == "test"]
    scaled = [
        load_dataset(tested, dataclasses.replace(site, scale=ends), job).columns["image"][0].copy()
        for ends in ((0.0, 1.0), (0.0, 0.5))
    ]
    assert scaled[1].mean() > 1.3 * scaled[0].mean()


def test_without_a_training_image_there_is_no_scale_and_one_line(tmp_path: Path) -> None:
    site, job = site_of(tmp_path / "a", 1.0), job_of("site-zscore")
    tested = [sample for sample in read_samples(site, job) if sample.split == "test"]
    with pytest.raises(SiteRefusal, match="from its training images") as refusal:
        load_dataset(tested, site, job)
    assert refusal.value.code == "no-training-images"
    with pytest.raises(ValueError, match="scale"):
        harmonise(tissue(0), "site-zscore")


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 255), min_size=5, max_size=50))
def test_ends_of_a_histogram_are_those_of_its_values(levels: list[int]) -> None:
    values = np.array(levels) / 255
    histogram = np.bincount(np.rint(values * 65535).astype(np.int64), minlength=65536)
    low, high = ends_of_histogram(histogram, "site-zscore")
    assert ((low + high) / 2, high - low) == (
        pytest.approx(values.mean(), abs=1e-6),
        pytest.approx(8 * values.std(), abs=1e-6),
    )
    low, high = ends_of_histogram(histogram, "site-percentiles")
    expected = np.percentile(values, (0.5, 99.5), method="inverted_cdf")
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-4)


# --- what a job may ask -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"data.harmonise": "polarty"}, "did you mean 'polarity'"),
        ({"data.harmonise": "none,zscore"}, "none stands alone"),
        ({"data.harmonise": "zscore,zscore"}, "twice"),
        ({"data.harmonise": ""}, "must be none, or one or more of"),
        ({"data.harmonise": "site-zscore,site-percentiles"}, "one scale"),
        ({"data.harmonise": "nyul"}, "set data.landmarks"),
        ({"data.harmonise": "nyul", "data.landmarks": "0.1 0.2"}, "11 growing numbers"),
        ({"data.harmonise": "nyul", "data.landmarks": "0 " + STANDARD[5:]}, "11 growing numbers"),
        ({"data.landmarks": STANDARD}, "take it out"),
        ({"data.harmonise": "macenko"}, "set data.channels = 3"),
        ({"data.harmonise": "reinhard"}, "set data.channels = 3"),
        ({"data.harmonise": "site-zscore", "data.modalities": "pa,lateral"}, "write 'zscore'"),
        ({"task": "sequence", "model.name": "cnn_gru", "data.harmonise": "zscore"}, "films"),
        ({"task": "sequence", "model.name": "cnn_gru", "data.spacing": 1.0}, "set it to 0"),
        ({"task": "detection", "data.classes": "a", "data.spacing": 1.0}, "set it to 0"),
    ],
)
def test_rules_that_do_not_go_are_refused_in_one_line(flat: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as error:
        job_from_flat(flat)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_every_rule_is_applied_and_described(root: Path) -> None:
    text = (root / "docs" / "harmonisation.md").read_text()
    for rule in RULES:
        assert f"`{rule}`" in text
        harmonise(np.full((4, 4, 3), 0.5, np.float32), rule, STANDARD, (0.0, 1.0))
    assert rules_of("none") == ()


def test_a_grey_picture_under_a_stain_rule_cannot_be_read() -> None:
    with pytest.raises(UnreadableImage) as error:
        harmonise(tissue(0), "macenko")
    assert error.value.code == "no-colour"


def test_without_a_rule_an_image_is_only_fitted(tmp_path: Path) -> None:
    site, job = site_of(tmp_path / "a", 1.0), job_of("none")
    data = load_dataset(read_samples(site, job), site, job)
    first = data.samples[0].path
    expected = fit(np.asarray(Image.open(site.root / first), np.float32) / 255, 40, 40, 1)
    assert to_float(data.columns["image"][0]).numpy() == pytest.approx(expected, abs=1e-5)
