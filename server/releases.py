"""What a registry of releases lists, and a run held against the release before it, by what the store has of both.

The registry is only read here, and believed; whether it is as it was signed, `consilium registry verify` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select

from server.compare import compare
from server.database import read
from server.database import schema as t
from shared.config import job_from_flat
from shared.errors import UserError

LOG = "log.jsonl"
Entry = dict[str, Any]


def listed(folder: Path) -> list[Entry]:
    """The releases in the order in which they were made; lines that are none are passed over.

    Raises:
        UserError: there is no registry.
    """
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{folder}: no registry, there is no {LOG} in it") from None
    found = []
    for line in lines:
        try:
            entry = json.loads(line)["entry"]
            found.append({**entry, "name": str(entry["name"]), "version": str(entry["version"])})
        except (ValueError, KeyError, TypeError):
            continue
    return found


def previous(entries: Iterable[Entry], key: str, name: str = "", version: str = "") -> Entry | None:
    """The release to hold the run of ``key`` against: the one that is named, else the last before the run's own release
    of the same name, else the last of all that is not the run's."""
    entries = list(entries)
    if name or version:
        chosen = [one for one in entries if name in ("", one["name"]) and version in ("", one["version"])]
        return chosen[-1] if chosen else None
    own = [place for place, one in enumerate(entries) if one.get("run_key") == key]
    if own:
        entries = [one for one in entries[: own[-1]] if one["name"] == entries[own[-1]]["name"]]
    others = [one for one in entries if one.get("run_key") != key]
    return others[-1] if others else None


def against_release(db: Engine, id: int, folder: Path, name: str = "", version: str = "") -> dict[str, Any] | None:
    """``server.compare.compare`` of a run with the release before it, or with one that is named; None where there is
    none. ``release`` holds its name, version and day, ``why_not`` why no figure can be given.

    Raises:
        UserError: no such run, no registry, or no release of that name and version.
    """
    own = read.run(db, id)
    entry = previous(listed(folder), own["key"], name, version)
    if entry is None:
        if name or version:
            raise UserError(f"{folder}: no release {name} {version}; `consilium registry list` names them".strip())
        return None
    told = {"release": {key: entry.get(key) for key in ("name", "version", "released", "round")}}
    told["release"]["itself"] = entry.get("run_key") == own["key"]
    other = _run_of(db, entry)
    if other is None:
        return told | {"why_not": "the run of this release is not in this store; bring it in: consilium runs import"}
    old = read.run(db, other)
    if not (own["settings"] and old["settings"]):
        return told | {"why_not": "the job of one of the two is not in the store"}
    sums = read.test_sums(db, id), read.test_sums(db, other)
    if not all(sums):
        return told | {"why_not": "one of the two has not been tested at any site"}
    return told | compare(*sums, job_from_flat(own["settings"]), job_from_flat(old["settings"]))


def _run_of(db: Engine, entry: Mapping[str, Any]) -> int | None:
    """The run a release was made of, by its key; releases of older versions hold none, and name folder and job."""
    with db.connect() as connection:
        if key := entry.get("run_key"):
            found: int | None = connection.scalar(select(t.run.c.id).where(t.run.c.key == key))
            return found
        same = select(t.run.c.id, t.run.c.path).where(t.run.c.job == entry.get("job_sha256"))
        rows = connection.execute(same.order_by(t.run.c.id)).all()
    fitting = [row.id for row in rows if Path(row.path).name == entry.get("run")]
    return int(fitting[-1]) if fitting else None
