"""Patches of 27 photographs, the photograph as the class: natural colours, as the parquet files that --data takes.

apt-get install lomiri-wallpapers-16.04 mate-backgrounds && python benchmarks/wallpapers.py runs/wallpapers
python benchmarks/wallpapers.py photos /usr/share/backgrounds 2000 500      # fewer of them

The photographs (Creative Commons and GPL) are scaled to tiles of 96 pixels, about 40 of them. A patch of 48 pixels lies
within a tile, and every fifth tile is for the test, so that no pixel is in both splits. Unless given, counts are the
built-in data's.
"""

import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

SOURCE = Path("/usr/share/backgrounds")  # of Debian's packages; elsewhere name it as the second argument
PATCHES = {"train": 6000, "test": 1500}
TILE, PATCH, TILES = 96, 48, 40


def tiles_of(file):
    """The tiles of a photograph, (TILE, TILE, 3) uint8 each, row by row."""
    image = Image.open(file).convert("RGB")
    scale = (TILES * TILE**2 / (image.width * image.height)) ** 0.5
    columns, rows = round(image.width * scale / TILE), round(image.height * scale / TILE)
    pixels = np.asarray(image.resize((columns * TILE, rows * TILE), Image.LANCZOS))
    return [tile for row in np.vsplit(pixels, rows) for tile in np.hsplit(row, columns)]


def main(target, source=SOURCE, *counts):
    files = sorted(Path(source).glob("*_by_*.jpg"), key=str) + sorted(Path(source).glob("mate/nature/*.jpg"), key=str)
    photographs = [tiles_of(file) for file in files]
    names = [file.stem for file in files]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    for split, count in zip(PATCHES, map(int, counts or PATCHES.values()), strict=True):
        images, labels = [], []
        for index in range(count):
            rng = np.random.default_rng([*split.encode(), index])
            label = index % len(files)
            tiles = [tile for i, tile in enumerate(photographs[label]) if (i % 5 == 2) == (split == "test")]
            top, left = rng.integers(TILE - PATCH + 1, size=2)
            images.append(Image.fromarray(tiles[rng.integers(len(tiles))][top : top + PATCH, left : left + PATCH]))
            labels.append(label)
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(Path(target) / f"{split}.parquet", batch_size=1000)
        print(f"{len(rows)} patches of {len(files)} photographs in {Path(target) / f'{split}.parquet'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
