"""Encoders: a backbone with a projection head, and the momentum update of the key encoder.

A backbone is a torchvision ResNet or, by the name timm/NAME, a model of timm, which is installed only where it is used.
"""

import difflib
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd.function import once_differentiable
from torchvision.models.resnet import BasicBlock, ResNet

from moco.errors import UserError, explained

TIMM = "timm/"  # stands before the names of timm's models


def resnet_names():
    """Every ResNet `build_encoder` knows: torchvision's, and resnet10 for small demonstrations."""
    names = torchvision.models.list_models(module=torchvision.models)
    return ["resnet10", *(name for name in names if "resne" in name)]


def check_arch(arch):
    """Raise UserError unless `build_encoder` knows this architecture; the message has the names, or the nearest."""
    if arch.startswith(TIMM):
        with explained(f"{arch} needs timm, which is not installed", "pip install timm", ImportError):
            import timm
        names = timm.list_models()
        if arch.removeprefix(TIMM) not in names:
            nearest = difflib.get_close_matches(arch.removeprefix(TIMM), names, 5, cutoff=0)
            raise UserError(
                f"{arch} is not a model of timm; the nearest are {', '.join(TIMM + name for name in nearest)}"
            )
    elif arch not in resnet_names():
        raise UserError(f"{arch} is none of {', '.join(resnet_names())}; a model of timm is timm/NAME")


class Encoder(nn.Module):
    """A backbone and a projection head: images (N, channels, S, S) -> features (N, width) -> (N, C), not normalised.

    Only the backbone is evaluated and published. arch: the name that `load_backbone` builds it by. image_size: the S it
    was built for; None where any size will do.
    """

    def __init__(self, backbone, head, arch, width, channels=3, image_size=None):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.arch, self.width, self.channels, self.image_size = arch, width, channels, image_size

    def forward(self, images):
        return self.head(self.backbone(images))

    def _load_from_state_dict(self, state, prefix, *arguments):
        """Also takes an encoder of earlier checkpoints, which was a ResNet with the head as its `fc`."""
        keys = [key for key in state if key.startswith(prefix)]
        if not any(key.startswith(f"{prefix}backbone.") for key in keys):
            for key in keys:
                name = key.removeprefix(prefix)
                part = f"head.{name[3:]}" if name.startswith("fc.") else f"backbone.{name}"
                state[prefix + part] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *arguments)


def build_encoder(arch, dim=128, head="mlp", stem="imagenet", bn_batch=None, image_size=None, channels=3):
    """An `Encoder` with random weights: (N, channels, H, W) images -> (N, dim), not normalised.

    arch: a name from `resnet_names()`, or timm/NAME, whose features are the pooled output of timm's model without its
    classifier. dim: output width C.
    head: "fc", one Linear (v1), or "mlp", Linear-ReLU-Linear with hidden width = feature width (v2).
    stem: "imagenet" (7x7 stride 2, max-pool) or "small" (3x3 stride 1, no pooling: for images of about 32 pixels), of a
    ResNet.
    bn_batch: images that share BatchNorm statistics in training; None for all of a forward pass.
    image_size: pixels, for those of timm's models that are built for one size; None for the model's default.
    Raises UserError for an unknown arch or a size that it cannot take, ValueError for an unknown head or stem.
    Source: arXiv:1911.05722 section 3.3, arXiv:2003.04297 section 2; the small stem is that of MoCo's CIFAR notebook.
    """
    check_arch(arch)
    if head not in ("fc", "mlp") or stem not in ("imagenet", "small"):
        raise ValueError(f"head must be fc or mlp and stem imagenet or small, got {head!r} and {stem!r}")
    if arch.startswith(TIMM):
        if stem == "small":
            raise UserError(f"--stem small is for ResNets, and {arch} has a stem of its own; leave the flag out")
        backbone, image_size, width = build_timm(arch, bn_batch, image_size, channels)
        last = nn.Linear(width, dim)
    else:
        backbone = build_resnet(arch, dim, bn_batch)
        last, backbone.fc = backbone.fc, nn.Identity()  # torchvision has drawn it already
        width = last.in_features
    if head == "mlp":
        last = nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)
    if not arch.startswith(TIMM) and (stem == "small" or channels != 3):
        replace_stem(backbone, stem, channels)
    return Encoder(backbone, last, arch, width, channels, image_size)


def build_resnet(arch, classes, bn_batch):
    """A torchvision ResNet with its `fc`, or a resnet10."""
    options = {"num_classes": classes, "norm_layer": partial(GroupedBatchNorm2d, group=bn_batch) if bn_batch else None}
    if arch == "resnet10":  # not torchvision's: one block a stage, four times as fast as resnet18's two on 48 pixels
        return ResNet(BasicBlock, [1, 1, 1, 1], **options)
    return torchvision.models.get_model(arch, **options)


def replace_stem(resnet, stem, channels):
    """Give a ResNet another first convolution, and with the small stem no pooling after it."""
    small = stem == "small"
    shape = {"kernel_size": 3, "padding": 1} if small else {"kernel_size": 7, "stride": 2, "padding": 3}
    resnet.conv1 = nn.Conv2d(channels, resnet.conv1.out_channels, **shape, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small:
        resnet.maxpool = nn.Identity()


# ---- models of timm


def timm_arguments(arch, image_size, channels):
    """What timm's create_model has to be told besides the name: the size where a model is built for one, channels."""
    import timm

    default = timm.get_pretrained_cfg(arch.removeprefix(TIMM))
    fixed = default is not None and default.fixed_input_size and image_size
    return ({"img_size": image_size} if fixed else {}) | ({"in_chans": channels} if channels != 3 else {})


def build_timm(arch, bn_batch, image_size, channels):
    """(model of timm without its classifier, image size it is built for, width of its features).

    It drops nothing at random in training, because that would be no function of seed and step.
    """
    import timm

    name = arch.removeprefix(TIMM)
    with explained(
        f"{arch} cannot be built for images of {image_size} pixels", "choose another --image-size or --arch"
    ):
        model = timm.create_model(name, num_classes=0, **timm_arguments(arch, image_size, channels))
        default = model.pretrained_cfg["input_size"][-1]
        image_size = image_size or default
        width = feature_width(model, image_size, channels)
    patches = next((module for module in model.modules() if isinstance(module, timm.layers.PatchEmbed)), None)
    side = max(patches.patch_size) if patches and not patches.dynamic_img_pad else 1
    if image_size % side and image_size != default:
        raise UserError(
            f"{arch} cuts images of {image_size} pixels into patches of {side} and would drop the rest; choose an"
            f" --image-size that is a multiple of {side}"
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("drop_prob", "drop_rate"):  # of timm's DropPath, and of models that call F.dropout themselves
            if hasattr(module, name):
                setattr(module, name, 0.0)
    if bn_batch:
        group_norms(model, bn_batch, arch)
    return model, image_size, width


@contextmanager
def in_eval_mode(module):
    """Put all parts of a module in eval mode; afterwards each is in its own again, as a frozen BatchNorm has one."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def feature_width(backbone, image_size, channels):
    """How many features a backbone gives for an image of this size and channels, found by a forward pass of one.

    Raises UserError if the backbone does not take such images, or gives anything but (N, width).
    """
    like = next(backbone.parameters())
    what = f"the backbone does not take images of {image_size} pixels with {channels} channels"
    with explained(what, "choose the --image-size it was built for"), in_eval_mode(backbone):
        features = backbone(like.new_zeros(1, channels, image_size, image_size))
    if not torch.is_tensor(features) or features.dim() != 2:
        shape = list(features.shape) if torch.is_tensor(features) else type(features).__name__
        raise UserError(f"the backbone gives {shape} for one image, not a row of features; choose another --arch")
    return features.shape[1]


# ---- BatchNorm


class NormalizeGroups(torch.autograd.Function):
    """BatchNorm of each group of rows in turn, which writes into one output, so that no forward pass concatenates.

    The backward pass still does, because PyTorch's kernel allocates its result: one copy of the input's gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, group, momentum, eps):
        out, parts = torch.empty_like(x), x.split(group)
        statistics = running_mean.new_empty(len(parts), 2, len(running_mean))  # means, and 1 / standard deviations
        settings = (weight, bias, running_mean, running_var, True, momentum, eps)
        for rows, normalised, of_group in zip(parts, out.split(group), statistics):
            torch.native_batch_norm(rows, *settings, out=(normalised, *of_group))
        ctx.save_for_backward(x, weight, statistics)
        ctx.group, ctx.eps = group, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, statistics = ctx.saved_tensors
        settings, backward = (True, ctx.eps, [True] * 3), torch.ops.aten.native_batch_norm_backward
        of_groups = [
            backward(of_rows, rows, weight, None, None, *of_group, *settings)
            for of_rows, rows, of_group in zip(gradient.split(ctx.group), x.split(ctx.group), statistics)
        ]
        of_x, *of_parameters = zip(*of_groups)
        return torch.cat(of_x), *(torch.stack(each).sum(dim=0) for each in of_parameters), *[None] * 5


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over each `group` images in turn: one forward pass does what a pass for each group would do.

    The convolutions around it see all images at once. On a CPU a step of four groups then takes 1.05 times as long as
    one of a single group, instead of 1.4. It equals the loop to the bit there, and to rounding when compiled.
    """

    def __init__(self, features, group):
        super().__init__(features)
        self.group = group

    def forward(self, x):
        if not self.training or len(x) <= self.group:
            return super().forward(x)
        groups, compiling = -(-len(x) // self.group), torch.compiler.is_compiling()
        self.num_batches_tracked.add_(groups)
        statistics, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        if compiling and len(x) % self.group == 0:
            x = self.all_at_once(x, groups)
        elif x.is_cuda and x.dtype == torch.bfloat16 and not compiling:
            x = NormalizeGroups.apply(x, *affine, *statistics, self.group, self.momentum, self.eps)
        else:  # cuDNN's kernels, which have no bfloat16; on a CPU a step is not slower with the copy
            settings = (*statistics, *affine, True, self.momentum, self.eps)
            x = torch.cat([F.batch_norm(rows, *settings) for rows in x.split(self.group)])
        return self.act(self.drop(x)) if hasattr(self, "act") else x  # timm's BatchNormAct2d

    def all_at_once(self, x, groups):
        """The same without a loop, for a compiler to fuse: from a loop it would make kernels for each group."""
        rows = x.unflatten(0, (groups, -1)).to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(rows, dim=(1, 3, 4), correction=0, keepdim=True)  # (groups, 1, C, 1, 1)
        scale = torch.rsqrt(var + self.eps) * self.weight.view(-1, 1, 1)
        with torch.no_grad():
            n, stays = rows[0].numel() // rows.shape[2], 1 - self.momentum
            shares = self.momentum * stays ** torch.arange(groups - 1, -1, -1, device=x.device, dtype=mean.dtype)
            for running, of_groups, factor in ((self.running_mean, mean, 1), (self.running_var, var, n / (n - 1))):
                moved = (of_groups.detach().view(groups, -1) * shares[:, None]).sum(dim=0)
                running.mul_(stays**groups).add_(moved, alpha=factor)
        return ((rows - mean) * scale + self.bias.view(-1, 1, 1)).to(x.dtype).flatten(0, 1)


def group_norms(model, group, arch):
    """Turn each BatchNorm of a model of timm into one over `group` images, in place.

    timm's BatchNormAct2d keeps its activation. Raises UserError for a BatchNorm that cannot be grouped here, such as
    one over anything but images.
    """
    for module in model.modules():
        kind = type(module)
        if (kind is nn.BatchNorm2d or hasattr(module, "act")) and isinstance(module, nn.BatchNorm2d) and module.affine:
            module.__class__ = type(f"Grouped{kind.__name__}", (GroupedBatchNorm2d, kind), {})
            module.group = group
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"{arch} has a {kind.__name__}, which --bn-batch cannot group; choose another --arch")


def sync_batchnorm(encoder):
    """The encoder with BatchNorm over all processes (GPUs only)."""
    if encoder.arch.startswith(TIMM):
        from timm.layers import convert_sync_batchnorm  # PyTorch's loses the activation in timm's BatchNormAct2d

        return convert_sync_batchnorm(encoder)
    return nn.SyncBatchNorm.convert_sync_batchnorm(encoder)


def batchnorm_in_words(encoder, otherwise):
    """How many images share BatchNorm statistics, as the modules have it. otherwise: where they do not say."""
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    groups = {getattr(norm, "group", otherwise) for norm in norms}
    return " and ".join(map(str, groups)) or "none in this model, so groups and the shuffle of keys have no effect"


# ---- the momentum update


def parameters_by_name(encoder):
    """{name: parameter} without what DDP and torch.compile put before or into the names."""
    named = {}
    for name, parameter in encoder.named_parameters():
        name = name.replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        named[name] = parameter
    return named


@torch.no_grad()
def momentum_update(query_encoder, key_encoder, momentum):
    """key <- momentum * key + (1 - momentum) * query, in place, for parameters only, paired by name.

    BatchNorm statistics are not averaged: the key encoder gathers its own. Either encoder may be wrapped (DDP,
    compile), and the query encoder may have more than the key encoder, such as a predictor. momentum: in [0, 1).
    One fused call: about 3 times as fast as a loop over the parameters on a CPU, and few launches on a GPU.
    Raises ValueError for a parameter of the key encoder without a partner of its shape.
    Source: arXiv:1911.05722, equation 2.
    """
    keys, queries = parameters_by_name(key_encoder), parameters_by_name(query_encoder)
    alone = [name for name, key in keys.items() if name not in queries or queries[name].shape != key.shape]
    if alone:
        raise ValueError(f"{alone[0]} of the key encoder has no partner of its shape in the query encoder")
    torch._foreach_lerp_(list(keys.values()), [queries[name] for name in keys], 1 - momentum)


def average_tensors(tensors, accelerator):
    """Replace tensors by their mean over processes, in place, with one all-reduce."""
    mean = accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
    parts = mean.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


@torch.no_grad()
def average_batchnorm(modules, accelerator):
    """Replace all floating-point buffers, BatchNorm's running statistics, by their mean over processes, in place.

    Called after each step, this keeps the whole state of a run equal on every process, so that any of them can evaluate
    or save it. It sends 0.4 MB for two ResNet-50; the gradients are 112 MB.
    """
    statistics = [b for module in modules for b in module.buffers() if b.is_floating_point()]
    if accelerator.num_processes > 1 and statistics:
        average_tensors(statistics, accelerator)
