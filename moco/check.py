"""Is my copy of train_moco.py still right? Two minutes on two CPU cores, on the built-in data.

python -m moco.check my_script.py [its flags]

Takes a few steps of the script in float64, where rounding cannot hide a difference: on one process, on two, and killed
and resumed. All must end with the same numbers. The script runs as it is, with the flags in DEFAULTS unless it is given
others; only its steps are cut, to four, and the images that `load_splits` gives it one by one, to two epochs of these.
Each fault is one line that says what to look at, and the exit code is then 1.
"""

import argparse
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

STEPS, KILLED_AFTER = 4, 3  # killed within the second epoch
MICRO_BATCH = 16  # images of a pass through the encoder on two processes; on one all go at once
STEPS_PER_EPOCH = 2  # so that what happens at its end is among them
INSIDE = "inside"  # in place of a script: this is a process of the check itself
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
TOLERANCE = 1e-9  # of float64 after a few steps, relative to the largest number of a tensor
LOADED = 1e-4  # of features after a way through a file in float32
DEFAULTS = {
    "--data": "shapes", "--batch-size": "64", "--bn-batch": "16", "--micro-batch": "64", "--queue-size": "256",
    "--workers": "1", "--knn-every": "0", "--log-every": "1",
}  # fmt: skip
LEGS = {  # what is run: (name, processes, whether it is killed, whether it is resumed)
    "one": ("one process", 1, False, False),
    "two": ("two processes, and more passes", 2, False, False),
    "killed": ("one process, to be killed", 1, True, False),
    "resumed": ("the killed run, resumed", 1, False, True),
}


class Fault(Exception):
    """A line that says what is wrong, and where to look."""


# ---- in the processes of the script


def run_script(script, killed, features, *flags):
    """Run a script in float64 for STEPS steps, and leave features of what it trained in a file for comparison."""
    import moco.data.load
    from moco.run.run import Run, untrained, untrained_in_words

    torch.set_default_dtype(torch.float64)
    torch.nn.modules.module.register_module_forward_pre_hook(as_weights)
    begin, loop, load, runs = Run.__init__, Run.steps, moco.data.load.load_splits, []
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--batch-size")

    def few_images(*args, **kwargs):
        train, test = load(*args, **kwargs)
        count = STEPS_PER_EPOCH * int(parser.parse_known_args(flags)[0].batch_size)
        if isinstance(train, moco.data.load.IndexedImages) and len(train) > count:
            train = train.select_rows(train.sample(count))
        return train, test

    def cut_begin(self, folder, accelerator, model, optimizer, images, order, total_steps, **options):
        options |= {"checkpoint_every": 1, "keep": STEPS + 1}
        runs.append(self)
        begin(self, folder, accelerator, model, optimizer, images, order, STEPS, **options)

    def cut_loop(self):
        for step in loop(self):
            if killed == "yes" and step == KILLED_AFTER:
                self.join_writer()
                os.kill(os.getpid(), 9)
            yield step

    Run.__init__, Run.steps, moco.data.load.load_splits = cut_begin, cut_loop, few_images
    sys.argv, sys.path[0] = [script, *flags], str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
    if names := untrained(runs[-1].modules, runs[-1].optimizer):
        sys.exit(f"error: {untrained_in_words(names)}")
    encoder = next((module for module in runs[-1].modules.values() if hasattr(module, "backbone")), None)
    if encoder is not None and os.environ.get("RANK", "0") == "0":
        with torch.no_grad():
            images, backbone = sample_images(runs[-1].settings), encoder.backbone.eval()
            save_file({"images": images, "features": backbone(images)}, features)


def as_weights(module, inputs):
    """Hand float32 images to a module of float64 weights as float64."""
    weights = next(module.parameters(recurse=False), None)
    if weights is not None and weights.dtype == torch.float64:
        return tuple(x.double() if torch.is_tensor(x) and x.dtype == torch.float32 else x for x in inputs)


def sample_images(settings):
    """Random images of the size and channels of a run. settings: those that the script handed to Run."""
    channels, size = len(settings.get("mean") or (0, 0, 0)), settings.get("image_size", 32)
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0))


# ---- in the process that compares


def launch(script, leg, folder, flags):
    """Run one of LEGS. Raises Fault with the script's last line if it ends otherwise than it should."""
    name, processes, killed, resumed = LEGS[leg]
    output = folder / ("killed" if resumed else leg)
    # Two processes also take their images in several passes, so that terms of the loss must be divided by these.
    words = [*flags, *(["--micro-batch", MICRO_BATCH] if processes > 1 else []), "--output", output]
    words += ["--resume"] if resumed else []
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [*starter, "-m", "moco.check", INSIDE, script, "yes" if killed else "no", folder / f"{leg}.safetensors"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *map(str, [*command, *words])], env=environment, capture_output=True, text=True
    )
    if done.returncode not in ((-9,) if killed else (0,)):
        lines = [line for line in done.stderr.splitlines() if line.strip() and "| " not in line]
        said = next(
            (line for line in lines if line.startswith("error:") or "Error: " in line), (lines or ["nothing"])[-1]
        )
        raise Fault(f"{name}: the script ended with exit code {done.returncode} and said: {said.strip()}")
    return output


def checkpoint(output, step):
    """{file and key: tensor} of a checkpoint."""
    files = sorted((output / "checkpoints" / f"step_{step}").glob("*.safetensors"))
    return {f"{file.stem}.{key}": tensor for file in files for key, tensor in load_file(file).items()}


def largest_difference(first, second):
    """(name, relative difference) of the tensor that differs most from its own in `second`.

    Relative to the largest number of the tensor. Raises Fault if the keys differ.
    """
    if first.keys() != second.keys():
        raise Fault(f"the checkpoints hold different tensors, such as {sorted(first.keys() ^ second.keys())[0]}")
    worst = ("nothing", 0.0)
    for name, tensor in first.items():
        difference = (tensor.double() - second[name].double()).abs().max().item() if tensor.numel() else 0.0
        relative = difference / max(tensor.double().abs().max().item(), 1e-12) if tensor.numel() else 0.0
        worst = max(worst, (name, relative), key=lambda entry: math.inf if math.isnan(entry[1]) else entry[1])
    return worst


def learned(tensors):
    """Those of a checkpoint without BatchNorm's statistics: two processes average theirs, one updates in turn."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(STATISTICS)}


def compare_processes(one, two):
    for step in range(1, STEPS + 1):
        name, difference = largest_difference(*(learned(checkpoint(output, step)) for output in (one, two)))
        if not difference <= TOLERANCE:
            raise Fault(
                f"one and two processes differ after step {step}, in {name} by {difference:.2g}: look for what is"
                " computed from this process's images alone, such as labels without the rank's offset, keys that are"
                " not gathered, a loss that is no mean over processes, or a term that is not divided by the passes;"
                " and for randomness that is not of the seed"
            )
    return f"one and two processes take equal steps (largest difference {difference:.1g})"


def compare_resumed(one, resumed):
    name, difference = largest_difference(checkpoint(one, STEPS), checkpoint(resumed, STEPS))
    if difference != 0:
        raise Fault(
            f"a killed and resumed run ends elsewhere, in {name} by {difference:.2g}: look for state that is in no"
            " module handed to Run, such as a scheduler's, and for views or other choices that draw from a global"
            " random state"
        )
    return "killed and resumed is the uninterrupted run, bit for bit"


def compare_trained(one):
    first, last = checkpoint(one, 0), checkpoint(one, STEPS)
    settings = json.loads((one / "args.json").read_text())
    trained = [name for name in first if not name.startswith("optimizer.") and not first[name].equal(last[name])]
    if not trained:
        raise Fault("no saved tensor changed in training: is the module that is trained the one that is handed to Run?")
    losses = [
        line["loss"] for line in map(json.loads, (one / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    levels = {math.log(1 + settings.get("queue_size", 0)), math.log(max(2, 2 * settings.get("batch_size", 1) - 1))}
    if any(abs(losses[-1] - level) < 1e-6 for level in levels) or len(set(losses)) == 1:
        raise Fault(
            f"the loss is {losses[-1]:.6f}, which is chance level or does not move: do all features collapse into one?"
        )
    return f"{len(trained)} saved tensors are trained; the loss is {losses[-1]:.3f}, and not at chance"


def compare_backbone(one, features):
    from moco.backbone import load_backbone

    if not features.exists():
        return "no module has a .backbone, so what is published was not compared"
    if not (one / "backbone" / "model.safetensors").exists():
        raise Fault(f"{one.name}: the script left no backbone/; does it still call save_backbone?")
    expected, backbone = load_file(features), load_backbone(str(one))[0].eval().double()
    with torch.no_grad():
        _, difference = largest_difference(
            {"features": expected["features"]}, {"features": backbone(expected["images"])}
        )
    if not difference <= LOADED:
        raise Fault(f"the saved backbone gives other features, by {difference:.2g}: is it the query encoder's?")
    return f"the backbone loads back with equal features (largest difference {difference:.1g})"


def main(script, *flags):
    given = [*(word for default in DEFAULTS.items() for word in default), *flags]  # of two values the last counts
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        folder, outputs = Path(folder), {}

        def leg(name):
            if name not in outputs:
                print(f"...     {LEGS[name][0]}", flush=True)
                outputs[name] = launch(script, name, folder, given)
            return outputs[name]

        checks = (
            lambda: compare_trained(leg("one")),
            lambda: compare_backbone(leg("one"), folder / "one.safetensors"),
            lambda: compare_processes(leg("one"), leg("two")),
            lambda: (leg("killed"), compare_resumed(leg("one"), leg("resumed")))[1],
        )
        for check in checks:
            try:
                print(f"ok      {check()}", flush=True)
            except Fault as fault:
                faults += 1
                print(f"FAULT   {fault}", flush=True)
                if "one" not in outputs:
                    break
    print(f"{script}: {f'{faults} fault' + 's' * (faults > 1) if faults else 'right'}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    if sys.argv[1:2] == [INSIDE]:
        run_script(*sys.argv[2:])
    elif len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
    elif not Path(sys.argv[1]).is_file():
        sys.exit(f"error: {sys.argv[1]} is not a file; name your copy of train_moco.py")
    else:
        main(*sys.argv[1:])
