"""Run a script of this repository that gets a signal as soon as it has logged a step, however fast it runs.

python tests/signalled.py NUMBER STEP train_moco.py [flags]
"""

import os
import runpy
import sys

from moco.run import run

number, step, *command = sys.argv[1:]
append_metrics = run.append_metrics


def append_and_signal(path, line):
    append_metrics(path, line)
    if line["step"] == int(step):
        os.kill(os.getpid(), int(number))


if __name__ == "__main__":
    run.append_metrics, sys.argv = append_and_signal, command
    runpy.run_path(command[0], run_name="__main__")
