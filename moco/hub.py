"""Bytes of files, on the Hub or on disk: where a file lies, ranges of it, whole files, and how much was read.

The Hub counts requests for addresses with /resolve/ in them: 5,000 in five minutes for a free account. It answers such
a resolve with a signed address on another host, from which any number of ranges can be read for about an hour without
being counted. So a machine resolves each file once an hour: the signed address is kept in a small file that all
processes of the machine read, and one of them renews it, under a lock, shortly before it ends.
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
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from glob import escape
from urllib.parse import parse_qsl, unquote, urljoin, urlsplit

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status, http_backoff

from moco.errors import UserError, first_line
from moco.jsonfile import write_json

TIMEOUT = 20  # seconds without a byte after which a connection is given up and tried again
RETRIES, LONGEST_WAIT = 30, 64  # waits of 1, 2, 4 ... 64, 64 seconds: about 25 minutes in all
RETRIED = (408, 425, 429, *range(500, 600))  # everything but refusals
RESOLVES, WINDOW = 5_000, 300  # what the Hub serves a free account, in so many seconds
ADDRESS_LIFE = 3_600  # seconds, of a signed address that does not say when it ends
RENEW_AT = 0.95  # of an address's life; the rest, three minutes, is for reads that have begun and clocks that differ


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
    """The signed address of a file on the Hub, or None if the Hub serves the file itself.

    refused: an address that did not work and must not be returned again, or None. The processes of a machine share the
    address. Raises what `resolve` raises.
    """
    url = resolve_url(path)
    file = shared_folder("addresses") / f"{hashlib.sha256(url.encode()).hexdigest()[:40]}.json"

    def usable():
        try:
            known = json.loads(file.read_text())
            works = refused is None or known["address"] != refused
            return known if works and time.time() < known["renew"] else None
        except (OSError, ValueError, KeyError, TypeError):  # missing, or not ours
            return None

    if not (known := usable()):
        with WeakFileLock(file.with_suffix(".lock")):  # the others wait here, and then find the new address
            if not (known := usable()):
                known = resolve(url, traffic)
                try:
                    write_json(file, known)
                except OSError as error:
                    say(f"addresses cannot be kept ({first_line(error)}), so each read asks the Hub; make room")
    return known["address"]


def resolve(url, traffic):
    """Ask the Hub where a file lies: {"address": signed address or None, "renew": seconds since the epoch}."""
    address = url
    while urlsplit(address)[:2] == urlsplit(url)[:2]:  # a renamed repository is elsewhere on the Hub
        response = ask_hub("HEAD", address, traffic)
        if "Location" not in response.headers:
            return {"address": None, "renew": time.time() + ADDRESS_LIFE}
        address = urljoin(address, response.headers["Location"])
    # By the server's own clock, as this machine's may be wrong.
    served = parsedate_to_datetime(response.headers["Date"]).timestamp() if "Date" in response.headers else time.time()
    return {"address": address, "renew": time.time() + RENEW_AT * (address_end(address, served) - served)}


def ask_hub(method, url, traffic, follow_redirects=False, **headers):
    """The Hub's response to a counted request, which has the user's token, meant for nobody else.

    Failures of the network and the server are tried again RETRIES times. Raises HfHubHTTPError for a refusal, and the
    HTTP client's exceptions if the last try fails.
    """
    response = http_backoff(
        method, url, headers=build_hf_headers() | {"Accept-Encoding": "identity"} | headers, timeout=TIMEOUT,
        follow_redirects=follow_redirects, max_retries=RETRIES, max_wait_time=LONGEST_WAIT,
        retry_on_status_codes=RETRIED,
    )  # fmt: skip
    traffic.add("resolves")
    hf_raise_for_status(response)
    return response


def address_end(address, served):
    """When a signed address ends, in seconds since the epoch: as its query says, or ADDRESS_LIFE after `served`."""
    query = dict(parse_qsl(urlsplit(address).query))
    try:
        if "X-Amz-Expires" in query:
            signed = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            return signed.timestamp() + int(query["X-Amz-Expires"])
        return int(query["Expires"])
    except (KeyError, ValueError):
        return served + ADDRESS_LIFE


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
    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{what} is refused ({first_line(error)}); accept the dataset's terms on its page, then `hf auth login`",
            alone=True,
        ) from error
    except Exception as error:  # the HTTP client's own exceptions differ between versions of huggingface_hub
        raise UserError(f"{what} cannot be read ({first_line(error)}); {remedy}", alone=True) from error


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
    """Do what `read_range` does for a file on the Hub: read its signed address, and a new one each time that fails.

    The first new address is tried at once, the others after growing waits.
    """
    refused, asked = None, f"bytes={start}" if start < 0 else f"bytes={start}-{end - 1}"
    for wait in (0, *(min(2**i, LONGEST_WAIT) for i in range(RETRIES)), None):
        address = address_of(path, refused, traffic)
        try:
            if address:
                return read_address(address, start, end, asked)
            response = ask_hub("GET", resolve_url(path), traffic, follow_redirects=True, Range=asked)
            return response.content, size_of(response, start, end)
        except HfHubHTTPError:  # the Hub's own refusal
            raise
        except Exception:  # refused, ended, broken off, another range: the Hub may know a better address
            if wait is None:
                raise
            refused = address
            traffic.add("refused")
        time.sleep(wait)


def read_address(address, start, end, asked):
    """Do what `read_range` does, by one request to a signed address, which gets no token."""
    headers = build_hf_headers(token=False) | {"Range": asked, "Accept-Encoding": "identity"}
    with get_session().stream("GET", address, headers=headers, timeout=TIMEOUT) as response:
        size = size_of(response, start, end)  # before the rest is read, which may be the whole file
        data = response.read()
    first, last = span(start, end, size)
    if len(data) != last - first:
        raise OSError(f"{len(data)} bytes in answer to {asked}")
    return data, size


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
