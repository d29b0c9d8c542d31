"""A folder of images on disk: which of its folders are splits, which are classes, and the files in them."""

import os
from collections import Counter
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
UNLABELED = ("unlabeled", "unlabelled", "unsupervised")  # no class beside a folder of training images
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # what `datasets` reads labels from


def folder_splits(name, split=None):
    """{split: data set} of a folder of images, or None if it holds something else, which `datasets` may read.

    split: the folder to train on, if the user named one. Folders are splits if it is one of them, if the names of all
    are in TRAIN, TEST or UNLABELED, or if there are names of both TRAIN and TEST. A data set has the column "image"
    and, if there are several folders in the split, "label", the number of the folder among those of training in
    alphabetical order, however deep below it an image lies. What was found is printed, and what is left out: files that
    are not images, images beside splits, and labels of classes that are not trained on.
    """
    images, others, skipped = list_files(os.path.abspath(name))
    if not images or any(path.endswith(".parquet") or os.path.basename(path) in METADATA for path in others):
        if images and any(path.endswith(".parquet") for path in others) and PartialState().is_main_process:
            print(f"found   parquet files in {name}; {len(images)} image files beside them are left out")
        return None
    root = os.path.commonpath({os.path.dirname(path) for path in images})
    splits = by_folder(images, root)
    kinds = {kind_of_split(part) for part in splits if part}
    if split not in splits and "" in kinds and not {"train", "test"} <= kinds:
        splits, kinds = {"": images}, set()
    beside = splits.pop("") if kinds and "" in splits else []
    classes = {split: by_folder(paths, os.path.join(root, split) if split else root) for split, paths in splits.items()}
    train = (
        split if split in classes else next((part for part in classes if part.lower() in TRAIN), next(iter(classes)))
    )
    trained = classes[train]
    names = sorted(trained) if len(trained) > 1 and "" not in trained else None
    extra_classes = {split: sorted(set(found) - set(names or found) - {""}) for split, found in classes.items()}
    if PartialState().is_main_process:
        print_found(name, classes, names, root)
        print_left_out(name, others, skipped, beside, extra_classes)
    return {  # under the names that --split has for them
        part if part == split else part.lower() or "train": image_rows(found, None if extra_classes[part] else names)
        for part, found in classes.items()
    }


def kind_of_split(name):
    """What a folder of this name holds: "train", "test", "unlabeled", or "" for anything else."""
    kinds = {"train": TRAIN, "test": TEST, "unlabeled": UNLABELED}
    return next((kind for kind, names in kinds.items() if name.lower() in names), "")


def print_found(name, classes, names, root):
    """One line of what a folder holds: images and their formats by split, and the folders that are the classes."""
    counts = []
    for split, found in classes.items():
        suffixes = Counter(path.rpartition(".")[2].lower() for paths in found.values() for path in paths)
        formats = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
        counts.append(f"{split} {formats}" if split else formats)
    where = "" if root == os.path.abspath(name) else f" in {root}"
    if names:
        labels = f"{len(names)} classes, a folder each: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
    elif all(set(found) == {""} for found in classes.values()):
        labels = "no labels: all images are in one folder"
    elif any("" in found for found in classes.values()):
        labels = "no labels: some images lie beside the class folders"
    else:
        labels = "no labels: there is one class alone"
    print(f"found   {'; '.join(counts)}{where}; {labels}")


def print_left_out(name, others, skipped, beside, extra_classes):
    """A line for each kind of thing that is left out."""
    if others:
        suffixes = sorted({Path(path).suffix or Path(path).name for path in others})
        print(f"        left out {len(others)} files in {name} that are not images: {', '.join(suffixes[:8])}")
    if skipped:
        shown = ", ".join(map(ascii, skipped[:3])) + (" ..." if len(skipped) > 3 else "")
        print(f"        left out {len(skipped)} that are not regular files, or have no name in UTF-8: {shown}")
    if beside:
        print(f"        left out {len(beside)} images in {name} that lie beside the splits")
    for split, found in extra_classes.items():
        if found:
            print(
                f"        left out the labels of {split}, with classes that are not trained on: {', '.join(found[:5])}"
            )


def list_files(folder, above=(), seen=None, links=0):
    """(paths of images, of other files, what is skipped) in a folder and below, in order, without hidden ones.

    Links are followed, but not back to a folder that they lie in (above); after another link (links: so many were
    followed to get here) only to a folder that was not visited before (seen), or folders that link to each other would
    be walked in every order there is.
    Skipped are pipes, sockets and devices, which block or never end, links to nothing or to themselves, and names that
    are not UTF-8.
    """
    status, seen = os.stat(folder), set() if seen is None else seen
    here = (status.st_dev, status.st_ino)
    images, others, skipped = [], [], []
    if here in above or (links > 1 and here in seen):
        return images, others, skipped
    seen.add(here)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        kind = kind_of(entry)
        if kind == "folder":
            below = list_files(entry.path, (*above, here), seen, links + entry.is_symlink())
            for found, more in zip((images, others, skipped), below, strict=True):
                found += more
        elif kind == "other":
            skipped.append(entry.path)
        else:
            (images if entry.name.lower().endswith(SUFFIXES) else others).append(entry.path)
    return images, others, skipped


def kind_of(entry):
    """Whether an entry of a folder is a "folder", a "file" or something "other" that must not be opened."""
    try:
        entry.name.encode()
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except (OSError, UnicodeEncodeError):  # a link to itself; a name of other bytes
        return "other"


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
