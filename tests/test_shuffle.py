"""Shuffled BatchNorm on one process; two processes are in test_golden.py and test_train.py.

pytest tests/test_shuffle.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import run_script
from torch import nn

from moco.contrast import KeyQueue, contrastive_logits
from moco.encoder import build_encoder
from moco.shuffle import encode_keys, shuffle_order


def test_order_is_a_permutation_that_depends_on_seed_and_step_alone():
    order = shuffle_order(seed=1, step=5, batch_size=64)
    assert order.sort().values.equal(torch.arange(64))
    assert order.equal(shuffle_order(1, 5, 64))
    assert not order.equal(shuffle_order(1, 6, 64)) and not order.equal(shuffle_order(2, 5, 64))


@pytest.mark.parametrize("bn_batch", [2, 4, 8])
def test_keys_equal_a_loop_over_the_groups(bn_batch):
    torch.manual_seed(0)
    encoder, order = build_encoder("resnet10", dim=8).double(), shuffle_order(0, 0, 8)
    images, slow_encoder = torch.randn(8, 3, 32, 32).double(), copy.deepcopy(encoder)
    keys = encode_keys(encoder, images, order, bn_batch, Accelerator(cpu=True))
    for group in order.split(bn_batch):
        with torch.no_grad():
            encoded = slow_encoder(torch.stack([images[i] for i in group]))
        for i, key in zip(group, encoded):
            torch.testing.assert_close(keys[i], key / key.norm(), rtol=0, atol=1e-9)
    for name, buffer in encoder.named_buffers():
        torch.testing.assert_close(buffer, slow_encoder.get_buffer(name), rtol=0, atol=1e-9)
    assert not keys.requires_grad


def test_images_exchanged_in_half_precision_give_the_keys_of_autocast():
    torch.manual_seed(0)
    encoder, images = build_encoder("resnet10", dim=8), torch.randn(8, 3, 32, 32)
    slow_encoder, order = copy.deepcopy(encoder), shuffle_order(0, 0, 8)
    AcceleratorState._reset_state()  # the precision is the process's, not the object's
    keys = encode_keys(encoder, images, order, 4, Accelerator(cpu=True, mixed_precision="bf16"))
    AcceleratorState._reset_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([slow_encoder(images[group]) for group in order.split(4)])[order.argsort()]
    assert keys.equal(F.normalize(expected.float(), dim=1))


@pytest.mark.slow
def test_bytes_that_processes_exchange_are_those_computed():
    """Counted in the collectives of fifty steps on two processes: the images that change place, one gather of keys."""
    done = run_script("benchmarks/traffic.py", processes=2)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if " counted " in line]
    bytes_of = {kind: (float(counted), float(computed)) for kind, _, counted, _, computed in lines}
    assert bytes_of.keys() == {"images", "keys", "statistics"}
    assert bytes_of["images"][0] == pytest.approx(bytes_of["images"][1], rel=0.05)  # at random, half stay
    assert all(bytes_of[kind][0] == bytes_of[kind][1] for kind in ("keys", "statistics"))
    ratio = next(float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("   8 processes"))
    assert ratio < 0.1  # of the reference's bytes


def test_sizes_that_do_not_divide_are_refused():
    encoder, images, accelerator = nn.Flatten(), torch.zeros(6, 3, 2, 2), Accelerator(cpu=True)
    with pytest.raises(ValueError, match="not divisible by images_per_pass 4"):
        encode_keys(encoder, images, torch.arange(6), 4, accelerator)
    with pytest.raises(ValueError, match="8 entries for a global batch of 6"):
        encode_keys(encoder, images, torch.arange(8), 2, accelerator)


class ReadsStatistics(nn.Module):
    """Knows nothing of an image but the statistics of its BatchNorm group: what BatchNorm makes of a black pixel."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(16, affine=False)
        self.conv = nn.Conv2d(3, 16, kernel_size=1)

    def forward(self, images):
        black = torch.zeros_like(images[..., :1])
        return self.norm(self.conv(torch.cat([images, black], dim=3)).relu())[:, :, 0, -1]


def cheating_accuracy(bn_batch, shuffle, steps=12, batch=64):
    """Contrast accuracy of an encoder that cannot see its image, against keys of earlier batches."""
    torch.manual_seed(0)
    encoder, queue, accelerator = ReadsStatistics(), KeyQueue(256, 16), Accelerator(cpu=True)
    correct = 0
    for step in range(steps):
        images = torch.randn(batch, 3, 1, 1) * torch.ones(
            1, 1, 2, 2
        )  # both views show the same, with noise of their own
        query_images, key_images = (images + 0.1 * torch.randn(batch, 3, 2, 2) for _ in range(2))
        order = shuffle_order(0, step, batch) if shuffle else torch.arange(batch)
        keys = encode_keys(encoder, key_images, order, bn_batch, accelerator)
        with torch.no_grad():
            queries = F.normalize(torch.cat([encoder(group) for group in query_images.split(bn_batch)]), dim=1)
        logits = contrastive_logits(queries, keys, queue.keys, 0.2)
        if step >= 4:  # the queue holds keys only
            correct += (logits.argmax(dim=1) == 0).sum().item()
        queue.enqueue(keys)
    return correct / (batch * (steps - 4))


def test_without_shuffling_batch_statistics_give_the_match_away():
    assert cheating_accuracy(bn_batch=8, shuffle=False) > 0.9


def test_one_group_gives_the_match_away_even_when_shuffled():
    """Why one GPU with one big BatchNorm batch leaks: query and key groups hold the same images in any order."""
    assert cheating_accuracy(bn_batch=64, shuffle=True) > 0.9


def test_shuffled_groups_hide_the_match():
    assert cheating_accuracy(bn_batch=8, shuffle=True) < 0.1
