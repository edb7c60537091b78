"""The one exception of the picture readers, and the two boundaries that turn every other failure into it.

`only_unreadable` catches exceptions; `call_apart` runs in a process of its own what may crash.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import logging
import os
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import IO, Any, Final, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

P = ParamSpec("P")
R = TypeVar("R")

#: Every code an UnreadableImage can carry, with its meaning for the person who reads the report.
CODES: Final[dict[str, str]] = {
    "not-found": "there is no such file",
    "not-permitted": "the file may not be read by this user",
    "empty-file": "the file has no bytes",
    "unsupported-format": "not a kind of picture this program reads",
    "not-dicom": "asked for as DICOM, but the DICM mark at byte 128 is missing",
    "no-pixels": "a sound file that holds no picture (a report, a plan, a directory)",
    "no-such-array": "the NumPy archive holds no array of that name, or several and none was named",
    "codec-missing": "no installed decoder reads this compression",
    "truncated": "the file ends before the picture does",
    "corrupt": "the header or the pixels contradict themselves or cannot be decoded",
    "too-large": "more pixels in one frame than MAX_PIXELS",
    "frame-out-of-range": "the file has no frame of that number",
    "bad-crop": "the crop box is not a box, or lies outside the picture",
}

#: Seconds after which a decoder in its own process counts as hung.
PATIENCE = 30.0

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
            problem = UnreadableImage(_code_of(error), f"{type(error).__name__}: {error}")
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


# --- a process of its own ---------------------------------------------------------------------------------------------

_lock = threading.Lock()
_helper: subprocess.Popen[bytes] | None = None


def call_apart(function: str, *arguments: str | int) -> tuple[npt.NDArray[Any], str]:
    """Call "package.module:function", which returns an array and a text, in a helper process.

    For C++ decoders that abort or fault on damaged bytes: here that costs the helper, which the next call starts anew,
    and not the training. The helper is kept between calls, one for each process that reads, and ends with it.

    Raises:
        UnreadableImage: as raised by the function; "corrupt" if the helper dies or takes longer than PATIENCE.
    """
    global _helper
    with _lock:
        if _helper is None or _helper.poll() is not None:
            _helper = _start()
        watch = threading.Timer(PATIENCE, _helper.kill)
        watch.start()
        try:
            return _exchange(_helper, [function, *arguments])
        except UnreadableImage:
            raise
        except (OSError, ValueError) as error:
            _stop()
            problem = f"the decoder died: {error}"
        except BaseException:
            _stop()  # interrupted: its answer to this request must not become the answer to the next
            raise
        finally:
            watch.cancel()
    raise UnreadableImage("corrupt", problem)


def _start() -> subprocess.Popen[bytes]:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", f"from {__name__} import _serve; _serve()"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths}
    )


def _stop() -> None:
    global _helper
    if _helper is not None:
        _helper.kill()
        _helper.communicate()
    _helper = None


def _exchange(helper: subprocess.Popen[bytes], request: list[str | int]) -> tuple[npt.NDArray[Any], str]:
    assert helper.stdin is not None
    assert helper.stdout is not None
    helper.stdin.write(json.dumps(request).encode() + b"\n")
    helper.stdin.flush()
    reply = json.loads(helper.stdout.readline())  # ValueError for the empty line of a dead helper
    if "code" in reply:
        raise UnreadableImage(reply["code"], reply["detail"])
    data = helper.stdout.read(reply["bytes"])
    return np.frombuffer(data, reply["dtype"]).reshape(reply["shape"]), reply["text"]


def _serve() -> None:
    """The helper: answer requests on the standard input until it closes."""
    replies: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a C library prints must not end up among the replies
    for line in sys.stdin.buffer:
        name, *arguments = json.loads(line)
        module, _, function = name.partition(":")
        try:
            array, text = only_unreadable(getattr(importlib.import_module(module), function))(*arguments)
        except UnreadableImage as error:
            replies.write(json.dumps({"code": error.code, "detail": error.detail}).encode() + b"\n")
        else:
            array = np.ascontiguousarray(array)
            head = {"bytes": array.nbytes, "dtype": array.dtype.str, "shape": array.shape, "text": text}
            replies.write(json.dumps(head).encode() + b"\n" + array.tobytes())
        replies.flush()


def _forget_helper() -> None:
    """In a forked process (a data loader's worker): the helper, and a lock that may be held, are the parent's."""
    global _helper, _lock
    _helper, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helper)
atexit.register(_stop)
