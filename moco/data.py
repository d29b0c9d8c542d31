"""A data name becomes rows of encoded images: the built-in shapes, a folder of images, or a dataset on the Hub."""

import io
import sys
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import simplejpeg
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from tqdm import tqdm

from moco.errors import UserError, first_line
from moco.folder import TEST, TRAIN, folder_splits
from moco.shapes import shapes_dataset
from moco.stream import ParquetImages, read_footers

MAX_UNDECODABLE = 0.05  # share of the images of an epoch above which the data is at fault, not some files
JPEG = b"\xff\xd8"  # how such a file begins
UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on damaged files


# ---- a name -> datasets with the columns "image" (not decoded) and, where there are labels, "label"


def load_splits(name, image_column=None, label_column=None, revision=None, streaming=True):
    """The images that `name` stands for, as (train, test) data sets of rows; test is None where there is no split.

    name: "shapes"; a folder (of images, see `folder_splits`; or of parquet files; or what `save_to_disk` wrote); or
    USER/NAME on the Hub. revision: of a Hub name, None for main.
    streaming: read parquet files by row group where they lie (ParquetImages). All else is a Hugging Face dataset; what
    is neither in image files nor saved by `datasets` is downloaded or converted once a machine, and kept on disk.
    All processes call it together. Raises UserError for a name, folder or column that is not there.
    """
    folder, here = Path(name), name != "" and Path(name).is_dir()
    if name != "shapes" and not here:
        check_hub_name(name)
    try:
        if name == "shapes":
            with PartialState().local_main_process_first():  # drawn once a machine
                return shapes_dataset("train"), shapes_dataset("test")
        if here and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists()):
            splits = datasets.load_from_disk(name)
        elif here and (found := folder_splits(name)):
            splits = found
        else:
            builder = datasets.load_dataset_builder(name, revision=revision)
            files = builder.config.data_files or {}
            paths = [str(path) for split in files.values() for path in split]
            if streaming and paths and all(path.endswith(".parquet") for path in paths):
                return parquet_splits(name, files, image_column, label_column)
            if streaming and not here and PartialState().is_main_process:
                print(f"data    {name} is not in parquet files: downloaded once a machine in place of being streamed")
            with PartialState().local_main_process_first():
                builder.download_and_prepare()
            splits = builder.as_dataset()
    except datasets.exceptions.DatasetNotFoundError as error:
        if revision is not None and "evision" in str(error):
            raise UserError(f"--revision {revision} is not in {name}: {first_line(error)}") from error
        raise UserError(
            f"--data {name} is not open to you ({first_line(error)}); accept the terms on"
            f" https://huggingface.co/datasets/{name}, then run `hf auth login`"
        ) from error
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"--data {name} cannot be read as images: {first_line(error)}") from error
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}
    return tuple(split and select_columns(split, name, image_column, label_column) for split in train_and_test(splits))


def train_and_test(splits):
    """Of {split: data}, what to train on and what to test on, or None; what is neither is named."""
    train = next((split for split in TRAIN if split in splits), next(iter(splits)))
    test = next((split for split in TEST if split in splits and split != train), None)
    left_out = [split for split in splits if split not in (train, test)]
    if left_out and PartialState().is_main_process:
        print(f"data    split {train} to train on, {test or 'none'} to test on; left out: {', '.join(left_out)}")
    return splits[train], splits.get(test)


def parquet_splits(name, files, image_column, label_column):
    """(train, test) read by row group. The main process reads the footers, in parallel, and tells the others."""
    told = [None]
    if PartialState().is_main_process:
        told = [[paths and (list(paths), read_footers(paths)) for paths in train_and_test(files)]]
    splits = []
    for split in broadcast_object_list(told)[0]:
        if split is not None:
            paths, footers = split
            features = datasets.Features.from_arrow_schema(footers[0].schema.to_arrow_schema())
            columns = choose_columns(features, name, image_column, label_column)
            kind = features[columns[0]]
            fields = set(kind) if isinstance(kind, dict) else set()
            if not isinstance(kind, datasets.Image) and "binary" not in str(kind) and not {"bytes", "path"} <= fields:
                raise UserError(f"--image-column {columns[0]} of {name} does not hold images but {kind}")
            split = ParquetImages(paths, footers, *columns)
        splits.append(split)
    return tuple(splits)


def check_hub_name(name):
    """Raise UserError at once for a name that is no folder and that the Hub does not have or does not answer for."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"--data {name} is neither 'shapes', nor a folder here, nor of the Hub's form USER/NAME")
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=20)
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise UserError(
            f"--data {name} is neither a folder here nor a dataset you can read on the Hub ({first_line(error)}); check"
            f" the name, or if it is private or gated accept its terms on the Hub and run `hf auth login`"
        ) from error
    except Exception as error:  # no network, no answer, offline mode: each client library has its own exceptions
        try:
            datasets.load.CachedDatasetModuleFactory(name).get_module()
        except FileNotFoundError:
            raise UserError(
                f"--data {name} is neither a folder here nor downloaded before, and the Hub cannot be reached"
                f" ({first_line(error)}); once it can: accept the dataset's terms there if it asks, `hf auth login`"
            ) from error


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
    try:
        return dataset.cast_column("image", datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--image-column {image_column} of {name} does not hold images: {first_line(error)}") from error


def label_range(dataset):
    """(smallest, largest) label, a missing one as -1; None for a stream whose files do not say without being read."""
    if isinstance(dataset, ParquetImages):
        return dataset.label_range()
    labels = np.asarray(dataset["label"])
    return (int(labels.min()), int(labels.max())) if labels.dtype.kind in "iu" else (-1, 0)


def label_kind(dataset):
    """The type of the labels in a word, "int64" or such where they are whole numbers."""
    feature = dataset.features.get("label")
    return str(getattr(feature, "dtype", type(feature).__name__))


def has_labels(dataset):
    """Whether each image has a whole number from 0 on as its label, as far as can be told without reading."""
    if not label_kind(dataset).startswith(("int", "uint")):
        return False
    found = label_range(dataset)
    return found is None or found[0] >= 0


def count_classes(train_set, test_set, name):
    """The number of classes. Raises UserError where images have no labels that a classifier could learn."""
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
    ranges = [label_range(split) for split in splits]
    if None in ranges and not names[0]:
        raise UserError(
            f"--data {name} names no classes, and its files do not say in their footers how many labels there are;"
            " --no-streaming counts them"
        )
    known = [found for found in ranges if found]
    low, high = min((low for low, _ in known), default=0), max((high for _, high in known), default=0)
    classes = len(names[0]) if names[0] else high + 1
    if low < 0 or high >= classes:
        raise UserError(
            f"--data {name} has labels from {low} to {high} for {classes} classes: some images are not labelled"
        )
    return classes


def hold_out(dataset, images, purpose, seed):
    """Split a dataset at random into (the rest, `images` of it); a stream by whole row groups of at least as many."""
    rng = np.random.default_rng([*purpose, seed])
    if not isinstance(dataset, ParquetImages):
        order = rng.permutation(len(dataset))
        return dataset.select(np.sort(order[images:])), dataset.select(np.sort(order[:images]))
    order = rng.permutation(len(dataset.groups))
    count = int(np.searchsorted(dataset.rows_in_group[order].cumsum(), images)) + 1
    if count >= len(order):
        raise UserError(
            f"the training data has {len(order)} row groups, too few to hold {images} of {len(dataset)} images out;"
            " --no-streaming holds out single images"
        )
    return dataset.select_groups(order[count:]), dataset.select_groups(order[:count])


# ---- one image


def decode_image(record):
    """An encoded image, {"bytes", "path"}, of which one may be None -> (H, W, 3) uint8 array.

    JPEGs are decoded by simplejpeg, bit for bit as by Pillow and faster; what it refuses (CMYK, damage) and every other
    format by Pillow. Gray, palette and RGBA images become RGB, 16 bits become 8. Raises one of UNDECODABLE, also where
    a row has no image.
    """
    data = encoded_bytes(record)
    if data[:2] == JPEG:
        try:
            return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode == "F":
                raise ValueError("pixels are floating-point numbers, of unknown range")
            if image.mode.startswith("I"):  # 16-bit gray, which convert() would clip at 255; "I" may be less
                gray = np.asarray(image)
                gray = gray >> 8 if image.mode != "I" or gray.max() > 255 else gray
                return np.repeat(gray.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except RuntimeError as error:  # Pillow's, of a damaged AVIF
        raise OSError(str(error)) from error


def encoded_bytes(record):
    if record is None or (record["bytes"] is None and record["path"] is None):
        raise ValueError("the row has no image")
    return record["bytes"] if record["bytes"] is not None else Path(record["path"]).read_bytes()


def read_image(dataset, index, decode=decode_image):
    """Row `index` decoded, or the nearest row after it that can be.

    Returns (what `decode` makes of the record, row, [(name, reason)] if it is not the row asked for): of several
    undecodable rows together each counts once, when it is asked for itself.
    """
    failed = []
    for row in range(index, index + len(dataset)):
        row %= len(dataset)
        record = dataset[row]["image"]
        try:
            return decode(record), row, failed
        except UNDECODABLE as error:
            failed = failed or [((record or {}).get("path") or f"row {row}", first_line(error))]
    raise UserError(f"none of the {len(dataset)} images can be decoded; the first: {': '.join(failed[0])}")


# ---- what could not be decoded


def check_undecodable(undecodable, images, data):
    """Raise UserError where of so many images, of an epoch or an evaluation, too many could not be decoded."""
    if undecodable > MAX_UNDECODABLE * images:
        raise UserError(
            f"{undecodable} of {images} images of --data {data} cannot be decoded, more than {MAX_UNDECODABLE:.0%};"
            " mend or remove them"
        )


def name_undecodable(failed, named, accelerator, instead="its neighbour takes its place"):
    """Print each undecodable image once, on the main process; returns how many all processes have, which call together.

    failed: this process's [(name, reason), ...]. named: the set of names printed before, which grows. instead: what
    becomes of it.
    """
    everyone = gather_object(failed)
    for name, reason in everyone:
        if name not in named:
            named.add(name)
            if accelerator.is_main_process:
                tqdm.write(f"cannot decode {name} ({reason}): {instead}", file=sys.stderr)
    return len(everyone)
