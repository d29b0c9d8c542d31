"""A data name becomes rows of encoded images: the built-in shapes, a folder of images, or a dataset on the Hub."""

import hashlib
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from moco.data.arrays import ImageRows
from moco.data.cache import RowGroupCache
from moco.data.decode import UNDECODABLE, decode_image, name_of, traits
from moco.data.find import find_splits
from moco.data.hub import RESOLVES, WINDOW, Traffic, is_remote
from moco.data.parquet import ParquetImages, features_of, read_footers
from moco.errors import UserError, explained, first_line

LOOKED_AT = 64  # images whose headers are read at the start
DEPTHS = (8, 12)  # bits that 16-bit images are taken to have, if no pixel of those looked at is above
STATTED = 10_000  # files whose sizes are part of a fingerprint, at most


# ---- rows that can be read one by one


class IndexedImages(ImageRows):
    """A Hugging Face dataset as a sequence of {"image": {"bytes", "path"}, "label"}, of which any row is cheap to read.

    It has the methods of `ParquetImages`.
    """

    channels, dtype = 3, np.dtype(np.uint8)  # as `decode_image` makes them
    name = None  # it is the one of --data

    def __init__(self, dataset, commit=None, bits=None):
        self.commit, self.bits = commit, bits
        self.dataset, self.features, self.column_names = dataset, dataset.features, dataset.column_names

    def select_rows(self, rows):
        """These rows alone, in this order, as a sequence of their own."""
        return IndexedImages(self.dataset.select(rows), self.commit, self.bits)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        values = self.dataset[row]
        if self.bits and values["image"]:
            values["image"]["bits"] = self.bits
        return values

    def fingerprint(self):
        """Of what a run depends on: names and sizes of files, or rows and columns. The same wherever the data lies.

        Of more than STATTED rows it takes the sizes of so many: asking a remote file system for those of 1.28 million
        files would take minutes. Otherwise it takes 0.7 s for so many.
        """
        images = self.dataset.data.column("image")  # of all rows, also where some are held out
        paths = [path or "" for path in pc.struct_field(images, "path").to_pylist()]
        root = os.path.commonprefix([min(paths), max(paths)]).rpartition(os.sep)[0]  # of all: they are sorted between
        digest = hashlib.sha256(repr((len(paths), self.column_names)).encode())
        digest.update("\0".join(path[len(root) :] for path in paths).encode())
        for row in range(0, len(paths), -(-len(paths) // STATTED)):
            data = (images[row].as_py() or {}).get("bytes")
            size = size_of(paths[row]) if data is None else len(data)
            digest.update(f"{size} ".encode())
        return digest.hexdigest()[:16]

    def label_range(self):
        """(smallest, largest) label, a missing one as -1."""
        column = self.dataset.select_columns("label").with_format("arrow")[:]["label"]  # at once, not row by row
        smallest, largest = pc.min_max(column).as_py().values() if pa.types.is_integer(column.type) else (None, None)
        return (-1, 0) if smallest is None else (-1 if column.null_count else smallest, largest)


def size_of(path):
    """Bytes of a file, None if there is none."""
    return os.path.getsize(path) if path and os.path.exists(path) else None


# ---- a name -> datasets with the columns "image" (not decoded) and, where there are labels, "label"


def load_splits(
    name, image_column=None, label_column=None, revision=None, config=None, split=None, no_streaming=False, cache=None,
    cache_gb=None, commit=None,
):  # fmt: skip
    """The images that `name` stands for, as (train, test) sequences of rows; test is None if there is no such split.

    name: "shapes"; a folder (of images, see `folder_splits`; or of parquet files; or what `save_to_disk` wrote); or
    USER/NAME on the Hub. revision: of a Hub name, None for main. config: the configuration of a dataset that has
    several. split: to train on, None for that of training. commit: USER/NAME@COMMIT that a resumed run was begun on.
    Parquet files are read by row group (ParquetImages), on the Hub or with no_streaming after they were downloaded.
    Everything else becomes IndexedImages; what is neither in image files nor saved by `datasets` is downloaded or
    converted once per machine, and kept on disk. cache: a folder that keeps what is streamed from the Hub, at most
    cache_gb GB (None: as RowGroupCache has it), or None for no cache.
    All processes call it together. Raises UserError for a name, folder, column or split that does not exist.
    """
    here = name not in ("", "shapes") and Path(name).is_dir()
    check_choices(name, here, revision, config, split, cache, cache_gb)
    kinds = (OSError, ValueError, datasets.exceptions.DatasetsError)
    terms = f"accept the terms on https://huggingface.co/datasets/{name}, then run `hf auth login`"
    with (
        explained(f"--data {name} cannot be read as images", "docs/data.md says what can", *kinds),
        explained(f"--data {name} is not open to you", terms, datasets.exceptions.DatasetNotFoundError),
    ):
        splits, features, commit = find_splits(name, here, revision, config, split, commit, not no_streaming)
        if isinstance(splits[0], list):
            splits = parquet_splits(name, splits, features, commit, image_column, label_column, cache, cache_gb)
    train, test = [
        IndexedImages(select_columns(part, name, image_column, label_column), commit)
        if isinstance(part, datasets.Dataset)
        else part
        for part in splits
    ]
    is_main = PartialState().is_main_process
    if test is not None and len(test) == 0:  # of parquet files
        test = None
        if is_main:
            print(f"data    the test split of {name} has no rows, and is left out")
    if cache and train.cache is None and is_main:
        print(f"cache   not used, as {name} is not streamed from the Hub")
    if name != "shapes":
        bits = broadcast_object_list([look_at(train) if is_main else None])[0]
        for part in (train, test):
            if part is not None:
                part.bits = bits
    return train, test


def check_choices(name, here, revision, config, split, cache, cache_gb):
    """Raise UserError for a choice that the data `name` does not have. here: whether it is a folder on this machine."""
    if revision is not None and (here or name == "shapes"):
        raise UserError(f"--revision {revision} names a version on the Hub, which --data {name} is not; leave it out")
    if name == "shapes" and (config or split):
        raise UserError(f"--data shapes has no --config and no --split to choose: leave {config or split} out")
    if cache_gb and not cache:
        raise UserError(f"--cache-gb {cache_gb:g} limits --cache, which is missing: name its folder")


def look_at(images):
    """Print what is uncommon in some images, and return how many bits gray pixels have that are stored in 16, or None.

    Of a stream they are those of the first row group.
    """
    is_stream = isinstance(images, ParquetImages)
    records = [images[row]["image"] for row in rows_looked_at(images, groups=1 if is_stream else LOOKED_AT)]
    found, of = [traits(record) for record in records], f"of {len(records)} images looked at"
    transparent, without_end, largest = zip(*found) if found else ((), (), ())
    if any(transparent):
        print(f"        {sum(transparent)} {of} have transparent pixels, shown on white")
    if any(without_end):
        print(f"        {sum(without_end)} {of} are JPEGs without an end marker, and are decoded all the same")
    largest = [value for value in largest if value is not None]
    if not largest:
        return None
    bits = next((bits for bits in DEPTHS if max(largest) < 2**bits), 16)
    print(f"        {len(largest)} {of} have 16 bits a pixel, of values up to {max(largest)}: scaled as {bits} bits")
    return bits if bits < 16 else None


def rows_looked_at(images, groups):
    """At most LOOKED_AT rows, at equal distances in so many groups at equal distances."""
    count = len(images.rows_in_group)
    for group in range(0, count, -(-count // groups) or 1):
        low, high = images.first_row[[group, group + 1]].tolist()
        yield from range(low, high, -(-(high - low) // max(1, LOOKED_AT // groups)) or 1)


def parquet_splits(name, splits, card, commit, image_column, label_column, cache, cache_gb):
    """(train, test) as ParquetImages. splits: the paths of each one's files, or None. card: features, or None.

    The main process reads the footers, in parallel, and shares them.
    """
    traffic, footers, remote = Traffic(), [None, None], is_remote(splits[0][0])
    if PartialState().is_main_process:
        footers = [paths and read_footers(paths, traffic) for paths in splits]
    footers = broadcast_object_list(footers)
    cache = RowGroupCache(cache, cache_gb) if cache and remote else None
    images = [None, None]
    for i, paths in enumerate(splits):
        if paths is not None:
            features = known_features(features_of(footers[i][0]), card)
            columns = choose_columns(features, name, image_column, label_column)
            check_same_schema(paths, footers[i], columns[1])
            kind = features[columns[0]]
            fields = set(kind) if isinstance(kind, dict) else set()
            if not isinstance(kind, datasets.Image) and "binary" not in str(kind) and "bytes" not in fields:
                raise UserError(f"--image-column {columns[0]} of {name} does not hold images but {kind}")
            images[i] = ParquetImages(paths, footers[i], *columns, traffic, cache, features, commit)
    if remote and PartialState().is_main_process:
        print_costs(*images, cache)
    return tuple(images)


def known_features(features, card):
    """Features of files, and where these do not know images or names of classes, those that the dataset card has."""
    known = dict(features)
    for column, feature in (card or {}).items():
        plain = isinstance(features.get(column), (datasets.Value, dict))
        is_number = plain and "int" in str(getattr(features[column], "dtype", ""))
        if plain and isinstance(feature, datasets.Image if not is_number else datasets.ClassLabel):
            known[column] = feature
    return datasets.Features(known)


def check_same_schema(paths, footers, label):
    """Raise UserError unless all files of a split have the columns of the first, and name its classes in its order.

    label: the column of labels, or None.
    """
    first = footers[0].schema.to_arrow_schema()
    for path, footer in zip(paths, footers):
        columns = footer.schema.to_arrow_schema()
        if (columns.names, columns.types) != (first.names, first.types):
            raise UserError(
                f"{path} has the columns {str(columns.remove_metadata())!r:.120}, unlike {paths[0]}; they must be the"
                " same in all files of a split"
            )
        if label and columns.metadata != first.metadata:
            names, expected = (getattr(features_of(each)[label], "names", None) for each in (footer, footers[0]))
            if names and expected and names != expected:
                raise UserError(
                    f"{path} names the classes {str(names)!r:.60}, unlike {paths[0]} ({str(expected)!r:.60}), so one"
                    " number would mean two classes; write both with the names in one order"
                )


def print_costs(train, test, cache):
    """Print what an epoch of a stream will ask of the Hub, and how much of it the cache will keep."""
    machines = PartialState().num_processes // int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))
    asked, size = len(train.paths) * machines, train.epoch_bytes()
    wait = (-(-asked // RESOLVES) - 1) * WINDOW // 60
    late = f", {RESOLVES} in {WINDOW // 60} minutes for a free account, so the last are read {wait} minutes late"
    print(
        f"stream  {len(train.paths)} files, {len(train.groups)} row groups, {size / 1e9:.1f} GB an epoch;"
        f" the Hub resolves {asked} addresses an hour" + (late if asked > RESOLVES else "")
    )
    if cache is None:
        print("cache   off: every epoch reads everything again; --cache FOLDER keeps it")
    else:
        print(f"cache   {cache.folder}: {cache.forecast(size + (test.epoch_bytes() if test else 0))}")


def choose_columns(features, name, image_column, label_column):
    """The columns of images and of labels (or None), where the flags leave them open."""
    for flag, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column is not None and column not in features:
            raise UserError(f"{flag} {column} is not in {name}, whose columns are {', '.join(features)}")
    if image_column is None:
        images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        if len(images) != 1:
            raise UserError(
                f"--data {name} has {len(images)} columns of images among {', '.join(features) or 'none'};"
                " it must have one (of jpg, png ...), or of several choose one with --image-column"
            )
        image_column = images[0]
    if label_column is None:
        classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        label_column = classes[0] if len(classes) == 1 else "label" if "label" in features else None
    return image_column, label_column


def select_columns(dataset, name, image_column, label_column):
    """Keep the image and, if there is one, the label, under those names; images stay encoded."""
    image_column, label_column = choose_columns(dataset.features, name, image_column, label_column)
    dataset = dataset.with_format(None)  # save_to_disk keeps one, which may hide the labels or make tensors of them
    dataset = dataset.select_columns([image_column] + ([label_column] if label_column else []))
    dataset = dataset.rename_columns({image_column: "image"} | ({label_column: "label"} if label_column else {}))
    what = f"--image-column {image_column} of {name} does not hold images"
    with explained(what, "name another", TypeError, ValueError, NotImplementedError):
        return dataset.cast_column("image", datasets.Image(decode=False))


def check_trainable(train_set, batch_size, name):
    """Raise UserError unless there is a batch of images, and one that can be decoded."""
    if len(train_set) < batch_size:
        raise UserError(f"--data {name} has {len(train_set)} images, fewer than a batch of {batch_size}")
    failed, groups = [], 4 if isinstance(train_set, ParquetImages) else LOOKED_AT
    for row in rows_looked_at(train_set, groups):  # before anything searches all of the data for one that can be
        values = train_set[row]
        try:
            decode_image(values["image"])
            return
        except UNDECODABLE as error:
            failed.append(f"{name_of(values, row)}: {first_line(error)}")
    raise UserError(
        f"none of the {len(failed)} images of --data {name} that were looked at can be decoded; the first: {failed[0]}"
    )
