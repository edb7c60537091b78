"""What the log of a site says of one reply: names, shapes and kinds, bytes and a SHA-256, never a value but epsilon."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from client import egress_log, lazy

Record = ArrayRecord | MetricRecord | ConfigRecord

_named: set[tuple[Path, int, str]] = set()  # lists of names that this process has written out, by site and run


def note(
    out: RecordDict, kind: str, message: Message, context: Context, home: Path | None, seconds: float = 0.0
) -> None:
    """Write one line of what was asked and is about to leave; a site that has no folder has no log.

    The names in a record are listed once in a run (by each process that serves it), then their digest stands for them.

    Args:
        seconds: how long the site worked on it.

    Raises:
        egress_log.BrokenLog, OSError: it cannot be written.
    """
    if home is None:
        return
    sha = hashlib.sha256()
    records: dict[str, dict[str, Any]] = {}
    for name in sorted(out):
        parts, size = _parts(out[name]), 0
        sha.update(f"{name}\n".encode())
        for piece in _pieces(out[name]):
            sha.update(piece)
            size += len(piece)
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        records[name] = {"names": digest, "count": len(parts), "bytes": size}
        if (home, context.run_id, digest) not in _named:
            records[name]["list"] = parts
    status, asked = out["status"], message.content.config_records.get("config", ConfigRecord())
    round_ = asked.get("round", 0)
    entry = {
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "run": str(context.run_id),
        "job": _word(context.run_config.get("name")),
        "round": round_ if isinstance(round_, int) else 0,
        "kind": kind,
        "split": _word(asked.get("split")),
        "seconds": round(seconds, 2),
        "site": status["site"],
        "declined": status["code"],
        "bytes": sum(facts["bytes"] for facts in records.values()),
        "content": sha.hexdigest(),
        "epsilon": out["metrics"].get("epsilon") if "metrics" in out else None,
        "records": records,
    }
    egress_log.append(home, entry)
    _named.update((home, context.run_id, facts["names"]) for facts in records.values())


def _word(value: object) -> str:
    """A word of the server's, as far as it goes into the log."""
    return value[:64] if isinstance(value, str) else ""


def _parts(record: Record) -> list[str]:
    """The names in a record with what they hold, not its values."""
    if isinstance(record, ArrayRecord):
        return [
            f"{name}: {array.dtype} {'x'.join(map(str, array.shape)) or 'number'}" for name, array in record.items()
        ]
    return [f"{name}: {_what(value)}" for name, value in record.items()]


def _what(value: object) -> str:
    if isinstance(value, list):
        return f"{len(value)} {'byte strings' if value and isinstance(value[0], bytes) else 'numbers'}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return {int: "count", float: "number"}.get(type(value), "word")


def _pieces(record: Record) -> Iterator[bytes | memoryview]:
    """What the SHA-256 and the bytes are of: names and bytes of arrays; of other records JSON with sorted keys,
    bytes in it as hexadecimal digits."""
    if isinstance(record, ArrayRecord):
        for name, array in record.items():
            yield name.encode()
            yield from lazy.pieces(array)
    else:
        yield json.dumps(dict(record), sort_keys=True, default=bytes.hex).encode()
