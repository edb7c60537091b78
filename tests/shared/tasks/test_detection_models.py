"""Detectors: what they are built of, what an image's loss depends on, what they write and draw."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.imaging.dataset import Dataset, load_dataset
from shared.samples import read_samples
from shared.tasks.detection import (
    MODELS,
    batch,
    build_like,
    build_model,
    check,
    collect,
    draw,
    example,
    predict,
    step,
    summarise,
    write,
)
from shared.tasks.detection.boxes import corners, to_input
from shared.tasks.detection.learning import detect
from shared.tasks.detection.models import MAX_BOXES, head_prefix, one_by_one
from shared.tasks.detection.predict import Prediction, draw_boxes
from shared.training import make_optimizer
from shared.weights import exchanged_names

CPU = torch.device("cpu")
RCNN = [name for name in MODELS if name.startswith("fasterrcnn")]
QUICK = "fasterrcnn_small"


def examples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples", Path(__file__).parent / "examples_detection.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLES = examples()


def job_of(name: str = QUICK, **more: Any) -> Job:
    flat = {"task": "detection", "model.name": name} | EXAMPLES.JOBS[name]
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Job]:
    """A detector that has learnt something of the examples, in some ten seconds of one core."""
    job = job_of(model__width=12)
    data = EXAMPLES.make(job, 24)
    model = build_model(job).train()
    optimizer = make_optimizer(model, job)
    torch.manual_seed(0)
    for number in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (number + 1) / 8, (100 - number) / 20)
        loss = step(model, batch(data, torch.randperm(24)[:6].tolist(), job, CPU, train=True), job, [1.0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), job


@pytest.mark.parametrize("name", MODELS)
def test_no_batch_norm_and_as_many_outputs_as_classes_and_background(name: str) -> None:
    with torch.device("meta"):
        for channels in (1, 3):
            model: Any = build_model(job_of(name, data__classes="a,b,c", data__channels=channels))
            assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
            assert any(isinstance(module, nn.GroupNorm) for module in model.modules())
            first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
            assert first.in_channels == channels
            if name in RCNN:
                assert model.roi_heads.box_predictor.cls_score.out_features == 4


def test_the_small_one_has_a_million_parameters() -> None:
    job = job_from_flat({"task": "detection", "data.classes": "a,b,c", "data.channels": 3, "model.name": QUICK})
    assert sum(parameter.numel() for parameter in build_model(job).parameters()) == pytest.approx(1.0e6, rel=0.05)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [64, 77])
def test_the_networks_own_transform_changes_nothing(name: str, size: int) -> None:
    with torch.device("meta"):
        model: Any = build_model(job_of(name, data__size=size, data__channels=3))
    images = torch.randn(2, 3, size, size)
    targets = [{"boxes": torch.tensor([[1.0, 2, 30, 40]]), "labels": torch.tensor([1])} for _ in images]
    for mode in (True, False):
        model.transform.train(mode)
        before = torch.get_rng_state()
        seen, boxes = model.transform(list(images), targets)
        torch.testing.assert_close(seen.tensors, images, rtol=0, atol=0)
        assert seen.image_sizes == [(size, size)] * 2
        assert boxes[0]["boxes"].tolist() == [[1, 2, 30, 40]]
        assert torch.equal(torch.get_rng_state(), before)
    found = [{"boxes": torch.tensor([[1.0, 2, 30, 40]])}]
    assert model.transform.postprocess(found, [(size, size)], [(size, size)])[0]["boxes"].tolist() == [[1, 2, 30, 40]]


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_images(name: str) -> None:
    """With the same draws of anchors and proposals: so an image's gradient does not depend on the other images."""
    job = job_of(name)
    model = build_model(job).train()
    whole = batch(EXAMPLES.make(job, 4), range(4), job, CPU, train=False)
    torch.manual_seed(0)
    together = step(model, whole, job, [1.0])
    torch.manual_seed(0)
    alone = one_by_one(model, whole.images, whole.targets)
    torch.testing.assert_close(together, alone.mean(), rtol=1e-4, atol=1e-5)
    assert (alone > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_an_image_without_objects_can_be_learnt_from(name: str) -> None:
    job = job_of(name)
    model = build_model(job).train()
    none = Dataset.of([Sample("a", (), "a", "train")], image=np.full((1, 1, 64, 64), 9000, np.uint16), shape=[[64, 64]])
    loss = step(model, batch(none, [0], job, CPU, train=True), job, [1.0])
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_gives_about_the_same_loss() -> None:
    job = job_of(train__precision="bfloat16")
    model = build_model(job).train()
    whole = batch(EXAMPLES.make(job, 4), range(4), job, CPU, train=False)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(step(model, whole, job, [1.0]))
    losses[1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_torchscript_takes_the_network(name: str) -> None:
    model = build_model(job_of(name)).eval()
    (image,) = example(job_of(name))[0]
    with torch.inference_mode():
        (wanted,) = model([image])
        _, (found,) = torch.jit.script(model)([image])
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value)


# --- what a trained one finds -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_from_scratch_and_its_boxes_are_kept_within_the_image(trained: tuple[nn.Module, Job]) -> None:
    model, job = trained
    data = EXAMPLES.make(job, 24, seed=1)
    found, at_first = (summarise(collect(network, data, job, CPU), job) for network in (model, build_model(job)))
    assert found["map50"].value > 0.3 > 0.05 > at_first["map50"].value
    assert found["sensitivity_1fp"].value > 0.6
    for item in detect(model, data, job, CPU):
        assert len(item.boxes) <= MAX_BOXES
        assert (np.diff(item.scores) <= 0).all()
        assert set(item.classes.tolist()) <= {0, 1}
        assert item.boxes.min(initial=0) >= 0
        assert item.boxes.max(initial=0) <= job.data.size


@pytest.mark.slow
def test_predictions_lie_in_the_images_own_pixels(trained: tuple[nn.Module, Job], tmp_path: Path) -> None:
    """A large image of another aspect: what is found there is what is found in it fitted, moved back."""
    model, job = trained
    small, boxes = EXAMPLES.picture(64, 0, 2)
    large = np.repeat(np.repeat(small[:48], 5, 0), 5, 1)  # 240 x 320
    Image.fromarray(large).save(tmp_path / "large.png")
    samples = [Sample("large.png", (), "a", "test")]
    site = SiteData("a", tmp_path)
    data = load_dataset(samples, site, job)
    (found,) = predict(model, data, job, CPU)
    (inside,) = detect(model, data, job, CPU)
    assert found.shape == (240, 320)
    np.testing.assert_allclose(to_input(found.boxes, found.shape, 64), inside.boxes, atol=1e-6)
    assert inside.boxes[:, 1].min() >= 8  # 8 rows of black above and below
    assert inside.boxes[:, 3].max() <= 56
    wanted = corners(np.array(boxes)[:, 1:]) * 5
    wanted[:, 3] = np.minimum(wanted[:, 3], 240)
    for box in wanted:
        assert np.abs(found.boxes - box).max(1).min() < 40


@pytest.mark.slow
def test_the_coco_file_is_read_by_pycocotools_and_by_our_own_reader(
    trained: tuple[nn.Module, Job], tmp_path: Path
) -> None:
    from pycocotools.coco import COCO

    model, job = trained
    EXAMPLES.site(tmp_path / "site", job, "a", 8, 1)
    site = SiteData("a", tmp_path / "site")
    samples = read_samples(site, job)
    data = load_dataset(samples, site, job)
    outcomes = list(predict(model, data, job, CPU))
    (file,) = write(zip(samples, outcomes, strict=True), site, job, tmp_path)
    coco = COCO(str(file))
    assert [item["name"] for item in coco.loadCats(coco.getCatIds())] == ["bright", "dark"]
    assert len(coco.imgs) == 8
    assert sum(len(outcome.boxes) for outcome in outcomes) == len(coco.anns) > 0
    for number, (sample, outcome) in enumerate(zip(samples, outcomes, strict=True), start=1):
        image = coco.imgs[number]
        assert (image["file_name"], image["height"], image["width"]) == (sample.path, *outcome.shape)
        items = coco.imgToAnns[number]
        np.testing.assert_allclose([item["score"] for item in items], outcome.scores, atol=1e-5)
        own = corners(np.array([item["bbox"] for item in items]).reshape(-1, 4))
        np.testing.assert_allclose(own, outcome.boxes, atol=0.02)
        assert [item["category_id"] - 1 for item in items] == list(outcome.classes)
    content = json.loads(file.read_text())
    for item in content["images"]:
        item["file_name"] = Path(item["file_name"]).name
    (tmp_path / "site" / "annotations.json").write_text(json.dumps(content))
    again = {sample.path: sample for sample in read_samples(site, job)}
    assert all(
        len(again[sample.path].boxes) == len(outcome.boxes) for sample, outcome in zip(samples, outcomes, strict=True)
    )


def test_frames_of_a_film_are_images_of_their_own_in_the_file(tmp_path: Path) -> None:
    nothing = Prediction((6, 8), np.zeros((0, 4)), (), ())
    samples = [Sample("film.mp4", (), "a", "test", frame=k) for k in (0, 3)]
    (file,) = write([(sample, nothing) for sample in samples], SiteData("a", tmp_path), job_of(), tmp_path)
    assert [(item["file_name"], item["frame"]) for item in json.loads(file.read_text())["images"]] == [
        ("film.mp4", 0),
        ("film.mp4", 3),
    ]


def test_boxes_are_drawn_where_they_are_and_unsure_ones_are_not() -> None:
    job = job_of()
    found = Prediction((100, 200), np.array([[20.0, 30, 90, 80], [120, 10, 190, 60]]), (0, 1), (0.9, 0.2))
    image = np.asarray(draw_boxes(np.zeros((200, 400), np.float32), found, job)).astype(int)  # twice as large
    assert image.shape == (200, 400, 3)
    coloured = np.argwhere(image.sum(2) > 0)
    assert coloured.min(0).tolist() == [60, 40]
    assert coloured.max(0).tolist() == [159, 179]
    assert image[60, 100].tolist() == list(bytes.fromhex("E69F00"))
    assert image[110, 110].tolist() == [0, 0, 0]


@pytest.mark.slow
def test_a_picture_of_what_was_found_comes_with_words(trained: tuple[nn.Module, Job]) -> None:
    model, job = trained
    data = EXAMPLES.make(job, 2, seed=1)
    (first, _) = predict(model, data, job, CPU)
    picture, words = draw(data, first, job)
    assert picture.dtype == np.uint8
    assert picture.shape == (768, 768, 3)
    shown = [job.classes[k] for k, score in zip(first.classes, first.scores, strict=True) if score >= 0.5]
    assert words.count("bright") == ("bright" in shown)
    _, words = draw(data, Prediction((64, 64), np.zeros((0, 4)), (), ()), job)
    assert words.endswith("nothing.")


# --- weights ----------------------------------------------------------------------------------------------------------


def torchvisions(name: str, classes: int) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(MODELS[name].published[0], weights=None, weights_backbone=None, num_classes=classes)
    for module in model.modules():  # as after some training
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet", "fasterrcnn_resnet50", "retinanet"])
def test_a_file_in_torchvisions_layout_gives_its_network_with_frozen_norms(name: str, tmp_path: Path) -> None:
    from torchvision.ops import FrozenBatchNorm2d

    other: Any = torchvisions(name, 3).eval()
    torch.save(other.state_dict(), tmp_path / "coco.pt")
    job = job_of(name, model__weights=str(tmp_path / "coco.pt"), data__channels=3)
    model: Any = build_model(job).eval()
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, nn.GroupNorm) for module in model.modules())
    state = model.state_dict()
    empty = build_like(job.replace(model__weights=""), state).state_dict()  # what a finished run is read into
    assert {key: value.shape for key, value in empty.items()} == {key: value.shape for key, value in state.items()}
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        wanted, found = other.backbone(images), model.backbone(images)
    for key, value in wanted.items():
        # mobilenet's BatchNorm has another eps than the frozen one torchvision uses in detectors
        torch.testing.assert_close(found[key], value, rtol=0.02, atol=0.02)
    for key, value in model.state_dict().items():
        if not key.startswith("backbone."):
            assert torch.equal(value, other.state_dict()[key]), key


def test_weights_of_a_classifier_become_the_body_and_the_head_is_new(tmp_path: Path) -> None:
    from torchvision.models import mobilenet_v3_large, resnet50

    for name, classifier in (("fasterrcnn_resnet50", resnet50), ("fasterrcnn_mobilenet", mobilenet_v3_large)):
        other = classifier(weights=None)
        save_file(other.state_dict(), tmp_path / f"{name}.safetensors")
        job = job_of(name, model__weights=str(tmp_path / f"{name}.safetensors"), data__channels=1)
        state = build_model(job).state_dict()
        own = {key.removeprefix("features."): value for key, value in other.state_dict().items()}
        body = {key.removeprefix("backbone.body."): value for key, value in state.items() if "backbone.body." in key}
        first, *rest = body
        torch.testing.assert_close(body[first], own[first].sum(1, keepdim=True))
        assert all(torch.equal(body[key], own[key]) for key in rest)


def test_weights_of_our_own_run_are_taken_with_their_group_norm(tmp_path: Path) -> None:
    job = job_of()
    other = build_model(job.replace(seed=7, data__classes="a,b,c"))
    save_file(other.state_dict(), tmp_path / "own.safetensors")
    state = build_model(job.replace(model__weights=str(tmp_path / "own.safetensors"))).state_dict()
    differ = [key for key, value in other.state_dict().items() if not state[key].equal(value)]
    assert {key.rpartition(".")[0] for key in differ} == {
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    }


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"backbone.body.x": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt.*does not fit fasterrcnn_small"):
        build_model(job_of(model__weights=str(tmp_path / "x.pt")))
    with pytest.raises(UserError, match="no such file"):
        build_model(job_of(model__weights=str(tmp_path / "gone.pt")))
    with pytest.raises(UserError, match=r"NONSENSE.*fasterrcnn_resnet50_fpn has COCO_V1.*resnet50 has IMAGENET1K_V1"):
        build_model(job_of("fasterrcnn_resnet50", model__weights="NONSENSE"))


@pytest.mark.parametrize("name", MODELS)
def test_with_a_frozen_backbone_the_body_stays_and_the_rest_travels(name: str) -> None:
    job = job_of(name, model__freeze="backbone")
    with torch.device("meta"):
        model = build_model(job)
    names = exchanged_names(model, job)
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert set(trained) == set(names)
    assert all(key.startswith(head_prefix(job)) for key in names)
    assert {key for key in model.state_dict() if key not in names} == {
        key for key in model.state_dict() if key.startswith("backbone.body.")
    }


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model.name": "fasterrcnn"}, "detection has fasterrcnn_small, .*did you mean"),
        ({"data.channels": 2}, "must be 1 .grey. or 3 .colour."),
        ({"data.size": 16}, "32 pixels or more"),
        ({"data.multilabel": True}, "set it to false"),
        ({"data.modalities": "a,b"}, "data.modalities.*leave it empty"),
        ({"data.tabular": "age"}, "data.tabular.*leave it empty"),
        ({"model.weights": "DEFAULT"}, "fasterrcnn_small has no published weights; give a file"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused_in_one_line(settings: dict[str, Any], says: str) -> None:
    flat = {"task": "detection", "model.name": QUICK} | EXAMPLES.JOBS[QUICK] | settings
    with pytest.raises(UserError, match=says) as caught:
        check(job_from_flat(flat))
    assert "\n" not in str(caught.value)


def test_adding_a_model_takes_a_function_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's FCOS, by the generic loss of one image after the other."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    from shared.tasks.detection.models import Entry, _untouched, group_norm

    def fcos(job: Job, norm: Callable[[int], nn.Module]) -> nn.Module:
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5)
        model: nn.Module = FCOS(backbone, 1 + len(job.classes), **_untouched(job))
        return model

    monkeypatch.setitem(MODELS, "fcos", Entry(fcos))
    job = job_of().replace(model__name="fcos", data__channels=3)
    check(job)
    model = build_model(job)
    assert any(isinstance(module, nn.GroupNorm) for module in model.modules())
    assert group_norm(12).num_groups == 4
    data = EXAMPLES.make(job, 4)
    loss = step(model.train(), batch(data, range(4), job, CPU, train=True), job, [1.0])
    assert torch.isfinite(loss)
    assert collect(model, data, job, CPU)["n"] == 4
