"""What a detector finds in new images, the COCO file it is written to, and the picture of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from shared.cases import Sample, SiteData
from shared.config import Job
from shared.imaging.dataset import Dataset, to_float
from shared.imaging.read import Picture
from shared.tasks.detection.boxes import Floats, inside, place, to_image
from shared.tasks.detection.data import shape_of
from shared.tasks.detection.learning import detect

#: Boxes of a lower score are written, but not drawn.
DRAWN = 0.5
# Okabe & Ito's colours, told apart by colour-blind eyes, as far as they stand out from grey.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")


class Prediction(NamedTuple):
    """What is found in an image of ``shape`` (height, width), best first.

    ``boxes`` float64 (n, 4) as x1, y1, x2, y2 in pixels of the image as it was read; ``classes`` indices; ``scores``.
    """

    shape: tuple[int, int]
    boxes: Floats
    classes: tuple[int, ...]
    scores: tuple[float, ...]


def predict(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Iterator[Prediction]:
    """One prediction for each image, in order."""
    for i, found in enumerate(detect(model, data, job, device)):
        shape = shape_of(data, i)
        boxes = inside(to_image(found.boxes, shape, job.data.size), shape)
        yield Prediction(shape, boxes, tuple(found.classes.tolist()), tuple(found.scores.tolist()))


def write(predictions: Iterable[tuple[Sample, Prediction]], site: SiteData, job: Job, out: Path) -> list[Path]:
    """Write ``predictions.json`` in COCO's layout: images, categories, and every box with its score.

    ``bbox`` is x, y, width, height in pixels of the image; category k + 1 is the job's class k. Frames of a film are
    images of their own, with the film's name and ``frame``.
    """
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for sample, prediction in predictions:
        height, width = prediction.shape
        frame = {"frame": sample.frame} if isinstance(sample.frame, int) else {}
        name = sample.path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height, **frame})
        for (x1, y1, x2, y2), k, score in zip(
            prediction.boxes.tolist(), prediction.classes, prediction.scores, strict=True
        ):
            box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": k + 1,
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                    "score": round(score, 5),
                }
            )
    categories = [{"id": k, "name": name} for k, name in enumerate(job.classes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file = out / "predictions.json"
    file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return [file]


def draw_boxes(picture: Picture, prediction: Prediction, job: Job) -> Image.Image:
    """A picture (H, W) or (H, W, 3) in [0, 1] of any scale, with the boxes of a score of DRAWN or more."""
    image = Image.fromarray(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    scale = np.tile([image.width / prediction.shape[1], image.height / prediction.shape[0]], 2)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(max(10, min(image.size) // 40))
    thick = max(1, min(image.size) // 200)
    found = zip(prediction.boxes * scale, prediction.classes, prediction.scores, strict=True)
    for box, k, score in reversed([item for item in found if item[2] >= DRAWN]):  # the surest on top
        colour = _COLOURS[k % len(_COLOURS)]
        x1, y1, x2, y2 = box.tolist()
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=thick)
        words = f"{job.classes[k]} {score:.2f}"
        place_of = pen.textbbox((x1 + thick, y1 + thick), words, font)
        pen.rectangle(place_of, fill=colour)
        pen.text((x1 + thick, y1 + thick), words, "black", font)
    return image


def draw(data: Dataset, prediction: Prediction, job: Job) -> tuple[np.ndarray, str]:
    """The first image of ``data`` with its boxes, uint8 (h, w, 3), and what was found in words."""
    where = place(prediction.shape, job.data.size)
    left, top = where.corner.astype(int)
    wide, high = where.sides.astype(int)
    picture = np.moveaxis(to_float(data.columns["image"][0]).numpy(), 0, -1)[top : top + high, left : left + wide]
    times = max(1, round(768 / max(wide, high)))
    large = np.repeat(np.repeat(picture, times, 0), times, 1)
    shown = [k for k, score in zip(prediction.classes, prediction.scores, strict=True) if score >= DRAWN]
    counts = ", ".join(f"{shown.count(k)} {name}" for k, name in enumerate(job.classes) if k in shown)
    words = f"Found with a score of {DRAWN} or more: {counts or 'nothing'}."
    return np.asarray(draw_boxes(large.squeeze(), prediction, job)), words
