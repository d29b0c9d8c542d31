"""Logits, losses and queue beside slow loops written from the papers, and SimCLR's reference numbers.

pytest tests/test_contrast.py
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from safetensors.torch import load_file

from moco.contrast import KeyQueue, contrastive_logits, nt_xent_logits


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


def test_autocast_does_not_coarsen_the_logits():
    queries, keys, queue = unit(2, 4), unit(2, 4, seed=1), unit(3, 4, seed=2)
    expected = contrastive_logits(queries, keys, queue, 0.07), nt_xent_logits(queries, keys, 0.07)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrastive_logits(queries, keys, queue, 0.07), nt_xent_logits(queries, keys, 0.07)[0]
    assert all(a.dtype == torch.float32 and a.equal(b) for a, b in zip(found, expected))


@pytest.mark.parametrize("temperature", [0, -0.1])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        contrastive_logits(unit(2, 4), unit(2, 4), unit(3, 4), temperature)
    with pytest.raises(ValueError, match="temperature"):
        nt_xent_logits(unit(2, 4), unit(2, 4), temperature)


# ---- SimCLR


def test_nt_xent_equals_the_loop_of_its_algorithm_1():
    first, second = unit(4, 6), unit(4, 6, seed=1)
    logits, labels = nt_xent_logits(first, second, 0.3)
    assert logits.shape == (8, 7) and logits.dtype == torch.float32
    z = [view for pair in zip(first, second) for view in pair]  # views 2k and 2k + 1 are of the same image
    losses = []
    for i in range(8):
        j = i + 1 if i % 2 == 0 else i - 1
        others = sum(torch.exp(z[i] @ z[k] / 0.3) for k in range(8) if k != i)
        losses.append(-torch.log(torch.exp(z[i] @ z[j] / 0.3) / others))
    torch.testing.assert_close(F.cross_entropy(logits, labels), torch.stack(losses).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_nt_xent_and_its_gradients(golden, dtype):
    config = json.loads((golden / "simclr" / "ntxent.json").read_text())["config"]
    data = load_file(golden / "simclr" / "ntxent.safetensors")
    exact = dtype == torch.float64
    for temperature in config["T"]:
        z = [data[name].to(dtype).clone().requires_grad_() for name in ("z0", "z1")]
        loss = F.cross_entropy(*nt_xent_logits(*(F.normalize(view, dim=1) for view in z), temperature))
        loss.backward()
        key = f"T{temperature}.single"
        numbers = [("loss", loss.detach()[None], 5e-6), ("grad_z0", z[0].grad, 1e-6), ("grad_z1", z[1].grad, 1e-6)]
        for name, value, atol in numbers:
            expected = data[f"{key}.{name}"]
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-10 if exact else atol)
            twice = data[f"{key}.tf_{name}"].double()  # the sum of two means
            torch.testing.assert_close(2 * value.double(), twice, rtol=0, atol=2 * atol)


def test_golden_nt_xent_over_two_processes(golden, tmp_path):
    """Each process has its own part of the whole loss's gradient, and all have the whole loss."""
    done = run_script("tests/ntxent.py", golden, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    data = load_file(golden / "simclr" / "ntxent.safetensors")
    for temperature in json.loads((golden / "simclr" / "ntxent.json").read_text())["config"]["T"]:
        losses = [data[f"T{temperature}.dist.rank{rank}.loss"] for rank in (0, 1)]
        for rank in (0, 1):
            ours, key = load_file(tmp_path / f"rank{rank}.safetensors"), f"T{temperature}.dist.rank{rank}"
            torch.testing.assert_close(ours[f"T{temperature}.loss"], sum(losses) / 2, rtol=0, atol=1e-10)
            for view in ("grad_z0", "grad_z1"):
                gradient = ours[f"T{temperature}.{view}"]
                torch.testing.assert_close(gradient, data[f"{key}.{view}"], rtol=0, atol=1e-10)
                assert (gradient * 2 - data[f"{key}.nograd_gather_{view}"]).norm() > 0.01 * gradient.norm()


# ---- the queue


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
