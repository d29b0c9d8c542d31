"""The built-in data: patterned shapes on quiet backgrounds, each image a pure function of (split, index).

A class is a pattern (stripes, dots, rings ...) in a palette (orange or blue), ten times two of them. Outline, position,
size, rotation, saturation, lighting, blur and noise are nuisances, drawn independently for each image.

Why both. What contrastive learning keeps is what its augmentation leaves alone. A pattern survives every recipe's
crops, flips and colours, so patterns alone cannot tell one recipe from another. On natural images a class also lies in
what augmentation takes away, colour above all: MoCo v1 shifts hues by up to 0.4 of the colour circle, v2 by 0.1. So
the palettes are half the circle apart: under v2 (0.1), and under SimCLR's recipe (0.2), a hue stays nearer to its own
palette; under v1 either palette can look like the other, and the encoder is trained to ignore the difference.

Why the rest is quiet. What tells an image from all others without telling its class is the easiest thing to learn. So
hues vary less within a palette than any recipe shifts them, and dark colours and backgrounds are nearly gray.
"""

import colorsys
import hashlib
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageFilter

from moco.errors import UserError

PATTERNS = (
    "horizontal stripes, vertical stripes, diagonal stripes, checker, dots, rings, zigzag, grid, triangles, rays"
).split(", ")
PALETTES = {"orange": 0.08, "blue": 0.58}  # hue of the light colour, in turns of the colour circle
HUE_RANGE = 0.04  # around it, to either side
CLASSES = tuple(f"{palette} {pattern}" for pattern in PATTERNS for palette in PALETTES)
VERSION = 2  # 1, until commit 062b35c: ten classes, of patterns alone
SPLITS = {"train": 6000, "test": 1500}  # images
JPEG_QUALITY = 90


def check_version(settings, data):
    """Raise UserError if the settings of a run or a backbone are of another version of the built-in data than this."""
    there = settings.get("data_version", 1)
    if settings.get("data") == data == "shapes" and there != VERSION:
        raise UserError(
            f"this run or backbone was trained on version {there} of the built-in data, and this is version {VERSION}:"
            " train it again, or use the commit that is in its args.json"
        )


def soft(distance, edge):
    """Antialiased step: 0 below, 1 above distance 0, linear over `edge` between."""
    return np.clip(distance / edge + 0.5, 0, 1)


def stripe(x):
    """Signed distance, in periods, from x to the border of stripes of period 1, half of them inside."""
    return 0.25 - np.abs(x - np.floor(x) - 0.5)


def draw_pattern(name, u, v, pixel):
    """Coverage in [0, 1] of a pattern at coordinates u, v in periods; `pixel`: the side of one in periods."""
    if name == "horizontal stripes":
        return soft(stripe(v), pixel)
    if name == "vertical stripes":
        return soft(stripe(u), pixel)
    if name == "diagonal stripes":
        return soft(stripe((u + v) * 0.7071), pixel)
    if name == "checker":
        return soft(stripe(u / 2) * stripe(v / 2) * 16, pixel * 2)
    if name == "dots":
        return soft(0.36 - np.hypot(u - np.round(u), v - np.round(v)), pixel)
    if name == "rings":
        return soft(stripe(np.hypot(u, v)), pixel)
    if name == "zigzag":
        return soft(stripe(v + 2 * np.abs(u / 2 - np.round(u / 2))), pixel * 1.4)
    if name == "grid":
        return soft(np.maximum(-stripe(u), -stripe(v)) - 0.1, pixel)
    if name == "triangles":
        shifted = u + np.floor(v) / 2
        return soft((v - np.floor(v)) - 2 * np.abs(shifted - np.round(shifted)), pixel * 2)
    return soft(stripe(np.arctan2(v, u) * 4 / np.pi), pixel / (np.hypot(u, v) + 0.2))


def draw_outline(kind, x, y, pixel):
    """Coverage of a unit-sized outline at x, y: 0 a disc, 3 to 6 a polygon, above 6 a flower of kind - 4 petals."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    if kind == 0:
        limit = 1.0
    elif kind <= 6:
        sector = 2 * np.pi / kind
        limit = np.cos(sector / 2) / np.cos(angle % sector - sector / 2) * (1.25 if kind < 5 else 1.1)
    else:
        limit = 0.85 + 0.15 * np.cos(angle * (kind - 4))
    return soft(limit - radius, pixel)


def draw_object(rng, radius, columns, rows):
    """A patterned shape: (its coverage (H, W), its pixels (H, W, 3), its label).

    radius: in pixels. columns, rows: of each pixel, from the shape's centre.
    """
    tilt, spin = rng.normal(0, 0.15), rng.uniform(0, 2 * np.pi)
    x, y = columns / radius, rows / radius
    kind = rng.choice([0, 3, 4, 5, 6, 8, 9, 10])
    mask = draw_outline(kind, x * np.cos(spin) + y * np.sin(spin), y * np.cos(spin) - x * np.sin(spin), 1 / radius)
    label, periods = int(rng.integers(len(CLASSES))), rng.uniform(1.5, 3.2)
    pattern, hue = PATTERNS[label // len(PALETTES)], [*PALETTES.values()][label % len(PALETTES)]
    u = (x * np.cos(tilt) + y * np.sin(tilt)) * periods
    v = (y * np.cos(tilt) - x * np.sin(tilt)) * periods
    if pattern not in ("rings", "rays"):
        u, v = u + rng.random(), v + rng.random()
    coverage = draw_pattern(pattern, u, v, periods / radius)[..., None]
    light = draw_colour(rng, (hue - HUE_RANGE, hue + HUE_RANGE), (0.2, 0.7), (0.75, 1))
    dark = draw_colour(rng, (0, 1), (0, 0.1), (0.05, 0.35))
    if rng.random() < 0.5:
        light, dark = dark, light
    return mask, coverage * light + (1 - coverage) * dark, label


def draw_colour(rng, hue, saturation, value):
    """A random colour, (3,) in [0, 1], each component uniform in its range."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value)))


def draw_scene(split, index, size=48, objects=1):
    """One image with its labels and boxes, a pure function of the arguments.

    split: "train" or "test". index: >= 0. size: side in pixels. objects: how many; none hides another.
    Returns image (size, size, 3) uint8, labels (objects,) int64 into CLASSES, boxes (objects, 4) float32, xyxy.
    Fewer objects come back if there is no room for another one.
    """
    rng = np.random.default_rng([*split.encode(), index, size, objects])
    rows, columns = np.mgrid[:size, :size] + 0.5
    gray, angle = rng.uniform(0.3, 0.8), rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * (columns / size - 0.5) + np.sin(angle) * (rows / size - 0.5))[..., None]
    image = np.broadcast_to(draw_colour(rng, (0, 1), (0, 0.1), (gray, gray)), (size, size, 3))
    labels, boxes, taken = [], [], np.zeros((size, size))
    for _ in range(objects * 20):
        if len(labels) == objects:
            break
        radius = size * rng.uniform(0.32, 0.5) / np.sqrt(objects) ** 0.8
        cx, cy = rng.uniform(radius * 0.6, size - radius * 0.6, 2)
        mask, pixels, label = draw_object(rng, radius, columns - cx, rows - cy)
        if (mask * taken).any():
            continue
        image = image + mask[..., None] * (pixels - image)
        inside_rows, inside_columns = np.nonzero((mask > 0.5).any(1))[0], np.nonzero((mask > 0.5).any(0))[0]
        boxes.append([inside_columns[0], inside_rows[0], inside_columns[-1] + 1, inside_rows[-1] + 1])
        labels.append(label)
        taken = np.maximum(taken, mask > 0)
    image = image * (1 + rng.uniform(0, 0.6) * slope) * rng.uniform(0.75, 1.15)  # lighting
    blur = ImageFilter.GaussianBlur(rng.uniform(0, 0.012) * size)
    blurred = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).filter(blur)
    noisy = np.asarray(blurred, np.float32) + rng.normal(0, 255 * rng.uniform(0, 0.04), (size, size, 3))
    return noisy.clip(0, 255).astype(np.uint8), np.array(labels), np.array(boxes, np.float32).reshape(-1, 4)


def encode_jpeg(image):
    """(H, W, 3) uint8 -> JPEG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def shapes_dataset(split):
    """The built-in data of one split as a Hugging Face dataset of JPEG bytes and labels, drawn once and then cached."""

    def rows(indices):
        for index in indices:
            image, labels, _ = draw_scene(split, index)
            yield {"image": {"bytes": encode_jpeg(image), "path": f"{split}_{index}.jpg"}, "label": int(labels[0])}

    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # an edited file draws anew
    return datasets.Dataset.from_generator(
        rows,
        features=datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=CLASSES)),
        gen_kwargs={"indices": list(range(SPLITS[split]))},
        fingerprint=f"{source}-{split}",
    )
