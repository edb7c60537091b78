"""`consilium models`: every registered model, with the numbers of the network that is really built."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consilium.models import default_job, input_shape, lines, rows
from shared.errors import UserError
from shared.tasks import TASKS, load_task

CONSILIUM = Path(sys.executable).parent / "consilium"
EVERY = list(rows())


def test_every_model_of_every_task_is_listed_once() -> None:
    assert [(row.task, row.model) for row in EVERY] == [
        (task, name) for task in TASKS for name in load_task(task).MODELS
    ]


@pytest.mark.parametrize(
    "row", [row for row in EVERY if row.parameters < 1e8], ids=lambda row: f"{row.task}-{row.model}"
)
def test_the_parameters_are_those_of_the_network_in_memory(row) -> None:  # type: ignore[no-untyped-def]
    """Listed from shapes alone; here the network is built, and what an optimiser would be given is counted."""
    job = default_job(row.task, row.model)
    task = load_task(row.task)
    task.check(job)
    model = task.build_model(job)
    trained = {
        id(parameter): parameter.numel()
        for part in task.parts(job)
        for name, parameter in model.named_parameters()
        if name.startswith(part.prefix) and parameter.requires_grad
    }
    frozen = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in trained)
    assert row.parameters == sum(trained.values()) > 1000
    assert frozen == 0 or hasattr(task, "reference")


@pytest.mark.parametrize(
    "row", [row for row in EVERY if row.parameters < 2e7], ids=lambda row: f"{row.task}-{row.model}"
)
def test_the_network_takes_what_is_listed(row) -> None:  # type: ignore[no-untyped-def]
    job = default_job(row.task, row.model)
    model = load_task(row.task).build_model(job).eval()
    shapes = iter([int(side) for side in part.split(" × ")] for part in row.shape.split(" + "))
    inputs = [
        torch.zeros(1, *next(shapes), dtype=example.dtype) if example.ndim > 1 else example
        for example in load_task(row.task).example(job)
    ]
    assert next(shapes, None) is None
    with torch.inference_mode():
        model(*inputs)


def test_known_sizes_are_right() -> None:
    """Torchvision's published counts, of 1000 classes and colour, corrected for our head and grey images."""
    known = {row.model: row.parameters for row in rows(["classification"])}
    published = {"resnet18": (11_689_512, 512, 7), "resnet50": (25_557_032, 2048, 7), "vgg16": (138_357_544, 4096, 3)}
    for name, (parameters, features, kernel) in published.items():
        assert known[name] == parameters - 1000 * (features + 1) + 2 * (features + 1) - 2 * 64 * kernel**2
    assert input_shape(default_job("classification", "cnn")) == "1 × 64 × 64"
    assert input_shape(default_job("classification", "cnn").replace(data__size=32, data__channels=3)) == "3 × 32 × 32"


def test_the_command_lists_all_or_one_task() -> None:
    done = subprocess.run([CONSILIUM, "models"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    heads = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [line.partition(":")[0] for line in heads] == list(TASKS)
    for row in EVERY:
        assert re.search(rf"^  {row.model} +{row.parameters:,} parameters  {row.shape}$", done.stdout, re.MULTILINE)
    assert next(lines("detection")) == f"detection: {TASKS['detection'].about}"
    assert len(list(lines("detection"))) == 1 + len(load_task("detection").MODELS)


def test_the_list_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(len(line) for line in lines()) <= 80


def test_an_unknown_task_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'segmentation'"):
        list(lines("segmentaton"))


def test_the_index_of_the_tasks_names_every_task_and_links_every_page(root: Path) -> None:
    folder = root / "docs" / "tasks"
    index = (folder / "README.md").read_text()
    linked = re.findall(r"\]\(([^)#]+)", index)
    assert [name for name in linked if not (folder / name).exists()] == []
    assert {path.name for path in folder.glob("*.md")} - {"README.md"} <= set(linked)
    assert all(f"| `{task}` |" in index for task in TASKS)
