"""The weighted kNN classifier, and features to run it on: how well a backbone separates classes, without training."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from moco.augment import normalize, to_float
from moco.data import CenterCrops, loader, sample_rows

FEATURE_BATCH = 256  # images in a forward pass without gradients
SIMILARITIES = 2**26  # entries of the similarity matrix at a time: 256 MB in float32
MONITOR_BANK, MONITOR_QUERIES = 50_000, 10_000  # images the monitor looks at, at most: a minute on ImageNet


@torch.no_grad()
def knn_predict(features, bank, bank_labels, classes, k=200, temperature=0.07):
    """Score of each class: the k nearest of the bank by cosine vote with weight exp(cosine / temperature).

    features: (N, D). bank: (M, D), M >= 1. bank_labels: (M,) int64 below `classes`. k is cut to M.
    Returns (N, classes) scores; a class without a vote has 0.
    Source: arXiv:1805.01978, section 3.4.
    """
    features, bank = F.normalize(features, dim=1), F.normalize(bank, dim=1)
    k = min(k, len(bank))
    scores = []
    for chunk in features.split(max(1, SIMILARITIES // len(bank))):
        similarity, neighbour = (chunk @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(chunk), classes, dtype=chunk.dtype, device=chunk.device)
        scores.append(votes.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp()))
    return torch.cat(scores)


@torch.no_grad()
def extract_features(encoder, dataset, rows, size, workers, accelerator):
    """Pooled backbone features of fixed crops of `rows`, each process doing its share of the work.

    encoder: a ResNet, whose head `fc` is left out; run in eval mode on a copy. rows: list of int.
    Returns on every process features (len(rows), width) float32, labels (len(rows),) and the undecodable images of its
    own share as (name, reason).
    """
    backbone = copy.deepcopy(encoder).eval()
    backbone.fc = nn.Identity()
    share = -(-len(rows) // accelerator.num_processes)
    padded = rows + rows[-1:] * (share * accelerator.num_processes - len(rows))  # cut off again below
    mine = padded[accelerator.process_index * share :][:share]
    batches = loader(
        CenterCrops(dataset, size), [mine[i : i + FEATURE_BATCH] for i in range(0, share, FEATURE_BATCH)], workers
    )
    features, labels, undecodable = [], [], []
    for crops, batch_labels, failed in tqdm(batches, "features", leave=False, disable=not accelerator.is_main_process):
        with accelerator.autocast():
            pooled = backbone(normalize(to_float(crops.to(accelerator.device, non_blocking=True))))
        features.append(pooled.float())
        labels.append(batch_labels.to(accelerator.device))
        undecodable += failed
    features, labels = accelerator.gather((torch.cat(features), torch.cat(labels)))
    return features[: len(rows)], labels[: len(rows)], undecodable


def knn_accuracy(features, labels, bank, bank_labels, accelerator):
    """Top-1 in percent of kNN with its default settings, each process classifying its share of `features`."""
    classes = int(max(labels.max(), bank_labels.max())) + 1
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    predicted = knn_predict(features[mine], bank, bank_labels, classes).argmax(dim=1)
    correct = accelerator.reduce((predicted == labels[mine]).sum(), "sum")
    return 100 * correct.item() / len(labels)


def knn_monitor(encoder, train_set, test_set, size, workers, accelerator):
    """kNN accuracy in percent of test images, or of training images held out of the bank where there is no test set.

    A fixed sample of at most MONITOR_BANK and MONITOR_QUERIES images, so that it follows training, not more: the full
    evaluation is linear_probe.py's. Returns the accuracy and this process's undecodable images as (name, reason).
    """
    if test_set is None:
        held_out = min(MONITOR_QUERIES, len(train_set) // 5)
        sample = sample_rows(train_set, MONITOR_BANK + held_out)
        test_set, queries, rows = train_set, sample[:held_out], sample[held_out:]
    else:
        queries, rows = sample_rows(test_set, MONITOR_QUERIES), sample_rows(train_set, MONITOR_BANK)
    bank, bank_labels, failed = extract_features(encoder, train_set, rows, size, workers, accelerator)
    features, labels, failed_too = extract_features(encoder, test_set, queries, size, workers, accelerator)
    return knn_accuracy(features, labels, bank, bank_labels, accelerator), failed + failed_too
