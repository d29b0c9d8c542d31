"""Features of a folder or dataset as a parquet file, with a picture of nearest neighbours and a list of duplicates."""

import csv
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from moco.augment import MEAN, STD
from moco.backbone.features import Features
from moco.data.batches import Crops, center_crop_of
from moco.data.decode import name_of, name_undecodable
from moco.data.load import load_splits
from moco.errors import UserError
from moco.run.flags import check_writable
from moco.run.pictures import nearest_rows, save_neighbours
from moco.spread import close_pairs


class NamedCrops(Crops):
    """The crops of evaluations. In place of undecodable images alone there is (these, [(row, name, label), ...]).

    An undecodable image keeps its own name and label. A label may be anything.
    """

    def __getitem__(self, item):
        batch, labels, failed = super().__getitem__(item)
        rows = [(row, self.dataset[row]) for _, row in item[0]]  # at hand: a file is not opened, a row group is kept
        return batch, labels, [(failed, [(row, name_of(values, row), values.get("label")) for row, values in rows])]


def embed(backbone, known, data, target, workers=2, duplicates=None):
    """Write the features of `data` under a backbone to the parquet file `target`, and a picture beside it.

    backbone, known: what `load_backbone` gave. data: what `load_splits` takes; of several splits the one to train on.
    Columns: "file" (a name or a row number), "label" if there are labels, whatever they are, and "feature", float32,
    not normalised. The crops are those of evaluations, at the size that the backbone was trained at.
    duplicates: a cosine. The pairs of images above it are written to a .csv file beside `target`, as they are found.
    Returns how many these are, 0 without. Raises UserError as what it calls does.
    """
    target = Path(target)
    files = [target.with_suffix(suffix) for suffix in (".parquet", ".png", *([] if duplicates is None else [".csv"]))]
    if target.suffix != ".parquet":
        raise UserError(f"OUT {target} must end with .parquet")
    if there := [str(file) for file in files if file.exists()]:
        raise UserError(f"OUT {target}: {', '.join(there)} must not exist yet; name another")
    check_writable(target.parent, f"OUT {target}", "name another")
    accelerator = Accelerator()
    backbone = backbone.eval().to(accelerator.device)
    images, _ = load_splits(data)
    size, mean, std = known.get("image_size", 224), known.get("mean", MEAN), known.get("std", STD)
    made = Features(backbone, size, mean, std, workers, accelerator)
    features = torch.empty(len(images), made.width, device=accelerator.device)
    crops = NamedCrops(images, partial(center_crop_of, size=size), labelled=False)
    batches = made.fill((features,), images, range(len(images)), crops)
    failed = sum((failed for failed, _ in batches), [])
    name_undecodable(failed, set(), accelerator, "the feature of its neighbour stands in its place")
    _, names, labels = zip(*sorted((each for _, rows in batches for each in rows), key=lambda each: each[0]))
    columns = {"file": names} | ({"label": labels} if "label" in images.column_names else {})
    columns["feature"] = pa.FixedSizeListArray.from_arrays(features.flatten().cpu().numpy(), features.shape[1])
    pq.write_table(pa.table(columns), target)
    asked, nearest = nearest_rows(features)
    found = {"nearest neighbours": nearest}
    save_neighbours(target.with_suffix(".png"), images, columns.get("label"), asked, found)
    if duplicates is None:
        return 0
    damaged = {row for failed, rows in batches if failed for row, name, _ in rows if name in dict(failed)}
    return write_duplicates(target.with_suffix(".csv"), names, features, duplicates, damaged)


def write_duplicates(path, names, features, threshold, left_out):
    """Write a line of CSV for each pair of images above a cosine of `threshold`; returns how many these are.

    left_out: rows of images whose features are not their own.
    """
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file", "duplicate", "cosine"])
        count = 0
        for pairs in close_pairs(features, threshold):
            for i, j, cosine in zip(*(each.tolist() for each in pairs)):
                if left_out.isdisjoint((i, j)):
                    lines.writerow((names[i], names[j], f"{cosine:.4f}"))
                    count += 1
    return count
