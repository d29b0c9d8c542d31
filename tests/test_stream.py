"""Parquet files read by row group: coverage, order, resuming, read-ahead. pytest tests/test_stream.py"""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, run_script, write_parquet, write_three_files
from hub import COMMIT, TOKEN, serving

from moco.augment import AUGMENTATIONS, MEAN, STD
from moco.backbone import load_backbone
from moco.backbone.features import Features
from moco.data.batches import ordered_rows
from moco.data.hub import Traffic
from moco.data.labels import count_classes
from moco.data.load import IndexedImages, load_splits
from moco.data.order import Order, stream_rows
from moco.data.parquet import ParquetImages, read_footer, read_footers
from moco.data.shapes import draw_scene, encode_jpeg
from moco.data.views import FastViews
from moco.errors import UserError
from moco.run.checkpoint import read_metrics

GROUPS = np.array([7, 10, 10, 3, 10, 10, 6, 10, 10, 10, 1, 10, 10, 4])  # rows: 111


def epoch_of_rows(start, steps, world, workers, seed=0, window=20, batch_size=8):
    """Rows of `steps` steps from `start` on, by process: [[[(epoch, row), ...] a step] a process]."""
    rows = [stream_rows(GROUPS, Order(batch_size, seed, rank, world, workers, window), start) for rank in range(world)]
    return [[batch for batch, _ in itertools.islice(process, steps)] for process in rows]


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 3), (2, 1), (2, 4), (4, 2), (8, 5)])
def test_every_epoch_holds_each_image_at_most_once_in_equal_steps(world, workers):
    steps_per_epoch = 111 // 8
    dropped = []
    processes = epoch_of_rows(0, 3 * steps_per_epoch, world, workers)
    assert all(len(batch) == 8 // world for process in processes for batch in process)
    for epoch in range(3):
        steps = [process[epoch * steps_per_epoch :][:steps_per_epoch] for process in processes]
        rows = [row for process in steps for batch in process for row in batch]
        assert {row_epoch for row_epoch, _ in rows} == {epoch}
        assert len(rows) == len(set(rows)) == steps_per_epoch * 8
        dropped.append(frozenset(range(111)) - {row for _, row in rows})
    assert all(len(rows) == 111 % 8 for rows in dropped) and len(set(dropped)) > 1


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 3)])
@pytest.mark.parametrize("start", [1, 5, 13, 14, 30])
def test_a_stream_starts_at_any_step(world, workers, start):
    whole = epoch_of_rows(0, 40, world, workers)
    assert epoch_of_rows(start, 40 - start, world, workers) == [process[start:] for process in whole]


def test_a_process_reads_its_share_and_one_group_more_a_worker():
    """Row groups that the rows of an epoch touch, over all processes and workers, against those there are."""
    groups = np.full(200, 10)
    ends = groups.cumsum()
    for world, workers in [(2, 2), (4, 3)]:
        for rank in range(world):
            touched = set()
            batches = itertools.islice(stream_rows(groups, Order(20, 0, rank, world, workers, 50), 0), 100)
            for step, (batch, _) in enumerate(batches):
                touched |= {(step % workers, int(np.searchsorted(ends, row, "right"))) for _, row in batch}
            assert len(touched) <= 200 / world + 2 * workers


def test_rows_are_shuffled_across_groups_and_differ_between_epochs_and_seeds():
    first = [row for batch in epoch_of_rows(0, 26, 1, 0)[0] for row in batch]
    order = [row for _, row in first[:104]]
    assert order != sorted(order) and order != [row for _, row in first[104:]]
    assert epoch_of_rows(0, 13, 1, 0, seed=1) != epoch_of_rows(0, 13, 1, 0)
    groups = np.searchsorted(GROUPS.cumsum(), order, "right")
    assert np.mean(groups[1:] != groups[:-1]) > 0.3  # neighbours are often of different row groups


def test_a_batch_names_the_groups_of_its_rows():
    ends = GROUPS.cumsum()
    for batch, groups in itertools.islice(stream_rows(GROUPS, Order(8, 0, workers=2, window=5), 0), 40):
        assert {int(np.searchsorted(ends, row, "right")) for _, row in batch} <= set(groups)


def test_a_stream_holds_the_rows_of_the_files(parquet_folder):
    train_set, test_set = load_splits(str(parquet_folder))
    assert len(train_set) == 75 and test_set is None and train_set.column_names == ["image", "label"]
    for row in (0, 9, 10, 24, 25, 74):
        image, labels, _ = draw_scene("train", row)
        assert train_set[row]["image"]["bytes"] == encode_jpeg(image) and train_set[row]["label"] == labels[0]
    train_set.keep([2, 3])
    assert train_set[26]["image"]["bytes"] == encode_jpeg(draw_scene("train", 26)[0])
    sample = train_set.sample(12)
    assert len(set(sample)) == 12 and sample == train_set.sample(12)


def test_streamed_pixels_do_not_depend_on_read_ahead_or_on_where_they_start(parquet_folder):
    def pixels(start, workers):
        images, _ = load_splits(str(parquet_folder))
        views = FastViews(AUGMENTATIONS["v2"], 16, MEAN, STD)
        batches = views.batches(images, Order(8, 0, workers=workers, window=20), start)
        return [torch.cat(next(batches)[0]) for _ in range(start, 12)]

    plain, later = pixels(0, workers=1), pixels(5, workers=1)
    assert all(one.equal(other) for one, other in zip(plain[5:], later, strict=True))
    assert all(one.equal(other) for one, other in zip(plain, pixels(0, workers=0), strict=True))


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 4), (2, 3), (4, 5), (20, 2)])
def test_in_order_each_row_comes_once_and_each_row_group_is_read_by_one_worker(parquet_folder, world, workers):
    images, _ = load_splits(str(parquet_folder))
    for rows in (range(75), [30, 31, 32, 5, 6, 70], []):
        found, readers = {}, {}
        for rank, (low, mine) in enumerate(images.split(rows, world)):
            for i, (first, batch, groups) in enumerate(ordered_rows(images, mine, 4, workers)):
                found |= {low + first + j: row for j, row in enumerate(batch)}
                assert set(images.groups_of(batch).tolist()) <= set(groups)
                for group in groups:
                    readers.setdefault(group, set()).add((rank, i % max(1, workers)))
        assert [found[i] for i in range(len(rows))] == list(rows) and len(found) == len(rows)
        assert all(len(reader) == 1 for reader in readers.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_features_of_a_stream_are_those_of_single_rows(parquet_folder, workers, tmp_path):
    images, _ = load_splits(str(parquet_folder))
    datasets.load_dataset(str(parquet_folder), cache_dir=tmp_path / "cache").save_to_disk(tmp_path / "saved")
    plain, _ = load_splits(str(tmp_path / "saved"))
    assert isinstance(plain, IndexedImages)
    backbone, rows = load_backbone("random", "resnet10")[0].eval(), [30, 31, 32, 5, 6, 70, 71]
    features, labels, _ = Features(backbone, 32, MEAN, STD, workers, Accelerator(cpu=True)).all(images, rows)
    expected, expected_labels, _ = Features(backbone, 32, MEAN, STD, 0, Accelerator(cpu=True)).all(plain, rows)
    torch.testing.assert_close(features, expected)
    assert labels.equal(expected_labels)


def test_selected_rows_are_a_stream_of_their_own(parquet_folder):
    images, _ = load_splits(str(parquet_folder))
    rows = [*range(45, 55), 3, 7, 4, 74]
    part = images.select_rows(rows)
    assert [part[i] for i in range(len(rows))] == [images[row] for row in rows]
    assert [part.select_rows([13, 1])[i] for i in (0, 1)] == [images[74], images[46]]
    part.keep([0, 1])
    assert part[11] == images[7]
    assert part.fingerprint() != images.select_rows(rows[:-1] + [73]).fingerprint() and len(images) == 75


def write_groups(path, images, labels, rows, names=None):
    """A parquet file of images and labels in row groups of so many rows, as pyarrow alone writes it."""
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features(image=datasets.Image(), label=kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [{"bytes": data, "path": None} for data in images], "label": labels})
    pq.write_table(table.cast(features.arrow_schema), path, row_group_size=rows)
    return str(path.parent)


def test_other_images_or_labels_of_the_same_count_have_another_fingerprint(tmp_path):
    images = [encode_jpeg(draw_scene("train", i)[0]) for i in range(12)]
    labels = [i // 3 for i in range(12)]
    prints = {
        name: load_splits(write_groups(tmp_path / name / "train.parquet", *columns, rows=4))[0].fingerprint()
        for name, columns in {
            "as they were": (images, labels),
            "a copy": (images, labels),
            "other images": ([encode_jpeg(draw_scene("test", i)[0]) for i in range(12)], labels),
            "other labels": (images, labels[::-1]),
        }.items()
    }
    assert prints["as they were"] == prints.pop("a copy") and len(set(prints.values())) == 3


@pytest.fixture(scope="module")
def sorted_folder(tmp_path_factory):
    """600 images of 20 classes, sorted by class, in row groups of 25; the test split of 100 likewise."""
    root = tmp_path_factory.mktemp("sorted")
    image = encode_jpeg(draw_scene("train", 0)[0])
    write_groups(root / "train.parquet", [image] * 600, [i // 30 for i in range(600)], rows=25)
    write_groups(root / "test.parquet", [image] * 100, [i // 5 for i in range(100)], rows=10)
    return root


def classes_of(images):
    return [images[row]["label"] for row in range(len(images))]


def test_of_sorted_files_every_class_is_held_out_and_trained_on(sorted_folder):
    images, _ = load_splits(str(sorted_folder))
    train, validation = images.hold_out(120, b"validation", 0)
    rest, chosen = train.hold_out(40, b"held out", 7)
    counts = [np.bincount(classes_of(part), minlength=20) for part in (rest, chosen, validation)]
    assert sum(counts).tolist() == [30] * 20 and [count.sum() for count in counts] == [440, 40, 120]
    assert counts[2].tolist() == [6] * 20 and counts[1].min() >= 1 and counts[0].min() >= 20


def test_of_sorted_files_the_monitor_looks_at_every_class(sorted_folder):
    """With and without a test split: random row groups would lack some classes, or hold them out as a whole."""
    train_set, test_set = load_splits(str(sorted_folder))
    assert train_set.is_sorted() and test_set.is_sorted()
    assert set(classes_of(train_set.select_rows(train_set.sample(60)))) == set(range(20))
    assert set(classes_of(test_set.select_rows(test_set.sample(50)))) == set(range(20))
    rows = train_set.sample(300, 60)
    assert len(set(rows)) == 300
    queries, bank = (np.bincount(classes_of(train_set.select_rows(part))) for part in (rows[:60], rows[60:]))
    assert queries.min() >= 1 and bank.min() >= 10 and len(queries) == len(bank) == 20


def test_the_monitors_sample_of_mixed_files_is_whole_row_groups(parquet_folder):
    """As it always was, because these cost the least to read."""
    images, _ = load_splits(str(parquet_folder))
    order = np.random.default_rng([*b"sample"]).permutation(9)
    assert not images.is_sorted()
    assert images.sample(30) == [row for g in order for row in range(*images.first_row[[g, g + 1]])][:30]


@pytest.mark.parametrize(
    "rows, row_groups, limit, flag, window, mixed",
    [(100, 40, 5e8, None, 800, 8), (900, 6, 5e8, None, 3600, 4), (900, 6, 1e6, None, 900, 1), (900, 6, 5e8, 50, 50, 1)],
)
def test_a_window_mixes_at_least_four_row_groups(
    tmp_path, monkeypatch, capsys, rows, row_groups, limit, flag, window, mixed
):
    """Row groups of 900 photographs are what `datasets` writes. The classes of a batch are counted, not computed."""
    labels = [i // 100 for i in range(rows * row_groups)]
    folder = write_groups(tmp_path / "train.parquet", [b"x" * 1000] * len(labels), labels, rows=rows)
    pq.write_table(pq.read_table(tmp_path / "train.parquet"), tmp_path / "train.parquet", rows, compression="none",
                   use_dictionary=["label"])  # fmt: skip
    monkeypatch.setattr("moco.data.parquet.WINDOW_BYTES", limit)
    images, order = load_splits(folder)[0], Order(256, 0, window=flag)
    assert images.order_state(order)["window"] == images.window(order) == window
    batches = itertools.islice(images.training_rows(order, 0), len(labels) // 256)
    seen = [len({labels[row] for _, row in batch}) for batch, _ in batches]
    images.print_order(order)
    said = capsys.readouterr().out
    assert f"{window} rows are shuffled at a time: {mixed} of {row_groups} row groups" in said
    assert ("--shuffle-window mixes more" in said) == (mixed < 4)
    about = int(re.search(r"about (\d+) of (\d+) classes", said)[1])
    assert about == pytest.approx(np.mean(seen), rel=0.2, abs=1)


def test_labels_are_told_by_the_footers_or_counted_on_disk(parquet_folder, tmp_path, monkeypatch):
    images, _ = load_splits(str(parquet_folder))
    labels = [images[row]["label"] for row in range(75)]
    assert images.label_range() == (0, max(labels))  # from 0 on, whatever the smallest
    columns = {"image": [images[0]["image"]] * 4, "label": [5, None, 3, 9]}
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int32"))
    here = tmp_path / "datasets" / "some" / "numbers"
    here.mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(here / "train.parquet")
    assert load_splits(str(here))[0].label_range() == (-1, 9)
    pq.write_table(pq.read_table(here / "train.parquet"), here / "train.parquet", write_statistics=False)
    assert load_splits(str(here))[0].label_range() == (-1, 9)
    path = "hf://datasets/some/numbers@abc/train.parquet"
    with serving(tmp_path) as hub:
        hub.here(monkeypatch)
        remote = ParquetImages([path], read_footers([path], Traffic()), "image", "label", Traffic())
        assert remote.label_range() is None and len(hub.reads) == 1
        with pytest.raises(UserError, match="names no classes, .*; --no-streaming downloads them, and counts"):
            count_classes(remote, None, "some/numbers")


def test_what_is_no_parquet_file_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet" * 10)
    with pytest.raises(UserError, match="is not a parquet file"):
        read_footer(str(tmp_path / "a.parquet"), Traffic())
    with pytest.raises(UserError, match="cannot be read"):
        read_footer(str(tmp_path / "missing.parquet"), Traffic())


def test_a_streamed_run_resumes_in_mid_epoch_and_with_other_workers_at_its_begin(parquet_folder, tmp_path):
    flags = "--arch resnet10 --image-size 32 --queue-size 40 --dim 16 --mixed-precision no --log-every 1 --epochs 2"
    flags = [*flags.split(), "--batch-size", 16, "--bn-batch", 8, "--knn-every", 0, "--shuffle-window", 20]
    checkpoints = ["--checkpoint-every", 3, "--keep", 9]

    def losses(output, *more):
        done = run_script("train_moco.py", "--data", parquet_folder, "--output", output, *flags, *checkpoints, *more)
        assert done.returncode == 0, done.stderr
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines], done.stdout

    whole, _ = losses(tmp_path / "run", "--workers", 1)
    assert len(whole) == 8
    for name in ("step_8", "step_6"):  # as if it had been killed after step 3
        (tmp_path / "run" / "checkpoints" / name / "state.json").unlink()
    resumed, said = losses(tmp_path / "run", "--workers", 1, "--resume")
    assert resumed == whole and "resume  after step 3" in said
    for name in ("step_8", "step_6"):
        (tmp_path / "run" / "checkpoints" / name / "state.json").unlink()
    other, said = losses(tmp_path / "run", "--workers", 2, "--resume")
    assert "resume  after step 0" in said and "not 3" in said and len(other) == 8 and other != whole


# ---- from a server


@pytest.fixture
def hub(parquet_folder):
    """A server of the files in `parquet_folder` as the dataset some/one."""
    with serving(parquet_folder.parents[2]) as server:
        yield server


def assert_same_rows(hub, parquet_folder, faults):
    """Read the whole of some/one, the footers and row groups of the last file with these faults.

    Returns how many reads and resolves the server had.
    """
    paths = [f"hf://datasets/some/one@abc/train-{file}-of-3.parquet" for file in range(3)]
    footers = read_footers(paths[:2], Traffic())
    hub.faults = list(faults)
    images = ParquetImages(paths, [*footers, read_footer(paths[2], Traffic())], "image", "label", Traffic())
    local, _ = load_splits(str(parquet_folder))
    assert images.fingerprint() == local.fingerprint()
    assert [images[row] for row in range(75)] == [local[row] for row in range(75)]
    assert not hub.faults and not hub.leaked
    return len(hub.reads), len(hub.resolves())


@pytest.mark.parametrize(
    "faults",
    [[], [500], [None, 503, 429], ["503 Retry-After"], ["reset"], [None, "truncate", 502], [403, None, 403, 403],
     ["other range", None, "whole"]],
)  # fmt: skip
def test_faults_of_the_server_change_nothing(hub, parquet_folder, monkeypatch, faults):
    """One read a footer and a row group, one resolve a file, and one more of each for a fault."""
    hub.here(monkeypatch, TOKEN)
    failed = len([fault for fault in faults if fault])
    assert assert_same_rows(hub, parquet_folder, faults) == (3 + 9 + failed, 3 + failed)


def test_a_connection_that_stalls_is_given_up_and_tried_again(hub, parquet_folder, monkeypatch):
    """On a slow machine others may be given up, too, which changes nothing."""
    hub.here(monkeypatch)
    monkeypatch.setattr("moco.data.hub.TIMEOUT", 0.5)
    reads, _ = assert_same_rows(hub, parquet_folder, ["stall", None, "stall"])
    assert reads >= 3 + 9 + 2


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_tried_again_and_says_what_to_do(hub, monkeypatch, status):
    hub.here(monkeypatch)
    hub.refusals = [status]
    with pytest.raises(UserError, match="accept the dataset's terms.*hf auth login"):
        read_footer("hf://datasets/some/one@abc/train-0-of-3.parquet", Traffic())
    assert len(hub.resolves()) == 1 and not hub.reads


def test_evaluation_asks_for_each_row_group_once(hub, parquet_folder, monkeypatch):
    hub.here(monkeypatch)
    paths = [f"hf://datasets/some/one@abc/train-{file}-of-3.parquet" for file in range(3)]
    images = ParquetImages(paths, read_footers(paths, Traffic()), "image", "label", Traffic())
    hub.reads.clear()
    Features(load_backbone("random", "resnet10")[0].eval(), 32, MEAN, STD, 2, Accelerator(cpu=True)).all(
        images, range(75)
    )
    assert len(hub.reads) == len(set(hub.reads)) == 9 and len(hub.resolves()) == 3


RUN = [*"--arch resnet10 --image-size 32 --queue-size 40 --dim 16 --mixed-precision no --log-every 1".split()]
RUN += ["--batch-size", 16, "--bn-batch", 8, "--workers", 1, "--shuffle-window", 20, "--epochs", 1]


def run_of(hub, data, output, *flags, processes=1):
    """train_moco.py as a user of the server would run it, with nothing in the caches."""
    environment = {"HF_HOME": str(output / "huggingface")} | hub.environment
    command = ("train_moco.py", "--data", data, "--output", output, *RUN, *flags)
    return run_script(*command, processes=processes, **environment)


def test_a_run_from_the_hub_with_faults_has_the_metrics_of_one_from_disk(hub, parquet_folder, tmp_path):
    local = run_of(hub, parquet_folder, tmp_path / "local")
    hub.faults = [503, None, "reset", None, None, 429, "truncate", None, "503 Retry-After", None, 403]
    hub.refusals = [503, None, 500]
    remote = run_of(hub, "some/one", tmp_path / "remote", "--revision", "v1.0")
    assert local.returncode == remote.returncode == 0, remote.stderr
    assert not hub.faults and not hub.refusals
    kept = ("step", "loss", "accuracy", "knn", "undecodable")
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("local", "remote")]
    metrics = [[{key: line.get(key) for key in kept} for line in run] for run in lines]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 5
    assert ("GET", "/api/datasets/some/one/revision/v1.0", None) in hub.requests
    assert {path.split("/")[5] for path in hub.resolves() if path.endswith(".parquet")} == {COMMIT}
    for file in ("args.json", "backbone/config.json"):
        assert f'"data_commit": "some/one@{COMMIT}"' in (tmp_path / "remote" / file).read_text()


def test_a_gated_dataset_is_refused_in_one_line(hub, tmp_path):
    hub.gated.add("some/one")
    done = run_of(hub, "some/one", tmp_path)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(lines) == 1 and "terms" in lines[0] and "hf auth login" in lines[0]


def test_files_of_the_hub_are_downloaded_once_and_found_without_it(tmp_path):
    """The files themselves are in huggingface_hub's cache, and nothing of their size beside them."""
    folder = tmp_path / "served" / "datasets" / "some" / "one"
    write_three_files(folder)
    write_parquet(folder / "test-0-of-1.parquet", "test", range(20), rows=10)
    write_parquet(folder / "extra-0-of-1.parquet", "train", range(20), rows=10)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - {{split: {split}, path: {split}-*}}\n" for split in ("train", "test", "extra")) + "---\n")  # fmt: skip
    local, tested = load_splits(str(folder))
    code = "import json; from moco.data.load import load_splits as load;"
    code += "images, tested = load('some/one', no_streaming=True);"
    code += "labels = [images[i]['label'] for i in range(75)]; disk = images.traffic.totals()[2];"
    code += "print(json.dumps([labels, images.fingerprint(), tested.fingerprint(), disk > 0]))"
    with serving(tmp_path / "served") as hub:
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN} | hub.environment
        first = run_script("-c", code, **environment)
        assert first.returncode == 0, first.stderr
        again = run_script("-c", code, **environment)
        assert {file for file, _ in hub.reads} == {path.name for path in folder.glob("t*.parquet")}
        assert len(hub.reads) == 4 and not hub.leaked
    offline = run_script("-c", code, **environment)
    expected = [[local[row]["label"] for row in range(75)], local.fingerprint(), tested.fingerprint(), True]
    for done in (first, again, offline):
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == expected  # so the order is that of a stream
    sizes = {
        path: path.stat().st_size for path in (tmp_path / "home").rglob("*") if path.is_file() and not path.is_symlink()
    }
    data = sum(path.stat().st_size for path in folder.glob("t*.parquet"))
    assert data < sum(sizes.values()) < 1.3 * data and not [path for path in sizes if path.suffix == ".arrow"]


def test_hf_download_gives_a_folder_to_train_on(tmp_path):
    """The command of docs/streaming.md, of another dataset into another folder."""
    folder = tmp_path / "served" / "datasets" / "some" / "one"
    write_parquet(folder / "data" / "train-0.parquet", "train", range(20), rows=10)
    (folder / "README.md").write_text("nothing to train on")
    words = re.search(r"^hf (download ILSVRC/.*)$", (ROOT / "docs" / "streaming.md").read_text(), re.MULTILINE)[1]
    words = words.replace("ILSVRC/imagenet-1k", "some/one").replace("/scratch/imagenet", str(tmp_path / "here"))
    with serving(tmp_path / "served") as hub:
        environment = {"HF_HOME": str(tmp_path / "home")} | hub.environment
        hf = Path(sys.executable).with_name("hf")
        done = subprocess.run([hf, *shlex.split(words)], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images, _ = load_splits(str(tmp_path / "here"))
    assert len(images) == 20 and images.traffic.totals()[0] == 0


def test_other_files_on_the_hub_are_downloaded_and_this_is_said(tmp_path):
    for index in range(20):
        path = tmp_path / "datasets" / "some" / "pictures" / "train" / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_jpeg(draw_scene("train", index)[0]))
    with serving(tmp_path) as hub:
        done = run_of(hub, "some/pictures", tmp_path / "run", "--batch-size", 40)
    assert done.stdout.count("some/pictures is not in parquet files: downloaded") == 1
    assert done.returncode == 2 and "has 20 images, fewer than a batch of 40" in done.stderr  # so they were read


def test_each_of_two_processes_reads_its_share_of_the_bytes(tmp_path):
    """300 row groups; beyond its half a process reads the footers, a row group a boundary and some ahead."""
    folder = tmp_path / "datasets" / "some" / "many"
    folder.mkdir(parents=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=2))
    rng = np.random.default_rng(0)
    for file in range(2):
        noise = rng.integers(0, 256, (450, 70, 90, 3), np.uint8)
        images = [{"bytes": encode_jpeg(image), "path": None} for image in noise]
        part = datasets.Dataset.from_dict({"image": images, "label": [0] * 450}, features=features)
        part.to_parquet(folder / f"train-{file}.parquet", batch_size=3)
    flags = ["--knn-every", 0, "--shuffle-window", 3, "--batch-size", 60, "--bn-batch", 30, "--workers", 0]
    with serving(tmp_path) as hub:
        done = run_of(hub, "some/many", tmp_path / "run", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    share = sum(path.stat().st_size for path in folder.iterdir()) / 2
    assert hub.sent["0"] == pytest.approx(share, rel=0.1) and hub.sent["1"] == pytest.approx(share, rel=0.1)
