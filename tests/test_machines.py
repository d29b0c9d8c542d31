"""Slow: processes killed together and resumed, and two machines' worth of processes on loopback.

pytest -m slow tests/test_machines.py
"""

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress

import datasets
import psutil
import pytest
from conftest import HANG, ROOT, assert_same_run, run_script, start_script, wait_for_step, write_three_files

pytestmark = pytest.mark.slow

RUN = "--arch resnet10 --image-size 32 --queue-size 40 --dim 16 --mixed-precision no --log-every 1 --epochs 5".split()
RUN += "--batch-size 16 --bn-batch 8 --workers 1 --shuffle-window 20 --checkpoint-every 3 --knn-every 2".split()


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    """Three files of 25 images: four steps an epoch."""
    root = tmp_path_factory.mktemp("parquet")
    write_three_files(root)
    return root


def start(launcher, data, output, *flags, **environment):
    """Start train_moco.py under a launcher."""
    command = ["-m", *launcher, "train_moco.py", "--data", data, "--output", output, *RUN, *flags]
    return start_script(*command, ACCELERATE_USE_CPU="true", **environment)


def kill(process):
    """SIGKILL to a launcher, its processes and their workers."""
    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        for each in (launcher, *launcher.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.communicate()


def finish(*processes):
    """Wait for launchers to succeed."""
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=HANG)
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            kill(process)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="session")
def uninterrupted(parquet, tmp_path_factory):
    """What the runs of this file over `parquet` are compared with."""
    return one_machine(parquet, tmp_path_factory.mktemp("uninterrupted") / "run")


def one_machine(data, output):
    """A run of two processes on one machine; returns its folder."""
    done = run_script("train_moco.py", "--data", data, "--output", output, *RUN, processes=2)
    assert done.returncode == 0, done.stderr
    return output


def test_two_processes_killed_in_mid_epoch_and_resumed_are_the_uninterrupted_run(parquet, uninterrupted, tmp_path):
    output = tmp_path / "run"
    for step, resume in ((5, []), (10, ["--resume"])):
        process = start(TORCHRUN, parquet, output, *resume)
        try:
            wait_for_step(process, output, step)
        finally:
            kill(process)
    finish(start(TORCHRUN, parquet, output, "--resume"))
    assert_same_run(output, uninterrupted)


@pytest.mark.parametrize("launcher, streamed", [("accelerate", True), ("torchrun", False)])
def test_two_machines_of_one_process_are_one_machine_of_two(parquet, uninterrupted, tmp_path, launcher, streamed):
    """The README's launch lines, streamed and not: one folder for the run, a cache of data for each machine."""
    data = parquet if streamed else tmp_path / "saved"
    if not streamed:
        datasets.load_dataset(str(parquet), cache_dir=tmp_path / "cache").save_to_disk(data)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = []
    for rank in ("0", "1"):
        if launcher == "accelerate":
            command = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
            command += ["--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        else:
            command = ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", rank]
            command += ["--master_addr", "127.0.0.1", "--master_port", port]
        machines.append(start(command, data, tmp_path / "two", HF_HOME=str(tmp_path / f"cache{rank}")))
    finish(*machines)
    expected = uninterrupted if streamed else one_machine(data, tmp_path / "one")  # other data, another order
    assert_same_run(tmp_path / "two", expected)


SRUN = """#!/bin/bash
shift  # --cpus-per-task
for node in 0 1; do SLURM_NODEID=$node SLURM_STEP_NUM_TASKS=2 "$@" & done
wait -n; code=$?; wait; exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


def test_the_slurm_script_trains_on_two_nodes_and_resumes(parquet, uninterrupted, tmp_path):
    """The script of the docs, with stand-ins for SLURM's commands and the flags of a small run."""
    script = re.search(r"```sh\n(#!/bin/bash.*?)```", (ROOT / "docs/reproducibility.md").read_text(), re.DOTALL)[1]
    small = " ".join(["--data", str(parquet), *RUN])
    script = script.replace("runs/v2-imagenet-1k", str(tmp_path / "run")).replace("--mixed_precision bf16", "")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = script.replace("$((20000 + SLURM_JOB_ID % 10000))", str(free.getsockname()[1]))
    script = script.replace("--batch-size 512 --lr 0.06", small)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("train.sh", script)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"NNODES": 2, "GPUS_ON_NODE": 1, "CPUS_PER_TASK": 2, "JOB_NODELIST": "n[0-1]", "JOB_ID": 1}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()} | {
        "PATH": f"{tmp_path}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true", "REQUEUED": str(tmp_path / "requeued"), "EARLY": "0",
    }  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}

    def job():
        return subprocess.Popen([tmp_path / "train.sh"], cwd=ROOT, env=os.environ | environment, **pipes)

    process = job()
    try:
        wait_for_step(process, tmp_path / "run", 5)
    finally:
        kill(process)
    finish(job())
    assert not (tmp_path / "requeued").exists()  # it is finished
    assert_same_run(tmp_path / "run", uninterrupted)
