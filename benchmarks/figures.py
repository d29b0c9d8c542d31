"""The figures of the ladder, from the accuracies of each seed.

python benchmarks/figures.py docs/numbers.json docs        those of the docs

benchmarks/ablation.py and benchmarks/official.py draw their own runs with the same functions. ImageNet's numbers are
the papers' and stand there for their order alone.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGENET = {  # linear top-1 in the papers: after 200 epochs, "v2, longer" after 800, SimCLR at batch 256
    "v1": 60.6, "v1 + mlp": 66.2, "v1 + aug": 63.4, "v1 + mlp + aug": 67.3, "v2": 67.5, "v2, longer": 71.1,
    "SimCLR, batch 128": 61.9, "supervised": 76.5,
}  # fmt: skip
IMAGENET_TEMPERATURES = {  # arXiv:2003.04297, table 2
    "mlp": {0.07: 62.9, 0.1: 64.9, 0.2: 66.2, 0.3: 65.7, 0.4: 65.0, 0.5: 64.3},
    "fc": {0.07: 60.6, 0.1: 60.7, 0.2: 59.0, 0.3: 58.2, 0.4: 57.2, 0.5: 56.4},
}
CHANGES = {  # what leads from one row to another
    "mlp": ("v1", "v1 + mlp"),
    "aug": ("v1", "v1 + aug"),
    "mlp after aug": ("v1 + aug", "v1 + mlp + aug"),
    "aug after mlp": ("v1 + mlp", "v1 + mlp + aug"),
    "cosine": ("v1 + mlp + aug", "v2"),
    "longer": ("v2", "v2, longer"),
    "MoCo v2 over SimCLR": ("SimCLR, batch 128", "v2"),
}


def gains(accuracies):
    """{change: (ours for each seed, the papers')} in points, where both rows were run; accuracies: {row: of seeds}."""
    return {
        change: ([b - a for a, b in zip(accuracies[start], accuracies[to])], IMAGENET[to] - IMAGENET[start])
        for change, (start, to) in CHANGES.items()
        if start in accuracies and to in accuracies
    }


def spread(ax, x, values, color, label=None):
    """A dot for each seed, and their mean with a bar of one standard deviation to either side."""
    ax.plot([x] * len(values), values, "o", color=color, alpha=0.5, markersize=4)
    deviation = stdev(values) if len(values) > 1 else 0
    ax.errorbar(x, mean(values), deviation, fmt="_", markersize=12, color=color, label=label, capsize=0, linewidth=1)


def draw_ladder(path, series):
    """Linear top-1 of each row, side by side. series: {who ran it: {row: accuracies of its seeds}}."""
    series = {name: accuracies for name, accuracies in series.items() if accuracies}
    rows = list(max(series.values(), key=len))
    figure, ax = plt.subplots(figsize=(10, 4), layout="constrained")
    for i, (name, accuracies) in enumerate(series.items()):
        for first, (row, values) in enumerate(accuracies.items()):
            label = f"{name}, a dot for each seed" if not first else None
            spread(ax, rows.index(row) + 0.2 * (i - (len(series) - 1) / 2), values, f"C{i}", label)
    papers = [row for row in rows if row in IMAGENET]
    label = "ImageNet, in the papers"
    ax.plot([rows.index(r) for r in papers], [IMAGENET[r] for r in papers], "s", color="gray", mfc="none", label=label)
    ax.set_xticks(range(len(rows)), rows, rotation=20, ha="right")
    ax.set_ylabel("linear top-1, %")
    ax.grid(axis="y", alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_gains(ax, accuracies):
    """How much each change gains; accuracies: {row: of its seeds}."""
    changes = gains(accuracies)
    for x, (values, paper) in enumerate(changes.values()):
        spread(ax, x, values, "C0", None if x else "here, a dot for each seed")
        ax.plot(x + 0.2, paper, "s", color="gray", mfc="none", label=None if x else "ImageNet, in the papers")
    ax.set_xticks(range(len(changes)), changes, rotation=30, ha="right")
    ax.axhline(0, color="gray", linewidth=1)
    ax.set_ylabel("gain of linear top-1, points")
    ax.legend()


def draw_temperatures(ax, temperatures):
    """Both heads over the temperature. temperatures: {head: {temperature: accuracies of its seeds}}."""
    for i, (head, found) in enumerate(temperatures.items()):
        paper = IMAGENET_TEMPERATURES[head]
        for temperature, values in found.items():
            spread(ax, float(temperature) + 0.006 * (2 * i - 1), values, f"C{i}")
        xs = [float(temperature) + 0.006 * (2 * i - 1) for temperature in found]
        ax.plot(xs, [mean(values) for values in found.values()], color=f"C{i}", label=f"{head}, here")
        style = {"color": f"C{i}", "mfc": "none", "alpha": 0.6, "label": f"{head}, ImageNet"}
        ax.plot(list(paper), list(paper.values()), "s--", **style)
    ax.set(xlabel="temperature", ylabel="linear top-1, %")
    ax.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw_spread(path, accuracies, temperatures):
    """What the seeds can tell: the gain of each change, and both heads over the temperature; either may be empty."""
    parts = [(draw, values) for draw, values in ((draw_gains, accuracies), (draw_temperatures, temperatures)) if values]
    figure, axes = plt.subplots(1, len(parts), figsize=(5.5 * len(parts), 4.5), layout="constrained", squeeze=False)
    for ax, (draw, values) in zip(axes[0], parts):
        draw(ax, values)
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(numbers, folder):
    numbers = json.loads(Path(numbers).read_text())
    draw_ladder(Path(folder) / "ladder.png", numbers["ladder"])
    draw_spread(Path(folder) / "spread.png", numbers["ladder"]["ours"], numbers["temperatures"])


if __name__ == "__main__":
    main(*sys.argv[1:])
