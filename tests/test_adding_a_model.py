"""docs/adding-a-model.md keeps its word: its code, run as it stands, adds models that train in a federation."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from consilium.models import rows
from consilium.predict import predict
from consilium.trained import open_run
from shared.config import job_from_flat
from shared.errors import UserError
from shared.tasks import load_task
from shared.weights import exchanged
from simulations.simulate import run


def code(root: Path) -> str:
    """The page's one block of Python."""
    (block,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "adding-a-model.md").read_text(), re.DOTALL)
    return str(block)


def examples(root: Path, task: str) -> ModuleType:
    path = root / "tests" / "shared" / "tasks" / f"examples_{task}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def added(root: Path) -> Iterator[dict[str, str]]:
    """Run the page's code; gives the model it adds to each task, and takes them out again."""
    registries = {name: load_task(name).MODELS for name in ("classification", "segmentation")}
    before = {name: dict(registry) for name, registry in registries.items()}
    exec(compile(code(root), "docs/adding-a-model.md", "exec"), {"__name__": "added"})
    try:
        yield {name: next(iter(set(registry) - set(before[name]))) for name, registry in registries.items()}
    finally:
        for name, registry in registries.items():
            registry.clear()
            registry.update(before[name])


def test_a_model_is_one_function_and_one_line(root: Path) -> None:
    body = [node for node in ast.parse(code(root)).body if not isinstance(node, ast.Import | ast.ImportFrom)]
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    lines = [node for node in body if isinstance(node, ast.Assign) and node.lineno == node.end_lineno]
    assert len(functions) == len(lines) == 2
    assert len(body) == 4


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_the_added_model_trains_in_a_federation_and_predicts(
    task: str, added: dict[str, str], root: Path, tmp_path: Path
) -> None:
    name, example = added[task], examples(root, task)
    assert name in [row.model for row in rows([task])]
    settings = next(iter(example.JOBS.values())) | {"data.labels": "", "train.device": "cpu"}
    job = job_from_flat(settings | {"task": task, "model.name": name, "federation.rounds": 2, "evaluation.every": 1})
    for number, site in enumerate(("a", "b")):
        example.site(tmp_path / "data" / site, job, site, 12, number)
    result = run(job, tmp_path / "data", tmp_path / "run", workers=2)
    scores = result.scores["federated"]
    assert scores["dropped"] == []
    assert set(scores["sites"]) == {"a", "b"}
    assert scores["gradient_steps"] == 2 * 2 * job.train.local_steps
    assert scores["n"][job.best_metric] > 0
    start = exchanged(load_task(task).build_model(job), job)
    trained = exchanged(open_run(tmp_path / "run", "last").model, job)
    assert all(not torch.equal(trained[key], value) for key, value in start.items() if value.ndim > 1)
    done = predict(tmp_path / "run", tmp_path / "data" / "a", tmp_path / "out")
    assert done.cases >= 12


def test_afterwards_the_model_is_unknown_again(root: Path) -> None:
    for task, name in (("classification", "plain"), ("segmentation", "dilated")):
        assert f'MODELS["{name}"]' in code(root)
        with pytest.raises(UserError, match=f"model.name = '{name}'"):
            load_task(task).check(job_from_flat({"task": task, "model.name": name}))
