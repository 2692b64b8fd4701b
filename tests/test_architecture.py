"""Rules of the code: which module may import which, how large functions are, and what an import loads."""

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
    return {row: set(re.findall(r"`([\w.]+)`", may_import)) for row, may_import in rows if row != "__init__"}


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
    row = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert row in ALLOWED, f"{row} has no row in the table"
    for name in imports(path):
        allowed = any(name == entry or name.startswith(entry + ".") for entry in ALLOWED[row] | {row})
        assert allowed, f"{path.relative_to(ROOT)} imports weightflip.{name}; {row} may import {sorted(ALLOWED[row])}"


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    """The files that a file imports, at module level or inside a function, but not for type checkers only."""
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

LEVELS = tuple(ALLOWED)
"""The rows of the table, the highest level first."""


def _row(name: str) -> str:
    return name.partition(".")[0]


def test_each_module_has_a_row():
    assert {_row(name) for name in MODULES} == ALLOWED.keys()
    for row, entries in ALLOWED.items():
        assert entries <= MODULES, f"the table lets {row} import a module that does not exist"


def test_modules_import_only_lower_levels():
    """Checks the imports, and also those that the table would allow."""
    allowed = {(row, entry) for row, entries in ALLOWED.items() for entry in entries}
    found = {(_module(path), name) for path in FILES for name in _imports(path) if _row(name) != _row(_module(path))}
    assert len(found) > 50, "imports are found"
    for name, imported in allowed | found:
        above, below = LEVELS.index(_row(name)), LEVELS.index(_row(imported))
        assert above < below, f"{name} imports {imported}, whose row is not below its own"


def test_there_are_no_import_cycles():
    graph = {_module(path): _imports(path) for path in FILES}
    # Remove files that import none of the remaining ones, until nothing is left.
    while ready := [name for name, imports in graph.items() if not imports & graph.keys()]:
        for name in ready:
            del graph[name]
    assert graph == {}, "files in an import cycle, or files that import one"


# From the highest level to the lowest. Each file imports only files of lower levels.
COUNTING_LEVELS = (
    {"tracker"},
    {"current"},
    {"totals", "batched", "gathered", "display", "stalls", "unsharded"},
    {"marks", "routes", "named", "silent_writes", "sharded", "summary", "history"},
    {"metric_runner", "canary", "nonfinite"},
    {"table", "sharding", "sampled"},
    {"collected"},
    {"layer", "columns", "notices", "schedule", "checkpoint"},
    {"batch", "ledger", "expressions", "stamps"},
    {"scaling", "observations"},
    {"scale_table", "sample_proof"},
    {"quantizer_cache"},
)


def test_files_of_counting_import_only_lower_levels():
    level = {f"counting.{name}": at for at, names in enumerate(COUNTING_LEVELS) for name in names}
    files = {_module(path) for path in (ROOT / "counting").glob("*.py") if path.stem != "__init__"}
    assert files == level.keys(), "each file of counting/ has a level"
    for path in (ROOT / "counting").glob("*.py"):
        for name in _imports(path) & level.keys():
            assert level[_module(path)] < level[name], f"{_module(path)} imports {name}, which is not below it"


def test_only_adapt_looks_up_optional_attributes_of_quantizers():
    """All other code reads what BaseQuantizer declares, so that its class lists everything."""
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


MAX_CLASS_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 50, 6
# In a docstring: why a class or function exceeds these limits.
REASON = re.compile(r"^Size: \S", re.MULTILINE)
# Functions that Numba and Triton compile take numbers and addresses, not objects that hold them.
COMPILED = ("kernels.groups.", "kernels.items.", "kernels.moves.", "kernels.vectors.", "kernels.cuda.")


def _defined(node: ast.AST, name: str) -> list[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Classes and functions below a node, also those inside others, with their dotted names."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found += [(f"{name}.{child.name}", child), *_defined(child, f"{name}.{child.name}")]
        else:
            found += _defined(child, name)
    return found


def lines_of_code(node: ast.AST, source: list[str]) -> int:
    """Without docstrings, comments and blank lines."""
    texts = [n for n in ast.walk(node) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    prose = {at for n in texts if isinstance(n.value.value, str) for at in range(n.lineno, n.end_lineno + 1)}
    numbered = enumerate(source[node.lineno - 1 : node.end_lineno], node.lineno)
    return sum(at not in prose and not line.strip().startswith("#") and bool(line.strip()) for at, line in numbered)


def _too_large(node: ast.ClassDef | ast.FunctionDef, source: list[str]) -> str | None:
    size = lines_of_code(node, source)
    if isinstance(node, ast.ClassDef):
        return f"{size} lines of code" if size > MAX_CLASS_LINES else None
    arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    parameters = len([name for name in arguments if name not in ("self", "cls")])
    is_large = size > MAX_FUNCTION_LINES or parameters > MAX_PARAMETERS
    return f"{size} lines of code, {parameters} parameters" if is_large else None


def test_classes_and_functions_are_small_or_say_why_not():
    large = {}
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for name, node in _defined(ast.parse(text), _module(path)):
            size = _too_large(node, text.splitlines())
            is_compiled = isinstance(node, ast.FunctionDef) and name.startswith(COMPILED)
            if size is not None and not is_compiled and not REASON.search(ast.get_docstring(node) or ""):
                large[name] = size
    assert large == {}, (
        f"a class has at most {MAX_CLASS_LINES} lines of code, a function {MAX_FUNCTION_LINES} and "
        f"{MAX_PARAMETERS} parameters; split it, or say why not in a line of its docstring that begins with 'Size:'"
    )


def test_lines_of_code_leave_out_prose():
    source = '''class Box:
    """What it is.

    Size: of a sentence.
    """

    width = 1
    """How wide."""

    # Why.
    def area(self, *, of=("a string", "is code")):
        return self.width  # in inches
'''
    (_, box), (name, area) = _defined(ast.parse(source), "shapes")
    assert (lines_of_code(box, source.splitlines()), lines_of_code(area, source.splitlines())) == (4, 2)
    assert name == "shapes.Box.area"


def test_import_is_light():
    heavy = ["torchao", "tensorboard", "matplotlib", "PIL", "wandb", "sklearn", "numba", "rich", "weightflip.report"]
    code = f"import sys, weightflip; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_public_names_exist_and_are_sorted():
    assert list(weightflip.__all__) == sorted(weightflip.__all__)
    assert all(hasattr(weightflip, name) for name in weightflip.__all__)
