"""JSON files: written whole or not at all, and read against what must be in them."""

import json
import os
from pathlib import Path

from moco.errors import UserError, first_line


def write_json(path, value):
    """Write JSON so that readers see the old file or the new one, never half of one."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    sync(partial)
    os.replace(partial, path)


def read_json(path, fields, remedy):
    """The object in a JSON file. fields: {key: whether a value is good}; a key that may be absent takes None.

    Raises UserError that names the file, what is wrong with it and the remedy.
    """
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no object); {remedy}")
    for key, is_good in fields.items():
        if not is_good(content.get(key)):
            raise UserError(f"{path} is damaged ({key} is {content.get(key)!r:.60}); {remedy}")
    return content


def is_whole(value):
    return type(value) is int and value >= 0


def is_text(value):
    return isinstance(value, str)


def is_object(value):
    return isinstance(value, dict)


def is_numeric(value):
    """A number, or a list of numbers."""
    return type(value) in (int, float) or (isinstance(value, list) and all(type(v) in (int, float) for v in value))


def or_absent(is_good):
    """The check of a key that may be absent, or null."""
    return lambda value: value is None or is_good(value)


def sync(path):
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
