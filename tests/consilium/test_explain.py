"""Explanations: the maps are those of the methods, they follow the weights and the place looked at, and can be read."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_dilation
from scipy.stats import spearmanr

from consilium.attribution import (
    METHODS,
    attribute,
    black,
    cam_layer,
    enlarged,
    grad_cam,
    has_maps,
    integrated_gradients,
    occlusion,
)
from consilium.explain import explain
from consilium.overlay import AGAINST, EDGE, FOR, blend, outlined, strength
from server.store import write_model
from shared import __version__
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.explaining import Explainable, log_odds_of_softmax
from shared.files import write_text
from shared.imaging.dataset import Dataset
from shared.tasks import classification as task
from shared.tasks import load_task
from shared.tasks.segmentation.data import assemble
from shared.training import train
from shared.weights import exchanged
from tests.conftest import called, examples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def job() -> Job:
    return job_from_flat(
        {
            "name": "halves", "data.classes": "plain,spot", "data.size": 32, "model.width": 8,
            "train.local_steps": 200, "train.batch_size": 16, "train.device": "cpu", "federation.rounds": 1,
            "train.learning_rate": 0.01,
        }
    )  # fmt: skip


def spots(n: int, seed: int) -> Dataset:
    """Noise; of class 1 there is a bright spot in the left half, and in the right half of either class one by chance.

    So only the left half tells the classes apart.
    """
    generator = np.random.default_rng(seed)
    images = generator.uniform(0.2, 0.5, (n, 1, 32, 32))
    for number in range(n):
        sides = [0] * (number % 2) + [16] * int(generator.integers(2))
        for side in sides:
            y, x = generator.integers(3, 24), side + generator.integers(2, 9)
            images[number, :, y : y + 5, x : x + 5] += 0.45
    samples = [Sample(str(k), (k % 2,), str(k), "train") for k in range(n)]
    return Dataset.of(samples, image=np.rint(images * 65535).astype(np.uint16))


@pytest.fixture(scope="module")
def looks_left(job: Job) -> torch.nn.Module:
    """A network trained until it tells the spots of the left half."""
    model = task.build_model(job)
    train(model, task, spots(160, 0), job, site="a", first_step=0, steps=200, class_weights=[1.0, 1.0])
    sums = task.collect(model, spots(100, 1), job, CPU)
    assert task.summarise(sums, job)["accuracy"].value > 0.95
    return model.eval()


def cases(model: torch.nn.Module, job: Job, n: int = 6) -> list[Explainable]:
    """Cases of class 1 with a spot in either half, the score of class 1."""
    data = spots(60, 2)
    both = [i for i in range(1, 60, 2) if (data.columns["image"][i][0, :, 16:] > 40_000).sum() > 10][:n]
    assert len(both) == n
    parts = [Dataset.of([data.samples[i]], image=[data.columns["image"][i]]) for i in both]
    return [task.explainable(model, part, job, CPU, "spot") for part in parts]


# --- sanity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_map_lies_where_the_model_looks(method: str, looks_left: torch.nn.Module, job: Job) -> None:
    """There is a spot in either half; only the left one counts."""
    for case in cases(looks_left, job):
        strong = np.clip(attribute(looks_left, case, method).maps[0], 0, None)
        assert strong[:, :16].sum() > 0.6 * strong.sum()
        marked = strong >= np.quantile(strong, 0.95)
        assert marked[:, :16].sum() > 0.6 * marked.sum()


@pytest.mark.parametrize("method", ["integrated-gradients", "occlusion"])
def test_of_a_model_that_cannot_see_the_right_half_nothing_is_there(method: str, job: Job) -> None:
    """Constructed, not trained: the right half is cut off before the network. (Grad-CAM stretches what a layer saw.)"""

    class LeftOnly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = task.build_model(job)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x[..., :16])  # type: ignore[no-any-return]

    model = LeftOnly().eval()
    (case,) = cases(model, job, 1)
    maps = np.abs(attribute(model, case, method).maps[0])
    assert maps[:, 18:].max() < 1e-4 * maps[:, :14].max()  # the window of occlusion is 4 wide, so it reaches 2 over


@pytest.mark.parametrize("method", METHODS)
def test_randomised_weights_change_the_map(method: str, looks_left: torch.nn.Module, job: Job) -> None:
    """The model randomisation test of Adebayo et al., Sanity Checks for Saliency Maps (NeurIPS 2018)."""
    found = []
    for number, case in enumerate(cases(looks_left, job)):
        own = attribute(looks_left, case, method).maps.ravel()
        assert np.array_equal(attribute(looks_left, case, method).maps.ravel(), own)
        for seed in range(3):
            random = task.build_model(job.replace(seed=100 + 10 * number + seed)).eval()
            other = attribute(random, cases(random, job)[number], method).maps.ravel()
            found.append(spearmanr(own, other).statistic if other.any() else 0.0)
    assert abs(np.mean(found)) < 0.2, found
    assert np.mean(np.abs(found)) < 0.4, found


# --- each method against its definition -------------------------------------------------------------------------------


def test_integrated_gradients_add_up_to_what_the_picture_adds_to_a_black_one(
    looks_left: torch.nn.Module, job: Job
) -> None:
    """The completeness axiom."""
    for case in cases(looks_left, job, 3):
        with torch.no_grad():
            difference = (case.score(case.inputs) - case.score(black(case))).item()
        assert integrated_gradients(looks_left, case).maps.sum() == pytest.approx(difference, rel=0.03)


def test_grad_cam_is_the_rectified_sum_of_maps_weighted_by_their_mean_gradients(
    looks_left: torch.nn.Module, job: Job
) -> None:
    """Equations 1 and 2 of Selvaraju et al., by plain autograd through the network cut in two."""
    case = cases(looks_left, job, 1)[0]
    name, _ = cam_layer(looks_left, case)
    layers = list(looks_left.features)  # type: ignore[arg-type]
    cut = int(name.removeprefix("features.")) + 1
    maps = torch.nn.Sequential(*layers[:cut])(case.inputs).detach().requires_grad_()
    logits = looks_left.head(torch.nn.Sequential(*layers[cut:])(maps))  # type: ignore[operator]
    (logits[0, 1] - logits[0, 0]).backward()
    assert maps.shape[2:] == (8, 8)
    assert maps.grad is not None
    coarse = (maps.grad.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    fine = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    np.testing.assert_allclose(grad_cam(looks_left, case).maps, fine[0].detach().numpy(), rtol=1e-3, atol=1e-5)


def test_occlusion_is_the_mean_fall_of_the_score_over_the_windows_on_a_pixel(
    looks_left: torch.nn.Module, job: Job
) -> None:
    case = cases(looks_left, job, 1)[0]
    side, step = case.window[-1], case.window[-1] // 2
    total, times = np.zeros((32, 32)), np.zeros((32, 32))
    with torch.no_grad():
        whole = case.score(case.inputs).item()
        for y in range(0, 32 - side + 1, step):
            for x in range(0, 32 - side + 1, step):
                covered = case.inputs.clone()
                covered[..., y : y + side, x : x + side] = case.inputs.mean()
                total[y : y + side, x : x + side] += whole - case.score(covered).item()
                times[y : y + side, x : x + side] += 1
    np.testing.assert_allclose(occlusion(looks_left, case).maps[0], total / times, rtol=1e-3, atol=1e-4)


def test_log_odds_are_those_of_the_softmax() -> None:
    logits = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = logits.softmax(1)
    torch.testing.assert_close(log_odds_of_softmax(logits), (share / (1 - share)).log())


@pytest.mark.parametrize(
    ("name", "size", "layer"),
    [
        ("cnn", 64, "features.19"), ("resnet18", 64, "layer3"), ("resnet18", 224, "layer4"),
        ("densenet121", 128, "features"), ("vgg16", 128, "features"),
    ],
)  # fmt: skip
def test_the_layer_of_grad_cam_is_the_deepest_with_a_map_worth_the_name(
    job: Job, name: str, size: int, layer: str
) -> None:
    changed = job.replace(model__name=name, data__size=size)
    model = task.build_model(changed).eval()
    data = Dataset.of([Sample("a", (), "", "test")], image=np.zeros((1, 1, size, size), np.uint16))
    assert cam_layer(model, task.explainable(model, data, changed, CPU))[0] == layer


# --- other tasks ------------------------------------------------------------------------------------------------------

DEVICE_AND_STEPS = {
    "train.device": "cpu", "federation.rounds": 1, "train.local_steps": 120, "train.batch_size": 16,
    "train.learning_rate": 0.01,
}  # fmt: skip


def only(data: Dataset, index: int) -> Dataset:
    return Dataset({name: column.rows([index]) for name, column in data.columns.items()}, (data.samples[index],))


def shares(maps: np.ndarray) -> np.ndarray:
    """Of the whole map, what lies in each of its pictures."""
    strong = np.abs(maps).sum((1, 2))
    found: np.ndarray = strong / strong.sum()
    return found


def learnt(name: str, data: Dataset, **settings: object) -> tuple[ModuleType, torch.nn.Module, Job]:
    """A model trained on ``data`` until it has learnt it."""
    flat = DEVICE_AND_STEPS | {key.replace("__", "."): value for key, value in settings.items()}
    job = job_from_flat(flat | {"task": name})
    module = load_task(name)
    model = module.build_model(job)
    weights = module.class_weights(module.count_classes(data, job), job)
    train(model, module, data, job, site="a", first_step=0, steps=job.train.local_steps, class_weights=weights)
    return module, model.eval(), job


def films(n: int, seed: int) -> Dataset:
    """Eight frames of noise; a flash somewhere, early (third frame) in class 1, late (seventh) in class 0."""
    generator = np.random.default_rng(seed)
    frames = generator.uniform(0.2, 0.4, (n, 8, 1, 16, 16))
    for number in range(n):
        y, x = generator.integers(1, 11, 2)
        frames[number, 2 if number % 2 else 6, :, y : y + 4, x : x + 4] += 0.5
    samples = [Sample(str(k), (k % 2,), "", "train") for k in range(n)]
    return Dataset.of(samples, frames=np.rint(frames * 65535).astype(np.uint16))


def signals(n: int, seed: int) -> Dataset:
    """Two leads of noise; a bump at steps 10 to 15, of the first lead in class 0, of the second in class 1."""
    values = np.random.default_rng(seed).normal(0, 0.3, (n, 40, 2)).astype(np.float32)
    for number in range(n):
        values[number, 10:16, number % 2] += 2
    return Dataset.of([Sample(str(k), (k % 2,), "", "train") for k in range(n)], signal=values)


def test_of_a_film_integrated_gradients_show_the_frame_that_tells() -> None:
    module, model, job = learnt(
        "sequence", films(64, 0), model__name="cnn_gru", data__classes="late,early", data__size=16, model__width=8
    )
    for number, frame in ((0, 6), (1, 2), (3, 2)):
        case = module.explainable(model, only(films(4, 5), number), job, CPU)
        assert case.label == ("late", "early")[number % 2]
        assert case.names[frame] == f"frame {frame + 1}"
        found = shares(attribute(model, case, "integrated-gradients").maps)
        assert found.argmax() == frame
        assert found[frame] > 0.4


def test_of_a_signal_the_lead_and_the_moment_are_shown(tmp_path: Path) -> None:
    module, model, job = learnt(
        "sequence", signals(64, 0), model__name="gru", data__classes="first,second", data__channels=2
    )
    for number in (0, 1):
        case = module.explainable(model, only(signals(2, 5), number), job, CPU)
        wide = case.pictures.shape[2] // 40
        for method in ("integrated-gradients", "occlusion"):
            maps = attribute(model, case, method).maps
            assert shares(maps)[number] > 0.6, method
            bump = np.abs(maps[number, 0, :]).reshape(40, wide).sum(1)
            assert 10 <= bump.argmax() <= 15, method
        with pytest.raises(UserError, match="try integrated-gradients"):
            attribute(model, case, "gradcam")
    np.savez(tmp_path / "case.npz", signal=signals(2, 5).columns["signal"][1])
    said = explain(save(model, job, tmp_path / "run"), tmp_path / "case.npz", tmp_path / "o").caption
    assert "integrated gradients" in " ".join(said).lower(), "where there is no map to take, another method is taken"


def pairs(n: int, seed: int) -> Dataset:
    """Two images a case, with a spot in either by chance; the class is whether there is one in the second."""
    generator = np.random.default_rng(seed)
    images = generator.uniform(0.2, 0.5, (n, 2, 16, 16))
    for number in range(n):
        for place in [0] * int(generator.integers(2)) + [1] * (number % 2):
            y, x = generator.integers(1, 11, 2)
            images[number, place, y : y + 4, x : x + 4] += 0.45
    samples = [Sample(f"{k}-1", (k % 2,), "", "train", paths=(f"{k}-1", f"{k}-2")) for k in range(n)]
    return Dataset.of(samples, image=np.rint(images * 65535).astype(np.uint16))


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_of_several_images_the_one_that_tells_is_shown(fusion: str) -> None:
    module, model, job = learnt(
        "classification", pairs(96, 0), data__classes="plain,spot", data__size=16, data__modalities="pa,lateral",
        model__width=8, model__fusion=fusion,
    )  # fmt: skip
    sums = module.collect(model, pairs(60, 1), job, CPU)
    assert module.summarise(sums, job)["accuracy"].value > 0.9
    for number in (1, 3, 5):
        case = module.explainable(model, only(pairs(6, 2), number), job, CPU, "spot")
        assert case.names == ("pa", "lateral")
        for method in ("integrated-gradients", "occlusion"):
            assert shares(attribute(model, case, method).maps)[1] > 0.6, (number, method)
        assert has_maps(model, case) == (fusion == "early")


def test_a_missing_image_is_called_missing() -> None:
    settings = {"data.classes": "plain,spot", "data.size": 16, "data.modalities": "pa,lateral", "data.missing": "zero"}
    job = job_from_flat({"model.width": 8} | settings)
    data = pairs(1, 0)
    bare = Dataset(data.columns, (dataclasses.replace(data.samples[0], paths=("0-1", "")),))
    assert task.explainable(task.build_model(job), bare, job, CPU).names == ("pa", "lateral (missing)")


def discs(n: int, seed: int) -> tuple[Dataset, Job]:
    module = examples("segmentation")
    job = job_from_flat(
        {"task": "segmentation", "model.name": "unet"} | module.JOBS["unet"] | {"data.size": 32, "data.labels": ""}
    )
    return module.make(job, n, seed), job


def test_of_a_segmenter_the_map_lies_on_what_is_found_and_follows_the_weights() -> None:
    data, job = discs(32, 0)
    settings = {key: value for key, value in job.flat().items() if key.split(".")[0] in ("data", "model")}
    module, model, job = learnt("segmentation", data, **settings)
    case = module.explainable(model, only(discs(4, 9)[0], 3), job, CPU, "disc")
    assert case.region is not None
    assert 5 < case.region.sum() < 0.15 * case.region.size
    assert f"over the {case.region.sum():,} pixels" in case.where
    near = binary_dilation(case.region[0], iterations=4)
    random = module.build_model(job.replace(seed=77)).eval()
    other = module.explainable(random, only(discs(4, 9)[0], 3), job, CPU, "disc")
    for method in ("integrated-gradients", "occlusion"):
        maps = np.abs(attribute(model, case, method).maps[0])
        assert maps[near].sum() / maps.sum() > 2.5 * near.mean(), method
    for method in METHODS:
        own, changed = attribute(model, case, method).maps, attribute(random, other, method).maps
        assert spearmanr(own.ravel(), changed.ravel()).statistic < 0.7, method
    drawn = outlined(case, 0)
    assert ((drawn == EDGE).all(2) <= case.region[0]).all()
    assert (drawn == EDGE).all(2).any()


def test_a_map_of_a_padded_image_lies_where_its_layer_looked() -> None:
    """The U-Net pads 17 pixels to 20 and 33 to 36, at their ends; a map of the padded image is not squeezed into it."""
    module, job = load_task("segmentation"), discs(1, 0)[1]
    row = assemble(np.full((1, 17, 33), 0.2), np.zeros((17, 33), np.uint8), np.ones(2), (17, 33), job)
    data = Dataset.of([Sample("a", (), "", "test")], **{name: [value] for name, value in row.items()})
    model = module.build_model(job).eval()
    case = module.explainable(model, data, job, CPU)
    assert case.extent == (20, 36)
    assert grad_cam(model, case).maps.shape == (1, 17, 33)
    coarse = torch.zeros(1, 1, 5, 9)
    coarse[0, 0, 2, 6] = 1  # of pixels 8 to 11 and 24 to 27
    fine = enlarged(coarse, (1, 17, 33), case.extent)[0]
    assert sorted(map(tuple, (fine == fine.max()).nonzero().tolist())) == [(y, x) for y in (9, 10) for x in (25, 26)]
    deep = enlarged(coarse[:, :, None], (3, 17, 33), (4, 20, 36))
    assert deep.shape == (3, 17, 33)
    assert torch.equal(deep[0] == deep.max(), fine == fine.max())


def test_of_an_image_too_large_for_one_pass_the_part_with_the_finding_is_explained() -> None:
    module, job = load_task("segmentation"), discs(1, 0)[1].replace(data__size=16)
    image = np.full((1, 200, 160), 0.2)
    image[:, 150:158, 120:128] = 0.9

    class Threshold(torch.nn.Module):
        """Disc where it is bright; nothing else."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([-x, x, -9 * torch.ones_like(x)], 1)

    row = assemble(image, np.zeros(image.shape[1:], np.uint8), np.ones(2), image.shape[1:], job)
    data = Dataset.of([Sample("a", (), "", "test")], **{name: [value] for name, value in row.items()})
    case = module.explainable(Threshold(), data, job, CPU)
    assert case.label == "disc"
    assert case.pictures.shape == (1, 16, 16)
    assert case.region is not None
    assert case.region.sum() == 64
    assert np.array_equal(case.pictures[0] > 0.5, case.region[0])


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_without_a_map_the_picture_stays_grey_and_the_strongest_takes_the_colour_of_its_sign() -> None:
    picture = np.full((2, 2), 0.5, np.float32)
    drawn = blend(picture, np.array([[0.0, 1.0], [-1.0, 0.5]]))
    assert drawn[0, 0].tolist() == [128] * 3
    for place, colour in (((0, 1), FOR), ((1, 0), AGAINST)):
        assert np.abs(drawn[place] - (0.85 * np.array(colour) + 0.15 * 128)).max() < 1
    assert np.abs(drawn[1, 1] - (0.425 * np.array(FOR) + 0.575 * 128)).max() < 1


def test_strength_keeps_zero_and_sign_and_one_pixel_does_not_set_the_scale() -> None:
    maps = np.linspace(-1, 1, 2001).reshape(1, 3, -1)
    maps[0, 0, 0] = 1000
    found = strength(maps)
    assert found.max() == 1
    assert np.array_equal(np.sign(found), np.sign(maps))
    assert found[0, 2, -500] == pytest.approx(maps[0, 2, -500], abs=0.01)
    assert not strength(np.zeros((1, 4, 4))).any()
    assert strength(np.eye(40)[None] * [[1.0] + [0.0] * 39]).max() == 1  # all but one pixel are 0


def test_the_two_colours_can_be_told_apart_without_red_green_or_blue_cones() -> None:
    """Simulated by the matrices of Machado, Oliveira & Fernandes (IEEE TVCG 2009), full severity, on linear light."""
    blind = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }

    def seen(colour: tuple[int, ...], matrix: list[list[float]]) -> np.ndarray:
        linear = (np.array(colour) / 255) ** 2.2
        return np.clip(np.array(matrix) @ linear, 0, 1) ** (1 / 2.2)

    grey = (128, 128, 128)
    for kind, matrix in blind.items():
        for one, other in ((FOR, AGAINST), (FOR, grey), (AGAINST, grey)):
            assert np.linalg.norm(seen(one, matrix) - seen(other, matrix)) > 0.2, (kind, one, other)
    red, green = (200, 60, 60), (110, 110, 30)  # a pair that deuteranopes confuse, so that the measure can fail
    assert np.linalg.norm(seen(red, blind["deutan"]) - seen(green, blind["deutan"])) < 0.2


# --- the command ------------------------------------------------------------------------------------------------------


def save(model: torch.nn.Module, job: Job, folder: Path) -> Path:
    """A run folder as the server leaves it."""
    write_text(folder / "job.toml", job.toml())
    facts = {"job": job.sha256, "round": "1", "version": __version__, "model": job.model.name}
    write_model(folder / "model.safetensors", exchanged(model, job), facts)
    return folder


@pytest.fixture
def run_folder(looks_left: torch.nn.Module, job: Job, tmp_path: Path) -> Path:
    return save(looks_left, job, tmp_path / "run")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = spots(2, 5).columns["image"][1][0] // 257
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "case 7.png")
    return tmp_path / "case 7.png"


@pytest.mark.parametrize("method", METHODS)
def test_the_command_writes_a_picture_with_a_caption(
    method: str, run_folder: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    code, said, _ = called(
        capsys, "explain", run_folder, "--image", image, "--method", method, "--class", "spot", "--out", out
    )
    assert code == 0
    (file,) = out.iterdir()
    assert file.name == f"case-7-spot-{method}.png"
    with Image.open(file) as drawn:
        text, sheet = drawn.info["Description"], np.asarray(drawn)
    for word in ("case 7.png", "cnn", "spot: 0.9", "halves"):
        assert word in said, word
        assert word in text, word
    assert str(file) in said
    plain = sheet[12 : 12 + 384, 12 : 12 + 384]
    assert np.array_equal(plain[6::12, 6::12, 0], np.asarray(Image.open(image))), "the image as the model sees it"
    assert not np.array_equal(sheet[12 : 12 + 384, 408 : 408 + 384], plain), "and with the map"


def test_an_empty_map_is_said_to_be_empty(job: Job, image: Path, tmp_path: Path) -> None:
    """Every feature speaks for one class and against the other, for which a rectified map has nothing to show."""
    model = task.build_model(job)
    model.head.weight.data = torch.tensor([[-1.0], [1.0]]).expand_as(model.head.weight).clone()  # type: ignore
    folder = save(model, job, tmp_path / "run")
    for name, empty in (("plain", True), ("spot", False)):
        caption = " ".join(explain(folder, image, tmp_path / "o.png", "gradcam", name).caption)
        assert ("map is empty" in caption) == empty


def test_of_a_detector_the_boxes_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every box an untrained model finds, however unsure it is."""
    detector = importlib.import_module("shared.tasks.detection.predict")
    example = examples("detection")
    name, settings = next(iter(example.JOBS.items()))
    job = job_from_flat({"task": "detection", "model.name": name} | settings)
    example.site(tmp_path / "site", job, "a", 2, 0)
    module = load_task("detection")
    folder = save(module.build_model(job), job, tmp_path / "run")
    image = next(path for path in sorted((tmp_path / "site").rglob("*")) if path.suffix in (".png", ".jpg"))
    code, said, _ = called(capsys, "explain", folder, "--image", image, "--out", tmp_path / "plain.png")
    assert code == 0
    assert "nothing" in said
    monkeypatch.setattr(detector, "DRAWN", 0.0)
    found = explain(folder, image, tmp_path / "boxes.png")
    assert any(job.classes[k] in found.caption[1] for k in range(len(job.classes)))
    with Image.open(tmp_path / "plain.png") as plain, Image.open(found.file) as boxes:
        assert plain.size == boxes.size
        height = boxes.height - 80
        assert not np.array_equal(np.asarray(plain)[:height], np.asarray(boxes)[:height])
    code, _, errors = called(
        capsys, "explain", folder, "--image", image, "--method", "gradcam", "--out", tmp_path / "o.png"
    )
    assert (code, errors.count("\n")) == (2, 1)
    assert "leave --method and --class out" in errors


def test_a_task_without_an_explanation_says_so(tmp_path: Path, image: Path) -> None:
    example = examples("reconstruction")
    name, settings = next(iter(example.JOBS.items()))
    job = job_from_flat({"task": "reconstruction", "model.name": name} | settings)
    folder = save(load_task("reconstruction").build_model(job), job, tmp_path / "run")
    with pytest.raises(UserError, match="no explanation that could be drawn"):
        explain(folder, image, tmp_path / "o.png")


def test_a_folder_of_many_images_is_not_one_case(run_folder: Path, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(image.read_bytes())
    with pytest.raises(UserError, match="holds 2 cases; name one of them"):
        explain(run_folder, folder, tmp_path / "o.png")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--class", "spto"], "did you mean 'spot'"), (["--method", "gradcan"], "did you mean 'gradcam'"),
        (["--image", "nowhere.png"], "nowhere.png: no such file"), (["--image", "bad.png"], "cannot be read: bad.png"),
        (["--out", "/proc/o"], "cannot write there"), (["--out", "folder.png"], "is a folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(
    more: list[str],
    named: str,
    run_folder: Path,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.png").write_bytes(b"no picture")
    Path("folder.png").mkdir()
    code, _, errors = called(capsys, "explain", run_folder, "--image", image, "--out", "o.png", *more)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith("consilium: ")
    assert named in errors
