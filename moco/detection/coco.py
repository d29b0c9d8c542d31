"""COCO folders: what is in them, masks in their run-length form, and COCO's metric, box and mask AP, by pycocotools."""

import contextlib
import importlib.util
import io
import json
import math
from collections import Counter

import numpy as np
from PIL import Image

from moco.detection.records import objects, select_objects
from moco.errors import UserError, explained
from moco.jsonfile import DAMAGE

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCOeval's twelve: s, m, l by area


def check_pycocotools(name):
    """Raise UserError where pycocotools, which only COCO needs, is not installed. name: of the data."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(
            f"--data {name} is a COCO folder, whose masks and metric need pycocotools: pip install pycocotools"
        )


# ---- a folder -> records, and what the metric reads


def is_whole(value):
    return type(value) is int


def is_text(value):
    return isinstance(value, str) and value != ""


def is_number(value, least=-math.inf):
    return type(value) in (int, float) and math.isfinite(value) and value >= least


def is_box(value):
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value)) and min(value[2:]) >= 0


# What each entry must have: its key, what tells whether a value is right, and how to say what is right.
FIELDS = {
    "categories": {"id": (is_whole, "a whole number"), "name": (is_text, "a name")},
    "images": {
        "id": (is_whole, "a whole number"),
        "file_name": (is_text, "the name of a file"),
        "width": (lambda value: is_number(value, 1), "a number of pixels"),
        "height": (lambda value: is_number(value, 1), "a number of pixels"),
    },
    "annotations": {
        "image_id": (is_whole, "a whole number"),
        "category_id": (is_whole, "a whole number"),
        "bbox": (is_box, "[x, y, width, height] in pixels"),
        "iscrowd": (lambda value: value in (None, 0, 1), "0 or 1"),
        "area": (lambda value: value is None or is_number(value, 0), "a number of pixels"),
    },
}


def load_coco(folder, masks, left_out):
    """(train records, test records, class names, what the metric reads, whether masks are trained) of a COCO folder.

    masks: "on", "off", or "auto", which is on if most objects of both splits have a mask. Crowds are no objects to
    train on. Labels are in the order of category ids. Raises UserError for entries that are not as COCO has them.
    """
    train, test = (read_instances(folder, split) for split in ("train2017", "val2017"))
    classes = class_names(train)
    if class_names(test) != classes:
        raise UserError(f"--data {folder}: the categories of train2017 and val2017 differ; both need the same file set")
    train_records = coco_records(folder, "train2017", train, left_out)
    test_records = coco_records(folder, "val2017", test, Counter())
    shares = [share_with_masks(records) for records in (train_records, test_records)]
    if masks == "on" and 0 in shares:
        raise UserError(
            f"--masks on, but no object of {'val' if shares[0] else 'train'}2017 has a mask; use --masks off"
        )
    masks = masks == "on" or masks == "auto" and min(shares) > 0.5
    truth = metric_truth(test, classes, masks, left_out)
    train_records = [settle_masks(record, masks, left_out) for record in train_records]
    test_records = [settle_masks(record, False, left_out) for record in test_records]  # the truth has them
    return train_records, test_records, classes, truth, masks


def read_instances(folder, split):
    """The annotation file of a split, each entry of which was looked at, as {"path", "categories", "images", ...}."""
    path = folder / "annotations" / f"instances_{split}.json"
    if not path.exists() or not (folder / split).is_dir():
        missing = folder / split if path.exists() else path
        raise UserError(f"{missing} is missing: unpack COCO's {split} and annotations_trainval2017 into {folder}")
    with explained(f"{path} cannot be read as COCO annotations", "unpack it again", *DAMAGE):
        content = json.loads(path.read_text())
        instances = {"path": path} | {kind: list(content[kind]) for kind in FIELDS}
    for kind, fields in FIELDS.items():
        for number, entry in enumerate(instances[kind]):
            for key, (is_right, wanted) in fields.items():
                value = entry.get(key) if isinstance(entry, dict) else None
                if not is_right(value):
                    raise UserError(f"{entry_name(path, kind, number, entry)} has {key} {value!r:.60}, not {wanted}")
    known = {}
    for kind, key, name in (("images", "image_id", "file_name"), ("categories", "category_id", "name")):
        known[key] = {}
        for entry in instances[kind]:
            other = known[key].setdefault(entry["id"], entry)
            if other is not entry:
                raise UserError(
                    f"{path}: the {kind} {other[name]!r} and {entry[name]!r} share the id {entry['id']}, so their"
                    " objects cannot be told apart; give each an id of its own"
                )
    for number, annotation in enumerate(instances["annotations"]):
        for key, entries in known.items():
            if annotation[key] not in entries:
                where = entry_name(path, "annotations", number, annotation)
                raise UserError(
                    f"{where} has {key} {annotation[key]}, which the file does not list; correct or remove it"
                )
    return instances


def entry_name(path, kind, number, entry):
    """Where in which file an entry is, for a message."""
    identity = f" (id {entry['id']!r:.40})" if isinstance(entry, dict) and "id" in entry else ""
    return f"{path}: {kind}[{number}]{identity}"


def class_names(instances):
    """Names in the order of category ids; a name that two categories share gets the id, so that each has its scores."""
    categories = sorted(instances["categories"], key=lambda category: category["id"])
    count = Counter(category["name"] for category in categories)
    return [c["name"] if count[c["name"]] == 1 else f"{c['name']} ({c['id']})" for c in categories]


def coco_records(folder, split, instances, left_out):
    """Records of a split without crowds, whose "masks" are None where an object has none."""
    label_of = {category: label for label, category in enumerate(sorted(c["id"] for c in instances["categories"]))}
    things = {image["id"]: [] for image in instances["images"]}
    sizes = image_sizes(instances)
    for number, annotation in enumerate(instances["annotations"]):
        if annotation.get("iscrowd"):
            left_out["crowds"] += 1
            continue
        mask = read_mask(instances["path"], number, annotation, *sizes[annotation["image_id"]])
        if isinstance(mask, list):
            mask = [ring.astype(np.float32) for ring in mask]
        x, y, width, height = annotation["bbox"]
        box = [x, y, x + width, y + height]
        things[annotation["image_id"]].append((box, label_of[annotation["category_id"]], mask))
    records, absent = [], []
    for image in instances["images"]:
        file = folder / split / image["file_name"]
        if not file.exists():
            absent.append(file)
        boxes, labels, masks = zip(*things[image["id"]]) if things[image["id"]] else ((), (), ())
        height, width = sizes[image["id"]]
        records.append(
            {"image": {"bytes": None, "path": str(file)}, "name": image["file_name"], "id": image["id"]}
            | {"width": width, "height": height, "masks": list(masks), **objects(boxes, labels)}
        )
    if absent:
        path = instances["path"]
        raise UserError(f"{len(absent)} of the {len(records)} images that {path} lists are missing, first {absent[0]}")
    return records


def image_sizes(instances):
    """{image id: (height, width)}"""
    return {image["id"]: (int(image["height"]), int(image["width"])) for image in instances["images"]}


def share_with_masks(records):
    """Share of the objects that have a mask; 0 of none."""
    have = [mask is not None for record in records for mask in record["masks"]]
    return sum(have) / max(1, len(have))


def settle_masks(record, masks, left_out):
    """The record with `masks` only objects that have one, counting the others; otherwise all objects, without masks."""
    if not masks:
        return {key: value for key, value in record.items() if key != "masks"}
    have = np.array([mask is not None for mask in record["masks"]], bool)
    left_out["objects without a mask"] += int((~have).sum())
    return select_objects(record, have)


def metric_truth(instances, classes, masks, left_out):
    """What pycocotools compares detections with, in its own format; with `masks` each has a run-length encoded one.

    pycocotools needs an area, and a mask that it can draw, and takes an object whose id is 0 or not unique for another
    or none. So ids are new here, an area that is missing is the mask's or the box's, and an object without mask gets
    its box as one and "unmasked".
    """
    from pycocotools import mask as coco_mask

    sizes, annotations = image_sizes(instances), []
    for number, annotation in enumerate(instances["annotations"]):
        size = sizes[annotation["image_id"]]
        encoded, area = {}, annotation.get("area")
        if masks:
            mask = read_mask(instances["path"], number, annotation, *size)
            encoded["unmasked"] = mask is None
            if isinstance(mask, list):
                mask = coco_mask.merge(coco_mask.frPyObjects([ring.flatten().tolist() for ring in mask], *size))
            elif mask is None:
                mask = coco_mask.frPyObjects(np.array([annotation["bbox"]], np.float64), *size)[0]
                left_out["test objects without a mask, which mask AP ignores"] += not annotation.get("iscrowd")
            encoded["segmentation"] = mask
        if area is None:
            area = float(coco_mask.area(mask)) if masks else annotation["bbox"][2] * annotation["bbox"][3]
            left_out[f"test objects without an area, for which their {'mask' if masks else 'box'}'s is taken"] += 1
        values = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        crowd = int(annotation.get("iscrowd") or 0)
        annotations.append({"id": number + 1, **values, "area": area, "iscrowd": crowd, **encoded})
    ids = sorted(category["id"] for category in instances["categories"])
    categories = [{"id": category, "name": name} for category, name in zip(ids, classes, strict=True)]
    images = [{"id": image, "height": height, "width": width} for image, (height, width) in sizes.items()]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


# ---- masks


def read_mask(path, number, annotation, height, width):
    """An annotation's segmentation: a list of polygons (points, 2), or one run-length encoding, or None.

    Polygons of fewer than three points are left out. Raises UserError where it is damaged, or of another size than its
    image.
    """
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return None
    where = entry_name(path, "annotations", number, annotation)
    with explained(f"{where} has a segmentation that cannot be read", "correct or remove it", *DAMAGE):
        if isinstance(segmentation, dict):
            return read_runs(segmentation, height, width)
        rings = [np.array(ring, np.float64) for ring in segmentation]
        if not all(ring.ndim == 1 and np.isfinite(ring).all() for ring in rings):
            raise ValueError("a polygon is not a list of finite numbers")
        return [ring.reshape(-1, 2) for ring in rings if len(ring) % 2 == 0 and len(ring) >= 6] or None


def read_runs(segmentation, height, width):
    """{"size", "counts"}, the counts a list or COCO's string -> pycocotools' form. Raises ValueError if damaged.

    pycocotools itself does not see runs that end too early, and then gives pixels that were never written.
    """
    from pycocotools import mask

    counts = segmentation["counts"]
    counts = counts if isinstance(counts, list) else run_lengths(counts)
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size is {segmentation['size']}, its image's [{height}, {width}]")
    if not all(map(is_whole, counts)) or min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"its runs are not whole numbers that add up to {height * width} pixels")
    return mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def run_lengths(text):
    """COCO's string of counts -> their list: five bits a character, lowest first, the sixth says that more follow.

    From the fourth on each is the difference to the one two places before.
    """
    counts, value, shift = [], 0, 0
    for character in text.encode():
        character -= 48
        value |= (character & 31) << shift
        shift += 5
        if not character & 32:
            if character & 16:  # negative
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


def encode_masks(masks):
    """(n, H, W) bool -> n run-length encoded masks, a few hundred bytes each where a mask is a byte a pixel."""
    from pycocotools import mask

    return mask.encode(np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8)))


def decode_masks(encoded):
    """What `encode_masks` gave -> (n, H, W) bool array."""
    from pycocotools import mask

    return mask.decode(encoded).transpose(2, 0, 1).astype(bool)


def move_mask(encoded, height, width, flip):
    """A run-length encoded mask at another size, by the nearest pixel as in the reference, and flipped."""
    from pycocotools import mask

    bits = mask.decode(encoded)
    if bits.shape != (height, width):
        bits = np.asarray(Image.fromarray(bits).resize((width, height), Image.Resampling.NEAREST))
    return mask.encode(np.asfortranarray(bits[:, ::-1] if flip else bits))


# ---- the metric


def evaluate_coco(truth, image_ids, predictions):
    """Box AP, and mask AP where there are masks, in percent: {"box": {"AP", "AP50", ..., "per_class"}, "mask": ...}.

    truth: of `metric_truth`, where crowds are ignored, not counted as misses. image_ids: of the predictions, each
    {"boxes" (n, 4) xyxy, "labels" (n,) from 0 in the order of category ids, "scores" (n,), "masks" n run-length
    encoded}. AP is the mean over IoU 0.50, 0.55 ... 0.95 and 101 recalls, None where there are no objects.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    categories = [category["id"] for category in truth["categories"]]
    found = [row for i, image in zip(image_ids, predictions, strict=True) for row in coco_rows(i, image, categories)]
    kinds = [("box", "bbox", "segmentation"), ("mask", "segm", "bbox")]
    results = {}
    with contextlib.redirect_stdout(io.StringIO()):  # its progress, and a table of what is returned
        for kind, name, other in kinds if all("masks" in image for image in predictions) else kinds[:1]:
            expected = COCO()
            expected.dataset = truth if kind == "box" else without_unmasked(truth)
            expected.createIndex()
            # Where rows have a box, pycocotools takes its area for the mask's, and so counts them as another size.
            rows = [{key: value for key, value in row.items() if key != other} for row in found]
            detected = expected.loadRes(rows) if rows else COCO()
            evaluation = COCOeval(expected, detected, name)
            evaluation.params.imgIds = sorted(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class) over all areas
            means = [None if value < 0 else 100 * value for value in evaluation.stats[:6].tolist()]
            results[kind] = dict(zip(NAMES, means))
            results[kind]["per_class"] = {
                category["name"]: class_scores(precision[..., i]) for i, category in enumerate(truth["categories"])
            }
    return results


def without_unmasked(truth):
    """The truth for mask AP: an object whose outline nobody drew is neither found nor missed, as in a crowd."""
    annotations = [a | {"iscrowd": 1} if a["unmasked"] else a for a in truth["annotations"]]
    return truth | {"annotations": annotations}


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
