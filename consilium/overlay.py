"""Drawing a map over a picture, with a scale and a caption. Orange and blue can be told apart by colour-blind eyes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from consilium.attribution import Attribution
from shared.explaining import Explainable

# Okabe & Ito, "Color Universal Design" (2008).
FOR, AGAINST, EDGE = (213, 94, 0), (0, 114, 178), (240, 228, 66)
SIDE = 384  # pixels of a picture's longer side
SHOWN = 4  # pictures of a case
STRONGEST = 0.85  # how much of the picture the strongest colour hides
_MARGIN, _LINE = 12, 18


def strength(maps: np.ndarray) -> np.ndarray:
    """The maps in -1..1, by the value that one pixel in 200 exceeds, so that a single pixel does not set the scale."""
    top = np.quantile(np.abs(maps), 0.995)
    top = top if top > 0 else np.abs(maps).max()
    return np.clip(maps / top, -1, 1) if top > 0 else np.zeros_like(maps)


def blend(picture: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The picture (h, w) or (h, w, 3) in grey, 0..1, under colour as opaque as -1..1 is strong; uint8 (h, w, 3)."""
    grey = picture if picture.ndim == 2 else picture @ np.array([0.299, 0.587, 0.114], np.float32)
    colour = np.where(strong[..., None] >= 0, FOR, AGAINST)
    weight = STRONGEST * np.abs(strong)[..., None]
    mixed: np.ndarray = np.rint((1 - weight) * 255 * grey[..., None] + weight * colour).astype(np.uint8)
    return mixed


def overlay(case: Explainable, found: Attribution, caption: Sequence[str]) -> Image.Image:
    """The pictures of a case, the same with their map, and below a scale and the caption.

    Of many pictures (frames, slices) those four are shown in which the map is strongest.
    """
    strong = strength(found.maps)
    weight = np.abs(strong).reshape(len(strong), -1).sum(1)
    shown = sorted(np.argsort(-weight, kind="stable")[:SHOWN].tolist())
    plain = [_enlarged(outlined(case, i)) for i in shown]
    mapped = [_enlarged(blend(case.pictures[i], strong[i])) for i in shown]
    rows = [plain + mapped] if len(shown) == 1 else [plain, mapped]
    names = [case.names[i] for i in shown] if len(shown) > 1 else []
    return _sheet(rows, names, caption, found.signed)


def titled(picture: np.ndarray, caption: Sequence[str]) -> Image.Image:
    """A picture uint8 (h, w) or (h, w, 3) with a caption below."""
    return _sheet([[Image.fromarray(picture).convert("RGB")]], [], caption, None)


def save(image: Image.Image, path: Path, caption: Sequence[str]) -> None:
    """Write a PNG under a temporary name, then rename it; the caption stands in its text, too."""
    text = PngInfo()
    text.add_itxt("Description", "\n".join(caption))
    work = path.with_name(f".{path.name}.writing")
    try:
        with work.open("wb") as file:
            image.save(file, "PNG", pnginfo=text)
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def outlined(case: Explainable, index: int) -> np.ndarray:
    """A picture of the case, uint8, with the edge of the region asked about, if there is one."""
    picture = case.pictures[index]
    values: np.ndarray = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    if case.region is None:
        return values
    from scipy.ndimage import binary_erosion

    values = values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)
    values[case.region[index] & ~binary_erosion(case.region[index])] = EDGE
    return values


def _enlarged(picture: np.ndarray) -> Image.Image:
    """Whole multiples, so that the pixels the network saw stay pixels; large pictures are made smaller."""
    image = Image.fromarray(picture).convert("RGB")
    longest = max(image.size)
    if longest > 2 * SIDE:
        return image.resize([max(1, round(side * SIDE / longest)) for side in image.size], Image.Resampling.BOX)
    times = max(1, SIDE // longest)
    return image.resize([side * times for side in image.size], Image.Resampling.NEAREST)


def _sheet(
    rows: Sequence[Sequence[Image.Image]], names: Sequence[str], caption: Sequence[str], signed: bool | None
) -> Image.Image:
    """Rows of pictures of one size under ``names``, above a scale (none if ``signed`` is None) and the caption."""
    cell = rows[0][0].size
    across = max(len(row) for row in rows)
    width = max(across * (cell[0] + _MARGIN) + _MARGIN, 480)
    font = ImageFont.load_default(14)
    wide = int((width - 2 * _MARGIN) / font.getlength("n"))
    lines = [part for line in caption for part in textwrap.wrap(line, wide) or [""]]
    heading = _LINE if names else 0
    below = len(rows) * (cell[1] + _MARGIN) + _MARGIN + heading
    words = below if signed is None else below + 2 * _LINE
    sheet = Image.new("RGB", (width, words + _LINE * len(lines) + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for place, name in enumerate(names):
        pen.text((_MARGIN + place * (cell[0] + _MARGIN), _MARGIN // 2), name, "black", font)
    for down, row in enumerate(rows):
        for place, image in enumerate(row):
            corner = (_MARGIN + place * (cell[0] + _MARGIN), heading + _MARGIN + down * (cell[1] + _MARGIN))
            sheet.paste(image, corner)
    if signed is not None:
        _scale(sheet, pen, below, font, signed)
    for number, line in enumerate(lines):
        pen.text((_MARGIN, words + number * _LINE), line, "black", font)
    return sheet


def _scale(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, top: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    signed: bool,
) -> None:  # fmt: skip
    """The colours from against to for (or from nothing to for), over mid grey as over a picture."""
    left, right = (
        ("speaks against the class", "speaks for it") if signed else ("does not matter", "speaks for the class")
    )
    start = _MARGIN + int(font.getlength(left)) + 8
    length = min(200, sheet.width - start - int(font.getlength(right)) - 8 - _MARGIN)
    pen.text((_MARGIN, top), left, "black", font)
    ramp = np.linspace(-1 if signed else 0, 1, length, dtype=np.float32)[None].repeat(14, 0)
    sheet.paste(Image.fromarray(blend(np.full_like(ramp, 0.5), ramp)), (start, top + 2))
    pen.text((start + length + 8, top), right, "black", font)
