"""Learning rates against the reference's, epoch by epoch. pytest tests/test_schedule.py"""

import json

import pytest

from moco.schedule import learning_rate


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
    assert compared >= 200


def test_cosine_starts_at_the_base_and_halves_in_the_middle():
    assert learning_rate(0.03, 0, 200, "cosine", ()) == 0.03
    assert learning_rate(0.03, 100, 200, "cosine", ()) == pytest.approx(0.015)


def test_step_drops_at_the_milestones():
    rates = [learning_rate(1.0, epoch, 10, "step", (6, 8)) for epoch in range(10)]
    assert rates == pytest.approx([1.0] * 6 + [0.1] * 2 + [0.01] * 2)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="linear"):
        learning_rate(0.03, 0, 200, "linear", ())
