"""The paper's detectors, Faster and Mask R-CNN on ResNet-C4, from torchvision's detection package.

The reference fine-tunes with detectron2. torchvision's parts are used wherever they compute the same; every override
here names the setting of detectron2's configuration for which torchvision has no argument.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d, batched_nms, clip_boxes_to_image, roi_align

from moco.augment import MEAN, STD
from moco.detection.coco import decode_masks
from moco.errors import UserError

ANCHOR_SIZES = (32, 64, 128, 256, 512)  # pixels
POOLED = 14  # ROI_BOX_HEAD.POOLER_RESOLUTION: side of an RoI's features before layer4, and of a mask


def build_detector(
    backbone, classes, masks=False, norm="batch", anchor_sizes=ANCHOR_SIZES, rpn_batch=256, roi_batch=512, mean=MEAN,
    std=STD,
):  # fmt: skip
    """Faster R-CNN C4, or with `masks` Mask R-CNN C4, of a ResNet: layers 1 to 3 below the heads, layer4 in them.

    backbone: a torchvision ResNet without head; it is copied. classes: how many, without background.
    norm: "batch" (every BatchNorm trains, with a new one after layer4) or "frozen" (statistics and affine fixed).
    anchor_sizes: sides of the square anchors in pixels. rpn_batch, roi_batch: samples an image in the two losses.
    mean, std: of each channel in [0, 1], what the backbone's images are normalised with.
    In training `detector(images, targets)` is a dict of losses; each target may hold a "generator" to sample by.
    In evaluation `detector(images)` is a list of {"boxes" at the network's size, "labels" from 1, "scores", "masks"
    (n, 14, 14) probabilities}, to be taken to the image's own size by `rescale`.
    Raises UserError as `check_resnet` does.
    Source: arXiv:1911.05722, section 4.2 and appendix; detectron2's R50-C4 configurations.
    """
    check_resnet(backbone)
    resnet = copy.deepcopy(backbone).requires_grad_(True)
    body = C4Body(resnet)
    box_head = nn.Sequential(resnet.layer4, nn.BatchNorm2d(out_channels(resnet.layer4)))
    width, features = out_channels(resnet.layer3), out_channels(resnet.layer4)
    rpn = ProposalNetwork(
        C4Anchors((tuple(anchor_sizes),), ((0.5, 1.0, 2.0),), body.stride),
        Float32RPNHead(width, 3 * len(anchor_sizes)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=rpn_batch,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 12000, "testing": 6000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )
    heads = C4Heads(
        box_roi_pool=RoIPool(1 / body.stride),
        box_head=box_head,
        box_predictor=BoxPredictor(features, classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=roi_batch,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        mask_predictor=MaskPredictor(features, classes) if masks else None,
    )
    detector = GeneralizedRCNN(body, rpn, heads, Normalize(mean, std))
    return freeze_norms(detector) if norm == "frozen" else detector


def check_resnet(backbone):
    """Raise UserError unless the backbone is a torchvision ResNet for images of three channels."""
    if not isinstance(backbone, ResNet):
        kind = f"{type(backbone).__module__}.{type(backbone).__qualname__}"
        raise UserError(
            f"detection needs a ResNet of torchvision, whose layers the C4 detector is made of, got a {kind}; name"
            " another --backbone"
        )
    if backbone.conv1.in_channels != 3:
        raise UserError(
            f"detection needs a backbone for images of 3 channels, got one for {backbone.conv1.in_channels}; name"
            " another --backbone"
        )


def out_channels(layer):
    """Channels that a layer of a ResNet puts out."""
    convolutions = [module for name, module in layer[-1].named_children() if name.startswith("conv")]
    return convolutions[-1].out_channels


class C4Body(nn.Sequential):
    """The ResNet up to layer3. `stride`: pixels of the image a feature; 16, less with the small stem."""

    def __init__(self, resnet):
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        super().__init__()
        for name in names:
            self.add_module(name, getattr(resnet, name))
        self.stride = 4 * resnet.conv1.stride[0] * (1 if isinstance(resnet.maxpool, nn.Identity) else 2)


def freeze_norms(module):
    """`module` with each BatchNorm a constant, statistics and affine, as with MODEL.RESNETS.NORM FrozenBN."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_norms(child)
    return module


class Normalize(nn.Module):
    """Images of 0 to 255, already resized, to one normalised batch, padded with zeros to the largest of them.

    Stands for GeneralizedRCNNTransform, which resizes by other rules and pads to multiples of 32 (size_divisibility 0).
    """

    def __init__(self, mean=MEAN, std=STD):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images, targets=None):
        sizes = [tuple(image.shape[-2:]) for image in images]
        height, width = (max(sides) for sides in zip(*sizes))
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for padded, image, (h, w) in zip(batch, images, sizes):
            padded[:, :h, :w] = (image.to(batch.dtype) - self.mean) / self.std
        return ImageList(batch, sizes), targets

    def postprocess(self, detections, image_sizes, original_sizes):
        return detections  # the caller knows the image's own size: `rescale`


# ---- proposals


class C4Anchors(AnchorGenerator):
    """Anchors ordered by size, then ratio, not rounded (DefaultAnchorGenerator), at the true stride, in float32.

    torchvision orders by ratio, rounds, infers the stride from the padded image, and follows the features' precision.
    """

    def __init__(self, sizes, aspect_ratios, stride):
        super().__init__(sizes, aspect_ratios)
        self.stride = stride

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu"):
        sizes = torch.tensor(scales, dtype=torch.float64)[:, None]
        roots = torch.tensor(aspect_ratios, dtype=torch.float64).sqrt()[None]  # ratios are height / width
        half = torch.stack([sizes / roots, sizes * roots], dim=2).view(-1, 2) / 2
        return torch.cat([-half, half], dim=1).to(device, dtype)

    def forward(self, image_list, feature_maps):
        grids = [features.shape[-2:] for features in feature_maps]
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        anchors = torch.cat(self.grid_anchors(grids, [(self.stride, self.stride)] * len(grids)))
        return [anchors] * len(image_list.image_sizes)


def at_least_float32(x):
    """x in float32; in float64 if it is already, as the tests against detectron2 have it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Float32RPNHead(RPNHead):
    """torchvision's head with outputs in float32, because half precision is too coarse for coordinates."""

    def forward(self, features):
        logits, deltas = super().forward(features)
        return list(map(at_least_float32, logits)), list(map(at_least_float32, deltas))


class ProposalNetwork(RegionProposalNetwork):
    """RPN with detectron2's losses, filter, and a sample that is a function of each target's generator."""

    def assign_targets_to_anchors(self, anchors, targets):
        """As torchvision, and the anchors that are not sampled are marked -1, too."""
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        sampler = self.fg_bg_sampler
        size, fraction = sampler.batch_size_per_image, sampler.positive_fraction
        for image_labels, target in zip(labels, targets, strict=True):
            chosen = sample(image_labels, size, fraction, target.get("generator"))
            unchosen = torch.ones_like(image_labels, dtype=torch.bool)
            unchosen[chosen] = False
            image_labels[unchosen] = -1
        return labels, matched

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        """Both losses are sums over samples / (batch size an image * images), boxes by L1 (SMOOTH_L1_BETA 0).

        If any output is not finite, neither is the box loss, because proposals leave such boxes out silently.
        """
        normalizer = self.fg_bg_sampler.batch_size_per_image * len(labels)
        labels, targets = torch.cat(labels), torch.cat(regression_targets)
        sampled, positive = labels >= 0, labels == 1
        box_loss = F.l1_loss(pred_bbox_deltas[positive], targets[positive], reduction="sum")
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], labels[sampled], reduction="sum"
        )
        return objectness_loss / normalizer, box_loss / normalizer + 0 * (objectness.sum() + pred_bbox_deltas.sum())

    def filter_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level):
        """Return each image's best boxes after NMS, by logits; only empty or non-finite boxes are dropped."""
        objectness = objectness.detach().view(len(proposals), -1)
        logits, order = objectness.topk(min(self.pre_nms_top_n(), objectness.shape[1]), dim=1)
        boxes_of, logits_of = [], []
        for boxes, image_logits, chosen, shape in zip(proposals, logits, order, image_shapes):
            boxes = boxes[chosen]
            finite = boxes.isfinite().all(dim=1) & image_logits.isfinite()
            boxes = clip_boxes_to_image(boxes, shape)
            keep = finite & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            boxes, image_logits = boxes[keep], image_logits[keep]
            one_level = torch.zeros_like(image_logits, dtype=torch.long)
            keep = batched_nms(boxes, image_logits, one_level, self.nms_thresh)[: self.post_nms_top_n()]
            boxes_of.append(boxes[keep])
            logits_of.append(image_logits[keep])
        return boxes_of, logits_of


def sample(labels, size, fraction, generator=None):
    """Indices of at most size * fraction labels above 0, filled up to `size` with labels that are 0.

    generator: on the CPU, so that the choice is the same on any device; None for torch's own.
    """
    positive, negative = (torch.where(chosen)[0] for chosen in (labels >= 1, labels == 0))
    positives = min(len(positive), int(size * fraction))
    negatives = min(len(negative), size - positives)
    drawn = [
        group[torch.randperm(len(group), generator=generator)[:count].to(group.device)]
        for group, count in ((positive, positives), (negative, negatives))
    ]
    return torch.cat(drawn)


# ---- heads


class RoIPool(nn.Module):
    """RoIAlign of 14 x 14 with aligned=True and as many samples a bin as it has features (POOLER_TYPE ROIAlignV2)."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, features, boxes, image_shapes):
        return roi_align(features["0"], boxes, POOLED, self.scale, sampling_ratio=0, aligned=True)


class BoxPredictor(nn.Module):
    """Class logits (N, 1 + K), background first, and box deltas (N, 4 (1 + K)), zeros for the background.

    The parameters are detectron2's FastRCNNOutputLayers but for the background, which comes last there.
    """

    def __init__(self, features, classes):
        super().__init__()
        self.cls_score = nn.Linear(features, 1 + classes)
        self.bbox_pred = nn.Linear(features, 4 * classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return at_least_float32(self.cls_score(x)), F.pad(at_least_float32(self.bbox_pred(x)), (4, 0))


class MaskPredictor(nn.Module):
    """(N, C, 7, 7) features of layer4 -> (N, K, 14, 14) mask logits (MaskRCNNConvUpsampleHead without convolutions)."""

    def __init__(self, features, classes):
        super().__init__()
        self.deconv = nn.ConvTranspose2d(features, 256, 2, stride=2)
        self.predictor = nn.Conv2d(256, classes, 1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for layer in (self.deconv, self.predictor):
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return at_least_float32(self.predictor(F.relu(self.deconv(x))))


class C4Heads(RoIHeads):
    """layer4 and its norm on each RoI, shared by boxes and masks (Res5ROIHeads with the reference's extra norm)."""

    def has_mask(self):
        return self.mask_predictor is not None

    def check_targets(self, targets):
        pass  # masks in any form: `mask_targets`

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return self.detect(features, proposals, image_shapes), {}
        self.generators = [target.get("generator") for target in targets]  # for `subsample`, which gets no targets
        proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))  # (RoIs, C, 7, 7)
        class_logits, deltas = self.box_predictor(pooled.mean(dim=(2, 3)))
        losses = box_losses(class_logits, deltas, torch.cat(labels), torch.cat(box_targets))
        if self.has_mask():
            positive = [image_labels > 0 for image_labels in labels]
            mask_logits = self.mask_predictor(pooled[torch.cat(positive)])
            truth = [
                mask_targets(target, boxes[chosen], indices[chosen])
                for target, boxes, indices, chosen in zip(targets, proposals, matched, positive)
            ]
            losses["loss_mask"] = mask_loss(mask_logits, torch.cat(truth), torch.cat(labels))
        return [], losses

    def subsample(self, labels):
        size, fraction = self.fg_bg_sampler.batch_size_per_image, self.fg_bg_sampler.positive_fraction
        return [sample(image, size, fraction, g) for image, g in zip(labels, self.generators, strict=True)]

    def detect(self, features, proposals, image_shapes):
        """Boxes from the proposals, then masks from the boxes."""
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, deltas = self.box_predictor(pooled.mean(dim=(2, 3)))
        found = self.postprocess_detections(class_logits, deltas, proposals, image_shapes)
        detections = [dict(zip(("boxes", "scores", "labels"), image)) for image in zip(*found)]
        if self.has_mask():
            boxes = [image["boxes"] for image in detections]
            logits = self.mask_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))
            labels = torch.cat([image["labels"] for image in detections])
            chosen = logits[torch.arange(len(logits), device=logits.device), labels - 1].sigmoid()
            for image, masks in zip(detections, chosen.split([len(b) for b in boxes])):
                image["masks"] = masks
        return detections

    def postprocess_detections(self, class_logits, box_regression, proposals, image_shapes):
        """As torchvision, but boxes stay however thin (`rescale` drops those without area) unless not finite."""
        counts = [len(boxes) for boxes in proposals]
        all_boxes = self.box_coder.decode(box_regression, proposals).view(len(class_logits), -1, 4)
        all_scores = class_logits.softmax(dim=1)
        found = []
        for boxes, scores, shape in zip(all_boxes.split(counts), all_scores.split(counts), image_shapes):
            finite = boxes.isfinite().all(dim=2).all(dim=1) & scores.isfinite().all(dim=1)
            boxes, scores = clip_boxes_to_image(boxes[finite], shape)[:, 1:], scores[finite, 1:]
            roi, label = torch.where(scores > self.score_thresh)
            boxes, scores = boxes[roi, label], scores[roi, label]
            keep = batched_nms(boxes, scores, label, self.nms_thresh)[: self.detections_per_img]
            found.append((boxes[keep], scores[keep], label[keep] + 1))
        return tuple(zip(*found))


def box_losses(class_logits, deltas, labels, box_targets):
    """Cross-entropy, and L1 on the box of the true class (SMOOTH_L1_BETA 0), both a mean over all RoIs."""
    positive = torch.where(labels > 0)[0]
    chosen = deltas.view(len(deltas), -1, 4)[positive, labels[positive]]
    box_loss = F.l1_loss(chosen, box_targets[positive], reduction="sum") / max(1, len(labels))
    return {"loss_classifier": F.cross_entropy(class_logits, labels), "loss_box_reg": box_loss}


def mask_loss(mask_logits, truth, labels):
    """Binary cross-entropy on the mask of the true class; 0 that still has a gradient where no RoI is positive."""
    labels = labels[labels > 0]
    if not len(labels):
        return mask_logits.sum() * 0
    chosen = mask_logits[torch.arange(len(labels), device=labels.device), labels - 1]
    return F.binary_cross_entropy_with_logits(chosen, truth)


def mask_targets(target, boxes, indices):
    """What the masks of RoIs should be: (n, 14, 14) of 0 and 1.

    boxes: (n, 4). indices: the object that each RoI matched. target: with "masks", for each object its polygons,
    (points, 2) each (MASK_FORMAT polygon, the reference's), or its bits (MASK_FORMAT bitmask): (H, W), or run-length
    encoded. All is drawn on the host, polygons by COCO's own routine.
    """
    device, boxes, indices = boxes.device, boxes.double().cpu(), indices.cpu()
    drawn = torch.zeros(len(boxes), POOLED, POOLED)
    for index in indices.unique().tolist():
        chosen, mask = indices == index, target["masks"][index]
        if isinstance(mask, list):
            drawn[chosen] = draw_polygons(mask, boxes[chosen])
            continue
        bits = torch.from_numpy(decode_masks([mask])[0]) if isinstance(mask, dict) else mask.cpu()
        seen = roi_align(bits[None, None].float(), [boxes[chosen].float()], POOLED, sampling_ratio=0, aligned=True)
        drawn[chosen] = (seen[:, 0] >= 0.5).float()
    return drawn.to(device)


def draw_polygons(rings, boxes):
    """The part of an object's polygons in each box, (n, 14, 14) of 0 and 1. boxes: (n, 4) float64."""
    from pycocotools import mask as coco_mask

    drawn = torch.zeros(len(boxes), POOLED, POOLED)
    for out, box in zip(drawn, boxes):
        origin, sides = box[:2].numpy(), (box[2:] - box[:2]).clamp(min=0.1).numpy()
        parts = [((np.asarray(ring) - origin) / sides * POOLED).flatten().tolist() for ring in rings]
        encoded = coco_mask.merge(coco_mask.frPyObjects(parts, POOLED, POOLED))
        out.copy_(torch.from_numpy(coco_mask.decode(encoded)))
    return drawn
