"""Row groups that came over the network, kept in a folder on disk.

A cache that is full stays as it is. Every epoch reads each row group once, in a new order, so no rule for what to evict
would save more than keeping what came first.
"""

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import re
import shutil
import zlib
from pathlib import Path
from urllib.parse import quote

from huggingface_hub.utils import WeakFileLock

from moco.data.hub import hub_file, is_remote, read_range, say
from moco.errors import explained, first_line

LONGEST_NAME = 200  # bytes; file systems take 255
FREE_SHARE = 0.1  # of the disk, which a cache without a limit leaves free


def read_ranges(path, name, ranges, cache, traffic):
    """Read ranges [(start, end), ...] of a file, as {start: bytes}.

    name: what to call them in the cache. cache: a RowGroupCache or None; if it has what lies on the Hub it is read
    there, and if not it keeps what was read. traffic: counts the bytes.
    """
    if cache is None or not is_remote(path):
        return {start: read_range(path, start, end, traffic)[0] for start, end in ranges}
    file, lengths = cache.path_of(path, name), [end - start for start, end in ranges]
    if data := cache.read(file, sum(lengths)):
        traffic.add("cache", sum(lengths))
    else:
        data = memoryview(b"".join(read_range(path, start, end, traffic)[0] for start, end in ranges))
        cache.keep(file, data)
    firsts = itertools.accumulate(lengths, initial=0)
    return {start: data[at : at + length] for (start, _), at, length in zip(ranges, firsts, lengths)}


def file_name(part):
    """A name for a file or folder: of a part of a path with "/" as "--", and no two parts have the same one."""
    name = quote(part)
    if re.search("--|-/|/-", name):  # "a/b" and "a--b" must not be one
        name = name.replace("-", "%2D")
    name = name.replace("/", "--")
    return name if len(name) <= LONGEST_NAME else hashlib.sha256(name.encode()).hexdigest()


class RowGroupCache:
    """A folder of row groups, one file each, that all processes of a machine and all its runs share.

    A file holds the bytes and their CRC-32. It gets its name, FOLDER/USER--NAME/COMMIT/FILE/ROW GROUP, once it is
    whole. One process writes at a time, so that the limit holds and no row group is counted twice.
    gigabytes: the limit; None leaves FREE_SHARE of the disk free. Raises UserError if the folder cannot be made.
    """

    def __init__(self, folder, gigabytes=None):
        self.folder, self.limit = Path(folder), gigabytes and gigabytes * 1e9
        self.sum = self.folder / ".bytes"  # how many are in the folder; without it they are counted
        self.full = multiprocessing.Value("b", False)  # for a process and its data workers
        with explained(f"--cache {folder} cannot be made", "name another folder", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError), self.lock():
            self.sum.unlink()  # a kill may have left it wrong

    def lock(self):
        return WeakFileLock(self.folder / ".lock")

    def path_of(self, path, name):
        """The path of the file that keeps a part of a file on the Hub."""
        repository, revision, file = hub_file(path)
        return self.folder.joinpath(*map(file_name, (repository, revision, file, name)))

    def read(self, path, length):
        """The `length` bytes that a path keeps, or None. A damaged file is reported and removed."""
        try:
            data = memoryview(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError:  # the disk's own
            data = memoryview(b"")
        if len(data) == length + 4 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little"):
            return data[:-4]
        say(f"{path} is damaged, and read anew")
        with contextlib.suppress(OSError), self.lock():
            path.unlink()
            self.sum.unlink()
        return None

    def keep(self, path, data):
        """Write bytes to a path if there is room. If the disk cannot be written, say so once and keep nothing more."""
        if self.full.value:
            return
        try:
            with self.lock():
                self.write(path, data)
        except OSError as error:  # the folder cannot be locked or counted
            self.give_up(error)

    def write(self, path, data):
        """What `keep` does once it has the lock."""
        if self.full.value or path.exists():  # another process saw to it while this one waited
            return
        used, size = self.used(), len(data) + 4
        if size > self.room(used):
            self.full.value = True
            return
        partial = self.folder / ".partial"  # one for all who write, so that kills leave no more than one
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.write(zlib.crc32(data).to_bytes(4, "little"))
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, path)
            self.sum.write_text(str(used + size))
        except OSError as error:
            self.give_up(error)
            with contextlib.suppress(OSError):
                partial.unlink()

    def give_up(self, error):
        """Keep nothing from now on, and say why once."""
        with self.full.get_lock():
            if not self.full.value and os.environ.get("LOCAL_RANK", "0") == "0":  # one of a machine
                say(f"{self.folder} cannot be written ({first_line(error)}), so nothing more is kept there")
            self.full.value = True

    def used(self):
        """Bytes in the folder."""
        try:
            return int(self.sum.read_text())
        except (OSError, ValueError):
            return sum(entry.stat().st_size for entry in self.folder.rglob("*") if entry.is_file())

    def room(self, used):
        """Bytes that may be added to those that are in the folder."""
        disk = shutil.disk_usage(self.folder)
        return self.limit - used if self.limit else disk.free - FREE_SHARE * disk.total

    def forecast(self, needed):
        """Say how much is in the folder and how much of `needed` bytes it will keep."""
        used = self.used()
        kept = min(needed, used + max(0, self.room(used)))
        limit = "the limit" if self.limit else f"{FREE_SHARE:.0%} of the disk stay free"
        return f"{used / 1e9:.1f} GB are there; of {needed / 1e9:.1f} GB {kept / 1e9:.1f} will be kept ({limit})"
