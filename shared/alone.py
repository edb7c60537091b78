"""One program at a time in a folder: a second one is told so, and a crash leaves nothing to clean up."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from shared.errors import UserError


@contextlib.contextmanager
def alone(file: Path, taken: str, cannot: str) -> Iterator[None]:
    """Hold ``file`` for this process; it and its folder are made where they are not there. The kernel lets it go with
    the process.

    Raises:
        UserError: ``taken``, if another process holds it; ``cannot`` and the reason, if it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    except OSError as error:
        raise UserError(f"{cannot}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(taken) from None
        yield
