"""Pictures of a run: what the encoders see, how training went, and which images are neighbours."""

import itertools
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from moco.augment import to_float
from moco.data.batches import center_crop
from moco.data.decode import read_image
from moco.run.checkpoint import read_metrics

SIDE = 64  # pixels of an image among neighbours
CURVE_POINTS = 400  # drawn of a log at most: every line of a long one would take seconds
# Numbers of a log with their titles, in the order of their panels, and those that have no panel.
CURVES = {
    "loss": "contrastive loss", "accuracy": "contrast accuracy, %", "knn": "kNN accuracy, %",
    "rank": "effective rank of features (RankMe)", "uniformity": "uniformity of features",
    "alignment": "alignment of two views", "lr": "learning rate",
}  # fmt: skip
RARE = ("knn", "rank", "uniformity", "alignment")  # of each evaluation only
BOOKKEEPING = "step|epoch|undecodable|images_per_second|data_share|.*_seconds|.*_mb|read_mb_per_second|resolves|refused"


def save_views(path, views, mean=None, std=None, count=8):
    """The first images of a batch as the encoders get them: a column an image, a row a view.

    views: a list of (n, C, S, S) float tensors. mean, std: what they were normalised with, to be undone. See
    `displayable`.
    """
    columns = min(count, len(views[0]))
    figure, axes = plt.subplots(len(views), columns, figsize=(1.5 * columns, 1.6 * len(views) + 0.3), squeeze=False)
    for number, (row, view) in enumerate(zip(axes, views)):
        x = view[:columns].detach().float().cpu().permute(0, 2, 3, 1)
        x = x if mean is None else x * torch.tensor(std) + torch.tensor(mean)
        for ax, image in zip(row, displayable(x)):
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(f"view {number + 1}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def displayable(x):
    """Images, a (N, H, W, C) float tensor, as an array (N, H, W, 3 or 1) of values in [0, 1].

    Values that do not lie there are scaled from the least and the largest of all. Of more than three channels the first
    three are drawn, of fewer one.
    """
    x = x[..., : 3 if x.shape[-1] >= 3 else 1]
    if x.min() < -0.01 or x.max() > 1.01:
        low, high = x.amin(dim=(0, 1, 2)), x.amax(dim=(0, 1, 2))
        x = (x - low) / (high - low).clamp(min=1e-30)
    return x.clamp(0, 1).numpy()


def save_curves(path, metrics, levels=None):
    """A panel for each number of a log that is no bookkeeping, over epochs; those of CURVES come first.

    metrics: path of metrics.jsonl. levels: {name of a number: (value, label)}, drawn as lines across; the kNN
    accuracy before training, where it was measured, is one, too.
    """
    lines = read_metrics(metrics, CURVE_POINTS)
    found = dict.fromkeys(name for line in lines for name in line if not re.fullmatch(BOOKKEEPING, name))
    names = [name for name in CURVES if name in found] + [name for name in found if name not in CURVES]
    start = next((line["knn"] for line in lines if line["step"] == 0 and "knn" in line), None)
    levels = (levels or {}) | ({} if start is None else {"knn": (start, f"at the start, {start:.1f} %")})
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
    for ax, below in zip(axes[:-1].flat, axes[1:].flat):
        if below.axison:
            ax.set_xlabel("")
        else:  # the last panel of its column
            ax.tick_params(labelbottom=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(ax, lines, x, title, keys, color=None):
    """Numbers of a log over its "epoch" or "step". keys: {number: its label, or None}; what is rare is marked."""
    for key, label in keys.items():
        points = [(line[x], line[key]) for line in lines if key in line]
        if points:
            marker = "o" if "AP" in key or key in RARE or len(points) == 1 else None
            ax.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
    if len(ax.lines) > 1 and any(keys.values()):
        ax.legend()
    ax.set_title(title)
    ax.set_xlabel({"step": "iteration"}.get(x, x))
    ax.grid(alpha=0.3)


def nearest_rows(features, queries=8, count=6):
    """(rows at equal distances, the nearest others of each by cosine): lists of at most `queries`, and `count` each."""
    x = F.normalize(features, dim=1)
    asked = [i * len(x) // queries for i in range(min(queries, len(x)))]
    cosines = x[asked] @ x.T
    cosines[torch.arange(len(asked)), asked] = -torch.inf  # itself; the most similar would be its twin, if it has one
    return asked, cosines.topk(min(count, len(x) - 1), dim=1).indices.tolist()


def save_neighbours(path, images, labels, asked, found):
    """Some images, each with its nearest neighbours beside it, as evaluations crop them.

    images: rows. labels: of all rows, or None; neighbours of another label have a red frame. asked: rows, one a line.
    found: {title: [[row, ...] for each of these]}, drawn side by side.
    """
    rows = sorted({*asked, *itertools.chain(*itertools.chain(*found.values()))})  # each read once, in order
    crops = torch.stack([center_crop(read_image(images, row)[0], SIDE) for row in rows])
    tiles = displayable(to_float(crops).permute(0, 2, 3, 1))
    tiles = dict(zip(rows, np.broadcast_to(tiles, (*tiles.shape[:3], 3))))
    lines, inside = [], (slice(3, -3),) * 2
    for i, query in enumerate(asked):
        line = [tiles[query]]
        for nearest in found.values():
            line.append(np.ones((SIDE, SIDE // 2, 3)))
            for row in nearest[i]:
                same = labels is None or bool(labels[row] == labels[query])
                line.append(np.full((SIDE, SIDE, 3), (1, same, same), dtype=float))  # a white frame, or a red one
                line[-1][inside] = tiles[row][inside]
        lines.append(np.pad(np.concatenate(line, axis=1), ((0, 4), (0, 0), (0, 0)), constant_values=1))
    picture = np.concatenate(lines)
    figure, ax = plt.subplots(figsize=(picture.shape[1] / 85, picture.shape[0] / 85), layout="constrained")
    ax.imshow(picture)
    ax.axis("off")
    ax.text(0, -6, "query", fontsize=9)
    for number, title in enumerate(found):
        ax.text(SIDE * (1.5 + number * (len(nearest[0]) + 0.5)), -6, title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
