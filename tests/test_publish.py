"""Backbones to and from the Hub, spoken by a server on loopback: the push, the card, loading back, refusals.

pytest tests/test_publish.py
"""

import contextlib
import json
import os
import shutil
import sys

import huggingface_hub
import pytest
import torch
from conftest import run_script
from hub import TOKEN, serving
from safetensors.torch import load_file

from moco.backbone import load_backbone, save_backbone
from moco.backbone.publish import prepare_folder, push_backbone
from moco.encoder import build_encoder
from moco.errors import UserError
from moco.run.checkpoint import weights_digest
from moco.run.flags import check_push

SETTINGS = {
    "recipe": "v2", "arch": "resnet10", "data": "shapes", "lr": 0.03, "versions": {"torch": "2.99"},
    "output": "/private/run", "cache": "/private/cache",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a backbone, curves and what must never be published."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(2)
    save_backbone(folder / "backbone", build_encoder("resnet10"), "resnet10", 32, "moco_v2", SETTINGS)
    (folder / "curves.png").write_bytes(b"\x89PNG")
    (folder / "backbone" / "notes.pth").write_bytes(b"a pickle that somebody left here")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server without repositories; this process is logged in and keeps what it downloads in tmp_path."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path / "hub") as hub:
        hub.here(monkeypatch, TOKEN)
        yield hub


def front_matter(text):
    return huggingface_hub.ModelCard(text).data


def test_a_push_sends_the_backbone_and_its_card_and_nothing_else(run, hub, capfd):
    address = push_backbone(run, "user/first", private=True)
    assert address == f"{hub.url}/user/first" and hub.created["user/first"] == "private"
    sent = hub.files("models", "user/first")
    assert set(sent) == {"model.safetensors", "config.json", "README.md", "curves.png"}
    for name in ("model.safetensors", "config.json"):
        assert sent[name].read_bytes() == (run / "backbone" / name).read_bytes()
    card = sent["README.md"].read_text()
    front = front_matter(card)
    assert (front.library_name, front.pipeline_tag, front.license) == ("timm", "image-feature-extraction", None)
    assert {"timm", "transformers", "moco"} <= set(front.tags)
    assert "Not evaluated." in card and "| lr | 0.03 |" in card and "![loss" in card
    assert 'timm.create_model("hf-hub:user/first", pretrained=True)' in card
    output = capfd.readouterr()
    published = card, sent["config.json"].read_text()
    assert not any(TOKEN in text for text in (output.out, output.err, *published))
    assert not any("/private/" in text for text in published)
    push_backbone(run, "user/first")  # again, into a repository that is there
    push_backbone(run, "user/public", license="apache-2.0")
    assert front_matter(hub.files("models", "user/public")["README.md"].read_text()).license == "apache-2.0"
    with pytest.raises(UserError, match="there already, and public"):
        push_backbone(run, "user/public", private=True)


def test_what_was_pushed_loads_back_in_every_library(run, hub, monkeypatch):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    push_backbone(run, "user/first")
    weights = load_file(run / "backbone" / "model.safetensors")
    for source in ("user/first", "hf-hub:user/first"):
        backbone = load_backbone(source)[0].eval()
        assert all(value.equal(weights[key]) for key, value in backbone.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = backbone(images)
        model = timm.create_model("hf-hub:user/first", pretrained=True).eval()
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
        wrapped = transformers.AutoModel.from_pretrained("user/first").eval()
        torch.testing.assert_close(wrapped(images).pooler_output.flatten(1), expected, rtol=0, atol=1e-5)
        assert timm.create_model("hf-hub:user/first", pretrained=True, num_classes=10)(images).shape == (2, 10)


def test_the_cards_code_for_torchvision_runs(run, hub):
    push_backbone(run, "user/first")
    card = hub.files("models", "user/first")["README.md"].read_text()
    code = card.split("torchvision:\n\n```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)  # it loads strictly
    assert names["model"](torch.zeros(2, 3, 32, 32)).shape == (2, 512)


def test_results_come_into_the_card_only_for_the_weights_they_were_measured_on(run, tmp_path, hub):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "linear_probe").mkdir()
    digest = weights_digest(load_file(copy / "backbone" / "model.safetensors"))
    results = {
        "data": "some/images", "data_on_hub": True, "classes": 10, "validation_images": 23, "held_out_images": 7,
        "approximate": False,
        "classifiers": [{}, {}], "lr": 3.0, "top1": 81.25, "top5": 99.5, "knn": {"200": {"top1": 70.5, "top5": 98.0}},
    }  # fmt: skip
    for measured_on, shown in ((digest, True), ("0" * 64, False)):
        (copy / "linear_probe" / "results.json").write_text(json.dumps(results | {"backbone_sha256": measured_on}))
        push_backbone(copy, "user/second")
        card = hub.files("models", "user/second")["README.md"].read_text()
        assert ("| linear probe, lr 3 | 81.25 | 99.50 |" in card) == shown
        assert ("Not evaluated." in card) != shown
        assert ([r.metric_value for r in front_matter(card).eval_results or []] == [81.25, 70.5]) == shown


def test_the_card_of_imported_weights_does_not_claim_their_training(tmp_path, hub):
    save_backbone(tmp_path / "timm", build_encoder("resnet10"), "resnet10", 224, "moco", {"arch": "resnet10"})
    push_backbone(tmp_path / "timm", "user/imported")
    card = hub.files("models", "user/imported")["README.md"].read_text()
    assert "how they were trained is not recorded" in card


def test_a_recipe_that_is_added_to_the_script_is_named_on_the_card(tmp_path, hub):
    save_backbone(
        tmp_path / "b", build_encoder("resnet10"), "resnet10", 32, "m", {"arch": "resnet10", "recipe": "mine"}
    )
    push_backbone(tmp_path / "b", "user/mine")
    assert "recipe mine of train_moco.py" in hub.files("models", "user/mine")["README.md"].read_text()


# ---- loaded back before anything is sent


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= changes.pop("pretrained_cfg", {})
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("arch", ["resnet10", "timm/vit_tiny_patch16_224"])
def test_what_timm_would_load_otherwise_is_not_sent(tmp_path, hub, arch):
    pytest.importorskip("timm")
    encoder = build_encoder(arch, image_size=32)
    settings = {"arch": arch}
    save_backbone(tmp_path / "b", encoder, arch, 32, "moco", settings)
    push_backbone(tmp_path / "b", "user/good")
    damage = {
        "resnet10": {"model_args": {"layers": [1, 1, 1, 1], "act_layer": "silu"}},  # loads, and computes something else
        "timm/vit_tiny_patch16_224": {"model_args": {"img_size": 32, "act_layer": "relu"}},
    }
    edit_config(tmp_path / "b", **damage[arch])
    assert "its features of the same images differ; nothing was sent" in refusal(
        push_backbone, tmp_path / "b", "user/b"
    )
    edit_config(tmp_path / "b", architecture="resnet19")
    assert "timm does not load" in refusal(push_backbone, tmp_path / "b", "user/b")
    edit_config(tmp_path / "b", architecture="resnet18", num_features=7)
    assert "not of width 7" in refusal(push_backbone, tmp_path / "b", "user/b")
    assert "user/b" not in hub.created


def test_without_timm_the_line_says_who_loaded_it_back(run, hub, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    push_backbone(run, "user/first")
    assert "loads back by load_backbone; timm, which its card names, is not installed" in capsys.readouterr().out


def test_a_small_stem_is_known_by_its_weights(tmp_path, hub):
    """Imported weights come without settings, and the card would name libraries that do not load them."""
    save_backbone(tmp_path / "b", build_encoder("resnet10", stem="small"), "resnet10", 32, "moco", {"arch": "resnet10"})
    push_backbone(tmp_path / "b", "user/small")
    assert "timm.create_model" not in hub.files("models", "user/small")["README.md"].read_text()


# ---- what the Hub refuses


def refusal(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)
    return str(error.value)


def test_a_push_that_is_refused_can_be_repeated(run, hub, monkeypatch):
    line = refusal(push_backbone, run, "somebody-else/first")
    assert "the Hub does not take somebody-else/first" in line and f"moco.backbone push {run}" in line
    assert "cannot be pushed to" in refusal(push_backbone, run, "not a name")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert "hf auth login" in refusal(push_backbone, run, "user/first")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with contextlib.suppress(OSError):
        (run / "backbone" / "README.md").unlink()
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")  # nothing listens there
        offline.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "the Hub cannot be reached" in refusal(push_backbone, run, "user/first")
    assert (run / "backbone" / "README.md").exists()  # written before anything was sent
    push_backbone(run, "user/first")
    assert "model.safetensors" in hub.files("models", "user/first")


def test_a_push_that_could_not_succeed_is_refused_before_the_run(hub, monkeypatch):
    check_push("user/first")
    assert "name USER/NAME" in refusal(check_push, "not a name")
    assert "name USER/NAME" in refusal(check_push, "first")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert "hf auth login" in refusal(check_push, "user/first")


def test_a_run_without_a_backbone_cannot_be_pushed(tmp_path):
    assert "has no backbone to push" in refusal(push_backbone, tmp_path, "user/first")


def test_a_backbone_that_is_not_to_be_had_from_the_hub(run, hub, monkeypatch):
    push_backbone(run, "user/first")
    assert "check the name" in refusal(load_backbone, "user/absent")
    hub.gated.add("user/first")
    assert "accept its terms" in refusal(load_backbone, "user/first")
    hub.gated.clear()
    hub.private.add("user/first")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert "hf auth login" in refusal(load_backbone, "user/first")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.files("models", "user/first")["model.safetensors"].unlink()
    assert "no model.safetensors" in refusal(load_backbone, "user/first")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "the Hub cannot be reached" in refusal(load_backbone, "user/first")


# ---- the whole way


@pytest.mark.slow
def test_from_pretraining_to_the_hub_and_back(tmp_path):
    """The built-in data, each script as users run it, with few steps; EXPERIMENTS.md has the figures of whole runs."""
    run = tmp_path / "run"
    with serving(tmp_path / "hub") as hub:
        there = hub.environment | {"HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(tmp_path / "cache")}

        def step(*command):
            done = run_script(*command, **there)
            assert done.returncode == 0, done.stderr
            assert TOKEN not in done.stdout + done.stderr
            return done.stdout

        short = ["--data", "shapes", "--mixed-precision", "no", "--workers", 0]
        step("train_moco.py", *short, "--epochs", 1, "--knn-every", 0, "--output", run)
        probe = ["linear_probe.py", *short, "--epochs", 1, "--cached-features"]
        step(*probe, "--backbone", run, "--push-to-hub", "user/probed")
        said = step("-m", "moco.backbone", "push", run, "user/first", "--private")
        assert said.strip() == f"{hub.url}/user/first"
        results = json.loads((run / "linear_probe" / "results.json").read_text())
        for name in ("user/first", "user/probed"):
            sent = hub.files("models", name)
            assert set(sent) == {"model.safetensors", "config.json", "README.md", "curves.png"}
            assert f"| {results['top1']:.2f} | {results['top5']:.2f} |" in sent["README.md"].read_text()
        step(*probe, "--backbone", "user/first", "--output", tmp_path / "back")
        again = json.loads((tmp_path / "back" / "results.json").read_text())
        assert again["backbone_sha256"] == results["backbone_sha256"] and again["top1"] == results["top1"]
        step("-m", "moco.backbone", "convert", "user/first", tmp_path / "r.pth", "--to", "detectron2")
        assert os.path.getsize(tmp_path / "r.pth") > 1e7


@pytest.mark.parametrize("arch, channels", [("resnet10", 6), ("timm/vit_tiny_patch16_224", 3)])
def test_the_card_shows_torchvision_only_what_it_can_build(tmp_path, arch, channels):
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    encoder = build_encoder(arch, image_size=32, channels=channels)
    statistics = [0.5] * channels, [0.2] * channels
    save_backbone(tmp_path / "b", encoder, arch, 32, "m", {"arch": arch, "recipe": "v2"}, *statistics)
    prepare_folder(tmp_path / "b", "user/name")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "timm:" in card and ("torchvision:" in card) == (arch == "resnet10")
    if arch == "resnet10":
        code = card.split("torchvision:\n\n```python\n")[1].split("```")[0]
        lines = [line for line in code.splitlines() if "hf_hub_download" not in line]
        names = {"weights": load_file(tmp_path / "b" / "model.safetensors")}
        exec("\n".join(lines), names)  # it loads strictly
        assert names["model"](torch.zeros(2, 6, 32, 32)).shape == (2, 512)
