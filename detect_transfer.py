"""Do the features transfer? Faster or Mask R-CNN C4, fine-tuned from a backbone (arXiv:1911.05722, section 4.2).

accelerate launch detect_transfer.py --data shapes --backbone runs/v2-shapes     the built-in data, minutes on two cores
accelerate launch detect_transfer.py --data VOCdevkit --backbone USER/NAME       VOC07+12 trainval, VOC07 test
accelerate launch detect_transfer.py --data COCO --backbone USER/NAME            boxes and masks, the 2x schedule
accelerate launch detect_transfer.py --output RUN/detection --resume             continue where it stopped
"""

import os
from contextlib import nullcontext
from itertools import islice

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded; keeps CPU threads from blocking each other

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from moco.backbone import load_backbone
from moco.backbone.publish import public_name
from moco.backbone.save import push_loaded
from moco.data import shapes
from moco.data.batches import loader
from moco.data.order import Order
from moco.detection.coco import check_pycocotools
from moco.detection.data import (
    DetectionImages,
    evaluate_detections,
    is_coco,
    load_detection,
    micro_batch_rows,
)
from moco.detection.detect import batch_norms, detect, precise_statistics
from moco.detection.model import ANCHOR_SIZES, build_detector, check_resnet
from moco.detection.pictures import save_detection_curves, save_detections
from moco.encoder import average_batchnorm
from moco.errors import UserError, one_line_errors
from moco.jsonfile import write_json
from moco.run import flags
from moco.run.checkpoint import read_metrics, weights_digest
from moco.run.flags import at_least, positive, seed
from moco.run.launch import device_in_words, optimizer_in_words, provenance, start_accelerator, stoppable
from moco.run.run import Run
from moco.schedule import warmup_step_rate

# The reference's configurations, by the data; each entry is the default of the flag of its name.
VOC = {"image_size": [*range(480, 801, 32)], "iterations": 24_000, "warmup": 100}
COCO = {"image_size": [*range(640, 801, 32)], "schedule": "2x", "warmup": 1000}
COCO_ITERATIONS = {"1x": 90_000, "2x": 180_000}
# What --data shapes sets, so that two CPU cores finish in minutes.
SHAPES = {
    "data_version": shapes.VERSION, "image_size": [96], "anchor_sizes": [40, 64], "roi_batch": 16, "batch_size": 4,
    "micro_batch": 4, "iterations": 300, "warmup": 30, "lr": 0.01, "workers": 1, "checkpoint_every": 100,
    "log_every": 10,
}  # fmt: skip
MILESTONES = {"VOC": (3 / 4, 11 / 12), "COCO": (2 / 3, 8 / 9)}  # of the iterations, where the learning rate is / 10
LONGEST = 1333  # pixels: INPUT.MAX_SIZE
SGD = {"momentum": 0.9, "weight_decay": 1e-4}
PRECISE_ITERATIONS = 200  # TEST.PRECISE_BN.NUM_ITER; of small data an epoch
# What a resumed run may change. Its numbers depend on everything else.
FREE_ON_RESUME = {
    "output", "resume", "evaluate", "backbone", "data", "workers", "keep", "checkpoint_every", "evaluate_every",
    "log_every", "push_to_hub", "license",
}  # fmt: skip


def detector_step(detector, optimizer, micro_batches, accelerator):
    """A training step of a detector: the mean of its losses over micro-batches, whose gradients add up.

    micro_batches: of this process, a list of what `DetectionImages` returns. Returns {name: loss}, means over them.
    """
    means = {}
    for i, items in enumerate(micro_batches):
        # The last backward pass averages the gradients over processes.
        with nullcontext() if i == len(micro_batches) - 1 else accelerator.no_sync(detector):
            losses = detector(*to_device(items, accelerator.device))
            accelerator.backward(sum(losses.values()) / len(micro_batches))
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + loss.detach() / len(micro_batches)
    optimizer.step()
    optimizer.zero_grad()
    average_batchnorm(batch_norms(detector), accelerator)
    return means


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
    progress = tqdm(batches, "BatchNorm", leave=False, disable=not accelerator.is_main_process)
    for items, _ in stoppable(progress, accelerator):
        with accelerator.autocast():
            detector(*to_device(items, accelerator.device))
        yield


def main_scores(scores):
    """The three numbers that papers compare: of VOC the 11-point rule's, of COCO the boxes'."""
    first = next(iter(scores.values()))
    return {key: first[key] for key in ("AP", "AP50", "AP75")}


def main():
    args = parse_args()
    accelerator = start_accelerator(args)
    is_main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    check_args(args, world)

    # ---- data
    with accelerator.local_main_process_first():  # one process per machine downloads, the others find it there
        backbone, known = load_backbone(args.backbone, args.arch, args.encoder, args.seed)
        check_resnet(backbone)
        shapes.check_version(known.get("settings", {}), args.data)
        data = load_detection(args.data, args.years, args.box_format, args.masks)
    if len(data.train) < args.batch_size:
        raise UserError(f"--data {args.data} has {len(data.train)} images, fewer than a batch of {args.batch_size}")
    train_images = DetectionImages(data.train, args.image_size, LONGEST, args.seed)
    test_images = DetectionImages(data.test, args.image_size, LONGEST)
    portrait = np.array([record["height"] > record["width"] for record in data.train])
    order = Order(args.batch_size, args.seed, rank, world)
    micro_batches = order.share // args.micro_batch

    # ---- detector
    digest = weights_digest(backbone.state_dict())
    detector, optimizer = prepare_detector(args, backbone, known, data, accelerator)
    model = nn.ModuleDict({"detector": accelerator.unwrap_model(detector, keep_torch_compile=False)})
    milestones = [round(args.iterations * part) for part in MILESTONES[data.metric]]

    # ---- the run
    if is_main:
        print_settings(args, known["arch"], data, milestones, optimizer, world)
    run = Run(
        args.output, accelerator, model, optimizer, train_images, order, args.iterations, backbone_sha256=digest,
        steps_per_epoch=(len(data.train) // args.micro_batch) * args.micro_batch / args.batch_size,
        one_size=False, **flags.run_options(args),
    )  # fmt: skip

    def micro_batches_from(step):
        return micro_batch_rows(portrait, args.batch_size, args.micro_batch, args.seed, step, rank, world)

    def detections():
        """Detections of the test images and, on the main process, their scores."""
        steps = min(PRECISE_ITERATIONS, len(data.train) // args.batch_size)
        rows = list(islice(micro_batches_from(run.done), steps * micro_batches))
        passes = training_passes(model["detector"].train(), loader(train_images, rows, args.workers), accelerator)
        precise_statistics(model["detector"], passes, accelerator)
        predictions, failed = detect(model["detector"], test_images, args.workers, accelerator)
        run.check_decoded(failed, len(data.test), instead="it counts as an image without detections")
        model["detector"].train()
        return predictions, evaluate_detections(data, predictions) if is_main else None

    def evaluation():
        with run.paused_for("evaluation"):
            _, scores = detections()
        return main_scores(scores) if is_main else {}

    # ---- training
    if run.unlogged:
        run.log(run.unlogged | evaluation())
    batches = run.timed(loader(train_images, micro_batches_from(run.done), args.workers))
    for step in run.steps():
        for group in optimizer.param_groups:  # each may have a learning rate of its own
            base_lr = group.setdefault("initial_lr", group["lr"])
            group["lr"] = warmup_step_rate(base_lr, step, milestones, args.warmup)
        losses = detector_step(detector, optimizer, list(islice(batches, micro_batches)), accelerator)
        run.record(loss=sum(losses.values()), **losses)

        evaluates = args.evaluate_every and run.due(args.evaluate_every) and run.done < run.total_steps
        if run.due(args.log_every) or evaluates:
            line = run.averages(lr=optimizer.param_groups[0]["lr"])
            if evaluates:
                line |= evaluation()
            run.log(line)
        if is_main and run.due(args.checkpoint_every):
            with run.paused_for("picture"):
                save_detection_curves(args.output / "curves.png", run.metrics)

    # ---- results
    predictions, scores = detections()
    if is_main:
        about = {"backbone": args.backbone, "arch": known["arch"], "encoder": args.encoder, "backbone_sha256": digest}
        write_json(args.output / "results.json", about | described(args, data, run, scores) | provenance(world))
        leave_results(args, data, run, predictions, scores)
        if args.push_to_hub:
            print(push_loaded(args.output, args.backbone, backbone, known, args.push_to_hub, args.license))
    accelerator.end_training()


def prepare_detector(args, backbone, known, data, accelerator):
    """The detector and its optimizer, prepared by Accelerate; equal on every process, because their seed is.

    backbone, known: of `load_backbone`.
    """
    torch.manual_seed(args.seed)
    detector = build_detector(
        backbone,
        len(data.classes),
        masks=data.masks,
        norm="frozen" if args.bn == "frozen" else "batch",
        anchor_sizes=args.anchor_sizes,
        roi_batch=args.roi_batch,
        **{name: known[name] for name in ("mean", "std") if name in known},
    )
    # CPUs have no SyncBatchNorm: there each process normalises its own images.
    if accelerator.num_processes > 1 and accelerator.device.type != "cpu":
        detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    detector = detector.to(accelerator.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(parameter_groups(detector), args.lr, **SGD)
    return accelerator.prepare(detector, optimizer)


def described(args, data, run, scores):
    """What was measured, on what, and how, for results.json."""
    data_name, on_hub = public_name(args.data)
    return {
        "data": data_name, "data_on_hub": on_hub, "metric": data.metric, "classes": len(data.classes),
        "train_images": len(data.train), "test_images": len(data.test),
        "left_out": {what: count for what, count in data.left_out.items() if count},
        "iterations": run.done, "bn": args.bn, **main_scores(scores), **scores, "undecodable": len(run.named),
        "settings": vars(args) | {"output": str(args.output)},
    }  # fmt: skip


def leave_results(args, data, run, predictions, scores):
    """Log and print the last scores, and draw the curves and some detections."""
    logged = any(line["step"] == run.done and "AP" in line for line in read_metrics(run.metrics))
    if not args.evaluate and not logged:
        run.log({"step": run.done, "epoch": run.done / run.steps_per_epoch} | main_scores(scores))
    save_detection_curves(args.output / "curves.png", run.metrics)
    save_detections(args.output / "detections.png", data.test, predictions, data.classes)
    for rule, values in scores.items():
        print(f"{rule:<7} AP {values['AP']:.2f} %, AP50 {values['AP50']:.2f} %, AP75 {values['AP75']:.2f} %")
    print(f"results.json, curves.png and detections.png are in {args.output}")


# ---- flags


def parse_args():
    """The flags. Later defaults override earlier ones: those below, then the data's, then the resumed run's."""
    parser = flags.flag_parser("--data DATA --backbone SOURCE [flags]", __doc__.split("\n\n")[0])
    flags.add_backbone_flags(parser.add_argument_group("backbone").add_argument)
    add = parser.add_argument_group("data").add_argument
    add("--data", help="a VOCdevkit folder, a COCO folder, USER/NAME on the Hub, or 'shapes' (built in)")
    add("--years", nargs="+", metavar="YEAR", default=["2007", "2012"], help="of VOC, to train on [2007 2012]")
    add("--masks", choices=("auto", "on", "off"), default="auto", help="of COCO; auto: if most objects have one")
    add("--box-format", choices=("xywh", "xyxy"), default="xywh", help="of boxes from the Hub")
    sides = "short sides, one drawn for each image; tests use the last [480 512 ... 800, COCO: from 640]"
    add("--image-size", type=at_least(32), metavar="PIXELS", nargs="+", help=sides)
    flags.add_workers_flag(add)
    add = parser.add_argument_group("detector").add_argument
    add("--bn", choices=("sync", "frozen"), default="sync", help="sync: trained, over all processes")
    add("--micro-batch", type=at_least(1), metavar="N", default=2, help="images in a forward pass of a process")
    anchors = "sides of square anchors [32 64 128 256 512]"
    add("--anchor-sizes", type=at_least(1), metavar="PIXELS", nargs="+", default=ANCHOR_SIZES, help=anchors)
    add("--roi-batch", type=at_least(4), metavar="N", default=512, help="regions to train on in an image")
    add = parser.add_argument_group("optimisation").add_argument
    add("--iterations", type=at_least(1), metavar="N", help="steps of SGD [24000, COCO: as --schedule says]")
    add("--schedule", choices=COCO_ITERATIONS, help="of COCO: 90000 or 180000 steps [2x]")
    add("--warmup", type=at_least(0), metavar="N", help="steps with a rising learning rate [100, COCO: 1000]")
    add("--batch-size", type=at_least(1), metavar="N", default=16, help="images in a step, over all processes")
    add("--lr", type=positive, metavar="LR", default=0.02, help="/ 10 at 3/4, 11/12; COCO 2/3, 8/9 [%(default)s]")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="[as accelerate launch says]")
    add("--seed", type=seed, metavar="N", default=0, help="of new weights, order, sizes, flips, regions")
    add = parser.add_argument_group("run").add_argument
    where = "detection/ in the backbone's, or in runs/"
    flags.add_run_flags(add, checkpoint_every=1000, log_every=20, default=where)
    add("--evaluate", action="store_true", help="only evaluate the newest complete checkpoint in --output")
    add("--evaluate-every", type=at_least(0), metavar="STEPS", default=0, help="0: only at the end [%(default)s]")

    early = flags.parse_early(parser)
    parser.set_defaults(**defaults_of(early.data, early.schedule))
    args = parser.parse_args()
    if args.output is None:
        check_named(args)
        args.output = flags.default_output(args.backbone, args.data, "detection")
    if args.resume or args.evaluate:
        args = flags.parse_resumed(parser, args.output, FREE_ON_RESUME)
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
    """Raise UserError for flags that do not go together, before anything is read or written."""
    flags.check_batch(args.batch_size, processes, "--micro-batch", args.micro_batch)
    if is_coco(args.data):
        check_pycocotools(args.data)
    elif args.schedule:
        raise UserError(f"--schedule {args.schedule} is for COCO folders, which {args.data} is not; use --iterations")
    elif args.masks == "on":
        raise UserError(f"--masks on is for COCO folders, which {args.data} is not; leave it out to train boxes")
    flags.check_output(args)


def print_settings(args, arch, data, milestones, optimizer, processes):
    """What the run will do, in the reference's terms."""
    passes = args.batch_size // processes // args.micro_batch
    sizes = "-".join(map(str, dict.fromkeys((args.image_size[0], args.image_size[-1]))))
    print(
        f"model   {'Mask' if data.masks else 'Faster'} R-CNN C4 of {arch}, BatchNorm {args.bn}",
        f"from    {args.backbone}",
        f"data    {args.data}: {len(data.train)} images to train on, short side {sizes}, {len(data.classes)} classes",
        f"batch   {args.batch_size} = {processes} processes x {passes} micro-batches x {args.micro_batch} images",
        f"device  {device_in_words(args.workers)}",
        f"train   {args.iterations} iterations, lr {args.lr}, / 10 at {' and '.join(map(str, milestones))}, warm-up"
        f" {args.warmup}, {optimizer_in_words(optimizer)}, mixed precision {args.mixed_precision}",
        f"test    {len(data.test)} images, {data.metric}'s metric",
        f"output  {args.output}",
        sep="\n",
    )
    for what, count in data.left_out.items():
        if count:
            print(f"        {count} {what}")


if __name__ == "__main__":
    with one_line_errors():
        main()
