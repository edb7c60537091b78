"""The report: says what result.json says, first what went wrong, and loads nothing from anywhere."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs
from sklearn.metrics import auc, confusion_matrix, roc_auc_score
from torch import Tensor, nn

import client.local_round
from server.figures import all_figures
from server.record import DECLINED, REASONS, number, read_record, reason_words
from server.report import write_report
from server.report_fair import fairness_lines
from server.report_style import plain
from server.results import run_scores
from server.store import Store, read_events, write_json
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.errors import CODES
from shared.files import write_text
from shared.imaging.dataset import Dataset
from shared.tasks import Sums, add_sums
from shared.tasks.classification.calibration import brier
from shared.tasks.classification.learning import collect
from shared.tasks.classification.metrics import histograms, summarise
from simulations.simulate import run as simulate

HOSTILE = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>"
Targets = list[tuple[int, ...]]


class Canned(nn.Module):
    """A model that answers with scores made up beforehand."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def images(targets: Targets) -> Dataset:
    """A data set of blank images with these labels."""
    samples = [Sample(str(k), target, str(k), "test") for k, target in enumerate(targets)]
    return Dataset.of(samples, image=np.zeros((len(targets), 1, 2, 2), np.uint16))


def draw(job: Job, seed: int, n: int = 400) -> tuple[Tensor, Targets]:
    """Logits that know something of the truth, and the truth."""
    generator = np.random.default_rng(seed)
    k = len(job.classes)
    if job.data.multilabel:
        truth = generator.random((n, k)) < 0.3
    else:
        truth = np.eye(k, dtype=bool)[generator.integers(0, k, n)]
    logits = generator.normal(size=(n, k)) + 1.3 * truth - 0.5
    return torch.tensor(logits, dtype=torch.float32), [tuple(np.flatnonzero(row).tolist()) for row in truth]


class Folder:
    """A run folder written event by event, the way server/rounds.py does."""

    def __init__(self, path: Path, job: Job, sites: list[str], seed: int = 0) -> None:
        self.path, self.job, self.sites = path, job, sites
        self.drawn = {name: draw(job, seed + place) for place, name in enumerate(sites)}
        one_batch = job.replace(evaluation__batch_size=10_000)
        self.sums: dict[str, Sums] = {
            name: collect(Canned(logits), images(targets), one_batch, torch.device("cpu"))
            for name, (logits, targets) in self.drawn.items()
        }
        self.store = Store(path)
        write_text(path / "job.toml", job.toml())
        self.store.add("start", job=job.sha256, name=job.name, rounds=job.federation.rounds, version="0.1.0")

    def survey(self, dropped: list[dict[str, str]] | None = None, skipped: int = 0) -> None:
        images = {"train": 100, "val": 40, "test": 400}
        classes = [50] * len(self.job.classes) + [100] * self.job.data.multilabel
        places = [{"node": 1, "name": n, "images": images, "classes": classes, "skipped": skipped} for n in self.sites]
        self.store.add("survey", sites=places, dropped=dropped or [])

    def round(self, number: int, lost: dict[str, str] | None = None) -> None:
        lost = lost or {}
        trained = [
            {"site": name, "weight": 100.0, "steps": 3, "images": 30, "loss": 60.0 / number}
            for name in self.sites
            if name not in lost
        ]
        gone = [{"site": name, "reason": reason} for name, reason in lost.items()]
        self.store.add("round", round=number, trained=trained, dropped=gone, seconds=1.0)

    def evaluation(self, number: int, split: str, lost: dict[str, str] | None = None) -> None:
        parts = {name: sums for name, sums in self.sums.items() if name not in (lost or {})}

        def rows(sums: Sums) -> dict[str, dict[str, Any]]:
            return {name: vars(estimate) for name, estimate in summarise(sums, self.job).items()}

        facts: dict[str, Any] = {"sums": parts} if split == "test" else {}
        whole = add_sums(parts.values())
        facts["metrics"], facts["sites"] = rows(whole), {n: rows(s) for n, s in parts.items()}
        facts["images"], facts["site_images"] = whole["n"], {n: s["n"] for n, s in parts.items()}
        gone = [{"site": name, "reason": reason} for name, reason in (lost or {}).items()]
        self.store.add("evaluation", round=number, split=split, dropped=gone, **facts)

    def whole(self) -> Folder:
        """A run of three rounds in which all goes well."""
        self.survey()
        self.evaluation(0, "val")
        for number_ in (1, 2, 3):
            self.round(number_)
        self.evaluation(3, "val")
        self.evaluation(3, "test")
        self.store.add("finish", seconds=1.0)
        return self

    def result(self, **more: Any) -> dict[str, Any]:
        content = {"version": "0.1.0", "job": self.job.flat(), "job_sha256": self.job.sha256, "seed": 0}
        write_json(self.path / "result.json", content | {"federated": run_scores(self.path)} | more)
        return json.loads((self.path / "result.json").read_text())  # type: ignore[no-any-return]


class Page(HTMLParser):
    """The page as a reader gets it: its text, its tables, its elements; scripts and styles left out."""

    VOID = ("meta", "link", "img", "br", "input", "hr")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tables, self.elements, self.open = "", [], [], []  # type: ignore[var-annotated]
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source.replace(get_plotlyjs(), ""))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
            if {"th", "td"} & set(self.open):
                self.tables[-1][-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The first table row that begins with ``first``."""
        return next(row for table in self.tables for row in table if row and row[0] == first)


def three_decimals(value: float) -> str:
    """The report's way to write a share, thought out once more."""
    return f"{value:.3f}".replace("0.", ".", 1) if value < 1 else f"{value:.3f}"


def shown(scores: dict[str, Any], metric: str) -> str:
    low, high = scores["intervals"][metric]
    return f"{three_decimals(scores[metric])} [{three_decimals(low)}, {three_decimals(high)}]"


@pytest.fixture
def job() -> Job:
    return job_from_flat({"name": "tiny", "data.classes": "normal,mass,cyst", "federation.rounds": 3})


@pytest.fixture
def with_baselines(tmp_path: Path, job: Job) -> tuple[Folder, dict[str, Any]]:
    """Two sites, a pooled model and a model of each site, all different."""
    run = Folder(tmp_path / "run", job, ["north", "south"]).whole()
    others = {}
    for seed, name in enumerate(("pooled", "local-north", "local-south"), 1):
        others[name] = run_scores(
            Folder(run.path / "baselines" / name, job, ["north", "south"], 10 * seed).whole().path
        )
    local = {name: others[f"local-{name}"] for name in run.sites}
    return run, run.result(pooled=others["pooled"], local=local)


def test_tables_and_head_say_what_result_json_says(with_baselines: tuple[Folder, dict[str, Any]]) -> None:
    run, result = with_baselines
    page = Page(write_report(run.path))
    models = {"Federated": result["federated"], "All data in one place": result["pooled"]}
    models |= {f"Only {name}": scores for name, scores in result["local"].items()}
    for name, scores in models.items():
        metrics = [shown(scores, metric) for metric in ("auroc", "balanced_accuracy", "accuracy", "loss")]
        assert page.row(name) == [name, *metrics, "800", "18", "3 of 3"]
        assert name.startswith("Only ") or shown(scores, "auroc:mass") in page.row("AUROC mass")
    for site, scores in result["federated"]["sites"].items():
        row = next(r for table in page.tables for r in table if r and r[0].split()[0] == site)
        assert row[1:5] == ["400", shown(scores, "auroc"), *(
            shown(model["sites"][site], "auroc") for model in (result["local"][site], result["pooled"])
        )]  # fmt: skip
    worst = min(run.sites, key=lambda name: result["federated"]["sites"][name]["auroc"])
    best = max(run.sites, key=lambda name: result["local"][name]["auroc"])
    assert f"{worst} worst" in {row[0] for table in page.tables for row in table if row}
    assert "2 sites trained cnn on 200 images for 3 rounds." in page.text
    assert f"reaches AUROC {shown(result['federated'], 'auroc')} on 800 test images of all sites" in page.text
    assert f"(only {best}) {shown(result['local'][best], 'auroc')}" in page.text
    assert run.job.sha256 in page.text
    assert "None: every site answered every time" in page.text


def test_a_spread_within_the_intervals_is_said_to_be_no_difference() -> None:
    def line(*sites: tuple[float, float, float]) -> str:
        rows = {str(k): {"auroc": v, "intervals": {"auroc": [low, high]}} for k, (v, low, high) in enumerate(sites)}
        record: Any = SimpleNamespace(scores={"federated": {"sites": rows}}, metric="auroc", worst="0")
        return fairness_lines(record)[1]

    told = "overlap: such a spread may be chance"
    assert told in line((0.6, 0.5, 0.8), (0.9, 0.7, 0.95))
    assert told not in line((0.6, 0.5, 0.7), (0.9, 0.8, 0.95))
    nothing: Any = None
    assert told not in line((0.6, nothing, nothing), (0.9, 0.7, 0.95))


def test_bytes_are_told_in_words_that_hold_of_a_simulation(tmp_path: Path, job: Job) -> None:
    run = Folder(tmp_path, job, ["north"]).whole()
    run.store.add("round", round=3, trained=[], dropped=[], seconds=1.0, bytes={"north": [2_000_000, 1_000_000]})
    run.result()
    page = Page(write_report(tmp_path))
    assert "To the sites went 2.0 MB, and 1.0 MB came back." in page.text
    assert "wire" not in page.text.lower()


def test_forest_plot_holds_every_model_and_site(with_baselines: tuple[Folder, dict[str, Any]]) -> None:
    run, result = with_baselines
    figure = all_figures(run.path)["test figures"]
    drawn = {
        trace.x[0]: (trace.x[0] - trace.error_x.arrayminus[0], trace.x[0] + trace.error_x.array[0])
        for trace in figure.data
    }
    rows = [result["federated"], result["pooled"], *result["local"].values(), *result["federated"]["sites"].values()]
    assert set(drawn) == {row["auroc"] for row in rows}
    for row in rows:
        assert drawn[row["auroc"]] == pytest.approx(row["intervals"]["auroc"])


def test_curves_are_the_events(with_baselines: tuple[Folder, dict[str, Any]]) -> None:
    run, _ = with_baselines
    figures = all_figures(run.path)
    traces = {trace.name: trace for trace in figures["metric by round"].data}
    events = [e for e in read_events(run.path) if e.get("split") == "val"]
    assert list(traces["Federated"].y) == [event["metrics"]["auroc"]["value"] for event in events]
    assert {"All data in one place", "Only north", "Only south", "best round: 3"} <= set(traces)
    loss = {trace.name: trace for trace in figures["training loss"].data}["Federated"]
    assert list(loss.y) == pytest.approx([2.0, 1.0, 2 / 3])  # a sum of 60 / round over 30 images


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    job = job_from_flat({"name": HOSTILE, "data.classes": f"ok,{HOSTILE}", "federation.rounds": 3})
    run = Folder(tmp_path, job, [HOSTILE, "b"]).whole()
    run.store.add("warning", text=HOSTILE)
    run.round(4, {HOSTILE: "site-declined: <b>x</b>"})
    run.result()
    page = Page(write_report(tmp_path))
    assert HOSTILE in page.text
    assert "<script>alert" not in page.source
    assert "<img" not in page.source.replace(get_plotlyjs(), "")
    assert "<b>x" not in page.source
    assert {"img", "b", "iframe", "a"}.isdisjoint(tag for tag, _ in page.elements)
    for figure in json.loads(script(page, "figures"))["figures"].values():
        for place in ("data", "layout"):
            labels = re.findall(
                r"<(?!b>|/b>|br>|extra>|/extra>)", json.dumps([strip(part) for part in [figure[place]]])
            )
            assert not labels  # Plotly reads markup in labels: only our own may be there


def strip(part: Any) -> Any:
    """Without ``meta``, which the page shows as escaped text and Plotly not at all."""
    if isinstance(part, dict):
        return {key: strip(value) for key, value in part.items() if key != "meta"}
    return [strip(item) for item in part] if isinstance(part, list) else part


def script(page: Page, name: str) -> str:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page.source, re.DOTALL)
    assert found
    return found[1]


def test_nothing_is_loaded_from_anywhere(with_baselines: tuple[Folder, dict[str, Any]]) -> None:
    page = Page(write_report(with_baselines[0].path))
    assert page.source.count(get_plotlyjs()) == 1
    rest = page.source.replace(get_plotlyjs(), "")
    for sign in (
        "http:",
        "https:",
        "//cdn",
        "src=",
        "href=",
        "<link",
        "@import",
        "url(",
        "fetch(",
        "XMLHttpRequest",
        "import(",
    ):
        assert sign not in rest
    assert "default-src 'none'" in rest


def test_the_reliability_curve_is_that_of_the_sums(with_baselines: tuple[Folder, dict[str, Any]]) -> None:
    """The figure, the scores and the sums of the sites say the same of the test images."""
    folder = with_baselines[0].path
    record, told = read_record(folder), run_scores(folder)["calibration"]
    curves = [trace for trace in all_figures(folder)["calibration"].data if trace.name]
    assert [trace.name.split(":")[0] for trace in curves] == list(told) == list(record.job.classes)
    for curve, name, positives, negatives in zip(curves, told, *histograms(record.test_sums, record.job), strict=True):
        assert sum(curve.customdata) == told[name]["n"] == int(positives.sum() + negatives.sum())
        assert told[name]["brier"][0] == brier(positives, negatives).value
        hits = sum(share * n for share, n in zip(curve.y, curve.customdata, strict=True))
        assert hits == pytest.approx(positives.sum())


def test_page_can_be_read_by_everybody(with_baselines: tuple[Folder, dict[str, Any]]) -> None:
    page = Page(write_report(with_baselines[0].path))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1
    assert tags.count("table") == tags.count("caption")
    plots = [attrs for tag, attrs in page.elements if attrs.get("class") == "plot"]
    assert len(plots) == tags.count("figcaption") == 8
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 30 for attrs in plots)
    order = [
        page.source.index(f"<h2>{name}</h2>") for name in ("Warnings", "Results", "Sites", "Figures", "Data", "Job")
    ]
    assert order == sorted(order)


def test_every_lost_reply_is_named_with_its_reason(tmp_path: Path, job: Job) -> None:
    run = Folder(tmp_path, job, ["a", "b", "c"])
    run.survey([{"site": "node 9", "reason": "other-job"}], skipped=1)
    run.evaluation(0, "val", {"c": "undecodable"})
    for number_ in range(1, 9):
        run.round(
            number_,
            {"b": "no-reply"} if number_ in (2, 3, 4, 7) else {"c": "site-declined: diverged"} if number_ == 5 else {},
        )
    run.evaluation(8, "val")
    run.store.add("warning", text="something odd")
    run.evaluation(8, "test", {"c": "site-crashed"})
    run.store.add("finish", seconds=1.0)
    run.result()
    text = " ".join(Page(write_report(tmp_path)).text.split())
    assert "node 9 is not in the run: the site runs another job. other-job" in text
    assert "b did not count in training in rounds 2–4, 7 (4 times): the site did not answer in time. no-reply" in text
    assert f"c did not count in training in round 5 (1 time): {REASONS['diverged']}. site-declined: diverged" in text
    assert f"c is missing from the validation in round 0 (1 time): {REASONS['undecodable']}. undecodable" in text
    assert f"c did not answer the test: {REASONS['site-crashed']}. site-crashed" in text
    assert "c is missing from the test figures: its 400 test images could not be evaluated." in text
    assert "a left out 1 image that cannot be read." in text
    assert "something odd" in text
    assert "800 test images of 2 of 3 sites" in text
    grid = all_figures(tmp_path)["participation"].data[0]
    assert grid.z.tolist() == [[1] * 8, [1, 2, 2, 2, 1, 1, 2, 1], [1, 1, 1, 1, 2, 1, 1, 1], [0] * 8]
    assert REASONS["no-reply"] in grid.text[1][1]


def test_very_many_lost_replies_are_summed_up_and_still_all_there(tmp_path: Path, job: Job) -> None:
    names = [f"hospital-{k}" for k in range(20)]
    run = Folder(tmp_path, job, names)
    run.survey()
    for number_, name in enumerate(names, 1):
        run.round(number_, {name: "no-reply"})
    run.store.add("failed", reason="the sites left")
    page = Page(write_report(tmp_path))
    assert "20 replies of 20 sites could not be used" in page.text
    for number_, name in enumerate(names, 1):
        assert f"{name} did not count in training in round {number_} (1 time)" in page.text


def test_failed_unfinished_and_empty_runs_have_a_report(tmp_path: Path, job: Job) -> None:
    failed = Folder(tmp_path / "failed", job, ["a", "b"])
    failed.survey()
    failed.evaluation(0, "val")
    failed.round(1, {"a": "site-gone", "b": "site-gone"})
    failed.store.add("failed", reason="in round 1, 0 sites are in order")
    text = Page(write_report(failed.path)).text
    assert "The run failed: in round 1, 0 sites are in order" in text
    assert "There is no test result" in text
    assert "No site has trained." in text

    empty = Folder(tmp_path / "empty", job, [])
    empty.survey([{"site": "node 1", "reason": "site-declined: no-data"}])
    assert "The run has not come to its end." in Page(write_report(empty.path)).text
    fresh = Folder(tmp_path / "fresh", job, [])
    assert write_report(fresh.path).exists()

    alone = Folder(tmp_path / "alone", job, ["a"]).whole()
    result = alone.result()
    page = Page(write_report(alone.path))
    assert page.row("Federated")[1] == shown(result["federated"], "auroc")
    assert "in one place" not in page.text


def test_site_without_a_class_shows_a_dash(tmp_path: Path) -> None:
    job = job_from_flat({"name": "one-sided", "federation.rounds": 3})
    run = Folder(tmp_path, job, ["a", "b"])
    run.sums["a"] = collect(Canned(torch.randn(5, 2)), images([(0,)] * 5), job, torch.device("cpu"))
    run.whole().result()
    assert Page(write_report(tmp_path)).row("a")[2] == "–"


@pytest.mark.parametrize("multilabel", [False, True])
def test_confusion_and_roc_agree_with_scikit_learn(tmp_path: Path, multilabel: bool) -> None:
    job = job_from_flat({"name": "x", "data.classes": "a,b,c", "data.multilabel": multilabel, "federation.rounds": 3})
    run = Folder(tmp_path, job, ["north", "south"]).whole()
    figures = all_figures(tmp_path)
    logits = torch.cat([logits for logits, _ in run.drawn.values()])
    truth = np.array([[k in target for k in range(3)] for _, targets in run.drawn.values() for target in targets])
    counts = np.array(
        [
            [int(cell.partition("<br>")[0].replace(",", "")) for cell in line]
            for line in figures["confusion matrix"].data[0].text
        ]
    )
    if multilabel:
        scores = logits.numpy()
        tables = [confusion_matrix(truth[:, k], scores[:, k] > 0) for k in range(3)]
        expected = np.array([[t[1, 1], t[1, 0], t[0, 1], t[0, 0]] for t in tables])
    else:
        scores = logits.softmax(1).numpy()
        expected = confusion_matrix(truth.argmax(1), scores.argmax(1))
    assert (counts == expected).all()
    curves = [trace for trace in figures["ROC"].data if trace.name]
    assert len(curves) == 3
    for k, trace in enumerate(curves):
        exact = roc_auc_score(truth[:, k], scores[:, k])
        assert auc(trace.x, trace.y) == pytest.approx(exact, abs=1e-3)
        assert trace.name.startswith(f"{'abc'[k]} {number(auc(trace.x, trace.y))} [")
    bands = [trace for trace in figures["ROC"].data if trace.fill]
    for trace, band in zip(curves, bands, strict=True):
        upper, lower = np.array(band.y).reshape(2, -1)
        assert (upper >= trace.y).all()
        assert (lower[::-1] <= trace.y).all()


def test_binary_job_has_one_curve(tmp_path: Path) -> None:
    job = job_from_flat({"name": "x", "data.classes": "normal,abnormal", "federation.rounds": 3})
    Folder(tmp_path, job, ["north"]).whole()
    assert [trace.name.split()[0] for trace in all_figures(tmp_path)["ROC"].data if trace.name] == ["abnormal"]


def test_forty_sites_and_three_hundred_rounds(tmp_path: Path, job: Job) -> None:
    names = [f"hospital-{k:02}" for k in range(40)]
    run = Folder(tmp_path, job, names)
    run.survey()
    for number_ in range(1, 301):
        run.round(number_, {names[number_ % 40]: "no-reply"} if number_ % 7 == 0 else {})
        if number_ % 50 == 0:
            run.evaluation(number_, "val")
    run.evaluation(300, "test")
    run.store.add("finish", seconds=1.0)
    run.result()
    started = time.monotonic()
    size = write_report(tmp_path).stat().st_size
    assert time.monotonic() - started < 10
    assert size < len(get_plotlyjs()) + 1_500_000
    figures = all_figures(tmp_path)
    assert figures["participation"].data[0].z.shape == (40, 300)
    by_site = {trace.name for trace in figures["metric by site"].data}
    assert "median site" in by_site
    assert len(by_site) == 3  # spread, median, worst


def reason_codes(source: str) -> set[str]:
    """Every word a source file can give as the reason why a reply is not used; fails on one it cannot follow."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Dropped", "SiteRefusal"):
            code = node.args[0]
            if isinstance(code, ast.Call):  # _FAILURES.get(…, "site-error")
                code = code.args[-1]
            if ast.unparse(code) == "code":  # of client.policy, whose table of rules is read below
                continue
            if isinstance(code, ast.JoinedStr):  # a code that a site sent
                assert isinstance(code.values[0], ast.Constant)
                assert code.values[0].value == DECLINED
                continue
            assert isinstance(code, ast.Constant), f"cannot tell the reason in {ast.unparse(node)}"
            found.add(str(code.value))
        elif isinstance(node, ast.Dict) and any(ast.unparse(key).startswith("ErrorCode.") for key in node.keys if key):
            found |= {ast.literal_eval(value) for value in node.values}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found |= {str(node.value.value) for target in node.targets if ast.unparse(target) == "code"}
        elif isinstance(node, ast.FunctionDef) and node.name == "_rules" and isinstance(node.body[-1], ast.Return):
            table = node.body[-1].value.elts  # type: ignore[attr-defined]
            found |= {ast.literal_eval(rule.elts[0]) for rule in table}
        elif isinstance(node, ast.FunctionDef) and node.name == "_word":  # what becomes of a code that is none
            found |= {part.orelse.value for part in ast.walk(node) if isinstance(part, ast.IfExp)}  # type: ignore[attr-defined]
    return found - {""}  # client.egress_entry has a word of the server's, or none


def test_every_reason_there_is_has_plain_words(root: Path) -> None:
    found: dict[str, str] = {}
    leaving: set[str] = set()
    for folder in ("client", "server", "shared"):
        for path in (root / folder).rglob("*.py"):
            codes = reason_codes(path.read_text(encoding="utf-8"))
            found |= dict.fromkeys(codes, str(path.relative_to(root)))
            leaving |= set(codes) if folder != "server" else set()
    assert leaving == set(CODES)  # no other code passes the site's gate
    known = "bad-name other-job other-frozen-weights wrong-records wrong-dtype undecodable too-far app-did-not-load"
    assert {*known.split(), "no-data", "too-many-unreadable", "internal-error", "unnamed", "site-error"} <= set(found)
    assert {code: place for code, place in found.items() if code not in REASONS} == {}
    assert {code for code in REASONS if code not in found} == set()  # words for reasons that are no more
    assert all(reason_words(DECLINED + code) == reason_words(code) == REASONS[code] for code in found)


def test_servers_own_images_are_shown(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    """A real run whose server holds the images of site c as its own."""
    result = simulate(tiny_job, three_sites, tmp_path / "run", workers=1, heldout=three_sites / "c" / "site.toml")
    own = result.scores["federated"]["server"]
    page = Page(result.report)
    metrics = [shown(own, metric) for metric in ("auroc", "balanced_accuracy", "accuracy", "loss")]
    assert page.row("server’s own images") == ["server’s own images", "40", *metrics]
    assert f"On the server’s own 40 images the federated model reaches AUROC {metrics[0]}." in page.text
    figures = all_figures(result.folder)
    line = next(trace for trace in figures["metric by round"].data if trace.name == "Federated, server’s own images")
    events = [event for event in read_events(result.folder) if event.get("split") == "val"]
    assert line.x == (0, 1, 2, 3)
    assert list(line.y) == [event["server"]["auroc"]["value"] for event in events]
    last = figures["test figures"].data[-1]
    low, high = last.x[0] - last.error_x.arrayminus[0], last.x[0] + last.error_x.array[0]
    assert (last.x[0], low, high) == pytest.approx((own["auroc"], *own["intervals"]["auroc"]))
    assert figures["test figures"].layout.yaxis.ticktext[-1] == "server’s own images"
    assert "None: every site answered every time" in page.text


def test_servers_own_images_are_shown_where_no_site_has_test_images(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    own = three_sites / "c" / "site.toml"
    for name in "ab":
        table = three_sites / name / "labels.csv"
        table.write_text(table.read_text().replace(",test", ",val"))
    own.parent.rename(tmp_path / "own")
    result = simulate(tiny_job, three_sites, tmp_path / "run", workers=1, heldout=tmp_path / "own" / "site.toml")
    page = Page(result.report)
    assert page.row("server’s own images")[1:3] == ["40", shown(result.scores["federated"]["server"], "auroc")]
    assert "There is no test figure of any site. On the server’s own 40 images" in page.text
    assert "a is missing from the test figures: it has no test images." in page.text


def test_dead_sites_of_a_real_run_are_named(
    three_sites: Path, tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of site a cannot be read; the process of site c dies in every round after the first."""
    for image in (three_sites / "a" / "images").iterdir():
        image.write_bytes(b"nothing to be seen")
    train = client.local_round.train

    def mortal(*args: Any, **more: Any) -> Any:
        return os._exit(9) if more["site"] == "c" and more["first_step"] else train(*args, **more)

    monkeypatch.setattr(client.local_round, "train", mortal)  # the workers are forks: they inherit it
    result = simulate(tiny_job, three_sites, tmp_path / "run", workers=1)
    page = Page(result.report)
    text = " ".join(page.text.split())
    assert f"a is not in the run: {REASONS['too-many-unreadable']}. site-declined: too-many-unreadable" in text
    assert f"c did not count in training in rounds 2–3 (2 times): {REASONS['site-crashed']}. site-crashed" in text
    assert "2 sites trained cnn on" in text
    grid = all_figures(result.folder)["participation"]
    assert grid.data[0].z.tolist() == [[1, 1, 1], [1, 2, 2], [0, 0, 0]]
    assert grid.data[0].text[2][0] == f"not in the run: {REASONS['too-many-unreadable']}"
    assert grid.layout.yaxis.ticktext == ("b", "c", "a")
    assert grid.layout.xaxis.dtick == 1  # no tick between two rounds


def test_simulating_brings_plotly_only_for_the_report() -> None:
    script = "import sys, simulations.simulate; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.94, ".940"), (1.0, "1.000"), (-0.0004, ".000"), (None, "–"), (12.5, "12.500"), (-0.5, "−.500")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_long_names_are_cut_for_figures() -> None:
    assert plain("x" * 100) == "x" * 25 + "…"
    assert plain("<b>a & b</b>") == "&lt;b&gt;a &amp; b&lt;/b&gt;"
