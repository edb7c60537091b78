"""A store with real runs in it, made once, and the application over it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from consilium.registry import add
from consilium.signing import keygen
from server.dashboard.app import create_app
from server.dashboard.guard import Access
from shared.config import Job, job_from_flat
from simulations.simulate import run

TOKEN = "a-token-of-the-tests-0123456789"
SIGNED_IN = {"Authorization": f"Bearer {TOKEN}"}


def make_job(**more: object) -> Job:
    settings = {"name": "tiny", "data.classes": "left,right", "data.size": 16, "model.width": 4, "train.local_steps": 2}
    settings |= {"train.batch_size": 8, "federation.rounds": 4, "evaluation.every": 1}
    return job_from_flat(settings | {key.replace("__", "."): value for key, value in more.items()})


def make_sites(folder: Path, **images: int) -> Path:
    """Sites of grey images, told apart by which half is bright."""
    for name, count in images.items():
        place, generator = folder / name, np.random.default_rng([count, *name.encode()])
        (place / "images").mkdir(parents=True)
        with (place / "labels.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label", "patient", "split"])
            for number in range(images[name]):
                pixels = generator.integers(0, 120, (16, 16))
                pixels[:, slice(0, 8) if number % 2 == 0 else slice(8, 16)] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(place / "images" / f"{number}.png")
                split = ("train", "train", "val", "test")[number // 2 % 4]
                rows.writerow([f"images/{number}.png", ("left", "right")[number % 2], f"{name}-{number}", split])
        rules = '[privacy]\nsubgroups = "sex"\n'
        (place / "site.toml").write_text(f'name = "{name}"\n[data]\nformat = "csv"\ncsv = "labels.csv"\n{rules}')
    return folder


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs beside their store: ``first`` with baselines, groups of patients (all of a sex that is not known) and a
    model card, ``second`` with noise at the sites."""
    folder = tmp_path_factory.mktemp("dashboard")
    data = make_sites(folder / "data", north=48, hill=32, river=40)
    run(make_job(evaluation__subgroups="sex"), data, folder / "runs" / "first", workers=1, baselines=True)
    private = make_job(
        name="private",
        privacy__dp="local",
        privacy__epsilon=50.0,
        privacy__sampling_rate=0.5,
        train__class_weights="none",
    )
    run(private, data, folder / "runs" / "second", workers=1)
    card = (
        "# Card of *tiny*\n\n<script>alert(1)</script>\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n[x](javascript:alert(1))\n"
    )
    (folder / "runs" / "first" / "model_card.md").write_text(card)
    return folder / "runs"


@pytest.fixture(scope="session")
def store(runs_folder: Path) -> Path:
    return runs_folder / "consilium.sqlite"


@pytest.fixture(scope="session")
def registry(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Releases: the run ``second`` is one."""
    folder = tmp_path_factory.mktemp("released")
    keygen(folder / "key")
    add(folder / "registry", runs_folder / "second", "tiny", "1.0", folder / "key")
    return folder / "registry"


@pytest.fixture
def client(store: Path) -> Iterator[TestClient]:
    """Nobody has signed in yet."""
    with TestClient(create_app(store, Access(TOKEN)), base_url="http://127.0.0.1:8600") as found:
        yield found


@pytest.fixture
def signed_in(client: TestClient) -> TestClient:
    client.headers.update(SIGNED_IN)
    return client


@pytest.fixture
def ids(signed_in: TestClient) -> dict[str, int]:
    """The runs' ids by the name of their folder."""
    return {row["path"]: row["id"] for row in signed_in.get("/api/runs").json()["runs"]}
