"""A small study on invented data, run once for all tests that look at what it left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_site

JOB = """
name = "tiny"
[data]
classes = "left,right"
size = 16
[model]
width = 4
[train]
local_steps = 2
batch_size = 8
[federation]
rounds = 2
[evaluation]
every = 1
"""
# The last variant fails: no reply passes, since every change is larger than the job allows.
STUDY = """
job = "tiny.toml"
data = "data"
seeds = [0, 1]
[[variant]]
name = "plain"
[[variant]]
name = "equal"
"federation.weighting" = "equal"
[[variant]]
name = "broken"
"federation.max_update_norm" = 1e-9
"""


def write_study(folder: Path, study: str = STUDY, job: str = JOB) -> Path:
    """Two sites, a job and a study; gives the study's file."""
    for name, images in {"a": 24, "b": 40}.items():
        write_site(folder / "data" / name, name, images)
    (folder / "tiny.toml").write_text(job)
    (folder / "study.toml").write_text(study)
    return folder / "study.toml"


@pytest.fixture(scope="session")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the small study, beside its job and data."""
    return write_study(tmp_path_factory.mktemp("study"))
