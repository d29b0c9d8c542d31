"""A data name becomes rows of encoded images: the built-in shapes, a folder of images, or a dataset on the Hub."""

import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from moco.data.cache import RowGroupCache
from moco.data.decode import is_transparent, read_image
from moco.data.folder import TEST, TRAIN, folder_splits
from moco.data.hub import RESOLVES, WINDOW, Traffic, download, is_remote, shared_folder
from moco.data.order import GroupedImages, batch_rows
from moco.data.parquet import ParquetImages, read_footers
from moco.data.shapes import shapes_dataset
from moco.errors import UserError, explained, first_line
from moco.jsonfile import write_json

MAX_CLASSES = 1_000_000  # numbers beyond are no labels
LOOKED_AT = 64  # images whose headers are read at the start
STATTED = 10_000  # files whose sizes are part of a fingerprint, at most


# ---- rows that can be read one by one


class IndexedImages(GroupedImages):
    """A Hugging Face dataset as a sequence of {"image": {"bytes", "path"}, "label"}, of which any row is cheap to read.

    It has the methods of `ParquetImages`, so that nothing else needs to know which of the two it reads.
    """

    traffic = cache = None  # it is not streamed

    def __init__(self, dataset):
        super().__init__(np.ones(len(dataset)))
        self.dataset, self.features, self.column_names = dataset, dataset.features, dataset.column_names

    def select_rows(self, rows):
        """These rows alone, in this order, as a sequence of their own."""
        return IndexedImages(self.dataset.select(rows))

    def __getitem__(self, row):
        return self.dataset[row]

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
        labels = np.asarray(self.dataset["label"])
        return (int(labels.min()), int(labels.max())) if labels.dtype.kind in "iu" else (-1, 0)

    def training_rows(self, order, start):
        """Endless ([(epoch, row), ...], ()), a batch of one process each; see `batch_rows`."""
        return ((rows, ()) for rows in batch_rows(len(self), order, start))

    def order_state(self, order):
        """What else the order of the rows depends on: nothing."""
        return {}

    def row_groups(self, rows):
        """Nothing to read ahead."""
        return []

    def keep(self, groups):
        """Nothing to keep."""


def size_of(path):
    """Bytes of a file, None if there is none."""
    return os.path.getsize(path) if path and os.path.exists(path) else None


# ---- a name -> datasets with the columns "image" (not decoded) and, where there are labels, "label"


def load_splits(
    name, image_column=None, label_column=None, revision=None, no_streaming=False, cache=None, cache_gb=None
):
    """The images that `name` stands for, as (train, test) sequences of rows; test is None if there is no such split.

    name: "shapes"; a folder (of images, see `folder_splits`; or of parquet files; or what `save_to_disk` wrote); or
    USER/NAME on the Hub. revision: of a Hub name, None for main.
    Parquet files are read by row group (ParquetImages), on the Hub or with no_streaming after they were downloaded.
    Everything else becomes IndexedImages; what is neither in image files nor saved by `datasets` is
    downloaded or converted once a machine, and kept on disk. cache: a folder that keeps what is streamed from the Hub,
    at most cache_gb GB (None: as RowGroupCache has it), or None for no cache.
    All processes call it together. Raises UserError for a name, folder or column that does not exist.
    """
    here = name not in ("", "shapes") and Path(name).is_dir()
    if revision is not None and (here or name == "shapes"):
        raise UserError(f"--revision {revision} names a version on the Hub, which --data {name} is not; leave it out")
    if cache_gb and not cache:
        raise UserError(f"--cache-gb {cache_gb:g} limits --cache, which is missing: name its folder")
    kinds = (OSError, ValueError, datasets.exceptions.DatasetsError)
    terms = f"accept the terms on https://huggingface.co/datasets/{name}, then run `hf auth login`"
    with (
        explained(f"--data {name} cannot be read as images", "docs/data.md says what can", *kinds),
        explained(f"--data {name} is not open to you", terms, datasets.exceptions.DatasetNotFoundError),
    ):
        splits = find_splits(name, here, revision, not no_streaming)
        if isinstance(splits[0], list):
            splits = parquet_splits(name, splits, image_column, label_column, cache, cache_gb)
    splits = tuple(
        IndexedImages(select_columns(split, name, image_column, label_column))
        if isinstance(split, datasets.Dataset)
        else split
        for split in splits
    )
    if cache and splits[0].cache is None and PartialState().is_main_process:
        print(f"cache   not used, as {name} is not streamed from the Hub")
    if name != "shapes" and isinstance(splits[0], IndexedImages) and PartialState().is_main_process:
        looked_at = range(0, len(splits[0]), -(-len(splits[0]) // LOOKED_AT) or 1)
        if transparent := sum(is_transparent(splits[0][row]["image"]) for row in looked_at):
            print(f"        {transparent} of {len(looked_at)} images looked at have transparent pixels, shown on white")
    return splits


def find_splits(name, here, revision, streaming):
    """(train, test): each a Hugging Face dataset, a list of paths of parquet files, or None.

    here: whether `name` is a folder; otherwise it is on the Hub, or "shapes".
    """
    if name == "shapes":
        with PartialState().local_main_process_first():  # drawn once a machine
            return shapes_dataset("train"), shapes_dataset("test")
    folder, downloads = Path(name), None if here else downloads_of(name, revision)
    if not here and not check_hub_name(name, downloads, revision):
        return json.loads(downloads.read_text())
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        splits = datasets.load_from_disk(name)
    elif not here or not (splits := folder_splits(name)):
        builder = datasets.load_dataset_builder(name, revision=revision)
        splits = {str(split): list(map(str, paths)) for split, paths in (builder.config.data_files or {}).items()}
        if not splits or not all(path.endswith(".parquet") for path in itertools.chain(*splits.values())):
            if streaming and not here and PartialState().is_main_process:
                print(f"data    {name} is not in parquet files: downloaded once a machine instead of being streamed")
            with PartialState().local_main_process_first():
                builder.download_and_prepare()
            splits = builder.as_dataset()
    train, test = train_and_test({"train": splits} if isinstance(splits, datasets.Dataset) else splits)
    if not here and isinstance(train, list):
        train, test = broadcast_object_list([train, test])  # of one commit, even if there is a newer one by now
        if not streaming:
            with PartialState().local_main_process_first():
                train, test = download(train), test and download(test)
            if PartialState().is_local_main_process:
                write_json(downloads, [train, test])
    return train, test


def downloads_of(name, revision):
    """Where a dataset's downloaded parquet files are listed, [train, test], for when the Hub cannot be reached."""
    return shared_folder("downloads") / f"{hashlib.sha256(repr((name, revision)).encode()).hexdigest()[:40]}.json"


def train_and_test(splits):
    """Of {split: data}, what to train on and what to test on, or None; what is neither is named."""
    train = next((split for split in TRAIN if split in splits), next(iter(splits)))
    test = next((split for split in TEST if split in splits and split != train), None)
    left_out = [split for split in splits if split not in (train, test)]
    if left_out and PartialState().is_main_process:
        print(f"data    split {train} to train on, {test or 'none'} to test on; left out: {', '.join(left_out)}")
    return splits[train], splits.get(test)


def parquet_splits(name, splits, image_column, label_column, cache, cache_gb):
    """(train, test) as ParquetImages. splits: the paths of each one's files, or None.

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
            check_same_schema(paths, footers[i])
            features = datasets.Features.from_arrow_schema(footers[i][0].schema.to_arrow_schema())
            columns = choose_columns(features, name, image_column, label_column)
            kind = features[columns[0]]
            fields = set(kind) if isinstance(kind, dict) else set()
            if not isinstance(kind, datasets.Image) and "binary" not in str(kind) and not {"bytes", "path"} <= fields:
                raise UserError(f"--image-column {columns[0]} of {name} does not hold images but {kind}")
            images[i] = ParquetImages(paths, footers[i], *columns, traffic, cache)
    if remote and PartialState().is_main_process:
        print_costs(*images, cache)
    return tuple(images)


def check_same_schema(paths, footers):
    """Raise UserError unless all files of a split have the columns of the first."""
    first = footers[0].schema.to_arrow_schema()
    for path, footer in zip(paths, footers):
        columns = footer.schema.to_arrow_schema()
        if (columns.names, columns.types) != (first.names, first.types):
            raise UserError(
                f"{path} has the columns {str(columns.remove_metadata())!r:.120}, unlike {paths[0]}; they must be the"
                " same in all files of a split"
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


def check_hub_name(name, downloads=None, revision=None):
    """Whether the Hub has to be asked for a name; False if it does not answer and `downloads` lists what is here.

    Raises UserError at once for a name or revision that the Hub does not have, and if it does not answer and nothing is
    here.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or ".." in name:
        raise UserError(f"--data {name} is neither 'shapes', nor a folder here, nor of the Hub's form USER/NAME")
    try:
        huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=20)
    except huggingface_hub.errors.RevisionNotFoundError as error:
        raise UserError(f"--revision {revision} is not in {name} ({first_line(error)}); name another") from error
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise UserError(
            f"--data {name} is neither a folder here nor a dataset you can read on the Hub ({first_line(error)}); check"
            f" the name, or if it is private or gated accept its terms on the Hub and run `hf auth login`"
        ) from error
    except Exception as error:  # no network, no answer, offline mode: each client library has its own exceptions
        if downloads and downloads.exists():
            return False
        try:
            datasets.load.CachedDatasetModuleFactory(name).get_module()
        except FileNotFoundError:
            raise UserError(
                f"--data {name} is neither a folder here nor downloaded before, and the Hub cannot be reached"
                f" ({first_line(error)}); once it can: accept the dataset's terms there if it asks, `hf auth login`"
            ) from error
    return True


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
                " it must hold images (jpg, png ...), of several columns name one with --image-column"
            )
        image_column = images[0]
    if label_column is None:
        classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        label_column = classes[0] if len(classes) == 1 else "label" if "label" in features else None
    return image_column, label_column


def select_columns(dataset, name, image_column, label_column):
    """Keep the image and, if there is one, the label, under those names; images stay encoded."""
    image_column, label_column = choose_columns(dataset.features, name, image_column, label_column)
    dataset = dataset.select_columns([image_column] + ([label_column] if label_column else []))
    dataset = dataset.rename_columns({image_column: "image"} | ({label_column: "label"} if label_column else {}))
    what = f"--image-column {image_column} of {name} does not hold images"
    with explained(what, "name another", TypeError, ValueError, NotImplementedError):
        return dataset.cast_column("image", datasets.Image(decode=False))


def check_trainable(train_set, batch_size, name):
    """Raise UserError unless there is a batch of images, and one that can be decoded."""
    if len(train_set) < batch_size:
        raise UserError(f"--data {name} has {len(train_set)} images, fewer than a batch of {batch_size}")
    read_image(train_set, 0)


def label_kind(dataset):
    """The type of the labels in a word, "int64" or such where they are whole numbers."""
    feature = dataset.features.get("label")
    return str(getattr(feature, "dtype", type(feature).__name__))


def has_labels(dataset):
    """Whether each image has a whole number from 0 on as its label, as far as can be told without reading."""
    if not label_kind(dataset).startswith(("int", "uint")):
        return False
    found = dataset.label_range()
    return found is None or 0 <= found[0] <= found[1] < MAX_CLASSES


def count_classes(train_set, test_set, name):
    """The number of classes. Raises UserError if images have no labels that a classifier could learn."""
    if "label" not in train_set.column_names:
        raise UserError(f"--data {name} has no labels, which a linear probe needs; --label-column may name a column")
    if test_set is not None and "label" not in test_set.column_names:
        raise UserError(f"--data {name} has labels for training but none for validation; both must have them")
    splits = [split for split in (train_set, test_set) if split is not None]
    names = [getattr(split.features["label"], "names", None) for split in splits]
    if names[0] != names[-1]:
        raise UserError(
            f"--data {name}: training (with {len(names[0] or ())} named classes) and validation"
            f" ({len(names[-1] or ())}) must name the same classes in the same order"
        )
    for split in splits:
        kind = label_kind(split)
        if not kind.startswith(("int", "uint")):
            raise UserError(f"--data {name} has labels of type {kind}; they must be whole numbers from 0 on")
    ranges = [split.label_range() for split in splits]
    if None in ranges and not names[0]:
        raise UserError(
            f"--data {name} names no classes, and its files do not say in their footers how many labels there are;"
            " --no-streaming downloads them, and counts"
        )
    known = [found for found in ranges if found]
    low, high = min((low for low, _ in known), default=0), max((high for _, high in known), default=0)
    classes = len(names[0]) if names[0] else high + 1
    if classes > MAX_CLASSES:
        raise UserError(f"--data {name} has labels up to {high}; {MAX_CLASSES} classes are the most")
    if low < 0 or high >= classes:
        raise UserError(
            f"--data {name} has labels from {low} to {high} for {classes} classes: some images are not labelled"
        )
    return classes
