"""Slow: processes killed together and resumed, and two machines' worth of processes on loopback.

pytest -m slow tests/test_machines.py
"""

import socket
from contextlib import suppress

import datasets
import psutil
import pytest
from conftest import HANG, assert_same_run, start_script, wait_for_step, write_parquet

pytestmark = pytest.mark.slow

RUN = "--arch resnet10 --image-size 32 --queue-size 40 --dim 16 --mixed-precision no --log-every 1 --epochs 5".split()
RUN += "--batch-size 16 --bn-batch 8 --workers 1 --shuffle-window 20 --checkpoint-every 3 --knn-every 2".split()


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    """Three files of 25 images in row groups of 10, 10 and 5: four steps an epoch."""
    root = tmp_path_factory.mktemp("parquet")
    for file in range(3):
        write_parquet(root / f"train-{file}-of-3.parquet", "train", range(25 * file, 25 * file + 25), rows=10)
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


def test_two_processes_killed_in_mid_epoch_and_resumed_are_the_uninterrupted_run(parquet, tmp_path):
    output = tmp_path / "run"
    for step, resume in ((5, []), (10, ["--resume"])):
        process = start(TORCHRUN, parquet, output, *resume)
        try:
            wait_for_step(process, output, step)
        finally:
            kill(process)
    finish(start(TORCHRUN, parquet, output, "--resume"))
    finish(start(TORCHRUN, parquet, tmp_path / "uninterrupted"))
    assert_same_run(output, tmp_path / "uninterrupted")


@pytest.mark.parametrize("launcher, streamed", [("accelerate", True), ("torchrun", False)])
def test_two_machines_of_one_process_are_one_machine_of_two(parquet, tmp_path, launcher, streamed):
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
    finish(start(TORCHRUN, data, tmp_path / "one"))
    assert_same_run(tmp_path / "two", tmp_path / "one")
