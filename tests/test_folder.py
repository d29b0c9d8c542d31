"""Folders of images as people have them: splits, classes, links, and what is neither.

pytest tests/test_folder.py
"""

import itertools
import os
import socket

import datasets
import pytest

from moco.data.folder import list_files
from moco.data.load import load_splits
from moco.data.shapes import draw_scene, encode_jpeg

IMAGE = encode_jpeg(draw_scene("test", 0)[0])


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE)
    return root


def labels_of(dataset):
    """{file name: class} of rows, or the file names if they have no labels."""
    dataset = dataset.dataset
    names = [record["path"].rsplit("/", 1)[1] for record in dataset["image"]]
    if "label" not in dataset.column_names:
        return names
    return {name: dataset.features["label"].names[label] for name, label in zip(names, dataset["label"], strict=True)}


def test_a_class_called_train_is_a_class(tmp_path):
    train_set, test_set = load_splits(str(write(tmp_path, "bus/0.jpg", "car/1.jpg", "test tube/2.jpg", "train/3.jpg")))
    assert labels_of(train_set) == {"0.jpg": "bus", "1.jpg": "car", "2.jpg": "test tube", "3.jpg": "train"}
    assert test_set is None


def test_files_called_after_splits_are_images_like_others(tmp_path):
    train_set, test_set = load_splits(str(write(tmp_path, "0.jpg", "test-1.PNG", "train_2.jpeg", "val.3.gif")))
    assert labels_of(train_set) == ["0.jpg", "test-1.PNG", "train_2.jpeg", "val.3.gif"] and test_set is None


@pytest.mark.parametrize("train, val", [("train", "val"), ("Training", "validation"), ("train", "valid")])
def test_splits_by_any_of_their_names_beside_other_folders(tmp_path, capsys, train, val):
    names = [f"{train}/cat/0.jpg", f"{train}/dog/deep/1.jpg", f"{val}/dog/2.jpg", "extra/3.jpg"]
    train_set, test_set = load_splits(str(write(tmp_path / "in" / "a folder", *names)))
    assert labels_of(train_set) == {"0.jpg": "cat", "1.jpg": "dog"}
    assert labels_of(test_set) == {"2.jpg": "dog"}  # by the number it has in training, though it is the only class
    assert "left out: extra" in capsys.readouterr().out


def test_flat_splits_and_images_beside_classes_have_no_labels(tmp_path):
    train_set, test_set = load_splits(str(write(tmp_path / "flat", "train/0.jpg", "val/1.jpg")))
    assert labels_of(train_set) == ["0.jpg"] and labels_of(test_set) == ["1.jpg"]
    train_set, _ = load_splits(str(write(tmp_path / "mixed", "0.jpg", "cat/1.jpg", "dog/2.jpg")))
    assert labels_of(train_set) == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_split_is_named_as_its_folder_is(tmp_path):
    write(tmp_path, "Base/cat/0.jpg", "Base/dog/1.jpg", "Extra/cat/2.jpg", "Extra/dog/3.jpg")
    train_set, _ = load_splits(str(tmp_path), split="Extra")
    assert labels_of(train_set) == {"2.jpg": "cat", "3.jpg": "dog"}


def test_links_are_followed_and_a_circle_is_walked_once(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", "cat/0.jpg", "dog/1.jpg", "val/cat/2.jpg")
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / "data" / "train" / name).symlink_to(elsewhere / name)
    (tmp_path / "data" / "val").symlink_to(elsewhere / "val")
    (elsewhere / "cat" / "up").symlink_to(tmp_path / "data")
    train_set, test_set = load_splits(str(tmp_path / "data"))
    assert labels_of(train_set) == {"0.jpg": "cat", "1.jpg": "dog"} and labels_of(test_set) == {"2.jpg": "cat"}


def test_what_is_no_image_is_counted_and_what_is_hidden_is_not(tmp_path, capsys):
    write(tmp_path, "cat/0.jpg", "dog/1.jpg", "dog/.2.jpg", ".cache/3.jpg", "labels.csv", "dog/Thumbs.db", "LICENSE")
    train_set, _ = load_splits(str(tmp_path))
    assert labels_of(train_set) == {"0.jpg": "cat", "1.jpg": "dog"}
    assert "left out 3 files in" in (out := capsys.readouterr().out) and "not images: .csv, .db, LICENSE" in out


@pytest.mark.parametrize("strange", ["cow", "images"])
def test_a_split_with_classes_that_are_not_trained_on_has_no_labels(tmp_path, capsys, strange):
    """Classes of something else, or the one folder of a split that has no classes."""
    write(tmp_path, "train/cat/0.jpg", "train/dog/1.jpg", f"val/{strange}/2.jpg", f"val/{strange}/3.jpg")
    train_set, test_set = load_splits(str(tmp_path))
    assert labels_of(train_set) == {"0.jpg": "cat", "1.jpg": "dog"} and labels_of(test_set) == ["2.jpg", "3.jpg"]
    assert f"left out the labels of val, with classes that are not trained on: {strange}" in capsys.readouterr().out


def test_images_beside_splits_are_counted_and_left_out(tmp_path, capsys):
    train_set, test_set = load_splits(str(write(tmp_path, "Training/0.jpg", "Testing/1.jpg", "preview.png")))
    assert labels_of(train_set) == ["0.jpg"] and labels_of(test_set) == ["1.jpg"]
    assert "left out 1 images in" in (out := capsys.readouterr().out) and "beside the splits" in out


def test_folders_linked_to_from_several_places_are_in_all_of_them(tmp_path):
    elsewhere = write(tmp_path / "data" / "raw", "cat/0.jpg", "dog/1.jpg")
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir()
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).symlink_to(elsewhere / name)
    for dataset in load_splits(str(tmp_path / "data")):
        assert labels_of(dataset) == {"0.jpg": "cat", "1.jpg": "dog"}


def test_folders_that_link_to_each_other_are_walked_once_a_link(tmp_path):
    """In every order there is, ten of them would be ten million walks."""
    write(tmp_path, *(f"{i}/{i}.jpg" for i in range(10)))
    for i, j in itertools.permutations(range(10), 2):
        (tmp_path / str(i) / f"to {j}").symlink_to(tmp_path / str(j))
    images, others, skipped = list_files(str(tmp_path))
    assert {path.rsplit("/", 1)[1] for path in images} == {f"{i}.jpg" for i in range(10)}
    assert len(images) <= 110 and not others and not skipped


def test_what_would_block_or_has_no_name_is_skipped_and_counted(tmp_path, capsys):
    write(tmp_path, "cat/0.jpg", "dog/1.jpg")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "dog" / "socket.jpg"))
    (tmp_path / "cat" / "self.jpg").symlink_to(tmp_path / "cat" / "self.jpg")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nothing")
    with open(bytes(tmp_path / "cat") + b"/caf\xe9.jpg", "wb") as file:
        file.write(IMAGE)
    train_set, _ = load_splits(str(tmp_path))
    assert labels_of(train_set) == {"0.jpg": "cat", "1.jpg": "dog"}
    assert "left out 5 that are not regular files, or have no name in UTF-8" in capsys.readouterr().out


def test_what_was_found_is_said(tmp_path, capsys):
    cases = [
        (["train/cat/0.jpg", "train/dog/1.PNG", "val/cat/2.jpg"], "train 1 jpg, 1 png; val 1 jpg; 2 classes"),
        (["0.jpg", "1.jpg"], "2 jpg; no labels"),
        (["only/0.jpg", "only/1.jpg"], "no labels: all images are in one folder"),
        (["train/only/0.jpg", "val/only/1.jpg"], "no labels: there is one class alone"),
        (["0.jpg", "cat/1.jpg", "dog/2.jpg"], "no labels: some images lie beside the class folders"),
    ]
    for number, (names, words) in enumerate(cases):
        load_splits(str(write(tmp_path / str(number), *names)))
        assert words in capsys.readouterr().out


def test_the_splits_of_saved_data_by_any_of_their_names(tmp_path, capsys):
    rows = {n: datasets.Dataset.from_dict({"image": [IMAGE] * n, "label": [0] * n}) for n in (1, 2, 3)}
    rows = {n: part.cast_column("image", datasets.Image()) for n, part in rows.items()}
    datasets.DatasetDict(train=rows[3], extra=rows[1], valid=rows[2]).save_to_disk(tmp_path / "saved")
    train_set, test_set = load_splits(str(tmp_path / "saved"))
    assert (len(train_set), len(test_set)) == (3, 2)
    assert "split train to train on, valid to test on; left out: extra" in capsys.readouterr().out
