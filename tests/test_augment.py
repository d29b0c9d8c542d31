"""Crops and the device augmentation beside torchvision's and Pillow's functions. pytest tests/test_augment.py"""

import itertools
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from moco.augment import (
    AUGMENTATIONS,
    MEAN,
    STD,
    V2,
    augment,
    augment_in_chunks,
    cut_crops,
    normalize,
    random_crop_boxes,
    sample_params,
    to_float,
)
from moco.fused import augment_fused, compiled_augmentation, fill_view

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # places in `factors`, numbers in `order`


def slow_view(image, factors, order, gray, gray_first, sigma, flip, solarize):
    """One view, (S, S, 3) uint8, through torchvision's functions one at a time, in the recipe's order."""

    def jitter(x):
        for operation in order.tolist():
            factor = factors[operation].item()
            if operation == BRIGHTNESS:
                x = TF.adjust_brightness(x, factor)
            elif operation == CONTRAST:
                x = TF.adjust_contrast(x, factor)
            elif operation == SATURATION:
                x = TF.adjust_saturation(x, factor)
            elif operation == HUE:
                x = TF.adjust_hue(x, factor)
        return x

    def grayscale(x):
        return TF.rgb_to_grayscale(x, num_output_channels=3) if gray else x

    x = image.permute(2, 0, 1).float() / 255
    x = jitter(grayscale(x)) if gray_first else grayscale(jitter(x))
    if sigma > 0:
        x = TF.gaussian_blur(x, 13 if x.shape[-1] <= 224 else 25, sigma.item() * x.shape[-1] / 224)
    if solarize:
        x = TF.solarize(x, 0.5)
    if flip:
        x = TF.hflip(x)
    return TF.normalize(x, MEAN, STD)


def by_views(crops, params):
    return augment(crops, params, MEAN, STD)


def by_batches(crops, params):
    """As on a GPU, here on the CPU."""
    out = torch.empty(len(crops), *crops[0].shape)
    augment_in_chunks(out, crops, params, MEAN, STD)
    return out.permute(0, 1, 4, 2, 3)


NOT_COMPILED = partial(augment_fused, fill=fill_view)


def by_masks(crops, params, fused=NOT_COMPILED):
    """As on a GPU in a compiled run, here on the CPU."""
    out = torch.empty(len(crops), *crops[0].shape)
    fused(out, crops, params, MEAN, STD)
    return out.permute(0, 1, 4, 2, 3)


BYOL = V2 | {"jitter": (0.4, 0.4, 0.2, 0.1)}
RECIPES = AUGMENTATIONS | {"byol": [BYOL | {"blur_p": 1.0}, BYOL | {"blur_p": 0.1, "solarize_p": 0.2}]}


@pytest.mark.parametrize("make", [by_views, by_batches, by_masks])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size, n", [(32, 80), (224, 6), (448, 3)])
def test_the_augmentation_equals_torchvision_per_sample(make, recipe, size, n):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n * 2, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    noisy = (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    views = (noisy * 255).byte().permute(0, 2, 3, 1).reshape(n, 2, size, size, 3)
    views[0, 0] = 77  # gray all over: no hue
    params = sample_params(RECIPES[recipe], n, seed=3, step=9)
    augmented = make(list(views.unbind(1)), params)
    for i, view in itertools.product(range(n), range(2)):
        expected = slow_view(views[i, view], **{name: values[i, view] for name, values in params.items()})
        torch.testing.assert_close(augmented[view][i], expected, rtol=0, atol=1e-5 / min(STD))


def test_a_compiler_takes_the_whole_augmentation_and_its_views_are_the_same():
    crops = [torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8) for _ in range(2)]
    params = sample_params(RECIPES["byol"], 5, seed=0, step=0)
    compiled = by_masks(crops, params, compiled_augmentation(backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled, torch.stack(by_views(crops, params)), rtol=0, atol=1e-5 / min(STD))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a compiler of C++")
@pytest.mark.parametrize("recipe", ["v1", "byol"])
def test_inductors_kernels_make_the_same_views(recipe):
    crops = [torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8) for _ in range(2)]
    params = sample_params(RECIPES[recipe], 5, seed=0, step=0)
    compiled = by_masks(crops, params, compiled_augmentation(backend="inductor"))
    torch.testing.assert_close(compiled, torch.stack(by_views(crops, params)), rtol=0, atol=1e-5 / min(STD))


def test_views_come_back_as_channels_last_halves():
    crops = [torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8) for _ in range(2)]
    query_images, key_images = augment(crops, sample_params(AUGMENTATIONS["v2"], 4, 0, 0), MEAN, STD)
    assert query_images.shape == key_images.shape == (4, 3, 16, 16)
    assert query_images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [3, 6])
def test_floats_of_any_range_keep_it_where_no_colour_is_changed(channels, monkeypatch):
    """From -3 to 3: flips and blur alone, in all three ways, in chunks of which the last is smaller."""
    for module in ("moco.augment", "moco.fused"):
        monkeypatch.setattr(f"{module}.CHUNK", 5)
    crops = [6 * torch.rand(8, 16, 16, channels) - 3 for _ in range(2)]
    params = sample_params(AUGMENTATIONS["no-colour"], 8, seed=0, step=0)
    scales = [0.5] * channels, [2.0] * channels
    views = [torch.empty(2, 8, 16, 16, channels) for _ in range(2)]
    for out, fill in zip(views, (augment_in_chunks, NOT_COMPILED)):
        fill(out, [crop.clone() for crop in crops], params, *scales)
    expected = torch.stack(augment(crops, params, *scales)).permute(0, 1, 3, 4, 2)
    for out in views:
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_a_process_sees_its_slice_of_the_global_batch():
    recipe = [V2, V2 | {"size": 0.5, "blur_p": 1.0}, V2]
    crops = [torch.randint(0, 256, (6, size, size, 3), dtype=torch.uint8) for size in (16, 8, 16)]
    whole = augment(crops, sample_params(recipe, 6, seed=0, step=4), MEAN, STD)
    assert [view.shape[-1] for view in whole] == [16, 8, 16]
    for mine in (slice(0, 3), slice(3, 6)):
        params = sample_params(recipe, 6, seed=0, step=4, rows=mine)
        part = augment([crop[mine] for crop in crops], params, MEAN, STD)
        for view in range(3):
            assert part[view].equal(whole[view][mine])


# ---- frequencies: 20,000 draws, five standard deviations

DRAWS = 20_000


def within(count, draws, probability):
    return abs(count - draws * probability) < 5 * math.sqrt(draws * probability * (1 - probability)) + 1e-9


@pytest.mark.parametrize("recipe, jitter_p, blur_p", [("v1", 1.0, 0.0), ("v2", 0.8, 0.5), ("simclr", 0.8, 0.5)])
def test_frequencies_are_the_papers(recipe, jitter_p, blur_p):
    params = sample_params(AUGMENTATIONS[recipe], DRAWS, seed=0, step=0)
    for view in range(2):
        jittered = (params["factors"][:, view] != torch.tensor([1.0, 1, 1, 0])).any(dim=1)
        assert within(jittered.sum().item(), DRAWS, jitter_p)
        assert within(params["gray"][:, view].sum().item(), DRAWS, 0.2)
        assert within((params["sigma"][:, view] > 0).sum().item(), DRAWS, blur_p)
        assert within(params["flip"][:, view].sum().item(), DRAWS, 0.5)


def test_every_operation_takes_every_place_and_all_24_orders_are_equally_likely():
    orders = sample_params(AUGMENTATIONS["v2"], DRAWS, seed=1, step=0)["order"][:, 0]
    for operation, place in itertools.product(range(4), range(4)):
        assert within((orders[:, place] == operation).sum().item(), DRAWS, 1 / 4)
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and all(within(count, DRAWS, 1 / 24) for count in counts.tolist())


def test_the_two_views_are_drawn_apart():
    params = sample_params(AUGMENTATIONS["v2"], DRAWS, seed=2, step=0)
    for name, p in (("gray", 0.2), ("flip", 0.5)):
        both = (params[name][:, 0] & params[name][:, 1]).sum().item()
        assert within(both, DRAWS, p * p)
    assert within((params["order"][:, 0] == params["order"][:, 1]).all(dim=1).sum().item(), DRAWS, 1 / 24)


@pytest.mark.parametrize("recipe, hue", [("v1", 0.4), ("v2", 0.1)])
def test_factors_are_uniform_in_their_ranges(recipe, hue):
    params = sample_params(AUGMENTATIONS[recipe], DRAWS, seed=4, step=0)
    factors = params["factors"][(params["factors"][..., 0] != 1)]
    for column, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-hue, hue)]):
        values = factors[:, column]
        assert low <= values.min() and values.max() <= high
        for quarter in range(4):
            edge = low + (high - low) * quarter / 4
            inside = ((values >= edge) & (values < edge + (high - low) / 4)).sum().item()
            assert within(inside, len(values), 1 / 4)
    sigma = params["sigma"][params["sigma"] > 0]
    assert recipe == "v1" or (
        sigma.min() >= 0.1 and sigma.max() <= 2 and within((sigma < 1.05).sum().item(), len(sigma), 0.5)
    )


def test_parameters_depend_on_seed_and_step_alone():
    first, again, other = (sample_params(AUGMENTATIONS["v2"], 8, 5, step) for step in (3, 3, 4))
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["factors"].equal(other["factors"])


# ---- crops


def test_crop_boxes_are_distributed_as_torchvisions():
    height, width = 375, 500
    boxes = np.concatenate([random_crop_boxes(height, width, np.random.default_rng(i)) for i in range(1500)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)])

    def statistics(b):
        free = np.maximum(height - b[:, 2], 1), np.maximum(width - b[:, 3], 1)
        columns = (
            b[:, 2] * b[:, 3] / (height * width),
            np.log(b[:, 3] / b[:, 2]),
            b[:, 0] / free[0],
            b[:, 1] / free[1],
        )
        return np.stack([np.quantile(column, np.linspace(0.05, 0.95, 10)) for column in columns])

    spread = np.array([0.23, 0.17, 0.3, 0.3])[:, None]  # standard deviations of the four, about
    assert (np.abs(statistics(boxes) - statistics(theirs)) < 5 * spread * 2 / math.sqrt(3000) * 1.4).all()


@pytest.mark.parametrize("height, width", [(375, 500), (20, 20), (10, 400), (400, 10), (1, 1)])
def test_crop_boxes_stay_inside(height, width):
    for seed in range(50):
        for top, left, h, w in random_crop_boxes(height, width, np.random.default_rng(seed)):
            assert top >= 0 and left >= 0 and h >= 1 and w >= 1 and top + h <= height and left + w <= width


def test_where_no_crop_fits_the_largest_centred_one_is_taken():
    for box in random_crop_boxes(10, 400, np.random.default_rng(0)):
        assert box.tolist() == [0, 193, 10, 13]


def test_crops_are_within_one_level_of_pillows():
    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).resize((500, 375)))
    boxes = random_crop_boxes(375, 500, rng)
    crops = cut_crops(image.copy(), boxes, 224)
    assert all(crop.shape == (224, 224, 3) and crop.dtype == torch.uint8 for crop in crops)
    for crop, (top, left, h, w) in zip(crops, boxes):
        box = (int(left), int(top), int(left + w), int(top + h))
        pillow = np.asarray(Image.fromarray(image).crop(box).resize((224, 224), Image.BILINEAR))
        assert np.abs(crop.numpy().astype(int) - pillow).max() <= 1


def test_normalisation_is_torchvisions():
    crops = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    expected = TF.normalize(crops.permute(0, 3, 1, 2) / 255, MEAN, STD)
    torch.testing.assert_close(normalize(to_float(crops), MEAN, STD), expected)
