"""The picture of docs/harmonisation.md: real images of several laboratories, as they are and under each rule.

python -m benchmarks.harmonisation_picture ../shared/data docs/pictures/harmonisation.png
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from server.likeness import landmarks
from shared.config import job_from_flat
from shared.imaging.harmonise import grey, harmonise
from shared.imaging.read import Picture, read_image
from shared.imaging.stain import lab_of
from shared.statistics import GREY_BINS, template

SIDE, EDGE, TITLE = 150, 6, 22
STAINED = ("none", "zscore", "percentiles", "nyul", "reinhard", "macenko")
NUCLEI = ("none", "polarity", "zscore", "polarity,zscore", "polarity,percentiles", "polarity,nyul")


def nuclei(data: Path) -> list[Picture]:
    """The first training image of a few groups of the nuclei."""
    with (data / "nuclei_dsb2018" / "sites.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    firsts = {row["site"]: row["image"] for row in reversed(rows)}
    return [read_image(data / "nuclei_dsb2018" / firsts[site]) for site in sorted(firsts)[:5]]


def smears(data: Path) -> list[Picture]:
    """The third image of each source of blood smears."""
    sites = sorted(path for path in (data / "bloodcell_det_multisite").iterdir() if path.is_dir())
    names = [json.loads((site / "annotations.json").read_text())["images"][2]["file_name"] for site in sites]
    return [read_image(site / "images" / name) for site, name in zip(sites, names, strict=True)]


def standard(pictures: list[Picture]) -> str:
    """Landmarks as `consilium survey` names them, of these pictures."""
    sums = template(job_from_flat({}))
    greys = np.concatenate([grey(picture).ravel() for picture in pictures])
    sums["grey-train"] = np.histogram(greys, GREY_BINS, (0, 1))[0].tolist()
    return landmarks(sums)


def tile(picture: Picture) -> Image.Image:
    """The middle of a picture, a square."""
    side = min(picture.shape[0], picture.shape[1], 256)
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    part = (picture[top : top + side, left : left + side] * 255).round().astype(np.uint8)
    return Image.fromarray(part).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def rows_of(pictures: list[Picture], rules: tuple[str, ...]) -> list[tuple[str, list[Picture]]]:
    """Each rule with what it makes of the pictures."""
    # The scale is made of pictures turned alike, as a survey of a job with polarity sees them.
    scale = standard([harmonise(picture, "polarity" if "polarity" in rules else "none") for picture in pictures])
    return [
        (rule, [harmonise(picture, rule, scale if "nyul" in rule else "") for picture in pictures]) for rule in rules
    ]


def main(data: Path, out: Path) -> None:
    """Draw both blocks, each image as it is and as the rules leave it, to ``out``."""
    blocks = [rows_of(nuclei(data), NUCLEI), rows_of(smears(data), STAINED)]
    width = sum(len(block[0][1]) * (SIDE + EDGE) + 4 * EDGE for block in blocks)
    height = max(len(block) for block in blocks) * (SIDE + EDGE + TITLE)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left = 2 * EDGE
    for block in blocks:
        for number, (rule, pictures) in enumerate(block):
            top = number * (SIDE + EDGE + TITLE)
            draw.text((left, top + 4), rule, fill="black", font_size=14)
            for place, picture in enumerate(pictures):
                sheet.paste(tile(picture), (left + place * (SIDE + EDGE), top + TITLE))
        left += len(block[0][1]) * (SIDE + EDGE) + 4 * EDGE
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(192).save(out, optimize=True)
    for rule, pictures in blocks[1]:
        places = [lab_of(picture[::2, ::2]).mean((0, 1)) for picture in pictures]
        apart = np.mean([np.linalg.norm(a - b) for k, a in enumerate(places) for b in places[:k]])
        print(f"{rule}: mean colours of the smears lie {apart:.1f} apart in CIELAB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
