"""Detection data read from small VOCdevkit, COCO and save_to_disk folders, their defects, and COCO's metric.

pytest tests/test_detection_data.py
"""

import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from folders import HEIGHT, SIZE, scenes, write_coco, write_hub, write_voc

from moco.data.batches import loader
from moco.detection.coco import decode_masks, encode_masks
from moco.detection.data import VOC_CLASSES, DetectionImages, evaluate_detections, load_detection
from moco.detection.model import mask_targets
from moco.errors import UserError


def perfect(records):
    """Predictions that repeat the objects, with masks of their boxes for COCO."""
    found = []
    for record in records:
        prediction = {"boxes": record["boxes"], "labels": record["labels"], "scores": np.ones(len(record["labels"]))}
        if "masks" in record:
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
    scores = evaluate_detections(data, perfect(data.test))
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
    content = json.loads(path.read_text())
    content["annotations"][1]["segmentation"] = []
    path.write_text(json.dumps(content))
    assert load_detection(str(tmp_path)).left_out["objects without a polygon"] == 1
    content["annotations"][1] |= {"category_id": 4, "segmentation": [[0, 0, 9, 0, 9, 9]]}
    path.write_text(json.dumps(content))
    assert "has category 4, unknown" in refused(tmp_path)
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


# ---- COCO's metric


def coco_scores(tmp_path, change):
    """Scores of predictions made from the perfect ones by change(prediction)."""
    write_coco(tmp_path, "train2017", 3)
    data = load_detection(str(write_coco(tmp_path, "val2017", 12)))
    return evaluate_detections(data, [change(prediction) for prediction in perfect(data.test)])


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


def test_masks_survive_their_encoding():
    masks = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    assert (decode_masks(encode_masks(masks)) == masks.numpy()).all()
