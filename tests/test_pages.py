"""Rows of downloaded parquet files one by one, in any order, without a copy of them. pytest tests/test_pages.py"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_script, write_parquet
from hub import TOKEN, serving

from moco.data import IndexedImages, load_splits
from moco.pages import BLOCK, NOWHERE, ParquetRows, locate
from moco.stream import ParquetImages, read_footers


@pytest.fixture(autouse=True)
def assets(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))


def encoded_rows():
    """Bytes that Snappy can and cannot compress, of 0 bytes to some blocks, twice the same, and none."""
    rng = np.random.default_rng(0)
    noise = [rng.bytes(size) for size in (10, 70_000, 0, 200_000, 65_536, 1, 3000)]
    flat = [bytes(100_000), b"header" * 30_000 + noise[1]]
    return [*noise, *flat, None, noise[3], *noise[:5], b"", *flat]


def write(path, **options):
    """Write these rows in columns of images and of bytes, with labels of which one is missing; returns them."""
    rows = encoded_rows()
    images = [None if row is None else {"bytes": row, "path": "x.jpg"} for row in rows]
    labels = [None if i == 4 else i for i in range(len(rows))]
    columns = {
        "image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "plain": pa.array(rows, pa.large_binary()),
        "label": pa.array(labels, pa.int32()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=8, **options)
    return rows


def rows_of(path, image_column="image", label_column="label"):
    return ParquetRows(ParquetImages([str(path)], read_footers([str(path)]), image_column, label_column))


SMALL = {"data_page_size": 1000, "write_batch_size": 1}  # a page for each row
LAYOUTS = {
    "plain": {"compression": "none", "use_dictionary": False},
    "plain, small pages": {"compression": "none", "use_dictionary": False} | SMALL,
    "dictionary": {"compression": "none"},
    "snappy": {"compression": "snappy"},
    "snappy, small pages": {"use_dictionary": False} | SMALL,
    "snappy, small dictionary": {"dictionary_pagesize_limit": 90_000} | SMALL,
    "checksums": {"write_page_checksum": True},
    "zstd": {"compression": "zstd"},
    "second version": {"data_page_version": "2.0", "use_dictionary": False},
    "deltas": {
        "use_dictionary": False,
        "column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY", "plain": "DELTA_BYTE_ARRAY"},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("column", ["image", "plain"])
def test_each_row_is_what_pyarrow_reads(tmp_path, layout, column, capsys):
    expected = write(tmp_path / "train.parquet", **LAYOUTS[layout])
    rows = rows_of(tmp_path / "train.parquet", column)
    for row in np.random.default_rng(1).permutation(len(expected)).tolist():
        found = rows[row]
        assert (found["image"] or {"bytes": None})["bytes"] == expected[row]
        assert found["label"] == (-1 if row == 4 else row)
    missing = int((rows.table[:, 0] < 0).sum())
    if layout in ("zstd", "second version"):
        assert missing == len(expected)
    elif layout != "deltas":
        assert missing == 1  # the row without an image
    assert f"{missing} of {len(expected)} rows are slow: each is read with its row group" in capsys.readouterr().out


def test_a_place_that_does_not_hold_its_row_is_none():
    """A Snappy stream whose second block refers to the first, as the format allows but its usual encoder never does."""
    first = np.random.default_rng(0).bytes(BLOCK)
    literal = bytes([61 << 2]) + (BLOCK - 1).to_bytes(2, "little") + first
    copies = [bytes([(60 - 1) << 2 | 3]) + offset.to_bytes(4, "little") for offset in (BLOCK - 100, BLOCK - 440)]
    stream = varint(BLOCK + 120) + literal + b"".join(copies)
    header = bytes([0x15, 0, 0x15]) + varint(2 * (BLOCK + 120)) + bytes([0x15]) + varint(2 * len(stream)) + bytes([0])
    values = [first[1000:2000], first[100:160] + first[500:560]]
    in_first, in_second = locate(header + stream, values, is_snappy=True)
    assert in_first[-1] == 1000 and in_second == NOWHERE


def varint(value):
    return bytes([value & 127 | 128, value >> 7 & 127 | 128, value >> 14])


def test_a_row_costs_about_its_own_size(tmp_path):
    expected = write(tmp_path / "train.parquet", compression="snappy", use_dictionary=True)
    rows = rows_of(tmp_path / "train.parquet")
    row = 3  # 200,000 bytes of a row group of 640,000
    before = rows.images.traffic.totals()[2]
    assert rows[row]["image"]["bytes"] == expected[row]
    assert rows.images.traffic.totals()[2] - before < len(expected[row]) + 2 * 66_000


def test_places_are_noted_once_and_anew_for_other_files(tmp_path):
    write(tmp_path / "train.parquet")
    first = rows_of(tmp_path / "train.parquet")
    asked = rows_of(tmp_path / "train.parquet").images.traffic.totals()
    assert asked == [0] * 5 and first.images.traffic.totals()[2] > 0
    write_parquet(tmp_path / "train.parquet", "train", range(20), rows=10)
    assert len(rows_of(tmp_path / "train.parquet")) == 20


def test_rows_are_shuffled_split_and_held_out_one_by_one(tmp_path):
    write_parquet(tmp_path / "data" / "train-0.parquet", "train", range(30), rows=10)
    images, _ = load_splits(str(tmp_path / "data"), streaming=False)
    assert isinstance(images, IndexedImages) and images.order(2, 3, 20) == {} and images.traffic is not None
    batch, groups = next(images.training_rows(12, 0, 0, 0, 1, 1, 10))
    order = np.random.default_rng([*b"order", 0, 0]).permutation(30)
    assert [row for _, row in batch] == order[:12].tolist() and groups == ()
    rest, held = images.hold_out(7, b"held", 0)
    labels = [images[row]["label"] for row in range(30)]
    assert sorted(labels) == sorted([part[i]["label"] for part in (rest, held) for i in range(len(part))])
    assert len(held) == 7 and images.label_range() == (min(labels), max(labels))


# ---- from the Hub


def test_files_of_the_hub_are_downloaded_once_and_found_without_it(tmp_path):
    """The files themselves are in huggingface_hub's cache, and nothing of their size beside them."""
    folder = tmp_path / "served" / "datasets" / "some" / "one"
    for file in range(3):
        write_parquet(folder / f"train-{file}-of-3.parquet", "train", range(25 * file, 25 * file + 25), rows=10)
    local, _ = load_splits(str(folder))
    code = "import json; from moco.data import load_splits; images, _ = load_splits('some/one', streaming=False);"
    code += "print(json.dumps([[images[i]['label'], len(images[i]['image']['bytes'])] for i in range(75)]))"
    with serving(tmp_path / "served") as hub:
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN} | hub.environment
        first = run_script("-c", code, **environment)
        assert first.returncode == 0, first.stderr
        assert len(hub.reads) == 3 and not hub.leaked
    offline = run_script("-c", code, **environment)
    expected = [[local[row]["label"], len(local[row]["image"]["bytes"])] for row in range(75)]
    for done in (first, offline):
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == expected
    sizes = {
        path: path.stat().st_size for path in (tmp_path / "home").rglob("*") if path.is_file() and not path.is_symlink()
    }
    data = sum(path.stat().st_size for path in folder.iterdir())
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
