"""Fashion-MNIST, 60,000 and 10,000 gray photographs of 28 x 28 pixels, as the parquet files that --data takes.

apt-get install dataset-fashion-mnist && python benchmarks/fashion_mnist.py runs/fashion-mnist
"""

import gzip
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package; elsewhere name it as the second argument
CLASSES = "t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot".split(", ")


def main(target, source=SOURCE):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    for split, name in (("train", "train"), ("test", "t10k")):
        pixels, labels = (
            np.frombuffer(gzip.open(Path(source) / f"{name}-{kind}.gz").read(), np.uint8, offset=offset)
            for kind, offset in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8))
        )
        images = [Image.fromarray(image) for image in pixels.reshape(-1, 28, 28)]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
        rows.to_parquet(Path(target) / f"{split}.parquet", batch_size=1000)
        print(f"{len(rows)} images in {Path(target) / f'{split}.parquet'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
