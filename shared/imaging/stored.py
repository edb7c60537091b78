"""From a DICOM file to the stored values of one frame: the header read, the pixels decoded, nothing interpreted yet.

pydicom and numpy do the work; this adds what pydicom does differently per machine (DECODERS), checks that the file is
whole, and keeps decoders that may crash in a process of their own.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import IO, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from shared.imaging.apart import call_apart
from shared.imaging.errors import MAX_PIXELS, UnreadableImage, silence

Array = npt.NDArray[Any]

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
_NO_LENGTH = 0xFFFFFFFF


@dataclass(frozen=True)
class Opened:
    """A DICOM file read up to its pixels; `file` stands at byte `start`, the first of the pixel element's value."""

    header: Any
    file: IO[bytes]
    start: int
    end: int
    length: int
    options: dict[str, Any]

    @property
    def syntax(self) -> Any:
        """The transfer syntax that the pixels are in."""
        return self.header.file_meta.TransferSyntaxUID

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return int(self.options["number_of_frames"])


# --- the file ---------------------------------------------------------------------------------------------------------


def open_dicom(file: IO[bytes]) -> Opened:
    """A DICOM file up to its pixels, which are not decoded yet.

    Raises:
        UnreadableImage: it is none, or says nothing of its pixels.
    """
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
    sides = [int(options.get(name) or 0) for name in ("rows", "columns", "samples_per_pixel")]
    if min(sides) < 1:
        raise UnreadableImage("corrupt", f"rows, columns, samples: {sides}")
    if math.prod(sides) > MAX_PIXELS:
        raise UnreadableImage("too-large", f"rows, columns, samples: {sides}")
    end = source.seek(0, os.SEEK_END)
    source.seek(start)
    return Opened(header, source, start, end, length, options)


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


def _check_complete(opened: Opened) -> None:
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


def decode(opened: Opened, index: int) -> tuple[Array, str]:
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
        opened = open_dicom(file)
        return _try_each(opened, index, _plugins(opened))


def _try_each(opened: Opened, index: int, plugins: list[str]) -> tuple[Array, str]:
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


def _plugins(opened: Opened) -> list[str]:
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


def _decode_with(opened: Opened, index: int, plugin: str) -> tuple[Array, str]:
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


def _one_bit(opened: Opened, index: int) -> Array:
    """A frame packed 8 pixels to the byte (PS3.5 8.1.1), which need not start at a whole byte: pydicom 3.0.2 then reads
    too few of them from a file."""
    shape = int(opened.options["rows"]), int(opened.options["columns"])
    count = shape[0] * shape[1]
    byte, bit = divmod(index * count, 8)
    opened.file.seek(opened.start + byte)
    data = opened.file.read((bit + count + 7) // 8)
    return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[bit : bit + count].reshape(shape)


def _check_length(opened: Opened) -> None:
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
