"""What a step asks of a GPU, on fake "cuda" tensors: nothing waits for it, nothing blocks. pytest tests/test_count.py

benchmarks/count.py prints the counts themselves.
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_run import Images
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.count import a_step, augmentation, counted
from moco.data.order import Order
from moco.run.run import Run


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.filterwarnings("ignore")  # of what fake tensors are not made for
@pytest.mark.parametrize("recipe", ["v1", "v2", "simclr"])
def test_the_augmentation_neither_waits_nor_blocks(fake, recipe):
    counts = counted(augmentation(32, 64, recipe)).counts
    assert counts["copies that block"] == counts["waits"] == counts["copies to the host"] == 0
    assert counts["copies to the device"] == 4  # the indices, the values, and the mean and deviation of ImageNet
    assert 50 < counts["kernels"] < 400


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_a_step_neither_waits_nor_blocks(fake, method):
    counts = counted(a_step(method, "resnet10", 32, 16, 8 if method == "moco" else None, queue_size=64)).counts
    assert counts["copies that block"] == counts["waits"] == counts["copies to the host"] == 0
    assert counts["kernels"] > 50


@pytest.mark.filterwarnings("ignore")
def test_a_steps_numbers_are_read_back_by_one_copy_that_does_not_block(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    module, accelerator = nn.Linear(1, 1), Accelerator(cpu=True)
    model, optimizer = nn.ModuleDict({"module": module}), torch.optim.SGD(module.parameters(), 1.0)
    run = Run(tmp_path, accelerator, model, optimizer, Images(8), Order(4, seed=0), total_steps=4, checkpoint_every=4)
    next(run.steps())
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss, accuracy = torch.empty((), device="cuda"), torch.empty((), device="cuda")
        counts = counted(lambda: run.record(loss=loss, accuracy=accuracy)).counts
    assert counts["copies to the host"] == 1 and counts["copies to the device"] == 1
    assert counts["copies that block"] == counts["waits"] == 0


@pytest.mark.filterwarnings("ignore")
def test_the_count_sees_what_blocks_and_what_waits(fake):
    x = torch.empty(4, 4, device="cuda")
    assert counted(lambda: x.cpu()).counts["copies that block"] == 1
    assert counted(lambda: x.to("cpu", non_blocking=True)).counts["copies that block"] == 0
    with pytest.raises(Exception, match="_local_scalar_dense"):
        counted(lambda: x.sum().item())
    with pytest.raises(Exception, match="device"):
        counted(lambda: x + torch.empty(4, 4))
