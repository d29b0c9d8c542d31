"""ResNet encoders with a projection head, and the momentum update of the key encoder."""

from functools import partial

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


def resnet_names():
    """Every architecture `build_encoder` knows: torchvision's ResNets, and resnet10 for small demonstrations."""
    names = torchvision.models.list_models(module=torchvision.models)
    return ["resnet10", *(name for name in names if "resne" in name)]


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over each `group` images in turn: one forward pass does what a pass for each group would do.

    The convolutions around it see all images at once. On a CPU a step of four groups then takes 1.05 times as long as
    one of a single group, instead of 1.4.
    """

    def __init__(self, features, group):
        super().__init__(features)
        self.group = group

    def forward(self, x):
        if not self.training or len(x) <= self.group:
            return super().forward(x)
        return torch.cat([*map(super().forward, x.split(self.group))])


def build_encoder(arch, dim=128, head="mlp", stem="imagenet", bn_batch=None, channels=3):
    """A torchvision ResNet whose `fc` is the projection head: (N, 3, H, W) images -> (N, dim), not normalised.

    arch: a name from `resnet_names()`. dim: output width C.
    head: "fc", one Linear (v1), or "mlp", Linear-ReLU-Linear with hidden width = feature width (v2).
    stem: "imagenet" (7x7 stride 2, max-pool) or "small" (3x3 stride 1, no pooling: for images of about 32 pixels).
    bn_batch: images that share BatchNorm statistics in training; None for all of a forward pass. channels: of an image.
    Raises ValueError for an unknown arch, head or stem.
    Source: arXiv:1911.05722 section 3.3, arXiv:2003.04297 section 2; the small stem is that of MoCo's CIFAR notebook.
    """
    if arch not in resnet_names():
        raise ValueError(f"unknown arch {arch!r}; one of {', '.join(resnet_names())}")
    if head not in ("fc", "mlp") or stem not in ("imagenet", "small"):
        raise ValueError(f"head must be fc or mlp and stem imagenet or small, got {head!r} and {stem!r}")
    options = {"num_classes": dim, "norm_layer": partial(GroupedBatchNorm2d, group=bn_batch) if bn_batch else None}
    if arch == "resnet10":  # not torchvision's: one block a stage, four times as fast as resnet18's two on 48 pixels
        encoder = ResNet(BasicBlock, [1, 1, 1, 1], **options)
    else:
        encoder = torchvision.models.get_model(arch, **options)
    if head == "mlp":
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    if stem == "small" or channels != 3:
        options = {"kernel_size": 3, "padding": 1} if stem == "small" else {"kernel_size": 7, "stride": 2, "padding": 3}
        encoder.conv1 = nn.Conv2d(channels, encoder.conv1.out_channels, bias=False, **options)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem == "small":
        encoder.maxpool = nn.Identity()
    return encoder


def feature_width(weights):
    """The number of features of a backbone with these weights: the channels of its last convolution."""
    return [value for value in weights.values() if value.dim() == 4][-1].shape[0]


@torch.no_grad()
def momentum_update(query_encoder, key_encoder, momentum):
    """key <- momentum * key + (1 - momentum) * query, in place, for parameters only.

    BatchNorm statistics are not averaged: the key encoder gathers its own. `query_encoder` may be wrapped (DDP,
    compile), as the order of parameters stays the same. momentum: in [0, 1).
    One fused call: about 3 times as fast as a loop over the parameters on a CPU, and few launches on a GPU.
    Source: arXiv:1911.05722, equation 2.
    """
    torch._foreach_lerp_(list(key_encoder.parameters()), list(query_encoder.parameters()), 1 - momentum)


def average_tensors(tensors, accelerator):
    """Replace tensors by their mean over processes, in place, with one all-reduce."""
    mean = accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
    parts = mean.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


@torch.no_grad()
def average_batchnorm(modules, accelerator):
    """Replace BatchNorm's running statistics by their mean over processes, in place.

    Called after each step, this keeps the whole state of a run equal on every process, so that any of them can evaluate
    or save it. It sends 0.4 MB for two ResNet-50; the gradients are 112 MB.
    """
    statistics = [b for module in modules for b in module.buffers() if b.is_floating_point()]
    if accelerator.num_processes > 1 and statistics:
        average_tensors(statistics, accelerator)
