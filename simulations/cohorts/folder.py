"""A cohort's folder: written whole or not at all, and known again when the same arguments come."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

README = "README.txt"  # what it says is also the mark by which the same arguments are known again

Progress = Callable[[int, int], None]  # hears (patients done, of all)
Writer = Callable[[Path], Iterable[object]]  # fills the folder of a hospital, one step per patient


def check_arguments(sites: int, patients: int, seed: int) -> None:
    """Raises ValueError for numbers no cohort can be made of."""
    if sites < 1 or patients < 1 or seed < 0:
        raise ValueError("sites and patients must be at least 1 and the seed at least 0")


def write_cohort(
    directory: Path, readme: str, writers: Mapping[str, Writer], patients: int, progress: Progress | None = None
) -> list[Path]:
    """Let the ``writers`` fill a folder each, named as their keys, and give these folders back.

    The whole cohort appears at once or not at all. One that is there already, of the same ``readme``, is left as it is.

    Args:
        readme: what README.txt says; a line of it, ``command: …``, holds the arguments.
        writers: each writes a labels.csv and a site.toml, too.
        patients: of all hospitals together, for ``progress``.

    Raises:
        ValueError: the folder holds something else.
    """
    directory = Path(directory)
    folders = [directory / name for name in writers]
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if _is_cohort(directory, readme, folders):
            return folders
        again = next((line for line in readme.splitlines() if line.startswith("command:")), "the same command")
        raise ValueError(
            f"{directory} is not empty and holds no cohort made by {again.removeprefix('command:').strip()}: "
            "name a new folder, or remove this one first"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _fill(partial, writers, patients, progress)
        (partial / README).write_text(readme, encoding="utf-8", newline="\n")
        if directory.exists():
            directory.rmdir()  # empty, as seen above; a rename onto a folder fails on some systems
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folders


def _fill(folder: Path, writers: Mapping[str, Writer], patients: int, progress: Progress | None) -> None:
    done = 0
    for name, write in writers.items():
        for _ in write(folder / name):
            done += 1
            if progress is not None:
                progress(done, patients)


def _is_cohort(directory: Path, readme: str, folders: Iterable[Path]) -> bool:
    """Whether the folder is what the same arguments wrote before: its README says so, and the hospitals are there."""
    note = directory / README
    if not note.is_file() or note.read_bytes() != readme.encode("utf-8"):
        return False
    return all((folder / "labels.csv").is_file() and (folder / "site.toml").is_file() for folder in folders)
