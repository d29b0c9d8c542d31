"""Batches of crops, made by data workers from rows: which images of which epoch, and what to read ahead.

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

from moco.augment import random_crop_boxes
from moco.data.decode import decode_crops, decode_image, read_image
from moco.errors import UserError

# ---- training batches


def empty_batch(n, crop):
    """A tensor for n crops like this one, allocated in shared memory in a data worker, which saves a copy."""
    shape = (n, *crop.shape)
    if get_worker_info() is None:
        return crop.new_empty(shape)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * crop.itemsize)  # as PyTorch's own collation does
    return crop.new_empty(0).set_(storage, 0, shape)


class Crops(Dataset):
    """Crops of each image of a batch, with its label.

    cut: (record of an image, epoch, index) -> a list of tensors, which may be the crops. finish: (what cut gave, epoch,
    index) -> the crops, where an error is not that of a damaged image, or None. Each crop has the same size in every
    image. labelled: whether to read labels, which may be anything where nobody looks at them; otherwise they are 0.
    Item ([(epoch, index), ...], row groups to read ahead) is (a tensor (n, ...) for each crop, labels (n,) int64,
    [(name, reason) of undecodable images]); the neighbour that replaces an undecodable image brings its own label.
    """

    def __init__(self, dataset, cut, finish=None, labelled=True):
        self.dataset, self.cut, self.finish, self.labelled = dataset, cut, finish, labelled

    def __getitem__(self, item):
        rows, groups = item
        self.dataset.keep(groups)
        batch, labels, undecodable = [], torch.zeros(len(rows), dtype=torch.long), []
        for i, (epoch, index) in enumerate(rows):
            crops, values, failed = read_image(self.dataset, index, partial(self.cut, epoch=epoch, index=index))
            crops = self.finish(crops, epoch, index) if self.finish else crops
            batch = batch or [empty_batch(len(rows), crop) for crop in crops]
            for whole, crop in zip(batch, crops, strict=True):
                if crop.shape != whole.shape[1:]:
                    raise UserError(
                        f"row {index} has a crop of {list(crop.shape)}, others of {list(whole.shape[1:])}: all images"
                        " need the same number of channels, and views must end with the same size"
                    )
                whole[i] = crop
            if self.labelled:
                labels[i] = values.get("label", 0)
            undecodable += failed
        return batch, labels, undecodable


def labelled_crops(dataset, size, seed):
    """One random crop of each image, flipped or not: what a classifier is trained on.

    RandomResizedCrop of torchvision's default scale 0.08-1, wider than the encoders' 0.2-1, as in the reference.
    """
    return Crops(dataset, partial(flipped_crop, size=size, seed=seed))


def center_crops(dataset, size, labelled=True):
    """Fixed crops for evaluation: short side resized to size * 256 / 224, then the centre, as the papers test."""
    return Crops(dataset, partial(center_crop_of, size=size), labelled=labelled)


def flipped_crop(record, epoch, index, size, seed):
    rng = crop_generator(seed, epoch, index)
    (crop,) = decode_crops(record, lambda h, w: random_crop_boxes(h, w, rng, [(0.08, 1)]), size)
    return [crop.flip(1) if rng.random() < 0.5 else crop]


def center_crop_of(record, epoch, index, size):
    return [center_crop(decode_image(record), size)]


class CachedFeatures(Dataset):
    """Features that `Features.cache` wrote to a folder, read from disk as far as memory does not hold them.

    Item [(epoch, index), ...] is ([features (n, width) float16], labels (n,) int64, []): the same in every epoch.
    """

    def __init__(self, folder):
        self.features, self.labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "labels"))

    def __getitem__(self, rows):
        indices = [index for _, index in rows]
        return [torch.from_numpy(self.features[indices])], torch.from_numpy(self.labels[indices]), []


def crop_generator(seed, epoch, index):
    """The source of the crops of one image in one epoch."""
    return np.random.default_rng([*b"crop", seed, epoch, index])


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
    """No conversion: it would turn a COCO target's masks into thousands of tensors, which DDP then moves to GPUs."""
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


THIN = 32  # times longer than wide; below that the whole image is resized, which costs little


def center_crop(image, size):
    """(H, W, C) array -> (size, size, C) tensor of its type: the centre of the image resized to size * 256 / 224.

    Of a thin image only the middle is resized, so that memory follows the crop.
    """
    height, width = image.shape[:2]
    top, left = (height - 4 * width) // 2, (width - 4 * height) // 2
    if height > THIN * width:
        image = image[top : top + 4 * width]
    elif width > THIN * height:
        image = image[:, left : left + 4 * height]
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    height, width = image.shape[:2]
    short = round(size * 256 / 224)
    scaled = (short, short * width // height) if height <= width else (short * height // width, short)
    resized = F.interpolate(pixels, scaled, mode="bilinear", antialias=True)
    top, left = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return resized[0, :, top : top + size, left : left + size].permute(1, 2, 0)
