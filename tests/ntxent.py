"""One of two gloo processes that differentiate SimCLR's loss over the global batch; test_contrast.py compares.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/ntxent.py GOLDEN_FOLDER OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path

import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from moco.contrast import gather_with_gradient, nt_xent_logits

golden, output = map(Path, sys.argv[1:])
accelerator = Accelerator()
rank, world = accelerator.process_index, accelerator.num_processes
data = load_file(golden / "simclr" / "ntxent.safetensors")
results = {}
for temperature in json.loads((golden / "simclr" / "ntxent.json").read_text())["config"]["T"]:
    own = [data[name].double().chunk(world)[rank].clone().requires_grad_() for name in ("z0", "z1")]
    views = [gather_with_gradient(F.normalize(z, dim=1), accelerator) for z in own]
    loss = F.cross_entropy(*nt_xent_logits(*views, temperature))
    loss.backward()
    results |= {f"T{temperature}.loss": loss.detach()[None]}
    results |= {f"T{temperature}.grad_z{i}": z.grad for i, z in enumerate(own)}
save_file(results, output / f"rank{rank}.safetensors")
accelerator.end_training()
