"""Detection data: VOCdevkit and COCO folders, Hub datasets of VOC's shape, the built-in shapes, as batches and scored.

Everything becomes a list of the records that records.py describes, one for each image.
"""

import hashlib
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from moco.data.decode import UNDECODABLE, read_image
from moco.data.find import check_hub_name
from moco.data.shapes import CLASSES as SHAPES_CLASSES
from moco.data.shapes import draw_scene, encode_jpeg
from moco.detection.coco import evaluate_coco, load_coco, move_mask
from moco.detection.records import check_records, decode_record, image_size, objects, trainable
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

    truth: what COCO's metric compares with. masks: whether masks are trained, too, which only COCO has.
    """

    train: list
    test: list
    classes: list
    metric: str
    left_out: Counter
    truth: dict | None = None
    masks: bool = False


# ---- a name -> records


def load_detection(name, years=("2007", "2012"), box_format="xywh", masks="auto"):
    """The detection data that `name` stands for.

    name: "shapes"; a VOCdevkit folder (trainval of `years` to train on, VOC2007's test set); a COCO folder (train2017,
    val2017 and annotations/); a folder that `save_to_disk` wrote; or USER/NAME on the Hub. The last two have columns
    "image" and "objects", the latter with "bbox" in `box_format` (xywh or xyxy), "category" and possibly "difficult".
    masks: of COCO; "auto" trains them where most objects have one.
    Raises UserError for data that is not there, not complete, of an unknown class, or with boxes for other images.
    """
    folder, left_out = Path(name), Counter()
    if name == "shapes":
        return DetectionData(scene_records("train"), scene_records("test"), list(SHAPES_CLASSES), "VOC", left_out)
    devkit = folder / "VOCdevkit" if (folder / "VOCdevkit").is_dir() else folder
    if is_coco(name):
        train, test, classes, truth, masks = load_coco(folder, masks, left_out)
        data = DetectionData(train, test, classes, "COCO", left_out, truth, masks)
    elif any(devkit.glob("VOC20*")):
        train = [record for year in years for record in voc_records(devkit, year, "trainval", left_out)]
        test = voc_records(devkit, "2007", "test", Counter())
        data = DetectionData(train, test, VOC_CLASSES, "VOC", left_out)
    else:
        train, test, classes = hub_records(name, box_format, left_out)
        data = DetectionData(train, test, classes, "VOC", left_out)
    check_records(data.train, "training", name, left_out)
    check_records(data.test, "test", name, left_out)
    if not any((~record["difficult"]).any() for record in data.test):
        raise UserError(f"--data {name} has no object in its {len(data.test)} test images to compare detections with")
    return data._replace(train=trainable(data.train, name, left_out))


def is_coco(name):
    """Whether `name` is a COCO folder."""
    return (Path(name) / "annotations").is_dir()


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
    classes, tested = (hub_classes(splits[split], name) for split in ("train", test))
    if tested != classes:
        raise UserError(
            f"--data {name}: objects.category names the classes {str(classes)!r:.60} in train, {str(tested)!r:.60} in"
            f" {test}, so one number would mean two classes; cast both to one ClassLabel"
        )
    train, test = ([*hub_split(splits[split], name, box_format, classes, left_out)] for split in ("train", test))
    return train, test, classes


def hub_classes(dataset, name):
    """The names of the classes of a split. Raises UserError if it lacks a column, or its classes have no names."""
    features = dataset.features
    fields = getattr(features.get("objects"), "feature", features.get("objects"))
    if "image" not in features or not isinstance(fields, dict) or not {"bbox", "category"} <= fields.keys():
        raise UserError(
            f"--data {name} needs the columns image and objects, with bbox and category in the latter; it has"
            f" {', '.join(f'{key}: {value}' for key, value in features.items())[:300]}"
        )
    category = getattr(fields["category"], "feature", fields["category"])
    if not isinstance(category, datasets.ClassLabel):
        raise UserError(
            f"--data {name}: objects.category is not a ClassLabel, so its classes have no names; cast it to one"
        )
    return category.names


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
        what = f"--data {name}, row {row}: its objects cannot be read"
        with explained(what, "each needs a bbox of four numbers and a category", *DAMAGE):
            record = objects(things.get("bbox", []), things.get("category", []), things.get("difficult"))
            if not len(record["boxes"]) == len(record["labels"]) == len(record["difficult"]):
                raise ValueError(f"{record['boxes'].size} coordinates of {len(record['labels'])} objects")
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
    return max(1, int(scaled[0] + 0.5)), max(1, int(scaled[1] + 0.5))


class DetectionImages(Dataset):
    """Images at the network's size with their targets.

    Item [(iteration, index), ...] is [(image (3, h, w) uint8, target), ...] and the undecodable as [(name, reason)].
    target: "boxes" (m, 4) at the network's size, "labels" (m,) from 1, as 0 is the background, "index", and for COCO
    "masks" as records have them. In training (`seed` is not None) the short side, drawn from `sizes`, and the flip are
    functions of (seed, iteration, index), an image that cannot be decoded or is not of its annotated size is replaced
    by the next one, and "seed" is there for what the detector samples. In evaluation such an image comes back as None.
    """

    traffic = None  # it is not streamed

    def __init__(self, records, sizes, longest, seed=None):
        self.records, self.sizes, self.longest, self.seed = records, sizes, longest, seed
        self.rows = [{"image": record, "name": record["name"]} for record in records]  # as `read_image` takes them

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
                image, row, failed = read_image(self.rows, index, decode_record)
                items.append(self.prepare(image, row["image"], iteration, index))
                undecodable += failed
                continue
            record = self.records[index]
            try:
                items.append(self.prepare(decode_record(record), record, iteration, index))
            except UNDECODABLE as error:
                items.append((None, {"index": index}))
                undecodable.append((record["name"], first_line(error)))
        return items, undecodable

    def prepare(self, image, record, iteration, index):
        """Resize by Pillow, as the reference; flip; move boxes and masks along."""
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
        if flip:
            image = image[:, ::-1]
            boxes = np.stack([new_width - boxes[:, ::-1, 0], boxes[..., 1]], axis=2)
        good = (boxes[:, 1] > boxes[:, 0]).all(axis=1)  # in float32 a thin box may have no area left
        target = {
            "boxes": torch.from_numpy(boxes.reshape(-1, 4)[good].astype(np.float32)),
            "labels": torch.from_numpy(record["labels"][good] + 1),
            "index": index,
            **sampling,
        }
        if "masks" in record:
            moved = [move_outline(mask, scale, new_height, new_width, flip) for mask in record["masks"]]
            target["masks"] = [mask for mask, take in zip(moved, good, strict=True) if take]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), target


def move_outline(mask, scale, height, width, flip):
    """A record's mask, polygons or a run-length encoding, on its image of another size, and flipped."""
    if isinstance(mask, dict):
        return move_mask(mask, height, width, flip)
    rings = [ring * scale for ring in mask]
    return [ring * (-1, 1) + (width, 0) for ring in rings] if flip else rings


def micro_batch_rows(portrait, batch_size, micro_batch, seed, start, rank, world):
    """Endless [(iteration, index), ...] of one process's micro-batches, from iteration `start` on.

    portrait: (images,) bool, taller than wide. A micro-batch holds images of one kind, so that little is padded. An
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
        return evaluate_coco(data.truth, [record["id"] for record in data.test], predictions)
    return {
        rule: evaluate_voc(predictions, data.test, data.classes, use_07_metric=rule == "voc2007")
        for rule in ("voc2007", "area")
    }
