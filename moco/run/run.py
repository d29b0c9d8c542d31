"""A run: its folder, log, checkpoints, resume and stop."""

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from moco.data.decode import check_undecodable, name_undecodable
from moco.data.hub import traffic_line
from moco.errors import UserError, explained
from moco.jsonfile import DAMAGE, write_json
from moco.run.checkpoint import (
    append_metrics,
    check_equal_state,
    complete_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
    trim_metrics,
)
from moco.run.launch import LONG_PATIENCE, STEP_PATIENCE, catch_signals, provenance, release_signals, set_patience

CHECKPOINT_SECONDS = 600  # a checkpoint is also due after so long, so that a slow run never starts from nothing


class Run:
    """A run in its folder: where it stands, what it logs and saves, and when it stops.

    run = Run(args, accelerator, modules, optimizer, train_set, total_steps, order=order)
    batches = run.timed(loader)
    for step in run.steps():
        loss = ...                                  # one training step, whatever it is
        run.record(failed, loss=loss)
        if run.due(log_every):
            run.log(run.averages() | {"lr": lr})

    All processes create one and call its methods together.

    args: the script's flags, of which it takes output, data, batch_size, checkpoint_every, keep, resume and, if it is
    there, evaluate. modules: {name: module} to save and load; every process must hold equal ones.
    images: what is trained on, with a length, a `fingerprint()` and `traffic`, which counts what this process and its
    data workers read, to be logged, or is None. If there are others, the run is not resumed.
    order: in which they are trained on; if what it depends on differs, the run resumes at the start of its epoch.
    steps_per_epoch: their number // batch_size unless given.
    backbone_sha256: of the weights a probe or detector starts from; if they differ, the run is not resumed.
    finite: whether weights must be finite to be saved; otherwise the run stops as diverged.
    """

    def __init__(
        self, args, accelerator, modules, optimizer, images, total_steps, *, order=None, steps_per_epoch=None,
        backbone_sha256=None, finite=True,
    ):  # fmt: skip
        self.args, self.folder, self.evaluates = args, args.output, getattr(args, "evaluate", False)
        self.accelerator, self.modules, self.optimizer, self.finite = accelerator, modules, optimizer, finite
        self.steps_per_epoch = steps_per_epoch or len(images) // args.batch_size
        rows = images.order_state(order) if order else None
        self.origin = {"images": len(images), "data": images.fingerprint(), "rows": rows}
        self.origin["backbone_sha256"] = backbone_sha256
        self.checkpoints, self.metrics = self.folder / "checkpoints", self.folder / "metrics.jsonl"
        self.done = 0  # steps taken, including the current one
        self.sums, self.summed = {}, 0  # of recorded values since the last log line, over so many steps
        self.pending = None  # the last step's values, on their way from the device
        self.spent = {"step": 0.0, "data": 0.0}  # seconds since the last log line
        self.traffic, self.counted, self.read = images.traffic, 0, 0  # read: counted so far, and since the last line
        self.undecodable, self.named = 0, set()  # images of this epoch; all names that were printed
        self.stopping, self.bar = None, None  # the signal that stops the run; its progress bar
        self.saved_at, self.overdue = time.monotonic(), False  # the last checkpoint, and whether it is too long ago
        self.pool, self.writing = ThreadPoolExecutor(1), None  # writes checkpoints
        if args.resume or self.evaluates:
            self.load(total_steps)
        self.total_steps = self.done if self.evaluates else total_steps
        accelerator.wait_for_everyone()  # nobody writes before everybody has read
        if accelerator.is_main_process and args.resume:
            trim_metrics(self.metrics, self.done)
        elif accelerator.is_main_process and not self.evaluates:
            settings = vars(args) | {"output": str(self.folder)}
            write_json(self.folder / "args.json", settings | provenance(accelerator.num_processes))
            self.metrics.write_text("")
        self.signals = catch_signals()

    def check_origin(self, state, total_steps):
        """Raise UserError unless the state of a checkpoint is of the same data and backbone, and of this run."""
        data, images = f"--data {self.args.data}", self.origin["images"]
        if state["images"] != images:
            raise UserError(f"{data} has {images} images to train on, {self.folder} was begun on {state['images']}")
        if state.get("data") not in (None, self.origin["data"]):
            raise UserError(
                f"{data} is not the data that {self.folder} was begun on: names or sizes of its files or row groups"
                " differ (or an earlier version of this code began it, which compared less); name that data, or start a"
                " new run with another --output"
            )
        if state.get("backbone_sha256") != self.origin["backbone_sha256"]:
            raise UserError(
                f"--backbone {self.args.backbone} has changed since {self.folder} was begun; start a new run"
            )
        if state["step"] > total_steps:
            raise ValueError(f"step is {state['step']} of {total_steps}")

    def load(self, total_steps):
        """Restore everything from the newest checkpoint."""
        path = complete_checkpoints(self.checkpoints)[-1]
        tensors, state = load_checkpoint(path)
        remedy = f"remove {path} to resume from the checkpoint before it"
        with explained(f"{path / 'state.json'} is damaged", remedy, *DAMAGE):
            self.check_origin(state, total_steps)
            self.done, self.undecodable = int(state["step"]), int(state["undecodable"])
            # A checkpoint of an earlier version has no sums: its first log line averages the steps since the resume.
            sums = state.get("sums") or {}
            self.sums = {name: torch.tensor(total, dtype=torch.double) for name, total in sums.items()}
            self.summed = int(state.get("summed") or 0)
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        flags, remedy = self.folder / "args.json", "one of them was changed: restore it, or start a new run"
        with explained(f"{path} does not fit the flags in {flags}", remedy, RuntimeError, KeyError, ValueError):
            for name, module in self.modules.items():
                module.load_state_dict(tensors[name])
            load_optimizer_tensors(self.optimizer, tensors["optimizer"])
        position, note = self.done % self.steps_per_epoch, ""
        if not self.evaluates and (state.get("rows") or {}) != (self.origin["rows"] or {}) and position:
            # The images of this epoch that were already used are not known.
            self.done -= position
            self.sums, self.summed, self.undecodable = {}, 0, 0
            note = (
                f"\n        not {state['step']}: processes, workers or window differ, so the epoch starts again"
                " in a new order"
            )
        if self.accelerator.is_main_process:
            print(f"{'evaluate' if self.evaluates else 'resume  after'} step {self.done}{note}")

    # ---- the loop

    def steps(self):
        """Yield the number of each remaining step, and save at the start, when due, and when a signal stops the run."""
        if self.done < self.total_steps:
            self.save()
        silent = not self.accelerator.is_main_process or self.done == self.total_steps
        self.bar = tqdm(total=self.total_steps, initial=self.done, unit="step", disable=silent)
        torch.backends.cudnn.benchmark = True  # all batches of a loop have one size
        set_patience(STEP_PATIENCE)
        for step in range(self.done, self.total_steps):
            self.done, self.started = step + 1, time.perf_counter()
            yield step
            self.bar.update()
            if self.due(self.args.checkpoint_every) or self.stopping or self.overdue:
                self.save()
            if self.stopping:
                what = "Ctrl-C" if self.stopping == signal.SIGINT else "SIGTERM"
                message = f"{what}: stopped after step {self.done}, which is saved; continue with --resume"
                self.finish(128 + self.stopping, message)
        torch.backends.cudnn.benchmark = False
        set_patience(LONG_PATIENCE)
        self.bar.close()
        self.join_writer()
        release_signals(self.signals)

    def timed(self, loader):
        """The batches of a loader, started when the first one is asked for. Waiting for them counts as data_seconds."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            self.spent["data"] += time.perf_counter() - asked
            yield batch

    def due(self, every):
        """Whether to do what is done every so many steps and at the end."""
        return self.done % every == 0 or self.done == self.total_steps

    @contextmanager
    def aside(self, what):
        """Work beside the steps. The next log line has its seconds, as `what`_seconds."""
        started = time.perf_counter()
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # batches of many sizes
        set_patience(LONG_PATIENCE)
        yield
        set_patience(STEP_PATIENCE)
        torch.backends.cudnn.benchmark = benchmark
        self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - started

    # ---- what a step leaves

    def record(self, failed, **values):
        """Hand in this step's numbers. They are read during the next step, so that the host never waits for the device.

        failed: this process's undecodable images, [(name, reason)]. values: tensors with one number or several; one of
        them is `loss`. The run stops if none of its numbers is finite on some process.
        """
        self.settle()
        row = torch.cat([value.detach().flatten() for value in values.values()])
        overdue = time.monotonic() - self.saved_at > CHECKPOINT_SECONDS
        traffic = torch.tensor(self.traffic.totals() if self.traffic else [], dtype=torch.double)
        shared = torch.tensor([len(failed), max(self.signals, default=0), overdue])
        shared, self.counted = torch.cat([shared, traffic - self.counted]).to(row.dtype), traffic
        row = torch.cat([row, shared.to(row.device, non_blocking=True)])
        rows = self.accelerator.gather(row[None]).to("cpu", non_blocking=True)  # a row a process
        arrived = torch.cuda.Event() if row.is_cuda else None
        if arrived:
            arrived.record()
        self.pending = (self.done, failed, {name: value.shape for name, value in values.items()}, rows, arrived)
        self.spent["step"] += time.perf_counter() - self.started

    def settle(self):
        """Read the numbers that were recorded last, and stop the run if its loss is not finite."""
        if self.pending is None:
            return
        (done, failed, shapes, rows, arrived), self.pending = self.pending, None
        if arrived:
            arrived.synchronize()
        sizes = [*(shape.numel() for shape in shapes.values()), 1, 1, 1]
        *columns, failures, signals, overdue, read = rows.double().tensor_split(np.cumsum(sizes).tolist(), dim=1)
        for (name, shape), column in zip(shapes.items(), columns, strict=True):
            diverged = (~column.isfinite().any(dim=1)).nonzero().flatten().tolist() if name == "loss" else []
            if diverged:
                loss = column[diverged[0]][0].item()
                self.stop_diverged(f"the loss is {loss} at step {done - 1} on process {diverged[0]}")
            self.sums[name] = self.sums.get(name, 0) + column.mean(dim=0).view(shape)
        self.summed, self.read = self.summed + 1, self.read + read.sum(dim=0)  # of all processes
        self.stopping, self.overdue = int(signals.max()) or None, bool(overdue[0])
        if int((done - 1) / self.steps_per_epoch) > int((done - 2) / self.steps_per_epoch):
            self.undecodable = 0
        if failures.any():
            self.undecodable += name_undecodable(failed, self.named, self.accelerator)
            check_undecodable(self.undecodable, self.origin["images"], self.args.data)

    def check_decoded(self, failed, images, **instead):
        """Name the undecodable of so many images in an evaluation, each once, and stop the run if they are too many."""
        failures = name_undecodable(failed, self.named, self.accelerator, **instead)
        check_undecodable(failures, images, self.args.data)

    def averages(self):
        """A line for the log: where the run stands, means over the steps since the last line, and their speed."""
        self.settle()
        line = {"step": self.done, "epoch": self.done / self.steps_per_epoch}
        line |= {name: (total / self.summed).tolist() for name, total in self.sums.items()}
        seconds = self.spent.pop("step")
        line |= {
            "undecodable": self.undecodable,  # in this epoch
            "images_per_second": self.summed * self.args.batch_size / seconds,
            "data_share": self.spent["data"] / seconds,
        }
        line |= {f"{what}_seconds": value for what, value in self.spent.items()}
        elapsed = seconds + sum(self.spent.values()) - self.spent["data"]  # waits for data are within steps
        read, rates = traffic_line(self.read.tolist(), elapsed) if self.traffic else ({}, "")
        line |= read
        self.sums, self.summed, self.read, self.spent = {}, 0, 0, {"step": 0.0, "data": 0.0}
        accuracy = f"accuracy {np.max(line['accuracy']):.1f} %, " if "accuracy" in line else ""
        speed = line["images_per_second"]
        self.bar.set_postfix_str(
            f"loss {np.min(line['loss']):.2f}, {accuracy}{speed:.{0 if speed >= 100 else 1}f} images/s,"
            f" {line['data_share']:.0%} waiting for data{rates}"
        )
        return line

    def log(self, line):
        """Append a line to metrics.jsonl, and send it to the tracker if there is one."""
        if self.accelerator.is_main_process:
            append_metrics(self.metrics, line)
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    # ---- checkpoints

    def save(self):
        """Save a checkpoint of this moment. Training goes on while it is hashed and written to disk."""
        self.settle()
        self.saved_at, self.overdue = time.monotonic(), False
        with self.aside("checkpoint"):
            if not check_equal_state(self.modules, self.accelerator) and self.finite:
                self.stop_diverged(f"weights are not finite after step {self.done}")
            self.join_writer()
            if self.accelerator.is_main_process:  # all processes hold equal weights, so one saves
                tensors = {name: module.state_dict() for name, module in self.modules.items()}
                tensors["optimizer"] = optimizer_tensors(self.optimizer)
                tensors = {name: host_copy(values) for name, values in tensors.items()}
                sums = {name: total.tolist() for name, total in self.sums.items()}
                state = self.origin | {"sums": sums, "summed": self.summed, "undecodable": self.undecodable}
                state["scaler"] = self.accelerator.scaler and self.accelerator.scaler.state_dict()
                where = (self.checkpoints, self.done)
                self.writing = self.pool.submit(save_checkpoint, *where, tensors, state, self.args.keep)

    def join_writer(self):
        """Wait until the last checkpoint is on disk. Raises UserError if it could not be written."""
        if self.writing is not None:
            self.writing.result()
        self.writing = None

    # ---- the end

    def stop_diverged(self, what):
        """Stop every process. The checkpoint that is kept may already be diverging."""
        self.join_writer()
        kept = ", ".join(map(str, complete_checkpoints(self.checkpoints)[-1:])) or "nothing"
        self.finish(1, f"{what}: the run diverged; start again with a lower --lr and another --output ({kept} is kept)")

    def finish(self, code, message):
        """Stop every process with this exit code; the main one says why."""
        self.join_writer()
        if self.bar is not None:
            self.bar.close()  # so that the message has a line of its own
        self.accelerator.wait_for_everyone()  # a launcher that sees one process end soon kills the others
        if self.accelerator.is_main_process:
            print(message, file=sys.stderr)
        self.accelerator.end_training()
        sys.exit(code)


def host_copy(tensors):
    """Copies of {key: tensor} in host memory that training does not touch."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
