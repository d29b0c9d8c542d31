"""How good are the features? A linear classifier on a frozen backbone, and kNN (arXiv:1911.05722, section 4.1).

accelerate launch linear_probe.py --data shapes --backbone runs/v2-shapes      the built-in data, minutes on two cores
accelerate launch linear_probe.py --backbone runs/v2-imagenet-1k               the paper's protocol, on ImageNet
accelerate launch linear_probe.py --backbone USER/NAME --lr 3 10 30 100        four classifiers in the one pass
accelerate launch linear_probe.py --backbone USER/NAME --cached-features --knn minutes instead of hours, approximate
accelerate launch linear_probe.py --output RUN/linear_probe --resume           go on where it stopped
"""

import math
import time
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from moco.augment import normalize, to_float
from moco.backbone import feature_width, load_backbone, push_loaded
from moco.batches import CachedFeatures, LabelledCrops, batch_rows, loader, row_order, split_rows, train_rows
from moco.checkpoint import (
    append_metrics,
    check_equal_state,
    complete_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    provenance,
    save_checkpoint,
    trim_metrics,
    weights_digest,
    write_json,
)
from moco.data import check_undecodable, count_classes, hold_out, load_splits, name_undecodable, read_image
from moco.encoder import average_tensors, resnet_names
from moco.errors import UserError, one_line_errors
from moco.knn import cache_features, extract_features, feature_bank, feature_batches, knn_evaluate
from moco.publish import check_push, public_name
from moco.run import (
    BACKBONE_HELP,
    catch_sigterm,
    check_limits,
    check_output,
    default_output,
    finish,
    flag_parser,
    given_flags,
    nearest_multiples,
    parse_resumed,
    release_sigterm,
    start_accelerator,
    stop_diverged,
)
from moco.schedule import learning_rate

# What --data shapes changes, so that two CPU cores finish in minutes.
SHAPES = {"image_size": 32, "epochs": 20, "workers": 1, "checkpoint_every": 115}
HELD_OUT, HELD_OUT_SHARE = 10_000, 0.1  # training images that choose among several --lr: at most, and share at most
# What a resumed run may change; everything else is what its numbers depend on.
FREE_ON_RESUME = {
    "output", "resume", "evaluate", "backbone", "data", "workers", "shuffle_window", "keep", "checkpoint_every",
    "evaluate_every", "log_every", "knn", "knn_temperature", "push_to_hub",
}  # fmt: skip


def parse_args():
    """The flags. Defaults, from weak to strong: below, the built-in data's, those of the run resumed."""
    parser = flag_parser("--backbone SOURCE [flags]", __doc__.split("\n\n")[0])
    add = parser.add_argument_group("backbone").add_argument
    add("--backbone", metavar="SOURCE", help=BACKBONE_HELP)
    add("--arch", help="a torchvision ResNet, or resnet10 [as the backbone says; random: resnet50]")
    add("--encoder", choices=("query", "key"), default="query", help="key: the momentum encoder [%(default)s]")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="ILSVRC/imagenet-1k", help="'shapes', a folder, or USER/NAME on the Hub [%(default)s]")
    add("--image-column", metavar="NAME", help="column of images, where the data has several")
    add("--label-column", metavar="NAME", help="column of labels, where the data has several")
    add("--revision", metavar="REV", help="branch, tag or commit of a dataset on the Hub [its main branch]")
    add("--no-streaming", action="store_true", help="download parquet files instead of reading them where they lie")
    add("--shuffle-window", type=int, metavar="ROWS", default=800, help="shuffled at a time in a stream [%(default)s]")
    add("--image-size", type=int, metavar="PIXELS", help="side of a crop [as the backbone was trained, else 224]")
    add("--workers", type=int, metavar="N", default=8, help="data-loading processes for each process [%(default)s]")
    add = parser.add_argument_group("classifier").add_argument
    add("--lr", type=float, metavar="LR", nargs="+", default=[30.0], help="of several, all are trained at once [30]")
    add("--epochs", type=int, metavar="N", default=100, help="lr / 10 at 60 %% and 80 %% of them [%(default)s]")
    add("--batch-size", type=int, metavar="N", default=256, help="images a step, over all processes [%(default)s]")
    add("--sgd-momentum", type=float, metavar="M", default=0.9, help="of the optimizer [%(default)s]")
    add("--weight-decay", type=float, metavar="W", default=0.0, help="of the optimizer [%(default)s]")
    add("--cached-features", action="store_true", help="train on features of a fixed crop: fast, approximate")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="of the backbone [as accelerate launch says]")
    add("--seed", type=int, metavar="N", default=0, help="of the weights, the order and the crops [%(default)s]")
    add = parser.add_argument_group("kNN").add_argument
    add("--knn", type=int, metavar="K", nargs="*", help="also kNN with each of these K; 200 if none is given [off]")
    add("--knn-temperature", type=float, metavar="T", default=0.07, help="of the votes [%(default)s]")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, metavar="RUN", help="the run folder [linear_probe/ in the backbone's, or in runs/]")
    add("--resume", action="store_true", help="go on from the newest complete checkpoint in --output")
    add("--evaluate", action="store_true", help="only evaluate the newest complete checkpoint in --output")
    add("--evaluate-every", type=int, metavar="EPOCHS", default=10, help="and at the end [%(default)s]")
    add("--checkpoint-every", type=int, metavar="STEPS", default=5000, help="also at the end and SIGTERM [%(default)s]")
    add("--keep", type=int, metavar="N", default=2, help="checkpoints kept [%(default)s]")
    add("--log-every", type=int, metavar="STEPS", default=50, help="between lines of metrics.jsonl [%(default)s]")
    add("--push-to-hub", metavar="USER/NAME", help="publish the backbone with these results")

    given = given_flags(parser)
    parser.set_defaults(**(SHAPES if given.data == "shapes" else {}))
    args = parser.parse_args()
    if args.output is None and args.backbone is not None:
        args.output = default_output(args.backbone, args.data, "linear_probe")
    if args.output is not None and (args.resume or args.evaluate):
        args = parse_resumed(parser, args.output, FREE_ON_RESUME)
    if args.backbone is None:
        raise UserError("--backbone is missing: name a run folder, a file, USER/NAME on the Hub, or 'random'")
    if args.backbone == "random" and args.arch is None:
        args.arch = "resnet10" if args.data == "shapes" else "resnet50"
    if args.knn == []:
        args.knn = [200]
    return args


def check_args(args, processes):
    """Raise UserError for values that cannot work, before anything is read or written."""
    limits = {
        "image_size": (args.image_size is None or args.image_size >= 16, "at least 16"),
        "shuffle_window": (args.shuffle_window >= 1, "at least 1"),
        "workers": (args.workers >= 0, "0 or more"),
        "arch": (args.arch is None or args.arch in resnet_names(), f"one of {', '.join(resnet_names())}"),
        "lr": (all(0 < lr < math.inf for lr in args.lr), "above 0"),
        "epochs": (args.epochs >= 1, "at least 1"),
        "batch_size": (args.batch_size >= 1, "at least 1"),
        "sgd_momentum": (0 <= args.sgd_momentum < 1, "at least 0 and below 1"),
        "weight_decay": (0 <= args.weight_decay < math.inf, "0 or more"),
        "seed": (0 <= args.seed < 2**63, "at least 0 and below 2^63"),
        "knn": (all(k >= 1 for k in args.knn or []), "at least 1"),
        "knn_temperature": (0 < args.knn_temperature < math.inf, "above 0"),
        "evaluate_every": (args.evaluate_every >= 1, "at least 1"),
        "checkpoint_every": (args.checkpoint_every >= 1, "at least 1"),
        "keep": (args.keep >= 1, "at least 1"),
        "log_every": (args.log_every >= 1, "at least 1"),
    }
    check_limits(vars(args), limits)
    if len(set(args.lr)) < len(args.lr):
        raise UserError(f"--lr {' '.join(map(str, args.lr))} has a value twice; name each once")
    if args.batch_size % processes:
        raise UserError(
            f"--batch-size {args.batch_size} is not divisible by {processes} processes; use"
            f" {nearest_multiples(args.batch_size, processes)}"
        )
    check_output(args.output, args.resume or args.evaluate)


# ---- classifiers


class LinearClassifiers(nn.Module):
    """Linear classifiers side by side on the same features: (N, width) -> logits (classifiers, N, classes).

    All start from the same weights, N(0, 0.01) with bias 0, so that each is what it would be alone.
    """

    def __init__(self, width, classes, count, seed):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(count))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(head.bias)

    def forward(self, features):
        return torch.stack([head(features) for head in self.heads])


def build_optimizer(classifiers, lrs, momentum, weight_decay):
    """SGD with a learning rate for each classifier."""
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(classifiers.heads, lrs, strict=True)]
    return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay)


def count_correct(logits, labels):
    """How many of logits (classifiers, N, classes) have the label (N,) first and among the first five.

    Returns (classifiers, 2) int64. Logits that are not finite, of a classifier that diverged, are never right.
    """
    ranked = logits.topk(min(5, logits.shape[2]), dim=2).indices
    hits = (ranked == labels[:, None]) & logits.isfinite().all(dim=2, keepdim=True)
    return torch.stack([hits[..., 0].sum(dim=1), hits.sum(dim=(1, 2))], dim=1)


def train_step(classifiers, optimizer, features, labels, accelerator):
    """One step of each classifier on this process's features (n, width) and labels (n,).

    Returns logits (classifiers, n, classes) before the step and each classifier's loss over these images.
    """
    logits = classifiers(features)
    losses = torch.stack([F.cross_entropy(each, labels) for each in logits])
    losses.sum().backward()  # no classifier's loss depends on another's weights
    if accelerator.num_processes > 1:  # averaged by hand: DDP would be another wrapper for these few tensors
        average_tensors([parameter.grad for parameter in classifiers.parameters()], accelerator)
    optimizer.step()
    optimizer.zero_grad()
    return logits.detach(), losses.detach()


@torch.no_grad()
def evaluate(backbone, classifiers, dataset, size, workers, accelerator):
    """Top-1 and top-5 of each classifier in percent, [[top1, top5], ...], over every image of the dataset, once.

    The processes share the images out and add up counts, so that none is padded or dropped. Also returns this
    process's undecodable images as (name, reason).
    """
    _, mine = split_rows(dataset, range(len(dataset)), accelerator.num_processes)[accelerator.process_index]
    correct = torch.zeros(len(classifiers.heads), 2, dtype=torch.long, device=accelerator.device)
    undecodable = []
    for _, features, labels, failed in feature_batches(backbone, dataset, mine, size, workers, accelerator):
        correct += count_correct(classifiers(features), labels)
        undecodable += failed
    return (100 * accelerator.reduce(correct, "sum").double() / len(dataset)).tolist(), undecodable


def print_settings(args, arch, width, counts, processes):
    """What the run will do, in the paper's terms. counts: images to train on, hold out and validate on; classes."""
    train, held_out, validation, classes = counts
    steps = train // args.batch_size
    print(
        f"model   {args.backbone}: {arch}, {width} features, frozen; {len(args.lr)} linear classifiers",
        f"data    {args.data}: {train} images at {args.image_size} pixels, {classes} classes, {steps} steps an epoch",
        f"batch   {args.batch_size} over {processes} processes",
        f"SGD     {args.epochs} epochs, lr {' '.join(f'{lr:g}' for lr in args.lr)}, momentum {args.sgd_momentum},"
        f" weight decay {args.weight_decay}, mixed precision {args.mixed_precision}",
        f"test    {validation} images" + (f"; {held_out} of training held out choose the lr" if held_out else ""),
        f"output  {args.output}",
        sep="\n",
    )
    if args.cached_features:
        gigabytes = train * width * 2 / 1e9
        print(f"cache   features of one fixed crop of each image, {gigabytes:.1f} GB; the accuracy is approximate")


def main():
    args = parse_args()
    accelerator = start_accelerator(args.mixed_precision)
    args.mixed_precision = accelerator.mixed_precision
    torch.backends.cudnn.benchmark = True  # all batches are of one size
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    check_args(args, world)
    if args.push_to_hub and is_main:
        check_push(args.push_to_hub)

    # ---- backbone
    if not is_main:
        datasets.disable_progress_bars()
    with accelerator.local_main_process_first():  # what is downloaded or drawn is made once a machine
        backbone = load_backbone(args.backbone, args.arch, args.encoder, args.seed)
    train_set, test_set = load_splits(
        args.data, args.image_column, args.label_column, args.revision, not args.no_streaming
    )
    args.image_size = args.image_size or backbone.known.get("image_size", 224)
    arch = backbone.known["arch"]
    width = feature_width(backbone.state_dict())
    digest = weights_digest(backbone.state_dict())
    # In eval mode BatchNorm uses the statistics it was trained with and does not update them: in training mode it
    # would change the very features that are measured, even without gradients.
    backbone = backbone.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)

    # ---- data
    classes = count_classes(train_set, test_set, args.data)
    if test_set is None:
        train_set, test_set = hold_out(train_set, max(1, len(train_set) // 5), b"validation", 0)
    bank_set, held_out = train_set, None  # kNN is the same however many --lr there are
    if len(args.lr) > 1:
        count = min(HELD_OUT, int(HELD_OUT_SHARE * len(train_set)))
        if not count:
            raise UserError(f"--data {args.data} has {len(train_set)} images, too few to choose among several --lr")
        train_set, held_out = hold_out(train_set, count, b"held out", args.seed)
    if len(train_set) < args.batch_size:
        raise UserError(f"--data {args.data} has {len(train_set)} images, fewer than a batch of {args.batch_size}")
    read_image(train_set, 0)  # where nothing can be decoded, say so now
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    row_source = {} if args.cached_features else row_order(train_set, world, args.workers, args.shuffle_window)

    # ---- classifiers, equal on every process, since their seed and their updates are
    classifiers = LinearClassifiers(width, classes, len(args.lr), args.seed).to(device)
    optimizer = build_optimizer(classifiers, args.lr, args.sgd_momentum, args.weight_decay)

    # ---- the run folder: start one, or go on with one
    checkpoints, metrics = args.output / "checkpoints", args.output / "metrics.jsonl"
    zeros = [0.0] * len(args.lr)
    start, totals, undecodable = 0, {"steps": 0, "loss": zeros, "correct": zeros}, 0
    if args.resume or args.evaluate:
        tensors, state = load_checkpoint(complete_checkpoints(checkpoints)[-1])
        if state["images"] != len(train_set):
            raise UserError(
                f"--data {args.data} has {len(train_set)} images to train on, {args.output} was begun on"
                f" {state['images']}"
            )
        if state["backbone_sha256"] != digest:
            raise UserError(f"--backbone {args.backbone} has changed since {args.output} was begun; start a new run")
        classifiers.load_state_dict(tensors["classifiers"])
        load_optimizer_tensors(optimizer, tensors["optimizer"])
        saved, totals, undecodable = state["step"], state["totals"], state["undecodable"]
        start = saved
        if args.resume and state["rows"] != row_source:  # which images of this epoch were used is not known then
            start = saved // steps_per_epoch * steps_per_epoch
        if start < saved:
            totals, undecodable = {"steps": 0, "loss": zeros, "correct": zeros}, 0
    accelerator.wait_for_everyone()  # nobody writes before everybody has read
    if is_main:
        counts = (len(train_set), len(held_out or ()), len(test_set), classes)
        print_settings(args, arch, width, counts, world)
        if args.resume or args.evaluate:
            print(f"resume  after step {start}")
            if start < saved:
                print(
                    f"        not {saved}: files, processes, workers or window differ, so the epoch starts again in a"
                    " new order"
                )
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
        check_equal_state({"classifiers": classifiers}, accelerator)
        if is_main:  # all are equal, so one saves
            state = {"images": len(train_set), "rows": row_source, "totals": totals, "undecodable": undecodable}
            tensors = {"classifiers": classifiers.state_dict(), "optimizer": optimizer_tensors(optimizer)}
            save_checkpoint(checkpoints, step, tensors, state | {"backbone_sha256": digest}, args.keep)
        accelerator.wait_for_everyone()

    named = set()  # undecodable images, each printed once

    def measure(dataset):
        accuracies, failed = evaluate(backbone, classifiers, dataset, args.image_size, args.workers, accelerator)
        check_undecodable(name_undecodable(failed, named, accelerator), len(dataset), args.data)
        return accuracies

    stopping = catch_sigterm()
    if args.evaluate:
        total_steps = start
    elif not args.resume or start < saved:
        save(start)

    # ---- training
    if args.cached_features and start < total_steps:
        failed, count = cache_features(
            args.output / "features", backbone, digest, train_set, args.image_size, args.workers, accelerator
        )
        name_undecodable(failed, named, accelerator)
        check_undecodable(count, len(train_set), args.data)
        rows = batch_rows(len(train_set), args.batch_size, args.seed, start, rank, world)
        batches = iter(loader(CachedFeatures(args.output / "features"), rows, workers=0))
    elif start < total_steps:  # else workers would read for nothing
        rows = train_rows(train_set, args.batch_size, args.seed, start, rank, world, args.workers, args.shuffle_window)
        batches = iter(loader(LabelledCrops(train_set, args.image_size, args.seed), rows, args.workers))
    timing = {"steps": 0, "seconds": 0.0, "data": 0.0}
    bar = tqdm(total=total_steps, initial=start, unit="step", disable=not is_main or args.evaluate)
    for step in range(start, total_steps):
        started = time.perf_counter()
        inputs, labels, failed = next(batches)  # crops (n, S, S, 3) uint8, or cached features (n, width) float16
        timing["data"] += time.perf_counter() - started
        epoch = step // steps_per_epoch
        milestones = (0.6 * args.epochs, 0.8 * args.epochs)
        lrs = [learning_rate(lr, epoch, args.epochs, "step", milestones) for lr in args.lr]
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)

        # ---- a training step
        if args.cached_features:
            features = inputs.float()
        else:
            with torch.no_grad(), accelerator.autocast():
                features = backbone(normalize(to_float(inputs))).float()
        logits, losses = train_step(classifiers, optimizer, features, labels, accelerator)

        # ---- what every process must know; to read it is the step's only wait for the device
        told = torch.cat([losses, count_correct(logits, labels)[:, 0], losses.new_tensor([len(failed), len(stopping)])])
        *told, failures, stop = accelerator.reduce(told, "sum").tolist()
        losses, correct = [loss / world for loss in told[: len(args.lr)]], told[len(args.lr) :]
        if not any(map(math.isfinite, losses)):
            stop_diverged(accelerator, f"the loss is {losses[0]} at step {step}", checkpoints)
        if failures:
            undecodable += name_undecodable(failed, named, accelerator)
            check_undecodable(undecodable, len(train_set), args.data)
        totals = {
            "steps": totals["steps"] + 1,
            "loss": [total + loss for total, loss in zip(totals["loss"], losses)],
            "correct": [total + count for total, count in zip(totals["correct"], correct)],
        }
        timing["steps"] += 1
        timing["seconds"] += time.perf_counter() - started
        bar.update()

        # ---- log, evaluate, save
        done = step + 1
        epoch_ends = done % steps_per_epoch == 0
        if done % args.log_every == 0 or epoch_ends:
            line = {
                "step": done,
                "epoch": done / steps_per_epoch,
                "loss": [total / totals["steps"] for total in totals["loss"]],  # of each classifier, as --lr
                "accuracy": [100 * total / (totals["steps"] * args.batch_size) for total in totals["correct"]],
                "lr": lrs,
                "undecodable": undecodable,  # in this epoch
                "images_per_second": timing["steps"] * args.batch_size / timing["seconds"],
                "data_seconds": timing["data"],
                "data_share": timing["data"] / timing["seconds"],
            }
            totals, timing = {"steps": 0, "loss": zeros, "correct": zeros}, {"steps": 0, "seconds": 0.0, "data": 0.0}
            bar.set_postfix_str(
                f"loss {min(line['loss']):.2f}, accuracy {max(line['accuracy']):.1f} %,"
                f" {line['images_per_second']:.0f} images/s, {line['data_share']:.0%} waiting for data"
            )
            if epoch_ends and (epoch + 1) % args.evaluate_every == 0 and done < total_steps:
                line["top1"], line["top5"] = map(list, zip(*measure(test_set)))
            log(line)
        if epoch_ends:
            undecodable = 0
        if done % args.checkpoint_every == 0 or done == total_steps or stop:
            save(done)
        if stop:
            finish(accelerator, 143, f"SIGTERM: stopped after step {done}, which is saved; go on with --resume")
    bar.close()
    release_sigterm(stopping)

    # ---- results
    results = {"backbone": args.backbone, "arch": arch, "encoder": args.encoder, "backbone_sha256": digest}
    data, on_hub = public_name(args.data)
    results |= {"data": data, "data_on_hub": on_hub, "classes": classes, "train_images": len(train_set)}
    results |= {"held_out_images": len(held_out or ()), "validation_images": len(test_set)}
    results |= {"approximate": args.cached_features, "epochs": args.epochs, "steps": total_steps}
    chosen = 0
    results["classifiers"] = [
        {"lr": lr, "top1": top1, "top5": top5} for lr, (top1, top5) in zip(args.lr, measure(test_set), strict=True)
    ]
    if held_out:
        for classifier, (top1, _) in zip(results["classifiers"], measure(held_out)):
            classifier["held_out_top1"] = top1
        chosen = max(range(len(args.lr)), key=lambda i: results["classifiers"][i]["held_out_top1"])
    results |= results["classifiers"][chosen]
    if args.knn:
        results["knn_temperature"] = args.knn_temperature
        features, labels, failed = extract_features(
            backbone, test_set, range(len(test_set)), args.image_size, args.workers, accelerator
        )
        bank, bank_labels, failed_too = feature_bank(
            backbone, bank_set, range(len(bank_set)), args.image_size, args.workers, accelerator
        )
        count = name_undecodable(failed + failed_too, named, accelerator)
        check_undecodable(count, len(test_set) + len(bank_set), args.data)
        found = knn_evaluate(features, labels, bank, bank_labels, classes, args.knn, args.knn_temperature, accelerator)
        results["knn"] = {str(k): accuracy for k, accuracy in found.items()}
    results |= {"undecodable": len(named), "settings": vars(args) | {"output": str(args.output)}} | provenance(world)
    if weights_digest(backbone.state_dict()) != digest:
        raise RuntimeError("the backbone changed while it was probed, so these results are of no backbone")
    if is_main:
        write_json(args.output / "results.json", results)
        for classifier in results["classifiers"]:
            held = f", {classifier['held_out_top1']:.2f} % of training held out" if held_out else ""
            print(f"lr {classifier['lr']:<6g} top-1 {classifier['top1']:.2f} %, top-5 {classifier['top5']:.2f} %{held}")
        for k, accuracy in results.get("knn", {}).items():
            print(f"kNN {k:<5} top-1 {accuracy['top1']:.2f} %, top-5 {accuracy['top5']:.2f} %")
        print(f"result  top-1 {results['top1']:.2f} % with lr {results['lr']:g}, in {args.output / 'results.json'}")
        if args.push_to_hub:
            print(push_loaded(args.output, args.backbone, backbone, args.push_to_hub))
    accelerator.end_training()


if __name__ == "__main__":
    with one_line_errors():
        main()
