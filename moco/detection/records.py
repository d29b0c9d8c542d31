"""What one image and its objects are in detection, and what must be true of them before anything is trained.

A record is {"image": encoded, as `decode_image` takes it, or (dataset, row), "name", "width", "height", "boxes" (m, 4)
float32 xyxy from 0, "labels" (m,) int64 from 0, "difficult" (m,) bool}, and for COCO "id" and, where masks are trained,
"masks": for each box a list of (points, 2) arrays, or a run-length encoding.
"""

import numpy as np

from moco.data.decode import MAX_UNDECODABLE, UNDECODABLE, decode_image, encoded_bytes, open_image
from moco.errors import UserError

LOOKED_AT = 1000  # images of a split, spread evenly, whose headers are compared with the annotated sizes at the start
CORNER = 2  # pixels: boxes in 0..1 end within them, centre, width and height read as xywh included
ORIENTATION = 0x0112  # EXIF's tag
# What turns stored pixels (H, W, 3) upright. The missing 1 is upright.
TURNS = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}


def objects(boxes, labels, difficult=None):
    """Lists -> the three arrays of a record."""
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "labels": np.array(labels, np.int64),
        "difficult": np.zeros(len(labels), bool) if difficult is None else np.array(difficult, bool),
    }


def select_objects(record, chosen):
    """The record with only the objects where `chosen`, (m,) bool."""
    record = record | {key: record[key][chosen] for key in ("boxes", "labels", "difficult")}
    if "masks" in record:
        record["masks"] = [mask for mask, take in zip(record["masks"], chosen, strict=True) if take]
    return record


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


# ---- pixels


def decode_record(record):
    """A record's image upright, (H, W, 3) uint8.

    Raises one of UNDECODABLE, also if the image has another size than annotated, because its boxes would lie elsewhere.
    """
    data = encoded_bytes(stored(record))
    image = TURNS.get(orientation(data), np.asarray)(decode_image({"bytes": data, "path": None}))
    image = np.ascontiguousarray(image)  # torch takes no view of an array that runs backwards
    height, width = image.shape[:2]
    if (width, height) != (record["width"], record["height"]):
        raise ValueError(f"{width} x {height} pixels, annotated as {record['width']} x {record['height']}")
    return image


def stored(record):
    """The encoded image of a record, read from its dataset if it lies in one."""
    if isinstance(record["image"], tuple):
        dataset, row = record["image"]
        return dataset[row]["image"]
    return record["image"]


def orientation(data):
    """EXIF's orientation of encoded bytes, 1 to 8, by which detectron2 turns images before it uses their boxes.

    1 where there is none. Pillow turns TIFF itself. Of PNG it decodes all pixels to search for EXIF behind them.
    """
    if data.startswith(b"\x89PNG") and not any(mark in data for mark in (b"eXIf", b"exif", b"xmp")):
        return 1
    try:
        with open_image(data) as image:
            return 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's many kinds for damaged EXIF; whether the image is damaged, too, `decode_image` says
        return 1


def upright_size(image):
    """(width, height) of an encoded image when it is upright, from its header; raises one of UNDECODABLE."""
    data = encoded_bytes(image)
    with open_image(data) as opened:
        return opened.size[::-1] if orientation(data) in (5, 6, 7, 8) else opened.size


def image_size(image, left_out):
    """As `upright_size`; (1, 1), which holds no box, where the image cannot be decoded."""
    try:
        return upright_size(image)
    except UNDECODABLE:
        left_out["images whose size cannot be read"] += 1
        return 1, 1


# ---- checks at the start


def check_records(records, split, name, left_out):
    """Raise UserError where the objects of a split ("training" or "test") cannot be those of its images.

    Few images of another size are only counted here. Training and evaluation then name and count each of them.
    """
    records = [record for record in records if len(record["boxes"])]
    check_boxes(records, split, name)
    looked = records[:: -(-len(records) // LOOKED_AT) or 1]
    wrong = [(record, size) for record in looked if (size := known_size(record)) and size != annotated_size(record)]
    if len(wrong) > MAX_UNDECODABLE * len(looked):
        record, (width, height) = wrong[0]
        raise UserError(
            f"--data {name}: {len(wrong)} of {len(looked)} {split} images have another size than annotated, first"
            f" {record['name']}: {width} x {height} pixels, annotated as {record['width']} x {record['height']};"
            " correct the annotations, or use the images that they were made for"
        )
    left_out[f"of {len(looked)} {split} images looked at have another size than annotated"] += len(wrong)


def annotated_size(record):
    return record["width"], record["height"]


def known_size(record):
    """The size of a record's image, None where it cannot be decoded, which is counted when it is used."""
    try:
        return upright_size(stored(record))
    except UNDECODABLE:
        return None


def check_boxes(records, split, name):
    """Raise UserError if a coordinate is not finite, or if the boxes of too many images are in 0..1 instead of pixels.

    The latter end within CORNER pixels of the image's corner.
    """
    for record in records:
        if not np.isfinite(record["boxes"]).all():
            raise UserError(f"--data {name}: a box of {record['name']} is not finite; correct or remove it")
    tiny = [record for record in records if record["boxes"].max() <= CORNER]
    if len(tiny) > MAX_UNDECODABLE * len(records):
        raise UserError(
            f"--data {name}: the boxes of {len(tiny)} of {len(records)} {split} images end within {CORNER} pixels of"
            f" the corner, first of {tiny[0]['name']}: {tiny[0]['boxes'][0].tolist()} (x1, y1, x2, y2), as boxes in"
            " 0..1 do; multiply them by the image's width and height"
        )
