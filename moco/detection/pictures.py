"""Pictures of a detector: how its training went, and what it finds."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from moco.data.decode import UNDECODABLE
from moco.detection.coco import decode_masks
from moco.detection.records import decode_record
from moco.run.checkpoint import read_metrics
from moco.run.pictures import CURVE_POINTS, draw_curves


def save_detection_curves(path, metrics):
    """The parts of a detector's loss, AP and learning rate over iterations. metrics: path of metrics.jsonl."""
    lines = read_metrics(metrics, CURVE_POINTS)
    parts = {key: key.removeprefix("loss_").replace("_", " ") for key in (lines[0] if lines else ()) if "loss_" in key}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    draw_curves(axes[0], lines, "step", "losses", parts)
    draw_curves(axes[1], lines, "step", "AP, %", {key: key for key in ("AP", "AP50", "AP75")})
    draw_curves(axes[2], lines, "step", "learning rate", {"lr": None})
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_detections(path, records, predictions, classes, images=6, threshold=0.5):
    """Every tenth test image with objects, a column each: these above, below what is found with a score of `threshold`.

    records, predictions: of moco.detection.data and `moco.detection.detect.detect`, in the same order.
    """
    chosen = [index for index, record in enumerate(records) if len(record["boxes"])][: 10 * images : 10] or [0]
    figure, axes = plt.subplots(2, len(chosen), figsize=(3 * len(chosen), 6.6), squeeze=False, layout="constrained")
    for column, index in enumerate(chosen):
        record, found = records[index], predictions[index]
        sure = found["scores"] >= threshold
        masks = decode_masks(found["masks"])[sure] if len(found.get("masks", [])) else None
        names = [f"{classes[c]} {score:.2f}" for c, score in zip(found["labels"][sure], found["scores"][sure])]
        try:
            image = decode_record(record)
        except UNDECODABLE:
            continue
        truth = [classes[label] for label in record["labels"]]
        axes[0, column].imshow(annotated(image, record["boxes"], record["labels"], truth))
        axes[1, column].imshow(annotated(image, found["boxes"][sure], found["labels"][sure], names, masks))
        if not sure.any():
            axes[1, column].set_title("none")
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for ax, name in zip(axes[:, 0], ("objects", f"detections, score from {threshold}"), strict=True):
        ax.set_ylabel(name)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def annotated(image, boxes, labels, names, masks=None, side=360):
    """(H, W, 3) uint8 with boxes (n, 4), named, and masks (n, H, W), enlarged to about `side` if smaller."""
    drawn = torch.from_numpy(image).permute(2, 0, 1)
    good = (boxes[:, 2:] >= boxes[:, :2]).all(axis=1)  # annotations hold others, which cannot be drawn
    colors = [tuple(map(int, plt.get_cmap("tab20")(label % 20, bytes=True)[:3])) for label in labels[good].tolist()]
    if colors and masks is not None and masks.shape[1:] == image.shape[:2]:
        drawn = draw_segmentation_masks(drawn, torch.from_numpy(masks[good]), alpha=0.5, colors=colors)
    scale = max(1, round(side / max(image.shape[:2])))
    drawn = drawn.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if colors:
        names = [name for name, take in zip(names, good) if take]
        font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
        style = {"colors": colors, "width": 2, "fill_labels": True, "label_colors": "black"}
        style |= {"font": font, "font_size": max(drawn.shape[1:]) // 25}
        drawn = draw_bounding_boxes(drawn, torch.from_numpy(boxes[good] * scale), names, **style)
    return drawn.permute(1, 2, 0).numpy()
