"""JSON files: written whole or not at all, and read with errors that say what to do."""

import json
import os
import socket
from contextlib import contextmanager
from pathlib import Path

from moco.errors import explained

# What using a value of another kind than was written raises, and what a missing or damaged file does.
DAMAGE = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


def write_json(path, value):
    """Write JSON so that readers see the old file or the new one, never half of one, whoever else writes it."""
    partial = Path(f"{path}.{socket.gethostname()}-{os.getpid()}.partial")  # machines may share the folder
    partial.write_text(json.dumps(value, indent=1) + "\n")
    sync(partial)
    os.replace(partial, path)


@contextmanager
def reading_json(path, remedy):
    """The object in a JSON file, for use inside of `with`: what cannot be used is reported as damage of the file.

    Raises UserError that names the file, what is wrong with it and the remedy.
    """
    with explained(f"{path} is damaged", remedy, *DAMAGE):
        with explained(f"{path} is missing", remedy, FileNotFoundError):
            content = Path(path).read_text()
        yield dict(json.loads(content))


def sync(path):
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
