"""Encoders and the momentum update. pytest tests/test_encoder.py"""

import copy

import pytest
import torch
import torchvision
from torch import nn

from moco.encoder import build_encoder, momentum_update, resnet_names


@pytest.mark.parametrize("arch", resnet_names())
def test_every_architecture_builds_with_torchvisions_keys(arch):
    with torch.device("meta"):
        encoder = build_encoder(arch, dim=16, head="fc")
        assert encoder(torch.empty(2, 3, 64, 64)).shape == (2, 16)
        if arch != "resnet10":
            expected = torchvision.models.get_model(arch, num_classes=16).state_dict()
            assert {k: v.shape for k, v in encoder.state_dict().items()} == {k: v.shape for k, v in expected.items()}


def test_the_list_covers_18_to_152_wide_and_resnext():
    assert {"resnet18", "resnet50", "resnet152", "wide_resnet50_2", "resnext50_32x4d"} <= set(resnet_names())


def test_mlp_head_is_linear_relu_linear_as_wide_as_the_features():
    first, activation, last = build_encoder("resnet18", dim=32, head="mlp").fc
    assert (first.in_features, first.out_features) == (512, 512)
    assert isinstance(activation, nn.ReLU)
    assert (last.in_features, last.out_features) == (512, 32)
    assert isinstance(build_encoder("resnet18", dim=32, head="fc").fc, nn.Linear)


def test_small_stem_keeps_the_resolution():
    encoder = build_encoder("resnet18", stem="small")
    assert encoder.maxpool(encoder.conv1(torch.zeros(1, 3, 32, 32))).shape == (1, 64, 32, 32)


@pytest.mark.parametrize(
    "wrong", [{"arch": "resnet19"}, {"arch": "resnet18", "head": "x"}, {"arch": "resnet18", "stem": "x"}]
)
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError):
        build_encoder(**wrong)


def test_momentum_update_equals_the_loop_of_the_paper_and_leaves_statistics_alone():
    query_encoder = build_encoder("resnet10", dim=8)
    key_encoder = copy.deepcopy(query_encoder)
    torch.manual_seed(0)
    for encoder in (query_encoder, key_encoder):
        for value in [*encoder.parameters(), *(b for b in encoder.buffers() if b.is_floating_point())]:
            nn.init.uniform_(value)
    expected = {name: 0.99 * key_encoder.get_parameter(name) + 0.01 * p for name, p in query_encoder.named_parameters()}
    statistics = {name: buffer.clone() for name, buffer in key_encoder.named_buffers()}
    queries = {name: value.clone() for name, value in query_encoder.state_dict().items()}
    momentum_update(query_encoder, key_encoder, 0.99)
    for name, parameter in key_encoder.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
    assert all(buffer.equal(statistics[name]) for name, buffer in key_encoder.named_buffers())
    assert all(value.equal(queries[name]) for name, value in query_encoder.state_dict().items())


def test_equal_encoders_stay_equal():
    query_encoder = build_encoder("resnet10", dim=8)
    key_encoder = copy.deepcopy(query_encoder)
    momentum_update(query_encoder, key_encoder, 0.999)
    assert all(k.equal(q) for k, q in zip(key_encoder.parameters(), query_encoder.parameters()))
