"""Scripts that run as forks of a process in which the libraries are imported already, which takes several seconds.

A fork runs a script as `python script` and torchrun do, but for its start: what a library reads from the environment
while it is imported has been read. `fork_is_a_start` says where this matters.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # of whatever is started, and of the server, which starts with the first fork
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_moco", "linear_probe", "detect_transfer"])
READ_BY_IMPORTS = ("HF_", "OMP_", "PYTHON", "CUDA_")


def fork_is_a_start(command, environment):
    """Whether a script, run with these variables beside those of the tests, cannot tell a fork from a start."""
    return str(command[0]).endswith(".py") and not any(name.startswith(READ_BY_IMPORTS) for name in environment)


def run_forked(command, processes, timeout, environment):
    """What `subprocess.run` gives for a script on so many gloo processes. A failure ends the others, too."""
    command, environment = [str(part) for part in command], dict(os.environ) | environment
    if processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
    deadline = time.monotonic() + timeout
    with TemporaryDirectory() as folder:
        streams = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        forks = []
        for rank in range(processes):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            forks.append(FORKS.Process(target=run_as_script, args=(command, environment | of_rank, streams)))
            forks[-1].start()
        try:
            codes = wait_for(forks, deadline)
        finally:
            for fork in forks:
                fork.kill()
        stdout, stderr = (Path(path).read_text() for path in streams)
    if time.monotonic() > deadline:
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    failed = [code for code in codes if code]
    return subprocess.CompletedProcess(command, (failed[0] if processes == 1 else 1) if failed else 0, stdout, stderr)


def wait_for(forks, deadline):
    """The exit codes of all, or of those that have ended when one has failed or time is up."""
    while True:
        codes = [fork.exitcode for fork in forks if fork.exitcode is not None]
        if len(codes) == len(forks) or any(codes) or time.monotonic() > deadline:
            return codes
        multiprocessing.connection.wait([fork.sentinel for fork in forks if fork.exitcode is None], timeout=1)


def run_as_script(command, environment, streams):
    """In the fork: be the process that `python command` would have started."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0:0] = command, [str(Path(command[0]).resolve().parent)]
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a fork of multiprocessing leaves out
