"""MoCo trajectories against the reference implementation's numbers, on one process and on two.

pytest tests/test_golden.py                                  the numbers in tests/golden
MOCO_GOLDEN=FOLDER pytest -k golden                          other numbers of the same schema
"""

import json

import pytest
import torch
from accelerate import Accelerator
from conftest import run_script
from safetensors.torch import load_file
from trajectory import run_trajectory

TRAJECTORIES = [
    ("moco_v1", 1),
    ("moco_v2", 1),
    ("moco_v2", 2),
    ("moco_v2_resnet18", 1),
    ("moco_v2_resnet18", 2),
    ("moco_v2_wc", 1),
    ("moco_v2_wc", 2),
]
PRECISIONS = {"float64": "f64", "float32": "f32"}


def read(golden, name, world):
    """(description, expected numbers) of a trajectory."""
    description = json.loads((golden / "moco" / f"{name}.json").read_text())
    return description, load_file(golden / "moco" / f"{name}_w{world}.safetensors")


def close(actual, expected, atol):
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=atol)


def digest(x):
    """[sum, l2 norm, up to 64 entries at equal distances], as the golden numbers keep large tensors."""
    flat = x.double().flatten()
    return torch.cat([flat.sum()[None], flat.norm()[None], flat[:: max(1, len(flat) // 64)][:64]])


def check_steps(description, expected, outputs, world, dtype):
    """Logits, loss, accuracy and queue of every step that was taken."""
    precision, exact = PRECISIONS[dtype], dtype == "float64"
    tolerances = description[f"w{world}_tolerance"][f"{precision}_logits_atol"]
    for step, atol in enumerate(tolerances if exact else tolerances[:1]):
        logits, losses, hits = outputs[f"step{step}.logits"], [], []
        for rank, rows in enumerate(logits.chunk(world)):
            key = f"{precision}.step{step}.rank{rank}"
            close(rows, expected[f"{key}.logits"], atol)
            losses.append(expected[f"{key}.loss"])
            hits.append(expected[f"{key}.acc1"])
        close(outputs[f"step{step}.loss"], torch.stack(losses).mean(dim=0), atol)
        if exact:
            close(outputs[f"step{step}.acc1"], torch.stack(hits).mean(dim=0), 1e-4)
        close(outputs[f"step{step}.queue"], expected[f"{precision}.step{step}.queue"], 1e-9 if exact else 1e-5)
        assert outputs[f"step{step}.queue_ptr"].equal(expected[f"{precision}.step{step}.queue_ptr"])


def check_statistics(description, expected, outputs, processes, world):
    """BatchNorm's running statistics of the first layer, after every step, with momentum 0.1.

    processes: how many ran. The reference overwrites the statistics with process 0's before each forward pass; ours
    are averaged over processes after each step, and several groups on one process update them in turn. All follow
    from the statistics of each group, which the reference's numbers give: batch = (after - 0.9 * process 0's
    before) / 0.1.
    """
    for encoder in "qk":
        for statistic, start in (("mean", 0.0), ("var", 1.0)):
            name = f"encoder_{encoder}.bn1.running_{statistic}"
            before = None
            for step in range(description["config"]["steps"]):
                after = [expected[f"f64.step{step}.rank{rank}.{name}"] for rank in range(world)]
                if before is None:
                    before = ours = torch.full_like(after[0], start)
                batches = [(rank_after - 0.9 * before) / 0.1 for rank_after in after]
                before = after[0]
                if processes > 1:
                    ours = sum(0.9 * ours + 0.1 * batch for batch in batches) / world
                else:
                    for batch in batches:
                        ours = 0.9 * ours + 0.1 * batch
                close(outputs[f"step{step}.{name}"], ours, 1e-9)


def check_end(expected, outputs):
    """Gradients of the first step, momentum buffers and final parameters."""
    gradients = [key for key in expected if key.startswith(("step0.grad.", "final.momentum."))]
    for key in gradients:
        close(outputs[key], expected[key], 1e-6 * expected[key].abs().max().item())
    finals = [key.removeprefix("f64.") for key in expected if key.startswith("f64.final.encoder")]
    finals = [key for key in finals if "running" not in key and "num_batches" not in key]
    for key in finals:
        close(outputs[key], expected[f"f64.{key}"], 1e-9)
    digests = [key for key in expected if key.startswith("f64.digest.") and "running" not in key]
    for key in digests:
        value = outputs[key.removeprefix("f64.digest.")]
        close(digest(value), expected[key], 1e-9 * max(1, value.double().abs().sum().item()))
    assert len(finals) + len(digests) >= 4 and len(gradients) + len(digests) >= 4


def check(description, expected, outputs, processes, world, dtype):
    check_steps(description, expected, outputs, world, dtype)
    if dtype == "float64":
        check_statistics(description, expected, outputs, processes, world)
        check_end(expected, outputs)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    "name, world, grouped",
    [(name, world, grouped) for name, world in TRAJECTORIES for grouped in ([False, True] if world > 1 else [False])],
)
def test_golden_trajectory_on_one_process(golden, name, world, grouped, dtype):
    """One process; the reference's two BatchNorm groups are two forward passes of it, or one that keeps them apart."""
    description, expected = read(golden, name, world)
    bn_batch = description["config"]["batch"] // world
    outputs = run_trajectory(golden, name, getattr(torch, dtype), bn_batch, Accelerator(cpu=True), grouped)
    check(description, expected, outputs, 1, world, dtype)


ON_TWO = [name for name, world in TRAJECTORIES if world == 2]


@pytest.fixture(scope="module")
def taken(golden, tmp_path_factory):
    """A folder with the steps that two processes took, of every trajectory."""
    output = tmp_path_factory.mktemp("taken")
    done = run_script("tests/trajectory.py", golden, output, *ON_TWO, processes=2)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ON_TWO)
def test_golden_trajectory_on_two_processes(golden, name, dtype, taken):
    """Two gloo processes, each encoding its half of the shuffled keys as one BatchNorm group."""
    description, expected = read(golden, name, 2)
    ranks = [load_file(taken / f"{name}_{dtype}_rank{rank}.safetensors") for rank in (0, 1)]
    for key in ranks[0]:
        if not key.endswith(("logits", "loss", "acc1")):
            assert ranks[0][key].equal(ranks[1][key]), f"{key} differs between the processes"
    for step in range(description["config"]["steps"] if dtype == "float64" else 1):
        ranks[0][f"step{step}.logits"] = torch.cat([rank[f"step{step}.logits"] for rank in ranks])
        for name in ("loss", "acc1"):
            ranks[0][f"step{step}.{name}"] = sum(rank[f"step{step}.{name}"] for rank in ranks) / 2
    check(description, expected, ranks[0], 2, 2, dtype)
