"""Text for a terminal."""

from __future__ import annotations

import shutil
import textwrap

WIDTH = 118  # where no terminal says how wide it is, and the most that is pleasant to read


def wrapped(text: str, indent: str) -> list[str]:
    """Lines as wide as the terminal, those after the first behind ``indent``. Paths and commands stay whole, to be
    copied."""
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
