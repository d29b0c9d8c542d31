"""The two views of an image: crops on the host, everything else as one batch on the training device.

Workers call `random_crop_boxes` and `crop_pair` on the decoded image and send uint8, a quarter of the bytes of
floats. `ViewAugment` then flips, jitters, grays, blurs and normalises, with parameters that `sample_params` draws for
each view of each image of the global batch, so that any number of processes sees the same pixels.
Source of each recipe: see `AUGMENTATIONS`.
"""

import math

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
BLUR_SIGMA = (0.1, 2.0)  # pixels of a 224 pixel image
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CHUNK = 64  # images augmented at a time: 77 MB a copy of both views at 224 pixels, of which it makes about five


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


# ---- device: the rest of the recipe


def to_float(crops):
    """(N, S, S, 3) uint8 -> (N, 3, S, S) float32 in [0, 1], channels-last by its strides, without a copy."""
    return crops.permute(0, 3, 1, 2).float() / 255


def send(values, x):
    """A small CPU tensor on x's device. Not to block spares a wait for all that the device still has to do."""
    return values.to(x.device, non_blocking=True)


def normalize(x):
    """Subtract ImageNet's mean and divide by its deviation, x: (N, 3, H, W) in [0, 1]."""
    mean, std = (send(torch.tensor(values, dtype=x.dtype), x).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


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


def luma(x):
    """(N, 3, H, W) -> (N, 1, H, W), the weights of ITU-R 601 as torchvision and Pillow have them."""
    red, green, blue = x.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def shift_hue(x, shift):
    """Turn the hue of x (N, 3, H, W) in [0, 1] by `shift` (N,) turns, through HSV without a branch a sextant."""
    red, green, blue = x.unbind(dim=1)
    value, low = x.amax(dim=1), x.amin(dim=1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sextant = hue + 6 * shift.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        k = (sextant + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def color_jitter(x, factors, order):
    """torchvision's ColorJitter with parameters of its own for every image. x: (N, 3, H, W) in [0, 1].

    factors: (N, 4), order: (N, 4) on the CPU. Brightness, contrast and saturation are one blend of the image, its
    gray and its mean gray, so each of the four slots costs one pass whatever the mix of operations in it.
    """
    for slot in range(4):
        operation = order[:, slot]
        factor = factors.gather(1, operation[:, None]).squeeze(1)
        keep = torch.where(operation == HUE, 1, factor)
        to_gray, to_mean = (1 - keep) * (operation == SATURATION), (1 - keep) * (operation == CONTRAST)
        keep, to_gray, to_mean = (send(weight, x).view(-1, 1, 1, 1) for weight in (keep, to_gray, to_mean))
        hue_rows = (operation == HUE).nonzero().squeeze(1)  # known on the host: no wait for the device
        factor, hue_rows = send(factor[hue_rows], x), send(hue_rows, x)
        turned = shift_hue(x[hue_rows], factor)
        gray = luma(x)
        x = (keep * x + to_gray * gray + to_mean * gray.mean(dim=(2, 3), keepdim=True)).clamp(0, 1)
        x[hue_rows] = turned
    return x


def gaussian_blur(x, sigma, half):
    """Blur each image with its own sigma > 0 (N,), in pixels, by `half` taps on either side; borders are reflected.

    As torchvision's, which knows one sigma for all. half: three times the largest sigma leave nothing out.
    """
    n, channels, height, width = x.shape
    taps = torch.arange(-half, half + 1, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)  # (N * 3, taps)
    planes = F.pad(x.reshape(1, n * channels, height, width), (half,) * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=n * channels)
    planes = F.conv2d(planes, kernel[:, None, None, :], groups=n * channels)
    return planes.view(n, channels, height, width)


class ViewAugment(nn.Module):
    """The device side of a recipe: (n, 2, S, S, 3) uint8 crops and their parameters -> query and key images.

    Returns two (n, 3, S, S) float32 tensors, channels-last, normalised with ImageNet's mean and std. Computed in
    float32 whatever the training precision (bfloat16 would be up to 17 levels off). Values are not rounded to uint8
    between operations as Pillow rounds them. Blur's sigma scales with S / 224.
    """

    def __init__(self, recipe):
        super().__init__()
        self.gray_first = AUGMENTATIONS[recipe]["gray_first"]

    @torch.no_grad()
    def forward(self, uint8_views, params):
        chunks = zip(uint8_views.split(CHUNK), *(values.split(CHUNK) for values in params.values()))
        parts = [self.augment(views, dict(zip(params, values))) for views, *values in chunks]
        return tuple(torch.cat(views) for views in zip(*parts))

    def augment(self, uint8_views, params):
        n, size = len(uint8_views), uint8_views.shape[2]
        x = to_float(uint8_views.transpose(0, 1).flatten(0, 1))  # (2n, 3, S, S), queries first
        factors, order, gray, sigma, flip = (
            params[name].transpose(0, 1).flatten(0, 1) for name in ("factors", "order", "gray", "sigma", "flip")
        )
        if not self.gray_first:
            x = color_jitter(x, factors, order)
        gray_rows = send(gray.nonzero().squeeze(1), x)
        x[gray_rows] = luma(x[gray_rows]).expand(-1, 3, -1, -1)
        if self.gray_first:
            x = color_jitter(x, factors, order)
        blurred_rows = sigma.nonzero().squeeze(1)
        if len(blurred_rows):
            rows = send(blurred_rows, x)
            half = max(6, math.ceil(3 * BLUR_SIGMA[1] * size / 224))
            x[rows] = gaussian_blur(x[rows], send(sigma[blurred_rows], x) * size / 224, half)
        x = torch.where(send(flip, x).view(-1, 1, 1, 1), x.flip(-1), x)
        return normalize(x).split(n)
