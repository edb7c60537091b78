"""A helper process for decoders that may crash: written in C++, they abort, fault or hang on some damaged bytes."""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
import threading
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from shared.imaging.errors import UnreadableImage, only_unreadable

#: Seconds after which a decoder in its own process counts as hung.
PATIENCE = 30.0

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
