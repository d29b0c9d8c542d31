"""Slow: what is kept for a GPU, run small on a CPU, all but its last three parts. pytest -m slow tests/test_gpu.py"""

import re

import pytest
from conftest import run_script

from benchmarks.gpu import PARTS


@pytest.mark.slow
def test_every_part_of_the_report_runs_and_none_runs_twice(tmp_path):
    command = ("benchmarks/gpu.py", "--tiny", "--minutes", 60, "--output", tmp_path / "report.md")
    assert run_script(*command).returncode == 0
    report = (tmp_path / "report.md").read_text()
    assert re.findall("^## (.*)$", report, re.MULTILINE) == [heading for heading, (_, tiny) in PARTS.items() if tiny]
    assert "failed" not in report and "| float64 | 0 | 0 |" in report and "kNN accuracy" in report
    again = run_script(*command)
    assert (tmp_path / "report.md").read_text() == report and len(again.stdout.splitlines()) == 1
