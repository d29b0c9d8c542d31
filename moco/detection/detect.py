"""What a detector finds, at the size of the images themselves, and the BatchNorm statistics that it needs for that."""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn
from torchvision.ops import clip_boxes_to_image
from tqdm import tqdm

from moco.data.batches import loader
from moco.detection.coco import encode_masks
from moco.run.launch import Stopped, stoppable

PASTE_CHUNK = 2**26  # pixels of masks pasted at a time: 0.8 GB in float32, two thirds of it for the grid to sample at


@torch.no_grad()
def detect(detector, images, workers, accelerator):
    """What the detector finds in each image, in their order, on every process; the processes share the images out.

    images: DetectionImages without a seed, one to a forward pass, so that none depends on others or their padding.
    Returns for each {"boxes" (n, 4), "labels" (n,) from 0, "scores" (n,)} arrays, and "masks", n run-length encoded;
    an image that cannot be decoded has no detections. Also this process's undecodable images as (name, reason).
    """
    detector.eval()
    mine = range(accelerator.process_index, len(images.records), accelerator.num_processes)
    batches = loader(images, [[(0, index)] for index in mine], workers)
    found, undecodable = [], []
    progress = tqdm(batches, "detect", leave=False, disable=not accelerator.is_main_process)
    for [(image, target)], failed in stoppable(progress, accelerator):
        record = images.records[target["index"]]
        found.append((target["index"], detect_one(detector, image, (record["height"], record["width"]), accelerator)))
        undecodable += failed
    found = dict(gather_object(found))
    return [found[index] for index in range(len(images.records))], undecodable


def detect_one(detector, image, size, accelerator):
    """The detections of one image (3, h, w), or of None, at `size` = (height, width)."""
    if image is None:
        empty = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64), "scores": np.zeros(0)}
        return empty | ({"masks": []} if detector.roi_heads.has_mask() else {})
    with accelerator.autocast():
        [detections] = detector([image.to(accelerator.device)])
    detections = rescale(detections, image.shape[-2:], size)
    masks = {"masks": encode_masks(detections.pop("masks"))} if "masks" in detections else {}
    arrays = {key: values.cpu().numpy() for key, values in detections.items()}
    return arrays | {"labels": arrays["labels"] - 1} | masks  # the detector counts from 1, as 0 is the background


def rescale(detections, network_size, output_size):
    """The detections of one image from the network's size to the image's own, both (height, width).

    Boxes are scaled, clipped, and dropped where nothing is left; masks are pasted: (n, H, W) bool, on the same device.
    """
    scale = [output / network for output, network in zip(output_size, network_size)]
    boxes = detections["boxes"] * detections["boxes"].new_tensor([scale[1], scale[0]] * 2)
    boxes = clip_boxes_to_image(boxes, output_size)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    result = {key: values[keep] for key, values in (detections | {"boxes": boxes}).items()}
    if "masks" in result:
        result["masks"] = paste_masks(result["masks"], result["boxes"], output_size)
    return result


def paste_masks(masks, boxes, size):
    """(n, 14, 14) probabilities of boxes (n, 4) -> (n, H, W) bool: sampled bilinearly at pixel centres, >= 0.5."""
    height, width = size
    rows, columns = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=boxes.device)
    chunk = max(1, PASTE_CHUNK // (height * width))
    for first in range(0, len(masks), chunk):
        part = slice(first, first + chunk)
        x0, y0, x1, y1 = boxes[part, :, None].unbind(dim=1)  # (chunk, 1) each
        x, y = (columns - x0) / (x1 - x0) * 2 - 1, (rows - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(
            [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3
        )  # (chunk, H, W, 2)
        pasted[part] = F.grid_sample(masks[part, None].to(grid), grid, align_corners=False)[:, 0] >= 0.5
    return pasted


# ---- BatchNorm statistics for evaluation


def batch_norms(module):
    """Every BatchNorm in `module` that is not frozen."""
    return [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def precise_statistics(module, forward_passes, accelerator):
    """Set each BatchNorm's running statistics to the mean and population variance of all its inputs in these passes.

    forward_passes: an iterator that runs `module` in training mode once before each of its items. All processes make
    equally many. The statistics of training itself are a moving average over few images in a step, of weights that
    were still changing. They would cost AP in evaluation, so the reference computes them anew (TEST.PRECISE_BN).
    """
    norms = batch_norms(module)
    if not norms:
        return
    momenta, counts = [norm.momentum for norm in norms], {}

    def count(norm, inputs):
        shared = accelerator.num_processes if isinstance(norm, nn.SyncBatchNorm) else 1
        counts[norm] = inputs[0].numel() // inputs[0].shape[1] * shared

    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics are then those of the last pass
    totals = [norm.running_mean.new_zeros(3, norm.num_features, dtype=torch.float64) for norm in norms]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    try:
        for _ in forward_passes:
            for norm, total in zip(norms, totals):
                n, mean, var = counts[norm], norm.running_mean.double(), norm.running_var.double()
                total += torch.stack([torch.ones_like(mean), mean, var * (n - 1) / n + mean.square()]) * n
    except Stopped:  # the run saves a checkpoint now, and in the middle of this each process has its own statistics
        for norm, (mean, var) in zip(norms, before):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
        raise
    for norm, total, momentum in zip(norms, totals, momenta):
        n, mean, square = accelerator.reduce(total, "sum")
        norm.running_mean.copy_(mean / n)
        norm.running_var.copy_(square / n - (mean / n).square())
        norm.momentum = momentum
    for hook in hooks:
        hook.remove()
