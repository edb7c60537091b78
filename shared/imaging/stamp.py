"""Whether a file changed since it was last looked at, without reading it."""

from __future__ import annotations

from pathlib import Path


def stamp(path: Path) -> str:
    """Changes when the file, or one in the folder, changes; never raises."""
    try:
        if path.is_dir():
            return str(sorted((item.name, stamp(item)) for item in path.iterdir()))
        status = path.stat()
    except OSError:
        return "absent"
    # A file put back with its old time of change (cp -p, rsync -t) has a new time of its own entry.
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
