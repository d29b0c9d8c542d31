"""Images in parquet files, on the Hub or on disk, read by row group, without a copy of the data.

Training reads them as `stream_rows` says. Evaluation reads in order: each worker of each process reads some row groups
that lie together, and no row group is read twice. A worker holds the row groups of its window and of the next, which it
reads ahead: about 2 x --shuffle-window x bytes an image, 2 x 800 x 110 kB = 176 MB for ImageNet, or two row groups if
these are larger.
"""

import copy
import hashlib
import io
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moco.data.cache import read_ranges
from moco.data.hub import is_remote, read_range
from moco.data.order import GroupedImages, stream_rows
from moco.errors import UserError

READERS = 4  # row groups a worker reads at a time
FOOTER_READERS = 16  # footers a process reads at a time
FOOTER_BYTES = 2**16  # guess of a footer's size; a second request fetches the rest of a larger one


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
        raise UserError(f"{path} is no parquet file")
    if length > len(tail):
        tail, _ = read_range(path, size - length, size, traffic)
    return pq.read_metadata(pa.BufferReader(tail))


def read_footers(paths, traffic):
    """The metadata of parquet files, of which FOOTER_READERS are read at a time."""
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        return list(pool.map(read_footer, paths, itertools.repeat(traffic)))


# ---- rows


class ParquetImages(GroupedImages):
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
        super().__init__([self.footers[file].row_group(i).num_rows for file, i in groups])
        self.groups = groups
        self.pool, self.owner, self.reading, self.last = None, None, {}, (None, None)

    def select_groups(self, numbers):
        """These row groups alone, in the order of the files, as a sequence of their own."""
        part = copy.copy(self)
        part.set_groups([self.groups[number] for number in sorted(numbers)])
        return part

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

    def training_rows(self, order, start):
        """Endless ([(epoch, row), ...], row groups to read ahead), a batch of one process each; see `stream_rows`."""
        return stream_rows(self.rows_in_group, order, start)

    def order_state(self, order):
        """What the order of the rows depends on besides the flags that a resumed run may not change."""
        return {"processes": order.world, "workers": max(1, order.workers), "window": order.window}

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
