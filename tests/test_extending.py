"""docs/extending.md keeps its word: its code, run as it stands, adds what it says, and a federation trains with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from client.check import check_site
from consilium.strategies import lines
from server.store import read_events
from shared.codecs import CODECS, coding, decode, encode
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.imaging.read import READERS, UnreadableImage, frame_count, is_image_name, read_image
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


def test_afterwards_neither_is_known_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"federation\.codec = 'fp16': must be one of none, bf16, "):
        job_from_flat({"federation.codec": "fp16"})
    (tmp_path / "1.numbers").write_text("#numbers\n1 2")
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "1.numbers")


def test_every_codec_has_its_words(root: Path) -> None:
    assert set(CODEC_NAMES) == {"none", *CODECS}
    page = (root / "docs" / "codecs.md").read_text()
    assert [name for name in CODEC_NAMES if f"| `{name}` |" not in page] == []
