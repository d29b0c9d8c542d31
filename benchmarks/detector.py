"""What detectron2's rules cost on torchvision: training iterations of our Faster R-CNN C4 beside torchvision's own.

python benchmarks/detector.py                                                          a small one, for CPUs
python benchmarks/detector.py --arch resnet50 --image-size 800 --roi-batch 512         the reference's, for a GPU

Both have the same backbone, heads, images, anchors a cell, proposals and regions, and see the images as tensors of one
size. torchvision's has its own RegionProposalNetwork, RoIHeads, AnchorGenerator, RoIAlign and predictor, RoIAlign with
as many samples a bin as ours. The two take turns, so that whatever else the machine does meets both.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from detect_transfer import detector_step
from moco.backbone import load_backbone
from moco.detection.model import POOLED, C4Body, Normalize, build_detector, out_channels

CLASSES = 20


def build_stock(resnet, anchor_sizes, roi_batch):
    """Faster R-CNN C4 as torchvision's parts make it, with the counts and thresholds of `build_detector`."""
    resnet = copy.deepcopy(resnet)
    features = out_channels(resnet.layer4)
    rpn = RegionProposalNetwork(
        AnchorGenerator((anchor_sizes,), ((0.5, 1.0, 2.0),)),
        RPNHead(out_channels(resnet.layer3), 3 * len(anchor_sizes)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 12000, "testing": 6000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )
    heads = RoIHeads(
        box_roi_pool=MultiScaleRoIAlign(["0"], POOLED, sampling_ratio=0),
        box_head=nn.Sequential(resnet.layer4, nn.BatchNorm2d(features), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        box_predictor=FastRCNNPredictor(features, 1 + CLASSES),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=roi_batch,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )
    return GeneralizedRCNN(C4Body(resnet), rpn, heads, Normalize())


def random_items(images, size):
    """Items of `DetectionImages`: noise (3, size, size) with eight boxes each."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    corners = torch.rand(images, 8, 2, generator=generator) * 0.6 * size
    sides = (0.1 + 0.3 * torch.rand(images, 8, 2, generator=generator)) * size
    boxes, labels = torch.cat([corners, corners + sides], dim=2), torch.randint(1, 1 + CLASSES, (images, 8))
    return [(image, {"boxes": b, "labels": c, "seed": 0}) for image, b, c in zip(pixels, boxes, labels)]


def timed_step(detector, optimizer, items, accelerator):
    """Seconds of one `detector_step`: by the clock on a GPU, on a CPU of processor time, which waits for nobody."""
    on_gpu = accelerator.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    started = clock()
    detector_step(detector, optimizer, [items], accelerator)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--arch", default="resnet18", help="a torchvision ResNet [%(default)s]")
    add("--image-size", type=int, metavar="PIXELS", default=256, help="sides of the images [%(default)s]")
    add("--batch-size", type=int, metavar="N", default=2, help="images an iteration [%(default)s]")
    add("--roi-batch", type=int, metavar="N", default=64, help="regions an image [%(default)s]")
    add("--rounds", type=int, metavar="N", default=20, help="iterations of each, after two to warm up [%(default)s]")
    args = parser.parse_args()
    accelerator = Accelerator()
    device = accelerator.device.type
    backbone = load_backbone("random", args.arch)[0]
    anchor_sizes = tuple(args.image_size // divisor for divisor in (16, 8, 4, 2, 1))
    torch.manual_seed(0)
    detectors = {
        "torchvision": build_stock(backbone, anchor_sizes, args.roi_batch),
        "ours": build_detector(backbone, CLASSES, anchor_sizes=anchor_sizes, roi_batch=args.roi_batch),
    }
    batch = random_items(args.batch_size, args.image_size)
    seconds, optimizers = {name: [] for name in detectors}, {}
    for name, detector in detectors.items():
        detector.to(device, memory_format=torch.channels_last)
        optimizers[name] = torch.optim.SGD(detector.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
    for turn in tqdm(range(args.rounds + 2), "rounds", leave=False):
        for name in list(detectors)[:: 1 if turn % 2 else -1]:  # neither is always the first
            taken = timed_step(detectors[name], optimizers[name], batch, accelerator)
            seconds[name] += [taken] if turn >= 2 else []
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [ours / stock for ours, stock in zip(seconds["ours"], seconds["torchvision"])]
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, processor time"
    )
    print(
        f"{args.arch}, {args.batch_size} images of {args.image_size} pixels, {args.roi_batch} regions each, on {where}"
    )
    for name, median in medians.items():
        spread = f"median {median:.3f} s, {min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        print(f"{name:<12} {1 / median:.3f} iterations/s ({spread}; {args.rounds} of each)")
    print(f"ours / torchvision in seconds: {medians['ours'] / medians['torchvision']:.3f} of the medians,", end=" ")
    print(f"{statistics.median(ratios):.3f} median of the rounds' ratios")


if __name__ == "__main__":
    main()
