"""Streaming beside that of `datasets`, with and without a limit of resolves; and what many GPUs would ask of the Hub.

python benchmarks/stream.py             a quarter of an hour on two cores, 400 MB in a temporary folder
python benchmarks/stream.py --scale     only the table for 1 to 512 GPUs, computed

All readers read the same parquet files from a server on loopback, in two processes with one worker each, decode with
the same code and cut the same crops. Runs alternate; medians are printed. `datasets` streams with shuffle and
split_dataset_by_node, as its documentation has it. The first epoch includes the time to open the dataset.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
import moco.data.hub
from benchmarks.data_path import photograph
from moco.augment import AUGMENTATIONS, MEAN, STD, random_crop_boxes
from moco.data.batches import crop_generator
from moco.data.decode import decode_crops
from moco.data.hub import RESOLVES, WINDOW
from moco.data.load import load_splits
from moco.data.order import Order
from moco.data.views import FastViews
from tests.hub import serving

PROCESSES, BATCH, ROWS, SIZE = 2, 64, 200, 224  # ROWS: of a shuffle window
GROUP = 100  # rows, as the Hub's image datasets have them
IMAGENET = (294, 1_281_167, 140e9)  # files, images, bytes
GPU, MACHINE = 2_300, 8  # images/s that one H100 asks for, GPUs in a machine


# ---- the readers: each yields the number of images of every batch of one process, and None after an epoch


def ours(name, rank, epochs, cache=None):
    images, _ = load_splits(name, cache=cache)
    steps = len(images) // BATCH
    batches = FastViews(AUGMENTATIONS["v2"], SIZE, MEAN, STD).batches(
        images, Order(BATCH, 0, rank, PROCESSES, 1, ROWS), 0
    )
    for step, (views, *_) in enumerate(itertools.islice(batches, epochs * steps), 1):
        yield len(views[0])
        if step % steps == 0:
            yield None


def cached(name, rank, epochs):
    return ours(name, rank, epochs, cache=f"{os.environ['HF_HOME']}/row-groups")  # empty at the start of each run


def old(name, rank, epochs):
    """Ours as it once was: each row group is read through an address with /resolve/ in it."""
    moco.data.hub.address_of = lambda path, *_: moco.data.hub.resolve_url(path)
    return ours(name, rank, epochs)


def theirs(name, rank, epochs):
    images = datasets.load_dataset(name, split="train", streaming=True)
    images = images.cast_column("image", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=ROWS)
    images = split_dataset_by_node(images, rank, PROCESSES)

    def crops(rows):
        views = torch.empty(len(rows), 2, SIZE, SIZE, 3, dtype=torch.uint8)
        for i, row in enumerate(rows):
            boxes = functools.partial(random_crop_boxes, rng=crop_generator(0, 0, i))
            views[i] = torch.stack(decode_crops(row["image"], boxes, SIZE))
        return views

    options = {"num_workers": 1, "prefetch_factor": 4, "drop_last": True, "collate_fn": crops}
    for epoch in range(epochs):
        images.set_epoch(epoch)
        yield from map(len, DataLoader(images, BATCH // PROCESSES, **options))
        yield None


READERS = {"ours": ours, "cached": cached, "old": old, "datasets": theirs}


def read_epochs(reader, name, epochs):
    """In one of the processes under torchrun: read epochs, and print [images, seconds] of each."""
    rank, started, images = PartialState(cpu=True).process_index, time.perf_counter(), 0
    for batch in READERS[reader](name, rank, int(epochs)):
        images += batch or 0
        if batch is None:
            PartialState().wait_for_everyone()
            print(f"{[images, time.perf_counter() - started]}\n", end="", flush=True)  # at once, as others print, too
            started, images = time.perf_counter(), 0


def measure(hub, reader, name, epochs=2):
    """[(images/s of all processes together, bytes that the server sent), ...] of the epochs, with empty caches."""
    hub.sent.clear()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    command += [__file__, "--child", reader, name, str(epochs)]
    found, lines, before = [], [], 0
    with tempfile.TemporaryDirectory() as home:
        environment = {"HF_HOME": home, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | hub.environment
        process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("["):
                lines.append(json.loads(line))
            if len(lines) == PROCESSES:
                (images, seconds), sent = zip(*lines), sum(hub.sent.values())
                found.append((sum(images) / max(seconds), sent - before))
                lines, before = [], sent
        assert process.wait() == 0 and len(found) == epochs
    return found


def write_files(folder, files, groups, images):
    """Write parquet files that hold `images` again and again, as links to one file; returns the bytes of all."""
    folder.mkdir(parents=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    column = [{"bytes": data, "path": None} for data in itertools.islice(itertools.cycle(images), groups * GROUP)]
    table = pa.table({"image": column, "label": [0] * len(column)}, schema=features.arrow_schema)
    first, *others = [folder / f"train-{file:05}-of-{files:05}.parquet" for file in range(files)]
    pq.write_table(table, first, row_group_size=GROUP, compression="none", use_dictionary=False)
    for other in others:
        os.link(first, other)
    return files * first.stat().st_size


def compare(hub, name, size, repeats):
    """Print speed and bytes of both epochs, with a cache and beside `datasets`. size: bytes of the files."""
    readers = ("cached", "datasets")
    runs = [[measure(hub, reader, name) for reader in readers] for _ in range(repeats)]
    for epoch in (0, 1):
        speeds, sent = ([median(run[i][epoch][k] for run in runs) for i in (0, 1)] for k in (0, 1))
        words = [f"{name} {v:.0f} images/s, {b / size:.2f} of the bytes" for name, v, b in zip(readers, speeds, sent)]
        print(f"  epoch {epoch + 1}: {'; '.join(words)}; ratio of speeds {speeds[0] / speeds[1]:.2f}", flush=True)


def compare_limit(hub, name, repeats):
    """Print the speed of an epoch while the Hub answers as many resolves for a row group as it does for one H100."""
    [(free, _)], seconds = measure(hub, "ours", name, epochs=1), 5
    allowed = round(free * seconds * (RESOLVES / WINDOW) / GPU)
    print(f"{free:.0f} images/s without a limit; now {allowed} resolves in {seconds} seconds", flush=True)
    found = {reader: [] for reader in ("ours", "old", "datasets")}
    for reader in list(found) * repeats:
        hub.resolved.clear()
        hub.limit = (allowed, seconds)
        [(speed, _)] = measure(hub, reader, name, epochs=1)
        hub.limit = None
        found[reader].append((speed, len(hub.resolved)))
    for reader, values in found.items():
        speed, resolves = map(median, zip(*values))
        print(f"  {reader:8} {speed:.0f} images/s, {resolves:.0f} resolves of parquet files", flush=True)


def network_share(machines, epochs, room):
    """Bytes that all machines together read from the network, in sizes of the dataset.

    In each epoch a machine reads its part of a new order, as the plan has it. room: the share of the data that its
    cache holds, which keeps what came first.
    """
    groups = IMAGENET[1] // GROUP
    have, read = np.zeros((machines, groups), bool), 0
    for epoch in range(epochs):
        order = np.random.default_rng([*b"groups", 0, epoch]).permutation(groups)
        for mine, part in zip(have, np.array_split(order, machines)):
            new = part[~mine[part]]
            read += len(new)
            mine[new[: max(0, int(room * groups) - int(mine.sum()))]] = True
    return read / groups


def print_scale():
    """Print requests and bytes of 200 epochs of ImageNet on 1 to 512 GPUs, as a table in Markdown."""
    files, images, size = IMAGENET
    print("| GPUs | an epoch | resolves in 5 minutes: one a row group | one a file: at first, later | GB/s", end="")
    print(" | TB without a cache | with 35 GB a machine | with 140 GB |\n" + "|---" * 8 + "|")
    for gpus in (1, 8, 64, 512):
        machines, speed = -(-gpus // MACHINE), gpus * GPU
        later = machines * files * WINDOW / 3_600  # seconds that an address lives
        words = [f"{gpus}", f"{images / speed:.0f} s", f"{speed / GROUP * WINDOW:,.0f}"]
        words += [f"{machines * files:,}, {later:,.0f}", f"{speed * size / images / 1e9:.2f}"]
        words += [f"{size / 1e12 * network_share(machines, 200, room):.2f}" for room in (0, 0.25, 1)]
        print(f"| {' | '.join(words)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, metavar="N", default=3, help="runs of each reader [%(default)s]")
    parser.add_argument("--scale", action="store_true", help="only compute what many GPUs ask for")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # what this script starts: a reader, data, epochs
    args = parser.parse_args()
    if args.child:
        return read_epochs(*args.child)
    print_scale()
    if args.scale:
        return
    with tempfile.TemporaryDirectory() as root, serving(root) as hub:
        rng, folder = np.random.default_rng(0), Path(root) / "datasets" / "some"
        images = [photograph(500, 375, 93, rng) for _ in range(50)]  # about 110 kB, as ImageNet's are on average
        print(f"images of {mean(map(len, images)) / 1000:.0f} kB in row groups of {GROUP}")
        for files, latency in ((24, 0), (25, 0), (24, 0.05)):
            name, hub.latency = f"{files}-{latency}", latency
            print(f"{files} files, {PROCESSES} processes, {1000 * latency:.0f} ms a request", flush=True)
            compare(hub, f"some/{name}", write_files(folder / name, files, 2, images), args.repeats)
        hub.latency = 0
        write_files(folder / "long", 4, 12, images)
        compare_limit(hub, "some/long", args.repeats)


if __name__ == "__main__":
    main()
