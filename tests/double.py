"""Run a script of this repository in float64, so that what its steps compute does not depend on the CPU.

python tests/double.py train_moco.py [flags]

Weights, views, losses and statistics are then float64, because nothing in the repository asks for another precision
than PyTorch's default one. In float32 a different order of additions (another instruction set, another number of
threads) is another trajectory after a few steps, because BatchNorm over few images multiplies the difference.
"""

import runpy
import sys

import torch

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
