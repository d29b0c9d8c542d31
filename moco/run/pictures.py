"""Pictures of a run: what the encoders see, how training went, and which images are neighbours."""

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from moco.augment import AUGMENTATIONS, MEAN, STD, ViewAugment, random_crop_boxes, sample_params
from moco.data.batches import crop_generator, crop_pairs
from moco.data.decode import read_image
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
