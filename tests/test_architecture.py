"""The house rules that a reader relies on: who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import weightflip
from weightflip.quantizers import BaseQuantizer

ROOT = Path(weightflip.__file__).parent


def _allowed() -> dict[str, set[str]]:
    """Module to the modules of the project that it may import: CONTRIBUTING.md's table; a package is all its files."""
    table = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)(?:\.py|/)` \|.*\| ([^|]*) \|$", table, re.MULTILINE)
    return {room: set(re.findall(r"`([\w.]+)`", may_import)) for room, may_import in rows if room != "__init__"}


ALLOWED = _allowed()


def imports(path: Path) -> set[str]:
    """Dotted names below ``weightflip`` that a file imports, anywhere in it; "" for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = inner if node.module == "weightflip" else [node.module]
        else:
            continue
        found |= {name.removeprefix("weightflip").lstrip(".") for name in names if name.split(".")[0] == "weightflip"}
    return found


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert room in ALLOWED, f"{room} has no place in the table"
    for name in imports(path):
        allowed = any(name == entry or name.startswith(entry + ".") for entry in ALLOWED[room] | {room})
        assert allowed, f"{path.relative_to(ROOT)} imports weightflip.{name}; {room} may import {sorted(ALLOWED[room])}"


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _needs(path: Path) -> set[str]:
    """Files that a file imports, at once or inside a function; not what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unread = {inner for block in blocks for inner in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("weightflip.") for alias in node.names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "weightflip":
            for alias in node.names:
                name = f"{node.module}.{alias.name}".removeprefix("weightflip.")
                found.add(name if name in MODULES else name.rpartition(".")[0])
    return found & MODULES


MODULES = {_module(path) for path in FILES}


def test_no_two_files_need_each_other():
    graph = {_module(path): _needs(path) for path in FILES}
    # A file is above those that it needs: taking away those that need nothing more, again and again, leaves none.
    while ready := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in ready:
            del graph[name]
    assert graph == {}, "files in a circle, or above one"


# From the highest down: each needs only those of lower floors.
COUNTING_FLOORS = (
    {"tracker"},
    {"totals", "batched", "gathered", "summary", "stalls", "single"},
    {"routes", "named", "silent", "sharded"},
    {"metric_runner", "shards", "canary"},
    {"table"},
    {"layer", "columns", "notices", "schedule", "checkpoint"},
    {"batch", "ledger"},
    {"scale_table"},
)


def test_no_arrow_runs_up_inside_counting():
    floor = {f"counting.{name}": at for at, names in enumerate(COUNTING_FLOORS) for name in names}
    files = {_module(path) for path in (ROOT / "counting").glob("*.py") if path.stem != "__init__"}
    assert files == floor.keys(), "each file of counting/ has a floor"
    for path in (ROOT / "counting").glob("*.py"):
        for name in _needs(path) & floor.keys():
            assert floor[_module(path)] < floor[name], f"{_module(path)} needs {name}, which is not below it"


def test_what_a_quantizer_has_is_asked_in_one_place():
    """Any other place reads what BaseQuantizer declares; so a reader finds there all that can be asked."""
    declared = {name for name in vars(BaseQuantizer) if not name.startswith("_")}
    assert {"encode", "is_active", "scope", "statistic", "plain"} <= declared
    for path in FILES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            if ast.unparse(call.func) not in ("getattr", "hasattr") or path.stem == "adapt":
                continue
            asked = ast.unparse(call)
            is_declared = isinstance(call.args[1], ast.Constant) and call.args[1].value in declared
            is_of_quantizer = is_declared or "quantizer" in ast.unparse(call.args[0])
            assert not is_of_quantizer, f"{_module(path)}: {asked}"


def test_import_is_light():
    heavy = ["torchao", "tensorboard", "matplotlib", "PIL", "wandb", "sklearn", "numba", "rich", "weightflip.report"]
    code = f"import sys, weightflip; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_public_names_exist_and_are_sorted():
    assert list(weightflip.__all__) == sorted(weightflip.__all__)
    assert all(hasattr(weightflip, name) for name in weightflip.__all__)
