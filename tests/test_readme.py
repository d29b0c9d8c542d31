"""Every command in README.md and docs/ names what is there, with flags that its script knows; links lead somewhere."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, run_script
from hub import TOKEN, serving

from moco.backbone import save_backbone
from moco.encoder import build_encoder
from moco.errors import UserError
from moco.run.checkpoint import read_metrics

PAGES = [ROOT / "README.md", ROOT / "EXPERIMENTS.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """The commands of all bash blocks of a page, each as its words, without comments and environment variables."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ").replace("$RANK", "1")
    commands = [shlex.split(part) for line in text.splitlines() for part in line.split(" # ")[0].split("&&")]
    return [words[1:] if re.match(r"[A-Z_]+=", words[0]) else words for words in commands if words]


def parse(script, flags, monkeypatch, processes=1):
    """Let a script parse flags as far as it can without the run that they name, and check them for so many processes.

    Of a benchmark only look for them in the source.
    """
    if script.startswith("benchmarks/"):
        source = (ROOT / script).read_text()
        assert all(f'"{flag}"' in source for flag in flags if flag.startswith("-"))
        return
    monkeypatch.setattr(sys, "argv", [script, *flags])
    module = importlib.import_module(script.removesuffix(".py"))
    if not hasattr(module, "check_args"):
        return module.parse_args()
    monkeypatch.setattr("moco.run.flags.check_output", lambda *_: None)  # makes the folder
    try:
        args = module.parse_args()
    except UserError as error:
        assert "no complete checkpoint" in str(error), error
    else:
        module.check_args(args, processes, *(["cuda"] if script == "train_moco.py" else []))


@pytest.mark.parametrize("words", [words for page in PAGES for words in commands(page)], ids=" ".join)
def test_a_command_of_the_pages_parses(words, monkeypatch):
    program, *rest = words
    if program == "pip":
        assert rest[:2] == ["install", "-r"] and (ROOT / rest[2]).exists()
    elif program == "accelerate":
        args = launch_command_parser().parse_args(rest[1:])
        if args.config_file:
            args.num_processes = yaml.safe_load((ROOT / args.config_file).read_text())["num_processes"]
        parse(args.training_script, args.training_script_args, monkeypatch, args.num_processes or 1)
    elif program == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(rest)
        parse(args.training_script, args.training_script_args, monkeypatch, int(args.nproc_per_node))
    elif program == "cp":
        assert (ROOT / rest[0]).exists()
    elif rest[:2] == ["-m", "moco.check"]:  # of a copy of train_moco.py, with flags of that
        parse("train_moco.py", rest[3:], monkeypatch)
    elif program == "python" and rest[0] == "-m":
        parse(f"{rest[1]}.__main__", rest[2:], monkeypatch)
    elif program == "python":
        parse(rest[0], rest[1:], monkeypatch)
    elif program == "hf":  # the download is run by test_stream.py
        assert rest[:2] in (["auth", "login"], ["download", "ILSVRC/imagenet-1k"])
    else:
        assert program == "git" or (program == "pytest" and rest in ([], ["-m", "slow"]))


@pytest.mark.slow
def test_the_walk_through_runs_as_written(tmp_path):
    """docs/own-images.md with fewer images and epochs, from a random backbone, to a server in the Hub's place."""
    if not Path("/usr/share/backgrounds/mate").is_dir():
        pytest.skip("needs Debian's lomiri-wallpapers-16.04 and mate-backgrounds")
    source = tmp_path / "runs" / "v2-shapes" / "backbone"
    save_backbone(source, build_encoder("resnet10"), "resnet10", 32, "moco_v2", {"arch": "resnet10", "recipe": "v2"})
    shorter = {"2000": "320", "500": "54", "20": "1", "30": "2", "USER/NAME": "user/name"}
    done = {}
    with serving(tmp_path / "hub") as hub:
        for words in commands(ROOT / "docs" / "own-images.md"):
            words = [re.sub("^(runs/|features|photos)", f"{tmp_path}/\\1", shorter.get(word, word)) for word in words]
            words = words[2 if words[0] == "accelerate" else 1 :]
            if words[0] == "train_moco.py":
                words += ["--output", f"{tmp_path}/runs/v2-photos"]
            there = hub.environment | {"HF_TOKEN": TOKEN} if "push" in words else {}
            done[words[2 if words[0] == "-m" else 0]] = result = run_script(*words, **there)
            assert result.returncode == 0, result.stderr
        card = hub.files("models", "user/name")["README.md"].read_text()
    assert done.keys() == {"benchmarks/wallpapers.py", "embed", "train_moco.py", "linear_probe.py", "push"}
    assert "from v2-shapes (license unknown; " in card and "| kNN, k " in card
    assert "pairs above a cosine of" in done["embed"].stdout
    lines = read_metrics(tmp_path / "runs" / "v2-photos" / "metrics.jsonl")
    assert {"knn", "rank", "uniformity", "alignment"} <= lines[0].keys() & lines[-1].keys()


def test_the_readme_has_commands_for_every_script():
    scripts = {word for words in commands(ROOT / "README.md") for word in words if word.endswith(".py")}
    assert {path.name for path in ROOT.glob("*.py")} <= scripts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", text):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor
