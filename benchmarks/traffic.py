"""Bytes that a process receives from the others in a step of MoCo, gradients aside, beside the reference's.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 benchmarks/traffic.py     counted on two, computed for 8 and 64
"""

import copy
import sys
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

sys.path.insert(0, str(Path(__file__).parent.parent))
from moco.contrast import KeyQueue
from moco.encoder import build_encoder
from moco.shuffle import shuffle_order
from train_moco import moco_step


def expected_bytes(n, world, size, dim, statistics, pixel_bytes):
    """What a process receives of each kind. n: images a process. statistics: numbers in both encoders' BatchNorms.

    Images are counted as if all changed place but 1 / world, which is their share on average. A mean over processes
    sends and receives twice the numbers but 1 / world of them, as a ring does.
    """
    others = (world - 1) / world
    return {
        "images": others * n * 3 * size * size * pixel_bytes,
        "keys": others * world * n * dim * 4,
        "statistics": 2 * others * statistics * 4,
    }


def reference_bytes(n, world, size, dim, queue_size, statistics):
    """The same of the reference: it gathers all images and twice all keys, and broadcasts all buffers before a forward.

    Its buffers are the queue and the query encoder's and key encoder's statistics.
    """
    return {
        "images": (world - 1) * n * 3 * size * size * 4,
        "keys": 2 * (world - 1) * n * dim * 4,
        "queue and statistics": 4 * (dim * queue_size + statistics),
    }


def count_received(call, accelerator):
    """Bytes from other processes in the collectives that `call()` makes, by kind."""
    received, world = Counter(), accelerator.num_processes
    originals = {name: getattr(torch.distributed, name) for name in ("all_to_all_single", "all_gather", "all_reduce")}

    def all_to_all_single(output, given, output_split_sizes, input_split_sizes, **options):
        own = output_split_sizes[accelerator.process_index]
        received["images"] += output[0].nbytes * (len(output) - own)
        return originals["all_to_all_single"](
            output, given, output_split_sizes=output_split_sizes, input_split_sizes=input_split_sizes, **options
        )

    def all_gather(outputs, tensor, **options):
        received["keys"] += tensor.nbytes * (world - 1)
        return originals["all_gather"](outputs, tensor, **options)

    def all_reduce(tensor, *rest, **options):
        received["statistics"] += 2 * tensor.nbytes * (world - 1) // world
        return originals["all_reduce"](tensor, *rest, **options)

    for function in (all_to_all_single, all_gather, all_reduce):
        setattr(torch.distributed, function.__name__, function)
    try:
        call()
    finally:
        for name, function in originals.items():
            setattr(torch.distributed, name, function)
    return received


def numbers_in_statistics(encoder):
    return sum(buffer.numel() for buffer in encoder.buffers() if buffer.is_floating_point())


def main():
    kwargs = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    accelerator = Accelerator(mixed_precision="bf16", kwargs_handlers=kwargs)
    world, n, size, dim = accelerator.num_processes, 32, 32, 128
    torch.manual_seed(0)
    query_encoder = build_encoder("resnet10", dim)
    key_encoder, queue = copy.deepcopy(query_encoder).requires_grad_(False), KeyQueue(512, dim)
    statistics = 2 * numbers_in_statistics(query_encoder)
    optimizer = torch.optim.SGD(query_encoder.parameters(), 0.03)
    query_encoder, optimizer = accelerator.prepare(query_encoder, optimizer)
    views = torch.randn(2, n, 3, size, size)

    def step(number):
        moco_step(
            query_encoder, key_encoder, queue, optimizer, views, shuffle_order(0, number, n * world), accelerator,
            temperature=0.2, encoder_momentum=0.999, images_per_pass=n,
        )  # fmt: skip

    steps = [count_received(lambda number=number: step(number), accelerator) for number in range(50)]
    counted = {kind: sum(s[kind] for s in steps) / len(steps) for kind in steps[0]}
    expected = expected_bytes(n, world, size, dim, statistics, pixel_bytes=2)
    if accelerator.is_main_process:
        print(f"{world} processes of {n} images of {size} pixels, resnet10, bfloat16: bytes received a step")
        for kind, value in counted.items():
            print(f"  {kind:10} counted {value:9.0f}   computed {expected[kind]:9.0f}")
        statistics = 2 * numbers_in_statistics(build_encoder("resnet50"))
        print("ResNet-50, 224 pixels, 32 images a process, K 65536, MB received a process and step:")
        for world in (2, 8, 64):
            ours = expected_bytes(32, world, 224, 128, statistics, pixel_bytes=2)
            theirs = reference_bytes(32, world, 224, 128, 65536, statistics)
            shown = ", ".join(f"{kind} {value / 1e6:.2f}" for kind, value in ours.items())
            there = ", ".join(f"{kind} {value / 1e6:.2f}" for kind, value in theirs.items())
            ratio = sum(ours.values()) / sum(theirs.values())
            print(f"  {world:2} processes: ours {shown}; reference {there}; ratio {ratio:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
