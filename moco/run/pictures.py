"""Pictures of a run: what the encoders see, how training went, and what a detector finds."""

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from moco.augment import AUGMENTATIONS, MEAN, STD, ViewAugment, random_crop_boxes, sample_params
from moco.data.batches import crop_generator, crop_pairs
from moco.data.decode import UNDECODABLE, read_image
from moco.detection.coco import decode_masks
from moco.detection.data import decode_stored
from moco.run.checkpoint import read_metrics

CURVE_POINTS = 400  # drawn of a log at most: every line of a long one would take seconds


def save_views(path, dataset, rows, args):
    """Images of the first step, a column each: the image with its two crops, the query view and the key view.

    rows: [(epoch, index), ...], the first of process 0 in step 0. args: the flags of the training. The views are what
    the encoders get, made by the same functions; only the normalisation is undone.
    """
    recipe, size, seed = args.augment, args.image_size, args.seed
    images = [read_image(dataset, index)[0] for _, index in rows]
    boxes = [
        random_crop_boxes(*image.shape[:2], crop_generator(seed, *row), AUGMENTATIONS[recipe]["crop"])
        for image, row in zip(images, rows)
    ]
    views, *_ = crop_pairs(dataset, size, seed, AUGMENTATIONS[recipe]["crop"])[rows, ()]
    params = sample_params(recipe, args.batch_size, seed, step=0)
    pair = ViewAugment(recipe)(views, {name: values[: len(rows)] for name, values in params.items()})
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    figure, axes = plt.subplots(3, len(rows), figsize=(1.5 * len(rows), 5), squeeze=False, layout="constrained")
    colors = ("tab:blue", "tab:orange")
    for column, image in enumerate(images):
        axes[0, column].imshow(image)
        for (top, left, height, width), color, row in zip(boxes[column], colors, (1, 2), strict=True):
            frame = plt.Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=color, linewidth=2)
            axes[0, column].add_patch(frame)
            axes[row, column].imshow((pair[row - 1][column] * std + mean).clamp(0, 1).permute(1, 2, 0))
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for ax, name, color in zip(axes[:, 0], ("image, two crops", "query", "key"), ("black", *colors), strict=True):
        ax.set_ylabel(name, color=color)
    figure.suptitle("The task: match each query with the key below it, among the keys of all other images")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_curves(path, metrics, candidates):
    """Loss beside its chance level, contrast accuracy, kNN and learning rate over epochs.

    metrics: path of metrics.jsonl. candidates: how many the positive is among, for the chance level: 1 + K, or
    SimCLR's 2N - 1.
    """
    lines, chance = read_metrics(metrics, CURVE_POINTS), math.log(candidates)
    scores = [line["knn"] for line in lines if "knn" in line]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    draw_curves(axes[0, 0], lines, "epoch", "contrastive loss", {"loss": None}, color="tab:blue")
    draw_curves(axes[0, 1], lines, "epoch", "contrast accuracy, %", {"accuracy": None}, color="tab:orange")
    draw_curves(axes[1, 0], lines, "epoch", "kNN accuracy, %", {"knn": None}, color="tab:green")
    draw_curves(axes[1, 1], lines, "epoch", "learning rate", {"lr": None}, color="tab:gray")
    levels = [(axes[0, 0], chance, f"chance, log({candidates}) = {chance:.2f}")]
    levels += [(axes[1, 0], scores[0], f"random backbone, {scores[0]:.1f} %")] if scores else []
    for ax, level, label in levels:
        ax.axhline(level, color="black", linestyle="--", linewidth=1, label=label)
        ax.legend()
    for ax in axes[0]:
        ax.set_xlabel("")
    figure.savefig(path, dpi=110)
    plt.close(figure)


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


def draw_curves(ax, lines, x, title, keys, color=None):
    """Numbers of a log over its "epoch" or "step". keys: {number: its label, or None}; what is rare is marked."""
    for key, label in keys.items():
        points = [(line[x], line[key]) for line in lines if key in line]
        if points:
            marker = "o" if "AP" in key or key == "knn" or len(points) == 1 else None
            ax.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
    if len(ax.lines) > 1:
        ax.legend()
    ax.set_title(title)
    ax.set_xlabel({"step": "iteration"}.get(x, x))
    ax.grid(alpha=0.3)


def save_detections(path, records, predictions, classes, images=6, threshold=0.5):
    """Every tenth test image with objects, a column each: these above, below what is found with a score of `threshold`.

    records, predictions: of moco.detection.data and `moco.detection.model.detect`, in the same order.
    """
    chosen = [index for index, record in enumerate(records) if len(record["boxes"])][: 10 * images : 10] or [0]
    figure, axes = plt.subplots(2, len(chosen), figsize=(3 * len(chosen), 6.6), squeeze=False, layout="constrained")
    for column, index in enumerate(chosen):
        record, found = records[index], predictions[index]
        sure = found["scores"] >= threshold
        masks = decode_masks(found["masks"])[sure] if len(found.get("masks", [])) else None
        names = [f"{classes[c]} {score:.2f}" for c, score in zip(found["labels"][sure], found["scores"][sure])]
        try:
            image = decode_stored(record["image"])
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


def save_neighbours(path, queries, found):
    """Some images, each with its nearest neighbours beside it.

    queries: images, (H, W, 3) arrays. found: for each query [(image, whether of its class), ...]; neighbours of another
    class have a red frame.
    """
    columns = max(map(len, found))
    size = (0.55 * (columns + 1.4), 0.6 * len(queries) + 0.5)
    widths = [1, 0.4, *[1] * columns]
    figure, axes = plt.subplots(len(queries), len(widths), figsize=size, width_ratios=widths, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    axes[0, 0].set_title("query", fontsize=9)
    axes[0, 2].set_title("nearest neighbours", fontsize=9, loc="left")
    for row, query, neighbours in zip(axes, queries, found, strict=True):
        row[0].imshow(query)
        for ax, (image, right) in zip(row[2:], neighbours):
            ax.imshow(image)
            if not right:
                side = len(image)
                frame = plt.Rectangle((-0.5, -0.5), side, side, fill=False, edgecolor="red", linewidth=3)
                ax.add_patch(frame)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
