"""Run by itself, around a step of one weight; whole scripts are in test_train.py. pytest tests/test_run.py"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, metrics_of, run_script, start_script
from torch import nn

from moco.data.order import Order
from moco.errors import UserError
from moco.run.checkpoint import complete_checkpoints, load_checkpoint, read_metrics
from moco.run.flags import add_workers_flag, check_output, flag_parser, lock, parse_resumed
from moco.run.launch import device_in_words, stoppable
from moco.run.run import CHECKPOINT_SECONDS, Run


class Images:
    """As many as `images`; their order depends on the number of workers, as a stream's does."""

    traffic = None

    def __init__(self, images, fingerprint="f"):
        self.images, self.fingerprint = range(images), lambda: fingerprint
        self.order_state = lambda order: {"workers": order.workers}

    def __len__(self):
        return len(self.images)


@pytest.fixture
def start(tmp_path):
    """Make a run of ten steps, five an epoch, in tmp_path; its module has one weight, the number of steps taken."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def make(**options):
        module = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(module.weight)
        optimizer = torch.optim.SGD(module.parameters(), 1.0, momentum=0.9)
        images = Images(options.pop("images", 40), options.pop("fingerprint", "f"))
        order = Order(options.pop("batch_size", 8), seed=0, workers=options.pop("workers", 0))
        options = {"total_steps": 10, "checkpoint_every": 4, "keep": 9} | options
        settings = {"data": "numbers", "backbone": "none"} | options.pop("settings", {})
        model = nn.ModuleDict({"module": module} | options.pop("others", {}))
        return Run(tmp_path, Accelerator(cpu=True), model, optimizer, images, order, settings=settings, **options)

    yield make
    for number, handler in before.items():
        signal.signal(number, handler)


def take_step(run, loss=1.0):
    with torch.no_grad():
        run.modules["module"].weight += 1
    run.record(loss=torch.tensor(loss), accuracy=torch.tensor(50.0))


def weight_in(checkpoint):
    return load_checkpoint(checkpoint)[0]["module"]["weight"].item()


def test_a_run_logs_means_and_saves_at_the_start_when_due_and_at_the_end(start, tmp_path):
    run = start()
    for step in run.steps():
        take_step(run, loss=float(step))
        if run.due(5):
            run.log(run.averages())
    assert [line["loss"] for line in metrics_of(tmp_path)] == [2.0, 7.0]
    assert [line["epoch"] for line in metrics_of(tmp_path)] == [1.0, 2.0]
    saved = complete_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in saved] == ["step_0", "step_4", "step_8", "step_10"]
    assert [weight_in(path) for path in saved] == [0, 4, 8, 10]


def test_a_module_without_numbers_is_saved_like_any_other(start, tmp_path):
    others = {"activation": nn.ReLU()}
    run = start(others=others, total_steps=2)
    for _ in run.steps():
        take_step(run)
    assert start(others=others, resume=True).done == 2


def test_a_checkpoint_holds_the_weights_of_its_moment(start, tmp_path):
    """Training goes on while it is written."""
    run = start()
    run.save()
    with torch.no_grad():
        run.modules["module"].weight.fill_(7)
    run.join_writer()
    assert weight_in(tmp_path / "checkpoints" / "step_0") == 0


def test_a_checkpoint_that_cannot_be_written_stops_the_run_at_the_next(start, tmp_path):
    run = start()
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="step_0 cannot be written"):
        for _ in run.steps():
            take_step(run)
    assert run.done == 4


def test_numbers_are_read_a_step_later(start):
    """Until then they may still be on their way from the device."""
    run = start()
    steps = run.steps()
    next(steps)
    take_step(run, loss=3.0)
    assert run.summed == 0
    next(steps)
    take_step(run, loss=5.0)
    assert run.summed == 1 and run.sums["loss"] == 3
    assert run.averages()["loss"] == 4


@pytest.mark.parametrize("at", [2, 3, 9])
def test_a_loss_that_is_not_finite_stops_the_run_a_step_later_at_most(start, tmp_path, capsys, at):
    run = start()
    with pytest.raises(SystemExit) as stopped:
        for step in run.steps():
            take_step(run, loss=float("nan") if step == at else 1.0)
    assert stopped.value.code == 1 and run.done <= at + 2
    kept = complete_checkpoints(tmp_path / "checkpoints")[-1]
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"the loss is nan at step {at} on process 0: the run diverged") and str(kept) in line
    assert weight_in(kept) <= at  # of no step after the loss


def test_weights_that_are_not_finite_are_not_saved(start, tmp_path, capsys):
    run = start()
    with pytest.raises(SystemExit):
        for step in run.steps():
            take_step(run)
            if step == 6:
                with torch.no_grad():
                    run.modules["module"].weight.fill_(torch.inf)
    assert "weights are not finite after step 8" in capsys.readouterr().err
    assert complete_checkpoints(tmp_path / "checkpoints")[-1].name == "step_4"


@pytest.mark.parametrize("number, code, what", [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_stops_after_a_saved_step(start, tmp_path, capsys, number, code, what):
    run = start()
    with pytest.raises(SystemExit) as stopped:
        for step in run.steps():
            if step == 5:
                signal.raise_signal(number)
            take_step(run)
    assert stopped.value.code == code and f"{what}: stopped after step {run.done}" in capsys.readouterr().err
    assert weight_in(tmp_path / "checkpoints" / f"step_{run.done}") == run.done <= 7


def test_a_second_ctrl_c_ends_at_once_unless_a_launcher_repeats_the_first():
    code = """if True:
        import signal
        from types import SimpleNamespace
        from moco.run import launch
        seconds = [0.0]
        launch.time = SimpleNamespace(monotonic=lambda: seconds[0])
        launch.catch_signals()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        print(len(launch.CAUGHT), flush=True)
        seconds[0] = 1.1
        signal.raise_signal(signal.SIGINT)
        print("went on")"""
    done = run_script("-c", code)
    assert done.stdout == "2\n" and done.returncode == -signal.SIGINT


@pytest.mark.parametrize("chosen", [True, False])
def test_threads_that_the_user_chose_are_told_from_those_of_a_launcher(chosen):
    """accelerate launch hands a 1 on, whether it was given one or none."""
    code = "from moco.run.launch import threads_were_chosen; print(threads_were_chosen())"
    launcher = f"""if True:
        import os, subprocess, sys
        environment = os.environ | {{"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}}
        subprocess.run([sys.executable, "-c", {code!r}], env=environment)"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": "1"} if chosen else {}
    done = subprocess.run([sys.executable, "-c", launcher], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{chosen}\n", done.stderr


@pytest.mark.parametrize("script", ["train_moco.py", "linear_probe.py", "detect_transfer.py"])
def test_cpu_threads_sleep_soon_while_they_wait(script):
    """GNU's OpenMP reads the variable when torch is loaded, and then says what it will do."""
    if not any("libgomp" in line for line in open("/proc/self/maps")):
        pytest.skip("needs a torch with GNU's OpenMP, libgomp")
    assert "GOMP_SPINCOUNT = '1000'" in run_script(script, "--help", OMP_DISPLAY_ENV="verbose").stderr


def test_a_checkpoint_is_due_when_the_last_is_long_ago(start, tmp_path, monkeypatch):
    seconds = [0.0]
    clock = SimpleNamespace(monotonic=lambda: seconds[0], perf_counter=time.perf_counter)
    monkeypatch.setattr("moco.run.run.time", clock)
    run = start(checkpoint_every=100)
    for step in run.steps():
        if step == 3:
            seconds[0] = CHECKPOINT_SECONDS + 1
        take_step(run)
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step_0", "step_5", "step_10"]


def test_time_beside_the_steps_is_logged_and_cudnn_tries_its_kernels_in_steps_alone(start, tmp_path):
    run = start()
    for _ in run.steps():
        assert torch.backends.cudnn.benchmark
        take_step(run)
        if run.due(5):
            line = run.averages()
            with run.paused_for("knn"):
                assert not torch.backends.cudnn.benchmark  # its batches have many sizes
            run.log(line)
    assert not torch.backends.cudnn.benchmark
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["checkpoint_seconds"] > 0 and "knn_seconds" not in first and second["knn_seconds"] > 0


def test_resume_continues_and_evaluate_leaves_the_log_alone(start, tmp_path, capsys):
    run = start(total_steps=4)
    for _ in run.steps():
        take_step(run)
    resumed = start(resume=True)
    assert resumed.done == 4 and resumed.modules["module"].weight.item() == 4
    log = (tmp_path / "metrics.jsonl").read_bytes()
    evaluated = start(evaluate=True)
    assert list(evaluated.steps()) == [] and evaluated.total_steps == 4
    assert (tmp_path / "metrics.jsonl").read_bytes() == log
    assert capsys.readouterr().out.splitlines() == ["resume  after step 4", "evaluate step 4"]


def test_the_speed_after_a_resume_is_that_of_the_steps_since(start):
    run = start(total_steps=4)
    for _ in run.steps():
        take_step(run)
    resumed = start(resume=True)
    for _ in resumed.steps():
        take_step(resumed)
        resumed.spent["step"] = 2.0
        line = resumed.averages()
        break
    assert resumed.done == 5 and line["loss"] == 1 and line["images_per_second"] == 4  # 8 images, not those of 5 steps


def test_other_data_or_another_backbone_is_refused(start):
    for _ in start(total_steps=4, backbone_sha256="a").steps():
        pass
    with pytest.raises(UserError, match="numbers has 41 images to train on, .* was begun on 40"):
        start(resume=True, images=41, backbone_sha256="a")
    with pytest.raises(UserError, match="--data numbers is not the data that .* was begun on"):
        start(resume=True, backbone_sha256="a", fingerprint="g")
    with pytest.raises(UserError, match="--backbone none has changed"):
        start(resume=True, backbone_sha256="b")
    with pytest.raises(UserError, match="damaged .ValueError: step is 4 of 3.; remove"):
        start(resume=True, backbone_sha256="a", total_steps=3)


def test_another_order_resumes_at_the_start_of_the_epoch(start, capsys):
    run = start(total_steps=7, workers=1)
    for _ in run.steps():
        take_step(run)
    assert start(resume=True, workers=1).done == 7
    assert start(resume=True, workers=2).done == 5
    assert "not 7: processes, workers or window differ" in capsys.readouterr().out


@pytest.mark.parametrize("at", [0, 5])
def test_a_signal_during_an_evaluation_saves_the_step_and_the_evaluation_is_made_again(start, tmp_path, capsys, at):
    """An evaluation may take minutes, and a launcher kills its processes 30 seconds after a SIGTERM."""
    looked_at = []

    def evaluate(run, signalled):
        with run.paused_for("knn"):
            for batch in stoppable(range(4), run.accelerator):
                looked_at.append(batch)
                if signalled and batch == 1:
                    signal.raise_signal(signal.SIGTERM)
        return {"knn": 50.0}

    run = start()
    with pytest.raises(SystemExit) as stopped:
        if at == 0:
            evaluate(run, signalled=True)
        for step in run.steps():
            take_step(run, loss=float(step))
            if run.due(5):
                run.log(run.averages(lr=0.1) | evaluate(run, signalled=True))
    assert stopped.value.code == 143 and looked_at == [0, 1] and metrics_of(tmp_path) == []
    assert f"SIGTERM: stopped after step {at}, which is saved" in capsys.readouterr().err
    resumed = start(resume=True)
    assert resumed.done == at and resumed.unlogged["step"] == at
    resumed.log(resumed.unlogged | evaluate(resumed, signalled=False))
    line = metrics_of(tmp_path)[0]
    assert looked_at == [0, 1, 0, 1, 2, 3] and line["knn"] == 50
    if at:
        assert (line["loss"], line["lr"]) == (2.0, 0.1)
    assert start(evaluate=True).unlogged is None  # the log is left alone
    again = start(resume=True)  # from the same checkpoint
    again.log(again.unlogged | {"knn": 60.0})
    assert [line["knn"] for line in metrics_of(tmp_path)] == [60.0]


def test_undecodable_images_are_counted_by_epoch(start, tmp_path):
    run = start(images=400, batch_size=80)
    batches = run.timed((step, [(f"{step}.jpg", "damaged")] if step in (1, 2, 6) else []) for step in range(10))
    for step in run.steps():
        assert next(batches) == step
        run.record(loss=torch.tensor(1.0))
        if run.due(5):
            run.log(run.averages())
    assert [line["undecodable"] for line in metrics_of(tmp_path)] == [2, 1]


def test_an_optimizer_of_what_would_not_be_saved_is_refused(tmp_path):
    """Such as a predictor that an edit adds and forgets to hand over: it would be drawn anew on resume."""
    encoder, predictor = nn.Linear(2, 3), nn.Linear(3, 5)
    optimizer = torch.optim.SGD([*encoder.parameters(), *predictor.parameters()], 0.1)
    arguments = (optimizer, Images(40), Order(8, seed=0), 10)
    with pytest.raises(UserError, match=r"trains 2 parameters, of shape 5x3, 5, .* \(encoder\).* lost on resume"):
        Run(tmp_path, Accelerator(cpu=True), nn.ModuleDict({"encoder": encoder}), *arguments)
    Run(tmp_path, Accelerator(cpu=True), nn.ModuleDict({"encoder": encoder, "predictor": predictor}), *arguments)


def test_a_parameter_with_gradients_that_nothing_trains_gets_a_line(start, capsys):
    """Such as a predictor that an edit hands to Run, but not to the optimizer. What is frozen is none."""
    others = {"predictor": nn.Linear(1, 1), "frozen": nn.Linear(1, 1).requires_grad_(False)}
    run = start(others=others)
    for _ in run.steps():
        run.modules["predictor"](run.modules["module"](torch.ones(1, 1))).sum().backward()
        run.optimizer.zero_grad()
        take_step(run)
    said = capsys.readouterr()
    assert said.out.count("note    predictor.weight and 1 more get gradients, but stay as they are") == 1
    run = start(others=others, total_steps=1)
    others["predictor"].requires_grad_(False).zero_grad()
    for _ in run.steps():
        take_step(run)
    assert "note" not in capsys.readouterr().out


def test_a_run_that_is_resumed_does_not_end_for_its_push(tmp_path, monkeypatch, capsys):
    """Which can be made later, when the Hub or a token is there again."""

    def refuse(name):
        raise UserError(f"--push-to-hub {name}: no login")

    monkeypatch.setattr("moco.run.flags.check_push", refuse)
    args = SimpleNamespace(output=tmp_path, data="shapes", push_to_hub="user/name", license=None, resume=True)
    check_output(args)
    assert capsys.readouterr().out == "note    --push-to-hub user/name: no login\n"
    args.resume = False
    with pytest.raises(UserError, match="no login"):
        check_output(args)


def test_a_file_system_without_locks_gets_a_line(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", lockf)
    lock(tmp_path)
    assert capsys.readouterr().out.startswith(
        f"note    --output {tmp_path} cannot be locked (Function not implemented)"
    )


def test_json_that_several_processes_write_at_once_is_whole(tmp_path):
    """As machines that share a folder may."""
    code = "import sys; from moco.jsonfile import write_json\nfor i in range(300): write_json(sys.argv[1], [i] * 999)"
    both = [start_script("-c", code, tmp_path / "a.json") for _ in range(2)]
    while any(process.poll() is None for process in both):
        if (tmp_path / "a.json").exists():
            assert len(set(json.loads((tmp_path / "a.json").read_text()))) == 1
    assert [process.communicate()[1] for process in both] == ["", ""]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_a_flag_that_was_switched_off_is_resumed_as_it_was(tmp_path, monkeypatch):
    """Such as one that an edit adds; False has a word of its own if argparse made one."""
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_1" / "state.json").write_text('{"sha256": {}}')
    (tmp_path / "args.json").write_text('{"own_loss": false, "switch": false, "data": "shapes", "data_version": 2}')
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    parser = flag_parser("[flags]", "Mine.")
    parser.add_argument("--own-loss", action=BooleanOptionalAction, default=True)
    parser.add_argument("--switch", action="store_true")
    args = parse_resumed(parser, tmp_path, free=set())
    assert args.own_loss is False and args.switch is False
    assert args.data_version == 2  # which no flag has; the probe asks for it


def test_a_step_is_a_step_whatever_accelerate_reads_from_the_environment():
    """Accelerate would divide every loss by this, and so every gradient."""
    code = "from argparse import Namespace; from moco.run.launch import start_accelerator;"
    code += "a = start_accelerator(Namespace(mixed_precision=None)); print(a.gradient_accumulation_steps)"
    assert run_script("-c", code, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4").stdout == "1\n"


@pytest.mark.parametrize(
    "variable, value, what",
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed precision fp8"),
    ],
)
def test_what_cuts_up_the_model_is_refused_before_anything_starts(variable, value, what):
    done = run_script("train_moco.py", "--data", "shapes", **{variable: value})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and what in done.stderr


@pytest.mark.parametrize("device, waited, expected", [("cuda", 0.5, 1), ("cuda", 0.1, 0), ("cpu", 0.5, 0)])
def test_a_gpu_that_waits_for_data_is_reported_once_workers_have_started(start, capsys, device, waited, expected):
    run, shown = start(settings={"workers": 3}), []
    real = run.accelerator
    for _ in zip(range(6), run.steps()):
        take_step(run)
        run.settle()
        run.spent = {"step": 1.0, "data": waited}
        run.accelerator = SimpleNamespace(device=torch.device(device), is_main_process=True)
        run.averages()
        run.accelerator = real
        shown.append(capsys.readouterr().out.count("the GPUs wait for data 50% of the time, at 8 images/s"))
    assert shown == [0, expected, 0, 0, 0, 0]


@pytest.mark.parametrize("precision, ampere, told", [("no", True, True), ("bf16", True, False), ("no", False, False)])
def test_float32_on_a_gpu_that_has_bfloat16_gets_a_line(monkeypatch, precision, ampere, told):
    monkeypatch.setattr("moco.run.launch.PartialState", lambda: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr("moco.run.launch.AcceleratorState", lambda: SimpleNamespace(mixed_precision=precision))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: ampere)
    assert ("--mixed-precision bf16" in device_in_words(4)) == told


def test_tasks_of_srun_that_do_not_know_of_each_other_are_refused():
    done = run_script("train_moco.py", "--data", "shapes", SLURM_STEP_NUM_TASKS="4")
    words = ("srun started 4 separate processes", "`accelerate launch` on each node")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and all(word in done.stderr for word in words)


@pytest.mark.parametrize("cores, processes, workers", [(32, 8, 4), (128, 1, 16), (4, 8, 1), (2, 1, 2)])
def test_the_processes_of_a_machine_share_its_cores_among_their_workers(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    parser = ArgumentParser()
    add_workers_flag(parser.add_argument)
    assert parser.parse_args([]).workers == workers


def test_a_character_that_stdout_lacks_does_not_silence_what_follows():
    code = "from moco.errors import one_line_errors\nwith one_line_errors(): print('Bär'); print('result')"
    assert run_script("-c", code, PYTHONIOENCODING="ascii").stdout == "B\\xe4r\nresult\n"
