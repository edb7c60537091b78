"""Segmentation metrics against MONAI, scikit-learn and slow versions; sums that add up and hold together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from sklearn.metrics import f1_score, jaccard_score

from shared.config import Job, job_from_flat
from shared.intervals import mean_dependent
from shared.tasks import add_sums
from shared.tasks.segmentation.learning import mask_losses
from shared.tasks.segmentation.measures import find_objects, hausdorff95, match_objects, overlap
from shared.tasks.segmentation.metrics import Tally, consistent, ratio, summarise


def job(**more: object) -> Job:
    flat = {"task": "segmentation", "data.classes": "organ,lesion", "model.name": "unet", "data.size": 32}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def blobs(seed: int, size: tuple[int, ...] = (40, 50), classes: int = 2) -> np.ndarray:
    """A smooth random mask of classes."""
    noise = ndimage.gaussian_filter(
        np.random.default_rng(seed).normal(size=(classes + 1, *size)), (0, *[3] * len(size))
    )
    return noise.argmax(0)


MASKS = arrays(np.int64, (7, 6), elements=st.integers(0, 2))


@given(MASKS, MASKS)
def test_dice_and_iou_are_those_of_scikit_learn(predicted: np.ndarray, truth: np.ndarray) -> None:
    over = overlap(predicted, truth, 2)
    for k in (1, 2):
        flat = (truth.ravel() == k, predicted.ravel() == k)
        if not (flat[0].any() or flat[1].any()):
            assert not over.seen[k - 1]
            assert np.isnan(over.dice[k - 1])
            continue
        assert over.dice[k - 1] == pytest.approx(f1_score(*flat, zero_division=0))
        assert over.iou[k - 1] == pytest.approx(jaccard_score(*flat, zero_division=0))


def test_dice_per_image_is_that_of_monai() -> None:
    from monai.metrics import compute_dice

    predicted, truth = blobs(0), blobs(1)
    hot = [torch.nn.functional.one_hot(torch.from_numpy(mask), 3).movedim(-1, 0)[None] for mask in (predicted, truth)]
    expected = compute_dice(*hot, include_background=False)[0]
    assert overlap(predicted, truth, 2).dice == pytest.approx(expected.numpy())


@pytest.mark.parametrize("size", [(40, 50), (9, 30, 28)])
@pytest.mark.parametrize("seed", range(4))
def test_hd95_is_that_of_monai(size: tuple[int, ...], seed: int) -> None:
    from monai.metrics import compute_hausdorff_distance

    spacing = [0.7, 1.3] if len(size) == 2 else [3.0, 0.7, 1.3]
    predicted, truth = blobs(seed, size) == 1, blobs(seed + 100, size) == 1
    hot = [torch.from_numpy(mask)[None, None].float() for mask in (predicted, truth)]
    expected = compute_hausdorff_distance(*hot, include_background=True, percentile=95, spacing=spacing)
    assert hausdorff95(predicted, truth, spacing) == pytest.approx(float(expected), rel=1e-5)


def test_hd95_of_two_squares_is_their_distance() -> None:
    """Two equal squares five columns apart, pixels of 2 mm across: every surface point is 0 to 10 mm away."""
    truth = np.zeros((30, 40), bool)
    truth[10:20, 5:15] = True
    predicted = np.roll(truth, 5, 1)
    slow = slow_hd95(predicted, truth, (1.0, 2.0))
    assert hausdorff95(predicted, truth, (1.0, 2.0)) == pytest.approx(slow) == pytest.approx(10.0)
    assert hausdorff95(truth, truth, (1.0, 2.0)) == 0
    assert hausdorff95(truth, np.zeros_like(truth), (1.0, 1.0)) is None


def slow_hd95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> float:
    """All pairs of surface points."""

    def surface(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1)
        inner = padded[1:-1, :-2] & padded[1:-1, 2:] & padded[:-2, 1:-1] & padded[2:, 1:-1]
        return np.argwhere(mask & ~inner) * np.array(spacing)

    pairs = np.linalg.norm(surface(a)[:, None] - surface(b)[None], axis=2)
    return float(max(np.percentile(pairs.min(1), 95), np.percentile(pairs.min(0), 95)))


OBJECTS = arrays(np.int64, (6, 7), elements=st.integers(0, 4))


@settings(max_examples=200)
@given(OBJECTS, OBJECTS)
def test_matched_objects_and_aji_are_those_of_a_slow_version(predicted: np.ndarray, truth: np.ndarray) -> None:
    found = match_objects(predicted, truth)
    assert found == slow_match(predicted, truth)


def slow_match(predicted: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, int, int]:
    """Object by object, as Kumar et al. write algorithm 1 down."""
    true_ids, ids = ([k for k in np.unique(mask) if k] for mask in (truth, predicted))
    matched = above = below = 0
    used = set()
    for i in true_ids:
        best, choice = 0.0, None
        for j in ids:
            both = np.sum((truth == i) & (predicted == j))
            either = np.sum((truth == i) | (predicted == j))
            if both / either > best:
                best, choice = both / either, j
        if choice is None:
            below += int(np.sum(truth == i))
            continue
        matched += best > 0.5
        above += int(np.sum((truth == i) & (predicted == choice)))
        below += int(np.sum((truth == i) | (predicted == choice)))
        used.add(choice)
    below += sum(int(np.sum(predicted == j)) for j in ids if j not in used)
    return matched, len(ids) - matched, len(true_ids) - matched, above, below


def test_objects_of_a_perfect_mask_are_all_found_whatever_their_numbers() -> None:
    truth = find_objects(blobs(3, classes=1) == 1)
    count = int(truth.max())
    other = np.where(truth > 0, (count - truth) * 977 + 12, 0)
    found = match_objects(other, truth)
    assert found[:3] == (count, 0, 0)
    assert found.aji_intersection == found.aji_union == (truth > 0).sum()


def tally(of: Job, cases: list[tuple[np.ndarray, np.ndarray]], losses: Sequence[float] = ()) -> Tally:
    """Sums of some pairs of predicted and true masks, of pixels of 1 mm."""
    made = Tally(of)
    classes = len(of.classes)
    for number, (predicted, truth) in enumerate(cases):
        marks = [(mask > 0).astype(int) if made.instances else mask for mask in (predicted, truth)]
        far = [hausdorff95(marks[0] == k, marks[1] == k, (1, 1)) for k in range(1, classes + 1)]
        objects = match_objects(find_objects(marks[0] > 0), truth) if made.instances else None
        loss = losses[number] if losses else 0.5
        made.add(loss, overlap(*marks, classes), [one for one in far if one is not None], objects)
    return made


def test_metrics_of_several_images_are_the_means_monai_gives() -> None:
    from monai.metrics import DiceMetric, HausdorffDistanceMetric, MeanIoU

    of = job()
    cases = [(blobs(seed), blobs(seed + 50)) for seed in range(5)]
    found = summarise(tally(of, cases).sums, of)
    hot = [
        torch.stack([torch.nn.functional.one_hot(torch.from_numpy(case[side]), 3).movedim(-1, 0) for case in cases])
        for side in (0, 1)
    ]
    for name, metric in {
        "dice": DiceMetric(include_background=False),
        "iou": MeanIoU(include_background=False),
        "hd95": HausdorffDistanceMetric(include_background=False, percentile=95),
    }.items():
        metric(*hot)
        assert found[name].value == pytest.approx(float(metric.aggregate()), rel=1e-5), name
        assert found[name].n == 5
    by_class = DiceMetric(include_background=False, reduction="mean_batch")
    by_class(*hot)
    assert [found[f"dice:{name}"].value for name in of.classes] == pytest.approx(by_class.aggregate().tolist())


def test_pooled_dice_and_iou_are_those_of_all_pixels_in_one_image() -> None:
    of = job()
    cases = [(blobs(seed), blobs(seed + 50)) for seed in range(5)]
    found = summarise(tally(of, cases).sums, of)
    whole = overlap(*(np.concatenate([case[side] for case in cases]) for side in (0, 1)), 2)
    assert found["dice_pooled"].value == pytest.approx(whole.dice.mean())
    assert found["iou_pooled"].value == pytest.approx(whole.iou.mean())
    for name in ("dice_pooled", "iou_pooled"):
        assert found[name].low < found[name].value < found[name].high


def test_a_class_in_neither_mask_is_left_out_and_an_invented_one_counts_nothing() -> None:
    of = job()
    empty, organ, lesion = np.zeros((8, 8), int), np.zeros((8, 8), int), np.zeros((8, 8), int)
    organ[2:6, 2:6] = 1
    lesion[0, 0] = 2
    found = summarise(tally(of, [(organ, organ), (empty, empty), (organ + lesion, organ)]).sums, of)
    assert (found["dice"].value, found["dice"].n) == (pytest.approx((1 + 0.5) / 2), 2)
    assert (found["dice:organ"].value, found["dice:organ"].n) == (1.0, 2)
    assert (found["dice:lesion"].value, found["dice:lesion"].n) == (0.0, 1)
    sums = tally(of, [(empty, empty)]).sums
    assert (sums["hd95_n"], sums["hd95_missing"], sums["dice_n"]) == (0, 1, 0)
    assert summarise(sums, of)["dice"].n == 0
    assert np.isnan(summarise(sums, of)["dice"].value)


def test_of_one_image_the_interval_is_all_there_is() -> None:
    of = job()
    found = summarise(tally(of, [(blobs(0), blobs(1))]).sums, of)
    for name in ("dice", "iou", "dice_pooled", "dice:organ", "dice:lesion"):
        assert (found[name].low, found[name].high, found[name].n) == (0.0, 1.0, 1), name


def test_instance_metrics_are_ratios_of_all_objects_and_pixels() -> None:
    of = job(data__classes="cell", data__masks="instances")
    cases = [(blobs(seed, classes=1), find_objects(blobs(seed + 9, classes=1) > 0)) for seed in range(4)]
    sums = tally(of, cases).sums
    one = [match_objects(find_objects(predicted > 0), truth) for predicted, truth in cases]
    matched, false, missed, inside, either = map(sum, zip(*one, strict=True))
    found = summarise(sums, of)
    assert found["instance_f1"].value == pytest.approx(2 * matched / (2 * matched + false + missed))
    assert found["aji"].value == pytest.approx(inside / either)


def textbook(values: Sequence[float], least: float = -np.inf, most: float = np.inf) -> tuple[float, float, float, int]:
    """The mean of some values with its normal interval, cut at what a value can be."""
    kept = np.array([value for value in values if not np.isnan(value)])
    half = 1.959963985 * kept.std(ddof=1) / np.sqrt(len(kept))
    return kept.mean(), max(kept.mean() - half, least), min(kept.mean() + half, most), len(kept)


def test_every_interval_of_a_mean_is_that_of_the_images_values() -> None:
    of = job()
    cases = [(blobs(seed), blobs(seed + 50)) for seed in range(6)]
    cases.append((np.where(cases[0][0] == 2, 0, cases[0][0]), np.where(cases[0][1] == 2, 0, cases[0][1])))
    losses = [0.1, 2.0, 0.4, 0.9, 3.0, 0.2, 0.7]
    found = summarise(tally(of, cases, losses).sums, of)
    over = [overlap(*case, 2) for case in cases]
    far = [[hausdorff95(p == k, t == k, (1, 1)) for k in (1, 2)] for p, t in cases]
    expected = {
        "loss": textbook(losses),
        "dice": textbook([float(np.nanmean(one.dice)) for one in over], 0, 1),
        "iou": textbook([float(np.nanmean(one.iou)) for one in over], 0, 1),
        "hd95": textbook([float(np.mean([x for x in pair if x is not None])) for pair in far]),
        "dice:organ": textbook([float(one.dice[0]) for one in over], 0, 1),
        "dice:lesion": textbook([float(one.dice[1]) for one in over], 0, 1),
    }
    assert expected["dice:lesion"][3] == 6, "one image has no lesion"
    for name, (value, low, high, n) in expected.items():
        assert vars(found[name]) == pytest.approx({"value": value, "low": low, "high": high, "n": n}), name


def test_the_interval_of_a_pooled_figure_is_made_of_each_classs_own() -> None:
    of = job(data__classes="organ,lesion,vessel")
    cases = [(blobs(seed, classes=3), blobs(seed + 50, classes=3)) for seed in range(5)]
    over = [overlap(*case, 3) for case in cases]
    parts = []
    for k in range(3):
        a = np.array([2.0 * one.both[k] for one in over])
        b = np.array([float(one.predicted[k] + one.truth[k]) for one in over])
        parts.append(ratio(a.sum(), b.sum(), [float(a @ a), float(a @ b), float(b @ b)], 5))
    assert vars(summarise(tally(of, cases).sums, of)["dice_pooled"]) == pytest.approx(vars(mean_dependent(parts)))


def test_one_class_has_no_figure_of_its_own_beside_that_of_all() -> None:
    of = job(data__classes="organ")
    found = summarise(tally(of, [(blobs(0, classes=1), blobs(1, classes=1))]).sums, of)
    assert not [name for name in found if name.startswith("dice:")]


def test_intervals_of_shares_end_at_none_and_all() -> None:
    of = job(data__classes="organ")
    right, wrong = np.zeros((8, 8), int), np.zeros((8, 8), int)
    right[:2], wrong[5:] = 1, 1
    low = summarise(tally(of, [(wrong, right), (wrong, right), (wrong, right), (right, right)]).sums, of)["dice"]
    high = summarise(tally(of, [(right, right), (right, right), (right, right), (wrong, right)]).sums, of)["dice"]
    assert (low.value, low.low, high.value, high.high) == (0.25, 0.0, 0.75, 1.0)
    assert 0.25 < low.high < 1
    assert 0 < high.low < 0.75


def test_intervals_of_objects_are_those_of_a_ratio_over_images() -> None:
    of = job(data__classes="cell", data__masks="instances")
    cases = [(blobs(seed, classes=1), find_objects(blobs(seed + 9, classes=1) > 0)) for seed in range(6)]
    found = summarise(tally(of, cases).sums, of)
    one = np.array([match_objects(find_objects(predicted > 0), truth) for predicted, truth in cases], float)
    matched, false, missed, inside, either = one.T
    assert false.any()
    assert missed.any()
    for name, a, b in (("instance_f1", 2 * matched, 2 * matched + false + missed), ("aji", inside, either)):
        value = a.sum() / b.sum()
        half = 1.959963985 * np.sqrt(len(a) * np.sum((a - value * b) ** 2) / (len(a) - 1)) / b.sum()
        ends = (value - half, min(value + half, 1))
        assert (found[name].low, found[name].high) == pytest.approx(ends, rel=1e-6), name


def test_contradicting_objects_and_modalities_are_refused() -> None:
    of = job(data__classes="cell", data__masks="instances")
    cases = [(blobs(seed, classes=1), find_objects(blobs(seed + 9, classes=1) > 0)) for seed in range(3)]
    sums = tally(of, cases).sums
    assert consistent(sums, of)
    assert not consistent(sums | {"aji_union": int(sums["aji_intersection"]) - 1}, of)  # type: ignore[arg-type]
    assert not consistent(sums | {"dice_n": 9}, of), "whatever the objects say"
    assert consistent(sums | {"missing": [3, 0]}, of)
    assert not consistent(sums | {"missing": [0, 4]}, of)


def test_a_perfect_model_is_consistent() -> None:
    of = job()
    sums = tally(of, [(blobs(seed), blobs(seed)) for seed in range(3)]).sums
    assert (sums["iou"], sums["dice"], sums["dice_n"]) == (3.0, 3.0, 3)
    assert consistent(sums, of)
    assert not consistent(sums | {"dice": 3.5}, of)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9))
def test_the_interval_of_a_ratio_is_the_textbook_one(pairs: list[tuple[int, int]]) -> None:
    """Residuals image by image, as Cochran writes it, against the sums of products."""
    a, b = (np.array(column, float) for column in zip(*((min(p), max(p)) for p in pairs), strict=True))
    products = [float((a * a).sum()), float((a * b).sum()), float((b * b).sum())]
    found = ratio(a.sum(), b.sum(), products, len(a))
    if not b.sum():
        assert found.n == 0
        return
    residual = a - a.sum() / b.sum() * b
    error = np.sqrt(len(a) * residual.var(ddof=1)) / b.sum()
    # The residuals add up to zero, so their variance is their mean square.
    assert found.high == pytest.approx(min(found.value + 1.959964 * error, 1), abs=1e-6)
    assert found.low == pytest.approx(max(found.value - 1.959964 * error, 0), abs=1e-6)


def test_a_ratio_of_one_object_is_a_figure_and_of_no_image_is_none() -> None:
    assert vars(ratio(1, 1, [1, 1, 1], 2)) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 2}
    assert ratio(1, 2, [1, 2, 4], 0).n == 0
    assert np.isnan(ratio(1, 2, [1, 2, 4], 0).value)


def test_the_interval_of_pooled_dice_covers_what_resampling_images_gives() -> None:
    of = job(data__classes="organ")
    cases = [(np.minimum(blobs(seed), 1), np.minimum(blobs(seed + 500), 1)) for seed in range(60)]
    found = summarise(tally(of, cases).sums, of)["dice_pooled"]
    over = [overlap(*case, 1) for case in cases]
    a, b = (np.array([float(o[0][0]) * 2 for o in over]), np.array([float(o[1][0] + o[2][0]) for o in over]))
    picks = np.random.default_rng(0).integers(0, 60, (4000, 60))
    low, high = np.percentile(a[picks].sum(1) / b[picks].sum(1), [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


@pytest.mark.parametrize("masks", ["classes", "instances"])
def test_sums_add_up_over_sites_and_agree_with_themselves(masks: str) -> None:
    of = job(data__masks=masks, data__classes="organ,lesion" if masks == "classes" else "cell")
    cases = [(blobs(seed), blobs(seed + 50)) for seed in range(5)]
    if masks == "instances":
        cases = [(predicted, find_objects(truth > 0)) for predicted, truth in cases]
    whole, parts = tally(of, cases).sums, [tally(of, cases[:2]).sums, tally(of, cases[2:]).sums]
    both = add_sums(parts)
    assert set(both) == set(whole)
    for key, value in whole.items():
        np.testing.assert_allclose(both[key], value, rtol=1e-12, err_msg=key)
    assert all(consistent(sums, of) for sums in (whole, *parts, Tally(of).sums))


@pytest.mark.parametrize(
    "lie",
    [
        {"intersection": [10**9, 0]},
        {"dice_n": 9},
        {"hd95_n": 9},
        {"dice_class_n": [9, 0]},
        {"dice": 8.0},
        {"iou": 4.9},
        {"n": 4},
    ],
)
def test_sums_that_contradict_each_other_are_refused(lie: dict[str, object]) -> None:
    of = job()
    sums = tally(of, [(blobs(seed), blobs(seed + 50)) for seed in range(5)]).sums
    assert consistent(sums, of)
    assert not consistent(sums | lie, of)  # type: ignore[operator]


def test_the_loss_of_an_image_is_cross_entropy_and_dice_and_its_own() -> None:
    """Against MONAI's, image by image; the mean over a batch is the mean of what each gives alone."""
    from monai.losses import DiceCELoss

    torch.manual_seed(0)
    logits, masks = torch.randn(3, 3, 9, 8), torch.randint(0, 3, (3, 9, 8))
    expected = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1.0, smooth_dr=1.0, reduction="mean"
    )
    found = mask_losses(logits, masks)
    for i in range(3):
        assert float(found[i]) == pytest.approx(float(expected(logits[i : i + 1], masks[i : i + 1, None])), rel=1e-5)
        assert float(found[i]) == pytest.approx(float(mask_losses(logits[i : i + 1], masks[i : i + 1])[0]), rel=1e-6)
    right = torch.nn.functional.one_hot(masks, 3).movedim(-1, 1) * 50.0
    assert mask_losses(right, masks).max() < 1e-3


def test_classes_that_an_image_lacks_count_in_its_cross_entropy_only() -> None:
    """Else a rare class is driven to zero: its Dice is 0 wherever it is not, so not finding it at all pays."""
    from monai.losses import DiceLoss

    torch.manual_seed(0)
    logits = torch.randn(2, 4, 9, 8)
    masks = torch.randint(0, 2, (2, 9, 8)) * 2  # background and class 2
    masks[1] = 0
    entropy = torch.nn.functional.cross_entropy(logits, masks, reduction="none").mean((1, 2))
    of_class = DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1.0, smooth_dr=1.0, reduction="none"
    )
    dice = of_class(logits, masks[:, None]).flatten(1)
    found = mask_losses(logits, masks)
    assert float(found[0]) == pytest.approx(float(entropy[0] + dice[0, 1]), rel=1e-5)
    assert float(found[1]) == pytest.approx(float(entropy[1] + dice[1].mean()), rel=1e-5)
