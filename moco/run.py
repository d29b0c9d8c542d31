"""What every script does about its flags and its run folder: refuse what cannot work, resume what was begun, stop."""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from moco.checkpoint import complete_checkpoints
from moco.errors import UserError

PATIENCE = timedelta(hours=3)  # with a process that downloads, retries the Hub or evaluates; else 10 minutes
BACKBONE_HELP = (
    "a run folder, a .safetensors file, USER/NAME on the Hub, an official MoCo .pth.tar,"
    " ResNet50_Weights.IMAGENET1K_V1 (torchvision's supervised weights), or 'random'"
)


def flag_parser(usage, description):
    """A parser that takes flags only in full, and reports a mistake in one line, as UserError."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {usage}",
        description=description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120),
        allow_abbrev=False,
    )

    def fail(message):
        raise UserError(message)

    parser.error = fail
    return parser


def given_flags(parser):
    """The flags as given so far, for defaults to follow from; --help waits until these are set."""
    return parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])[0]


def parse_resumed(parser, output, free):
    """The flags of the run in `output`, which those given now must equal but for the names in `free`.

    Raises UserError where there is no run to go on with, or a flag differs.
    """
    if not (output / "args.json").exists() or not complete_checkpoints(output / "checkpoints"):
        raise UserError(
            f"--output {output} has no complete checkpoint in checkpoints/ to go on from; name the folder of a run,"
            " or begin one without --resume and --evaluate"
        )
    saved = json.loads((output / "args.json").read_text())
    if saved.get("script", parser.prog) != parser.prog:
        raise UserError(f"--output {output} holds a run of {saved['script']}; name one of {parser.prog}")
    begun = vars(parser.parse_args()).keys() & saved.keys() - {"output", "resume", "evaluate"}
    parser.set_defaults(**{name: saved[name] for name in begun})
    args = parser.parse_args()
    args.output = output
    for name in sorted(begun - free):
        value = getattr(args, name)
        if value != saved[name]:
            raise UserError(
                f"{as_flag(name, value)} cannot resume {output}, which has {as_flag(name, saved[name])};"
                " leave the flag out, or start a new run with another --output"
            )
    return args


def default_output(backbone, data, name):
    """RUN/name where the backbone is of a run folder, there publishing looks for results; else a folder in runs/."""
    if (Path(backbone) / "args.json").exists():
        return Path(backbone) / name
    return Path("runs") / f"{name}-{re.sub(r'[^A-Za-z0-9.-]+', '-', backbone).strip('-.')}-{Path(data).resolve().name}"


def as_flag(name, value):
    """A flag as it is given on the command line."""
    return f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def check_limits(values, limits):
    """Raise UserError at the first flag outside its limits.

    values: {flag's name in Python: value}. limits: {name: (whether its value is good, the limit in words)}.
    """
    for name, (good, limit) in limits.items():
        if not good:
            raise UserError(f"{as_flag(name, values[name])} must be {limit}")


def check_output(output, goes_on):
    """Make the run folder. Raises UserError where it cannot be written, or holds a run and this one does not go on."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error}); name another folder") from error
    left = [file for file in ("backbone/model.safetensors", "results.json") if (output / file).exists()]
    if not goes_on and (complete_checkpoints(output / "checkpoints") or left):
        raise UserError(f"--output {output} holds another run; add --resume to go on with it, or name another folder")


def nearest_multiples(value, unit):
    """The multiples of `unit` next to a number that is none, as a remedy to name."""
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below} or {above}" if below else f"{above}"


def start_accelerator(mixed_precision, **options):
    """The Accelerator of a script. Raises UserError for a device or a precision that cannot work.

    Buffers are not sent before each forward pass: they are equal by construction, or averaged after it.
    """
    # The flag's successor is not in every torch that this runs on.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated")  # Accelerate's call
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=PATIENCE)]
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers, **options)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed-precision fp16 needs a GPU; use bf16 or no")
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda" and not fast_bf16():
        raise UserError("--mixed-precision bf16 needs a GPU since Ampere; use fp16 or no")
    if accelerator.device.type == "mps":
        raise UserError("Apple's GPUs have no float64, which is needed here; set ACCELERATE_USE_CPU=true")
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1 and torch.get_num_threads() == 1
    if alone and "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by accelerate launch, which leaves it one thread
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return accelerator


def fast_bf16():
    """Whether bfloat16 makes this machine faster: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def catch_sigterm():
    """A list that grows with each SIGTERM from now on, in place of the process's end."""
    came = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    return came


def release_sigterm(came):
    """Let SIGTERM end the process again, after the last step, when all is saved; one that came since ends it now."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if came:
        signal.raise_signal(signal.SIGTERM)


def stop_diverged(accelerator, what, checkpoints):
    """Stop every process where numbers are no longer finite. The checkpoint kept may be diverging already."""
    kept = ", ".join(map(str, complete_checkpoints(checkpoints)[-1:])) or "nothing"
    message = f"{what}: the run diverged; start anew with a lower --lr and another --output ({kept} is kept)"
    finish(accelerator, 1, message)


def finish(accelerator, code, message):
    """Stop every process with this exit code, saying why once."""
    if accelerator.is_main_process:
        print(message, file=sys.stderr)
    accelerator.end_training()
    sys.exit(code)
