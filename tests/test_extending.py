"""docs/extending.md keeps its word: its code, run as it stands, adds what it says, and a federation trains with it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import numpy as np
import pytest
import torch

from client.check import check_site
from consilium.strategies import lines
from server.store import read_events
from shared.codecs import CODECS, coding, decode, encode
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.imaging.read import READERS, Reader, UnreadableImage, frame_count, is_image_name, read_image
from shared.strategies import CODEC_NAMES
from simulations.simulate import run
from tests.conftest import write_site


@pytest.fixture
def added(root: Path) -> Iterator[None]:
    for block in re.findall(r"```python\n(.*?)```", (root / "docs" / "extending.md").read_text(), re.DOTALL):
        exec(compile(block, "docs/extending.md", "exec"), {"__name__": "added"})
    try:
        yield
    finally:
        del CODECS["fp16"], CODEC_NAMES["fp16"], READERS["numbers"]


@pytest.mark.usefixtures("added")
def test_the_codec_rounds_as_numpy_does_and_a_federation_trains_with_it(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    job = tiny_job.replace(federation__codec="fp16")
    how = coding(job)
    assert how is not None
    before = {"w": torch.randn(3, 5), "b": torch.randn(7)}
    after = {name: value + torch.randn(value.shape) for name, value in before.items()}
    got = decode(before, encode(before, after, how, 0), how)
    for name, value in before.items():
        change = (after[name] - value).numpy().astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(got[name].numpy(), value.numpy() + change)
    assert any("fp16" in line for line in lines())
    sent = {}  # bytes of the sites' replies
    for name in ("fp16", "none"):
        result = run(tiny_job.replace(federation__codec=name), three_sites, tmp_path / name, workers=2)
        assert result.scores["federated"]["dropped"] == []
        rounds = [event for event in read_events(tmp_path / name) if event["event"] == "round"]
        sent[name] = sum(up for event in rounds for _, up in event["bytes"].values())
    assert 0.4 < sent["fp16"] / sent["none"] < 0.55


@pytest.mark.usefixtures("added")
def test_the_files_are_read_checked_and_learnt_from(tmp_path: Path, tiny_job: Job) -> None:
    for name in "ab":
        site = write_site(tmp_path / "data" / name, name, 32)
        for image in sorted((site.parent / "images").iterdir()):
            values = read_image(image)
            text = "#numbers\n" + "\n".join(" ".join(f"{value:.9g}" for value in row) for row in values)
            image.with_suffix(".numbers").write_text(text)
            image.unlink()
            read = read_image(image.with_suffix(".numbers"))
            np.testing.assert_allclose(read, values, rtol=1e-6)
        table = site.parent / "labels.csv"
        table.write_text(table.read_text().replace(".png", ".numbers"))
    image = tmp_path / "data" / "a" / "images" / "3.numbers"
    assert is_image_name(image)
    assert frame_count(image) == 1
    image.write_text("#numbers\n1 2\n3")
    with pytest.raises(UnreadableImage):
        read_image(image)
    report = check_site(tmp_path / "data" / "a" / "site.toml", None, "auto", None, None)
    assert [case.path for case in report.unreadable] == ["images/3.numbers"]
    scores = run(tiny_job, tmp_path / "data", tmp_path / "run", workers=2).scores["federated"]
    assert scores["dropped"] == []
    assert set(scores["sites"]) == {"a", "b"}


def test_a_kind_of_file_may_begin_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(path: object, key: str | None) -> np.ndarray:
        return np.full((1, 2, 2), 0.5, np.float32)

    monkeypatch.setitem(READERS, "either", Reader((b"#one", b"#two"), (".either",), one))
    for start in ("#one", "#two"):
        (tmp_path / "1.either").write_text(start)
        np.testing.assert_array_equal(read_image(tmp_path / "1.either"), np.full((2, 2), 0.5, np.float32))
    (tmp_path / "1.either").write_text("#three")
    with pytest.raises(UnreadableImage, match="unsupported-format"):
        read_image(tmp_path / "1.either")


def test_afterwards_neither_is_known_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"federation\.codec = 'fp16': must be one of none, bf16, "):
        job_from_flat({"federation.codec": "fp16"})
    (tmp_path / "1.numbers").write_text("#numbers\n1 2")
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "1.numbers")


def test_the_loss_is_what_it_says_for_one_label_and_for_several_and_refused_where_it_does_nothing(
    root: Path, tmp_path: Path
) -> None:
    """In a copy of the program, because the lines belong into files of it."""
    shutil.copytree(root / "shared", tmp_path / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    field, line = re.findall(r"```py\n(.*?)```", (root / "docs" / "extending.md").read_text(), re.DOTALL)
    for name, before, new in (
        ("settings.py", "    class_weights: str = knob(", indent(field, "    ")),
        ("tasks/classification/learning.py", "    return (losses * weights).mean()", f"    {line}"),
    ):
        file = tmp_path / "shared" / name
        assert file.read_text().count(before) == 1, (
            f"{name} has not {before!r} once: docs/extending.md needs another place"
        )
        file.write_text(file.read_text().replace(before, new + before))
    found = subprocess.run([sys.executable, "-c", FOCAL], cwd=tmp_path, capture_output=True, text=True, check=True)
    answer = json.loads(found.stdout)
    logits, weights = np.array(LOGITS), np.array(WEIGHTS)
    truth = np.array([[1, 0, 0], [0, 0, 1]])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right = (shares * truth).sum(1)
    one = np.mean(-np.log(right) * (1 - right) ** 2 * (truth * weights).sum(1))
    right = np.where(truth == 1, 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits)))
    several = np.mean(-np.log(right) * (1 - right) ** 2 * np.where(truth == 1, weights, 1))
    assert answer["losses"] == pytest.approx([one, several], rel=1e-5)
    assert answer["refused"].startswith(
        "train.focal = 2.0: detection does not read it, only classification, sequence, "
    )


LOGITS, WEIGHTS = [[0.3, -1.2, 0.8], [2.0, 0.1, -0.5]], [0.5, 1.0, 2.0]
FOCAL = f"""
import json, torch
from shared.config import job_from_flat
from shared.errors import UserError
from shared.tasks.classification.learning import loss_of_logits
asked = {{"data.classes": "a,b,c", "train.focal": 2.0}}
jobs = [job_from_flat(asked | {{"data.multilabel": several}}) for several in (False, True)]
losses = [loss_of_logits(torch.tensor({LOGITS}), [(0,), (2,)], job, {WEIGHTS}).item() for job in jobs]
try:
    job_from_flat(asked | {{"task": "detection"}})
except UserError as error:
    print(json.dumps({{"losses": losses, "refused": str(error)}}))
"""


def test_every_codec_has_its_words(root: Path) -> None:
    assert set(CODEC_NAMES) == {"none", *CODECS}
    page = (root / "docs" / "codecs.md").read_text()
    unsaid = [name for name in CODEC_NAMES if f"| `{name}` |" not in page]
    assert not unsaid, f"{unsaid}: each needs its row in docs/codecs.md"
