"""The site's own log: what came, what was done, what went wrong, in words for its own people.

A module of its own, because what supervises a site writes it, too, and has no use for PyTorch's 400 MB.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path


def write_log(home: Path, text: str) -> None:
    """Append a line to the site's own log, which never leaves the site."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "site.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n")
