"""Streaming beside `datasets`' own and beside a resolve for each row group; rows of downloaded files; what scales.

python benchmarks/stream.py             a quarter of an hour on two cores, 400 MB in a temporary folder
python benchmarks/stream.py --scale     only the table for 1 to 512 GPUs, computed

Readers read the same parquet files from a server on loopback in two processes with one worker each, decode with the
same code and cut the same crops; runs alternate; medians. `datasets` streams with shuffle and split_dataset_by_node, as
its documentation has it. Two epochs are read whole, the first from the name of the dataset to its last batch. Our bytes
of an epoch have in them the first window of the next one, which is read ahead.
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
import moco.hub
from moco.augment import random_crop_boxes
from moco.batches import CropPairs, crop_generator, train_batches
from moco.data import IndexedImages, load_splits, select_columns
from moco.decode import decode_crops
from moco.hub import ADDRESS_LIFE, RENEW_AT, RESOLVES, WINDOW
from moco.shapes import encode_jpeg
from moco.stream import read_footer, read_footers, worker_windows
from tests.hub import serving

PROCESSES, BATCH, ROWS, SIZE = 2, 64, 200, 224  # ROWS: of a shuffle window
GROUP = 100  # rows, as the Hub's image datasets have them
IMAGENET = (294, 1_281_167, 140e9)  # files, images, bytes
GPU, MACHINE = 2_300, 8  # images/s that one H100 asks for, GPUs in a machine


# ---- the readers, a process's epochs each: yields the number of images of a batch, and None after an epoch


def ours(name, rank, epochs, cache=None):
    images, _ = load_splits(name, cache=cache)
    steps = len(images) // BATCH
    rows = itertools.islice(images.training_rows(BATCH, 0, 0, rank, PROCESSES, 1, ROWS), epochs * steps)
    for step, (views, _) in enumerate(train_batches(images, SIZE, 0, "v2", rows, 1), 1):
        yield len(views)
        if step % steps == 0:
            yield None


def kept(name, rank, epochs):
    """Ours with a cache, which is in HF_HOME as it is empty in each run."""
    return ours(name, rank, epochs, cache=f"{os.environ['HF_HOME']}/kept")


def through(name, rank, epochs):
    """Ours as it was: each row group through an address with /resolve/ in it."""
    moco.hub.address_of = lambda *arguments: None
    return ours(name, rank, epochs)


def theirs(name, rank, epochs):
    images = datasets.load_dataset(name, split="train", streaming=True)
    images = images.cast_column("image", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=ROWS)
    images = split_dataset_by_node(images, rank, PROCESSES)

    def crops(rows):
        views = torch.empty(len(rows), 2, SIZE, SIZE, 3, dtype=torch.uint8)
        for i, row in enumerate(rows):
            boxes = functools.partial(random_crop_boxes, rng=crop_generator(0, 0, i))
            views[i] = decode_crops(row["image"], boxes, SIZE)
        return views

    n = BATCH // PROCESSES
    for epoch in range(epochs):
        images.set_epoch(epoch)
        for views in DataLoader(images, n, num_workers=1, prefetch_factor=4, drop_last=True, collate_fn=crops):
            yield len(views)
        yield None


def read_epochs(reader, name, epochs):
    """In one of the processes under torchrun: read epochs, and print the images and seconds of each."""
    rank, started, images = PartialState(cpu=True).process_index, time.perf_counter(), 0
    for batch in reader(name, rank, epochs):
        images += batch or 0
        if batch is None:
            PartialState().wait_for_everyone()
            line = json.dumps({"images": images, "seconds": time.perf_counter() - started})
            print(f"{line}\n", end="", flush=True)  # at once, as another process prints, too
            started, images = time.perf_counter(), 0


def start(hub, command):
    """Run Python on the server's data, with nothing in its caches; yields its lines of JSON as they are printed."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {"HF_HOME": cache, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | hub.environment
        command = [sys.executable, *command]
        process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        yield from (json.loads(line) for line in process.stdout if line[0] in "{[")
        assert process.wait() == 0


def measure(hub, reader, name, epochs=2):
    """[(images/s of all processes together, bytes that the server sent), ...] of the epochs."""
    hub.sent.clear()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    found, told, before = [], [], 0
    for line in start(hub, [*launch, __file__, "--child", reader, name, str(epochs)]):
        told.append(line)
        if len(told) == PROCESSES:
            sent = sum(hub.sent.values())
            found.append((sum(line["images"] for line in told) / max(line["seconds"] for line in told), sent - before))
            told, before = [], sent
    assert len(found) == epochs
    return found


# ---- data


def photographs(count):
    """JPEGs of 500 x 375 pixels and about 110 kB, as ImageNet's are on average: noise of a photograph's spectrum."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(500), np.fft.fftfreq(375)))[..., None]
    for _ in range(count):
        spectrum = np.fft.fft2(rng.standard_normal((375, 500, 3)), axes=(0, 1)) / np.maximum(frequency, 1e-3) ** 1.05
        pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
        yield encode_jpeg((127 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))


def write_files(folder, files, groups, images, compression="none"):
    """Parquet files of `groups` row groups each that hold the JPEGs `images` again and again; links to one file."""
    folder.mkdir(parents=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    rows = itertools.cycle({"bytes": data, "path": None} for data in images)
    column = list(itertools.islice(rows, groups * GROUP))
    table = pa.table({"image": column, "label": [0] * len(column)}, schema=features.arrow_schema)
    first, *others = [folder / f"train-{file:05}-of-{files:05}.parquet" for file in range(files)]
    options = {"compression": compression, "use_dictionary": compression != "none"}
    pq.write_table(table, first, row_group_size=GROUP, **options)
    for other in others:
        os.link(first, other)


# ---- what is printed


def compare(hub, name, share, repeats):
    """Alternate the readers; print medians and ratios of both epochs. share: bytes of the files."""
    found = {"kept": [], "theirs": []}
    for _ in range(repeats):
        for reader in found:
            found[reader].append(measure(hub, reader, name))
    for epoch in range(2):
        (speed, sent), (other_speed, other_sent) = (
            map(statistics.median, zip(*(run[epoch] for run in runs))) for runs in found.values()
        )
        print(
            f"  epoch {epoch + 1}: {speed:4.0f} images/s, {sent / share:.2f} of the bytes; datasets {other_speed:4.0f},"
            f" {other_sent / share:.2f}; ratio of speeds {speed / other_speed:.2f}",
            flush=True,
        )


def compare_limit(hub, name, repeats):
    """An epoch while the Hub answers fewer resolves than row groups are read, as many fewer as for one H100."""
    [(free, _)] = measure(hub, "ours", name, epochs=1)
    seconds = 5
    allowed = round(free / GROUP * seconds * (RESOLVES / WINDOW) / (GPU / GROUP))
    print(f"{name}: {free:.0f} images/s without a limit; now {allowed} resolves in {seconds} seconds", flush=True)
    for reader in ("ours", "through", "theirs"):
        speeds, resolves = [], []
        for _ in range(repeats):
            hub.resolved.clear()
            hub.limit = (allowed, seconds)
            [(speed, _)] = measure(hub, reader, name, epochs=1)
            hub.limit = None
            speeds.append(speed)
            resolves.append(len(hub.resolved))
        speed, count = statistics.median(speeds), statistics.median(resolves)
        print(f"  {reader:8} {speed:4.0f} images/s, {count:.0f} resolves of parquet files", flush=True)


def compare_rows(repositories, images, repeats):
    """Milliseconds of a worker for one row, and for its crops, from Arrow files and from parquet files as they are."""
    with tempfile.TemporaryDirectory() as cache:
        moco.hub.huggingface_hub.constants.HF_ASSETS_CACHE = datasets.config.HF_DATASETS_CACHE = cache
        sources = {}
        for compression in ("none", "snappy"):
            folder = repositories / f"rows-{compression}"
            write_files(folder, 1, 20, images, compression)
            started = time.process_time()
            sources[f"parquet, {compression}"], _ = load_splits(str(folder), streaming=False)
            print(f"places in {compression} files: {50 * (time.process_time() - started):.0f} ms of CPU a row group")
        builder = datasets.load_dataset_builder(str(folder), cache_dir=cache)
        builder.download_and_prepare()
        sources["Arrow"] = IndexedImages(select_columns(builder.as_dataset()["train"], "rows", None, None))
        order = np.random.default_rng(0).permutation(20 * GROUP)[:300].tolist()
        times = {name: ([], []) for name in sources}
        for _ in range(repeats):
            for name, source in sources.items():
                crops = functools.partial(CropPairs(source, SIZE, 0).__getitem__, ([(0, row) for row in order], ()))
                for work, spent in zip((lambda rows=source: [rows[row] for row in order], crops), times[name]):
                    spent.append(1000 * seconds_of(work, 1, time.process_time) / len(order))
        for name, (row, crop) in times.items():
            row, crop = statistics.median(row), statistics.median(crop)
            print(f"  {name:16} {row:.3f} ms a row, {crop:.2f} with its crops: {1000 / crop:.0f} images/s", flush=True)


# ---- what scales


def network_share(machines, epochs, room):
    """Bytes that all machines read from the network in so many epochs, in sizes of the data set.

    Each epoch a machine reads its part of a new order, as the plan has it. room: the share of the data that its own
    cache holds, where what came first stays.
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
    """Requests and bytes of 200 epochs of ImageNet on 1 to 512 GPUs, as a table in Markdown."""
    files, images, size = IMAGENET
    print(
        "| GPUs | an epoch | resolves in 5 minutes, one a row group | one a file: at the start, then | GB/s |", end=""
    )
    print(" TB without a cache | with 35 GB a machine | with 140 GB |")
    for gpus in (1, 8, 64, 512):
        machines, speed = -(-gpus // MACHINE), gpus * GPU
        before, later = speed / GROUP * WINDOW, machines * files * WINDOW / (RENEW_AT * ADDRESS_LIFE)
        tera = [size / 1e12 * network_share(machines, 200, room) for room in (0, 0.25, 1)]
        print(f"| {gpus} | {images / speed:.0f} s | {before:,.0f} | {machines * files:,}, {later:,.0f} |", end="")
        print(f" {speed * size / images / 1e9:.2f} | {tera[0]:.1f} | {tera[1]:.1f} | {tera[2]:.1f} |")


# ---- the rest


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


def serve_until_done(repositories, args, hub):
    """Everything that reads from the server."""
    images = list(photographs(50))
    for name, files, groups in (("even", args.files, 2), ("odd", args.files + 1, 2), ("long", 4, 24)):
        write_files(repositories / name, files, groups, images)
    write_files(repositories / "footers", IMAGENET[0], 44, [b"tiny"])
    for latency in (0, 0.05):
        hub.latency = latency
        [(parallel, serial)] = start(hub, [__file__, "--child", "footers", "some/footers", "1"])
        print(
            f"{IMAGENET[0]} footers, {1000 * latency:.0f} ms a request: {parallel:.2f} s at once,"
            f" {serial:.2f} s one after another, ratio {serial / parallel:.1f}",
            flush=True,
        )
    print(f"images of {statistics.mean(map(len, images)) / 1000:.0f} kB in row groups of {GROUP}")
    compare_rows(repositories, images, 5)
    for name, files, latency in (("even", args.files, 0), ("odd", args.files + 1, 0), ("even", args.files, 0.05)):
        hub.latency = latency
        share = sum(path.stat().st_size for path in (repositories / name).iterdir())
        print(f"{files} files, {PROCESSES} processes, {1000 * latency:.0f} ms a request", flush=True)
        compare(hub, f"some/{name}", share, args.repeats)
    hub.latency = 0
    compare_limit(hub, "some/long", args.repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, metavar="N", default=3, help="runs of each reader [%(default)s]")
    parser.add_argument("--files", type=int, metavar="N", default=24, help="parquet files of 200 images [%(default)s]")
    parser.add_argument("--scale", action="store_true", help="only compute what many GPUs ask for")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # what this script starts: a reader, data, epochs
    args = parser.parse_args()
    if args.child:
        function, name, epochs = args.child
        readers = {"ours": ours, "kept": kept, "through": through, "theirs": theirs}
        open_footers(name) if function == "footers" else read_epochs(readers[function], name, int(epochs))
        return

    print_scale()
    if args.scale:
        return
    for world in (1, 8):
        seconds = seconds_of(functools.partial(plan_imagenet, world, 8), 5, time.process_time)
        print(f"an epoch of ImageNet planned for one of {world} processes: {1000 * seconds:.0f} ms of CPU", flush=True)
    with tempfile.TemporaryDirectory() as root, serving(root) as hub:
        serve_until_done(Path(root) / "datasets" / "some", args, hub)


if __name__ == "__main__":
    main()
