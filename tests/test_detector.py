"""The C4 detectors: against detectron2's numbers, and against slow loops.

detectron2 computed in float32. We compute in float64, so that the difference is detectron2's rounding on any CPU.

pytest tests/test_detector.py
MOCO_GOLDEN=FOLDER pytest tests/test_detector.py -k golden       other numbers of the same schema
"""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, mobilenet_v2
from torchvision.models.resnet import Bottleneck, ResNet

from moco.detection.detect import rescale
from moco.detection.model import build_detector
from moco.errors import UserError

ATOL = {"features": 1e-4, "boxes": 0.01, "scores": 1e-4}


class NarrowResNet(ResNet):
    """ResNet-50 a sixteenth as wide behind its stem, as the golden numbers have it."""

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 16, *args, **kwargs)

    def __init__(self):
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=1)
        self.fc = nn.Identity()


class Golden:
    """parity_c4.npz with its prefixes; arrays become tensors, uint8 stays."""

    def __init__(self, folder):
        self.file = np.load(folder / "detection" / "parity_c4.npz")
        self.count = sum(re.fullmatch(r"input/image\d+", name) is not None for name in self.file.files)  # of images

    def __getitem__(self, name):
        tensor = torch.from_numpy(self.file[name])
        return tensor.double() if tensor.is_floating_point() else tensor

    def under(self, prefix):
        return {name.removeprefix(prefix): self[name] for name in self.file.files if name.startswith(prefix)}

    def compare(self, name, actual, atol):
        """For large tensors that tests/golden leaves out; what follows from them is there."""
        if name in self.file.files:
            close(actual, self[name], atol)

    def of_images(self, name):
        return [self[f"{name}{i}"] for i in range(self.count)]

    def images(self):
        return self.of_images("input/image")

    def targets(self, masks):
        return [
            {"boxes": self[f"input/gt_boxes{i}"], "labels": self[f"input/gt_classes{i}"] + 1}
            | ({"masks": self[f"input/gt_masks{i}"]} if masks else {})
            for i in range(self.count)
        ]


@pytest.fixture(scope="module")
def numbers(golden):
    return Golden(golden)


def our_name(name):
    """detectron2's name of a tensor -> ours."""
    rules = [
        (r"backbone\.stem\.conv1\.norm", "backbone.bn1"),
        (r"backbone\.stem\.conv1", "backbone.conv1"),
        (r"backbone\.res(\d)", lambda m: f"backbone.layer{int(m[1]) - 1}"),
        (r"roi_heads\.res5\.norm", "roi_heads.box_head.1"),
        (r"roi_heads\.res5", "roi_heads.box_head.0"),
        (r"conv(\d)\.norm", r"bn\1"),
        (r"shortcut\.norm", "downsample.1"),
        (r"shortcut", "downsample.0"),
        (r"proposal_generator\.rpn_head\.conv", "rpn.head.conv.0.0"),
        (r"proposal_generator\.rpn_head\.objectness_logits", "rpn.head.cls_logits"),
        (r"proposal_generator\.rpn_head\.anchor_deltas", "rpn.head.bbox_pred"),
        (r"mask_head", "mask_predictor"),
    ]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def ours(name, tensor):
    """(our name, tensor with the background first) of one of detectron2's."""
    if "cls_score" in name:
        tensor = torch.cat([tensor[-1:], tensor[:-1]])
    return our_name(name), tensor


@pytest.fixture
def detector(numbers):
    built = build_detector(NarrowResNet(), int(numbers["meta/num_classes"]), masks=True, rpn_batch=4096, roi_batch=4096)
    weights = dict(ours(name, tensor) for name, tensor in numbers.under("weights/").items())
    absent, unknown = built.load_state_dict(weights, strict=False)
    assert not unknown and all(name.endswith("num_batches_tracked") for name in absent)
    return built.double().eval()


def close(actual, expected, atol, rtol=0.0):
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, atol=atol, rtol=rtol)


# ---- detectron2's numbers


@torch.no_grad()
def test_golden_anchors_and_proposals(detector, numbers):
    images, _ = detector.transform(numbers.images())
    numbers.compare("eval/net_input", images.tensors, 1e-5)
    features = detector.backbone(images.tensors)
    close(features, numbers["eval/res4"], ATOL["features"])
    logits, deltas = detector.rpn.head([features])
    close(logits[0], numbers["eval/rpn_logits"], ATOL["features"])
    close(deltas[0], numbers["eval/rpn_deltas"], ATOL["features"])
    close(detector.rpn.anchor_generator(images, [features])[0], numbers["eval/anchors"], 1e-4)
    boxes, _ = detector.rpn(images, {"0": features})
    for found, expected in zip(boxes, numbers.of_images("eval/proposal_boxes"), strict=True):
        close(found, expected, ATOL["boxes"])


@torch.no_grad()
def test_golden_box_and_mask_heads(detector, numbers):
    heads, features = detector.roi_heads, {"0": numbers["eval/res4"]}
    pooled = heads.box_roi_pool(features, numbers.of_images("roi/boxes"), None)
    numbers.compare("roi/pooled", pooled[:, :8], ATOL["features"])
    res5 = heads.box_head(pooled)
    close(res5.mean(dim=(2, 3)), numbers["roi/res5_mean"], ATOL["features"])
    logits, deltas = heads.box_predictor(res5.mean(dim=(2, 3)))
    close(logits.roll(-1, dims=1), numbers["roi/class_logits"], ATOL["features"])
    close(deltas[:, 4:], numbers["roi/box_deltas"], ATOL["features"])
    numbers.compare("roi/mask_logits", heads.mask_predictor(res5), ATOL["features"])


@torch.no_grad()
def test_golden_detections(detector, numbers):
    for i, found in enumerate(detector(numbers.images())):
        expected = {key: numbers[f"det/{key}{i}"] for key in ("raw_boxes", "scores", "classes", "mask_probs", "boxes")}
        assert found["labels"].equal(expected["classes"] + 1)
        close(found["boxes"], expected["raw_boxes"], ATOL["boxes"])
        close(found["scores"], expected["scores"], ATOL["scores"])
        close(found["masks"], expected["mask_probs"], ATOL["scores"])
        output_size = tuple(numbers[f"input/output_hw{i}"].tolist())
        final = rescale(found, numbers[f"input/image{i}"].shape[-2:], output_size)
        close(final["boxes"], expected["boxes"], ATOL["boxes"])
        if f"det/pasted_masks{i}" in numbers.file.files:
            pasted = numbers[f"det/pasted_masks{i}"]
            assert final["masks"].shape == pasted.shape
            assert (final["masks"] != pasted).float().mean() < 1e-4  # pixels whose probability is 0.5 to rounding


@pytest.mark.parametrize("masks", [False, True])
def test_golden_training_step(detector, numbers, masks):
    """Losses, gradients, BatchNorm statistics, and the parameters after a step of SGD."""
    detector.train()
    if not masks:
        detector.roi_heads.mask_predictor = None
    prefix = "train_boxmask/" if masks else "train_box/"
    losses = detector(numbers.images(), numbers.targets(masks))
    theirs = {
        "loss_classifier": "loss_cls", "loss_box_reg": "loss_box_reg", "loss_objectness": "loss_rpn_cls",
        "loss_rpn_box_reg": "loss_rpn_loc", "loss_mask": "loss_mask",
    }  # fmt: skip
    assert losses.keys() == {name for name in theirs if masks or name != "loss_mask"}
    for name, loss in losses.items():
        close(loss, numbers[prefix + theirs[name]], atol=0, rtol=1e-4)
    sum(losses.values()).backward()
    parameters = dict(detector.named_parameters())
    gradients = numbers.under(prefix + "grad/")
    assert gradients
    for name, expected in gradients.items():
        name, expected = ours(name, expected)
        close(parameters[name].grad, expected, 1e-3 * expected.abs().max().item())
    for name, expected in numbers.under(prefix + "bn_after/").items():
        close(detector.state_dict()[our_name(name)], expected, ATOL["features"])
    torch.optim.SGD(detector.parameters(), 0.02).step()
    after = numbers.under(prefix + "param_after_one_sgd_step_lr0.02/")
    assert after
    for name, expected in after.items():
        name, expected = ours(name, expected)
        close(parameters[name], expected, 2e-5)


def test_an_output_that_is_not_finite_shows_in_the_losses(detector, numbers):
    """Proposals leave such boxes out, so that the run would go on without them."""
    detector.train()
    detector.rpn.head.bbox_pred.register_forward_hook(
        lambda module, inputs, output: output.index_fill(3, torch.tensor([1]), torch.nan)
    )
    losses = detector(numbers.images(), numbers.targets(True))
    assert not sum(losses.values()).isfinite() and losses["loss_classifier"].isfinite()


def test_images_are_normalised_as_the_backbones_were():
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
    detector = build_detector(NarrowResNet(), 2, mean=mean, std=std)
    batch, _ = detector.transform([255 * torch.tensor(mean).view(3, 1, 1).expand(3, 4, 4)])
    assert batch.tensors.abs().max() < 1e-6
    batch, _ = detector.transform([255 * torch.tensor([0.75, 0.6, 0.4]).view(3, 1, 1).expand(3, 4, 4)])
    torch.testing.assert_close(batch.tensors, torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: VisionTransformer(32, 16, 1, 1, 8, 8),
        lambda: mobilenet_v2(width_mult=0.1),
        lambda: type("ResNet", (nn.Sequential,), {})(),  # what is called one
        lambda: NarrowResNet().layer4,
    ],
)
def test_a_backbone_that_is_no_resnet_is_refused_whatever_it_is_called(make):
    with pytest.raises(UserError, match="^detection needs a ResNet of torchvision[^\n]*$"):
        build_detector(make(), 20)
