"""Streaming beside `datasets`' own: images/s, bytes, footers opened, an epoch planned. Each as a ratio; medians.

python benchmarks/stream.py     ten minutes on two cores, 40 MB in a temporary folder

Both read the same parquet files from a server on loopback in two processes with one worker each, decode with the same
code and cut the same crops; runs alternate. `datasets` streams with shuffle and split_dataset_by_node, as its
documentation has it. Epochs are read whole, the time from the name of the dataset to its last batch. Our bytes have in
them the first window of the next epoch, which is read ahead.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
from moco.augment import random_crop_boxes
from moco.batches import crop_generator, train_batches
from moco.data import load_splits
from moco.decode import decode_crops
from moco.shapes import encode_jpeg
from moco.stream import read_footer, read_footers, worker_windows
from tests.hub import serving

PROCESSES, BATCH, WINDOW, SIZE = 2, 64, 200, 224
GROUP = 100  # rows, as the Hub's image datasets have them
IMAGENET = (294, 1_281_167)  # files, images


# ---- the two readers, a process's epoch each: yields the number of images of a batch


def ours(name, rank):
    images, _ = load_splits(name)
    rows = itertools.islice(images.training_rows(BATCH, 0, 0, rank, PROCESSES, 1, WINDOW), len(images) // BATCH)
    for views, _ in train_batches(images, SIZE, 0, "v2", rows, 1):
        yield len(views)


def theirs(name, rank):
    images = datasets.load_dataset(name, split="train", streaming=True)
    images = images.cast_column("image", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=WINDOW)
    images = split_dataset_by_node(images, rank, PROCESSES)

    def crops(rows):
        views = torch.empty(len(rows), 2, SIZE, SIZE, 3, dtype=torch.uint8)
        for i, row in enumerate(rows):
            boxes = functools.partial(random_crop_boxes, rng=crop_generator(0, 0, i))
            views[i] = decode_crops(row["image"], boxes, SIZE)
        return views

    n = BATCH // PROCESSES
    for views in DataLoader(images, n, num_workers=1, prefetch_factor=4, drop_last=True, collate_fn=crops):
        yield len(views)


def read_epoch(reader, name):
    """In one of the processes under torchrun: read an epoch and print its images and seconds."""
    rank, started = PartialState(cpu=True).process_index, time.perf_counter()
    images = sum(reader(name, rank))
    print(json.dumps({"images": images, "seconds": time.perf_counter() - started}), flush=True)


def start(hub, command):
    """Run Python on the server's data, with nothing in its caches; returns what it prints."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {"HF_HOME": cache, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | hub.environment
        command = [sys.executable, *command]
        return subprocess.run(
            command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout


def measure(hub, reader, name):
    """(images/s of all processes together, bytes that the server sent)."""
    hub.sent.clear()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    lines = start(hub, [*launch, __file__, "--child", reader, name]).splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(told) == PROCESSES
    return sum(line["images"] for line in told) / max(line["seconds"] for line in told), sum(hub.sent.values())


# ---- data


def photographs(count):
    """JPEGs of 500 x 375 pixels and about 110 kB, as ImageNet's are on average: noise of a photograph's spectrum."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(500), np.fft.fftfreq(375)))[..., None]
    for _ in range(count):
        spectrum = np.fft.fft2(rng.standard_normal((375, 500, 3)), axes=(0, 1)) / np.maximum(frequency, 1e-3) ** 1.05
        pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
        yield encode_jpeg((127 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))


def write_files(folder, files, groups, images):
    """Parquet files of `groups` row groups each that hold the JPEGs `images` again and again; links to one file."""
    folder.mkdir(parents=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    rows = itertools.cycle({"bytes": data, "path": None} for data in images)
    column = list(itertools.islice(rows, groups * GROUP))
    table = pa.table({"image": column, "label": [0] * len(column)}, schema=features.arrow_schema)
    first, *others = [folder / f"train-{file:05}-of-{files:05}.parquet" for file in range(files)]
    pq.write_table(table, first, row_group_size=GROUP, use_dictionary=False)
    for other in others:
        os.link(first, other)


# ---- what is printed


def compare(hub, name, share, repeats):
    """Alternate the readers; print medians and ratios. share: bytes of the files."""
    found = {"ours": [], "theirs": []}
    for _ in range(repeats):
        for reader in found:
            found[reader].append(measure(hub, reader, name))
    (speed, sent), (other_speed, other_sent) = (map(statistics.median, zip(*found[reader])) for reader in found)
    print(f"  images/s        {speed:8.0f}   datasets {other_speed:8.0f}   ratio {speed / other_speed:.2f}")
    print(
        f"  bytes/file size {sent / share:8.2f}   datasets {other_sent / share:8.2f}   ratio {sent / other_sent:.2f}",
        flush=True,
    )


def seconds_of(function, repeats, clock=time.perf_counter):
    times = []
    for _ in range(repeats):
        started = clock()
        function()
        times.append(clock() - started)
    return statistics.median(times)


def plan_imagenet(world, workers):
    """Every window of one process's first epoch."""
    groups = np.full(-(-IMAGENET[1] // GROUP), GROUP)
    groups[-1] = IMAGENET[1] % GROUP
    for worker in range(workers):
        windows = worker_windows(groups, 256, 0, 0, 0, world, worker, workers, 800)
        rows = sum(len(rows) for _, rows, _ in itertools.takewhile(lambda window: window[0] == 0, windows))
        assert rows >= IMAGENET[1] // world // workers - 256


def open_footers(name):
    """Print the seconds that a dataset's footers take at once and one after another."""
    api = huggingface_hub.HfApi()
    files = sorted(file for file in api.list_repo_files(name, repo_type="dataset") if file.endswith(".parquet"))
    paths = [f"hf://datasets/{name}@main/{file}" for file in files]
    parallel = seconds_of(lambda: read_footers(paths), 3)
    print(json.dumps([parallel, seconds_of(lambda: [read_footer(path) for path in paths], 3)]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, metavar="N", default=3, help="runs of each reader [%(default)s]")
    parser.add_argument("--files", type=int, metavar="N", default=24, help="parquet files of 200 images [%(default)s]")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # what this script starts: a function, a dataset
    args = parser.parse_args()
    if args.child:
        function, name = args.child
        open_footers(name) if function == "footers" else read_epoch({"ours": ours, "theirs": theirs}[function], name)
        return

    for world in (1, 8):
        seconds = seconds_of(functools.partial(plan_imagenet, world, 8), 5, time.process_time)
        print(f"an epoch of ImageNet planned for one of {world} processes: {1000 * seconds:.0f} ms of CPU", flush=True)
    with tempfile.TemporaryDirectory() as root, serving(root) as hub:
        repositories = Path(root) / "datasets" / "some"
        images = list(photographs(50))
        for name, files in (("even", args.files), ("odd", args.files + 1)):
            write_files(repositories / name, files, 2, images)
        write_files(repositories / "footers", IMAGENET[0], 44, [b"tiny"])
        for latency in (0, 0.05):
            hub.latency = latency
            parallel, serial = json.loads(start(hub, [__file__, "--child", "footers", "some/footers"]))
            print(
                f"{IMAGENET[0]} footers, {1000 * latency:.0f} ms a request: {parallel:.2f} s at once,"
                f" {serial:.2f} s one after another, ratio {serial / parallel:.1f}",
                flush=True,
            )
        print(f"images of {statistics.mean(map(len, images)) / 1000:.0f} kB in row groups of {GROUP}")
        for name, files, latency in (
            ("even", args.files, 0), ("odd", args.files + 1, 0), ("even", args.files, 0.05),
        ):  # fmt: skip
            hub.latency = latency
            share = sum(path.stat().st_size for path in (repositories / name).iterdir())
            print(f"{files} files, {PROCESSES} processes, {1000 * latency:.0f} ms a request", flush=True)
            compare(hub, f"some/{name}", share, args.repeats)


if __name__ == "__main__":
    main()
