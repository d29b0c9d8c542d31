"""Arrays, datasets of one's own and rows of one's own as training data. pytest tests/test_arrays.py"""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, assert_same_run, call_main, metrics_of
from PIL import Image
from torch.utils.data import Dataset

from moco.augment import AUGMENTATIONS, MEAN, STD
from moco.backbone.monitor import monitor
from moco.data.arrays import ArrayImages, ImageRows, normalization
from moco.data.batches import center_crops, labelled_crops
from moco.data.labels import count_classes, has_labels
from moco.data.load import load_splits
from moco.data.order import Order
from moco.data.shapes import draw_scene, encode_jpeg
from moco.data.views import FastViews
from moco.encoder import build_encoder
from moco.errors import UserError

RNG = np.random.default_rng(0)
SIX = RNG.normal(40, 9, (30, 20, 24, 6)).astype(np.float32)
LABELS = np.arange(30) % 3


class Pairs(Dataset):
    """A dataset of images and labels, of Pillow images unless they are given."""

    def __init__(self, n=30, images=None):
        self.images = images if images is not None else [Image.fromarray(draw_scene("train", i)[0]) for i in range(n)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], int(LABELS[i])


def memory_mapped(tmp_path):
    np.save(tmp_path / "images.npy", SIX)
    return ArrayImages(np.load(tmp_path / "images.npy", mmap_mode="r"), LABELS)


@pytest.mark.parametrize("kind", ["pairs", "arrays", "memory-mapped"])
def test_rows_of_anything_are_read_as_they_are(kind, tmp_path):
    made = {
        "pairs": lambda: ArrayImages(Pairs()),
        "arrays": lambda: ArrayImages(Pairs(images=SIX)),
        "memory-mapped": lambda: memory_mapped(tmp_path),
    }
    images = made[kind]()
    pixels = [np.asarray(image) for image in Pairs().images] if kind == "pairs" else SIX
    for row in (0, 7, 29):
        np.testing.assert_array_equal(images[row]["image"], pixels[row])
        assert images[row]["label"] == LABELS[row]
    assert has_labels(images) and count_classes(images, images, "mine") == 3
    rest, held_out = images.hold_out(5, b"validation", 0)
    assert len(held_out) >= 5 and len(rest) + len(held_out) == 30
    assert rest.fingerprint() == images.fingerprint() and set(held_out.labels) <= {0, 1, 2}
    assert [held_out[i]["label"] for i in range(len(held_out))] == held_out.labels.tolist()
    assert rest.channels == images.channels == pixels[0].shape[2]
    crops, labels, undecodable = center_crops(images, 16)[[(0, 4), (0, 11)], ()]
    assert crops[0].shape == (2, 16, 16, images.channels) and labels.tolist() == [1, 2] and not undecodable
    assert labelled_crops(images, 16, 0)[[(0, 4)], ()][0][0].dtype == crops[0].dtype == torch.tensor(pixels[0]).dtype


def test_the_order_and_the_pixels_are_those_of_the_same_images_in_files(tmp_path):
    for i in range(12):
        Image.fromarray(draw_scene("train", i)[0]).save(tmp_path / f"{i:02}.png")
    files, _ = load_splits(str(tmp_path))
    arrays, views = ArrayImages(Pairs(12)), FastViews(AUGMENTATIONS["v2"], 32, MEAN, STD)
    for start in (0, 4):
        order = Order(4, 3)
        both = zip(views.batches(files, order, start), views.batches(arrays, order, start))
        for (crops, *_), (others, *_) in itertools.islice(both, 4):
            assert all(map(torch.equal, crops, others))


def test_the_fingerprint_is_of_pixels_labels_and_their_number():
    changed = SIX.copy()
    changed[0, 0, 0, 0] += 1
    cases = [
        ArrayImages(SIX, LABELS),
        ArrayImages(changed, LABELS),
        ArrayImages(SIX[:-1], LABELS[:-1]),
        ArrayImages(SIX),
    ]
    cases.append(ArrayImages(SIX, 2 - LABELS))
    assert len({images.fingerprint() for images in cases}) == 5
    assert ArrayImages(list(SIX), LABELS).fingerprint() == cases[0].fingerprint()


class MyRows(ImageRows):
    """What the documentation asks for, and no more."""

    def __len__(self):
        return 40

    def __getitem__(self, row):
        image, labels, _ = draw_scene("train", row)
        return {"image": {"bytes": encode_jpeg(image), "path": None}, "label": int(labels[0])}


@pytest.mark.parametrize("images", [MyRows(), ArrayImages(SIX, LABELS)], ids=["own rows", "six channels"])
def test_features_and_the_monitor_take_them(images, tmp_path):
    mean, std = normalization(images)
    encoder, accelerator = build_encoder("resnet10", channels=images.channels), Accelerator(cpu=True)
    views = FastViews(AUGMENTATIONS["no-colour"], 16, mean, std)
    options = (16, mean, std, 0, accelerator, views, tmp_path)
    numbers, undecodable, looked_at = monitor(encoder, images, None, *options)
    assert 0 <= numbers["knn"] <= 100 and not undecodable and looked_at == len(images)
    assert min(Image.open(tmp_path / "neighbours.png").size) > 100
    assert has_labels(images) and len(images.fingerprint()) == 16


def test_statistics_are_imagenets_or_measured_or_given(capsys):
    assert normalization(ArrayImages(Pairs())) == (MEAN, STD)
    mean, std = normalization(ArrayImages(SIX))
    np.testing.assert_allclose(mean, SIX.mean(axis=(0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(std, SIX.std(axis=(0, 1, 2)), rtol=1e-4)
    assert "measured" in capsys.readouterr().out
    sixteen = RNG.integers(0, 65536, (4, 8, 8), np.uint16)
    mean, std = normalization(ArrayImages(sixteen))
    assert mean[0] == pytest.approx(sixteen.mean() / 65535, rel=1e-4) and len(mean) == len(std) == 1
    eight = RNG.integers(0, 256, (4, 8, 8), np.uint8)
    assert normalization(ArrayImages(eight))[0][0] == pytest.approx(eight.mean() / 255, rel=1e-4)
    assert normalization(ArrayImages(SIX), [1.0] * 6, [2.0] * 6) == ((1.0,) * 6, (2.0,) * 6)
    constant = np.concatenate([SIX, np.ones((30, 20, 24, 1), np.float32)], axis=3)
    for images, given, message in (
        (ArrayImages(SIX), ([1.0] * 3, [2.0] * 3), "--mean has 3 numbers and --std 3; the images have 6 channels"),
        (ArrayImages(SIX), ([1.0] * 6, None), "belong together"),
        (ArrayImages(constant), (None, None), "--std 0 of channel 6 must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            normalization(images, *given)


class Flips(Pairs):
    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return (image.transpose(Image.FLIP_LEFT_RIGHT) if np.random.rand() < 0.5 else image), label


REFUSED = {
    "nothing": (lambda: ArrayImages([]), "its length is 0"),
    "tensors": (lambda: ArrayImages([torch.zeros(3, 8, 8)] * 2), "is a tensor, whose channels come first"),
    "int64": (lambda: ArrayImages(np.zeros((2, 8, 8), np.int64)), "type int64; it must be"),
    "dicts": (lambda: ArrayImages([{"image": SIX[0]}]), "image 0 is dict"),
    "volumes": (lambda: ArrayImages(np.zeros((2, 8, 8, 8, 1), np.uint8)), r"shape \(8, 8, 8, 1\)"),
    "names": (lambda: ArrayImages([(SIX[0], "cat")]), "the label of image 0 is 'cat'"),
    "few labels": (lambda: ArrayImages(SIX, LABELS[1:]), "29 labels for 30 images"),
    "fractions": (lambda: ArrayImages(SIX, LABELS / 2), "float64; they must be"),
    "random": (lambda: ArrayImages(Flips()), "has other pixels each time it is read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_data_is_refused(kind):
    make, message = REFUSED[kind]
    with pytest.raises(UserError, match=message):
        make()


def test_a_row_that_differs_or_cannot_be_read_is_an_undecodable_one():
    class Damaged(Pairs):
        def __getitem__(self, i):
            if i in (0, 5):
                raise OSError("truncated")
            image, label = super().__getitem__(i)
            return (np.zeros((8, 8, 4), np.uint8) if i == 9 else image), label

    images = ArrayImages(Damaged(24))
    rows = [(0, row) for row in (4, 5, 9, 10)]
    _, labels, undecodable = center_crops(images, 16)[rows, ()]
    assert undecodable == [
        ("row 5", "OSError: truncated"),
        ("row 9", "ValueError: 4 channels of uint8, unlike image 0"),
    ]
    assert labels.tolist() == [4 % 3, 6 % 3, 10 % 3, 10 % 3]
    assert ArrayImages([(SIX[0], 0), (SIX[1], None)]).label_range() == (-1, 0)
    assert images.label_range() == (0, 2)  # there are labels, whatever those of the two are
    holes = SIX.copy()
    holes[3, 0, 0, 0] = np.nan
    assert center_crops(ArrayImages(holes), 16)[[(0, 3)], ()][2] == [("row 3", "ValueError: pixels are not finite")]


FLAGS = """--data mine --arch resnet10 --stem small --image-size 16 --queue-size 16 --dim 8 --batch-size 8 --bn-batch 8
--epochs 3 --augment no-colour --knn-every 1 --log-every 1 --checkpoint-every 4 --keep 9 --mixed-precision no"""


PROBE = "--data mine --image-size 16 --epochs 1 --batch-size 8 --knn --workers 0 --mixed-precision no"


def copied_script(name, folder, edits=()):
    """A copy of a script that reads the six channels from a memory-mapped file, in two changed lines."""
    script = (ROOT / name).read_text()
    for before, after in {
        "load_splits(args.data, **flags.data_options(args))": f"""(
        ArrayImages(np.load({str(folder / "images.npy")!r}, mmap_mode="r"), np.arange(30) % 3), None
    )""",
        "\nfrom torch import nn\n": """
import numpy as np
from torch import nn
from moco.data.arrays import ArrayImages
""",
        **dict(edits),
    }.items():
        assert script.count(before) == 1
        script = script.replace(before, after)
    (folder / f"my_{name}").write_text(script)
    return folder / f"my_{name}"


def test_copied_scripts_train_on_six_channels_exactly_and_probe_what_they_trained(tmp_path, capsys):
    six = SIX.copy()
    six[..., 0] *= -1e-7  # a mean that is written with an exponent
    np.save(tmp_path / "images.npy", six)
    own_loss = {"loss=loss, accuracy=accuracy)": "loss=loss, accuracy=accuracy, mine=2 * loss)"}
    script, run = copied_script("train_moco.py", tmp_path, own_loss), tmp_path / "run"
    call_main(script, *FLAGS.split(), "--output", run, "--workers", 0)
    said = capsys.readouterr().out
    assert "6 channels of 20 x 24 pixels" in said and "measured, as ImageNet's do not fit" in said
    args = json.loads((run / "args.json").read_text())
    assert args["data"] == "own images (memmap)" and "own images (memmap)" in said  # whatever --data says
    assert args["mean"] == pytest.approx(six.mean(axis=(0, 1, 2)).tolist(), rel=1e-4, abs=0)
    lines = metrics_of(run)
    assert len(lines) == 10 and all(line["mine"] == pytest.approx(2 * line["loss"]) for line in lines[1:])
    assert Image.open(run / "curves.png").size[1] > 900  # five panels in three rows of 330 pixels
    shutil.copytree(run, tmp_path / "cut")
    for step in (8, 9):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{step}")
    call_main(script, *FLAGS.split(), "--output", tmp_path / "cut", "--workers", 2, "--resume")
    assert_same_run(tmp_path / "cut", run)

    config = json.loads((run / "backbone" / "config.json").read_text())
    assert config["moco"]["data"] == args["data"] and not config["moco"]["data_on_hub"]
    config = config["pretrained_cfg"]
    assert config["input_size"] == [6, 16, 16] and config["mean"] == args["mean"] and config["std"] == args["std"]
    script = copied_script("linear_probe.py", tmp_path)
    unfinished = tmp_path / "unfinished"  # without backbone/: args.json says what it takes
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("backbone"))
    for backbone in (run, unfinished, "random"):
        words = ["--backbone", backbone, "--output", tmp_path / "probe", *PROBE.split()]
        capsys.readouterr()
        call_main(script, *words, *(["--arch", "resnet10"] if backbone == "random" else []))
        assert ("measured" in capsys.readouterr().out) == (backbone == "random")  # otherwise those of pre-training
        results = json.loads((tmp_path / "probe" / "results.json").read_text())
        assert 0 <= results["top1"] <= 100 and results["data"] == args["data"]
        shutil.rmtree(tmp_path / "probe")
    with pytest.raises(UserError, match="takes images of 6 channels, and --data shapes has 3"):
        call_main("linear_probe.py", "--backbone", run, "--output", tmp_path / "probe", "--data", "shapes")
