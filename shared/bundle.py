"""The app bundle: the code that a server sends with a run, held against the release that is installed here.

A bundle is a zip of the packages ``client``, ``server`` and ``shared`` and a ``pyproject.toml`` (Flower's FAB format).
It is read in memory only: nothing of it is unpacked, and nothing of it is imported.
"""

from __future__ import annotations

import io
import re
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from difflib import unified_diff
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from shared import __version__
from shared.config import Job, Scalar, toml_scalar

PACKAGES = ("client", "server", "shared")
MANIFEST = "pyproject.toml"
MOST_BYTES = 64 << 20  # unpacked; the format allows 10 MiB packed
MOST_FILES = 2000
# What a server may say of a run beside the job: where its files lie, and which run it is.
RUN_KEYS: dict[str, Scalar] = {
    "run.out": "",  # the run folder
    "run.sites": "",  # where the site.toml of each node lies, under Flower's own simulation engine
    "run.heldout": "",  # site.toml of the server's own images
    "run.reference": "",  # weights of the network that the job's task measures by
    "run.id": "",  # the run, also when it is resumed; Flower gives it a new number then
    "run.resume": False,
    "run.expected": 0,  # sites to wait for at first
    "run.store": "",  # the database, where it is not the file beside the run folders
}

Files = dict[str, bytes]


class BadBundle(Exception):
    """The bytes are no bundle; ``str`` says why, in words for the site's own log."""


class Difference(NamedTuple):
    """A file that is not the same in the bundle and in the installed release."""

    path: str
    what: str  # new, changed, missing
    lines: list[str]  # a unified diff from the installed file to the bundle's; empty for what is no text


@cache
def release() -> Mapping[str, bytes]:
    """The files of the bundle that the installed release makes, by path in the bundle."""
    files: Files = {MANIFEST: _manifest().encode()}
    for package in PACKAGES:
        root = Path(str(import_module(package).__file__)).parent
        for path in sorted(root.rglob("*.py")):
            files[f"{package}/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    return files


def _manifest() -> str:
    """What Flower must know of the app: where its two ends are, and every key that a run may set with its default."""
    config = RUN_KEYS | Job().flat()
    lines = "".join(f"{key} = {toml_scalar(value)}\n" for key, value in config.items())
    return (
        f'[project]\nname = "consilium"\nversion = "{__version__}"\n'
        'description = "Federated learning for medical imaging"\nlicense = "Apache-2.0"\n\n'
        '[tool.flwr.app]\npublisher = "consilium"\n\n'
        '[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "client.app:app"\n\n'
        f"[tool.flwr.app.config]\n{lines}"
    )


def read_bundle(content: bytes) -> Files:
    """The files of a bundle, by path.

    Raises:
        BadBundle: no zip, too large, or a path that leads out of it.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(entries) > MOST_FILES or sum(entry.file_size for entry in entries) > MOST_BYTES:
                raise BadBundle("it is larger than a bundle can be")
            names = [entry.filename for entry in entries]
            if len(set(names)) < len(names):
                raise BadBundle("it holds a file twice")
            for name in names:
                if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
                    raise BadBundle(f"it holds the path {name!r}")
            return {entry.filename: archive.read(entry) for entry in entries if entry.filename != ".info/CONTENT"}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise BadBundle(f"it is not a readable zip: {error}") from None


def release_version(files: Mapping[str, bytes]) -> str:
    """The version that a bundle's manifest gives it; "" if none that could be one."""
    try:
        version = tomllib.loads(files[MANIFEST].decode())["project"]["version"]
    except (KeyError, TypeError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return ""
    return version if isinstance(version, str) and re.fullmatch(r"[0-9A-Za-z.+!-]{1,40}", version) else ""


def differences(files: Mapping[str, bytes], installed: Mapping[str, bytes]) -> list[Difference]:
    """Where a bundle differs from the installed release, file by file; empty if it is the same program."""
    found = []
    for path in sorted({*files, *installed}):
        theirs, ours = files.get(path), installed.get(path)
        if theirs == ours or (path == MANIFEST and _same_toml(theirs, ours)):
            continue
        what = "new" if ours is None else "missing" if theirs is None else "changed"
        found.append(Difference(path, what, _diff(path, ours or b"", theirs or b"")))
    return found


def _same_toml(one: bytes | None, other: bytes | None) -> bool:
    try:
        return tomllib.loads((one or b"").decode()) == tomllib.loads((other or b"").decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False


def _diff(path: str, old: bytes, new: bytes) -> list[str]:
    try:
        before, after = old.decode().splitlines(), new.decode().splitlines()
    except UnicodeDecodeError:
        return []
    return list(unified_diff(before, after, f"installed/{path}", f"sent/{path}", lineterm=""))
