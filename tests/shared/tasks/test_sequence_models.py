"""Sequence networks: padding changes nothing, order does, and each layer agrees with torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.tasks.sequence import build_model, check, example, head_prefix
from shared.tasks.sequence.models import MODELS, FilmNorm, FrameEncoder, Recurrent, valid_steps

LENGTHS = torch.tensor([5, 2, 1, 3])


def job(name: str = "cnn_gru", **more: Any) -> Job:
    small = {"task": "sequence", "model.name": name, "data.size": 8, "model.width": 4, "model.hidden": 6}
    return job_from_flat(small | {key.replace("__", "."): value for key, value in more.items()})


def inputs(made: Job, steps: int = 5, seed: int = 0) -> Tensor:
    """A batch of four cases, with noise in the padding too."""
    shape = example(made)[0].shape[2:]
    return torch.randn(4, steps, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_in_the_padding_changes_neither_result_nor_gradient(name: str) -> None:
    model, series = build_model(job(name)), inputs(job(name))
    other = series.clone()
    padding = ~valid_steps(LENGTHS, 5)
    other[padding] = 1e4 * torch.randn(other[padding].shape)
    results = []
    for given_series in (series, other):
        model.zero_grad()
        logits = model(given_series, LENGTHS)
        logits.square().sum().backward()
        results.append((logits, [parameter.grad.clone() for parameter in model.parameters()]))
    (logits, gradients), (logits2, gradients2) = results
    torch.testing.assert_close(logits2, logits, rtol=0, atol=1e-6)
    for one, two in zip(gradients, gradients2, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_case_in_a_batch_is_as_the_case_alone_without_padding(name: str) -> None:
    model, series = build_model(job(name)), inputs(job(name))
    together = model(series, LENGTHS)
    longer = model(torch.cat([series, series], 1), LENGTHS)  # five more steps of padding
    torch.testing.assert_close(longer, together, rtol=0, atol=1e-6)
    for k, length in enumerate(LENGTHS.tolist()):
        alone = model(series[k : k + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(alone[0], together[k], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_the_steps_matters(name: str) -> None:
    model, series = build_model(job(name)), inputs(job(name))
    whole = torch.full((4,), 5)
    assert (model(series, whole) - model(series.flip(1), whole)).abs().min() > 1e-5


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.sampled_from([(1, 4), (2, 4), (4, 4), (8, 8)]),
    st.integers(0, 1000),
)
def test_film_norm_is_group_norm_of_each_film(lengths: list[int], shape: tuple[int, int], seed: int) -> None:
    groups, channels = shape
    torch.manual_seed(seed)
    ours, torchs = FilmNorm(groups, channels), nn.GroupNorm(groups, channels)
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
        torchs.load_state_dict(ours.state_dict())
    x = 2 + 3 * torch.randn(len(lengths), max(lengths), channels, 3, 5)
    found = ours(x.flatten(0, 1), valid_steps(torch.tensor(lengths), max(lengths))).view_as(x)
    for film, result, length in zip(x, found, lengths, strict=True):
        expected = torchs(film[:length].transpose(0, 1)[None])[0].transpose(0, 1)
        torch.testing.assert_close(result[:length], expected, rtol=1e-4, atol=1e-5)


def test_film_norm_keeps_how_bright_frames_are_against_each_other() -> None:
    """What the normalisation of single frames takes away."""
    film = torch.randn(1, 1, 4, 6, 6).expand(1, 3, 4, 6, 6) + torch.tensor([0.0, 1, 2]).view(1, 3, 1, 1, 1)
    found = FilmNorm(1, 4)(film.flatten(0, 1), torch.ones(1, 3, dtype=torch.bool))
    levels = found.mean((1, 2, 3))
    assert torch.allclose(levels.diff(), levels.diff()[0].expand(2), atol=1e-5)
    assert levels.diff().min() > 0.5


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM])
def test_the_head_sees_the_last_state_and_the_mean_of_packed_sequences(layer: type[nn.GRU] | type[nn.LSTM]) -> None:
    torch.manual_seed(0)
    model, features = Recurrent(layer, 3, 6, 2), torch.randn(4, 5, 3)
    packed = pack_padded_sequence(features, LENGTHS, batch_first=True, enforce_sorted=False)
    states = model.layer(packed)[1]
    last = (states[0] if layer is nn.LSTM else states)[0]
    means = torch.stack([model.layer(features[k : k + 1, :n])[0][0].mean(0) for k, n in enumerate(LENGTHS.tolist())])
    torch.testing.assert_close(model(features, LENGTHS), model.head(torch.cat([last, means], 1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "convolutions", "side"), [(8, 4, 4), (16, 4, 8), (32, 6, 8), (64, 6, 8), (256, 8, 16)]
)
def test_larger_frames_get_more_stages(size: int, convolutions: int, side: int) -> None:
    encoder = FrameEncoder(1, size, 4)
    seen: list[tuple[int, ...]] = []
    encoder.norms[-1].register_forward_hook(lambda module, args, result: seen.append(result.shape))
    found = encoder(torch.zeros(1, 2, 1, size, size), torch.ones(1, 2, dtype=torch.bool))
    assert len(encoder.convolutions) == convolutions
    assert seen[0][2:] == (side, side)
    assert found.shape == (1, 2, encoder.outputs)


def test_sizes_that_do_not_divide_evenly_and_colour() -> None:
    made = job(data__size=37, data__channels=3)
    assert build_model(made)(torch.rand(2, 3, 3, 37, 37), torch.tensor([3, 1])).shape == (2, 2)


def test_hidden_units_leads_and_classes_set_the_shapes() -> None:
    model = build_model(job("lstm", data__channels=12, model__hidden=7, data__classes="a,b,c"))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["layer.weight_ih_l0"] == (4 * 7, 12)
    assert shapes["head.weight"] == (3, 14)


@pytest.mark.parametrize("name", MODELS)
def test_freezing_leaves_the_head_alone(name: str) -> None:
    made = job(name, model__freeze="backbone")
    trained = [n for n, parameter in build_model(made).named_parameters() if parameter.requires_grad]
    assert len(trained) == 2
    assert all(n.startswith(head_prefix(made)) for n in trained)


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_a_file_are_taken_but_for_a_head_of_other_classes(name: str, tmp_path: Path) -> None:
    source = build_model(job(name, seed=3)).state_dict()
    save_file(source, tmp_path / "w.safetensors")
    same = build_model(job(name, model__weights=str(tmp_path / "w.safetensors"))).state_dict()
    assert all(torch.equal(same[key], value) for key, value in source.items())
    more = job(name, model__weights=str(tmp_path / "w.safetensors"), data__classes="a,b,c")
    other = build_model(more).state_dict()
    assert all(torch.equal(other[key], value) for key, value in source.items() if not key.startswith(head_prefix(more)))
    with pytest.raises(UserError, match="does not fit"):
        build_model(job(name, model__weights=str(tmp_path / "w.safetensors"), model__hidden=9))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("cnn_gur", {}, "did you mean 'cnn_gru'"),
        ("cnn_gru", {"data__channels": 2}, "1 .grey. or 3 .colour."),
        ("cnn_gru", {"data__window": "40 abc"}, "data.window"),
        ("cnn_lstm", {"model__weights": "DEFAULT"}, "no published weights; give a file"),
        ("cnn_gru", {"data__modalities": "t1,t2"}, "data.modalities"),
        ("gru", {"data__tabular": "age"}, "data.tabular"),
        ("gru", {"augment__flip": "both"}, "augment.flip = 'both': is for pictures"),
        ("gru", {"augment__rotate": 5.0}, "augment.rotate = 5.0: is for pictures"),
        ("lstm", {"data__normalise": "imagenet"}, "data.normalise = 'imagenet': is for pictures"),
        ("lstm", {"data__window": "0 1"}, "data.window = '0 1': is for pictures"),
    ],
)
def test_jobs_that_make_no_sense_are_one_line(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check(job(name, **settings))
    assert "\n" not in str(caught.value)


def test_an_example_is_no_longer_than_the_job_allows() -> None:
    series, lengths = example(job(data__frames=3))
    assert series.shape == (1, 3, 1, 8, 8)
    assert lengths.tolist() == [3]
    assert np.prod(example(job("gru", data__channels=12))[0].shape) == 16 * 12
