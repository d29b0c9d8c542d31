"""Learning rates and LARS against the reference's numbers. pytest tests/test_schedule.py"""

import json

import pytest
import torch
from safetensors.torch import load_file

from moco.schedule import LARS, learning_rate, warmup_cosine_rate


def test_golden_learning_rates(golden):
    compared = 0
    for name, entry in json.loads((golden / "schedules" / "lr.json").read_text()).items():
        args = entry["args"]
        if "lr" not in entry:  # by step, not by epoch: SimCLR's
            continue
        schedule = "cosine" if args.get("cos") else "step"
        for epoch, expected in enumerate(entry["lr"]):
            ours = learning_rate(args["lr"], epoch, args["epochs"], schedule, args["schedule"])
            assert ours == pytest.approx(expected, rel=1e-12), (name, epoch)
            compared += 1
    assert compared


def test_golden_learning_rates_of_simclr(golden):
    compared = 0
    for name, entry in json.loads((golden / "schedules" / "lr.json").read_text()).items():
        if "lr_per_step" not in entry:
            continue
        args = entry["args"]
        images, batch = args["num_examples"], args["train_batch_size"]
        scale = batch / 256 if args["learning_rate_scaling"] == "linear" else batch**0.5
        warmup, total = args["warmup_epochs"] * images // batch, args["train_epochs"] * images // batch + 1
        for step, expected in enumerate(entry["lr_per_step"]):
            ours = warmup_cosine_rate(args["base_lr"] * scale, step, warmup, total)
            assert ours == pytest.approx(expected, abs=1e-6 * args["base_lr"] * scale), (name, step)
            compared += 1
    assert compared


@pytest.mark.parametrize("impl, dtype", [("tf_f64", torch.float64), ("tf", torch.float32), ("tf_wd0", torch.float32)])
def test_golden_lars(golden, impl, dtype):
    """Parameters after each step: to rounding in float64; in float32 relative to how far they went."""
    description = json.loads((golden / "simclr" / "lars.json").read_text())
    config, data = description["config"], load_file(golden / "simclr" / "lars.safetensors")
    start = {name: data[f"init|{name}"].to(dtype) for name in config["names"]}
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    decay = config["variants"].get(impl, {}).get("weight_decay", config["weight_decay"])
    optimizer = LARS(parameters.values(), 0, config["momentum"], decay, config["eeta"])
    for step, lr in enumerate(config["lrs"]):
        optimizer.param_groups[0]["lr"] = lr
        for name, parameter in parameters.items():
            parameter.grad = data[f"step{step}|grad|{name}"].to(dtype)
        optimizer.step()
        for name, parameter in parameters.items():
            expected = data[f"{impl}|step{step}|{name}"]
            if dtype == torch.float64:
                torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-12)
            else:
                moved = (expected - start[name]).norm()
                assert (parameter.detach() - expected).norm() <= 5e-4 * moved, (name, step)


def test_cosine_starts_at_the_base_and_halves_in_the_middle():
    assert learning_rate(0.03, 0, 200, "cosine", ()) == 0.03
    assert learning_rate(0.03, 100, 200, "cosine", ()) == pytest.approx(0.015)


def test_step_drops_at_the_milestones():
    rates = [learning_rate(1.0, epoch, 10, "step", (6, 8)) for epoch in range(10)]
    assert rates == pytest.approx([1.0] * 6 + [0.1] * 2 + [0.01] * 2)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="linear"):
        learning_rate(0.03, 0, 200, "linear", ())
