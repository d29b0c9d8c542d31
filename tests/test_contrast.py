"""Logits and queue beside slow loops written from the paper. pytest tests/test_contrast.py"""

import pytest
import torch
import torch.nn.functional as F

from moco.contrast import KeyQueue, contrastive_logits


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_logits_equal_the_loop_of_algorithm_1():
    queries, keys, queue = unit(5, 8), unit(5, 8, seed=1), unit(7, 8, seed=2)
    logits = contrastive_logits(queries, keys, queue, 0.2)
    assert logits.shape == (5, 8) and logits.dtype == torch.float32
    for i in range(5):
        row = [sum(queries[i][c] * keys[i][c] for c in range(8))]
        row += [sum(queries[i][c] * queue[j][c] for c in range(8)) for j in range(7)]
        torch.testing.assert_close(logits[i], torch.stack(row) / 0.2, rtol=1e-5, atol=1e-5)


def test_loss_is_minus_the_log_of_the_positives_share():
    queries, keys, queue = unit(3, 4), unit(3, 4, seed=1), unit(6, 4, seed=2)
    loss = F.cross_entropy(contrastive_logits(queries, keys, queue, 0.07), torch.zeros(3, dtype=torch.long))
    shares = []
    for q, k in zip(queries, keys):
        positive = torch.exp(q @ k / 0.07)
        shares.append(positive / (positive + sum(torch.exp(q @ negative / 0.07) for negative in queue)))
    torch.testing.assert_close(loss, -torch.stack(shares).log().mean())


def test_half_precision_inputs_give_float32_logits_and_double_ones_double():
    queries, keys, queue = unit(2, 4), unit(2, 4, seed=1), unit(3, 4, seed=2)
    assert contrastive_logits(queries.bfloat16(), keys.bfloat16(), queue, 0.2).dtype == torch.float32
    assert contrastive_logits(queries.double(), keys.double(), queue.double(), 0.2).dtype == torch.float64


@pytest.mark.parametrize("temperature", [0, -0.1])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        contrastive_logits(unit(2, 4), unit(2, 4), unit(3, 4), temperature)


@pytest.mark.parametrize("size", [1, 5, 7, 64])
def test_queue_equals_a_list_that_forgets(size):
    """Batches smaller and larger than the queue, that divide it and that do not."""
    queue = KeyQueue(size, 3)
    slots, cursor = [row.clone() for row in queue.keys], 0
    for seed, n in enumerate([3, 1, 64, 5, 7, 8, 2]):
        keys = unit(n, 3, seed=seed)
        queue.enqueue(keys)
        for key in keys:
            slots[cursor] = key
            cursor = (cursor + 1) % size
        assert queue.keys.equal(torch.stack(slots))
        assert queue.cursor.item() == cursor


def test_queue_starts_as_unit_vectors_of_its_generator():
    first, again = (KeyQueue(32, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(first.keys.norm(dim=1), torch.ones(32))
    assert first.keys.equal(again.keys) and not first.keys.equal(KeyQueue(32, 8).keys)
    assert first.cursor.item() == 0 and list(first.state_dict()) == ["keys", "cursor"]


def test_queue_carries_no_gradient_and_copies():
    queue, keys = KeyQueue(4, 2), unit(2, 2).requires_grad_()
    queue.enqueue(keys * 1)
    assert not queue.keys.requires_grad
    before = queue.keys.clone()
    with torch.no_grad():
        keys.mul_(2)
    assert queue.keys.equal(before)


def test_a_queue_without_room_is_refused():
    with pytest.raises(ValueError, match="at least one key"):
        KeyQueue(0, 4)
