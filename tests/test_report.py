"""Pictures hold what they say. pytest tests/test_report.py"""

import numpy as np
import torch
from PIL import Image

from moco.data.shapes import CLASSES, draw_scene, encode_jpeg
from moco.detection.coco import encode_masks
from moco.detection.data import objects
from moco.detection.pictures import annotated, save_detections
from moco.run.pictures import save_neighbours


def test_neighbours_of_another_class_alone_are_framed(tmp_path):
    images = [{"image": np.full((16, 20, 3), 128, np.uint8)}] * 5

    def red_pixels(*right):
        labels = [0, 0, *(not good for good in right)]
        save_neighbours(tmp_path / "n.png", images, labels, [0, 1], {"nearest": [[2, 3, 4]] * 2})
        pixels = np.asarray(Image.open(tmp_path / "n.png").convert("RGB")).astype(int)
        return int(((pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(axis=2)).sum())

    assert red_pixels(True, True, True) == 0
    assert red_pixels(True, False, True) > 0
    assert 1.5 < red_pixels(False, True, False) / red_pixels(True, False, True) < 2.5


def test_detections_are_drawn_with_masks_and_without_what_cannot_be_drawn(tmp_path):
    """A box turned around and a damaged image are left out; image, boxes and masks have one scale."""
    image, labels, boxes = draw_scene("test", 3, 96, 3)
    size = {"width": 96, "height": 96, "name": "scene"}
    record = {"image": {"bytes": encode_jpeg(image), "path": None}, **size, **objects(boxes, labels)}
    turned = record | {"boxes": record["boxes"][:, [2, 1, 0, 3]]}
    masks = torch.zeros(len(boxes), 96, 96, dtype=torch.bool)
    masks[:, 20:40, 30:60] = True
    found = {"boxes": record["boxes"], "labels": labels, "scores": np.full(len(labels), 0.9)}
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    damaged = record | {"image": {"bytes": b"damaged", "path": None}}
    plain = annotated(image, empty["boxes"], empty["labels"], [])
    boxed = annotated(image, found["boxes"], labels, ["a"] * len(labels))
    masked = annotated(image, found["boxes"], labels, ["a"] * len(labels), masks.numpy())
    assert plain.shape == boxed.shape == masked.shape and plain.shape[0] % 96 == 0
    assert (plain[::4, ::4] == image).all() and (boxed != plain).any() and (masked != boxed).any()
    records, predictions = [record, turned, damaged], [found | {"masks": encode_masks(masks)}, empty, found]
    save_detections(tmp_path / "detections.png", records * 10, predictions * 10, CLASSES)
    assert min(Image.open(tmp_path / "detections.png").size) > 300
