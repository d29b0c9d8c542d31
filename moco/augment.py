"""The two views of an image: crops on the host, everything else as one batch on the training device.

Workers call `random_crop_boxes` and `crop_pair` on the decoded image and send uint8, a quarter of the bytes of
floats. `ViewAugment` then jitters, grays, blurs, flips and normalises, with parameters that `sample_params` draws for
each view of each image of the global batch, so that any number of processes sees the same pixels. On a GPU that is
PyTorch, a batch at a time; on a CPU it is OpenCV, a view at a time, three times as fast. Both are torchvision's
functions to 1e-5. Source of each recipe: see `AUGMENTATIONS`.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# crop: the least share of an image's area. jitter: strengths of brightness, contrast, saturation, hue. jitter_p, gray_p
# and blur_p: how probable each is. gray_first: before the jitter, not after it. Sources: arXiv:1911.05722 section 3.3,
# arXiv:2003.04297 section 3, arXiv:2002.05709 appendix A with strength 1.
AUGMENTATIONS = {
    "v1": {
        "crop": 0.2, "jitter": (0.4, 0.4, 0.4, 0.4), "jitter_p": 1.0, "gray_p": 0.2, "gray_first": True, "blur_p": 0.0,
    },
    "v2": {
        "crop": 0.2, "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.2, "gray_first": False, "blur_p": 0.5,
    },
    "simclr": {
        "crop": 0.08, "jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8,
        "gray_p": 0.2, "gray_first": False, "blur_p": 0.5,
    },
}  # fmt: skip
CROP_RATIO = (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # as `sample_params` numbers them
NEUTRAL = (1, 1, 1, 0)  # the factor of each that changes nothing
BLUR_SIGMA = (0.1, 2.0)  # pixels of a 224 pixel image
LUMA = np.array([0.2989, 0.587, 0.114], np.float32)  # of red, green, blue: ITU-R 601's, as torchvision has them
CHUNK = 256  # images that a GPU augments at a time: at 224 pixels 308 MB a copy of both views, of which it makes two


# ---- host: where to cut, and the cut


def random_crop_boxes(height, width, rng, least=0.2, views=2):
    """Boxes of RandomResizedCrop for each view: (views, 4) int, rows of top, left, height, width.

    rng: a numpy Generator. Ten tries for a share of the area from `least` to 1 and an aspect in CROP_RATIO that fit,
    then the largest centred box of an aspect in range, as torchvision does.
    """
    draws = rng.random((views, 10, 4))
    area = height * width * (least + draws[..., 0] * (1 - least))
    low, high = np.log(CROP_RATIO)
    ratio = np.exp(low + draws[..., 1] * (high - low))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    top, left = np.floor(draws[..., 2] * (height - h + 1)), np.floor(draws[..., 3] * (width - w + 1))
    candidates = np.stack([top, left, h, w], axis=-1).astype(int)
    boxes = candidates[np.arange(views), fits.argmax(axis=1)]
    if not fits.any(axis=1).all():
        w = min(width, round(height * CROP_RATIO[1]))
        h = min(height, round(width / CROP_RATIO[0]))
        boxes[~fits.any(axis=1)] = ((height - h) // 2, (width - w) // 2, h, w)
    return boxes


def crop_pair(image, boxes, size):
    """Cut and resize every box: image (H, W, 3) uint8 array -> (views, size, size, 3) uint8 tensor.

    Bilinear with antialiasing, at most one level from Pillow's. Channels-last strides are what makes the resize fast.
    """
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    crops = [pixels[:, :, top : top + h, left : left + w] for top, left, h, w in boxes]
    resized = [F.interpolate(crop, (size, size), mode="bilinear", antialias=True) for crop in crops]
    return torch.cat(resized).permute(0, 2, 3, 1)


# ---- device: crops as the encoders take them


def to_float(crops):
    """(N, S, S, 3) uint8 -> (N, 3, S, S) in [0, 1], channels-last by its strides, without a copy.

    Of PyTorch's default precision: float32, unless a test asks for float64.
    """
    return crops.permute(0, 3, 1, 2).to(torch.get_default_dtype()) / 255


def normalize(x):
    """Subtract ImageNet's mean and divide by its deviation, x: (N, 3, H, W) in [0, 1]."""
    mean, std = (send(values, x.dtype, x).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


# ---- parameters of the augmentation


def sample_params(recipe, n, seed, step, rows=slice(None)):
    """Augmentation parameters of the global batch at `step`: a dict of CPU tensors, each (n, 2) or (n, 2, 4).

    recipe: of `AUGMENTATIONS`. n: images in the global batch. rows: those of one process; all are drawn, so that the
    parameters do not depend on the number of processes.
    factors (n, 2, 4): brightness, contrast, saturation factors and hue shift (in turns), neutral where not jittered.
    order (n, 2, 4): the operations in the order they are applied. gray, flip (n, 2): bool. sigma (n, 2): of the blur,
    in pixels of a 224 pixel image, 0 for none.
    """
    settings = AUGMENTATIONS[recipe]
    rng = np.random.default_rng([*b"photometry", seed, step])
    strength = np.array(settings["jitter"])
    factors = rng.uniform(-strength, strength, (n, 2, 4)) + (1, 1, 1, 0)
    jitter = rng.random((n, 2, 1)) < settings["jitter_p"]
    params = {
        "factors": np.where(jitter, factors, (1, 1, 1, 0)).astype(np.float32),
        "order": rng.random((n, 2, 4)).argsort(axis=-1),
        "gray": rng.random((n, 2)) < settings["gray_p"],
        "sigma": (rng.uniform(*BLUR_SIGMA, (n, 2)) * (rng.random((n, 2)) < settings["blur_p"])).astype(np.float32),
        "flip": rng.random((n, 2)) < 0.5,
    }
    return {name: torch.from_numpy(values[rows]) for name, values in params.items()}


def blur_taps(size):
    """Taps on either side of the blur's centre: three times the largest sigma leave nothing out."""
    return max(6, math.ceil(3 * BLUR_SIGMA[1] * size / 224))


# ---- on a CPU: one view, (S, S, 3), by OpenCV

TO_GRAY = np.broadcast_to(LUMA, (3, 3))
NORMALIZE = np.column_stack([np.diag(1 / np.array(STD)), -np.array(MEAN) / STD])  # an affine map of colours, (3, 4)


def augment_view(crop, order, factors, gray, sigma, flip, gray_first):
    """The view of a crop, (S, S, 3) uint8 -> float32, normalised; the parameters are those of one view."""
    x = (cv2.flip(crop, 1) if flip else crop).astype(np.float32)
    x *= 1 / 255
    if gray and gray_first:
        x = cv2.transform(x, TO_GRAY)
    for operation in order:
        if factors[operation] != NEUTRAL[operation]:
            x = jitter_view(x, operation, factors[operation])
    if gray and not gray_first:
        x = cv2.transform(x, TO_GRAY)
    if sigma:
        size = len(x)
        x = cv2.GaussianBlur(x, (2 * blur_taps(size) + 1,) * 2, sigma * size / 224, borderType=cv2.BORDER_REFLECT_101)
    return cv2.transform(x, NORMALIZE)


def jitter_view(x, operation, factor):
    """Brightness, contrast or saturation, each an affine map of colours, or a turn of the hue by `factor` turns."""
    if operation == HUE:
        hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
        hsv[..., 0] += 360 * (factor % 1)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    colours = factor * np.eye(3, 4, dtype=np.float32)
    if operation == CONTRAST:
        colours[:, 3] = (1 - factor) * LUMA @ cv2.mean(x)[:3]
    if operation == SATURATION:
        colours[:, :3] += (1 - factor) * LUMA
    return cv2.transform(x, colours).clip(0, 1)


# ---- on a GPU: operations on a batch, (N, 3, H, W) in [0, 1], in place; factor, shift and sigma: (N, 1, 1, 1)


def luma(x):
    """(N, 3, H, W) -> (N, 1, H, W)."""
    return sum(weight * channel for weight, channel in zip(LUMA.tolist(), x.split(1, dim=1)))


def adjust_brightness(x, factor):
    x.mul_(factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    mean = luma(x.mean(dim=(2, 3), keepdim=True))
    x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def adjust_saturation(x, factor):
    torch.lerp(luma(x), x, factor, out=x).clamp_(0, 1)


def adjust_hue(x, shift):
    """Turn the hue by `shift` turns: each channel is the value less as much chroma as its own hue is away."""
    red, green, blue = x.split(1, dim=1)
    above, below = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, above), torch.minimum(red, above)
    low = torch.minimum(middle, below)
    chroma = value - low
    largest_is_red, green_first = (red >= above), (green >= blue)
    sextant = torch.where(largest_is_red, torch.where(green_first, 0.0, -1.0), torch.where(green_first, -1 / 3, 2 / 3))
    hue = ((middle - below) / (6 * chroma).clamp(min=1e-30) + sextant).abs() + shift
    floor = low - chroma
    chroma.mul_(6)
    for channel, turns in enumerate((1 / 2, 1 / 6, -1 / 6)):
        away = hue + turns
        away.sub_(away.round()).abs_()  # how far the hue is from the one opposite to the channel, in turns
        torch.clamp(torch.addcmul(floor, chroma, away), low, value, out=x[:, channel : channel + 1])


def to_gray(x):
    x.copy_(luma(x))


def flip(x):
    x.copy_(x.flip(-1))


def gaussian_blur(x, sigma):
    """Blur each image with its own sigma, in pixels; borders are reflected. As torchvision's, which takes one sigma."""
    n, channels, height, width = x.shape
    half = blur_taps(width)
    taps = torch.arange(-half, half + 1, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma.view(n, 1)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)  # (N * 3, taps)
    planes = F.pad(x.view(1, n * channels, height, width), (half,) * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=n * channels)
    x.copy_(F.conv2d(planes, kernel[:, None, None, :], groups=n * channels).view_as(x))


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def plan(params, size, gray_first):
    """[(operation, images, a value for each or None)]: what is done to a batch, in this order, and to no other image.

    params: of `sample_params`, each (N, ...) here, without the dimension of views. size: side of an image.
    """
    order, factors, sigma = (params[name].tolist() for name in ("order", "factors", "sigma"))
    steps = []
    for place in range(4):
        for number, operation in enumerate(JITTER):
            images = [i for i, o in enumerate(order) if o[place] == number and factors[i][number] != NEUTRAL[number]]
            steps.append((operation, images, [factors[i][number] for i in images]))
    gray = (to_gray, params["gray"].nonzero().flatten().tolist(), None)
    steps = [gray, *steps] if gray_first else [*steps, gray]
    blurred = params["sigma"].nonzero().flatten().tolist()
    steps.append((gaussian_blur, blurred, [sigma[i] * size / 224 for i in blurred]))
    steps.append((flip, params["flip"].nonzero().flatten().tolist(), None))
    return [step for step in steps if step[1]]


def send(values, dtype, x):
    """Numbers as a tensor on x's device, from pinned memory: the copy does not wait for what the device has to do."""
    values = torch.tensor(values, dtype=dtype)
    return values.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else values


def augment_batch(crops, params, gray_first):
    """The views of crops, (N, S, S, 3) uint8 -> (N, 3, S, S) float32 in [0, 1]; params as for `plan`."""
    x = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    steps = plan(params, x.shape[-1], gray_first)
    lengths = [len(images) for _, images, _ in steps]
    # All parameters in two copies to the device, then cut into those of each step.
    indices = send([i for _, images, _ in steps for i in images], torch.long, x).split(lengths)
    values = send([v for _, images, of_each in steps for v in of_each or images], x.dtype, x).split(lengths)
    for (operation, _, of_each), index, value in zip(steps, indices, values):
        part = x.index_select(0, index)
        operation(part, *(() if of_each is None else (value.view(-1, 1, 1, 1),)))
        x.index_copy_(0, index, part)
    return x


class ViewAugment(nn.Module):
    """The device side of a recipe: (n, 2, S, S, 3) uint8 crops and their parameters -> query and key images.

    Returns two (n, 3, S, S) float32 tensors, channels-last, normalised with ImageNet's mean and std. An image pays for
    the operations that it gets, not for those of others. Computed in float32 whatever the training precision (bfloat16
    would be up to 17 levels off). Values are not rounded to uint8 between operations as Pillow rounds them. Blur's
    sigma scales with S / 224.
    """

    def __init__(self, recipe):
        super().__init__()
        self.gray_first = AUGMENTATIONS[recipe]["gray_first"]

    @torch.no_grad()
    def forward(self, uint8_views, params):
        n, _, size, _, _ = uint8_views.shape
        views = torch.empty(2, n, size, size, 3, device=uint8_views.device)
        if uint8_views.device.type == "cpu":
            self.augment_on_cpu(views.numpy(), uint8_views.numpy(), params)
        else:
            for first in range(0, n, CHUNK):
                chunk = slice(first, first + CHUNK)
                crops = uint8_views[chunk].transpose(0, 1).flatten(0, 1)  # queries first
                of_chunk = {name: values[chunk].transpose(0, 1).flatten(0, 1) for name, values in params.items()}
                x = normalize(augment_batch(crops, of_chunk, self.gray_first))
                views[:, chunk] = x.permute(0, 2, 3, 1).unflatten(0, (2, -1))
        return tuple(views.permute(0, 1, 4, 2, 3))

    def augment_on_cpu(self, views, crops, params):
        """Fill views (2, n, S, S, 3) with those of crops (n, 2, S, S, 3), both numpy arrays."""
        params = {name: values.tolist() for name, values in params.items()}
        for i, pair in enumerate(crops):
            for view, crop in enumerate(pair):
                of_view = {name: values[i][view] for name, values in params.items()}
                views[view, i] = augment_view(crop, **of_view, gray_first=self.gray_first)
