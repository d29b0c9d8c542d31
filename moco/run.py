"""What every script does about its flags and its run folder: refuse what cannot work, resume what was begun, stop."""

import sys
import tempfile

import torch

from moco.checkpoint import complete_checkpoints
from moco.errors import UserError


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
    if not goes_on and complete_checkpoints(output / "checkpoints"):
        raise UserError(f"--output {output} holds another run; add --resume to go on with it, or name another folder")


def check_unchanged(output, values, saved, free):
    """Raise UserError where a flag differs from that of the run in `output`, and what it changes is not in `free`.

    values, saved: {name: value} as given now and as kept in args.json. free: names that may differ.
    """
    for name in values.keys() - free:
        if values[name] != saved[name]:
            raise UserError(
                f"{as_flag(name, values[name])} cannot resume {output}, which has {as_flag(name, saved[name])};"
                " leave the flag out, or start a new run with another --output"
            )


def fast_bf16():
    """Whether bfloat16 makes this machine faster: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def finish(accelerator, code, message):
    """Stop every process with this exit code, saying why once."""
    if accelerator.is_main_process:
        print(message, file=sys.stderr)
    accelerator.end_training()
    sys.exit(code)
