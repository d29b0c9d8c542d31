"""The edits of docs/editing.md, applied to the current train_moco.py, and the check of a copied script."""

import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_run, call_main, metrics_of, run_script
from PIL import Image
from safetensors.torch import save_file

from moco.backbone import save_backbone
from moco.backbone.load import check_loads_back
from moco.backbone.publish import prepare_folder
from moco.check import STEPS, Fault, compare_backbone, compare_processes, compare_resumed, compare_trained
from moco.encoder import build_encoder
from moco.run.checkpoint import save_checkpoint

PAGE = (ROOT / "docs" / "editing.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", PAGE, re.MULTILINE))
EDITS = {
    title: match[1] for title, text in SECTIONS.items() if (match := re.search(r"```diff\n(.*?)```", text, re.DOTALL))
}
ADDED = dict(re.findall(r"^\| \[(.+?)\]\(#.*?\) \| (\d+) \|$", PAGE, re.MULTILINE))
FLAGS = (
    "--arch resnet10 --image-size 32 --batch-size 32 --bn-batch 16 --queue-size 64 --epochs 1 --lr 0.01 --workers 1"
    " --knn-every 0 --log-every 1 --checkpoint-every 1 --keep 9 --mixed-precision no"
).split()


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """Two batches of images."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(64):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def edited(diff, script="train_moco.py"):
    """The script with a diff of the page applied: parts between lines of dots, each of which must stand there once."""
    text = (ROOT / script).read_text()
    for part in re.split(r"^\.\.\.\n", diff, flags=re.MULTILINE):
        lines = part.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def test_the_page_has_eight_edits_and_counts_their_lines():
    counts = {title.lower(): sum(line.startswith("+") for line in diff.splitlines()) for title, diff in EDITS.items()}
    counts["a backbone of timm"] = 0
    assert counts == {title.lower(): int(count) for title, count in ADDED.items()}
    assert len(counts) == 8 and max(counts.values()) <= 25


@pytest.mark.parametrize("title", EDITS)
def test_an_edit_applies_trains_resumes_exactly_and_can_be_published(title, tmp_path, small_folder, capsys):
    script, run, cut = tmp_path / "mine.py", tmp_path / "run", tmp_path / "cut"
    script.write_text(edited(EDITS[title]))
    flags = ["--data", small_folder, *FLAGS, *(["--augment", "no-colour"] if "channels" in title else [])]
    call_main(script, *flags, "--output", run)
    said = capsys.readouterr().out
    assert len([line for line in metrics_of(run) if "loss" in line]) == 2
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("backbone", "step_2"))  # as if killed after the first step
    call_main(script, *flags, "--output", cut, "--resume", "--workers", 0)
    assert_same_run(cut, run)
    check_loads_back(prepare_folder(run, "user/name"))
    config = json.loads((run / "backbone" / "config.json").read_text())["moco"]
    named = {"Multi-crop": "own", "Transforms of your own": "own", "Arrays with six channels": "no-colour"}.get(title)
    assert config["augment"] == (named or "v2")  # what runs, whatever --augment says
    assert config["data"] == ("own images (Scenes)" if "channels" in title else small_folder.name)
    if title == "Multi-crop":
        assert Image.open(run / "views.png").size[1] > 700  # four rows of 176 pixels
    if title == "AdamW":
        assert "AdamW with betas (0.9, 0.999), eps 1e-08, weight decay 0.0001" in said
    if "second term" in title:
        assert all("distance" in line for line in metrics_of(run))


def test_the_normalisation_of_transforms_and_the_rates_of_groups_are_kept(tmp_path, small_folder, capsys):
    """Evaluations and whoever loads the backbone normalise as the transforms do; the schedule scales each rate."""
    text = edited(EDITS["Transforms of your own"])
    for before, after in {
        "v2.Normalize(args.mean, args.std)": "v2.Normalize([0.5] * 3, [0.25] * 3)",
        "[transform, transform], args.mean, args.std": "[transform, transform], [0.5] * 3, [0.25] * 3",
        "        query_encoder.parameters(), args.lr,": "        [{'params': query_encoder.backbone.parameters(),"
        " 'lr': 1e-4}, {'params': query_encoder.head.parameters()}], args.lr,",
        "accuracy=accuracy)": "accuracy=accuracy, rates=torch.tensor([g['lr'] for g in optimizer.param_groups]))",
    }.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (tmp_path / "mine.py").write_text(text)
    call_main(tmp_path / "mine.py", "--data", small_folder, *FLAGS, "--epochs", 2, "--output", tmp_path / "run")
    assert "lr 0.0001 and 0.01 cosine" in capsys.readouterr().out
    lines = metrics_of(tmp_path / "run")
    assert [line["rates"] for line in lines] == [pytest.approx([1e-4 * x, 1e-2 * x]) for x in (1, 1, 0.5, 0.5)]
    assert [line["lr"] for line in lines] == pytest.approx([1e-4, 1e-4, 0.5e-4, 0.5e-4])
    known = json.loads((tmp_path / "run" / "backbone" / "config.json").read_text())["pretrained_cfg"]
    assert known["mean"] == [0.5] * 3 and known["std"] == [0.25] * 3


def test_the_loop_of_the_page_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1].replace("Accelerator(), 20", "Accelerator(), 2")
    done = run_script("-c", code.replace("monitor(query_encoder", "({'knn': 0.0, 'rank': 1.0},) or (query_encoder"))
    assert done.returncode == 0 and "loss " in done.stdout, done.stderr


# ---- python -m moco.check


def checked(tmp_path, text, *flags):
    """(exit code, output) of the check of a script."""
    (tmp_path / "mine.py").write_text(text)
    command = [sys.executable, "-m", "moco.check", tmp_path / "mine.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


SCRIPT = (ROOT / "train_moco.py").read_text()
DEFECTS = {  # what is planted: (the script's text, what it becomes, what the check must say)
    "a module that is not saved": (
        'query_encoder.parameters(), args.lr, momentum=',
        '[*query_encoder.parameters(), *nn.Linear(2, 3).parameters()], args.lr, momentum=',
        "trains 2 parameters, of shape 3x2, 3",
    ),
    "labels without the rank's offset": (
        "        logits = contrastive_logits(q, k, queue.keys, temperature)  # (images_per_pass, 1 + K)\n"
        "        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)",
        "        logits = q @ keys.T / temperature\n        labels = torch.arange(len(q))",
        "one and two processes differ after step 1",
    ),
    "a queue of this process's keys": ("queue.enqueue(keys)", "queue.enqueue(own_keys)", "queue differs between"),
    "a term that is not divided by the passes": (
        "F.cross_entropy(logits, labels) / passes",
        "F.cross_entropy(logits, labels) / passes + 0.1 * (q - k).square().sum(dim=1).mean()",
        "one and two processes differ after step 1",
    ),
    "a scheduler that starts anew on resume": (
        "        run.record(loss=loss, accuracy=accuracy)\n",
        "        run.record(loss=loss, accuracy=accuracy)\n        if run.done % steps_per_epoch == 0:\n"
        "            optimizer.param_groups[0]['initial_lr'] *= 0.5\n",
        "a killed and resumed run ends elsewhere",
    ),
    "an epoch that begins again on resume": (
        "views.batches(train_set, order, run.done)",
        "views.batches(train_set, order, run.done // steps_per_epoch * steps_per_epoch)",
        "a killed and resumed run ends elsewhere",
    ),
    "a module that nothing trains": (
        "    query_encoder, optimizer = accelerator.prepare(query_encoder, optimizer)\n",
        "    query_encoder.head.append(nn.Linear(args.dim, args.dim, bias=False))\n"
        "    query_encoder, optimizer = accelerator.prepare(query_encoder, optimizer)\n",
        "query_encoder.head.3.weight get gradients, but stay as they are",
    ),
    "views from a global random state": (
        "        if args.simclr:\n            loss, accuracy = simclr_step(",
        "        images = [image + 0.01 * torch.randn_like(image) for image in images]\n"
        "        if args.simclr:\n            loss, accuracy = simclr_step(",
        "a killed and resumed run ends elsewhere",
    ),
}  # fmt: skip


def fault(compare, *arguments):
    with pytest.raises(Fault) as found:
        compare(*arguments)
    return str(found.value)


def test_what_the_check_compares_of_two_runs(tmp_path):
    for name, changed in (("one", None), ("same", None), ("first", 1), ("last", STEPS)):
        for step in range(STEPS + 1):
            weights = {"weight": torch.full((2,), step + 1.0), "running_mean": torch.rand(2)}  # averaged otherwise
            weights["weight"][1] += 1e-6 * (step == changed)
            save_checkpoint(tmp_path / name / "checkpoints", step, {"query_encoder": weights}, {}, keep=9)
    one, same, first, last = (tmp_path / name for name in ("one", "same", "first", "last"))
    assert "take equal steps" in compare_processes(one, same)
    assert "differ after step 1, in query_encoder.weight by" in fault(compare_processes, one, first)
    assert f"differ after step {STEPS}" in fault(compare_processes, one, last)
    assert "ends elsewhere" in fault(compare_resumed, one, same)  # with other statistics
    assert "bit for bit" in compare_resumed(one, one)
    (one / "args.json").write_text('{"queue_size": 15}')
    for losses, line in (
        (["2.7", "2.5"], None),
        (["2.7", f"{math.log(16)}"], "chance level"),
        (["2", "2"], "not move"),
    ):
        (one / "metrics.jsonl").write_text("".join(f'{{"loss": {loss}}}\n' for loss in losses))
        assert ("are trained" in compare_trained(one)) if line is None else (line in fault(compare_trained, one))
    shutil.rmtree(one / "checkpoints" / f"step_{STEPS}")
    shutil.copytree(one / "checkpoints" / "step_0", one / "checkpoints" / f"step_{STEPS}")
    assert "no saved tensor changed" in fault(compare_trained, one)


def test_what_the_check_compares_of_a_backbone(tmp_path):
    encoder, images = build_encoder("resnet10").double().eval(), torch.randn(4, 3, 32, 32).double()
    features = {"images": images, "features": encoder.backbone(images).detach()}
    save_file(features, tmp_path / "features")
    assert "left no backbone/" in fault(compare_backbone, tmp_path, tmp_path / "features")
    save_backbone(tmp_path / "backbone", encoder.float(), "resnet10", 32, "m", {})
    assert "loads back with equal features" in compare_backbone(tmp_path, tmp_path / "features")
    save_file(features | {"features": features["features"] * 1.001}, tmp_path / "features")
    assert "gives other features, by" in fault(compare_backbone, tmp_path, tmp_path / "features")


def test_given_flags_override_those_of_the_check(tmp_path):
    code, output = checked(tmp_path, "import sys\nsys.exit(f'flags: {sys.argv}')", "--batch-size=32")
    assert code == 1 and re.search("flags: .*'--batch-size', '64'.*'--batch-size=32'", output), output


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["v2", "simclr"])
def test_the_check_finds_the_script_right(tmp_path, recipe):
    code, output = checked(tmp_path, SCRIPT, "--recipe", recipe)
    assert code == 0 and output.count("ok      ") == 4, output


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_check_catches_a_planted_defect(tmp_path, defect):
    before, after, line = DEFECTS[defect]
    assert SCRIPT.count(before) == 1
    code, output = checked(tmp_path, SCRIPT.replace(before, after))
    assert code == 1 and line in output, output
