"""The commands for whoever releases a model: `consilium export`, `consilium card` and `consilium registry`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from consilium.cli_runs import STORE_HELP
from shared.errors import UserError

_registry = click.option(
    "--registry", "folder", type=Path, default=Path("registry"), show_default=True, help="The folder of releases."
)


@click.command(short_help="Write the model of a run as ONNX, TorchScript or safetensors.")
@click.argument("run", type=Path)
@click.option(
    "--format",
    "formats",
    multiple=True,
    default=("onnx",),
    show_default=True,
    help="onnx, torchscript or safetensors; repeatable.",
)
@click.option("--int8", is_flag=True, help="Also the ONNX file with 8-bit weights.")
@click.option("--images", type=Path, help="Also check on these images; a site.toml: and measure what int8 costs.")
@click.option("--out", type=Path, required=True, help="New or empty folder.")
@click.option(
    "--weights", default="best", show_default=True, help="best: the round best in validation; last: the last one."
)
@click.option(
    "--site-parts", "parts", type=Path, help="A site's own model of this run, to be used instead of the common one."
)
def export(
    run: Path,
    formats: tuple[str, ...],
    int8: bool,
    images: Path | None,
    out: Path,
    weights: str,
    parts: Path | None,
) -> None:
    """Write the model of the run folder RUN so that other programs can run it, with all that they must know.

    Every file is run and compared with the model before anything is written. model.json says how an image becomes the
    input and what the output means; the folder can be loaded as a MONAI bundle.
    """
    from consilium.shipping.export import export as write
    from consilium.trained import whose

    if line := whose(run, parts):
        click.echo(line)
    done = write(run, out, formats, int8, images, weights, parts)
    for name, facts in done.files.items():
        click.echo(f"{out / name}  {facts['bytes'] / 1e6:.2f} MB  {_in_words(facts)}")
    click.echo(f"how to run it: {out / 'model.json'}")


def _in_words(facts: dict[str, object]) -> str:
    """What the check of a file found, in one line."""
    check, int8 = facts.get("check"), facts.get("int8")
    if isinstance(check, dict):
        found = {what: check[key] for key, what in (("random", "random inputs"), ("images", "images"))}
        run = {what: facts for what, facts in found.items() if isinstance(facts, dict)}
        worst = max(facts["largest_difference"] for facts in run.values())
        on = " and ".join(f"{facts['inputs']} {what}" for what, facts in run.items())
        return f"agrees with PyTorch within {worst:.1g} on {on}"
    assert isinstance(int8, dict)
    lost = int8["metric_loss"]
    if isinstance(lost, str):
        return f"metric loss {lost}"
    name, row = next(iter(lost.items()))
    return f"{name} {row['float32']:.3f} → {row['int8']:.3f} on {int8['images']} images"


@click.command(short_help="Write the model card of a run.")
@click.argument("run", type=Path)
@click.option("--out", type=Path, help="The file.  [default: model_card.md in RUN]")
def card(run: Path, out: Path | None) -> None:
    """Write what the run folder RUN tells of its model, by the conventions of model cards, as Markdown.

    What no run tells, such as the use that is meant, is left to be filled in, and said to be.
    """
    from server.card import CARD, model_card
    from shared.files import write_text

    if not (run / "job.toml").is_file():
        raise UserError(f"{run}: no run folder, there is no job.toml in it")
    target = out or run / CARD
    try:
        write_text(target, model_card(run))
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    click.echo(target)


@click.group()
def registry() -> None:
    """Released models, signed, with where they come from; nothing in it is ever changed."""


@registry.command("keygen")
@click.argument("file", type=Path)
def registry_keygen(file: Path) -> None:
    """Make the key that signs releases: FILE stays with the coordinator, FILE.pub goes to whoever verifies."""
    from consilium.signing import keygen

    public, digest = keygen(file)
    click.echo(f"private: {file}\n  keep it off the registry's machine if you can")
    click.echo(f"public: {public}\n  SHA-256 {digest}")


@registry.command("add")
@click.argument("run", type=Path)
@click.option("--name", required=True, help="The model's name.")
@click.option("--version", required=True, help="Its version, never used before.")
@click.option("--key", type=Path, required=True, help="The private key of `consilium registry keygen`.")
@click.option("--files", "also", type=Path, help="A folder whose files belong to the release, such as an export.")
@_registry
def registry_add(run: Path, name: str, version: str, key: Path, also: Path | None, folder: Path) -> None:
    """Release the best model of the finished run RUN."""
    from consilium.registry import add

    entry = add(folder, run, name, version, key, also)
    click.echo(f"{name} {version} released: {len(entry['files'])} files, number {entry['number']}")
    click.echo(f"  {folder / name / version}")


@registry.command("list")
@_registry
def registry_list(folder: Path) -> None:
    """List the releases. Whether they are genuine, `consilium registry verify` says."""
    from consilium.registry import entries

    for entry in entries(folder):
        name = entry["best_metric"]
        row = entry["metrics"].get(name)
        figure = "no test figure"
        if row and row["value"] is not None:
            figure = f"{name} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        spent = entry["privacy"]
        epsilon = f"epsilon {spent['epsilon']:.3g}" if spent else "no DP"
        click.echo(f"{entry['name']} {entry['version']}  {entry['released']}  {entry['task']} {entry['model']}")
        click.echo(f"  {figure}  {entry['sites']} sites  {epsilon}  job {entry['job_sha256'][:12]}")


@registry.command("compare")
@click.argument("run", type=Path)
@click.option("--name", default="", help="The release's name.  [default: the one before RUN]")
@click.option("--version", default="", help="Its version.")
@click.option("--store", default="", envvar="CONSILIUM_STORE", help=STORE_HELP)
@_registry
def registry_compare(run: Path, name: str, version: str, store: str, folder: Path) -> None:
    """Hold the model of RUN against the release before it, on the test sums of the sites that tested both.

    Both runs must be in the store. Exit code 1: they cannot be compared, and why.
    """
    from server.releases import against_release
    from server.tracking.follow import run_in_store

    db, id = run_in_store(run, store)
    found = against_release(db, id, folder, name, version)
    if found is None:
        raise UserError(f"{folder}: holds no release but that of {run} itself")
    click.echo(f"{run} against {found['release']['name']} {found['release']['version']}:")
    if found["why_not"]:
        click.echo(f"cannot be compared: {found['why_not']}")
        sys.exit(1)
    for line in _compared(found):
        click.echo(line)


def _compared(found: dict[str, Any]) -> Iterator[str]:
    """A comparison in lines: each metric of both, the difference, and whether it can be told from chance."""
    from server.wording import metric_name, with_interval

    def words(row: dict[str, Any], metric: str) -> str:
        return with_interval(row["value"], row["low"], row["high"], metric)

    for metric, row in found["metrics"].items():
        told = {"new": "better", "old": "worse", "unclear": "no clear difference"}[row["better"]]
        old, new, gap = (words(row[key], metric) for key in ("old", "new", "difference"))
        yield f"  {metric_name(metric, True)}: {old} → {new}, difference {gap}: {told}"
    images = f"{found['images']['new']:,} now, {found['images']['old']:,} then"
    yield f"on the test images of {', '.join(found['sites'])}: {images}; intervals of differences are wide, not narrow"
    if found["changed"]:
        yield f"note: other test images than then at {', '.join(found['changed'])}"
    if found["left_out"]:
        yield f"left out, as only one of the two was tested there: {', '.join(found['left_out'])}"


@registry.command("verify")
@click.option("--key", type=Path, help="The coordinator's public key, had from elsewhere than the registry.")
@_registry
def registry_verify(folder: Path, key: Path | None) -> None:
    """Is every release as it was signed? Exit code 1: no, and what is not."""
    from consilium.registry import entries, verify

    faults, last, digest = verify(folder, key)
    for fault in faults:
        click.echo(f"{fault.where}: {fault.what}")
    if faults:
        click.echo(f"{folder}: {len(faults)} faults; do not use these models before they are explained")
        sys.exit(1)
    count = len(entries(folder))
    click.echo("the one release is as it was signed" if count == 1 else f"all {count} releases are as they were signed")
    whose = "" if key else " (the registry's own; compare it, or give --key)"
    click.echo(f"SHA-256 of the key{whose}:\n  {digest}")
    click.echo(f"SHA-256 of the last line (keep it: a log cut off at its end shows by it):\n  {last}")
