"""The one exception of the picture readers, and the boundary that turns every other exception into it."""

from __future__ import annotations

import functools
import logging
import os
import re
import struct
import warnings
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Every code an UnreadableImage can carry, with its meaning for the person who reads the report.
CODES: Final[dict[str, str]] = {
    "not-found": "there is no such file",
    "not-permitted": "the file may not be read by this user",
    "empty-file": "the file has no bytes",
    "unsupported-format": "not a kind of picture this program reads",
    "not-dicom": "asked for as DICOM, but the DICM mark at byte 128 is missing",
    "no-pixels": "a DICOM file without a picture in it (a report, a plan, a directory)",
    "no-such-array": "the NumPy archive holds no array of that name, or several and none was named",
    "codec-missing": "no installed decoder reads this compression (docs/hospital.md names one to add)",
    "truncated": "the file ends before the picture does",
    "corrupt": "the header or the pixels contradict themselves or cannot be decoded",
    "too-large": "more pixels in one frame than MAX_PIXELS",
    "frame-out-of-range": "the file has no frame of that number",
    "box-outside": "an object's box lies outside the picture",
    "annotated-size": "the image is of another size than the one its boxes were drawn in",
    "no-annotation": "a film of which no frame is annotated, or an image listed without its annotation",
    "bad-annotation": "the file that should say what an image shows is none",
    "no-frames": "a film or signal of length zero",
    "uneven-frames": "frames of a film differ in size, colour or depth",
    "no-order": "the frames of a film do not say in which order they come",
    "wrong-leads": "a signal has another number of leads than the job's data.channels",
    "not-finite": "a signal with a value that is missing or no number",
    "bad-crop": "the crop box is not a box, or lies outside the picture",
    "not-a-volume": "one picture, a film or a colour picture where a stack of slices was expected",
    "mixed-series": "a folder with slices of more than one series",
    "missing-slice": "slices of a series lie at uneven distances: one at least is missing",
    "duplicate-slice": "two slices of a series lie at the same place",
    "uneven-slices": "slices of a series differ in size, pixel spacing or orientation",
    "not-a-mask": "a mask whose values are not whole numbers of one channel",
    "mask-size": "mask and image differ in size",
    "images-differ": "the images of one case differ in size, or lie elsewhere in space than each other",
    "mask-position": "the mask lies elsewhere in space than the image, or belongs to another image",
    "unknown-class": "a mask with a value or segment that is no class of the job",
    "no-colour": "the job's rule for stains wants colour, and the picture is grey",
    "no-spacing": "the job asks for pixels of so many mm, and the file does not say how large its pixels are",
}

_LONGEST: Final = 300  # letters of a detail shown: a decoder may say pages
#: Largest samples per frame decoded (134 million): a flipped bit in a header must not claim all memory.
MAX_PIXELS: Final = 2**27


class UnreadableImage(Exception):
    """A picture that cannot be read. `str()` gives only the code, so that it may leave the site.

    Attributes:
        code: one of CODES.
        detail: free text for the site's own log. It may hold header values and paths: never send it.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        if code not in CODES:
            # torch's data loader rebuilds exceptions with a whole traceback as their only argument.
            code, detail = "corrupt", code
        super().__init__(code)
        self.code = code
        self.detail = detail


def explained(path: str, code: str, detail: str = "", root: str | os.PathLike[str] = "") -> str:
    """One line, for a person at the site, on why a case cannot be read.

    Args:
        path: of the case, as the site names it.
        code, detail: of the UnreadableImage. What is wrong may lie in a slice or the mask, which the detail names.
        root: the site's folder; files below it are named from there, as ``path`` is.
    """
    for folder in {str(root), os.path.abspath(root)} - {"", "."}:
        detail = re.sub(rf"(?<![^\s'\"(\[]){re.escape(folder.rstrip('/'))}/", "", detail)
    detail = "" if detail == path else " ".join(detail.removeprefix(f"{path}: ").split())
    text = f"{path}: {CODES[code]} ({code})" + (f": {detail[:_LONGEST]}" if detail else "")
    # Names of files may hold line ends, and bytes that no terminal can show.
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def only_unreadable(reader: Callable[P, R]) -> Callable[P, R]:
    """Wrap `reader` so that whatever is in the file, nothing but UnreadableImage is raised and nothing is printed.

    MemoryError, KeyboardInterrupt and SystemExit pass through: they are not about the file.
    """

    @functools.wraps(reader)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return reader(*args, **kwargs)
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except UnreadableImage as error:
            problem = UnreadableImage(error.code, error.detail)
        except BaseException as error:  # decoders in Rust panic with a BaseException
            code, detail = _code_of(error), f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and code in ("not-found", "not-permitted"):
                detail = str(error.filename)  # the code says the rest
            problem = UnreadableImage(code, detail)
        # Raised outside the handlers: __context__ would carry the original message, which may hold header values.
        raise problem

    return guarded


def _code_of(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "not-found"
    if isinstance(error, PermissionError):
        return "not-permitted"
    if isinstance(error, IsADirectoryError | NotImplementedError):
        return "unsupported-format"
    if isinstance(error, EOFError | struct.error) or "truncated" in str(error).lower():
        return "truncated"
    return "corrupt"


def require_bytes(path: str | os.PathLike[str]) -> None:
    """Raise UnreadableImage("empty-file") for a file of no bytes; OSError where there is no file."""
    if os.stat(path).st_size == 0:
        raise UnreadableImage("empty-file", str(path))


def silence(*loggers: str) -> None:
    """Switch the named loggers off for good: pydicom logs header values, and a log handler may send them on."""
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
