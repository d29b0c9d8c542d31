"""train_moco.py as users run it: whole runs on one and two processes, killed, resumed, compared.

pytest tests/test_train.py
"""

import copy
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    HANG,
    ROOT,
    assert_same_run,
    final_state,
    is_time,
    metrics_of,
    run_script,
    start_script,
    wait_for_step,
)
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train_moco
from moco.augment import AUGMENTATIONS, MEAN, STD
from moco.data.load import load_splits
from moco.data.order import Order
from moco.data.shapes import CLASSES, draw_scene, encode_jpeg
from moco.data.views import FastViews
from moco.encoder import build_encoder
from moco.run.checkpoint import load_checkpoint, read_metrics
from moco.shuffle import shuffle_order

SPENT = ("data", "checkpoint", "knn", "picture")
SMALL = "--arch resnet10 --image-size 32 --queue-size 40 --dim 16 --mixed-precision no --log-every 1".split()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """75 of the built-in images in a folder a class."""
    root = tmp_path_factory.mktemp("data")
    for index in range(75):
        image, labels, _ = draw_scene("train", index)
        (root / CLASSES[labels[0]]).mkdir(exist_ok=True)
        (root / CLASSES[labels[0]] / f"{index}.jpg").write_bytes(encode_jpeg(image))
    return root


def train(folder, output, *flags, script=("train_moco.py",), **options):
    done = run_script(*script, "--data", folder, "--output", output, *SMALL, *flags, **options)
    assert done.returncode == 0, done.stderr
    return done


DOUBLE = ("tests/double.py", "train_moco.py")


@pytest.fixture
def double():
    """PyTorch's default precision is float64, as tests/double.py sets it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- the numbers of a run, in float64: in float32 they depend on the CPU after a few steps


def test_first_steps_are_algorithm_1_written_plainly(folder, tmp_path, double):
    """The script's losses beside the paper's pseudo-code: one encoder call a group, no library of ours in the step."""
    flags = ["--batch-size", 16, "--bn-batch", 8, "--epochs", 1, "--workers", 0, "--knn-every", 0]
    train(folder, tmp_path / "run", *flags, script=DOUBLE)
    logged = [line["loss"] for line in metrics_of(tmp_path / "run")]

    torch.manual_seed(0)
    f_q = build_encoder("resnet10", dim=16, head="mlp")
    f_k = copy.deepcopy(f_q)
    queue = F.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1).T  # CxK
    optimizer = torch.optim.SGD(f_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    images = load_splits(str(folder))[0]
    views, order = FastViews(AUGMENTATIONS["v2"], 32, MEAN, STD), Order(16, 0)
    batches = views.batches(images, order, 0)
    for step in range(4):
        x_q, x_k = views.on_device(next(batches)[0], order, step, "cpu")
        for p_q, p_k in zip(f_q.parameters(), f_k.parameters()):
            p_k.data = 0.999 * p_k.data + (1 - 0.999) * p_q.data
        idx = shuffle_order(0, step, 16)
        with torch.no_grad():
            k = F.normalize(torch.cat([f_k(x_k[idx[:8]]), f_k(x_k[idx[8:]])]), dim=1)[idx.argsort()]
        q = F.normalize(torch.cat([f_q(x_q[:8]), f_q(x_q[8:])]), dim=1)
        l_pos = torch.bmm(q.view(16, 1, 16), k.view(16, 16, 1)).squeeze(2)
        l_neg = torch.mm(q, queue)
        loss = F.cross_entropy(torch.cat([l_pos, l_neg], dim=1) / 0.2, torch.zeros(16, dtype=torch.long))
        assert logged[step] == pytest.approx(loss.item(), abs=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch.cat([queue, k.T], dim=1)[:, 16:]  # first in, first out
    assert len(logged) == 4


def test_one_and_two_processes_take_the_same_steps(folder, uninterrupted, tmp_path):
    """Same images in the same steps, so the same losses, kNN accuracies, queue and key encoder, for 8 steps.

    From the weights of another run, and one process goes on exactly where two were.
    """
    flags = ["--batch-size", 32, "--bn-batch", 16, "--micro-batch", 16, "--epochs", 4, "--knn-every", 2]
    flags += ["--init", uninterrupted, "--init-head", "--checkpoint-every", 4, "--keep", 9, "--workers"]
    done = train(folder, tmp_path / "one", *flags, 0, script=DOUBLE)
    assert "init    run (license unknown; backbone " in done.stdout
    begun = load_checkpoint(tmp_path / "one" / "checkpoints" / "step_0")[0]
    given = final_state(uninterrupted)[0]["query_encoder"]
    for name in ("query_encoder", "key_encoder"):
        assert all(value.equal(begun[name][key].to(value.dtype)) for key, value in given.items())
    train(folder, tmp_path / "two", *flags, 1, script=DOUBLE, processes=2)
    shutil.copytree(tmp_path / "two", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_8")
    train(folder, tmp_path / "cut", *flags, 0, "--resume", script=DOUBLE)
    one, two, cut = (metrics_of(tmp_path / name) for name in ("one", "two", "cut"))
    assert len(one) == len(two) == len(cut) == 9
    for line, *others in zip(one, two, cut):
        rare = {name: line.pop(name) for name in ("rank", "uniformity", "alignment") if name in line}
        for other in others:  # with BatchNorm's statistics after a step, which are estimates: see below
            found = {name: other.pop(name) for name in rare}
            assert found == pytest.approx(rare, rel=0.02 if line["step"] else 1e-5)
            assert line == pytest.approx(other, abs=1e-9)
    (tensors, _), (others, _) = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    torch.testing.assert_close(tensors["queue"]["keys"], others["queue"]["keys"], rtol=0, atol=1e-9)
    assert tensors["queue"]["cursor"].equal(others["queue"]["cursor"])
    for name, value in tensors["key_encoder"].items():
        if "running" in name:  # an estimate: one process updates it group by group, two processes average theirs
            torch.testing.assert_close(value, others["key_encoder"][name], rtol=0.05, atol=0.01)
        elif "num_batches" not in name:
            torch.testing.assert_close(value, others["key_encoder"][name], rtol=0, atol=1e-9)


def test_first_steps_of_simclr_are_its_algorithm_written_plainly(folder, tmp_path, double):
    flags = ["--recipe", "simclr", "--batch-size", 16, "--epochs", 1, "--warmup-epochs", 0, "--optimizer", "sgd"]
    train(folder, tmp_path / "run", *flags, "--workers", 0, "--knn-every", 0, script=DOUBLE)
    logged = metrics_of(tmp_path / "run")

    torch.manual_seed(0)
    f = build_encoder("resnet10", dim=16, head="mlp")
    optimizer = torch.optim.SGD(f.parameters(), lr=0.3 * 16 / 256, momentum=0.9, weight_decay=1e-6)
    images = load_splits(str(folder))[0]
    views, order = FastViews(AUGMENTATIONS["simclr"], 32, MEAN, STD), Order(16, 0)
    batches = views.batches(images, order, 0)
    for step, line in enumerate(logged):
        z = F.normalize(f(torch.cat(views.on_device(next(batches)[0], order, step, "cpu"))), dim=1)
        s = z @ z.T / 0.1
        losses = [torch.logsumexp(torch.cat([s[i, :i], s[i, i + 1 :]]), 0) - s[i, (i + 16) % 32] for i in range(32)]
        loss = torch.stack(losses).mean()
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.step()
    assert len(logged) == 4 and logged[0]["lr"] == pytest.approx(0.3 * 16 / 256)


def test_simclr_on_one_and_two_processes(folder, tmp_path):
    """The loss is over the global batch and its gradient whole, with two BatchNorm groups a process."""
    flags = ["--recipe", "simclr", "--batch-size", 32, "--bn-batch", 8, "--epochs", 3, "--warmup-epochs", 1]
    train(folder, tmp_path / "one", *flags, "--workers", 0, "--knn-every", 0, script=DOUBLE)
    train(folder, tmp_path / "two", *flags, "--workers", 0, "--knn-every", 0, script=DOUBLE, processes=2)
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert len(one) == len(two) == 6
    for line, other in zip(one, two):
        assert line == pytest.approx(other, abs=1e-9)
    (tensors, _), (others, _) = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert tensors.keys() == others.keys() == {"query_encoder", "optimizer"}
    for name, value in tensors["query_encoder"].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, others["query_encoder"][name], rtol=0, atol=1e-9)


def test_simclr_resumes_where_it_was(folder, tmp_path):
    flags = ["--recipe", "simclr", "--batch-size", 16, "--epochs", 2, "--warmup-epochs", 1, "--workers", 0]
    flags += ["--knn-every", 0, "--checkpoint-every", 3, "--keep", 9]
    train(folder, tmp_path / "run", *flags)
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{step}")
    train(folder, tmp_path / "cut", *flags, "--resume")
    assert_same_run(tmp_path / "cut", tmp_path / "run")


# ---- killed and resumed

RUN = [
    "--batch-size",
    "16",
    "--bn-batch",
    "8",
    "--epochs",
    "5",
    "--checkpoint-every",
    "3",
    "--log-every",
    "2",
    "--knn-every",
    "2",
]


@pytest.fixture(scope="session")
def uninterrupted(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(folder, output, *RUN, "--workers", 0)
    return output


def start(folder, output, *flags):
    return start_script("train_moco.py", "--data", folder, "--output", output, *SMALL, *flags)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twice_and_resumed_is_the_uninterrupted_run(folder, uninterrupted, tmp_path, workers):
    output = tmp_path / "run"
    steps = sorted(random.Random(workers).sample(range(4, 17), 2))
    for attempt, step in enumerate(steps):
        process = start(folder, output, *RUN, "--workers", workers, *(["--resume"] if attempt else []))
        wait_for_step(process, output, step)
        process.kill()
        process.wait()
    train(folder, output, *RUN, "--workers", workers, "--resume")
    assert_same_run(output, uninterrupted)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits(folder, uninterrupted, tmp_path, number, code):
    output = tmp_path / "run"
    flags = ["--data", folder, "--output", output, *SMALL, *RUN, "--workers", 1]
    done = run_script("tests/signalled.py", int(number), 4, "train_moco.py", *flags)
    assert done.returncode == code
    step = final_state(output)[1]["step"]
    assert 4 <= step <= 6 and f"stopped after step {step}" in done.stderr
    resumed = run_script("train_moco.py", "--output", output, "--resume")  # the flags are in the folder
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(output, uninterrupted)


def test_sigterm_to_every_process_leaves_the_workers_their_batch(folder, tmp_path):
    """As service managers and job schedulers send it."""
    output = tmp_path / "run"
    process = start(folder, output, *RUN, "--epochs", 500, "--workers", 1)
    wait_for_step(process, output, 4)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=HANG)
    assert process.returncode == 143 and f"stopped after step {final_state(output)[1]['step']}" in stderr


@pytest.mark.parametrize("target", ["the second process", "the launcher"])
def test_sigterm_to_two_processes_stops_both_at_the_same_step(folder, tmp_path, target):
    """The launcher passes it on to the process groups, where data workers must not end by it."""
    output = tmp_path / "run"
    flags = ["--data", folder, "--output", output, *SMALL, *RUN, "--epochs", "500", "--workers", "1"]
    launcher = start_script("train_moco.py", *flags, processes=2)
    wait_for_step(launcher, output, 4)
    stopped = launcher
    if target == "the second process":
        stopped = next(p for p in psutil.Process(launcher.pid).children() if p.environ()["RANK"] == "1")
    stopped.send_signal(signal.SIGTERM)
    _, stderr = launcher.communicate(timeout=HANG)
    step = final_state(output)[1]["step"]
    assert f"stopped after step {step}" in stderr
    if target == "the second process":
        assert stderr.count("exitcode  : 143") >= 1


def test_closed_streams_do_not_end_a_training(folder, uninterrupted, tmp_path):
    flags = ["--data", folder, "--output", tmp_path / "run", *SMALL, *RUN, "--workers", 0]
    command = shlex.join(map(str, [sys.executable, "train_moco.py", *flags]))
    done = subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], cwd=ROOT, timeout=HANG)
    assert done.returncode == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(folder, tmp_path):
    output = tmp_path / "run"
    done = run_script(
        "train_moco.py", "--data", folder, "--output", output, *SMALL, *RUN, "--workers", 0, "--lr", "1e9"
    )
    assert done.returncode == 1
    step = int(done.stderr.split("the loss is nan at step ")[1].split()[0])
    assert "on process 0: the run diverged; start again with a lower --lr" in done.stderr
    assert "Traceback" not in done.stderr
    tensors, state = final_state(output)
    assert state["step"] <= step and all(torch.isfinite(v).all() for v in tensors["query_encoder"].values())


# ---- what a run leaves


def test_the_backbone_is_torchvisions_without_its_head(uninterrupted):
    weights = load_file(uninterrupted / "backbone" / "model.safetensors")
    config = json.loads((uninterrupted / "backbone" / "config.json").read_text())
    resnet = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, **config["model_args"])
    resnet.fc = nn.Identity()
    resnet.load_state_dict(weights)  # strict
    assert config["architecture"] == "resnet18" and config["num_features"] == 512
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32] and config["pretrained_cfg"]["classifier"] == "fc"
    encoder = final_state(uninterrupted)[0]["query_encoder"]
    assert all(value.equal(encoder[f"backbone.{name}"]) for name, value in weights.items())


def test_a_compiled_run_is_saved_as_one_that_is_not(folder, tmp_path):
    """The backend runs the captured graph as it is, in which BatchNorm's groups are normalised at once."""
    runs = [tmp_path / "compiled", tmp_path / "plain"]
    for run, backend in zip(runs, ("eager", "no")):
        train(folder, run, *RUN, "--workers", 0, "--epochs", 1, script=DOUBLE, ACCELERATE_DYNAMO_BACKEND=backend)
    for line, expected in zip(*map(metrics_of, runs), strict=True):
        assert line == pytest.approx(expected, abs=1e-9)
    backbone, expected = (load_file(run / "backbone" / "model.safetensors") for run in runs)
    assert backbone.keys() == expected.keys()
    for key, weight in backbone.items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-9)


def test_the_run_folder_holds_the_flags_the_log_and_the_pictures(uninterrupted):
    args = json.loads((uninterrupted / "args.json").read_text())
    assert args["recipe"] == "v2" and args["temperature"] == 0.2 and args["processes"] == 1
    assert args["versions"]["torch"] == torch.__version__.split("+")[0]
    for name in ("views.png", "curves.png", "neighbours.png"):
        assert min(Image.open(uninterrupted / name).size) > 300
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, *range(2, 21, 2)]
    assert {"step", "epoch", "loss", "accuracy", "lr", "undecodable"} == {key for key in lines[1] if not is_time(key)}
    times = {key for line in lines for key in line if is_time(key)}
    assert times == {"images_per_second", "data_share"} | {f"{what}_seconds" for what in SPENT}
    for name in ("knn", "rank", "uniformity", "alignment"):
        assert [line["step"] for line in lines if name in line] == [0, 8, 16, 20]


def test_a_finished_run_that_is_resumed_draws_its_curves(folder, uninterrupted, tmp_path):
    """As one that a signal stopped in its last evaluation has not."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "curves.png").unlink()
    done = run_script("train_moco.py", "--data", folder, "--output", tmp_path / "run", "--resume")
    assert done.returncode == 0 and (tmp_path / "run" / "curves.png").exists(), done.stderr


def test_the_start_is_what_was_measured_before_the_first_step(capsys):
    lines = [{"step": 0, "knn": 20.0}, {"step": 1, "loss": 3.0}, {"step": 2, "knn": 50.0}]
    train_moco.print_knn(lines, "the random backbone")
    assert capsys.readouterr().out == "kNN accuracy 50.0 %\nof the random backbone at the start 20.0 %\n"
    train_moco.print_knn(lines[1:], "the random backbone")  # resumed with another --knn-every
    assert capsys.readouterr().out == "kNN accuracy 50.0 %\n"


def test_odd_images_without_labels_train_and_are_counted(tmp_path):
    """Gray, RGBA and a damaged file in a flat folder, a queue larger than the data, every process of the step."""
    (tmp_path / "flat").mkdir()
    for index in range(24):
        image = Image.fromarray(draw_scene("test", index)[0]).convert(("RGB", "L", "RGBA")[index % 3])
        image.save(tmp_path / "flat" / f"{index:02}.png")
    (tmp_path / "flat" / "05.png").write_bytes(b"damaged")
    flags = ["--batch-size", 8, "--bn-batch", 4, "--queue-size", 100, "--epochs", 2, "--workers", 1, "--recipe", "v1"]
    done = train(tmp_path / "flat", tmp_path / "run", *flags)
    assert "on training images; kNN off: no integer label column" in done.stdout and "--label-column" in done.stdout
    assert done.stderr.count("cannot decode") == 1 and "05.png" in done.stderr
    lines = metrics_of(tmp_path / "run")
    assert [line["undecodable"] for line in lines[1:]][2::3] == [1, 1]  # at the end of each epoch
    assert [line["step"] for line in lines if "rank" in line] == [0, 6] and "knn" not in lines[0]


def test_more_than_five_percent_undecodable_is_an_error(tmp_path):
    (tmp_path / "flat").mkdir()
    for index in range(16):
        data = b"damaged" if index in (3, 7) else encode_jpeg(draw_scene("test", index)[0])
        (tmp_path / "flat" / f"{index:02}.jpg").write_bytes(data)
    flags = ["--batch-size", 8, "--bn-batch", 4, "--epochs", 2, "--workers", 0]
    done = run_script("train_moco.py", "--data", tmp_path / "flat", "--output", tmp_path / "run", *SMALL, *flags)
    assert done.returncode == 2 and "of 16 images" in done.stderr and "Traceback" not in done.stderr


def test_state_that_differs_between_processes_is_found():
    """The check that guards each checkpoint; every other test on two processes passes it."""
    done = run_script("tests/unequal.py", processes=2)
    assert done.returncode != 0 and "queue differs between processes" in done.stderr
