"""Bytes of files, on the Hub or on disk: where a file lies, ranges of it, whole files, and how much was read.

The Hub counts requests for addresses with /resolve/ in them: 5,000 in five minutes for a free account. It answers such
a resolve with a signed address on another host, from which any number of ranges can be read for about an hour without
being counted. So a machine resolves each file once an hour: the signed address is kept in a small file that all
processes of the machine read, and when it is refused one of them gets another one, under a lock.
"""

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
import time
from glob import escape
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session

from moco.errors import explained, first_line
from moco.jsonfile import write_json

TIMEOUT = 20  # seconds without a byte after which a connection is given up and tried again
SLOWEST = 1_000  # bytes a second, over as long, below which it is given up as well
RETRIES, LONGEST_WAIT = 20, 64  # waits of 1, 2, 4 ... 64, 64 seconds, beside huggingface_hub's own: about 25 minutes
RETRIED = (408, 425, 429, *range(500, 600))  # everything but refusals
RESOLVES, WINDOW = 5_000, 300  # what the Hub serves a free account, in so many seconds


class Traffic:
    """What a process and its data workers have read: bytes by source, resolves, and addresses that were refused."""

    NAMES = ("network", "cache", "disk", "resolves", "refused")

    def __init__(self):
        self.counts = multiprocessing.Array("q", len(self.NAMES))  # in memory that data workers share

    def add(self, name, amount=1):
        with self.counts.get_lock():
            self.counts[self.NAMES.index(name)] += amount

    def totals(self):
        return list(self.counts.get_obj())  # without the lock, which a worker that is killed may leave locked


def traffic_line(read, seconds):
    """What was read in so many seconds: as values for the log, and in words for the progress bar.

    read: the amounts, in the order of Traffic.NAMES.
    """
    counts = dict(zip(Traffic.NAMES, read, strict=True))
    megabytes = {name: counts[name] / 1e6 for name in Traffic.NAMES[:3]}
    line = {f"{name}_mb": value for name, value in megabytes.items()}
    line["read_mb_per_second"] = sum(megabytes.values()) / seconds
    words = [f", {name} {value / seconds:.1f} MB/s" for name, value in megabytes.items() if value]
    return line | {name: round(counts[name]) for name in Traffic.NAMES[3:]}, "".join(words)


@functools.cache
def say(message):
    """Print a line once in each process, below the progress bar that the main process may show."""
    print(f"\nstream  {message}", file=sys.stderr, flush=True)


# ---- where a file lies


def hub_file(path):
    """Split hf://datasets/REPO@REVISION/FILE into (repository, revision, file)."""
    return tuple(map(unquote, re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", path).groups()))


def resolve_url(path):
    """The Hub's own address of a file. The Hub counts each request to it."""
    repository, revision, name = hub_file(path)
    return huggingface_hub.hf_hub_url(repository, name, repo_type="dataset", revision=revision)


def shared_folder(name):
    """A folder that all processes of this user on this machine share, below HF_HOME."""
    assets = huggingface_hub.constants.HF_ASSETS_CACHE
    folder = huggingface_hub.cached_assets_path("moco", f"user-{os.getuid()}", name, assets_dir=assets)
    folder.chmod(0o700)  # whoever has a signed address can read a gated file
    return folder


def address_of(path, refused, traffic):
    """Where a file on the Hub can be read: a signed address on another host, or the Hub's own for what lies there.

    refused: an address that did not work and must not be returned again unless the Hub says so, or None. The processes
    of a machine share the address. Raises HfHubHTTPError for a refusal, and the HTTP client's exceptions.
    """
    url = resolve_url(path)
    file = shared_folder("addresses") / f"{hashlib.sha256(url.encode()).hexdigest()[:40]}.json"

    def known():
        with contextlib.suppress(OSError, ValueError):  # missing, or not ours
            address = json.loads(file.read_text())
            return address if isinstance(address, str) and address != refused else None

    if address := known():
        return address
    with WeakFileLock(file.with_suffix(".lock")):  # the others wait here, and then find the new address
        if address := known():
            return address
        traffic.add("resolves")
        metadata = huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT, retry_on_errors=True)
        address = metadata.location
        if metadata.commit_hash is None and is_same_host(address, url):  # a login page, or a proxy's
            raise OSError("a page that is not the Hub's in answer to a resolve")
        try:
            write_json(file, address)
        except OSError as error:
            say(f"addresses cannot be kept ({first_line(error)}), so each read asks the Hub; make room")
    return address


# ---- ranges


def read_range(path, start, end, traffic):
    """Read bytes [start, end) of a file on disk or on the Hub; returns them and the size of the file.

    start < 0 counts from the end of the file. traffic: a Traffic, which counts the bytes. Raises UserError for a
    refusal (not logged in, terms not accepted, gone) and when the last try fails.
    """
    with readable(path, "once it can, go on with --resume"):
        data, size = read_hub(path, start, end, traffic) if is_remote(path) else read_file(path, start, end)
    traffic.add("network" if is_remote(path) else "disk", len(data))
    return data, size


def span(start, end, size):
    """(first, last + 1) of the bytes that a range has in a file of `size` bytes."""
    return (max(0, size + start), size) if start < 0 else (start, end)


def is_remote(path):
    """Whether a path is on the Hub."""
    return path.startswith("hf://")


@contextlib.contextmanager
def readable(what, remedy):
    """Turn every exception of reading something into a UserError that says what to do."""
    login = "accept the dataset's terms on its page, then `hf auth login`; a run that was begun goes on with --resume"
    with (
        explained(f"{what} cannot be read", remedy, alone=True),
        explained(f"{what} is refused", login, GatedRepoError, RepositoryNotFoundError, alone=True),
    ):
        yield


def read_file(path, start, end):
    """Do what `read_range` does for a file on disk."""
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, io.SEEK_END)
        start, end = span(start, end, size)
        file.seek(start)
        data = file.read(end - start)
    if len(data) < end - start:
        raise OSError(f"it ends before byte {end}, so it changed or is damaged")
    return data, size


def read_hub(path, start, end, traffic):
    """Do what `read_range` does for a file on the Hub: read at its address, and at a new one each time that fails.

    The first new address is tried at once, the others after growing waits.
    """
    refused = None
    for wait in (0, *(min(2**i, LONGEST_WAIT) for i in range(RETRIES)), None):
        address = None
        try:
            address = address_of(path, refused, traffic)
            return read_address(address, start, end, resolve_url(path), traffic)
        except Exception as error:  # refused, ended, broken off, another range: the Hub may know a better address
            if wait is None or isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRIED:
                raise  # the Hub's own refusal
            if type(error).__name__ == "TooManyRedirects":  # to itself, which will not end
                raise
        if address:
            refused = address
            traffic.add("refused")
        time.sleep(wait)


def read_address(address, start, end, url, traffic):
    """Do what `read_range` does by one request, which has the user's token if it is to the Hub, as `url` is."""
    on_hub = is_same_host(address, url)
    traffic.add("resolves", on_hub)
    asked = f"bytes={start}" if start < 0 else f"bytes={start}-{end - 1}"
    headers = build_hf_headers(token=None if on_hub else False) | {"Range": asked, "Accept-Encoding": "identity"}
    with get_session().stream("GET", address, headers=headers, timeout=TIMEOUT) as response:
        size = size_of(response, start, end)  # before the rest is read, which may be the whole file
        data = b"".join(steady(response.iter_raw()))
    first, last = span(start, end, size)
    if len(data) != last - first:
        raise OSError(f"{len(data)} bytes in answer to {asked}")
    return data, size


def is_same_host(address, url):
    """Whether two addresses are of one host."""
    return urlsplit(address)[:2] == urlsplit(url)[:2]


def steady(chunks):
    """The same chunks of bytes. Raises OSError if fewer than SLOWEST a second come for TIMEOUT seconds."""
    began, received = time.monotonic(), 0
    for chunk in chunks:
        yield chunk
        received += len(chunk)
        seconds = time.monotonic() - began
        if seconds > TIMEOUT:
            if received < SLOWEST * seconds:
                raise OSError(f"{received} bytes in {seconds:.0f} seconds")
            began, received = time.monotonic(), 0


def size_of(response, start, end):
    """The size of a file, from a response that has its bytes [start, end). Raises OSError if it has other bytes."""
    answered = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if response.status_code != 206 or not answered:
        raise OSError(f"status {response.status_code} in answer to a range")
    first, last, size = map(int, answered.groups())
    if (first, last + 1) != span(start, end, size):
        raise OSError(f"bytes {first} to {last} in answer to {start} to {end}")
    return size


# ---- whole files


def download(paths):
    """Download files of one revision of one repository into huggingface_hub's cache; returns their paths on disk.

    Files that are there already are not downloaded again. Raises UserError as `read_range` does.
    """
    (repository, revision, _), names = hub_file(paths[0]), [hub_file(path)[2] for path in paths]
    with readable(repository, "start again once it can: what came is kept"):
        folder = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=list(map(escape, names))
        )
    return [f"{folder}/{name}" for name in names]
