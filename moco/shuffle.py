"""Shuffled BatchNorm: keys are encoded in groups that share no more than chance with the groups of their queries.

A query's group and its key's group would otherwise see the same images, and the encoder could tell the positive
from the group's BatchNorm statistics instead of from the image (arXiv:1911.05722, section 3.3). Groups are of
--bn-batch images here, not processes, so one process is as safe as eight and computes the same.
"""

import numpy as np
import torch
import torch.nn.functional as F


def shuffle_order(seed, step, batch_size):
    """The permutation of the global batch at `step`: (batch_size,) int64 on the CPU, the same on every process."""
    return torch.from_numpy(np.random.default_rng([*b"shuffle", seed, step]).permutation(batch_size))


def exchange_rows(images, shuffle, accelerator):
    """Rows shuffle[rank * n : (rank + 1) * n] of the global batch; this process holds n rows of it.

    One all-to-all moves only the rows that change place; gathering would send every row to every process.
    Returns (n, C, H, W), channels-last.
    """
    world, rank, n = accelerator.num_processes, accelerator.process_index, len(images)
    if world == 1:
        return images[shuffle.to(images.device, non_blocking=True)]
    wanted = shuffle.view(world, n)  # wanted[r]: the rows that process r encodes
    owner = wanted // n
    sent = [wanted[r][owner[r] == rank] - rank * n for r in range(world)]
    pixels = images.permute(0, 2, 3, 1)  # a view without a copy when the images are channels-last
    outgoing = pixels[torch.cat(sent).to(images.device, non_blocking=True)]
    incoming = torch.empty_like(outgoing, memory_format=torch.contiguous_format)
    torch.distributed.all_to_all_single(
        incoming,
        outgoing.contiguous(),
        output_split_sizes=torch.bincount(owner[rank], minlength=world).tolist(),
        input_split_sizes=[len(rows) for rows in sent],
    )
    by_owner = owner[rank].argsort(stable=True)  # rows arrive in the order of their owners
    return incoming[by_owner.argsort().to(images.device, non_blocking=True)].permute(0, 3, 1, 2)


@torch.no_grad()
def encode_keys(key_encoder, images, shuffle, images_per_pass, accelerator):
    """Keys of the global batch, encoded in shuffled order over all processes.

    images: this process's (n, channels, S, S). shuffle: a permutation of the global batch, equal on all processes.
    images_per_pass: images in a forward pass.
    Returns all keys (N, C), N = n x processes, in sample order, L2-normalised, float32 (float64 from a float64
    encoder).
    Raises ValueError if the sizes do not divide.
    Source: arXiv:1911.05722, section 3.3, with BatchNorm groups in the place of GPUs.
    """
    n, total = len(images), len(images) * accelerator.num_processes
    if len(shuffle) != total:
        raise ValueError(f"shuffle has {len(shuffle)} entries for a global batch of {total}")
    if n % images_per_pass:
        raise ValueError(f"{n} images per process are not divisible by images_per_pass {images_per_pass}")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if half:
        images = images.to(half)  # as the first convolution will see them under autocast: half the bytes to exchange
    shuffled = exchange_rows(images, shuffle, accelerator)
    with accelerator.autocast():
        keys = torch.cat([key_encoder(group) for group in shuffled.split(images_per_pass)])
    keys = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=1)
    return accelerator.gather(keys)[shuffle.argsort().to(keys.device, non_blocking=True)]
