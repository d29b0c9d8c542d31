"""A training step of MoCo against a plain one, written as the reference writes it: images/s, memory, and its parts.

python benchmarks/step.py                                                 small, one thread of a CPU
python benchmarks/step.py --arch resnet50 --size 224 --batch 256 --bn-batch 32 64 128 256 --compile    a GPU
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 benchmarks/step.py    what it costs that processes work together

Plain: float32, contiguous, the whole batch at once, the momentum update a loop over parameters, a queue of columns.
Ours: channels-last, BatchNorm over groups of one pass, one fused update. Each also under autocast to bfloat16; on GPUs
since Ampere float32's convolutions are TF32, PyTorch's default. Supervised: one encoder and a classifier in our
settings, which has 3/4 of MoCo's operations. The augmentation is not in the steps but measured by itself. All variants
take turns in one process; medians are printed, and ratios to plain. Linux only, for the memory.
"""

import argparse
import copy
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import convert_outputs_to_fp32

sys.path.insert(0, str(Path(__file__).parent.parent))
from moco.augment import AUGMENTATIONS, MEAN, STD, augment, sample_params
from moco.contrast import KeyQueue, contrastive_logits
from moco.encoder import build_encoder, momentum_update
from moco.fused import compiled_augmentation
from moco.schedule import LARS
from moco.shuffle import shuffle_order
from train_moco import moco_step, simclr_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(call):
    wait()
    if torch.distributed.is_initialized():  # else the wait for a slower process counts as time of the call
        torch.distributed.barrier()
    started = time.perf_counter()
    call()
    wait()
    return 1000 * (time.perf_counter() - started)


def take_turns(calls, rounds):
    """{name: median milliseconds}, each called once a round, after a round that does not count."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    return {name: median(values[1:]) for name, values in times.items()}


# ---- the step, plainly and by train_moco.py


def plain_step(arch, size, batch, queue_size, precision):
    """A function that takes one step of the reference's algorithm on its own random images."""
    torch.manual_seed(0)
    encoder_q = build_encoder(arch).to(DEVICE)
    encoder_k = copy.deepcopy(encoder_q)
    for parameter in encoder_k.parameters():
        parameter.requires_grad = False
    queue = F.normalize(torch.randn(128, queue_size, device=DEVICE), dim=0)
    optimizer = torch.optim.SGD(encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    im_q, im_k = torch.randn(2, batch, 3, size, size, device=DEVICE)
    labels = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    pointer = 0

    def step():
        nonlocal pointer
        with autocast:
            q = F.normalize(encoder_q(im_q), dim=1)
            with torch.no_grad():
                reference_update(encoder_q, encoder_k)
                shuffle = torch.randperm(batch, device=DEVICE)
                k = F.normalize(encoder_k(im_k[shuffle]), dim=1)[torch.argsort(shuffle)]
            l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
            l_neg = torch.einsum("nc,ck->nk", [q, queue.clone().detach()])
            loss = F.cross_entropy(torch.cat([l_pos, l_neg], dim=1) / 0.2, labels)
        queue[:, pointer : pointer + batch] = k.float().T
        pointer = (pointer + batch) % queue_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def alone(precision):
    """What a step asks of an Accelerator, for one process. One process cannot hold real ones of two precisions."""
    bf16 = precision == "bf16"
    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        mixed_precision="bf16" if bf16 else "no",
        autocast=lambda: torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16),
        gather=lambda rows: rows,
        backward=lambda loss: loss.backward(),
        no_sync=lambda module: nullcontext(),
    )


def prepared(encoder, precision, compiled=False):
    """The encoder as accelerator.prepare hands it back: compiled or not, its forward pass in the precision."""
    if compiled:
        encoder.compile(dynamic=False)  # for one shape, as in training, though variants have several
    if precision == "bf16":
        encoder.forward = convert_outputs_to_fp32(torch.autocast(DEVICE.type, torch.bfloat16)(encoder.forward))
    return encoder


def our_step(
    arch, size, batch, queue_size, precision, bn_batch, accelerator=None, compiled=False, images_per_pass=None
):  # fmt: skip
    """A function that takes `moco_step`, on random images of each process unless it is given others.

    images_per_pass: the whole batch if it is None.
    """
    accelerator = accelerator or alone(precision)
    torch.manual_seed(0)
    query_encoder = build_encoder(arch, bn_batch=bn_batch).to(DEVICE, memory_format=torch.channels_last)
    key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
    queue = KeyQueue(queue_size, 128).to(DEVICE)
    optimizer = torch.optim.SGD(query_encoder.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    if compiled:
        key_encoder.compile(dynamic=False)
    if accelerator.num_processes > 1:
        query_encoder, optimizer = accelerator.prepare(query_encoder, optimizer)
    else:
        query_encoder = prepared(query_encoder, precision, compiled)
    images = torch.randn(2, batch, 3, size, size, device=DEVICE)
    views = [view.contiguous(memory_format=torch.channels_last) for view in images]
    numbers = itertools.count()

    def step(views=views):
        moco_step(
            query_encoder, key_encoder, queue, optimizer, views,
            shuffle_order(0, next(numbers), accelerator.num_processes * batch), accelerator,
            temperature=0.2, encoder_momentum=0.999, images_per_pass=images_per_pass or batch,
        )  # fmt: skip

    return step


def supervised_step(arch, size, batch, precision):
    """A function that takes a step of a classifier of 1000 classes on its own random images."""
    torch.manual_seed(0)
    model = build_encoder(arch, dim=1000, head="fc").to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=DEVICE) % 1000

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def end_to_end_step(arch, size, batch, precision):
    """A function that takes `simclr_step` on its own random images: both views get gradients, all activations stay."""
    torch.manual_seed(0)
    encoder = build_encoder(arch).to(DEVICE, memory_format=torch.channels_last)
    optimizer = LARS(encoder.parameters(), 0.3, weight_decay=1e-6)
    images = torch.randn(2, batch, 3, size, size, device=DEVICE)
    views = [view.contiguous(memory_format=torch.channels_last) for view in images]
    encoder = prepared(encoder, precision)
    return lambda: simclr_step(encoder, optimizer, views, alone(precision), temperature=0.1, bn_batch=batch)


def variants(arch, size, batch, queue_size, groups, compile):
    """{name: a function that builds its step}. groups: sizes of BatchNorm groups. compile: ours also compiled."""
    moco = (arch, size, batch, queue_size)
    found = {
        "plain, float32": partial(plain_step, *moco, "float32"),
        "plain, bfloat16": partial(plain_step, *moco, "bf16"),
        "supervised, bfloat16": partial(supervised_step, arch, size, batch, "bf16"),
    }
    for precision, name in (("float32", "float32"), ("bf16", "bfloat16")):
        for group in sorted({min(group, batch) for group in (*groups, batch)}, reverse=True):
            for compiled in (False, True) if compile else (False,):
                row = f"ours, {name}, groups of {group}{', compiled' if compiled else ''}"
                found[row] = partial(our_step, *moco, precision, group, compiled=compiled)
    return found


def as_in_training():
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # variants have several shapes


def in_a_process(function, *args):
    """What a function returns in a process of its own. On a CPU it is a fork, which starts at once; CUDA forbids it."""
    context = multiprocessing.get_context("spawn" if DEVICE.type == "cuda" else "fork")
    with ProcessPoolExecutor(1, context, as_in_training) as pool:
        return pool.submit(function, *args).result()


def peak_memory(build):
    """MB of the step that build() gives."""
    return measured_memory(build())


def measured_memory(step):
    """MB at most during two steps: on a GPU of the allocator, on a CPU what they add to the process."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        return torch.cuda.max_memory_allocated() / 1e6
    before = process_memory("VmRSS")
    step(), step()
    return process_memory("VmHWM") - before


def process_memory(kind):
    """MB, now (VmRSS) or at its highest (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) / 1e3


# ---- its parts


def reference_update(query_encoder, key_encoder):
    for param_q, param_k in zip(query_encoder.parameters(), key_encoder.parameters()):
        param_k.data = param_k.data * 0.999 + param_q.data * (1.0 - 0.999)


def print_parts(size, batch, step_ms, rounds, compiled):
    """What is in a step, and the augmentation beside a step that takes step_ms."""
    crops = [torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    params = sample_params(AUGMENTATIONS["v2"], batch, 0, 0)
    calls = {"augmentation of both views": lambda: augment(crops, params, MEAN, STD)}
    if compiled and DEVICE.type == "cuda":
        calls["the same, compiled"] = lambda: augment(crops, params, MEAN, STD, compiled_augmentation())
    print()
    for name, took in take_turns(calls, rounds).items():
        print(f"{name} {took:.1f} ms, {took / step_ms:.1%} of our fastest step")
    query_encoder, key_encoder = (build_encoder("resnet50").to(DEVICE) for _ in range(2))
    flat = torch.cat([p.detach().flatten() for p in query_encoder.parameters()])
    target = flat.clone()
    times = take_turns(
        {
            "loop": lambda: reference_update(query_encoder, key_encoder),
            "fused": lambda: momentum_update(query_encoder, key_encoder, 0.999),
            "flat": lambda: target.lerp_(flat, 0.001),
        },
        rounds,
    )
    print(
        f"momentum update of a ResNet-50: reference's loop {times['loop']:.1f} ms, fused {times['fused']:.1f} ms"
        f" (x {times['loop'] / times['fused']:.2f}); of one flat tensor, its bytes' limit, {times['flat']:.1f} ms"
    )
    queries, keys = F.normalize(torch.randn(2, 256, 128, device=DEVICE), dim=2)
    queries.requires_grad_()
    for size in (4096, 65536, 1_000_000):
        queue = KeyQueue(size, 128).to(DEVICE)
        zeros = torch.zeros(256, dtype=torch.long, device=DEVICE)
        times = take_turns(
            {
                "enqueue": lambda queue=queue: queue.enqueue(keys),
                "loss": lambda queue=queue, zeros=zeros: F.cross_entropy(
                    contrastive_logits(queries, keys, queue.keys, 0.2), zeros
                ).backward(),
            },
            max(3, rounds // 3),
        )
        print(f"K {size:8}: enqueue of 256 keys {times['enqueue']:6.2f} ms, logits and loss {times['loss']:8.1f} ms")


def compare_processes(arch, size, batch, queue_size, bn_batch, rounds):
    """A step of each process by itself beside their step together, which shuffles, gathers and averages."""
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    steps = {
        "alone": our_step(arch, size, batch, queue_size, "float32", bn_batch),
        "together": our_step(arch, size, batch, queue_size, "float32", bn_batch, accelerator),
    }
    times = take_turns(steps, rounds)
    if accelerator.is_main_process:
        for name, took in times.items():
            print(f"{accelerator.num_processes} processes, {name:8} {took:8.1f} ms, x {took / times['alone']:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="pixels [%(default)s]")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bn-batch", type=int, nargs="+", default=[32], help="groups of so many, and one group [32]")
    parser.add_argument("--compile", action="store_true", help="ours also with torch.compile, which takes minutes")
    parser.add_argument("--queue-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    as_in_training()
    moco = (args.arch, args.size, args.batch, args.queue_size)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return compare_processes(*moco, args.bn_batch[0], args.rounds)
    builders = variants(*moco, args.bn_batch, args.compile)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    print(
        f"{args.arch}, {args.size} pixels, batch {args.batch}, K {args.queue_size}, {where}, torch {torch.__version__}"
    )
    memory = {name: in_a_process(peak_memory, build) for name, build in builders.items()}  # first: this holds none
    times = take_turns({name: build() for name, build in builders.items()}, args.rounds)
    plain = times["plain, float32"]
    for name, took in times.items():
        print(
            f"{name:42} {took:8.1f} ms, {1000 * args.batch / took:7.1f} images/s, x {plain / took:.2f},"
            f" peak memory {memory[name]:7.0f} MB"
        )
    print_parts(
        args.size,
        args.batch,
        min(took for name, took in times.items() if name[:4] == "ours"),
        args.rounds,
        args.compile,
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main()
