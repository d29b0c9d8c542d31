"""Backbones in and out: every source, exact keys, round trips, refusals. pytest tests/test_backbone.py"""

import json
import pickle
import sys

import pytest
import torch
import torchvision
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from trajectory import reference_name

import train_moco
from moco.backbone import convert, load_backbone, save_backbone
from moco.backbone.keys import to_detectron2
from moco.backbone.load import read_backbone
from moco.backbone.publish import prepare_folder
from moco.backbone.start import load_start, read_start
from moco.encoder import build_encoder
from moco.errors import UserError
from moco.run.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A resnet10 as train_moco.py leaves it: (folder, encoder)."""
    torch.manual_seed(1)
    encoder = build_encoder("resnet10")
    folder = tmp_path_factory.mktemp("run") / "backbone"
    save_backbone(folder, encoder, "resnet10", 32, "moco_v2", {"recipe": "v2", "arch": "resnet10", "data": "shapes"})
    return folder, encoder


def assert_same_weights(backbone, encoder):
    weights = getattr(encoder, "backbone", encoder).state_dict()
    weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
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


def begun(monkeypatch, *flags):
    """(query encoder, key encoder, flags) as train_moco.py begins with them."""
    monkeypatch.setattr(sys, "argv", ["train_moco.py", "--image-size", "32", "--queue-size", "8", *map(str, flags)])
    args, accelerator = train_moco.parse_args(), Accelerator(cpu=True)
    start = read_start(args, accelerator)
    return *train_moco.build_encoders(args, start, 3, args.batch_size, accelerator)[:2], args


def test_both_encoders_start_from_a_golden_checkpoint_and_its_head_if_asked(golden, monkeypatch):
    """BatchNorm's statistics, too. Without --init-head the head is the one of a run from nothing."""
    name = next(iter(load_file(golden / "checkpoint" / "features.safetensors"))).split("|")[0]
    weights = torch.load(golden / "checkpoint" / name, weights_only=True)["state_dict"]
    prefix = "module.encoder_q."
    official = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    recipe = ["--recipe", "v2" if "fc.2.weight" in official else "v1"]
    *encoders, args = begun(monkeypatch, *recipe, "--init", golden / "checkpoint" / name, "--init-head")
    for encoder in encoders:
        state = {reference_name(key): value for key, value in encoder.state_dict().items()}
        assert state.keys() == official.keys() and all(value.equal(official[key]) for key, value in state.items())
    assert args.stem == "imagenet" and args.init_from["name"] == name and args.init_from["license"] is None
    query, key, args = begun(monkeypatch, *recipe, "--init", golden / "checkpoint" / name)
    assert_same_weights(load_backbone(golden / "checkpoint" / name)[0], query)
    fresh, *_ = begun(monkeypatch, *recipe, "--arch", args.arch)
    assert all(value.equal(query.head.state_dict()[key]) for key, value in fresh.head.state_dict().items())
    assert all(value.equal(query.state_dict()[name]) for name, value in key.state_dict().items())


def test_what_pretraining_starts_from_names_stem_statistics_and_license(tmp_path, monkeypatch):
    encoder = build_encoder("resnet10", stem="small")
    settings = {"recipe": "v2", "arch": "resnet10"}
    save_backbone(tmp_path / "run" / "backbone", encoder, "resnet10", 32, "m", settings, (0.5,) * 3, (0.2,) * 3)
    prepare_folder(tmp_path / "run", "user/name", "mit")
    query, _, args = begun(monkeypatch, "--init", tmp_path / "run")
    assert_same_weights(query.backbone, encoder)
    assert (args.arch, args.stem, args.mean) == ("resnet10", "small", [0.5] * 3)
    assert args.init_from["license"] == "mit" and not args.init_from["on_hub"]
    *_, alone = begun(monkeypatch, "--init", tmp_path / "run", "--mean", 0.1, 0.1, 0.1)
    assert alone.std is None  # refused later, as without --init; not completed from the source
    for on_hub in (False, True):
        settings = vars(args) | {"init_from": args.init_from | {"on_hub": on_hub}}
        save_backbone(tmp_path / "next", query, args.arch, 32, "m", settings, args.mean, args.std)
        prepare_folder(tmp_path / "next", "user/next")
        card = (tmp_path / "next" / "README.md").read_text()
        assert "Pre-trained without labels, from run (license mit; " in card and str(tmp_path) not in card
        assert ("base_model: run\n" in card) == on_hub
    start = {f"backbone.{key}": value for key, value in encoder.backbone.state_dict().items()}
    with pytest.raises(UserError, match="conv1.weight is 64x3x3x3, not 64x6x3x3"):
        load_start(build_encoder("resnet10", stem="small", channels=6), start, args)


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
    backbone = build_encoder("resnet18", stem=stem).backbone
    backbone.load_state_dict(load_file(tmp_path / "back.safetensors"))  # strict
    assert_same_weights(backbone, encoder)


def test_the_momentum_encoder_on_request(tmp_path):
    query, key = build_encoder("resnet10"), build_encoder("resnet10")
    state = {f"module.encoder_q.{name}": value for name, value in query.backbone.state_dict().items()}
    state |= {f"module.encoder_k.{name}": value for name, value in key.backbone.state_dict().items()}
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


# ---- files of other programs

LIGHTLY = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def under(prefix, weights, numbered=False):
    def name(key):
        part, dot, rest = key.partition(".")
        return f"{LIGHTLY[part]}{dot}{rest}" if numbered else key

    return {f"{prefix}{name(key)}": value for key, value in weights.items()}


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "backbone.", "encoder.", "encoder_q.", "module.encoder.", "module.base_encoder.", "_orig_mod."],
)
@pytest.mark.parametrize("numbered", [False, True])
def test_a_backbone_is_found_below_any_prefix_beside_other_keys(tmp_path, capsys, prefix, numbered):
    encoder = build_encoder("resnet18", stem="small")
    others = {
        "projector.0.weight": torch.ones(2, 2),
        "module.queue": torch.ones(2),
        f"{prefix}fc.weight": torch.ones(3),
    }
    weights = under(prefix, encoder.backbone.state_dict(), numbered) | others
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "w.pth")
    backbone, known = load_backbone(tmp_path / "w.pth")
    assert_same_weights(backbone, encoder)
    assert known["arch"] == "resnet18"
    said = capsys.readouterr().out
    assert f"120 keys of a backbone below {prefix!r}" in said and "2 others are left out" in said


def test_of_two_encoders_the_one_that_was_asked_for(tmp_path):
    """As MoCo v3, lightly, DINO (whose two are dicts of their own) and an average of the weights have them."""
    one, two = build_encoder("resnet10"), build_encoder("resnet10")
    first, second = one.backbone.state_dict(), two.backbone.state_dict()
    files = [
        {"state_dict": under("module.base_encoder.", first) | under("module.momentum_encoder.", second)},
        under("backbone.", first, True) | under("backbone_momentum.", second, True),
        {"student": under("module.backbone.", first), "teacher": under("backbone.", second), "epoch": 1},
        {"net": first, "net_ema": second},
    ]
    for content in files:
        torch.save(content, tmp_path / "w.pth")
        assert_same_weights(load_backbone(tmp_path / "w.pth")[0], one)
        assert_same_weights(load_backbone(tmp_path / "w.pth", encoder="key")[0], two)


def test_a_name_that_only_contains_a_word_for_the_second_encoder_is_none(tmp_path):
    """Taking the other one without a word would be a wrong backbone."""
    one, two = (build_encoder("resnet10").backbone.state_dict() for _ in range(2))
    save_file(under("semantic.", one) | under("schema.", two), tmp_path / "w.safetensors")
    assert "holds several backbones, below 'schema.', 'semantic.'" in refusal(tmp_path / "w.safetensors")


def test_of_several_the_one_that_an_architecture_fits_else_none(tmp_path):
    one, two = (build_encoder("resnet10").backbone.state_dict() for _ in range(2))
    part = {key: value for key, value in two.items() if not key.startswith("layer3")}
    save_file(under("a.", one) | under("b.", part), tmp_path / "w.safetensors")
    assert all(load_backbone(tmp_path / "w.safetensors")[0].state_dict()[key].equal(one[key]) for key in one)
    save_file(under("a.", one) | under("b.", two), tmp_path / "w.safetensors")
    assert "holds several backbones, below 'a.', 'b.'" in refusal(tmp_path / "w.safetensors")
    save_file(under("a.", part), tmp_path / "w.safetensors")
    assert "missing layer3.0.bn1" in refusal(tmp_path / "w.safetensors")
    assert "holds no ResNet's query encoder but a.x" in refusal_of(tmp_path, {"a.x": torch.ones(1)})


def refusal_of(folder, weights):
    save_file(weights, folder / "w.safetensors")
    return refusal(folder / "w.safetensors")


def test_a_run_folder_from_before_an_encoder_had_two_parts(tmp_path):
    """Without backbone/, as a run that was not finished leaves it."""
    query, key = (torchvision.models.resnet18(num_classes=8) for _ in range(2))
    tensors = {"query_encoder": query.state_dict(), "key_encoder": key.state_dict()}
    save_checkpoint(tmp_path / "checkpoints", 3, tensors, {}, keep=1)
    (tmp_path / "args.json").write_text(json.dumps({"arch": "resnet18", "image_size": 32}))
    assert_same_weights(load_backbone(tmp_path)[0], query)
    assert_same_weights(load_backbone(tmp_path, encoder="key")[0], key)


def test_weights_of_an_unfinished_run_say_where_they_are_from(tmp_path):
    """Not the epochs that were planned; and no local folder is taken for a dataset on the Hub."""
    encoders = {name: build_encoder("resnet10").state_dict() for name in ("query_encoder", "key_encoder")}
    save_checkpoint(tmp_path / "run" / "checkpoints", 30, encoders, {"images": 650}, keep=1)
    settings = {"arch": "resnet10", "image_size": 32, "recipe": "v2", "epochs": 200, "batch_size": 64}
    (tmp_path / "run" / "args.json").write_text(json.dumps(settings | {"data": "data/photos", "data_commit": None}))
    convert(tmp_path / "run", tmp_path / "w.pth.tar", "moco")
    assert torch.load(tmp_path / "w.pth.tar", weights_only=True)["epoch"] == 3
    for encoder in ("query", "key"):
        convert(tmp_path / "run", tmp_path / encoder, "timm", encoder=encoder)
        card = (prepare_folder(tmp_path / encoder, "user/name") / "README.md").read_text()
        assert f"The weights are those of the {encoder} encoder after step 30 of 2000." in card
        assert "| data | photos |" in card and "datasets" not in card
    (tmp_path / "run" / "args.json").write_text('{"arch": "resnet10", "image_size": 32}')  # of a script of one's own
    assert load_backbone(tmp_path / "run")[1]["arch"] == "resnet10"


# ---- models of timm

TIMM = [("timm/vit_tiny_patch16_224", 3), ("timm/convnext_atto", 3), ("timm/convnext_atto", 6), ("resnet10", 6)]


@pytest.mark.parametrize("arch, channels", TIMM)
def test_models_of_timm_and_other_channels_load_back_everywhere(tmp_path, arch, channels, capsys):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    encoder = build_encoder(arch, image_size=32, channels=channels).eval()
    mean, std = [0.1] * channels, [0.3] * channels
    save_backbone(tmp_path / "saved", encoder, arch, 32, "moco_v2", {"arch": arch}, mean, std)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [channels, 32, 32] and config["num_features"] == encoder.width
    assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]) == (mean, std)
    convert(tmp_path / "saved", tmp_path / "converted", "timm")
    assert (tmp_path / "converted" / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()
    images = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        expected = encoder.backbone(images)
        for folder in (tmp_path / "saved", tmp_path / "converted"):
            backbone, known = load_backbone(folder)
            assert (known["arch"], known["channels"], known["image_size"]) == (arch, channels, 32)
            assert backbone.eval()(images).equal(expected)
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
        wrapped = transformers.AutoModel.from_pretrained(folder).eval()
        torch.testing.assert_close(wrapped(images).pooler_output.flatten(1), expected, rtol=0, atol=1e-5)
    assert "found" not in capsys.readouterr().out  # nothing to be told of a folder of ours


def test_a_model_of_timm_in_the_file_of_another_program(tmp_path):
    pytest.importorskip("timm")
    encoder = build_encoder("timm/vit_tiny_patch16_224", image_size=32)
    weights = under("encoder_q.", encoder.backbone.state_dict()) | {"encoder_q.head.weight": torch.ones(2, 2)}
    save_file(weights, tmp_path / "w.safetensors")
    arguments = {"arch": "timm/vit_tiny_patch16_224", "image_size": 32}
    assert_same_weights(load_backbone(tmp_path / "w.safetensors", **arguments)[0], encoder)
    assert "pos_embed is 1x5x192, not 1x197x192" in refusal(tmp_path / "w.safetensors", arch=arguments["arch"])
    line = refusal(tmp_path / "w.safetensors", arch="timm/vit_small_patch16_224", image_size=32)
    assert "does not fit --arch timm/vit_small_patch16_224" in line
    save_file(weights | {"encoder_q.blocks.12.norm1.weight": torch.ones(192)}, tmp_path / "w.safetensors")
    assert "unexpected blocks.12.norm1.weight" in refusal(tmp_path / "w.safetensors", **arguments)
    assert "needs --arch timm/NAME" in refusal(tmp_path / "w.safetensors")


def test_a_model_that_is_built_for_one_size_is_converted_at_that(tmp_path):
    timm = pytest.importorskip("timm")
    arch = "timm/vit_tiny_patch16_384"
    torch.save(timm.create_model("vit_tiny_patch16_384", num_classes=0).state_dict(), tmp_path / "v.pth")
    convert(tmp_path / "v.pth", tmp_path / "v", "timm", arch)
    backbone, known = load_backbone(tmp_path / "v")
    assert known["image_size"] == 384 and backbone.eval()(torch.zeros(1, 3, 384, 384)).shape == (1, 192)


@pytest.mark.parametrize("to, name", [("torchvision", "r.safetensors"), ("detectron2", "r.pth"), ("moco", "r.pth.tar")])
def test_a_model_of_timm_is_converted_to_timm_alone(tmp_path, to, name):
    pytest.importorskip("timm")
    encoder = build_encoder("timm/convnext_atto")
    save_backbone(tmp_path / "saved", encoder, "timm/convnext_atto", 32, "m", {})
    with pytest.raises(UserError, match=f"--to {to} is for ResNets .* is a timm/convnext_atto; use --to timm"):
        convert(tmp_path / "saved", tmp_path / name, to)


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


@pytest.mark.parametrize("text", [b"torch>=2.11", b"error code: 1010", b"rate limited", b"", b"<html>", b"\x80\x02."])
def test_a_file_of_no_weights_at_all(tmp_path, text):
    (tmp_path / "w.pth").write_bytes(text)
    assert "w.pth is not read" in refusal(tmp_path / "w.pth") or "no state dict" in refusal(tmp_path / "w.pth")


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
