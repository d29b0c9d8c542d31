"""Slow: what is kept for a GPU, run small on a CPU, the first four parts. pytest -m slow tests/test_gpu.py"""

import re
import sys

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_every_part_of_the_report_runs_and_none_runs_twice(tmp_path, monkeypatch, capsys):
    path = tmp_path / "report.md"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--minutes", "60", "--output", str(path)])
    gpu.main()
    report = path.read_text()
    assert re.findall("^## (.*)$", report, re.MULTILINE) == [name for name, (_, tiny) in gpu.PARTS.items() if tiny]
    assert "failed" not in report
    shares = {name: float(share) for name, share in re.findall(r"\| (float\S*|bfloat16).* \| .* \| (.*) \|", report)}
    assert shares["float64"] == 0 < shares["float32"] < 1e-4 < shares["bfloat16"] < 0.1
    off = [float(number) for number in re.findall(r"views, .*: (\S+) at most from those of the CPU", report)]
    assert len(off) == 2 and max(off) < 1e-5 / 0.224  # of float32, divided by the smallest deviation
    assert "were taken twice: their losses differ by 0 at most" in report and "kNN accuracy" in report
    capsys.readouterr()
    gpu.main()
    assert path.read_text() == report and len(capsys.readouterr().out.splitlines()) == 1
