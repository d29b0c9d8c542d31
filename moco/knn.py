"""The weighted kNN classifier, and features to run it on: how well a backbone separates classes, without training."""

import copy
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from moco.augment import normalize, to_float
from moco.backbone import feature_width
from moco.batches import CenterCrops, loader, ordered_rows
from moco.errors import UserError
from moco.jsonfile import is_whole, read_json, write_json

FEATURE_BATCH = 256  # images in a forward pass without gradients
SIMILARITIES = 2**26  # entries of the similarity matrix at a time: 256 MB in float32
MONITOR_BANK, MONITOR_QUERIES = 50_000, 10_000  # images the monitor looks at, at most


def default_k(images):
    """How many neighbours vote: the papers' 200, and of a bank below 5,000 images one in 25, at least 1."""
    return min(200, max(1, images // 25))


@torch.no_grad()
def knn_predict(features, bank, bank_labels, classes, k=200, temperature=0.07):
    """Score of each class: the k nearest of the bank by cosine vote with weight exp(cosine / temperature).

    features: (N, D). bank: (M, D), M >= 1. bank_labels: (M,) int64 below `classes`. k is cut to M.
    Returns (N, classes) scores; a class without a vote has 0. `knn_evaluate` does the same for processes that share the
    bank.
    Source: arXiv:1805.01978, section 3.4.
    """
    features, bank = F.normalize(features, dim=1), F.normalize(bank, dim=1)
    k = min(k, len(bank))
    scores = []
    for chunk in features.split(max(1, SIMILARITIES // len(bank))):
        similarity, neighbour = (chunk @ bank.T).topk(k, dim=1)
        scores.append(class_votes(similarity, bank_labels[neighbour], classes, temperature))
    return torch.cat(scores)


def class_votes(similarity, labels, classes, temperature):
    """Votes of neighbours, similarity and labels (N, k), for each class: (N, classes)."""
    votes = torch.zeros(len(labels), classes, dtype=similarity.dtype, device=similarity.device)
    return votes.scatter_add_(1, labels, (similarity / temperature).exp())


@torch.no_grad()
def feature_batches(backbone, dataset, rows, size, workers, accelerator):
    """Pooled features of fixed crops of `rows`, this process's own sequence of int, a batch at a time.

    backbone: in eval mode, without a head. Yields the position in `rows` of a batch's first row (batches come in the
    order in which workers read them), features (n, width) float32, labels (n,) and the undecodable images as
    (name, reason).
    """
    order = ordered_rows(dataset, rows, FEATURE_BATCH, workers)
    batches = loader(CenterCrops(dataset, size), [(batch, groups) for _, batch, groups in order], workers)
    progress = tqdm(batches, "features", leave=False, disable=not accelerator.is_main_process)
    for (first, batch, _), (crops, labels, failed) in zip(order, progress, strict=True):
        if len(batch):
            with accelerator.autocast():
                pooled = backbone(normalize(to_float(crops.to(accelerator.device, non_blocking=True))))
            yield first, pooled.float(), labels.to(accelerator.device), failed


def extract_features(backbone, dataset, rows, size, workers, accelerator):
    """Pooled features of fixed crops of `rows`, each process doing its share of the work.

    backbone: in eval mode, without a head. rows: sequence of int.
    Returns on every process features (len(rows), width) float32, labels (len(rows),) and the undecodable images of its
    own share as (name, reason).
    """
    first, mine = dataset.split(rows, accelerator.num_processes)[accelerator.process_index]
    features = torch.zeros(len(rows), feature_width(backbone.state_dict()), device=accelerator.device)
    labels = torch.zeros(len(rows), dtype=torch.long, device=accelerator.device)
    undecodable = fill_features((features[first:], labels[first:]), backbone, dataset, mine, size, workers, accelerator)
    # Shares differ in length, and the rows of other processes are zero here, so a sum joins them.
    return accelerator.reduce(features, "sum"), accelerator.reduce(labels, "sum"), undecodable


def fill_features(out, backbone, dataset, rows, size, workers, accelerator):
    """Write features and labels of `rows` over the first rows of two tensors or arrays; returns the undecodable."""
    undecodable = []
    for first, features, labels, failed in feature_batches(backbone, dataset, rows, size, workers, accelerator):
        for whole, values in zip(out, (features, labels)):
            whole[first : first + len(labels)] = values if torch.is_tensor(whole) else values.cpu().numpy()
        undecodable += failed
    return undecodable


def feature_bank(backbone, dataset, rows, size, workers, accelerator):
    """This process's share of the features of `rows`, (m, width) float32 and L2-normalised, and its labels (m,).

    Written batch by batch into one tensor, because collecting them first would hold them twice. Also returns the
    undecodable images as (name, reason).
    """
    _, mine = dataset.split(rows, accelerator.num_processes)[accelerator.process_index]
    bank = torch.empty(len(mine), feature_width(backbone.state_dict()), device=accelerator.device)
    labels = torch.empty(len(mine), dtype=torch.long, device=accelerator.device)
    undecodable = fill_features((bank, labels), backbone, dataset, mine, size, workers, accelerator)
    return F.normalize(bank, dim=1, out=bank), labels, undecodable


def cache_features(folder, backbone, digest, dataset, size, workers, accelerator):
    """Write features of one fixed crop of each image, float16, and labels to folder/*.npy, for `CachedFeatures`.

    Each process writes its part of the same files. digest: of the backbone; a finished cache is recognised by it.
    Returns this process's undecodable images as (name, reason), and the number of all; for a finished cache, only that.
    Raises UserError if the disk is too full.
    """
    made_of = {"backbone_sha256": digest, "images": len(dataset), "image_size": size}
    paths, done = [folder / "features.npy", folder / "labels.npy"], folder / "cache.json"
    if done.exists():
        known = read_json(done, {"undecodable": is_whole}, "remove it, and the features are made again")
        if made_of.items() <= known.items():
            return [], known["undecodable"]
    accelerator.wait_for_everyone()
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        for path in (done, *paths):
            path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    width = feature_width(backbone.state_dict())
    needed, free = len(dataset) * (2 * width + 8), shutil.disk_usage(folder).free
    if needed > free:  # otherwise a bus error would end the run: files are mapped now and filled later
        raise UserError(f"{folder} needs {needed / 1e9:.1f} GB for features, {free / 1e9:.1f} GB are free; make room")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        np.lib.format.open_memmap(paths[0], "w+", np.float16, (len(dataset), width))
        np.lib.format.open_memmap(paths[1], "w+", np.int64, (len(dataset),))
    accelerator.wait_for_everyone()
    files = [np.load(path, mmap_mode="r+") for path in paths]
    first, mine = dataset.split(range(len(dataset)), accelerator.num_processes)[accelerator.process_index]
    own = [file[first:] for file in files]
    undecodable = fill_features(own, backbone, dataset, mine, size, workers, accelerator)
    for file in files:
        file.flush()
    count = len(gather_object(undecodable))  # by then every process has written its part
    if accelerator.is_main_process:
        write_json(done, made_of | {"undecodable": count})
    return undecodable, count


@torch.no_grad()
def knn_evaluate(features, labels, bank, bank_labels, classes, ks, temperature, accelerator):
    """Top-1 and top-5 of kNN in percent, for each k of `ks`: {k: {"top1": ..., "top5": ...}}.

    features (N, D) and labels (N,): the same on every process. bank (m, D), L2-normalised, and bank_labels (m,): this
    process's own part. Of 1.28 million ImageNet features of ResNet-50 that is 10.5 GB over the number of processes,
    and each keeps a chunk of its similarities at a time. A class without a vote is in no top 5.
    """
    features, k = F.normalize(features, dim=1), max(ks)
    sizes = accelerator.gather(torch.tensor([len(bank)], device=bank.device))
    k = min(k, int(sizes.sum()))
    here = min(k, len(bank))
    hits = torch.zeros(len(ks), 2, dtype=torch.long, device=bank.device)
    chunk_size = max(1, SIMILARITIES // max(1, int(sizes.max())))
    for chunk, targets in zip(features.split(chunk_size), labels.split(chunk_size)):
        similarity, neighbour = (chunk @ bank.T).topk(here, dim=1)
        similarity = F.pad(similarity, (0, k - here), value=-torch.inf)  # no neighbour: votes with exp(-inf) = 0
        candidates = F.pad(bank_labels[neighbour], (0, k - here))
        similarity, candidates = (accelerator.gather(x[None]) for x in (similarity, candidates))  # (processes, n, k)
        similarity, candidates = (x.transpose(0, 1).flatten(1) for x in (similarity, candidates))
        similarity, nearest = similarity.topk(k, dim=1)
        candidates = candidates.gather(1, nearest)
        for row, each in zip(hits, ks):
            votes = class_votes(similarity[:, :each], candidates[:, :each], classes, temperature)
            score, ranked = votes.topk(min(5, classes), dim=1)
            hit = (ranked == targets[:, None]) & (score > 0)
            row += torch.stack([hit[:, 0].sum(), hit.sum()])
    percent = (100 * hits / len(labels)).tolist()
    return {each: {"top1": top1, "top5": top5} for each, (top1, top5) in zip(ks, percent)}


def knn_monitor(encoder, train_set, test_set, size, workers, accelerator):
    """kNN accuracy in percent of test images or, without a test set, of training images held out of the bank.

    encoder: a ResNet; a copy of it runs in eval mode without its head `fc`. It looks at a fixed sample of at most
    MONITOR_BANK and MONITOR_QUERIES images, which is enough to follow training; linear_probe.py evaluates in full.
    Returns the accuracy, this process's undecodable images as (name, reason), and how many images were looked at.
    """
    backbone = copy.deepcopy(encoder).eval()
    backbone.fc = nn.Identity()
    if test_set is None:
        held_out = min(MONITOR_QUERIES, max(1, len(train_set) // 5))
        sample = train_set.sample(MONITOR_BANK + held_out)
        test_set, queries, rows = train_set, sample[:held_out], sample[held_out:]
    else:
        queries, rows = test_set.sample(MONITOR_QUERIES), train_set.sample(MONITOR_BANK)
    bank, bank_labels, failed = feature_bank(backbone, train_set, rows, size, workers, accelerator)
    features, labels, failed_too = extract_features(backbone, test_set, queries, size, workers, accelerator)
    classes = int(accelerator.gather(torch.cat([labels, bank_labels]).max()[None]).max()) + 1
    k = default_k(len(rows))
    scores = knn_evaluate(features, labels, bank, bank_labels, classes, [k], 0.07, accelerator)
    return scores[k]["top1"], failed + failed_too, len(rows) + len(queries)
