"""Reconstruction metrics against scikit-image, scikit-learn and slow versions of the formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset, to_uint16
from shared.tasks import Sums, add_sums
from shared.tasks.reconstruction import collect, consistent, summarise
from shared.tasks.reconstruction.metrics import BINS, LEAST, error_bins, psnr, squared_error, ssim

CPU = torch.device("cpu")


def pairs(n: int, channels: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth images and noisy versions of them, float64 in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 4, 4, generator=generator, dtype=torch.float64)
    images = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    strength = torch.linspace(0.01, 0.5, n, dtype=torch.float64).view(-1, 1, 1, 1)
    return images, (images + strength * noise).clamp(0, 1)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 11, 11), (1, 17, 40), (3, 32, 32)])
def test_ssim_and_psnr_are_those_of_scikit_image(channels: int, height: int, width: int) -> None:
    images, rebuilt = pairs(5, channels, height, width)
    found, decibels = ssim(images, rebuilt), psnr(squared_error(images, rebuilt))
    for k in range(5):
        a, b = (np.moveaxis(x[k].numpy(), 0, -1) for x in (images, rebuilt))
        expected = structural_similarity(
            a, b, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1
        )
        assert found[k].item() == pytest.approx(expected, abs=1e-9)
        assert decibels[k].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-9)


@pytest.mark.parametrize(("size", "side"), [(8, 7), (9, 9), (10, 9)])
def test_ssim_of_small_images_has_the_largest_odd_window_that_fits(size: int, side: int) -> None:
    """A slow version of the paper's formulas, window by window."""
    images, rebuilt = pairs(2, 1, size, size)
    offsets = np.arange(side) - side // 2
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    for k, found in enumerate(ssim(images, rebuilt)):
        values = []
        for top in range(size - side + 1):
            for left in range(size - side + 1):
                a, b = (x[k, 0, top : top + side, left : left + side].numpy() for x in (images, rebuilt))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                top_line = (2 * mean_a * mean_b + 0.01**2) * (2 * both + 0.03**2)
                values.append(top_line / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
        assert found.item() == pytest.approx(np.mean(values), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(8, 24))
def test_ssim_is_one_for_equal_images_symmetric_and_never_above_one(seed: int, size: int) -> None:
    images, rebuilt = pairs(2, 1, size, size, seed)
    assert torch.allclose(ssim(images, images), torch.ones(2, dtype=torch.float64))
    found = ssim(images, rebuilt)
    assert torch.allclose(found, ssim(rebuilt, images))
    assert (found.abs() <= 1 + 1e-12).all()


def test_psnr_of_equal_images_is_a_hundred_decibels() -> None:
    assert psnr(torch.tensor([0.0, 1.0, 0.01])).tolist() == pytest.approx([100.0, 0.0, 20.0])


@given(st.lists(st.floats(1e-12, 2), min_size=2, max_size=50))
def test_a_larger_error_never_falls_into_a_lower_bin(errors: list[float]) -> None:
    bins = error_bins(torch.tensor(sorted(errors), dtype=torch.float64))
    assert (bins.diff() >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < BINS


def test_errors_outside_the_limits_fall_into_an_end() -> None:
    assert error_bins(torch.tensor([0.0, LEAST, 1.0, 5.0, math.inf, math.nan])).tolist() == [0, 0, *[BINS - 1] * 4]


# --- from images to metrics -------------------------------------------------------------------------------------------


def job_of(**more: Any) -> Job:
    flat = {"task": "reconstruction", "data.classes": "spot,plain,stripes", "data.normal": "plain", "data.size": 16}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


class Blur(nn.Module):
    """Stands for an autoencoder whose reconstructions can be worked out: a mean of 3 x 3 pixels."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        padded = nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
        return nn.functional.avg_pool2d(padded, 3, 1), images.new_zeros(len(images))


def noise(job: Job, n: int, seed: int = 0) -> Dataset:
    """Images of noise whose strength depends, with overlap, on the class."""
    generator = np.random.default_rng(seed)
    samples, images = [], []
    for k in range(n):
        strength = generator.uniform(0.1, 0.4) + (0.1, 0.0, 0.2)[k % 3]
        images.append(to_uint16(generator.uniform(0, strength, (job.data.channels, 16, 16)) + 0.2))
        samples.append(Sample(f"{k}.png", (k % 3,), str(k), "test"))
    return Dataset.of(samples, image=images)


def by_hand(data: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes, mean squared errors and SSIM of ``Blur``, one image at a time, by scikit-image."""
    from scipy.ndimage import uniform_filter

    classes, errors, similar = [], [], []
    for k, sample in enumerate(data.samples):
        image = data.columns["image"][k].astype(np.float64) / 65535
        blurred = np.stack([uniform_filter(plane, 3, mode="nearest") for plane in image])
        errors.append(((image - blurred) ** 2).mean())
        similar.append(
            structural_similarity(
                image,
                blurred,
                data_range=1.0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                channel_axis=0,
            )
        )
        classes.append(sample.target[0])
    return np.array(classes), np.array(errors), np.array(similar)


@pytest.mark.parametrize(("normalise", "channels"), [("fixed", 1), ("image", 3), ("imagenet", 3), ("imagenet", 1)])
def test_figures_are_those_of_the_images_in_grey_values_whatever_the_normalisation(
    normalise: str, channels: int
) -> None:
    job = job_of(data__normalise=normalise, data__channels=channels, evaluation__batch_size=7)
    data = noise(job, 300)
    classes, errors, similar = by_hand(data)
    sums = collect(Blur(), data, job, CPU)
    found = summarise(sums, job)
    mine = errors[classes == 1]
    assert found["mse"].value == pytest.approx(mine.mean(), rel=1e-4)
    half = 1.96 * mine.std(ddof=1) / math.sqrt(100)
    assert found["mse"].high - found["mse"].low == pytest.approx(2 * half, rel=1e-3)
    assert found["psnr"].value == pytest.approx((-10 * np.log10(mine)).mean(), rel=1e-4)
    assert found["ssim"].value == pytest.approx(similar[classes == 1].mean(), rel=1e-4)
    assert found["ssim"].low < found["ssim"].value < found["ssim"].high
    assert {found[name].n for name in ("mse", "psnr", "ssim")} == {100}
    assert found["auroc"].value == pytest.approx(roc_auc_score(classes != 1, errors), abs=1e-3)
    assert found["auroc"].n == 300
    for k, name in ((0, "spot"), (2, "stripes")):
        chosen = classes != 2 - k
        assert found[f"auroc:{name}"].value == pytest.approx(
            roc_auc_score(classes[chosen] == k, errors[chosen]), abs=1e-3
        )


def test_sums_of_two_sites_are_those_of_all_images_together() -> None:
    job = job_of()
    first, second = noise(job, 31, seed=1), noise(job, 17, seed=2)
    both = Dataset.of(
        (*first.samples, *second.samples),
        image=[data.columns["image"][k] for data in (first, second) for k in range(len(data))],
    )
    added = add_sums([collect(Blur(), data, job, CPU) for data in (first, second)])
    pooled = collect(Blur(), both, job, CPU)
    assert added["errors"] == pooled["errors"]
    for key, value in pooled.items():
        assert added[key] == pytest.approx(value, rel=1e-12), key


def test_a_class_of_anomalies_alone_has_no_figure_of_its_own_and_no_anomaly_no_auroc() -> None:
    two = job_of(data__classes="plain,spot")
    samples = [Sample(str(k), (k % 2,), str(k), "test") for k in range(6)]
    images = noise(two, 6).columns["image"].take(range(6))
    assert set(summarise(collect(Blur(), Dataset.of(samples, image=images), two, CPU), two)) == {
        "mse",
        "psnr",
        "ssim",
        "auroc",
    }
    healthy = [Sample(str(k), (0,), str(k), "test") for k in range(6)]
    found = summarise(collect(Blur(), Dataset.of(healthy, image=images), two, CPU), two)
    assert found["auroc"].n == 0
    assert math.isnan(found["auroc"].value)
    assert found["mse"].n == 6
    ill = [Sample(str(k), (1,), str(k), "test") for k in range(6)]
    found = summarise(collect(Blur(), Dataset.of(ill, image=images), two, CPU), two)
    assert {estimate.n for estimate in found.values()} == {0}


def test_sums_that_contradict_each_other_are_told() -> None:
    job = job_of()
    good = collect(Blur(), noise(job, 12), job, CPU)
    assert consistent(good, job)

    def changed(**more: Any) -> Sums:
        return good | more

    moved = list(good["errors"])  # type: ignore[arg-type]
    moved[0] += 1
    wrong = [
        changed(n=13),
        changed(errors=moved),
        changed(mse=4.1),
        changed(mse_squares=float(good["mse"]) * 1.1),  # type: ignore[arg-type]
        changed(psnr=401.0),
        changed(dssim=4.1),
    ]
    assert not any(consistent(sums, job) for sums in wrong)
