"""The tutorial is followed to the letter: its files are saved, its commands run, and what they print is in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_docs import blocks

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")

pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("rich", "torchao", "sklearn")),
    reason="the tutorial needs: pip install 'weightflip[examples,report]'",
)


def without_numbers(text: str) -> list[str]:
    """Words of a text; not its numbers, its bars, nor where its lines end."""
    return re.sub(r"[\u2581-\u2588\u2500]+", "", NUMBER.sub("#", text)).split()


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def environment(tmp_path: Path) -> dict[str, str]:
    """That of a reader: ``python`` and ``weightflip`` are those of this environment, on the code of this checkout."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, arguments in (("python", ""), ("weightflip", "-m weightflip ")):
        program = bin_dir / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        program.chmod(0o755)
    path = f"{bin_dir}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "110"}


def test_every_command_prints_what_the_tutorial_shows(tmp_path):
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    found = list(blocks(text))
    setup, *steps = found
    assert "make demo" in setup.body
    env = environment(tmp_path)
    run_dir = tmp_path / "runs"
    run_dir.mkdir()
    compared = 0
    for block, following in zip(steps, [*steps[1:], None], strict=True):
        script = run_dir / "train.py"
        if block.language == "python" and "# The training\n" in block.body:
            before = script.read_text().partition("# The training\n")[0] if script.exists() else ""
            script.write_text(before + block.body)
        if block.language != "sh":
            continue
        assert following is not None
        assert following.language == "text"
        done = subprocess.run(["sh", "-ec", block.body], cwd=run_dir, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # The last report goes on with a table that the tutorial leaves out.
        printed, shown = (without_numbers(output) for output in (done.stdout, following.body))
        assert printed[: len(shown)] == shown, f"docs/tutorial.md:{following.line}"
        pairs = zip(numbers(done.stdout), numbers(following.body), strict=False)
        assert all(actual == pytest.approx(said, rel=0.3, abs=0.2) for actual, said in pairs)
        compared += 1
    assert compared == 5
