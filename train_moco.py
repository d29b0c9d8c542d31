"""Pre-train an image backbone: MoCo v1 (arXiv:1911.05722), MoCo v2 (arXiv:2003.04297), or SimCLR (arXiv:2002.05709).

accelerate launch train_moco.py --data shapes          the built-in data, minutes on two CPU cores
accelerate launch train_moco.py                        the paper's MoCo v2: ResNet-50, ImageNet, 200 epochs
accelerate launch train_moco.py --output RUN --resume  go on where RUN stopped
accelerate launch --config_file accelerate_config.yaml train_moco.py --data FOLDER --recipe v1
accelerate launch train_moco.py --recipe simclr        the end-to-end counterpart that MoCo is compared with
"""

import copy
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate.tracking import get_available_trackers
from accelerate.utils import DynamoBackend
from torch import nn
from tqdm import tqdm

from moco.augment import RECIPES as AUGMENTATIONS
from moco.augment import ViewAugment, sample_params
from moco.backbone import save_backbone
from moco.batches import row_order, train_batches, train_rows
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
    write_json,
)
from moco.contrast import KeyQueue, contrastive_logits, gather_with_gradient, nt_xent_logits
from moco.data import check_undecodable, has_labels, load_splits, name_undecodable, read_image
from moco.encoder import average_statistics, build_encoder, momentum_update, resnet_names
from moco.errors import UserError, one_line_errors
from moco.knn import knn_monitor
from moco.publish import check_push, push_backbone
from moco.report import save_curves, save_views
from moco.run import (
    catch_sigterm,
    check_limits,
    check_output,
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
from moco.schedule import LARS, learning_rate, warmup_cosine_rate
from moco.shuffle import encode_keys, shuffle_order

# The rows of the papers' ablation, and SimCLR; each entry is the default of the flag of its name.
RECIPES = {
    "v1": {"head": "fc", "augment": "v1", "temperature": 0.07, "schedule": "step"},
    "v1-mlp": {"head": "mlp", "augment": "v1", "temperature": 0.2, "schedule": "step"},
    "v1-aug": {"head": "fc", "augment": "v2", "temperature": 0.07, "schedule": "step"},
    "v1-mlp-aug": {"head": "mlp", "augment": "v2", "temperature": 0.2, "schedule": "step"},
    "v2": {"head": "mlp", "augment": "v2", "temperature": 0.2, "schedule": "cosine"},
    "simclr": {
        "head": "mlp", "augment": "simclr", "temperature": 0.1, "schedule": "warmup-cosine", "optimizer": "lars",
        "weight_decay": 1e-6, "lr": None, "bn_batch": None,  # these two follow from the batch
        "end_to_end": True,  # no flag: keys have gradients, and neither queue nor second encoder is there
    },
}  # fmt: skip
SCHEDULES = ("cosine", "step", "warmup-cosine")
# What --data shapes changes, so that two CPU cores finish in minutes.
SHAPES = {
    "arch": "resnet10", "image_size": 32, "queue_size": 512, "encoder_momentum": 0.998, "epochs": 40,
    "batch_size": 128, "bn_batch": 64, "lr": 0.015, "workers": 1, "checkpoint_every": 460,
}  # fmt: skip
# What a resumed run may change; everything else is what its numbers depend on.
FREE_ON_RESUME = {
    "output", "resume", "data", "workers", "shuffle_window", "keep", "checkpoint_every", "log_every", "knn_every",
    "tracker", "push_to_hub",
}  # fmt: skip


def parse_args():
    """The flags. Defaults, from weak to strong: below, the built-in data's, the recipe's, those of the run resumed."""
    parser = flag_parser("[flags]", __doc__.split("\n\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--data", default="ILSVRC/imagenet-1k", help="'shapes', a folder, or USER/NAME on the Hub [%(default)s]")
    add("--image-column", metavar="NAME", help="column of images, where the data has several")
    add("--label-column", metavar="NAME", help="column of labels; only the kNN monitor uses them")
    add("--revision", metavar="REV", help="branch, tag or commit of a dataset on the Hub [its main branch]")
    add("--no-streaming", action="store_true", help="download parquet files instead of reading them where they lie")
    add("--shuffle-window", type=int, metavar="ROWS", default=800, help="shuffled at a time in a stream [%(default)s]")
    add("--image-size", type=int, metavar="PIXELS", default=224, help="side of a view [%(default)s]")
    add("--workers", type=int, metavar="N", default=8, help="data-loading processes for each process [%(default)s]")
    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", choices=RECIPES, default="v2", help="row of the ablation, or simclr; sets defaults [%(default)s]")
    add("--head", choices=("fc", "mlp"), help="projection head [%(default)s]")
    add("--augment", choices=AUGMENTATIONS, help="v2: with blur; simclr: stronger, smaller crops too [%(default)s]")
    add("--temperature", type=float, metavar="T", help="of the softmax over similarities [%(default)s]")
    add("--schedule", choices=SCHEDULES, help="step: lr / 10 at 60 %% and 80 %% of the epochs [%(default)s]")
    add("--optimizer", choices=("sgd", "lars"), default="sgd", help="[%(default)s; simclr: lars]")
    add = parser.add_argument_group("encoders and queue").add_argument
    add("--arch", default="resnet50", help="a torchvision ResNet, or resnet10 [%(default)s]")
    add("--stem", choices=("imagenet", "small"), default="imagenet", help="small: 3x3, no pooling [%(default)s]")
    add("--dim", type=int, metavar="C", default=128, help="width of queries and keys [%(default)s]")
    add("--queue-size", type=int, metavar="K", default=65536, help="keys in the queue [%(default)s; simclr: none]")
    add("--encoder-momentum", type=float, metavar="M", default=0.999, help="of the key encoder [%(default)s]")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, metavar="N", default=200, help="passes over the data [%(default)s]")
    add("--batch-size", type=int, metavar="N", default=256, help="images a step, over all processes [%(default)s]")
    add("--bn-batch", type=int, metavar="N", default=32, help="images that share BatchNorm [%(default)s; simclr: all]")
    add("--lr", type=float, metavar="LR", default=0.03, help="for any batch [%(default)s; simclr: 0.3 x batch / 256]")
    add("--warmup-epochs", type=int, metavar="N", default=10, help="of schedule warmup-cosine [%(default)s]")
    add("--sgd-momentum", type=float, metavar="M", default=0.9, help="of the optimizer [%(default)s]")
    add("--weight-decay", type=float, metavar="W", default=1e-4, help="lars: of weights [%(default)s; simclr: 1e-6]")
    add("--seed", type=int, metavar="N", default=0, help="of weights, queue, order and augmentation [%(default)s]")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="[as accelerate launch says; shapes: bf16 if fast]")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, metavar="FOLDER", help="run folder [runs/RECIPE-DATA]")
    add("--resume", action="store_true", help="go on from the newest complete checkpoint in --output")
    add("--checkpoint-every", type=int, metavar="STEPS", default=1000, help="also at the end and SIGTERM [%(default)s]")
    add("--keep", type=int, metavar="N", default=2, help="checkpoints kept [%(default)s]")
    add("--log-every", type=int, metavar="STEPS", default=10, help="between lines of metrics.jsonl [%(default)s]")
    add("--knn-every", type=int, metavar="EPOCHS", default=10, help="between kNN evaluations, 0 for none [%(default)s]")
    add("--tracker", choices=("tensorboard", "wandb"), help="log there too, where it is installed")
    add("--push-to-hub", metavar="USER/NAME", help="publish the backbone when the run is done")
    parser.set_defaults(end_to_end=False, **RECIPES["v2"])  # for --help to show

    given = given_flags(parser)
    parser.set_defaults(**(SHAPES if given.data == "shapes" else {}))
    parser.set_defaults(**RECIPES[given.recipe])
    args = parser.parse_args()
    if args.lr is None:
        args.lr = 0.3 * args.batch_size / 256
    if args.bn_batch is None:
        args.bn_batch = args.batch_size
    if args.output is None:
        args.output = Path("runs") / f"{args.recipe}-{Path(args.data).resolve().name}"
    return parse_resumed(parser, args.output, FREE_ON_RESUME) if args.resume else args


def check_args(args, processes, device_type):
    """Raise UserError for values that cannot work, before anything is read or written."""
    limits = {
        "image_size": (args.image_size >= 16, "at least 16"),
        "shuffle_window": (args.shuffle_window >= 1, "at least 1"),
        "workers": (args.workers >= 0, "0 or more"),
        "temperature": (0 < args.temperature < math.inf, "above 0"),
        "dim": (args.dim >= 1, "at least 1"),
        "queue_size": (args.queue_size >= 1, "at least 1"),
        "encoder_momentum": (0 <= args.encoder_momentum < 1, "at least 0 and below 1"),
        "epochs": (args.epochs >= 1, "at least 1"),
        "warmup_epochs": (
            args.schedule != "warmup-cosine" or 0 <= args.warmup_epochs < args.epochs,
            f"at least 0 and below the {args.epochs} epochs",
        ),
        "batch_size": (args.batch_size >= 1, "at least 1"),
        "bn_batch": (args.bn_batch >= 2, "at least 2, for BatchNorm to have something to average"),
        "lr": (0 < args.lr < math.inf, "above 0"),
        "sgd_momentum": (0 <= args.sgd_momentum < 1, "at least 0 and below 1"),
        "weight_decay": (0 <= args.weight_decay < math.inf, "0 or more"),
        "seed": (0 <= args.seed < 2**63, "at least 0 and below 2^63"),
        "checkpoint_every": (args.checkpoint_every >= 1, "at least 1"),
        "keep": (args.keep >= 1, "at least 1"),
        "log_every": (args.log_every >= 1, "at least 1"),
        "knn_every": (args.knn_every >= 0, "0 (never) or more"),
        "arch": (args.arch in resnet_names(), f"one of {', '.join(resnet_names())}"),
        "tracker": (
            args.tracker in (None, *map(str, get_available_trackers())),
            f"installed: pip install {args.tracker}",
        ),
    }
    check_limits(vars(args), limits)
    synchronised = processes > 1 and args.end_to_end and args.bn_batch == args.batch_size
    unit = processes * (1 if synchronised else args.bn_batch)
    if args.batch_size % unit:
        raise UserError(
            f"--batch-size {args.batch_size} is not divisible by {processes} processes x --bn-batch"
            f" {args.bn_batch}; use --batch-size {nearest_multiples(args.batch_size, unit)}, or another"
            " --bn-batch"
        )
    if synchronised and device_type == "cpu":
        raise UserError(
            f"--bn-batch {args.bn_batch} over {processes} processes needs SyncBatchNorm, which runs on GPUs only; use"
            f" --bn-batch {args.batch_size // processes}"
        )
    check_output(args.output, args.resume)


def print_settings(args, images, processes, groups, candidates):
    """What the run will do, in the papers' terms. groups: BatchNorm micro-batches a process."""
    print(
        f"recipe  {args.recipe}: {args.head} head, {args.augment} augmentation, temperature {args.temperature}",
        f"model   {args.arch}, {args.stem} stem, {args.dim} dimensions"
        + ("" if args.end_to_end else f", encoder momentum {args.encoder_momentum}, queue of {args.queue_size} keys"),
        f"data    {args.data}: {images} images at {args.image_size} pixels, {images // args.batch_size} steps an epoch",
        f"batch   {args.batch_size} = {processes} processes x {groups} micro-batches x"
        f" {args.batch_size // processes // groups} images, BatchNorm over {args.bn_batch}",
        f"{args.optimizer.upper():7} {args.epochs} epochs, lr {args.lr} {args.schedule}, momentum {args.sgd_momentum},"
        f" weight decay {args.weight_decay}, mixed precision {args.mixed_precision}",
        f"loss    chance is log({candidates}) = {math.log(candidates):.2f}"
        + (
            "" if args.end_to_end else f"; lower for {-(-args.queue_size // args.batch_size)} steps, as the queue fills"
        ),
        f"output  {args.output}",
        sep="\n",
    )


def main():
    args = parse_args()
    if args.mixed_precision is None and args.data == "shapes" and fast_bf16():
        args.mixed_precision = "bf16"
    accelerator = start_accelerator(args.mixed_precision, log_with=args.tracker, project_dir=args.output)
    args.mixed_precision = accelerator.mixed_precision
    torch.backends.cudnn.benchmark = True  # all batches are of one size
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    check_args(args, world, device.type)
    if args.push_to_hub and is_main:
        check_push(args.push_to_hub)

    # ---- data
    if not is_main:
        datasets.disable_progress_bars()
    train_set, test_set = load_splits(
        args.data, args.image_column, args.label_column, args.revision, not args.no_streaming
    )
    if len(train_set) < args.batch_size:
        raise UserError(f"--data {args.data} has {len(train_set)} images, fewer than a batch of {args.batch_size}")
    read_image(train_set, 0)  # where nothing can be decoded, say so now
    with_knn = args.knn_every > 0 and has_labels(train_set)
    if with_knn and test_set is not None and not has_labels(test_set):
        test_set = None  # the monitor then holds training images out
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    n = args.batch_size // world  # images a process and step
    mine = slice(rank * n, (rank + 1) * n)  # its rows of the global batch
    micro_batches = max(1, n // args.bn_batch)
    candidates = 2 * args.batch_size - 1 if args.end_to_end else 1 + args.queue_size  # one of which is the positive
    row_source = row_order(train_set, world, args.workers, args.shuffle_window)

    def rows_from(step):
        return train_rows(train_set, args.batch_size, args.seed, step, rank, world, args.workers, args.shuffle_window)

    # ---- encoders and queue: equal on every process, since their seed and their updates are
    torch.manual_seed(args.seed)
    query_encoder = build_encoder(args.arch, args.dim, args.head, args.stem).to(memory_format=torch.channels_last)
    for module in query_encoder.modules():
        if isinstance(module, nn.BatchNorm2d):  # running statistics look back over equally many steps on any hardware
            module.momentum = 0.1 / micro_batches
    if not args.end_to_end:
        key_encoder = copy.deepcopy(query_encoder).requires_grad_(False).to(device)
        queue = KeyQueue(args.queue_size, args.dim, torch.Generator().manual_seed(args.seed)).to(device)
    if args.bn_batch > n:
        query_encoder = nn.SyncBatchNorm.convert_sync_batchnorm(query_encoder)
    optimizer = {"sgd": torch.optim.SGD, "lars": LARS}[args.optimizer](
        query_encoder.parameters(), args.lr, momentum=args.sgd_momentum, weight_decay=args.weight_decay
    )
    query_encoder, optimizer = accelerator.prepare(query_encoder, optimizer)
    unwrapped = accelerator.unwrap_model(query_encoder, keep_torch_compile=False)  # to evaluate and to save
    dynamo = accelerator.state.dynamo_plugin  # accelerate launch --dynamo_backend compiles what is prepared
    if dynamo.backend != DynamoBackend.NO and not args.end_to_end:
        key_encoder.compile(**dynamo.to_kwargs())
    encoders = [unwrapped] if args.end_to_end else [unwrapped, key_encoder]
    augment = ViewAugment(args.augment)

    # ---- the run folder: start one, or go on with one
    checkpoints, metrics = args.output / "checkpoints", args.output / "metrics.jsonl"
    modules = {"query_encoder": unwrapped}
    if not args.end_to_end:
        modules |= {"key_encoder": key_encoder, "queue": queue}
    start, totals, undecodable = 0, {"steps": 0, "loss": 0.0, "correct": 0.0}, 0
    if args.resume:
        tensors, state = load_checkpoint(complete_checkpoints(checkpoints)[-1])
        if state["images"] != len(train_set):
            raise UserError(
                f"--data {args.data} has {len(train_set)} images, {args.output} was begun on {state['images']}"
            )
        for name, module in modules.items():
            module.load_state_dict(tensors[name])
        load_optimizer_tensors(optimizer, tensors["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        del tensors
        saved, totals, undecodable = state["step"], state["totals"], state["undecodable"]
        start = saved
        if state["rows"] != row_source:  # which images of this epoch were used is not known then
            start = saved // steps_per_epoch * steps_per_epoch
        if start < saved:
            totals, undecodable = {"steps": 0, "loss": 0.0, "correct": 0.0}, 0
    accelerator.wait_for_everyone()  # nobody writes before everybody has read
    if is_main:
        print_settings(args, len(train_set), world, micro_batches, candidates)
        if args.resume:
            trim_metrics(metrics, start)
            print(f"resume  after step {start}")
            if start < saved:
                print(
                    f"        not {saved}: files, processes, workers or window differ, so the epoch starts again in a"
                    " new order"
                )
        else:
            write_json(args.output / "args.json", vars(args) | {"output": str(args.output)} | provenance(world))
            metrics.write_text("")
            first_rows = next(rows_from(0))[0][:8]
            save_views(
                args.output / "views.png",
                train_set,
                first_rows,
                args.augment,
                args.image_size,
                args.batch_size,
                args.seed,
            )
        if not with_knn:
            no_labels = "no column of labels (whole numbers from 0 on), or several: name one with --label-column"
            print("kNN     off:", "--knn-every 0" if args.knn_every == 0 else no_labels)
        elif test_set is None:
            print("kNN     of training images held out, for there is no test set with labels")
    if args.tracker:
        accelerator.init_trackers("moco", config={name: str(value) for name, value in vars(args).items()})

    def log(line):
        if is_main:
            append_metrics(metrics, line)
        accelerator.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def save(step):
        if not check_equal_state(modules, accelerator):
            stop_diverged(accelerator, f"weights are not finite after step {step}", checkpoints)
        if is_main:  # all are equal, so one saves
            tensors = {name: module.state_dict() for name, module in modules.items()}
            state = {"images": len(train_set), "rows": row_source, "totals": totals, "undecodable": undecodable}
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
            save_checkpoint(checkpoints, step, tensors | {"optimizer": optimizer_tensors(optimizer)}, state, args.keep)
            save_curves(args.output / "curves.png", metrics, candidates)
        accelerator.wait_for_everyone()

    named = set()  # undecodable images, each printed once

    def measure_knn():
        accuracy, failed, images = knn_monitor(
            unwrapped, train_set, test_set, args.image_size, args.workers, accelerator
        )
        check_undecodable(name_undecodable(failed, named, accelerator), images, args.data)
        return {"knn": accuracy}

    stopping = catch_sigterm()
    if not args.resume and with_knn:
        log({"step": 0, "epoch": 0} | measure_knn())
    if not args.resume or start < saved:
        save(start)

    if start < total_steps:  # else workers would read for nothing
        batches = train_batches(train_set, args.image_size, args.seed, args.augment, rows_from(start), args.workers)
    timing = {"steps": 0, "seconds": 0.0, "data": 0.0}
    positive = torch.zeros(args.bn_batch, dtype=torch.long, device=device)  # the positive is column 0
    bar = tqdm(total=total_steps, initial=start, unit="step", disable=not is_main)
    for step in range(start, total_steps):
        started = time.perf_counter()
        views, failed = next(batches)  # (n, 2, S, S, 3) uint8
        timing["data"] += time.perf_counter() - started
        epoch = step // steps_per_epoch
        if args.schedule == "warmup-cosine":
            lr = warmup_cosine_rate(args.lr, step, args.warmup_epochs * steps_per_epoch, total_steps)
        else:
            lr = learning_rate(args.lr, epoch, args.epochs, args.schedule, (0.6 * args.epochs, 0.8 * args.epochs))
        for group in optimizer.param_groups:
            group["lr"] = lr
        params = sample_params(args.augment, args.batch_size, args.seed, step)
        params = {name: values[mine] for name, values in params.items()}
        query_images, key_images = augment(views.to(device, non_blocking=True), params)  # (n, 3, S, S) each

        if not args.end_to_end:
            # ---- a training step of MoCo: Algorithm 1 of the paper
            momentum_update(query_encoder, key_encoder, args.encoder_momentum)
            order = shuffle_order(args.seed, step, args.batch_size)
            all_keys = encode_keys(key_encoder, key_images, order, args.bn_batch, accelerator)  # keys: (batch, C)
            groups = zip(query_images.split(args.bn_batch), all_keys[mine].split(args.bn_batch), strict=True)
            total_loss, correct = 0, 0
            for i, (images, keys) in enumerate(groups):
                with nullcontext() if i == micro_batches - 1 else accelerator.no_sync(query_encoder):
                    q = F.normalize(query_encoder(images), dim=1)  # queries: (bn_batch, C)
                    logits = contrastive_logits(q, keys, queue.keys, args.temperature)  # (bn_batch, 1 + K)
                    loss = F.cross_entropy(logits, positive) / micro_batches
                    accelerator.backward(loss)  # gradients add up; the last micro-batch averages them over processes
                total_loss += loss.detach()
                correct += (logits.argmax(dim=1) == 0).sum()
            optimizer.step()
            optimizer.zero_grad()
            queue.enqueue(all_keys)
        else:
            # ---- a training step of SimCLR: every view is a query, the batch is the queue, keys have gradients, too
            groups = zip(query_images.split(args.bn_batch), key_images.split(args.bn_batch), strict=True)
            pairs = [F.normalize(query_encoder(torch.cat(group)), dim=1).chunk(2) for group in groups]
            first, second = (gather_with_gradient(torch.cat(z), accelerator) for z in zip(*pairs))  # (batch, C) each
            logits, positives = nt_xent_logits(first, second, args.temperature)  # (2 batch, 2 batch - 1)
            loss = F.cross_entropy(logits, positives)
            accelerator.backward(loss * world)  # x world: DDP averages the processes' parts of a sum
            optimizer.step()
            optimizer.zero_grad()
            correct = (logits.argmax(dim=1) == positives).sum() / (2 * world)  # of two views, counted by every process
            total_loss = loss.detach()
        average_statistics(encoders, accelerator)

        # ---- what every process must know; to read it is the step's only wait for the device
        told = torch.stack([total_loss, correct, *total_loss.new_tensor([len(failed), len(stopping)])])
        told = accelerator.gather(told[None]).tolist()  # a row a process
        for process, (process_loss, *_) in enumerate(told):
            if not math.isfinite(process_loss):
                what = f"the loss is {process_loss} at step {step} on process {process}"
                stop_diverged(accelerator, what, checkpoints)
        loss_sum, correct_sum, failures, stop = (sum(column) for column in zip(*told, strict=True))
        if failures:
            undecodable += name_undecodable(failed, named, accelerator)
            check_undecodable(undecodable, len(train_set), args.data)
        totals["steps"] += 1
        totals["loss"] += loss_sum / world
        totals["correct"] += correct_sum
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
                "loss": totals["loss"] / totals["steps"],
                "accuracy": 100 * totals["correct"] / (totals["steps"] * args.batch_size),
                "lr": lr,
                "undecodable": undecodable,  # in this epoch
                "images_per_second": timing["steps"] * args.batch_size / timing["seconds"],
                "data_seconds": timing["data"],
                "data_share": timing["data"] / timing["seconds"],
            }
            totals, timing = {"steps": 0, "loss": 0.0, "correct": 0.0}, {"steps": 0, "seconds": 0.0, "data": 0.0}
            bar.set_postfix_str(
                f"loss {line['loss']:.2f}, accuracy {line['accuracy']:.1f} %, {line['images_per_second']:.0f} images/s,"
                f" {line['data_share']:.0%} waiting for data"
            )
            if with_knn and epoch_ends and ((epoch + 1) % args.knn_every == 0 or done == total_steps):
                line |= measure_knn()
            log(line)
        if epoch_ends:
            undecodable = 0
        if done % args.checkpoint_every == 0 or done == total_steps or stop:
            save(done)
        if stop:
            finish(accelerator, 143, f"SIGTERM: stopped after step {done}, which is saved; go on with --resume")
    bar.close()
    release_sigterm(stopping)

    # ---- what the run leaves
    if is_main:
        settings = json.loads((args.output / "args.json").read_text())
        tag = ("" if args.end_to_end else "moco_") + args.recipe.replace("-", "_")
        save_backbone(args.output / "backbone", unwrapped, args.arch, args.image_size, tag, settings)
        print(f"backbone, views.png and curves.png are in {args.output}")
        if with_knn:
            scores = {line["step"]: line["knn"] for line in read_metrics(metrics) if "knn" in line}
            for step, what in ((total_steps, "kNN accuracy"), (0, "of the random backbone at the start")):
                if step in scores:
                    print(f"{what} {scores[step]:.1f} %")
        if args.push_to_hub:
            print(push_backbone(args.output, args.push_to_hub))
    accelerator.end_training()


if __name__ == "__main__":
    with one_line_errors():
        main()
