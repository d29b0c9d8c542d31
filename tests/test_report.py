"""Pictures hold what they say. pytest tests/test_report.py"""

import numpy as np
from PIL import Image

from moco.report import save_neighbours


def test_neighbours_of_another_class_alone_are_framed(tmp_path):
    gray = np.full((16, 16, 3), 128, np.uint8)

    def red_pixels(*right):
        found = {"random": [[(gray, good) for good in right]] * 2, "trained": [[(gray, True)] * len(right)] * 2}
        save_neighbours(tmp_path / "n.png", [gray, gray], found)
        pixels = np.asarray(Image.open(tmp_path / "n.png").convert("RGB")).astype(int)
        return int(((pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(axis=2)).sum())

    assert red_pixels(True, True, True) == 0
    assert red_pixels(True, False, True) > 0
    assert 1.5 < red_pixels(False, True, False) / red_pixels(True, False, True) < 2.5
