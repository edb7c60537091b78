"""Autoencoders: any size, alone in a batch, and what a code costs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.tasks.reconstruction import build_model, check, step
from shared.tasks.reconstruction.data import Batch
from shared.tasks.reconstruction.learning import NOISE
from shared.tasks.reconstruction.models import MODELS, Autoencoder, Vae, sides

torch.set_num_threads(1)


def job_of(name: str = "autoencoder", **more: Any) -> Job:
    flat = {
        "task": "reconstruction",
        "model.name": name,
        "data.classes": "plain,spot",
        "data.size": 16,
        "model.width": 8,
        "model.latent": 6,
    }
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def pictures(job: Job, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, job.data.channels, job.data.size, job.data.size, generator=generator)


@given(size=st.integers(8, 4096))
def test_each_side_is_half_the_one_before_rounded_up_down_to_the_smallest(size: int) -> None:
    found = sides(size)
    assert found[0] == size
    assert 2 <= found[-1] <= 4
    # a convolution of 3 pixels with stride 2 and one pixel of padding gives floor((side - 1) / 2) + 1
    assert all(small == (large - 1) // 2 + 1 for large, small in pairwise(found))


@settings(max_examples=12, deadline=None)
@given(size=st.integers(8, 70), channels=st.sampled_from([1, 3]), name=st.sampled_from(list(MODELS)))
def test_images_of_any_size_come_out_as_they_went_in(size: int, channels: int, name: str) -> None:
    job = job_of(name, data__size=size, data__channels=channels)
    rebuilt, cost = build_model(job)(pictures(job, 2))
    assert rebuilt.shape == (2, channels, size, size)
    assert cost.shape == (2,)


@pytest.mark.parametrize("name", MODELS)
def test_no_image_changes_what_is_made_of_another(name: str) -> None:
    job = job_of(name)
    model = build_model(job).eval()
    images = pictures(job, 4)
    alone = torch.cat([model(image[None])[0] for image in images])
    assert torch.allclose(model(images)[0], alone, atol=1e-5)
    assert not list(model.buffers())


@pytest.mark.parametrize("latent", [1, 6])
def test_nothing_but_the_latent_numbers_passes_from_the_image_to_its_reconstruction(latent: int) -> None:
    """The Jacobian of the reconstruction has no more rank than there are latent numbers."""
    job = job_of(model__latent=latent)
    model = build_model(job).double()
    image = pictures(job, 1).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[0].flatten(), image).reshape(256, 256)  # type: ignore[no-untyped-call]
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-9) == latent


def test_the_code_of_an_autoencoder_costs_nothing_and_the_loss_is_the_mean_squared_error() -> None:
    job = job_of()
    model = build_model(job)
    images = pictures(job, 3)
    loss = step(model, Batch(images, 0.0, 1.0), job, [1.0])
    assert loss.item() == pytest.approx(((model(images)[0] - images) ** 2).mean().item(), rel=1e-6)


def test_the_loss_of_a_vae_is_the_negative_evidence_lower_bound() -> None:
    """Against torch's own normal distributions, up to the constant and the factor that ``step`` states."""
    job = job_of("vae")
    model = build_model(job)
    assert isinstance(model, Vae)
    images = pictures(job, 3)
    torch.manual_seed(4)
    loss = step(model.train(), Batch(images, 0.0, 1.0), job, [1.0])
    mean, log_variance = model.encoder(images).chunk(2, 1)
    code = Normal(mean, log_variance.exp().sqrt())
    torch.manual_seed(4)
    drawn = code.rsample()
    likelihood = Normal(model.decoder(drawn), NOISE)
    best = Normal(images, NOISE).log_prob(images)
    gap = (best - likelihood.log_prob(images)).sum((1, 2, 3))
    bound = gap + kl_divergence(code, Normal(torch.zeros(6), torch.ones(6))).sum(1)
    assert loss.item() == pytest.approx((2 * NOISE**2 * bound / 256).mean().item(), rel=1e-4)


def test_a_vae_draws_from_torchs_generator_in_training_and_takes_the_mean_in_evaluation() -> None:
    job = job_of("vae")
    model = build_model(job)
    images = pictures(job, 2)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        rebuilt: Tensor = model(images)[0]
        return rebuilt

    model.train()
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    model.eval()
    assert torch.equal(drawn(1), drawn(2))
    mean, _ = model.encoder(images).chunk(2, 1)  # type: ignore[operator]
    assert torch.equal(model.decoder(mean), drawn(1))  # type: ignore[operator]


def test_the_gradient_of_a_batch_is_the_mean_of_its_images_gradients() -> None:
    """What differential privacy bounds per image."""
    job = job_of()
    model = build_model(job)
    images = pictures(job, 3)

    def gradient(chosen: Tensor) -> Tensor:
        model.zero_grad()
        step(model, Batch(chosen, 0.0, 1.0), job, [1.0]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    parts = torch.stack([gradient(image[None]) for image in images])
    assert torch.allclose(gradient(images), parts.mean(0), atol=1e-6)


def test_weights_of_a_file_are_taken_whole_or_refused(tmp_path: Any) -> None:
    job = job_of()
    source = build_model(job.replace(seed=3))
    save_file(dict(source.state_dict()), tmp_path / "weights.safetensors")
    given = {"model__weights": str(tmp_path / "weights.safetensors")}
    state = build_model(job.replace(**given)).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())
    for other in ({"model__latent": 5}, {"data__channels": 3}, {"model__name": "vae"}):
        with pytest.raises(UserError, match="does not fit"):
            build_model(job.replace(**given, **other))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model__name": "autoencodr"}, "did you mean 'autoencoder'"),
        ({"data__channels": 2}, "1 .grey. or 3"),
        ({"data__normal": "plane"}, "did you mean 'plain'"),
        ({"data__multilabel": True}, "multilabel"),
        ({"model__freeze": "backbone"}, "no backbone"),
        ({"model__weights": "DEFAULT"}, "no published weights"),
        ({"data__modalities": "pa,lateral"}, "one image per case"),
        ({"data__tabular": "age"}, "one image per case"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_line(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        check(job_of().replace(**change))
    assert "\n" not in str(caught.value)


def test_adding_a_model_takes_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.tasks.reconstruction.models import Entry

    class Linear(Autoencoder):
        """A code from a single layer."""

    monkeypatch.setitem(MODELS, "linear", Entry(lambda job: Linear(1, job.data.size, 4, 2)))
    assert isinstance(build_model(job_of("linear")), Linear)
