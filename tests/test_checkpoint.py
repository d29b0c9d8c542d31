"""Checkpoints are complete or absent. Whole runs that are killed and resumed are in test_train.py.

pytest tests/test_checkpoint.py
"""

import json

import pytest
import torch
from accelerate import Accelerator

from moco.errors import UserError
from moco.run.checkpoint import (
    check_equal_state,
    checksum,
    complete_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    read_metrics,
    save_checkpoint,
    trim_metrics,
)


def tensors(seed=0):
    weights = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    return {
        "query_encoder": {"conv": weights.to(memory_format=torch.channels_last)},
        "queue": {"cursor": torch.tensor(5)},
    }


def test_what_is_saved_comes_back(tmp_path):
    save_checkpoint(tmp_path, 7, tensors(), {"window": {"loss": 0.1 + 0.2}}, keep=2)
    loaded, state = load_checkpoint(complete_checkpoints(tmp_path)[-1])
    assert loaded["query_encoder"]["conv"].equal(tensors()["query_encoder"]["conv"])
    assert loaded["queue"]["cursor"].item() == 5
    assert state["step"] == 7 and state["window"]["loss"] == 0.1 + 0.2


def test_the_newest_are_kept(tmp_path):
    for step in (0, 5, 10, 100):
        save_checkpoint(tmp_path, step, tensors(), {}, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_10", "step_100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_100"]


@pytest.mark.parametrize("missing", ["state.json", "queue.safetensors"])
def test_a_folder_that_lacks_a_file_is_no_checkpoint(tmp_path, missing):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(), {}, keep=2)
    (tmp_path / "step_2" / missing).unlink()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_1"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors(), {}, keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moco.run.checkpoint.sync", full)
    with pytest.raises(UserError, match="step_2 cannot be written .*No space left.* make room.* --resume"):
        save_checkpoint(tmp_path, 2, tensors(1), {}, keep=1)
    monkeypatch.undo()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_1"]
    save_checkpoint(tmp_path, 2, tensors(1), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_a_folder_that_was_being_written_is_no_checkpoint_and_is_written_anew(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(), {}, keep=2)
    (tmp_path / "step_1").rename(tmp_path / ".step_1.partial")
    (tmp_path / ".step_1.partial" / "state.json").unlink()
    assert complete_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, 1, tensors(), {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_kill_while_the_same_step_is_saved_again_leaves_a_checkpoint(tmp_path, monkeypatch):
    """As a resumed run does first."""
    save_checkpoint(tmp_path, 1, tensors(), {}, keep=1)

    def killed(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("moco.run.checkpoint.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, tensors(), {}, keep=1)
    monkeypatch.undo()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_1"]
    save_checkpoint(tmp_path, 2, tensors(), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


@pytest.mark.parametrize("damaged", ["state.json", "queue.safetensors"])
def test_damage_is_named_with_the_remedy(tmp_path, damaged):
    save_checkpoint(tmp_path, 3, tensors(), {}, keep=1)
    path = tmp_path / "step_3" / damaged
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{damaged} is damaged.*remove .*step_3"):
        load_checkpoint(complete_checkpoints(tmp_path)[-1])


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.1)])
def test_an_optimizer_goes_on_exactly(make):
    def step(parameter, optimizer, seed):
        parameter.grad = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    parameter = torch.zeros(4, requires_grad=True)
    optimizer = make([parameter])
    step(parameter, optimizer, 0)
    restored = parameter.detach().clone().requires_grad_()
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer).items()}
    other = make([restored])
    load_optimizer_tensors(other, saved)
    step(parameter, optimizer, 1)
    step(restored, other, 1)
    assert saved and restored.equal(parameter)


def test_metrics_are_cut_after_the_step_and_at_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.5}) for step in (0, 10, 20)]
    path.write_text("\n".join(lines) + '\n{"step": 30, "lo')
    assert [line["step"] for line in read_metrics(path)] == [0, 10, 20]
    trim_metrics(path, 10)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    path.write_text('{"step": 0, "lo\n{"step": 10}\n')
    for damaged in (path, tmp_path / "absent.jsonl"):
        with pytest.raises(UserError, match=f"{damaged.name} is damaged or missing"):
            read_metrics(damaged)


def test_an_optimizers_state_comes_back_in_the_layout_of_its_weights(tmp_path):
    """Files hold no strides; updates that take all weights at once are slower where state and weight differ."""
    encoder = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1, momentum=0.9)
    encoder(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    before = optimizer.state[encoder.weight]["momentum_buffer"].clone()
    save_checkpoint(tmp_path, 1, {"optimizer": optimizer_tensors(optimizer)}, {}, keep=1)
    load_optimizer_tensors(optimizer, load_checkpoint(tmp_path / "step_1")[0]["optimizer"])
    after = optimizer.state[encoder.weight]["momentum_buffer"]
    assert after.equal(before) and after.stride() == encoder.weight.stride()


def test_weights_that_diverged_alike_are_equal_but_not_finite():
    module = torch.nn.Linear(2, 2)
    assert check_equal_state({"classifiers": module}, Accelerator(cpu=True))  # of one process, too
    module.weight.data[0] = torch.nan
    assert not check_equal_state({"classifiers": module}, Accelerator(cpu=True))


def test_states_are_compared_by_bits_which_no_order_of_adding_changes():
    """Devices of two kinds add in different orders. Then equal weights would have different sums of floats."""
    weights = torch.tensor([1e16, 1.0, -1e16, 1.0] * 50, dtype=torch.double)
    assert checksum(weights) == checksum(weights.flip(0)) == checksum(weights.view(10, 20).T)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool):
        one, other = torch.ones(3, 4).to(dtype), torch.ones(3, 4).to(dtype)
        assert checksum(one) == checksum(other)
        other[1, 2] = 0
        assert checksum(one) != checksum(other)
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor(1.0).nextafter(torch.tensor(2.0)))


class Other:
    """A process beside this one, on which every tensor has these checksums and is finite or not."""

    def __init__(self, there):
        self.there = there

    def gather(self, here):
        return torch.cat([here, self.there(here)])


def test_weights_that_diverged_on_one_process_only_are_a_difference():
    module = torch.nn.Linear(2, 2)
    assert check_equal_state({"module": module}, Other(lambda here: here.clone()))
    with pytest.raises(RuntimeError, match="module differs"):
        check_equal_state({"module": module}, Other(lambda here: here * torch.tensor([2, 0])))
    module.weight.data[0] = torch.nan  # its bits may differ
    here_and_there = {"module": torch.nn.ParameterList([module.weight])}
    assert not check_equal_state(here_and_there, Other(lambda here: here * torch.tensor([2, 1])))


def test_a_checkpoint_half_written_is_removed_by_the_next(tmp_path):
    (tmp_path / ".step_3.partial").mkdir()
    save_checkpoint(tmp_path, 7, tensors(), {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_7"]
