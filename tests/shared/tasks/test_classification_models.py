"""The networks: they build, learn, start alike everywhere, and take weights from files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

import shared.tasks.classification as task
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.imaging.dataset import Dataset
from shared.tasks.classification import build_model, check, step
from shared.tasks.classification.data import Batch
from shared.tasks.classification.models import MODELS, head_prefix
from shared.training import make_optimizer, train
from shared.weights import digest, exchanged, put

torch.set_num_threads(1)  # on small networks more threads are slower, above all where cores are shared

SMALL = [name for name in MODELS if name != "vgg16"]  # vgg16 has 134 million parameters: one test of its own
ENDS = ("weight", "bias")
BATCHNORM = ["resnet18", "resnet50", "densenet121"]


def job_of(name: str, **more: Any) -> Job:
    flat = {"model.name": name, "data.size": 32, "data.classes": "a,b,c", "model.width": 8, "train.local_steps": 2}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def pictures(job: Job, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, job.data.channels, job.data.size, job.data.size, generator=generator)


def losses(model: nn.Module, job: Job, rate: float = 1e-3, steps: int = 3) -> list[float]:
    """Training on one fixed batch."""
    images = pictures(job, 6)
    targets: list[tuple[int, ...]] = [(k % 3,) for k in range(6)]
    if job.data.multilabel:
        targets = [(), (0,), (1, 2), (0, 1, 2), (2,), (1,)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step(model, Batch(images, targets), job, [1.0, 1.0, 1.0])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("channels", "multilabel"), [(1, False), (3, True)])
@pytest.mark.parametrize("name", SMALL)
def test_a_model_answers_with_one_logit_per_class_and_learns_a_fixed_batch(
    name: str, channels: int, multilabel: bool
) -> None:
    job = job_of(name, data__channels=channels, data__multilabel=multilabel)
    model = build_model(job)
    assert model(pictures(job, 2)).shape == (2, 3)
    found = losses(model, job)
    assert all(loss == loss for loss in found)
    assert found[-1] < found[0]


def test_vgg16_answers_trains_its_head_and_exchanges_it() -> None:
    job = job_of("vgg16", model__freeze="backbone")
    model = build_model(job).eval()
    assert model(pictures(job, 1)).shape == (1, 3)
    assert list(exchanged(model, job)) == ["classifier.6.weight", "classifier.6.bias"]
    found = losses(model, job)
    assert found[-1] < found[0]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [8, 31, 33])
def test_a_model_takes_every_size_a_job_may_ask_for_or_refuses_the_job(name: str, size: int) -> None:
    """In one line at the start, not with a traceback at the sites."""
    job = job_of(name, data__size=size)
    try:
        check(job)
        model = build_model(job)
    except UserError:
        return
    assert model(pictures(job, 2)).shape == (2, 3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"data__channels": 2}, "data.channels = 2"),
        ({"data__multilabel": True, "data__partition": "dirichlet"}, "data.partition = 'dirichlet'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_line(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check(job_of("cnn", **more))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    for value in (1, 3):
        check(job_of("cnn", data__channels=value, data__multilabel=True))


def test_cnn_has_the_number_of_parameters_it_is_said_to_have() -> None:
    model = build_model(job_from_flat({}))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 0.16
    assert not list(model.buffers())


def test_no_image_changes_what_cnn_answers_for_another() -> None:
    job = job_of("cnn")
    model = build_model(job).train()
    images = pictures(job, 4)
    alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(model(images), alone, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_exchanged_puts_an_equal_model_together(name: str) -> None:
    job = job_of(name)
    model = build_model(job)
    losses(model, job, steps=2)  # moves weights and running statistics
    sent = exchanged(model, job)
    other = build_model(job.replace(seed=1))
    put(other, sent, job)
    state = other.state_dict()
    assert list(sent) == list(state)
    for key, value in model.state_dict().items():
        assert state[key].dtype == sent[key].dtype == value.dtype
        assert torch.equal(state[key], value), key
    if name in BATCHNORM:
        counters = [value for key, value in sent.items() if key.endswith("num_batches_tracked")]
        assert counters
        assert all(value.dtype == torch.int64 and value.item() == 2 for value in counters)
    images = pictures(job, 2, seed=5)
    assert torch.equal(model.eval()(images), other.eval()(images))


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_equal_jobs_start_from_equal_weights_in_every_process(name: str, root: Path) -> None:
    job = job_of(name)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    mine = digest(build_model(job).state_dict())
    assert torch.equal(before, torch.get_rng_state())  # the caller's random numbers stay what they were
    torch.rand(3)
    assert digest(build_model(job).state_dict()) == mine
    assert digest(build_model(job.replace(seed=1)).state_dict()) != mine
    code = (
        "import sys, torch; torch.rand(7); from shared.config import job_from_flat; import json\n"
        "from shared.tasks.classification import build_model; from shared.weights import digest\n"
        "print(digest(build_model(job_from_flat(json.loads(sys.argv[1]))).state_dict()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, json.dumps(job.flat())],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == mine


@pytest.mark.parametrize("name", ["cnn", *BATCHNORM])
def test_a_frozen_backbone_is_neither_trained_nor_sent_and_keeps_its_statistics(
    name: str, dataset: Callable[[Job], Dataset]
) -> None:
    job = job_of(name, model__freeze="backbone", train__batch_size=4)
    model = build_model(job)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, task, dataset(job), job, site="a", first_step=0, steps=2, class_weights=[1, 1, 1])
    head = head_prefix(job)
    assert {key for key in before if key.startswith(head)} == {head + end for end in ENDS}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith(head), key
    assert list(exchanged(model, job)) == [head + end for end in ENDS]
    trained = [parameter for group in make_optimizer(model, job).param_groups for parameter in group["params"]]
    assert sum(parameter.numel() for parameter in trained) == sum(before[head + end].numel() for end in ENDS)


@pytest.fixture
def dataset() -> Callable[[Job], Dataset]:
    """Twelve random images of three classes."""

    def make(job: Job) -> Dataset:
        shape = (12, job.data.channels, job.data.size, job.data.size)
        images = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
        return Dataset.of([Sample(str(k), (k % 3,), str(k), "train") for k in range(12)], image=images)

    return make


# --- weights from elsewhere -------------------------------------------------------------------------------------------


def published(name: str, classes: int = 10) -> nn.Module:
    """A network as torchvision makes it, with running statistics of its own."""
    torch.manual_seed(11)
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.uniform_(-0.1, 0.1).add_(key.endswith("var"))
    return model.eval()


def write(state: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_of_a_file_are_taken_and_the_head_only_where_it_fits(tmp_path: Path, suffix: str) -> None:
    source = published("resnet18")
    text = write(source.state_dict(), tmp_path / f"weights{suffix}")
    job = job_of("resnet18", data__channels=3)
    fresh = build_model(job).state_dict()
    state = build_model(job.replace(model__weights=text)).state_dict()
    for key, value in source.state_dict().items():
        assert torch.equal(state[key], fresh[key] if key.startswith("fc.") else value), key
    ten = job.replace(model__weights=text, data__classes=",".join("abcdefghij"))
    state = build_model(ten).state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("name", BATCHNORM)
def test_a_grey_image_is_answered_as_the_original_answers_it_shown_in_colour(tmp_path: Path, name: str) -> None:
    source = published(name)
    text = write(source.state_dict(), tmp_path / "weights.safetensors")
    job = job_of(name, data__channels=1, data__classes=",".join("abcdefghij"), model__weights=text)
    grey = pictures(job, 3)
    with torch.inference_mode():
        expected = source(grey.expand(-1, 3, -1, -1))
        found = build_model(job).eval()(grey)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())
    assert found.std() > 0


def test_cnn_continues_from_its_own_weights(tmp_path: Path) -> None:
    job = job_of("cnn")
    source = build_model(job.replace(seed=5))
    text = write(source.state_dict(), tmp_path / "global.safetensors")
    assert digest(build_model(job.replace(model__weights=text)).state_dict()) == digest(source.state_dict())


def one_line(job: Job) -> str:
    with pytest.raises(UserError) as caught:
        build_model(job)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_are_not_there_not_weights_or_of_another_network_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({"epoch": 3, "state_dict": published("resnet18").state_dict()}, tmp_path / "other.pt")
    write(published("resnet50").state_dict(), tmp_path / "resnet50.pt")
    words = {
        "gone.pt": "no such file",
        "gone.safetensors": "no such file",
        "text.pt": "not a file of weights",
        "text.safetensors": "not a file of weights",
        "list.pt": "",
        "other.pt": "does not fit",
        "resnet50.pt": "does not fit resnet18",
    }
    for name, word in words.items():
        text = one_line(job_of("resnet18", model__weights=str(tmp_path / name)))
        assert name in text
        assert word in text


def test_grey_weights_do_not_fit_a_network_for_colour(tmp_path: Path) -> None:
    text = write(build_model(job_of("cnn")).state_dict(), tmp_path / "grey.pt")
    assert "does not fit cnn" in one_line(job_of("cnn", data__channels=3, model__weights=text))


def test_a_weight_name_torchvision_does_not_know_is_answered_with_those_it_does() -> None:
    text = one_line(job_of("resnet18", model__weights="IMAGENET"))
    assert "IMAGENET1K_V1" in text
    assert "DEFAULT" in text
    assert "no published weights" in one_line(job_of("cnn", model__weights="DEFAULT"))


def fetched(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> None:
    """Replace the download, under both names it has."""
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", answer)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", answer)


def test_without_a_network_the_file_to_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    fetched(monkeypatch, offline)
    text = one_line(job_of("resnet18", model__weights="DEFAULT"))
    assert re.search(r"resnet18-\w+\.pth", text)
    assert "URLError" in text


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision's older files are: no counters of batches, and dots in the names of densenet's layers."""
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])\.")
    return {pattern.sub(r"\1.\2.", key): value for key, value in state.items() if "num_batches" not in key}


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("name", BATCHNORM)
def test_weights_as_torchvision_publishes_them_are_taken(
    name: str, as_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = published(name, classes=1000)
    files = old_names(source.state_dict())
    fetched(monkeypatch, lambda *args, **kwargs: dict(files))
    # The oracle: torchvision itself takes them.
    reference = torchvision.models.get_model(name, weights="IMAGENET1K_V1").eval()
    job = job_of(name, data__channels=3)
    where = write(files, tmp_path / "weights.pth") if as_file else "IMAGENET1K_V1"
    state = build_model(job.replace(model__weights=where)).state_dict()
    head = head_prefix(job)
    for key, value in reference.state_dict().items():
        if not key.startswith(head):
            assert torch.equal(state[key], value), key


def test_an_unknown_model_is_answered_with_the_nearest() -> None:
    job = job_of("resnet81")
    for call in (check, build_model):
        with pytest.raises(UserError, match="did you mean 'resnet18'"):
            call(job)
    for name in MODELS:
        check(job_of(name))
