"""A trained model's word on new images: one file or a folder of them, read as in training, in files others can use."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from consilium.trained import TrainedModel, facts_of, open_run
from server.store import fresh_folder, write_json
from shared.cases import Sample, SiteData
from shared.config import Job
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Skipped, load_dataset
from shared.imaging.harmonise import Ends
from shared.imaging.scale import with_scale
from shared.rules import site_rule
from shared.samples import find_images, read_samples
from shared.sitefile import read_site

AT_ONCE = 64  # cases decoded before the model sees them: so little disk and memory is needed, however many there are
MARK = "prediction.json"

Progress = Callable[[int, int], None]  # hears (cases done, of all)


class Predicted(NamedTuple):
    """What was done: cases predicted, what could not be read, the files written."""

    cases: int
    unreadable: list[Skipped]
    files: list[Path]


def predict(
    run: Path,
    path: Path,
    out: Path,
    weights: str = "best",
    device: str = "auto",
    progress: Progress | None = None,
    own: Path | None = None,
    parts: Path | None = None,
) -> Predicted:
    """Predict every case in ``path``, a file or a folder; the files appear in ``out`` all at once, or not at all.

    ``own`` is the site.toml of the hospital the images are from, where ``data.harmonise`` has a rule of the site;
    ``parts`` a site's own model of the run, to be used instead of the common one.

    ``prediction.json`` beside them says which model it was, of which job, and what could not be read.

    Raises:
        UserError: no run, nothing there, or no place to write; one line.
    """
    trained = open_run(run, weights, device, parts)
    site, samples = find_cases(trained, path, own)
    with filled_whole(out, MARK, "predictions") as work:
        unreadable: list[Skipped] = []
        site = dataclasses.replace(site, cache=work / ".cache")
        found = _predictions(trained, site, samples, unreadable, progress or (lambda done, of: None))
        files = trained.task.write(found, site, trained.job, work)
        result = Predicted(len(samples) - len(unreadable), unreadable, [out / file.relative_to(work) for file in files])
        if result.cases:
            facts = {"cases": result.cases, "unreadable": [vars(item) for item in unreadable]}
            write_json(work / MARK, facts_of(trained) | facts)
    return result


def find_cases(trained: TrainedModel, path: Path, own: Path | None = None) -> tuple[SiteData, list[Sample]]:
    """The cases in a file or a folder, without labels, and the site they would be.

    ``own``: the site.toml of the hospital whose images they are, for a rule of ``data.harmonise`` that needs its scale.

    Raises:
        UserError: there is none; or ``own`` is needed or of no use.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        samples: list[Sample] = getattr(trained.task, "find", find_images)(path, trained.job)
    except SiteRefusal as refusal:
        raise UserError(str(refusal)) from None
    if not samples:
        raise UserError(f"{path}: no image was found here")
    folder = path if path.is_dir() else path.parent
    return SiteData("predict", folder, max_unreadable=1.0, scale=_scale(trained.job, own)), samples


def _scale(job: Job, own: Path | None) -> Ends | None:
    """The scale of the hospital whose images are asked about, from its training images."""
    rule = site_rule(job.data.harmonise)
    if not rule:
        if own:
            raise UserError(f"--site {own}: the model needs nothing of a hospital; leave it out")
        return None
    if not own:
        raise UserError(
            f"the model was trained with data.harmonise = {job.data.harmonise!r}: {rule} needs the scale of the "
            "hospital the images are from; name its site.toml with --site"
        )
    try:
        site = read_site(own)
        return with_scale(read_samples(site, job), site, job).scale
    except SiteRefusal as refusal:
        raise UserError(f"--site {own}: {refusal}") from None


def _predictions(
    trained: TrainedModel, site: SiteData, samples: Sequence[Sample], unreadable: list[Skipped], progress: Progress
) -> Iterator[tuple[Sample, Any]]:
    """Each readable case with its prediction; those that cannot be read are added to ``unreadable``."""
    task, job = trained.task, trained.job
    for start in range(0, len(samples), AT_ONCE):
        progress(start, len(samples))
        data = load_dataset(samples[start : start + AT_ONCE], site, job)
        unreadable += data.skipped
        yield from zip(data.samples, task.predict(trained.model, data, job, trained.device), strict=True)
        if site.cache:
            shutil.rmtree(site.cache)
    progress(len(samples), len(samples))


@contextlib.contextmanager
def filled_whole(out: Path, mark: str, what: str) -> Iterator[Path]:
    """A folder to fill, whose content moves to ``out`` at the end, ``mark`` last: no file is ever there in part.

    Nothing moves if ``mark`` was not written. An ``out`` that holds ``mark`` is moved aside first.

    Raises:
        UserError: ``out`` holds anything else, or cannot be written.
    """
    if aside := fresh_folder(out, mark, what):
        print(f"what was in {out} is kept in {aside}", file=sys.stderr)
    work = out / ".writing"
    try:
        work.mkdir()
        yield work
        if (work / mark).is_file():
            for item in sorted(work.iterdir(), key=lambda item: item.name == mark):
                if not item.name.startswith("."):
                    item.rename(out / item.name)
    except OSError as error:  # a full disk
        raise UserError(f"--out {out}: cannot write there: {error.strerror or error}") from None
    except SiteRefusal as refusal:
        where = f"--out {out}: cannot write there: " if refusal.code == "no-cache" else ""  # the cache lies in it
        raise UserError(f"{where}{refusal}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not any(out.iterdir()):
            out.rmdir()
