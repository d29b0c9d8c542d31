"""The official code beside ours: learning curves on the same photographs, with the same settings.

git clone https://github.com/facebookresearch/moco official && git -C official checkout 132aea9
python benchmarks/fashion_mnist.py runs/fashion-mnist
python benchmarks/official.py official runs/fashion-mnist

Theirs: MoCo, the training loop, the learning rate and the blur of that commit, on one gloo process; `.cuda()` does
nothing there, and their accuracy, which fails on today's PyTorch, is not computed. Ours: train_moco.py. Both train the
same small ResNet on the first IMAGES of the data, at 32 pixels, in batches of 128 that share BatchNorm; each has its
own random numbers and its own augmentation. The recipe's blur is meant for 224 pixels: ours scales it with the image,
theirs does not, so ours is also run with theirs. A second call continues where the first stopped. At the end it prints
a table and draws runs/official/official.png.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import types
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import moco.augment as augment
import train_moco
from benchmarks.data_path import standard_transform
from moco.encoder import build_resnet

ROOT = Path(__file__).parent.parent
IMAGES, EPOCHS, BATCH = 10_000, 12, 128
SIZE, QUEUE, MOMENTUM, TEMPERATURE, LR = 32, 4096, 0.99, 0.2, 0.03
SIDES = {"official": "the official code", "same blur": "ours, with its blur", "ours": "ours"}


def subset(data, folder):
    """The first IMAGES of the training data, and all of the test data, as parquet files in `folder`."""
    if not (folder / "test.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(Path(data) / "train.parquet").slice(0, IMAGES), folder / "train.parquet")
        pq.write_table(pq.read_table(Path(data) / "test.parquet"), folder / "test.parquet")
    return folder


# ---- their side


def load_official(folder):
    """Their modules (main_moco, builder, loader), which import each other by the name of a package that is not here."""
    package = "deeplearning.cross_image_ssl.moco"
    for name in ("deeplearning", "deeplearning.cross_image_ssl", package):
        sys.modules[name] = types.ModuleType(name)
    modules = []
    for name, path in ((f"{package}.loader", "moco/loader.py"), (f"{package}.builder", "moco/builder.py")):
        modules.append(import_file(name, folder / path))
        setattr(sys.modules[package], name.rpartition(".")[2], modules[-1])
    sys.modules["deeplearning"].cross_image_ssl = sys.modules["deeplearning.cross_image_ssl"]
    sys.modules["deeplearning.cross_image_ssl"].moco = sys.modules[package]
    return import_file("main_moco", folder / "main_moco.py"), *reversed(modules)


def import_file(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Photographs(torch.utils.data.Dataset):
    """What their ImageFolder would give: two transformed views and a label."""

    def __init__(self, data, transform):
        self.rows, self.transform = load_dataset(str(data), split="train"), transform

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.transform(self.rows[row]["image"].convert("RGB")), 0


def run_official(folder, data, seed, output):
    """Train with their code; leaves a checkpoint of theirs and the mean loss of each epoch."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    main_moco, builder, loader = load_official(folder)
    main_moco.accuracy = lambda output, target, topk: [torch.zeros(1) for _ in topk]
    torch.distributed.init_process_group("gloo", f"file://{output}/rendezvous", rank=0, world_size=1)
    torch.manual_seed(seed)
    np.random.seed(seed)
    main_moco.random.seed(seed)
    # Their list of transforms is inside their main, with a size of 224.
    transform = standard_transform(SIZE, loader.GaussianBlur([0.1, 2.0]))
    photographs = Photographs(data, loader.TwoCropsTransform(transform))
    sampler = DistributedSampler(photographs, seed=seed)
    batches = DataLoader(photographs, BATCH, sampler=sampler, num_workers=1, drop_last=True)
    # Their builder makes both heads' hidden layer by itself, so the encoder comes with one linear layer.
    encoder = lambda num_classes: build_resnet("resnet10", num_classes, bn_batch=None)  # noqa: E731
    model = builder.MoCo(encoder, 128, QUEUE, MOMENTUM, TEMPERATURE, mlp=True)
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-4)
    args = argparse.Namespace(lr=LR, cos=True, epochs=EPOCHS, gpu=0, print_freq=10**9)
    losses, criterion = [], torch.nn.CrossEntropyLoss()

    def keep_loss(logits, labels):
        losses.append(criterion(logits, labels))
        return losses[-1]

    means = []
    for epoch in tqdm(range(EPOCHS), unit="epoch"):
        sampler.set_epoch(epoch)
        main_moco.adjust_learning_rate(optimizer, epoch, args)
        with redirect_stdout(sys.stderr):
            main_moco.train(batches, model, keep_loss, optimizer, epoch, args)
        means.append(mean(loss.item() for loss in losses))
        losses.clear()
    torch.save({"epoch": EPOCHS, "arch": "resnet10", "state_dict": model.state_dict()}, output / "official.pth.tar")
    (output / "losses.json").write_text(json.dumps(means))


# ---- our side


def run_ours(data, seed, output, same_blur):
    """Train with train_moco.py, a line of the log an epoch, and leave the mean loss of each epoch."""
    if same_blur:  # sigmas that scale to theirs at SIZE pixels
        augment.BLUR_SIGMA = tuple(sigma * 224 / SIZE for sigma in augment.BLUR_SIGMA)
        augment.blur_taps = partial(lambda size: 6)
    flags = {
        "data": data, "output": output / "run", "arch": "resnet10", "image-size": SIZE, "batch-size": BATCH,
        "bn-batch": BATCH, "queue-size": QUEUE, "encoder-momentum": MOMENTUM, "lr": LR, "epochs": EPOCHS,
        "workers": 1, "seed": seed, "knn-every": 0, "log-every": 10**6, "keep": 1, "shuffle-window": IMAGES,
    }  # fmt: skip
    sys.argv = ["train_moco.py", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    sys.argv += ["--resume"] if (output / "run" / "checkpoints").exists() else []
    train_moco.main()
    lines = map(json.loads, (output / "run" / "metrics.jsonl").read_text().splitlines())
    (output / "losses.json").write_text(json.dumps([line["loss"] for line in lines]))


# ---- both


def run(side, official, data, seed, output):
    """Train one side with one seed and probe its backbone, unless that is done: (losses by epoch, results)."""
    output.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    call = partial(subprocess.run, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    if not (output / "losses.json").exists():
        call([sys.executable, __file__, official, data, "--one", side, "--seeds", str(seed), "--output", output])
    if not (output / "probe" / "results.json").exists():
        backbone = output / "official.pth.tar" if side == "official" else output / "run"
        probe = [
            "linear_probe.py",
            "--backbone",
            backbone,
            "--data",
            data,
            "--output",
            output / "probe",
            "--workers",
            1,
        ]
        probe += ["--image-size", SIZE, "--knn", 200, "--epochs", 10, "--cached-features", "--seed", seed]
        call([sys.executable, *map(str, probe)])
    return json.loads((output / "losses.json").read_text()), json.loads((output / "probe" / "results.json").read_text())


def draw(path, found, seeds):
    """The loss of each epoch, a line a seed, and kNN accuracies as dots."""
    figure, (losses, knn) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1), layout="constrained")
    for i, (side, name) in enumerate(SIDES.items()):
        color = f"C{i}"
        for seed in seeds:
            curve, results = found[side, seed]
            label = name if seed == seeds[0] else None
            losses.plot(range(1, len(curve) + 1), curve, color=color, label=label, linestyle="--" if i == 2 else "-")
            knn.plot(i, results["knn"]["200"]["top1"], "o", color=color)
    losses.set(xlabel="epoch", ylabel="loss, mean of the epoch")
    losses.legend()
    knn.set_xticks(range(len(SIDES)), SIDES.values(), rotation=20, ha="right")
    knn.set_ylabel("kNN top-1, % (a dot a seed)")
    for ax in (losses, knn):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("official", type=Path, help="a checkout of the official code")
    parser.add_argument("data", type=Path, help="what benchmarks/fashion_mnist.py wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "official", help="[runs/official]")
    args = parser.parse_args()
    if args.one == "official":
        return run_official(args.official, args.data, args.seeds[0], args.output)
    if args.one:
        return run_ours(args.data, args.seeds[0], args.output, args.one == "same blur")
    data = subset(args.data, args.output / "data")
    jobs = [(side, seed) for seed in args.seeds for side in SIDES]
    found = {}
    for side, seed in tqdm(jobs, unit="run"):
        folder = args.output / f"{side.replace(' ', '-')}-seed{seed}"
        found[side, seed] = run(side, args.official.resolve(), data.resolve(), seed, folder.resolve())
    print(
        f"\n{IMAGES} images, {EPOCHS} epochs, seeds {args.seeds}; chance is log(1 + {QUEUE}) = {np.log(1 + QUEUE):.2f}"
    )
    print("| | loss of the last epoch | kNN 200, % | linear, cached features, % |\n|---|---|---|---|")
    for side, name in SIDES.items():
        columns = zip(*((c[-1], r["knn"]["200"]["top1"], r["top1"]) for c, r in (found[side, s] for s in args.seeds)))
        shown = [f"{mean(v):.2f}" + (f" ± {stdev(v):.2f}" if len(v) > 1 else "") for v in columns]
        print(f"| {name} | {' | '.join(shown)} |")
    draw(args.output / "official.png", found, args.seeds)


if __name__ == "__main__":
    main()
