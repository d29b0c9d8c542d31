"""From files to batches: what is read, in which order, and what happens to files that cannot be.

pytest tests/test_data.py
"""

import io
import itertools
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from moco.augment import AUGMENTATIONS, MEAN, STD, cut_crops, random_crop_boxes
from moco.data.batches import center_crop, center_crops, crop_generator
from moco.data.decode import decode_crops, decode_image
from moco.data.labels import has_labels
from moco.data.load import IndexedImages, check_trainable, load_splits
from moco.data.order import Order, batch_rows
from moco.data.views import FastViews
from moco.errors import UserError


def picture(seed, height=30, width=40, channels=3):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, channels), np.uint8).squeeze()
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def write_images(folder, n, **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        picture(i, **kwargs).save(folder / f"{i:03}.jpg")
    return folder


def crop_pairs(images, size, rows, seed=0):
    """Two crops of each of [(epoch, row), ...], (n, 2, size, size, 3), and the undecodable images."""
    crops, _, undecodable = FastViews(AUGMENTATIONS["v2"], size, MEAN, STD).crops(images, seed)[rows, ()]
    return torch.stack(crops, dim=1), undecodable


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


# ---- names


def test_a_folder_of_classes_gives_images_and_labels(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "pets" / name, 3)
    train_set, test_set = load_splits(str(tmp_path / "pets"))
    assert len(train_set) == 6 and test_set is None
    assert train_set.features["label"].names == ["cat", "dog"] and train_set["label"] == [0] * 3 + [1] * 3


def test_a_flat_folder_has_no_labels(tmp_path):
    train_set, _ = load_splits(str(write_images(tmp_path / "flat", 3)))
    assert train_set.column_names == ["image"] and len(train_set) == 3


def test_train_and_val_folders_are_splits(tmp_path):
    for split, n in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            write_images(tmp_path / "pets" / split / name, n)
    train_set, test_set = load_splits(str(tmp_path / "pets"))
    assert len(train_set) == 6 and len(test_set) == 4


def parquet(folder, **columns):
    """Two parquet files with the images of `picture` in column "img", and other columns."""
    folder.mkdir()
    images = [encoded(picture(i), "JPEG") for i in range(4)]
    features = datasets.Features(img=datasets.Image(), **{name: datasets.Value("int64") for name in columns})
    whole = datasets.Dataset.from_dict({"img": images, **columns}, features=features)
    for i in range(2):
        whole.shard(2, i).to_parquet(folder / f"train-{i}.parquet")
    whole.save_to_disk(folder.parent / "saved")
    return str(folder)


def test_parquet_files_and_saved_datasets_are_read_whatever_the_columns_are_called(tmp_path):
    name = parquet(tmp_path / "parquet", coarse=[0, 1, 0, 1], fine=[3, 4, 5, 6])
    for source in (name, str(tmp_path / "saved")):
        train_set, _ = load_splits(source)
        assert train_set.column_names == ["image"]
        train_set, _ = load_splits(source, image_column="img", label_column="fine")
        assert [train_set[row]["label"] for row in range(4)] == [3, 4, 5, 6]
        expected = np.asarray(Image.open(io.BytesIO(encoded(picture(2), "JPEG")["bytes"])))
        np.testing.assert_array_equal(decode_image(train_set[2]["image"]), expected)


@pytest.mark.parametrize("format", ["torch", "numpy", "arrow", "pandas"])
def test_a_format_that_a_dataset_was_saved_with_does_not_matter(tmp_path, format):
    parquet(tmp_path / "parquet", label=[3, 4, 5, 6])
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    saved.with_format(format, columns=["img"]).save_to_disk(tmp_path / "formatted")
    images, _ = load_splits(str(tmp_path / "formatted"))
    assert [images[row]["label"] for row in range(4)] == [3, 4, 5, 6]
    assert center_crops(images, 16)[[(0, row) for row in range(4)], ()][1].tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_column_of_something_else_is_refused(tmp_path, kind):
    parquet(tmp_path / "parquet", number=[0, 1, 0, 1])
    with pytest.raises(UserError, match="--image-column number of .* does not hold images"):
        load_splits(str(tmp_path / kind), image_column="number")


def test_a_column_with_a_dot_in_its_name(tmp_path):
    columns = {"img.jpg": [encoded(picture(0), "JPEG")], "img": [7]}
    features = datasets.Features({"img.jpg": datasets.Image(), "img": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "dots" / "train.parquet")
    images, _ = load_splits(str(tmp_path / "dots"), label_column="img")
    assert images[0]["label"] == 7 and images.label_range() == (0, 7)
    assert decode_image(images[0]["image"]).shape == (30, 40, 3)


def test_names_and_columns_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    flat = write_images(tmp_path / "flat", 2)
    for name, message in {
        "nosuch": "neither 'shapes'",
        "": "neither 'shapes'",
        str(tmp_path / "nosuch"): "neither 'shapes'",
        str(flat / "000.jpg"): "neither 'shapes'",
        str(tmp_path / "empty"): "cannot be read as images",
        str(tmp_path / "texts"): "0 columns of images",
    }.items():
        with pytest.raises(UserError, match=message):
            load_splits(name)
    with pytest.raises(UserError, match="--image-column picture is not in .*, whose columns are image"):
        load_splits(str(flat), image_column="picture")


@pytest.mark.parametrize("labels, usable", [([0, 3], True), ([0, -1], False), (["a", "b"], False), (None, False)])
def test_labels_are_whole_numbers_from_0_on(labels, usable):
    columns = {"image": [b"", b""]} | ({"label": labels} if labels else {})
    assert has_labels(IndexedImages(datasets.Dataset.from_dict(columns))) is usable


# ---- one image


@pytest.mark.parametrize(
    "mode, format",
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG")],
)
def test_every_mode_becomes_rgb_as_pillow_has_it(mode, format):
    record = encoded(picture(0).convert(mode), format)
    expected = np.asarray(Image.open(io.BytesIO(record["bytes"])).convert("RGB"))
    levels = 1 if mode == "CMYK" else 0  # the two round the product of ink and black differently
    np.testing.assert_allclose(decode_image(record).astype(int), expected.astype(int), rtol=0, atol=levels)


def test_sixteen_bits_become_eight_instead_of_white():
    gray = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    image = decode_image(encoded(Image.fromarray(gray), "PNG"))
    np.testing.assert_array_equal(image, np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["folder", "parquet", "saved"])
@pytest.mark.parametrize("largest, shift", [(255, 0), (4095, 4), (4096, 8), (65535, 8)])
def test_sixteen_bits_are_scaled_by_the_range_that_the_data_has(tmp_path, capsys, kind, largest, shift):
    """By all images that were looked at, not each by its own: this one is the darker of two."""
    gray = (np.arange(64, dtype=np.uint16) * (largest // 100)).reshape(8, 8)
    records = [encoded(Image.fromarray(values), "PNG") for values in (gray, np.full((8, 8), largest, np.uint16))]
    if kind == "folder":
        for i, each in enumerate(records):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / f"{i}.png").write_bytes(each["bytes"])
    else:
        rows = datasets.Dataset.from_dict({"image": records}, features=datasets.Features(image=datasets.Image()))
        rows.save_to_disk(tmp_path / "data") if kind == "saved" else rows.to_parquet(
            tmp_path / "data" / "train.parquet"
        )
    images, _ = load_splits(str(tmp_path / "data"))
    assert f"2 of 2 images looked at have 16 bits a pixel, of values up to {largest}" in capsys.readouterr().out
    for part in (images, images.select_rows([0])):
        np.testing.assert_array_equal(decode_image(part[0]["image"])[..., 0], gray >> shift)
    boxes = lambda height, width: np.array([[0, 0, 8, 8]] * 2)  # noqa: E731
    np.testing.assert_array_equal(decode_crops(images[0]["image"], boxes, 8)[0][..., 0], gray >> shift)


def test_small_whole_numbers_in_32_bits_stay_and_fractions_are_refused():
    gray = np.arange(256, dtype=np.int32).reshape(16, 16)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(gray), "TIFF"))[..., 0], gray)
    with pytest.raises(ValueError, match="floating-point"):
        decode_image(encoded(Image.fromarray(gray.astype(np.float32) / 255), "TIFF"))


@pytest.mark.parametrize("height, width", [(300, 400), (400, 300), (224, 224), (50, 301)])
def test_the_evaluation_crop_is_torchvisions(height, width):
    image = picture(1, height, width)
    expected = np.asarray(Compose([Resize(256), CenterCrop(224)])(image)).astype(int)
    assert np.abs(center_crop(np.array(image), 224).numpy() - expected).max() <= 1


# ---- batches


def test_an_epoch_holds_every_image_at_most_once_and_drops_another_tail_each_time():
    steps_per_epoch = 103 // 8
    rows = itertools.islice(batch_rows(103, Order(8, 0), 0), steps_per_epoch * 2)
    epochs = {0: [], 1: []}
    for epoch, index in itertools.chain.from_iterable(rows):
        epochs[epoch].append(index)
    assert all(len(indices) == len(set(indices)) == 96 for indices in epochs.values())
    assert set(epochs[0]) != set(epochs[1]) and epochs[0] != sorted(epochs[0])


def draw(seed):
    return lambda height, width: random_crop_boxes(height, width, np.random.default_rng(seed), [(0.5, 1)] * 2)


@pytest.mark.parametrize("format, width", [("JPEG", 90), ("PNG", 500)])
def test_crops_are_those_of_the_whole_image(format, width):
    """Of a JPEG too small for a reduced scale, and of other formats at any size."""
    record = encoded(picture(0, height=80, width=width), format)
    image = decode_image(record)
    for seed in range(10):
        expected = cut_crops(image, draw(seed)(*image.shape[:2]), 48)
        assert all(map(torch.equal, decode_crops(record, draw(seed), 48), expected))


@pytest.mark.parametrize("height, width", [(300, 401), (517, 1030)])
def test_a_large_jpeg_is_decoded_at_a_scale_that_hardly_shows(height, width):
    """Crops begin up to half of the larger pixels aside: no pixel is outside what the ones around it are."""
    record = encoded(picture(0, height=height, width=width), "JPEG", quality=95)
    image = decode_image(record)
    for seed in range(10):
        expected = torch.stack(cut_crops(image, draw(seed)(height, width), 32)).float().permute(0, 3, 1, 2)
        crops = torch.stack(decode_crops(record, draw(seed), 32)).float().permute(0, 3, 1, 2)
        assert not crops.equal(expected)  # by another way
        low, high = (-sign * F.max_pool2d(-sign * expected, 3, stride=1) for sign in (1, -1))
        inner = crops[..., 1:-1, 1:-1]
        assert (inner >= low - 3).all() and (inner <= high + 3).all()


@pytest.mark.parametrize("start", [0, 5, 12, 13, 40])
@pytest.mark.parametrize("world", [2, 4])
def test_rows_start_at_any_step_and_join_to_those_of_one_process(start, world):
    whole = list(itertools.islice(batch_rows(103, Order(8, 1), 0), 45))
    parts = [itertools.islice(batch_rows(103, Order(8, 1, rank, world), start), 45 - start) for rank in range(world)]
    joined = [sum(step, []) for step in zip(*parts)]
    assert joined == whole[start:]


@pytest.fixture
def images(tmp_path):
    return load_splits(str(write_images(tmp_path / "images", 12)))[0]


def test_a_batch_holds_the_two_crops_of_each_image(images):
    views, undecodable = crop_pairs(images, 16, [(0, 3), (2, 7)], seed=4)
    assert views.shape == (2, 2, 16, 16, 3) and views.dtype == torch.uint8 and not undecodable
    for row, (epoch, index) in zip(views, [(0, 3), (2, 7)]):
        image = decode_image(images[index]["image"])
        boxes = random_crop_boxes(*image.shape[:2], crop_generator(4, epoch, index))
        assert row.equal(torch.stack(cut_crops(image, boxes, 16))) and not row[0].equal(row[1])


def test_crops_depend_on_seed_epoch_and_image():
    draws = [crop_generator(*key).random() for key in itertools.product((0, 1), repeat=3)]
    assert len(set(draws)) == 8 and draws[3] == crop_generator(0, 1, 1).random()


def test_workers_do_not_change_the_batches(images):
    def first(workers, start):
        views = FastViews(AUGMENTATIONS["v2"], 16, MEAN, STD)
        batches = views.batches(images, Order(4, 0, workers=workers), start)
        return [torch.cat(next(batches)[0]) for _ in range(4)]

    plain = first(workers=0, start=0)
    assert all(a.equal(b) for a, b in zip(plain, first(workers=2, start=0)))
    assert all(a.equal(b) for a, b in zip(plain[2:], first(workers=2, start=2)))


# ---- files that cannot be decoded


def damage(tmp_path, names):
    folder = write_images(tmp_path / "damaged", 6)
    for name, content in names.items():
        (folder / name).write_bytes(content((folder / name).read_bytes()))
    return load_splits(str(folder))[0]


DAMAGE = {"empty": lambda b: b"", "text": lambda b: b"not an image", "truncated": lambda b: b[: len(b) // 2]}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_image_is_named_and_its_neighbour_takes_its_place(tmp_path, kind):
    images = damage(tmp_path, {"002.jpg": DAMAGE[kind]})
    views, undecodable = crop_pairs(images, 16, [(0, 1), (0, 2)])
    assert [name.endswith("002.jpg") for name, reason in undecodable] == [True]
    boxes = random_crop_boxes(30, 40, crop_generator(0, 0, 2))
    assert views[1].equal(torch.stack(cut_crops(decode_image(images[3]["image"]), boxes, 16)))


def test_the_last_images_neighbour_is_the_first(tmp_path):
    images = damage(tmp_path, {"005.jpg": DAMAGE["text"], "000.jpg": DAMAGE["text"]})
    (first, second), undecodable = crop_pairs(images, 16, [(0, 5), (0, 1)])
    assert [name[-7:] for name, _ in undecodable] == ["005.jpg"]
    boxes = random_crop_boxes(30, 40, crop_generator(0, 0, 5))
    assert first.equal(torch.stack(cut_crops(decode_image(images[1]["image"]), boxes, 16))) and not first.equal(second)


def test_damaged_images_side_by_side_count_once_each(tmp_path):
    images = damage(tmp_path, {f"{i:03}.jpg": DAMAGE["empty"] for i in (1, 2, 3, 4)})
    _, undecodable = crop_pairs(images, 16, [(0, i) for i in range(6)])
    assert [name[-7:] for name, _ in undecodable] == ["001.jpg", "002.jpg", "003.jpg", "004.jpg"]


def test_structs_without_a_path_or_without_bytes_are_rows_like_others(tmp_path):
    data = encoded(picture(0), "JPEG")["bytes"]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [{"bytes": data}, None, {"bytes": None}]}), tmp_path / "data" / "train.parquet")
    images, _ = load_splits(str(tmp_path / "data"), image_column="image")
    views, undecodable = crop_pairs(images, 16, [(0, 0), (0, 1), (0, 2)])
    assert [name for name, _ in undecodable] == ["row 1", "row 2"] and views[2].float().std() > 0
    pq.write_table(pa.table({"image": [{"path": "a.jpg"}]}), tmp_path / "data" / "train.parquet")
    with pytest.raises(UserError, match="--image-column image of .* does not hold images"):
        load_splits(str(tmp_path / "data"), image_column="image")


def test_a_column_of_more_than_can_be_read_at_once_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("moco.data.parquet.LARGEST_CHUNK", 20_000)
    rows = datasets.Dataset.from_dict({"image": [np.random.default_rng(0).bytes(3000)] * 10})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    rows.to_parquet(tmp_path / "data" / "train.parquet", batch_size=5)
    load_splits(str(tmp_path / "data"))
    monkeypatch.setattr("moco.data.parquet.LARGEST_CHUNK", 2_000)
    with pytest.raises(UserError, match="GB of image in one row group .5 rows., .* save_to_disk them"):
        load_splits(str(tmp_path / "data"))


@pytest.mark.parametrize("change", ["other", "removed", "touched"])
def test_a_file_that_is_replaced_while_a_run_reads_it_ends_the_run(tmp_path, change):
    path = tmp_path / "data" / "train.parquet"
    rows = datasets.Dataset.from_dict({"image": [encoded(picture(i), "JPEG") for i in range(10)]})
    rows = rows.cast_column("image", datasets.Image())
    rows.to_parquet(path, batch_size=5)
    images, _ = load_splits(str(path.parent))
    assert images[0]
    if change == "removed":
        path.unlink()
    elif change == "touched":
        os.utime(path, (1, 1))
    else:
        rows.select(range(9, -1, -1)).to_parquet(path, batch_size=5)
        os.utime(path, (1, 1))
    with pytest.raises(UserError, match="train.parquet was changed or removed while this run reads it; .* --resume"):
        images[7]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_row_without_an_image_is_an_undecodable_one(tmp_path, kind):
    features = datasets.Features(image=datasets.Image())
    rows = datasets.Dataset.from_dict({"image": [encoded(picture(0), "JPEG"), None]}, features=features)
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    rows.save_to_disk(tmp_path / "saved")
    images, _ = load_splits(str(tmp_path / kind))
    views, undecodable = crop_pairs(images, 16, [(0, 0), (0, 1)])
    assert undecodable == [("row 1", "ValueError: the row has no image")] and views.float().std() > 0


def test_in_evaluation_the_neighbour_brings_its_label(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "pets" / name, 1)
    (tmp_path / "pets" / "cat" / "000.jpg").write_bytes(b"")
    (crops,), labels, undecodable = center_crops(load_splits(str(tmp_path / "pets"))[0], 16)[[(0, 0), (0, 1)], ()]
    assert labels.tolist() == [1, 1] and crops[0].equal(crops[1]) and len(undecodable) == 1


def test_undecodable_data_is_refused_after_a_look_at_a_few_row_groups(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [b"JPEG 2000"] * 200}).cast_column(
        "image", datasets.Image(decode=False)
    )
    rows.to_parquet(tmp_path / "data" / "train.parquet", batch_size=5)
    images, _ = load_splits(str(tmp_path / "data"))
    before = images.traffic.totals()[2]
    with pytest.raises(
        UserError, match="none of the 20 images of --data D that were looked at .* no image in a format"
    ):
        check_trainable(images, 8, "D")
    assert images.traffic.totals()[2] - before < images.epoch_bytes() / 5


def test_where_no_image_can_be_decoded_the_user_is_told(tmp_path):
    images = damage(tmp_path, {f"{i:03}.jpg": DAMAGE["text"] for i in range(6)})
    with pytest.raises(UserError, match="none of the .* images"):
        crop_pairs(images, 16, [(0, 0)])
