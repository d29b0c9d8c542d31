"""A few steps of MoCo on stored inputs, by the step of train_moco.py; test_golden.py compares every number.

Run as a script it is one of two gloo processes, and takes the steps of each trajectory in both precisions:
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/trajectory.py GOLDEN_FOLDER OUTPUT_FOLDER NAME ...
"""

import copy
import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import train_moco
from moco.contrast import KeyQueue, contrastive_logits
from moco.encoder import GroupedBatchNorm2d, build_encoder


def tiny_resnet(width, layers, dim, mlp, bn_batch=None):
    """The golden numbers' small encoder: a ResNet of BasicBlocks with every channel count divided by 64 / width."""
    norm = partial(GroupedBatchNorm2d, group=bn_batch) if bn_batch else nn.BatchNorm2d
    encoder = ResNet(BasicBlock, layers, num_classes=dim, norm_layer=norm)
    encoder.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    encoder.bn1 = norm(width)
    encoder.inplanes = width
    for i, blocks in enumerate(layers):
        stage = encoder._make_layer(BasicBlock, width * 2**i, blocks, stride=1 if i == 0 else 2)
        setattr(encoder, f"layer{i + 1}", stage)
    encoder.fc = nn.Linear(8 * width, dim)
    if mlp:
        encoder.fc = nn.Sequential(nn.Linear(8 * width, 8 * width), nn.ReLU(), encoder.fc)
    return encoder


def reference_name(name):
    """The reference's name of a parameter or buffer: there an encoder is a ResNet with the head as its `fc`."""
    return name.removeprefix("backbone.").replace("head.", "fc.")


def recipe_weights(shapes, base_seed):
    """Weights that are not stored but computed, see "Recipe for moco_v2_resnet18" of the golden numbers."""
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        u = np.random.RandomState(base_seed + i).random_sample(shape) * 2 - 1
        if len(shape) == 4:
            u = u * np.sqrt(6 / np.prod(shape[1:]))
        elif len(shape) == 2:
            u = u / np.sqrt(shape[1])
        else:
            u = 1 + 0.1 * u if name.endswith("weight") else 0.1 * u
        weights[name] = torch.from_numpy(u.astype(np.float32))
    return weights


def initial_encoder(description, inputs, bn_batch):
    """The query encoder of step 0 with the stored or computed weights."""
    config = description["config"]
    if "full" in config:
        encoder = build_encoder(config["full"], config["dim"], "mlp" if config["mlp"] else "fc", bn_batch=bn_batch)
        shapes = {reference_name(name): tuple(value.shape) for name, value in encoder.named_parameters()}
        assert list(shapes) == description["param_names"]
        weights = recipe_weights(shapes, description["recipe"]["base_seed"])
        for name, check in description["recipe"]["checks"].items():
            torch.testing.assert_close(weights[name].flatten()[:4].tolist(), check["first"], rtol=0, atol=0)
        missing, unexpected = encoder.load_state_dict(weights, strict=False)
        assert not unexpected and all("running" in name or "num_batches" in name for name in missing)
        return encoder
    encoder = tiny_resnet(config["width"], config["layers"], config["dim"], config["mlp"], bn_batch)
    prefix = "init.encoder_q."
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)})
    return encoder


def run_trajectory(golden, name, dtype, bn_batch, accelerator, grouped=False):
    """`moco_step` on this process's rows; returns a dict of tensors named as the golden files name them.

    dtype: in float64 every step is taken. In float32 it is the first one alone, because the later ones depend on the
    CPU: BatchNorm over few images multiplies a difference in rounding up to 0.2 in the logits within five steps.
    bn_batch: images in a BatchNorm group; several groups a process make what the reference needs several GPUs for.
    grouped: whether one forward pass holds all groups, instead of a pass for each.
    """
    description = json.loads((golden / "moco" / f"{name}.json").read_text())
    config, inputs = description["config"], load_file(golden / "moco" / f"{name}_inputs.safetensors")
    query_encoder = initial_encoder(description, inputs, bn_batch if grouped else None).to(dtype)
    key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
    queue = KeyQueue(config["K"], config["dim"]).to(dtype)
    queue.keys.copy_(inputs["init.queue"].T)
    optimizer = torch.optim.SGD(
        query_encoder.parameters(), config["lr"], config["momentum"], weight_decay=config["weight_decay"]
    )
    names = [reference_name(name) for name, _ in query_encoder.named_parameters()]
    outputs, logits = {}, []

    def keep_gradients(sgd, *_):
        for name, parameter in zip(names, query_encoder.parameters()):
            outputs.setdefault(f"step0.grad.{name}", parameter.grad.clone())

    def keep_logits(*arguments):
        logits.append(contrastive_logits(*arguments))
        return logits[-1]

    optimizer.register_step_pre_hook(keep_gradients)
    query_encoder, optimizer = accelerator.prepare(query_encoder, optimizer)
    bare_query_encoder = accelerator.unwrap_model(query_encoder)

    n, rank = config["batch"] // accelerator.num_processes, accelerator.process_index
    mine = slice(rank * n, (rank + 1) * n)
    for step in range(config["steps"] if dtype == torch.float64 else 1):
        views = [inputs[f"step{step}.im_{x}"][mine].to(dtype) / 32 for x in "qk"]
        with patch.object(train_moco, "contrastive_logits", keep_logits):
            loss, accuracy = train_moco.moco_step(
                query_encoder, key_encoder, queue, optimizer, views, inputs[f"step{step}.idx_shuffle"], accelerator,
                temperature=config["T"], encoder_momentum=config["m"], images_per_pass=n if grouped else bn_batch,
            )  # fmt: skip
        outputs |= {f"step{step}.loss": loss[None], f"step{step}.acc1": accuracy[None]}
        outputs[f"step{step}.logits"] = torch.cat(logits).detach()
        logits.clear()
        outputs[f"step{step}.queue"] = queue.keys.T.clone().contiguous()
        outputs[f"step{step}.queue_ptr"] = queue.cursor.clone()[None]
        for which, encoder in (("q", bare_query_encoder), ("k", key_encoder)):
            norm = getattr(encoder, "backbone", encoder).bn1
            outputs[f"step{step}.encoder_{which}.bn1.running_mean"] = norm.running_mean.clone()
            outputs[f"step{step}.encoder_{which}.bn1.running_var"] = norm.running_var.clone()
    for which, encoder in (("q", bare_query_encoder), ("k", key_encoder)):
        outputs |= {
            f"final.encoder_{which}.{reference_name(name)}": value for name, value in encoder.state_dict().items()
        }
    for name, parameter in zip(names, query_encoder.parameters()):
        outputs[f"final.momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    return outputs


if __name__ == "__main__":
    golden, output, *names = sys.argv[1:]
    torch.set_num_threads(1)
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    for name in names:
        config = json.loads((Path(golden) / "moco" / f"{name}.json").read_text())["config"]
        per_process = config["batch"] // accelerator.num_processes
        for dtype in ("float64", "float32"):
            outputs = run_trajectory(Path(golden), name, getattr(torch, dtype), per_process, accelerator)
            save_file(outputs, Path(output) / f"{name}_{dtype}_rank{accelerator.process_index}.safetensors")
    accelerator.end_training()
