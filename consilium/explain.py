"""Why a model says what it says of one image: the image, and in colour what the answer depends on."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from consilium.attribution import METHODS, attribute, has_maps
from consilium.overlay import overlay, save, titled
from consilium.predict import find_cases
from consilium.trained import TrainedModel, open_run
from shared.config import nearest
from shared.errors import UserError
from shared.imaging.dataset import Dataset, load_dataset
from shared.imaging.errors import explained


class Explained(NamedTuple):
    """The picture that was written, and what it says in words."""

    file: Path
    caption: tuple[str, ...]


def explain(
    run: Path,
    image: Path,
    out: Path,
    method: str = "",
    name: str = "",
    weights: str = "best",
    device: str = "auto",
    own: Path | None = None,
    parts: Path | None = None,
) -> Explained:
    """Write a picture of why the model of ``run`` says what it says of ``image``.

    Classifiers and segmenters: what the score of class ``name``, or of the likeliest, depends on, by ``method``, one of
    METHODS; if none is named Grad-CAM, or integrated gradients where no layer gives maps. Detectors: the boxes found.
    ``out`` is a PNG file, or a folder for one. ``own``: see ``consilium.predict.find_cases``.

    Raises:
        UserError: no run, an image that cannot be read, a class or method there is not.
    """
    if method and method not in METHODS:
        raise UserError(f"--method {method}: must be one of {', '.join(METHODS)}{nearest(method, METHODS)}")
    trained = open_run(run, weights, device, parts)
    data = decode_one(trained, image, own)
    caption = [f"{image.name}: {trained.job.model.name} of the job {trained.job.name}"]
    if hasattr(trained.task, "explainable"):
        sheet, label = _attributed(trained, data, method, name, caption)
    elif hasattr(trained.task, "draw"):
        if method or name:
            raise UserError(f"a {trained.job.task} model shows what it found: leave --method and --class out")
        sheet, label = _drawn(trained, data, caption), "found"
    else:
        raise UserError(f"{run}: {trained.job.task} has no explanation that could be drawn")
    file = _place(out, image, label)
    save(sheet, file, caption)
    return Explained(file, tuple(caption))


def decode_one(trained: TrainedModel, image: Path, own: Path | None = None) -> Dataset:
    """The one case in a file or folder, as the model sees it; of a film in which each frame is one, the middle frame.

    Raises:
        UserError: it cannot be read, and why; or there are several.
    """
    site, samples = find_cases(trained, image, own)
    paths = {sample.path for sample in samples}
    if len(paths) > 1:
        raise UserError(f"{image}: holds {len(paths)} cases; name one of them")
    with tempfile.TemporaryDirectory(prefix="consilium-") as cache:
        # Nothing is read later from the files that go: a mapped file lives as long as its mapping.
        data = load_dataset([samples[len(samples) // 2]], dataclasses.replace(site, cache=Path(cache)), trained.job)
    if not len(data):
        skipped = data.skipped[0]
        raise UserError(f"cannot be read: {explained(str(image), skipped.code, skipped.detail)}")
    return data


def _attributed(
    trained: TrainedModel, data: Dataset, method: str, name: str, caption: list[str]
) -> tuple[Image.Image, str]:
    """The sheet of an attribution and a label for its file; completes the caption."""
    case = trained.task.explainable(trained.model, data, trained.job, trained.device, name)
    method = method or ("gradcam" if has_maps(trained.model, case) else "integrated-gradients")
    found = attribute(trained.model, case, method)
    caption.append(f"{case.label}: {case.value:.3f}{case.where}. {found.how[0].upper()}{found.how[1:]}.")
    if not np.any(found.maps):
        caption.append("The map is empty: by this method nothing here speaks for the class.")
    caption.append("Colour shows what the score depends on, not whether it is right.")
    return overlay(case, found, caption), f"{case.label}-{method}"


def _drawn(trained: TrainedModel, data: Dataset, caption: list[str]) -> Image.Image:
    """What the model found, drawn into the image; completes the caption."""
    job = trained.job
    (prediction,) = trained.task.predict(trained.model, data, job, trained.device)
    picture, words = trained.task.draw(data, prediction, job)
    caption.append(words)
    return titled(picture, caption)


def _place(out: Path, image: Path, label: str) -> Path:
    """The PNG to write: ``out`` itself, or in the folder ``out`` one named after the image and what is shown."""
    plain = re.sub(r"[^\w.-]+", "-", f"{image.stem or image.name}-{label}").strip("-.")
    file = out if out.suffix.lower() == ".png" else out / f"{plain}.png"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}") from None
    if file.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, or a folder that does not end in .png")
    return file
