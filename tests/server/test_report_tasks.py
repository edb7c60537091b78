"""The report of tasks other than classification: their metrics by name, and figures from the sums they have."""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.util
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from plotly.offline import get_plotlyjs
from rich.console import Console
from sklearn.metrics import auc

import consilium.tables
from server.figures import all_figures
from server.record import FEDERATED, read_record
from server.report import write_report
from server.report_style import fit
from server.results import run_scores
from server.store import Store, write_json
from server.wording import WORDINGS, metric_name, number, with_interval, wording
from shared.config import Job, job_from_flat
from shared.files import write_text
from shared.tasks import TASKS, Sums, add_sums, load_task
from simulations.result import Result

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[1] / "shared" / "tasks"


def examples(task: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(task, EXAMPLES / f"examples_{task}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(sums: Sums, job: Job) -> dict[str, dict[str, Any]]:
    return {name: vars(estimate) for name, estimate in load_task(job.task).summarise(sums, job).items()}


class Folder:
    """A run folder of three sites and three rounds, whose sums are those of a fresh network on example data."""

    def __init__(self, path: Path, task: str, model: str, n: int = 16) -> None:
        module, package = examples(task), load_task(task)
        flat = {"task": task, "model.name": model, "federation.rounds": 3, "train.device": "cpu"} | module.JOBS[model]
        self.path, self.job = path, job_from_flat(flat)
        network = package.build_model(self.job)
        self.sums = {}
        for seed, name in enumerate("abc"):
            data = module.make(self.job, n, seed)
            self.sums[name] = package.collect(network, dataclasses.replace(data, origin=data), self.job, CPU)
        self.counts = package.count_classes(module.make(self.job, 16, 0), self.job)

    def write(self, change: Callable[[dict[str, Any]], None] = lambda facts: None, **pictures: bytes) -> Path:
        """Write the events; ``change`` edits the facts of every evaluation."""
        store = Store(self.path)
        write_text(self.path / "job.toml", self.job.toml())
        store.add("start", job=self.job.sha256, name=self.job.name, rounds=3, version="0.1.0")
        images = {"train": 8, "val": 4, "test": 16}
        places = [
            {"node": k, "name": n, "images": images, "classes": self.counts, "skipped": 0} for k, n in enumerate("abc")
        ]
        store.add("survey", sites=places, dropped=[])
        for number_, split in ((0, "val"), (1, "val"), (2, "val"), (3, "val"), (2, "test")):
            if number_ and split == "val":
                trained = [{"site": n, "weight": 8.0, "steps": 1, "images": 8, "loss": 16.0 / number_} for n in "abc"]
                store.add("round", round=number_, trained=trained, dropped=[], seconds=1.0)
            whole = add_sums(self.sums.values())
            facts: dict[str, Any] = {"metrics": rows(whole, self.job), "images": whole["n"]}
            facts["sites"] = {name: rows(sums, self.job) for name, sums in self.sums.items()}
            facts["site_images"] = {name: sums["n"] for name, sums in self.sums.items()}
            facts |= {"sums": self.sums} if split == "test" else {}
            if pictures:
                facts["pictures"] = []
                for name, content in pictures.items():
                    file = self.path / "pictures" / f"{name}-{split}-{number_:06}.png"
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(content + bytes([number_]))
                    facts["pictures"].append(f"pictures/{file.name}")
            change(facts)
            store.add("evaluation", round=number_, split=split, dropped=[], **facts)
        store.add("finish", seconds=1.0)
        content = {"version": "0.1.0", "job": self.job.flat(), "job_sha256": self.job.sha256, "seed": 0}
        write_json(self.path / "result.json", content | {"federated": run_scores(self.path)})
        return self.path


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8").replace(get_plotlyjs(), "")


def text_of(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def table_rows(page: str) -> list[list[str]]:
    found = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in found]


EVERY = [(task, next(iter(load_task(task).MODELS))) for task in TASKS if (EXAMPLES / f"examples_{task}.py").exists()]


@pytest.mark.parametrize(("task", "model"), EVERY)
def test_every_metric_a_run_has_stands_in_its_report_by_name_with_its_figures(
    task: str, model: str, tmp_path: Path
) -> None:
    folder = Folder(tmp_path, task, model).write()
    page = page_of(folder)
    own = json.loads((folder / "result.json").read_text())["federated"]
    cells = [cell for row in table_rows(page) for cell in row]
    heads = " ".join(cells)
    for metric, (low, high) in own["intervals"].items():
        if own[metric] is not None:
            value = with_interval(own[metric], low, high, metric)
            assert any(cell == value or cell.startswith(f"{value} n ") for cell in cells), metric
            assert metric_name(metric).lower() in heads.lower()
    case = TASKS[task].case
    assert f"3 sites trained {model} on 24 {case}s for 3 rounds." in text_of(page)
    assert f"on 48 test {case}s of all sites" in text_of(page)


def test_every_metric_of_every_task_has_a_name_of_its_own_and_every_name_a_metric() -> None:
    known = {metric for facts in TASKS.values() for metric in facts.metrics}
    assert set(WORDINGS) <= known
    names = [metric_name(metric) for metric in known]
    assert len(set(names)) == len(names)
    assert not any("_" in name for name in names)


@pytest.mark.parametrize(
    ("metric", "plain", "start"),
    [
        ("dice", "Dice", "Dice"),
        ("dice:liver", "Dice liver", "Dice liver"),
        ("hd95", "Hausdorff 95 (mm)", "Hausdorff 95 (mm)"),
        ("map50", "mAP@50", "mAP@50"),
        ("map50:WBC", "AP@50 WBC", "AP@50 WBC"),
        ("map", "mAP@[.5:.95]", "mAP@[.5:.95]"),
        ("image_auroc", "whole-image AUROC", "Whole-image AUROC"),
        ("image_auroc:sick", "whole-image AUROC sick", "Whole-image AUROC sick"),
        ("frechet", "Fréchet distance", "Fréchet distance"),
        ("balanced_accuracy", "balanced accuracy", "Balanced accuracy"),
        ("something_new:a_b", "something new a_b", "Something new a_b"),
    ],
)
def test_names_of_metrics(metric: str, plain: str, start: str) -> None:
    assert (metric_name(metric), metric_name(metric, True)) == (plain, start)


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.00123456, "mse", ".00123"),
        (0.0999999, "mse", ".100"),
        (27.149, "psnr", "27.1"),
        (12.34, "frechet", "12.3"),
        (9.9999, "frechet", "10.0"),
        (0.5, "hd95", ".500"),
        (123.4, "hd95", "123"),
        (123456.0, "frechet", "123,000"),
        (2e-8, "mse", "2.00e-08"),
        (-3.14159, "psnr", "−3.14"),
        (0.0, "mse", ".000"),
        (None, "mse", "–"),
        (float("inf"), "psnr", "–"),
        (0.12345, "dice", ".123"),
        (0.12345, "dice:liver", ".123"),
    ],
)
def test_measures_have_three_significant_figures_and_shares_three_decimals(
    value: float | None, metric: str, text: str
) -> None:
    assert number(value, metric) == text


@given(st.floats(1e-5, 1e6))
def test_a_measure_is_written_as_near_as_three_figures_allow(value: float) -> None:
    written = float(number(value, "frechet").replace(",", ""))
    assert abs(written - value) <= 0.00501 * value


def test_a_figure_without_an_interval_stands_without_brackets(tmp_path: Path) -> None:
    def no_interval(facts: dict[str, Any]) -> None:
        for found in (facts["metrics"], *facts["sites"].values()):
            found["mse"] |= {"low": None, "high": None}

    folder = Folder(tmp_path, "reconstruction", "autoencoder").write(no_interval)
    own = json.loads((folder / "result.json").read_text())["federated"]
    text = text_of(page_of(folder))
    assert f"reaches MSE {number(own['mse'], 'mse')} on 48 test images" in text
    drawn = all_figures(folder)["test figures"]
    assert all(trace.error_x.array is None for trace in drawn.data)
    assert all(np.isfinite(drawn.layout.xaxis.range))


# --- less is better ---------------------------------------------------------------------------------------------------


def spread(facts: dict[str, Any]) -> None:
    """Site b is made the worst by MSE and a the best, whatever the data."""
    for name, factor in {"a": 0.5, "b": 4.0, "c": 1.0}.items():
        row = facts["sites"][name]["mse"]
        for key in ("value", "low", "high"):
            row[key] *= factor


def test_where_less_is_better_the_worst_site_is_the_one_with_most(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "reconstruction", "autoencoder").write(spread)
    assert read_record(folder).worst == "b"
    page = page_of(folder)
    assert any(row[0] == "b worst" for row in table_rows(page) if row)
    assert "At b, its worst site, the federated model reaches" in text_of(page)
    assert "Less is better: MSE." in text_of(page)
    figures = all_figures(folder)
    assert figures["test figures"].layout.yaxis.ticktext[-3:] == ("a", "c", "b")  # from the best to the worst
    assert "the worst site is b, MSE" in figures["metric by site"].layout.meta["alt"]
    assert "Less is better." in figures["metric by round"].layout.meta["caption"]


def test_where_more_is_better_nothing_says_otherwise(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "detection", "fasterrcnn_small").write()
    assert "ess is better" not in text_of(page_of(folder))


# --- axes -------------------------------------------------------------------------------------------------------------


def axis_of(values: list[float | None], measure: bool) -> tuple[str, float, float]:
    figure = go.Figure()
    fit(figure, values, measure=measure)
    axis = figure.layout.yaxis
    low, high = axis.range
    return (axis.type or "linear", 10**low, 10**high) if axis.type == "log" else ("linear", low, high)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=10), st.booleans())
def test_every_value_lies_within_the_axis(values: list[float], measure: bool) -> None:
    _, low, high = axis_of([*values, None, float("nan")], measure)
    assert low <= min(values) * (1 + 1e-9)
    assert high >= max(values) * (1 - 1e-9)
    assert low >= 0


def test_shares_are_clipped_at_their_ends_and_measures_are_not() -> None:
    assert axis_of([0.5, 1.0], False)[2] <= 1.01
    assert axis_of([0.5, 1.0], True)[2] > 1.01
    kind, low, high = axis_of([0.0010, 0.0020], True)
    assert (kind, low > 0.0009, high < 0.0021) == ("linear", True, True)  # not lost in an axis made for shares
    assert axis_of([0.1, 200.0], True)[0] == "log"
    assert axis_of([0.0, 200.0], True)[0] == "linear"  # zero has no logarithm
    assert axis_of([0.001, 0.9], False)[0] == "linear"


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Detections of made-up scores: each class finds most of its boxes, and some that are none."""
    run = Folder(tmp_path_factory.mktemp("boxes"), "detection", "fasterrcnn_small")
    from shared.tasks.detection.metrics import Tally

    for seed, name in enumerate("abc"):
        generator = np.random.default_rng(seed)
        tally = Tally(2)
        for image in range(20):
            count = int(generator.integers(0, 5))
            corner = generator.uniform(0, 80, (count, 2))
            truth = np.concatenate([corner, corner + 10], 1)
            classes = generator.integers(0, 2, count)
            wrong = generator.uniform(0, 80, (int(generator.integers(0, 4)), 2))
            found = np.concatenate([truth + generator.normal(0, 1, truth.shape), np.concatenate([wrong, wrong + 8], 1)])
            named = np.concatenate([classes, generator.integers(0, 2, len(wrong))])
            scores = np.clip(
                np.concatenate([generator.beta(5, 2, count), generator.beta(2, 5, len(wrong))]), 0.01, 0.99
            )
            tally.add(f"{name}{image}", truth, classes, found, named, scores)
        run.sums[name] = tally.sums()
    run.write()
    return run


def test_the_area_under_precision_and_recall_is_the_average_precision(boxes: Folder) -> None:
    own = json.loads((boxes.path / "result.json").read_text())["federated"]
    traces = all_figures(boxes.path)["precision and recall"].data
    assert len(traces) == len(boxes.job.classes) == 2
    for name, trace in zip(boxes.job.classes, traces, strict=True):
        recall, precision = np.array(trace.x), np.array(trace.y)
        # COCO's: the best precision at each of 101 recalls or beyond.
        grid = [precision[recall >= r].max(initial=0.0) for r in np.linspace(0, 1, 101)]
        assert np.mean(grid) == pytest.approx(own[f"map50:{name}"], abs=1e-9)
        assert trace.name == f"{name} {with_interval(own[f'map50:{name}'], *own['intervals'][f'map50:{name}'])}"


def test_the_froc_curve_passes_through_the_sensitivity_at_one_false_positive(boxes: Folder) -> None:
    own = json.loads((boxes.path / "result.json").read_text())["federated"]
    *classes, whole = all_figures(boxes.path)["FROC"].data
    assert [trace.name for trace in classes] == list(boxes.job.classes)
    wrong, found = np.array(whole.customdata), np.array(whole.y)
    assert found[wrong <= 1].max() == pytest.approx(own["sensitivity_1fp"])
    assert (np.diff(wrong) >= 0).all()
    assert (np.diff(found) >= 0).all()
    assert (np.array(whole.x) >= 1 / 16).all()  # the axis is logarithmic


def test_a_class_that_is_never_named_has_a_curve_at_zero(boxes: Folder, tmp_path: Path) -> None:
    run = Folder(tmp_path, "detection", "fasterrcnn_small")
    for name, sums in boxes.sums.items():
        fine = np.array(sums["fine"]).reshape(2, -1)
        coarse = np.array(sums["coarse"]).reshape(10, 2, -1)
        fine[1], coarse[:, 1] = 0, 0
        run.sums[name] = sums | {"fine": fine.flatten().tolist(), "coarse": coarse.flatten().tolist()}
    figures = all_figures(run.write())
    assert figures["precision and recall"].data[1].name.split()[:2] == [run.job.classes[1], ".000"]
    assert list(figures["FROC"].data[1].y) == [0]


def test_counts_of_boxes_are_called_boxes(boxes: Folder) -> None:
    head = next(row for row in table_rows(page_of(boxes.path)) if row and row[-1] == "Unreadable")
    assert [f"{name}, training boxes" for name in boxes.job.classes] == head[4:6]


def test_what_was_left_out_of_a_sites_cases_or_is_missing_there_is_said(tmp_path: Path) -> None:
    run = Folder(tmp_path / "boxes", "detection", "fasterrcnn_small")
    run.sums["b"] |= {"dropped": 3}
    assert "b , test images: 3 boxes were left out, less than 2 pixels wide or high" in text_of(page_of(run.write()))
    views = Folder(tmp_path / "views", "classification", "cnn")
    assert "None: every site answered every time" in text_of(page_of(views.write()))
    views.path = tmp_path / "lacking"
    views.job = views.job.replace(data__modalities="pa,lateral", data__tabular="age", data__missing="zero")
    views.sums = {name: sums | {"missing": [0, 5 * (name == "c"), 1]} for name, sums in views.sums.items()}
    said = text_of(page_of(views.write()))
    assert "c , test images: 5 of 16 lack lateral." in said
    assert [f"{name} , test images: 1 of 16 lack age." in said for name in "abc"] == [True] * 3
    assert "lack pa" not in said
    assert "None: every site" not in said


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_with_labels_have_a_figure_by_class_and_those_of_the_whole_image(tmp_path: Path) -> None:
    run = Folder(tmp_path, "segmentation", "unet")
    own = run_scores(run.write())
    figures = all_figures(run.path)
    squares = [trace for trace in figures["classes"].data if trace.name == FEDERATED]
    assert [trace.x[0] for trace in squares] == [own[f"dice:{name}"] for name in run.job.classes]
    dots = [trace for trace in figures["classes"].data if trace.name == "at each site"]
    assert [list(trace.x) for trace in dots] == [
        [own["sites"][site][f"dice:{name}"] for site in "abc"] for name in run.job.classes
    ]
    assert "confusion matrix" not in figures
    drawn = figures["confusion matrix, whole image"].data[0]
    counts = [[int(cell.partition("<br>")[0]) for cell in line] for line in drawn.text]
    assert np.array(counts).flatten().tolist() == add_sums(run.sums.values())["image_confusion"]
    assert auc(*(figures["ROC, whole image"].data[-1][axis] for axis in "xy")) == pytest.approx(own["image_auroc"])
    head = next(row for row in table_rows(page_of(run.path)) if row and row[-1] == "Unreadable")
    names = [*run.job.classes, *run.job.labels]
    assert head == [
        "Site",
        "Training",
        "Validation",
        "Test",
        *(f"{name}, training images" for name in names),
        "Unreadable",
    ]


def test_many_metrics_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "segmentation", "unet").write()
    found = table_rows(page_of(folder))
    head = next(row for row in found if row[0] == "Model")
    assert len(head) == 1 + 5 + 3
    listed = {row[0] for row in found}
    assert {"Whole-image AUROC", "Whole-image accuracy", "Dice disc"} <= listed


# --- errors -----------------------------------------------------------------------------------------------------------


def test_anomaly_scores_are_shares_and_their_roc_is_the_auroc(tmp_path: Path) -> None:
    run = Folder(tmp_path, "reconstruction", "autoencoder", n=24)
    own = run_scores(run.write())
    figures = all_figures(run.path)
    curves = [trace for trace in figures["anomaly ROC"].data if trace.name]
    others = [name for name in run.job.classes if name != run.job.data.normal]
    expected = [own["auroc"], *(own[f"auroc:{name}"] for name in others)]
    assert [auc(trace.x, trace.y) for trace in curves] == pytest.approx(expected, abs=1e-9)
    axis = figures["anomaly scores"].layout.xaxis
    assert [float(text) for text in axis.ticktext] == pytest.approx(list(axis.tickvals))
    scores = figures["anomaly scores"].data
    assert scores[0].name == f"{run.job.data.normal} (normal)"
    table = np.array(add_sums(run.sums.values())["errors"]).reshape(3, -1)
    edges = 10 ** np.linspace(-10, 0, table.shape[1] + 1)
    for name, trace in zip([run.job.data.normal, *others], scores, strict=True):
        counts = table[run.job.classes.index(name)]
        assert sum(trace.y) == pytest.approx(1)
        expected = [  # the share of images whose bin begins in the bar
            counts[(edges[:-1] >= low * (1 - 1e-9)) & (edges[:-1] < high * (1 - 1e-9))].sum() / counts.sum()
            for low, high in zip(trace.x[:-1], trace.x[1:], strict=True)
        ]
        assert list(trace.y[:-1]) == pytest.approx(expected)


# --- generators -------------------------------------------------------------------------------------------------------


def test_a_generator_has_its_distances_and_the_loss_of_each_network(tmp_path: Path) -> None:
    run = Folder(tmp_path, "generation", "dcgan")
    run.write()
    store = Store(run.path)
    for number_ in (1, 2):
        trained = [
            {"site": name, "weight": 8.0, "steps": 1, "images": images, "loss": 0.0}
            | {"losses": {"discriminator": 8.0 * number_, "generator": -4.0}}
            for name, images in (("a", 8), ("b", 24))
        ]
        store.add("round", round=number_, trained=trained, dropped=[], seconds=1.0)
    figures = all_figures(run.path)
    lines = {trace.name: list(trace.y) for trace in figures["training loss"].data}
    assert lines == {"Federated: discriminator": [0.5, 1.0], "Federated: generator": [-0.25, -0.25]}
    held, made = figures["nearest training"].data
    assert sum(held.y) == pytest.approx(1)
    assert sum(made.y) == pytest.approx(1)
    assert "invented images only" in figures["confusion matrix"].layout.meta["caption"]


def test_pictures_of_the_first_the_middle_and_the_kept_round_are_in_the_page_itself(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "PNG")
    folder = Folder(tmp_path, "generation", "dcgan").write(samples=content.getvalue(), more_of_them=content.getvalue())
    page = page_of(folder)
    images = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', page)
    drawn = [(alt, base64.b64decode(data)) for alt, data in images]
    expected = [(0, "first"), (2, "kept")]  # the middle of rounds 0 to 3 is the kept one itself
    assert [data for _, data in drawn] == [content.getvalue() + bytes([k]) for _ in range(2) for k, _ in expected]
    names = ("samples", "more of them")
    assert [alt for alt, _ in drawn] == [
        f"{name}: drawn by the {when} model, of round {k}" for name in names for k, when in expected
    ]
    assert page.count("<img") == 4
    assert not re.search("https?:", page)


def test_pictures_outside_the_run_folder_or_gone_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")

    def elsewhere(facts: dict[str, Any]) -> None:
        facts["pictures"] = ["../secret.png", "/etc/hostname", "pictures/gone.png"]

    folder = Folder(tmp_path / "run", "generation", "dcgan").write(elsewhere)
    page = page_of(folder)
    assert "<img" not in page
    assert base64.b64encode(b"secret").decode() not in page


def test_what_went_wrong_with_the_reference_network_is_said(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "generation", "dcgan").write()
    other = Store(folder / "reference")
    other.add("round", round=4, trained=[], dropped=[{"site": "b", "reason": "no-reply"}], seconds=1.0)
    other.add("finish", seconds=1.0)
    text = text_of(page_of(folder))
    assert "Reference network: b did not count in training in round 4 (1 time): the site did not answer in time" in text


# --- the terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "model"), EVERY)
def test_the_table_in_the_terminal_fits_80_columns_and_begins_with_what_picked_the_model(
    task: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path, task, model).write()
    shown = io.StringIO()
    monkeypatch.setattr(consilium.tables, "Console", lambda: Console(file=shown, width=80))
    consilium.tables.print_result(Result(folder))
    lines = shown.getvalue().splitlines()
    paths = ("report: ", "to look at it in a browser: ")  # as long as they are, to be copied
    assert all(len(line.rstrip()) <= 80 for line in lines if not line.startswith(paths))
    best = next(iter(TASKS[task].metrics))
    own = json.loads((folder / "result.json").read_text())["federated"]
    head = next(line for line in lines if line.split()[:1] == ["model"])
    assert head.split("  ")[0].strip() == "model"
    assert re.split(r"\s{2,}", head.strip())[1].startswith(metric_name(best))
    assert head.rstrip().endswith(f"{TASKS[task].case}s")
    federated = next(line for line in lines if line.strip().startswith("federated"))
    assert with_interval(own[best], *own["intervals"][best], best) in federated
    assert "…" not in shown.getvalue()
    assert ("less is better" in shown.getvalue()) == (TASKS[task].metrics[best] < 0 or "MSE" in head or "loss" in head)


def test_measures_are_told_from_shares() -> None:
    measures = {metric for facts in TASKS.values() for metric in facts.metrics if wording(metric).figures}
    assert measures == {"hd95", "frechet", "mse", "psnr"}
