"""Images from a trained generator, as a folder that can be read as a site's."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from consilium.predict import filled_whole
from consilium.trained import open_run
from server.store import write_json
from shared import __version__
from shared.errors import UserError

MARK = "generation.json"


def generate_images(
    run: Path,
    count: int,
    out: Path,
    seed: int = 0,
    weights: str = "best",
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write ``count`` PNG pictures to ``out``, all at once or none; returns their paths.

    A generator that is told the class makes the classes in turn, and ``labels.csv`` beside the pictures names them.
    ``generation.json`` says which model made them; each picture says in its own text that it is synthetic.

    Raises:
        UserError: no run of a generator, or no place to write; one line.
    """
    trained = open_run(run, weights, device)
    job = trained.job
    if not hasattr(trained.task, "generate"):
        raise UserError(f"{run}: is a run of {job.task}, which makes no images; use `consilium predict`")
    text = PngInfo()
    text.add_text("Comment", f"synthetic image, made by consilium {__version__}, job {job.sha256[:16]}")
    rows: list[tuple[str, str]] = []
    with filled_whole(out, MARK, "images") as work:
        for number, (name, picture) in enumerate(trained.task.generate(trained.model, job, count, seed), start=1):
            word = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80]
            file = f"{number:06d}{'-' if word else ''}{word}.png"
            Image.fromarray(picture).save(work / file, pnginfo=text)
            rows.append((file, name))
            if progress:
                progress(number, count)
        if job.model.conditional:
            with (work / "labels.csv").open("w", newline="", encoding="utf-8") as table:
                csv.writer(table, lineterminator="\n").writerows([("path", "label"), *rows])
        facts = {
            "version": __version__,
            "run": str(run.resolve()),
            "weights": weights,
            "round": int(trained.facts.get("round", 0)),
            "model": job.model.name,
            "job_sha256": job.sha256,
            "seed": seed,
            "images": count,
            "synthetic": True,
        }
        write_json(work / MARK, facts)
    return [out / file for file, _ in rows]
