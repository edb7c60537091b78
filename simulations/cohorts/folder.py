"""A cohort's folder: written whole or not at all, and known again when the same arguments come."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

README = "README.txt"


def write_cohort(
    directory: Path, readme: str, sites: Sequence[str], write: Callable[[Path], None], again: str
) -> list[Path]:
    """Let ``write`` fill a new folder, and give back the sites' folders in it.

    The whole cohort appears at once or not at all. One that is there already, of the same ``readme``, is left as it is.

    Args:
        readme: what README.txt says; it holds the arguments, and is the mark by which they are known again.
        sites: the names of the folders, each with a labels.csv and a site.toml.
        again: the arguments as the command line has them, for the error.

    Raises:
        ValueError: the folder holds something else.
    """
    directory = Path(directory)
    folders = [directory / name for name in sites]
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if _is_cohort(directory, readme, folders):
            return folders
        raise ValueError(
            f"{directory} is not empty and holds no cohort made with {again}: "
            "name a new folder, or remove this one first"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        (partial / README).write_text(readme, encoding="utf-8", newline="\n")
        if directory.exists():
            directory.rmdir()  # empty, as seen above; a rename onto a folder fails on some systems
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folders


def _is_cohort(directory: Path, readme: str, folders: Sequence[Path]) -> bool:
    """Whether the folder is what the same arguments wrote before: its README says so, and the hospitals are there."""
    note = directory / README
    if not note.is_file() or note.read_bytes() != readme.encode("utf-8"):
        return False
    return all((folder / "labels.csv").is_file() and (folder / "site.toml").is_file() for folder in folders)
