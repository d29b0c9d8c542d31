"""Batches of uint8 crops, made by data workers from rows: which images of which epoch, and what to read ahead.

Training batches are a function of (seed, step): step s takes its rows of the permutation of its epoch, and each image
its crops from (seed, epoch, image). No state travels from one batch to the next, so a run resumes at any step with any
number of workers, and one process reads what several read together.
"""

import atexit
import itertools
import math
import multiprocessing
import os
import signal
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset, get_worker_info

from moco.augment import AUGMENTATIONS, random_crop_boxes
from moco.decode import decode_crops, decode_image, read_image

# ---- training batches


def empty_batch(*shape):
    """A uint8 tensor for a batch, allocated in shared memory in a data worker, which saves a copy."""
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
        rows, groups = item
        self.dataset.keep(groups)
        views = empty_batch(len(rows), 2, self.size, self.size, 3)
        undecodable = []
        for view, (epoch, index) in zip(views, rows, strict=True):
            crops, _, failed = read_image(self.dataset, index, partial(self.cut, epoch=epoch, index=index))
            view.copy_(crops)
            undecodable += failed
        return views, undecodable

    def cut(self, record, epoch, index):
        """Both crops of a record: of the image that was asked for, or of the neighbour in its place."""
        rng = crop_generator(self.seed, epoch, index)
        return decode_crops(record, lambda h, w: random_crop_boxes(h, w, rng, self.least), self.size)


class LabelledCrops(Dataset):
    """One random crop of each image of a batch, flipped or not, with its label: what a classifier is trained on.

    RandomResizedCrop of torchvision's default scale 0.08-1, wider than the encoders' 0.2-1, as in the reference.
    Item ([(epoch, index), ...], row groups to read ahead) is (crops (n, size, size, 3) uint8, labels (n,) int64,
    [(name, reason) of undecodable images]); the neighbour that replaces an undecodable image brings its own label.
    """

    def __init__(self, dataset, size, seed):
        self.dataset, self.size, self.seed = dataset, size, seed

    def __getitem__(self, item):
        rows, groups = item
        cuts = [partial(self.cut, epoch=epoch, index=index) for epoch, index in rows]
        return labelled_batch(self.dataset, [index for _, index in rows], groups, cuts, self.size)

    def cut(self, record, epoch, index):
        """The crop of a record."""
        rng = crop_generator(self.seed, epoch, index)
        crop = decode_crops(record, lambda h, w: random_crop_boxes(h, w, rng, least=0.08, views=1), self.size)[0]
        return crop.flip(1) if rng.random() < 0.5 else crop


def labelled_batch(dataset, rows, groups, cuts, size):
    """What LabelledCrops and CenterCrops return. cuts: for each row what makes its record a crop."""
    dataset.keep(groups)
    crops = empty_batch(len(rows), size, size, 3)
    labels, undecodable = torch.empty(len(rows), dtype=torch.long), []
    for i, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
        crops[i], read, failed = read_image(dataset, row, cut)
        labels[i] = dataset[read].get("label", 0)  # without labels nobody looks at them
        undecodable += failed
    return crops, labels, undecodable


class CachedFeatures(Dataset):
    """Features that `moco.knn.cache_features` wrote to a folder, read from disk as far as memory does not hold them.

    Item [(epoch, index), ...] is (features (n, width) float16, labels (n,) int64, []): the same in every epoch.
    """

    def __init__(self, folder):
        self.features, self.labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "labels"))

    def __getitem__(self, rows):
        indices = [index for _, index in rows]
        return torch.from_numpy(self.features[indices]), torch.from_numpy(self.labels[indices]), []


def crop_generator(seed, epoch, index):
    """The source of the crops of one image in one epoch."""
    return np.random.default_rng([*b"crop", seed, epoch, index])


def train_batches(dataset, size, seed, recipe, rows, workers):
    """Endless batches of the images in `rows` (of `training_rows`); see CropPairs for what a batch is."""
    return iter(loader(CropPairs(dataset, size, seed, AUGMENTATIONS[recipe]["crop"]), rows, workers))


def loader(dataset, items, workers):
    """A DataLoader that yields dataset[item] for each of `items`, in order; each is a whole batch already.

    Up to 2 x workers of them wait in shared memory: a batch of 256 pairs of views of 224 pixels is 77 MB.
    """
    atexit.unregister(stop_workers)
    atexit.register(stop_workers)
    return DataLoader(
        dataset,
        sampler=items,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=leave_group,
        collate_fn=as_made,
        pin_memory=PartialState().device.type == "cuda",
    )


def as_made(batch):
    """No conversion: it would turn a COCO target's polygons into thousands of tensors, which DDP then moves to GPUs."""
    return batch


def leave_group(worker):
    """Put a worker in its own process group and let it ignore one SIGTERM, so that a stopped run finishes its step.

    Launchers send SIGTERM to the run's process group, service managers to each process, but the current step still
    needs its batch before a checkpoint is saved. A second SIGTERM, such as the run sends at its end, ends the worker.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def stop_workers():
    """Kill workers that are left after an error: at exit Python sends them one SIGTERM, and waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises for each worker that ends
    for worker in multiprocessing.active_children():
        worker.kill()


# ---- evaluation batches


def ordered_rows(dataset, rows, size, workers):
    """Batches of at most `size` of `rows`, as [(position of its first, rows, row groups to read ahead), ...].

    Each worker of a `loader` reads a contiguous part. A DataLoader hands batches to its workers in turn, so the list
    takes one from each part in turn, and an empty one if a part has no more.
    """
    parts = []
    for first, part in dataset.split(rows, max(1, workers)):
        batches = [part[i : i + size] for i in range(0, len(part), size)]
        groups = [dataset.row_groups(batch) for batch in batches]
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
        cuts = [lambda record: center_crop(decode_image(record), self.size)] * len(indices)
        return labelled_batch(self.dataset, indices, groups, cuts, self.size)


def center_crop(image, size):
    """(H, W, 3) uint8 array -> (size, size, 3) uint8 tensor: the centre of the image resized to size * 256 / 224."""
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    height, width = image.shape[:2]
    short = round(size * 256 / 224)
    scaled = (short, short * width // height) if height <= width else (short * height // width, short)
    resized = F.interpolate(pixels, scaled, mode="bilinear", antialias=True)
    top, left = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return resized[0, :, top : top + size, left : left + size].permute(1, 2, 0)
