"""Pictures of a run: what the encoders see, how training went, and which images are neighbours."""

import itertools
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from moco.run.checkpoint import read_metrics

CURVE_POINTS = 400  # drawn of a log at most: every line of a long one would take seconds
# Numbers of a log with their titles, in the order of their panels, and those that have no panel.
CURVES = {
    "loss": "contrastive loss", "accuracy": "contrast accuracy, %", "knn": "kNN accuracy, %", "lr": "learning rate",
}  # fmt: skip
BOOKKEEPING = "step|epoch|undecodable|images_per_second|data_share|.*_seconds|.*_mb|read_mb_per_second|resolves|refused"


def save_views(path, views, mean=None, std=None, count=8):
    """The first images of a batch as the encoders get them: a column an image, a row a view.

    views: a list of (n, C, S, S) float tensors. mean, std: what they were normalised with, to be undone. Values that do
    not lie in [0, 1] afterwards are drawn between the least and the largest of a view. Of more than three channels the
    first three are drawn, of fewer one.
    """
    columns = min(count, len(views[0]))
    figure, axes = plt.subplots(len(views), columns, figsize=(1.5 * columns, 1.6 * len(views) + 0.3), squeeze=False)
    for number, (row, view) in enumerate(zip(axes, views)):
        x = view[:columns].detach().float().cpu().permute(0, 2, 3, 1)
        x = x if mean is None else x * torch.tensor(std) + torch.tensor(mean)
        x = x[..., : 3 if x.shape[-1] >= 3 else 1]
        if x.min() < -0.01 or x.max() > 1.01:
            low, high = x.amin(dim=(0, 1, 2)), x.amax(dim=(0, 1, 2))
            x = (x - low) / (high - low).clamp(min=1e-30)
        for ax, image in zip(row, x.clamp(0, 1).numpy()):
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(f"view {number + 1}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_curves(path, metrics, levels=None):
    """A panel for each number of a log that is no bookkeeping, over epochs; those of CURVES come first.

    metrics: path of metrics.jsonl. levels: {name of a number: (value, label)}, drawn as lines across; the untrained
    backbone's kNN accuracy, where it was measured, is one, too.
    """
    lines = read_metrics(metrics, CURVE_POINTS)
    found = dict.fromkeys(name for line in lines for name in line if not re.fullmatch(BOOKKEEPING, name))
    names = [name for name in CURVES if name in found] + [name for name in found if name not in CURVES]
    start = next((line["knn"] for line in lines if line["step"] == 0 and "knn" in line), None)
    levels = (levels or {}) | ({} if start is None else {"knn": (start, f"random backbone, {start:.1f} %")})
    rows = -(-len(names) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9, 3 * rows), sharex=True, squeeze=False, layout="constrained")
    colors = itertools.cycle(("tab:blue", "tab:orange", "tab:green", "tab:gray", "tab:red", "tab:purple"))
    for ax, name, color in itertools.zip_longest(axes.flat, names, itertools.islice(colors, len(names))):
        if name is None:
            ax.axis("off")
            continue
        draw_curves(ax, lines, "epoch", CURVES.get(name, name), {name: None}, color)
        if name in levels:
            value, label = levels[name]
            ax.axhline(value, color="black", linestyle="--", linewidth=1, label=label)
            ax.legend()
    for ax in axes[:-1].flat:
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
