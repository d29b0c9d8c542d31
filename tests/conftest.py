"""What several test files share: the folder of golden numbers, and running a script as a user would."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """The folder of golden numbers: tests/golden, or another of the same schema that MOCO_GOLDEN names."""
    return Path(os.environ.get("MOCO_GOLDEN") or Path(__file__).parent / "golden").resolve()


def run_script(*command, processes=1, timeout=300, **environment):
    """Run a Python script from the repository's root, on one process or as gloo processes under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment["ACCELERATE_USE_CPU"] = "true"
    process = subprocess.Popen(
        launcher + [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):  # a timeout leaves none of its processes behind
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
