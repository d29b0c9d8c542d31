"""The papers' cost table: memory and hours of MoCo and of end-to-end training, at batch 256 and 4096, on this GPU.

python benchmarks/cost.py                                                            ResNet-50, 224 pixels, bfloat16
python benchmarks/cost.py --arch resnet10 --size 32 --batches 64 256 --images 6000   small, for a CPU

MoCo takes a batch in passes of 32 images, which are BatchNorm groups, so activations are those of 32. End-to-end holds
the whole batch on this GPU; in the paper each of 8 GPUs holds an eighth of it. What does not fit says so. Hours are for
200 epochs of --images, from the median step without data loading and augmentation.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.step import DEVICE, end_to_end_step, in_a_process, measured_memory, our_step, take_turns

PAPER = {
    ("MoCo", 256): "5.0 GB, 53 h",
    ("end-to-end", 256): "7.4 GB, 65 h",
    ("end-to-end", 4096): "93.0 GB (estimated)",
}


def measure(method, arch, size, batch, queue_size, rounds):
    """(MB, milliseconds) of one method's step, or None if it does not fit."""
    try:
        if method == "MoCo":
            step = our_step(arch, size, batch, queue_size, "bf16", bn_batch=32, images_per_pass=32)
        else:
            step = end_to_end_step(arch, size, batch, "bf16")
        memory = measured_memory(step)
        return memory, take_turns({"step": step}, rounds)["step"]
    except torch.OutOfMemoryError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels [%(default)s]")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--images", type=int, default=1_281_167, help="of an epoch [%(default)s]")
    parser.add_argument("--queue-size", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{args.arch}, {args.size} pixels, bfloat16, {DEVICE}, torch {torch.__version__}")
    print(
        "| method | batch | memory, GB | hours for 200 epochs | in the paper, a GPU of 8 V100 |\n|---|---|---|---|---|"
    )
    for method in ("MoCo", "end-to-end"):
        for batch in args.batches:
            done = in_a_process(measure, method, args.arch, args.size, batch, args.queue_size, args.rounds)
            memory, hours = "does not fit", ""
            if done:
                memory, hours = f"{done[0] / 1000:.1f}", f"{200 * args.images / batch * done[1] / 3.6e6:.1f}"
            print(f"| {method} | {batch} | {memory} | {hours} | {PAPER.get((method, batch), '')} |")


if __name__ == "__main__":
    main()
