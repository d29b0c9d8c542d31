"""Small detection folders as VOC, COCO and the Hub lay them out, of the built-in scenes, for the tests to read."""

import json

import datasets

from moco.data.shapes import CLASSES, draw_scene, encode_jpeg
from moco.detection.data import VOC_CLASSES

SIZE = 64
HEIGHT = 48  # of every second image, so that there are two kinds


def scenes(split, count):
    """(JPEG, height, boxes, labels below 20) of each scene; boxes are cut to the image."""
    for index in range(count):
        image, labels, boxes = draw_scene(split, index, SIZE, 1 + index % 3)
        height = SIZE if index % 2 else HEIGHT
        yield encode_jpeg(image[:height]), height, boxes.clip(0, (SIZE, height, SIZE, height)), labels


def write_voc(devkit, year, split, count, first=0):
    """An image set of a VOCdevkit folder; boxes are from 1 and inclusive there."""
    root = devkit / f"VOC{year}"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = []
    for index, (image, height, boxes, labels) in enumerate(scenes(split, count), first):
        names.append(f"{year}_{split}_{index:06}")
        (root / "JPEGImages" / f"{names[-1]}.jpg").write_bytes(image)
        objects = [
            f"<object><name>{VOC_CLASSES[label]}</name><difficult>{int(i == 1)}</difficult><bndbox><xmin>{x1 + 1:g}"
            f"</xmin><ymin>{y1 + 1:g}</ymin><xmax>{x2:g}</xmax><ymax>{y2:g}</ymax></bndbox></object>"
            for i, ((x1, y1, x2, y2), label) in enumerate(zip(boxes, labels))
        ]
        size = f"<size><width>{SIZE}</width><height>{height}</height></size>"
        annotation = f"<annotation>{size}{''.join(objects)}</annotation>"
        (root / "Annotations" / f"{names[-1]}.xml").write_text(annotation)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return devkit


def write_coco(folder, split, count):
    """Images and instances of one split; category ids 3, 6, 9 ..., and one crowd in the first image."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3 * i, "name": f"class {i}"} for i in range(1, len(CLASSES) + 1)],
    }
    for index, (image, height, boxes, labels) in enumerate(scenes("train", count)):
        name = f"{index:012}.jpg"
        (folder / split / name).write_bytes(image)
        content["images"].append({"id": 100 + index, "file_name": name, "width": SIZE, "height": height})
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1, "image_id": 100 + index, "category_id": 3 * (label + 1),
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0,
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                }
            )  # fmt: skip
    crowd = {"size": [HEIGHT, SIZE], "counts": [0, HEIGHT * SIZE]}
    content["annotations"].append(
        {
            "id": 999, "image_id": 100, "category_id": 3, "bbox": [0, 0, SIZE, HEIGHT], "area": SIZE * HEIGHT,
            "iscrowd": 1, "segmentation": crowd,
        }
    )  # fmt: skip
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def edit_coco(folder, split, change):
    """Let change(content) edit a split's annotations in place."""
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def write_hub(folder, box_format="xywh", sized=True):
    """What save_to_disk writes of a dataset with the columns image and objects."""
    box = datasets.Sequence(datasets.Value("float32"), 4)
    names = [f"class {i}" for i in range(len(CLASSES))]
    features = {"image": datasets.Image(), "objects": {"bbox": [box], "category": [datasets.ClassLabel(names=names)]}}
    features |= {"width": datasets.Value("int64"), "height": datasets.Value("int64")} if sized else {}
    splits = {}
    for split, count in (("train", 6), ("test", 3)):
        rows = []
        for image, height, boxes, labels in scenes(split, count):
            if box_format == "xywh":
                boxes = boxes - [[0, 0, 1, 1]] * boxes[:, [0, 1, 0, 1]]
            row = {"image": {"bytes": image, "path": None}, "objects": {"bbox": boxes.tolist(), "category": labels}}
            rows.append(row | ({"width": SIZE, "height": height} if sized else {}))
        splits[split] = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder
