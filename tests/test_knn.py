"""The monitor: kNN against golden scores and a slow loop, and the numbers without labels. pytest tests/test_knn.py"""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from moco.augment import AUGMENTATIONS, MEAN, STD, normalize, to_float
from moco.backbone import load_backbone
from moco.backbone.features import Features
from moco.backbone.monitor import monitor
from moco.data.batches import center_crop
from moco.data.decode import decode_image
from moco.data.load import IndexedImages, load_splits
from moco.data.order import Order
from moco.data.shapes import CLASSES
from moco.data.views import FastViews
from moco.encoder import build_encoder
from moco.knn import default_k, knn_evaluate, knn_predict
from moco.run.pictures import nearest_rows
from moco.spread import alignment, close_pairs, rankme, uniformity


def test_golden_knn_scores_and_top1(golden):
    data = load_file(golden / "knn" / "knn.safetensors")
    description = json.loads((golden / "knn" / "knn.json").read_text())
    config = description["config"]
    for temperature in config["T"]:
        for k in config["k"]:
            key = f"T{temperature}.k{k}"
            scores = knn_predict(
                data["query_features"].double(),
                data["train_features"].double(),
                data["train_labels"],
                config["C"],
                k,
                temperature,
            )
            torch.testing.assert_close(scores, data[f"{key}.scores"], rtol=1e-9, atol=0)
            top1 = 100 * (scores.argmax(dim=1) == data["query_labels"]).double().mean().item()
            assert top1 == pytest.approx(description["results"][key]["dino_top1"])
            features, bank = data["query_features"].double(), F.normalize(data["train_features"].double(), dim=1)
            labels = data["query_labels"], data["train_labels"]
            asked = (features, labels[0], bank, labels[1], config["C"], [k], temperature, Accelerator(cpu=True))
            expected = {"top1": top1, "top5": description["results"][key]["top5_voted_only"]}
            assert knn_evaluate(*asked)[k] == pytest.approx(expected)


def test_scores_equal_the_loop_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    features, bank = torch.randn(5, 6, generator=generator), torch.randn(20, 6, generator=generator)
    labels = torch.randint(0, 3, (20,), generator=generator)
    scores = knn_predict(features, bank, labels, classes=3, k=7, temperature=0.5)
    for row, feature in zip(scores, features):
        cosines = [torch.cosine_similarity(feature, other, dim=0).item() for other in bank]
        expected = [0.0] * 3
        for i in sorted(range(20), key=lambda i: -cosines[i])[:7]:
            expected[labels[i]] += torch.tensor(cosines[i] / 0.5).exp().item()
        torch.testing.assert_close(row, torch.tensor(expected))


@pytest.mark.parametrize("temperature", [0.02, 0.01, 0.001])
def test_a_low_temperature_does_not_overflow(temperature):
    """exp(1 / 0.01) is above the largest float32; the nearest then decide, as in float64."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    bank = F.normalize(torch.eye(5)[labels] + 0.5 * torch.rand(200, 5, generator=generator), dim=1)
    asked = torch.eye(5)[labels[:50]] + 0.5 * torch.rand(50, 5, generator=generator)

    def top1(kind):
        arguments = (asked.to(kind), labels[:50], bank.to(kind), labels, 5, [100], temperature, Accelerator(cpu=True))
        return knn_evaluate(*arguments)[100]["top1"]

    assert top1(torch.float32) == top1(torch.float64) > 80


def test_an_image_is_not_its_own_neighbour_but_its_twin_is():
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=0)
    asked, nearest = nearest_rows(features)
    assert all(found[0] == row ^ 1 and row not in found for row, found in zip(asked, nearest, strict=True))
    assert nearest_rows(features[:1]) == ([0], [[]])


def test_k_is_cut_to_the_bank():
    features = torch.eye(3)
    assert knn_predict(features, features, torch.arange(3), classes=3, k=200).argmax(dim=1).tolist() == [0, 1, 2]


def test_chunks_do_not_change_the_scores(monkeypatch):
    features, bank, labels = torch.randn(9, 4), torch.randn(30, 4), torch.arange(30) % 3
    whole = knn_predict(features, bank, labels, 3)
    monkeypatch.setattr("moco.knn.SIMILARITIES", 60)  # two rows at a time
    torch.testing.assert_close(knn_predict(features, bank, labels, 3), whole, rtol=1e-5, atol=0)


def test_features_are_the_pooled_ones_in_the_order_of_the_rows():
    train_set, _ = load_splits("shapes")
    backbone = load_backbone("random", "resnet10")[0].eval()
    rows = [5, 3, 300, 5]
    features, labels, undecodable = Features(backbone, 32, MEAN, STD, 0, Accelerator(cpu=True)).all(train_set, rows)
    assert features.shape == (4, 512) and features[0].equal(features[3]) and not undecodable
    assert labels.tolist() == [train_set[row]["label"] for row in rows]
    crop = center_crop(decode_image(train_set[3]["image"]), 32)
    torch.testing.assert_close(
        features[1], backbone(normalize(to_float(crop[None]), MEAN, STD))[0], rtol=1e-4, atol=1e-5
    )


def test_the_monitor_holds_training_images_out_where_there_is_no_test_set():
    train_set, _ = load_splits("shapes")
    few = IndexedImages(train_set.dataset.select(range(100)))
    encoder, accelerator = build_encoder("resnet10"), Accelerator(cpu=True)
    numbers, undecodable, images = monitor(encoder, few, None, 32, MEAN, STD, 0, accelerator)
    assert images == 100 and not undecodable
    assert encoder.training and isinstance(encoder.head, torch.nn.Sequential)  # as it was
    sample = few.sample(100)
    features, labels, _ = Features(encoder.backbone.eval(), 32, MEAN, STD, 0, accelerator).all(few, sample)
    predicted = knn_predict(features[:20], features[20:], labels[20:], len(CLASSES), k=default_k(80)).argmax(dim=1)
    assert numbers["knn"] == pytest.approx(100 * (predicted == labels[:20]).float().mean().item())
    assert numbers["rank"] == pytest.approx(rankme(features[:20]), rel=1e-4)


# ---- without labels


def test_rank_alignment_and_uniformity_equal_the_loops_of_their_definitions(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, 5, generator=generator, dtype=torch.double) for _ in range(2))
    roots = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()
    p = [root.item() / roots.sum().item() + 1e-7 for root in roots]
    assert rankme(x) == pytest.approx(math.exp(-sum(each * math.log(each) for each in p)), rel=1e-6)
    assert rankme(torch.eye(6)) == pytest.approx(6, rel=1e-4) and rankme(torch.ones(6, 3)) == pytest.approx(1, rel=1e-4)

    def distance(a, b):
        return math.dist((a / a.norm()).tolist(), (b / b.norm()).tolist()) ** 2

    assert alignment(x, y).item() == pytest.approx(sum(map(distance, x, y)) / 7)
    pairs = list(itertools.combinations(range(7), 2))
    monkeypatch.setattr("moco.spread.TILE", 3)
    assert uniformity(x) == pytest.approx(math.log(sum(math.exp(-2 * distance(x[i], x[j])) for i, j in pairs) / 21))
    cosines = {(i, j): torch.cosine_similarity(x[i], x[j], dim=0).item() for i, j in pairs}
    found = [torch.stack(each, dim=1).tolist() for each in close_pairs(x, 0.1)]
    found = {(int(i), int(j)): cosine for i, j, cosine in itertools.chain(*found)}
    assert found == pytest.approx({pair: cosine for pair, cosine in cosines.items() if cosine > 0.1}) and len(found) > 3


def test_the_monitor_aligns_the_views_of_trainings_first_step(tmp_path):
    """The same at each call; of neighbours those of the start stay beside those of now."""
    images = IndexedImages(load_splits("shapes")[0].dataset.select(range(40)).select_columns("image"))
    encoder, accelerator = build_encoder("resnet10"), Accelerator(cpu=True)
    views, options = FastViews(AUGMENTATIONS["v2"], 32, MEAN, STD), (32, MEAN, STD, 0, accelerator)
    numbers, _, looked_at = monitor(encoder, images, None, *options, views, tmp_path)
    assert looked_at == 40 and numbers.keys() == {"rank", "uniformity", "alignment"}
    assert numbers == monitor(encoder, images, None, *options, views)[0]
    order, sample = Order(40, 0), images.select_rows(images.sample(40))
    pair = views.on_device(next(views.batches(sample, order, 0))[0], order, 0, "cpu")
    backbone = encoder.backbone.eval()
    assert numbers["alignment"] == pytest.approx(alignment(*(backbone(view) for view in pair)).item(), rel=1e-4)
    width, start = Image.open(tmp_path / "neighbours.png").width, (tmp_path / "neighbours.json").read_text()
    monitor(build_encoder("resnet10"), images, None, *options, views, tmp_path, 7)
    assert Image.open(tmp_path / "neighbours.png").width > 1.5 * width
    assert (tmp_path / "neighbours.json").read_text() == start
