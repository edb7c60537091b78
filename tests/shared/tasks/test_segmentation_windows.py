"""Blending windows, held to MONAI's sliding_window_inference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.tasks.segmentation.windows import blended, starts


def theirs(image: Tensor, sides: tuple[int, ...], at_once: int, overlap: float, look: nn.Module) -> Tensor:
    from monai.inferers import sliding_window_inference

    found: Tensor = sliding_window_inference(
        image, sides, at_once, look, overlap=overlap, mode="gaussian", padding_mode="replicate"
    )
    return found


def network(axes: int) -> nn.Module:
    """Two outputs that depend on where in the window a pixel lies, as those of any network near its edge do."""
    torch.manual_seed(0)
    layer = nn.Conv2d if axes == 2 else nn.Conv3d
    return layer(1, 2, 5, padding=2).requires_grad_(False)


@settings(max_examples=60, deadline=None)
@given(
    axes=st.sampled_from([2, 3]),
    data=st.data(),
    at_once=st.integers(1, 5),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9]),
)
def test_it_is_monais(axes: int, data: st.DataObject, at_once: int, overlap: float) -> None:
    sides = tuple(data.draw(st.integers(2, 16)) for _ in range(axes))
    # Shorter than a window, too: replicating lengthens by any number of pixels.
    size = tuple(data.draw(st.integers(2, 40 if axes == 2 else 24)) for _ in range(axes))
    image = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(len(size) + sum(size)))
    look = network(axes)
    found = blended(image, sides, at_once, overlap, look)
    assert found.shape == (1, 2, *size)
    torch.testing.assert_close(found, theirs(image, sides, at_once, overlap, look), rtol=1e-4, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(side=st.integers(1, 50), more=st.integers(0, 200), overlap=st.floats(0, 0.95))
def test_windows_reach_both_ends_and_leave_no_gap(side: int, more: int, overlap: float) -> None:
    found = starts(side + more, side, overlap)
    assert found[0] == 0
    assert found[-1] == more
    assert all(0 < after - before <= side for before, after in itertools.pairwise(found))


def test_what_every_window_says_stays() -> None:
    image = torch.rand(1, 1, 33, 47)
    same = blended(image, (16, 16), 3, 0.25, lambda windows: windows)
    torch.testing.assert_close(same, image)


@pytest.mark.parametrize("overlap", [0.0, 0.25])
def test_half_precision_is_blended_in_float32(overlap: float) -> None:
    found = blended(torch.rand(1, 1, 20, 20), (16, 16), 2, overlap, lambda windows: windows.bfloat16())
    assert found.dtype == torch.float32
