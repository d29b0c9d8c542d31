"""Images in parquet files, on the Hub or on disk, read by row group as a plan says, without a copy of the data.

The plan is a function of (seed, epoch): a permutation of all row groups, cut at exact row counts into one part for each
worker of each process, and each part into windows of some hundred rows that are shuffled. So every process takes the
same number of steps and reads only its share, no image comes twice in an epoch, and a run resumes at any step by
skipping windows without reading them. The streams of `datasets` do none of this if the number of files is not divisible
by the number of processes. Evaluation reads in order instead: each worker of each process reads some row groups that
lie together, and no row group is read twice.

A worker holds the row groups of its window and of the next, which it reads ahead: about
2 x --shuffle-window x bytes an image, 2 x 800 x 110 kB = 176 MB for ImageNet, or two row groups if these are larger.
"""

import copy
import hashlib
import io
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moco.cache import read_ranges
from moco.errors import UserError
from moco.hub import is_remote, read_range

READERS = 4  # row groups a worker reads at a time
FOOTER_READERS = 16  # footers a process reads at a time
FOOTER_BYTES = 2**16  # guess of a footer's size; a second request fetches the rest of a larger one


# ---- files


class Pieces(io.RawIOBase):
    """Some byte ranges of a file, {first byte: bytes}, as a file that pyarrow can read."""

    def __init__(self, pieces, size):
        self.pieces, self.size, self.position = pieces, size, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self):
        return self.position

    def read(self, n=-1):
        for start, data in self.pieces.items():
            if start <= self.position < start + len(data):
                first = self.position - start
                data = data[first : first + n if n >= 0 else None]
                self.position += len(data)
                return data
        return b""


def read_footer(path, traffic):
    """The metadata of a parquet file: its row groups, its columns, and where their bytes are."""
    tail, size = read_range(path, -FOOTER_BYTES, None, traffic)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1" or length > size:
        raise UserError(f"{path} is no parquet file")
    if length > len(tail):
        tail, _ = read_range(path, size - length, size, traffic)
    return pq.read_metadata(Pieces({size - len(tail): tail}, size))


def read_footers(paths, traffic):
    """The metadata of parquet files, of which FOOTER_READERS are read at a time."""
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        return list(pool.map(read_footer, paths, itertools.repeat(traffic)))


# ---- rows


class ParquetImages:
    """Parquet files as a sequence of {"image": {"bytes", "path"}, "label"}, read by row group when asked for.

    paths: on disk or hf://. footers: what `read_footers` gave. image_column, label_column (or None): their names.
    traffic: counts what is read. cache: a RowGroupCache, or None.
    Its rows are cheap to ask for in an order that stays within few row groups: the last one read is kept, and those
    that `keep` names are read ahead and kept.
    """

    def __init__(self, paths, footers, image_column, label_column, traffic, cache=None):
        self.paths, self.footers, self.traffic, self.cache = paths, footers, traffic, cache
        self.columns = [image_column] + ([label_column] if label_column else [])
        self.column_names = ["image"] + (["label"] if label_column else [])
        features = datasets.Features.from_arrow_schema(footers[0].schema.to_arrow_schema())
        self.features = {name: features[column] for name, column in zip(self.column_names, self.columns)}
        self.set_groups([(file, i) for file, footer in enumerate(footers) for i in range(footer.num_row_groups)])

    def set_groups(self, groups):
        """Hold these row groups, [(file, index in it), ...], in this order."""
        self.groups = groups
        self.rows_in_group = np.array([self.footers[file].row_group(i).num_rows for file, i in groups], dtype=np.int64)
        self.first_row = np.concatenate([[0], self.rows_in_group.cumsum()])
        self.pool, self.owner, self.reading, self.last = None, None, {}, (None, None)

    def select_groups(self, numbers):
        """These row groups alone, in the order of the files, as a sequence of their own."""
        part = copy.copy(self)
        part.set_groups([self.groups[number] for number in sorted(numbers)])
        return part

    def __len__(self):
        return int(self.first_row[-1])

    def fingerprint(self):
        """Of what the order of rows depends on: base names and row counts, not where the files lie."""
        names = [Path(path).name for path in self.paths]
        return hashlib.sha256(repr((names, self.groups, self.rows_in_group.tolist())).encode()).hexdigest()[:16]

    def label_range(self):
        """(smallest, largest) of all labels and 0, where a missing label counts as -1; None if that is not known.

        Footers say it, as a rule. If they do not, the label column of files on disk is read, and files on the Hub are
        left unknown.
        """
        ends = {0}
        for file, index in self.groups:
            row_group, label = self.footers[file].row_group(index), self.columns[1]
            chunks = (row_group.column(i) for i in range(row_group.num_columns))
            found = next((chunk.statistics for chunk in chunks if chunk.path_in_schema == label), None)
            nulls = found.null_count if found and found.has_null_count else None
            if nulls is not None and (found.has_min_max or nulls == row_group.num_rows):
                smallest, largest = found.min, found.max
            elif is_remote(self.paths[file]):
                return None
            else:
                with pq.ParquetFile(self.paths[file], metadata=self.footers[file]) as parquet:
                    labels = parquet.read_row_group(index, columns=[label])[label]
                nulls, (smallest, largest) = labels.null_count, pc.min_max(labels).as_py().values()
            ends |= ({-1} if nulls else set()) | {smallest, largest} - {None}
        return min(ends), max(ends)

    # ---- the methods that moco.data.IndexedImages has too

    def training_rows(self, batch_size, seed, start, rank, world, workers, window):
        """Endless ([(epoch, row), ...], row groups to read ahead), a batch of one process each; see `stream_rows`."""
        return stream_rows(self.rows_in_group, batch_size, seed, start, rank, world, workers, window)

    def order(self, world, workers, window):
        """What else the order of the rows depends on."""
        return {"processes": world, "workers": max(1, workers), "window": window}

    def sample(self, n):
        """A fixed sample of n rows, or all if there are fewer: those of random row groups."""
        rows = []
        for group in np.random.default_rng([*b"sample"]).permutation(len(self.rows_in_group)):
            if len(rows) >= n:
                break
            rows += range(self.first_row[group], self.first_row[group + 1])
        return rows[:n]

    def split(self, rows, parts):
        """A sequence of rows in contiguous parts, [(position of its first row, rows), ...]; some may be empty.

        Cut between row groups, so that each is read for one part alone.
        """
        starts = np.flatnonzero(np.diff(self.groups_of(rows), prepend=-1, append=-2))
        cuts = starts[np.searchsorted(starts, np.arange(parts + 1) * len(rows) // parts)].tolist()
        return [(low, rows[low:high]) for low, high in zip(cuts, cuts[1:])]

    def hold_out(self, images, purpose, seed):
        """(the rest, at least `images` rows): random row groups. Raises UserError if there are too few of them."""
        order = np.random.default_rng([*purpose, seed]).permutation(len(self.groups))
        count = int(np.searchsorted(self.rows_in_group[order].cumsum(), images)) + 1
        if count >= len(order):
            raise UserError(
                f"the training data has {len(order)} row groups, too few to hold {images} of {len(self)} images out; of"
                " what `datasets` saves with save_to_disk, given as --data FOLDER, single images are held out"
            )
        return self.select_groups(order[count:]), self.select_groups(order[:count])

    def row_groups(self, rows):
        """The row groups of `rows`, each once, in order: what to `keep` while these rows are read."""
        return list(dict.fromkeys(self.groups_of(rows).tolist()))

    def groups_of(self, rows):
        """The row group that each of `rows` is in."""
        return np.searchsorted(self.first_row, rows, "right") - 1

    def __getitem__(self, row):
        group = int(self.groups_of(row))
        if group in self.reading:
            table = self.reading[group].result()
        else:
            if self.last[0] != group:
                self.last = (group, self.read_group(group))
            table = self.last[1]
        values = [table[column][int(row - self.first_row[group])].as_py() for column in self.columns]
        if not isinstance(values[0], dict):  # a plain column of bytes
            values[0] = {"bytes": values[0], "path": None}
        return dict(zip(self.column_names, values))

    def keep(self, groups):
        """Read these row groups in the background, in this order, and forget all others."""
        if self.owner != os.getpid():  # a worker inherits its parent's pool, but not the threads
            self.pool, self.owner, self.reading = ThreadPoolExecutor(READERS), os.getpid(), {}
        for group in self.reading.keys() - set(groups):
            self.reading.pop(group).cancel()
        for group in groups:
            if group not in self.reading:
                self.reading[group] = self.pool.submit(self.read_group, group)

    def read_group(self, group):
        """One row group's columns as a table, by one request where their bytes lie together."""
        file, index = self.groups[group]
        ranges = self.ranges(group)
        name = "-".join([f"{index:05}", *self.columns])
        pieces = read_ranges(self.paths[file], name, ranges, self.cache, self.traffic)
        source = Pieces(pieces, max(end for _, end in ranges))
        parquet = pq.ParquetFile(source, metadata=self.footers[file], pre_buffer=False)
        return parquet.read_row_group(index, columns=self.columns, use_threads=False)

    def ranges(self, group):
        """[(start, end), ...] in bytes of what is read of a row group; columns that lie together are one."""
        file, index = self.groups[group]
        chunks = [self.footers[file].row_group(index).column(i) for i in range(self.footers[file].num_columns)]
        prefixes = tuple(f"{column}." for column in self.columns)  # of image.bytes, label ...
        wanted = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(prefixes)]
        ranges = []
        for start, end in sorted(map(chunk_range, wanted)):
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, end))
        return ranges

    def epoch_bytes(self):
        """The number of bytes that an epoch reads, each row group once."""
        return sum(end - start for group in range(len(self.groups)) for start, end in self.ranges(group))


def chunk_range(chunk):
    """[start, end) in bytes of a column chunk."""
    starts = [chunk.data_page_offset] + ([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])
    return min(starts), min(starts) + chunk.total_compressed_size


# ---- the plan


def part_windows(rows_in_group, seed, epoch, part, low, high, window):
    """Rows [low, high) of an epoch's order of row groups, as [(shuffled rows, row groups), ...].

    part: any ints that name it, the source of its shuffle. window: rows; it ends with the row group that reaches it.
    Yields arrays of row numbers and lists of row group numbers.
    """
    order = np.random.default_rng([*b"groups", seed, epoch]).permutation(len(rows_in_group))
    ends = rows_in_group[order].cumsum()
    starts = ends - rows_in_group[order]
    # The number of a row is its position in this order and the shift of its row group.
    shift = rows_in_group.cumsum()[order] - ends
    rng = np.random.default_rng([*b"windows", seed, epoch, *part])
    while low < high:
        first, last = np.searchsorted(ends, low, "right"), np.searchsorted(ends, min(low + window, high), "left")
        stop = min(int(ends[last]), high)
        rows_of_each = np.minimum(ends[first : last + 1], stop) - np.maximum(starts[first : last + 1], low)
        rows = np.arange(low, stop) + np.repeat(shift[first : last + 1], rows_of_each)
        rng.shuffle(rows)
        yield rows, order[first : last + 1].tolist()
        low = stop


def worker_windows(rows_in_group, batch_size, seed, start, rank, world, worker, workers, window):
    """Endless (epoch, rows, row groups) of one worker of one process, from the window that step `start` is in.

    The first window comes without the rows of the steps before `start`. Steps go to workers in turn.
    """
    steps_per_epoch, n = int(rows_in_group.sum()) // batch_size, batch_size // world

    def steps_before(step, worker):
        return (step - worker + workers - 1) // workers

    for epoch in itertools.count(start // steps_per_epoch):
        first, last = epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch
        rows = [(steps_before(last, w) - steps_before(first, w)) * n for w in range(workers)]
        low = rank * steps_per_epoch * n + sum(rows[:worker])
        skip = max(0, steps_before(start, worker) - steps_before(first, worker)) * n
        for shuffled, groups in part_windows(
            rows_in_group, seed, epoch, (rank, worker), low, low + rows[worker], window
        ):
            if skip < len(shuffled):
                yield epoch, shuffled[skip:], groups
            skip = max(0, skip - len(shuffled))


def worker_batches(windows, n):
    """Endless ([(epoch, row), ...] of n rows, row groups to have: of these rows, then of the next window)."""
    (epoch, rows, groups), ahead = next(windows), next(windows)
    while True:
        used = groups
        while len(rows) < n:  # a part of an epoch is whole batches, so these are of the same epoch
            rows, groups = np.concatenate([rows, ahead[1]]), ahead[2]
            used, ahead = used + groups, next(windows)
        yield [(epoch, row) for row in rows[:n].tolist()], used + ahead[2]
        rows = rows[n:]
        if len(rows) == 0:
            (epoch, rows, groups), ahead = ahead, next(windows)


def stream_rows(rows_in_group, batch_size, seed, start, rank, world, workers, window):
    """Endless batches of one process from step `start` on, as `worker_batches` has them.

    Worker step % workers reads the batch of a step, which is how a DataLoader hands batches out.
    """
    workers = max(1, workers)
    batches = [
        worker_batches(
            worker_windows(rows_in_group, batch_size, seed, start, rank, world, worker, workers, window),
            batch_size // world,
        )
        for worker in range(workers)
    ]
    for step in itertools.count(start):
        yield next(batches[step % workers])
