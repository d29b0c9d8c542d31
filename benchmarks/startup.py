"""How long a run takes to find its data: seconds and memory until the first step could be read.

python benchmarks/startup.py    a folder of 1.28 million files in 1000 classes, and 300 parquet files 50 ms away

The files of the folder are empty, the parquet files are links to one, and both lie in a temporary folder. Each
measurement is one process that does what the start of train_moco.py and of linear_probe.py does with the data: it finds
the images, says what they are, counts the classes, compares the data with a checkpoint's, and holds images out.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.data_path import photograph
from benchmarks.stream import write_files
from tests.hub import serving

REPOSITORY = Path(__file__).parent.parent
FILES, CLASSES, PARQUET_FILES, LATENCY = 1_281_167, 1000, 300, 0.05
CHILD = """
import json, resource, sys, time
from moco.data.labels import count_classes, has_labels
from moco.data.load import load_splits
started, seconds = time.perf_counter(), {}
def lap(name):
    global started
    seconds[name], started = time.perf_counter() - started, time.perf_counter()
train, _ = load_splits(sys.argv[1])
lap("find")
has_labels(train), has_labels(train), count_classes(train, None, "")
lap("labels")
train.fingerprint()
lap("compare")
train.hold_out(len(train) // 5, b"validation", 0)
lap("hold out")
seconds["MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
print(json.dumps(seconds))
"""


def measure(what, name, repository=REPOSITORY, **environment):
    """Print the seconds of each part of a start, and the memory at its peak."""
    with tempfile.TemporaryDirectory() as home:
        environment = {"HF_HOME": home, "OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-c", CHILD, str(name)]
        done = subprocess.run(
            command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True, cwd=repository
        )
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{what}: {', '.join(f'{part} {value:.2f}' for part, value in found.items())}", flush=True)


def main():
    with tempfile.TemporaryDirectory() as root:
        for number in range(FILES):
            folder = Path(root) / "files" / "train" / f"n{number * CLASSES // FILES:08}"
            if number == 0 or not folder.is_dir():
                folder.mkdir(parents=True)
            (folder / f"{folder.name}_{number}.JPEG").touch()
        for _ in range(2):  # the second finds names in the system's cache
            measure(f"{FILES} files", Path(root) / "files")
        images = [photograph(500, 375, 93, np.random.default_rng(0)) for _ in range(10)]
        write_files(Path(root) / "datasets" / "some" / "many", PARQUET_FILES, 2, images)
        with serving(root) as hub:
            hub.latency = LATENCY
            for _ in range(2):
                measure(f"{PARQUET_FILES} parquet files", "some/many", **hub.environment)


if __name__ == "__main__":
    main()
