"""Random changes stay within what the job allows; normalisation is what it says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass
from scipy.stats import binom
from torch import Tensor
from torchvision.transforms import Normalize

from shared.config import Job, job_from_flat
from shared.imaging.augment import augmentation, normalise


def job_of(channels: int = 1, **augment: Any) -> Job:
    return job_from_flat({"data.channels": channels} | {f"augment.{key}": value for key, value in augment.items()})


def noise(n: int, channels: int = 1, size: int = 16) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def changed(images: Tensor, job: Job, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return augmentation(job)(images)


def test_without_augmentation_images_stay_and_no_random_number_is_drawn() -> None:
    images = noise(3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(augmentation(job_of())(images), images)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("flip", "axes"), [("horizontal", [(), (-1,)]), ("vertical", [(), (-2,)]), ("both", [(), (-1,), (-2,), (-2, -1)])]
)
def test_each_image_is_mirrored_on_its_own_about_equally_often(flip: str, axes: list[tuple[int, ...]]) -> None:
    images = noise(400, size=4)
    seen = dict.fromkeys(axes, 0)
    for image, found in zip(images, changed(images, job_of(flip=flip)), strict=True):
        for axis in axes:
            seen[axis] += torch.equal(image.flip(axis) if axis else image, found)
    assert sum(seen.values()) == 400
    low, high = binom.interval(1 - 1e-6, 400, 1 / len(axes))
    assert all(low <= number <= high for number in seen.values())


def test_a_shift_moves_the_picture_by_whole_pixels_up_to_its_share_and_fills_with_black() -> None:
    images = noise(60) + 0.1
    moves = set()
    for image, found in zip(images, changed(images, job_of(shift=0.25)), strict=True):
        padded = np.pad(image[0].numpy(), 4)
        matches = [
            (dx, dy)
            for dx in range(-4, 5)
            for dy in range(-4, 5)
            if np.allclose(padded[4 - dy : 20 - dy, 4 - dx : 20 - dx], found[0].numpy(), atol=1e-4)
        ]
        assert len(matches) == 1
        moves.add(matches[0])
    assert len(moves) > 30
    assert max(abs(step) for move in moves for step in move) >= 3


def blob(n: int, size: int = 65) -> Tensor:
    """A soft spot 16 pixels to the right of the centre."""
    axis = torch.arange(size) - size // 2
    spot = torch.exp(-((axis[None] - 16) ** 2 + axis[:, None] ** 2) / 18)
    return spot.expand(n, 1, size, size).clone()


def places(images: Tensor) -> np.ndarray:
    """Radius and angle in degrees of each spot about the centre."""
    centre = images.shape[-1] // 2
    found = [center_of_mass(image[0].numpy()) for image in images]
    offsets = [(y - centre, x - centre) for y, x in found]
    return np.array([(math.hypot(x, y), math.degrees(math.atan2(y, x))) for y, x in offsets])


def test_a_rotation_turns_about_the_centre_up_to_its_degrees_either_way() -> None:
    radius, angle = places(changed(blob(200), job_of(rotate=30.0))).T
    assert np.abs(radius - 16).max() < 0.2
    assert np.abs(angle).max() < 30.5
    assert angle.max() > 27
    assert angle.min() < -27
    assert abs(angle.mean()) < 6


def test_a_zoom_scales_about_the_centre_up_to_its_share_either_way() -> None:
    radius, angle = places(changed(blob(200), job_of(zoom=0.25))).T
    assert np.abs(angle).max() < 0.5
    assert radius.min() > 16 * 0.74
    assert radius.max() < 16 * 1.26
    assert radius.min() < 16 * 0.8
    assert radius.max() > 16 * 1.2


def test_intensity_changes_brightness_and_contrast_and_nothing_else() -> None:
    images = noise(100) * 0.2 + 0.4  # far from the ends, so that nothing is clipped
    slopes = []
    for image, found in zip(images, changed(images, job_of(intensity=0.3)), strict=True):
        x, y = image.flatten().numpy(), found.flatten().numpy()
        slope, offset = np.polyfit(x, y, 1)
        assert np.allclose(slope * x + offset, y, atol=1e-5)
        brightness = y.mean() / x.mean()  # contrast keeps the mean
        assert 0.7 - 1e-3 <= brightness <= 1.3 + 1e-3
        assert 0.7 - 1e-3 <= slope / brightness <= 1.3 + 1e-3
        slopes.append(slope)
    assert np.std(slopes) > 0.1


def test_intensity_keeps_the_range_from_0_to_1() -> None:
    found = changed(noise(50), job_of(intensity=0.9))
    assert found.min() >= 0
    assert found.max() <= 1


def test_colour_leaves_grey_pixels_grey_and_changes_coloured_ones() -> None:
    job = job_of(channels=3, colour=0.5)
    grey = noise(10).expand(-1, 3, -1, -1)
    assert torch.allclose(changed(grey, job), grey, atol=2e-3)
    coloured = noise(10, 3)
    found = changed(coloured, job)
    assert all((one - other).abs().max() > 0.01 for one, other in zip(coloured, found, strict=True))


def test_colour_does_nothing_to_grey_images() -> None:
    assert torch.equal(changed(noise(4), job_of(colour=0.9)), noise(4))


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_at_once_repeats_with_its_seed_and_keeps_shape_and_range(channels: int) -> None:
    more = {"flip": "both", "rotate": 20.0, "shift": 0.1, "zoom": 0.2, "intensity": 0.2, "colour": 0.2}
    job, images = job_of(channels, **more), noise(6, channels)
    kept = images.clone()
    found = changed(images, job, seed=3)
    assert torch.equal(changed(images, job, seed=3), found)
    assert not torch.equal(changed(images, job, seed=4), found)
    assert torch.equal(images, kept)
    assert found.shape == images.shape
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1
    same = changed(images[:1].expand(6, -1, -1, -1), job)
    assert len({tuple(image.flatten().tolist()) for image in same}) == 6


# --- normalise --------------------------------------------------------------------------------------------------------


def with_rule(rule: str, channels: int = 1) -> Job:
    return job_from_flat({"data.normalise": rule, "data.channels": channels})


def test_fixed_takes_0_to_minus_2_and_1_to_2() -> None:
    images = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(1, 1, 2, 2)
    assert normalise(images, with_rule("fixed")).flatten().tolist() == [-2.0, -1.0, 0.0, 2.0]


@pytest.mark.parametrize("channels", [1, 3])
def test_image_takes_each_image_to_mean_0_and_sd_1_on_its_own(channels: int) -> None:
    images = noise(5, channels) * torch.tensor([1, 0.5, 0.2, 1, 0.1]).view(5, 1, 1, 1) + 0.05
    found = normalise(images, with_rule("image", channels)).double()
    for number, image in enumerate(found):
        assert image.mean().item() == pytest.approx(0, abs=1e-4)
        sd = np.std(images[number].numpy().astype(float), ddof=1)
        assert image.std().item() == pytest.approx(sd / (sd + 1e-3), rel=1e-3)
        assert torch.allclose(
            normalise(images[number][None], with_rule("image", channels))[0].double(), image, atol=1e-5
        )
    assert torch.equal(normalise(torch.ones(1, 1, 4, 4) * 0.5, with_rule("image")), torch.zeros(1, 1, 4, 4))


def test_imagenet_is_torchvisions_normalisation_and_its_mean_for_grey() -> None:
    mean, sd = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = noise(3, 3)
    assert torch.allclose(normalise(images, with_rule("imagenet", 3)), Normalize(mean, sd)(images), atol=1e-6)
    grey = noise(3)
    expected = (grey - sum(mean) / 3) / (sum(sd) / 3)
    assert torch.allclose(normalise(grey, with_rule("imagenet")), expected, atol=1e-5)
