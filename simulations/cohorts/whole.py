"""A cohort appears at once or not at all, and one that is already there from the same arguments is left as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

README = "README.txt"  # what it says is also the mark by which the same arguments are known again


def write_whole(directory: Path, readme: str, sites: Sequence[str], write: Callable[[Path], Iterable[None]]) -> None:
    """Let ``write`` fill a folder beside ``directory``, and rename it into place with README.txt in it.

    Args:
        sites: names of the folders ``write`` makes; each gets a labels.csv and a site.toml.
        write: fills the folder it is given, step by step.

    Raises:
        ValueError: ``directory`` holds anything but the cohort that ``readme`` describes.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if _is_there(directory, readme, sites):
            return
        raise ValueError(
            f"{directory} is not empty and holds no cohort made by the same command: name a new folder, or remove this "
            "one first"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for _ in write(partial):
            pass
        (partial / README).write_text(readme, encoding="utf-8", newline="\n")
        if directory.exists():
            directory.rmdir()  # empty, as seen above; a rename onto a folder fails on some systems
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _is_there(directory: Path, readme: str, sites: Sequence[str]) -> bool:
    note = directory / README
    if not note.is_file() or note.read_bytes() != readme.encode("utf-8"):
        return False
    return all((directory / site / name).is_file() for site in sites for name in ("labels.csv", "site.toml"))
