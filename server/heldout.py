"""The server's own held-out images, where the coordinator has some."""

from __future__ import annotations

from pathlib import Path

from shared.config import Job
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Dataset, load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site


def load_heldout(path: Path, job: Job) -> Dataset:
    """All images described by a site.toml on the server; their split does not matter, none is trained on."""
    site = read_site(path)
    try:
        return load_dataset(read_samples(site, job), site, job)
    except SiteRefusal as refusal:
        raise UserError(f"{path}: {refusal}") from None
