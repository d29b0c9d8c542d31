"""Parquet files read by row group: coverage, order, resuming, read-ahead. pytest tests/test_stream.py"""

import contextlib
import itertools
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import huggingface_hub
import numpy as np
import pytest
from conftest import run_script

from moco.data import load_splits, sample_rows, train_batches, train_keys
from moco.errors import UserError
from moco.shapes import draw_scene, encode_jpeg
from moco.stream import ParquetImages, read_footer, read_footers, stream_keys

GROUPS = np.array([7, 10, 10, 3, 10, 10, 6, 10, 10, 10, 1, 10, 10, 4])  # rows: 111


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of 25 images in row groups of 10, 10 and 5."""
    root = tmp_path_factory.mktemp("parquet")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    for file in range(3):
        scenes = [draw_scene("train", 25 * file + i) for i in range(25)]
        images = [{"bytes": encode_jpeg(scene[0]), "path": f"{i}.jpg"} for i, scene in enumerate(scenes)]
        part = datasets.Dataset.from_dict(
            {"image": images, "label": [int(scene[1][0]) for scene in scenes]}, features=features
        )
        part.to_parquet(root / f"train-{file}-of-3.parquet", batch_size=10)
    return root


def epoch_of_rows(start, steps, world, workers, seed=0, window=20, batch_size=8):
    """Rows of `steps` steps from `start` on, by process: [[[(epoch, row), ...] a step] a process]."""
    keys = [stream_keys(GROUPS, batch_size, seed, start, rank, world, workers, window) for rank in range(world)]
    return [[batch for batch, _ in itertools.islice(process, steps)] for process in keys]


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 3), (2, 1), (2, 4), (4, 2), (8, 5)])
def test_every_epoch_holds_each_image_at_most_once_in_equal_steps(world, workers):
    steps_per_epoch = 111 // 8
    dropped = []
    processes = epoch_of_rows(0, 3 * steps_per_epoch, world, workers)
    assert all(len(batch) == 8 // world for process in processes for batch in process)
    for epoch in range(3):
        steps = [process[epoch * steps_per_epoch :][:steps_per_epoch] for process in processes]
        keys = [key for process in steps for batch in process for key in batch]
        assert {key[0] for key in keys} == {epoch}
        assert len(keys) == len(set(keys)) == steps_per_epoch * 8
        dropped.append(frozenset(range(111)) - {row for _, row in keys})
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
            batches = itertools.islice(stream_keys(groups, 20, 0, 0, rank, world, workers, 50), 100)
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
    for batch, groups in itertools.islice(stream_keys(GROUPS, 8, 0, 0, 0, 1, 2, 5), 40):
        assert {int(np.searchsorted(ends, row, "right")) for _, row in batch} <= set(groups)


def test_a_stream_holds_the_rows_of_the_files(folder):
    train_set, test_set = load_splits(str(folder))
    assert len(train_set) == 75 and test_set is None and train_set.column_names == ["image", "label"]
    for row in (0, 9, 10, 24, 25, 74):
        image, labels, _ = draw_scene("train", row)
        assert train_set[row]["image"]["bytes"] == encode_jpeg(image) and train_set[row]["label"] == labels[0]
    train_set.keep([2, 3])
    assert train_set[26]["image"]["bytes"] == encode_jpeg(draw_scene("train", 26)[0])
    sample = sample_rows(train_set, 12)
    assert len(set(sample)) == 12 and sample == sample_rows(train_set, 12)


def test_streamed_pixels_do_not_depend_on_read_ahead_or_on_where_they_start(folder):
    def pixels(start, workers):
        images, _ = load_splits(str(folder))
        keys = train_keys(images, 8, 0, start, 0, 1, workers, 20)
        batches = train_batches(images, 16, 0, "v2", keys, workers)
        return [next(batches)[0] for _ in range(start, 12)]

    plain, later = pixels(0, workers=1), pixels(5, workers=1)
    assert all(one.equal(other) for one, other in zip(plain[5:], later, strict=True))
    assert all(one.equal(other) for one, other in zip(plain, pixels(0, workers=0), strict=True))


def test_what_is_no_parquet_file_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet" * 10)
    with pytest.raises(UserError, match="is no parquet file"):
        read_footer(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="cannot be read"):
        read_footer(str(tmp_path / "missing.parquet"))


def test_a_streamed_run_resumes_in_mid_epoch_and_with_other_workers_at_its_begin(folder, tmp_path):
    flags = "--arch resnet10 --image-size 32 --queue-size 40 --dim 16 --mixed-precision no --log-every 1 --epochs 2"
    flags = [*flags.split(), "--batch-size", 16, "--bn-batch", 8, "--knn-every", 0, "--shuffle-window", 20]
    checkpoints = ["--checkpoint-every", 3, "--keep", 9]

    def losses(output, *more):
        done = run_script("train_moco.py", "--data", folder, "--output", output, *flags, *checkpoints, *more)
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


@contextlib.contextmanager
def resolving(folder, faults, monkeypatch):
    """A server on loopback for the files of `folder` at the Hub's resolve addresses; yields the ranges asked for.

    faults: consumed one a request: a status to answer with, "reset", "truncate", or None for none.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = re.fullmatch(r"/datasets/some/one/resolve/abc/(.+)", self.path)
            fault = 404  # the client asks for other things of its own accord
            if path:
                asked.append(self.headers["Range"])
                fault = faults.pop(0) if faults else None
            if isinstance(fault, int):
                self.send_response(fault)
                if fault in (401, 403):
                    self.send_header("X-Error-Code", "GatedRepo")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = (folder / path[1]).read_bytes()
            first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"]).groups()
            start, end = (int(first), int(last) + 1) if first else (max(0, len(data) - int(last)), len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            body = data[start:end]
            self.wfile.write(body[: len(body) // 2] if fault in ("reset", "truncate") else body)
            self.close_connection = fault is not None
            if fault == "reset":
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def log_message(self, *values):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("faults", [[], [500], [503, 429], ["reset"], ["truncate", 502]])
def test_faults_of_the_server_change_nothing(folder, monkeypatch, faults):
    paths = [f"hf://datasets/some/one@abc/train-{file}-of-3.parquet" for file in range(3)]
    with resolving(folder, [], monkeypatch) as asked:
        images = ParquetImages(paths, read_footers(paths), "image", "label")
        assert len(asked) == 3  # a footer a request
    local, _ = load_splits(str(folder))
    assert images.fingerprint() == local.fingerprint()
    with resolving(folder, list(faults), monkeypatch) as asked:
        assert all(images[row] == local[row] for row in range(25))
        assert len(asked) == 3 + len(faults)  # one request a row group, and one more a fault


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_tried_again_and_says_what_to_do(folder, monkeypatch, status):
    with resolving(folder, [status], monkeypatch) as asked:
        with pytest.raises(UserError, match="accept the dataset's terms.*hf auth login"):
            read_footer("hf://datasets/some/one@abc/train-0-of-3.parquet")
        assert len(asked) == 1
