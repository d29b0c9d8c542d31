"""Two processes whose queues differ: the check that guards checkpoints must find it. Run by test_train.py."""

import torch
from accelerate import Accelerator

from moco.contrast import KeyQueue
from moco.run.checkpoint import check_equal_state

accelerator = Accelerator()
equal = KeyQueue(4, 2, torch.Generator().manual_seed(0))
check_equal_state({"queue": equal}, accelerator)
different = KeyQueue(4, 2, torch.Generator().manual_seed(accelerator.process_index))
check_equal_state({"queue": different}, accelerator)
