"""Save and resume a run: complete folders of safetensors and JSON, written so that a kill at any moment loses none."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from moco.errors import UserError, explained
from moco.jsonfile import DAMAGE, reading_json, sync, write_json

EVALUATION = ('"knn"', '"top1"', '"AP"')  # keys of metrics.jsonl that stand in few of its lines


def save_checkpoint(folder, step, tensors, state, keep):
    """Write folder/step_N, then remove the oldest complete checkpoints beyond `keep`, and any of later steps.

    tensors: {file name: {key: tensor}}, each a safetensors file. state: what JSON can hold.
    The folder appears under its name only once everything in it is on disk. Raises UserError if it cannot be
    written, on a full disk for example.
    """
    final, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    again = "make room, then continue with --resume"
    with explained(f"{final} cannot be written", again, OSError, SafetensorError, alone=True):
        for left_over in folder.glob(".step_*.partial"):  # of a kill while saving
            shutil.rmtree(left_over)
        partial.mkdir(parents=True)
        checksums = {}
        for name, values in tensors.items():
            path = partial / f"{name}.safetensors"
            data = save({key: value.detach().cpu().contiguous() for key, value in values.items()})
            path.write_bytes(data)
            sync(path)
            checksums[path.name] = hashlib.sha256(data).hexdigest()
        write_json(partial / "state.json", {"step": step, "sha256": checksums, **state})
        sync(partial)
    old = folder / f".step_{step}.old.partial"
    if final.exists():  # of the same step, by which a resumed run begins; moved, because to remove it takes a while
        os.replace(final, old)
    os.replace(partial, final)
    sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    complete = complete_checkpoints(folder)
    here = complete.index(final) + 1
    for path in complete[: max(0, here - keep)] + complete[here:]:  # later ones: the run went back to this step
        shutil.rmtree(path)


def check_equal_state(modules, accelerator):
    """Raise RuntimeError if modules, {name: module}, differ between processes: only one process will save its copy.

    Nothing repairs a difference in what lives outside DDP, so none may go unnoticed. All processes call this together.
    Returns whether all numbers are finite.
    """
    all_finite = True
    for name, module in modules.items():
        values = [value.detach() for value in module.state_dict().values()]
        if not values:  # an activation, say
            continue
        here = torch.stack([torch.stack([checksum(value), value.isfinite().all().long()]) for value in values])
        sums, finite = accelerator.gather(here[None]).unbind(dim=2)  # (processes, tensors) each
        same = sums.eq(sums[0]) | (finite.eq(0) & finite[0].eq(0))  # diverged on all alike
        if not same.all():
            raise RuntimeError(f"{name} differs between processes: an update is missing on some of them, or differs")
        all_finite = all_finite and bool(finite.all())
    return all_finite


def checksum(tensor):
    """The sum of a tensor's bits as whole numbers, int64: the same in any order of adding, so on every device."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integers).sum(dtype=torch.int64)


def weights_digest(weights):
    """SHA-256 of the keys and every bit of the values of a state dict, {key: tensor}."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def complete_checkpoints(folder):
    """The checkpoints in `folder` that have all of their files, oldest first."""

    def is_complete(path):
        try:
            names = json.loads((path / "state.json").read_text())["sha256"]
            return all((path / name).exists() for name in names)
        except FileNotFoundError:
            return False
        except DAMAGE:
            return True  # nothing is missing, but damaged, which load_checkpoint reports

    numbered = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(filter(is_complete, numbered), key=lambda path: int(path.name.removeprefix("step_")))


def load_checkpoint(path):
    """Read a checkpoint back: ({file name: {key: tensor}}, state). Raises UserError if a file is damaged."""
    tensors, remedy = {}, f"remove {path} to resume from the checkpoint before it"
    with reading_json(path / "state.json", remedy) as state:
        if f"step_{state['step']}" != path.name:
            raise ValueError(f"step is {state['step']}")
        for name, expected in state["sha256"].items():
            data = (path / name).read_bytes() if (path / name).is_file() else b""
            if hashlib.sha256(data).hexdigest() != expected:
                raise UserError(f"{path / name} is damaged or missing (its checksum differs); {remedy}")
            tensors[name.removesuffix(".safetensors")] = load(data)
    return tensors, state


def optimizer_tensors(optimizer):
    """An optimizer's state of each parameter as {"parameter.name": tensor}. Its settings come from the flags."""
    state = optimizer.state_dict()["state"]
    return {
        f"{parameter}.{name}": torch.as_tensor(value)
        for parameter, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer, tensors):
    """Restore what `optimizer_tensors` returned."""
    whole = optimizer.state_dict()
    whole["state"] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        if value.shape == like.shape:  # in the layout of the weight, because fused updates need both to have the same
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        whole["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(whole)


def append_metrics(path, line):
    """Add a line, a dict, to metrics.jsonl."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(path, points=None):
    """The lines of metrics.jsonl as dicts, without one that a kill left half-written at the end.

    points: of a longer file so many lines at equal distances, and all with an EVALUATION in them, for a picture.
    Raises UserError if the file is missing or damaged.
    """
    with explained(f"{path} is damaged or missing", "an empty file in its place will do", *DAMAGE):
        lines = path.read_text().splitlines()
        if lines and not lines[-1].endswith("}"):
            lines.pop()
        if points and len(lines) > points:
            chosen = {i * (len(lines) - 1) // (points - 1) for i in range(points)}
            lines = [line for i, line in enumerate(lines) if i in chosen or any(key in line for key in EVALUATION)]
        parsed = [json.loads(line) for line in lines]
        return [line for line in parsed if line["step"] >= 0]  # each has one


def trim_metrics(path, step):
    """Drop the lines of metrics.jsonl about later steps, which the resumed run will take again."""
    partial = Path(f"{path}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step))
    sync(partial)
    os.replace(partial, path)
