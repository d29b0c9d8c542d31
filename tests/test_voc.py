"""The VOC metric: detectron2's numbers, a slow loop, and detectors whose AP is known; sizes and micro-batches.

pytest tests/test_voc.py
"""

import json

import numpy as np
import pytest

from moco.detection.data import micro_batch_rows, resized_shape
from moco.detection.voc import evaluate_voc
from moco.schedule import warmup_step_rate


def per_image(description):
    """(predictions, targets) in the order in which detectron2's evaluator saw the images."""
    classes = description["classes"]
    seen = [detection["image"] for detection in description["detections"]] + description["images"]
    predictions, targets = [], []
    for name in dict.fromkeys(seen):
        found = [d for d in description["detections"] if d["image"] == name]
        truth = [t for t in description["ground_truth"] if t["image"] == name]
        predictions.append(
            {
                "boxes": np.array([d["bbox"] for d in found]).reshape(-1, 4),
                "labels": np.array([classes.index(d["class"]) for d in found]),
                "scores": np.array([d["score"] for d in found]),
            }
        )
        targets.append(
            {
                "boxes": np.array([t["bbox_voc"] for t in truth], float).reshape(-1, 4) - [1, 1, 0, 0],
                "labels": np.array([classes.index(t["class"]) for t in truth]),
                "difficult": np.array([bool(t["difficult"]) for t in truth], bool),
            }
        )
    return predictions, targets


def test_golden_voc_metric(golden):
    description = json.loads((golden / "detection" / "voc_eval.json").read_text())
    predictions, targets = per_image(description)
    scores = evaluate_voc(predictions, targets, description["classes"])
    expected = description["expected"]
    for key in ("AP", "AP50", "AP75"):
        assert scores[key] == pytest.approx(expected[key], abs=1e-6)
    for name, values in expected["per_class"].items():
        assert scores["per_class"][name]["AP_by_iou"] == pytest.approx(values["AP_by_iou"], abs=1e-6)
    area = evaluate_voc(predictions, targets, description["classes"], use_07_metric=False)
    for key in ("AP", "AP50", "AP75"):
        assert area[key] == pytest.approx(description["diagnostic_voc2012_area_metric"][key], abs=1e-6)


def test_golden_schedules_and_sizes(golden):
    numbers = json.loads((golden / "detection" / "schedule_resize.json").read_text())
    for name in ("lr_schedule_voc", "lr_schedule_coco"):
        schedule = numbers[name]
        for iteration, expected in schedule["lr_used_at_iteration_0based"].items():
            lr = warmup_step_rate(schedule["base_lr"], int(iteration), schedule["steps"], schedule["warmup_iters"])
            assert lr == pytest.approx(expected, rel=1e-9)
    for height, width, short, longest, *expected in numbers["resize_shapes"]["rows"]:
        assert list(resized_shape(height, width, short, longest)) == expected


BOXES = np.array([[10.0, 10, 50, 40], [60, 20, 90, 80]], np.float32)


def image(boxes, scores=(0.9, 0.8), **more):
    labels = np.arange(len(boxes))
    found = {"boxes": boxes, "labels": labels, "scores": np.array(scores[: len(boxes)])}
    truth = {"boxes": BOXES, "labels": np.arange(2), "difficult": np.zeros(2, bool)} | more
    return [found], [truth]


@pytest.mark.parametrize("use_07_metric", [True, False])
def test_a_perfect_detector_has_100_and_an_empty_one_0(use_07_metric):
    perfect = evaluate_voc(*image(BOXES), ["a", "b"], use_07_metric)
    empty = evaluate_voc(*image(BOXES[:0]), ["a", "b"], use_07_metric)
    for key in ("AP", "AP50", "AP75"):
        assert perfect[key] == pytest.approx(100) and empty[key] == 0
    absent = evaluate_voc(*image(BOXES), ["a", "b", "without objects"], use_07_metric)
    assert absent["AP50"] == pytest.approx(200 / 3)  # counts in the mean


def test_a_shifted_detector_has_the_thresholds_below_its_overlap():
    """Ten pixels aside: 40 x 30 boxes (inclusive of 1 more in the devkit's frame: x from 11) keep 30 of 50 columns."""
    shifted = evaluate_voc(*image(BOXES[:1] + [10, 0, 10, 0]), ["a"])
    assert shifted["AP50"] == pytest.approx(100) and shifted["AP75"] == 0
    assert shifted["AP"] == pytest.approx(20)  # 0.6 is above 0.50 and 0.55, not strictly above 0.60


def test_a_second_hit_is_wrong_and_a_difficult_object_is_neither():
    found = {"boxes": BOXES[[0, 0, 1]], "labels": np.zeros(3, int), "scores": np.array([0.9, 0.8, 0.7])}
    truth = {"boxes": BOXES, "labels": np.zeros(2, int), "difficult": np.zeros(2, bool)}
    twice = evaluate_voc([found], [truth], ["a"], use_07_metric=False)
    assert twice["AP50"] == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))
    difficult = evaluate_voc([found], [truth | {"difficult": np.array([False, True])}], ["a"], use_07_metric=False)
    assert difficult["AP50"] == pytest.approx(100)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_are_those_of_any_number_of_processes(micro_batch):
    portrait = np.arange(37) % 3 == 0

    def take(world, iterations, start=0):
        sources = [micro_batch_rows(portrait, 8, micro_batch, 5, start, rank, world) for rank in range(world)]
        each = 8 // micro_batch // world
        return [[next(source) for source in sources for _ in range(each)] for _ in range(iterations)]

    one, two = take(1, 12), take(2, 12)
    assert one == two and take(1, 5, start=7) == one[7:]
    first_epoch = [index for batch in one for group in batch for _, index in group][: 37 // micro_batch * micro_batch]
    assert len(set(first_epoch)) == len(first_epoch)  # each image at most once
    mixed = sum(len({bool(portrait[index]) for _, index in group}) > 1 for batch in one for group in batch)
    assert mixed <= 4  # one micro-batch an epoch at most
