"""The small pieces a Markdown page is put together from; text from files goes through ``plain``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def plain(value: object) -> str:
    """Text from a file so that it stays text in Markdown: one line, its special characters escaped."""
    text = re.sub(r"\s+", " ", str(value)).strip()
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", text)


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(item) for item in line) + " |" for line in lines)


def listed(items: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {item}" for item in items)
