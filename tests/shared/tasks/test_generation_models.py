"""The generator and the discriminator: sizes, the spectral norm, the moving average, and whose gradient goes where."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import shared.tasks.generation as task
from server.aggregation import weighted_mean
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.imaging.augment import normalise
from shared.imaging.dataset import Dataset, to_uint16
from shared.tasks import TASKS
from shared.tasks.generation.data import Batch
from shared.tasks.generation.layers import SpectralConv2d, SpectralLinear, _start, largest_singular_value
from shared.tasks.generation.models import (
    Gan,
    build_model,
    check,
    reference,
    sides,
)
from shared.training import train
from shared.weights import digest, exchanged, exchanged_names, put


def job_of(**more: Any) -> Job:
    flat = {
        "task": "generation",
        "model.name": "dcgan",
        "model.width": 4,
        "model.latent": 8,
        "model.conditional": True,
        "data.classes": "left,right",
        "data.size": 12,
        "train.batch_size": 4,
        "train.device": "cpu",
        "train.learning_rate": 0.002,
    }
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def data_of(job: Job, n: int = 12, seed: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)
    pictures = generator.random((n, job.data.channels, job.data.size, job.data.size))
    return Dataset.of([Sample(str(k), (k % 2,), str(k), "train") for k in range(n)], image=to_uint16(pictures))


def batch_of(job: Job, n: int = 6, seed: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, job.data.channels, job.data.size, job.data.size, generator=generator)
    return Batch(images, torch.arange(n) % 2)


def run(model: Gan, job: Job, data: Dataset, first_step: int = 0, steps: int = 1, site: str = "a") -> None:
    train(model, task, data, job, site=site, first_step=first_step, steps=steps, class_weights=[1.0])


# --- shapes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(size=st.integers(8, 128), channels=st.sampled_from([1, 3]), conditional=st.booleans())
def test_every_size_a_job_may_ask_for(size: int, channels: int, conditional: bool) -> None:
    job = job_of(data__size=size, data__channels=channels, model__conditional=conditional)
    model = build_model(job)
    with torch.inference_mode():
        pictures = model(torch.randn(2, 8), torch.tensor([0, 1]))
        scores = model.discriminator(normalise(pictures, job), torch.tensor([0, 1]))
    assert pictures.shape == (2, channels, size, size)
    assert scores.shape == (2,)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    lengths = sides(size)
    assert lengths[-1] == size
    assert lengths[0] in range(4, 9)
    assert all(small == -(-large // 2) for small, large in pairwise(lengths))


def test_the_class_changes_the_picture_and_the_score_only_of_a_conditional_model() -> None:
    noise = torch.randn(5, 8)
    for conditional in (True, False):
        job = job_of(model__conditional=conditional)
        model = build_model(job)
        first, second = (model(noise, torch.full((5,), kind)) for kind in (0, 1))
        scores = [model.discriminator(normalise(first, job), torch.full((5,), kind)) for kind in (0, 1)]
        assert torch.equal(first, second) != conditional
        assert torch.equal(*scores) != conditional


def test_no_image_changes_the_score_of_another() -> None:
    job = job_of()
    model = build_model(job).train()
    images, classes = batch_of(job)
    together = model.discriminator(images, classes)
    alone = torch.cat([model.discriminator(images[k : k + 1], classes[k : k + 1]) for k in range(len(images))])
    assert torch.allclose(together, alone, atol=1e-5)


# --- the spectral norm ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 96),
    columns=st.integers(1, 200),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_the_spectral_norm_is_nearly_that_of_the_singular_value_decomposition(
    rows: int, columns: int, seed: int, scale: float
) -> None:
    """Random matrices are the hard case: their largest singular values lie close together."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    exact = np.linalg.svd(weight.numpy().astype(np.float64), compute_uv=False)[0]
    found = largest_singular_value(weight, _start(rows)).item()
    assert 0.97 * exact <= found <= exact * (1 + 1e-5)


def test_the_spectral_norm_and_its_gradient_are_exact_where_one_direction_stands_out() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.linalg.qr(torch.randn(n, 6, generator=generator))[0] for n in (24, 50))
    weight = (rows * torch.tensor([5.0, 3, 2, 1, 1, 0.5])) @ columns.T
    ours, theirs = (weight.clone().requires_grad_() for _ in range(2))
    norm = largest_singular_value(ours, _start(24))
    norm.backward()
    torch.linalg.matrix_norm(theirs, 2).backward()
    assert norm.item() == pytest.approx(5, rel=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)  # type: ignore[arg-type]


def test_the_norm_keeps_its_precision_under_autocast() -> None:
    weight = torch.randn(48, 200, generator=torch.Generator().manual_seed(1))
    exact = largest_singular_value(weight, _start(48))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(largest_singular_value(weight, _start(48)), exact, rtol=1e-5)


@pytest.mark.parametrize("layer", [SpectralConv2d(3, 8, 3, 2, 1), SpectralLinear(40, 7)], ids=["conv", "linear"])
def test_a_layers_weight_does_not_matter_in_scale(layer: SpectralConv2d | SpectralLinear) -> None:
    x = torch.randn(2, 3, 9, 9) if isinstance(layer, SpectralConv2d) else torch.randn(2, 40)
    before = layer(x)
    with torch.no_grad():
        layer.weight *= 7
    assert torch.allclose(layer(x), before, atol=1e-5)


def test_the_discriminator_follows_from_what_is_exchanged_alone() -> None:
    """No power iteration's vector is carried: a site that trained, one that sat out and the server score alike."""
    job = job_of()
    model = build_model(job)
    run(model, job, data_of(job), steps=3)
    assert not [name for name in exchanged_names(model, job) if "start" in name]
    other = build_model(job.replace(seed=5))
    run(other, job, data_of(job, seed=9), steps=2)  # a history of its own
    put(other, exchanged(model, job), job)
    images, classes = batch_of(job)
    assert torch.equal(model.discriminator(images, classes), other.discriminator(images, classes))


def test_averaged_weights_are_normalised_as_any_others() -> None:
    """The mean of the sites' discriminators has layers of norm 1, though a mean of unit vectors has not length 1."""
    job = job_of()
    sites = [build_model(job) for _ in range(3)]
    for number, model in enumerate(sites):
        run(model, job, data_of(job, seed=number), steps=4, site=str(number))
    mean = build_model(job)
    put(mean, weighted_mean((1.0, exchanged(model, job)) for model in sites), job)
    for layer in mean.discriminator.modules():
        if isinstance(layer, SpectralConv2d | SpectralLinear):
            weight = layer.weight / largest_singular_value(layer.weight, layer.start)
            norm = torch.linalg.matrix_norm(weight.flatten(1), 2).item()
            assert 1 - 1e-5 <= norm <= 1.05


# --- the moving average -----------------------------------------------------------------------------------------------


def test_the_average_is_buffers_that_travel_and_no_optimiser_sees() -> None:
    job = job_of()
    model = build_model(job)
    assert not list(model.average.parameters())
    names = {name for name, _ in model.generator.named_parameters()}
    assert names == {name for name, _ in model.average.named_buffers()}
    assert {f"average.{name}" for name in names} | {"updates"} < set(exchanged_names(model, job))
    trained = {name.partition(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"generator", "discriminator"}
    assert not [name for name in exchanged_names(model, job) if name.startswith("reference.")]


def test_with_one_step_a_round_the_mean_of_the_sites_averages_is_the_average_of_the_mean() -> None:
    """To the bit at the sites; the oracle is the textbook's recursion over the global generators, in float64."""
    job = job_of(federation__rounds=6, train__local_steps=1)
    start = build_model(job)
    state = exchanged(start, job)
    expected = {name: value.double() for name, value in state.items() if name.startswith("average.")}
    data = [data_of(job, 8, 1), data_of(job, 14, 2)]
    for round_ in range(6):
        share = max(1 / max(0.05 * 6, 1.0), 9 / (10 + round_))
        for name in expected:
            now = state[name.replace("average.", "generator.")].double()
            expected[name] = (1 - share) * expected[name] + share * now
        replies = []
        for number, part in enumerate(data):
            model = build_model(job)
            put(model, state, job)
            run(model, job, part, first_step=round_, site=str(number))
            replies.append((float(len(part)), exchanged(model, job)))
        for name in expected:
            assert torch.equal(replies[0][1][name], replies[1][1][name])
        assert not torch.equal(replies[0][1]["generator.first.weight"], replies[1][1]["generator.first.weight"])
        state = weighted_mean(replies)
        for name, value in expected.items():
            assert torch.equal(state[name], replies[0][1][name])
            assert torch.allclose(state[name].double(), value, atol=1e-5)
        assert state["updates"].item() == round_ + 1
        assert state["updates"].dtype == torch.int64


@pytest.mark.parametrize(("updates", "horizon", "share"), [(0, 40.0, 0.9), (90, 40.0, 0.09), (5000, 40.0, 1 / 40)])
def test_the_average_moves_fast_at_first_and_by_its_horizon_in_the_end(
    updates: int, horizon: float, share: float
) -> None:
    model = build_model(job_of())
    model.updates.fill_(updates)
    before = model.average.get_buffer("last.weight").clone()
    with torch.no_grad():
        model.generator.get_parameter("last.weight").add_(1.0)
    model.follow(horizon)
    assert torch.allclose(model.average.get_buffer("last.weight") - before, torch.full_like(before, share), atol=1e-5)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_losses_are_the_hinge_loss_written_out() -> None:
    job = job_of()
    model = build_model(job)
    images, classes = batch_of(job, 5)
    torch.manual_seed(4)
    noise = torch.randn(5, 8)
    made = normalise(model.generator(noise, classes), job)
    fake = [model.discriminator(made[k : k + 1], classes[k : k + 1]).item() for k in range(5)]
    real = [model.discriminator(images[k : k + 1], classes[k : k + 1]).item() for k in range(5)]
    hinge = np.mean([max(0, 1 - r) + max(0, 1 + f) for r, f in zip(real, fake, strict=True)])
    torch.manual_seed(4)
    found = task.step(model, Batch(images, classes), job, [1.0], "discriminator.")
    assert found.item() == pytest.approx(hinge, abs=1e-5)
    torch.manual_seed(4)
    found = task.step(model, Batch(images, classes), job, [1.0], "generator.")
    assert found.item() == pytest.approx(-np.mean(fake), abs=1e-5)


@pytest.mark.parametrize("part", ["discriminator.", "generator."])
def test_a_turn_changes_its_player_alone(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of()
    model = build_model(job)
    turns = tuple(turn for turn in task.parts(job) if turn.prefix == part)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(task, "parts", lambda job: turns)
    run(model, job, data_of(job))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    followed = {"average", "updates"} if part == "generator." else set()
    assert {name.partition(".")[0] for name in changed} - followed == {part.rstrip(".")}
    weights = {name for name in before if name.startswith(part) and name.endswith("weight")}
    assert weights <= changed


def test_the_discriminators_turn_leaves_no_gradient_at_the_generator() -> None:
    job = job_of()
    model = build_model(job)
    task.step(model, batch_of(job), job, [1.0], "discriminator.").backward()
    assert all(parameter.grad is None for parameter in model.generator.parameters())
    assert all(parameter.grad is not None for parameter in model.discriminator.parameters())


def test_noise_comes_from_torchs_global_generator() -> None:
    job = job_of()
    model = build_model(job)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(task.step(model, batch_of(job), job, [1.0], "discriminator.").item())

    assert loss(1) == loss(1) != loss(2)


# --- the job ----------------------------------------------------------------------------------------------------------


def test_the_reference_is_a_classifier_of_the_same_images_whatever_the_generator_is_trained_with() -> None:
    job = job_of(evaluation__reference_rounds=7, data__normalise="image")
    found = reference(job)
    assert (found.task, found.federation.rounds, found.classes) == ("classification", 7, job.classes)
    assert found.data == job.data
    assert found.best_metric in TASKS["classification"].metrics
    assert reference(job.replace(train__local_steps=4, train__learning_rate=0.1, model__width=9)) == found
    state = build_model(job).reference.state_dict()
    from shared.tasks.classification import build_model as classifier

    assert digest(state) == digest(classifier(found).state_dict())


def test_equal_jobs_start_from_equal_weights_and_leave_the_callers_random_numbers() -> None:
    job = job_of()
    before = torch.get_rng_state()
    first = digest(build_model(job).state_dict())
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert digest(build_model(job).state_dict()) == first


def test_training_goes_on_from_the_weights_of_an_earlier_run(tmp_path: Path) -> None:
    job = job_of()
    model = build_model(job)
    run(model, job, data_of(job), steps=2)
    save_file(exchanged(model, job), tmp_path / "model.safetensors")
    again = build_model(job.replace(model__weights=str(tmp_path / "model.safetensors"), seed=8))
    assert digest(exchanged(again, job)) == digest(exchanged(model, job))
    with pytest.raises(UserError, match="does not fit dcgan"):
        build_model(job.replace(model__weights=str(tmp_path / "model.safetensors"), model__width=8))


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"model.name": "dcgna"}, "did you mean 'dcgan'"),
        ({"data.size": 129}, "at most 128"),
        ({"data.classes": "chest"}, "at least two"),
        ({"data.multilabel": True}, "multilabel"),
        ({"data.channels": 2}, "data.channels"),
        ({"model.freeze": "backbone"}, "model.freeze"),
        ({"model.weights": "DEFAULT"}, "no published weights"),
        ({"data.modalities": "pa,lateral"}, "data.modalities"),
        ({"data.tabular": "age"}, "data.tabular"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(settings_: dict[str, Any], words: str) -> None:
    job = job_from_flat(job_of().flat() | settings_)
    with pytest.raises(UserError, match=words) as caught:
        check(job)
    assert "\n" not in str(caught.value)


def test_scores_are_bounded_by_the_distance_of_the_images() -> None:
    """What the spectral norm is for: no step of the image changes the score by more than the layers' norms allow."""
    job = job_of(model__conditional=False)
    model = build_model(job)
    run(model, job, data_of(job), steps=10)
    first, second = batch_of(job, 40, 1).images, batch_of(job, 40, 2).images
    none = torch.zeros(40, dtype=torch.int64)
    gap = (model.discriminator(first, none) - model.discriminator(second, none)).abs()
    layers = [layer for layer in model.discriminator.modules() if isinstance(layer, SpectralConv2d)]
    # A kernel of norm 1 as a matrix is an operator of norm at most its side, where patches overlap.
    bound = np.prod([layer.kernel_size[0] / layer.stride[0] for layer in layers]) * 1.05 ** (len(layers) + 1)
    assert (gap <= bound * (first - second).flatten(1).norm(dim=1)).all()
    assert F.relu(gap).max() > 0
