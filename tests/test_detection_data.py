"""Detection data read from small VOCdevkit, COCO and save_to_disk folders, their defects, and COCO's metric.

pytest tests/test_detection_data.py
"""

import io
import itertools
import re
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from folders import HEIGHT, SIZE, edit_coco, scenes, write_coco, write_hub, write_voc
from PIL import Image, ImageOps

from moco.data.batches import loader
from moco.detection.coco import decode_masks, encode_masks
from moco.detection.data import VOC_CLASSES, DetectionImages, evaluate_detections, load_detection, resized_shape
from moco.detection.model import mask_targets
from moco.detection.pictures import save_detections
from moco.detection.records import image_size, objects
from moco.errors import UserError


def perfect(data):
    """Predictions that repeat the objects of the test images, with masks of their boxes where masks are trained."""
    found = []
    for record in data.test:
        prediction = {"boxes": record["boxes"], "labels": record["labels"], "scores": np.ones(len(record["labels"]))}
        if data.masks:
            masks = torch.zeros(len(record["boxes"]), record["height"], record["width"], dtype=torch.bool)
            for mask, (x1, y1, x2, y2) in zip(masks, record["boxes"].astype(int)):
                mask[y1:y2, x1:x2] = True
            prediction["masks"] = encode_masks(masks)
        found.append(prediction)
    return found


def assert_scenes(records, split):
    for record, (_, height, boxes, labels) in zip(records, scenes(split, len(records)), strict=True):
        assert (record["width"], record["height"]) == (SIZE, height)
        np.testing.assert_allclose(record["boxes"], boxes, atol=1e-4)
        assert record["labels"].tolist() == labels.tolist()


# ---- a name -> records


@pytest.fixture
def devkit(tmp_path):
    for year in ("2007", "2012"):
        write_voc(tmp_path / "VOCdevkit", year, "trainval", 4)
    return write_voc(tmp_path / "VOCdevkit", "2007", "test", 3)


def test_a_voc_devkit(devkit):
    for name in (devkit, devkit.parent):
        data = load_detection(str(name))
        assert data.metric == "VOC" and data.classes == VOC_CLASSES and len(data.train) == 8
        assert_scenes(data.train[:4], "trainval")
        assert_scenes(data.test, "test")
    for record in data.test:
        assert record["difficult"].tolist() == [i == 1 for i in range(len(record["labels"]))]
    assert sum(record["difficult"].sum() for record in data.test) >= 2
    assert len(load_detection(str(devkit), years=["2012"]).train) == 4
    scores = evaluate_detections(data, perfect(data))
    present = len({int(label) for record in data.test for label in record["labels"][~record["difficult"]]})
    for rule in ("voc2007", "area"):
        assert scores[rule]["AP50"] == pytest.approx(100 * present / len(VOC_CLASSES))  # 0 where there are no objects


def test_a_folder_of_save_to_disk(tmp_path):
    for number, (box_format, sized) in enumerate([("xywh", True), ("xyxy", False)]):
        data = load_detection(str(write_hub(tmp_path / str(number), box_format, sized)), box_format=box_format)
        assert data.metric == "VOC" and data.classes == [f"class {i}" for i in range(20)]
        assert_scenes(data.train, "train")
        assert_scenes(data.test, "test")
        [(image, target)], undecodable = DetectionImages(data.train, [96], 1333, seed=0)[[(0, 1)]]
        assert image.shape == (3, 96, 96) and len(target["boxes"]) == 2 and not undecodable


def test_a_coco_folder(tmp_path):
    write_coco(tmp_path, "val2017", 3)
    data = load_detection(str(write_coco(tmp_path, "train2017", 5)))
    assert data.metric == "COCO" and data.classes == [f"class {i}" for i in range(1, 21)]
    assert_scenes(data.train, "train")
    assert +data.left_out == {"crowds": 1}
    for record in data.train:
        corners = [mask[0][[0, 2]].flatten() for mask in record["masks"]]
        np.testing.assert_allclose(corners, record["boxes"], atol=1e-4)


@pytest.mark.parametrize("flipped", [False, True])
def test_boxes_and_polygons_follow_size_and_flip(tmp_path, flipped):
    write_coco(tmp_path, "val2017", 1)
    data = load_detection(str(write_coco(tmp_path, "train2017", 4)))
    images = DetectionImages(data.train, [64, 96], 1333, seed=0)
    for iteration in range(50):
        [(image, target)], _ = images[[(iteration, 2)]]
        scale = image.shape[1] / HEIGHT
        box, expected = target["boxes"][0].numpy(), data.train[2]["boxes"][0] * scale
        mirrored = np.array([image.shape[2] - expected[2], expected[1], image.shape[2] - expected[0], expected[3]])
        if np.allclose(box, mirrored if flipped else expected, atol=0.5):
            ring = target["masks"][0][0]
            np.testing.assert_allclose([*ring.min(axis=0), *ring.max(axis=0)], box, atol=0.5)
            return
    raise AssertionError("50 iterations without one that is flipped, or one that is not")


def test_mask_targets_are_the_polygon_as_each_region_sees_it():
    """A square of 28 pixels: whole in its own box, its right half in a region that begins in its middle."""
    ring = np.array([[10, 10], [38, 10], [38, 38], [10, 38]], np.float32)
    boxes = torch.tensor([[10.0, 10, 38, 38], [24, 10, 52, 38], [60, 60, 88, 88]])
    drawn = mask_targets({"masks": [[ring]]}, boxes, torch.zeros(3, dtype=torch.long))
    assert drawn[0].eq(1).all() and drawn[2].eq(0).all()
    assert drawn[1, :, :7].eq(1).all() and drawn[1, :, 7:].eq(0).all()


# ---- what is wrong with them: refused with a line, or counted


def damage(devkit, old, new, name="2012_trainval_000001"):
    path = devkit / "VOC2012" / "Annotations" / f"{name}.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def refused(name, **options):
    with pytest.raises(UserError) as error:
        load_detection(str(name), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_voc_years_and_files_that_are_missing(devkit):
    line = refused(devkit, years=["2007", "2011"])
    assert "VOC2011/ImageSets/Main/trainval.txt is missing" in line and "--years" in line
    (devkit / "VOC2012" / "JPEGImages" / "2012_trainval_000002.jpg").unlink()
    line = refused(devkit)
    assert "1 of the 4 jpg files" in line and "2012_trainval_000002.jpg" in line
    (devkit / "VOC2012" / "Annotations" / "2012_trainval_000000.xml").unlink()
    assert "1 of the 4 xml files" in refused(devkit)


def test_voc_annotations_that_cannot_be_read(devkit):
    damage(devkit, "</annotation>", "")
    assert "2012_trainval_000001.xml cannot be read" in refused(devkit)
    (devkit / "VOC2012" / "Annotations" / "2012_trainval_000001.xml").write_text(
        "<annotation><object><name>cat</name></object></annotation>"
    )
    assert "2012_trainval_000001.xml cannot be read" in refused(devkit)  # an object without a box
    (devkit / "VOC2012" / "Annotations" / "2012_trainval_000001.xml").write_text(
        "<annotation><object><name>cat</name><bndbox><xmin>left</xmin></bndbox></object></annotation>"
    )
    assert "2012_trainval_000001.xml cannot be read" in refused(devkit)


def test_sizes_of_voc_that_are_empty_or_with_a_point(devkit):
    damage(devkit, f"<width>{SIZE}</width>", f"<width>{SIZE}.0</width>")
    damage(devkit, f"<height>{HEIGHT}</height>", "<height></height>", "2012_trainval_000002")
    assert_scenes(load_detection(str(devkit), years=["2012"]).train, "trainval")


def test_a_class_that_voc_does_not_have(devkit):
    path = devkit / "VOC2012" / "Annotations" / "2012_trainval_000001.xml"
    path.write_text(path.read_text().replace("<name>", "<name>flying ", 1))
    line = refused(devkit)
    assert "unknown class 'flying" in line and "tvmonitor" in line and path.name in line


def test_boxes_outside_their_image_of_no_area_or_absent_are_counted(devkit):
    def annotate(name, *boxes):
        things = "".join(
            f"<object><name>cat</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            "</bndbox></object>"
            for x1, y1, x2, y2 in boxes
        )
        size = f"<size><width>{SIZE}</width><height>{HEIGHT}</height></size>"
        (devkit / "VOC2012" / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{things}</annotation>")

    annotate("2012_trainval_000000")
    annotate("2012_trainval_000002", (-4, 1, 20, 20), (70, 1, 90, 20), (9, 9, 8, 20))
    data = load_detection(str(devkit), years=["2012"])
    assert +data.left_out == Counter(
        {
            "boxes clipped to their image": 2,
            "boxes without area in their image": 2,
            "training images without objects": 1,
        }
    )
    assert len(data.train) == 3
    assert data.train[1]["boxes"].tolist() == [[0, 0, 20, 20]]


def test_data_without_any_object(devkit):
    for path in (devkit / "VOC2012" / "Annotations").glob("*.xml"):
        path.write_text("<annotation><size><width>64</width><height>48</height></size></annotation>")
    assert "no training image with an object in it, of 4 images" in refused(devkit, years=["2012"])


def test_an_image_that_cannot_be_decoded(devkit):
    (devkit / "VOC2012" / "JPEGImages" / "2012_trainval_000001.jpg").write_bytes(b"damaged")
    data = load_detection(str(devkit), years=["2012"])
    [(_, target)], undecodable = DetectionImages(data.train, [48], 1333, seed=0)[[(0, 1)]]
    assert [name for name, _ in undecodable] == ["2012_trainval_000001"]
    assert len(target["boxes"]) == len(data.train[2]["boxes"])  # its neighbour, with its own objects
    [(image, _)], undecodable = DetectionImages(data.train, [48], 1333)[[(0, 1)]]
    assert image is None and len(undecodable) == 1  # in evaluation nothing replaces it
    (devkit / "VOC2012" / "JPEGImages" / "2012_trainval_000002.jpg").write_bytes(b"damaged, too")
    _, undecodable = DetectionImages(data.train, [48], 1333, seed=0)[[(0, 1), (0, 2)]]
    assert [name for name, _ in undecodable] == ["2012_trainval_000001", "2012_trainval_000002"]  # each once
    for path in (devkit / "VOC2012" / "JPEGImages").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="none of the 4 images can be decoded"):
        DetectionImages(data.train, [48], 1333, seed=0)[[(0, 1)]]


def test_polygons_reach_the_training_loop_as_arrays(tmp_path):
    """As tensors, DDP would move each of them to its GPU, from where they cannot be drawn."""
    write_coco(tmp_path, "val2017", 1)
    data = load_detection(str(write_coco(tmp_path, "train2017", 3)))
    batches = loader(DetectionImages(data.train, [64], 1333, seed=0), [[(0, 0), (0, 1)]], workers=0)
    for image, target in next(iter(batches))[0]:
        assert torch.is_tensor(image) and torch.is_tensor(target["boxes"])
        assert all(isinstance(ring, np.ndarray) for rings in target["masks"] for ring in rings)


def test_what_a_coco_folder_may_lack(tmp_path):
    write_coco(tmp_path, "train2017", 3)
    assert "instances_val2017.json is missing" in refused(tmp_path)
    write_coco(tmp_path, "val2017", 2)
    (tmp_path / "val2017" / "000000000001.jpg").unlink()
    line = refused(tmp_path)
    assert "1 of the 2 images" in line and "000000000001.jpg" in line
    write_coco(tmp_path, "val2017", 2)
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text("{")
    assert "cannot be read as COCO annotations" in refused(tmp_path)


def test_hub_data_of_another_shape(tmp_path):
    write_hub(tmp_path / "good")
    splits = datasets.load_from_disk(str(tmp_path / "good"))
    splits.remove_columns("objects").save_to_disk(str(tmp_path / "images"))
    assert "needs the columns image and objects" in refused(tmp_path / "images")
    datasets.DatasetDict({"train": splits["train"]}).save_to_disk(str(tmp_path / "train"))
    assert "needs the splits train and test" in refused(tmp_path / "train")
    (tmp_path / "empty").mkdir()
    assert "neither a VOCdevkit folder" in refused(tmp_path / "empty")
    bare = datasets.DatasetDict(train=splits["train"], test=splits["test"].remove_columns("objects"))
    bare.save_to_disk(str(tmp_path / "bare"))
    assert "needs the columns image and objects" in refused(tmp_path / "bare")
    features = splits["test"].features.copy()
    features["objects"] = renamed(features["objects"])
    mixed = datasets.DatasetDict(train=splits["train"], test=splits["test"].cast(features))
    mixed.save_to_disk(str(tmp_path / "mixed"))
    assert "in test, so one number would mean two classes" in refused(tmp_path / "mixed")


def renamed(feature):
    """A feature whose ClassLabel has its names in another order."""
    if isinstance(feature, datasets.ClassLabel):
        return datasets.ClassLabel(names=[*feature.names[1:], feature.names[0]])
    if isinstance(feature, dict):
        return {name: renamed(part) for name, part in feature.items()}
    return type(feature)(renamed(feature.feature)) if hasattr(feature, "feature") else feature


@pytest.mark.parametrize("corners", [2, 3, 8])
def test_hub_boxes_of_other_than_four_numbers(tmp_path, corners):
    """Eight would otherwise be two boxes, and the class of the second that of the next object."""
    splits = datasets.load_from_disk(str(write_hub(tmp_path / "four")))
    boxes = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
    features = datasets.Features(
        splits["train"].features | {"objects": splits["train"].features["objects"] | {"bbox": boxes}}
    )
    splits = splits.map(
        lambda row: {"objects": row["objects"] | {"bbox": [(2 * b)[:corners] for b in row["objects"]["bbox"]]}},
        features=features,
    )
    splits.save_to_disk(str(tmp_path / "other"))
    assert "row 0: its objects cannot be read" in refused(tmp_path / "other")


# ---- images of another size than annotated


def store(path, pixels, orientation):
    """Save pixels (H, W, 3) so that a viewer which obeys EXIF shows them as they are here."""
    turned_back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    if orientation in turned_back:
        mirrored = Image.new("L", (1, 1)).getexif()
        mirrored[0x0112] = turned_back[orientation]
        carrier = io.BytesIO()
        Image.fromarray(pixels).save(carrier, "PNG", exif=mirrored)
        pixels = np.asarray(ImageOps.exif_transpose(Image.open(carrier)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **({"quality": 100, "subsampling": 0} if "jpg" in path.name else {}))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_on_images_that_exif_turns(tmp_path, orientation, suffix):
    """A red rectangle on blue, once per orientation: in training and evaluation it fills its box and nothing else."""
    pixels = np.full((48, 64, 3), (0, 0, 255), np.uint8)
    pixels[8:24, 16:56] = (255, 0, 0)
    store(tmp_path / f"image.{suffix}", pixels, orientation)
    image = {"bytes": None, "path": str(tmp_path / f"image.{suffix}")}
    assert image_size(image, Counter()) == (64, 48)
    record = {"image": image, "name": "image", "width": 64, "height": 48, **objects([[16, 8, 56, 24]], [0])}
    for images in (DetectionImages([record], [48], 1333, seed=0), DetectionImages([record], [48], 1333)):
        for iteration in range(4):  # flipped or not
            [(image, target)], undecodable = images[[(iteration, 0)]]
            assert not undecodable
            x1, y1, x2, y2 = target["boxes"][0].int().tolist()
            inside = torch.zeros(48, 64, dtype=torch.bool)
            inside[y1:y2, x1:x2] = True
            red = image[0].int() - image[2].int()
            assert red[inside].float().mean() > 230 and red[~inside].float().mean() < -230
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    save_detections(tmp_path / "detections.png", [record], [nothing], ["red"])
    assert min(Image.open(tmp_path / "detections.png").size) > 100


def resize(folder, split, numbers, size):
    for number in numbers:
        path = folder / split / f"{number:012}.jpg"
        Image.open(path).resize(size).save(path)


@pytest.mark.parametrize("split, word", [("train2017", "training"), ("val2017", "test")])
@pytest.mark.parametrize("size", [(32, 24), (SIZE - 8, SIZE)])
def test_images_that_were_resized_after_they_were_annotated_are_refused(tmp_path, split, word, size):
    write_coco(tmp_path, "val2017", 8)
    write_coco(tmp_path, "train2017", 8)
    resize(tmp_path, split, range(8), size)
    line = refused(tmp_path)
    assert f"8 of 8 {word} images have another size than annotated, first 000000000000.jpg" in line
    assert f"{size[0]} x {size[1]} pixels, annotated as {SIZE} x {HEIGHT}" in line


def test_a_few_images_of_another_size_are_named_and_counted_in_training_and_evaluation(tmp_path):
    write_coco(tmp_path, "val2017", 25)
    write_coco(tmp_path, "train2017", 25)
    for split in ("train2017", "val2017"):
        resize(tmp_path, split, [4], (HEIGHT, SIZE))
    data = load_detection(str(tmp_path))
    for split in ("training", "test"):
        assert data.left_out[f"of 25 {split} images looked at have another size than annotated"] == 1
    [(image, target)], undecodable = DetectionImages(data.train, [48], 1333, seed=0)[[(0, 4)]]
    assert undecodable == [
        ("000000000004.jpg", f"ValueError: {HEIGHT} x {SIZE} pixels, annotated as {SIZE} x {HEIGHT}")
    ]
    assert len(target["boxes"]) == len(data.train[5]["boxes"])
    [(image, _)], undecodable = DetectionImages(data.test, [48], 1333)[[(0, 4)]]
    assert image is None and [name for name, _ in undecodable] == ["000000000004.jpg"]


def test_a_thin_image_keeps_a_pixel_of_its_short_side():
    assert resized_shape(1, 20_000, 800, 1333) == (1, 1333)


# ---- boxes in 0..1


@pytest.mark.parametrize("kind", ["voc", "coco", "xywh", "xyxy"])
def test_boxes_in_shares_of_the_image_are_refused(tmp_path, kind):
    if kind == "coco":
        write_coco(tmp_path, "val2017", 3)
        write_coco(tmp_path, "train2017", 3)
        edit_coco(tmp_path, "val2017", lambda c: [a.update(bbox=[b / 64 for b in a["bbox"]]) for a in c["annotations"]])
        line = refused(tmp_path)
        assert "of 3 test images" in line
    elif kind == "voc":
        for year, split in (("2007", "trainval"), ("2007", "test")):
            write_voc(tmp_path, year, split, 4)
        for path in (tmp_path / "VOC2007" / "Annotations").glob("*trainval*"):
            number = re.compile("<(x|y)(min|max)>([^<]*)<")
            path.write_text(number.sub(lambda m: f"<{m[1]}{m[2]}>{float(m[3]) / 64}<", path.read_text()))
        line = refused(tmp_path, years=["2007"])
    else:
        splits = datasets.load_from_disk(str(write_hub(tmp_path / "pixels", kind)))
        splits = splits.map(
            lambda row: {"objects": row["objects"] | {"bbox": [[v / 64 for v in b] for b in row["objects"]["bbox"]]}}
        )
        splits.save_to_disk(str(tmp_path / "shares"))
        line = refused(tmp_path / "shares", box_format=kind)
    assert "as boxes in 0..1 do; multiply them by the image's width and height" in line


# ---- COCO's entries


@pytest.fixture
def coco(tmp_path):
    write_coco(tmp_path, "val2017", 8)
    return write_coco(tmp_path, "train2017", 8)


@pytest.mark.parametrize("split", ["train2017", "val2017"])
@pytest.mark.parametrize(
    "kind, key, value, words",
    [
        ("annotations", "bbox", None, "annotations[1] (id 2) has bbox None, not [x, y, width, height]"),
        ("annotations", "bbox", [1, 2, 3], "annotations[1] (id 2) has bbox [1, 2, 3], not"),
        ("annotations", "bbox", [1, 2, -3, 4], "annotations[1] (id 2) has bbox [1, 2, -3, 4], not"),
        ("annotations", "bbox", [1, 2, float("nan"), 4], "annotations[1] (id 2) has bbox [1, 2, nan, 4], not"),
        ("annotations", "category_id", None, "annotations[1] (id 2) has category_id None, not a whole number"),
        ("annotations", "category_id", 4, "annotations[1] (id 2) has category_id 4, which the file does not list"),
        ("annotations", "image_id", "100", "annotations[1] (id 2) has image_id '100', not a whole number"),
        ("annotations", "image_id", 7, "annotations[1] (id 2) has image_id 7, which the file does not list"),
        ("annotations", "iscrowd", "0", "annotations[1] (id 2) has iscrowd '0', not 0 or 1"),
        ("annotations", "area", "big", "annotations[1] (id 2) has area 'big', not a number"),
        ("annotations", "segmentation", [["a"] * 6], "annotations[1] (id 2) has a segmentation that cannot be read"),
        ("annotations", "segmentation", [[float("inf")] * 6], "annotations[1] (id 2) has a segmentation that cannot"),
        ("annotations", "segmentation", {"size": [9, 9], "counts": [81]}, "its size is [9, 9], its image's [64, 64]"),
        ("annotations", "segmentation", {"size": [64, 64], "counts": [9]}, "add up to 4096 pixels"),
        ("annotations", "segmentation", {"size": [64, 64], "counts": "04"}, "add up to 4096 pixels"),
        ("annotations", "segmentation", {"size": [64, 64]}, "a segmentation that cannot be read (KeyError"),
        ("images", "id", "101", "images[1] (id '101') has id '101', not a whole number"),
        ("images", "file_name", None, "images[1] (id 101) has file_name None, not the name of a file"),
        ("images", "width", None, "images[1] (id 101) has width None, not a number of pixels"),
        ("images", "height", "64", "images[1] (id 101) has height '64', not a number of pixels"),
        ("images", "id", 100, "'000000000000.jpg' and '000000000001.jpg' share the id 100"),
        ("categories", "id", 3, "'class 1' and 'class 2' share the id 3"),
        ("categories", "name", None, "categories[1] (id 6) has name None, not a name"),
    ],
)
def test_an_entry_of_coco_that_cannot_be_right(coco, split, kind, key, value, words):
    edit_coco(coco, split, lambda content: content[kind][1].update({key: value}))
    line = refused(coco)
    assert words in line and f"instances_{split}.json" in line


# ---- masks as runs, and none at all


def as_runs(content, compressed):
    """Turn the polygons into run-length encodings of the same pixels."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for annotation in content["annotations"]:
        height, width = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        bits = torch.zeros(1, height, width, dtype=torch.bool)
        bits[:, round(y) : round(y + h), round(x) : round(x + w)] = True
        [runs] = encode_masks(bits)
        lengths = [len(list(group)) for _, group in itertools.groupby(bits[0].T.flatten().tolist())]
        lengths = [0] * bool(bits[0, 0, 0]) + lengths  # the first run is of zeros
        counts = runs["counts"].decode() if compressed else lengths
        annotation["segmentation"] = {"size": [height, width], "counts": counts}


@pytest.mark.parametrize("compressed", [False, True])
def test_masks_in_run_lengths_train_and_score_as_their_pixels(coco, compressed):
    for split in ("train2017", "val2017"):
        edit_coco(coco, split, lambda content: as_runs(content, compressed))
    data = load_detection(str(coco))
    assert data.masks and len(data.train) == 8 and +data.left_out == {"crowds": 1}
    scores = evaluate_detections(data, perfect(data))
    assert scores["mask"]["AP"] == pytest.approx(100)
    seen = set()
    for iteration in range(8):
        [(image, target)], _ = DetectionImages(data.train, [96], 1333, seed=0)[[(iteration, 1)]]
        box = data.train[1]["boxes"][0].round() * 1.5
        flipped = abs(target["boxes"][0][0].item() - data.train[1]["boxes"][0][0] * 1.5) > 0.01
        seen.add(flipped)
        bits = decode_masks(target["masks"])[0]
        x1, x2 = (96 - box[2], 96 - box[0]) if flipped else (box[0], box[2])
        expected = np.zeros((96, 96), bool)
        expected[int(box[1] + 0.5) : int(box[3] + 0.5), int(x1 + 0.5) : int(x2 + 0.5)] = True
        assert (bits != expected).mean() < 0.02  # half a pixel of the enlarged edge
        drawn = mask_targets(target, target["boxes"][:1], torch.tensor([0]))
        assert drawn.mean() > 0.9  # it fills its box
    assert seen == {False, True}


@pytest.mark.parametrize("absent", [None, []])
def test_a_coco_folder_of_boxes_alone(coco, absent):
    def strip(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = absent
            del annotation["area"]

    for split in ("train2017", "val2017"):
        edit_coco(coco, split, strip)
    data = load_detection(str(coco))
    assert not data.masks and "masks" not in data.train[0] and sum(len(r["boxes"]) for r in data.train) == 12
    assert data.left_out["test objects without an area, for which their box's is taken"] == 13  # with the crowd
    scores = evaluate_detections(data, perfect(data))
    assert list(scores) == ["box"] and scores["box"]["AP"] == pytest.approx(100)
    assert "--masks on, but no object of train2017 has a mask; use --masks off" in refused(coco, masks="on")


def test_masks_on_off_and_where_most_objects_have_one(coco, tmp_path):
    data = load_detection(str(coco), masks="off")
    assert not data.masks and "masks" not in data.train[0] | data.test[0]
    edit_coco(coco, "train2017", lambda c: [a.update(segmentation=[]) for a in c["annotations"][:9]])
    assert not load_detection(str(coco)).masks
    data = load_detection(str(coco), masks="on")
    assert data.masks and data.left_out["objects without a mask"] == 9
    assert sum(len(record["masks"]) for record in data.train) == sum(len(record["boxes"]) for record in data.train) == 3


# ---- COCO's metric


def coco_scores(tmp_path, change=lambda found: found, edit=lambda content: None):
    """Scores of predictions made from the perfect ones by change(prediction), where `edit` changed the annotations."""
    write_coco(tmp_path, "train2017", 3)
    edit_coco(write_coco(tmp_path, "val2017", 12), "val2017", edit)
    data = load_detection(str(tmp_path))
    return evaluate_detections(data, [change(prediction) for prediction in perfect(data)])


def test_a_perfect_detector_has_coco_ap_100_in_boxes_and_masks(tmp_path):
    scores = coco_scores(tmp_path, lambda found: found)
    for kind in ("box", "mask"):
        assert [scores[kind][key] for key in ("AP", "AP50", "AP75")] == pytest.approx([100] * 3)
        assert all(values["AP"] in (pytest.approx(100), None) for values in scores[kind]["per_class"].values())
    assert list(scores) == ["box", "mask"] and len(scores["box"]["per_class"]) == 20


def test_an_empty_detector_has_coco_ap_0_and_a_shifted_one_the_thresholds_below_its_overlap(tmp_path):
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0), "masks": []}
    scores = coco_scores(tmp_path, lambda found: nothing)
    assert scores["box"]["AP"] == scores["mask"]["AP50"] == 0

    def narrow(found):  # to the left 0.72 of each box: right at 0.50 to 0.70, wrong from 0.75 on
        boxes = found["boxes"].copy()
        boxes[:, 2] = boxes[:, 0] + 0.72 * (boxes[:, 2] - boxes[:, 0])
        return found | {"boxes": boxes}

    scores = coco_scores(tmp_path, narrow)
    assert scores["box"]["AP50"] == pytest.approx(100) and scores["box"]["AP75"] == 0
    assert scores["box"]["AP"] == pytest.approx(50) and scores["mask"]["AP"] == pytest.approx(100)


def test_annotations_without_an_area_score_as_with_that_of_their_masks(tmp_path):
    """Masks are rectangles of whole pixels, once with COCO's area and once without."""

    def whole(content):
        for annotation in content["annotations"]:
            x, y, w, h = (round(value) for value in annotation["bbox"])
            ring = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotation.update(bbox=[x, y, w, h], area=w * h)
            annotation["segmentation"] = annotation["segmentation"] if annotation["iscrowd"] else [ring]

    def without(content):
        whole(content)
        for annotation in content["annotations"]:
            del annotation["area"]

    def shifted(found):
        return found | {"boxes": found["boxes"] + [0, 0, 4, 0]}

    expected = coco_scores(tmp_path / "with", shifted, whole)
    assert coco_scores(tmp_path / "without", shifted, without) == expected
    assert 0 < expected["box"]["AP"] < 100 and expected["box"]["APs"] != expected["box"]["APm"]
    assert expected["box"]["APl"] is None  # no object is large, which pycocotools calls -1


@pytest.mark.parametrize("ids", [lambda i: i, lambda i: 1, lambda i: i // 2])
def test_objects_whose_annotation_ids_are_0_or_not_unique_count_once_each(tmp_path, ids):
    def renumber(content):
        for i, annotation in enumerate(content["annotations"]):
            annotation["id"] = ids(i)

    scores = coco_scores(tmp_path, edit=renumber)
    for kind in ("box", "mask"):
        assert scores[kind]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("segmentation", [None, [], [[1, 2, 30, 40]], [[1, 2, 30, 40, 5, 6, 7]]])
def test_an_object_without_outline_counts_in_box_ap_and_neither_way_in_mask_ap(tmp_path, segmentation):
    def strip(content):
        content["annotations"][1].update(segmentation=segmentation)

    write_coco(tmp_path, "train2017", 3)
    edit_coco(write_coco(tmp_path, "val2017", 12), "val2017", strip)
    data = load_detection(str(tmp_path))
    assert data.masks and data.left_out["test objects without a mask, which mask AP ignores"] == 1
    found = perfect(data)
    assert len(found[0]["boxes"]) == 1  # so that the first object of the second image has no outline
    bits = decode_masks(found[1]["masks"])
    x1, _, x2, _ = data.test[1]["boxes"][0].astype(int)
    bits[0, :, x1 + (x2 - x1) // 4 :] = False  # a quarter of the box, so no match for a mask that fills it
    found[1]["masks"] = encode_masks(torch.from_numpy(bits))
    scores = evaluate_detections(data, found)
    assert scores["box"]["AP"] == scores["mask"]["AP"] == pytest.approx(100)
    found[1] = {key: values[1:] for key, values in found[1].items()}
    scores = evaluate_detections(data, found)
    assert scores["box"]["AP"] < 99 and scores["mask"]["AP"] == pytest.approx(100)


def test_two_categories_of_one_name_have_their_own_scores(tmp_path):
    def rename(content):
        for category in content["categories"]:
            category["name"] = "thing"

    write_coco(tmp_path, "train2017", 3)
    write_coco(tmp_path, "val2017", 3)
    for split in ("train2017", "val2017"):
        edit_coco(tmp_path, split, rename)
    data = load_detection(str(tmp_path))
    assert data.classes[:2] == ["thing (3)", "thing (6)"]
    assert len(evaluate_detections(data, perfect(data))["box"]["per_class"]) == 20


def test_one_class_and_ids_that_begin_anywhere(tmp_path):
    def merge(content):
        content["categories"] = [{"id": 17, "name": "thing"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 17

    for split, count in (("train2017", 3), ("val2017", 12)):
        edit_coco(write_coco(tmp_path, split, count), split, merge)
    data = load_detection(str(tmp_path))
    assert data.classes == ["thing"] and {int(v) for r in data.train for v in r["labels"]} == {0}
    scores = evaluate_detections(data, perfect(data))
    assert scores["box"]["AP"] == scores["mask"]["AP"] == pytest.approx(100)
    assert list(scores["box"]["per_class"]) == ["thing"]


def test_masks_survive_their_encoding():
    masks = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    assert (decode_masks(encode_masks(masks)) == masks.numpy()).all()
