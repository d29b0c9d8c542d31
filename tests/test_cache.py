"""Row groups kept on disk: what is read again, limits, kills, damage, a full disk. pytest tests/test_cache.py"""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import namedtuple
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import HANG, assert_same_run, is_time, metrics_of, run_script, start_script, wait_for_step
from hub import serving

from moco.augment import AUGMENTATIONS, MEAN, STD
from moco.data.cache import RowGroupCache
from moco.data.hub import Traffic
from moco.data.load import load_splits, print_costs
from moco.data.order import Order
from moco.data.parquet import ParquetImages, read_footers
from moco.data.views import FastViews
from moco.errors import UserError
from moco.run.checkpoint import read_metrics

PATHS = [f"hf://datasets/some/one@abc/train-{file}-of-3.parquet" for file in range(3)]
LIMIT = 1000  # GB; without one the free space of this machine would decide what is kept
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def hub(parquet_folder, monkeypatch):
    """A server of the files in `parquet_folder` as some/one."""
    with serving(parquet_folder.parents[2]) as server:
        server.here(monkeypatch)
        yield server
    shutil.rmtree(server.root / "HF_ASSETS_CACHE", ignore_errors=True)


def images_of(paths, cache=None, label="label"):
    return ParquetImages(paths, read_footers(paths, Traffic()), "image", label, Traffic(), cache)


@pytest.fixture
def local(parquet_folder):
    """The images that `hub` serves, from their files."""
    return images_of([str(path) for path in sorted(parquet_folder.iterdir())])


def epoch_of(images, epoch):
    """Pixels of one epoch of 9 steps of 8 images, by one worker: of two, both may read the row group between them."""
    views = FastViews(AUGMENTATIONS["v2"], 16, MEAN, STD)
    batches = views.batches(images, Order(8, 0, workers=1, window=20), 9 * epoch)
    return [torch.cat(crops) for crops, *_ in itertools.islice(batches, 9)]


def same(some, others):
    return all(one.equal(other) for one, other in zip(some, others, strict=True))


def kept(cache):
    """{row group in a cache: its size}."""
    files = [path for path in cache.folder.rglob("*") if path.is_file() and path.name[0].isdigit()]
    return {str(path.relative_to(cache.folder)): path.stat().st_size for path in files}


# ---- what is read again


def test_the_second_epoch_asks_the_network_for_nothing(hub, local, tmp_path):
    images = images_of(PATHS, RowGroupCache(tmp_path, LIMIT))
    assert same(epoch_of(images, 0), epoch_of(local, 0)) and len(hub.reads) == 3 + 9
    asked = (len(hub.reads), len(hub.requests))
    assert same(epoch_of(images, 1), epoch_of(local, 1)) and (len(hub.reads), len(hub.requests)) == asked
    network, from_cache, *_ = images.traffic.totals()
    assert network == images.epoch_bytes() <= from_cache and len(kept(images.cache)) == 9
    assert "some--one/abc/train-0-of-3.parquet/00002-image-label" in kept(images.cache)


def test_a_cache_of_half_the_size_asks_for_half(hub, tmp_path):
    half = images_of(PATHS).epoch_bytes() / 2
    images = images_of(PATHS, RowGroupCache(tmp_path, half / 1e9))
    for _ in range(3):
        before = images.traffic.totals()[0]
        for group in range(9):
            images.read_group(group)
        assert sum(kept(images.cache).values()) <= half
    largest = max(end - start for group in range(9) for start, end in images.ranges(group))
    assert images.traffic.totals()[0] - before == pytest.approx(half, abs=largest)


def test_without_a_limit_a_tenth_of_the_disk_stays_free(hub, tmp_path, monkeypatch):
    images = images_of(PATHS, RowGroupCache(tmp_path))
    disk = namedtuple("usage", "total used free")
    free = 100_000 + sum(end - start for start, end in images.ranges(0)) + 4
    monkeypatch.setattr("shutil.disk_usage", lambda folder: disk(1_000_000, 0, free - sum(kept(images.cache).values())))
    for group in range(9):
        images.read_group(group)
    assert len(kept(images.cache)) == 1


def test_files_on_this_disk_are_not_kept_again(local, tmp_path):
    images = images_of(local.paths, RowGroupCache(tmp_path, LIMIT))
    assert images[0] and not kept(images.cache)


def test_another_choice_of_columns_is_another_row_group(hub, tmp_path):
    cache = RowGroupCache(tmp_path, LIMIT)
    with_label, without = images_of(PATHS, cache), images_of(PATHS, cache, label=None)
    assert with_label[3]["label"] is not None and without[3] == {"image": with_label[3]["image"]}
    assert {name.rsplit("/")[-1] for name in kept(cache)} == {"00000-image-label", "00000-image"}


def test_no_two_row_groups_have_one_name(tmp_path, parquet_folder):
    files = [
        "a/b.parquet",
        "a--b.parquet",
        "a-/b.parquet",
        "a/-b.parquet",
        "a%2Fb.parquet",
        "图" * 40,
        "图" * 400,
        "图" * 401,
    ]
    cache = RowGroupCache(tmp_path, LIMIT)
    paths = [cache.path_of(f"hf://datasets/some/one@abc/{quote(file)}", "00000-image") for file in files]
    assert len({*paths}) == len(files) and all(len(part) < 256 for path in paths for part in path.parts)
    for number, path in enumerate(paths):
        cache.keep(path, bytes([number]) * 9)
    assert [bytes(cache.read(path, 9))[0] for path in paths] == [*range(len(files))]


def test_columns_with_a_dash_are_other_columns(tmp_path, hub, monkeypatch):
    """Of the columns "a-b" alone, and of "a" with the labels "b"."""
    columns = {"a-b": [b"one"], "a": [b"two"], "b": [3]}
    (hub.root / "datasets" / "some" / "dashes").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), hub.root / "datasets" / "some" / "dashes" / "train.parquet")
    paths, cache = ["hf://datasets/some/dashes@abc/train.parquet"], RowGroupCache(tmp_path, LIMIT)
    footers = read_footers(paths, Traffic())
    for _ in range(2):
        assert ParquetImages(paths, footers, "a-b", None, Traffic(), cache)[0]["image"]["bytes"] == b"one"
        assert ParquetImages(paths, footers, "a", "b", Traffic(), cache)[0]["image"]["bytes"] == b"two"
    assert len(hub.reads) == 3


# ---- several processes, kills


def keep_forever(folder, seed):
    """Write row groups of 20 MB until killed."""
    cache, data = RowGroupCache(folder, LIMIT), random.Random(seed).randbytes(20_000_000)
    for number in itertools.count():
        cache.keep(cache.path_of(PATHS[0], f"{number % 5}-{seed}"), data)
        (cache.folder / "written").touch()
        if number % 5 == 4:
            shutil.rmtree(cache.folder / "some--one")


def test_a_kill_while_writing_leaves_whole_files_or_none(tmp_path):
    cache = RowGroupCache(tmp_path, LIMIT)
    for attempt in range(8):
        process = FORK.Process(target=keep_forever, args=(tmp_path, attempt))
        process.start()
        while not (tmp_path / "written").exists():
            time.sleep(0.001)
        time.sleep(random.Random(attempt).uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        (tmp_path / "written").unlink()
        for name in kept(cache):
            assert len(cache.read(tmp_path / name, 20_000_000)) == 20_000_000
    path = cache.path_of(PATHS[0], "after")
    cache.keep(path, b"whole")
    assert cache.read(path, 5) == b"whole"


def read_all(paths, folder, limit, both, send):
    both.wait()  # to fork while the server hashes for the other one could leave a lock of OpenSSL's locked
    images = images_of(paths, RowGroupCache(folder, limit))
    send.send([images[row]["label"] for row in range(75)])


def test_two_runs_share_a_folder_and_its_limit(hub, local, tmp_path):
    """Both read the same row groups at the same time."""
    hub.latency = 0.05
    limit = images_of(PATHS).epoch_bytes() * 0.8
    ends, both = [FORK.Pipe(duplex=False) for _ in range(2)], FORK.Barrier(2)
    processes = [FORK.Process(target=read_all, args=(PATHS, tmp_path, limit / 1e9, both, send)) for _, send in ends]
    for process in processes:
        process.start()
    for process, (receive, _) in zip(processes, ends):
        process.join(timeout=HANG)
        assert process.exitcode == 0 and receive.recv() == [local[row]["label"] for row in range(75)]
    sizes = kept(RowGroupCache(tmp_path, LIMIT)).values()
    assert limit - max(sizes) <= sum(sizes) <= limit


def keep_many(folder, number):
    cache = RowGroupCache(folder, 0.001)
    for item in range(100):
        cache.keep(cache.path_of(PATHS[0], f"{number}-{item}"), f"{number}-{item}".encode().rjust(4996))


def test_processes_that_write_at_once_spoil_nothing(tmp_path):
    """Four times 100 row groups of 5 kB, of which 1 MB are to be kept."""
    processes = [FORK.Process(target=keep_many, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=HANG)
    cache = RowGroupCache(tmp_path, LIMIT)
    assert len(kept(cache)) == 200 and cache.used() == 1_000_000
    for name in kept(cache):
        assert bytes(cache.read(tmp_path / name, 4996)).decode().strip() == name.rsplit("/")[-1]


# ---- damage, a full disk


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "longer"])
def test_a_damaged_file_is_read_anew_and_said_once(hub, local, tmp_path, capfd, damage):
    images = images_of(PATHS, RowGroupCache(tmp_path, LIMIT))
    expected = [local[row] for row in range(75)]
    assert [images[row] for row in range(75)] == expected
    path = images.cache.path_of(PATHS[1], "00001-image-label")
    data = path.read_bytes()
    flipped = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
    path.write_bytes({"a bit": flipped, "cut": data[:-1000], "empty": b"", "longer": data + b"!"}[damage])
    asked = len(hub.reads)
    for _ in range(2):
        images.last = (None, None)
        assert [images[row] for row in range(75)] == expected
    assert len(hub.reads) == asked + 1 and path.read_bytes() == data
    assert capfd.readouterr().err.count(f"{path} is damaged, and read anew") == 1


def test_a_full_disk_is_said_once_and_the_data_read_without_it(hub, local, tmp_path, capfd):
    (tmp_path / ".partial").symlink_to("/dev/full")
    images = images_of(PATHS, RowGroupCache(tmp_path, LIMIT))
    for epoch in range(2):
        assert same(epoch_of(images, epoch), epoch_of(local, epoch))
    said = [line for line in capfd.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(said) == 1 and "No space left" in said[0] and not kept(images.cache)


def test_a_cache_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache .*file/in cannot be made"):
        RowGroupCache(tmp_path / "file" / "in")
    with pytest.raises(UserError, match="--cache-gb 3 limits --cache, which is missing"):
        load_splits("shapes", cache_gb=3)


# ---- runs


def test_what_an_epoch_asks_for_is_said_and_more_only_where_it_is_too_much(hub, tmp_path, capsys, monkeypatch):
    images, cache = images_of(PATHS), RowGroupCache(tmp_path, 1)
    print_costs(images, None, cache)
    print_costs(images, None, None)
    monkeypatch.setattr("moco.data.load.RESOLVES", 2)
    print_costs(images, None, None)
    asked, kept, again, off, late, _ = capsys.readouterr().out.splitlines()
    assert asked == again == "stream  3 files, 9 row groups, 0.0 GB an epoch; the Hub resolves 3 addresses an hour"
    assert kept == f"cache   {tmp_path}: 0.0 GB are there; of 0.0 GB 0.0 will be kept (the limit)"
    assert off == "cache   off: every epoch reads everything again; --cache FOLDER keeps it"
    assert late == asked + ", 2 in 5 minutes for a free account, so the last are read 5 minutes late"


RUN = [*"--arch resnet10 --image-size 32 --queue-size 40 --dim 16 --mixed-precision no --log-every 1".split()]
RUN += ["--batch-size", 16, "--bn-batch", 8, "--workers", 1, "--shuffle-window", 20, "--knn-every", 0]


def environment_of(hub, output):
    """What lets a script find the server, with nothing in huggingface_hub's caches."""
    return {"HF_HOME": str(output / "huggingface")} | hub.environment


def test_a_run_says_what_it_reads_from_where_and_the_probe_reads_the_same_cache(hub, tmp_path):
    command = ("train_moco.py", "--data", "some/one", "--output", tmp_path / "run", *RUN, "--epochs", 3)
    done = run_script(*command, "--cache", tmp_path / "cache", "--cache-gb", LIMIT, **environment_of(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "stream  3 files, 9 row groups, 0.0 GB an epoch; the Hub resolves 3 addresses an hour\n" in done.stdout
    assert f"cache   {tmp_path / 'cache'}: 0.0 GB are there" in done.stdout
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    size = images_of(PATHS).epoch_bytes() / 1e6
    network, cache, resolves = (
        [sum(line[name] for line in lines[4 * epoch :][:4]) for epoch in range(3)]
        for name in ("network_mb", "cache_mb", "resolves")
    )
    assert network[0] > size and network[2] == 0 and cache[2] > 0 and sum(resolves) == 3
    assert all(line["read_mb_per_second"] >= 0 and line["disk_mb"] == line["refused"] == 0 for line in lines)
    assert {"network_mb", "cache_mb", "read_mb_per_second"} < {key for key in lines[0] if is_time(key)}
    assert "network" in done.stderr and "MB/s" in done.stderr  # in the progress line

    reads, resolved = len(hub.reads), len(hub.resolved)
    command = ("linear_probe.py", "--data", "some/one", "--backbone", tmp_path / "run", "--cache", tmp_path / "cache")
    flags = "--epochs 1 --batch-size 8 --workers 1 --shuffle-window 20 --knn 5".split()
    done = run_script(*command, *flags, **environment_of(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(hub.reads) == reads + 3 and len(hub.resolved) == resolved  # footers, from addresses that were known


@pytest.mark.slow
def test_two_processes_killed_twice_with_a_cache_are_the_run_without_one(hub, parquet_folder, tmp_path):
    flags = [*RUN, "--epochs", 5, "--checkpoint-every", 3]
    output, environment = tmp_path / "run", environment_of(hub, tmp_path)
    for step, resume in ((3, []), (9, ["--resume"])):
        command = ("train_moco.py", "--data", "some/one", "--output", output, *flags, *resume)
        process = start_script(*command, "--cache", tmp_path / "cache", "--cache-gb", LIMIT, processes=2, **environment)
        try:
            wait_for_step(process, output, step)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    done = run_script("train_moco.py", "--output", output, "--resume", processes=2, **environment)
    assert done.returncode == 0, done.stderr
    plain = ("train_moco.py", "--data", parquet_folder, "--output", tmp_path / "plain", *flags)
    done = run_script(*plain, processes=2, **environment)
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(output)) == 20
    assert_same_run(output, tmp_path / "plain")
