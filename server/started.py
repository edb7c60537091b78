"""Whether `consilium server start` holds a federation's folder, and since when."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import Any

from server.federation import Folder

YOUNG = 60.0  # seconds in which a server that does not answer yet is taken to be starting


def state_file(folder: Folder) -> Path:
    """Where a server that runs writes down its process, when it began and the ports of its health service."""
    return folder.state / "server.json"


def lock_file(folder: Folder) -> Path:
    """What a server that runs holds, until its process ends."""
    return folder.state / "start.lock"


def is_started(folder: Folder) -> bool:
    """Whether a server holds the folder; what one that was killed left behind is none."""
    if not state_file(folder).exists():
        return False
    try:
        with lock_file(folder).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def is_starting(folder: Folder) -> bool:
    """Whether it holds it since less than ``YOUNG`` seconds."""
    return is_started(folder) and 0 <= time.time() - float(state(folder).get("started", 0)) < YOUNG


def state(folder: Folder) -> dict[str, Any]:
    """What the server wrote down; {} if nothing can be read."""
    try:
        return dict(json.loads(state_file(folder).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
