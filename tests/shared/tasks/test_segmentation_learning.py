"""What a segmenter makes of whole images and how it is judged: windows, spacing, objects, labels of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset
from shared.tasks import add_sums
from shared.tasks.classification.metrics import summarise as summarise_labels
from shared.tasks.segmentation.data import assemble, batch, whole_image
from shared.tasks.segmentation.learning import class_weights, collect, likeliest, outcomes, step
from shared.tasks.segmentation.measures import hausdorff95
from shared.tasks.segmentation.metrics import consistent, label_job, summarise
from shared.tasks.segmentation.models import build_model
from shared.training import train

CPU = torch.device("cpu")


def job(name: str = "unet", **more: object) -> Job:
    flat = {"task": "segmentation", "model.name": name, "model.width": 4, "model.depth": 3, "data.size": 16}
    flat |= {"data.classes": "organ,lesion", "data.depth": 8, "train.device": "cpu"}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def dataset(of: Job, sizes: list[tuple[int, ...]], spacing: float = 0.0) -> Dataset:
    """Smooth masks of three grey levels, and images that are these masks with a little noise."""
    rows = []
    for number, size in enumerate(sizes):
        generator = np.random.default_rng(number)
        mask = ndimage.gaussian_filter(generator.normal(size=(3, *size)), (0, *[2] * len(size))).argmax(0)
        image = (mask / 2 * 0.8 + 0.1 + generator.normal(0, 0.02, size)).clip(0, 1).astype(np.float32)
        rows.append(assemble(image[None], mask.astype(np.uint8), np.full(len(size), spacing), size, of))
    samples = [Sample(str(k), (k % 2,) if of.labels else (), str(k), "train") for k in range(len(sizes))]
    return Dataset.of(samples, **{name: [row[name] for row in rows] for name in rows[0]})


class Pointwise(nn.Module):
    """A network that sees one pixel at a time: grey levels become classes, and the image's label its mean."""

    def __init__(self, labels: bool = False) -> None:
        super().__init__()
        self.labels = labels
        self.shapes: list[torch.Size] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        self.shapes.append(x.shape)
        logits = torch.cat([-((x - level) ** 2) * 3 for level in (-1.6, 0.0, 1.6)], 1)
        mean = x.flatten(1).mean(1)
        return (logits, torch.stack([-mean, mean], 1)) if self.labels else logits


@pytest.mark.parametrize(("name", "size"), [("unet", (70, 45)), ("unet3d", (13, 50, 41))])
def test_sliding_windows_give_a_pointwise_network_s_own_result_on_the_whole_image(
    name: str, size: tuple[int, ...]
) -> None:
    of = job(name)
    data = dataset(of, [size])
    model = Pointwise()
    ((logits, _),) = outcomes(model, data, of, CPU)
    patch = (16, 16) if name == "unet" else (8, 16, 16)
    assert {tuple(shape[2:]) for shape in model.shapes} == {patch}
    with torch.no_grad():
        expected = Pointwise()(whole_image(data, 0, of)[None])[0]
    assert logits.shape == (3, *size)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_windows_overlap_as_the_job_says_and_reach_the_edge() -> None:
    of = job(evaluation__overlap=0.5, evaluation__batch_size=3)
    model = Pointwise()
    list(outcomes(model, dataset(of, [(64, 32)]), of, CPU))
    assert sum(shape[0] for shape in model.shapes) == 7 * 3  # a window every 8 pixels
    assert max(shape[0] for shape in model.shapes) <= 3


def test_an_image_of_few_patches_is_seen_whole() -> None:
    of = job()
    model = Pointwise()
    list(outcomes(model, dataset(of, [(32, 32), (5, 9), (33, 32)]), of, CPU))
    assert [tuple(shape[2:]) for shape in model.shapes][:2] == [(32, 32), (5, 9)]
    assert {tuple(shape[2:]) for shape in model.shapes[2:]} == {(16, 16)}


def test_collected_sums_are_those_of_the_masks() -> None:
    """A network that is right but for noise; Dice and HD95 once more by hand, in mm of unequal images."""
    of = job()
    data = dataset(of, [(30, 20), (18, 33)], spacing=0.5)
    found = summarise(collect(Pointwise(), data, of, CPU), of)
    dice, far = [], []
    for index, (logits, _) in enumerate(outcomes(Pointwise(), data, of, CPU)):
        predicted, truth = logits.argmax(0).numpy(), data.columns["mask"][index]
        pairs = [(predicted == k, truth == k) for k in (1, 2)]
        dice.append(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]))
        far.append(np.mean([hausdorff95(a, b, (0.5, 0.5)) for a, b in pairs]))
    assert found["dice"].value == pytest.approx(np.mean(dice))
    assert found["dice"].value > 0.8
    assert found["hd95"].value == pytest.approx(np.mean(far))
    assert found["hd95"].n == 2


def test_without_spacing_there_is_no_hd95_and_the_images_are_counted() -> None:
    of = job()
    sums = collect(Pointwise(), dataset(of, [(20, 20)] * 3), of, CPU)
    assert (sums["hd95_n"], sums["hd95_missing"]) == (0, 3)
    assert summarise(sums, of)["hd95"].n == 0


def test_sums_do_not_depend_on_which_images_are_judged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image by image, so that federated equals pooled to the last digit of every count."""
    monkeypatch.setattr("shared.devices.has_bfloat16", lambda _: True)  # by way of float32, if need be
    of = job(train__precision="bfloat16")
    model = build_model(of)
    data = dataset(of, [(30, 20), (18, 33), (50, 40), (16, 16)])
    whole = collect(model, data, of, CPU)
    ones = []
    for index in range(4):
        columns = {name: column.rows([index]) for name, column in data.columns.items()}
        ones.append(collect(model, Dataset(columns, (data.samples[index],)), of, CPU))
    both = add_sums(ones)
    for key, value in whole.items():
        np.testing.assert_allclose(both[key], value, rtol=1e-12, err_msg=key)
    assert consistent(whole, of)


def test_labels_of_images_are_judged_as_a_classifier_is() -> None:
    of = job(data__labels="dim,bright")
    data = dataset(of, [(16, 16), (40, 70), (20, 30), (60, 50)])
    sums = collect(Pointwise(labels=True), data, of, CPU)
    assert consistent(sums, of)
    assert not consistent(sums | {"image_confusion": [9, 0, 0, 0]}, of)
    found = summarise(sums, of)
    own = {key.removeprefix("image_"): value for key, value in sums.items() if key.startswith("image_")}
    expected = summarise_labels(own | {"n": 4, "loss": 0.0, "loss_squares": 0.0}, label_job(of))
    assert found["image_auroc"] == expected["auroc"]
    assert found["image_accuracy"].n == 4
    assert found["dice"].n == 4
    assert "image_loss" not in found


def test_the_label_of_a_large_image_is_the_mean_over_its_windows() -> None:
    of = job(data__labels="dim,bright", evaluation__overlap=0.0)
    data = dataset(of, [(64, 64)])
    ((_, of_image),) = outcomes(Pointwise(labels=True), data, of, CPU)
    assert of_image is not None
    assert float(of_image[1]) == pytest.approx(float(whole_image(data, 0, of).mean()), abs=1e-5)


def test_the_loss_has_the_label_s_share_and_weights() -> None:
    of = job(data__labels="dim,bright")
    data = dataset(of, [(16, 16)] * 4)
    sample = batch(data, range(4), of, CPU, train=False)
    model = build_model(of).eval()
    logits, of_image = model(sample.images)
    plain = step(lambda x: logits, sample, of, [1.0, 1.0]).item()  # type: ignore[arg-type]
    entropy = nn.functional.cross_entropy(of_image, torch.tensor([0, 1, 0, 1]), reduction="none")
    for weights in ([1.0, 1.0], [3.0, 0.5]):
        expected = plain + (torch.tensor(weights)[[0, 1, 0, 1]] * entropy).mean().item()
        assert step(model, sample, of, weights).item() == pytest.approx(expected, rel=1e-5)
    assert class_weights([4, 3, 30, 10], of) == pytest.approx([40 / 60, 40 / 20])
    assert class_weights([4, 3], job()) == [1.0]


def test_the_gradient_of_an_image_does_not_depend_on_the_others() -> None:
    """The gradient of a batch is the mean of those of its images: what differential privacy clips is well defined."""
    of = job(data__labels="dim,bright")
    data = dataset(of, [(16, 16)] * 3)
    model = build_model(of)

    def gradient(rows: list[int]) -> torch.Tensor:
        model.zero_grad()
        step(model, batch(data, rows, of, CPU, train=False), of, [1.0, 2.0]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(
        gradient([0, 1, 2]), (gradient([0]) + gradient([1]) + gradient([2])) / 3, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("name", ["unet", "unet3d"])
def test_a_few_steps_find_the_classes(name: str) -> None:
    of = job(name, federation__rounds=100, train__batch_size=4, train__learning_rate=0.01)
    data = dataset(of, [(24, 24), (30, 20)] if name == "unet" else [(10, 24, 24), (8, 30, 20)])
    model = build_model(of)
    import shared.tasks.segmentation as task

    before = summarise(collect(model, data, of, CPU), of)["dice"].value
    train(model, task, data, of, site="a", first_step=0, steps=100, class_weights=[1.0])
    after = summarise(collect(model, data, of, CPU), of)["dice"].value
    assert after > 0.8 > before


@pytest.mark.parametrize("size", [(9, 7), (3, 5, 4)])
def test_the_likeliest_class_is_argmax_and_of_equals_the_first(size: tuple[int, ...]) -> None:
    logits = torch.randint(0, 3, (4, *size), generator=torch.Generator().manual_seed(1)).float()  # many are equal
    assert np.array_equal(likeliest(logits).numpy(), np.argmax(logits.numpy(), 0))
