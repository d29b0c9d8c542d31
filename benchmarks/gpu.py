"""Everything that only a GPU can show, in order of weight, in a few minutes: Markdown to paste into EXPERIMENTS.md.

python benchmarks/gpu.py --minutes 9                  ResNet-50, 224 pixels, batch 256
python benchmarks/gpu.py --minutes 9 --output FILE    continues FILE, whose parts are not run again
python benchmarks/gpu.py --tiny                       on a CPU, small, the first four parts

Correctness comes first, because wrong steps need no timing: a few steps of MoCo beside the CPU in float64, in every
precision and compiled, then a run that is killed and resumed, which also shows images/s, waits and kNN. Each part is a
process of its own, ends when the time is up, and is written down as soon as it is done.
"""

import argparse
import copy
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.step import DEVICE, alone, prepared
from moco.augment import AUGMENTATIONS, MEAN, STD, augment, augment_in_chunks, sample_params
from moco.contrast import KeyQueue
from moco.encoder import build_encoder
from moco.fused import compiled_augmentation
from moco.run.checkpoint import complete_checkpoints, read_metrics
from moco.run.launch import provenance
from moco.shuffle import shuffle_order
from train_moco import moco_step

ROOT = Path(__file__).parent.parent
STEP = "benchmarks/step.py --arch resnet50 --size 224 --batch 256 --queue-size 65536 --bn-batch 32 --rounds 5"
TINY = "--arch resnet10 --size 32 --queue-size 64 --rounds 1"
RESUMED = "benchmarks/gpu.py --resumed {folder}/shapes"
TINY_RUN = "--checkpoint-every 4 --image-size 16 --batch-size 500 --bn-batch 250"
PARTS = {  # heading: (command, the same small, for a CPU), both below the repository's root; most important first
    "Three steps beside the CPU in float64": ("benchmarks/gpu.py --steps",) * 2,
    "Training on the built-in data, killed and resumed": (RESUMED, f"{RESUMED} --tiny"),
    "Steps": (STEP, f"benchmarks/step.py {TINY} --batch 16 --bn-batch 8"),
    "Memory and hours by batch": (
        "benchmarks/cost.py --batches 32 256 1024", f"benchmarks/cost.py {TINY} --batches 32"
    ),
    "Steps, compiled": (f"{STEP} --compile", None),  # None: takes minutes on a CPU, and other tests run it
    "Linear probe": (
        "linear_probe.py --data shapes --backbone {folder}/shapes --cached-features --output {folder}/probe", None
    ),
    "The data path of one worker": ("benchmarks/data_path.py", None),
    "Detection": ("benchmarks/detector.py --arch resnet50 --image-size 800 --roi-batch 512", None),
    "The ladder, as far as the time goes": ("benchmarks/ablation.py --size gpu --seeds 0", None),
}  # fmt: skip


def steps_of(device, dtype, precision="float32", compiled=False):
    """The weights and statistics, one float64 vector, after three steps of a small MoCo on given images."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet10", dim=16, bn_batch=4).to(dtype)
    images = torch.randn(3, 2, 16, 3, 64, 64).to(dtype)  # in float64 it would draw others
    encoder = encoder.to(device, memory_format=torch.channels_last)
    key_encoder, queue = copy.deepcopy(encoder).requires_grad_(False), KeyQueue(64, 16).to(device, dtype)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1, momentum=0.9, fused=device.type == "cuda" or None)
    model = prepared(encoder, precision, compiled)
    for step, views in enumerate(images.to(device)):
        moco_step(
            model, key_encoder, queue, optimizer, views, shuffle_order(0, step, 16), alone(precision),
            temperature=0.2, encoder_momentum=0.9, images_per_pass=16,
        )  # fmt: skip
    state = [*encoder.state_dict().values(), *key_encoder.state_dict().values(), queue.keys]
    return torch.cat([value.detach().double().cpu().flatten() for value in state])


def compare_steps():
    """Print how far the device is from the CPU in float64. Exit with code 1 if float64 itself differs there."""
    expected = steps_of(torch.device("cpu"), torch.float64)
    print("| precision | largest difference of a number | of all, as a share of their norm |\n|---|---|---|")
    wrong = False
    for name, dtype, precision, tf32, compiled in (
        ("float64", torch.float64, "float32", False, False),
        ("float32", torch.float32, "float32", False, False),
        ("float32 with TF32", torch.float32, "float32", True, False),
        ("bfloat16", torch.float32, "bf16", True, False),
        ("float32, compiled", torch.float32, "float32", False, True),
    ):
        torch.backends.cudnn.allow_tf32 = tf32
        off = steps_of(DEVICE, dtype, precision, compiled) - expected
        print(f"| {name} | {off.abs().max():.2g} | {off.norm() / expected.norm():.2g} |")
        wrong = wrong or (dtype == torch.float64 and off.abs().max() > 1e-9)
    compare_views()
    sys.exit("float64 on the device is not float64 on the CPU" if wrong else 0)


def compare_views():
    """Print how far the views that the device's two ways make are from those of the CPU's."""
    crops = list(torch.randint(0, 256, (2, 64, 64, 64, 3), dtype=torch.uint8))
    params = sample_params(AUGMENTATIONS["v2"], 64, 0, 0)
    expected = torch.stack(augment(crops, params, MEAN, STD))
    for name, fill in (("an operation at a time", augment_in_chunks), ("compiled", compiled_augmentation())):
        views = torch.empty(2, 64, 64, 64, 3, device=DEVICE)
        fill(views, [crop.to(DEVICE, copy=True) for crop in crops], params, MEAN, STD)
        off = (views.permute(0, 1, 4, 2, 3).cpu() - expected).abs().max()
        print(f"\nviews, {name}: {off:.2g} at most from those of the CPU")


def train_resumed(output, *flags):
    """Train on the built-in data, killed on the way, and print how far the steps that are then taken again differ."""
    command = [sys.executable, "train_moco.py", "--data", "shapes", "--epochs", "1", "--log-every", "1"]
    command += ["--checkpoint-every", "10", "--knn-every", "1", "--output", output, *flags]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while run.poll() is None and len(unsaved_losses(output)) < 2:
        time.sleep(0.02)
    if run.poll() is not None:
        sys.exit("training ended before it could be killed")
    run.kill()
    run.wait()
    before = unsaved_losses(output)
    subprocess.run([*command, "--resume"], cwd=ROOT, check=True)
    after = {line["step"]: line.get("loss") for line in read_metrics(output / "metrics.jsonl")}
    off = max(abs(after[step] - loss) for step, loss in before.items())
    print(f"steps {min(before)} to {max(before)} were taken twice: their losses differ by {off:.2g} at most")


def unsaved_losses(output):
    """{step: loss} of what a run has logged since its last checkpoint; nothing where that is the one at its start."""
    last = max(
        (int(path.name.removeprefix("step_")) for path in complete_checkpoints(output / "checkpoints")), default=0
    )
    lines = read_metrics(output / "metrics.jsonl") if last else []
    return {line["step"]: line["loss"] for line in lines if line["step"] > last}


def where():
    """The device, its driver and the commit, for the head of the report."""
    made = provenance(1)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    driver = ""
    if DEVICE.type == "cuda":
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = f", driver {subprocess.run(ask, capture_output=True, text=True).stdout.splitlines()[0]}"
    return f"{device}{driver}, torch {torch.__version__}, commit {made['commit']}"


def run_part(command, seconds):
    """What a command prints, and its last line of errors if it fails or its time is up."""
    try:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as expired:
        return (expired.stdout or b"").decode() + f"\nstopped after {seconds:.0f} s\n"
    failed = f"\nfailed: {(done.stderr.strip().splitlines() or ['?'])[-1]}\n" if done.returncode else ""
    return done.stdout + failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.md"), help="report, continued [%(default)s]")
    parser.add_argument("--tiny", action="store_true", help="small, for a CPU")
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resumed", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps:
        return compare_steps()
    if args.resumed:
        return train_resumed(args.resumed, *(TINY_RUN.split() if args.tiny else ()))
    deadline = time.monotonic() + 60 * args.minutes
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not args.output.exists():
        args.output.write_text(f"# On a GPU\n\n{where()}\n")
    for heading, commands in PARTS.items():
        if f"\n## {heading}\n" in args.output.read_text() or commands[args.tiny] is None:
            continue
        left = deadline - time.monotonic()
        if left < 5:
            break
        command = commands[args.tiny].format(folder=args.output.resolve().parent).split()
        started = time.monotonic()
        text = run_part(command, left).strip()
        took = time.monotonic() - started
        with args.output.open("a") as report:
            fence = "" if text.startswith("|") else "```"
            report.write(f"\n## {heading}\n\n`python {' '.join(command)}`, {took:.0f} s\n\n{fence}\n{text}\n{fence}\n")
        print(f"{heading}: {took:.0f} s", flush=True)
    print(f"the report is in {args.output}")


if __name__ == "__main__":
    main()
