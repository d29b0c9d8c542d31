"""Labels and images of the layouts in which data is found, read back row by row; and labels that do not match.

pytest tests/test_layouts.py
"""

import io
import json
import shutil
import tarfile

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from hub import serving

from moco.backbone import load_backbone
from moco.backbone.embed import embed, write_duplicates
from moco.data.labels import count_classes, has_labels, monitor_test_set
from moco.data.load import load_splits
from moco.data.shapes import draw_scene, encode_jpeg
from moco.errors import UserError

IMAGES = [encode_jpeg(draw_scene("train", number)[0]) for number in range(18)]
NAMES = ["great white shark", "Mähnenwolf", "n01440764"]
CLASS_OF = [NAMES[number * 7 % 3] for number in range(18)]  # of each image, in no order
TRAIN, TEST, MORE = range(9), range(9, 14), range(14, 18)


def pairs(dataset):
    """{(number of the image, name of its class)} of every row, read from its pixels' bytes; "" without labels."""
    found = []
    names = getattr(dataset.features.get("label"), "names", None)
    for row in range(len(dataset)):
        values = dataset[row]
        record, label = values["image"], values.get("label", "")
        data = record["bytes"] or open(record["path"], "rb").read()
        found.append((IMAGES.index(data), names[label] if names and label >= 0 else str(label)))
    assert len(set(found)) == len(found)
    return sorted(found)


def expected(numbers, label=lambda number: CLASS_OF[number]):
    return [(number, label(number)) for number in numbers]


def unlabelled(numbers):
    return expected(numbers, lambda number: "")


def write(root, numbers, place):
    for number in numbers:
        path = root / place(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGES[number])


def table(numbers, label="label", image="image", **more):
    numbers = list(numbers)
    columns = {image: [{"bytes": IMAGES[n], "path": f"{n}.jpg"} for n in numbers]}
    columns[label] = [NAMES.index(CLASS_OF[n]) for n in numbers]
    kinds = {image: datasets.Image(), label: datasets.ClassLabel(names=NAMES)}
    for name, (kind, values) in more.items():
        columns[name], kinds[name] = [values(n) for n in numbers], kind
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def imagenet(root):
    write(root, TRAIN, lambda n: f"train/{CLASS_OF[n]}/{n}.JPEG")
    write(root, TEST, lambda n: f"val/{CLASS_OF[n]}/ILSVRC2012_val_{n:08}.JPEG")
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"")


def kaggle(root):
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    write(data, TRAIN, lambda n: f"train/{CLASS_OF[n]}/{CLASS_OF[n]}_{n}.JPEG")
    write(data, TEST, lambda n: f"val/ILSVRC2012_val_{n:08}.JPEG")
    write(data, MORE, lambda n: f"test/ILSVRC2012_test_{n:08}.JPEG")
    (root / "ILSVRC" / "Annotations").mkdir()
    (root / "ILSVRC" / "Annotations" / "metadata.xml").write_text("<annotation/>")
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n")


def tiny_imagenet(root):
    write(root, TRAIN, lambda n: f"train/{CLASS_OF[n]}/images/{CLASS_OF[n]}_{n}.JPEG")
    write(root, TEST, lambda n: f"val/images/val_{n}.JPEG")
    write(root, MORE, lambda n: f"test/images/test_{n}.JPEG")
    for name in ("wnids.txt", "words.txt", "val/val_annotations.txt", "metadata.txt", "metadata.json", "metadata.yaml"):
        (root / name).write_text("{}")


def folders_beside(root):
    write(root, TRAIN, lambda n: f"train/{CLASS_OF[n]}/{n}.png")
    write(root, MORE, lambda n: f"unlabeled/{n}.png")


def saved(root):
    table(TRAIN).save_to_disk(root)


def saved_splits(root):
    datasets.DatasetDict(train=table(TRAIN), validation=table(TEST)).save_to_disk(root)


def shards(root, order=list):
    rows = order(TRAIN)
    for file in range(3):
        part = rows[3 * file : 3 * file + 3]
        table(part).to_parquet(root / "data" / f"train-{file:05}-of-00003.parquet", batch_size=2)
    table(order(TEST)).to_parquet(root / "data" / "test-00000-of-00001.parquet", batch_size=2)


def sorted_shards(root):
    shards(root, lambda numbers: sorted(numbers, key=lambda n: CLASS_OF[n]))


def metadata_csv(root):
    write(root, TRAIN, lambda n: f"train/{n}.jpg")
    lines = [f"{n}.jpg,{CLASS_OF[n]}" for n in TRAIN]
    (root / "train" / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))


def metadata_jsonl(root):
    write(root, TRAIN, lambda n: f"train/{n}.jpg")
    lines = [json.dumps({"file_name": f"{n}.jpg", "label": NAMES.index(CLASS_OF[n])}) for n in TRAIN]
    (root / "train" / "metadata.jsonl").write_text("\n".join(lines))


def webdataset(root):
    root.mkdir()
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        with tarfile.open(root / f"{split}-0000.tar", "w") as tar:
            for n in numbers:
                for suffix, data in (("jpg", IMAGES[n]), ("cls", str(NAMES.index(CLASS_OF[n])).encode())):
                    entry = tarfile.TarInfo(f"{n:06}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def card(root, configs):
    """A dataset card that names the files of {configuration: {split: pattern}}."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - {{split: {split}, path: {pattern}}}" for split, pattern in splits.items()]
    (root / "README.md").write_text("\n".join([*lines, "---\n"]))


def cifar10(root):
    table(TRAIN, image="img").to_parquet(root / "plain_text" / "train-00000-of-00001.parquet", batch_size=4)
    table(TEST, image="img").to_parquet(root / "plain_text" / "test-00000-of-00001.parquet", batch_size=4)
    card(root, {"plain_text": {"train": "plain_text/train-*", "test": "plain_text/test-*"}})


def cifar100(root):
    coarse = datasets.ClassLabel(names=["a", "b"]), lambda n: n % 2
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        part = table(numbers, label="fine_label", image="img", coarse_label=coarse)
        part.to_parquet(root / "cifar100" / f"{split}-00000-of-00001.parquet")
    card(root, {"cifar100": {"train": "cifar100/train-*", "test": "cifar100/test-*"}})


def food101(root):
    for file in range(3):
        part = table(TRAIN[3 * file : 3 * file + 3])
        part.to_parquet(root / "data" / f"train-{file:05}-of-00003.parquet", batch_size=2)
    table(TEST).to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    card(root, {"default": {"train": "data/train-*", "validation": "data/validation-*"}})


def stl10(root):
    table(TRAIN).to_parquet(root / "data" / "train-00000-of-00001.parquet")
    table(TEST).to_parquet(root / "data" / "test-00000-of-00001.parquet")
    part = table(MORE)
    part = part.remove_columns("label").add_column("label", [-1] * len(part), feature=part.features["label"])
    part.to_parquet(root / "data" / "unlabeled-00000-of-00001.parquet")
    card(root, {"default": {split: f"data/{split}-*" for split in ("train", "test", "unlabeled")}})


def numbered(number):
    return str(NAMES.index(CLASS_OF[number]))


LABELLED, BOTH = (expected(TRAIN), None), (expected(TRAIN), expected(TEST))
LAYOUTS = [
    (imagenet, {}, BOTH), (kaggle, {}, (expected(TRAIN), unlabelled(TEST))),
    (tiny_imagenet, {}, (expected(TRAIN), unlabelled(TEST))), (folders_beside, {}, LABELLED),
    (folders_beside, {"split": "unlabeled"}, (unlabelled(MORE), None)), (saved, {}, LABELLED), (saved_splits, {}, BOTH),
    (saved_splits, {"split": "validation"}, (expected(TEST), None)), (shards, {}, BOTH), (sorted_shards, {}, BOTH),
    (metadata_csv, {}, LABELLED), (metadata_jsonl, {}, (expected(TRAIN, numbered), None)),
    (webdataset, {"image_column": "jpg", "label_column": "cls"}, (expected(TRAIN, numbered), expected(TEST, numbered))),
]  # fmt: skip
ON_HUB = [
    (cifar10, {}, BOTH), (cifar100, {"label_column": "fine_label"}, BOTH), (food101, {}, BOTH), (stl10, {}, BOTH),
    (stl10, {"split": "unlabeled"}, (expected(MORE, lambda n: "-1"), expected(TEST))),
]  # fmt: skip


def name_of(value):
    return value.__name__ if callable(value) else ""


@pytest.mark.parametrize("layout, options, found", LAYOUTS, ids=name_of)
def test_images_keep_their_labels(tmp_path, layout, options, found):
    layout(tmp_path / "data")
    train, test = load_splits(str(tmp_path / "data"), **options)
    assert (pairs(train), test and pairs(test)) == found


@pytest.mark.parametrize("layout, options, found", ON_HUB, ids=name_of)
@pytest.mark.parametrize("streamed", [True, False])
def test_images_on_the_hub_keep_their_labels(tmp_path, monkeypatch, layout, options, found, streamed):
    (tmp_path / "datasets" / "some" / "one").mkdir(parents=True)
    layout(tmp_path / "datasets" / "some" / "one")
    with serving(tmp_path) as hub:
        hub.here(monkeypatch)
        train, test = load_splits("some/one", no_streaming=not streamed, **options)
        assert (pairs(train), test and pairs(test)) == found


# ---- configurations, splits and cards


def test_what_there_is_to_choose_from_is_listed(tmp_path, monkeypatch):
    root = tmp_path / "datasets" / "some" / "two"
    for config, numbers in (("small", TRAIN), ("large", TEST)):
        table(numbers).to_parquet(root / config / "train.parquet")
    card(root, {config: {"train": f"{config}/*.parquet"} for config in ("small", "large")})
    with serving(tmp_path) as hub:
        hub.here(monkeypatch)
        with pytest.raises(UserError, match="some/two has the configurations small, large; name one with --config"):
            load_splits("some/two")
        with pytest.raises(UserError, match="--config middle is not in some/two, which has small, large"):
            load_splits("some/two", config="middle")
        with pytest.raises(UserError, match="--split unlabeled is not in some/two, whose splits are train"):
            load_splits("some/two", config="small", split="unlabeled")
        assert [pairs(load_splits("some/two", config=config)[0]) for config in ("small", "large")] == [*BOTH]
    imagenet(tmp_path / "folder")
    with pytest.raises(UserError, match="--split extra is not in .*, whose splits are train, val"):
        load_splits(str(tmp_path / "folder"), split="extra")
    with pytest.raises(UserError, match="--config small names a part of a dataset on the Hub"):
        load_splits(str(tmp_path / "folder"), config="small")
    with pytest.raises(UserError, match="shapes has no --config"):
        load_splits("shapes", config="small")


def test_names_of_classes_in_the_card_count_for_a_stream(tmp_path, monkeypatch):
    root = tmp_path / "datasets" / "some" / "numbers"
    root.mkdir(parents=True)
    part = table(TRAIN).cast(datasets.Features(image=datasets.Image(), label=datasets.Value("int32")))
    pq.write_table(part.data.table.replace_schema_metadata(None), root / "train.parquet")
    names = "\n".join(f"          '{i}': {name}" for i, name in enumerate(NAMES))
    (root / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        f"      class_label:\n        names:\n{names}\n---\n"
    )
    with serving(tmp_path) as hub:
        hub.here(monkeypatch)
        train, _ = load_splits("some/numbers")
        assert pairs(train) == expected(TRAIN) and count_classes(train, None, "some/numbers") == 3


# ---- labels that do not match


def write_splits(folder, kind, splits):
    """{split: data set} as `save_to_disk` writes them, or as a parquet file each."""
    if kind == "saved":
        datasets.DatasetDict(splits).save_to_disk(folder)
        return
    for split, part in splits.items():
        part.to_parquet(folder / f"{split}.parquet")


def renamed(part, names):
    return part.cast_column("label", datasets.ClassLabel(names=names))


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_test_split_with_names_in_another_order_is_not_compared(tmp_path, capsys, kind):
    """Its numbers mean other classes, so the monitor holds training images out, and the probe refuses."""
    write_splits(tmp_path / "data", kind, {"train": table(TRAIN), "test": renamed(table(TEST), NAMES[::-1])})
    train, test = load_splits(str(tmp_path / "data"))
    assert monitor_test_set(train, test, "D") is None and "in another order" in capsys.readouterr().out
    assert monitor_test_set(train, train, "D") is train and not capsys.readouterr().out
    with pytest.raises(UserError, match="must name the same classes in the same order"):
        count_classes(train, test, "D")


def test_files_of_one_split_with_names_in_another_order_are_refused(tmp_path):
    table(TRAIN).to_parquet(tmp_path / "data" / "train-0.parquet")
    renamed(table(TEST), NAMES[::-1]).to_parquet(tmp_path / "data" / "train-1.parquet")
    with pytest.raises(UserError, match="train-1.parquet names the classes .* so one number would mean two classes"):
        load_splits(str(tmp_path / "data"))


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_an_empty_test_split_is_none(tmp_path, capsys, kind):
    write_splits(tmp_path / "data", kind, {"train": table(TRAIN), "test": table([0]).select([])})
    train, test = load_splits(str(tmp_path / "data"))
    assert pairs(train) == expected(TRAIN) and test is None
    assert "the test split of" in (said := capsys.readouterr().out) and "has no rows, and is left out" in said


def test_labels_are_counted_with_those_that_are_missing(tmp_path):
    """By the column, also of rows that were selected."""
    part = datasets.Dataset.from_dict({"image": [b""] * 4, "label": [5, None, 3, 9]})
    part.cast_column("image", datasets.Image(decode=False)).save_to_disk(tmp_path / "data")
    images, _ = load_splits(str(tmp_path / "data"))
    assert images.label_range() == (-1, 9) and not has_labels(images)
    assert images.select_rows([2, 0]).label_range() == (3, 5) and has_labels(images.select_rows([2, 0]))


def test_features_are_written_beside_labels_of_any_kind(tmp_path):
    labels = ["Bär", None, "Ara", "Bär"]
    images = [*IMAGES[:3], IMAGES[0]]
    part = datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())
    part.save_to_disk(tmp_path / "saved")
    part.to_parquet(tmp_path / "parquet" / "train.parquet")
    for kind in ("saved", "parquet"):
        target = tmp_path / f"{kind}.parquet"
        embed(*load_backbone("random", "resnet10"), str(tmp_path / kind), target, workers=1, duplicates=0.9999)
        lines = (tmp_path / f"{kind}.csv").read_text().splitlines()
        assert lines == ["file,duplicate,cosine", "row 0,row 3,1.0000"]
    found = [pq.read_table(tmp_path / f"{kind}.parquet").to_pydict() for kind in ("saved", "parquet")]
    assert found[0] == found[1] and found[0]["label"] == labels and len(found[0]["feature"]) == 4


def test_a_damaged_image_is_nobodys_duplicate(tmp_path):
    """It has the feature of its neighbour."""
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(IMAGES[i // 2])
    (tmp_path / "3.jpg").write_bytes(b"damaged")
    embed(*load_backbone("random", "resnet10"), str(tmp_path), tmp_path / "out.parquet", workers=0, duplicates=0.9999)
    (line,) = (tmp_path / "out.csv").read_text().splitlines()[1:]
    assert "0.jpg" in line and "1.jpg" in line
    names, twins = ("a.jpg", "b.jpg", "a.jpg"), torch.ones(3, 4)  # the last is damaged, and has the name of another
    assert write_duplicates(tmp_path / "names.csv", names, twins, 0.9, {2}) == 1


@pytest.mark.parametrize("there", ["out.parquet", "out.png", "out.csv", "folder"])
def test_what_cannot_be_written_is_refused_before_features_are_made(tmp_path, there):
    (tmp_path / there).write_text("mine")
    target = tmp_path / there / "out.parquet" if there == "folder" else tmp_path / "out.parquet"
    with pytest.raises(UserError, match="^OUT [^\\n]*(must not exist yet|cannot be written)[^\\n]*$"):
        embed(*load_backbone("random", "resnet10"), "nowhere", target, duplicates=0.9)
    assert (tmp_path / there).read_text() == "mine"


# ---- one commit


def test_a_run_goes_on_with_the_commit_that_it_was_begun_on(tmp_path, monkeypatch, capsys):
    for root, numbers in (("old", TRAIN), ("new", range(14))):
        table(numbers).to_parquet(tmp_path / root / "datasets" / "some" / "one" / "train.parquet", batch_size=4)
    with serving(tmp_path / "old") as hub:
        hub.here(monkeypatch)
        begun, _ = load_splits("some/one")
        first, other = hub.main, "decade" + hub.main[6:]
        assert begun.commit == f"some/one@{first}" and pairs(begun) == expected(TRAIN)
        hub.root, hub.main, hub.older = tmp_path / "new", other, {first: tmp_path / "old"}
        capsys.readouterr()
        new, _ = load_splits("some/one")
        assert pairs(new) == expected(range(14)) and "has moved" not in capsys.readouterr().out
        resumed, _ = load_splits("some/one", commit=begun.commit)
        assert f"some/one has moved to {other[:12]} since the run began, which goes on with {first[:12]}" in (
            capsys.readouterr().out
        )
        assert pairs(resumed) == expected(TRAIN)
        assert (resumed.commit, resumed.fingerprint()) == (begun.commit, begun.fingerprint())
        downloaded, _ = load_splits("some/one", commit=begun.commit, no_streaming=True)
        assert downloaded.commit == begun.commit and downloaded.fingerprint() == begun.fingerprint()
        shutil.copytree(tmp_path / "old" / "datasets" / "some" / "one", tmp_path / "here")
        local, _ = load_splits(str(tmp_path / "here"), commit=begun.commit)
        assert local.commit is None and local.fingerprint() == begun.fingerprint()
