"""The papers' ablation: each recipe pre-trained and probed, over several seeds, beside the papers' numbers.

python benchmarks/ablation.py                        the ladder on the built-in data, on two CPU cores about four hours
python benchmarks/ablation.py --temperatures         the temperature table, about as long again
python benchmarks/ablation.py --longer               every row of the ladder four times as long
python benchmarks/ablation.py --size photographs     five rows on Fashion-MNIST (benchmarks/fashion_mnist.py)
python benchmarks/ablation.py --size gpu             the ladder on one GPU

A second call continues where the first stopped. At the end it prints a table and draws it in runs/ablation-SIZE. The
papers' ImageNet numbers stand beside ours for their order alone.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.figures import IMAGENET, IMAGENET_TEMPERATURES, draw_ladder, draw_spread, gains
from moco.data.shapes import CLASSES, draw_scene

ROOT = Path(__file__).parent.parent
# "epochs" are those of MoCo and SimCLR, twice the demo's; supervised has half as many.
SHAPES = {"data": "shapes", "arch": "resnet10", "epochs": 40, "flags": "", "jobs": 2}
SIZES = {  # jobs: runs at a time
    "cpu": SHAPES,
    "gpu": SHAPES | {"arch": "resnet18", "epochs": 100, "flags": "--workers 4", "jobs": 3},
    "photographs": {
        "data": "runs/fashion-mnist", "arch": "resnet10", "epochs": 4, "jobs": 2,
        "flags": "--image-size 32 --batch-size 128 --bn-batch 64 --queue-size 4096 --encoder-momentum 0.99 --workers 1"
        " --shuffle-window 20000 --checkpoint-every 500",
        "rows": ("random", "v1", "v2", "v2, longer", "supervised"),
    },
}  # fmt: skip
LADDER = {  # row -> flags of train_moco.py; "longer" is four times as long, as 800 epochs to 200
    "random": None,
    "v1": ["--recipe", "v1"],
    "v1 + mlp": ["--recipe", "v1-mlp"],
    "v1 + aug": ["--recipe", "v1-aug"],
    "v1 + mlp + aug": ["--recipe", "v1-mlp-aug"],
    "v2": ["--recipe", "v2"],
    "v2, longer": ["--recipe", "v2"],
    "SimCLR, batch 128": ["--recipe", "simclr"],
    "supervised": None,
}


def temperature_row(head, temperature):
    return f"{head}, T {temperature}"


def temperature_table():
    """v1 with and without the mlp head at each temperature of the paper: {row: flags}, {row: ImageNet top-1}."""
    rows, papers = {}, {}
    for head, of_paper in IMAGENET_TEMPERATURES.items():
        for temperature, paper in of_paper.items():
            row = temperature_row(head, temperature)
            rows[row] = ["--recipe", "v1", "--head", head, "--temperature", str(temperature)]
            papers[row] = paper
    return rows, papers


def commands(row, flags, seed, size, longer, folder):
    """The commands of one run: pre-train, then probe. longer: how many times as many epochs."""
    epochs = size["epochs"] * (4 if row == "v2, longer" else 1) * longer
    resume = ["--resume"] if any(folder.glob("checkpoints/step_*/state.json")) else []
    probe = ["linear_probe.py", "--data", size["data"], "--seed", str(seed), "--knn", "200", "--workers", "1"]
    if size["data"] != "shapes":
        probe += ["--image-size", "32", "--epochs", "10", "--cached-features"]
    probe += ["--output", str(folder / "linear_probe")]
    probe += ["--resume"] if any(folder.glob("linear_probe/checkpoints/step_*/state.json")) else []
    if row == "random":
        return [[*probe, "--backbone", "random", "--arch", size["arch"]]]
    common = ["--data", size["data"], "--arch", size["arch"], "--seed", str(seed), "--output", str(folder)]
    if row == "supervised":
        pretrain = ["benchmarks/supervised.py", *common, "--epochs", str(epochs // 2)]
    else:
        pretrain = ["train_moco.py", *common, *flags, *size["flags"].split(), "--epochs", str(epochs)]
        pretrain += ["--knn-every", "0", *resume]
    done = (folder / "backbone" / "config.json").exists()
    return [*([] if done else [pretrain]), [*probe, "--backbone", str(folder)]]


def run(row, flags, seed, size, longer, folder, threads):
    """Pre-train and probe one row with one seed, unless it is done; what it prints goes to its folder's log.txt."""
    results = folder / "linear_probe" / "results.json"
    if not results.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for command in commands(row, flags, seed, size, longer, folder):
            with (folder / "log.txt").open("a") as log:
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log)
            if done.returncode:
                raise RuntimeError(f"{row}, seed {seed} failed; see {folder / 'log.txt'}")
    return json.loads(results.read_text())


def summary(values):
    """Mean and, of several, the standard deviation."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def print_table(rows, found, seeds, papers):
    """papers: {row: ImageNet top-1 in the papers}."""
    print("\n| recipe | n | linear top-1, % | kNN top-1, % | ImageNet linear top-1 in the paper, % |")
    print("|---|---|---|---|---|")
    for row in rows:
        top1, knn = (
            [get(found[row, s]) for s in seeds] for get in (lambda r: r["top1"], lambda r: r["knn"]["200"]["top1"])
        )
        print(f"| {row} | {len(seeds)} | {summary(top1)} | {summary(knn)} | {papers.get(row, '')} |")


def print_gains(changes):
    print("\n| change | gain of each seed | mean | in the papers |")
    print("|---|---|---|---|")
    for change, (ours, paper) in changes.items():
        print(f"| {change} | {', '.join(f'{gain:+.1f}' for gain in ours)} | {summary(ours)} | {paper:+.1f} |")


def save_contact_sheet(path, columns=12):
    """The built-in data: a row a class, the first `columns` test images of each."""
    rows = [[] for _ in CLASSES]
    index = 0
    while min(map(len, rows)) < columns:
        image, labels, _ = draw_scene("test", index)
        rows[labels[0]].append(image)
        index += 1
    side = len(image)
    sheet = np.full((len(CLASSES) * (side + 2), columns * (side + 2), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row[:columns]):
            sheet[i * (side + 2) :, j * (side + 2) :][:side, :side] = image
    figure, ax = plt.subplots(figsize=(8, 11))
    ax.imshow(sheet)
    ax.set_yticks([(i + 0.5) * (side + 2) for i in range(len(CLASSES))], CLASSES)
    ax.set_xticks([])
    for edge in ax.spines.values():
        edge.set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="cpu", help="[%(default)s]")
    parser.add_argument("--temperatures", action="store_true", help="the temperature table in place of the ladder")
    parser.add_argument("--longer", action="store_true", help="every row four times as long")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time [2; gpu: 3]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    args = parser.parse_args()
    size = SIZES[args.size]
    rows, papers = temperature_table() if args.temperatures else (LADDER, IMAGENET)
    chosen = args.rows or size.get("rows", list(rows))
    rows = {row: rows[row] for row in chosen if not (args.longer and row == "v2, longer")}
    name = "temperatures" if args.temperatures else "longer" if args.longer else "ablation"
    output = ROOT / "runs" / f"ablation-{args.size}"
    parallel, longer = args.jobs or size["jobs"], 4 if args.longer else 1
    threads = max(1, (os.cpu_count() or 1) // parallel)
    jobs = [(row, flags, seed) for seed in args.seeds for row, flags in rows.items()]
    folders = []
    for row, _, seed in jobs:
        folder = output / f"{row.replace(' ', '').replace(',', '-')}-seed{seed}"
        folders.append(folder.with_name(f"{folder.name}-longer") if args.longer and row != "random" else folder)
    found = {}
    with ThreadPoolExecutor(parallel) as pool:
        waiting = [pool.submit(run, *job, size, longer, folder, threads) for job, folder in zip(jobs, folders)]
        for (row, _, seed), result in zip(jobs, tqdm(waiting, unit="run"), strict=True):
            found[row, seed] = result.result()
    print_table(rows, found, args.seeds, papers)
    accuracies = {row: [found[row, seed]["top1"] for seed in args.seeds] for row in rows}
    if changes := gains(accuracies):
        print_gains(changes)
    print(f"\nfigures in {output}")
    if args.temperatures:
        heads = {
            head: {t: accuracies[row] for t in of_paper if (row := temperature_row(head, t)) in accuracies}
            for head, of_paper in IMAGENET_TEMPERATURES.items()
        }
        draw_spread(output / f"{name}.png", {}, heads)
    else:
        draw_ladder(output / f"{name}.png", {"here": accuracies})
    if changes:
        draw_spread(output / f"{name}-gains.png", accuracies, {})
    if name == "ablation" and size["data"] == "shapes" and not args.rows:
        save_contact_sheet(output / "shapes.png")


if __name__ == "__main__":
    main()
