"""Bytes of files, on the Hub or on disk: where a file lies, ranges of it, whole files, and how much was read.

The Hub counts requests for addresses with /resolve/ in them: 5,000 in five minutes for a free account. Such a resolve
answers with a signed address on another host, from which any number of ranges can be read for about an hour, uncounted.
So a machine resolves each file once an hour. What the Hub answered is in a small file that all processes of the machine
read, and that one of them renews, under a lock, shortly before the address ends.
"""

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
    """What was read in so many seconds, for the log, and in words for the progress bar. read: as Traffic.NAMES."""
    counts = dict(zip(Traffic.NAMES, read, strict=True))
    megabytes = {name: counts[name] / 1e6 for name in Traffic.NAMES[:3]}
    line = {f"{name}_mb": value for name, value in megabytes.items()}
    line["read_mb_per_second"] = sum(megabytes.values()) / seconds
    words = [f", {name} {value / seconds:.1f} MB/s" for name, value in megabytes.items() if value]
    return line | {name: round(counts[name]) for name in Traffic.NAMES[3:]}, "".join(words)


def count(traffic, name, amount=1):
    if traffic is not None:
        traffic.add(name, amount)


@functools.cache
def say(message):
    """Print a line, once a process, below the progress bar that the main process may show."""
    print(f"\nstream  {message}", file=sys.stderr, flush=True)


# ---- where a file lies


def hub_file(path):
    """The parts of hf://datasets/REPO@REVISION/FILE as (repository, revision, file)."""
    return tuple(map(unquote, re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", path).groups()))


def resolve_url(path):
    """The Hub's own address of a file, each request for which is counted."""
    repository, revision, name = hub_file(path)
    return huggingface_hub.hf_hub_url(repository, name, repo_type="dataset", revision=revision)


def shared_folder(name):
    """A folder for what the processes of a user share on this machine, beside what huggingface_hub keeps."""
    assets = huggingface_hub.constants.HF_ASSETS_CACHE
    folder = huggingface_hub.cached_assets_path("moco", f"user-{os.getuid()}", name, assets_dir=assets)
    folder.chmod(0o700)  # whoever has a signed address can read a gated file
    return folder


def address_of(path, refused=None, traffic=None):
    """The signed address of a file on the Hub, or None where the Hub serves the file itself.

    refused: an address that is not to be had again. All processes of a machine share what one of them was told.
    Raises as `resolve`.
    """
    url = resolve_url(path)
    known = shared_folder("addresses") / f"{hashlib.sha256(url.encode()).hexdigest()[:40]}.json"

    def usable():
        try:
            told = json.loads(known.read_text())
        except (OSError, ValueError):
            return None
        return told if time.time() < told["renew"] and (told["address"] is None or told["address"] != refused) else None

    if not (told := usable()):
        with WeakFileLock(known.with_suffix(".lock")):  # the others wait, and then find what this one was told
            if not (told := usable()):
                told = resolve(url, traffic)
                try:
                    write_json(known, told)
                except OSError as error:
                    say(f"addresses cannot be kept ({first_line(error)}), so each read asks the Hub; make room")
    return told["address"]


def resolve(url, traffic=None):
    """Ask the Hub where a file lies: {"address": signed address or None, "renew": seconds since the epoch}.

    Only the Hub itself is asked, as the token is for nobody else. Faults of the network and the server are tried again,
    RETRIES times. Raises the exceptions of huggingface_hub for refusals, and its HTTP client's when the last try fails.
    """
    address = url
    while urlsplit(address)[:2] == urlsplit(url)[:2]:  # a renamed repository is elsewhere on the Hub
        response = http_backoff(
            "HEAD", address, headers=build_hf_headers() | {"Accept-Encoding": "identity"}, timeout=TIMEOUT,
            follow_redirects=False, max_retries=RETRIES, max_wait_time=LONGEST_WAIT, retry_on_status_codes=RETRIED,
        )  # fmt: skip
        count(traffic, "resolves")
        hf_raise_for_status(response)
        if "Location" not in response.headers:
            return {"address": None, "renew": time.time() + ADDRESS_LIFE}
        address = urljoin(address, response.headers["Location"])
    # By the server's own clock, as this machine's may be wrong.
    served = parsedate_to_datetime(response.headers["Date"]).timestamp() if "Date" in response.headers else time.time()
    return {"address": address, "renew": time.time() + RENEW_AT * (address_end(address, served) - served)}


def address_end(address, served):
    """When a signed address ends, in seconds since the epoch, as its query says; ADDRESS_LIFE from `served` if not."""
    query = dict(parse_qsl(urlsplit(address).query))
    try:
        if "X-Amz-Expires" in query:
            signed = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            return signed.timestamp() + int(query["X-Amz-Expires"])
        return int(query["Expires"])
    except (KeyError, ValueError):
        return served + ADDRESS_LIFE


# ---- ranges


def read_range(path, start, end, traffic=None):
    """Bytes [start, end) of a file on disk or on the Hub, and the size of the file; start < 0 counts from its end.

    Raises UserError for a refusal (not logged in, terms not accepted, gone) and when the last try fails.
    """
    try:
        data, size = read_hub(path, start, end, traffic) if is_remote(path) else read_file(path, start, end)
    except (huggingface_hub.errors.GatedRepoError, huggingface_hub.errors.RepositoryNotFoundError) as error:
        raise UserError(
            f"{path} is refused ({first_line(error)}); accept the dataset's terms on its page, then `hf auth login`",
            alone=True,
        ) from error
    except Exception as error:  # the HTTP client's own exceptions differ between versions of huggingface_hub
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); once it can, go on with --resume", alone=True
        ) from error
    if len(data) != length_of(start, end, size):
        raise UserError(f"{path} ends before byte {end}; it changed or is damaged", alone=True)
    count(traffic, "network" if is_remote(path) else "disk", len(data))
    return data, size


def is_remote(path):
    return path.startswith("hf://")


def read_file(path, start, end):
    """As `read_range`, of a file on disk."""
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, io.SEEK_END)
        start, end = (max(0, size + start), size) if start < 0 else (start, end)
        file.seek(start)
        return file.read(end - start), size


def read_hub(path, start, end, traffic=None):
    """As `read_range`, of a file on the Hub: from its signed address, from a new one, at last through /resolve/."""
    refused = None
    for _ in range(2):
        address = address_of(path, refused, traffic)
        if address is None:
            break
        try:
            return read_address(address, start, end)
        except Exception:  # refused, ended, broken off, another range: whatever it is, the Hub may know a better one
            refused = address
            count(traffic, "refused")
    return read_through_hub(path, start, end, traffic)


def read_through_hub(path, start, end, traffic=None):
    """As `read_range`, by a request to the Hub that is redirected to wherever the file lies, and counted.

    Tried again, RETRIES times, unless the Hub itself refuses it; what the other host answers may differ next time.
    """
    for wait in (*(min(2**i, LONGEST_WAIT) for i in range(RETRIES)), None):
        response = http_backoff(
            "GET", resolve_url(path), headers=build_hf_headers() | range_headers(start, end), timeout=TIMEOUT,
            follow_redirects=True, max_retries=RETRIES, max_wait_time=LONGEST_WAIT, retry_on_status_codes=RETRIED,
        )  # fmt: skip
        count(traffic, "resolves")
        try:
            if not response.history:  # of redirects
                hf_raise_for_status(response)
            return response.content, size_of(response, start, end)
        except OSError:
            if wait is None or not response.history:
                raise
        time.sleep(wait)


def read_address(address, start, end):
    """As `read_range`, from an address that needs no token. Raises OSError and the HTTP client's exceptions."""
    headers = build_hf_headers(token=False) | range_headers(start, end)
    with get_session().stream("GET", address, headers=headers, timeout=TIMEOUT) as response:
        size = size_of(response, start, end)  # before the rest is read, which may be the whole file
        data = response.read()
    if len(data) != length_of(start, end, size):
        raise OSError(f"{len(data)} bytes in answer to {start} to {end}")
    return data, size


def length_of(start, end, size):
    """Bytes in a range of a file of so many."""
    return end - start if start >= 0 else min(-start, size)


def range_headers(start, end):
    return {"Range": f"bytes={start}" if start < 0 else f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}


def size_of(response, start, end):
    """The size of a file of which a response has bytes [start, end). Raises OSError if it does not have just these."""
    answered = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if response.status_code != 206 or not answered:
        raise OSError(f"status {response.status_code} in answer to a range")
    first, last, size = map(int, answered.groups())
    if (first, last + 1) != ((max(0, size + start), size) if start < 0 else (start, end)):
        raise OSError(f"bytes {first} to {last} in answer to {start} to {end}")
    return size


def download(paths):
    """Local paths of files on the Hub, of one revision of one repository, in huggingface_hub's own cache.

    What is there already is not asked for. Raises UserError as `read_range`.
    """
    (repository, revision, _), names = hub_file(paths[0]), [hub_file(path)[2] for path in paths]
    try:
        folder = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=[escape(name) for name in names]
        )
    except (huggingface_hub.errors.GatedRepoError, huggingface_hub.errors.RepositoryNotFoundError) as error:
        raise UserError(
            f"{repository} is refused ({first_line(error)}); accept its terms on its page, then `hf auth login`"
        ) from error
    except Exception as error:
        raise UserError(
            f"{repository} cannot be downloaded ({first_line(error)}); start again once it can: what came is kept"
        ) from error
    return [f"{folder}/{name}" for name in names]
