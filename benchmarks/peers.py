"""Ours beside the official transforms and lightly (MoCoV2Transform, its MoCo v2 step): processor time on one thread.

pip install -r benchmarks/requirements-peers.txt
python benchmarks/peers.py            all of it, about twenty minutes
python benchmarks/peers.py data       a JPEG file to two finished views: decoding, crops, colours, blur, normalisation
python benchmarks/peers.py step       a training step on images that are there
python benchmarks/peers.py epoch      both: files in, a step for each batch

Everybody does the whole work: views come out as float tensors of a batch, and both steps make one update of MoCo v2
with the same encoder, queue and batch. All take turns in one process; ratios are medians of the rounds', above 1 where
the first of ours is faster. Processor time leaves out what a machine does besides.
"""

import argparse
import copy
import io
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import lightly
import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.data_path import photograph, standard_transform
from benchmarks.step import our_step
from moco.augment import AUGMENTATIONS, MEAN, STD, augment, random_crop_boxes, sample_params
from moco.data.decode import decode_crops
from moco.encoder import build_encoder

QUEUE = 4096


def take_turns(calls, rounds):
    """{name: seconds of processor time of each round}, after a round that does not count."""
    times = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:  # nobody is always the first
            started = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - started)
    return {name: values[1:] for name, values in times.items()}


def print_ratios(what, times, images):
    """Images/s of each, and how many times as fast ours is."""
    ours = next(name for name in times if name.startswith("ours"))
    for name, seconds in times.items():
        ratio = median(theirs / own for theirs, own in zip(seconds, times[ours]))
        print(f"| {what} | {name} | {images / median(seconds):.1f} | {ratio:.2f} |", flush=True)


# ---- files to views


def pillow_views(files, transform):
    """Two views of each file by transforms of Pillow images, as two float batches."""
    pairs = []
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            image = image.convert("RGB")
        pairs.append(transform(image))
    return [torch.stack(views) for views in zip(*pairs)]


def our_views(files, size, step=0):
    rng, n = np.random.default_rng(step), len(files)
    crops = [decode_crops({"bytes": data, "path": None}, partial(random_crop_boxes, rng=rng), size) for data in files]
    params = sample_params(AUGMENTATIONS["v2"], n, 0, step)
    return augment([torch.stack(views) for views in zip(*crops)], params, MEAN, STD)


def view_makers(size):
    """{name: function of JPEG files that makes two views of each}."""
    standard = standard_transform(size)
    return {
        "official transforms": partial(pillow_views, transform=lambda image: (standard(image), standard(image))),
        f"lightly {lightly.__version__}": partial(pillow_views, transform=MoCoV2Transform(input_size=size)),
        "ours": partial(our_views, size=size),
    }


def compare_data(rounds):
    print("\n| two views of a JPEG file | | images/s | ours is x times as fast |\n|---|---|---|---|")
    rng = np.random.default_rng(0)
    for width, height, quality, size in ((500, 375, 92, 224), (1600, 1200, 90, 224), (48, 48, 90, 32)):
        files = [photograph(width, height, quality, rng) for _ in range(16)]
        calls = {name: partial(make, files) for name, make in view_makers(size).items()}
        print_ratios(f"{width} x {height}, views of {size}", take_turns(calls, rounds), len(files))


# ---- the step


def lightly_step(arch, size, batch, precision):
    """A function that takes the step of lightly's MoCo v2 example, on its own images unless it is given others."""
    torch.manual_seed(0)
    encoder = build_encoder(arch, head="fc")
    width = encoder.width
    backbone = nn.Sequential(*list(encoder.backbone.children())[:-1], nn.Flatten())
    query = nn.Sequential(backbone, MoCoProjectionHead(width, width, 128))
    key = copy.deepcopy(query)
    deactivate_requires_grad(key)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, 128))
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(2, batch, 3, size, size)

    def step(views=images):
        update_momentum(query, key, m=0.999)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            q = query(views[0])
            with torch.no_grad():
                shuffled, order = batch_shuffle(views[1])
                k = batch_unshuffle(key(shuffled), order)
        criterion(q.float(), k.float()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_steps(rounds, archs=("resnet18",)):
    print("\n| a step | | images/s | ours is x times as fast |\n|---|---|---|---|")
    for arch in archs:
        for size, batch in ((64, 64), (32, 128)):
            for precision in ("float32", "bf16"):
                steps = {f"lightly {lightly.__version__}": lightly_step(arch, size, batch, precision)}
                steps["ours, one group"] = our_step(arch, size, batch, QUEUE, precision, batch)
                steps["ours, groups of 32"] = our_step(arch, size, batch, QUEUE, precision, 32)
                what = f"{arch}, {size} pixels, batch {batch}, {precision}"
                print_ratios(what, take_turns(steps, rounds), batch)


def compare_epochs(rounds, size=32, batch=64):
    """Files in, steps out: what an epoch consists of, for one batch."""
    print("\n| files and a step | | images/s | ours is x times as fast |\n|---|---|---|---|")
    files = [photograph(48, 48, 90, np.random.default_rng(i)) for i in range(batch)]
    makers, peer = view_makers(size), f"lightly {lightly.__version__}"
    steps = {
        peer: lightly_step("resnet18", size, batch, "float32"),
        "ours": our_step("resnet18", size, batch, QUEUE, "float32", batch),
    }
    calls = {name: partial(lambda make, step: step(make(files)), makers[name], step) for name, step in steps.items()}
    print_ratios(f"48 x 48, views of {size}, resnet18, batch {batch}", take_turns(calls, rounds), batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("what", nargs="*", choices=[[], "data", "step", "epoch"], help="[all]")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for what, compare in (("data", compare_data), ("step", compare_steps), ("epoch", compare_epochs)):
        if not args.what or what in args.what:
            compare(args.rounds)


if __name__ == "__main__":
    main()
