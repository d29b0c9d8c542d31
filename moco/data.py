"""A data name becomes batches of uint8 crops: the built-in shapes, a folder of images, or a dataset on the Hub.

Training batches are a function of (seed, step): step s takes its rows of the permutation of its epoch, and each image
its crops from (seed, epoch, image). No state travels from one batch to the next, so a run resumes at any step with any
number of workers, and one process reads what several read together.
"""

import contextlib
import io
import itertools
import math
import os
import sys
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from moco.augment import RECIPES, crop_pair, random_crop_boxes
from moco.errors import UserError, first_line
from moco.shapes import shapes_dataset
from moco.stream import ParquetImages, read_footers, stream_keys

MAX_UNDECODABLE = 0.05  # share of the images of an epoch above which the data is at fault, not some files
JPEG = b"\xff\xd8"  # how such a file begins
UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on damaged files


# ---- a name -> datasets with the columns "image" (not decoded) and, where there are labels, "label"


def load_splits(name, image_column=None, label_column=None, revision=None, streaming=True):
    """The images that `name` stands for, as (train, test) data sets of rows; test is None where there is no split.

    name: "shapes"; a folder (a folder of images for each class, or flat, below train/ and val/ if there is a split;
    or parquet files; or what `save_to_disk` wrote); or USER/NAME on the Hub. revision: of a Hub name, None for main.
    streaming: read parquet files by row group where they lie (ParquetImages); everything else, and parquet files
    without it, is downloaded or converted once a machine and kept on disk (a Hugging Face dataset).
    All processes call it together. Raises UserError for a name, folder or column that is not there.
    """
    if name == "shapes":
        with PartialState().local_main_process_first():  # drawn once a machine
            return shapes_dataset("train"), shapes_dataset("test")
    folder = Path(name)
    if not folder.is_dir():
        check_hub_name(name)
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            splits = datasets.load_from_disk(name)
        else:
            builder = datasets.load_dataset_builder(name, revision=revision)
            files = builder.config.data_files or {}
            if (
                streaming
                and files
                and all(str(path).endswith(".parquet") for paths in files.values() for path in paths)
            ):
                return parquet_splits(name, files, image_column, label_column)
            if streaming and not folder.is_dir() and PartialState().is_main_process:
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
    """Of {split: data}, what to train on and what to test on, or None."""
    train = "train" if "train" in splits else next(iter(splits))
    test = next((split for split in ("validation", "test") if split in splits and split != train), None)
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
            split = ParquetImages(paths, footers, *choose_columns(features, name, image_column, label_column))
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
                " it must hold images (jpg, png ...), and of several columns --image-column must name one"
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
    except (TypeError, ValueError) as error:
        raise UserError(f"--image-column {image_column} of {name} does not hold images: {first_line(error)}") from error


def label_range(dataset):
    """(smallest, largest) label, a missing one as -1; None for a stream whose files do not say without being read."""
    if isinstance(dataset, ParquetImages):
        return dataset.label_range()
    labels = np.asarray(dataset["label"])
    return (int(labels.min()), int(labels.max())) if labels.dtype.kind in "iu" else (-1, 0)


def has_labels(dataset):
    """Whether each image has a whole number from 0 on as its label, as far as can be told without reading."""
    kind = str(getattr(dataset.features.get("label"), "dtype", ""))
    if not kind.startswith(("int", "uint")):
        return False
    found = label_range(dataset)
    return found is None or found[0] >= 0


# ---- one image


def decode_image(record):
    """An encoded image, {"bytes", "path"}, of which one may be None -> (H, W, 3) uint8 array.

    JPEGs are decoded by simplejpeg, bit for bit as by Pillow and faster; what it refuses (CMYK, damage) and every other
    format by Pillow. Gray, palette and RGBA images become RGB, 16 bits become 8. Raises one of UNDECODABLE.
    """
    data = encoded_bytes(record)
    if data[:2] == JPEG:
        try:
            return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):  # 16-bit gray, which convert() would clip at 255
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def encoded_bytes(record):
    return record["bytes"] if record["bytes"] is not None else Path(record["path"]).read_bytes()


def decode_crops(record, draw_boxes, size):
    """Crops of an encoded image, (views, size, size, 3) uint8; raises as `decode_image`.

    draw_boxes: (height, width) -> boxes, (views, 4) int. A JPEG is decoded at a half, a quarter or an eighth of its
    sides where every crop still has `size` pixels: two thirds of the time for 1600 x 1200 pixels. Crops then begin at
    the nearest of fewer pixels, and differ by about a level from those of the whole image.
    """
    data = encoded_bytes(record)
    if data[:2] == JPEG:
        with contextlib.suppress(ValueError):
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            boxes = draw_boxes(height, width)
            factor = next((factor for factor in (8, 4, 2) if boxes[:, 2:].min() >= factor * size), 1)
            if factor == 1:
                return crop_pair(simplejpeg.decode_jpeg(data), boxes, size)
            least = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
            image = simplejpeg.decode_jpeg(data, **least)
            ends = (boxes[:, :2] + boxes[:, 2:]) / factor
            starts, ends = np.rint(boxes[:, :2] / factor).astype(int), np.rint(ends).astype(int)
            return crop_pair(image, np.concatenate([starts, np.minimum(ends, image.shape[:2]) - starts], axis=1), size)
    image = decode_image({"bytes": data, "path": None})
    return crop_pair(image, draw_boxes(*image.shape[:2]), size)


def read_image(dataset, index, decode=decode_image):
    """Row `index` decoded, or the nearest row after it that can be.

    Returns (what `decode` makes of the record, row, [(name, reason) of the undecodable]).
    """
    undecodable = []
    for row in range(index, index + len(dataset)):
        row %= len(dataset)
        record = dataset[row]["image"]
        try:
            return decode(record), row, undecodable
        except UNDECODABLE as error:
            undecodable.append((record["path"] or f"row {row}", first_line(error)))
    raise UserError(f"none of the {len(dataset)} images can be decoded; the first: {': '.join(undecodable[0])}")


def sample_rows(dataset, n):
    """A fixed sample of n rows, or all if there are fewer: random ones; of a stream, those of random row groups."""
    rng = np.random.default_rng([*b"sample"])
    if not isinstance(dataset, ParquetImages):
        return rng.permutation(len(dataset))[:n].tolist()
    rows = []
    for group in rng.permutation(len(dataset.rows_in_group)):
        if len(rows) >= n:
            break
        rows += range(dataset.first_row[group], dataset.first_row[group + 1])
    return rows[:n]


# ---- training batches


def empty_batch(*shape):
    """A uint8 tensor for a batch; in a data worker in shared memory, to which it else would be copied to leave it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as PyTorch's own collation does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


class CropPairs(Dataset):
    """Two random crops of each image of a batch.

    least: the smallest share of an image's area in a crop.
    Item ([(epoch, index), ...], row groups to read ahead) is (views (n, 2, size, size, 3) uint8,
    [(name, reason) of undecodable images]).
    """

    def __init__(self, dataset, size, seed, least=0.2):
        self.dataset, self.size, self.seed, self.least = dataset, size, seed, least

    def __getitem__(self, item):
        keys, groups = item
        if groups:
            self.dataset.keep(groups)
        views = empty_batch(len(keys), 2, self.size, self.size, 3)
        undecodable = []
        for view, key in zip(views, keys, strict=True):
            crops, _, failed = read_image(self.dataset, key[1], lambda record, key=key: self.cut(record, *key))
            view.copy_(crops)
            undecodable += failed
        return views, undecodable

    def cut(self, record, epoch, index):
        """Both crops of a record: of the image that the key names, or of the neighbour in its place."""
        rng = crop_generator(self.seed, epoch, index)
        return decode_crops(record, lambda h, w: random_crop_boxes(h, w, rng, self.least), self.size)


class LabelledCrops(Dataset):
    """One random crop of each image of a batch, flipped or not, with its label: what a classifier is trained on.

    RandomResizedCrop of torchvision's default scale 0.08-1, larger than the encoders' 0.2-1, as in the reference.
    Item ([(epoch, index), ...], row groups to read ahead) is (crops (n, size, size, 3) uint8, labels (n,) int64,
    [(name, reason) of undecodable images]); the neighbour that replaces an undecodable image brings its own label.
    """

    def __init__(self, dataset, size, seed):
        self.dataset, self.size, self.seed = dataset, size, seed

    def __getitem__(self, item):
        keys, groups = item
        if groups:
            self.dataset.keep(groups)
        crops = empty_batch(len(keys), self.size, self.size, 3)
        labels, undecodable = torch.empty(len(keys), dtype=torch.long), []
        for i, key in enumerate(keys):
            crops[i], row, failed = read_image(self.dataset, key[1], lambda record, key=key: self.cut(record, *key))
            labels[i] = self.dataset[row]["label"]
            undecodable += failed
        return crops, labels, undecodable

    def cut(self, record, epoch, index):
        """The crop of a record."""
        rng = crop_generator(self.seed, epoch, index)
        crop = decode_crops(record, lambda h, w: random_crop_boxes(h, w, rng, least=0.08, views=1), self.size)[0]
        return crop.flip(1) if rng.random() < 0.5 else crop


class CachedFeatures(Dataset):
    """Features that `moco.knn.cache_features` wrote to a folder, read from disk as far as memory does not hold them.

    Item [(epoch, index), ...] is (features (n, width) float16, labels (n,) int64, []): the same in every epoch.
    """

    def __init__(self, folder):
        self.features, self.labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "labels"))

    def __getitem__(self, keys):
        rows = [index for _, index in keys]
        return torch.from_numpy(self.features[rows]), torch.from_numpy(self.labels[rows]), []


def crop_generator(seed, epoch, index):
    """The source of the crops of one image in one epoch."""
    return np.random.default_rng([*b"crop", seed, epoch, index])


def batch_keys(images, batch_size, seed, start, rank, world):
    """Endless [(epoch, index), ...] of one process, from step `start` on.

    Each epoch is a fresh permutation of all images; its remainder below a batch is dropped, another one each epoch.
    """
    steps_per_epoch, n = images // batch_size, batch_size // world
    permuted = None
    for step in itertools.count(start):
        epoch, position = divmod(step, steps_per_epoch)
        if permuted is None or position == 0:
            permuted = np.random.default_rng([*b"order", seed, epoch]).permutation(images)
        first = position * batch_size + rank * n
        yield [(epoch, index) for index in permuted[first : first + n].tolist()]


def train_keys(dataset, batch_size, seed, start, rank, world, workers, window):
    """Endless ([(epoch, index), ...], row groups to read ahead) of this process's rows, from global step `start` on."""
    if isinstance(dataset, ParquetImages):
        return stream_keys(dataset.rows_in_group, batch_size, seed, start, rank, world, workers, window)
    return ((keys, ()) for keys in batch_keys(len(dataset), batch_size, seed, start, rank, world))


def row_order(dataset, world, workers, window):
    """What else the order of the rows depends on: a run resumes in mid-epoch only where it is unchanged."""
    if isinstance(dataset, ParquetImages):
        return {"files": dataset.fingerprint(), "processes": world, "workers": max(1, workers), "window": window}
    return {}


def train_batches(dataset, size, seed, recipe, keys, workers):
    """Endless batches of the images that `keys`, of `train_keys`, name; see CropPairs for what a batch is."""
    return iter(loader(CropPairs(dataset, size, seed, RECIPES[recipe]["crop"]), keys, workers))


def loader(dataset, keys, workers):
    """A DataLoader whose items are whole batches, in order, just as the dataset makes them.

    Up to 2 x workers of them wait in shared memory: a batch of 256 pairs of views of 224 pixels is 77 MB.
    """
    return DataLoader(
        dataset,
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=leave_group,
        collate_fn=as_made,
        pin_memory=torch.cuda.is_available(),
    )


def as_made(batch):
    """No conversion: a COCO target's polygons would become tensors, thousands of them, which DDP then moves to GPUs."""
    return batch


def leave_group(worker):
    """Put a worker in a process group of its own, so that a signal to the run's group does not end it.

    Launchers send SIGTERM to the group: the step that is being taken still needs its batch, and then a checkpoint is
    saved. Workers end with their process.
    """
    os.setpgid(0, 0)


# ---- evaluation batches


def split_rows(dataset, rows, parts):
    """A sequence of rows in contiguous parts, [(position of its first, rows), ...], some of which may be empty.

    Those of a stream are cut between row groups, so that each is read by one part alone.
    """
    starts = np.arange(len(rows) + 1)
    if isinstance(dataset, ParquetImages):
        starts = np.flatnonzero(np.diff(dataset.groups_of(rows), prepend=-1, append=-2))
    cuts = starts[np.searchsorted(starts, np.arange(parts + 1) * len(rows) // parts)].tolist()
    return [(low, rows[low:high]) for low, high in zip(cuts, cuts[1:])]


def ordered_keys(dataset, rows, size, workers):
    """Batches of at most `size` of `rows`, as [(position of its first, rows, row groups to read ahead), ...].

    Each worker of a `loader` reads a contiguous part: a DataLoader hands batches to its workers in turn, so the list
    has those of each part in turn, and empty ones where a part has no more.
    """
    streamed, parts = isinstance(dataset, ParquetImages), []
    for first, part in split_rows(dataset, rows, max(1, workers)):
        batches = [part[i : i + size] for i in range(0, len(part), size)]
        groups = [list(dict.fromkeys(dataset.groups_of(batch).tolist())) if streamed else [] for batch in batches]
        ahead = [here + following for here, following in zip(groups, [*groups[1:], []])]
        parts.append(zip(range(first, first + len(part), size), batches, ahead))
    return [batch for turn in itertools.zip_longest(*parts, fillvalue=(0, [], [])) for batch in turn]


class CenterCrops(Dataset):
    """Fixed crops for evaluation: short side resized to size * 256 / 224, then the centre, as the papers test.

    Item ([index, ...], row groups to read ahead) is (crops (n, size, size, 3) uint8, labels (n,) int64, [(name, reason)
    of undecodable images]). An undecodable image is replaced by its neighbour, label included.
    """

    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size

    def __getitem__(self, item):
        indices, groups = item
        if groups:
            self.dataset.keep(groups)
        crops = empty_batch(len(indices), self.size, self.size, 3)
        labels, undecodable = torch.empty(len(indices), dtype=torch.long), []
        for i, index in enumerate(indices):
            image, row, failed = read_image(self.dataset, index)
            crops[i] = center_crop(image, self.size)
            labels[i] = self.dataset[row]["label"]
            undecodable += failed
        return crops, labels, undecodable


def center_crop(image, size):
    """(H, W, 3) uint8 array -> (size, size, 3) uint8 tensor: the centre of the image resized to size * 256 / 224."""
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    height, width = image.shape[:2]
    short = round(size * 256 / 224)
    scaled = (short, short * width // height) if height <= width else (short * height // width, short)
    resized = F.interpolate(pixels, scaled, mode="bilinear", antialias=True)
    top, left = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return resized[0, :, top : top + size, left : left + size].permute(1, 2, 0)


# ---- what could not be decoded


def name_undecodable(failed, named, accelerator, instead="its neighbour takes its place"):
    """Print each undecodable image once, on the main process. All processes call it together.

    failed: this process's [(name, reason), ...]. named: the set of names printed before, which grows. instead: what
    becomes of it.
    """
    for name, reason in gather_object(failed):
        if name not in named:
            named.add(name)
            if accelerator.is_main_process:
                tqdm.write(f"cannot decode {name} ({reason}): {instead}", file=sys.stderr)
