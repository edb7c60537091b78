"""`consilium export`: a run's model as files for other programs, each checked by running it, with all that is needed.

FOLDER/model.json            the sidecar: inputs, outputs, pre-processing, classes, checks, digests
FOLDER/models/               model.onnx, model.int8.onnx, model.ts, model.safetensors
FOLDER/configs/, docs/       as MONAI's bundles have them; docs/README.md is the run's model card
FOLDER/job.toml              the job
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from consilium.predict import filled_whole, find_cases
from consilium.shipping.bundle import SIDECAR, inference, metadata
from consilium.shipping.check import TOLERANCE, Compared, on_images, on_random
from consilium.shipping.formats import FORMATS, opset, read_network, require_onnx
from consilium.shipping.graph import Graph, Spec, spec_of
from consilium.shipping.quantise import FILE as INT8
from consilium.shipping.quantise import loss_of, write_int8
from consilium.shipping.sidecar import inputs_facts, outputs_facts, postprocessing, preprocessing
from consilium.trained import TrainedModel, facts_of, open_run
from server.card import model_card
from server.markdown import plain
from server.store import write_json
from shared.config import Job, load_job, nearest
from shared.errors import SiteRefusal, UserError
from shared.files import write_text
from shared.imaging.dataset import Dataset, load_dataset
from shared.rules import site_rule
from shared.samples import read_samples
from shared.sitefile import read_site

MOST_IMAGES = 200  # images that a file is checked on; metrics are of all


class Images(NamedTuple):
    """Decoded images to check on, and whether they have labels."""

    data: Dataset
    labelled: bool


class Exported(NamedTuple):
    """What was written, and what the sidecar says of each file."""

    folder: Path
    files: dict[str, dict[str, Any]]


def export(
    run: Path,
    out: Path,
    formats: Sequence[str] = ("onnx",),
    int8: bool = False,
    images: Path | None = None,
    weights: str = "best",
    parts: Path | None = None,
) -> Exported:
    """Write the model of ``run`` to ``out`` in some of FORMATS; all files appear at once, or none.

    ``images``: a file or folder of images, or a site.toml, whose test images have labels, too: each file is run on them
    as well as on random inputs, and must agree with the PyTorch network within TOLERANCE. ``parts``: a site's own model
    of the run, to be written instead of the common one.

    Raises:
        UserError: no run, no such format, a network that cannot be had in it, or a file that does not agree; one line.
    """
    _check_asked(formats, int8)
    trained = open_run(run, weights, "cpu", parts)
    job = trained.job
    spec = spec_of(job, trained.model)
    graph = Graph(trained.model, job, spec).eval()
    with filled_whole(out, SIDECAR, "an export") as work:
        given = None if images is None else _decoded(trained, images, work / ".cache")
        files: dict[str, dict[str, Any]] = {}
        (work / "models").mkdir()
        for name in dict.fromkeys(formats):
            files[f"models/{FORMATS[name].file}"] = _written(name, graph, trained, spec, given, work)
        if int8:
            files[f"models/{INT8}"] = _quantised(trained, spec, given, work)
        write_text(work / "configs" / "inference.json", _json(inference(job, spec, tuple(formats))))
        write_text(work / "configs" / "metadata.json", _json(metadata(job, spec, facts_of(trained))))
        write_text(work / "docs" / "README.md", _readme(run, trained, weights))
        # Of a file of starting weights nothing is needed here, and its path is this machine's.
        write_text(work / "job.toml", job.replace(model__weights="", model__freeze="none").toml())
        write_json(work / SIDECAR, _sidecar(trained, spec, files))
    return Exported(out, files)


def _check_asked(formats: Sequence[str], int8: bool) -> None:
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format {name}: must be one of {', '.join(FORMATS)}{nearest(name, FORMATS)}")
    if not formats:
        raise UserError(f"--format: name one or more of {', '.join(FORMATS)}")
    if int8 and "onnx" not in formats:
        raise UserError("--int8: onnxruntime quantises ONNX files; add --format onnx")
    if "onnx" in formats:
        require_onnx()


def _decoded(trained: TrainedModel, images: Path, cache: Path) -> Images:
    """The images to check on: of a site.toml the test images, or all where it has none."""
    job = trained.job
    if job.task == "generation":
        raise UserError("--images: a generator takes none; leave it out")
    try:
        if images.suffix == ".toml":
            site = dataclasses.replace(read_site(images), cache=cache)
            data = load_dataset(list(read_samples(site, job)), site, job)
            data = data.subset("test") if len(data.subset("test")) else data
        else:
            if site_rule(job.data.harmonise):
                raise UserError(
                    f"--images {images}: data.harmonise = {job.data.harmonise!r} needs the scale of the hospital the "
                    "images are from; name its site.toml"
                )
            site, samples = find_cases(trained, images)
            data = load_dataset(samples, dataclasses.replace(site, cache=cache), job)
    except SiteRefusal as refusal:
        raise UserError(f"--images {images}: {refusal}") from None
    if not len(data):
        raise UserError(f"--images {images}: not one image could be read")
    return Images(data, images.suffix == ".toml")


def _first(data: Dataset) -> Dataset:
    """As many images as a check takes."""
    rows = list(range(min(len(data), MOST_IMAGES)))
    columns = {name: column.rows(rows) for name, column in data.columns.items()}
    return Dataset(columns, data.samples[: len(rows)], origin=data)


def _written(
    name: str, graph: Graph, trained: TrainedModel, spec: Spec, given: Images | None, work: Path
) -> dict[str, Any]:
    """Write one format, run it and compare; its facts for the sidecar."""
    form, job = FORMATS[name], trained.job
    path = work / "models" / form.file
    try:
        form.write(graph, job, spec, path)
        run = form.load(path, job, spec)
        random = on_random(graph, run, job, spec)
        real = on_images(trained.model, run, job, spec, _first(given.data)) if given else None
    except Exception as error:  # torch's exporters and onnxruntime raise what they like
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--format {name}: {job.model.name} of {job.task} cannot be exported: {first}") from None
    _require(name, random, "random inputs")
    if real:
        _require(name, real, "the images given")
    return {
        "format": name,
        **({"opset": opset(path)} if name == "onnx" else {}),
        **_digest(path),
        "check": {
            "against": f"PyTorch {torch.__version__}, on the CPU",
            "measure": "largest |a - b| / max(1, |b|) over all outputs",
            "tolerance": TOLERANCE,
            "random": _found(random, job),
            "images": _found(real, job) if real else "none were given",
        },
    }


def _found(compared: Compared, job: Job) -> dict[str, Any]:
    facts = compared.facts()
    if job.task == "detection" and not compared.numbers:
        facts["remark"] = "not one box was found by either: say --images to compare where there are objects"
    return facts


def _require(name: str, compared: Compared, where: str) -> None:
    if not compared.passed:
        raise UserError(
            f"--format {name}: on {where} the file differs from the PyTorch model by {compared.difference:.2g}, more "
            f"than {TOLERANCE:g}; nothing was written"
        )


def _quantised(trained: TrainedModel, spec: Spec, given: Images | None, work: Path) -> dict[str, Any]:
    source, target = work / "models" / FORMATS["onnx"].file, work / "models" / INT8
    write_int8(source, target)
    try:
        lost = loss_of(
            source,
            target,
            trained.model,
            trained.job,
            spec,
            given.data if given else None,
            bool(given and given.labelled),
        )
    except Exception as error:  # onnxruntime raises what it likes where a network has a part that it cannot run
        raise UserError(f"--int8: onnxruntime cannot run what it quantised: {str(error).splitlines()[0]}") from None
    return {"format": "onnx", "opset": opset(target), **_digest(target), "int8": lost}


def _digest(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _readme(run: Path, trained: TrainedModel, weights: str) -> str:
    """The run's card; where these are not the weights that were tested it says so first."""
    card, site = model_card(run), trained.facts.get("site", "")
    if weights == "best" and not site:
        return card
    head, _, rest = card.partition("\n# ")
    said = f"These files hold the last round's weights, of round {trained.facts.get('round', '?')}; the figures below"
    said = f"{said} are of the best round's."
    if site:
        said = f"These files hold the own model of the site {plain(site)}, not the common one."
    title, _, body = rest.partition("\n")
    return f"{head}\n# {title}\n\n**{said}**\n{body}"


def _sidecar(trained: TrainedModel, spec: Spec, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    job = trained.job
    facts = facts_of(trained) | {"weights": trained.file.name, "weights_sha256": _digest(trained.file)["sha256"]}
    return {
        "about": "How to run this model without Consilium; see docs/README.md for what it is and is not.",
        "model": {"name": job.name, "network": facts.pop("model"), **facts},
        "inputs": inputs_facts(spec),
        "outputs": outputs_facts(spec),
        "preprocessing": preprocessing(job, spec),
        "postprocessing": postprocessing(job),
        "files": files,
    }


def _json(content: object) -> str:
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"


def load_network(folder: str | Path) -> nn.Module:
    """The network of an exported folder that has a safetensors file, ready to run: what its inference.json names.

    Raises:
        UserError: there is none, or it is of another network.
    """
    path = Path(folder) / "models" / FORMATS["safetensors"].file
    if not path.is_file():
        raise UserError(f"{path}: no such file; export with --format safetensors")
    return read_network(path, load_job(Path(folder) / "job.toml"))
