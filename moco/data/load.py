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
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from moco.data.cache import RowGroupCache
from moco.data.decode import is_transparent, read_image
from moco.data.folder import TEST, TRAIN, folder_splits
from moco.data.hub import RESOLVES, WINDOW, Traffic, download, is_remote, shared_folder
from moco.data.order import GroupedImages, batch_rows
from moco.data.parquet import ParquetImages, features_of, read_footers
from moco.data.shapes import shapes_dataset
from moco.errors import UserError, explained, first_line
from moco.jsonfile import write_json

LOOKED_AT = 64  # images whose headers are read at the start
STATTED = 10_000  # files whose sizes are part of a fingerprint, at most


# ---- rows that can be read one by one


class IndexedImages(GroupedImages):
    """A Hugging Face dataset as a sequence of {"image": {"bytes", "path"}, "label"}, of which any row is cheap to read.

    It has the methods of `ParquetImages`, so that nothing else needs to know which of the two it reads.
    """

    traffic = cache = None  # it is not streamed

    def __init__(self, dataset, commit=None):
        super().__init__(np.ones(len(dataset)))
        self.commit = commit
        self.dataset, self.features, self.column_names = dataset, dataset.features, dataset.column_names

    def select_rows(self, rows):
        """These rows alone, in this order, as a sequence of their own."""
        return IndexedImages(self.dataset.select(rows), self.commit)

    def without_labels(self):
        """The same images, and nothing else."""
        return IndexedImages(self.dataset.select_columns("image"), self.commit)

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
        column = self.dataset.select_columns("label").with_format("arrow")[:]["label"]  # at once, not row by row
        smallest, largest = pc.min_max(column).as_py().values() if pa.types.is_integer(column.type) else (None, None)
        return (-1, 0) if smallest is None else (-1 if column.null_count else smallest, largest)

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
    name, image_column=None, label_column=None, revision=None, config=None, split=None, no_streaming=False, cache=None,
    cache_gb=None, commit=None,
):  # fmt: skip
    """The images that `name` stands for, as (train, test) sequences of rows; test is None if there is no such split.

    name: "shapes"; a folder (of images, see `folder_splits`; or of parquet files; or what `save_to_disk` wrote); or
    USER/NAME on the Hub. revision: of a Hub name, None for main. config: the configuration of a dataset that has
    several. split: to train on, None for that of training. commit: USER/NAME@COMMIT that a resumed run was begun on.
    Parquet files are read by row group (ParquetImages), on the Hub or with no_streaming after they were downloaded.
    Everything else becomes IndexedImages; what is neither in image files nor saved by `datasets` is
    downloaded or converted once a machine, and kept on disk. cache: a folder that keeps what is streamed from the Hub,
    at most cache_gb GB (None: as RowGroupCache has it), or None for no cache.
    All processes call it together. Raises UserError for a name, folder, column or split that does not exist.
    """
    here = name not in ("", "shapes") and Path(name).is_dir()
    if revision is not None and (here or name == "shapes"):
        raise UserError(f"--revision {revision} names a version on the Hub, which --data {name} is not; leave it out")
    if name == "shapes" and (config or split):
        raise UserError(f"--data shapes has no --config and no --split to choose: leave {config or split} out")
    if cache_gb and not cache:
        raise UserError(f"--cache-gb {cache_gb:g} limits --cache, which is missing: name its folder")
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
    if test is not None and len(test) == 0:
        test = None
        if is_main:
            print(f"data    the test split of {name} has no rows, and is left out")
    if cache and train.cache is None and is_main:
        print(f"cache   not used, as {name} is not streamed from the Hub")
    if name != "shapes" and isinstance(train, IndexedImages) and is_main:
        looked_at = range(0, len(train), -(-len(train) // LOOKED_AT) or 1)
        if transparent := sum(is_transparent(train[row]["image"]) for row in looked_at):
            print(f"        {transparent} of {len(looked_at)} images looked at have transparent pixels, shown on white")
    return train, test


def find_splits(name, here, revision, config, split, commit, streaming):
    """((train, test), features, commit): each split a Hugging Face dataset, a list of paths of parquet files, or None.

    here: whether `name` is a folder; otherwise it is on the Hub, or "shapes". features: what a dataset card says of the
    columns, or None. commit: USER/NAME@COMMIT to read, or None; returned is the one that is read.
    """
    if name == "shapes":
        with PartialState().local_main_process_first():  # drawn once a machine
            return (shapes_dataset("train"), shapes_dataset("test")), None, None
    if not here:
        return find_on_hub(name, revision, config, split, commit, streaming)
    folder, features = Path(name), None
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        splits = datasets.load_from_disk(name)
        splits = {"train": splits} if isinstance(splits, datasets.Dataset) else splits
    elif not (splits := folder_splits(name, split)):
        splits, features = builder_splits(open_builder(name, config), name)
    elif config:
        raise UserError(f"--config {config} names a part of a dataset on the Hub, which --data {name} is not")
    return train_and_test(splits, split, name), features, None


def find_on_hub(name, revision, config, split, commit, streaming):
    """What `find_splits` has of a dataset on the Hub: at one commit, whatever its branch does later."""
    begun = commit.partition("@")[2] if commit and commit.startswith(f"{name}@") else None
    downloads = downloads_of(name, begun or revision, config, split)
    newest = broadcast_object_list([check_hub_name(name, downloads, revision)])[0]
    if begun and newest not in (None, begun) and PartialState().is_main_process:
        print(f"data    {name} has moved to {newest[:12]} since the run began, which goes on with {begun[:12]}")
    if newest is None and downloads.exists():
        paths, features = json.loads(downloads.read_text()), None
        if len(paths) > 2:
            features = datasets.Features.from_dict(paths[2]) if paths[2] else None
        found = re.search("/snapshots/([^/]+)/", paths[0][0])
        return tuple(paths[:2]), features, found and f"{name}@{found[1]}"
    commit = begun or newest
    builder = open_builder(name, config, commit)
    splits, features = builder_splits(builder, name, streaming)
    train, test = train_and_test(splits, split, name)
    if isinstance(train, list) and not streaming:
        with PartialState().local_main_process_first():
            train, test = download(train), test and download(test)
        if PartialState().is_local_main_process:
            known = [train, test, features and features.to_dict()]
            for asked in {revision, commit}:  # for a new run, and for one that resumes
                write_json(downloads_of(name, asked, config, split), known)
    return (train, test), features, commit and f"{name}@{commit}"


def open_builder(name, config, commit=None):
    """The builder of `datasets`. Raises UserError that lists the configurations if one of several must be named."""
    try:
        return datasets.load_dataset_builder(name, config, revision=commit)
    except ValueError as error:
        if "onfig" not in str(error):
            raise
        known = ", ".join(datasets.get_dataset_config_names(name, revision=commit))
        what = f"--config {config} is not in {name}, which has" if config else f"--data {name} has the configurations"
        raise UserError(f"{what} {known}; name one with --config") from error


def builder_splits(builder, name, streaming=False):
    """({split: paths of its parquet files, or a data set}, the features that the dataset card names or None)."""
    splits = {str(split): list(map(str, paths)) for split, paths in (builder.config.data_files or {}).items()}
    if splits and all(path.endswith(".parquet") for path in itertools.chain(*splits.values())):
        return splits, builder.info.features
    if streaming and PartialState().is_main_process:
        print(f"data    {name} is not in parquet files: downloaded once a machine instead of being streamed")
    with PartialState().local_main_process_first():
        builder.download_and_prepare()
    return builder.as_dataset(), None


def downloads_of(name, revision, config=None, split=None):
    """Where a dataset's downloaded parquet files are listed, for when the Hub cannot be reached."""
    key = (name, revision) + ((config, split) if config or split else ())
    return shared_folder("downloads") / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:40]}.json"


def train_and_test(splits, split, name):
    """Of {split: data}, what to train on and what to test on, or None; what is neither is named.

    split: to train on, if it is said. Raises UserError if there is no such split.
    """
    if split is not None and split not in splits:
        raise UserError(f"--split {split} is not in {name}, whose splits are {', '.join(splits)}")
    others = [each for each in splits if each not in TEST]
    train = split or next((each for each in TRAIN if each in splits), (others or list(splits))[0])
    test = next((each for each in TEST if each in splits and each != train), None)
    left_out = [each for each in splits if each not in (train, test)]
    if left_out and PartialState().is_main_process:
        print(f"data    split {train} to train on, {test or 'none'} to test on; left out: {', '.join(left_out)}")
    return splits[train], splits.get(test)


def parquet_splits(name, splits, card, commit, image_column, label_column, cache, cache_gb):
    """(train, test) as ParquetImages. splits: the paths of each one's files, or None. card: features, or None.

    The main process reads the footers, in parallel, and shares them.
    """
    traffic, footers, remote = Traffic(), [None, None], is_remote(splits[0][0])
    if PartialState().is_main_process:
        footers = [paths and read_footers(paths, traffic) for paths in splits]
    splits, footers = broadcast_object_list([splits, footers])
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
                    f"{path} names the classes {str(names)!r:.60}, unlike {paths[0]} ({str(expected)!r:.60}), so the same"
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


def check_hub_name(name, downloads=None, revision=None):
    """The commit that a name's revision (None: main) stands for; None if the Hub does not answer but the data is here.

    downloads: the file that lists what was downloaded, or None.

    Raises UserError at once for a name or revision that the Hub does not have, and if it does not answer and nothing is
    here.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or ".." in name:
        raise UserError(f"--data {name} is neither 'shapes', nor a folder here, nor of the Hub's form USER/NAME")
    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=20).sha
    except huggingface_hub.errors.RevisionNotFoundError as error:
        raise UserError(f"--revision {revision} is not in {name} ({first_line(error)}); name another") from error
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise UserError(
            f"--data {name} is neither a folder here nor a dataset you can read on the Hub ({first_line(error)}); check"
            f" the name, or if it is private or gated accept its terms on the Hub and run `hf auth login`"
        ) from error
    except Exception as error:  # no network, no answer, offline mode: each client library has its own exceptions
        if downloads and downloads.exists():
            return None
        try:
            datasets.load.CachedDatasetModuleFactory(name).get_module()
        except FileNotFoundError:
            raise UserError(
                f"--data {name} is neither a folder here nor downloaded before, and the Hub cannot be reached"
                f" ({first_line(error)}); once it can: accept the dataset's terms there if it asks, `hf auth login`"
            ) from error
        return None


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
