"""The views of an image: crops on the host, everything else as one batch on the training device.

Data workers call `random_crop_boxes` and `cut_crops` on the decoded image and send uint8, a quarter of the bytes of
floats. `augment` then jitters, grays, blurs, flips and normalises, with parameters that `sample_params` draws for each
view of each image of the global batch, so that any number of processes sees the same pixels. On a GPU that is PyTorch,
a batch at a time, or in compiled runs moco/fused.py; on a CPU it is OpenCV, a view at a time, three times as fast. All
are torchvision's functions to 1e-5. Crops, flips and blur take any number of channels, colours take three.
`moco/data/views.py` puts it together.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F

# A view. size: its side, as a share of --image-size. area: the least and the largest share of the image in its crop.
# jitter: strengths of brightness, contrast, saturation, hue. jitter_p, gray_p, blur_p and solarize_p: how probable each
# is. gray_first: before the jitter, not after it. Sources: arXiv:1911.05722 section 3.3, arXiv:2003.04297 section 3,
# arXiv:2002.05709 appendix A with strength 1.
V2 = {
    "size": 1.0, "area": (0.2, 1.0), "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.2,
    "gray_first": False, "blur_p": 0.5, "solarize_p": 0.0,
}  # fmt: skip
V1 = V2 | {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_p": 1.0, "gray_first": True, "blur_p": 0.0}
SIMCLR = V2 | {"area": (0.08, 1.0), "jitter": (0.8, 0.8, 0.8, 0.2)}
NO_COLOUR = V2 | {"jitter_p": 0.0, "gray_p": 0.0}  # for images of any number of channels
# A recipe is a list of views, which may differ. Multi-crop, for one, is
# [V2 | {"area": (0.14, 1.0)}] * 2 + [V2 | {"size": 96 / 224, "area": (0.05, 0.14)}] * 6
AUGMENTATIONS = {"v1": [V1, V1], "v2": [V2, V2], "simclr": [SIMCLR, SIMCLR], "no-colour": [NO_COLOUR, NO_COLOUR]}
CROP_RATIO = (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # as `sample_params` numbers them
NEUTRAL = (1, 1, 1, 0)  # the factor of each that changes nothing
BLUR_SIGMA = (0.1, 2.0)  # pixels of a 224 pixel image
LUMA = np.array([0.2989, 0.587, 0.114], np.float32)  # of red, green, blue: ITU-R 601's, as torchvision has them
CHUNK = 256  # images that a GPU augments at a time: at 224 pixels 308 MB a copy of two views, and it makes two copies


# ---- host: where to cut, and the cut


def random_crop_boxes(height, width, rng, areas=((0.2, 1.0), (0.2, 1.0))):
    """Boxes of RandomResizedCrop for each view: (views, 4) int, rows of top, left, height, width.

    rng: a numpy Generator. areas: (least, largest) share of the image's area, of each view. Ten tries for a share in
    that range and an aspect in CROP_RATIO that fit, then the largest centred box of an aspect in range, as torchvision
    does.
    """
    views, (least, largest) = len(areas), np.transpose(areas)[..., None]
    draws = rng.random((views, 10, 4))
    area = height * width * (least + draws[..., 0] * (largest - least))
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


def cut_crops(image, boxes, sizes):
    """Cut and resize every box of an image, a (H, W, C) array: a list of (size, size, C) tensors of its type.

    sizes: the side of each crop, or one for all. Bilinear with antialiasing, at most one level from Pillow's.
    Channels-last strides are what makes the resize fast.
    """
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    crops = []
    for (top, left, h, w), size in zip(boxes, np.broadcast_to(sizes, len(boxes)).tolist()):
        crop = pixels[:, :, top : top + h, left : left + w]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0))
    return crops


# ---- device: crops as the encoders take them


def to_float(crops):
    """(N, S, S, C) uint8 -> (N, C, S, S) in [0, 1], channels-last by its strides. Floats keep their values.

    Of PyTorch's default precision: float32, unless a test or a check asks for float64.
    """
    x = crops.permute(0, 3, 1, 2).to(torch.get_default_dtype())
    return x / 255 if crops.dtype == torch.uint8 else x


def normalize(x, mean, std):
    """Subtract each channel's mean and divide by its deviation. x: (N, C, H, W). mean, std: C numbers each."""
    mean, std = (send(values, x.dtype, x).view(1, x.shape[1], 1, 1) for values in (mean, std))
    return (x - mean) / std


# ---- parameters of the augmentation


def sample_params(recipe, n, seed, step, rows=slice(None)):
    """Augmentation parameters of the global batch at `step`: a dict of CPU tensors, each (n, V) or (n, V, 4).

    recipe: a list of V views, see `AUGMENTATIONS`. n: images in the global batch. rows: those of one process; all are
    drawn, so that the parameters do not depend on the number of processes.
    factors (n, V, 4): brightness, contrast, saturation factors and hue shift (in turns), neutral where not jittered.
    order (n, V, 4): the operations in the order they are applied. gray, gray_first, flip, solarize (n, V): bool.
    sigma (n, V): of the blur, in pixels of a 224 pixel image, 0 for none.
    """
    rng, views = np.random.default_rng([*b"photometry", seed, step]), len(recipe)
    strength, jitter_p, gray_p, gray_first, blur_p, solarize_p = (
        np.array([view[name] for view in recipe])
        for name in ("jitter", "jitter_p", "gray_p", "gray_first", "blur_p", "solarize_p")
    )
    factors = rng.uniform(-strength, strength, (n, views, 4)) + NEUTRAL
    jitter = rng.random((n, views, 1)) < jitter_p[:, None]
    params = {
        "factors": np.where(jitter, factors, NEUTRAL).astype(np.float32),
        "order": rng.random((n, views, 4)).argsort(axis=-1),
        "gray": rng.random((n, views)) < gray_p,
        "gray_first": np.tile(gray_first, (n, 1)),
        "sigma": (rng.uniform(*BLUR_SIGMA, (n, views)) * (rng.random((n, views)) < blur_p)).astype(np.float32),
        "flip": rng.random((n, views)) < 0.5,
        "solarize": rng.random((n, views)) < solarize_p,
    }
    return {name: torch.from_numpy(values[rows]) for name, values in params.items()}


def blur_taps(size):
    """Taps on either side of the blur's centre: three times the largest sigma leave nothing out."""
    return max(6, math.ceil(3 * BLUR_SIGMA[1] * size / 224))


# ---- on a CPU: one view, (S, S, C), by OpenCV

TO_GRAY = np.broadcast_to(LUMA, (3, 3))


def augment_view(crop, normalization, order, factors, gray, gray_first, sigma, flip, solarize):
    """The view of a crop, (S, S, C) uint8 or float32 -> float32, normalised; the parameters are those of one view.

    normalization: an affine map of colours, (C, C + 1).
    """
    x = (cv2.flip(crop, 1) if flip else crop).astype(np.float32)
    if crop.dtype == np.uint8:
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
    if solarize:
        x = np.where(x < 0.5, x, 1 - x)
    return cv2.transform(x, normalization).reshape(crop.shape)  # OpenCV drops a single channel


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


# ---- on a GPU: operations on a batch, (N, 3, H, W) in [0, 1], which they may overwrite; they return the new one.
# factor, shift and sigma: (N, 1, 1, 1)


def luma(x):
    """(N, 3, H, W) -> (N, 1, H, W)."""
    red, green, blue = LUMA.tolist()
    return (red * x[:, :1]).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)


def adjust_brightness(x, factor):
    return x.mul_(factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    mean = luma(x.mean(dim=(2, 3), keepdim=True))
    return torch.addcmul((1 - factor) * mean, x, factor, out=x).clamp_(0, 1)


def adjust_saturation(x, factor):
    return torch.lerp(luma(x), x, factor, out=x).clamp_(0, 1)


def adjust_hue(x, shift):
    """Turn the hue by `shift` turns: each channel is the value less as much chroma as its own hue is away."""
    red, green, blue = x.split(1, dim=1)
    above, below = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, above), torch.minimum(red, above)
    low = torch.minimum(middle, below)
    largest_is_red, green_first = (red >= above), (green >= blue)
    sextant = torch.where(largest_is_red, torch.where(green_first, 0.0, -1.0), torch.where(green_first, -1 / 3, 2 / 3))
    chroma = value - low
    floor = low - chroma
    chroma.mul_(6)
    hue = middle.sub_(below).div_(chroma.clamp(min=1e-30)).add_(sextant).abs_().add_(shift)
    away = torch.empty_like(x)  # how far the hue is from the one opposite to each channel, in turns
    for channel, turns in enumerate((2, 5 / 3, 4 / 3)):  # half a turn more, and one, so that nothing is negative
        torch.add(hue, turns, out=away[:, channel : channel + 1])
    away.frac_().sub_(0.5).abs_()
    return torch.clamp(torch.addcmul(floor, chroma, away, out=away), low, value, out=x)


def to_gray(x):
    return luma(x).expand_as(x)


def solarize(x):
    return torch.where(x < 0.5, x, 1 - x)


def blur_kernel(sigma, half):
    """sigma (N, 1), in pixels -> weights (N, 2 * half + 1), whose sum is 1."""
    taps = torch.arange(-half, half + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
    return kernel / kernel.sum(dim=1, keepdim=True)


def gaussian_blur(x, sigma):
    """Blur each image with its own sigma, in pixels; borders are reflected. As torchvision's, which takes one sigma."""
    n, channels, height, width = x.shape
    half = blur_taps(width)
    kernel = blur_kernel(sigma.view(n, 1), half).repeat_interleave(channels, dim=0)  # (n * channels, taps)
    planes = F.pad(x.view(1, n * channels, height, width), (half,) * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=n * channels)
    return F.conv2d(planes, kernel[:, None, None, :], groups=n * channels).view_as(x)


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def plan(params, size):
    """What is done to a batch: the images to flip, then [(operation, images, a value for each or None)] in this order.

    params: of `sample_params`, each (N, ...) here, without the dimension of views. size: side of an image.
    """
    order, factors, sigma = (params[name].tolist() for name in ("order", "factors", "sigma"))
    gray, gray_first = params["gray"], params["gray_first"]
    steps = [(to_gray, images_of(gray & gray_first), None)]
    for place in range(4):
        for number, operation in enumerate(JITTER):
            images = [i for i, o in enumerate(order) if o[place] == number and factors[i][number] != NEUTRAL[number]]
            steps.append((operation, images, [factors[i][number] for i in images]))
    steps.append((to_gray, images_of(gray & ~gray_first), None))
    blurred = images_of(params["sigma"])
    steps.append((gaussian_blur, blurred, [sigma[i] * size / 224 for i in blurred]))
    steps.append((solarize, images_of(params["solarize"]), None))
    return images_of(params["flip"]), [step for step in steps if step[1]]


def images_of(chosen):
    """The numbers of the images, a list, for which a tensor (N,) is not 0."""
    return chosen.nonzero().flatten().tolist()


def send(values, dtype, x):
    """Numbers as a tensor on x's device, from pinned memory: the copy does not wait for what the device has to do."""
    values = torch.as_tensor(values, dtype=dtype)
    return values.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else values


def scale_and_shift(mean, std, x):
    """What x, a view, is multiplied by and what is added to normalise it: (C,) each, on its device."""
    return send([1 / s for s in std], x.dtype, x), send([-m / s for m, s in zip(mean, std)], x.dtype, x)


def augment_batch(crops, params):
    """The views of crops, (N, S, S, C) uint8 or float32 -> (N, C, S, S) float32; params as for `plan`.

    The crops are flipped first, in place, because a byte a pixel is a quarter of what they are later.
    """
    flipped, steps = plan(params, crops.shape[1])
    lengths = [len(flipped), *(len(images) for _, images, _ in steps)]
    # All parameters in two copies to the device, then cut into those of each step.
    indices = [*flipped, *(i for _, images, _ in steps for i in images)]
    flipped, *indices = send(indices, torch.long, crops).split(lengths)
    values = [v for _, images, of_each in steps for v in of_each or images]
    values = send(values, torch.float32, crops).split(lengths[1:])
    crops.index_copy_(0, flipped, crops.index_select(0, flipped).flip(2))
    x = torch.empty(crops.permute(0, 3, 1, 2).shape, dtype=torch.float32, device=crops.device)
    torch.div(crops.permute(0, 3, 1, 2), 255 if crops.dtype == torch.uint8 else 1, out=x)
    for (operation, _, of_each), index, value in zip(steps, indices, values):
        part = x.index_select(0, index)
        x.index_copy_(0, index, operation(part, *(() if of_each is None else (value.view(-1, 1, 1, 1),))))
    return x


# ---- all views of a batch


def augment_on_cpu(out, crops, params, mean, std):
    """Fill out, (V, n, S, S, C), with the views of V crops (n, S, S, C), one by one."""
    params = {name: values.tolist() for name, values in params.items()}
    normalization = np.column_stack([np.diag(1 / np.array(std)), -np.array(mean) / std])
    for v, (views, crops_of_view) in enumerate(zip(out.numpy(), crops)):
        for i, crop in enumerate(crops_of_view.numpy()):
            of_view = {name: values[i][v] for name, values in params.items()}
            views[i] = augment_view(crop, normalization, **of_view)


def augment_in_chunks(out, crops, params, mean, std):
    """As `augment_on_cpu`, by operations on many images at a time."""
    scale, shift = (values.view(-1, 1, 1) for values in scale_and_shift(mean, std, out))
    for first in range(0, out.shape[1], CHUNK):
        chunk = slice(first, first + CHUNK)
        of_chunk = {name: values[chunk].transpose(0, 1).flatten(0, 1) for name, values in params.items()}
        x = augment_batch(torch.cat([crop[chunk] for crop in crops]), of_chunk).unflatten(0, (len(crops), -1))
        torch.addcmul(shift, x, scale, out=out[:, chunk].permute(0, 1, 4, 2, 3))  # normalised, and channels-last


@torch.no_grad()
def augment(crops, params, mean, std, on_gpu=augment_in_chunks):
    """The device part of a recipe: crops and their parameters -> a list of V (n, C, S, S) float32 tensors.

    crops: a list of V (n, S, S, C) tensors, uint8 or float32; sides may differ. params: of `sample_params`, for these
    n images. mean, std: C numbers each, to normalise with. The views are channels-last by their strides.
    An image pays for the operations that it gets, not for those of others. Computed in float32 whatever the training
    precision (bfloat16 would be up to 17 levels off). Values are not rounded to uint8 between operations as Pillow
    rounds them. Blur's sigma scales with S / 224.
    """
    views = [None] * len(crops)
    for size in sorted({crop.shape[1] for crop in crops}):  # views of one size are one batch
        group = [v for v, crop in enumerate(crops) if crop.shape[1] == size]
        of_group = {name: values[:, group] for name, values in params.items()}
        out = torch.empty(len(group), *crops[group[0]].shape, device=crops[0].device)
        fill = augment_on_cpu if out.device.type == "cpu" else on_gpu
        fill(out, [crops[v] for v in group], of_group, mean, std)
        for v, view in zip(group, out.permute(0, 1, 4, 2, 3)):
            views[v] = view
    return views
