"""Imports run one way, from the method to data, run, backbone and detection; docs/code.md has every file."""

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

LEVELS = {"moco": 0, "moco/data": 1, "moco/run": 2, "moco/backbone": 3, "moco/detection": 3}  # folder -> how high it is
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.relative_to(ROOT)
    for path in (ROOT / "moco").rglob("*.py")
}
ABOVE_ALL = {"moco.check"}  # a command that uses everything, as the scripts do


def imports(path):
    """The modules of moco that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & MODULES.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found


@pytest.mark.parametrize("module", sorted(MODULES.keys() - ABOVE_ALL))
def test_no_module_imports_from_a_higher_folder(module):
    here = LEVELS[str(MODULES[module].parent)]
    too_high = {name for name in imports(ROOT / MODULES[module]) if LEVELS[str(MODULES[name].parent)] > here}
    assert not too_high


def test_imports_run_in_no_circle():
    graph = {name: imports(ROOT / path) - {name} for name, path in MODULES.items()}
    for name in graph:  # a package is imported with each of its modules, so its __init__ must not need them in turn
        graph[name] -= {parent for parent in map(".".join, [name.split(".")[:i] for i in range(1, 9)])}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_page_of_files_has_every_one():
    named = Counter(re.findall(r"\w+\.py", (ROOT / "docs" / "code.md").read_text()))
    assert Counter(path.name for path in MODULES.values() if not path.name.startswith("__")) <= named
