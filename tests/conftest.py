"""What several test files share: the folder of golden numbers, parquet files, and running a script as a user would."""

import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# Before any library looks. The caller's settings must not reach the tests, nor the scripts that they start.
for name in list(os.environ):
    if name.startswith(("ACCELERATE_", "HF_", "HUGGING_FACE_", "OMP_", "GOMP_", "MKL_")) and name not in (
        "HF_HOME",
        "HF_XET_CACHE",
    ):
        del os.environ[name]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one process and two are compared on the same device
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; another number of threads sums in another order

import datasets
import pytest
from accelerate.state import AcceleratorState
from forks import ROOT, fork_is_a_start, run_forked

from moco.data.shapes import CLASSES, draw_scene, encode_jpeg
from moco.errors import one_line_errors
from moco.run.checkpoint import complete_checkpoints, load_checkpoint, read_metrics

HANG = 1800  # seconds after which a process is taken to hang; no test passes or fails by it on a slow machine


@pytest.fixture(scope="session")
def golden():
    """The folder of golden numbers: tests/golden, or another of the same schema that MOCO_GOLDEN names."""
    return Path(os.environ.get("MOCO_GOLDEN") or Path(__file__).parent / "golden").resolve()


def start_script(*command, processes=1, **environment):
    """Start a Python script from the repository's root, on one process or as gloo processes under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(
        launcher + [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_script(*command, processes=1, timeout=HANG, **environment):
    """Run a script as `start_script` does, to its end; as a fork, if it cannot tell."""
    if fork_is_a_start(command, environment):
        return run_forked(command, processes, timeout, environment)
    process = start_script(*command, processes=processes, **environment)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):  # a timeout leaves none of its processes behind
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_for_step(process, output, step):
    """Wait until the run in `output` has logged a step."""
    while process.poll() is None:
        if (output / "metrics.jsonl").exists() and any(
            line["step"] >= step for line in read_metrics(output / "metrics.jsonl")
        ):
            return
        time.sleep(0.01)
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


def write_parquet(path, split, numbers, rows):
    """A parquet file of the built-in images `numbers` of a split, with their classes, in row groups of `rows`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=len(CLASSES)))
    scenes = [draw_scene(split, number) for number in numbers]
    images = [{"bytes": encode_jpeg(image), "path": f"{number}.jpg"} for number, (image, _, _) in zip(numbers, scenes)]
    labels = [int(labels[0]) for _, labels, _ in scenes]
    part = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    part.to_parquet(path, batch_size=rows)


def write_three_files(folder):
    """Three parquet files of 25 images in row groups of 10, 10 and 5."""
    for file in range(3):
        write_parquet(folder / f"train-{file}-of-3.parquet", "train", range(25 * file, 25 * file + 25), rows=10)


@pytest.fixture(scope="module")
def parquet_folder(tmp_path_factory):
    """The folder of `write_three_files`, where `hub.serving` finds it as the dataset some/one."""
    root = tmp_path_factory.mktemp("served") / "datasets" / "some" / "one"
    write_three_files(root)
    return root


def refusal(script, argv, monkeypatch, capsys):
    """The one line with which a script's main() refuses its flags, with exit code 2."""
    datasets.disable_progress_bars()  # what is converted on the way would show one
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
    AcceleratorState._reset_state()  # as in a process of its own
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        script.main()
    AcceleratorState._reset_state()
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def call_main(script, *flags):
    """The main() of a script of the repository, or of a copy of one, in this process: it saves the start of another."""
    AcceleratorState._reset_state()  # as in a process of its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / script), *map(str, flags)])
        runpy.run_path(sys.argv[0])["main"]()
    AcceleratorState._reset_state()


def is_time(key):
    """Whether a value of the log may differ between two runs of the same numbers: how long it took, and from where."""
    read = ("_mb", "read_mb_per_second", "resolves", "refused")
    return key in ("images_per_second", "data_share") or key.endswith(("_seconds", *read))


def metrics_of(output):
    """The lines of a run's log without what two runs of the same numbers differ in."""
    return [{k: v for k, v in line.items() if not is_time(k)} for line in read_metrics(output / "metrics.jsonl")]


def final_state(output):
    """(tensors, state) of a run's newest checkpoint."""
    return load_checkpoint(complete_checkpoints(output / "checkpoints")[-1])


def assert_same_run(output, expected):
    """Bit for bit the same weights, statistics, queue, optimizer state and metrics.

    Numbers of features differ by rounding, which depends on how many images a worker has at once.
    """
    lines, expected_lines = metrics_of(output), metrics_of(expected)
    for line, expected_line in zip(lines, expected_lines):
        for name in {"rank", "uniformity", "alignment"} & line.keys():
            assert line.pop(name) == pytest.approx(expected_line.pop(name), rel=1e-4)
    assert lines == expected_lines
    (tensors, state), (expected_tensors, expected_state) = final_state(output), final_state(expected)
    assert state == expected_state  # with the checksum of every file
    assert all(value.equal(expected_tensors[name][key]) for name in tensors for key, value in tensors[name].items())
