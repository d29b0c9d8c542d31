"""detect_transfer.py as users run it: whole runs on one and two processes, stopped, resumed, compared; its mistakes.

pytest tests/test_detect_transfer.py
"""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, assert_same_run, final_state, metrics_of, refusal, run_script
from folders import edit_coco, write_coco, write_voc
from hub import TOKEN, serving
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from two_processes import seen

import detect_transfer
from moco.backbone import load_backbone, save_backbone
from moco.backbone.publish import prepare_folder
from moco.detection.detect import precise_statistics
from moco.detection.model import build_detector
from moco.encoder import build_encoder
from moco.errors import one_line_errors
from moco.run.launch import Stopped
from moco.schedule import warmup_step_rate

KEYS = ("AP", "AP50", "AP75")
SMALL = (
    "--backbone random --arch resnet10 --image-size 48 64 --anchor-sizes 16 32 --roi-batch 8 --batch-size 4"
    " --micro-batch 2 --iterations 6 --warmup 2 --lr 0.005 --mixed-precision no --log-every 1"
).split()


@pytest.fixture(scope="session")
def devkit(tmp_path_factory):
    """10 training images, 5 test images; of the former one cannot be decoded."""
    root = tmp_path_factory.mktemp("voc") / "VOCdevkit"
    write_voc(root, "2007", "trainval", 10)
    (root / "VOC2007" / "JPEGImages" / "2007_trainval_000003.jpg").write_bytes(b"damaged")
    write_voc(root, "2012", "trainval", 14)
    return write_voc(root, "2007", "test", 5)


def run_here(*command):
    """As `run_script`, in this process, which spares the imports."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        patch.setattr(sys, "argv", [str(part) for part in command])
        try:
            with one_line_errors():
                detect_transfer.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def transfer(data, output, *flags, processes=1):
    command = ["detect_transfer.py", "--data", data, "--output", output, *SMALL, *flags]
    done = run_here(*command) if processes == 1 else run_script(*command, processes=processes)
    assert done.returncode == 0, done.stderr
    return done


# ---- stopped and resumed


RUN = "--checkpoint-every 3 --evaluate-every 4".split()


@pytest.fixture(scope="session")
def uninterrupted(devkit, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    transfer(devkit, output, *RUN, "--workers", 0)
    return output


def test_sigterm_saves_and_exits_143_and_the_resumed_run_is_the_uninterrupted_one(devkit, uninterrupted, tmp_path):
    output = tmp_path / "run"
    flags = ["--data", devkit, "--output", output, *SMALL, *RUN, "--workers", 1]
    stopped = run_script("tests/signalled.py", int(signal.SIGTERM), 1, "detect_transfer.py", *flags)
    assert stopped.returncode == 143
    step = final_state(output)[1]["step"]
    assert 1 <= step < 6 and f"stopped after step {step}" in stopped.stderr
    resumed = run_script("detect_transfer.py", "--output", output, "--resume")  # the flags are in the folder
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(output, uninterrupted)
    results, expected = (json.loads((run / "results.json").read_text()) for run in (output, uninterrupted))
    assert results["voc2007"] == expected["voc2007"] and results["area"] == expected["area"]


def test_what_a_run_leaves(devkit, uninterrupted):
    lines = metrics_of(uninterrupted)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert [line["step"] for line in lines if "AP50" in line] == [4, 6]
    for line in lines[:-1]:
        assert line["lr"] == pytest.approx(warmup_step_rate(0.005, line["step"] - 1, (4, 6), 2))
        assert line["loss"] == pytest.approx(sum(value for name, value in line.items() if "loss_" in name))
    results = json.loads((uninterrupted / "results.json").read_text())
    assert results["metric"] == "VOC" and results["train_images"] == 24 and results["test_images"] == 5
    assert len(results["voc2007"]["per_class"]) == len(results["area"]["per_class"]) == 20
    assert results["AP50"] == results["voc2007"]["AP50"] == lines[-1]["AP50"]
    backbone = load_backbone("random", "resnet10")[0].state_dict()
    assert results["backbone_sha256"] == detect_transfer.weights_digest(backbone)
    args = json.loads((uninterrupted / "args.json").read_text())
    assert args["years"] == ["2007", "2012"] and args["processes"] == 1 and args["versions"]["torch"]
    for name in ("curves.png", "detections.png"):
        assert min(Image.open(uninterrupted / name).size) > 300


def test_evaluate_gives_the_results_again_and_publishes_them(uninterrupted, tmp_path, monkeypatch):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").unlink()
    with serving(tmp_path / "hub") as hub:
        hub.here(monkeypatch, TOKEN)
        done = run_here("detect_transfer.py", "--output", tmp_path / "run", "--evaluate", "--push-to-hub", "user/name")
        assert done.returncode == 0, done.stderr
        sent = hub.files("models", "user/name")
    after = json.loads((tmp_path / "run" / "results.json").read_text())
    assert after["voc2007"] == before["voc2007"] and after["iterations"] == 6
    assert metrics_of(tmp_path / "run") == metrics_of(uninterrupted)
    assert "curves.png" not in sent  # the backbone's own, which a random one has not
    assert_card(sent["README.md"].read_text(), after)


def assert_card(card, results):
    assert f"| VOC2007, 11 points | {results['AP']:.2f} | {results['AP50']:.2f} | {results['AP75']:.2f} |" in card
    measured = [result for result in ModelCard(card).data.eval_results if result.task_type == "object-detection"]
    assert [r.metric_value for r in measured if "11 points" in r.metric_name] == [results[k] for k in KEYS]
    assert str(ROOT) not in card and "/VOCdevkit" not in card


def test_the_card_of_the_backbones_own_run_has_them_too(uninterrupted, tmp_path):
    backbone = load_backbone("random", "resnet10")[0]
    save_backbone(tmp_path / "run" / "backbone", backbone, "resnet10", 32, "moco_v2", {"arch": "resnet10"})
    shutil.copytree(uninterrupted, tmp_path / "run" / "detection")
    card = (prepare_folder(tmp_path / "run", "user/name") / "README.md").read_text()
    assert_card(card, json.loads((uninterrupted / "results.json").read_text()))
    backbone.conv1.weight.data += 1
    save_backbone(tmp_path / "run" / "backbone", backbone, "resnet10", 32, "moco_v2", {"arch": "resnet10"})
    card = (prepare_folder(tmp_path / "run", "user/name") / "README.md").read_text()
    assert "Not evaluated." in card  # the numbers are of other weights


# ---- one process and two


def test_frozen_one_process_with_accumulation_takes_the_steps_of_two(devkit, tmp_path):
    """The same images and regions in the same iterations, so the same losses and weights."""
    flags = ["--bn", "frozen", "--iterations", 3, "--workers", 0]
    one = transfer(devkit, tmp_path / "one", *flags)
    two = transfer(devkit, tmp_path / "two", *flags, processes=2)
    assert "2 processes x 1 micro-batches x 2 images" in two.stdout and "1 processes x 2 micro" in one.stdout
    assert (one.stderr + two.stderr).count("cannot decode") == 2  # once a run
    for line, other in zip(metrics_of(tmp_path / "one")[:3], metrics_of(tmp_path / "two")[:3], strict=True):
        assert line == pytest.approx(other, abs=0, rel=1e-6)
    (tensors, _), (others, _) = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    for name, value in tensors["detector"].items():
        assert value.equal(others["detector"][name]), name
    start = load_backbone("random", "resnet10")[0]
    frozen = [name for name in start.state_dict() if "running" in name]
    for name in frozen:
        name, value = name.replace("layer4", "roi_heads.box_head.0"), start.state_dict()[name]
        assert value.equal(tensors["detector"][name if "roi" in name else f"backbone.{name}"])


@pytest.mark.slow
def test_two_processes_that_train_batchnorm_end_with_one_detector(devkit, tmp_path):
    """Each normalises its own images on CPUs; their statistics are averaged, so that all are equal in checkpoints."""
    transfer(devkit, tmp_path / "run", "--iterations", 3, "--checkpoint-every", 1, "--workers", 1, processes=2)
    tensors, state = final_state(tmp_path / "run")
    assert state["step"] == 3 and all(value.isfinite().all() for value in tensors["detector"].values())
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 2


def test_two_processes_count_each_of_an_uneven_number_of_images_once(tmp_path):
    """And PreciseBN is over the inputs of both, as a slow loop has it."""
    done = run_script("tests/two_processes.py", tmp_path / "process", processes=2)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"process{i}").read_text()) for i in (0, 1))
    one = json.loads(json.dumps(seen(Accelerator(cpu=True))))
    assert first["predictions"] == second["predictions"] == one["predictions"]
    assert len(one["predictions"]) == 5 and one["predictions"][3]["boxes"] == []
    assert sum(len(image["boxes"]) for image in one["predictions"]) > 4
    assert [name for name, _ in first["undecodable"] + second["undecodable"]] == ["3"]
    for key in ("mean", "var"):
        assert first[key] == second[key] == pytest.approx(one[key], abs=1e-6)


def test_precise_statistics_are_those_of_a_slow_loop():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=0.3)).double()
    batches = [torch.randn(n, 3, 6, 7).double() * n for n in (1, 4, 2)]
    precise_statistics(network.train(), (network(x) for x in batches), Accelerator(cpu=True))
    assert [network[i].momentum for i in (1, 3)] == [0.1, 0.3] and not network[1]._forward_pre_hooks
    inputs = {1: [], 3: []}
    with torch.no_grad():
        for x in batches:
            x = network[0](x)
            inputs[1].append(x)
            mean, var = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), correction=0, keepdim=True)
            inputs[3].append(((x - mean) / (var + 1e-5).sqrt()).relu())
    for i, parts in inputs.items():
        values = [[v for x in parts for image in x for v in image[c].flatten().tolist()] for c in range(4)]
        for c, channel in enumerate(values):
            mean = sum(channel) / len(channel)
            var = sum((v - mean) ** 2 for v in channel) / len(channel)
            assert network[i].running_mean[c].item() == pytest.approx(mean, abs=1e-9)
            assert network[i].running_var[c].item() == pytest.approx(var, rel=1e-9)


def test_precise_statistics_that_a_signal_interrupts_are_as_before():
    """Otherwise each of several processes would save its own, and none would."""
    network = nn.Sequential(nn.BatchNorm2d(4))
    before = {key: value.clone() for key, value in network.state_dict().items() if "running" in key}

    def passes():
        yield network(torch.randn(8, 4, 5, 5))
        raise Stopped(15)

    with pytest.raises(Stopped):
        precise_statistics(network.train(), passes(), Accelerator(cpu=True))
    assert all(network.state_dict()[key].equal(value) for key, value in before.items())


# ---- COCO, the optimizer, the defaults


def test_a_coco_folder_trains_masks_and_measures_both(tmp_path):
    write_coco(tmp_path / "coco", "val2017", 3)
    write_coco(tmp_path / "coco", "train2017", 6)
    done = transfer(tmp_path / "coco", tmp_path / "run", "--iterations", 2, "--workers", 0)
    assert "Mask R-CNN C4" in done.stdout and "1 crowds" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metric"] == "COCO" and results["settings"]["schedule"] == "2x"
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class"} == set(results["box"]) == set(results["mask"])
    assert metrics_of(tmp_path / "run")[0]["loss_mask"] > 0
    assert min(Image.open(tmp_path / "run" / "detections.png").size) > 300


def test_a_coco_folder_of_one_class_without_masks_trains_a_faster_rcnn(tmp_path):
    def strip(content):
        content["categories"] = content["categories"][:1]
        for annotation in content["annotations"]:
            annotation["category_id"] = 3
            del annotation["segmentation"], annotation["area"]

    for split, count in (("val2017", 3), ("train2017", 6)):
        edit_coco(write_coco(tmp_path / "coco", split, count), split, strip)
    done = transfer(tmp_path / "coco", tmp_path / "run", "--iterations", 2, "--workers", 0)
    assert "Faster R-CNN C4" in done.stdout and "1 classes" in done.stdout
    assert "test objects without an area" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metric"] == "COCO" and results["box"]["AP"] >= 0 and "mask" not in results
    assert list(results["box"]["per_class"]) == ["class 1"]
    assert "loss_mask" not in metrics_of(tmp_path / "run")[0]


def test_cudnn_does_not_try_its_kernels_on_each_of_many_image_sizes(devkit, tmp_path):
    benchmarked = []

    def note(module, inputs):
        benchmarked.append(torch.backends.cudnn.benchmark)

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    transfer(devkit, tmp_path / "run", "--iterations", 2, "--workers", 0)
    hook.remove()
    assert benchmarked and not any(benchmarked)


@pytest.mark.parametrize("name, masks", [("voc", False), ("coco", True)])
def test_golden_parameter_groups(golden, name, masks):
    numbers = json.loads((golden / "detection" / "schedule_resize.json").read_text())
    detector = build_detector(build_encoder("resnet50").backbone, 20, masks)
    optimizer = torch.optim.SGD(detect_transfer.parameter_groups(detector), 0.02, **detect_transfer.SGD)
    groups = [{key: group[key] for key in ("weight_decay", "momentum", "lr")} for group in optimizer.param_groups]
    counts = [len(group["params"]) for group in optimizer.param_groups]
    expected = numbers[f"optimizer_groups_{name}"]
    assert counts == [group["n_params"] for group in expected]
    assert groups == [{key: group[key] for key in ("weight_decay", "momentum", "lr")} for group in expected]


@pytest.mark.parametrize(
    "data, schedule, iterations, warmup, sizes",
    [
        ("voc", None, 24_000, 100, (480, 800)),
        ("coco", None, 180_000, 1000, (640, 800)),
        ("coco", "1x", 90_000, 1000, (640, 800)),
    ],
)
def test_defaults_are_the_references(monkeypatch, tmp_path, data, schedule, iterations, warmup, sizes):
    if data == "coco":
        (tmp_path / "annotations").mkdir()
    flags = ["--data", str(tmp_path), "--backbone", "random", *(["--schedule", schedule] if schedule else [])]
    monkeypatch.setattr(sys, "argv", ["detect_transfer.py", *flags])
    args = detect_transfer.parse_args()
    assert (args.iterations, args.warmup, args.image_size[0], args.image_size[-1]) == (iterations, warmup, *sizes)
    assert (args.batch_size, args.micro_batch, args.lr, args.roi_batch, args.bn) == (16, 2, 0.02, 512, "sync")
    assert tuple(args.anchor_sizes) == (32, 64, 128, 256, 512) and args.arch == "resnet50"


# ---- mistakes


@pytest.fixture
def refuse(monkeypatch, capsys, tmp_path):
    """Call main() with flags that it must refuse; returns its one line."""

    def call(*flags, output=tmp_path / "run"):
        return refusal(detect_transfer, ["--output", output, *SMALL, *flags], monkeypatch, capsys)

    return call


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--batch-size 5", "--batch-size 5 divisible --micro-batch 4 6"),
        ("--micro-batch 0", "--micro-batch 0 at least 1"),
        ("--image-size 16 48", "--image-size 16 at least 32"),
        ("--anchor-sizes 0", "--anchor-sizes 0 at least 1"),
        ("--roi-batch 2", "--roi-batch 2 at least 4"),
        ("--iterations 0", "--iterations 0 at least 1"),
        ("--warmup -1", "--warmup -1 0 or more"),
        ("--lr nan", "--lr nan above 0"),
        ("--bn none", "--bn 'none' sync frozen"),
        ("--masks yes", "--masks 'yes' auto on off"),
        ("--masks on", "--masks on COCO"),
        ("--schedule 1x", "--schedule 1x COCO --iterations"),
        ("--arch vit_b_16", "--arch vit_b_16 resnet18"),
        ("--evaluate-every -1", "--evaluate-every -1 0"),
        ("--seed -1", "--seed -1 at least 0"),
        ("--learning-rate 1", "--learning-rate"),
    ],
)
def test_a_value_outside_its_limits(refuse, devkit, tmp_path, flags, words):
    line = refuse("--data", devkit, *flags.split())
    assert all(word in line for word in words.split()), line
    assert not (tmp_path / "run").exists()


def test_no_data_and_no_backbone(refuse, monkeypatch):
    assert "--data is missing" in refuse()
    monkeypatch.setitem(globals(), "SMALL", [])
    assert "--backbone is missing" in refuse("--data", "shapes")


def test_data_that_is_nowhere_or_too_small(refuse, devkit, tmp_path):
    assert "neither" in refuse("--data", tmp_path / "nowhere")
    assert "--years" in refuse("--data", devkit, "--years", "2008")
    line = refuse("--data", devkit, "--batch-size", 26)
    assert "has 24 images, fewer than a batch of 26" in line


def test_a_backbone_that_is_no_resnet(refuse, devkit, tmp_path):
    save_file({"patch_embed.proj.weight": torch.zeros(3, 3)}, tmp_path / "vit.safetensors")
    assert "holds no ResNet" in refuse("--data", devkit, "--backbone", tmp_path / "vit.safetensors")
    assert "neither a folder or file" in refuse("--data", devkit, "--backbone", "nothing.here")
    weights = load_backbone("random", "resnet10")[0].state_dict()
    weights.pop("layer4.0.conv2.weight")
    save_file(weights, tmp_path / "part.safetensors")
    assert "missing layer4.0.conv2.weight" in refuse("--data", devkit, "--backbone", tmp_path / "part.safetensors")


def test_coco_without_pycocotools(refuse, monkeypatch, tmp_path):
    write_coco(tmp_path / "coco", "train2017", 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install pycocotools" in refuse("--data", tmp_path / "coco")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_holds_another_run_or_none(refuse, devkit, uninterrupted, tmp_path):
    assert "holds another run" in refuse("--data", devkit, output=uninterrupted)
    assert "no complete checkpoint" in refuse("--data", devkit, "--resume")
    line = refuse("--data", devkit, "--resume", "--bn", "frozen", output=uninterrupted)
    assert "--bn frozen cannot resume" in line


def test_more_than_five_percent_undecodable_is_an_error(tmp_path):
    devkit = write_voc(tmp_path / "VOCdevkit", "2007", "trainval", 6)
    write_voc(devkit, "2007", "test", 2)
    (devkit / "VOC2007" / "JPEGImages" / "2007_trainval_000001.jpg").write_bytes(b"damaged")
    command = ["detect_transfer.py", "--data", devkit, "--years", 2007, "--output", tmp_path / "run", *SMALL]
    done = run_here(*command, "--workers", 0)
    assert done.returncode == 2 and "1 of 6 images" in done.stderr and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(devkit, tmp_path):
    command = ["detect_transfer.py", "--data", devkit, "--output", tmp_path / "run", *SMALL, "--workers", 0]
    done = run_here(*command, "--lr", "1e9", "--warmup", 0)
    assert done.returncode == 1 and "the loss is nan at step" in done.stderr and "Traceback" not in done.stderr
    tensors, _ = final_state(tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in tensors["detector"].values())


def test_help_is_grouped_and_readable_on_a_screen_and_a_half(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detect_transfer.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        detect_transfer.parse_args()
    shown = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and len(shown) <= 60 and max(map(len, shown)) <= 120
    assert {"backbone:", "data:", "detector:", "optimisation:", "run:"} <= set(shown)
