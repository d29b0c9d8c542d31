"""A folder of images on disk: which of its folders are splits, which are classes, and the files in them."""

import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets.table import InMemoryTable
from torchvision.datasets.folder import IMG_EXTENSIONS

from moco.errors import UserError, first_line

SUFFIXES = (*IMG_EXTENSIONS, ".gif")
TRAIN = ("train", "training")
TEST = ("validation", "valid", "val", "dev", "eval", "test", "testing")  # the first that is there is taken


def folder_splits(name):
    """{split: data set} of a folder of images, or None where it holds something else, which `datasets` may read.

    Folders are splits where all of them are called as in TRAIN and TEST, or some as in either. A data set has the
    column "image" and, if there are several folders in the split, "label", the number of the folder among those of
    training in alphabetical order, however deep below it an image lies.
    Raises UserError for a folder that cannot be read, and for a class to test on that is not trained on.
    """
    images, others = list_files(os.path.abspath(name))
    if not images or any(path.endswith(".parquet") or Path(path).stem == "metadata" for path in others):
        return None
    if others and PartialState().is_main_process:
        kinds = sorted({Path(path).suffix or Path(path).name for path in others})
        print(f"data    {len(others)} files in {name} are no images and are left out: {', '.join(kinds[:8])}")
    root = os.path.commonpath({os.path.dirname(path) for path in images})
    splits = by_folder(images, root)
    kinds = ["train" if part.lower() in TRAIN else "test" if part.lower() in TEST else "" for part in splits]
    if "" in kinds and not {"train", "test"} <= set(kinds):
        splits = {"": images}
    classes = {split: by_folder(paths, os.path.join(root, split) if split else root) for split, paths in splits.items()}
    trained = next((found for split, found in classes.items() if split.lower() in TRAIN), next(iter(classes.values())))
    names = sorted(trained) if len(trained) > 1 and "" not in trained else None
    for split, found in classes.items():
        if names and "" not in found and not set(found) <= set(names):
            strange = ", ".join(sorted(set(found) - set(names))[:5])
            raise UserError(f"--data {name} has in {split}/ classes that are not in training: {strange}")
    return {split.lower() or "train": image_rows(found, names) for split, found in classes.items()}


def list_files(folder):
    """(paths of images, of other files) in a folder and below, in order, links followed, without hidden ones."""
    images, others, visited = [], [], set()

    def fail(error):
        raise UserError(f"--data {folder} cannot be read: {first_line(error)}")

    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:  # linked to from below
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                (images if name.lower().endswith(SUFFIXES) else others).append(os.path.join(here, name))
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
