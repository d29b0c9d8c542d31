"""What a step asks of a GPU, counted without one: kernels, bytes, copies between host and device, waits.

python benchmarks/count.py                    ResNet-50, 224 pixels, a batch of 256 in BatchNorm groups of 32

The augmentation and the forward half of both steps run on fake "cuda" tensors, which have shapes and a device but no
numbers; mixing devices raises. Autograd cannot run on them without a GPU, so whole steps run on fake "cpu" tensors that
call themselves a GPU's: they show kernels and bytes, but not copies and waits. Autocast is off, so its casts are
missing. Bytes are those of every kernel's inputs and outputs, as if no cache held any of them; a kernel is an operation
of PyTorch, and cuDNN may launch several for one. Then the memory of a step, computed.
tests/test_count.py holds what must not change: no copy that blocks, no wait, and one read-back a step.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn
from torch._inductor import config, metrics
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.step import alone
from moco.augment import AUGMENTATIONS, MEAN, STD, augment, plan, sample_params
from moco.contrast import KeyQueue
from moco.encoder import build_encoder
from moco.fused import compiled_augmentation
from moco.run.memory import activation_bytes
from moco.shuffle import shuffle_order
from train_moco import moco_step, simclr_step

NO_KERNEL = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view", "aten::detach", "prim::device"}
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}


def moved(name, on_device, inputs, outputs):
    """Bytes that a kernel reads and writes; of an index only the rows that it takes or puts."""
    if name in ("aten::index_select", "aten::index_copy_", "aten::index"):
        part = inputs[-1] if name == "aten::index_copy_" else outputs[0]
        return 2 * part.numel() * part.element_size()
    return sum(tensor.numel() * tensor.element_size() for tensor in on_device)


class Count(TorchDispatchMode):
    """Counts what passes: kernels, MB, copies to the device, to the host, those that block, other waits."""

    def __init__(self, device):
        super().__init__()
        self.counts, self.device = Counter(), device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        written = {argument.name for argument in function._schema.arguments if argument.is_out}  # and not read
        given = (args, {name: value for name, value in (kwargs or {}).items() if name not in written})
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in (given, result)
        )
        on_device = [tensor for tensor in (*inputs, *outputs) if tensor.device.type == self.device]
        name = function._schema.name
        if (
            name in ("aten::_to_copy", "aten::copy_")
            and len({tensor.device.type for tensor in (*inputs, *outputs)}) > 1
        ):
            target = (args[0] if name == "aten::copy_" else result).device.type
            self.counts["copies to the device" if target == self.device else "copies to the host"] += 1
            blocks = not ((kwargs or {}).get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
            self.counts["copies that block"] += blocks
        elif on_device and name in WAITS:
            self.counts["waits"] += 1
        elif on_device and not function.is_view and name not in NO_KERNEL:
            self.counts["kernels"] += 1
            self.counts["MB"] += moved(name, on_device, inputs, outputs) / 1e6
        return result


def counted(call, device="cuda"):
    """What a call counts."""
    with (
        Count(device) as count,
        patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
    ):  # fake ones have no pages
        call()
    return count


def augmentation(batch, size, recipe="v2", step=0):
    """A call of `augment` on fake crops of a GPU. What the host plans is planned before, with real numbers."""
    with unset_fake_temporarily():
        params = sample_params(AUGMENTATIONS[recipe], batch, 0, step)
        joined = {name: values.transpose(0, 1).flatten(0, 1) for name, values in params.items()}
        planned = plan(joined, size)
    crops = [torch.empty(batch, size, size, 3, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def call():
        with patch("moco.augment.plan", lambda *_: planned), patch("moco.augment.CHUNK", batch):
            augment(crops, params, MEAN, STD)

    return call


def fused_augmentation(batch, size, recipe="v2"):
    """What the augmentation of a compiled run counts, as Inductor counts its code for a CPU."""
    params = sample_params(AUGMENTATIONS[recipe], 8, 0, 0)
    crops = [torch.zeros(8, size, size, 3, dtype=torch.uint8) for _ in range(2)]
    torch._logging.set_logs(inductor_metrics=True)  # without it nothing is counted
    metrics.reset()
    with config.patch(force_disable_caches=True):
        compiled_augmentation(dynamic=False)(torch.empty(2, 8, size, size, 3), crops, params, MEAN, STD)
    torch._logging.set_logs()
    kernels = sum(1 for _, numbers in metrics.nodes_num_elem if numbers)
    # One view of 8 images was compiled. The table of parameters and the two vectors to normalise with are sent.
    megabytes = 2 * batch / 8 * metrics.num_bytes_accessed / 1e6
    return Counter({"kernels": 2 * kernels, "MB": megabytes, "copies to the device": 3})


def a_step(
    method, arch, size, batch, bn_batch, queue_size=65536, images_per_pass=None, dtype=torch.float32, device="cuda"
):
    """A call of `moco_step` or `simclr_step`: on "cuda" the forward half, on "cpu" all of it.

    dtype: of the weights of all but BatchNorm, and of the images.
    """
    with torch.device(device):
        encoder, key_encoder = (build_encoder(arch, bn_batch=bn_batch) for _ in range(2))
        queue = KeyQueue(queue_size, 128)
    for module in (*encoder.modules(), *key_encoder.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):  # fake weights cannot be moved in place
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(weight.detach().to(dtype)))
    key_encoder.requires_grad_(False)
    views = torch.empty(2, batch, 3, size, size, device=device, dtype=dtype)
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    accelerator, optimizer = alone("float32"), SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    if device == "cuda":
        accelerator.backward = lambda loss: None
    else:
        optimizer = torch.optim.SGD(encoder.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True)
    if method == "simclr":
        return lambda: simclr_step(encoder, optimizer, views, accelerator, temperature=0.1, bn_batch=batch)
    order = shuffle_order(0, 0, batch)
    return lambda: moco_step(
        encoder, key_encoder, queue, optimizer, views, order, accelerator,
        temperature=0.2, encoder_momentum=0.999, images_per_pass=images_per_pass or batch,
    )  # fmt: skip


def count_whole(*args, **options):
    """What the second step counts, when momentum is there, where our code takes a GPU's branches."""
    call = a_step(*args, **options, device="cpu")
    with patch.object(FakeTensor, "is_cuda", True, create=True):
        call()
        return counted(call, "cpu").counts


def print_memory(arch, size):
    """Memory of a GPU in both precisions, computed, beside the papers' measurements on 8 GPUs in float32.

    The activations that a pass keeps, and weights, gradients, momentum, MoCo's key encoder and its queue; without what
    the libraries, the convolutions and the allocator need besides.
    """
    encoder = build_encoder(arch)
    weights = sum(4 * parameter.numel() for parameter in encoder.parameters())
    moco, end_to_end = 4 * weights + 4 * 128 * 65536, 3 * weights
    rows = {
        "MoCo, 256 images in one pass": (256, moco, ""), "MoCo, 32 images (256 on 8 GPUs)": (32, moco, "5.0"),
        "end-to-end, 32 images, two views": (64, end_to_end, "7.4"),
        "end-to-end, 512 images (4096 on 8 GPUs)": (1024, end_to_end, "93.0"),
    }  # fmt: skip
    each = {}
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            each[precision] = activation_bytes(encoder, 3, size)
    print(f"\n| {arch}, {size} pixels | float32 | bfloat16 | the papers, GB |\n|---|---|---|---|")
    print(f"| MB an image keeps for the backward pass | {' | '.join(f'{b / 1e6:.1f}' for b in each.values())} | |")
    for name, (views, rest, paper) in rows.items():
        print(f"| {name}, GB | {' | '.join(f'{(views * b + rest) / 1e9:.1f}' for b in each.values())} | {paper} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels [%(default)s]")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bn-batch", type=int, default=32)
    args = parser.parse_args()
    shape = f"{args.arch}, {args.size} pixels, batch {args.batch}, groups of {args.bn_batch}"
    print(f"{shape}, float32, torch {torch.__version__}")
    kinds = ("kernels", "MB", "copies to the device", "copies to the host", "copies that block", "waits")
    print(f"| | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 1)}")
    rows = {  # name: (method, BatchNorm's group, options)
        "MoCo": ("moco", args.bn_batch, {}),
        "MoCo, bfloat16": ("moco", args.bn_batch, {"dtype": torch.bfloat16}),
        "MoCo, a pass for each group": ("moco", None, {"images_per_pass": args.bn_batch}),
        "MoCo, one group": ("moco", args.batch, {}),
        "SimCLR": ("simclr", None, {}),
    }
    counts = {"augmentation, v2, compiled": fused_augmentation(args.batch, args.size)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        counts["augmentation, v2"] = counted(augmentation(args.batch, args.size)).counts
        for name, (method, group, options) in rows.items():
            step = (method, args.arch, args.size, args.batch, group)
            counts[f"{name}, forward"] = counted(a_step(*step, **options)).counts
            counts[f"{name}, whole step"] = count_whole(*step, **options)
    for name, count in counts.items():
        shown = kinds[:2] if name.endswith("whole step") else kinds
        print(f"| {name} | {' | '.join(f'{count[kind]:.0f}' if kind in shown else '' for kind in kinds)} |")
    print_memory(args.arch, args.size)


if __name__ == "__main__":
    main()
