"""Images in parquet files, on the Hub or on disk, read by row group, without a copy of the data.

Training reads them as `stream_rows` says. Evaluation reads in order: each worker of each process reads some row groups
that lie together, and no row group is read twice. A worker holds the row groups of its window and of the next, which it
reads ahead: about 2 x the window's rows x bytes an image, 2 x 800 x 110 kB = 176 MB for ImageNet.
"""

import contextlib
import copy
import hashlib
import io
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moco.data.cache import read_ranges
from moco.data.hub import is_remote, read_range
from moco.data.order import GroupedImages, even_rows, stream_rows
from moco.errors import UserError, explained

READERS = 4  # row groups a worker reads at a time
FOOTER_READERS = 16  # footers a process reads at a time
FOOTER_BYTES = 2**16  # guess of a footer's size; a second request fetches the rest of a larger one
LARGEST_CHUNK = 2**31 - 2**20  # bytes of a column in a row group: pyarrow reads no nested column beyond 2 GB at once
WINDOW, MIXED = 800, 4  # rows that are shuffled at a time at least, and row groups
WINDOW_BYTES = 5e8  # that these row groups may take: a worker holds two windows


# ---- files


class Pieces:
    """Some byte ranges of a file, {first byte: bytes}, as a file that pyarrow can read."""

    closed = False

    def __init__(self, pieces, size):
        self.pieces, self.size, self.position = pieces, size, 0

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
        raise UserError(f"{path} is not a parquet file")
    if length > len(tail):
        tail, _ = read_range(path, size - length, size, traffic)
    return pq.read_metadata(pa.BufferReader(tail))


def features_of(footer):
    """The features of a file's columns, as its schema has them."""
    return datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())


def status_of(path):
    """What changes when a file on disk is replaced; None on the Hub, where a commit's files stay what they are."""
    return None if is_remote(path) else (os.stat(path).st_size, os.stat(path).st_mtime_ns)


@contextlib.contextmanager
def unchanged(path, status):
    """Raise UserError, whatever else goes wrong inside, if a file no longer has the status that it had."""
    try:
        yield
    finally:
        if not is_remote(path) and (not os.path.exists(path) or status_of(path) != status):
            what = f"{path} was changed or removed while this run reads it"
            raise UserError(f"{what}; put back what was there, and go on with --resume", alone=True)


def read_footers(paths, traffic):
    """The metadata of parquet files, of which FOOTER_READERS are read at a time."""
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        return list(pool.map(read_footer, paths, itertools.repeat(traffic)))


# ---- rows


class ParquetImages(GroupedImages):
    """Parquet files as a sequence of {"image": {"bytes", "path"}, "label"}, read by row group when asked for.

    paths: on disk or hf://. footers: what `read_footers` gave. image_column, label_column (or None): their names.
    traffic: counts what is read. cache: a RowGroupCache, or None. features: of the columns, if the files' own schema
    does not say. commit: see GroupedImages.
    Its rows are cheap to ask for in an order that stays within few row groups: the last one read is kept, and those
    that `keep` names are read ahead and kept. Raises UserError for row groups that are too large to be read.
    """

    def __init__(
        self, paths, footers, image_column, label_column, traffic, cache=None, features=None, commit=None
    ):  # fmt: skip
        self.paths, self.footers, self.traffic, self.cache, self.commit = paths, footers, traffic, cache, commit
        self.columns = [image_column] + ([label_column] if label_column else [])
        self.column_names = ["image"] + (["label"] if label_column else [])
        features = features or features_of(footers[0])
        self.features = {name: features[column] for name, column in zip(self.column_names, self.columns)}
        self.status = [status_of(path) for path in paths]
        groups = [(file, i) for file, footer in enumerate(footers) for i in range(footer.num_row_groups)]
        self.ranges_of = {(file, i): self.find_ranges(file, i) for file, i in groups}
        self.spans = {}  # of labels, by row group
        self.set_groups(groups)

    def set_groups(self, groups, chosen=None):
        """Hold these row groups, [(file, index in it), ...], in this order; of each the rows in `chosen`, or all."""
        super().__init__([self.footers[file].row_group(i).num_rows for file, i in groups] if chosen is None else
                         [len(rows) for rows in chosen])  # fmt: skip
        self.groups, self.chosen = groups, chosen
        self.pool, self.owner, self.reading, self.last = None, None, {}, (None, None)

    def select_rows(self, rows):
        """These rows alone, in this order, as a sequence of their own. Each of their row groups is still read whole."""
        rows = np.asarray(rows)
        groups = self.groups_of(rows)
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        chosen = np.split(rows - self.first_row[groups], starts[1:])
        numbers = groups[starts].tolist()
        if self.chosen is not None:
            chosen = [self.chosen[number][rows] for number, rows in zip(numbers, chosen)]
        part = copy.copy(self)
        part.set_groups([self.groups[number] for number in numbers], chosen if numbers else [])
        return part

    def fingerprint(self):
        """Of which rows these are: names of files, and where the bytes of each row group lie and the labels it has.

        The same wherever the files lie. Other images have other sizes, so that their bytes lie elsewhere.
        """
        names = [Path(path).name for path in self.paths]
        groups = [(group, self.ranges_of[group], self.label_statistics(*group)) for group in self.groups]
        digest = hashlib.sha256(repr((names, groups, self.rows_in_group.tolist())).encode())
        for rows in self.chosen or []:
            digest.update(np.asarray(rows, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def training_rows(self, order, start):
        """Endless ([(epoch, row), ...], row groups to read ahead), a batch of one process each; see `stream_rows`."""
        return stream_rows(self.rows_in_group, order._replace(window=self.window(order)), start)

    def order_state(self, order):
        """What the order of the rows depends on besides the flags that a resumed run may not change."""
        return {"processes": order.world, "workers": max(1, order.workers), "window": self.window(order)}

    # ---- what footers tell: labels, and how well a window mixes

    def label_statistics(self, file, index):
        """(smallest, largest, missing) label of a row group, as far as the footer tells; otherwise None."""
        if len(self.columns) == 1:
            return None
        row_group, label = self.footers[file].row_group(index), self.columns[1]
        chunks = (row_group.column(i) for i in range(row_group.num_columns))
        found = next((chunk.statistics for chunk in chunks if chunk.path_in_schema == label), None)
        nulls = found.null_count if found and found.has_null_count else None
        known = nulls is not None and (found.has_min_max or nulls == row_group.num_rows)
        return (found.min, found.max, nulls) if known else None

    def label_spans(self):
        """(smallest, largest) label of each row group, an array (groups, 2), a missing label as -1; None if unknown.

        Footers say it, as a rule. If they do not, the label column of files on disk is read, and files on the Hub are
        left unknown.
        """
        if len(self.columns) == 1 or not str(getattr(self.features["label"], "dtype", "")).startswith(("int", "uint")):
            return None
        for file, index in self.groups:
            if (file, index) in self.spans:
                continue
            found = self.label_statistics(file, index)
            if found is None and is_remote(self.paths[file]):
                return None
            if found is None:
                with pq.ParquetFile(self.paths[file], metadata=self.footers[file]) as parquet:
                    labels = parquet.read_row_group(index, columns=[self.columns[1]])[self.columns[1]]
                found = (*pc.min_max(labels).as_py().values(), labels.null_count)
            ends = {-1} if found[2] else set()
            ends |= {*found[:2]} - {None}
            self.spans[file, index] = (min(ends, default=0), max(ends, default=0))
        return np.array([self.spans[group] for group in self.groups], dtype=object).reshape(-1, 2)

    def label_range(self):
        """(smallest, largest) of all labels and 0, where a missing label counts as -1; None if that is not known."""
        spans = self.label_spans()
        return None if spans is None else (min(0, *spans[:, 0]), max(0, *spans[:, 1]))

    def is_sorted(self):
        """Whether a row group has few of the classes, as in files sorted by class; True if that is not known."""
        spans = self.label_spans()
        if spans is None:
            return True
        return bool(np.median(spans[:, 1] - spans[:, 0]) < (spans[:, 1].max() - spans[:, 0].min()) / 2)

    def sample(self, n, held_out=0):
        """What GroupedImages has; of files sorted by class rows of all row groups, so that no class is missing."""
        if not self.is_sorted():
            return super().sample(n, held_out)
        rng = np.random.default_rng([*b"sample"])
        rows = even_rows(len(self), min(n, len(self)), rng)
        first = even_rows(len(rows), held_out, rng)
        return [*rows[first].tolist(), *np.delete(rows, first).tolist()]

    def choose(self, n, rng):
        """n rows from all over the files: of whole row groups, sorted files would have classes that no other has."""
        return even_rows(len(self), n, rng)

    def window(self, order):
        """Rows that are shuffled at a time: --shuffle-window, or WINDOW and at least MIXED row groups.

        Fewer, if they are above WINDOW_BYTES.
        """
        if order.window is not None:
            return order.window
        largest = int(self.rows_in_group.max())
        return max(WINDOW, largest * max(1, min(MIXED, int(WINDOW_BYTES / (largest * self.row_bytes())))))

    def row_bytes(self):
        """Bytes of a row, on average."""
        rows = sum(self.footers[file].row_group(index).num_rows for file, index in self.groups)
        return max(1, self.epoch_bytes() / rows)

    def print_order(self, order):
        """Print how many row groups a window mixes, what memory this takes, and how many classes a batch sees."""
        window, groups, mean = self.window(order), len(self.groups), self.rows_in_group.mean()
        mixed = min(groups, max(1, round(window / mean)))
        held = 2 * min(max(window, mean), len(self)) * self.row_bytes()
        line = (
            f"window  {window} rows are shuffled at a time: {mixed} of {groups} row groups; a worker holds two windows,"
        )
        line += f" {held / 1e9:.1f} GB"
        if mixed < min(MIXED, groups):
            line += f" (with {MIXED} row groups above {2 * WINDOW_BYTES / 1e9:g} GB: --shuffle-window mixes more)"
        spans = self.label_spans()
        if spans is not None:
            groups = mixed + order.share / mean  # of a batch, which may begin in one window and end in the next
            seen, classes = classes_in_batch(spans.astype(np.int64), groups, order)
            line += f"; a batch sees about {seen} of {classes} classes"
        print(line)

    # ---- reading

    def row_groups(self, rows):
        """The row groups of `rows`, each once, in order: what to `keep` while these rows are read."""
        return list(dict.fromkeys(self.groups_of(rows).tolist()))

    def __getitem__(self, row):
        group = int(self.groups_of(row))
        if group in self.reading:
            table = self.reading[group].result()
        else:
            if self.last[0] != group:
                self.last = (group, self.read_group(group))
            table = self.last[1]
        values = [table[column][int(row - self.first_row[group])].as_py() for column in self.columns]
        if isinstance(values[0], dict):
            values[0] = {"bytes": values[0].get("bytes"), "path": values[0].get("path")}
        else:  # a plain column of bytes
            values[0] = {"bytes": values[0], "path": None}
        if self.bits:
            values[0]["bits"] = self.bits
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
        """The rows of one row group as a table, by one request where their bytes lie together."""
        file, index = self.groups[group]
        path, ranges = self.paths[file], self.ranges(group)
        name = "-".join([f"{index:05}", *(column.replace("%", "%25").replace("-", "%2D") for column in self.columns)])
        damaged = explained(f"row group {index} of {path} cannot be read", "repair or replace the file", alone=True)
        with unchanged(path, self.status[file]), damaged:
            pieces = read_ranges(path, name, ranges, self.cache, self.traffic)
            source = Pieces(pieces, max(end for _, end in ranges))
            parquet = pq.ParquetFile(source, metadata=self.footers[file], pre_buffer=False)
            table = parquet.read_row_group(index, columns=self.columns, use_threads=False)
        # A copy of the rows, so that the others do not stay in memory.
        return table if self.chosen is None else table.take(self.chosen[group])

    def ranges(self, group):
        """[(start, end), ...] in bytes of what is read of a row group; columns that lie together are one."""
        return self.ranges_of[self.groups[group]]

    def find_ranges(self, file, index):
        """What `ranges` has of a row group of a file. Raises UserError for more than can be read at once."""
        row_group, ranges = self.footers[file].row_group(index), []
        prefixes = tuple(f"{column}." for column in self.columns)  # of image.bytes, label ...
        chunks = map(row_group.column, range(row_group.num_columns))
        wanted = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(prefixes)]
        largest = max(chunk.total_uncompressed_size for chunk in wanted)
        if largest > LARGEST_CHUNK:
            raise UserError(
                f"{self.paths[file]} has {largest / 1e9:.1f} GB of {self.columns[0]} in one row group"
                f" ({row_group.num_rows} rows), and {LARGEST_CHUNK / 1e9:.1f} GB are the most that can be read at once;"
                " let `datasets` load the files and save_to_disk them, then give that folder as --data"
            )
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


def classes_in_batch(spans, groups, order):
    """(how many classes a batch has, as expected, how many there are) if its rows are from so many groups a process.

    spans: (smallest, largest) label of each row group, among which its labels are taken to be equally frequent.
    """
    lowest, classes = spans.min(), int(spans.max() - spans.min()) + 1
    count = min(len(spans), max(1, round(groups * order.world)))
    seen, rng = [], np.random.default_rng(0)
    for _ in range(20):
        expected = np.zeros(classes)  # images of each class
        for low, high in spans[rng.permutation(len(spans))[:count]] - lowest:
            expected[low : high + 1] += order.batch_size / count / (high + 1 - low)
        seen.append((1 - np.exp(-expected)).sum())
    return round(np.mean(seen)), classes
