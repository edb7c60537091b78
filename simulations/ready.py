"""The jobs and studies that come with Consilium, by name: ``chest`` is ``jobs/chest.toml``, wherever that is."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from shared.errors import UserError

_HERE = Path(__file__).parent


def ready_job(job: str | Path) -> Path:
    """The file of a job, or of the ready job of this name.

    Raises:
        UserError: a name that is neither.
    """
    return _find(job, "job", _HERE / "jobs")


def ready_study(study: str | Path) -> Path:
    """The file of a study, or of the ready study of this name; errors as for ``ready_job``."""
    return _find(study, "study", _HERE / "studies")


def ready_jobs() -> dict[str, str]:
    """What each ready job is for, in a sentence or two, by name."""
    first = {file.stem: file.read_text(encoding="utf-8").partition("\n")[0] for file in _files(_HERE / "jobs")}
    return {name: line.removeprefix("# ") for name, line in first.items()}


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.toml"))


def _find(name: str | Path, kind: str, folder: Path) -> Path:
    path = Path(name)
    if path.exists():
        return path
    known = {file.stem: file for file in _files(folder)}
    if path.suffix or len(path.parts) != 1:
        beside = [str(file) for file in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        near = get_close_matches(str(path), beside, n=1) or get_close_matches(path.stem, list(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{path}: no such file{hint}")
    if path.name not in known:
        raise UserError(f"{path}: no such file, nor a {kind} that comes with Consilium: {', '.join(known)}")
    return known[path.name]
