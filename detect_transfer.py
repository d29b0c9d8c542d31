"""Do the features transfer? Faster or Mask R-CNN C4, fine-tuned from a backbone (arXiv:1911.05722, section 4.2).

accelerate launch detect_transfer.py --data shapes --backbone runs/v2-shapes     the built-in data, minutes on two cores
accelerate launch detect_transfer.py --data VOCdevkit --backbone USER/NAME       VOC07+12 trainval, VOC07 test
accelerate launch detect_transfer.py --data COCO --backbone USER/NAME            boxes and masks, the 2x schedule
accelerate launch detect_transfer.py --output RUN/detection --resume             go on where it stopped
"""

import math
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from moco.backbone import load_backbone, push_loaded
from moco.batches import loader
from moco.checkpoint import (
    append_metrics,
    check_equal_state,
    complete_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    provenance,
    read_metrics,
    save_checkpoint,
    trim_metrics,
    weights_digest,
    write_json,
)
from moco.coco import check_pycocotools
from moco.data import check_undecodable, name_undecodable
from moco.detection import DetectionImages, evaluate_detections, is_coco, load_detection, micro_batch_rows
from moco.detector import ANCHOR_SIZES, batch_norms, build_detector, detect, precise_statistics
from moco.encoder import average_statistics, resnet_names
from moco.errors import UserError, one_line_errors
from moco.publish import check_push, public_name
from moco.report import save_detection_curves, save_detections
from moco.run import (
    BACKBONE_HELP,
    catch_sigterm,
    check_limits,
    check_output,
    default_output,
    fast_bf16,
    finish,
    flag_parser,
    given_flags,
    nearest_multiples,
    parse_resumed,
    release_sigterm,
    start_accelerator,
    stop_diverged,
)
from moco.schedule import warmup_step_rate

# The reference's configurations, by the data; each entry is the default of the flag of its name.
VOC = {"image_size": [*range(480, 801, 32)], "iterations": 24_000, "warmup": 100}
COCO = {"image_size": [*range(640, 801, 32)], "schedule": "2x", "warmup": 1000}
COCO_ITERATIONS = {"1x": 90_000, "2x": 180_000}
# What --data shapes sets, so that two CPU cores finish in minutes.
SHAPES = {
    "image_size": [96], "anchor_sizes": [40, 64], "roi_batch": 16, "batch_size": 4, "micro_batch": 4,
    "iterations": 300, "warmup": 30, "lr": 0.01, "workers": 1, "checkpoint_every": 100, "log_every": 10,
}  # fmt: skip
MILESTONES = {"VOC": (3 / 4, 11 / 12), "COCO": (2 / 3, 8 / 9)}  # of the iterations, where the learning rate is / 10
LONGEST = 1333  # pixels: INPUT.MAX_SIZE
SGD = {"momentum": 0.9, "weight_decay": 1e-4}
PRECISE_ITERATIONS = 200  # TEST.PRECISE_BN.NUM_ITER; of small data an epoch
# What a resumed run may change; everything else is what its numbers depend on.
FREE_ON_RESUME = {
    "output", "resume", "evaluate", "backbone", "workers", "keep", "checkpoint_every", "evaluate_every", "log_every",
    "push_to_hub",
}  # fmt: skip


def parse_args():
    """The flags. Defaults, from weak to strong: below, those that go with the data, those of the run resumed."""
    parser = flag_parser("--data DATA --backbone SOURCE [flags]", __doc__.split("\n\n")[0])
    add = parser.add_argument_group("backbone").add_argument
    add("--backbone", metavar="SOURCE", help=BACKBONE_HELP)
    add("--arch", help="a torchvision ResNet, or resnet10 [as the backbone says; random: resnet50]")
    add("--encoder", choices=("query", "key"), default="query", help="key: the momentum encoder [%(default)s]")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="a VOCdevkit folder, a COCO folder, USER/NAME on the Hub, or 'shapes' (built in)")
    add("--years", nargs="+", metavar="YEAR", default=["2007", "2012"], help="of VOC, to train on [2007 2012]")
    add("--box-format", choices=("xywh", "xyxy"), default="xywh", help="of boxes from the Hub [%(default)s]")
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        nargs="+",
        help="short sides, one drawn for each image; the last is the test's [480 512 ... 800, COCO: from 640]",
    )
    add("--workers", type=int, metavar="N", default=8, help="data-loading processes for each process [%(default)s]")
    add = parser.add_argument_group("detector").add_argument
    add("--bn", choices=("sync", "frozen"), default="sync", help="sync: trained, over all processes [%(default)s]")
    add("--micro-batch", type=int, metavar="N", default=2, help="images a forward pass and process [%(default)s]")
    add(
        "--anchor-sizes",
        type=int,
        metavar="PIXELS",
        nargs="+",
        default=ANCHOR_SIZES,
        help="sides of square anchors [32 64 128 256 512]",
    )
    add("--roi-batch", type=int, metavar="N", default=512, help="regions an image to train on [%(default)s]")
    add = parser.add_argument_group("optimisation").add_argument
    add("--iterations", type=int, metavar="N", help="steps of SGD [24000, COCO: as --schedule says]")
    add("--schedule", choices=COCO_ITERATIONS, help="of COCO: 90000 or 180000 steps [2x]")
    add("--warmup", type=int, metavar="N", help="steps of rising learning rate [100, COCO: 1000]")
    add("--batch-size", type=int, metavar="N", default=16, help="images a step, over all processes [%(default)s]")
    add("--lr", type=float, metavar="LR", default=0.02, help="/ 10 at 3/4 and 11/12, COCO: 2/3 and 8/9 [%(default)s]")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="[as accelerate launch says; shapes: bf16 if fast]")
    add("--seed", type=int, metavar="N", default=0, help="of new weights, order, sizes, flips, regions [%(default)s]")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, metavar="RUN", help="the run folder [detection/ in the backbone's, or in runs/]")
    add("--resume", action="store_true", help="go on from the newest complete checkpoint in --output")
    add("--evaluate", action="store_true", help="only evaluate the newest complete checkpoint in --output")
    add("--evaluate-every", type=int, metavar="STEPS", default=0, help="0: only at the end [%(default)s]")
    add("--checkpoint-every", type=int, metavar="STEPS", default=1000, help="also at the end and SIGTERM [%(default)s]")
    add("--keep", type=int, metavar="N", default=2, help="checkpoints kept [%(default)s]")
    add("--log-every", type=int, metavar="STEPS", default=20, help="between lines of metrics.jsonl [%(default)s]")
    add("--push-to-hub", metavar="USER/NAME", help="publish the backbone with these results")

    given = given_flags(parser)
    parser.set_defaults(**defaults_of(given.data, given.schedule))
    args = parser.parse_args()
    if args.output is None:
        check_named(args)
        args.output = default_output(args.backbone, args.data, "detection")
    if args.resume or args.evaluate:
        args = parse_resumed(parser, args.output, FREE_ON_RESUME)
    check_named(args)
    if args.backbone == "random" and args.arch is None:
        args.arch = "resnet10" if args.data == "shapes" else "resnet50"
    return args


def defaults_of(data, schedule):
    """{flag's name in Python: default} that go with the data."""
    if data == "shapes":
        return SHAPES
    if data is not None and is_coco(data):
        return COCO | {"iterations": COCO_ITERATIONS[schedule or COCO["schedule"]]}
    return VOC


def check_named(args):
    """Raise UserError where what has no default is missing."""
    if args.data is None:
        raise UserError("--data is missing: name a VOCdevkit or COCO folder, USER/NAME on the Hub, or 'shapes'")
    if args.backbone is None:
        raise UserError("--backbone is missing: name a run folder, a file, USER/NAME on the Hub, or 'random'")


def check_args(args, processes):
    """Raise UserError for values that cannot work, before anything is read or written."""
    limits = {
        "arch": (args.arch is None or args.arch in resnet_names(), f"one of {', '.join(resnet_names())}"),
        "image_size": (all(side >= 32 for side in args.image_size), "at least 32"),
        "workers": (args.workers >= 0, "0 or more"),
        "micro_batch": (args.micro_batch >= 1, "at least 1"),
        "anchor_sizes": (all(side >= 1 for side in args.anchor_sizes), "at least 1"),
        "roi_batch": (args.roi_batch >= 4, "at least 4, a quarter of them objects"),
        "iterations": (args.iterations >= 1, "at least 1"),
        "warmup": (args.warmup >= 0, "0 or more"),
        "batch_size": (args.batch_size >= 1, "at least 1"),
        "lr": (0 < args.lr < math.inf, "above 0"),
        "seed": (0 <= args.seed < 2**63, "at least 0 and below 2^63"),
        "evaluate_every": (args.evaluate_every >= 0, "0 (at the end alone) or more"),
        "checkpoint_every": (args.checkpoint_every >= 1, "at least 1"),
        "keep": (args.keep >= 1, "at least 1"),
        "log_every": (args.log_every >= 1, "at least 1"),
    }
    check_limits(vars(args), limits)
    unit = processes * args.micro_batch
    if args.batch_size % unit:
        raise UserError(
            f"--batch-size {args.batch_size} is not divisible by {processes} processes x --micro-batch"
            f" {args.micro_batch}; use --batch-size {nearest_multiples(args.batch_size, unit)}, or"
            " another --micro-batch"
        )
    if is_coco(args.data):
        check_pycocotools(args.data)
    elif args.schedule:
        raise UserError(f"--schedule {args.schedule} is of COCO folders, which {args.data} is not; use --iterations")
    check_output(args.output, args.resume or args.evaluate)


def print_settings(args, arch, data, milestones, processes):
    """What the run will do, in the reference's terms."""
    passes = args.batch_size // processes // args.micro_batch
    sizes = "-".join(map(str, dict.fromkeys((args.image_size[0], args.image_size[-1]))))
    print(
        f"model   {'Mask' if data.metric == 'COCO' else 'Faster'} R-CNN C4 of {arch}, BatchNorm {args.bn}",
        f"from    {args.backbone}",
        f"data    {args.data}: {len(data.train)} images to train on, short side {sizes}, {len(data.classes)} classes",
        f"batch   {args.batch_size} = {processes} processes x {passes} micro-batches x {args.micro_batch} images",
        f"SGD     {args.iterations} iterations, lr {args.lr}, / 10 at {' and '.join(map(str, milestones))}, warm-up"
        f" {args.warmup}, mixed precision {args.mixed_precision}",
        f"test    {len(data.test)} images, {data.metric}'s metric",
        f"output  {args.output}",
        sep="\n",
    )
    for what, count in data.left_out.items():
        if count:
            print(f"        {count} {what}")


# ---- training


def parameter_groups(detector):
    """Weight decay on everything but the weights and biases of norms (WEIGHT_DECAY_NORM 0)."""
    norms = {id(parameter) for norm in batch_norms(detector) for parameter in norm.parameters()}
    decayed = [parameter for parameter in detector.parameters() if id(parameter) not in norms]
    plain = [parameter for parameter in detector.parameters() if id(parameter) in norms]
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def to_device(items, device):
    """Items of DetectionImages -> (images, targets) on the device, each target with a generator of its own seed."""
    images, targets = zip(*items)
    targets = [
        target
        | {key: target[key].to(device, non_blocking=True) for key in ("boxes", "labels")}
        | {"generator": torch.Generator().manual_seed(target["seed"])}
        for target in targets
    ]
    return [image.to(device, non_blocking=True) for image in images], targets


def training_passes(detector, batches, accelerator):
    """A forward pass in training mode for each micro-batch of `batches`, as `precise_statistics` wants them."""
    for items, _ in tqdm(batches, "BatchNorm", leave=False, disable=not accelerator.is_main_process):
        with accelerator.autocast():
            detector(*to_device(items, accelerator.device))
        yield


def headline(scores):
    """The three numbers that papers compare: of VOC the 11-point rule's, of COCO the boxes'."""
    first = next(iter(scores.values()))
    return {key: first[key] for key in ("AP", "AP50", "AP75")}


def main():
    args = parse_args()
    if args.mixed_precision is None and args.data == "shapes" and fast_bf16():
        args.mixed_precision = "bf16"
    accelerator = start_accelerator(args.mixed_precision)
    args.mixed_precision = accelerator.mixed_precision
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    check_args(args, world)
    if args.push_to_hub and is_main:
        check_push(args.push_to_hub)

    # ---- backbone
    if not is_main:
        datasets.disable_progress_bars()
    with accelerator.local_main_process_first():  # what is downloaded is made once a machine
        backbone = load_backbone(args.backbone, args.arch, args.encoder, args.seed)
        data = load_detection(args.data, args.years, args.box_format)
    arch = backbone.known["arch"]
    digest = weights_digest(backbone.state_dict())

    # ---- data
    if len(data.train) < args.batch_size:
        raise UserError(f"--data {args.data} has {len(data.train)} images, fewer than a batch of {args.batch_size}")
    train_images = DetectionImages(data.train, args.image_size, LONGEST, args.seed)
    test_images = DetectionImages(data.test, args.image_size, LONGEST)
    portrait = np.array([record["height"] > record["width"] for record in data.train])
    steps_per_epoch = len(data.train) // args.batch_size
    micro_batches = args.batch_size // world // args.micro_batch
    milestones = [round(args.iterations * part) for part in MILESTONES[data.metric]]

    # ---- detector: equal on every process, since its seed and its updates are
    torch.manual_seed(args.seed)
    detector = build_detector(
        backbone,
        len(data.classes),
        masks=data.metric == "COCO",
        norm="frozen" if args.bn == "frozen" else "batch",
        anchor_sizes=args.anchor_sizes,
        roi_batch=args.roi_batch,
    )
    if world > 1 and device.type != "cpu":  # CPUs have no SyncBatchNorm: there each process normalises its own images
        detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    detector = detector.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(parameter_groups(detector), args.lr, **SGD)
    detector, optimizer = accelerator.prepare(detector, optimizer)
    unwrapped = accelerator.unwrap_model(detector, keep_torch_compile=False)  # to evaluate and to save
    norms = batch_norms(unwrapped)  # none where they are frozen
    losses_of = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
    losses_of += ["loss_mask"] if data.metric == "COCO" else []

    # ---- the run folder: start one, or go on with one
    checkpoints, metrics = args.output / "checkpoints", args.output / "metrics.jsonl"
    zeros = [0.0] * len(losses_of)
    start, totals, undecodable = 0, {"steps": 0, "losses": zeros}, 0
    if args.resume or args.evaluate:
        tensors, state = load_checkpoint(complete_checkpoints(checkpoints)[-1])
        if state["images"] != len(data.train):
            raise UserError(
                f"--data {args.data} has {len(data.train)} images to train on, {args.output} was begun on"
                f" {state['images']}"
            )
        if state["backbone_sha256"] != digest:
            raise UserError(f"--backbone {args.backbone} has changed since {args.output} was begun; start a new run")
        unwrapped.load_state_dict(tensors["detector"])
        load_optimizer_tensors(optimizer, tensors["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        del tensors
        start, totals, undecodable = state["step"], state["totals"], state["undecodable"]
    accelerator.wait_for_everyone()  # nobody writes before everybody has read
    if is_main:
        print_settings(args, arch, data, milestones, world)
        if args.resume or args.evaluate:
            print(f"resume  after step {start}")
        if not args.evaluate:
            if args.resume:
                trim_metrics(metrics, start)
            else:
                write_json(args.output / "args.json", vars(args) | {"output": str(args.output)} | provenance(world))
                metrics.write_text("")

    def log(line):
        if is_main:
            append_metrics(metrics, line)

    def save(step):
        if not check_equal_state({"detector": unwrapped}, accelerator):
            stop_diverged(accelerator, f"weights are not finite after step {step}", checkpoints)
        if is_main:  # all are equal, so one saves
            state = {"images": len(data.train), "totals": totals, "undecodable": undecodable}
            state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None
            tensors = {"detector": unwrapped.state_dict(), "optimizer": optimizer_tensors(optimizer)}
            save_checkpoint(checkpoints, step, tensors, state | {"backbone_sha256": digest}, args.keep)
            save_detection_curves(args.output / "curves.png", metrics)
        accelerator.wait_for_everyone()

    named = set()  # undecodable images, each printed once

    def micro_batches_from(step):
        return micro_batch_rows(portrait, args.batch_size, args.micro_batch, args.seed, step, rank, world)

    def measure(step):
        """Detections of the test images and, on the main process, their scores."""
        rows = islice(micro_batches_from(step), min(PRECISE_ITERATIONS, steps_per_epoch) * micro_batches)
        passes = training_passes(unwrapped.train(), loader(train_images, rows, args.workers), accelerator)
        precise_statistics(unwrapped, passes, accelerator)
        predictions, failed = detect(unwrapped, test_images, args.workers, accelerator)
        count = name_undecodable(failed, named, accelerator, "it counts as an image without detections")
        check_undecodable(count, len(data.test), args.data)
        unwrapped.train()
        return predictions, evaluate_detections(data, predictions) if is_main else None

    stopping = catch_sigterm()
    total_steps = start if args.evaluate else args.iterations
    if not (args.resume or args.evaluate):
        save(0)

    # ---- training
    if start < total_steps:  # else workers would read for nothing
        batches = iter(loader(train_images, micro_batches_from(start), args.workers))
    timing = {"steps": 0, "seconds": 0.0, "data": 0.0}
    bar = tqdm(total=total_steps, initial=start, unit="step", disable=not is_main or args.evaluate)
    for step in range(start, total_steps):
        started = time.perf_counter()
        lr = warmup_step_rate(args.lr, step, milestones, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ---- a training step
        parts, failed = torch.zeros(len(losses_of), device=device), []
        for i in range(micro_batches):
            waiting = time.perf_counter()
            items, undecoded = next(batches)
            timing["data"] += time.perf_counter() - waiting
            failed += undecoded
            with nullcontext() if i == micro_batches - 1 else accelerator.no_sync(detector):
                losses = detector(*to_device(items, device))
                accelerator.backward(sum(losses.values()) / micro_batches)  # the last averages gradients over processes
            parts += torch.stack([losses[name].detach() for name in losses_of]) / micro_batches
        optimizer.step()
        optimizer.zero_grad()
        if norms:
            average_statistics(norms, accelerator)

        # ---- what every process must know; to read it is the step's only wait for the device
        told = torch.cat([parts, parts.new_tensor([len(failed), len(stopping)])])
        told = accelerator.gather(told[None]).tolist()  # a row a process
        for process, row in enumerate(told):
            if not math.isfinite(loss := sum(row)):
                stop_diverged(accelerator, f"the loss is {loss} at step {step} on process {process}", checkpoints)
        *losses, failures, stop = (sum(column) for column in zip(*told, strict=True))
        if failures:
            undecodable += name_undecodable(failed, named, accelerator)
            check_undecodable(undecodable, len(data.train), args.data)
        totals = {
            "steps": totals["steps"] + 1,
            "losses": [total + loss / world for total, loss in zip(totals["losses"], losses)],
        }
        timing["steps"] += 1
        timing["seconds"] += time.perf_counter() - started
        bar.update()

        # ---- log, evaluate, save
        done = step + 1
        evaluates = args.evaluate_every and done % args.evaluate_every == 0 and done < total_steps
        if done % args.log_every == 0 or done == total_steps or evaluates:
            means = {name: total / totals["steps"] for name, total in zip(losses_of, totals["losses"])}
            line = {
                "step": done,
                "epoch": done / steps_per_epoch,
                "loss": sum(means.values()),
                **means,
                "lr": lr,
                "undecodable": undecodable,  # in this epoch
                "images_per_second": timing["steps"] * args.batch_size / timing["seconds"],
                "data_seconds": timing["data"],
                "data_share": timing["data"] / timing["seconds"],
            }
            totals, timing = {"steps": 0, "losses": zeros}, {"steps": 0, "seconds": 0.0, "data": 0.0}
            bar.set_postfix_str(
                f"loss {line['loss']:.2f}, {line['images_per_second']:.1f} images/s,"
                f" {line['data_share']:.0%} waiting for data"
            )
            if evaluates:
                _, scores = measure(done)
                line |= headline(scores) if is_main else {}
            log(line)
        if done % steps_per_epoch == 0:
            undecodable = 0
        if done % args.checkpoint_every == 0 or done == total_steps or stop:
            save(done)
        if stop:
            finish(accelerator, 143, f"SIGTERM: stopped after step {done}, which is saved; go on with --resume")
    bar.close()
    release_sigterm(stopping)

    # ---- results
    predictions, scores = measure(total_steps)
    if is_main:
        results = {"backbone": args.backbone, "arch": arch, "encoder": args.encoder, "backbone_sha256": digest}
        data_name, on_hub = public_name(args.data)
        results |= {"data": data_name, "data_on_hub": on_hub, "metric": data.metric, "classes": len(data.classes)}
        results |= {"train_images": len(data.train), "test_images": len(data.test)}
        results["left_out"] = +data.left_out  # + drops what is 0
        results |= {"iterations": total_steps, "bn": args.bn, **headline(scores), **scores, "undecodable": len(named)}
        results |= {"settings": vars(args) | {"output": str(args.output)}} | provenance(world)
        write_json(args.output / "results.json", results)
        if not any(line["step"] == total_steps and "AP" in line for line in read_metrics(metrics)):
            log({"step": total_steps, "epoch": total_steps / steps_per_epoch} | headline(scores))
        save_detection_curves(args.output / "curves.png", metrics)
        save_detections(args.output / "detections.png", data.test, predictions, data.classes)
        for rule, values in scores.items():
            print(f"{rule:<7} AP {values['AP']:.2f} %, AP50 {values['AP50']:.2f} %, AP75 {values['AP75']:.2f} %")
        print(f"results.json, curves.png and detections.png are in {args.output}")
        if args.push_to_hub:
            print(push_loaded(args.output, args.backbone, backbone, args.push_to_hub))
    accelerator.end_training()


if __name__ == "__main__":
    with one_line_errors():
        main()
