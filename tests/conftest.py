"""Fixtures and helpers: real data beside the checkout where it is there; small sites and runs made on the spot."""

from __future__ import annotations

import csv
import gc
import importlib
import locale
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.config import Job, job_from_flat

ROOT = Path(__file__).parents[1]
LOCALE = locale.setlocale(locale.LC_ALL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background: programs we start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # two cores, several processes: more threads only fight
# Torch's first backward starts a thread for each device that it knows, and what is forked from a process with such a
# thread cannot train. FakeTensors (torch.export) enter a GPU that is not there; so the first backward comes before any.
torch.ones(1, requires_grad=True).backward()  # type: ignore[no-untyped-call]


def pytest_collection_finish() -> None:
    """What was imported stays: a full collection walks a million objects for nothing, and libraries ask for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _locale_stays() -> Iterator[None]:
    """ITK, which writes files for the tests, sets the whole process's locale to C: text is ASCII from then on."""
    locale.setlocale(locale.LC_ALL, LOCALE)  # a fixture of the module may have used it
    yield
    locale.setlocale(locale.LC_ALL, LOCALE)


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """A folder of real medical images that lies beside the checkout; skips where there is none."""

    def find(name: str) -> Path:
        folder = ROOT.parent / "shared" / "data" / name
        if not folder.is_dir():
            pytest.skip(f"the shared data set {name} does not lie beside this checkout (SKIPPED shared data)")
        return folder

    return find


def make_tiny_job() -> Job:
    """Two classes told apart by which half is bright; learnt in seconds."""
    return job_from_flat(
        {
            "name": "tiny",
            "data.classes": "left,right",
            "data.size": 16,
            "model.width": 4,
            "train.local_steps": 2,
            "train.batch_size": 8,
            "federation.rounds": 3,
            "evaluation.every": 1,
        }
    )


@pytest.fixture
def tiny_job() -> Job:
    """The job of ``make_tiny_job``."""
    return make_tiny_job()


def write_site(folder: Path, name: str, images: int = 24, seed: int = 0) -> Path:
    """A site of grey PNG images with a labels.csv; returns its site.toml."""
    generator = np.random.default_rng([seed, *name.encode()])
    (folder / "images").mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "patient", "split"])
        for number in range(images):
            label = ("left", "right")[number % 2]
            pixels = generator.integers(0, 120, (16, 16))
            pixels[:, slice(0, 8) if label == "left" else slice(8, 16)] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
            split = ("train", "train", "val", "test")[number // 2 % 4]
            rows.writerow([f"images/{number}.png", label, f"{name}-{number}", split])
    (folder / "site.toml").write_text(f'name = "{name}"\n[data]\nformat = "csv"\ncsv = "labels.csv"\n')
    return folder / "site.toml"


@pytest.fixture
def three_sites(tmp_path: Path) -> Path:
    """A folder with the sites a, b and c, of 24, 32 and 40 images."""
    for name, images in {"a": 24, "b": 32, "c": 40}.items():
        write_site(tmp_path / "data" / name, name, images)
    return tmp_path / "data"


def examples(task: str) -> ModuleType:
    """Small jobs, data and sites of a task: the module ``examples_<task>`` of the tests of all models."""
    return importlib.import_module(f"tests.shared.tasks.examples_{task}")


def save_run(folder: Path, job: Job, **facts: str) -> Path:
    """A run folder as the server leaves it, of an untrained model; ``facts`` go to those of the model's file."""
    from server.store import write_model
    from shared import __version__
    from shared.files import write_text
    from shared.tasks import load_task
    from shared.weights import exchanged

    model = load_task(job.task).build_model(job)
    write_text(folder / "job.toml", job.toml())
    known = {"job": job.sha256, "round": "1", "version": __version__, "model": job.model.name}
    write_model(folder / "model.safetensors", exchanged(model, job), known | facts)
    return folder


# Networks of which one test of all takes as long as those of all others: their turns are slow tests.
LARGE = ("vgg16", "fasterrcnn_resnet50", "fcn_resnet50", "retinanet")


def by_size(pairs: Iterable[tuple[str, str]]) -> list[Any]:
    """Tasks and networks as parameters, those of large networks marked slow."""
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair[1] in LARGE), id="-".join(pair)) for pair in pairs]


def called(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """The command in this process, which has imported everything already: exit code, output, errors."""
    from consilium.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["consilium", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
    return code, *capsys.readouterr()
