"""Pre-train an image backbone: MoCo v1 (arXiv:1911.05722), MoCo v2 (arXiv:2003.04297), or SimCLR (arXiv:2002.05709).

accelerate launch train_moco.py --data shapes          the built-in data, minutes on two CPU cores
accelerate launch train_moco.py                        the paper's MoCo v2: ResNet-50, ImageNet, 200 epochs
accelerate launch train_moco.py --output RUN --resume  continue RUN where it stopped
accelerate launch --config_file accelerate_config.yaml train_moco.py --data FOLDER --recipe v1
accelerate launch train_moco.py --recipe simclr        the end-to-end counterpart that MoCo is compared with
"""

import copy
import math
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded; keeps CPU threads from blocking each other

import torch
import torch.nn.functional as F
from accelerate.tracking import get_available_trackers
from torch import nn

from moco.augment import AUGMENTATIONS
from moco.backbone import save_backbone
from moco.backbone.monitor import monitor
from moco.backbone.publish import push_backbone
from moco.backbone.start import load_start, read_start, start_in_words
from moco.contrast import KeyQueue, contrastive_logits, gather_with_gradient, nt_xent_logits
from moco.data import shapes
from moco.data.arrays import normalization
from moco.data.labels import has_labels, monitor_test_set
from moco.data.load import check_trainable, load_splits
from moco.data.order import Order
from moco.data.views import FastViews
from moco.encoder import average_batchnorm, batchnorm_in_words, build_encoder, momentum_update, sync_batchnorm
from moco.errors import UserError, one_line_errors
from moco.run import flags
from moco.run.checkpoint import read_metrics
from moco.run.flags import architecture, at_least, below_one, not_negative, positive, seed
from moco.run.launch import (
    compile_options,
    device_in_words,
    optimizer_in_words,
    provenance,
    rates_in_words,
    start_accelerator,
)
from moco.run.memory import micro_batch
from moco.run.pictures import save_curves, save_views
from moco.run.run import Run
from moco.schedule import LARS, rate_at
from moco.shuffle import encode_keys, shuffle_order

# The rows of the papers' ablation, and SimCLR. Each entry is the default of the flag with its name.
RECIPES = {
    "v1": {"head": "fc", "augment": "v1", "temperature": 0.07, "schedule": "step"},
    "v1-mlp": {"head": "mlp", "augment": "v1", "temperature": 0.2, "schedule": "step"},
    "v1-aug": {"head": "fc", "augment": "v2", "temperature": 0.07, "schedule": "step"},
    "v1-mlp-aug": {"head": "mlp", "augment": "v2", "temperature": 0.2, "schedule": "step"},
    "v2": {"head": "mlp", "augment": "v2", "temperature": 0.2, "schedule": "cosine"},
    "simclr": {
        "head": "mlp", "augment": "simclr", "temperature": 0.1, "schedule": "warmup-cosine", "optimizer": "lars",
        "weight_decay": 1e-6, "lr": None, "bn_batch": None,  # `follow_batch` sets these two
        "simclr": True,  # no flag: every view is a query, so there is neither a queue nor a key encoder
    },
}  # fmt: skip


def follow_batch(args):
    """Set what follows from the batch unless it was given: SimCLR's learning rate, and its one BatchNorm over all."""
    args.lr = 0.3 * args.batch_size / 256 if args.lr is None else args.lr
    args.bn_batch = args.bn_batch or args.batch_size


# What --data shapes changes, so that two CPU cores finish in minutes.
SHAPES = {
    "data_version": shapes.VERSION, "arch": "resnet10", "image_size": 32, "queue_size": 512, "encoder_momentum": 0.998,
    "epochs": 20, "batch_size": 128, "bn_batch": 64, "lr": 0.015, "workers": 1, "checkpoint_every": 230,
}  # fmt: skip
# What a resumed run may change. Its numbers depend on everything else.
FREE_ON_RESUME = {
    "output", "resume", "data", "no_streaming", "cache", "cache_gb", "workers", "shuffle_window", "micro_batch", "keep",
    "checkpoint_every", "log_every", "knn_every", "tracker", "push_to_hub", "license",
}  # fmt: skip


def moco_step(
    query_encoder,
    key_encoder,
    queue,
    optimizer,
    views,
    shuffle,
    accelerator,
    *,
    temperature,
    encoder_momentum,
    images_per_pass,
):
    """A training step of MoCo: Algorithm 1 of arXiv:1911.05722, with shuffled BatchNorm.

    views: this process's query and key images, (n, channels, S, S) each; N = n x processes is the global batch.
    shuffle: (N,), the permutation in which keys are encoded. images_per_pass: images of a forward pass; divides n.
    Returns the loss and the accuracy in percent (how often the positive scores highest) of this process's images.
    """
    query_images, key_images = views
    momentum_update(query_encoder, key_encoder, encoder_momentum)
    keys = encode_keys(key_encoder, key_images, shuffle, images_per_pass, accelerator)  # of all processes: (N, C)
    own_keys = keys.chunk(accelerator.num_processes)[accelerator.process_index]  # (n, C)
    passes, total_loss, correct = len(query_images) // images_per_pass, 0, 0
    for images, k in micro_batches(query_encoder, accelerator, images_per_pass, query_images, own_keys):
        q = F.normalize(query_encoder(images), dim=1)  # queries: (images_per_pass, C)
        logits = contrastive_logits(q, k, queue.keys, temperature)  # (images_per_pass, 1 + K)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # the positive is column 0
        loss = F.cross_entropy(logits, labels) / passes
        accelerator.backward(loss)
        total_loss += loss.detach()
        correct += (logits.argmax(dim=1) == labels).sum()
    optimizer.step()
    optimizer.zero_grad()
    queue.enqueue(keys)
    average_batchnorm((query_encoder, key_encoder), accelerator)
    return total_loss, 100 * correct / len(query_images)


def micro_batches(encoder, accelerator, size, *tensors):
    """Parts of `size` rows of each tensor. Their gradients add up; only the last backward pass syncs processes."""
    parts = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
    for part in parts[:-1]:
        with accelerator.no_sync(encoder):
            yield part
    yield parts[-1]


def simclr_step(encoder, optimizer, views, accelerator, *, temperature, bn_batch):
    """A training step of SimCLR: Algorithm 1 of arXiv:2002.05709. Every view is a query, and the batch is the queue.

    views: as for `moco_step`. bn_batch: images that share BatchNorm statistics, with both of their views.
    Returns the loss and the accuracy in percent, both over the global batch.
    """
    groups = zip(*(view.split(bn_batch) for view in views), strict=True)
    pairs = [F.normalize(encoder(torch.cat(group)), dim=1).chunk(2) for group in groups]
    first, second = (gather_with_gradient(torch.cat(z), accelerator) for z in zip(*pairs))  # (N, C) each
    logits, labels = nt_xent_logits(first, second, temperature)  # (2N, 2N - 1), (2N,)
    loss = F.cross_entropy(logits, labels)
    accelerator.backward(loss * accelerator.num_processes)  # each process has a part of the sum, which DDP divides
    optimizer.step()
    optimizer.zero_grad()
    average_batchnorm((encoder,), accelerator)
    return loss.detach(), 100 * (logits.argmax(dim=1) == labels).float().mean()


def main():
    args = parse_args()
    accelerator = start_accelerator(args, log_with=args.tracker, project_dir=args.output)
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    check_args(args, world, device.type)
    start = read_start(args, accelerator)

    # ---- data
    train_set, test_set = load_splits(args.data, **flags.data_options(args))
    args.data, args.data_commit = train_set.name or args.data, train_set.commit
    check_trainable(train_set, args.batch_size, args.data)
    test_set = monitor_test_set(train_set, test_set, args.data)  # without one the monitor holds training images out
    order = Order(args.batch_size, args.seed, rank, world, args.workers, args.shuffle_window)
    steps_per_epoch = len(train_set) // args.batch_size
    args.mean, args.std = normalization(train_set, args.mean, args.std)
    views = FastViews(AUGMENTATIONS[args.augment], args.image_size, args.mean, args.std, compile_options(accelerator))
    args.mean, args.std = views.mean or args.mean, views.std or args.std  # evaluations normalise as the views do
    check_batches(args, views.check(train_set), order.share)

    # ---- encoders, queue and optimizer
    parts = build_encoders(args, start, train_set.channels, order.share, accelerator)
    query_encoder, key_encoder, queue, optimizer = parts
    model = nn.ModuleDict({"query_encoder": accelerator.unwrap_model(query_encoder, keep_torch_compile=False)})
    model.update({} if args.simclr else {"key_encoder": key_encoder, "queue": queue})  # all that a run must keep
    if args.simclr:  # a pass for each BatchNorm group, whose activations are kept until all are made
        pass_size = min(order.share, args.bn_batch)
        memory = "; --micro-batch has no effect" if args.micro_batch else ""
    else:
        fit, memory = micro_batch(args.micro_batch, query_encoder, train_set.channels, args.image_size, accelerator)
        pass_size = images_per_pass(order.share, args.bn_batch, fit)
    logits_of_query = 2 * args.batch_size - 1 if args.simclr else 1 + args.queue_size  # chance is their logarithm

    # ---- the run
    if is_main:
        passes = order.share // pass_size
        print_settings(args, views.name, model, train_set, test_set, optimizer, passes, memory, world, logits_of_query)
        train_set.print_order(order)
    total_steps = args.epochs * steps_per_epoch
    run = Run(args.output, accelerator, model, optimizer, train_set, order, total_steps, **flags.run_options(args))
    if args.tracker:
        accelerator.init_trackers("moco", config={name: str(value) for name, value in vars(args).items()})

    def evaluation():
        with run.paused_for("knn"):
            options = (args.image_size, args.mean, args.std, args.workers, accelerator, views, args.output, run.done)
            numbers, failed, images = monitor(model["query_encoder"], train_set, test_set, *options)
            run.check_decoded(failed, images)
        return numbers

    def draw_curves():
        chance = math.log(logits_of_query)
        levels = {"loss": (chance, f"chance, log({logits_of_query}) = {chance:.2f}")}
        save_curves(args.output / "curves.png", run.metrics, levels)

    if run.unlogged or (args.knn_every and not args.resume):  # a signal stopped an evaluation; or before training
        run.log((run.unlogged or {"step": 0, "epoch": 0}) | (evaluation() if args.knn_every else {}))

    # ---- training
    batches = run.timed(views.batches(train_set, order, run.done))
    for step in run.steps():
        for group in optimizer.param_groups:  # each may have a learning rate of its own
            base_lr = group.setdefault("initial_lr", group["lr"])
            group["lr"] = rate_at(base_lr, step, steps_per_epoch, args.epochs, args.schedule, args.warmup_epochs)

        crops, _ = next(batches)
        images = views.on_device(crops, order, step, device)  # (n, channels, S, S) for queries, and for keys
        if args.simclr:
            loss, accuracy = simclr_step(
                query_encoder, optimizer, images, accelerator, temperature=args.temperature, bn_batch=args.bn_batch
            )
        else:
            shuffle = shuffle_order(args.seed, step, args.batch_size)
            loss, accuracy = moco_step(
                query_encoder, key_encoder, queue, optimizer, images, shuffle, accelerator,
                temperature=args.temperature, encoder_momentum=args.encoder_momentum, images_per_pass=pass_size,
            )  # fmt: skip
        run.record(loss=loss, accuracy=accuracy)

        if is_main and step == 0:
            with run.paused_for("picture"):
                save_views(args.output / "views.png", images, views.mean, views.std)
        if run.due(args.log_every) or run.due(steps_per_epoch):
            line = run.averages(lr=optimizer.param_groups[0]["lr"])
            if args.knn_every and run.due(args.knn_every * steps_per_epoch):
                line |= evaluation()
            run.log(line)
        if is_main and run.due(max(1, args.epochs // 10) * steps_per_epoch) and run.done < total_steps:
            with run.paused_for("picture"):
                draw_curves()

    # ---- results
    if is_main:
        draw_curves()
        leave_results(args, views.name, model["query_encoder"], run.metrics, world)
    accelerator.end_training()


def build_encoders(args, start, channels, share, accelerator):
    """(query encoder, key encoder, queue, optimizer): equal on every process, because their seed and updates are.

    start: weights of --init, or None. channels: of an image. share: images of a process in a step. The query encoder
    and its optimizer are prepared by Accelerate. SimCLR has neither a key encoder nor a queue; they are None.
    """
    torch.manual_seed(args.seed)
    bn_batch = None if args.simclr else args.bn_batch  # simclr_step makes a pass of each group
    query_encoder = build_encoder(args.arch, args.dim, args.head, args.stem, bn_batch, args.image_size, channels)
    if start is not None:
        load_start(query_encoder, start, args)
    query_encoder.to(memory_format=torch.channels_last)
    for module in query_encoder.modules():
        if isinstance(module, nn.BatchNorm2d):  # each group of a step updates the running statistics in turn
            module.momentum = 0.1 / max(1, share // args.bn_batch)
    key_encoder = queue = None
    if not args.simclr:
        key_encoder = copy.deepcopy(query_encoder).requires_grad_(False).to(accelerator.device)
        queue = KeyQueue(args.queue_size, args.dim, torch.Generator().manual_seed(args.seed)).to(accelerator.device)
    if args.bn_batch > share:
        query_encoder = sync_batchnorm(query_encoder)
    # A fused optimizer reads the weights once. Not under fp16: if the first step is skipped, its momentum stays unset.
    # None rather than False, which would also turn off PyTorch's next best, foreach.
    fused = (accelerator.device.type == "cuda" and accelerator.mixed_precision != "fp16") or None
    optimizer = {"sgd": partial(torch.optim.SGD, fused=fused), "lars": LARS}[args.optimizer](
        query_encoder.parameters(), args.lr, momentum=args.sgd_momentum, weight_decay=args.weight_decay
    )
    query_encoder, optimizer = accelerator.prepare(query_encoder, optimizer)
    compiled = compile_options(accelerator)  # Accelerate compiles what it prepares
    if compiled is not None and key_encoder is not None:
        key_encoder.compile(**compiled)
    return query_encoder, key_encoder, queue, optimizer


def images_per_pass(share, bn_batch, micro_batch):
    """How many of a process's `share` of images go through an encoder at once.

    Whole BatchNorm groups, a divisor of `share`, and at most `micro_batch` images unless a single group is larger.
    """
    groups = max(1, share // bn_batch)
    sizes = [share // passes for passes in range(1, groups + 1) if groups % passes == 0]
    return next(size for size in sizes if size <= max(micro_batch, bn_batch))


def leave_results(args, augment, query_encoder, metrics, processes):
    """Save the backbone, print the last numbers, and publish it if asked to. augment: the name of the views."""
    tag = ("" if args.simclr else "moco_") + args.recipe.replace("-", "_")
    settings = vars(args) | {"augment": augment} | provenance(processes)
    made_for = (args.arch, args.image_size, tag, settings, args.mean, args.std)
    save_backbone(args.output / "backbone", query_encoder, *made_for)
    print(f"backbone, views.png and curves.png are in {args.output}")
    print_knn(read_metrics(metrics), args.init_from["name"] if args.init_from else "the random backbone")
    if args.push_to_hub:
        print(push_backbone(args.output, args.push_to_hub, license=args.license))


def print_knn(lines, start):
    """Print the last kNN accuracy of a log, and that of the `start` if it was measured before the first step."""
    if scores := {line["step"]: line["knn"] for line in lines if "knn" in line}:
        print(f"kNN accuracy {scores[max(scores)]:.1f} %")
        if 0 in scores:
            print(f"of {start} at the start {scores[0]:.1f} %")


# ---- flags


def parse_args():
    """The flags. Later defaults override earlier ones: those below, then --data shapes, the recipe, the resumed run."""
    parser = flags.flag_parser("[flags]", __doc__.split("\n\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--data", default="ILSVRC/imagenet-1k", help="'shapes', a folder, or USER/NAME on the Hub")
    flags.add_data_flags(add)
    add("--image-size", type=at_least(16), metavar="PIXELS", default=224, help="side of a view")
    flags.add_pixel_flags(add)
    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", choices=RECIPES, default="v2", help="row of the ablation, or simclr; sets defaults")
    add("--head", choices=("fc", "mlp"), help="projection head")
    add("--augment", choices=AUGMENTATIONS, help="v2: with blur; simclr: stronger colours, smaller crops too")
    add("--temperature", type=positive, metavar="T", help="of the softmax over similarities")
    add("--schedule", choices=("cosine", "step", "warmup-cosine"), help="step: lr / 10 at 60 %% and 80 %% of the run")
    add("--optimizer", choices=("sgd", "lars"), default="sgd", help="[%(default)s; simclr: lars]")
    add = parser.add_argument_group("encoders and queue").add_argument
    add("--arch", type=architecture, metavar="ARCH", default="resnet50", help="ResNet of torchvision, or timm/NAME")
    add("--stem", choices=("imagenet", "small"), default="imagenet", help="small: 3x3 convolution, no pooling")
    add("--dim", type=at_least(1), metavar="C", default=128, help="width of queries and keys")
    add("--queue-size", type=at_least(1), metavar="K", default=65536, help="keys to keep [%(default)s; simclr: none]")
    add("--init", metavar="SOURCE", help="start from this backbone: what linear_probe.py's --backbone takes [random]")
    add("--init-head", action="store_true", help="also from its projection head, which must fit --head and --dim")
    add("--encoder-momentum", type=below_one, metavar="M", default=0.999, help="of the key encoder")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=at_least(1), metavar="N", default=200, help="passes over the data")
    add("--batch-size", type=at_least(1), metavar="N", default=256, help="images in a step, over all processes")
    add("--bn-batch", type=at_least(2), metavar="N", default=32, help="sharing BatchNorm [%(default)s; simclr: all]")
    add("--micro-batch", type=at_least(1), metavar="N", help="images in a pass [GPU: what fits; CPU: a million pixels]")
    add("--lr", type=positive, metavar="LR", default=0.03, help="not scaled [%(default)s; simclr: 0.3 x batch / 256]")
    add("--warmup-epochs", type=at_least(0), metavar="N", default=10, help="of schedule warmup-cosine")
    add("--sgd-momentum", type=below_one, metavar="M", default=0.9, help="of the optimizer")
    add("--weight-decay", type=not_negative, metavar="W", default=1e-4, help="[%(default)s; simclr: 1e-6]")
    add("--seed", type=seed, metavar="N", default=0, help="of weights, queue, order and augmentation")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="[as accelerate launch says]")
    add = parser.add_argument_group("run").add_argument
    flags.add_run_flags(add, checkpoint_every=1000, log_every=10, default="runs/RECIPE-DATA")
    add("--knn-every", type=at_least(0), metavar="EPOCHS", default=10, help="between evaluations, 0 for none")
    add("--tracker", choices=("tensorboard", "wandb"), metavar="NAME", help="log to tensorboard or wandb, too")
    parser.set_defaults(simclr=False, data_commit=None, init_from=None, **RECIPES["v2"])  # for --help to show

    early = flags.parse_early(parser)
    parser.set_defaults(**(SHAPES if early.data == "shapes" else {}))
    parser.set_defaults(**RECIPES[early.recipe], **({"arch": None, "stem": None} if early.init else {}))
    args = parser.parse_args()
    if args.output is None:
        args.output = Path("runs") / f"{args.recipe}-{Path(args.data).resolve().name}"
    if args.resume:
        args = flags.parse_resumed(parser, args.output, FREE_ON_RESUME)
    follow_batch(args)
    return args


def check_args(args, processes, device_type):
    """Raise UserError for flags that do not go together, before anything is read or written."""
    if args.schedule == "warmup-cosine" and args.warmup_epochs >= args.epochs:
        raise UserError(f"--warmup-epochs {args.warmup_epochs} must be below the {args.epochs} epochs")
    if args.tracker not in (None, *map(str, get_available_trackers())):
        raise UserError(f"--tracker {args.tracker} must be installed: pip install {args.tracker}")
    if processes > 1 and args.simclr and args.bn_batch == args.batch_size:  # one BatchNorm over all processes
        flags.check_batch(args.batch_size, processes)
        if device_type == "cpu":
            raise UserError(
                f"--bn-batch {args.bn_batch} over {processes} processes needs SyncBatchNorm, which runs on GPUs only;"
                f" use --bn-batch {args.batch_size // processes}"
            )
    else:
        flags.check_batch(args.batch_size, processes, "--bn-batch", args.bn_batch)
    flags.check_memory({f"--queue-size {args.queue_size} x --dim {args.dim}": 4 * args.queue_size * args.dim})
    flags.check_output(args)


def check_batches(args, crops, share):
    """Raise UserError for batches that memory does not hold. crops: of one image, as a data worker leaves them.

    share: images of a process in a step.
    """
    batch = share * sum(crop.nbytes for crop in crops)
    floats = 4 * share * sum(crop.numel() for crop in crops)  # as they are on the training device
    flags.check_memory(
        {
            f"--batch-size {args.batch_size} views of --image-size {args.image_size}": floats,
            f"--workers {args.workers} with two batches each": args.workers * 2 * batch,
        }
    )


def print_settings(args, augment, model, train_set, test_set, optimizer, passes, memory, processes, logits_of_query):
    """What the run will do, in the papers' terms. passes: through the encoder, of a process in a step.

    augment: the name of the views. memory: what they were chosen by, in words, or "".
    """
    steps, n = len(train_set) // args.batch_size, args.batch_size // processes // passes
    stem = "" if args.arch.startswith("timm/") else f"{args.stem} stem, "
    norms = batchnorm_in_words(model["query_encoder"], args.bn_batch)
    moco = f", encoder momentum {args.encoder_momentum}, queue of {args.queue_size} keys"
    filling = f"; lower for {-(-args.queue_size // args.batch_size)} steps, while the queue fills"
    labelled, every = has_labels(train_set), args.knn_every
    split = "test images" if test_set else "held-out training images" if labelled else "training images"
    no_labels = "" if labelled else "; kNN off: no integer label column, or several: choose one with --label-column"
    seen = f"{'kNN, ' * labelled}rank, uniformity and alignment every {every} epochs, on {split}"
    print(
        f"recipe  {args.recipe}: {args.head} head, {augment} augmentation, temperature {args.temperature}",
        f"model   {args.arch}, {stem}{args.dim} dimensions" + ("" if args.simclr else moco),
        *([f"init    {start_in_words(args.init_from)}"] if args.init_from else []),
        f"data    {args.data}: {len(train_set)} images at {args.image_size} pixels, {steps} steps an epoch",
        f"batch   {args.batch_size} = {processes} processes x {passes} passes x {n} images; BatchNorm: {norms}"
        + memory,
        f"train   {args.epochs} epochs, lr {rates_in_words(optimizer)} {args.schedule},"
        f" {optimizer_in_words(optimizer)}, mixed precision {args.mixed_precision}",
        f"device  {device_in_words(args.workers)}",
        f"loss    chance is log({logits_of_query}) = {math.log(logits_of_query):.2f}"
        + ("" if args.simclr else filling),
        "monitor " + (seen + no_labels if every else "off"),
        f"output  {args.output}",
        sep="\n",
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
