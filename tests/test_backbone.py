"""Backbones in and out: every source, exact keys, round trips, refusals. pytest tests/test_backbone.py"""

import json
import pickle

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from moco.backbone import convert, load_backbone, read_backbone, save_backbone, to_detectron2
from moco.encoder import build_encoder
from moco.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A resnet10 as train_moco.py leaves it: (folder, encoder)."""
    torch.manual_seed(1)
    encoder = build_encoder("resnet10")
    folder = tmp_path_factory.mktemp("run") / "backbone"
    save_backbone(folder, encoder, "resnet10", 32, "moco_v2", {"recipe": "v2", "arch": "resnet10", "data": "shapes"})
    return folder, encoder


def assert_same_weights(backbone, encoder):
    weights = {key: value for key, value in encoder.state_dict().items() if not key.startswith("fc.")}
    assert backbone.state_dict().keys() == weights.keys()
    assert all(value.equal(weights[key]) for key, value in backbone.state_dict().items())


def test_golden_checkpoints_of_the_reference_are_imported(golden):
    expected = json.loads((golden / "checkpoint" / "expected.json").read_text())
    for name, description in expected.items():
        weights, known = read_backbone(golden / "checkpoint" / name)
        assert known["arch"] == description["arch"] and weights.keys() == description["backbone"].keys()
        for key, entry in description["backbone"].items():
            value = weights[key]
            assert list(value.shape) == entry["shape"] and str(value.dtype) == f"torch.{entry['dtype']}"
            assert value.double().sum().item() == pytest.approx(entry["sum"], rel=1e-9, abs=1e-9)
            assert value.double().abs().sum().item() == pytest.approx(entry["abs_sum"], rel=1e-9)
            assert value.flatten()[: len(entry["first"])].tolist() == entry["first"]
        for key, renamed in description.get("detectron2_key_map", []):
            assert to_detectron2(key.removeprefix("module.encoder_q.")) == renamed


def test_names_of_detectron2():
    """Written out: a folder of golden numbers may hold no pairs of names, and a round trip shows no common mistake."""
    names = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv3.weight": "res2.0.conv3.weight",
        "layer3.5.bn2.bias": "res4.5.conv2.norm.bias",
        "layer4.0.downsample.0.weight": "res5.0.shortcut.weight",
        "layer4.0.downsample.1.running_mean": "res5.0.shortcut.norm.running_mean",
    }
    assert {key: to_detectron2(key) for key in names} == names


def test_golden_features_of_imported_backbones(golden):
    numbers = load_file(golden / "checkpoint" / "features.safetensors")
    for key in [key for key in numbers if key.endswith("|images")]:
        name = key.removesuffix("|images")
        backbone = load_backbone(golden / "checkpoint" / name)[0].eval()
        images = numbers[key].float() / 32
        with torch.no_grad():
            single, double = backbone(images), backbone.double()(images.double())
        expected = numbers[f"{name}|features_f32"]
        torch.testing.assert_close(single, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(double, numbers[f"{name}|features_f64"], rtol=0, atol=1e-9)


def test_a_saved_folder_its_run_and_its_file_are_the_same_backbone(saved):
    folder, encoder = saved
    for source in (folder, folder.parent, folder / "model.safetensors"):
        assert_same_weights(load_backbone(str(source))[0], encoder)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize(
    "to, name",
    [("torchvision", "r.safetensors"), ("timm", "r"), ("detectron2", "r.pth"), ("moco", "r.pth.tar")],
)
def test_round_trips_are_bit_exact(tmp_path, stem, to, name):
    """timm knows no small stem."""
    if (stem, to) == ("small", "timm"):
        to, name = "torchvision", "r.safetensors"
    encoder = build_encoder("resnet18", stem=stem)
    save_backbone(tmp_path / "source", encoder, "resnet18", 32, "moco_v2", {"arch": "resnet18", "stem": stem})
    convert(tmp_path / "source", tmp_path / name, to)
    assert_same_weights(load_backbone(tmp_path / name)[0], encoder)
    convert(tmp_path / name, tmp_path / "back.safetensors", "torchvision")
    backbone = build_encoder("resnet18", stem=stem)
    backbone.fc = nn.Identity()
    backbone.load_state_dict(load_file(tmp_path / "back.safetensors"))  # strict
    assert_same_weights(backbone, encoder)


def test_the_momentum_encoder_on_request(tmp_path):
    query, key = build_encoder("resnet10"), build_encoder("resnet10")
    state = {f"module.encoder_q.{name}": value for name, value in query.state_dict().items()}
    state |= {f"module.encoder_k.{name}": value for name, value in key.state_dict().items()}
    torch.save({"arch": "resnet10", "state_dict": state | {"module.queue": torch.ones(2, 2)}}, tmp_path / "m.pth.tar")
    assert_same_weights(load_backbone(tmp_path / "m.pth.tar")[0], query)
    assert_same_weights(load_backbone(tmp_path / "m.pth.tar", encoder="key")[0], key)


def test_torchvisions_supervised_weights(tmp_path, monkeypatch):
    """The file lies where a download would put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = torchvision.models.resnet18()
    file = tmp_path / "hub" / "checkpoints" / torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.split("/")[-1]
    file.parent.mkdir(parents=True)
    torch.save(model.state_dict(), file)
    assert_same_weights(load_backbone("ResNet18_Weights.IMAGENET1K_V1")[0], model)


def test_random_is_a_function_of_the_seed():
    assert_same_weights(load_backbone("random", "resnet10", seed=3)[0], load_backbone("random", "resnet10", seed=3)[0])
    other = load_backbone("random", "resnet10", seed=4)[0].conv1.weight
    assert not other.equal(load_backbone("random", "resnet10", seed=3)[0].conv1.weight)


# ---- refused, in one line that names the keys


def refusal(source, **arguments):
    with pytest.raises(UserError) as error:
        load_backbone(source, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_arch_that_does_not_fit(saved):
    line = refusal(saved[0], arch="resnet18")
    assert "--arch resnet18" in line and "missing layer1.1." in line


def test_missing_and_unexpected_keys_are_named(saved, tmp_path):
    weights = load_file(saved[0] / "model.safetensors")
    weights["layer5.weight"] = weights.pop("layer2.0.conv1.weight")
    save_file(weights, tmp_path / "w.safetensors")
    line = refusal(tmp_path / "w.safetensors")
    assert "missing layer2.0.conv1.weight" in line and "unexpected layer5.weight" in line


def test_a_head_instead_of_a_backbone(tmp_path):
    save_file({"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}, tmp_path / "w.safetensors")
    assert "fc.bias, fc.weight" in refusal(tmp_path / "w.safetensors")


def test_a_truncated_safetensors_file(saved, tmp_path):
    (tmp_path / "w.safetensors").write_bytes((saved[0] / "model.safetensors").read_bytes()[:-100])
    assert "truncated" in refusal(tmp_path / "w.safetensors")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("write", [lambda v, f: torch.save(v, f), lambda v, f: f.write_bytes(pickle.dumps(v, 2))])
def test_a_hostile_pickle_is_refused_without_running(tmp_path, write):
    write({"state_dict": {"conv1.weight": Hostile(str(tmp_path / "ran"))}}, tmp_path / "w.pth.tar")
    assert "could run any code" in refusal(tmp_path / "w.pth.tar")
    assert not (tmp_path / "ran").exists()


def test_a_name_that_is_nowhere():
    assert "neither a folder or file here" in refusal("nowhere")
    assert "ResNet50_Weights.NONE" in refusal("ResNet50_Weights.NONE")


# ---- loaded by others


@pytest.mark.parametrize("arch", ["resnet10", "resnet50"])
def test_timm_and_transformers_give_the_same_features(tmp_path, arch):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    encoder = build_encoder(arch)
    save_backbone(tmp_path, encoder, arch, 64, "moco_v2", {"recipe": "v2", "arch": arch, "data": "shapes"})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = load_backbone(tmp_path)[0].eval()(images)
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
        wrapped = transformers.AutoModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(wrapped(images).pooler_output.flatten(1), expected, rtol=0, atol=1e-5)
        transformers.AutoImageProcessor.from_pretrained(tmp_path)
        headed = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=10).eval()
        assert headed(images).shape == (2, 10)
        torch.testing.assert_close(headed.forward_head(headed.forward_features(images), pre_logits=True), expected)
        maps = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()(images)
    torch.testing.assert_close(maps[-1].mean(dim=(2, 3)), expected, rtol=0, atol=1e-5)
