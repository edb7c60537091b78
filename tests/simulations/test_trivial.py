"""The trivial models against other libraries: scikit-learn's logistic regression and PCA, scikit-image's Otsu."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.filters import threshold_otsu
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from shared.config import Job
from simulations.trivial import Components, fit_regression, otsu, segment, trivial_scores


def test_logistic_regression_is_scikit_learns(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    """The oracle reads the PNGs with Pillow and fits and judges with scikit-learn."""
    split: dict[str, tuple[list[np.ndarray], list[int]]] = {"train": ([], []), "val": ([], []), "test": ([], [])}
    for site in sorted(three_sites.iterdir()):
        for line in (site / "labels.csv").read_text().splitlines()[1:]:
            path, label, _, where = line.split(",")
            split[where][0].append((np.asarray(Image.open(site / path), np.float64) / 255 - 0.5) / 0.25)
            split[where][1].append(int(label == "right"))
    x, y = (np.stack(split["train"][0]).reshape(len(split["train"][1]), -1), split["train"][1])
    oracle = LogisticRegression(C=1.0, class_weight="balanced", max_iter=5000, tol=1e-10).fit(x, y)
    tested = np.stack(split["test"][0]).reshape(len(split["test"][1]), -1)
    found = trivial_scores(tiny_job, three_sites, tmp_path)
    assert found["about"] == "logistic regression on pixels"
    assert found["auroc"] == pytest.approx(roc_auc_score(split["test"][1], oracle.decision_function(tested)), abs=1e-3)
    assert found["accuracy"] == pytest.approx(oracle.score(tested, split["test"][1]))
    assert set(found["sites"]) == {"a", "b", "c"}
    assert found["images"] == len(split["test"][1]) == sum(part["images"] for part in found["sites"].values())


def test_the_weights_of_three_classes_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 200)
    x = generator.normal(size=(200, 5)) + y[:, None] * [1, 0, -1, 0, 0.5]
    weights = [1.0, 2.0, 0.5]
    ours = fit_regression(torch.from_numpy(x), torch.from_numpy(y), torch.tensor(weights))
    oracle = LogisticRegression(C=1.0, class_weight=dict(enumerate(weights)), max_iter=5000, tol=1e-12).fit(x, y)
    difference = ours[:-1].T.numpy() - oracle.coef_
    assert np.abs(difference).max() < 1e-4


def test_components_are_scikit_learns() -> None:
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rebuilt, _ = Components(images[:50])(images[50:])
    oracle = PCA(32).fit(images[:50].flatten(1).numpy())
    expected = oracle.inverse_transform(oracle.transform(images[50:].flatten(1).numpy()))
    assert torch.allclose(rebuilt.flatten(1), torch.from_numpy(expected).float(), atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_scikit_images_and_the_smaller_side_is_the_foreground(seed: int) -> None:
    generator = np.random.default_rng(seed)
    image = generator.normal(0.3, 0.05, (64, 64))
    image[10:30, 10:30] = generator.normal(0.8, 0.05, (20, 20))
    assert otsu(image) == pytest.approx(threshold_otsu(image), abs=(image.max() - image.min()) / 200)
    wanted = np.zeros((64, 64), bool)
    wanted[10:30, 10:30] = True
    assert (segment(image) == wanted).mean() > 0.99
    assert (segment(1 - image) == wanted).mean() > 0.99


def test_a_job_whose_cases_it_cannot_take_has_none(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    assert trivial_scores(tiny_job.replace(data__multilabel=True), three_sites, tmp_path) == {}


def test_a_site_that_cannot_take_part_is_left_out(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    whole = trivial_scores(tiny_job, three_sites, tmp_path / "whole")
    for image in sorted((three_sites / "c" / "images").iterdir())[:10]:
        image.write_bytes(b"broken")
    left = trivial_scores(tiny_job, three_sites, tmp_path / "left")
    assert (set(whole["sites"]), set(left["sites"])) == ({"a", "b", "c"}, {"a", "b"})
