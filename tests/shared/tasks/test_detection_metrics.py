"""Average precision from sums against two other programs, on invented and on real images."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shared.cases import SiteData
from shared.config import Job, job_from_flat
from shared.intervals import Estimate, proportion
from shared.samples import read_samples
from shared.tasks import Sums, add_sums
from shared.tasks.detection.boxes import corners
from shared.tasks.detection.metrics import (
    _STUDENT,
    BINS,
    GROUPS,
    OVERLAPS,
    Tally,
    average_precision,
    consistent,
    jackknife,
    overlaps,
    right_at,
    score_bins,
    summarise,
)

CLOSE = 0.005
JOB: Job = job_from_flat({"task": "detection", "data.classes": "a,b,c"})


class Picture(NamedTuple):
    """Truth and detections of one image, boxes as x1, y1, x2, y2."""

    truth: np.ndarray
    true_classes: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


Scores = Callable[[np.random.Generator, int, int], np.ndarray]


def logistic(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


SCORES: dict[str, Scores] = {
    "even": lambda rng, right, wrong: np.concatenate([rng.uniform(0.2, 1, right), rng.uniform(0, 0.8, wrong)]),
    "sure": lambda rng, right, wrong: logistic(np.concatenate([rng.normal(7, 2, right), rng.normal(2, 3, wrong)])),
    "unsure": lambda rng, right, wrong: np.concatenate([rng.beta(2, 20, right), rng.beta(1, 20, wrong)]),
}


def invented(rng: np.random.Generator, images: int, scores: Scores, most: int = 25) -> list[Picture]:
    """Detections near the truth, some of the wrong class, and some anywhere."""

    def somewhere(count: int) -> np.ndarray:
        return corners(np.concatenate([rng.uniform(0, 200, (count, 2)), rng.uniform(8, 50, (count, 2))], 1))

    found = []
    for _ in range(images):
        truth = somewhere(int(rng.integers(0, most)))
        true_classes = rng.integers(0, 3, len(truth))
        hit = rng.random(len(truth)) < 0.85
        near = truth[hit] + rng.normal(0, 2.5, (hit.sum(), 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        named = np.where(rng.random(hit.sum()) < 0.9, true_classes[hit], rng.integers(0, 3, hit.sum()))
        wrong = somewhere(int(rng.poisson(6)))
        classes = np.concatenate([named, rng.integers(0, 3, len(wrong))])
        values = scores(rng, len(near), len(wrong))
        found.append(Picture(truth, true_classes, np.concatenate([near, wrong]), classes, values))
    return found


def tallied(pictures: Sequence[Picture], first: int = 0) -> Sums:
    tally = Tally(3)
    for number, picture in enumerate(pictures, start=first):
        tally.add(str(number), *picture)
    return tally.sums()


def as_coco(pictures: Sequence[Picture]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The truth as a COCO data set, the detections as COCO results."""

    def box(values: np.ndarray) -> list[float]:
        x1, y1, x2, y2 = values.tolist()
        return [x1, y1, x2 - x1, y2 - y1]

    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, start=1):
        for values, k in zip(picture.truth, picture.true_classes, strict=True):
            area = float((values[2] - values[0]) * (values[3] - values[1]))
            item = {"id": len(truth) + 1, "image_id": number, "category_id": int(k) + 1, "bbox": box(values)}
            truth.append(item | {"area": area, "iscrowd": 0})
        for values, k, score in zip(picture.boxes, picture.classes, picture.scores, strict=True):
            item = {"image_id": number, "category_id": int(k) + 1, "bbox": box(values)}
            found.append(item | {"score": float(score)})
    images = [{"id": number} for number in range(1, len(pictures) + 1)]
    categories = [{"id": k, "name": str(k)} for k in (1, 2, 3)]
    return {"images": images, "annotations": truth, "categories": categories}, found


def pycocotools(pictures: Sequence[Picture]) -> np.ndarray:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return evaluated(COCO, COCOeval, pictures)


def faster_coco_eval(pictures: Sequence[Picture]) -> np.ndarray:
    from faster_coco_eval import COCO, COCOeval_faster

    return evaluated(COCO, COCOeval_faster, pictures)


def evaluated(data: Any, evaluation: Any, pictures: Sequence[Picture]) -> np.ndarray:
    """Average precision (overlaps, classes) of another program; -1 where a class has no box."""
    content, found = as_coco(pictures)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = data()
        truth.dataset = content
        truth.createIndex()
        run = evaluation(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
    precision = np.asarray(run.eval["precision"])[..., 0, -1]  # overlap, recall, class; any area, 100 detections
    return np.where((precision > -1).all(1), precision.mean(1), -1)


def expected(table: np.ndarray) -> dict[str, float]:
    """The metrics from another program's table."""
    kept = table[:, (table > -1).all(0)]
    means = kept.mean(1)
    found = {"map50": means[0], "map75": means[5], "map": means.mean()}
    return found | {f"map50:{name}": table[0, k] for k, name in enumerate("abc") if table[0, k] > -1}


def agree(found: dict[str, Estimate], wanted: dict[str, float], within: float = CLOSE) -> None:
    for name, value in wanted.items():
        assert found[name].value == pytest.approx(value, abs=within), name


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("images", [3, 20, 120])
def test_average_precision_is_that_of_pycocotools_and_faster_coco_eval(kind: str, images: int) -> None:
    within = CLOSE if images > 3 else 0.02  # of a dozen boxes each one counts, and two may be tied in a bin
    for seed in range(3):
        pictures = invented(np.random.default_rng([seed, images]), images, SCORES[kind])
        found = summarise(tallied(pictures), JOB)
        agree(found, expected(pycocotools(pictures)), within)
        agree(found, expected(faster_coco_eval(pictures)), within)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), images=st.integers(1, 5), most=st.integers(1, 8), kind=st.sampled_from([*SCORES]))
def test_it_is_so_for_few_boxes_too(seed: int, images: int, most: int, kind: str) -> None:
    pictures = invented(np.random.default_rng(seed), images, SCORES[kind], most)
    if not any(len(picture.truth) for picture in pictures) or not any(len(picture.scores) for picture in pictures):
        return
    bins = np.concatenate([score_bins(picture.scores) for picture in pictures])
    if len(np.unique(bins)) < len(bins):
        return  # two detections in one bin are tied for us; of few boxes each one counts
    agree(summarise(tallied(pictures), JOB), expected(pycocotools(pictures)), 1e-9)


def test_more_than_a_hundred_detections_of_a_class_are_cut_as_coco_cuts_them() -> None:
    rng = np.random.default_rng(0)
    pictures = invented(rng, 3, SCORES["even"], most=600)
    assert max(np.bincount(picture.classes).max() for picture in pictures) > 100
    found = summarise(tallied(pictures), JOB)
    agree(found, expected(pycocotools(pictures)))


def test_real_boxes_moved_a_little_score_as_the_other_programs_say(
    shared_data: Callable[[str], Path],
) -> None:
    """A detector made from the truth of three sites: moved, some left out, some invented."""
    rng = np.random.default_rng(1)
    pictures = []
    for folder in sorted(path for path in shared_data("bloodcell_det_multisite").iterdir() if path.is_dir()):
        job = JOB.replace(data__classes="WBC,RBC,Platelet")
        for sample in read_samples(SiteData(folder.name, folder), job)[:120]:
            table = np.array(sample.boxes).reshape(-1, 5)
            truth, classes = corners(table[:, 1:]), table[:, 0].astype(int)
            kept = rng.random(len(truth)) < 0.9
            noise = rng.normal(0, 0.06, (kept.sum(), 4)) * np.tile(truth[kept, 2:] - truth[kept, :2], 2)
            wrong = truth[rng.random(len(truth)) < 0.2] + 40
            boxes = np.concatenate([truth[kept] + noise, wrong])
            scores = SCORES["sure"](rng, int(kept.sum()), len(wrong))
            named = np.concatenate([classes[kept], rng.integers(0, 3, len(wrong))])
            pictures.append(Picture(truth, classes, boxes, named, scores))
    found = summarise(tallied(pictures), JOB)
    assert 0.5 < found["map50"].value < 0.99
    agree(found, expected(pycocotools(pictures)), 0.002)
    agree(found, expected(faster_coco_eval(pictures)), 0.002)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 12))
def test_sums_of_parts_are_the_sums_of_the_whole(seed: int, cut: int) -> None:
    pictures = invented(np.random.default_rng(seed), 12, SCORES["even"])
    whole = tallied(pictures)
    both = add_sums([tallied(pictures[:cut]), tallied(pictures[cut:], first=cut)])
    assert both == whole
    assert consistent(whole, JOB)
    assert json.loads(json.dumps(whole)) == whole


def slowly_right(boxes: np.ndarray, truth: np.ndarray, overlap: float) -> list[bool]:
    """COCO's matching as its evaluation writes it, loop by loop."""
    taken, right = set(), []
    for box in boxes:
        best, match = min(overlap, 1 - 1e-10), -1
        for number, other in enumerate(truth):
            if number in taken:
                continue
            wide = min(box[2], other[2]) - max(box[0], other[0])
            high = min(box[3], other[3]) - max(box[1], other[1])
            inside = wide * high if wide > 0 and high > 0 else 0.0
            area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
            if inside / (area - inside) < best:
                continue
            best, match = inside / (area - inside), number
        right.append(match >= 0)
        taken.add(match)
    return right


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), found=st.integers(0, 12), there=st.integers(0, 8))
def test_matching_is_the_slow_one(seed: int, found: int, there: int) -> None:
    rng = np.random.default_rng(seed)

    def crowd(count: int) -> np.ndarray:
        return corners(np.concatenate([rng.integers(0, 12, (count, 2)), rng.integers(5, 12, (count, 2))], 1) * 1.0)

    boxes, truth = crowd(found), crowd(there)
    right = right_at(boxes, truth)
    assert right.shape == (10, found)
    for row, overlap in zip(right, OVERLAPS, strict=True):
        assert row.tolist() == slowly_right(boxes, truth, overlap)


def test_overlap_of_known_boxes() -> None:
    one = np.array([[0.0, 0, 10, 10]])
    others = np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 4]])
    assert overlaps(one, others)[0].tolist() == pytest.approx([1, 1 / 3, 0, 0.04])


def test_average_precision_by_hand() -> None:
    # three boxes; the sure detection is right, the next wrong, the last right: precisions 1, 1/2, 2/3 at recalls
    # 1/3, 1/3, 2/3, so 1 up to recall .33 (34 of COCO's 101 points), 2/3 up to .66 (33 points), then 0
    detections, right = np.array([1, 1, 1]), np.array([1, 0, 1])
    assert average_precision(detections, right, 3) == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)
    assert average_precision(np.array([0, 2]), np.array([0, 2]), 2) == 1
    assert average_precision(np.array([3, 0]), np.array([0, 0]), 2) == 0
    assert average_precision(np.zeros(4, int), np.zeros(4, int), 2) == 0


def test_scores_keep_their_order_in_bins_and_crowd_nowhere() -> None:
    scores = np.sort(np.random.default_rng(0).random(5000))
    bins = score_bins(scores)
    assert (np.diff(bins) >= 0).all()
    assert np.bincount(bins).max() < 5000 / 200
    near_one = score_bins(1 - np.array([1e-2, 1e-3, 1e-4, 1e-5, 1e-6], np.float64))
    assert (np.diff(near_one) > 100).all()
    assert score_bins(np.array([0.0, 1.0])).tolist() == [0, BINS - 1]


def one_class(images: Sequence[tuple[int, list[tuple[float, bool]]]]) -> Sums:
    """Images of one class: how many boxes, and for each detection its score and whether it is right."""
    tally = Tally(3)
    for number, (there, found) in enumerate(images):
        truth = corners(np.array([[20.0 * k, 0, 10, 10] for k in range(there)]).reshape(-1, 4))
        places = iter(range(there))
        boxes = [
            [20.0 * next(places), 0, 10, 10] if right else [0, 500.0 + 20 * k, 10, 10]
            for k, (_, right) in enumerate(found)
        ]
        scores = np.array([score for score, _ in found])
        zeros = np.zeros(len(found), np.int64)
        tally.add(str(number), truth, np.zeros(there, np.int64), corners(np.array(boxes).reshape(-1, 4)), zeros, scores)
    return tally.sums()


def test_sensitivity_at_one_false_detection_per_image_by_hand() -> None:
    # two images, so two false detections are allowed: at .3 there are 2 of them, and 3 of 5 boxes are found
    sums = one_class(
        [
            (3, [(0.9, True), (0.8, False), (0.6, True), (0.1, True)]),
            (2, [(0.7, False), (0.5, True), (0.2, False)]),
        ]
    )
    found = summarise(sums, JOB)["sensitivity_1fp"]
    assert found == proportion(3, 5)
    without_false = summarise(one_class([(2, [(0.4, True)])]), JOB)["sensitivity_1fp"]
    assert (without_false.value, without_false.n) == (0.5, 2)


def test_images_without_objects_count_against_what_is_found_there() -> None:
    right = (1, [(0.5, True)])
    alone = summarise(one_class([right] * 4), JOB)
    beside_empty = summarise(one_class([right] * 4 + [(0, [(0.9, False)])] * 4), JOB)
    assert alone["map50"].value == 1
    assert beside_empty["map50"].value == pytest.approx(0.5)
    assert beside_empty["sensitivity_1fp"].value == 1  # one false detection in each empty image is allowed


def test_a_class_without_a_box_is_passed_over_and_no_box_at_all_is_nothing() -> None:
    found = summarise(one_class([(1, [(0.5, True)])] * 3), JOB)
    assert found["map50"].value == found["map50:a"].value == 1
    assert found["map50:b"].n == 0
    assert math.isnan(found["map50:b"].value)
    nothing = summarise(Tally(3).sums(), JOB)
    assert set(nothing) == set(found)
    assert all(estimate.n == 0 and math.isnan(estimate.value) for estimate in nothing.values())
    only_false = summarise(one_class([(0, [(0.5, False)])]), JOB)
    assert all(estimate.n == 0 for estimate in only_false.values())


def test_sums_that_contradict_each_other_are_found_out() -> None:
    good = tallied(invented(np.random.default_rng(3), 20, SCORES["even"]))
    assert consistent(good, JOB)

    def wrong(key: str, place: int, value: int) -> bool:
        values = list(good[key])  # type: ignore[arg-type]
        values[place] += value
        return consistent(good | {key: values}, JOB)

    fine = np.array(good["fine"]).reshape(3, 11, BINS)
    used = int(np.flatnonzero(fine[0, 0])[0])
    assert not consistent(good | {"n": 21}, JOB)
    assert not wrong("images", 0, 1)
    assert not wrong("fine", used, 1)
    assert not wrong("coarse", 0, 1)
    more_right = fine.copy()
    more_right[0, 1, used] = fine[0, 0, used] + 1
    assert not consistent(good | {"fine": more_right.flatten().tolist()}, JOB)
    assert not consistent(good | {"objects": [0] * GROUPS * 3}, JOB)


def test_the_quantiles_are_students() -> None:
    assert [round(float(stats.t.ppf(0.975, df)), 4) for df in range(1, 10)] == list(_STUDENT)


def test_of_equal_groups_the_jackknife_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, 10)
    without = [(values.sum() - value) / 9 for value in values]
    found = jackknife(values.mean(), values.mean(), without, [7] * 10, 70)
    half = stats.t.ppf(0.975, 9) * values.std(ddof=1) / math.sqrt(10)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-4)


def test_intervals_know_when_there_is_little_to_tell_from() -> None:
    assert jackknife(0.7, 0.7, [0.7], [5], 5) == Estimate(0.7, 0.0, 1.0, 5)
    sure = jackknife(1.0, 1.0, [1.0] * 5, [4] * 5, 60)
    assert sure == Estimate(1.0, proportion(20, 20).low, 1.0, 60)


def test_the_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    truth = summarise(tallied(invented(np.random.default_rng(99), 2500, SCORES["even"])), JOB)["map50"].value
    held, runs = 0, 40
    for run in range(runs):
        tally = Tally(3)
        for number, picture in enumerate(invented(np.random.default_rng([7, run]), 40, SCORES["even"])):
            tally.add(f"{run}-{number}", *picture)
        found = summarise(tally.sums(), JOB)["map50"]
        held += found.low <= truth <= found.high
    assert stats.binom.cdf(held, runs, 0.95) > 0.001
    assert held / runs > 0.8
