"""JPEG files to batches of two views: images/s of one data worker, ours against the standard recipe.

python benchmarks/data_path.py

Standard: Pillow and torchvision's transforms, MoCo v2's two full views, float batches. Ours: one decode, two crops,
uint8 batches; the rest of the recipe runs on the training device (its cost on a CPU is printed beside it). Both go
through a DataLoader with one worker, take turns, and read files that this script makes.
"""

import io
import sys
import time
from pathlib import Path
from statistics import median

import datasets
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
from moco.augment import AUGMENTATIONS, MEAN, STD, augment, cut_crops, random_crop_boxes, sample_params
from moco.data.batches import loader
from moco.data.decode import decode_image
from moco.data.load import IndexedImages
from moco.data.views import FastViews

BATCH, BATCHES, ROUNDS = 32, 4, 5


def photograph(width, height, quality, rng):
    """JPEG bytes of noise in octaves, of about equal strength: files are as large as those of photographs."""
    image = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 11):
        n = 2**octave
        coarse = rng.normal(0, 1, (max(2, height * n // width), n, 3)).astype(np.float32)
        planes = [Image.fromarray(coarse[..., c]).resize((width, height), Image.BICUBIC) for c in range(3)]
        image += np.stack(planes, axis=-1) * n**0.1
    image = (image - image.min()) / (image.max() - image.min()) * 255
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class GaussianBlur:
    """As the reference has it: Pillow's, with a sigma of its own for each image."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def standard_transform(size, blur=None):
    """The official code's transforms of one view for MoCo v2. blur: theirs, else the same written here."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur or GaussianBlur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class StandardViews(torch.utils.data.Dataset):
    def __init__(self, files):
        self.files, self.transform = files, standard_transform(224)

    def __len__(self):
        return BATCH * BATCHES

    def __getitem__(self, index):
        with Image.open(io.BytesIO(self.files[index % len(self.files)])) as image:
            image = image.convert("RGB")
        return self.transform(image), self.transform(image)


def seconds(batches):
    """Seconds that all but the first batch take: starting the worker is not what is measured."""
    next(batches)
    started = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - started


def our_batches(files):
    images = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None} for data in files]},
        features=datasets.Features(image=datasets.Image(decode=False)),
    )
    keys = [([(0, i % len(files)) for i in range(b * BATCH, (b + 1) * BATCH)], ()) for b in range(BATCHES)]
    crops = FastViews(AUGMENTATIONS["v2"], 224, MEAN, STD).crops(IndexedImages(images), seed=0)
    return iter(loader(crops, keys, workers=1))


def deviation(data, n=40):
    """Largest and mean difference in levels of our crops from Pillow's antialiased ones of the whole image."""
    image = decode_image({"bytes": data, "path": None})
    height, width = image.shape[:2]
    largest, means = 0, []
    for i in range(n):
        boxes = random_crop_boxes(height, width, np.random.default_rng(i))
        for ours, (top, left, h, w) in zip(cut_crops(image, boxes, 224), boxes.tolist()):
            cut = Image.fromarray(image).crop((left, top, left + w, top + h))
            pillow = np.asarray(cut.resize((224, 224), Image.BILINEAR), int)
            difference = np.abs(ours.numpy() - pillow)
            largest, means = max(largest, difference.max()), [*means, difference.mean()]
    return largest, float(np.mean(means))


def print_main_process():
    """What is left to do in the main process for each image, and the recipe's other half on this CPU."""
    times = {"parameters": [], "device augmentation": []}
    views = [torch.randint(0, 256, (32, 224, 224, 3), dtype=torch.uint8) for _ in range(2)]
    for step in range(ROUNDS):
        started = time.perf_counter()
        params = sample_params(AUGMENTATIONS["v2"], 256, 0, step)
        times["parameters"].append(1000 * (time.perf_counter() - started) / 256)
        started = time.perf_counter()
        augment(views, {name: values[:32] for name, values in params.items()}, MEAN, STD)
        times["device augmentation"].append(1000 * (time.perf_counter() - started) / 32)
    for name, values in times.items():
        print(f"{name}: {median(values):.3f} ms an image" + ("" if name == "parameters" else ", on one CPU thread"))


def main():
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for width, height, quality in ((500, 375, 92), (1600, 1200, 90)):
        files = [photograph(width, height, quality, rng) for _ in range(8)]
        times = {"standard": [], "ours": []}
        for _ in range(ROUNDS):
            standard = DataLoader(StandardViews(files), batch_size=BATCH, num_workers=1, prefetch_factor=1)
            times["standard"].append(seconds(iter(standard)))
            times["ours"].append(seconds(our_batches(files)))
        rates = {name: BATCH * (BATCHES - 1) / median(values) for name, values in times.items()}
        ratio = median(a / b for a, b in zip(times["standard"], times["ours"]))
        largest, mean = deviation(files[0])
        print(
            f"{width}x{height}, {np.mean([len(data) for data in files]) / 1000:.0f} kB: standard"
            f" {rates['standard']:.0f} images/s, ours {rates['ours']:.0f}, ratio {ratio:.1f}; crops differ from"
            f" Pillow's by {largest} levels at most, {mean:.3f} in the mean"
        )
    print_main_process()


if __name__ == "__main__":
    main()
