"""How features lie in their space: three numbers that need no labels."""

import torch
import torch.nn.functional as F

TILE = 2048  # rows of a similarity matrix at a time, so that none is held whole


@torch.no_grad()
def rankme(features):
    """The effective rank of features, (N, D): from 1, all on a line, to min(N, D), all directions used alike.

    exp(-sum p log p), where p = s / sum(s) + 1e-7 and s are the singular values. In float64, whatever the features are.
    Source: RankMe, arXiv:2210.02885, equation 2.
    """
    singular = torch.linalg.svdvals(features.double())
    p = singular / singular.sum().clamp(min=torch.finfo(torch.double).tiny) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


@torch.no_grad()
def alignment(first, second):
    """The mean squared distance of two views' features, (N, D) each, after normalisation: from 0, equal, to 4.

    Source: arXiv:2005.10242, section 4.2, with alpha = 2.
    """
    return (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(dim=1).mean()


@torch.no_grad()
def uniformity(features):
    """The logarithm of the mean of exp(-2 |x - y|^2) over all pairs of N >= 2 normalised rows, (N, D).

    It is 0 where all rows are equal, and falls to about -4 as they spread over the sphere.
    Source: arXiv:2005.10242, section 4.2, with t = 2.
    """
    x, total = F.normalize(features.double(), dim=1), 0
    for rows in x.split(TILE):
        total += (4 * (rows @ x.T) - 4).exp().sum()  # |x - y|^2 = 2 - 2 x.y
    own = (4 * x.square().sum(dim=1) - 4).exp().sum()  # of each row with itself, 1
    return ((total - own) / (len(x) * (len(x) - 1))).log().item()


@torch.no_grad()
def close_pairs(features, threshold):
    """(row, later row, cosine) of all pairs of features, (N, D), with a cosine above `threshold`, a few rows at a time.

    Yields triples of tensors, in the order of the rows; the N x N cosines are made tile by tile and never held.
    """
    x = F.normalize(features, dim=1)
    for first in range(0, len(x), TILE):
        rows, later = x[first : first + TILE], x[first:]
        for start in range(0, len(later), TILE):
            cosines = rows @ later[start : start + TILE].T
            i, j = (cosines > threshold).nonzero(as_tuple=True)
            i, j, found = i + first, j + first + start, cosines[i, j]
            yield i[j > i], j[j > i], found[j > i]
