"""A folder of images on disk: which of its folders are splits, which are classes, and the files in them."""

import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets.table import InMemoryTable
from torchvision.datasets.folder import IMG_EXTENSIONS

SUFFIXES = (*IMG_EXTENSIONS, ".gif")
TRAIN = ("train", "training")
TEST = ("validation", "valid", "val", "dev", "eval", "test", "testing")  # the first that is there is taken


def folder_splits(name):
    """{split: data set} of a folder of images, or None where it holds something else, which `datasets` may read.

    Folders are splits if the names of all are in TRAIN or TEST, or if there are names of both kinds. A data set has the
    column "image" and, if there are several folders in the split, "label", the number of the folder among those of
    training in alphabetical order, however deep below it an image lies. What is left out is printed: files that are no
    images, images beside splits, and labels of classes that are not trained on.
    """
    images, others = list_files(os.path.abspath(name))
    if not images or any(path.endswith(".parquet") or Path(path).stem == "metadata" for path in others):
        return None
    root = os.path.commonpath({os.path.dirname(path) for path in images})
    splits = by_folder(images, root)
    kinds = {"train" if part.lower() in TRAIN else "test" if part.lower() in TEST else "" for part in splits if part}
    if "" in kinds and kinds != {"", "train", "test"}:
        splits, kinds = {"": images}, set()
    loose = splits.pop("") if kinds and "" in splits else []
    classes = {split: by_folder(paths, os.path.join(root, split) if split else root) for split, paths in splits.items()}
    trained = next((found for split, found in classes.items() if split.lower() in TRAIN), next(iter(classes.values())))
    names = sorted(trained) if len(trained) > 1 and "" not in trained else None
    strange = {split: sorted(set(found) - set(names or found) - {""}) for split, found in classes.items()}
    if PartialState().is_main_process:
        if others:
            suffixes = sorted({Path(path).suffix or Path(path).name for path in others})
            print(f"data    {len(others)} files in {name} are no images and left out: {', '.join(suffixes[:8])}")
        if loose:
            print(f"data    {len(loose)} images in {name} lie beside the splits and are left out")
        for split, found in strange.items():
            if found:
                print(
                    f"data    labels of {split} left out, with classes that are not trained on: {', '.join(found[:5])}"
                )
    return {
        split.lower() or "train": image_rows(found, None if strange[split] else names)
        for split, found in classes.items()
    }


def list_files(folder, above=()):
    """(paths of images, of other files) in a folder and below, in order, links followed, without hidden ones.

    above: what the folders that it lies in are told by; a link back to one of them is a circle and not followed.
    """
    status = os.stat(folder)
    here = (*above, (status.st_dev, status.st_ino))
    images, others = [], []
    if here[-1] in above:
        return images, others
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            for found, more in zip((images, others), list_files(entry.path, here), strict=True):
                found += more
        else:
            (images if entry.name.lower().endswith(SUFFIXES) else others).append(entry.path)
    return images, others


def by_folder(paths, root):
    """{name of the folder in `root` that paths lie in or below, "" for none: paths}."""
    found = {}
    for path in paths:
        folder, separator, _ = path[len(root) + 1 :].partition(os.sep)
        found.setdefault(folder if separator else "", []).append(path)
    return found


def image_rows(classes, names):
    """A data set of {class: paths}, with labels where `names` are given and no image is without a class."""
    paths = pa.array([path for paths in classes.values() for path in paths])
    encoded = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    columns, features = {"image": encoded}, datasets.Features(image=datasets.Image(decode=False))
    if names and "" not in classes:
        labels = [np.full(len(paths), names.index(name)) for name, paths in classes.items()]
        columns["label"], features["label"] = np.concatenate(labels), datasets.ClassLabel(names=names)
    # Of an Arrow table at once: from_dict looks at each row, 17 s for ImageNet's.
    return datasets.Dataset(InMemoryTable(pa.table(columns)), info=datasets.DatasetInfo(features=features))
