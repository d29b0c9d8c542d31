"""Command-line flags: limits stand beside each flag, mistakes are one line, and a resumed run remembers its flags."""

import argparse
import errno
import fcntl
import os
import re
import socket
import sys
import tempfile
from pathlib import Path

import huggingface_hub
from accelerate import PartialState
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from moco.data import shapes
from moco.encoder import check_arch
from moco.errors import UserError, explained
from moco.jsonfile import reading_json
from moco.run.checkpoint import complete_checkpoints
from moco.run.launch import cores_of_process

LOCKS = []  # open files of locked run folders, which are locked as long as they are open
BACKBONE_HELP = (
    "a run folder, a .safetensors file, USER/NAME on the Hub, an official MoCo .pth.tar,"
    " ResNet50_Weights.IMAGENET1K_V1 (torchvision's supervised weights), or 'random'"
)


# ---- types for argparse: numbers within limits


def limited(kind, is_valid, limit):
    """An argparse type: a number of `kind` (int or float) that passes `is_valid`; `limit` describes the valid range."""

    def number(text):
        value = kind(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{value} must be {limit}")
        return value

    number.__name__ = kind.__name__  # argparse says "invalid int value" when `kind` itself fails
    return number


def folder(text):
    """An argparse type: the path of a folder to write to."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} must be the name of a folder")
    return Path(text)


def architecture(text):
    """An argparse type: a name that `moco.encoder.build_encoder` knows."""
    try:
        check_arch(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def at_least(low):
    """An argparse type for integers of at least `low`."""
    return limited(int, lambda value: value >= low, f"at least {low}" if low else "0 or more")


LARGEST = 1e9  # no rate, temperature or weight decay is anywhere near it
positive = limited(float, lambda value: 0 < value <= LARGEST, f"a number above 0 and at most {LARGEST:g}")
not_negative = limited(float, lambda value: 0 <= value <= LARGEST, f"a number from 0 to {LARGEST:g}")
finite = limited(float, lambda value: abs(value) <= LARGEST, f"a number from -{LARGEST:g} to {LARGEST:g}")
below_one = limited(float, lambda value: 0 <= value < 1, "at least 0 and below 1")
seed = limited(int, lambda value: 0 <= value < 2**63, "at least 0 and below 2^63")


# ---- flags that several scripts have


def add_data_flags(add):
    """The flags of `moco.data.load.load_splits`, which `data_options` hands to it, and those of how it is read."""
    add("--image-column", metavar="NAME", help="column of images, if the data has several")
    add("--label-column", metavar="NAME", help="column of labels, if the data has several")
    add("--config", metavar="NAME", help="configuration of a dataset on the Hub, if it has several")
    add("--split", metavar="NAME", help="to train on [train, or the first]")
    add("--revision", metavar="REV", help="branch, tag or commit of a dataset on the Hub [its main branch]")
    add("--no-streaming", action="store_true", help="download parquet files of the Hub, then read those")
    add("--cache", metavar="FOLDER", help="keep what is streamed there, for later epochs and runs [off]")
    add("--cache-gb", type=positive, metavar="GB", help="of --cache at most [all but a tenth of the disk]")
    add(
        "--shuffle-window",
        type=at_least(1),
        metavar="ROWS",
        help="of a stream, shuffled at a time [800, and 4 row groups]",
    )
    add_workers_flag(add)


def add_pixel_flags(add):
    """What images are normalised with, for `moco.data.arrays.normalization`."""
    units = {"nargs": "+", "metavar": "V", "help": "of each channel [ImageNet's, or measured where these do not fit]"}
    add("--mean", type=finite, **units)
    add("--std", type=positive, **units)


def data_options(args):
    """The flags of `add_data_flags` as keyword arguments of `load_splits`.

    args.data_commit is not a flag: USER/NAME@COMMIT that was read when a run began, or None.
    """
    names = ("image_column", "label_column", "revision", "config", "split", "no_streaming", "cache", "cache_gb")
    return {name: getattr(args, name) for name in names} | {"commit": args.data_commit}


def add_workers_flag(add):
    workers = min(16, cores_of_process())
    add("--workers", type=at_least(0), metavar="N", default=workers, help="data workers per process")


def add_run_flags(add, checkpoint_every, log_every, default):
    """The flags of a run. default: what its folder is if --output does not say."""
    add("--output", type=folder, metavar="FOLDER", help=f"run folder [{default}]")
    add("--resume", action="store_true", help="continue from the newest complete checkpoint in --output")
    often = {"type": at_least(1), "metavar": "STEPS"}
    add("--checkpoint-every", **often, default=checkpoint_every, help="also at the end and on SIGTERM")
    add("--keep", type=at_least(1), metavar="N", default=2, help="checkpoints to keep")
    add("--log-every", **often, default=log_every, help="between lines of metrics.jsonl")
    add("--push-to-hub", metavar="USER/NAME", help="publish the backbone at the end, with what was measured")
    add("--license", metavar="NAME", help="of the published weights, such as mit; the card names none without it")


def run_options(args):
    """The flags of `add_run_flags` as keyword arguments of `moco.run.run.Run`."""
    names = ("checkpoint_every", "keep", "resume", "evaluate")
    return {"settings": vars(args)} | {name: getattr(args, name) for name in names if name in args}


def add_backbone_flags(add):
    """Where a backbone comes from, for `moco.backbone.load_backbone`."""
    add("--backbone", metavar="SOURCE", help=BACKBONE_HELP)
    add("--arch", type=architecture, metavar="ARCH", help="[as the backbone says; random: train_moco.py's default]")
    add("--encoder", choices=("query", "key"), default="query", help="key: the momentum encoder")


# ---- parsing


class HelpFormatter(argparse.HelpFormatter):
    """Shows each flag's default in brackets, unless its help already has brackets or there is no default."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=120)

    def _get_help_string(self, action):
        is_switch = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help if is_switch or "[" in action.help else f"{action.help} [%(default)s]"


def flag_parser(usage, description):
    """A parser that accepts only full flag names and raises mistakes as a one-line UserError."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {usage}", description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )

    def fail(message):
        if message.startswith("argument "):  # "argument --keep: 0 must be ..." -> "--keep 0 must be ..."
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        raise UserError(message)

    parser.error = fail
    return parser


def parse_early(parser):
    """The flags with the defaults so far, because other defaults depend on them; --help waits for the final parse."""
    return parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])[0]


def parse_resumed(parser, output, free):
    """The flags of the run in folder `output`. Flags given now must agree with them, except for the names in `free`.

    Raises UserError if there is no run to continue, or a flag differs.
    """
    if not complete_checkpoints(output / "checkpoints"):
        raise UserError(
            f"--output {output} has no complete checkpoint in checkpoints/ to continue from; name the folder of a run,"
            " or start a new run without --resume and --evaluate"
        )
    remedy = "restore it, or start a new run"
    with reading_json(output / "args.json", remedy) as saved:
        script = saved.get("script", parser.prog)
        if script != parser.prog:
            raise UserError(f"--output {output} holds a run of {script}; name the folder of a {parser.prog} run")
        shapes.check_version(saved, "shapes")
        begun = vars(parser.parse_args()).keys() & saved.keys() - {"output", "resume", "evaluate"}
        flags = {action.dest: saved[action.dest] for action in parser._actions if action.dest in begun}
        words = [word for name, value in flags.items() for word in saved_words(parser, name, value)]
        try:  # as if they were typed, so that they are within their limits
            typed = vars(parser.parse_args(words))
        except UserError as error:
            raise ValueError(error) from error
        for name, value in flags.items():
            if typed[name] != value:
                raise ValueError(f"{name} is {value!r:.60}")
    parser.set_defaults(**{name: saved[name] for name in begun | ({"data_version"} & saved.keys())})  # it is not a flag
    args = parser.parse_args()
    args.output = output
    for name in sorted(begun - free):
        value = getattr(args, name)
        if value != saved[name]:
            now, then = (" ".join(as_words(name, each)) for each in (value, saved[name]))
            raise UserError(
                f"{now} cannot resume {output}, which has {then}; leave the flag out, or start a new run with another"
                " --output"
            )
    return args


def as_words(name, value):
    """A flag as it is typed on the command line, a list of words."""
    values = value if isinstance(value, list) else [] if value is True else [value]
    words = (f" {each}" if str(each).startswith("-") else str(each) for each in values)  # or -1e-05 would be a flag
    return [f"--{name.replace('_', '-')}", *words]


def saved_words(parser, name, value):
    """A flag of args.json as words. None is left out, and so is False unless argparse made a --no-name for it."""
    if value is False:
        no = f"--no-{name.replace('_', '-')}"
        return [no] if no in parser._option_string_actions else []
    return [] if value is None else as_words(name, value)


# ---- rules that several scripts share


def default_output(backbone, data, name):
    """RUN/name if the backbone comes from a run folder, where publishing looks for results; else a folder in runs/."""
    if (Path(backbone) / "args.json").exists():
        return Path(backbone) / name
    return Path("runs") / f"{name}-{re.sub(r'[^A-Za-z0-9.-]+', '-', backbone).strip('-.')}-{Path(data).resolve().name}"


def check_output(args):
    """Create the run folder, and lock it until the process ends. args: the flags, of `add_run_flags`.

    Raises UserError if it is not writable, is used by another process, has to do with a folder of data, or holds a run
    that this one does not continue; and if the user may not push to the Hub, but wants to in the end.
    """
    output, data = args.output, args.data
    if args.license and not args.push_to_hub:
        raise UserError(f"--license {args.license} is for --push-to-hub, which is missing: add it, or leave this out")
    if args.push_to_hub and PartialState().is_main_process:
        try:
            check_push(args.push_to_hub)
        except UserError as error:  # a run that is under way is worth more than its push, which can be made later
            if not args.resume:
                raise
            print(f"note    {error}")
    if Path(data).is_dir():
        there, here = Path(data).resolve(), output.resolve()
        if there == here or there in here.parents or here in there.parents:
            raise UserError(
                f"--output {output} and --data {data} are one folder, or one lies in the other: a run's pictures would"
                " become data; name another --output"
            )
    check_writable(output, f"--output {output}", "name another folder")
    if PartialState().is_main_process:
        lock(output)
    left = [file for file in ("backbone/model.safetensors", "results.json") if (output / file).exists()]
    if (
        not args.resume
        and not getattr(args, "evaluate", False)
        and (complete_checkpoints(output / "checkpoints") or left)
    ):
        raise UserError(f"--output {output} holds another run; add --resume to continue it, or name another folder")


def check_writable(folder, what, remedy):
    """Create a folder. Raises UserError, which names `what` and the remedy, unless files can be written there."""
    with explained(f"{what} cannot be written", remedy, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def lock(folder):
    """Lock a run folder for this process. The lock goes with the process, however it ends.

    Raises UserError that names the process which holds it.
    """
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by data workers, which may outlive the process
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # as some cluster's file systems have no locks
            print(f"note    --output {folder} cannot be locked ({error.strerror}): start no second run in it")
            return
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(
            f"--output {folder} is used by {holder}; wait for it, stop it, or name another folder", alone=True
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    LOCKS.append(file)


def check_memory(needs):
    """Raise UserError for sizes that this machine's memory does not hold. needs: {flags: bytes that they take}."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for what, size in needs.items():
        if size > memory:
            raise UserError(f"{what} would take {size / 1e9:.3g} GB, but this machine has {memory / 1e9:.3g}; lower it")


def check_push(name):
    """Raise UserError before a run whose push to `name` at its end could not succeed without a login."""
    later = "`hf auth login`, or leave the flag out and `python -m moco.backbone push` when the run is done"
    with (
        explained(f"--push-to-hub {name}: the Hub refuses your login or cannot be reached", later),
        explained(
            f"--push-to-hub {name}", "name USER/NAME, and `hf auth login`", HFValidationError, LocalTokenNotFoundError
        ),
    ):
        huggingface_hub.utils.validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("it lacks the user or organisation")
        huggingface_hub.HfApi().whoami()


def check_batch(batch_size, processes, part_flag=None, part=1):
    """Raise UserError unless the batch divides into processes, and there into parts of --part-flag `part` images."""
    unit = processes * part
    if batch_size % unit:
        below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
        divisor = f"{processes} processes" + (f" x {part_flag} {part}" if part_flag else "")
        raise UserError(
            f"--batch-size {batch_size} is not divisible by {divisor}; use --batch-size"
            f" {f'{below} or {above}' if below else above}" + (f", or another {part_flag}" if part_flag else "")
        )
