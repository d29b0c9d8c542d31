"""The weighted kNN classifier: how well features separate classes, without training."""

import torch
import torch.nn.functional as F

SIMILARITIES = 2**26  # entries of the similarity matrix at a time: 256 MB in float32


def default_k(images):
    """How many neighbours vote: the papers' 200, and of a bank below 5,000 images one in 25, at least 1."""
    return min(200, max(1, images // 25))


@torch.no_grad()
def knn_predict(features, bank, bank_labels, classes, k=200, temperature=0.07):
    """Score of each class: the k nearest of the bank by cosine vote with weight exp(cosine / temperature).

    features: (N, D). bank: (M, D), M >= 1. bank_labels: (M,) int64 below `classes`. k is cut to M.
    Returns (N, classes) scores; a class without a vote has 0. `knn_evaluate` does the same for processes that share the
    bank, and for temperatures at which exp(1 / temperature) overflows.
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
def knn_evaluate(features, labels, bank, bank_labels, classes, ks, temperature, accelerator):
    """Top-1 and top-5 of kNN in percent, for each k of `ks`: {k: {"top1": ..., "top5": ...}}.

    features (N, D) and labels (N,): the same on every process. bank (m, D), L2-normalised, and bank_labels (m,): this
    process's own part. ImageNet's (1.28 million features of ResNet-50) takes 10.5 GB, divided among the processes, and
    each keeps a chunk of its similarities at a time. A class without a vote is in no top 5.
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
            # Relative to the nearest, which changes no rank; otherwise exp(1 / temperature) overflows below 0.012.
            votes = class_votes(similarity[:, :each] - similarity[:, :1], candidates[:, :each], classes, temperature)
            score, ranked = votes.topk(min(5, classes), dim=1)
            hit = (ranked == targets[:, None]) & (score > 0)
            row += torch.stack([hit[:, 0].sum(), hit.sum()])
    percent = (100 * hits / len(labels)).tolist()
    return {each: {"top1": top1, "top5": top5} for each, (top1, top5) in zip(ks, percent)}
