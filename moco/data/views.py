"""The views of a batch, made by one object with a part in the data workers and a part on the training device.

    views = FastViews(AUGMENTATIONS["v2"], 224, mean, std)     or     views = TransformViews([transform, transform])
    batches = views.batches(train_set, order, start)
    batch, _, failed = next(batches)
    images = views.on_device(batch, order, step, device)       # a list of (n, C, S, S) tensors, one for each view

Both depend on nothing but (seed, epoch, image) and (seed, step), so a run resumes at any step with any number of
workers. `check` refuses images that views do not fit, before anything is computed. Another object with these three
methods, and `name`, `mean` and `std`, does as well.
"""

import random
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from moco.augment import AUGMENTATIONS, augment, augment_in_chunks, random_crop_boxes, sample_params
from moco.data.batches import Crops, crop_generator, loader
from moco.data.decode import decode_crops, decode_image, read_image
from moco.errors import UserError
from moco.fused import compiled_augmentation

COLOURS = ("jitter_p", "gray_p", "solarize_p")  # what takes three channels with values in [0, 1]


class FastViews:
    """Our own recipes: uint8 crops in the workers, everything else as one batch on the device; see `moco.augment`.

    recipe: a list of views, as in AUGMENTATIONS; `name` is the one that it has there, otherwise "own". size: of an
    image, in pixels, of which a view may be a share.
    mean, std: a number for each channel, to normalise with; see `normalization`. compiled: of `compile_options`; if it
    is not None, a GPU takes the augmentation that torch.compile makes with them of moco/fused.py.
    """

    def __init__(self, recipe, size, mean, std, compiled=None):
        self.recipe, self.mean, self.std, self.compiled = recipe, mean, std, compiled
        self.sizes, self.areas = [round(view["size"] * size) for view in recipe], [view["area"] for view in recipe]
        self.name = next((name for name, views in AUGMENTATIONS.items() if views == recipe), "own")

    def batches(self, images, order, start):
        """Endless (crops, labels, undecodable) of one process from step `start` on; see Crops. order: Order.

        crops: a tensor (n, S, S, C) for each view. Labels are 0.
        """
        return iter(loader(self.crops(images, order.seed), images.training_rows(order, start), order.workers))

    def crops(self, images, seed):
        """The worker's part: Crops that may be asked for any rows."""
        return Crops(images, partial(self.cut, seed=seed), labelled=False)

    def cut(self, record, epoch, index, seed):
        """The crops of a record: of the image that was asked for, or of the neighbour in its place."""
        rng = crop_generator(seed, epoch, index)
        return decode_crops(record, lambda h, w: random_crop_boxes(h, w, rng, self.areas), self.sizes)

    def on_device(self, crops, order, step, device):
        """The views of this process's crops at a step: a list of (n, C, S, S) float32 tensors, channels-last."""
        params = sample_params(self.recipe, order.batch_size, order.seed, step, order.own_rows)
        crops = [crop.to(device, non_blocking=True) for crop in crops]
        on_gpu = augment_in_chunks if self.compiled is None else compiled_augmentation(**self.compiled)
        return augment(crops, params, self.mean, self.std, on_gpu)

    def check(self, images):
        """Crops like those of an image, without values. Raises UserError if the recipe does not fit the images."""
        if len(self.mean) != images.channels:
            raise UserError(f"mean and std are of {len(self.mean)} channels, the images have {images.channels}")
        if any(view[name] for view in self.recipe for name in COLOURS):
            self.check_colours(images)
        dtype = torch.uint8 if images.dtype == np.uint8 else torch.float32
        return [torch.empty(size, size, images.channels, dtype=dtype, device="meta") for size in self.sizes]

    def check_colours(self, images):
        remedy = "take --augment no-colour, or a recipe without jitter, gray and solarize"
        if images.channels != 3:
            raise UserError(f"the augmentation changes colours: it needs 3 channels, not {images.channels}; {remedy}")
        if images.dtype != np.uint8:
            found = [read_image(images, row)[0] for row in images.sample(16)]
            low, high = min(image.min() for image in found), max(image.max() for image in found)
            if low < 0 or high > 1:
                raise UserError(
                    f"the augmentation changes colours from 0 to 1, the images have values from {low:g} to {high:g};"
                    f" scale them, or {remedy}"
                )


class TransformViews:
    """Any transforms, one for each view, such as torchvision's (v1 or v2), run by the data workers.

    transforms: functions of a Pillow image, or where an image is no RGB of uint8, of its (H, W, C) array, which return
    a (C, S, S) float tensor, normalised. They may draw from the global generators of torch, numpy and random: these are
    seeded for each view of each image and epoch, and afterwards are as they were before.
    mean, std: a number for each channel, what the transforms normalise with. Evaluations normalise alike, and so does
    whoever loads the backbone. Without them `normalization` chooses, and a line says so.
    """

    def __init__(self, transforms, mean=None, std=None):
        if (mean is None) != (std is None):
            raise UserError("TransformViews needs both, mean and std, or none")
        self.transforms, self.name = transforms, "own"
        self.mean, self.std = (values if values is None else tuple(map(float, values)) for values in (mean, std))

    def batches(self, images, order, start):
        """As those of FastViews, with the views as floats. Raises UserError for a transform that returns no such."""
        return iter(loader(self.crops(images, order.seed), images.training_rows(order, start), order.workers))

    def crops(self, images, seed):
        """The worker's part, as that of FastViews."""
        return Crops(images, decoded, partial(self.transform, seed=seed), labelled=False)

    def transform(self, image, epoch, index, seed):
        """The views of an image."""
        views = []
        for number, transform in enumerate(self.transforms):
            with seeded(*b"view", seed, epoch, index, number):
                view = transform(image.copy())
            if not isinstance(view, torch.Tensor) or view.ndim != 3 or not view.is_floating_point():
                kind = f"{view.ndim}-dimensional {view.dtype}" if torch.is_tensor(view) else type(view).__name__
                raise UserError(
                    f"the transform of view {number} returns a {kind}, which must be a (C, S, S) float tensor; end"
                    " it with ToTensor(), or v2.ToImage(), v2.ToDtype(torch.float32, scale=True)"
                )
            views.append(view)
        return views

    def on_device(self, views, order, step, device):
        options = {"non_blocking": True, "memory_format": torch.channels_last}
        return [view.to(device, torch.float32, **options) for view in views]

    def check(self, images):
        """The views of the first image. Raises UserError if it has other ones the second time."""
        if self.mean is None and PartialState().is_main_process:
            print("note    TransformViews has no mean and std: evaluations may normalise unlike its transforms")
        image = decoded_image(read_image(images, 0)[0])
        views = self.transform(image, 0, 0, 0)
        for number, (view, again) in enumerate(zip(views, self.transform(image, 0, 0, 0))):
            if not view.equal(again):
                raise UserError(
                    f"the transform of view {number} draws from a generator of its own, which is not seeded here, so"
                    " that no run could be resumed; let it draw from torch's, numpy's or random's global one"
                )
        return views


def decoded(record, epoch, index):
    return decoded_image(decode_image(record))


def decoded_image(pixels):
    """What transforms take: a Pillow image of RGB, else the array."""
    return Image.fromarray(pixels) if pixels.shape[2] == 3 and pixels.dtype == np.uint8 else pixels


@contextmanager
def seeded(*key):
    """Seed the global generators of torch, numpy and random from whole numbers; restore their states afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    torch.default_generator.manual_seed(first)  # not torch.manual_seed, which would seed the GPU's, too
    np.random.seed(second)
    random.seed(third)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
