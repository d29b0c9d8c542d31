"""How good are the features? A linear classifier on a frozen backbone, and kNN (arXiv:1911.05722, section 4.1).

accelerate launch linear_probe.py --data shapes --backbone runs/v2-shapes      the built-in data, minutes on two cores
accelerate launch linear_probe.py --backbone runs/v2-imagenet-1k               the paper's protocol, on ImageNet
accelerate launch linear_probe.py --backbone USER/NAME --lr 3 10 30 100        four classifiers in the one pass
accelerate launch linear_probe.py --backbone USER/NAME --cached-features --knn minutes instead of hours, approximate
accelerate launch linear_probe.py --output RUN/linear_probe --resume           continue where it stopped
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded; keeps CPU threads from blocking each other

import torch
import torch.nn.functional as F
from torch import nn

from moco.augment import normalize, to_float
from moco.backbone import load_backbone
from moco.backbone.features import Features
from moco.backbone.publish import public_name
from moco.backbone.save import push_loaded
from moco.data import shapes
from moco.data.arrays import normalization
from moco.data.batches import CachedFeatures, labelled_crops, loader
from moco.data.decode import check_undecodable
from moco.data.labels import count_classes
from moco.data.load import check_trainable, load_splits
from moco.data.order import Order, batch_rows
from moco.encoder import average_tensors, feature_width
from moco.errors import UserError, one_line_errors
from moco.jsonfile import write_json
from moco.knn import default_k, knn_evaluate
from moco.run import flags
from moco.run.checkpoint import weights_digest
from moco.run.flags import at_least, below_one, not_negative, positive, seed
from moco.run.launch import device_in_words, optimizer_in_words, provenance, start_accelerator
from moco.run.run import Run
from moco.schedule import rate_at

# What --data shapes changes, so that two CPU cores finish in minutes.
SHAPES = {"data_version": shapes.VERSION, "image_size": 32, "epochs": 20, "workers": 1, "checkpoint_every": 115}
HELD_OUT, HELD_OUT_SHARE = 10_000, 0.1  # training images that choose among several --lr: at most, and share at most
# What a resumed run may change. Its numbers depend on everything else.
FREE_ON_RESUME = {
    "output", "resume", "evaluate", "backbone", "data", "no_streaming", "cache", "cache_gb", "workers",
    "shuffle_window", "keep", "checkpoint_every", "evaluate_every", "log_every", "knn", "knn_temperature",
    "push_to_hub", "license",
}  # fmt: skip


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


def probe_step(classifiers, optimizer, features, labels, accelerator):
    """One step of each classifier on this process's features (n, width) and labels (n,).

    Returns each classifier's loss and accuracy in percent over these images before the step, (classifiers,) each.
    """
    logits = classifiers(features)
    losses = torch.stack([F.cross_entropy(each, labels) for each in logits])
    accelerator.backward(losses.sum())  # no classifier's loss depends on another's weights
    if accelerator.num_processes > 1:  # averaged by hand: DDP would be another wrapper for these few tensors
        average_tensors([parameter.grad for parameter in classifiers.parameters()], accelerator)
    optimizer.step()
    optimizer.zero_grad()
    return losses.detach(), 100 * count_correct(logits, labels)[:, 0] / len(labels)


@torch.no_grad()
def top_accuracies(features, classifiers, dataset, accelerator):
    """Top-1 and top-5 of each classifier in percent, [[top1, top5], ...], over every image of the dataset, once.

    features: Features. The processes share the images out and add up counts, so that none is padded or dropped. Also
    returns this process's undecodable images as (name, reason).
    """
    _, mine = features.share(dataset, range(len(dataset)))
    correct = torch.zeros(len(classifiers.heads), 2, dtype=torch.long, device=accelerator.device)
    undecodable = []
    for _, inputs, labels, failed in features.batches(dataset, mine):
        correct += count_correct(classifiers(inputs), labels)
        undecodable += failed
    return (100 * accelerator.reduce(correct, "sum").double() / len(dataset)).tolist(), undecodable


def main():
    args = parse_args()
    accelerator = start_accelerator(args)
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    check_args(args, world)

    # ---- data
    with accelerator.local_main_process_first():  # one process per machine downloads or draws, the others find it there
        backbone, known = load_backbone(args.backbone, args.arch, args.encoder, args.seed, args.image_size)
        shapes.check_version(known.get("settings", {}), args.data)
    sets = load_sets(args)
    args.data, args.data_commit = sets.train.name or args.data, sets.train.commit
    check_trainable(sets.train, args.batch_size, args.data)
    order = Order(args.batch_size, args.seed, rank, world, args.workers, args.shuffle_window)
    steps_per_epoch = len(sets.train) // args.batch_size

    # ---- backbone and classifiers, equal on every process, because their seed and their updates are
    args.image_size = args.image_size or known.get("image_size", 224)
    backbone, known = for_channels(args, backbone, known, sets.train.channels)
    mean, std = normalization(sets.train, known.get("mean"), known.get("std"))
    width = feature_width(backbone, args.image_size, known["channels"])
    digest = weights_digest(backbone.state_dict())
    # In eval mode BatchNorm uses the statistics it was trained with and does not update them. In training mode it
    # would change the very features that are measured, even without gradients.
    backbone = backbone.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    classifiers = LinearClassifiers(width, sets.classes, len(args.lr), args.seed).to(device)
    optimizer = accelerator.prepare(build_optimizer(classifiers, args.lr, args.sgd_momentum, args.weight_decay))

    # ---- the run
    if is_main:
        print_settings(args, known["arch"], width, sets, optimizer, world)
        sets.train.print_order(order)
    model, total_steps = nn.ModuleDict({"classifiers": classifiers}), args.epochs * steps_per_epoch
    run = Run(
        args.output, accelerator, model, optimizer, sets.train, order, total_steps, backbone_sha256=digest,
        finite=False,  # of several classifiers some may diverge while others learn
        **flags.run_options(args),
    )  # fmt: skip
    frozen = Features(backbone, args.image_size, mean, std, args.workers, accelerator)

    def accuracies_on(dataset):
        accuracies, failed = top_accuracies(frozen, classifiers, dataset, accelerator)
        run.check_decoded(failed, len(dataset))
        return accuracies

    def evaluation():
        with run.paused_for("evaluation"):
            top1, top5 = map(list, zip(*accuracies_on(sets.test)))
        return {"top1": top1, "top5": top5}

    # ---- training
    if run.unlogged:
        run.log(run.unlogged | evaluation())
    batches = run.timed(training_batches(args, frozen, digest, sets.train, order, run))
    for step in run.steps():
        for group in optimizer.param_groups:  # one for each classifier
            base_lr = group.setdefault("initial_lr", group["lr"])
            group["lr"] = rate_at(base_lr, step, steps_per_epoch, args.epochs, "step")
        (inputs,), labels = next(batches)  # crops (n, S, S, C), or cached features (n, width) float16
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if args.cached_features:
            features = inputs.float()
        else:
            with torch.no_grad(), accelerator.autocast():
                features = backbone(normalize(to_float(inputs), mean, std)).float()
        losses, accuracies = probe_step(classifiers, optimizer, features, labels, accelerator)
        run.record(loss=losses, accuracy=accuracies)  # a number for each classifier

        if run.due(args.log_every) or run.due(steps_per_epoch):
            line = run.averages(lr=[group["lr"] for group in optimizer.param_groups])
            if run.due(args.evaluate_every * steps_per_epoch) and run.done < run.total_steps:
                line |= evaluation()
            run.log(line)

    # ---- results
    results = probe_results(args.lr, accuracies_on(sets.test), sets.held_out and accuracies_on(sets.held_out))
    if args.knn is not None:
        results |= knn_results(args, frozen, sets, run)
    measured = weights_digest(backbone.state_dict())  # of the weights that these are results of
    if is_main:
        about = {"backbone": args.backbone, "arch": known["arch"], "encoder": args.encoder, "backbone_sha256": measured}
        results = about | described(args, sets, run) | results | {"frozen": measured == digest} | provenance(world)
        write_json(args.output / "results.json", results)
        print_results(results, args.output / "results.json")
    check_frozen(backbone, measured == digest, args.output)
    if is_main and args.push_to_hub:
        print(push_loaded(args.output, args.backbone, backbone, known, args.push_to_hub, args.license))
    accelerator.end_training()


def check_frozen(backbone, unchanged, output):
    """Raise UserError if a backbone that nobody trained is not the one that the probe began with."""
    if not unchanged and not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise UserError(
            f"the backbone changed while it was probed, although none of its parameters is trained; the results in"
            f" {output} are of the changed one; keep it in eval mode, where BatchNorm leaves its statistics alone"
        )


def for_channels(args, backbone, known, channels):
    """The backbone and what is known of it, if it takes images of so many channels; a random one is drawn anew."""
    if args.backbone == "random" and known["channels"] != channels:
        options = {"image_size": args.image_size, "channels": channels}
        backbone, known = load_backbone(args.backbone, args.arch, seed=args.seed, **options)
    if known["channels"] != channels:
        raise UserError(
            f"--backbone {args.backbone} takes images of {known['channels']} channels, and --data {args.data} has"
            f" {channels}; name another of the two"
        )
    return backbone, known


def training_batches(args, frozen, digest, train_set, order, run):
    """A loader of crops from where the run stands on, or with --cached-features of features, which are made first."""
    if not args.cached_features or run.done == run.total_steps:
        rows = train_set.training_rows(order, run.done)
        return loader(labelled_crops(train_set, args.image_size, args.seed), rows, args.workers)
    depends_on = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    failed, count = frozen.cache(args.output / "features", digest, train_set, run.origin["data"], depends_on)
    run.check_decoded(failed, len(train_set))
    check_undecodable(count, len(train_set), args.data)  # a cache from before names none
    return loader(CachedFeatures(args.output / "features"), batch_rows(len(train_set), order, run.done), workers=0)


class Sets(NamedTuple):
    """What the probe reads. held_out chooses among several --lr, or is None. bank: of kNN, however many --lr are."""

    train: Sequence
    held_out: Sequence | None
    test: Sequence
    bank: Sequence
    classes: int


def load_sets(args):
    """The Sets of --data. Raises UserError if there are too few images, or labels that a classifier cannot learn."""
    train, test = load_splits(args.data, **flags.data_options(args))
    classes = count_classes(train, test, args.data)
    if test is None:
        train, test = train.hold_out(max(1, len(train) // 5), b"validation", 0)
    bank, held_out = train, None
    if len(args.lr) > 1:
        count = min(HELD_OUT, int(HELD_OUT_SHARE * len(train)))
        if not count:
            raise UserError(f"--data {args.data} has {len(train)} images, too few to choose among several --lr")
        train, held_out = train.hold_out(count, b"held out", args.seed)
    return Sets(train, held_out, test, bank, classes)


def probe_results(lrs, accuracies, held_out):
    """The accuracies of all classifiers, and those of the chosen one: the best on held-out images, else the only one.

    accuracies: [(top1, top5), ...] on test images. held_out: the same on images held out of training, or None.
    """
    classifiers = [{"lr": lr, "top1": top1, "top5": top5} for lr, (top1, top5) in zip(lrs, accuracies, strict=True)]
    for classifier, (top1, _) in zip(classifiers, held_out or ()):
        classifier["held_out_top1"] = top1
    chosen = max(classifiers, key=lambda classifier: classifier.get("held_out_top1", 0))
    return {"classifiers": classifiers, **chosen}


def knn_results(args, frozen, sets, run):
    """kNN accuracies of the test images for each k of --knn."""
    features, labels, failed = frozen.all(sets.test, range(len(sets.test)))
    bank, bank_labels, bank_failed = frozen.bank(sets.bank, range(len(sets.bank)))
    run.check_decoded(failed + bank_failed, len(sets.test) + len(sets.bank))
    ks = args.knn or [default_k(len(sets.bank))]
    accuracies = knn_evaluate(
        features, labels, bank, bank_labels, sets.classes, ks, args.knn_temperature, run.accelerator
    )
    by_k = {str(k): accuracy for k, accuracy in accuracies.items()}
    return {"knn_temperature": args.knn_temperature, "knn": by_k}


def described(args, sets, run):
    """What was measured on, and how, for results.json."""
    data, on_hub = public_name(args.data)
    return {
        "data": data, "data_on_hub": on_hub, "classes": sets.classes, "train_images": len(sets.train),
        "held_out_images": len(sets.held_out or ()), "validation_images": len(sets.test),
        "approximate": args.cached_features, "epochs": run.total_steps // run.steps_per_epoch, "steps": run.total_steps,
        "undecodable": len(run.named), "settings": vars(args) | {"output": str(args.output)},
    }  # fmt: skip


# ---- flags and printing


def parse_args():
    """The flags. Later defaults override earlier ones: those below, then --data shapes, then the resumed run."""
    parser = flags.flag_parser("--backbone SOURCE [flags]", __doc__.split("\n\n")[0])
    flags.add_backbone_flags(parser.add_argument_group("backbone").add_argument)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="ILSVRC/imagenet-1k", help="'shapes', a folder, or USER/NAME on the Hub")
    flags.add_data_flags(add)
    add("--image-size", type=at_least(16), metavar="PIXELS", help="side of a crop [the backbone's, else 224]")
    add = parser.add_argument_group("classifier").add_argument
    add("--lr", type=positive, metavar="LR", nargs="+", default=[30.0], help="if several, all are trained at once [30]")
    add("--epochs", type=at_least(1), metavar="N", default=100, help="lr / 10 at 60 %% and 80 %% of them")
    add("--batch-size", type=at_least(1), metavar="N", default=256, help="images in a step, over all processes")
    add("--sgd-momentum", type=below_one, metavar="M", default=0.9, help="of the optimizer")
    add("--weight-decay", type=not_negative, metavar="W", default=0.0, help="of the optimizer")
    add("--cached-features", action="store_true", help="train on features of one fixed crop: fast, approximate")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="of the backbone [as accelerate launch says]")
    add("--seed", type=seed, metavar="N", default=0, help="of the weights, the order and the crops")
    add = parser.add_argument_group("kNN").add_argument
    add("--knn", type=at_least(1), metavar="K", nargs="*", help="also kNN with these K; without a K 200 or fewer")
    add("--knn-temperature", type=positive, metavar="T", default=0.07, help="of the votes")
    add = parser.add_argument_group("run").add_argument
    where = "linear_probe/ in the backbone's, or in runs/"
    flags.add_run_flags(add, checkpoint_every=5000, log_every=50, default=where)
    add("--evaluate", action="store_true", help="only evaluate the newest complete checkpoint in --output")
    add("--evaluate-every", type=at_least(1), metavar="EPOCHS", default=10, help="between tests; also at the end")

    parser.set_defaults(data_commit=None)
    early = flags.parse_early(parser)
    parser.set_defaults(**(SHAPES if early.data == "shapes" else {}))
    args = parser.parse_args()
    if args.output is None and args.backbone is not None:
        args.output = flags.default_output(args.backbone, args.data, "linear_probe")
    if args.output is not None and (args.resume or args.evaluate):
        args = flags.parse_resumed(parser, args.output, FREE_ON_RESUME)
    if args.backbone is None:
        raise UserError("--backbone is missing: name a run folder, a file, USER/NAME on the Hub, or 'random'")
    if args.backbone == "random" and args.arch is None:
        args.arch = "resnet10" if args.data == "shapes" else "resnet50"
    return args


def check_args(args, processes):
    """Raise UserError for flags that do not go together, before anything is read or written."""
    if len(set(args.lr)) < len(args.lr):
        raise UserError(f"--lr {' '.join(map(str, args.lr))} has a value twice; name each once")
    flags.check_batch(args.batch_size, processes)
    flags.check_output(args)


def print_settings(args, arch, width, sets, optimizer, processes):
    """What the run will do, in the paper's terms."""
    images = len(sets.train)
    print(
        f"model   {args.backbone}: {arch}, {width} features, frozen; {len(args.lr)} linear classifiers",
        f"data    {args.data}: {images} images at {args.image_size} pixels, {sets.classes} classes,"
        f" {images // args.batch_size} steps an epoch",
        f"batch   {args.batch_size} over {processes} processes",
        f"device  {device_in_words(args.workers)}",
        f"train   {args.epochs} epochs, lr {' '.join(f'{lr:g}' for lr in args.lr)}, {optimizer_in_words(optimizer)},"
        f" mixed precision {args.mixed_precision}",
        f"test    {len(sets.test)} images"
        + (f"; {len(sets.held_out)} of training held out choose the lr" if sets.held_out else ""),
        f"output  {args.output}",
        sep="\n",
    )
    if args.cached_features:
        gigabytes = images * width * 2 / 1e9
        print(f"cache   features of one fixed crop of each image, {gigabytes:.1f} GB; the accuracy is approximate")


def print_results(results, path):
    """The accuracy of each classifier and of kNN. path: the file that holds them."""
    for classifier in results["classifiers"]:
        held = f", {classifier['held_out_top1']:.2f} % of training held out" if "held_out_top1" in classifier else ""
        print(f"lr {classifier['lr']:<6g} top-1 {classifier['top1']:.2f} %, top-5 {classifier['top5']:.2f} %{held}")
    for k, accuracy in results.get("knn", {}).items():
        print(f"kNN {k:<5} top-1 {accuracy['top1']:.2f} %, top-5 {accuracy['top5']:.2f} %")
    print(f"result  top-1 {results['top1']:.2f} % with lr {results['lr']:g}, in {path}")


if __name__ == "__main__":
    with one_line_errors():
        main()
