"""What a script needs around its run: Accelerate on the right device and threads, patience, signals, provenance."""

import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin

from moco.errors import UserError

# How long a process waits for the others. In a step one of them may retry the Hub for 25 minutes (moco/data/hub.py);
# downloads and evaluations take longer.
STEP_PATIENCE, LONG_PATIENCE = timedelta(minutes=40), timedelta(hours=3)
CAUGHT = []  # signals that asked this process to stop, since `catch_signals`
# What `accelerate launch` can ask for that cuts up the model, and with it the modules that a run saves.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}  # fmt: skip


class Stopped(Exception):
    """A signal ended an evaluation between two of its batches, on all processes. `number` is the signal's."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def start_accelerator(args, **options):
    """The Accelerator of a script, whose precision is then in args. Raises UserError for a device that cannot do it.

    DDP does not broadcast buffers before each forward pass: they are equal by construction, or averaged after it.
    """
    # Not every torch that this supports has the flag's successor.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated")  # Accelerate's call
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise UserError(f"{variable} asks for {name}, which is not supported; launch plain processes, as with DDP")
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8" and args.mixed_precision is None:
        raise UserError("mixed precision fp8 is not supported; use bf16, fp16 or no")
    # A step is a step: the steps average over micro-batches themselves. Without the plugin Accelerate would divide the
    # loss by ACCELERATE_GRADIENT_ACCUMULATION_STEPS.
    options["gradient_accumulation_plugin"] = GradientAccumulationPlugin(num_steps=1)
    handlers = [
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),  # one copy of gradients
        InitProcessGroupKwargs(timeout=LONG_PATIENCE),
    ]
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=handlers, **options)
    check_slurm(accelerator.num_processes)
    args.mixed_precision, device = accelerator.mixed_precision, accelerator.device.type
    if args.mixed_precision == "fp16" and device == "cpu":
        raise UserError("--mixed-precision fp16 needs a GPU; use bf16 or no")
    no_bf16 = device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if args.mixed_precision == "bf16" and no_bf16:
        raise UserError("--mixed-precision bf16 needs an Ampere GPU or newer; use fp16 or no")
    if device == "mps":
        raise UserError("Apple's GPUs have no float64, which is needed here; use `accelerate launch --cpu`")
    if device == "cpu" and not threads_were_chosen():
        torch.set_num_threads(cores_of_process())
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    return accelerator


def compile_options(accelerator):
    """What `accelerate launch --dynamo_backend ...` says for torch.compile, or None where nothing is to be compiled."""
    dynamo = accelerator.state.dynamo_plugin
    return None if dynamo.backend == DynamoBackend.NO else dynamo.to_kwargs()


def check_slurm(processes):
    """Raise UserError if srun started several tasks that do not know of each other: each would be a run of its own."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if processes == 1 and tasks > 1:
        raise UserError(
            f"srun started {tasks} separate processes, because this script does not read SLURM's variables; start one"
            " `accelerate launch` on each node, as in docs/reproducibility.md (or `unset SLURM_STEP_NUM_TASKS` if"
            " separate runs are what you want)"
        )


def cores_of_process():
    """This process's share of the machine's cores that it may use, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def device_in_words(workers):
    """What a process runs on, for the settings that are printed at the start."""
    device = PartialState().device
    if device.type == "cuda":
        words = f"{torch.cuda.get_device_name(device)}, {workers} data workers per process"
        slow = AcceleratorState().mixed_precision == "no" and torch.cuda.is_bf16_supported(including_emulation=False)
        return words + ("\n        float32; this GPU is much faster with --mixed-precision bf16" if slow else "")
    return f"{device.type} with {torch.get_num_threads()} threads, {workers} data workers per process"


def optimizer_in_words(optimizer):
    """The class and the settings of an optimizer as it runs, without its learning rate, which a schedule sets."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # as Accelerate wraps it
    shown = {name: value for name, value in optimizer.defaults.items() if name != "lr" and value not in (None, False)}
    words = [f"{name.replace('_', ' ')} {value}" for name, value in shown.items()]
    return f"{type(optimizer).__name__} with " + ", ".join(words)


def rates_in_words(optimizer):
    """The learning rates that the parameter groups of an optimizer begin with, each once."""
    return " and ".join(dict.fromkeys(f"{group['lr']:g}" for group in optimizer.param_groups))


def threads_were_chosen():
    """Whether the user set OMP_NUM_THREADS. Launchers set it as well, to 1 unless they were told another number."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return "OMP_NUM_THREADS" in os.environ
    try:
        launcher = Path(f"/proc/{os.getppid()}")
        given = b"\0OMP_NUM_THREADS=" in b"\0" + (launcher / "environ").read_bytes()
        return given or b"--num_cpu_threads_per_process" in (launcher / "cmdline").read_bytes()
    except OSError:  # no /proc
        return os.environ.get("OMP_NUM_THREADS") not in (None, "1")


def set_patience(timeout):
    """How long collectives wait for other processes from now on."""
    if torch.distributed.is_initialized():
        set_timeout = getattr(torch.distributed, "set_timeout", None)  # older torch has it under a private name only
        (set_timeout or torch.distributed.distributed_c10d._set_pg_timeout)(timeout)


def catch_signals():
    """Collect SIGTERM and Ctrl-C in CAUGHT from now on, instead of ending the process. A second Ctrl-C ends it.

    Launchers pass a Ctrl-C on to processes that had it from the terminal already: one within a second is the same.
    """
    CAUGHT.clear()
    first = time.monotonic()

    def handle(number, frame):
        nonlocal first
        if number == signal.SIGINT and number in CAUGHT and time.monotonic() - first > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        first = time.monotonic() if number not in CAUGHT else first
        CAUGHT.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def stoppable(batches, accelerator):
    """The items of a sized iterable of an evaluation. Between two of them a signal to any process stops all of them.

    Each process has items of its own; those with fewer keep in step with the others until all are done, by a number
    that all exchange for each item. Raises Stopped.
    """
    items = iter(batches)
    for i in range(largest_of_all(len(batches), accelerator)):
        if number := largest_of_all(max(CAUGHT, default=0), accelerator):
            raise Stopped(number)
        if i < len(batches):
            yield next(items)


def largest_of_all(number, accelerator):
    """The largest of a whole number of each process. One process alone knows it, and need not wait for its device."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def release_signals():
    """Let the signals end the process again, now that all is saved; one that came since the last step ends it now."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if CAUGHT:
        signal.signal(CAUGHT[0], signal.SIG_DFL)
        signal.raise_signal(CAUGHT[0])


def provenance(processes):
    """What made a run: script, versions, this repository's commit if there is one, and the number of processes."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    names = ("torch", "torchvision", "accelerate", "datasets")
    return {
        "script": Path(sys.argv[0]).name,
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names},
        "commit": commit,
        "processes": processes,
    }
