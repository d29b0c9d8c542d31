"""A ViT and a ConvNeXt of timm through every script, as a user runs them. pytest -m slow tests/test_timm.py"""

import json
import shutil

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import torch
from conftest import assert_same_run, call_main, metrics_of, refusal
from hub import TOKEN, serving

import detect_transfer
from moco.backbone import load_backbone
from moco.data.shapes import CLASSES, draw_scene, encode_jpeg

TRAIN = """--image-size 32 --batch-size 16 --bn-batch 8 --queue-size 32 --dim 8 --epochs 2 --lr 0.01 --knn-every 1
--log-every 1 --checkpoint-every 3 --keep 9 --mixed-precision no""".split()
PROBE = "--epochs 1 --batch-size 16 --lr 1 --knn --workers 0 --mixed-precision no".split()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """40 training and 12 test images of two classes."""
    root = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 40), ("test", 12)):
        for index in range(count):
            folder = root / split / CLASSES[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index}.jpg").write_bytes(encode_jpeg(draw_scene(split, index)[0]))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["timm/test_vit", "timm/test_convnext"])
def test_a_model_of_timm_goes_the_whole_way(arch, labelled, tmp_path, monkeypatch, capsys):
    timm = pytest.importorskip("timm")
    run, flags = tmp_path / "run", ["--data", labelled, "--arch", arch, *TRAIN]
    call_main("train_moco.py", *flags, "--output", run, "--workers", 0)
    lines = metrics_of(run)
    assert len(lines) == 5 and [line["step"] for line in lines if "knn" in line] == [0, 2, 4]
    cut = tmp_path / "cut"
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("backbone", "step_4"))  # as if killed after step 3
    call_main("train_moco.py", *flags, "--output", cut, "--workers", 1, "--resume")
    assert_same_run(cut, run)

    call_main("linear_probe.py", "--backbone", run, "--data", labelled, *PROBE)
    results = json.loads((run / "linear_probe" / "results.json").read_text())
    assert results["arch"] == arch and results["validation_images"] == 12 and results["settings"]["image_size"] == 32

    table = tmp_path / "features.parquet"
    call_main("moco/backbone/__main__.py", "embed", run, "--data", labelled, table)
    backbone, known = load_backbone(run)
    embedded = torch.tensor(pq.read_table(table)["feature"].to_pylist())
    assert embedded.shape == (40, backbone.eval()(torch.zeros(1, 3, 32, 32)).shape[1]) and embedded.std(dim=0).min() > 0

    call_main("moco/backbone/__main__.py", "convert", run, tmp_path / "converted", "--to", "timm")
    images = torch.randn(2, 3, 32, 32)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path / "hub") as hub, torch.no_grad():
        hub.here(monkeypatch, TOKEN)
        call_main("moco/backbone/__main__.py", "push", run, "user/first")  # loaded back by timm before it is sent
        assert "linear probe, lr 1" in hub.files("models", "user/first")["README.md"].read_text()
        for name in ("hf-hub:user/first", f"local-dir:{tmp_path / 'converted'}"):
            model = timm.create_model(name, pretrained=True).eval()
            torch.testing.assert_close(model(images), backbone(images), rtol=0, atol=1e-5)

    capsys.readouterr()  # what was printed so far
    flags = ["--data", "shapes", "--backbone", run, "--output", tmp_path / "detection"]
    assert "detection needs a ResNet of torchvision" in refusal(detect_transfer, flags, monkeypatch, capsys)
