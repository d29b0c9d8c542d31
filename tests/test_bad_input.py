"""Mistakes of the user: one clear line on stderr that names value, limit and remedy, and exit code 2.

pytest tests/test_bad_input.py
"""

import errno
import functools
import json
import os
import shutil
import socket
import sys

import datasets
import pytest
from accelerate.tracking import get_available_trackers
from conftest import HANG, refusal, run_script, start_script
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

import linear_probe
import train_moco
from moco.data.shapes import draw_scene, encode_jpeg
from moco.encoder import build_encoder
from moco.errors import UserError, first_line, one_line_errors
from moco.run.checkpoint import complete_checkpoints
from moco.run.flags import lock

SMALL = "--arch resnet10 --image-size 32 --queue-size 40 --dim 16 --batch-size 8 --bn-batch 4 --mixed-precision no"

SMALL_PROBE = "--image-size 32 --epochs 1 --batch-size 8 --workers 0 --mixed-precision no"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Ten images without labels."""
    root = tmp_path_factory.mktemp("images")
    for index in range(10):
        (root / f"{index}.jpg").write_bytes(encode_jpeg(draw_scene("train", index)[0]))
    return root


@pytest.fixture(scope="session")
def finished_run(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    flags = SMALL.split() + ["--epochs", "1", "--workers", "0"]
    done = run_script("train_moco.py", "--data", folder, "--output", output, *flags)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def refuse(monkeypatch, capsys, tmp_path):
    """Call main() with flags that it must refuse; returns its one line."""

    def call(*flags, output=tmp_path / "run", script=train_moco):
        small = {train_moco: SMALL, linear_probe: SMALL_PROBE}[script].split()
        return refusal(script, ["--output", output, *small, *flags], monkeypatch, capsys)

    return call


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--recipe v3", "--recipe 'v3' v1-mlp v2"),
        ("--arch resnet19", "--arch resnet19 resnet18 resnext50_32x4d"),
        ("--batch-sise 8", "--batch-sise"),
        ("--lr fast", "--lr 'fast'"),
        ("--batch-size 10", "--batch-size 10 divisible --bn-batch 4 8 12"),
        ("--batch-size 2", "--batch-size 2 divisible 4"),
        ("--batch-size 0", "--batch-size 0 at least 1"),
        ("--bn-batch 0", "--bn-batch 0 at least 2"),
        ("--bn-batch 1", "--bn-batch 1 at least 2"),
        ("--queue-size 0", "--queue-size 0 at least 1"),
        ("--temperature 0", "--temperature 0.0 above 0"),
        ("--temperature nan", "--temperature nan above 0"),
        ("--temperature -0.2", "--temperature -0.2 above 0"),
        ("--encoder-momentum 1", "--encoder-momentum 1.0 below 1"),
        ("--encoder-momentum -0.1", "--encoder-momentum -0.1 at least 0"),
        ("--image-size 15", "--image-size 15 at least 16"),
        ("--epochs 0", "--epochs 0 at least 1"),
        ("--lr 0", "--lr 0.0 above 0"),
        ("--mixed-precision fp16", "--mixed-precision fp16 GPU bf16"),
        ("--recipe simclr --epochs 10", "--warmup-epochs 10 below the 10 epochs"),
        ("--workers -1", "--workers -1 0 or more"),
        ("--seed -1", "--seed -1 at least 0"),
        ("--seed 9223372036854775808", "--seed 9223372036854775808 below 2^63"),
        ("--lr inf", "--lr inf a number above 0 and at most 1e+09"),
        ("--lr 1e308", "--lr 1e+308 at most 1e+09"),
        ("--weight-decay nan", "--weight-decay nan a number from 0"),
        ("--queue-size 1000000000000", "--queue-size 1000000000000 --dim 16 would take 6.4e+04 GB"),
        ("--dim 100000000000", "--dim 100000000000 would take GB"),
    ],
)
def test_a_value_outside_its_limits(refuse, folder, tmp_path, flags, words):
    line = refuse("--data", folder, *flags.split())
    assert all(word in line for word in words.split()), line
    assert not (tmp_path / "run").exists()  # refused before anything is written


@pytest.mark.parametrize("flags", ["--image-size 1000000", "--workers 100000000"])
def test_views_that_memory_does_not_hold(refuse, folder, tmp_path, flags):
    """Only the data tells how many channels and bytes they have, so it is looked at first, but no run is begun."""
    line = refuse("--data", folder, *flags.split())
    assert flags in line and "would take" in line and "GB" in line
    assert not (tmp_path / "run" / "args.json").exists()


@pytest.mark.skipif("wandb" in map(str, get_available_trackers()), reason="needs an environment without wandb")
def test_a_tracker_that_is_not_installed(refuse, folder):
    assert "pip install wandb" in refuse("--data", folder, "--tracker", "wandb")


# ---- data


@pytest.mark.parametrize(
    "name", ["shape", "shapes/", "user/..", "../nowhere", "no/such/folder", "./nowhere", "/nowhere/at/all", "a b/c", ""]
)
def test_data_that_is_nowhere(refuse, name):
    line = refuse("--data", name)
    assert name in line and "neither 'shapes', nor a folder here" in line


def test_a_hub_name_while_the_hub_cannot_be_reached(refuse, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    line = refuse("--data", "someone/something")
    assert "someone/something" in line and "hf auth login" in line


def test_a_version_of_what_is_not_on_the_hub(refuse, folder):
    assert "--revision v1 names a version on the Hub, which" in refuse("--data", folder, "--revision", "v1")


@pytest.mark.parametrize("flag", ["--image-column", "--label-column"])
def test_a_column_that_is_not_there(refuse, folder, flag):
    line = refuse("--data", folder, flag, "picture")
    assert f"{flag} picture is not in" in line and "whose columns are image" in line


def test_an_empty_folder(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refuse("--data", tmp_path / "empty")


def test_a_folder_of_text(refuse, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image\n" * 20)
    line = refuse("--data", tmp_path / "text")
    assert "columns of images" in line and "--image-column" in line


def test_a_folder_whose_images_are_none(refuse, tmp_path):
    (tmp_path / "fake").mkdir()
    for index in range(10):
        (tmp_path / "fake" / f"{index}.jpg").write_text("no image")
    assert "none of the 10 images of --data" in refuse("--data", tmp_path / "fake")


def test_fewer_images_than_a_batch(refuse, folder):
    assert "has 10 images, fewer than a batch of 12" in refuse("--data", folder, "--batch-size", 12)


# ---- the run folder


def test_resume_from_nothing(refuse, folder, tmp_path):
    assert "no complete checkpoint in" in refuse("--data", folder, "--resume")


def test_an_output_that_holds_another_run(refuse, folder, finished_run):
    line = refuse("--data", folder, output=finished_run)
    assert str(finished_run) in line and "--resume" in line


@pytest.mark.parametrize("left", ["backbone/model.safetensors", "results.json"])
def test_an_output_that_holds_a_run_without_its_checkpoints(refuse, folder, tmp_path, left):
    (tmp_path / "run" / left).parent.mkdir(parents=True)
    (tmp_path / "run" / left).write_bytes(b"")
    assert "holds another run" in refuse("--data", folder)


def test_resume_from_another_recipe(refuse, folder, finished_run):
    line = refuse("--data", folder, "--recipe", "v1", "--resume", output=finished_run)
    assert "--recipe v1 cannot resume" in line and "--recipe v2" in line


def test_resume_on_other_data(refuse, folder, finished_run, tmp_path):
    shutil.copytree(folder, tmp_path / "more")
    shutil.copy(folder / "0.jpg", tmp_path / "more" / "10.jpg")
    shutil.copytree(finished_run, tmp_path / "run")
    line = refuse("--data", tmp_path / "more", "--epochs", 1, "--resume")
    assert "has 11 images" in line and "begun on 10" in line


@pytest.mark.parametrize("damage", ["truncate", "flip a bit"])
def test_resume_from_a_damaged_checkpoint(refuse, folder, finished_run, tmp_path, damage):
    shutil.copytree(finished_run, tmp_path / "run")
    checkpoint = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    file = checkpoint / "queue.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if damage == "flip a bit" else data[:-7])
    line = refuse("--data", folder, "--epochs", 1, "--resume")
    assert str(checkpoint) in line and "queue.safetensors" in line
    assert file.exists()  # nothing is thrown away


def test_an_output_without_a_name_or_in_the_data(refuse, folder, tmp_path):
    assert "--output '' must be the name of a folder" in refuse("--data", folder, output="")
    for output in (folder, folder / "runs", folder.parent):
        line = refuse("--data", folder, output=output)
        assert str(output) in line and "a run's pictures would become data" in line


def test_weights_to_start_from_that_do_not_fit(refuse, folder, finished_run, golden):
    official = golden / "checkpoint" / "fake_official_resnet18_v1.pth.tar"
    for flags, words in (
        (["--init", "nowhere.pth"], "nowhere.pth neither a folder or file here"),
        (["--init", official], "--arch resnet10"),
        (["--init", official, "--arch", "resnet18", "--stem", "small"], "--stem small not that of --init imagenet"),
        (["--init", finished_run, "--init-head", "--head", "fc"], "--head fc --dim 16 unexpected head.0.weight"),
        (["--init", finished_run / "backbone", "--init-head"], "--init-head has no head"),
        (["--init-head"], "--init SOURCE is missing"),
    ):
        line = refuse("--data", folder, *flags)
        assert all(word in line for word in words.split()), line


def test_two_runs_in_one_folder(refuse, folder, tmp_path):
    """The lock goes with the process that holds it, however it ends."""
    (tmp_path / "run").mkdir()
    code = "import signal, sys; from pathlib import Path; from moco.run.flags import lock; lock(Path(sys.argv[1]));"
    holder = start_script("-c", f"{code} print('locked', flush=True); signal.pause()", tmp_path / "run")
    assert holder.stdout.readline() == "locked\n"
    line = refuse("--data", folder)
    assert f"is used by process {holder.pid} on {socket.gethostname()}" in line and "name another folder" in line
    holder.kill()
    holder.wait()
    lock(tmp_path / "run")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": "warm"}, "args.json is damaged --temperature 'warm' restore it"),
        ({"epochs": None}, "args.json is damaged epochs is None); restore it"),
        ({"batch_size": [8]}, "args.json is damaged batch_size is [8])"),
        ({"no_streaming": "yes"}, "args.json is damaged yes"),
        ({"recipe": "v9"}, "args.json is damaged --recipe 'v9'"),
        ({"script": 3}, "holds a run of 3"),
        ({"arch": "resnet18"}, "does not fit the flags in args.json or the script's modules"),
        (None, "args.json is missing restore it, or start a new run"),
    ],
)
def test_resume_with_flags_that_somebody_edited(finished_run, tmp_path, monkeypatch, capsys, change, words):
    shutil.copytree(finished_run, tmp_path / "run")
    path = tmp_path / "run" / "args.json"
    path.unlink() if change is None else path.write_text(json.dumps(json.loads(path.read_text()) | change))
    line = refusal(train_moco, ["--output", tmp_path / "run", "--resume"], monkeypatch, capsys)
    assert all(word in line for word in words.split()), line


def test_resume_on_other_data_of_the_same_size(refuse, folder, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "moved" / "3.jpg").write_bytes(encode_jpeg(draw_scene("test", 3)[0]))
    line = refuse("--data", tmp_path / "moved", "--epochs", 1, "--resume")
    assert "is not the data that" in line and "names or sizes of its files" in line


def test_images_beside_parquet_files_and_files_of_other_columns(refuse, tmp_path, capsys):
    rows = datasets.Dataset.from_dict({"image": [encode_jpeg(draw_scene("train", 0)[0])] * 8})
    rows = rows.cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "data" / "train-0.parquet")
    (tmp_path / "data" / "0.png").write_bytes(b"")
    rows.add_column("name", ["a"] * 8).to_parquet(tmp_path / "data" / "train-1.parquet")
    line = refuse("--data", tmp_path / "data")
    assert "train-1.parquet has the columns" in line and "must be the same in all files" in line


def test_labels_beyond_any_number_of_classes(refuse_probe, tmp_path):
    rows = datasets.Dataset.from_dict({"image": [encode_jpeg(draw_scene("train", 0)[0])] * 8, "label": [2**62] * 8})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "data" / "train.parquet")
    flags = ["--backbone", "random", "--arch", "resnet10"]
    assert "1000000 classes are the most" in refuse_probe("--data", tmp_path / "data", *flags)


def test_a_full_disk_and_streams_that_nobody_reads(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "views.png")
    assert stopped.value.code == 2 and "views.png cannot be written (No space left" in capsys.readouterr().err
    read, write = os.pipe()
    os.close(read)
    for stream in (open(write, "w", buffering=1), None):
        monkeypatch.setattr(sys, "stdout", stream)
        with one_line_errors():
            print("nobody reads this\n" * 10_000, flush=True)
            print("nor this", flush=True)


def test_an_output_that_cannot_be_written(refuse, folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refuse("--data", folder, output=tmp_path / "file" / "run")
    assert str(tmp_path / "file") in line and "cannot be written" in line


def test_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    flags = ["--data", "some/one", "--output", tmp_path / "run", *SMALL.split()]
    done = run_script("train_moco.py", *flags, HF_HOME=str(tmp_path / "file" / "home"), HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "set HF_HOME to a folder that can" in done.stderr and "Traceback" not in done.stderr


def test_what_datasets_hides_is_said():
    try:
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from OSError(
            "the disk is on fire"
        )
    except datasets.exceptions.DatasetGenerationError as error:
        assert first_line(error) == "OSError: the disk is on fire"


def test_a_full_shared_memory(monkeypatch, capsys):
    """What PyTorch says in a worker, and when the system kills one."""
    for words in (
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
        " shared memory.",
    ):
        with pytest.raises(SystemExit) as stopped, one_line_errors():
            raise RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n{words}")
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and "/dev/shm" in line and "--workers" in line and line.count("\n") == 1


# ---- linear_probe.py


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Twelve training and four validation images of two classes."""
    root = tmp_path_factory.mktemp("labelled")
    for split, images in (("train", 12), ("val", 4)):
        for index in range(images):
            path = root / split / "ab"[index % 2] / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_jpeg(draw_scene(split, index)[0]))
    return root


@pytest.fixture
def refuse_probe(refuse):
    return functools.partial(refuse, script=linear_probe)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "--backbone is missing run folder"),
        ("--backbone random --arch resnet19", "--arch resnet19 resnet18"),
        ("--backbone random --lr 30 -1", "--lr -1.0 above 0"),
        ("--backbone random --lr 3 3", "--lr 3.0 3.0 twice"),
        ("--backbone random --epochs 0", "--epochs 0 at least 1"),
        ("--backbone random --knn 0", "--knn 0 at least 1"),
        ("--backbone random --knn-temperature 0", "--knn-temperature 0.0 above 0"),
        ("--backbone random --image-size 8", "--image-size 8 at least 16"),
        ("--backbone random --batch-size 0", "--batch-size 0 at least 1"),
        ("--backbone nowhere", "nowhere neither a folder or file USER/NAME"),
        ("--backbone random --encoder key", "--encoder key random run folder"),
        ("--backbone ResNet50_Weights.IMAGENET1K_V9", "ResNet50_Weights.IMAGENET1K_V9 torchvision's weights"),
        ("--backbone random --data shape", "--data shape neither"),
        ("--backbone random --data ./nowhere", "--data ./nowhere neither"),
        ("--backbone random --bacth-size 8", "--bacth-size"),
    ],
)
def test_the_probe_refuses_a_value_outside_its_limits(refuse_probe, labelled, tmp_path, flags, words):
    line = refuse_probe("--data", labelled, *flags.split())
    assert all(word in line for word in words.split()), line


def test_the_probe_needs_labels_and_enough_images(refuse_probe, folder, labelled):
    assert "has no labels" in refuse_probe("--backbone", "random", "--arch", "resnet10", "--data", folder)
    flags = ["--backbone", "random", "--arch", "resnet10", "--data", labelled]
    assert "has 12 images, fewer than a batch of 16" in refuse_probe(*flags, "--batch-size", 16)
    assert "--label-column name is not in" in refuse_probe(*flags, "--label-column", "name")


def test_the_probe_refuses_weights_that_are_no_fitting_backbone(refuse_probe, labelled, tmp_path):
    encoder = build_encoder("resnet10")
    weights = encoder.backbone.state_dict()
    save_file(encoder.head.state_dict(prefix="fc."), tmp_path / "h.safetensors")
    assert "holds no ResNet" in refuse_probe("--data", labelled, "--backbone", tmp_path / "h.safetensors")
    save_file(weights, tmp_path / "w.safetensors")
    line = refuse_probe("--data", labelled, "--backbone", tmp_path / "w.safetensors", "--arch", "resnet18")
    assert "does not fit --arch resnet18" in line and "missing layer1.1.bn1" in line
    (tmp_path / "t.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:5000])
    assert "truncated" in refuse_probe("--data", labelled, "--backbone", tmp_path / "t.safetensors")
    line = refuse_probe("--data", labelled, "--backbone", tmp_path / "w.safetensors", "--encoder", "key")
    assert "w.safetensors holds one" in line
    assert not (tmp_path / "run" / "args.json").exists()


def test_the_probe_goes_on_only_with_what_it_was_begun_on(refuse_probe, labelled, finished_run, tmp_path):
    assert "has no complete checkpoint" in refuse_probe("--backbone", "random", "--resume")
    assert "has no complete checkpoint" in refuse_probe("--backbone", "random", "--evaluate")
    line = refuse_probe("--resume", output=finished_run)
    assert "holds a run of train_moco.py; name the folder of a linear_probe.py run" in line
    weights = build_encoder("resnet10").backbone.state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    flags = ["--data", labelled, "--backbone", tmp_path / "w.safetensors"]
    output = tmp_path / "begun"
    done = run_script("linear_probe.py", "--output", output, *SMALL_PROBE.split(), *flags)
    assert done.returncode == 0, done.stderr
    assert "holds another run; add --resume" in refuse_probe(*flags, output=output)
    line = refuse_probe(*flags, "--lr", 3, "--resume", output=output)
    assert "--lr 3.0 cannot resume" in line and "--lr 30.0;" in line
    save_file(weights | {"conv1.weight": weights["conv1.weight"] + 1}, tmp_path / "w.safetensors")
    assert "has changed since" in refuse_probe(*flags, "--resume", output=output)


# ---- processes


def test_a_batch_that_two_processes_cannot_share(folder, tmp_path):
    flags = SMALL.split() + ["--batch-size", "12"]
    done = run_script("train_moco.py", "--data", folder, "--output", tmp_path / "run", *flags, processes=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1
    assert "12 is not divisible by 2 processes" in lines[0] and "use --batch-size 8 or 16" in lines[0]


def test_simclr_over_several_processes_needs_gpus(monkeypatch, folder):
    flags = ["--data", str(folder), "--recipe", "simclr", "--batch-size", "12"]
    monkeypatch.setattr(sys, "argv", ["train_moco.py", *flags])
    with pytest.raises(UserError, match="--bn-batch 12 over 2 processes needs SyncBatchNorm.*; use --bn-batch 6"):
        train_moco.check_args(train_moco.parse_args(), 2, "cpu")


class Failing(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError("the message")


def test_a_mistake_found_by_a_worker_is_one_line_on_any_process(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit), one_line_errors():
        next(iter(DataLoader(Failing(), num_workers=1)))
    assert capsys.readouterr().err == "error: the message\n"


@pytest.mark.parametrize("error, code", [("UserError", 2), ("RuntimeError", 1), ("KeyboardInterrupt", 130)])
def test_an_error_ends_the_process_though_workers_wait(error, code):
    """Workers pass over a SIGTERM, of which Python sends one at exit before it waits for them."""
    program = f"""
import itertools
from moco.data.batches import loader
from moco.errors import UserError, first_line, one_line_errors
from moco.run.flags import lock

with one_line_errors():
    batches = iter(loader(list(range(10_000)), itertools.cycle(range(10_000)), workers=1))
    next(batches)
    raise {error}("the message")
"""
    done = run_script("-c", program, timeout=HANG)
    assert done.returncode == code and ("the message" in done.stderr or "stopped by Ctrl-C" in done.stderr)


@pytest.mark.parametrize("alone", [False, True])
def test_a_mistake_is_printed_by_one_process_of_those_that_meet_it(capsys, monkeypatch, alone):
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("the message", alone=alone)
    assert capsys.readouterr().err == ("error: the message\n" if alone else "")


def test_help_is_grouped_and_readable_on_a_screen_and_a_half(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_moco.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        train_moco.parse_args()
    shown = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and len(shown) <= 66 and max(map(len, shown)) <= 120
    assert {"data:", "recipe:", "encoders and queue:", "optimisation:", "run:"} <= set(shown)
