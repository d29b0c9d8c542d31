"""The contrastive losses' logits and the queue of keys."""

import torch
import torch.nn.functional as F
from torch import nn


def contrastive_logits(queries, keys, queue, temperature):
    """InfoNCE logits; the positive is column 0.

    queries, keys: (N, C), L2-normalised. queue: (K, C), L2-normalised.
    temperature: > 0, dimensionless (v1: 0.07, v2: 0.2).
    Returns (N, 1 + K) float32, or float64 if the inputs are: half precision is too coarse for the softmax, so
    autocast is off here.
    Raises ValueError if temperature <= 0.
    Source: arXiv:1911.05722, Algorithm 1.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    q = queries.to(dtype) / temperature  # of the queries, because the logits are hundreds of times as many numbers
    with torch.autocast(q.device.type, enabled=False):
        positive = (q * keys.to(dtype)).sum(dim=1, keepdim=True)  # (N, 1)
        negative = q @ queue.to(dtype).T  # (N, K)
    return torch.cat([positive, negative], dim=1)


def nt_xent_logits(first, second, temperature):
    """NT-Xent logits of both views of N images: the positive of a view is the other view, all others are negatives.

    first, second: (N, C), L2-normalised; row i of each is a view of image i.
    temperature: > 0, dimensionless. Returns logits (2N, 2N - 1), without similarities of a view to itself, in float32
    (float64 where the inputs are) under autocast, too, and labels (2N,), the columns of the positives. Their
    cross-entropy is the loss.
    Raises ValueError if temperature <= 0.
    Source: arXiv:2002.05709, equation 1 and Algorithm 1; SimCLR's TensorFlow code has exactly twice this loss.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    z = torch.cat([first, second])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    rows, n = len(z), len(first)
    with torch.autocast(z.device.type, enabled=False):
        similarity = z @ z.T / temperature
    # Drop the diagonal: after the first entry, each run of 2N + 1 entries ends with one on the diagonal.
    logits = similarity.flatten()[1:].view(rows - 1, rows + 1)[:, :-1].reshape(rows, rows - 1)
    image = torch.arange(n, device=z.device)
    return logits, torch.cat([image + n - 1, image])


def gather_with_gradient(rows, accelerator):
    """The rows (n, C) of all processes as (global N, C); this process's own rows keep their gradient.

    Every process computes the loss over all rows, and gets its own part of the gradient; the parts add up to the whole.
    DDP averages, so scale the loss by the number of processes. Nothing needs to be sent back. Gathering without any
    gradient gives wrong ones, by 13 to 21 % on two processes.
    """
    n, rank = len(rows), accelerator.process_index
    everyone = accelerator.gather(rows.detach())
    return torch.cat([everyone[: rank * n], rows, everyone[(rank + 1) * n :]])


class KeyQueue(nn.Module):
    """The newest `size` keys, first in first out; starts as random unit vectors.

    keys: buffer (size, dim). cursor: buffer, the row that is overwritten next. Both stay on the device, so that
    enqueueing never syncs with it. Every process holds an equal copy, because every process enqueues the same
    gathered keys. Raises ValueError if size < 1.
    Source: arXiv:1911.05722, section 3.2 (where the batch must divide the size; here it need not).
    """

    def __init__(self, size, dim, generator=None):
        super().__init__()
        if size < 1:
            raise ValueError(f"the queue needs at least one key, got size {size}")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys):
        """Overwrite the oldest rows with keys (N, dim), wrapping around; of more than `size` keys the last stay."""
        size = len(self.keys)
        newest = keys[-size:]
        first = self.cursor + len(keys) - len(newest)
        rows = (first + torch.arange(len(newest), device=self.cursor.device)) % size
        self.keys.index_copy_(0, rows, newest.to(self.keys.dtype))
        self.cursor.copy_((self.cursor + len(keys)) % size)
