"""A run: its folder, log, checkpoints, resume and stop."""

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

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
from moco.run.launch import (
    CAUGHT,
    LONG_PATIENCE,
    STEP_PATIENCE,
    Stopped,
    catch_signals,
    cores_of_process,
    provenance,
    release_signals,
    set_patience,
)

CHECKPOINT_SECONDS = 600  # a checkpoint is also due after so long, so that a slow run never starts from nothing


class Run:
    """A run in its folder: where it stands, what it logs and saves, and when it stops.

    model = nn.ModuleDict({"query_encoder": ..., "queue": ...})
    run = Run(folder, accelerator, model, optimizer, train_set, order, total_steps)
    batches = run.timed(loader)
    for step in run.steps():
        loss = ...                                  # one training step on next(batches), whatever it is
        run.record(loss=loss)
        if run.due(log_every):
            run.log(run.averages(lr=lr))

    All processes create one and call its methods together.

    model: whatever is trained or must survive a restart, in submodules of their own. Each is saved in a file of its
    name, and compared across processes before every checkpoint. Raises UserError if the optimizer trains a parameter
    that is not in it, because that would be lost on resume.
    images: what is trained on. It has a length, a `fingerprint()`, an `order_state(order)` and `traffic`, which counts
    what is read from the Hub, or None. order: an Order. A run resumes only on the same images, and at the start of its
    epoch if something else that their order depends on has changed.
    settings: what the log is about, for args.json: the script's flags. The rest is of `flags.run_options`:
    checkpoint_every: steps. keep: checkpoints. resume, evaluate: continue from the newest one, or only measure it.
    steps_per_epoch: len(images) // batch_size unless given.
    backbone_sha256: of the frozen weights that a probe or detector starts from; other ones are refused on resume.
    finite: whether weights must be finite to be saved; otherwise the run stops as diverged.
    one_size: whether all images have one size, so that cuDNN may try its kernels on it. It would try on each of many.
    """

    def __init__(
        self, folder, accelerator, model, optimizer, images, order, total_steps, *, settings=None,
        checkpoint_every=1000, keep=2, resume=False, evaluate=False, steps_per_epoch=None, backbone_sha256=None,
        finite=True, one_size=True,
    ):  # fmt: skip
        self.folder, self.settings = Path(folder), settings or {}
        self.checkpoints, self.metrics = self.folder / "checkpoints", self.folder / "metrics.jsonl"
        self.accelerator, self.optimizer, self.finite, self.one_size = accelerator, optimizer, finite, one_size
        self.modules = dict(model.named_children())
        check_trained(model, optimizer)
        self.checkpoint_every, self.keep, self.only_evaluates = checkpoint_every, keep, evaluate
        self.batch_size = order.batch_size
        self.steps_per_epoch = steps_per_epoch or len(images) // order.batch_size
        self.origin = {"images": len(images), "data": images.fingerprint(), "rows": images.order_state(order)}
        self.origin["backbone_sha256"] = backbone_sha256
        self.done = 0  # steps taken, including the current one
        self.sums, self.summed = {}, 0  # of recorded values since the last log line, over so many steps
        self.steps_timed = 0  # of these the steps that this process took, and so knows the seconds of
        self.lines = 0  # of the log, since the start
        self.unlogged = None  # the log line of this moment, if it waits for an evaluation
        self.pending = None  # the last step's values, on their way from the device
        self.spent = {"step": 0.0, "data": 0.0}  # seconds since the last log line
        self.traffic, self.counted, self.read = images.traffic, 0, 0  # counted so far, and read since the last log line
        self.failed = []  # undecodable images of the batches that were read since the last step was recorded
        self.undecodable, self.named = 0, set()  # images of this epoch; all names that were printed
        self.stopping, self.bar = None, None  # the signal that stops the run; its progress bar
        self.saved_at, self.overdue = time.monotonic(), False  # the last checkpoint, and whether it is too long ago
        self.pool, self.writing = ThreadPoolExecutor(1), None  # writes checkpoints
        if resume or evaluate:
            self.load(total_steps)
        self.total_steps = self.done if evaluate else total_steps
        accelerator.wait_for_everyone()  # nobody writes before everybody has read
        if accelerator.is_main_process and resume:
            trim_metrics(self.metrics, self.done - bool(self.unlogged))  # a line that is open is logged again
        elif accelerator.is_main_process and not evaluate:
            self.folder.mkdir(parents=True, exist_ok=True)
            settings = self.settings | {"output": str(folder)}
            write_json(self.folder / "args.json", settings | provenance(accelerator.num_processes))
            self.metrics.write_text("")
        catch_signals()

    def check_origin(self, state, total_steps):
        """Raise UserError unless the state of a checkpoint is of the same data and backbone, and of this run."""
        data, images = f"--data {self.settings.get('data')}", self.origin["images"]
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
                f"--backbone {self.settings.get('backbone')} has changed since {self.folder} was begun; start a new run"
            )
        if state["step"] > total_steps:
            raise ValueError(f"step is {state['step']} of {total_steps}")

    def load(self, total_steps):
        """Restore everything from the newest checkpoint."""
        if not (complete := complete_checkpoints(self.checkpoints)):
            raise UserError(f"{self.folder} has no complete checkpoint to resume from; start a new run")
        path = complete[-1]
        tensors, state = load_checkpoint(path)
        remedy = f"remove {path} to resume from the checkpoint before it"
        with explained(f"{path / 'state.json'} is damaged", remedy, *DAMAGE):
            self.check_origin(state, total_steps)
            self.done, self.undecodable = int(state["step"]), int(state["undecodable"])
            self.sums = {name: torch.tensor(total, dtype=torch.double) for name, total in state["sums"].items()}
            self.summed = int(state["summed"])
            self.unlogged = None if self.only_evaluates else state.get("unlogged")  # the log is left as it is
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        fault = f"{path} does not fit the flags in {self.folder / 'args.json'}, or the script's modules"
        with explained(fault, "restore what was changed, or start a new run", RuntimeError, KeyError, ValueError):
            for name, module in self.modules.items():
                module.load_state_dict(tensors[name])
            load_optimizer_tensors(self.optimizer, tensors["optimizer"])
        position, note = self.done % self.steps_per_epoch, ""
        if not self.only_evaluates and (state.get("rows") or {}) != self.origin["rows"] and position:
            # The images of this epoch that were already used are not known.
            self.done -= position
            self.sums, self.summed, self.undecodable, self.unlogged = {}, 0, 0, None
            note = (
                f"\n        not {state['step']}: processes, workers or window differ, so the epoch starts again"
                " in a new order"
            )
        if self.accelerator.is_main_process:
            print(f"{'evaluate' if self.only_evaluates else 'resume  after'} step {self.done}{note}")

    # ---- the loop

    def steps(self):
        """Yield the number of each remaining step, and save at the start, when due, and when a signal stops the run."""
        if self.done < self.total_steps:
            self.save()
        silent = not self.accelerator.is_main_process or self.done == self.total_steps
        self.bar = tqdm(total=self.total_steps, initial=self.done, unit="step", disable=silent)
        torch.backends.cudnn.benchmark = self.one_size
        set_patience(STEP_PATIENCE)
        first = self.done
        for step in range(first, self.total_steps):
            self.done, self.started = step + 1, time.perf_counter()
            yield step
            self.bar.update()
            if step == first and not silent and (names := untrained(self.modules, self.optimizer)):
                tqdm.write(f"note    {untrained_in_words(names)}")
            if self.due(self.checkpoint_every) or self.stopping or self.overdue:
                self.save()
            if self.stopping:
                self.stop(self.stopping)
        torch.backends.cudnn.benchmark = False
        set_patience(LONG_PATIENCE)
        self.bar.close()
        self.join_writer()
        release_signals()

    def timed(self, loader):
        """Yield a loader's batches without their last part, the undecodable images, which the run counts and names.

        It is started when the first batch is asked for. Waiting for batches counts as data_seconds.
        """
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            *batch, failed = next(batches)
            self.spent["data"] += time.perf_counter() - asked
            self.failed += failed
            yield batch if len(batch) > 1 else batch[0]

    def due(self, every):
        """Whether to do what is done every so many steps and at the end."""
        return self.done % every == 0 or self.done == self.total_steps

    @contextmanager
    def paused_for(self, what):
        """Work between two steps. The next log line has its seconds, as `what`_seconds.

        If a signal stops it, the run ends with a checkpoint whose log line is left open: after the resume the line is
        `unlogged`, and the script makes the evaluation again.
        """
        started = time.perf_counter()
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # batches of many sizes
        set_patience(LONG_PATIENCE)
        try:
            yield
        except Stopped as stopped:
            self.unlogged = self.unlogged or {"step": self.done, "epoch": self.done / self.steps_per_epoch}
            self.save()
            self.stop(stopped.number)
        set_patience(STEP_PATIENCE)
        torch.backends.cudnn.benchmark = benchmark
        self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - started

    # ---- what a step leaves

    def record(self, **values):
        """Hand in this step's numbers. They are read during the next step, so that the host never waits for the device.

        values: tensors with one number or several; one of them is `loss`. The run stops if none of its numbers is
        finite on some process.
        """
        self.settle()
        row = torch.cat([value.detach().flatten() for value in values.values()])
        overdue = time.monotonic() - self.saved_at > CHECKPOINT_SECONDS
        traffic = torch.tensor(self.traffic.totals() if self.traffic else [], dtype=torch.double)
        failed, self.failed = self.failed, []
        shared = torch.tensor([len(failed), max(CAUGHT, default=0), overdue])
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
        self.summed, self.steps_timed = self.summed + 1, self.steps_timed + 1
        self.read = self.read + read.sum(dim=0)  # of all processes
        self.stopping, self.overdue = int(signals.max()) or None, bool(overdue[0])
        if int((done - 1) / self.steps_per_epoch) > int((done - 2) / self.steps_per_epoch):
            self.undecodable = 0
        if failures.any():
            self.undecodable += name_undecodable(failed, self.named, self.accelerator)
            check_undecodable(self.undecodable, self.origin["images"], self.settings.get("data"))

    def check_decoded(self, failed, images, **instead):
        """Name the undecodable of so many images in an evaluation, each once, and stop the run if they are too many."""
        failures = name_undecodable(failed, self.named, self.accelerator, **instead)
        check_undecodable(failures, images, self.settings.get("data"))

    def averages(self, **values):
        """A line for the log: where the run stands, means over the steps since the last line, and their speed.

        values: whatever else the line shall hold, such as the learning rate.
        """
        self.settle()
        line = {"step": self.done, "epoch": self.done / self.steps_per_epoch}
        line |= {name: (total / self.summed).tolist() for name, total in self.sums.items()}
        seconds = self.spent.pop("step")
        line |= {
            "undecodable": self.undecodable,  # in this epoch
            "images_per_second": self.steps_timed * self.batch_size / seconds,
            "data_share": self.spent["data"] / seconds,
        }
        line |= {f"{what}_seconds": value for what, value in self.spent.items()}
        elapsed = seconds + sum(self.spent.values()) - self.spent["data"]  # waits for data are within steps
        read, rates = traffic_line(self.read.tolist(), elapsed) if self.traffic else ({}, "")
        line |= read
        self.sums, self.summed, self.steps_timed, self.read, self.spent = {}, 0, 0, 0, {"step": 0.0, "data": 0.0}
        self.lines += 1
        if self.lines == 2 and self.accelerator.device.type == "cuda":  # workers start during the first
            self.warn_starving(line["data_share"], line["images_per_second"])
        accuracy = f"accuracy {np.max(line['accuracy']):.1f} %, " if "accuracy" in line else ""
        speed = line["images_per_second"]
        self.bar.set_postfix_str(
            f"loss {np.min(line['loss']):.2f}, {accuracy}{speed:.{0 if speed >= 100 else 1}f} images/s,"
            f" {line['data_share']:.0%} waiting for data{rates}"
        )
        self.unlogged = line | values
        return self.unlogged

    def warn_starving(self, share, speed):
        """Say once, on the main process, that the data does not feed the GPUs, and what to do."""
        if share > 0.2 and self.accelerator.is_main_process:
            workers = f"{self.settings.get('workers')} for {cores_of_process()} cores"
            tqdm.write(
                f"note    the GPUs wait for data {share:.0%} of the time, at {speed:.0f} images/s; raise --workers"
                f" ({workers} of a process), or store smaller images"
            )

    def log(self, line):
        """Append a line to metrics.jsonl, and send it to the tracker if there is one."""
        if self.accelerator.is_main_process:
            append_metrics(self.metrics, line)
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])
        self.unlogged = None

    # ---- checkpoints

    def save(self):
        """Save a checkpoint of this moment. Training goes on while it is hashed and written to disk."""
        self.settle()
        self.saved_at, self.overdue = time.monotonic(), False
        with self.paused_for("checkpoint"):
            if not check_equal_state(self.modules, self.accelerator) and self.finite:
                self.stop_diverged(f"weights are not finite after step {self.done}")
            self.join_writer()
            if self.accelerator.is_main_process:  # all processes hold equal weights, so one saves
                tensors = {name: module.state_dict() for name, module in self.modules.items()}
                tensors["optimizer"] = optimizer_tensors(self.optimizer)
                tensors = {name: host_copy(values) for name, values in tensors.items()}
                sums = {name: total.tolist() for name, total in self.sums.items()}
                state = self.origin | {"sums": sums, "summed": self.summed, "undecodable": self.undecodable}
                state["unlogged"] = self.unlogged
                state["scaler"] = self.accelerator.scaler and self.accelerator.scaler.state_dict()
                where = (self.checkpoints, self.done)
                self.writing = self.pool.submit(save_checkpoint, *where, tensors, state, self.keep)

    def join_writer(self):
        """Wait until the last checkpoint is on disk. Raises UserError if it could not be written."""
        if self.writing is not None:
            self.writing.result()
        self.writing = None

    # ---- the end

    def stop(self, number):
        """Stop every process after a signal; the current step is saved."""
        what = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        self.join_writer()
        self.finish(128 + number, f"{what}: stopped after step {self.done}, which is saved; continue with --resume")

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


def check_trained(model, optimizer):
    """Raise UserError if an optimizer trains what is not in a submodule of the model, and so would not be saved."""
    kept = {id(parameter) for module in model.children() for parameter in module.parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    lost = ["x".join(map(str, parameter.shape)) or "1" for parameter in trained if id(parameter) not in kept]
    if lost:
        names = ", ".join(name for name, _ in model.named_children())
        shapes = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        raise UserError(
            f"the optimizer trains {len(lost)} parameters, of shape {shapes}, that are in none of the run's modules"
            f" ({names}) and would be lost on resume; add their module to what is handed to Run"
        )


def untrained(modules, optimizer):
    """Names of the parameters of {name: module} that a loss gave gradients, but that the optimizer does not train."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = ((f"{name}.{key}", p) for name, module in modules.items() for key, p in module.named_parameters())
    return [name for name, p in named if p.grad is not None and id(p) not in trained]


def untrained_in_words(names):
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} get gradients, but stay as they are: give them to the optimizer, or requires_grad_(False)"


def host_copy(tensors):
    """Copies of {key: tensor} in host memory that training does not touch."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
