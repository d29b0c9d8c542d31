"""Bytes from the Hub: addresses that are shared and end, limits, refusals, wrong answers. pytest tests/test_hub.py

"Before" is how each row group was once read: through an address with /resolve/ in it.
"""

import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import HANG, write_parquet
from hub import TOKEN, serving

from moco.augment import AUGMENTATIONS, MEAN, STD
from moco.data.batches import stop_workers
from moco.data.hub import Traffic, read_range
from moco.data.order import Order
from moco.data.parquet import ParquetImages, read_footer
from moco.data.views import FastViews
from moco.errors import UserError

FILES, FORK = 24, multiprocessing.get_context("fork")
ENDED = 8  # workers of two processes that may be ended at any moment between an address and what it was for
PATHS = [f"hf://datasets/some/many@abc/train-{file:02}.parquet" for file in range(FILES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 files of two row groups of ten images; links to one file."""
    root = tmp_path_factory.mktemp("served") / "datasets" / "some" / "many"
    write_parquet(root / "train-00.parquet", "train", range(20), rows=10)
    for file in range(1, FILES):
        os.link(root / "train-00.parquet", root / f"train-{file:02}.parquet")
    return root


@pytest.fixture
def hub(folder, monkeypatch):
    with serving(folder.parents[2]) as server:
        server.here(monkeypatch, TOKEN)
        yield server
        assert not server.leaked  # no token leaves the Hub, whatever happens there
    shutil.rmtree(server.root / "HF_ASSETS_CACHE", ignore_errors=True)


def read_epochs(paths, rank, epochs, both, send):
    """One of two processes, with four workers: send a digest of its pixels, and what it read."""
    both.wait()  # to fork while the server hashes for the other one could leave a lock of OpenSSL's locked
    traffic = Traffic()
    # By no pool of threads: one that still ends while workers fork could leave them a lock of OpenSSL's locked.
    images = ParquetImages(paths, [read_footer(paths[0], traffic)] * FILES, "image", "label", traffic)
    batches = FastViews(AUGMENTATIONS["v2"], 16, MEAN, STD).batches(images, Order(24, 0, rank, 2, 4, 10), 0)
    digest = hashlib.sha256()
    try:
        for crops, *_ in itertools.islice(batches, epochs * 20):
            digest.update(torch.stack(crops).numpy().tobytes())
    finally:
        stop_workers()  # they ignore the first signal to end
    send.send((digest.hexdigest(), dict(zip(Traffic.NAMES, traffic.totals(), strict=True))))


def two_processes(paths, epochs):
    """Digests of two processes that read at once, and the sum of what they read."""
    ends, both = [FORK.Pipe(duplex=False) for _ in range(2)], FORK.Barrier(2)
    processes = [
        FORK.Process(target=read_epochs, args=(paths, rank, epochs, both, send)) for rank, (_, send) in enumerate(ends)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=HANG)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    digests, read = zip(*(receive.recv() for receive, _ in ends))
    return digests, sum(map(Counter, read), Counter())


@pytest.fixture(scope="module")
def digests(folder):
    return two_processes([str(path) for path in sorted(folder.iterdir())], 2)[0]


def test_two_processes_with_four_workers_resolve_each_file_once(hub, digests):
    found, read = two_processes(PATHS, 2)
    assert found == digests and len(hub.resolves()) == FILES == read["resolves"] and not read["refused"]
    assert len(hub.reads) >= 2 + 2 * 2 * FILES  # footers, and row groups of two epochs: before, as many resolves


def test_an_address_is_renewed_when_it_ends_by_one_for_all(hub, digests):
    """Each serves two reads here, of which a file has at least four."""
    hub.uses = 2
    found, read = two_processes(PATHS, 2)
    assert found == digests and read["refused"] >= len(hub.resolved) - FILES - ENDED
    reads = Counter(file for file, _ in hub.reads)
    assert len(reads) == FILES
    needed = sum(-(-count // 2) for count in reads.values())
    assert 0 <= len(hub.resolved) - needed <= ENDED and abs(read["resolves"] - len(hub.resolved)) <= ENDED


def test_a_limit_of_resolves_is_waited_for(hub, digests):
    """The Hub answers ten, refuses the next five, answers ten, and so on."""
    hub.refusals = [*[None] * 10, *[429] * 5] * 2
    found, read = two_processes(PATHS, 2)
    assert found == digests and read["resolves"] == len(hub.resolved) == FILES
    assert not hub.refusals and len(hub.resolves()) == FILES + 10


def test_wrong_answers_cost_a_resolve_each(hub, digests):
    faults = ["other range", "whole", 416, "truncate", 403, "other range"]
    hub.faults = [None, None, *(fault for fault in faults for fault in (None, fault))]
    found, read = two_processes(PATHS, 2)
    assert found == digests and not hub.faults and 0 < read["refused"] <= len(faults)  # some after another
    assert read["resolves"] <= FILES + len(faults)  # of the Hub's own count some may be a client's second try


def test_a_host_that_goes_on_refusing_is_asked_again_after_growing_waits(hub, monkeypatch):
    waits = []
    monkeypatch.setattr("moco.data.hub.time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    hub.faults = [403, 416, "other range"]
    data, size = read_range(PATHS[0], 0, 100, Traffic())
    assert len(data) == 100 and size > 100 and len(hub.resolves()) == 4 and waits == [0, 1, 2]
    hub.faults = [416, 416, "other range"]
    monkeypatch.setattr("moco.data.hub.RETRIES", 1)
    with pytest.raises(UserError, match="cannot be read .*bytes 1 to 100 in answer to 0 to 100"):
        read_range(PATHS[1], 0, 100, Traffic())


def test_a_refusal_by_the_hub_is_none_of_an_address(hub):
    """403 from the host of an address asks for another one; from the Hub it is the end."""
    read_range(PATHS[0], 0, 100, Traffic())
    hub.faults, hub.refusals = [403], [403]
    with pytest.raises(UserError, match="accept the dataset's terms"):
        read_range(PATHS[0], 0, 100, Traffic())
    assert len(hub.resolves()) == 2


def test_a_file_that_the_hub_serves_itself_and_one_of_a_renamed_repository(hub):
    (hub.root / "datasets" / "some" / "more").mkdir(exist_ok=True)
    (hub.root / "datasets" / "some" / "more" / "small.bin").write_bytes(bytes(range(100)))
    for _ in range(2):
        assert read_range("hf://datasets/some/more@abc/small.bin", -10, None, Traffic()) == (bytes(range(90, 100)), 100)
    assert [method for method, path, _ in hub.requests if "/resolve/" in path] == ["HEAD", "GET", "GET"]
    hub.renamed["old/many"] = "some/many"
    old, new = (read_range(path, 0, 9, Traffic()) for path in (PATHS[0].replace("some/many", "old/many"), PATHS[0]))
    assert old == new


def test_a_process_killed_while_it_resolves_leaves_the_others_their_turn(hub):
    hub.open.clear()
    first = FORK.Process(target=read_range, args=(PATHS[0], 0, 100, Traffic()))
    first.start()
    while not hub.resolves():
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    hub.open.set()
    assert len(read_range(PATHS[0], 0, 100, Traffic())[0]) == 100 and len(hub.resolves()) == 2


def test_a_page_in_answer_to_a_resolve_is_no_address(hub):
    """A proxy's, with status 200: kept for an hour, it would make each read a request that the Hub counts."""
    hub.refusals = [200]
    for _ in range(3):
        assert len(read_range(PATHS[0], 0, 100, Traffic())[0]) == 100
    assert len(hub.resolves()) == 2 and len(hub.reads) == 3


def test_a_redirect_to_itself_ends_the_run(hub):
    hub.renamed["some/many"] = "some/many"
    with pytest.raises(UserError, match="cannot be read .*edirects"):
        read_range(PATHS[0], 0, 100, Traffic())
    assert len(hub.resolves()) < 50


def test_a_server_that_sends_a_byte_a_second_is_given_up(hub, monkeypatch):
    hub.trickle = 0.05
    monkeypatch.setattr("moco.data.hub.TIMEOUT", 0.5)
    monkeypatch.setattr("moco.data.hub.RETRIES", 0)
    with pytest.raises(UserError, match="cannot be read .* bytes in .* seconds"):
        read_range(PATHS[0], 0, 1000, Traffic())


def test_a_refusal_in_mid_run_says_how_to_go_on(hub):
    hub.refusals = [401]
    with pytest.raises(UserError, match="is refused .*hf auth login.*--resume"):
        read_range(PATHS[0], 0, 100, Traffic())
