"""Detection data: VOCdevkit and COCO folders, Hub datasets of VOC's shape, the built-in shapes, as batches and scored.

Everything becomes a list of records, one for each image: {"image": encoded, as `decode_image` takes it, or (dataset,
row), "name", "width", "height", "boxes" (m, 4) float32 xyxy from 0, "labels" (m,) int64 from 0, "difficult" (m,)
bool}, and for COCO "id" and "polygons", a list of (points, 2) arrays for each box.
"""

import hashlib
import json
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from moco.data.decode import UNDECODABLE, decode_image, encoded_bytes, open_image, read_image
from moco.data.find import check_hub_name
from moco.data.shapes import CLASSES as SHAPES_CLASSES
from moco.data.shapes import draw_scene, encode_jpeg
from moco.detection.coco import evaluate_coco
from moco.detection.voc import evaluate_voc
from moco.errors import UserError, explained, first_line
from moco.jsonfile import DAMAGE

VOC_CLASSES = (
    "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person,"
    " pottedplant, sheep, sofa, train, tvmonitor"
).split(", ")
SCENES = {"train": 400, "test": 200}  # images of the built-in detection set
SCENE_SIZE, SCENE_OBJECTS = 96, 4  # pixels a side; objects in an image, at most


class DetectionData(NamedTuple):
    """What `load_detection` returns. metric: "VOC" or "COCO". left_out: {what: how many}, to be reported.

    annotations: the file that COCO's metric reads.
    """

    train: list
    test: list
    classes: list
    metric: str
    left_out: Counter
    annotations: Path | None = None


# ---- a name -> records


def load_detection(name, years=("2007", "2012"), box_format="xywh"):
    """The detection data that `name` stands for.

    name: "shapes"; a VOCdevkit folder (trainval of `years` to train on, VOC2007's test set); a COCO folder (train2017,
    val2017 and annotations/); a folder that `save_to_disk` wrote; or USER/NAME on the Hub. The last two have columns
    "image" and "objects", the latter with "bbox" in `box_format` (xywh or xyxy), "category" and possibly "difficult".
    Raises UserError for data that is not there, not complete, or of an unknown class.
    """
    folder, left_out = Path(name), Counter()
    if name == "shapes":
        return DetectionData(scene_records("train"), scene_records("test"), list(SHAPES_CLASSES), "VOC", left_out)
    if is_coco(name):
        train, classes = coco_records(folder, "train2017", left_out)
        test, test_classes = coco_records(folder, "val2017", Counter())
        if test_classes != classes:
            raise UserError(
                f"--data {name}: the categories of train2017 and val2017 differ; both need the same file set"
            )
        annotations = folder / "annotations" / "instances_val2017.json"
        return DetectionData(trainable(train, name, left_out), test, classes, "COCO", left_out, annotations)
    devkit = folder / "VOCdevkit" if (folder / "VOCdevkit").is_dir() else folder
    if any(devkit.glob("VOC20*")):
        train = [record for year in years for record in voc_records(devkit, year, "trainval", left_out)]
        test = voc_records(devkit, "2007", "test", Counter())
        return DetectionData(trainable(train, name, left_out), test, VOC_CLASSES, "VOC", left_out)
    train, test, classes = hub_records(name, box_format, left_out)
    return DetectionData(trainable(train, name, left_out), test, classes, "VOC", left_out)


def is_coco(name):
    """Whether `name` is a COCO folder."""
    return (Path(name) / "annotations").is_dir()


def trainable(records, name, left_out):
    """The records that have boxes, clipped to their images; what is dropped is counted in `left_out`.

    Raises UserError if nothing is left. Objects marked difficult stay, as in the reference.
    """
    kept = []
    for record in records:
        limits = np.array([record["width"], record["height"]] * 2, np.float32)
        boxes = record["boxes"].clip(0, limits)
        left_out["boxes clipped to their image"] += int((boxes != record["boxes"]).any(axis=1).sum())
        good = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        left_out["boxes without area in their image"] += int((~good).sum())
        if good.any():
            kept.append(select_objects(record | {"boxes": boxes}, good))
        else:
            left_out["training images without objects"] += 1
    if not kept:
        raise UserError(f"--data {name} has no training image with an object in it, of {len(records)} images")
    return kept


def select_objects(record, chosen):
    """The record with only the objects where `chosen`, (m,) bool."""
    record = record | {key: record[key][chosen] for key in ("boxes", "labels", "difficult")}
    if "polygons" in record:
        record["polygons"] = [polygons for polygons, take in zip(record["polygons"], chosen, strict=True) if take]
    return record


def objects(boxes, labels, difficult=None):
    """Lists -> the three arrays of a record."""
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "labels": np.array(labels, np.int64),
        "difficult": np.zeros(len(labels), bool) if difficult is None else np.array(difficult, bool),
    }


def scene_records(split):
    """The built-in detection set: patterned shapes, one to SCENE_OBJECTS in an image."""
    records = []
    for index in range(SCENES[split]):
        image, labels, boxes = draw_scene(split, index, SCENE_SIZE, 1 + index % SCENE_OBJECTS)
        encoded = {"bytes": encode_jpeg(image), "path": f"{split}_{index}.jpg"}
        size = {"width": SCENE_SIZE, "height": SCENE_SIZE}
        records.append({"image": encoded, "name": encoded["path"], **size, **objects(boxes, labels)})
    return records


def voc_records(devkit, year, split, left_out):
    """One image set of a VOCdevkit folder. Its boxes, counted from 1 and inclusive, become (x - 1, y - 1, x2, y2)."""
    root = devkit / f"VOC{year}"
    image_set = root / "ImageSets" / "Main" / f"{split}.txt"
    if not image_set.exists():
        raise UserError(f"{image_set} is missing: unpack VOC{year}'s {split} data into {devkit}, or name other --years")
    names = image_set.read_text().split()
    for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        missing = [name for name in names if not (root / folder / f"{name}.{suffix}").exists()]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(names)} {suffix} files that {image_set} lists are missing, first"
                f" {root / folder / missing[0]}.{suffix}; unpack VOC{year}'s {split} data again"
            )
    return [voc_record(root, name, left_out) for name in names]


def voc_record(root, name, left_out):
    """One image with its annotation."""
    path = root / "Annotations" / f"{name}.xml"
    image = {"bytes": None, "path": str(root / "JPEGImages" / f"{name}.jpg")}
    boxes, labels, difficult = [], [], []
    with explained(
        f"{path} cannot be read as a VOC annotation", "unpack it again", xml.etree.ElementTree.ParseError, *DAMAGE
    ):
        tree = xml.etree.ElementTree.parse(path)
        width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
        for thing in tree.findall("object"):
            label = thing.findtext("name", "")
            if label not in VOC_CLASSES:
                raise UserError(f"{path}: unknown class {label!r}; VOC's classes are {', '.join(VOC_CLASSES)}")
            corners = [float(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append([corners[0] - 1, corners[1] - 1, corners[2], corners[3]])
            labels.append(VOC_CLASSES.index(label))
            difficult.append(thing.findtext("difficult", "0").strip() == "1")
    if min(width, height) < 1:
        width, height = image_size(image, left_out)
    return {"image": image, "name": name, "width": width, "height": height, **objects(boxes, labels, difficult)}


def image_size(image, left_out):
    """(width, height) from the header of an encoded image; (1, 1), which holds no box, where it cannot be decoded."""
    try:
        with open_image(encoded_bytes(image)) as opened:
            return opened.size
    except UNDECODABLE:
        left_out["images whose size cannot be read"] += 1
        return 1, 1


def coco_records(folder, split, left_out):
    """(records, class names) of one split of a COCO folder: no crowds, and labels in the order of category ids."""
    path = folder / "annotations" / f"instances_{split}.json"
    if not path.exists() or not (folder / split).is_dir():
        missing = folder / split if path.exists() else path
        raise UserError(f"{missing} is missing: unpack COCO's {split} and annotations_trainval2017 into {folder}")
    with explained(f"{path} cannot be read as COCO annotations", "unpack it again", *DAMAGE):
        content = json.loads(path.read_text())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        annotations = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    records, absent = [], []
    for image in content["images"]:
        file = folder / split / image["file_name"]
        if not file.exists():
            absent.append(file)
        boxes, labels, polygons = [], [], []
        for annotation in annotations[image["id"]]:
            if annotation.get("iscrowd", 0):
                left_out["crowds"] += 1
                continue
            if annotation["category_id"] not in label_of:
                raise UserError(
                    f"{path}: annotation {annotation['id']} has category {annotation['category_id']}, unknown"
                )
            rings = annotation.get("segmentation") or []
            rings = [r for r in rings if len(r) % 2 == 0 and len(r) >= 6] if isinstance(rings, list) else []
            if not rings:
                left_out["objects without a polygon"] += 1
                continue
            x, y, width, height = annotation["bbox"]
            boxes.append([x, y, x + width, y + height])
            labels.append(label_of[annotation["category_id"]])
            polygons.append([np.array(ring, np.float32).reshape(-1, 2) for ring in rings])
        records.append(
            {"image": {"bytes": None, "path": str(file)}, "name": image["file_name"], "id": image["id"]}
            | {"width": image["width"], "height": image["height"], "polygons": polygons, **objects(boxes, labels)}
        )
    if absent:
        raise UserError(f"{len(absent)} of the {len(records)} images that {path} lists are missing, first {absent[0]}")
    return records, [category["name"] for category in categories]


def hub_records(name, box_format, left_out):
    """(train, test, class names) of a dataset on the Hub or on disk, of the columns that `load_detection` tells."""
    if not Path(name).is_dir():
        check_hub_name(name)
    what = f"--data {name} is neither a VOCdevkit folder (VOC2007, VOC2012), nor a COCO folder (annotations), nor a"
    kinds = (OSError, ValueError, datasets.exceptions.DatasetsError)
    with explained(f"{what} dataset that can be read", "check the name", *kinds):
        on_disk = (Path(name) / "dataset_dict.json").exists()
        splits = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name)
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise UserError(f"--data {name} needs the splits train and test (or validation), it has {', '.join(splits)}")
    features = splits["train"].features
    fields = getattr(features.get("objects"), "feature", features.get("objects"))
    if "image" not in features or not isinstance(fields, dict) or not {"bbox", "category"} <= fields.keys():
        raise UserError(
            f"--data {name} needs the columns image and objects, with bbox and category in the latter; it has"
            f" {', '.join(f'{key}: {value}' for key, value in features.items())[:300]}"
        )
    category = getattr(fields["category"], "feature", fields["category"])
    if not isinstance(category, datasets.ClassLabel):
        raise UserError(
            f"--data {name}: objects.category is no ClassLabel, so its classes have no names; cast it to one"
        )
    train, test = ([*hub_split(splits[s], name, box_format, category.names, left_out)] for s in ("train", test))
    return train, test, category.names


def hub_split(dataset, name, box_format, classes, left_out):
    """The records of one split; images stay where they are and are read again when they are needed."""
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    sized = {"width", "height"} <= dataset.features.keys()
    for row, values in enumerate(dataset.remove_columns("image") if sized else dataset):
        things = values["objects"] or {}
        if isinstance(things, list):  # a list of objects, where others have an object of lists
            things = {
                key: [thing[key] for thing in things]
                for key in ("bbox", "category", "difficult")
                if things and key in things[0]
            }
        record = objects(things.get("bbox", []), things.get("category", []), things.get("difficult"))
        if ((record["labels"] < 0) | (record["labels"] >= len(classes))).any():
            raise UserError(f"--data {name}, row {row}: a category outside its {len(classes)} classes")
        if box_format == "xywh":
            record["boxes"][:, 2:] += record["boxes"][:, :2]
        width, height = (values["width"], values["height"]) if sized else image_size(values["image"], left_out)
        yield {"image": (dataset, row), "name": f"row {row}", "width": width, "height": height, **record}


# ---- records -> what a detector gets


def resized_shape(height, width, short, longest):
    """(height, width) scaled so that the short side is `short`, the long one at most `longest`.

    Halves are rounded up, and the long side is limited before rounding, as in the reference's ResizeShortestEdge.
    """
    scale = short / min(height, width)
    scaled = (short, scale * width) if height < width else (scale * height, short)
    if max(scaled) > longest:
        shrink = longest / max(scaled)
        scaled = (scaled[0] * shrink, scaled[1] * shrink)
    return int(scaled[0] + 0.5), int(scaled[1] + 0.5)


class DetectionImages(Dataset):
    """Images at the network's size with their targets.

    Item [(iteration, index), ...] is [(image (3, h, w) uint8, target), ...] and the undecodable as [(name, reason)].
    target: "boxes" (m, 4) at the network's size, "labels" (m,) from 1, as 0 is the background, "index", and for COCO
    "polygons". In training (`seed` is not None) the short side, drawn from `sizes`, and the flip are functions of
    (seed, iteration, index), an image that cannot be decoded is replaced by the next one, and "seed" is there for what
    the detector samples. In evaluation such an image comes back as None.
    """

    traffic = None  # it is not streamed

    def __init__(self, records, sizes, longest, seed=None):
        self.records, self.sizes, self.longest, self.seed = records, sizes, longest, seed

    def __len__(self):
        return len(self.records)

    def fingerprint(self):
        """Of what a run depends on: each image's name and size, and its objects."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(f"{record['name']} {record['width']} {record['height']}".encode())
            digest.update(record["boxes"].tobytes() + record["labels"].tobytes())
        return digest.hexdigest()[:16]

    def order_state(self, order):
        """What else the order of the images depends on: nothing."""
        return {}

    def __getitem__(self, rows):
        items, undecodable = [], []
        for iteration, index in rows:
            if self.seed is not None:
                image, record, failed = read_image(self.records, index, decode_stored)
                items.append(self.prepare(image, record, iteration, index))
                undecodable += failed
                continue
            record = self.records[index]
            try:
                items.append(self.prepare(decode_stored(record["image"]), record, iteration, index))
            except UNDECODABLE as error:
                items.append((None, {"index": index}))
                undecodable.append((record["name"], first_line(error)))
        return items, undecodable

    def prepare(self, image, record, iteration, index):
        """Resize by Pillow, as the reference; flip; move boxes and polygons along."""
        short, flip, sampling = self.sizes[-1], False, {}
        if self.seed is not None:
            rng = np.random.default_rng([*b"view", self.seed, iteration, index])
            short, flip = int(rng.choice(self.sizes)), bool(rng.random() < 0.5)
            sampling["seed"] = int(rng.integers(2**63))
        height, width = image.shape[:2]
        new_height, new_width = resized_shape(height, width, short, self.longest)
        if (new_height, new_width) != (height, width):
            image = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR))
        scale = np.array([new_width / width, new_height / height], np.float32)
        boxes = (record["boxes"].reshape(-1, 2, 2) * scale).clip(0, (new_width, new_height))
        polygons = [[ring * scale for ring in rings] for rings in record.get("polygons", [])]
        if flip:
            image = image[:, ::-1]
            boxes = np.stack([new_width - boxes[:, ::-1, 0], boxes[..., 1]], axis=2)
            polygons = [[ring * (-1, 1) + (new_width, 0) for ring in rings] for rings in polygons]
        good = (boxes[:, 1] > boxes[:, 0]).all(axis=1)  # a size other than annotated may leave none of a box
        target = {
            "boxes": torch.from_numpy(boxes.reshape(-1, 4)[good].astype(np.float32)),
            "labels": torch.from_numpy(record["labels"][good] + 1),
            "index": index,
            **sampling,
        }
        if "polygons" in record:
            target["polygons"] = [rings for rings, take in zip(polygons, good, strict=True) if take]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), target


def decode_stored(image):
    """A record's image as pixels: encoded, or (dataset, row) to be read from there."""
    if isinstance(image, tuple):
        dataset, row = image
        image = dataset[row]["image"]
    return decode_image(image)


def micro_batch_rows(portrait, batch_size, micro_batch, seed, start, rank, world):
    """Endless [(iteration, index), ...] of one process's micro-batches, from iteration `start` on.

    portrait: (images,) bool, higher than wide. A micro-batch holds images of one kind, so that little is padded. An
    epoch is a permutation; what is left of it below a micro-batch is dropped, other images each time.
    The images of an iteration are those of any other number of processes, in the same micro-batches.
    """
    images, per_iteration = len(portrait), batch_size // micro_batch
    groups_per_epoch, mine = images // micro_batch, per_iteration // world
    epoch, groups, iteration = None, None, start
    while True:
        for i in range(rank * mine, (rank + 1) * mine):
            wanted, position = divmod(iteration * per_iteration + i, groups_per_epoch)
            if wanted != epoch:
                epoch, rng = wanted, np.random.default_rng([*b"order", seed, wanted])
                order = rng.permutation(images)
                order = order[np.argsort(portrait[order], kind="stable")]
                drop = rng.integers(images % micro_batch + 1)  # of the remainder, how much at the front
                groups = order[drop:][: groups_per_epoch * micro_batch].reshape(-1, micro_batch)
                groups = groups[rng.permutation(len(groups))]
            yield [(iteration, index) for index in groups[position].tolist()]
        iteration += 1


# ---- predictions -> scores


def evaluate_detections(data, predictions):
    """Every score of the predictions for `data.test`, in percent, the one to be compared by first.

    data: of `load_detection`. predictions: of `detect`. Returns {"voc2007" (11 points), "area"}, or
    for COCO {"box", "mask"}, each a dict of "AP", "AP50", "AP75", "per_class" ...
    """
    if data.metric == "COCO":
        return evaluate_coco(data.annotations, [record["id"] for record in data.test], predictions)
    return {
        rule: evaluate_voc(predictions, data.test, data.classes, use_07_metric=rule == "voc2007")
        for rule in ("voc2007", "area")
    }
