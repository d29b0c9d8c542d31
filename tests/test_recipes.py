"""The flags' defaults are the papers', and later defaults override earlier ones. pytest tests/test_recipes.py"""

import sys

import pytest

import detect_transfer
import linear_probe
import train_moco
from moco.detection.model import ANCHOR_SIZES


@pytest.mark.parametrize(
    "recipe, head, augment, temperature, schedule",
    [
        ("v1", "fc", "v1", 0.07, "step"),
        ("v1-mlp", "mlp", "v1", 0.2, "step"),
        ("v1-aug", "fc", "v2", 0.07, "step"),
        ("v1-mlp-aug", "mlp", "v2", 0.2, "step"),
        ("v2", "mlp", "v2", 0.2, "cosine"),
        ("simclr", "mlp", "simclr", 0.1, "warmup-cosine"),
    ],
)
def test_recipes_are_the_rows_of_the_papers(monkeypatch, recipe, head, augment, temperature, schedule):
    monkeypatch.setattr(sys, "argv", ["train_moco.py", "--recipe", recipe])
    args = train_moco.parse_args()
    assert (args.head, args.augment, args.temperature, args.schedule) == (head, augment, temperature, schedule)
    assert (args.arch, args.data, args.epochs, args.batch_size) == ("resnet50", "ILSVRC/imagenet-1k", 200, 256)
    assert (args.queue_size, args.encoder_momentum, args.dim) == (65536, 0.999, 128)
    assert (args.sgd_momentum, args.image_size) == (0.9, 224)
    rest = (args.optimizer, args.lr, args.weight_decay, args.bn_batch)
    assert rest == (("lars", 0.3, 1e-6, 256) if recipe == "simclr" else ("sgd", 0.03, 1e-4, 32))


def test_a_recipe_that_is_added_is_what_it_says(monkeypatch):
    mine = train_moco.RECIPES["simclr"] | {"augment": "v2"}
    monkeypatch.setattr(train_moco, "RECIPES", train_moco.RECIPES | {"mine": mine})
    monkeypatch.setattr(sys, "argv", ["train_moco.py", "--recipe", "mine"])
    args = train_moco.parse_args()
    assert args.simclr and (args.augment, args.optimizer, args.bn_batch) == ("v2", "lars", 256)


def test_a_flag_given_wins_over_the_recipe_and_the_built_in_datas_settings(monkeypatch):
    monkeypatch.setattr(sys, "argv", "train_moco.py --data shapes --recipe v1 --head mlp --lr 0.5".split())
    args = train_moco.parse_args()
    assert (args.head, args.lr, args.temperature) == ("mlp", 0.5, 0.07)
    assert args.arch == train_moco.SHAPES["arch"]
    monkeypatch.setattr(sys, "argv", "train_moco.py --data shapes --recipe simclr --batch-size 64".split())
    args = train_moco.parse_args()
    assert (args.lr, args.bn_batch, args.image_size) == (0.3 * 64 / 256, 64, 32)


def test_the_probe_voc_and_coco_have_the_papers_settings(monkeypatch, tmp_path):
    """arXiv:1911.05722 sections 4.1, 4.2 and its appendix; the reference's detection configurations."""
    monkeypatch.setattr(sys, "argv", "linear_probe.py --backbone random".split())
    args = linear_probe.parse_args()
    assert (args.lr, args.sgd_momentum, args.weight_decay, args.batch_size) == ([30.0], 0.9, 0.0, 256)
    assert (args.epochs, args.data, args.encoder) == (100, "ILSVRC/imagenet-1k", "query")

    (tmp_path / "COCO" / "annotations").mkdir(parents=True)
    common = {"batch_size": 16, "lr": 0.02, "roi_batch": 512, "micro_batch": 2, "bn": "sync"}
    common |= {"anchor_sizes": (32, 64, 128, 256, 512)}
    voc = {"iterations": 24_000, "warmup": 100, "image_size": [*range(480, 801, 32)], "years": ["2007", "2012"]}
    coco = {"iterations": 180_000, "warmup": 1000, "image_size": [*range(640, 801, 32)]}
    for data, extra, papers in (
        (tmp_path / "VOCdevkit", "", voc),
        (tmp_path / "COCO", "", coco),
        (tmp_path / "COCO", "--schedule 1x", coco | {"iterations": 90_000}),
    ):
        command = f"detect_transfer.py --data {data} --backbone random --arch resnet50 {extra}"
        monkeypatch.setattr(sys, "argv", command.split())
        args = vars(detect_transfer.parse_args())
        for name, value in (common | papers).items():
            assert args[name] == value, name
    assert detect_transfer.SGD == {"momentum": 0.9, "weight_decay": 1e-4} and detect_transfer.LONGEST == 1333
    drops = {data: [round(24 * part) for part in parts] for data, parts in detect_transfer.MILESTONES.items()}
    assert drops["VOC"] == [18, 22] and [round(180 * part) for part in detect_transfer.MILESTONES["COCO"]] == [120, 160]
    assert detect_transfer.PRECISE_ITERATIONS == 200 and ANCHOR_SIZES == common["anchor_sizes"]
