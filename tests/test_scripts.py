"""Benchmarks and examples, most of which no test runs: they can be imported, and what they import exists."""

from __future__ import annotations

import ast
import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
# Each takes seconds to import, and tests of their own run these examples.
INTEGRATIONS = {"accelerate", "lightning", "transformers"}

IMPORT_EACH = """
import importlib.util, json, sys
from pathlib import Path

failed = {}
for index, file in enumerate(sys.argv[1:]):
    sys.path[:] = [str(Path(file).parent), *sys.path]
    sys.argv[:] = [file]
    try:
        spec = importlib.util.spec_from_file_location(f"script{index}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except BaseException as error:
        failed[file] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""


def imports(path: Path) -> list[tuple[str, str | None]]:
    """The modules that a file imports, each with a name that it takes from the module, if any."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found


def missing(path: Path) -> set[str]:
    """The packages that a file needs and that are not installed, and the integrations."""
    here = {other.stem for other in (*path.parent.glob("*.py"), *(ROOT / "examples").glob("*.py"))}
    packages = {module.partition(".")[0] for module, _ in imports(path)} - here
    return {name for name in packages if name in INTEGRATIONS or find_spec(name) is None}


def test_what_scripts_import_from_the_library_exists():
    assert len(FILES) > 20
    found = [(path, module, name) for path in FILES for module, name in imports(path)]
    ours = [(path, module, name) for path, module, name in found if module.partition(".")[0] == "weightflip"]
    assert len(ours) > 30
    for path, module, name in ours:
        there = importlib.import_module(module)
        exists = name is None or hasattr(there, name) or find_spec(f"{module}.{name}") is not None
        assert exists, f"{path.relative_to(ROOT)} imports {name} from {module}, which does not have it"


def test_scripts_can_be_imported():
    files = [str(path) for path in FILES if not missing(path)]
    if not files:
        pytest.skip("all need: pip install 'weightflip[examples]'")
    done = run_python("-c", IMPORT_EACH, *files, cwd=ROOT)
    assert json.loads(done.stdout.splitlines()[-1]) == {}
    of_integrations = {path.name for path in FILES if missing(path) & INTEGRATIONS}
    assert of_integrations == {"accelerate_digits.py", "lightning_digits.py", "trainer_digits.py"}
