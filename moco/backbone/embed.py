"""Features of a folder or dataset as a parquet file, and a picture of nearest neighbours under them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch.nn.functional as F
from accelerate import Accelerator

from moco.augment import MEAN, STD
from moco.backbone.features import Features
from moco.data.decode import name_of, name_undecodable, read_image
from moco.data.load import load_splits
from moco.errors import UserError
from moco.run.pictures import save_neighbours


def embed(backbone, known, data, target, workers=2):
    """Write the features of `data` under a backbone to the parquet file `target`, and a picture beside it.

    backbone, known: what `load_backbone` gave. data: what `load_splits` takes; of several splits the one to train on.
    Columns: "file" (a name or a row number), "label" if there are labels, whatever they are, and "feature", float32,
    not normalised. The crops are those of evaluations, at the size that the backbone was trained at. Raises UserError
    as these do.
    """
    target = Path(target)
    if target.suffix != ".parquet" or target.exists():
        raise UserError(f"OUT {target} must end with .parquet, and must not exist yet")
    accelerator = Accelerator()
    backbone = backbone.eval().to(accelerator.device)
    images, _ = load_splits(data)
    rows, has_label, size = range(len(images)), "label" in images.column_names, known.get("image_size", 224)
    mean, std = known.get("mean", MEAN), known.get("std", STD)
    features, _, failed = Features(backbone, size, mean, std, workers, accelerator).all(images.without_labels(), rows)
    name_undecodable(failed, set(), accelerator, "the feature of its neighbour stands in its place")
    columns = {name: [] for name in ("file", *(["label"] if has_label else []))}
    for row in rows:  # once more, because an undecodable image keeps its own name and label
        values = images[row]
        columns["file"].append(name_of(values, row))
        if has_label:
            columns["label"].append(values["label"])
    columns["feature"] = pa.FixedSizeListArray.from_arrays(features.flatten().cpu().numpy(), features.shape[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), target)
    save_neighbours_of(images, F.normalize(features, dim=1), columns.get("label"), target.with_suffix(".png"))


def save_neighbours_of(images, features, labels, path, queries=8, count=6):
    """Draw some images at equal distances with their nearest neighbours; those of another label have a red frame."""
    asked = [i * len(images) // queries for i in range(min(queries, len(images)))]
    nearest = (features[asked] @ features.T).topk(min(count + 1, len(images)), dim=1).indices[:, 1:].tolist()
    found = [
        [(read_image(images, i)[0], labels is None or bool(labels[i] == labels[query])) for i in row]
        for query, row in zip(asked, nearest)
    ]
    save_neighbours(path, [read_image(images, query)[0] for query in asked], found)
