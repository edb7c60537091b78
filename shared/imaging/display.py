"""From stored values to a picture as a radiologist sees it.

Order of steps (PS3.3 C.11, PS3.4 N.2): Modality LUT or rescale, VOI LUT or window, inversion. Added to what pydicom
does: a missing slope, an output in [0, 1], inversion, padding, functional groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shared.imaging.errors import UnreadableImage
from shared.imaging.stored import Opened

Array = npt.NDArray[Any]
Picture = npt.NDArray[np.float32]

_PADDING_PREFIX = {"PixelData": "", "FloatPixelData": "Float", "DoubleFloatPixelData": "DoubleFloat"}


def display(stored: Array, photometric: str, opened: Opened, index: int) -> Picture:
    """Stored values (H, W) or (H, W, 3) of frame ``index`` as float32 in [0, 1], (H, W) or (H, W, 3); 0 is black."""
    if stored.ndim == 3:
        return _colour(stored, photometric, opened)
    if photometric == "PALETTE COLOR":
        return _palette(stored, opened)
    return _grey(stored, photometric, opened, index)


def min_max(values: Array, valid: Array | None = None) -> Picture:
    """Stretch the least to the largest of `values` (where finite and `valid`) to [0, 1]; all 0 if they are equal."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    inside = values[finite if valid is None else finite & valid]
    if inside.size == 0 or inside.min() == inside.max():
        return np.zeros(values.shape, np.float32)
    # Halved, because the difference of two doubles near the ends of their range overflows.
    low, high = inside.min() / 2, inside.max() / 2
    return _unit(np.where(finite, (values / 2 - low) / (high - low), 0.0))


def _unit(values: Array) -> Picture:
    picture: Picture = np.clip(np.nan_to_num(values), 0.0, 1.0).astype(np.float32)
    return picture


def _colour(stored: Array, photometric: str, opened: Opened) -> Picture:
    if stored.shape[-1] != 3 or photometric.startswith("YBR_PARTIAL"):
        raise UnreadableImage("unsupported-format", f"{photometric} with {stored.shape[-1]} samples")
    full = 2.0 ** int(opened.options["bits_stored"]) - 1
    if stored.max() > full:
        full = 2.0 ** (stored.dtype.itemsize * 8) - 1
    values = stored.astype(np.float64)
    if photometric in ("YBR_FULL", "YBR_FULL_422"):
        values = _rgb(values, (full + 1) / 2)
    return _unit(values / full)


def _rgb(ybr: Array, middle: float) -> Array:
    """YBR_FULL to RGB, the inverse of the equations of PS3.3 C.7.6.3.1.2."""
    y, cb, cr = ybr[..., 0], ybr[..., 1] - middle, ybr[..., 2] - middle
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)


def _palette(stored: Array, opened: Opened) -> Picture:
    """PALETTE COLOR through its three tables, PS3.3 C.7.6.3.1.5 and (segmented) C.7.9.2."""
    header = opened.header
    entries, first, bits = (int(v) for v in header.RedPaletteColorLookupTableDescriptor)
    entries = entries or 2**16
    first = _signed_first(first, opened.options.get("pixel_representation") == 1)
    if "RedPaletteColorLookupTableData" in header:
        little = bool(opened.syntax.is_little_endian)
        data = [header[f"{c}PaletteColorLookupTableData"].value for c in ("Red", "Green", "Blue")]
        table = np.stack([_table(d, entries, bits, little)[:entries] for d in data], axis=-1)
    else:
        from pydicom.pixels.processing import apply_color_lut

        table = apply_color_lut(np.arange(first, first + entries), header)[:, :3]
    # By their values, not by the descriptor: tables of 8 bits come in 16, in the low byte or in the high one.
    full = 255.0 if table.max() <= 255 else 65535.0
    return _unit(table[np.clip(stored.astype(np.int64) - first, 0, len(table) - 1)] / full)


def quantities(stored: Array, opened: Opened, index: int) -> tuple[Array, Array]:
    """Stored values (H, W) of frame ``index`` as what they measure (CT: HU), float64, and a mask of what is padding."""
    padded = _padding(stored, opened)
    values = _modality(stored.astype(np.float64), opened, index)
    padded |= ~np.isfinite(values)
    return np.nan_to_num(values), padded


def _grey(stored: Array, photometric: str, opened: Opened, index: int) -> Picture:
    header = opened.header
    values, padded = quantities(stored, opened, index)
    grey = _voi(values, opened, index)
    if grey is None:
        one_bit = opened.options.get("bits_stored") == 1
        grey = _unit(values) if one_bit else min_max(values, ~padded)
    # Either says it: conformant images that have both (PS3.3 C.8.11.3.1.2) say the same thing twice.
    if photometric == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        np.subtract(1, grey, out=grey)
    grey[padded] = 0
    return grey


def _padding(stored: Array, opened: Opened) -> Array:
    """Mask of the padding, (H, W) bool: PixelPaddingValue to PixelPaddingRangeLimit, in stored values."""
    name = _PADDING_PREFIX[opened.options["pixel_keyword"]] + "PixelPadding"
    value, limit = (_number(opened.header.get(name + end)) for end in ("Value", "RangeLimit"))
    if value is None:
        return np.zeros(stored.shape, bool)
    ends = [value, value if limit is None else limit]
    if stored.dtype.kind in "iu":
        # The VR (US or SS) is often wrong for the signedness of the pixels: -2000 comes as 63536.
        span = 2 ** int(opened.options["bits_allocated"])
        low = int(np.iinfo(stored.dtype).min)
        ends = [(end - low) % span + low for end in ends]
    result: Array = (stored >= min(ends)) & (stored <= max(ends))
    return result


def functional_group(opened: Opened, index: int, macro: str) -> Any:
    """The item of a functional group macro for this frame, else shared by all (PS3.3 C.7.6.16), else the header."""
    for sequence, number in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = opened.header.get(sequence)
        if groups and number < len(groups) and groups[number].get(macro):
            return groups[number].get(macro)[0]
    return opened.header


def _modality(values: Array, opened: Opened, index: int) -> Array:
    """Modality LUT or rescale, PS3.3 C.11.1. A slope left out counts as 1 (pydicom would skip the intercept too)."""
    if opened.header.get("ModalityLUTSequence"):
        signed = opened.options.get("pixel_representation") == 1
        return _through(values, opened.header.ModalityLUTSequence[0], opened, signed)[0]
    group = functional_group(opened, index, "PixelValueTransformationSequence")
    slope, intercept = _number(group.get("RescaleSlope")), _number(group.get("RescaleIntercept"))
    # A slope of 0 would erase the picture: GDCM reads it as 1 too.
    return values * (slope or 1.0) + (intercept or 0.0)


def _voi(values: Array, opened: Opened, index: int) -> Picture | None:
    """First VOI LUT, else first window, as [0, 1]; None where the file names neither (PS3.3 C.11.2)."""
    group = functional_group(opened, index, "FrameVOILUTSequence")
    if group.get("VOILUTSequence"):
        grey, full = _through(np.rint(values), group.VOILUTSequence[0], opened, bool(values.min() < 0))
        return _unit(grey / full)
    try:
        centre, width = _number(group.get("WindowCenter")), _number(group.get("WindowWidth"))
    except ValueError:
        return None  # a window that is no number is no window
    if centre is None or width is None or width <= 0:
        return None
    return _window(values, centre, width, str(group.get("VOILUTFunction") or "LINEAR").upper())


def _window(values: Array, centre: float, width: float, function: str) -> Picture:
    """Window to [0, 1] by LINEAR (PS3.3 C.11.2.1.2.1), SIGMOID (C.11.2.1.3.1) or LINEAR_EXACT (C.11.2.1.3.2).

    A LINEAR width below 1 is not allowed by the standard, yet written for values that are fractions: it is taken as
    LINEAR_EXACT, which is what is meant and is defined there. An unknown function counts as LINEAR.
    """
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return _unit(1 / (1 + np.exp(-4 * (values - centre) / width)))
    if function != "LINEAR_EXACT" and width >= 1:
        centre, width = centre - 0.5, width - 1
    if width == 0:
        return (values > centre).astype(np.float32)
    return _unit((values - centre) / width + 0.5)


def _through(values: Array, item: Any, opened: Opened, signed: bool) -> tuple[Array, float]:
    """Values through the table of a LUT item (PS3.3 C.11.1.1.1, C.11.2.1.1), and the largest the table can hold."""
    entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries = entries or 2**16
    table = _table(item["LUTData"].value, entries, bits, bool(opened.syntax.is_little_endian))
    first = _signed_first(first, signed)
    places = np.clip(values - first, 0, min(entries, len(table)) - 1).astype(np.int64)
    return table[places].astype(np.float64), max(2.0**bits - 1, float(table.max()))


def _signed_first(first: int, signed: bool) -> int:
    """The first value mapped; its VR (US or SS) is often wrong, so that -1024 comes as 64512."""
    return first - 2**16 if signed and first >= 2**15 else first


def _table(data: Any, entries: int, bits: int, little: bool) -> Array:
    """LUT data as integers: bytes of 16 bits, bytes of 8 bits padded to pairs, or numbers pydicom has parsed."""
    if not isinstance(data, bytes):
        numbers = np.atleast_1d(np.asarray(data)).astype("<u2")
        if bits > 8 or len(numbers) >= entries:
            return numbers
        data, little = numbers.tobytes(), True  # two entries of 8 bits in each number
    words = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if little else ">u2")
    if len(words) >= entries:
        return words
    return words.astype("<u2").view(np.uint8)  # swapped by the pair where the file is big endian


def _number(value: Any) -> float | None:
    """First value of a header element as a float; None where absent or empty; ValueError where not a finite number."""
    if value is not None and not isinstance(value, str | int | float) and hasattr(value, "__getitem__"):
        value = value[0] if len(value) else None
    if value is None or value == "":
        return None
    number = float(value)
    if not np.isfinite(number):
        raise ValueError("not a finite number")
    return number
