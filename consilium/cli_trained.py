"""The commands on a trained model: `consilium predict`, `consilium generate` and `consilium explain`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_run = click.argument("run", type=Path)
_weights = click.option(
    "--weights", default="best", show_default=True, help="best: the round best in validation; last: the last one."
)
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")


@click.command(short_help="Predict images with the model of a run.")
@_run
@click.argument("path", type=Path)
@click.option("--out", type=Path, required=True, help="New or empty folder for the predictions.")
@_weights
@_device
def predict(run: Path, path: Path, out: Path, weights: str, device: str) -> None:
    """Predict the image PATH, or every image in the folder PATH, with the model of the run folder RUN.

    Labels are written as CSV, boxes as COCO json, masks as PNG, NIfTI or, of DICOM images, DICOM SEG. What cannot be
    read is named. Exit code 0: done. Exit code 1: not one image could be read. Exit code 2: the question was wrong.
    """
    from consilium.predict import predict as predict_all
    from consilium.progress import counting
    from shared.imaging.errors import explained

    with counting("predicting") as progress:
        done = predict_all(run, path, out, weights, device, progress)
    for item in done.unreadable:
        folder = path if path.is_dir() else path.parent
        click.echo(f"cannot be read: {explained(item.path, item.code, item.detail, folder)}")
    ending = f", {len(done.unreadable)} cannot be read" if done.unreadable else ""
    where = f"; {done.files[0] if len(done.files) == 1 else out}" if done.cases else ""
    click.echo(f"{done.cases} of {done.cases + len(done.unreadable)} cases predicted{ending}{where}")
    sys.exit(0 if done.cases else 1)


@click.command(short_help="Invent images with the generator of a run.")
@_run
@click.option("--count", type=click.IntRange(1), required=True, help="How many images.")
@click.option("--out", type=Path, required=True, help="New or empty folder for the images.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same images.")
@_weights
@_device
def generate(run: Path, count: int, out: Path, seed: int, weights: str, device: str) -> None:
    """Invent images with the generator of the run folder RUN."""
    from consilium.generate import generate_images
    from consilium.progress import counting

    with counting("drawing") as progress:
        files = generate_images(run, count, out, seed, weights, device, progress)
    click.echo(f"{len(files)} invented images in {out}")


@click.command(short_help="Draw what a model looked at in an image.")
@_run
@click.option("--image", type=Path, required=True, help="The image; or the folder of a series or of frames.")
@click.option("--method", default="", help="gradcam, integrated-gradients or occlusion.  [default: gradcam]")
@click.option("--class", "name", default="", help="The class asked about.  [default: the likeliest]")
@click.option("--out", type=Path, required=True, help="A PNG file, or a folder for one.")
@_weights
@_device
def explain(run: Path, image: Path, method: str, name: str, out: Path, weights: str, device: str) -> None:
    """Draw what the answer of the model in the run folder RUN depends on in one image, or the boxes it finds there.

    Orange speaks for the class, blue against it. It shows what the score depends on, not whether that is right.
    """
    from consilium.explain import explain as draw

    drawn = draw(run, image, out, method, name, weights, device)
    for line in drawn.caption:
        click.echo(line)
    click.echo(drawn.file)
