"""The VOC metric, as the VOC2007 devkit and the reference's evaluator compute it."""

import numpy as np


def evaluate_voc(predictions, targets, classes, use_07_metric=True):
    """AP, AP50 and AP75 in percent, as the VOC2007 devkit and the reference's evaluator compute them.

    predictions: for each image {"boxes" (n, 4) xyxy from 0, "labels" (n,) into classes, "scores" (n,)}.
    targets: for each image {"boxes" (m, 4) as loaded, "labels", "difficult" (m,) bool}.
    use_07_metric: precision at 11 recalls; False: area under the curve, the rule of 2010 and later.
    Returns {"AP", "AP50", "AP75", "per_class": {class: the same and "AP_by_iou"}}. AP is the mean over IoU 0.50,
    0.55 ... 0.95. A class without objects has AP 0 and counts in the means.
    Boxes are compared as the devkit's, from 1 and inclusive, detections rounded as in its result files (scores to
    three decimals, corners to one). Equal scores keep the order of the images.
    """
    found = [{key: np.asarray(image[key]) for key in ("boxes", "labels", "scores")} for image in predictions]
    truth = [{key: np.asarray(image[key]) for key in ("boxes", "labels", "difficult")} for image in targets]
    thresholds = range(50, 100, 5)
    per_class = {}
    for label, name in enumerate(classes):
        overlaps, objects, difficult, objects_count = match_class(found, truth, label)
        by_iou = {
            str(t): 100 * average_precision(overlaps > t / 100, objects, difficult, objects_count, use_07_metric)
            for t in thresholds
        }
        mean = float(np.mean(list(by_iou.values())))
        per_class[name] = {"AP": mean, "AP50": by_iou["50"], "AP75": by_iou["75"], "AP_by_iou": by_iou}
    means = {key: float(np.mean([scores[key] for scores in per_class.values()])) for key in ("AP", "AP50", "AP75")}
    return means | {"per_class": per_class}


def match_class(found, truth, label):
    """The detections of one class, best first, each with the object it overlaps most.

    Returns IoU (n,), id of that object (n,), whether it is difficult (n,), and the number of objects that are not.
    """
    scores, overlaps, objects, difficult = [], [], [], []
    first_id, counted = 0, 0
    shift = np.array([1, 1, 0, 0])
    for image, target in zip(found, truth, strict=True):
        chosen, present = image["labels"] == label, target["labels"] == label
        boxes = decimals(image["boxes"].reshape(-1, 4)[chosen] + shift.astype(image["boxes"].dtype), 1)
        gt_boxes, gt_difficult = target["boxes"].reshape(-1, 4)[present] + shift, target["difficult"][present]
        scores.append(decimals(image["scores"][chosen], 3))
        if len(gt_boxes):
            iou = inclusive_iou(boxes, gt_boxes)
            best = iou.argmax(axis=1)
            overlaps.append(iou.max(axis=1))
            objects.append(first_id + best)
            difficult.append(gt_difficult[best])
        else:
            overlaps.append(np.full(len(boxes), -np.inf))
            objects.append(np.full(len(boxes), -1))
            difficult.append(np.zeros(len(boxes), bool))
        first_id += len(gt_boxes)
        counted += int((~gt_difficult).sum())
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return *(np.concatenate(parts)[order] for parts in (overlaps, objects, difficult)), counted


def decimals(values, places):
    """Values as a text file of so many decimals holds them."""
    if not len(values):
        return np.zeros(values.shape)
    return np.char.mod(f"%.{places}f", values).astype(np.float64)


def inclusive_iou(boxes, others):
    """(n, m) overlap of boxes whose corners are pixels inside them: a side is x2 - x1 + 1."""
    top_left = np.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (bottom_right - top_left + 1).clip(0).prod(axis=2)
    areas, other_areas = ((b[:, 2:] - b[:, :2] + 1).prod(axis=1) for b in (boxes, others))
    return common / (areas[:, None] + other_areas[None] - common)


def average_precision(hits, objects, difficult, objects_count, use_07_metric):
    """AP in [0, 1] of one class at one threshold, from its detections in order of score.

    The first hit on an object is right, each further one wrong; a hit on a difficult object is neither.
    """
    if not objects_count:
        return 0.0
    first = np.zeros(len(hits), bool)
    counted = np.flatnonzero(hits & ~difficult)
    first[counted[np.unique(objects[counted], return_index=True)[1]]] = True
    right, wrong = np.cumsum(first), np.cumsum(~first & ~(hits & difficult))
    recall = right / objects_count
    precision = right / np.maximum(right + wrong, np.finfo(np.float64).eps)
    if use_07_metric:
        levels = np.arange(0, 1.1, 0.1)  # with its rounding errors: 0.30000000000000004 counts a recall of 0.3 out
        return float(sum(precision[recall >= level].max(initial=0) for level in levels)) / 11
    recall = np.concatenate([[0], recall, [1]])
    envelope = np.maximum.accumulate(np.concatenate([[0], precision, [0]])[::-1])[::-1]
    return float((np.diff(recall) * envelope[1:]).sum())
