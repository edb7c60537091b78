"""Cases of several images and of numbers: what is read, what the network sees, what it can learn from them."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import shared.tasks.classification as task
from shared.cases import Sample, SiteData
from shared.composed import parse_number
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Dataset, load_dataset
from shared.samples import read_samples
from shared.tasks import add_sums
from shared.tasks.classification import MODELS, build_model, check, collect, consistent, find, step, summarise
from shared.tasks.classification.data import Batch
from shared.tasks.classification.fusion import Ramps
from shared.tasks.classification.models import example, head_prefix
from shared.training import train
from shared.weights import exchanged, put
from simulations.simulate import run

torch.set_num_threads(1)
CPU = torch.device("cpu")
SIZE = 16
BOTH = {"data.modalities": "pa,lateral", "data.tabular": "age,sex"}


def job_of(**more: Any) -> Job:
    flat = {
        "data.classes": "no,yes",
        "data.size": SIZE,
        "model.width": 8,
        "train.batch_size": 16,
        "train.learning_rate": 0.01,
        "federation.rounds": 60,
    }
    return job_from_flat(flat | BOTH | {key.replace("__", "."): value for key, value in more.items()})


class Facts:
    """Four independent facts of each of n cases: stripes in either image, an age above 60, a sex."""

    def __init__(self, n: int, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.pa, self.lateral, self.old, self.female = self.generator.integers(0, 2, (4, n)).astype(bool)
        self.ages = np.where(self.old, self.generator.uniform(62, 90, n), self.generator.uniform(20, 58, n)).round()

    def picture(self, spot: bool) -> np.ndarray:
        """uint8 (SIZE, SIZE): noise, with stripes of random place or without."""
        pixels = self.generator.integers(60, 120, (SIZE, SIZE))
        stripes = (np.arange(SIZE) + self.generator.integers(4)) % 4 < 2
        return (pixels + 120 * spot * stripes).astype(np.uint8)


LABELS: dict[str, Callable[[Facts], Any]] = {
    "second image": lambda facts: facts.lateral,
    "age": lambda facts: facts.old,
    "either image but not both": lambda facts: facts.pa ^ facts.lateral,
    "second image or sex but not both": lambda facts: facts.lateral ^ facts.female,
}


def cases(n: int, label: str, seed: int = 0) -> Dataset:
    """n cases in memory whose label follows from the named facts alone."""
    facts = Facts(n, seed)
    truth = LABELS[label](facts)
    images = [
        np.stack([facts.picture(spot) for spot in (facts.pa[k], facts.lateral[k])]).astype(np.uint16) * 257
        for k in range(n)
    ]
    samples = [
        Sample(
            f"{k}-pa.png",
            (int(truth[k]),),
            str(k),
            "train",
            paths=(f"{k}-pa.png", f"{k}-lateral.png"),
            values=(float(facts.ages[k]), float(facts.female[k])),
        )
        for k in range(n)
    ]
    return Dataset.of(samples, image=images)


def auroc(job: Job, label: str, n: int = 256, data: Callable[[Dataset], Dataset] = lambda data: data) -> float:
    """AUROC on new cases after the job's training on n; ``data`` may change both."""
    model = build_model(job)
    steps = job.federation.rounds
    known = data(cases(n, label))
    train(model, task, known, job, site="a", first_step=0, steps=steps, class_weights=[1.0, 1.0])
    return summarise(collect(model, data(cases(200, label, seed=1)), job, CPU), job)["auroc"].value


@pytest.mark.slow
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_the_label_is_learnt_wherever_it_is_hidden(fusion: str, label: str) -> None:
    if "but not both" not in label:
        assert auroc(job_of(model__fusion=fusion, federation__rounds=100), label) > 0.95
        return
    # Neither part alone says anything, and from some starting weights none is found in so few steps.
    more = {"train__batch_size": 64, "train__learning_rate": 0.002, "federation__rounds": 200, "model__fusion": fusion}
    assert any(auroc(job_of(seed=seed, **more), label, 1024) > 0.95 for seed in range(4))


@pytest.mark.parametrize("label", LABELS)
def test_one_image_alone_cannot_tell(label: str) -> None:
    """The control of the test above: the first image says nothing by itself."""

    def first(data: Dataset) -> Dataset:
        samples = [dataclasses.replace(sample, paths=(), values=()) for sample in data.samples]
        return Dataset.of(samples, image=[data.columns["image"][k][:1] for k in range(len(data))])

    job = job_of(data__modalities="", data__tabular="")
    assert 0.35 < auroc(job, label, 256, first) < 0.65


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-1e6, 1e6)


def ramps(values: Sequence[float]) -> Tensor:
    found: Tensor = Ramps()(torch.tensor([list(values)], dtype=torch.float64))
    return found.view(len(values), Ramps.RAMPS)


@given(st.lists(NUMBERS, min_size=1, max_size=4))
def test_ramps_are_those_of_the_slow_way(values: list[float]) -> None:
    for row, value in zip(ramps(values).tolist(), values, strict=True):
        place = math.asinh(value)
        expected = []
        for k in range(40):
            low = -10 + 0.5 * k
            climbed = 0.0 if place <= low else 1.0 if place >= low + 0.5 else (place - low) / 0.5
            expected.append(climbed - (1.0 if low < 0 else 0.0))
        assert row == pytest.approx(expected, abs=1e-9)


@given(NUMBERS, NUMBERS)
def test_a_larger_number_is_lower_on_no_ramp(a: float, b: float) -> None:
    low, high = ramps(sorted([a, b]))
    assert (high >= low).all()


def test_numbers_of_every_scale_stand_well_apart_and_a_missing_one_climbs_nothing() -> None:
    apart = ramps([0, 1, 20, 30, 60, 90, 120, 200, 37.0, 40.0]).sum(1)
    assert (apart[1:8] - apart[:7]).min() > 0.5
    assert apart[9] - apart[8] > 0.1
    assert (ramps([math.nan]) == 0).all()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("63", 63.0), (" 1.5e3 ", 1500.0), ("-2", -2.0), ("M", 0.0), ("female", 1.0), ("Yes", 1.0), ("045Y", 45.0),
        ("006M", 0.5), ("026W", 26 * 7 / 365.25), ("w", 1.0), ("heavy", 90.0),
    ],
)  # fmt: skip
def test_numbers_are_read_as_sites_and_dicom_write_them(text: str, number: float) -> None:
    site = SiteData("a", Path(), label_map={"w": "F", "heavy": "90"})
    assert parse_number(text, "there", site) == pytest.approx(number)


@pytest.mark.parametrize("text", ["w", "1,5", "inf", "12 kg"])
def test_what_is_no_number_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(SiteRefusal, match="label_map") as caught:
        parse_number(text, "labels.csv line 7: sex", SiteData("a", Path()))
    assert caught.value.code == "bad-table"
    assert "labels.csv line 7: sex" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- tables -----------------------------------------------------------------------------------------------------------


def write_site(folder: Path, n: int = 8, label: str = "second image", seed: int = 0, without: str = "") -> SiteData:
    """A site of n cases as PNG files with a labels.csv, perhaps ``without`` a column."""
    facts = Facts(n, seed)
    truth = LABELS[label](facts)
    folder.mkdir(parents=True)
    columns = ["path:pa", "path:lateral", "label", "patient", "split", "age", "sex"]
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, [column for column in columns if column != without], extrasaction="ignore")
        rows.writeheader()
        for k in range(n):
            for view, spot in (("pa", facts.pa[k]), ("lateral", facts.lateral[k])):
                Image.fromarray(facts.picture(spot)).save(folder / f"{k}-{view}.png")
            rows.writerow(
                {
                    "path:pa": f"{k}-pa.png",
                    "path:lateral": f"{k}-lateral.png",
                    "label": ("no", "yes")[int(truth[k])],
                    "patient": f"p{k}",
                    "split": ("train", "train", "val", "test")[k % 4],
                    "age": f"{int(facts.ages[k]):03d}Y",
                    "sex": "MF"[int(facts.female[k])],
                }
            )
    (folder / "site.toml").write_text(f'name = "{folder.name}"\n[data]\nformat = "csv"\n')
    return SiteData(folder.name, folder)


def edit(site: SiteData, line: int, **changes: str) -> None:
    """Change cells of one line of the table; ``path_pa`` is the column path:pa."""
    table = site.root / "labels.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[line - 2] |= {key.replace("_", ":"): value for key, value in changes.items()}
    with table.open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)


def test_a_table_gives_each_case_its_images_and_numbers(tmp_path: Path) -> None:
    site, facts = write_site(tmp_path / "a"), Facts(8, 0)
    samples = {sample.patient: sample for sample in read_samples(site, job_of())}
    assert len(samples) == 8
    for k in range(8):
        sample = samples[f"p{k}"]
        assert sample.paths == (f"{k}-pa.png", f"{k}-lateral.png")
        assert sample.path == f"{k}-pa.png"
        assert sample.values == (facts.ages[k], float(facts.female[k]))
        decoded = task.decode(sample, site, job_of())["image"]
        assert decoded.shape == (2, SIZE, SIZE)
        for plane, name in zip(decoded, sample.paths, strict=True):
            stored = np.asarray(Image.open(site.root / name), np.float64) / 255
            assert np.abs(plane / 65535 - stored).max() < 1e-4


@pytest.mark.parametrize("without", ["path:lateral", "age"])
def test_a_site_that_lacks_a_column_is_refused_or_filled_as_the_job_says(without: str, tmp_path: Path) -> None:
    site = write_site(tmp_path / "a", without=without)
    with pytest.raises(SiteRefusal, match=rf"labels\.csv: has no column {without};.*data\.missing = 'zero'") as caught:
        read_samples(site, job_of())
    assert caught.value.code == "missing-modality"
    samples = read_samples(site, job_of(data__missing="zero"))
    if without == "age":
        assert all(math.isnan(sample.values[0]) and sample.values[1] in (0, 1) for sample in samples)
    else:
        assert all(sample.paths[1] == "" != sample.paths[0] for sample in samples)


@pytest.mark.parametrize("change", [{"path_pa": ""}, {"path_lateral": ""}, {"age": ""}, {"sex": "NA"}])
def test_a_case_that_lacks_a_part_is_named_by_its_line_or_filled(change: dict[str, str], tmp_path: Path) -> None:
    site = write_site(tmp_path / "a")
    edit(site, 5, **change)
    with pytest.raises(SiteRefusal, match=r"labels.csv line 5: \S+ is empty \(1 of 8 cases\)") as caught:
        read_samples(site, job_of())
    assert caught.value.code == "missing-modality"
    job = job_of(data__missing="zero")
    data = load_dataset(read_samples(site, job), site, job)
    assert len(data) == 8
    sums = collect(build_model(job), data, job, CPU)
    assert sums["missing"] == [int(key.replace("_", ":") in change or key in change) for key in KEYS]
    assert consistent(sums, job)
    assert not consistent(sums | {"missing": [0, 9, 0, 0]}, job)


KEYS = ("path_pa", "path_lateral", "age", "sex")


def test_a_case_without_any_image_and_a_file_that_is_not_there_are_refused_either_way(tmp_path: Path) -> None:
    site = write_site(tmp_path / "a")
    edit(site, 4, path_lateral="gone.png")
    for missing in ("refuse", "zero"):
        with pytest.raises(SiteRefusal, match=r"gone\.png") as caught:
            read_samples(site, job_of(data__missing=missing))
        assert caught.value.code == "missing-files"
    edit(site, 4, path_lateral="", path_pa="")
    with pytest.raises(SiteRefusal, match="line 4: the case has no image at all"):
        read_samples(site, job_of(data__missing="zero"))


def test_an_unreadable_second_image_leaves_the_case_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    site = dataclasses.replace(write_site(tmp_path / "a"), max_unreadable=0.2)
    (site.root / "3-lateral.png").write_bytes(b"no picture")
    job = job_of()
    data = load_dataset(read_samples(site, job), site, job)
    assert len(data) == 7
    assert [skip.path for skip in data.skipped] == ["3-pa.png"]


def test_class_folders_hold_no_composed_cases(tmp_path: Path) -> None:
    site = SiteData("a", tmp_path, "folder")
    with pytest.raises(SiteRefusal, match="come in a table"):
        read_samples(site, job_of())
    with pytest.raises(UserError, match="come in a table"):
        check(job_of(data__format="folder"))
    with pytest.raises(UserError, match=r"name them in data\.modalities"):
        check(job_of(data__modalities="", model__fusion="late"))


# --- what the network sees --------------------------------------------------------------------------------------------


def lacking(data: Dataset, k: int, image: int | None = None, number: int | None = None) -> Dataset:
    """The data with something of case k marked as missing; its pixels stay, to see whether anybody looks."""
    samples = list(data.samples)
    paths = tuple("" if place == image else name for place, name in enumerate(samples[k].paths))
    values = tuple(math.nan if place == number else value for place, value in enumerate(samples[k].values))
    samples[k] = dataclasses.replace(samples[k], paths=paths, values=values)
    return Dataset(data.columns, tuple(samples))


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_a_missing_part_is_zero_flagged_and_changes_its_own_case_only(fusion: str) -> None:
    job = job_of(data__missing="zero", model__fusion=fusion)
    model = build_model(job).eval()
    data = cases(4, "second image")
    whole = task.batch(data, range(4), job, CPU, train=False)
    assert whole.images.shape == (4, 4, SIZE, SIZE)
    assert (whole.images[:, 2:] == 0).all()
    for part in ({"image": 0}, {"image": 1}, {"number": 0}, {"number": 1}):
        less = task.batch(lacking(data, 2, **part), range(4), job, CPU, train=False)  # type: ignore[arg-type]
        if "image" in part:
            assert (less.images[2, part["image"]] == 0).all()
            assert (less.images[2, 2 + part["image"]] == 1).all()
        assert torch.equal(less.images[[0, 1, 3]], whole.images[[0, 1, 3]])
        with torch.inference_mode():
            found, before = model(*less.inputs), model(*whole.inputs)
        assert found.isfinite().all()
        assert torch.allclose(found[[0, 1, 3]], before[[0, 1, 3]], atol=1e-6)
        assert not torch.allclose(found[2], before[2])


def test_nothing_of_a_missing_image_reaches_late_fusion_not_even_that_it_is_grey() -> None:
    """The encoder's answer to an empty image counts as zeros."""
    job = job_of(data__missing="zero", model__fusion="late", data__tabular="")
    model = build_model(job).eval()
    images = torch.randn(1, 4, SIZE, SIZE)
    images[:, 2:] = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    other = images.clone()
    other[:, 1] = torch.randn(SIZE, SIZE)
    assert torch.equal(model(images), model(other))
    other[:, 0] += 1
    assert not torch.equal(model(images), model(other))


def test_all_images_of_a_case_change_alike_in_training() -> None:
    """Two copies of one image stay copies through flips, rotations and shifts."""
    job = job_of(augment__flip="both", augment__rotate=20, augment__shift=0.1, augment__intensity=0.3)
    data = cases(6, "age")
    twins = [np.repeat(data.columns["image"][k][:1], 2, 0) for k in range(6)]
    torch.manual_seed(0)
    images = task.batch(Dataset.of(data.samples, image=twins), range(6), job, CPU, train=True).images
    assert torch.equal(images[:, 0], images[:, 1])
    still = task.batch(Dataset.of(data.samples, image=twins), range(6), job, CPU, train=False).images
    assert all(not torch.allclose(a, b) for a, b in zip(images, still, strict=True))
    again = task.batch(Dataset.of(data.samples, image=twins), range(6), job, CPU, train=True).images
    assert not torch.allclose(images, again)


# --- networks ---------------------------------------------------------------------------------------------------------

FUSIONS = [
    {"model__fusion": "early", "data__tabular": ""},
    {"model__fusion": "early"},
    {"model__fusion": "early", "data__modalities": ""},
    {"model__fusion": "late", "data__tabular": ""},
    {"model__fusion": "late", "data__missing": "zero"},
]


def inputs(job: Job, n: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    images, *values = example(job)
    found = torch.randn(n, *images.shape[1:], generator=generator)
    if job.data.missing == "zero":
        found[:, -len(job.modalities) :] = 0
    return (found, *(50 * torch.rand(n, value.shape[1], generator=generator) for value in values))


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_every_network_can_be_fused_learns_a_fixed_batch_and_is_exported(name: str, kind: dict[str, Any]) -> None:
    job = job_of(model__name=name, data__channels=3 if "data__tabular" in kind else 1, **kind)
    model = build_model(job)
    images, *values = inputs(job)
    batch = Batch(images, [(k % 2,) for k in range(4)], values[0] if values else None)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = step(model, batch, job, [1.0, 1.0])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0]
    model.eval()
    expected = model(*batch.inputs)
    assert expected.shape == (4, 2)
    if name == "cnn":
        program = torch.export.export(model, inputs(job, 1)).module()
        one = tuple(value[:1] for value in batch.inputs)
        torch.testing.assert_close(program(*one), expected[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FUSIONS)
def test_equal_jobs_fuse_equal_networks_and_the_exchange_is_exact(kind: dict[str, Any]) -> None:
    job = job_of(**kind)
    model, other = build_model(job), build_model(job.replace(seed=3))
    sent = exchanged(model, job)
    assert all(torch.equal(value, exchanged(build_model(job), job)[key]) for key, value in sent.items())
    put(other, sent, job)
    assert torch.equal(model(*inputs(job)), other(*inputs(job)))


def test_one_image_and_no_number_is_the_plain_network() -> None:
    plain = job_of(data__modalities="", data__tabular="")
    state = build_model(plain).state_dict()
    assert all(name.startswith(("features.", "head.")) for name in state)
    named = build_model(job_of(data__modalities="pa", data__tabular="")).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in named.items())


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_frozen_backbone_leaves_what_joins_the_parts_to_be_learnt(kind: dict[str, Any]) -> None:
    job = job_of(model__freeze="backbone", **kind)
    model = build_model(job)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(head_prefix(job))}
    assert {name.partition(".")[0] for name in trained} == {"head"}
    assert list(exchanged(model, job)) == [name for name in model.state_dict() if name in trained]


def resnet(classes: int) -> torch.nn.Module:
    torch.manual_seed(5)
    model: torch.nn.Module = torchvision.models.resnet18(weights=None, num_classes=classes)
    return model.eval()


@pytest.mark.parametrize("missing", ["refuse", "zero"])
def test_published_weights_answer_one_image_shown_in_all_places_as_before(missing: str, tmp_path: Path) -> None:
    """Early fusion: each of the stacked images gets a share of the first layer."""
    source = resnet(2)
    save_file(source.state_dict(), tmp_path / "resnet.safetensors")
    for channels in (1, 3):
        job = job_of(
            model__name="resnet18",
            model__weights=str(tmp_path / "resnet.safetensors"),
            data__channels=channels,
            data__tabular="",
            data__missing=missing,
        )
        model = build_model(job).eval()
        image = torch.randn(2, channels, SIZE, SIZE)
        flags = torch.zeros(2, 2 if missing == "zero" else 0, SIZE, SIZE)
        with torch.inference_mode():
            found = model(torch.cat([image, image, flags], 1))
            expected = source(image.expand(-1, 3, -1, -1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_weights_of_one_network_go_to_every_encoder_and_those_of_a_fused_one_to_all_of_it(
    fusion: str, tmp_path: Path
) -> None:
    source = resnet(7)
    save_file(source.state_dict(), tmp_path / "resnet.safetensors")
    job = job_of(model__name="resnet18", model__fusion=fusion, data__channels=3)
    model = build_model(job.replace(model__weights=str(tmp_path / "resnet.safetensors")))
    for encoder in model.get_submodule("encoders").children():
        state = encoder.state_dict()
        same = {name for name, value in source.state_dict().items() if not name.startswith("fc.")}
        assert set(state) == same
        assert all(
            torch.equal(state[name], source.state_dict()[name])
            for name in same
            if fusion == "late" or name != "conv1.weight"
        )
    save_file(model.state_dict(), tmp_path / "fused.safetensors")
    again = build_model(job.replace(seed=8, model__weights=str(tmp_path / "fused.safetensors")))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="does not fit"):
        build_model(job_of(model__weights=str(tmp_path / "resnet.safetensors")))


def test_every_registered_network_is_built_from_its_registry_line_when_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding a model stays one function and one line: fusion asks nothing more of it."""

    def tiny(job: Job) -> torch.nn.Module:
        layers = torch.nn.Sequential(torch.nn.Conv2d(job.data.channels, 5, 3), torch.nn.AdaptiveMaxPool2d(1))
        layers.append(torch.nn.Flatten())
        layers.add_module("last", torch.nn.Linear(5, len(job.classes)))
        return layers

    monkeypatch.setitem(MODELS, "tiny", MODELS["cnn"]._replace(build=tiny, head="last"))
    for kind in FUSIONS:
        job = job_of(model__name="tiny", **kind)
        assert build_model(job)(*inputs(job)).shape == (4, 2)


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_sums_of_two_sites_are_those_of_all_cases_together() -> None:
    job = job_of(data__missing="zero")
    model = build_model(job)
    data = lacking(lacking(cases(30, "age"), 3, image=1), 20, number=0)
    parts = [
        Dataset({"image": data.columns["image"].rows(list(rows))}, tuple(data.samples[k] for k in rows))
        for rows in (range(11), range(11, 30))
    ]
    added = add_sums([collect(model, part, job, CPU) for part in parts])
    whole = collect(model, data, job, CPU)
    assert whole["missing"] == added["missing"] == [0, 1, 1, 0]
    assert added["positives"] == whole["positives"]
    assert added["confusion"] == whole["confusion"]
    assert collect(model, Dataset.of(()), job, CPU)["missing"] == [0, 0, 0, 0]
    assert "missing" not in collect(build_model(job_of()), data.subset("none"), job_of(), CPU)


def test_a_site_without_the_second_image_trains_along_if_the_job_fills_and_is_refused_if_it_does_not(
    tmp_path: Path,
) -> None:
    """Real files, processes and server. The label is in the second image: the first site alone can teach it."""
    write_site(tmp_path / "data" / "whole", 160)
    write_site(tmp_path / "data" / "bare", 80, seed=1, without="path:lateral")
    job = job_of(
        data__missing="zero", federation__rounds=60, evaluation__every=60, model__fusion="late", data__tabular=""
    )
    filled = run(job, tmp_path / "data", tmp_path / "filled", workers=1, pages=False).scores["federated"]
    assert set(filled["sites"]) == {"bare", "whole"}
    assert filled["dropped"] == []
    assert filled["sites"]["whole"]["auroc"] > 0.9
    with pytest.raises(UserError, match=r"site bare: .*labels\.csv: has no column path:lateral"):
        run(job.replace(data__missing="refuse"), tmp_path / "data", tmp_path / "refused", workers=1)


def test_cases_of_a_table_are_predicted_without_labels(tmp_path: Path) -> None:
    site = write_site(tmp_path / "a")
    job = job_of()
    model = build_model(job)
    data = load_dataset(read_samples(site, job), site, job)
    expected = {s.paths: p for s, p in zip(data.samples, task.predict(model, data, job, CPU), strict=True)}
    table = site.root / "new.csv"
    with (site.root / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with table.open("w", newline="") as file:
        out = csv.DictWriter(file, ["path:lateral", "sex", "age", "path:pa"], extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)
    for path in (table, site.root):
        samples = find(path, job)
        assert {sample.target for sample in samples} == {()}
        new = load_dataset(samples, SiteData("predict", site.root, cache=tmp_path / "cache"), job)
        found = {s.paths: p for s, p in zip(new.samples, task.predict(model, new, job, CPU), strict=True)}
        assert found == expected
    (tmp_path / "out").mkdir()
    (written,) = task.write(((s, expected[s.paths]) for s in samples), site, job, tmp_path / "out")
    with written.open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [sample.path for sample in samples]


def test_new_cases_without_a_table_or_a_column_are_answered_with_what_is_needed(tmp_path: Path) -> None:
    site = write_site(tmp_path / "a", without="age")
    with pytest.raises(SiteRefusal, match="has no column age"):
        find(site.root, job_of())
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "b", site.root / "0-pa.png"):
        with pytest.raises(UserError, match="path:pa, path:lateral, age, sex"):
            find(path, job_of())
    plain = find(site.root, job_of(data__modalities="", data__tabular=""))
    assert len(plain) == 16
