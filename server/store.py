"""The run folder: what happened, line by line in rounds.jsonl, and files that are written whole or not at all.

What happened is also put into the database of ``server.database``, from which it is shown.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from server.database.journal import parsed
from shared.errors import UserError
from shared.files import replacing, write_text

if TYPE_CHECKING:  # whoever only reads events needs neither
    import numpy as np
    from torch import Tensor

    from server.database.mirror import Mirror

Event = dict[str, Any]
Listener = Callable[[Event], None]
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, ``listener`` hears every event of this thread's runs as it is stored (progress displays)."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def fresh_folder(folder: Path, mark: str, what: str) -> Path | None:
    """Make ``folder`` an empty one. If it holds the file ``mark``, so is our own, it is moved aside first; gives where.

    Raises:
        UserError: it holds anything else, is the folder one is in, or cannot be written.
    """
    if folder.resolve() == Path.cwd():
        raise UserError(f"--out {folder}: is the folder you are in; name one of its own")
    aside = None
    try:
        if folder.exists() and any(folder.iterdir()):
            if not (folder / mark).exists():
                raise UserError(f"--out {folder}: holds files that are not {what} of ours; name a new folder")
            aside = folder.with_name(f"{folder.resolve().name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
            folder.rename(aside)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there: {error.strerror}") from None
    return aside


def write_json(path: Path, content: object) -> None:
    """JSON that every reader takes: numbers that are not finite become null, what is no letter is replaced."""
    write_text(path, json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):  # half a character pair has no UTF-8, and PostgreSQL takes no NUL
        return value.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")
    if isinstance(value, Mapping):
        return {str(_plain(str(key))): _plain(item) for key, item in value.items()}
    if isinstance(value, list) and set(map(type, value)) <= {int}:  # thousands of counts, in every evaluation
        return value
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_model(path: Path, arrays: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Weights as safetensors with the run's facts in its metadata: equal weights and facts give equal bytes.

    The facts stand as JSON under the one key ``consilium``: safetensors writes several keys in an order of its own.
    """
    from safetensors.torch import save_file

    with replacing(path) as name:
        save_file(dict(arrays), name, metadata={"consilium": json.dumps(facts, sort_keys=True)})


def write_pictures(folder: Path, pictures: dict[str, np.ndarray], label: str) -> list[str]:
    """Write pictures uint8 (h, w) or (h, w, 3) as PNG; gives their paths relative to the run folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}-{label}.png")
        names.append(f"{folder.name}/{name}-{label}.png")
    return names


class Store:
    """What happens in one run: told to ``rounds.jsonl`` in its folder first, then to the database and the listeners.

    ``store`` is the database, where it is not the file beside the run folders; None: this run is in none. A journal
    that cannot be written ends the run; a database that cannot is said once, as a warning, and the run goes on.
    """

    def __init__(self, folder: Path, store: str | None = "") -> None:
        self.folder, self.store = folder, store
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "rounds.jsonl"
        if log.exists() and (text := log.read_bytes()) and not text.endswith(b"\n"):
            with log.open("ab") as file:  # an earlier attempt broke off in the middle of a line
                file.write(b"\n")
        self._held: IO[bytes] | None = None  # the journal, from the run's beginning to its end: see ``broke_off``
        self.mirror: Mirror | None = None
        if store is not None:
            from server.database.mirror import Mirror  # not at the top: a worker that reads an event needs no database

            self.mirror = Mirror(folder, store)

    def add(self, kind: str, **facts: Any) -> None:
        """Append an event, put it into the database, and tell the listeners.

        Raises:
            OSError: the journal cannot be written.
        """
        if kind == "start":
            self._held = _locked(self.folder)
        self._append(kind, facts)
        if kind in ("finish", "failed") and self._held is not None:
            self._held.close()
        problem = self.mirror.update(now=kind in ("start", "finish", "failed")) if self.mirror is not None else ""
        if problem:
            self._append("warning", {"text": problem})

    def _append(self, kind: str, facts: Mapping[str, Any]) -> None:
        event: Event = {"event": kind, "time": round(time.time(), 3), **facts}
        with (self.folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                event["run"] = secrets.token_hex(8)  # its name in databases, wherever the folder is moved to
            file.write(json.dumps(_plain(event), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for listener in _listeners.get():
            listener(event)


def _locked(folder: Path) -> IO[bytes] | None:
    """The journal, locked while it is open; None on a disk without locks, or where another program is at the run."""
    file = (folder / "rounds.jsonl").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def broke_off(folder: Path) -> bool:
    """Whether no program is at a run whose journal has no end: it was killed, or the machine went down.

    The kernel lets a program's locks go with it. False where that cannot be told.
    """
    try:
        with (folder / "rounds.jsonl").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def read_events(folder: Path) -> list[Event]:
    """All events of a run in order; a last line cut short by a crash is passed over.

    Of a round that was done again, after a crash, the last is given, with the number of earlier ones as ``repeated``.
    """
    path = folder / "rounds.jsonl"
    events: dict[object, Event] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else []):
        if (event := parsed(line)) is None:
            continue
        key = (event["event"], event.get("round"), event.get("split")) if "round" in event else number
        if earlier := events.pop(key, None):
            event["repeated"] = earlier.get("repeated", 0) + 1
        events[key] = event
    return list(events.values())
