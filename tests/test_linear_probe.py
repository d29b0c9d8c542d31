"""linear_probe.py: against the reference's numbers, and as users run it. pytest tests/test_linear_probe.py"""

import json
import random
import shutil
import signal

import datasets
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import HANG, ROOT, call_main, run_script, start_script, wait_for_step, write_parquet
from safetensors.torch import load_file
from torch import nn
from trajectory import tiny_resnet

from linear_probe import LinearClassifiers, build_optimizer, count_correct, probe_step
from moco.augment import MEAN, STD
from moco.backbone.features import Features
from moco.data.labels import count_classes
from moco.data.load import load_splits
from moco.data.shapes import CLASSES, draw_scene, encode_jpeg
from moco.encoder import build_encoder
from moco.errors import UserError
from moco.knn import knn_evaluate, knn_predict
from moco.run.checkpoint import complete_checkpoints, read_metrics
from moco.schedule import learning_rate

SMALL = "--backbone random --arch resnet10 --image-size 32 --epochs 5 --batch-size 16 --mixed-precision no --workers 0"


@pytest.mark.parametrize("dtype, precision", [(torch.float64, "f64"), (torch.float32, "f32")])
def test_golden_linear_probe(golden, dtype, precision):
    """Logits, losses, accuracies, learning rates and classifier of each step, then the validation images.

    In float32 of the first step alone: what follows depends on the CPU.
    """
    config = json.loads((golden / "linprobe" / "linprobe.json").read_text())["config"]
    data = load_file(golden / "linprobe" / "linprobe.safetensors")
    encoder = tiny_resnet(config["width"], config["layers"], config["classes"], mlp=False)
    encoder.load_state_dict({key.removeprefix("init."): v for key, v in data.items() if key.startswith("init.")})
    classifiers = LinearClassifiers(8 * config["width"], config["classes"], 1, seed=0)
    classifiers.heads[0].load_state_dict(encoder.fc.state_dict())
    encoder.fc = nn.Identity()
    encoder, classifiers = encoder.eval().to(dtype), classifiers.to(dtype)
    optimizer = build_optimizer(classifiers, [config["lr"]], config["momentum"], 0)
    exact = precision == "f64"

    def close(actual, name, f32_atol):
        expected = data[f"{precision}.{name}"]
        torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=1e-10 if exact else f32_atol)

    for step, epoch in enumerate(config["epochs_per_step"][: None if exact else 1]):
        lr = learning_rate(config["lr"], epoch, config.get("epochs", 100), "step", config["schedule"])
        assert lr == pytest.approx(data[f"{precision}.step{step}.lr"].item(), rel=1e-12)
        optimizer.param_groups[0]["lr"] = lr
        labels = data[f"step{step}.labels"]
        with torch.no_grad():
            features = encoder(data[f"step{step}.images"].to(dtype) / 32)
            logits = classifiers(features)
        losses, accuracies = probe_step(classifiers, optimizer, features, labels, Accelerator(cpu=True))
        close(logits[0], f"step{step}.logits", 1e-3)
        close(losses, f"step{step}.loss", 1e-5 * max(1, losses.item()))
        percent = 100 * count_correct(logits, labels)[0].double() / len(labels)
        assert accuracies.item() == pytest.approx(percent[0].item())
        assert percent.tolist() == pytest.approx([data[f"{precision}.step{step}.acc{k}"].item() for k in (1, 5)])
        close(classifiers.heads[0].weight.detach(), f"step{step}.fc.weight", 1e-4)
        close(classifiers.heads[0].bias.detach(), f"step{step}.fc.bias", 1e-4)
    if not exact:
        return
    with torch.no_grad():
        logits = classifiers(encoder(data["val.images"].to(dtype) / 32))
    close(logits[0], "val.logits", None)
    percent = 100 * count_correct(logits, data["val.labels"])[0].double() / len(data["val.labels"])
    assert percent.tolist() == pytest.approx([data[f"{precision}.val.acc{k}"].item() for k in (1, 5)])


def test_correct_counts_equal_a_loop_and_a_diverged_classifier_is_never_right():
    logits, labels = torch.randn(3, 40, 9, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 9
    logits[2, :, 0] = torch.nan
    for counts, classifier in zip(count_correct(logits, labels).tolist()[:2], logits):
        ranks = [sorted(range(9), key=lambda c: -row[c])[:5] for row in classifier.tolist()]
        top1 = sum(rank[0] == label for rank, label in zip(ranks, labels.tolist()))
        assert counts == [top1, sum(label in rank for rank, label in zip(ranks, labels.tolist()))]
    assert count_correct(logits, labels)[2].tolist() == [0, 0]


def test_side_by_side_each_classifier_is_what_it_is_alone():
    features, labels = torch.randn(4, 20, 6), torch.randint(0, 5, (4, 20))
    together = LinearClassifiers(6, 5, 2, seed=0)
    alone = nn.Linear(6, 5)
    alone.load_state_dict(together.heads[1].state_dict())
    optimizer = build_optimizer(together, [30.0, 0.5], 0.9, 0)
    sgd = torch.optim.SGD(alone.parameters(), 0.5, momentum=0.9)
    for x, y in zip(features, labels):
        probe_step(together, optimizer, x, y, Accelerator(cpu=True))
        F.cross_entropy(alone(x), y).backward()
        sgd.step()
        sgd.zero_grad()
    assert together.heads[1].weight.equal(alone.weight) and together.heads[1].bias.equal(alone.bias)


def test_knn_over_several_k_is_the_classifier_of_each():
    features, labels = torch.randn(30, 8), torch.arange(30) % 6
    bank, bank_labels = F.normalize(torch.randn(50, 8), dim=1), torch.arange(50) % 6
    found = knn_evaluate(features, labels, bank, bank_labels, 6, [1, 7, 200], 0.07, Accelerator(cpu=True))
    for k, accuracy in found.items():
        scores = knn_predict(features, bank, bank_labels, 6, k, 0.07)
        assert accuracy["top1"] == pytest.approx(100 * (scores.argmax(1) == labels).float().mean().item(), abs=1e-3)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """70 training and 23 validation images, so that neither the last batches nor two processes' shares are even."""
    root = tmp_path_factory.mktemp("labelled")
    for split, source, count in (("train", "train", 70), ("val", "test", 23)):
        for index in range(count):
            image, _, _ = draw_scene(source, index)
            label = CLASSES[random.Random(index).randrange(3)]
            (root / split / label).mkdir(parents=True, exist_ok=True)
            (root / split / label / f"{index}.jpg").write_bytes(encode_jpeg(image))
    return root


def probe(data, output, *flags, processes=1, says=""):
    done = run_script(
        "linear_probe.py", "--data", data, "--output", output, *SMALL.split(), *flags, processes=processes
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    return json.loads((output / "results.json").read_text())


def test_one_and_two_processes_give_the_same_top1_and_a_resumed_run_the_same_classifier(labelled, tmp_path):
    flags = ["--lr", 1, 3, "--knn", 1, 5]
    one = probe(labelled, tmp_path / "one", *flags)
    two = probe(labelled, tmp_path / "two", *flags, processes=2)
    assert one["validation_images"] == 23 and one["held_out_images"] == 7
    assert two["classifiers"] == one["classifiers"] and two["knn"] == one["knn"] and two["top1"] == one["top1"]

    probe(labelled, tmp_path / "cut", *flags, "--checkpoint-every", 6, "--keep", 9)
    for last in sorted((tmp_path / "cut" / "checkpoints").glob("step_*"))[1:]:
        if int(last.name.removeprefix("step_")) > 6:
            last.rename(tmp_path / last.name)  # as if it had been killed after step 6
    resumed = probe(labelled, tmp_path / "cut", *flags, "--checkpoint-every", 6, "--keep", 9, "--resume")
    assert resumed["classifiers"] == one["classifiers"]
    final = max((tmp_path / "cut" / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
    weights, expected = (load_file(f / "classifiers.safetensors") for f in (final, tmp_path / final.name))
    assert all(value.equal(expected[key]) for key, value in weights.items())


def test_classes_of_a_stream_are_told_without_reading_its_images(tmp_path):
    def stream(labels, feature, statistics=True):
        features = datasets.Features(image=datasets.Image(), label=feature)
        part = datasets.Dataset.from_dict({"image": [None] * len(labels), "label": labels}, features=features)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        pq.write_table(part.data.table, folder / "train.parquet", write_statistics=statistics)
        return load_splits(str(folder))[0]

    named, numbers = datasets.ClassLabel(names=["a", "b", "c"]), datasets.Value("int32")
    for split in (stream([0, 1], named), stream([0, 1], named, statistics=False), stream([0, 2, 1], numbers),
                  stream([0, 2, 1], numbers, statistics=False)):  # fmt: skip
        assert count_classes(split, None, "D") == 3
    for split, message in (
        (stream([0, -1], named), "labels from -1 to 0 for 3 classes"),
        (stream([0, None], numbers), "some images are not labelled"),
        (stream([0, None], numbers, statistics=False), "some images are not labelled"),
        (stream(["a", "b"], datasets.Value("string")), "labels of type string"),
    ):
        with pytest.raises(UserError, match=message):
            count_classes(split, None, "D")
    assert [len(part) for part in stream([0, 1], named).hold_out(1, b"validation", 0)] == [1, 1]  # of one row group


@pytest.mark.slow
def test_a_stream_is_probed_resumed_and_evaluated_like_files_downloaded(tmp_path):
    """The test images are one row group, so of two processes one has none."""
    parquet = tmp_path / "data"
    for file in range(3):
        write_parquet(parquet / f"train-{file}.parquet", "train", range(25 * file, 25 * file + 25), rows=10)
    write_parquet(parquet / "test-0.parquet", "test", range(13), rows=13)
    flags = ["--lr", 1, 3, "--knn", 1, 5, "--epochs", 2, "--shuffle-window", 20, "--checkpoint-every", 2, "--keep", 9]
    checkpoints = tmp_path / "run" / "checkpoints"
    whole = probe(parquet, tmp_path / "run", *flags)
    assert whole["classes"] == 20 and whole["validation_images"] == 13
    assert whole["train_images"] + whole["held_out_images"] == 75 and whole["held_out_images"] == 7
    assert whole["steps"] == 8  # two epochs of 68 // 16
    weights = (checkpoints / "step_8" / "classifiers.safetensors").read_bytes()

    def as_if_killed_after_step_2():
        for name in ("step_8", "step_6", "step_4"):
            (checkpoints / name / "state.json").unlink()

    as_if_killed_after_step_2()
    resumed = probe(parquet, tmp_path / "run", *flags, "--resume", says="resume  after step 2")
    assert (checkpoints / "step_8" / "classifiers.safetensors").read_bytes() == weights
    assert resumed["classifiers"] == whole["classifiers"] and resumed["knn"] == whole["knn"]
    two = probe(parquet, tmp_path / "run", *flags, "--evaluate", processes=2)
    assert two["classifiers"] == whole["classifiers"] and two["knn"] == whole["knn"]

    as_if_killed_after_step_2()
    probe(parquet, tmp_path / "run", *flags, "--resume", "--workers", 2, says="not 2: processes, workers")
    assert (checkpoints / "step_8" / "classifiers.safetensors").read_bytes() != weights


def test_the_features_of_one_row_group_are_cached_and_searched_by_two_processes(tmp_path):
    """One has no image, neither of training nor of the test; kNN is that of one process without a stream."""
    parquet = tmp_path / "data"
    write_parquet(parquet / "train-0.parquet", "train", range(25), rows=25)
    write_parquet(parquet / "test-0.parquet", "test", range(13), rows=13)
    streamed = probe(parquet, tmp_path / "two", "--epochs", 1, "--knn", 5, "--cached-features", processes=2)
    datasets.load_dataset(str(parquet), cache_dir=tmp_path / "cache").save_to_disk(tmp_path / "saved")
    saved = probe(tmp_path / "saved", tmp_path / "one", "--epochs", 1, "--knn", 5)
    assert streamed["approximate"] and streamed["knn"] == saved["knn"]
    assert streamed["train_images"] == saved["train_images"] == 25


def test_sigterm_finishes_the_step_saves_and_exits_143(labelled, tmp_path):
    flags = ["--data", labelled, *SMALL.split(), "--epochs", 50, "--log-every", 1]
    process = start_script("linear_probe.py", "--output", tmp_path / "run", *flags)
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=HANG)
    step = int(complete_checkpoints(tmp_path / "run" / "checkpoints")[-1].name.removeprefix("step_"))
    assert process.returncode == 143 and f"stopped after step {step}" in stderr


@pytest.mark.parametrize("split", ["train", "val"])
def test_more_than_five_percent_undecodable_is_an_error_wherever_images_are_read(labelled, tmp_path, split):
    """Also of features that were cached before."""
    shutil.copytree(labelled, tmp_path / "damaged")
    files = sorted((tmp_path / "damaged" / split).rglob("*.*"))
    for path in files[1::2]:
        path.write_bytes(b"damaged")
    flags = ["--data", tmp_path / "damaged", "--output", tmp_path / "run", *SMALL.split(), "--cached-features"]
    for _ in range(2):
        begun = ["--resume"] if complete_checkpoints(tmp_path / "run" / "checkpoints") else []
        done = run_script("linear_probe.py", *flags, *begun)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"{len(files) // 2} of {len(files)} images of --data {tmp_path / 'damaged'}" in done.stderr


def test_features_that_were_cached_of_other_labels_or_images_are_made_again(labelled, tmp_path):
    """Where a run that ended before its first checkpoint left them in its folder."""
    backbone, crops = build_encoder("resnet10", head="fc").backbone, load_splits(labelled)[0]
    features = Features(backbone, 32, MEAN, STD, 0, Accelerator(cpu=True))

    def cache(data="abc", **settings):
        features.cache(tmp_path, "digest", crops, data, {"label_column": None} | settings)
        return (tmp_path / "labels.npy").stat().st_mtime_ns

    first = cache()
    assert cache() == first
    assert first < cache("mended") < cache("mended", label_column="fine")


def test_a_backbone_that_is_trained_is_evaluated_in_eval_mode(labelled):
    """Fine-tuning leaves it in training mode, perhaps with BatchNorms that are frozen by eval(); so it stays."""
    backbone, images = build_encoder("resnet10", head="fc").backbone, load_splits(labelled)[1]
    features = Features(backbone.eval(), 32, MEAN, STD, 0, Accelerator(cpu=True))
    expected, statistics = features.all(images, range(20))[0], backbone.bn1.running_mean.clone()
    backbone.train()
    backbone.layer1.eval()
    made = Features(backbone, 32, MEAN, STD, 0, Accelerator(cpu=True)).all(images, range(20))[0]
    assert made.equal(expected) and backbone.bn1.running_mean.equal(statistics)
    assert backbone.layer2[0].bn1.training and not backbone.layer1[0].bn1.training


def test_a_sigterm_after_the_last_step_ends_the_process():
    """Everything is saved by then; to go on with an evaluation that may take hours would ignore it."""
    code = "import signal; from moco.run.launch import *; catch_signals(); signal.raise_signal(signal.SIGTERM);"
    done = run_script("-c", f"{code} print(len(CAUGHT), flush=True); release_signals(); print('went on')")
    assert done.stdout == "1\n" and done.returncode == -signal.SIGTERM
    done = run_script("-c", "from moco.run.launch import *; catch_signals(); release_signals(); print('went on')")
    assert done.stdout == "went on\n" and done.returncode == 0


BACKBONE = "backbone = backbone.requires_grad_(False).eval()."
EDITS = {  # of a copy: what stands there, and what it becomes
    "trained on purpose": {
        BACKBONE: "backbone = backbone.eval().",
        "return torch.optim.SGD(groups,": "return torch.optim.SGD([*groups, {'params': backbone.parameters()}], 1e-3,",
        "def build_optimizer(classifiers,": "def build_optimizer(backbone, classifiers,",
        "build_optimizer(classifiers, args.lr,": "build_optimizer(backbone, classifiers, args.lr,",
        '{"classifiers": classifiers}': '{"classifiers": classifiers, "backbone": backbone}',
        "with torch.no_grad(), accelerator.autocast():": "with accelerator.autocast():",
    },
    "by mistake": {BACKBONE: "backbone = backbone.requires_grad_(False).train()."},
}


@pytest.mark.parametrize("kind", EDITS)
def test_results_are_written_first_whatever_became_of_the_backbone(kind, labelled, tmp_path):
    """One that is trained on purpose is right; one whose statistics moved by mistake is an error afterwards."""
    script, run = (ROOT / "linear_probe.py").read_text(), tmp_path / "run"
    for before, after in EDITS[kind].items():
        assert script.count(before) == 1, before
        script = script.replace(before, after)
    (tmp_path / "linear_probe.py").write_text(script)
    flags = ["--data", labelled, "--output", run, *SMALL.split(), "--epochs", 1, "--lr", 1]
    if kind == "trained on purpose":
        call_main(tmp_path / "linear_probe.py", *flags)
    else:
        with pytest.raises(UserError, match="the backbone changed while it was probed, although none"):
            call_main(tmp_path / "linear_probe.py", *flags)
    results = json.loads((run / "results.json").read_text())
    assert not results["frozen"] and 0 <= results["top1"] <= 100
    if kind == "trained on purpose":
        assert read_metrics(run / "metrics.jsonl")[-1]["lr"] == [1, 1e-3]  # each group its own
