"""The built-in data: a pure function of (split, index), with labels and boxes that fit. pytest tests/test_shapes.py"""

import io

import datasets
import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image

from benchmarks.features import TARGETS, linear_predict
from moco.augment import AUGMENTATIONS
from moco.backbone import load_backbone
from moco.data.decode import decode_image
from moco.data.labels import class_names
from moco.data.load import load_splits
from moco.data.shapes import (
    CLASSES,
    PALETTES,
    PATTERNS,
    SPLITS,
    VERSION,
    check_version,
    draw_pattern,
    draw_scene,
    encode_jpeg,
    shapes_dataset,
)
from moco.errors import UserError
from moco.knn import knn_predict


def test_a_scene_depends_on_nothing_but_its_arguments():
    image, labels, boxes = draw_scene("train", 5, objects=3)
    np.random.seed(1)
    draw_scene("train", 6)
    again = draw_scene("train", 5, objects=3)
    assert all(np.array_equal(one, other) for one, other in zip((image, labels, boxes), again))
    for other in (draw_scene("test", 5, objects=3), draw_scene("train", 6, objects=3), draw_scene("train", 5)):
        assert not np.array_equal(image, other[0])
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8


def test_classes_are_drawn_evenly():
    counts = np.bincount([draw_scene("train", index, size=8)[1][0] for index in range(1000)], minlength=len(CLASSES))
    assert counts.min() > 28 and counts.max() < 72  # 50 expected, standard deviation 6.9


@pytest.mark.parametrize("objects", [1, 4])
def test_boxes_lie_around_what_is_drawn(objects):
    """Outside its boxes an image is quiet: brightness changes from pixel to pixel as noise and shading do."""
    inside, outside = [], []
    for index in range(40):
        image, labels, boxes = draw_scene("train", index, size=96, objects=objects)
        assert 1 <= len(labels) == len(boxes) <= objects
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 96).all() and (boxes[:, 2:] - boxes[:, :2] > 8).all()
        change = np.abs(np.diff(image.astype(float).mean(2), axis=1))
        covered = np.zeros(change.shape, bool)
        for left, top, right, bottom in boxes.astype(int):
            covered[max(0, top - 2) : bottom + 2, max(0, left - 3) : right + 2] = True
        if not covered.all():
            inside.append(change[covered].mean())
            outside.append(change[~covered].mean())
    assert len(outside) > 30
    assert np.mean(outside) < 0.5 * np.mean(inside)
    assert np.mean(np.array(outside) < inside) > 0.9


def test_no_object_hides_another():
    for index in range(20):
        _, _, boxes = draw_scene("test", index, size=96, objects=5)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        for i, centre in enumerate(centres):
            others = np.delete(boxes, i, axis=0)
            assert not ((others[:, :2] < centre) & (centre < others[:, 2:])).all(1).any()


def test_every_pattern_is_another():
    rows, columns = (np.mgrid[:64, :64] - 32) / 16
    patterns = np.stack([draw_pattern(name, columns, rows, 1 / 16) for name in PATTERNS])
    assert patterns.min() >= 0 and patterns.max() <= 1
    correlation = np.corrcoef(patterns.reshape(len(PATTERNS), -1))
    assert (np.abs(correlation - np.eye(len(PATTERNS))) < 0.8).all()


def test_the_data_set_travels_as_jpeg_bytes():
    train, test = load_splits("shapes")
    assert (len(train), len(test)) == (SPLITS["train"], SPLITS["test"])
    image, labels, _ = draw_scene("test", 7)
    assert list(train.features["label"].names) == list(CLASSES) and test[7]["label"] == labels[0]
    assert test[7]["image"]["bytes"] == encode_jpeg(image)
    assert np.array_equal(decode_image(test[7]["image"]), np.asarray(Image.open(io.BytesIO(encode_jpeg(image)))))


def hues(image):
    """Hues in turns of the clearly coloured pixels of an image."""
    hue, saturation, value = np.asarray(Image.fromarray(image).convert("HSV")).reshape(-1, 3).T / 255
    return hue[(saturation > 0.25) & (value > 0.3)]


def test_a_split_that_was_just_drawn_names_the_classes_of_one_from_the_cache(tmp_path, monkeypatch):
    """Drawing was interrupted after the training split, or another process drew it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("moco.data.shapes.SPLITS", {"train": 40, "test": 40})
    shapes_dataset("train")
    train, test = (shapes_dataset(split) for split in ("train", "test"))
    assert class_names(train) == class_names(test) == list(CLASSES)


def test_a_hue_tells_the_palette_after_the_shifts_of_v2_but_not_of_v1():
    """As the module's docstring argues: by the nearest palette, of the hues shifted as far as a recipe shifts them."""
    palettes = np.array(list(PALETTES.values()))

    def nearest(hue):
        return np.abs((hue - palettes + 0.5) % 1 - 0.5).argmin()

    right = {"v1": [], "v2": [], "simclr": []}
    rng = np.random.default_rng(0)
    for index in range(200):
        image, labels, _ = draw_scene("train", index)
        found = hues(image)
        if len(found) < 20:
            continue
        angles = 2 * np.pi * found
        hue = np.arctan2(np.sin(angles).mean(), np.cos(angles).mean()) / (2 * np.pi)
        for recipe in right:
            shift = rng.uniform(-1, 1) * AUGMENTATIONS[recipe][0]["jitter"][3]
            right[recipe].append(nearest(hue + shift) == labels[0] % len(PALETTES))
    shares = {recipe: np.mean(hits) for recipe, hits in right.items()}
    assert len(right["v1"]) > 150 and shares["v2"] > 0.98 and shares["simclr"] > 0.95 and shares["v1"] < 0.75


def test_a_backbone_or_run_of_another_version_is_refused(tmp_path):
    for settings in ({"data": "shapes"}, {"data": "shapes", "data_version": VERSION + 1}):
        with pytest.raises(UserError, match="of the built-in data, and this is version"):
            check_version(settings, "shapes")
    check_version({"data": "shapes", "data_version": VERSION}, "shapes")
    check_version({"data": "photographs"}, "shapes")
    check_version({"data": "shapes"}, "photographs")


def test_pixels_alone_do_not_tell_the_classes():
    def pixels(split, n):
        scenes = [draw_scene(split, index) for index in range(n)]
        images = torch.from_numpy(np.stack([scene[0] for scene in scenes])).float()
        return (images - images.mean((1, 2), keepdim=True)).flatten(1), torch.tensor([scene[1][0] for scene in scenes])

    bank, bank_labels = pixels("train", 1500)
    features, labels = pixels("test", 300)
    accuracy = (knn_predict(features, bank, bank_labels, len(CLASSES), k=20).argmax(1) == labels).float().mean().item()
    assert 0.1 < accuracy < 0.6, accuracy


def test_the_supervised_backbone_names_the_version_that_it_saw(tmp_path):
    done = run_script("benchmarks/supervised.py", "--epochs", "0", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    check_version(load_backbone(tmp_path)[1]["settings"], "shapes")


def test_what_features_hold_is_found_by_a_linear_classifier_even_in_a_small_direction():
    labels = torch.arange(400) % len(CLASSES)
    names = [CLASSES[label].split(" ", 1) for label in labels]
    assert TARGETS["pattern"][0](labels).tolist() == [PATTERNS.index(pattern) for _, pattern in names]
    palette = TARGETS["palette"][0](labels)
    assert palette.tolist() == [list(PALETTES).index(palette) for palette, _ in names]
    features = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    features[:, 3] *= 1e-3
    features[:, 3] += 2e-3 * (palette - 0.5)
    bank, queries, bank_labels, asked = features[:300], features[300:], palette[:300], palette[300:]
    by_knn, by_linear = knn_predict(queries, bank, bank_labels, 2, k=20), linear_predict(queries, bank, bank_labels, 2)
    assert (by_knn.argmax(1) == asked).float().mean() < 0.65
    assert (by_linear.argmax(1) == asked).float().mean() > 0.8
