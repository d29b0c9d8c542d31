"""How many images a pass takes. pytest tests/test_memory.py"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moco.encoder import build_encoder
from moco.run.memory import activation_bytes, micro_batch


def test_activations_are_what_the_layers_must_keep():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    images, hidden = 3 * 16 * 16, 8 * 16 * 16
    # A convolution keeps its input, a ReLU its output, which is also the input of the linear layer and counts once.
    assert activation_bytes(layers, 3, 16) == 4 * (images + hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert activation_bytes(layers, 3, 16) == 2 * (images + hidden)
    with torch.no_grad():
        assert activation_bytes(layers, 3, 16) == 0


def test_a_resnet_50_keeps_86_megabytes_an_image_and_nothing_is_computed():
    """86.0 MB, counted by hand. BatchNorm over groups keeps the same, and no statistic moves."""
    encoder = build_encoder("resnet50", bn_batch=32)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert 85e6 < activation_bytes(encoder, 3, 224) < 87e6
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("arch", ["timm/vit_tiny_patch16_224", "timm/convnext_atto", "timm/mobilenetv3_small_050"])
def test_activations_of_timms_models(arch):
    pytest.importorskip("timm")
    assert 1e6 < activation_bytes(build_encoder(arch, image_size=224, bn_batch=4), 3, 224) < 1e8


def test_a_pass_takes_what_the_gpu_with_the_least_free_memory_holds(monkeypatch):
    encoder = build_encoder("resnet10")
    each = activation_bytes(encoder, 3, 64)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000 * each, 2000 * each))
    gpus = SimpleNamespace(
        device=torch.device("cuda"), unwrap_model=lambda model, **_: model,
        gather=lambda free: torch.cat([free, free // 2]),
    )  # fmt: skip
    images, words = micro_batch(None, encoder, 3, 64, gpus)
    assert images == 350 and f"0.7 of {500 * each / 1e9:.1f} GB" in words and f"{each / 1e6:.1f} MB an image" in words
    assert micro_batch(7, encoder, 3, 64, gpus) == (7, "")
    cpu = SimpleNamespace(device=torch.device("cpu"))
    assert micro_batch(None, encoder, 3, 32, cpu) == (1024, "") and micro_batch(None, encoder, 3, 2000, cpu) == (1, "")
