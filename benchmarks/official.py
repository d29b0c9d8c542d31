"""The official code beside ours: learning curves, and the ladder of recipes, with the same settings on the same data.

git clone https://github.com/facebookresearch/moco official && git -C official checkout 132aea9
python benchmarks/official.py official shapes --ladder                  every recipe on the built-in data, six hours
python benchmarks/fashion_mnist.py runs/fashion-mnist
python benchmarks/official.py official runs/fashion-mnist               learning curves on photographs

Theirs: MoCo, the training loop, the learning rate and the blur of that commit, on gloo processes; `.cuda()` does
nothing there, and their accuracy, which fails on today's PyTorch, is not computed. Ours: train_moco.py. Both train the
same small ResNet at 32 pixels in batches of 128, and a process of theirs is a BatchNorm group of ours: one for the
curves, two for the ladder. Each has its own random numbers and its own augmentation. Our scripts probe both. The
recipe's blur is meant for 224 pixels: ours scales it with the image, theirs does not. In the ladder theirs is scaled,
too; for the curves theirs is left alone, and ours is also run with theirs. A second call continues where the first
stopped. At the end it prints a table and draws it in its output.
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
from datasets import Image, load_dataset
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import moco.augment as augment
import train_moco
from benchmarks.data_path import standard_transform
from benchmarks.figures import draw_ladder
from moco.augment import MEAN, STD
from moco.data.shapes import shapes_dataset
from moco.encoder import build_resnet

ROOT = Path(__file__).parent.parent
SIZE, BATCH, WEIGHT_DECAY = 32, 128, 1e-4
CURVES = {"steps": 936, "queue_size": 4096, "encoder_momentum": 0.99, "lr": 0.03, "groups": 1}  # 12 epochs of IMAGES
LADDER = {"steps": 1840, "queue_size": 512, "encoder_momentum": 0.998, "lr": 0.015, "groups": 2}  # as --data shapes
IMAGES = 10_000  # of Fashion-MNIST
RECIPES = [recipe for recipe in train_moco.RECIPES if recipe != "simclr"]
SIDES = {"official": "the official code", "same blur": "ours, with its blur", "ours": "ours"}


def subset(data, folder):
    """The first IMAGES of the training data, and all of the test data, as parquet files in `folder`."""
    if not (folder / "test.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(Path(data) / "train.parquet").slice(0, IMAGES), folder / "train.parquet")
        pq.write_table(pq.read_table(Path(data) / "test.parquet"), folder / "test.parquet")
    return folder


def training_images(data):
    """The training split of a folder of parquet files, or of the built-in data, as a Hugging Face dataset."""
    if data == "shapes":
        return shapes_dataset("train").cast_column("image", Image())
    return load_dataset(str(data), split="train")


def epochs_of(images, settings):
    return round(settings["steps"] / (len(images) // BATCH))


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


def official_transform(recipe, blur):
    """The transforms of a view, which are inside their main, with a size of 224."""
    if train_moco.RECIPES[recipe]["augment"] == "v2":
        return standard_transform(SIZE, blur)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
            transforms.RandomGrayscale(p=0.2),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class Views(torch.utils.data.Dataset):
    """What their ImageFolder would give: two transformed views and a label."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.transform(self.images[row]["image"].convert("RGB")), 0


def run_official(folder, images, recipe, seed, output, settings, scaled_blur):
    """Train with their code, one of the processes; the first leaves a checkpoint and the mean loss of each epoch."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    main_moco, builder, loader = load_official(folder)
    main_moco.accuracy = lambda output, target, topk: [torch.zeros(1) for _ in topk]
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for set_seed in (torch.manual_seed, np.random.seed, main_moco.random.seed):
        set_seed(seed + 1000 * rank)  # DistributedDataParallel gives all of them the first's weights and queue
    blur = loader.GaussianBlur([sigma * (SIZE / 224 if scaled_blur else 1) for sigma in (0.1, 2.0)])
    views = Views(images, loader.TwoCropsTransform(official_transform(recipe, blur)))
    sampler = DistributedSampler(views, seed=seed)
    batches = DataLoader(views, BATCH // processes, sampler=sampler, num_workers=1, drop_last=True)
    # Their builder makes both heads' hidden layer by itself, so the encoder comes with one linear layer.
    encoder = lambda num_classes: build_resnet("resnet10", num_classes, bn_batch=None)  # noqa: E731
    ours, epochs = train_moco.RECIPES[recipe], epochs_of(images, settings)
    sizes = settings["queue_size"], settings["encoder_momentum"], ours["temperature"]
    model = torch.nn.parallel.DistributedDataParallel(builder.MoCo(encoder, 128, *sizes, mlp=ours["head"] == "mlp"))
    optimizer = torch.optim.SGD(model.parameters(), settings["lr"], momentum=0.9, weight_decay=WEIGHT_DECAY)
    args = argparse.Namespace(lr=settings["lr"], cos=ours["schedule"] == "cosine", epochs=epochs, gpu=0)
    args.schedule, args.print_freq = [0.6 * epochs, 0.8 * epochs], 10**9
    losses, criterion = [], torch.nn.CrossEntropyLoss()

    def keep_loss(logits, labels):
        losses.append(criterion(logits, labels))
        return losses[-1]

    means = []
    for epoch in tqdm(range(epochs), unit="epoch", disable=rank > 0):
        sampler.set_epoch(epoch)
        main_moco.adjust_learning_rate(optimizer, epoch, args)
        with redirect_stdout(sys.stderr):
            main_moco.train(batches, model, keep_loss, optimizer, epoch, args)
        total = torch.stack(losses).detach().mean()
        torch.distributed.all_reduce(total)
        means.append(total.item() / processes)
        losses.clear()
    if rank == 0:
        torch.save({"epoch": epochs, "arch": "resnet10", "state_dict": model.state_dict()}, output / "official.pth.tar")
        (output / "losses.json").write_text(json.dumps(means))


# ---- our side


def run_ours(data, images, recipe, seed, output, settings, same_blur):
    """Train with train_moco.py, a line of the log an epoch, and leave the mean loss of each epoch."""
    if same_blur:  # sigmas that scale to theirs at SIZE pixels
        augment.BLUR_SIGMA = tuple(sigma * 224 / SIZE for sigma in augment.BLUR_SIGMA)
        augment.blur_taps = partial(lambda size: 6)
    flags = {
        "data": data, "output": output / "run", "recipe": recipe, "arch": "resnet10", "image-size": SIZE,
        "batch-size": BATCH, "bn-batch": BATCH // settings["groups"], "queue-size": settings["queue_size"],
        "encoder-momentum": settings["encoder_momentum"], "lr": settings["lr"], "weight-decay": WEIGHT_DECAY,
        "epochs": epochs_of(images, settings), "workers": 1, "seed": seed, "knn-every": 0, "log-every": 10**6,
        "keep": 1, "checkpoint-every": 230, "shuffle-window": len(images),
    }  # fmt: skip
    sys.argv = ["train_moco.py", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    sys.argv += ["--resume"] if any(output.glob("run/checkpoints/step_*/state.json")) else []
    train_moco.main()
    lines = map(json.loads, (output / "run" / "metrics.jsonl").read_text().splitlines())
    (output / "losses.json").write_text(json.dumps([line["loss"] for line in lines]))


# ---- both


def run(side, official, data, ladder, recipe, seed, output):
    """Train one side with one seed and probe its backbone, unless that is done: (losses by epoch, results)."""
    output.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    call = partial(subprocess.run, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    if not (output / "losses.json").exists():
        job = ["--one", side, "--recipes", recipe, "--seeds", str(seed), "--output", output]
        job += ["--ladder"] if ladder else []
        processes = (LADDER if ladder else CURVES)["groups"]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        call([sys.executable, *(launcher if side == "official" else []), __file__, official, data, *job])
    if not (output / "probe" / "results.json").exists():
        backbone = output / "official.pth.tar" if side == "official" else output / "run"
        probe = ["--backbone", backbone, "--data", data, "--output", output / "probe", "--workers", 1, "--seed", seed]
        probe += ["--image-size", SIZE, "--knn", 200]
        probe += ["--epochs", 20] if ladder else ["--epochs", 10, "--cached-features"]
        probe += ["--resume"] if any(output.glob("probe/checkpoints/step_*/state.json")) else []
        call([sys.executable, "linear_probe.py", *map(str, probe)])
    return json.loads((output / "losses.json").read_text()), json.loads((output / "probe" / "results.json").read_text())


def print_table(found, rows, seeds):
    """rows: {name: (side, recipe)}. found: what `run` returned for (side, recipe, seed)."""
    print("| | n | loss of the last epoch | kNN 200, % | linear, % |\n|---|---|---|---|---|")
    for name, row in rows.items():
        columns = zip(*((c[-1], r["knn"]["200"]["top1"], r["top1"]) for c, r in (found[*row, s] for s in seeds)))
        shown = [f"{mean(v):.2f}" + (f" ± {stdev(v):.2f}" if len(v) > 1 else "") for v in columns]
        print(f"| {name} | {len(seeds)} | {' | '.join(shown)} |")


def draw(path, found, seeds):
    """The loss of each epoch, a line a seed, and kNN accuracies as dots."""
    figure, (losses, knn) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1), layout="constrained")
    for i, (side, name) in enumerate(SIDES.items()):
        color = f"C{i}"
        for seed in seeds:
            curve, results = found[side, "v2", seed]
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
    parser.add_argument("data", help="what benchmarks/fashion_mnist.py wrote; with --ladder 'shapes' or a folder")
    parser.add_argument("--ladder", action="store_true", help="every recipe, with the settings of the built-in data")
    parser.add_argument("--recipes", choices=RECIPES, nargs="+", help="of the ladder [all]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="[runs/official, runs/ladder-DATA]")
    args = parser.parse_args()
    settings = LADDER if args.ladder else CURVES
    if args.one:
        images, (recipe,), (seed,) = training_images(args.data), args.recipes, args.seeds
        if args.one == "official":
            return run_official(args.official, images, recipe, seed, args.output, settings, args.ladder)
        return run_ours(args.data, images, recipe, seed, args.output, settings, args.one == "same blur")
    name = f"ladder-{Path(args.data).name}" if args.ladder else "official"
    output = (args.output or ROOT / "runs" / name).resolve()
    data = args.data if args.ladder else subset(args.data, output / "data")
    recipes = (args.recipes or RECIPES) if args.ladder else ["v2"]
    sides = [side for side in SIDES if not (args.ladder and side == "same blur")]
    jobs = [(side, recipe, seed) for seed in args.seeds for side in sides for recipe in recipes]
    found = {}
    for side, recipe, seed in tqdm(jobs, unit="run"):
        folder = output / f"{side.replace(' ', '-')}-{recipe}-seed{seed}"
        data_there = data if data == "shapes" else Path(data).resolve()
        found[side, recipe, seed] = run(side, args.official.resolve(), data_there, args.ladder, recipe, seed, folder)
    rows = {f"{recipe}, {SIDES[side]}": (side, recipe) for recipe in recipes for side in sides}
    chance = np.log(1 + settings["queue_size"])
    print(f"\n{settings['steps']} steps, seeds {args.seeds}; a loss of {chance:.2f} is chance")
    print_table(found, rows, args.seeds)
    if not args.ladder:
        return draw(output / "official.png", found, args.seeds)
    series = {}
    for side in sides:  # rows are named as in ablation.py: v1 + mlp
        of_recipe = {recipe: [found[side, recipe, seed][1]["top1"] for seed in args.seeds] for recipe in recipes}
        series[SIDES[side]] = {recipe.replace("-", " + "): values for recipe, values in of_recipe.items()}
    draw_ladder(output / "ladder.png", series)


if __name__ == "__main__":
    main()
