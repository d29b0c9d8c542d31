"""Encoders and the momentum update. pytest tests/test_encoder.py"""

import copy
import sys

import pytest
import torch
import torchvision
from torch import nn

from moco.encoder import GroupedBatchNorm2d, batchnorm_in_words, build_encoder, momentum_update, resnet_names
from moco.errors import UserError


@pytest.mark.parametrize("arch", resnet_names())
def test_every_resnet_builds_with_torchvisions_keys(arch):
    with torch.device("meta"):
        encoder = build_encoder(arch, dim=16, head="fc")
        assert encoder(torch.empty(2, 3, 64, 64)).shape == (2, 16)
        assert encoder.backbone(torch.empty(2, 3, 64, 64)).shape == (2, encoder.width)
        if arch != "resnet10":
            expected = torchvision.models.get_model(arch, num_classes=16).state_dict()
            expected = {key: value.shape for key, value in expected.items() if not key.startswith("fc.")}
            assert {key: value.shape for key, value in encoder.backbone.state_dict().items()} == expected


def test_the_list_covers_18_to_152_wide_and_resnext():
    assert {"resnet18", "resnet50", "resnet152", "wide_resnet50_2", "resnext50_32x4d"} <= set(resnet_names())


def test_weights_are_drawn_as_torchvision_draws_a_resnet_with_its_fc():
    """So that a run of a seed has the same numbers as one from before an encoder had two parts."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=16)
    hidden = nn.Linear(512, 512)
    for head in ("fc", "mlp"):
        torch.manual_seed(0)
        encoder = build_encoder("resnet18", dim=16, head=head)
        layers = encoder.head if head == "mlp" else [encoder.head]
        drawn = [*encoder.backbone.parameters(), *layers[-1].parameters()]
        assert all(value.equal(expected) for value, expected in zip(drawn, resnet.parameters(), strict=True))
    assert encoder.head[0].weight.equal(hidden.weight)
    assert [name.split(".")[0] for name, _ in encoder.named_parameters()][-5:] == ["backbone"] + ["head"] * 4


def test_mlp_head_is_linear_relu_linear_as_wide_as_the_features():
    first, activation, last = build_encoder("resnet18", dim=32, head="mlp").head
    assert (first.in_features, first.out_features) == (512, 512)
    assert isinstance(activation, nn.ReLU)
    assert (last.in_features, last.out_features) == (512, 32)
    assert isinstance(build_encoder("resnet18", dim=32, head="fc").head, nn.Linear)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_small_stem_keeps_the_resolution(channels):
    backbone = build_encoder("resnet18", stem="small", channels=channels).backbone
    assert backbone.maxpool(backbone.conv1(torch.zeros(1, channels, 32, 32))).shape == (1, 64, 32, 32)


def test_images_of_any_number_of_channels():
    encoder = build_encoder("resnet10", dim=8, channels=6)
    assert encoder.channels == 6 and encoder(torch.zeros(2, 6, 64, 64)).shape == (2, 8)
    assert encoder.backbone.conv1.stride == (2, 2)


def test_checkpoints_from_before_an_encoder_had_two_parts_are_restored():
    """Also where the encoder is a part of a larger module."""
    resnet, encoder = torchvision.models.resnet18(num_classes=8), build_encoder("resnet18", dim=8, head="fc")
    encoder.load_state_dict(resnet.state_dict())  # strict
    assert encoder.head.weight.equal(resnet.fc.weight) and encoder.backbone.conv1.weight.equal(resnet.conv1.weight)
    whole = nn.ModuleDict({"query_encoder": build_encoder("resnet18", dim=8, head="fc")})
    whole.load_state_dict({f"query_encoder.{name}": value for name, value in resnet.state_dict().items()})
    assert all(value.equal(whole["query_encoder"].state_dict()[name]) for name, value in encoder.state_dict().items())
    with pytest.raises(RuntimeError, match="layer9"):
        encoder.load_state_dict(resnet.state_dict() | {"layer9.weight": torch.ones(1)})


# ---- models of timm


@pytest.mark.parametrize(
    "name, channels, width",
    [("vit_tiny_patch16_224", 3, 192), ("vit_tiny_patch16_224", 5, 192), ("convnext_atto", 3, 320),
     ("mobilenetv3_small_050", 3, 1024), ("resnet10t", 2, 512)],
)  # fmt: skip
def test_features_are_the_pooled_output_of_timms_model_without_its_classifier(name, channels, width):
    timm = pytest.importorskip("timm")
    encoder = build_encoder(f"timm/{name}", dim=16, image_size=32, channels=channels)
    assert (encoder.width, encoder.channels, encoder.image_size) == (width, channels, 32) and encoder.training
    options = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=0, in_chans=channels, **options)
    model.load_state_dict(encoder.backbone.state_dict())  # strict
    images = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval().backbone(images), model.eval()(images), rtol=0, atol=0)
        assert encoder(images).shape == (2, 16)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])  # BatchNorm; the same with an activation in it
def test_batchnorm_of_timms_models_is_over_groups(name):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    grouped = build_encoder(f"timm/{name}", image_size=32, bn_batch=4).backbone.double()
    plain = build_encoder(f"timm/{name}", image_size=32).backbone.double()
    plain.load_state_dict(grouped.state_dict())
    images = torch.randn(8, 3, 32, 32).double()
    in_turn = torch.cat([plain(half) for half in images.split(4)])
    torch.testing.assert_close(grouped(images), in_turn, rtol=0, atol=1e-9)
    assert not torch.allclose(plain(images), in_turn, atol=1e-2)
    grouped, plain = grouped.state_dict(), plain.state_dict()
    assert any("running_mean" in name for name in grouped)
    assert batchnorm_in_words(build_encoder("timm/convnext_atto", image_size=32, bn_batch=4), 4).startswith("none")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "rexnet_100"])  # with DropPath; with Dropout
def test_timms_models_drop_nothing_at_random(name):
    """What is drawn from a global state would differ after a resume."""
    pytest.importorskip("timm")
    backbone = build_encoder(f"timm/{name}", image_size=64).backbone
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert backbone.train()(images).equal(backbone(images))


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"arch": "timm/vit_tiny_patch16_225"}, "timm/vit_tiny_patch16_224"),
        ({"arch": "vit_tiny_patch16_224"}, "timm/NAME"),
        ({"arch": "timm/vit_tiny_patch16_224", "image_size": 8}, "8 pixels"),
        (
            {"arch": "timm/vit_tiny_patch16_224", "image_size": 40},
            "40 pixels into patches of 16",
        ),
        ({"arch": "timm/test_vit", "image_size": 40}, "40 pixels"),  # which timm refuses itself
        ({"arch": "timm/convnext_atto", "stem": "small"}, "--stem small is for ResNets"),
        ({"arch": "timm/levit_128s", "bn_batch": 2}, "BatchNorm1d"),
    ],
)
def test_what_timm_cannot_build_is_refused_in_one_line(wrong, words):
    pytest.importorskip("timm")
    with pytest.raises(UserError) as error:
        build_encoder(**wrong)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_without_timm_its_models_are_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm/resnet50 needs timm, which is not installed .*; pip install timm"):
        build_encoder("timm/resnet50")


# ---- BatchNorm over groups


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("images", [32, 30])  # whole groups, and a smaller one at the end
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_groups_in_one_pass_equal_a_pass_for_each_to_the_bit(monkeypatch, dtype, images, layout):
    """Also as a GPU does it in bfloat16, which adds the parameters' gradients in another order."""
    torch.manual_seed(0)
    x = (torch.randn(images, 6, 5, 7) * 3 + 1).to(dtype).contiguous(memory_format=layout)
    gradient, found = torch.randn(x.shape).to(dtype).contiguous(memory_format=layout), []
    for form in ("loop", "module", "module of a GPU"):
        norm = nn.BatchNorm2d(6) if form == "loop" else GroupedBatchNorm2d(6, 4)
        norm.to(dtype if dtype == torch.float64 else torch.float32)
        inputs = x.clone().requires_grad_()
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "is_cuda", form == "module of a GPU")
            output = torch.cat([norm(rows) for rows in inputs.split(4)]) if form == "loop" else norm(inputs)
        output.backward(gradient)
        found.append(([p.grad for p in norm.parameters()], [output, inputs.grad, *norm.buffers()]))
    (gradients, expected), (of_module, module), (of_gpu, gpu) = found
    torch.testing.assert_close(of_module, gradients, rtol=0, atol=0)
    torch.testing.assert_close(of_gpu, gradients)
    for other in (module, gpu):
        assert all(a.equal(b) and a.stride() == b.stride() for a, b in zip(expected, other, strict=True))


def test_groups_are_normalised_at_once_where_a_compiler_can_fuse_them():
    torch.manual_seed(0)
    x, found = torch.randn(32, 6, 5, 7, dtype=torch.double) * 3 + 1, []
    for compiled in (False, True):
        norm, inputs = GroupedBatchNorm2d(6, 4).double(), x.clone().requires_grad_()
        output = (torch.compile(norm, backend="eager", fullgraph=True) if compiled else norm)(inputs)
        output.square().sum().backward()
        found.append([output, inputs.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
    torch.testing.assert_close(*found)


# ---- refused, and the momentum update


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


class Wrapper(nn.Module):
    """Names its parameters as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_wrapped_encoders_are_paired_by_name_and_a_predictor_is_left_alone():
    """In another order too: whoever pairs by position gets the wrong weights, or another number of them."""
    query_encoder, key_encoder = (build_encoder("resnet10", dim=8) for _ in range(2))
    wanted = {
        name: value.lerp(query_encoder.get_parameter(name), 0.5) for name, value in key_encoder.named_parameters()
    }
    query_encoder._modules = dict(reversed(query_encoder._modules.items()))  # the head comes first
    query_encoder.predictor = nn.Linear(8, 8)
    momentum_update(torch.compile(Wrapper(query_encoder), backend="eager"), key_encoder, 0.5)
    for name, value in key_encoder.named_parameters():
        torch.testing.assert_close(value, wanted[name])


def test_a_parameter_of_the_key_encoder_without_a_partner_is_an_error():
    query_encoder, key_encoder = (build_encoder("resnet10", dim=8) for _ in range(2))
    key_encoder.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra.weight of the key encoder has no partner"):
        momentum_update(query_encoder, key_encoder, 0.5)
    with pytest.raises(ValueError, match="head.2.weight of the key encoder has no partner of its shape"):
        momentum_update(build_encoder("resnet10", dim=1), build_encoder("resnet10", dim=8), 0.5)
