"""Images that are arrays already, in a `torch.utils.data.Dataset`, a list, a memory-mapped array or zarr, as rows.

    train_set = ArrayImages(my_dataset)                    # in a copy of a script, instead of load_splits(...)
    train_set = ArrayImages(np.load("images.npy", mmap_mode="r"), np.load("labels.npy"))

`ImageRows` is what the scripts ask of images that can be read one by one: for rows of your own, write a subclass with
`__len__` and `__getitem__`.
"""

import hashlib
from functools import cached_property

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from moco.augment import MEAN, STD
from moco.data.decode import UNDECODABLE, decode_image, read_image, rgb_of
from moco.data.order import GroupedImages, batch_rows
from moco.errors import UserError

LOOKED_AT = 64  # rows whose contents are part of a fingerprint
READ_TWICE = 8  # rows that are read twice at the start
MEASURED = 256  # images that mean and deviation are measured on


class ImageRows(GroupedImages):
    """A sequence of images of which any is cheap to read: {"image": ..., "label": ...}, the label being optional.

    A subclass needs `__len__` and `__getitem__` of an int; it may have a cheaper way to `labels`. An image is what
    `decode_image` takes: {"bytes", "path"} of a file, or an (H, W, C) array, uint8, or float32 of any range. All have
    the same number of channels.
    """

    traffic = cache = None  # it is not streamed

    def __init__(self):
        """Nothing is needed: what its base has as attributes follows from the length here."""

    # ---- what is in it

    @cached_property
    def name(self):
        """What args.json and the card of a backbone call it: --data says nothing about rows that a script makes."""
        return f"own images ({type(self).__name__})"

    @cached_property
    def rows_in_group(self):
        return np.ones(len(self), np.int64)  # each row is a group of its own

    @cached_property
    def first_row(self):
        return np.arange(len(self) + 1)

    @cached_property
    def column_names(self):
        return list(self[0])

    @cached_property
    def features(self):
        """{column: its type}, of labels alone."""
        return {"label": datasets.Value("int64")} if "label" in self.column_names else {}

    @cached_property
    def labels(self):
        """All labels, (len(self),) int64, a missing one as -1. Every image is read for this, once."""
        found = (self[row].get("label") for row in range(len(self)))
        return np.array([-1 if label is None else label for label in found])

    @cached_property
    def first_image(self):
        return read_image(self, 0)[0]

    @property
    def channels(self):
        return self.first_image.shape[2]

    @property
    def dtype(self):
        return self.first_image.dtype

    def fingerprint(self):
        """Of the number of rows, and of the contents of LOOKED_AT of them."""
        digest = hashlib.sha256(repr((len(self), self.column_names)).encode())
        for row in range(0, len(self), -(-len(self) // LOOKED_AT)):
            values = self[row]
            try:
                pixels = decode_image(values["image"])
                digest.update(repr((pixels.shape, pixels.dtype.str, values.get("label"))).encode() + pixels.tobytes())
            except UNDECODABLE:
                digest.update(b"undecodable")
        return digest.hexdigest()[:16]

    def label_range(self):
        """(smallest, largest) label."""
        return int(self.labels.min()), int(self.labels.max())

    def select_rows(self, rows):
        """These rows alone, in this order, as a sequence of their own."""
        return SelectedRows(self, np.asarray(rows, np.int64))

    # ---- how it is read

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


class SelectedRows(ImageRows):
    """Some rows of others. The fingerprint stays that of all."""

    def __init__(self, images, rows):
        self.images, self.rows, self.name = images, rows, images.name
        self.column_names, self.features, self.first_image = images.column_names, images.features, images.first_image

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.images[int(self.rows[row])]

    @cached_property
    def labels(self):
        return self.images.labels[self.rows]

    def fingerprint(self):
        return self.images.fingerprint()


class ArrayImages(ImageRows):
    """Anything with `len()` and `[i]` as rows that the scripts read.

    dataset: of images, or of (image, label). An image is an (H, W, C) or (H, W) array of uint8, uint16 or floats, or a
    Pillow image, which becomes RGB as files do. uint16 becomes float32 in [0, 1]; floats keep their values. Sizes may
    differ, the number of channels may not. A label is a whole number from 0 on.
    labels: (len(dataset),) whole numbers, if the items have none, or if reading all of them to know how many classes
    there are would take too long.
    name: what args.json and the card of a backbone call the data; None for the class of the dataset.
    An image that raises one of UNDECODABLE, or differs in its channels, counts as undecodable.
    Raises UserError if items are something else, or other pixels each time they are read: random transforms belong in
    `TransformViews`, which seeds them, or a run could not be resumed.
    """

    def __init__(self, dataset, labels=None, name=None):
        if not len(dataset):
            raise UserError("the dataset has no images: its length is 0")
        if labels is not None and len(labels) != len(dataset):
            raise UserError(f"there are {len(labels)} labels for {len(dataset)} images")
        self.dataset, self.given = dataset, None if labels is None else np.asarray(labels)
        self.name = name or f"own images ({type(dataset).__name__})"
        if self.given is not None:
            if self.given.dtype.kind not in "iu" or self.given.ndim != 1:
                raise UserError(f"labels are {self.given.ndim}-dimensional, {self.given.dtype}; they must be (N,) ints")
            self.labels = self.given.astype(np.int64)
        self.first_image, label = self.first_readable()
        self.column_names = ["image"] + ([] if label is None else ["label"])
        for row in range(0, len(self), -(-len(self) // READ_TWICE)):
            image, again = (self[row]["image"] for _ in range(2))
            if isinstance(image, np.ndarray) and not np.array_equal(image, again):
                raise UserError(
                    f"image {row} has other pixels each time it is read, so that no run could be resumed; give random"
                    " transforms to TransformViews instead of to the dataset"
                )
        if PartialState().is_main_process:
            height, width, channels = self.first_image.shape
            print(f"arrays  {len(self)} images; the first has {channels} channels of {height} x {width} pixels")

    def first_readable(self):
        """What `read` gives for the first row that can be read."""
        for row in range(len(self)):
            try:
                return self.read(row)
            except UNDECODABLE as error:
                if isinstance(error, UserError) or row == len(self) - 1:
                    raise

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        label = 0 if self.given is None else int(self.given[row])  # if it cannot be read: its neighbour brings its own
        try:
            image, label = self.read(row)
            if image.shape[2] != self.channels or image.dtype != self.dtype:
                raise ValueError(f"{image.shape[2]} channels of {image.dtype}, unlike image 0")
            if image.dtype != np.uint8 and not np.isfinite(image).all():
                raise ValueError("pixels are not finite")
        except UNDECODABLE as error:
            image = error
        return dict(zip(self.column_names, (image, label)))

    def read(self, row):
        """(pixels, label or None) of an item."""
        item = self.dataset[row]
        if self.given is not None:
            image, label = item, int(self.given[row])
        else:
            image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        if label is not None and (np.ndim(label) or np.asarray(label).dtype.kind not in "iu"):
            raise UserError(f"the label of image {row} is {label!r:.40}; it must be a whole number")
        return pixels_of(image, row), label if label is None else int(label)


def pixels_of(image, row):
    """An (H, W, C) array, uint8 or float32, that nobody else writes to. row: its number, for messages."""
    if isinstance(image, Image.Image):
        return rgb_of(image)
    if isinstance(image, torch.Tensor):
        raise UserError(
            f"image {row} is a tensor, whose channels come first, as a rule; return image.permute(1, 2, 0).numpy(), or"
            " leave the transform that makes tensors to TransformViews"
        )
    pixels = np.array(image, order="C")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or 0 in pixels.shape or not (pixels.dtype in (np.uint8, np.uint16) or pixels.dtype.kind == "f"):
        raise UserError(
            f"image {row} is {type(image).__name__} of shape {pixels.shape} and type {pixels.dtype}; it must be an"
            " (H, W, C) or (H, W) array of uint8, uint16 or floats, or a Pillow image"
        )
    if pixels.dtype == np.uint16:
        return pixels.astype(np.float32) / 65535
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32, copy=False)


def normalization(images, mean=None, std=None):
    """(mean, std), a number for each channel, to normalise these rows with: as given, or fitting.

    ImageNet's fit three channels of uint8. Others are measured on a sample, and printed. Units: uint8 and uint16 lie in
    [0, 1], floats have their own. Raises UserError if the numbers do not fit the channels.
    """
    if (mean is None) != (std is None):
        raise UserError("--mean and --std belong together: give both, or none")
    if mean is None:
        if images.channels == 3 and images.dtype == np.uint8:
            return MEAN, STD
        mean, std = measured(images)
        if PartialState().is_main_process:
            words = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
            print("pixels  mean {}, std {}: measured, as ImageNet's do not fit".format(*words))
    if not len(mean) == len(std) == images.channels:
        raise UserError(
            f"--mean has {len(mean)} numbers and --std {len(std)}; the images have {images.channels} channels"
        )
    if min(std) <= 0:
        raise UserError(f"--std {min(std):g} of channel {std.index(min(std))} must be above 0; leave that channel out")
    return tuple(mean), tuple(std)


def measured(images):
    """(mean, std) of each channel over the pixels of a sample, each image counting alike."""
    moments = []
    for row in images.sample(MEASURED):
        pixels = read_image(images, row)[0].reshape(-1, images.channels).astype(np.float64)
        pixels /= 255 if images.dtype == np.uint8 else 1
        moments.append((pixels.mean(axis=0), (pixels**2).mean(axis=0)))
    mean, square = np.mean(moments, axis=0)
    return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()
