"""What processes do together for a detector. Run by test_detect_transfer.py, which compares with one process alone.

python tests/two_processes.py FILE: writes what each process saw to FILE and its own number.
"""

import json
import sys

import torch
from accelerate import Accelerator
from torch import nn

from moco.backbone import load_backbone
from moco.data.shapes import draw_scene, encode_jpeg
from moco.detection.data import SCENE_SIZE, DetectionImages
from moco.detection.detect import detect, precise_statistics
from moco.detection.model import build_detector
from moco.detection.records import objects


def seen(accelerator):
    """Detections of five images, and PreciseBN over eight batches, as this process has them in the end."""
    torch.manual_seed(0)
    detector = build_detector(load_backbone("random", "resnet10")[0], 10, anchor_sizes=(32,), roi_batch=4)
    detector.roi_heads.box_predictor.cls_score.weight.data *= 200  # scores that differ from each other
    records = []
    for index in range(5):  # an uneven number, and one that no process can decode
        image, labels, boxes = draw_scene("test", index, SCENE_SIZE, 2)
        encoded = {"bytes": b"damaged" if index == 3 else encode_jpeg(image), "path": None}
        size = {"width": SCENE_SIZE, "height": SCENE_SIZE}
        records.append({"image": encoded, "name": str(index), **size, **objects(boxes, labels)})
    predictions, undecodable = detect(detector, DetectionImages(records, [64], 1333), 0, accelerator)

    norm, inputs = nn.BatchNorm2d(3), torch.randn(8, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mine = inputs[accelerator.process_index :: accelerator.num_processes]
    precise_statistics(norm, (norm(x) for x in mine), accelerator)
    return {
        "predictions": [{key: values.tolist() for key, values in image.items()} for image in predictions],
        "undecodable": undecodable,
        "mean": norm.running_mean.tolist(),
        "var": norm.running_var.tolist(),
    }


if __name__ == "__main__":
    accelerator = Accelerator()
    with open(f"{sys.argv[1]}{accelerator.process_index}", "w") as file:
        json.dump(seen(accelerator), file)
