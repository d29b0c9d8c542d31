"""COCO's metric, box and mask AP, by pycocotools; and masks in its run-length form."""

import contextlib
import importlib.util
import io

import numpy as np

from moco.errors import UserError

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCOeval's twelve: s, m, l by area


def check_pycocotools(name):
    """Raise UserError where pycocotools, which only COCO needs, is not installed. name: of the data."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(
            f"--data {name} is a COCO folder, whose masks and metric need pycocotools: pip install pycocotools"
        )


def encode_masks(masks):
    """(n, H, W) bool -> n run-length encoded masks, a few hundred bytes each where a mask is a byte a pixel."""
    from pycocotools import mask

    return mask.encode(np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8)))


def decode_masks(encoded):
    """What `encode_masks` gave -> (n, H, W) bool array."""
    from pycocotools import mask

    return mask.decode(encoded).transpose(2, 0, 1).astype(bool)


def evaluate_coco(annotations, image_ids, predictions):
    """Box AP, and mask AP where there are masks, in percent: {"box": {"AP", "AP50", ..., "per_class"}, "mask": ...}.

    annotations: path of instances_*.json, read whole, since crowds are ignored, not counted as misses. image_ids: of
    the predictions, each {"boxes" (n, 4) xyxy, "labels" (n,) from 0 in the order of category ids, "scores" (n,),
    "masks" n run-length encoded}. AP is the mean over IoU 0.50, 0.55 ... 0.95 and 101 recalls.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # its progress, and a table of what is returned
        truth = COCO(str(annotations))
        categories = sorted(truth.getCatIds())
        found = [
            row for i, image in zip(image_ids, predictions, strict=True) for row in coco_rows(i, image, categories)
        ]
        kinds = [("box", "bbox", "segmentation"), ("mask", "segm", "bbox")]
        results = {}
        for kind, name, other in kinds if all("masks" in image for image in predictions) else kinds[:1]:
            # Where rows have a box, pycocotools takes its area for the mask's, and so counts them as another size.
            rows = [{key: value for key, value in row.items() if key != other} for row in found]
            detected = truth.loadRes(rows) if rows else COCO()
            evaluation = COCOeval(truth, detected, name)
            evaluation.params.imgIds = sorted(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class) over all areas
            results[kind] = dict(zip(NAMES, (100 * evaluation.stats[:6]).tolist()))
            results[kind]["per_class"] = {
                truth.cats[category]["name"]: class_scores(precision[..., i]) for i, category in enumerate(categories)
            }
    return results


def coco_rows(image_id, image, categories):
    """The detections of one image as COCO's result format lists them."""
    masks = image.get("masks", [None] * len(image["boxes"]))
    for (x1, y1, x2, y2), label, score, mask in zip(
        image["boxes"].tolist(), image["labels"].tolist(), image["scores"].tolist(), masks, strict=True
    ):
        row = {
            "image_id": image_id,
            "category_id": categories[label],
            "score": score,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
        }
        yield row if mask is None else row | {"segmentation": mask}


def class_scores(precision):
    """AP, AP50 and AP75 in percent of one class from its precision (IoU, recall); None where it has no objects."""
    if (precision < 0).all():
        return {"AP": None, "AP50": None, "AP75": None}
    return {key: 100 * float(values.mean()) for key, values in zip(NAMES, (precision, precision[0], precision[5]))}
