"""What is looked at during training, on a fixed sample of images: kNN where there are labels, and what needs none."""

import copy

import torch

from moco.backbone.features import Features
from moco.data.batches import center_crops
from moco.data.labels import has_labels
from moco.data.order import Order
from moco.jsonfile import reading_json, write_json
from moco.knn import default_k, knn_evaluate
from moco.run.launch import largest_of_all
from moco.run.pictures import nearest_rows, save_neighbours
from moco.spread import alignment, rankme, uniformity

MONITOR_BANK, MONITOR_QUERIES = 50_000, 10_000  # images the monitor looks at, at most
ALIGNED = 256  # of them in two views


def monitor(encoder, train_set, test_set, size, mean, std, workers, accelerator, views=None, folder=None, step=0):
    """Numbers of an encoder's backbone, whose copy runs in eval mode, on a fixed sample of held-out images.

    These are of the test set or, without one, of training images held out of the bank; without labels, too, of any. At
    most MONITOR_BANK and MONITOR_QUERIES images are enough to follow training; linear_probe.py evaluates in full.
    views: as in train_moco.py, two at least. The alignment is of the first two, which are the same at each call.
    folder: of the run, where neighbours.png is drawn, with those of `step` 0 beside those of now.
    Returns {"knn" in percent, if there are labels, "rank", "uniformity" and, with views, "alignment"}, this process's
    undecodable images as (name, reason), and how many images were looked at.
    """
    backbone = copy.deepcopy(encoder.backbone).eval()
    held_out, bank_set = monitor_sets(train_set, test_set)
    features = Features(backbone, size, mean, std, workers, accelerator)
    crops = center_crops(held_out, size, labelled=bank_set is not None)
    asked, labels, failed = features.all(held_out, range(len(held_out)), crops)
    numbers = {}
    if bank_set is not None:
        bank, bank_labels, bank_failed = features.bank(bank_set, range(len(bank_set)))
        failed, k = failed + bank_failed, default_k(len(bank_set))
        classes = largest_of_all(int(torch.cat([labels, bank_labels]).max()), accelerator) + 1
        scores = knn_evaluate(asked, labels, bank, bank_labels, classes, [k], 0.07, accelerator)
        numbers["knn"] = scores[k]["top1"]
    if len(asked) > 1 and asked.isfinite().all():
        numbers |= {"rank": rankme(asked), "uniformity": uniformity(asked)}
        if views is not None:
            aligned = asked.new_zeros(())
            if accelerator.is_main_process:  # alone, so that the images are those of any number of processes
                aligned += alignment(*view_features(features, held_out, views))
            numbers["alignment"] = accelerator.reduce(aligned, "sum").item()
        if folder is not None and accelerator.is_main_process:
            draw_neighbours(folder, held_out, None if bank_set is None else labels, asked, step)
    return numbers, failed, len(held_out) + len(bank_set or ())


def monitor_sets(train_set, test_set):
    """(held-out images, bank of kNN or None)."""
    if not has_labels(train_set):
        images = train_set if test_set is None else test_set
        return images.select_rows(images.sample(MONITOR_QUERIES)), None
    if test_set is not None:
        held_out = test_set.select_rows(test_set.sample(MONITOR_QUERIES))
        return held_out, train_set.select_rows(train_set.sample(MONITOR_BANK))
    count = min(MONITOR_QUERIES, max(1, len(train_set) // 5))
    sample = train_set.sample(MONITOR_BANK + count, count)
    return train_set.select_rows(sample[:count]), train_set.select_rows(sample[count:])


@torch.no_grad()
def view_features(features, images, views):
    """Features of the first two views of ALIGNED images, or of fewer, as a step would make them under seed 0."""
    order = Order(min(ALIGNED, len(images)), 0)
    crops, *_ = next(views.batches(images.select_rows(range(order.batch_size)), order, 0))
    pair = views.on_device(crops, order, 0, features.device)[:2]
    with features.accelerator.autocast():
        return [torch.cat([features.backbone(part).float() for part in view.split(features.batch)]) for view in pair]


def draw_neighbours(folder, images, labels, features, step):
    """Write folder/neighbours.png, and at step 0 neighbours.json, which later pictures show beside their own."""
    asked, nearest = nearest_rows(features)
    path, found = folder / "neighbours.json", {}
    if step == 0:
        write_json(path, {"nearest": nearest})
    elif path.exists():
        with reading_json(path, "remove it") as start:
            found["nearest at the start"] = start["nearest"]
    found = {("nearest now" if found else "nearest neighbours"): nearest} | found
    save_neighbours(folder / "neighbours.png", images, labels, asked, found)
