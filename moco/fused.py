"""The augmentation of a GPU as one function for torch.compile, which makes a handful of kernels of it.

`augment_in_chunks` of moco/augment.py runs an operation at a time on the images that get it, and each writes its result
down. Here every image goes through every operation, and masks choose: more arithmetic, but a seventh of the bytes,
which is what a GPU waits for. Without a compiler it is the slower way by far. Same parameters, same views to 1e-5.
"""

import itertools
from functools import cache, partial

import torch
import torch.nn.functional as F

from moco.augment import (
    CHUNK,
    CONTRAST,
    HUE,
    LUMA,
    NEUTRAL,
    SATURATION,
    blur_kernel,
    blur_taps,
    scale_and_shift,
    send,
)

RED, GREEN, BLUE = LUMA.tolist()  # numbers, which a compiler can write into its code
NONE = -1  # in place of an operation: leave the image as it is


@cache
def compiled_augmentation(**options):
    """`augment_fused` with `fill_view` compiled, when it is first called. options: of torch.compile."""
    return partial(augment_fused, fill=torch.compile(fill_view, **options))


def augment_fused(out, crops, params, mean, std, fill):
    """As `augment_in_chunks`, by `fill`, which is `fill_view` or what a compiler made of it."""
    table = send(table_of(params, out.shape[2]), torch.float32, out)
    scale, shift = scale_and_shift(mean, std, out)
    taps = blur_taps(out.shape[2]) if params["sigma"].any() else 0
    for v, first in itertools.product(range(len(crops)), range(0, out.shape[1], CHUNK)):
        chunk = slice(first, first + CHUNK)
        fill(out[v, chunk], crops[v][chunk], table[v, chunk], scale, shift, taps)


def table_of(params, size):
    """The parameters of views, (V, n, 13) float32: four operations, their values, and `fill_view`'s other five."""
    order, values = params["order"], params["factors"].gather(-1, params["order"])
    operations = torch.where(values == torch.tensor(NEUTRAL)[order], NONE, order)
    gray, first = params["gray"], params["gray_first"]
    others = gray & first, gray & ~first, params["flip"], params["sigma"] * size / 224, params["solarize"]
    return torch.cat([operations, values, torch.stack(others, dim=-1)], dim=-1).transpose(0, 1)


def fill_view(out, crops, table, scale, shift, taps):
    """Fill out, (n, S, S, C), with the views of crops (n, S, S, C), uint8 or float32, normalised by scale and shift.

    table: (n, 13), of `table_of`. taps: of the blur, on either side; 0 for none.
    """
    columns = [column.view(-1, 1, 1) for column in table.unbind(dim=1)]
    operations, values, (gray_first, gray_last, flip, sigma, solarize) = columns[:4], columns[4:8], columns[8:]
    x = torch.where(flip[..., None] > 0, crops.flip(2), crops)
    x = x / 255 if crops.dtype == torch.uint8 else x
    if x.shape[-1] == 3:
        planes = gray_where(gray_first, x.unbind(dim=-1))
        # The contrast's mean is of the image that the operations before it leave.
        past, before = torch.zeros_like(gray_first, dtype=torch.bool), []
        for operation in operations:
            past = past | (operation == CONTRAST)
            before.append(torch.where(past, NONE, operation))
        mean = luma(jitter(planes, before, values, 0.0)).mean(dim=(1, 2), keepdim=True)
        x = torch.stack(gray_where(gray_last, jitter(planes, operations, values, mean)), dim=-1)
    x = gaussian_blur(x, sigma.view(-1, 1), taps) if taps else x
    x = torch.where((solarize[..., None] > 0) & (x >= 0.5), 1 - x, x)
    out.copy_(x * scale + shift)


def luma(planes):
    return RED * planes[0] + GREEN * planes[1] + BLUE * planes[2]


def gray_where(chosen, planes):
    gray = luma(planes)
    return [torch.where(chosen > 0, gray, plane) for plane in planes]


def jitter(planes, operations, values, mean):
    """The three planes of images, (n, S, S) each, after four operations, numbers and values (n, 1, 1) each.

    mean: what contrast mixes with, of each image.
    """
    for operation, value in zip(operations, values):
        other = torch.where(operation == SATURATION, luma(planes), torch.where(operation == CONTRAST, mean, 0.0))
        mixed = [(value * plane + (1 - value) * other).clamp(0, 1) for plane in planes]
        jittered = [torch.where(operation == HUE, *both) for both in zip(turn_hue(planes, value), mixed)]
        planes = [torch.where(operation == NONE, *both) for both in zip(planes, jittered)]
    return planes


def turn_hue(planes, shift):
    """Turn the hue by `shift` turns: each channel is the value less as much chroma as its own hue is away."""
    red, green, blue = planes
    value = torch.maximum(red, torch.maximum(green, blue))
    low = torch.minimum(red, torch.minimum(green, blue))
    chroma = value - low
    sextant = torch.where(green == value, 2 * chroma + blue - red, 4 * chroma + red - green)
    hue = torch.where(red == value, green - blue, sextant) / (6 * chroma).clamp(min=1e-30) + shift
    # How far the hue is from the one opposite to each channel; whole turns more, so that nothing is negative.
    away = [((hue + turns).frac() - 0.5).abs() for turns in (2, 5 / 3, 4 / 3)]
    return [torch.minimum(torch.maximum(low - chroma + 6 * chroma * part, low), value) for part in away]


def gaussian_blur(x, sigma, taps):
    """Blur each image, (n, S, S, C), with its own sigma (n, 1), in pixels, 0 for none; borders are reflected."""
    size = x.shape[2]
    kernel = blur_kernel(sigma.clamp(min=1e-3), taps)  # of a sigma that small the centre alone is left
    kernel = kernel.view(-1, 1, 1, 1, 2 * taps + 1).unbind(dim=-1)
    x = F.pad(x.permute(0, 3, 1, 2), (taps,) * 4, mode="reflect").permute(0, 2, 3, 1)
    x = sum(x[:, :, i : i + size] * weight for i, weight in enumerate(kernel))
    return sum(x[:, i : i + size] * weight for i, weight in enumerate(kernel))
