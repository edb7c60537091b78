"""DICOM pictures as a radiologist sees them: one frame, decoded, through its Modality and VOI look-up tables.

Order of steps (PS3.3 C.11, PS3.4 N.2): stored values, Modality LUT or rescale, VOI LUT or window, inversion.
pydicom and numpy do the work; this module adds what pydicom leaves out or does differently per machine:
a missing slope, an output in [0, 1], inversion, padding, functional groups, the high bit, and DECODERS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import IO, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from shared.imaging.errors import MAX_PIXELS, UnreadableImage, call_apart, only_unreadable, require_bytes, silence

Array = npt.NDArray[Any]
Picture = npt.NDArray[np.float32]

_JPEG = ("pillow", "pylibjpeg")
_JPEG_LOSSLESS = ("gdcm", "pylibjpeg")
_JPEG_LS = ("pyjpegls", "pylibjpeg")
_JPEG_2000 = ("pylibjpeg", "pillow")
_SYNTAX = "1.2.840.10008.1.2."

#: pydicom plug-ins tried for each compressed transfer syntax, first to last, the same at every site: decoders of lossy
#: JPEG differ by one grey level. "pylibjpeg" under the JPEG and JPEG-LS syntaxes means pylibjpeg-libjpeg (GPL, the
#: user's own choice): it is last there, so that installing it changes no picture that the others can decode. GDCM
#: aborts or faults on damaged bytes (1 in 100 with a few bytes changed), so it serves only where no other free decoder
#: does.
DECODERS: Final[dict[str, tuple[str, ...]]] = {
    _SYNTAX + "4.50": _JPEG,
    _SYNTAX + "4.51": _JPEG,
    _SYNTAX + "4.57": _JPEG_LOSSLESS,
    _SYNTAX + "4.70": _JPEG_LOSSLESS,
    _SYNTAX + "4.80": _JPEG_LS,
    _SYNTAX + "4.81": _JPEG_LS,
    _SYNTAX + "4.90": _JPEG_2000,
    _SYNTAX + "4.91": _JPEG_2000,
    _SYNTAX + "4.201": ("pylibjpeg",),
    _SYNTAX + "4.202": ("pylibjpeg",),
    _SYNTAX + "4.203": ("pylibjpeg",),
    _SYNTAX + "5": ("pylibjpeg", "pydicom"),
}
_RLE = _SYNTAX + "5"
_JPEG_EXTENDED = _SYNTAX + "4.51"

_PIXEL_KEYWORDS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
_PADDING_PREFIX = {"PixelData": "", "FloatPixelData": "Float", "DoubleFloatPixelData": "DoubleFloat"}
_NO_LENGTH = 0xFFFFFFFF


@dataclass(frozen=True)
class _Opened:
    """A DICOM file read up to its pixels; `file` stands at byte `start`, the first of the pixel element's value."""

    header: Any
    file: IO[bytes]
    start: int
    end: int
    length: int
    options: dict[str, Any]

    @property
    def syntax(self) -> Any:
        return self.header.file_meta.TransferSyntaxUID

    @property
    def frames(self) -> int:
        return int(self.options["number_of_frames"])


@only_unreadable
def read_dicom(path: str | os.PathLike[str], frame: int | str = "middle") -> Picture:
    """Read one frame of a DICOM file as it is displayed.

    Args:
        path: a file with the DICM mark at byte 128 (PS3.10 7.1); others are not guessed at.
        frame: number from 0, or "middle" (frame count // 2). Only this frame is decoded.

    Returns:
        float32 (H, W) for grey or (H, W, 3) for colour, in [0, 1]; 0 is black. Grey goes through the first VOI LUT,
        else the first window, else from the least to the largest value of this frame without its padding (a constant
        frame is 0; one-bit masks stay 0 and 1). Padding (PS3.3 C.7.5.1.1.2) is black. Colour is scaled by bit depth.

    Raises:
        UnreadableImage: with any of CODES but "unsupported-format" for files that are not DICOM ("not-dicom").
    """
    require_bytes(path)
    with open(path, "rb") as file:
        opened = _open(file)
        index = frame_index(frame, opened.frames)
        stored, photometric = _decode(opened, index)
        if stored.ndim == 3:
            return _colour(stored, photometric, opened)
        if photometric == "PALETTE COLOR":
            return _palette(stored, opened)
        return _grey(stored, photometric, opened, index)


@only_unreadable
def dicom_frame_count(path: str | os.PathLike[str]) -> int:
    """Number of frames the header names, 1 if it names none. Raises UnreadableImage as read_dicom does."""
    require_bytes(path)
    with open(path, "rb") as file:
        return _open(file).frames


def frame_index(frame: int | str, frames: int) -> int:
    """The number, from 0, of the asked frame among `frames`; UnreadableImage("frame-out-of-range") if not there."""
    if isinstance(frame, str) and frame != "middle" and not frame.isdecimal():
        raise UnreadableImage("frame-out-of-range", f"frame {frame!r}")
    index = frames // 2 if frame == "middle" else int(frame)
    if not 0 <= index < frames:
        raise UnreadableImage("frame-out-of-range", f"frame {index} of {frames}")
    return index


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


# --- the file ---------------------------------------------------------------------------------------------------------


def _open(file: IO[bytes]) -> _Opened:
    from pydicom import dcmread
    from pydicom.pixels.utils import as_pixel_options

    silence("pydicom")
    if len(preamble := file.read(132)) < 132 or preamble[128:] != b"DICM":
        raise UnreadableImage("not-dicom")
    file.seek(0)
    header = dcmread(file, stop_before_pixels=True)
    syntax = header.file_meta.TransferSyntaxUID
    if not syntax.is_transfer_syntax:
        raise UnreadableImage("codec-missing", f"transfer syntax {syntax}")
    if syntax.is_deflated:
        # The header and the pixels are one compressed stream: there is no place in the file to read from.
        opened = _open_deflated(file)
    else:
        opened = _at_pixels(file, syntax.is_implicit_VR, syntax.is_little_endian)
    keyword, vr, source, start, length = opened
    options = {**as_pixel_options(header), "pixel_keyword": keyword, "pixel_vr": vr}
    if options.get("rows", 0) * options.get("columns", 0) * options.get("samples_per_pixel", 1) > MAX_PIXELS:
        raise UnreadableImage("too-large", f"{options.get('rows')} x {options.get('columns')}")
    end = source.seek(0, os.SEEK_END)
    source.seek(start)
    return _Opened(header, source, start, end, length, options)


def _at_pixels(file: IO[bytes], implicit: bool, little: bool) -> tuple[str, str, IO[bytes], int, int]:
    """Read the pixel element's own header (PS3.5 7.1), at which stop_before_pixels left the file."""
    order: Literal["little", "big"] = "little" if little else "big"
    head = file.read(8)
    tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)
    if len(head) < 8 or tag not in _PIXEL_KEYWORDS:
        raise UnreadableImage("no-pixels")
    # Files exist that turn to implicit elements midway, pydicom's SC_rgb_jpeg among them: then no letters stand here.
    implicit = implicit or not (head[4:6].isalpha() and head[4:6].isupper())
    vr = "OW" if implicit else head[4:6].decode("ascii", "replace")
    length = int.from_bytes(head[4:8] if implicit else file.read(4), order)
    return _PIXEL_KEYWORDS[tag], vr, file, file.tell(), length


def _open_deflated(file: IO[bytes]) -> tuple[str, str, IO[bytes], int, int]:
    from io import BytesIO

    from pydicom import dcmread

    file.seek(0)
    whole = dcmread(file)
    for tag, keyword in _PIXEL_KEYWORDS.items():
        if tag in whole:
            value = bytes(whole[tag].value)
            return keyword, str(whole[tag].VR), BytesIO(value), 0, len(value)
    raise UnreadableImage("no-pixels")


def _check_complete(opened: _Opened) -> None:
    """Raise "truncated" if the file ends within its pixels: some decoders would fill the rest with grey."""
    if opened.length != _NO_LENGTH:
        if opened.start + opened.length > opened.end:
            raise UnreadableImage("truncated", f"{opened.end - opened.start} of {opened.length} bytes of pixels")
        return
    position = opened.start
    while True:  # over the fragments (PS3.5 A.4), reading only their lengths
        opened.file.seek(position)
        head = opened.file.read(8)
        if head[:4] == b"\xfe\xff\xdd\xe0":
            break
        position += 8 + int.from_bytes(head[4:], "little")
        if len(head) < 8 or position > opened.end:
            raise UnreadableImage("truncated", "the last fragment is cut")
        if head[:4] != b"\xfe\xff\x00\xe0":
            break  # not a fragment at all: the decoder's to judge
    opened.file.seek(opened.start)


# --- stored values ----------------------------------------------------------------------------------------------------


def _decode(opened: _Opened, index: int) -> tuple[Array, str]:
    """Stored values of one frame, (H, W) or (H, W, samples), and their photometric interpretation once decoded."""
    _check_complete(opened)
    if not opened.syntax.is_encapsulated:
        return _decode_with(opened, index, "")
    plugins = _plugins(opened)
    if not plugins:
        raise UnreadableImage("codec-missing", f"transfer syntax {opened.syntax.name}")
    if opened.syntax == _RLE or plugins == ["pillow"]:
        return _try_each(opened, index, plugins)
    # The C and C++ decoders for the rest fault, abort or run for ever on some damaged bytes.
    return call_apart(f"{__name__}:_try_apart", os.path.abspath(opened.file.name), index)


def _try_apart(path: str, index: int) -> tuple[Array, str]:
    with open(path, "rb") as file:
        opened = _open(file)
        return _try_each(opened, index, _plugins(opened))


def _try_each(opened: _Opened, index: int, plugins: list[str]) -> tuple[Array, str]:
    problems = []
    for plugin in plugins:
        try:
            return _decode_with(opened, index, plugin)
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the next decoder may do; panics in Rust are BaseExceptions
            problems.append(f"{plugin}: {error}")
    text = "; ".join(problems)
    raise UnreadableImage("truncated" if "truncated" in text.lower() else "corrupt", text)


def _plugins(opened: _Opened) -> list[str]:
    from pydicom.pixels.decoders.base import get_decoder

    try:
        available = get_decoder(opened.syntax).available_plugins
    except NotImplementedError:
        return []
    if opened.syntax == _RLE and opened.options["bits_allocated"] == 1:
        return []  # none of the RLE decoders unpacks bits
    if opened.syntax == _JPEG_EXTENDED and opened.options["bits_stored"] > 8:
        available = tuple(name for name in available if name == "pylibjpeg")  # the others have 8-bit libraries
    return [name for name in DECODERS.get(opened.syntax, ()) if name in available]


def _decode_with(opened: _Opened, index: int, plugin: str) -> tuple[Array, str]:
    from pydicom.pixels.decoders.base import get_decoder

    options = dict(opened.options)
    has_high_bit = options["pixel_keyword"] == "PixelData" and (
        not opened.syntax.is_encapsulated or opened.syntax == _RLE
    )
    if has_high_bit:
        options["correct_unused_bits"] = False
    opened.file.seek(opened.start)
    source: Any = opened.file  # pydicom's types do not know that it takes a file
    if not opened.syntax.is_encapsulated and opened.length != _NO_LENGTH:
        _check_length(opened)
        if options["bits_allocated"] == options["samples_per_pixel"] == 1:
            return _one_bit(opened, index), str(options["photometric_interpretation"])
    array, properties = get_decoder(opened.syntax).as_array(
        source, index=index, raw=True, decoding_plugin=plugin, **options
    )
    array = np.asarray(array)
    if has_high_bit:
        array = _used_bits(array, int(options["bits_stored"]), opened.header.get("HighBit"))
    return array, str(properties["photometric_interpretation"])


def _one_bit(opened: _Opened, index: int) -> Array:
    """A frame packed 8 pixels to the byte (PS3.5 8.1.1), which need not start at a whole byte: pydicom 3.0.2 then reads
    too few of them from a file."""
    shape = int(opened.options["rows"]), int(opened.options["columns"])
    count = shape[0] * shape[1]
    byte, bit = divmod(index * count, 8)
    opened.file.seek(opened.start + byte)
    data = opened.file.read((bit + count + 7) // 8)
    return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[bit : bit + count].reshape(shape)


def _check_length(opened: _Opened) -> None:
    """Raise "truncated" if the pixel element is shorter than its frames: the read would run into what follows it."""
    o = opened.options
    samples = o["rows"] * o["columns"] * o["samples_per_pixel"] * o["number_of_frames"]
    bits = samples * o["bits_allocated"]
    if o["photometric_interpretation"] == "YBR_FULL_422":
        bits = bits // 3 * 2
    if (bits + 7) // 8 > opened.length:
        raise UnreadableImage("truncated", f"{opened.length} bytes of pixels where {(bits + 7) // 8} are needed")


def _used_bits(array: Array, stored: int, high_bit: int | None) -> Array:
    """Keep the `stored` bits that end at `high_bit` (PS3.5 8.1.1): overlays may hide above, and old files shift up."""
    allocated = array.dtype.itemsize * 8
    if high_bit is None or not stored - 1 <= high_bit < allocated:
        high_bit = stored - 1
    if stored >= allocated:
        return array
    result: Array = array << (allocated - 1 - high_bit) >> (allocated - stored)
    return result


# --- display ----------------------------------------------------------------------------------------------------------


def _colour(stored: Array, photometric: str, opened: _Opened) -> Picture:
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


def _palette(stored: Array, opened: _Opened) -> Picture:
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


def _grey(stored: Array, photometric: str, opened: _Opened, index: int) -> Picture:
    header = opened.header
    padded = _padding(stored, opened)
    values = _modality(stored.astype(np.float64), opened, index)
    padded |= ~np.isfinite(values)
    values = np.nan_to_num(values)
    grey = _voi(values, opened, index)
    if grey is None:
        one_bit = opened.options.get("bits_stored") == 1
        grey = _unit(values) if one_bit else min_max(values, ~padded)
    # Either says it: conformant images that have both (PS3.3 C.8.11.3.1.2) say the same thing twice.
    if photometric == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        np.subtract(1, grey, out=grey)
    grey[padded] = 0
    return grey


def _padding(stored: Array, opened: _Opened) -> Array:
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


def _group(opened: _Opened, index: int, macro: str) -> Any:
    """The item of a functional group macro for this frame, else shared by all (PS3.3 C.7.6.16), else the header."""
    for sequence, number in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = opened.header.get(sequence)
        if groups and number < len(groups) and groups[number].get(macro):
            return groups[number].get(macro)[0]
    return opened.header


def _modality(values: Array, opened: _Opened, index: int) -> Array:
    """Modality LUT or rescale, PS3.3 C.11.1. A slope left out counts as 1 (pydicom would skip the intercept too)."""
    if opened.header.get("ModalityLUTSequence"):
        signed = opened.options.get("pixel_representation") == 1
        return _through(values, opened.header.ModalityLUTSequence[0], opened, signed)[0]
    group = _group(opened, index, "PixelValueTransformationSequence")
    slope, intercept = _number(group.get("RescaleSlope")), _number(group.get("RescaleIntercept"))
    # A slope of 0 would erase the picture: GDCM reads it as 1 too.
    return values * (slope or 1.0) + (intercept or 0.0)


def _voi(values: Array, opened: _Opened, index: int) -> Picture | None:
    """First VOI LUT, else first window, as [0, 1]; None where the file names neither (PS3.3 C.11.2)."""
    group = _group(opened, index, "FrameVOILUTSequence")
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


def _through(values: Array, item: Any, opened: _Opened, signed: bool) -> tuple[Array, float]:
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
