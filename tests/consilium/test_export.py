"""`consilium export`: what is written runs without Consilium and says what the PyTorch model says.

The oracle is the task's network with the run's weights, run here by hand; files are opened with onnxruntime, torch.jit
and safetensors, not with Consilium's own code.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from consilium.cli import main
from consilium.predict import predict
from consilium.shipping import export as exporting
from consilium.shipping.check import Compared, compare, tensors
from consilium.shipping.export import export, load_network
from consilium.shipping.formats import FORMATS, Format
from consilium.shipping.harmonising import harmonising
from server.store import write_model
from shared import __version__
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.files import write_text
from shared.imaging.dataset import Dataset, load_dataset
from shared.rules import RULES
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import TASKS, load_task
from shared.weights import exchanged

CPU = torch.device("cpu")
LARGE = ("resnet50", "densenet121", "vgg16", "fcn_resnet50", "fasterrcnn_mobilenet", "fasterrcnn_resnet50", "retinanet")
EVERY = [
    pytest.param(task, name, marks=pytest.mark.slow if name in LARGE else (), id=f"{task}-{name}")
    for task in TASKS
    for name in load_task(task).MODELS
]


def examples(task: str) -> ModuleType:
    """``examples_<task>.py`` of the tests of all models."""
    path = Path(__file__).parents[1] / "shared" / "tasks" / f"examples_{task}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def job_of(task: str, name: str, **more: Any) -> Job:
    flat = {"name": "small", "task": task, "model.name": name, "train.device": "cpu"} | examples(task).JOBS[name]
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def saved(folder: Path, job: Job, seed: int = 0) -> tuple[Path, torch.nn.Module]:
    """A run folder of a network none of whose parameters is as it started, so that nothing is zero or one by chance.

    What decides is spread out: of an untrained detector no box has a score worth keeping.
    """
    model = load_task(job.task).build_model(job)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not value.requires_grad:
                continue  # a frozen backbone is that of the weights it was given
            value.add_(torch.randn(value.shape, generator=generator) * 0.05 * value.abs().mean().clamp(min=0.02))
            if name.endswith("cls_logits.bias"):
                value.fill_(-0.5)
            if name.endswith("cls_logits.weight"):
                value.mul_(4)  # else all boxes are as sure as each other, and chance says which are kept
        for name, value in model.named_buffers():  # what BatchNorm and the generator's average hold
            if value.is_floating_point() and not name.startswith("reference."):
                value.mul_(1 + 0.1 * torch.rand(value.shape, generator=generator))
    write_text(folder / "job.toml", job.toml())
    facts = {"job": job.sha256, "round": "7", "version": __version__, "model": job.model.name}
    write_model(folder / "model.safetensors", exchanged(model, job), facts)
    return folder, model.eval()


def raw_inputs(job: Job, batch: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Random inputs as the sidecar asks for them: images in [0, 1]; other sizes than any that was exported with."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for value in load_task(job.task).example(job):
        shape = [batch, *value.shape[1:]]
        if job.task == "segmentation":
            shape[2:] = [side + 8 for side in shape[2:]]
        if job.task == "sequence" and value.ndim > 1:
            shape[1] = 5
        if job.task == "generation" and value.is_floating_point():
            found.append(torch.randn(shape, generator=generator))
        elif value.is_floating_point():
            found.append(torch.rand(shape, generator=generator))
        elif job.task == "sequence":
            found.append(torch.tensor([5, 2, 1][:batch]))
        else:
            found.append(torch.randint(0, len(job.classes), (batch,), generator=generator))
    return tuple(found)


@torch.inference_mode()
def by_pytorch(model: torch.nn.Module, job: Job, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the network says of images in [0, 1], normalised here by hand: these jobs all have (x - 0.5) / 0.25."""
    first, *rest = inputs
    if job.task != "generation" and not (job.task == "sequence" and first.ndim == 3):
        first = (first - 0.5) / 0.25
    if job.task == "detection":
        found = model([first[0]])[0]
        return [found["boxes"], found["labels"], found["scores"]]
    if job.task == "reconstruction":
        return [model(first)[0] * 0.25 + 0.5]
    return tensors(model(first, *rest))


def by_onnxruntime(file: Path, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    named = {item.name: value.numpy() for item, value in zip(session.get_inputs(), inputs, strict=False)}
    return [torch.from_numpy(value) for value in session.run(None, named)]


@torch.inference_mode()
def by_torchscript(file: Path, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    module = torch.jit.load(str(file)).eval()  # type: ignore[no-untyped-call]
    return tensors(module(*inputs))


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [value.shape for value in found] == [value.shape for value in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "name"), EVERY)
def test_every_model_of_every_task_says_the_same_in_every_format(task: str, name: str, tmp_path: Path) -> None:
    job = job_of(task, name)
    run, model = saved(tmp_path / "run", job)
    images = None if task == "generation" else examples(task).site(tmp_path / "site", job, "a", 8, 0)
    done = export(run, tmp_path / "out", tuple(FORMATS), images=images)
    assert {path.name for path in (tmp_path / "out" / "models").iterdir()} == {form.file for form in FORMATS.values()}
    one = task == "detection"
    for seed, batch in enumerate((1,) if one else (1, 3)):
        inputs = raw_inputs(job, batch, seed)
        taken = inputs[:1] if task == "generation" and not job.model.conditional else inputs
        expected = by_pytorch(model, job, inputs)
        assert all(value.numel() for value in expected), "nothing is compared"
        close(by_onnxruntime(tmp_path / "out" / "models" / "model.onnx", taken), expected)
        close(by_torchscript(tmp_path / "out" / "models" / "model.ts", taken), expected)
        with torch.inference_mode():
            close(tensors(load_network(tmp_path / "out")(*taken)), expected)
    weights = load_file(tmp_path / "out" / "models" / "model.safetensors")
    own = model.state_dict()
    assert weights.keys() <= own.keys()
    assert all(torch.equal(value, own[name]) for name, value in weights.items())
    onnx.checker.check_model(str(tmp_path / "out" / "models" / "model.onnx"), full_check=True)
    for facts in done.files.values():
        checks = [facts["check"]["random"]] + ([facts["check"]["images"]] if images else [])
        assert all(0 <= check["largest_difference"] <= 1e-4 for check in checks)
        assert all(check["inputs"] and check["numbers_compared"] for check in checks)


VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "odd sides, instance norm": ("segmentation", "unet", {"data__size": 19, "model__norm": "instance"}),
    "volumes of odd sides, instance norm": (
        "segmentation",
        "unet3d",
        {"data__size": 21, "data__depth": 5, "model__norm": "instance"},
    ),
    "odd side": ("classification", "cnn", {"data__size": 33}),
    "colour, normalised as ImageNet": ("classification", "cnn", {"data__channels": 3, "data__normalise": "imagenet"}),
    "each image normalised by itself": ("classification", "cnn", {"data__normalise": "image"}),
    "volumes normalised each by itself": ("segmentation", "unet3d", {"data__normalise": "image"}),
    "rebuilt, each normalised by itself": ("reconstruction", "vae", {"data__normalise": "image", "data__size": 21}),
    "films normalised each by itself": ("sequence", "cnn_gru", {"data__normalise": "image"}),
    "signals normalised each by itself": ("sequence", "lstm", {"data__normalise": "image"}),
    "several labels": ("classification", "cnn", {"data__multilabel": True}),
    "bfloat16 in training": ("segmentation", "unet", {"train__precision": "bfloat16"}),
    "colour boxes": ("detection", "fasterrcnn_small", {"data__channels": 3, "data__normalise": "imagenet"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_a_site_give_what_the_task_itself_gives(variant: str, tmp_path: Path) -> None:
    """The exported file in the place of the network, in the task's own prediction of decoded files."""
    task, name, more = VARIANTS[variant]
    job = job_of(task, name, **more)
    run, _ = saved(tmp_path / "run", job)
    site = examples(task).site(tmp_path / "site", job, "a", 8, 0)
    done = export(run, tmp_path / "out", ("onnx", "torchscript"), images=site)
    for facts in done.files.values():
        assert facts["check"]["images"]["largest_difference"] <= 1e-4
        assert facts["check"]["images"]["inputs"] >= 1
        assert facts["check"]["images"]["numbers_compared"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_generator_that_is_told_the_class_has_it_as_an_input(tmp_path: Path) -> None:
    job = job_of("generation", "dcgan", model__conditional=True)
    run, model = saved(tmp_path / "run", job)
    export(run, tmp_path / "out", ("onnx",))
    inputs = raw_inputs(job, 3, 0)
    close(by_onnxruntime(tmp_path / "out" / "models" / "model.onnx", inputs), by_pytorch(model, job, inputs))
    other = (inputs[0], (inputs[1] + 1) % len(job.classes))
    found = by_onnxruntime(tmp_path / "out" / "models" / "model.onnx", other)[0]
    assert not torch.allclose(found, by_pytorch(model, job, inputs)[0], atol=1e-3)


@pytest.mark.parametrize("fusion", ["early", "late"])
@pytest.mark.filterwarnings("ignore")
def test_cases_of_several_images_and_numbers_some_of_them_missing(fusion: str, tmp_path: Path) -> None:
    more = {"data__modalities": "pa,lateral", "data__tabular": "age,sex", "data__missing": "zero"}
    job = job_of("classification", "cnn", model__fusion=fusion, **more)
    run, model = saved(tmp_path / "run", job)
    export(run, tmp_path / "out", ("onnx", "torchscript"))
    side = job.data.size
    images = torch.rand(2, 2, side, side, generator=torch.Generator().manual_seed(0))
    flags = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    values = torch.tensor([[71.0, float("nan")], [3.5, 1.0]])
    planes = flags[:, :, None, None].expand(-1, -1, side, side)
    wanted = torch.where(planes > 0, torch.zeros(()), (images - 0.5) / 0.25)  # a missing image is 0 to the network
    with torch.inference_mode():
        expected = [model(torch.cat([wanted, planes], 1), values)]
    sidecar = json.loads((tmp_path / "out" / "model.json").read_text())
    (stack,) = [step for step in sidecar["preprocessing"] if step["step"] == "stack"]
    gap = torch.tensor(stack["fill_missing_with"])
    given = torch.cat([torch.where(planes > 0, gap, images), planes], 1)
    close(by_onnxruntime(tmp_path / "out" / "models" / "model.onnx", (given, values)), expected)
    close(by_torchscript(tmp_path / "out" / "models" / "model.ts", (given, values)), expected)


# --- the sidecar is enough --------------------------------------------------------------------------------------------


def step_of(sidecar: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(step for step in sidecar["preprocessing"] if step["step"] == name)
    return found


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis, keepdims=True))
    found: np.ndarray = shares / shares.sum(axis, keepdims=True)
    return found


def fitted(path: Path, size: list[int]) -> np.ndarray:
    """A grey PNG by the words of the step ``fit``, with Pillow."""
    picture = Image.fromarray(np.asarray(Image.open(path).convert("L"), np.float32) / 255)
    scale = min(size[0] / picture.height, size[1] / picture.width)
    height, width = round(picture.height * scale), round(picture.width * scale)
    small = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)).clip(0, 1)
    found = np.zeros(size, np.float32)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    found[top : top + height, left : left + width] = small
    return found


@pytest.mark.parametrize("normalise", ["fixed", "image"])
@pytest.mark.filterwarnings("ignore")
def test_by_the_sidecar_alone_pillow_and_onnxruntime_predict_as_consilium_does(normalise: str, tmp_path: Path) -> None:
    job = job_of("classification", "cnn", data__size=40, data__normalise=normalise)
    run, _ = saved(tmp_path / "run", job)
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number, shape in enumerate(((64, 48), (30, 80), (40, 40), (17, 9))):
        rough = Image.fromarray(generator.integers(0, 256, (8, 8)).astype(np.uint8)).resize(shape[::-1])
        rough.save(tmp_path / "images" / f"{number}.png")
    export(run, tmp_path / "out", ("onnx",), images=tmp_path / "images")
    predict(run, tmp_path / "images", tmp_path / "predicted")
    with (tmp_path / "predicted" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    sidecar = json.loads((tmp_path / "out" / "model.json").read_text())
    classes = sidecar["postprocessing"]["classes"]
    step = step_of(sidecar, "normalise")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "models" / "model.onnx"))
    for row in rows:
        image = fitted(tmp_path / "images" / row["path"], step_of(sidecar, "fit")["size"])
        if not step["in_model"]:
            image = (image - image.mean()) / (image.std(ddof=1) + step["epsilon"])
        assert sidecar["inputs"][0]["name"] == "image"
        (logits,) = session.run(None, {"image": image[None, None].astype(np.float32)})
        shares = softmax(logits)[0]
        assert shares.tolist() == pytest.approx([float(row[f"probability:{name}"]) for name in classes], abs=2e-3)
        assert row["label"] == classes[int(shares.argmax())]
    assert len({row["probability:left"] for row in rows}) == 4


def rescaled(picture: np.ndarray, sidecar: dict[str, Any]) -> np.ndarray:
    """A grey picture after the rules of the sidecar, by its words and numbers."""
    for step in sidecar["preprocessing"]:
        if step["step"] == "polarity":
            picture = 1 - picture if ((picture - picture.mean()) ** 3).mean() < 0 else picture
        elif step["step"] == "zscore":
            low, high = picture.mean() + picture.std() * step["sds"] * np.array([-1, 1])
            picture = ((picture - low) / (high - low)).clip(0, 1)
        elif step["step"] == "percentiles":
            low, high = np.percentile(picture, step["percentiles"])
            picture = ((picture - low) / (high - low)).clip(0, 1)
        elif step["step"] == "nyul":
            ends = np.percentile(picture[picture > 0], step["percentiles"])
            picture = np.interp(picture, [0, *ends, picture.max()], [0, *step["landmarks"], 1])
    return picture


@pytest.mark.parametrize("rules", ["polarity,zscore", "percentiles", "polarity,nyul"])
@pytest.mark.filterwarnings("ignore")
def test_by_the_sidecar_alone_images_are_harmonised_as_consilium_does(rules: str, tmp_path: Path) -> None:
    more = {"data__landmarks": "0.02 0.1 0.16 0.22 0.3 0.38 0.46 0.55 0.65 0.8 0.95"} if "nyul" in rules else {}
    job = job_of("classification", "cnn", data__size=40, data__harmonise=rules, **more)
    run, _ = saved(tmp_path / "run", job)
    (tmp_path / "images").mkdir()
    rough = np.random.default_rng(0).beta(2, 5, (40, 40))
    for number, picture in enumerate((rough, 1 - rough, rough * 0.5 + 0.2)):
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
    export(run, tmp_path / "out", ("onnx",), images=tmp_path / "images")
    predict(run, tmp_path / "images", tmp_path / "predicted")
    with (tmp_path / "predicted" / "predictions.csv").open() as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    sidecar = json.loads((tmp_path / "out" / "model.json").read_text())
    assert [step["step"] for step in sidecar["preprocessing"]][1 : 1 + len(rules.split(","))] == rules.split(",")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "models" / "model.onnx"))
    for number in range(3):
        picture = np.asarray(Image.open(tmp_path / "images" / f"{number}.png")) / 255
        image = rescaled(picture, sidecar)
        assert np.abs(image - picture).max() > 0.05
        (logits,) = session.run(None, {"image": image[None, None].astype(np.float32)})
        row = rows[f"{number}.png"]
        names = sidecar["postprocessing"]["classes"]
        assert softmax(logits)[0].tolist() == pytest.approx(
            [float(row[f"probability:{name}"]) for name in names], abs=2e-3
        )


def test_every_rule_has_its_words_and_numbers_in_the_sidecar() -> None:
    landmarks = "0.02 0.1 0.16 0.22 0.3 0.38 0.46 0.55 0.65 0.8 0.95"
    for rule in RULES:
        job = job_of("classification", "cnn", data__channels=3).replace(
            data__harmonise=rule, data__landmarks=landmarks if rule == "nyul" else ""
        )
        (step,) = harmonising(job)
        assert step["step"] == rule
        assert len(step["how"]) > 40
        assert ("training images of the hospital" in step["how"]) == rule.startswith("site-")


def test_with_a_rule_of_the_site_images_come_with_their_site(tmp_path: Path) -> None:
    run, _ = saved(tmp_path / "run", job_of("classification", "cnn", data__harmonise="site-zscore"))
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match=r"name its site\.toml"):
        export(run, tmp_path / "out", ("torchscript",), images=tmp_path / "images")


@pytest.mark.filterwarnings("ignore")
def test_by_the_sidecar_alone_a_mask_of_odd_sides_is_that_of_consilium(tmp_path: Path) -> None:
    job = job_of("segmentation", "unet")
    run, _ = saved(tmp_path / "run", job)
    pixels = np.random.default_rng(1).integers(0, 256, (19, 27)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    export(run, tmp_path / "out", ("onnx",))
    predict(run, tmp_path / "images", tmp_path / "predicted")
    expected = np.asarray(Image.open(tmp_path / "predicted" / "a.png"))
    sidecar = json.loads((tmp_path / "out" / "model.json").read_text())
    step = step_of(sidecar, "pad")
    sides = zip(pixels.shape, step["multiples"], step["least"], strict=True)
    grown = [max(low, -(-side // unit) * unit) for side, unit, low in sides]
    assert pixels.size <= step["whole_up_to_patches"] * np.prod(step["patch"])
    extra = [(0, want - side) for side, want in zip(pixels.shape, grown, strict=True)]
    image = np.pad(pixels.astype(np.float32) / 255, extra, mode="edge")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "models" / "model.onnx"))
    logits = session.run(["logits"], {"image": image[None, None]})[0][0, :, :19, :27]
    assert np.array_equal(logits.argmax(0), expected)
    assert len(np.unique(expected)) > 1


# --- a file that does not agree ---------------------------------------------------------------------------------------


def replaced(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """ONNX files are changed right after they are written."""
    form = FORMATS["onnx"]

    def write(*args: Any) -> None:
        form.write(*args)
        change(args[-1])

    monkeypatch.setitem(exporting.FORMATS, "onnx", Format(write, form.load, form.file))


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_differs_in_one_weight_is_not_written(
    tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nudge(path: Path) -> None:
        model = onnx.load(str(path))
        (bias,) = [item for item in model.graph.initializer if item.name.endswith("head.bias")]
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(5e-3), bias.name))
        onnx.save(model, str(path))

    replaced(monkeypatch, nudge)
    run, _ = saved(tmp_path / "run", tiny_job)
    with pytest.raises(UserError, match=r"differs from the PyTorch model by 0\.00\d+, more than 0\.0001; nothing"):
        export(run, tmp_path / "out", ("torchscript", "onnx"))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_cannot_be_run_is_not_written(
    tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(monkeypatch, lambda path: path.write_bytes(path.read_bytes()[:-200]))
    run, _ = saved(tmp_path / "run", tiny_job)
    with pytest.raises(UserError, match=r"--format onnx: cnn of classification cannot be exported: "):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_measure_sees_shapes_and_what_is_not_finite_and_no_order_of_boxes(tiny_job: Job) -> None:
    a = torch.tensor([[1.0, 200.0]])
    assert compare([([a + torch.tensor([[0.0, 0.02]])], [a])], tiny_job).difference == pytest.approx(1e-4, rel=1e-2)
    assert not compare([([a[:, :1]], [a])], tiny_job).passed
    assert not compare([([a * float("nan")], [a])], tiny_job).passed
    assert not compare([], tiny_job).passed
    assert Compared(1, 1, 1e-4).passed
    assert not Compared(1, 1, 1.01e-4).passed
    job = job_of("detection", "fasterrcnn_small")
    boxes = torch.tensor([[0.0, 0, 5, 5], [1.0, 1, 9, 9]])
    labels, scores = torch.tensor([1, 2]), torch.tensor([0.5, 0.5])
    turned = [boxes.flip(0), labels.flip(0), scores]
    assert compare([(turned, [boxes, labels, scores])], job).difference == 0
    assert not compare([([boxes.flip(0), labels, scores], [boxes, labels, scores])], job).passed


# --- 8 bits -----------------------------------------------------------------------------------------------------------


def labelled(tmp_path: Path, job: Job, task: str, n: int = 24) -> tuple[Path, Dataset]:
    file = examples(task).site(tmp_path / "site", job, "a", n, 0)
    site = read_site(file)
    return file, load_dataset(read_samples(site, job), site, job).subset("test")


@pytest.mark.parametrize(
    ("task", "name"),
    [("classification", "cnn"), ("segmentation", "unet"), ("sequence", "lstm"), ("reconstruction", "autoencoder")],
)
@pytest.mark.filterwarnings("ignore")
def test_what_8_bits_cost_is_measured_on_labelled_images(task: str, name: str, tmp_path: Path) -> None:
    job = job_of(task, name)
    run, model = saved(tmp_path / "run", job)
    file, data = labelled(tmp_path, job, task)
    export(run, tmp_path / "out", ("onnx",), int8=True, images=file)
    told = json.loads((tmp_path / "out" / "model.json").read_text())["files"]["models/model.int8.onnx"]["int8"]
    collected = load_task(task).summarise(load_task(task).collect(model, data, job, CPU), job)
    expected = {metric: found.value for metric, found in collected.items() if found.n}
    assert set(told["metric_loss"]) == set(expected)
    for metric, row in told["metric_loss"].items():
        assert row["float32"] == pytest.approx(expected[metric])
        assert row["change"] == pytest.approx(row["int8"] - row["float32"])
    assert told["images"] == len(data)
    assert 0 < told["largest_difference"] < 1
    types = {onnx.TensorProto.DataType.Name(item.data_type) for item in
             onnx.load(str(tmp_path / "out" / "models" / "model.int8.onnx")).graph.initializer}  # fmt: skip
    assert "UINT8" in types


@pytest.mark.filterwarnings("ignore")
def test_8_bits_are_smaller_and_without_labels_the_loss_is_said_not_to_be_measured(tmp_path: Path) -> None:
    job = job_of("classification", "cnn", model__width=24)
    run, _ = saved(tmp_path / "run", job)
    done = export(run, tmp_path / "out", ("onnx",), int8=True)
    told = done.files["models/model.int8.onnx"]["int8"]
    assert told["metric_loss"].startswith("not measured: no images")
    assert told["bytes_int8"] < told["bytes_float32"] / 2
    examples("classification").site(tmp_path / "site", job, "a", 4, 0)
    done = export(run, tmp_path / "bare", ("onnx",), int8=True, images=tmp_path / "site")
    told = done.files["models/model.int8.onnx"]["int8"]
    assert told["metric_loss"].startswith("not measured: the images have no labels")
    assert told["images"] == 4
    assert 0 <= told["same_decision"] <= 1


# --- others load it ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("task", "name"), [("classification", "cnn"), ("segmentation", "unet3d"), ("reconstruction", "vae")]
)
def test_monai_verifies_and_loads_the_folder(
    task: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai.bundle import ConfigParser, load, verify_net_in_out

    job = job_of(task, name)
    run, model = saved(tmp_path / "run", job)
    export(run, tmp_path / "bundle", ("torchscript", "onnx", "safetensors"))
    configs = tmp_path / "bundle" / "configs"
    monkeypatch.chdir(tmp_path / "bundle")
    verify_net_in_out("network_def", str(configs / "metadata.json"), str(configs / "inference.json"), device="cpu")
    mandatory = "version changelog monai_version pytorch_version numpy_version task description authors copyright"
    facts = json.loads((configs / "metadata.json").read_text())
    assert {*mandatory.split(), "network_data_format", "required_packages_version"} <= set(facts)
    parser = ConfigParser()
    parser.read_config(str(configs / "inference.json"))
    parser.read_meta(str(configs / "metadata.json"))
    parser["bundle_root"] = str(tmp_path / "bundle")
    inputs = raw_inputs(job, 1, 0)
    expected = by_pytorch(model, job, inputs)
    with torch.inference_mode():
        network = parser.get_parsed_content("network_def").eval()
        close(tensors(network(*inputs)), expected)
        if task == "segmentation":
            inferer = parser.get_parsed_content("inferer")
            volume = torch.rand(1, 1, 11, 24, 24)
            assert inferer(volume, network).shape == (1, 3, 11, 24, 24)
    loaded = load("bundle", load_ts_module=True, bundle_dir=str(tmp_path), source="github", version=None)
    module = loaded[0] if isinstance(loaded, tuple) else loaded
    with torch.inference_mode():
        close(tensors(module(*inputs)), expected)
    session = parser.get_parsed_content("session")
    assert [item.name for item in session.get_inputs()] == ["image"]


@pytest.mark.filterwarnings("ignore")
def test_the_folder_names_no_path_of_this_machine_and_no_others_weights(tmp_path: Path) -> None:
    start, _ = saved(tmp_path / "start", job_of("classification", "cnn"))
    given = str(start / "model.safetensors")
    job = job_of("classification", "cnn", model__weights=given, model__freeze="backbone")
    run, model = saved(tmp_path / "run", job)
    export(run, tmp_path / "out", tuple(FORMATS))
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
    inputs = raw_inputs(job, 2, 0)
    with torch.inference_mode():
        close(tensors(load_network(tmp_path / "out")(*inputs)), by_pytorch(model, job, inputs))


@pytest.mark.filterwarnings("ignore")
def test_a_generators_export_holds_the_generator_alone(tmp_path: Path) -> None:
    run, _ = saved(tmp_path / "run", job_of("generation", "dcgan"))
    export(run, tmp_path / "out", ("safetensors", "onnx"))
    weights = load_file(tmp_path / "out" / "models" / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"average"}
    names = [item.name for item in onnx.load(str(tmp_path / "out" / "models" / "model.onnx")).graph.initializer]
    assert not [name for name in names if "discriminator" in name or "reference" in name]


# --- the command ------------------------------------------------------------------------------------------------------


def called(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["consilium", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.filterwarnings("ignore")
def test_the_command_says_what_it_wrote_and_how_well_it_agrees(
    tiny_job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = saved(tmp_path / "run", tiny_job)
    code, said, errors = called(capsys, "export", run, "--format", "onnx", "--format", "torchscript", "--int8",
                                "--out", tmp_path / "out")  # fmt: skip
    assert (code, errors) == (0, "")
    lines = said.splitlines()
    assert len(lines) == 4
    assert "model.onnx" in lines[0]
    assert "agrees with PyTorch within" in lines[0]
    assert "on 3 random inputs" in lines[1]
    assert "metric loss not measured" in lines[2]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--format", "onx"], "must be one of safetensors, onnx, torchscript (did you mean 'onnx'?)"),
        (["--format", "torchscript", "--int8"], "--int8: onnxruntime quantises ONNX files; add --format onnx"),
        (["--images", "nowhere"], "no such file or folder"),
        (["--weights", "first"], "--weights first: must be one of best, last"),
    ],
)
def test_mistakes_are_one_line(
    more: list[str], said: str, tiny_job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = saved(tmp_path / "run", tiny_job)
    code, out, errors = called(capsys, "export", run, "--out", tmp_path / "out", *more)
    assert (code, out) == (2, "")
    assert said in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_had_says_why(tmp_path: Path, tiny_job: Job) -> None:
    with pytest.raises(UserError, match="no run folder"):
        export(tmp_path, tmp_path / "out")
    run, _ = saved(tmp_path / "gan", job_of("generation", "dcgan"))
    with pytest.raises(UserError, match="--images: a generator takes none"):
        export(run, tmp_path / "out", images=tmp_path)
    run, _ = saved(tmp_path / "run", tiny_job)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("no picture")
    with pytest.raises(UserError, match="not one image could be read"):
        export(run, tmp_path / "out", images=tmp_path / "text")


def test_where_onnx_is_not_installed_it_is_named(
    tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = saved(tmp_path / "run", tiny_job)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"in the folder of the source: pip install .* --editable '\.\[export\]'$"):
        export(run, tmp_path / "out")
    export(run, tmp_path / "out", ("torchscript",))
