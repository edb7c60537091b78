"""The commands for whoever releases a model: `consilium export`, `consilium card` and `consilium registry`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

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
    from server.store import write_text
    from shared.errors import UserError

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
    click.echo(f"private: {file}  (keep it off the registry's machine if you can)")
    click.echo(f"public:  {public}  SHA-256 {digest}")


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
    click.echo(
        f"{name} {version} released: {folder / name / version}, {len(entry['files'])} files, number {entry['number']}"
    )


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
        click.echo(
            f"{entry['name']} {entry['version']}  {entry['released']}  {entry['task']} {entry['model']}  {figure}  "
            f"{entry['sites']} sites  {epsilon}  job {entry['job_sha256'][:12]}"
        )


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
    click.echo(f"key SHA-256 {digest}" + ("" if key else "  (the registry's own; compare it, or give --key)"))
    click.echo(f"last line SHA-256 {last}  (keep it: a log cut off at its end shows by it)")
