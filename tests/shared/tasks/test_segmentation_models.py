"""The segmenters: shapes, skip connections, sizes that do not divide, norms, heads, equal starts, weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.tasks.segmentation import models


def job(name: str = "unet", **more: object) -> Job:
    flat = {"task": "segmentation", "model.name": name, "model.width": 4, "model.depth": 3, "data.size": 32}
    flat |= {"data.classes": "organ,lesion", "data.depth": 8}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_gives_a_logit_per_class_and_pixel_for_any_size(name: str) -> None:
    model = models.build_model(job(name)).eval()
    sizes = [(32, 32), (33, 47), (7, 50)] if models.MODELS[name].dimensions == 2 else [(8, 32, 32), (5, 19, 33)]
    for size in sizes:
        with torch.no_grad():
            assert model(torch.randn(2, 1, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("norm", ["group", "instance"])
@pytest.mark.parametrize("name", models.MODELS)
def test_an_image_smaller_than_any_stride_is_no_trouble(name: str, norm: str) -> None:
    model = models.build_model(job(name, model__norm=norm)).train()
    size = (3, 5) if models.MODELS[name].dimensions == 2 else (2, 3, 5)
    with torch.no_grad():
        assert model(torch.randn(1, 1, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("name", models.MODELS)
def test_an_image_of_the_batch_does_not_change_the_result_of_another(name: str) -> None:
    """No BatchNorm anywhere: in training mode too, an image's logits are its own."""
    model = models.build_model(job(name)).train()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    size = (32, 32) if models.MODELS[name].dimensions == 2 else (8, 32, 32)
    images = torch.randn(3, 1, *size)
    with torch.no_grad():
        assert torch.allclose(model(images)[:1], model(images[:1]), atol=1e-4)


@pytest.mark.parametrize("name", models.MODELS)
def test_equal_jobs_start_equal_and_other_seeds_do_not(name: str) -> None:
    state = torch.random.get_rng_state()
    a, b, c = (models.build_model(job(name, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("name", models.MODELS)
def test_labels_of_the_image_get_a_head_of_their_own_that_is_part_of_the_head(name: str) -> None:
    with_labels = job(name, data__labels="sick,well,unsure")
    model = models.build_model(with_labels).eval()
    size = (32, 32) if models.MODELS[name].dimensions == 2 else (8, 32, 32)
    with torch.no_grad():
        logits, of_image = model(torch.randn(2, 1, *size))
    assert logits.shape == (2, 3, *size)
    assert of_image.shape == (2, 3)
    frozen = models.build_model(with_labels.replace(model__freeze="backbone"))
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, _ in frozen.named_parameters() if name.startswith(models.head_prefix(with_labels))
    }
    assert any("of_image" in name for name in trained)


def test_a_unet_of_a_size_that_divides_is_not_touched_by_padding() -> None:
    """Padded by hand to the next multiple, the result on the image is the same as the network's own padding gives."""
    model = models.build_model(job()).eval()
    image = torch.randn(1, 1, 30, 41)
    padded = torch.nn.functional.pad(image, (0, 3, 0, 2), mode="replicate")
    with torch.no_grad():
        assert torch.equal(model(image), model(padded)[..., :30, :41])
    assert model.extent((30, 41)) == (32, 44)
    assert model.extent((3, 4)) == (8, 8)
    assert models.pad_to(padded, (32, 44)) is padded


@pytest.mark.parametrize("norm", ["group", "instance"])
@pytest.mark.parametrize("name", ["unet", "unet3d"])
def test_depth_width_and_norm_do_what_they_say(name: str, norm: str) -> None:
    model = models.build_model(job(name, model__depth=4, model__width=8, model__norm=norm, data__depth=32))
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    assert [m.out_channels for m in convolutions[:8]] == [8, 8, 16, 16, 32, 32, 64, 64]
    kinds = {type(m).__name__.lower() for m in model.modules() if "norm" in type(m).__name__.lower()}
    assert kinds == ({"groupnorm"} if norm == "group" else {f"instancenorm{name[4:] or '2d'}"})


def test_bfloat16_normalises_in_float32_to_the_same_result() -> None:
    """The layer for bfloat16 is GroupNorm: same parameters, same result in float32, a close one in bfloat16."""
    plain, fast = (models.build_model(job(train__precision=kind)).eval() for kind in ("float32", "bfloat16"))
    assert plain.state_dict().keys() == fast.state_dict().keys()
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(image), fast(image))
        with torch.autocast("cpu", torch.bfloat16):
            half = fast(image)
        assert half.dtype == torch.bfloat16
        assert torch.allclose(half.float(), plain(image), atol=0.1)


def test_skip_connections_carry_detail_past_the_bottleneck() -> None:
    """With the way up from the bottleneck cut off, the result still follows a single pixel of the image."""
    model = models.build_model(job()).eval()
    for up in model.up:
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
    image = torch.randn(1, 1, 32, 32)
    other = image.clone()
    other[0, 0, 16, 16] += 5
    with torch.no_grad():
        change = (model(image) - model(other)).abs().sum((0, 1))
    assert change.argmax() in [16 * 32 + 16 + dy * 32 + dx for dy in range(-4, 5) for dx in range(-4, 5)]


def test_thick_slices_are_not_halved_away() -> None:
    thin = models.build_model(job("unet3d", model__depth=4, data__depth=4))
    deep = models.build_model(job("unet3d", model__depth=4, data__depth=32))
    assert thin.factors == (1, 8, 8)
    assert deep.factors == (8, 8, 8)


def test_parameters_grow_as_the_docs_say() -> None:
    def count(**more: object) -> int:
        return sum(p.numel() for p in models.build_model(job(**more)).parameters())

    assert count(model__width=16, model__depth=4) == 482_483
    assert count(model__width=16, model__depth=5) == 1_942_323


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_can_be_exported(name: str) -> None:
    model = models.build_model(job(name)).eval()
    image = torch.randn(1, 1, *((32, 32) if models.MODELS[name].dimensions == 2 else (8, 32, 32)))
    exported = torch.export.export(model, (image,)).module()
    with torch.no_grad():
        assert torch.allclose(exported(image), model(image), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"model__name": "unett"}, "did you mean 'unet'"),
        ({"data__channels": 2}, "data.channels"),
        ({"model__name": "unet3d", "data__channels": 3}, "data.channels"),
        ({"model__depth": 7}, "data.size"),
        ({"data__masks": "instances"}, "data.classes"),
        ({"data__multilabel": True}, "data.multilabel"),
        ({"data__labels": "sick"}, "data.labels"),
        ({"data__tabular": "age,sex"}, "data.tabular"),
        ({"model__weights": "DEFAULT"}, "none published"),
        ({"data__window": "0 100"}, "data.window"),
        ({"model__name": "unet3d", "data__window": "100 0"}, "data.window"),
        ({"model__name": "unet3d", "data__harmonise": "polarity"}, "data.harmonise"),
        ({"model__name": "unet3d", "data__normalise": "imagenet"}, "data.normalise"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        models.check(job().replace(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["unet", "unet3d"])
def test_weights_of_a_run_start_the_next_whose_classes_may_differ(name: str, tmp_path: Path) -> None:
    first = models.build_model(job(name, seed=3))
    file = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in first.state_dict().items()}, file)
    second = models.build_model(job(name, model__weights=str(file), data__classes="other"))
    own = second.state_dict()
    for key, value in first.state_dict().items():
        if not key.startswith("head"):
            assert torch.equal(own[key], value)
    with pytest.raises(UserError, match="does not fit"):
        models.build_model(job(name, model__weights=str(file), model__width=8))


def test_published_weights_fit_fcn_resnet50_by_name(tmp_path: Path) -> None:
    """The names and shapes torchvision's published file has: those of its own network with 21 classes."""
    from torchvision.models.segmentation import fcn_resnet50

    published = fcn_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True).state_dict()
    torch.save(published, tmp_path / "coco.pt")
    ours = models.build_model(job("fcn_resnet50", model__weights=str(tmp_path / "coco.pt"), data__channels=1))
    own = ours.state_dict()
    assert torch.equal(own["backbone.layer3.0.conv1.weight"], published["backbone.layer3.0.conv1.weight"])
    assert torch.equal(own["classifier.0.weight"], published["classifier.0.weight"])
    assert torch.allclose(own["backbone.conv1.weight"], published["backbone.conv1.weight"].sum(1, keepdim=True))
    assert own["classifier.4.weight"].shape[0] == 3
