"""The files of a run that the dashboard shows and gives out: two models, the model card, the report. No others."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

MODELS = {"best": "model.safetensors", "last": "last.safetensors"}
CARD, REPORT = "model_card.md", "report.html"
MAX_CARD = 1 << 20  # bytes


def file_of(folder: Path | None, name: str) -> Path | None:
    """A file of the run folder; None where there is none, or it is a link to somewhere else."""
    if folder is None:
        return None
    path = (folder / name).resolve()
    return path if path.parent == folder and path.is_file() else None


def model_facts(path: Path) -> dict[str, Any]:
    """Bytes, sha256, and what the file says of itself: the run's facts, without the state for resuming."""
    from safetensors import SafetensorError, safe_open

    stat = path.stat()
    found: dict[str, Any] = {"bytes": stat.st_size, "sha256": _sha256(path, stat.st_mtime_ns, stat.st_size)}
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {}).get("consilium", "{}"))
    except (SafetensorError, ValueError, OSError):
        return found | {"facts": {}, "damaged": True}
    return found | {"facts": {key: str(value) for key, value in facts.items() if key != "state"}, "damaged": False}


@lru_cache(maxsize=256)
def _sha256(path: Path, _changed: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def card_html(path: Path) -> str:
    """A model card as HTML. Markup and images in it are not carried over, so that it can bring nothing along."""
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(MAX_CARD)
    if text.startswith("---\n"):  # what catalogues of models read, and no person
        text = text.partition("\n---\n")[2]
    return str(MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(text))
