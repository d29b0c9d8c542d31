"""Single rows of parquet files on disk, in any order, without reading the row groups around them.

A shuffle over all rows asks for one image here and one there, but parquet is made to be read by row group: 100 images
of ImageNet, 11 MB, may be compressed as one piece. So one pass over the files notes where each image's bytes are. In an
uncompressed column these are just the bytes; under Snappy, the blocks of 64 kB that hold them, because no block refers
to another. From then on a row costs a read of about its own size, and the files need no copy in another format.

The pass checks each place: what is read there must equal what pyarrow reads. Rows without a place (other codecs, other
kinds of pages) are read with their row group each time; the pass prints how many there are.
Sources: https://parquet.apache.org/docs/file-format, and format_description.txt of https://github.com/google/snappy.
"""

import contextlib
import copy
import hashlib
import os

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from tqdm import tqdm

from moco.hub import read_range, shared_folder
from moco.stream import chunk_range

BLOCK = 2**16  # bytes that Snappy compresses at a time
NOWHERE = [-1, 0, 0, 0, 0]  # the place of a row that cannot be read by itself


class ParquetRows:
    """Parquet files on disk as {"image": {"bytes", "path"}, "label"}, of which any row is cheap to read.

    It has what `moco.data.IndexedImages` needs of a Hugging Face dataset. images: ParquetImages. All processes create
    one together: the first of a machine writes the table of places, 48 bytes a row, unless an earlier run has.
    """

    def __init__(self, images):
        self.images, self.features, self.column_names = images, images.features, images.column_names
        files = [(os.path.realpath(path), os.path.getsize(path), os.path.getmtime(path)) for path in images.paths]
        digest = hashlib.sha256(repr((files, images.columns)).encode()).hexdigest()[:40]
        table = shared_folder("places") / f"{digest}.npy"
        with PartialState().local_main_process_first():
            if not table.exists():
                write_places(table, images)
        self.table = np.load(table, mmap_mode="r")  # (rows, 6): a place, and the label, -1 where there is none
        self.rows = np.arange(len(self.table))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        if row == "label":
            return self.table[self.rows, 5]
        row = int(self.rows[row])
        *place, label = self.table[row].tolist()
        if place == NOWHERE:
            record = self.images[row]
        else:
            path = self.images.paths[self.images.groups[int(self.images.groups_of(row))][0]]
            data = read_place(lambda start, end: read_range(path, start, end, self.images.traffic)[0], *place)
            record = {"image": {"bytes": data, "path": None}}
        return record | ({"label": label} if "label" in self.column_names else {})

    def select(self, rows):
        """These rows as a sequence of their own."""
        part = copy.copy(self)
        part.rows = self.rows[rows]
        return part


def write_places(path, images):
    """Read all files once, and write the table of places."""
    groups = tqdm(range(len(images.groups)), f"places of {len(images)} images", leave=False)
    table = np.concatenate([places_in_group(images, group) for group in groups])
    missing = int((table[:, 0] < 0).sum())
    if missing:
        print(f"data    {missing} of {len(table)} rows are slow: each is read with its row group (see moco/pages.py)")
    partial = path.with_suffix(f".{os.getpid()}.npy")  # another run may write the same table
    np.save(partial, table)
    os.replace(partial, path)


def places_in_group(images, group):
    """Places and labels of the rows of a row group, (rows, 6) int64."""
    file, index = images.groups[group]
    row_group = images.footers[file].row_group(index)
    leaves = (row_group.column(i) for i in range(row_group.num_columns))
    chunk = next(leaf for leaf in leaves if leaf.path_in_schema in (f"{images.columns[0]}.bytes", images.columns[0]))
    start, end = chunk_range(chunk)
    columns = images.read_group(group)
    encoded = columns[images.columns[0]].combine_chunks()
    values = (encoded.field("bytes") if pa.types.is_struct(encoded.type) else encoded).to_pylist()
    table = np.zeros((len(values), 6), np.int64)
    table[:, :5] = NOWHERE
    if chunk.compression in ("UNCOMPRESSED", "SNAPPY"):
        data = read_range(images.paths[file], start, end, images.traffic)[0]
        with contextlib.suppress(IndexError, KeyError, ValueError, OSError):  # of a layout unlike the usual ones
            table[:, :5] = locate(data, values, chunk.compression == "SNAPPY")
        table[table[:, 0] >= 0, 0] += start
    if len(images.columns) > 1 and pa.types.is_integer(columns[images.columns[1]].type):
        table[:, 5] = columns[images.columns[1]].fill_null(-1).to_numpy()
    return table


def locate(data, values, is_snappy):
    """Where values lie in the bytes of a column chunk: a place of each, or NOWHERE."""
    places, at, i = [NOWHERE] * len(values), 0, 0
    while at < len(data) and i < len(values):
        header, at = read_header(data, at)
        kind, length, size = header[1], header[2], header[3]
        if kind == 3:  # a page of the second version, of which Snappy compresses only a part
            break
        page, blocks = data[at : at + size], None
        if is_snappy:
            page, blocks = pa.decompress(page, length, codec="snappy", asbytes=True), snappy_blocks(data, at)
        end = 0  # of the last value; the length of the next one stands between them, in four bytes
        while i < len(values):
            if values[i] is not None:
                found = end + 4 if page.startswith(values[i], end + 4) else page.find(values[i])
                if found < 0:
                    break  # in a later page
                end = found + len(values[i])
                place = [at + found, end - found, 0, 0, end - found]
                if is_snappy:
                    place = snappy_place(blocks, found, end, length)
                with contextlib.suppress(OSError, ValueError):  # of a block that refers to another after all
                    if read_place(lambda start, end: data[start:end], *place) == values[i]:
                        places[i] = place
            i += 1
        at += size
    return places


def read_place(read, start, size, raw, skip, length):
    """The `length` bytes at a place. read: (start, end) -> bytes.

    They are `size` bytes from `start` on, which Snappy makes `raw` bytes if that is not 0; `skip` come before them.
    """
    data = read(start, start + size)
    if raw:  # as if these blocks were all: a stream begins with its length, seven bits a byte
        whole = bytes(raw >> shift & 127 | 128 for shift in (0, 7, 14)) + bytes([raw >> 21])
        data = pa.decompress(whole + data, raw, codec="snappy", asbytes=True)
    return data[skip : skip + length]


# ---- formats


def read_header(data, at):
    """A page's header, {field: number, length of bytes, or header within}, and where it ends: Thrift's compact form."""
    fields, field = {}, 0
    while data[at]:
        field, kind, at = field + (data[at] >> 4), data[at] & 15, at + 1
        if kind == 12:
            fields[field], at = read_header(data, at)
        elif kind > 2:  # not true or false, which have no bytes of their own
            fields[field], at = read_varint(data, at)
            if kind == 8:  # bytes
                at += fields[field]
            else:
                fields[field] >>= 1  # the lowest bit is the sign, and nothing here has one
    return fields, at + 1


def snappy_blocks(data, at):
    """Where the blocks begin of a Snappy stream that begins at `at`, and where the last one ends."""
    length, at = read_varint(data, at)
    starts, done = [], 0
    while done < length:
        if done % BLOCK == 0:
            starts.append(at)
        kind, size = data[at] & 3, data[at] >> 2
        if kind == 0:  # a literal; its length less one is in the tag, or in up to four bytes behind it
            more = max(0, size - 59)
            size = (int.from_bytes(data[at + 1 : at + 1 + more], "little") if more else size) + 1
            at += 1 + more + size
        else:  # a copy of what came before
            size = (size & 7) + 4 if kind == 1 else size + 1
            at += (2, 3, 5)[kind - 1]
        done += size
    return [*starts, at]


def snappy_place(blocks, found, end, length):
    """The place of bytes [found, end) of a page of `length` bytes. blocks: of `snappy_blocks`."""
    first, last = found // BLOCK, max(found, end - 1) // BLOCK
    raw = min(length, (last + 1) * BLOCK) - first * BLOCK
    return [blocks[first], blocks[last + 1] - blocks[first], raw, found - first * BLOCK, end - found]


def read_varint(data, at):
    """A number, seven bits a byte and the lowest first, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at
