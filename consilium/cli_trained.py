"""The commands on a trained model: `consilium predict`, `generate`, `explain` and `audit`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_run = click.argument("run", type=Path)
_weights = click.option(
    "--weights", default="best", show_default=True, help="best: the round best in validation; last: the last one."
)
_parts = click.option(
    "--site-parts", "parts", type=Path, help="A site's own model of this run, to be used instead of the common one."
)
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
_own = click.option(
    "--site",
    type=Path,
    help="The hospital's site.toml; asked for only where the job's data.harmonise has a rule of the site.",
)


def _say_whose(run: Path, parts: Path | None) -> None:
    from consilium.trained import whose

    if line := whose(run, parts):
        click.echo(line)


@click.command(short_help="Predict images with the model of a run.")
@_run
@click.argument("path", type=Path)
@click.option("--out", type=Path, required=True, help="New or empty folder for the predictions.")
@_own
@_weights
@_parts
@_device
def predict(run: Path, path: Path, out: Path, site: Path | None, weights: str, parts: Path | None, device: str) -> None:
    """Predict the image PATH, or every image in the folder PATH, with the model of the run folder RUN.

    Labels are written as CSV, boxes as COCO json, masks as PNG, NIfTI or, of DICOM images, DICOM SEG. What cannot be
    read is named. Exit code 0: done. Exit code 1: not one image could be read. Exit code 2: the question was wrong.
    """
    from consilium.predict import predict as predict_all
    from consilium.progress import counting
    from shared.imaging.errors import explained

    _say_whose(run, parts)
    with counting("predicting") as progress:
        done = predict_all(run, path, out, weights, device, progress, site, parts)
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
@_own
@_weights
@_parts
@_device
def explain(
    run: Path,
    image: Path,
    method: str,
    name: str,
    out: Path,
    site: Path | None,
    weights: str,
    parts: Path | None,
    device: str,
) -> None:
    """Draw what the answer of the model in the run folder RUN depends on in one image, or the boxes it finds there.

    Orange speaks for the class, blue against it. It shows what the score depends on, not whether that is right.
    """
    from consilium.explain import explain as draw

    _say_whose(run, parts)
    drawn = draw(run, image, out, method, name, weights, device, site, parts)
    for line in drawn.caption:
        click.echo(line)
    click.echo(drawn.file)


@click.command(short_help="For the hospital: what a run tells of your images.")
@_run
@click.option("--site", type=Path, required=True, help="The site.toml of the site whose images were trained on.")
@click.option("--shadows", type=int, default=8, show_default=True, help="Models that LiRA compares with; 0: no LiRA.")
@click.option("--steps", type=int, help="Gradient steps of each of them.  [default: as one site's in the run]")
@click.option(
    "--inversion-steps", type=int, default=1000, show_default=True, help="For each rebuilt image; 0: no inversion."
)
@click.option("--out", type=Path, help="FILE.html, or a folder.  [default: .consilium/audit/RUN beside the site.toml]")
@_weights
@_device
def audit(
    run: Path,
    site: Path,
    shadows: int,
    steps: int | None,
    inversion_steps: int,
    out: Path | None,
    weights: str,
    device: str,
) -> None:
    """Attack the model of the run folder RUN with your own images: can it be told who was trained on, or an image be
    rebuilt from an update?

    All of it runs on this machine and stays here; see docs/audit.md for what the figures mean. Only if site.toml says
    audit_in_model_card = true, the figures, without a picture, are written to RUN, too.
    """
    from consilium.audit import audit as measure
    from consilium.audit_page import default_folder, print_audit, write_audit, write_for_card
    from consilium.progress import counting

    with counting("auditing") as progress:
        found = measure(run, site, shadows, steps, inversion_steps, weights, device, progress)
    print_audit(found)
    for file in write_audit(found, out or default_folder(run, site)):
        shows = " (shows a patient's image)" if found.rebuilt and file.suffix != ".json" else ""
        click.echo(f"stays at the site: {file}{shows}")
    card = write_for_card(found, run)
    click.echo(f"for the model card, figures only: {card}" if card else "nothing was written to the run")
