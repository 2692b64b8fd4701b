"""The tutorial is followed to the letter: its files are saved, its commands run, and what they print is in it."""

from __future__ import annotations

import os
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import run_python
from test_docs import blocks
from test_examples import IMPORTS

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")

pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("rich", "torchao", "sklearn")),
    reason="the tutorial needs: pip install 'weightflip[examples,report]'",
)


def without_numbers(text: str) -> list[str]:
    """Words of a text; not its numbers, its small curves, nor where its lines end."""
    return re.sub(r"[\u2581-\u2588]+", "", NUMBER.sub("#", text)).split()


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def run(command: str, cwd: Path) -> str:
    """What a command of the tutorial prints: ``python`` and ``weightflip`` are those of this environment."""
    program, *arguments = shlex.split(command)
    first = {"python": (), "weightflip": ("-m", "weightflip")}[program]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "110"}
    return run_python(*first, *arguments, imported=IMPORTS, cwd=cwd, env=env).stdout


def test_every_command_prints_what_the_tutorial_shows(tmp_path):
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    found = list(blocks(text))
    setup, *steps = found
    assert "make demo" in setup.body
    compared = 0
    for block, following in zip(steps, [*steps[1:], None], strict=True):
        script = tmp_path / "train.py"
        if block.language == "python" and "# The training\n" in block.body:
            before = script.read_text().partition("# The training\n")[0] if script.exists() else ""
            script.write_text(before + block.body)
        if block.language != "sh":
            continue
        assert following is not None
        assert following.language == "text"
        output = run(block.body, tmp_path)
        # The last report goes on with a table that the tutorial leaves out.
        printed, shown = (without_numbers(text) for text in (output, following.body))
        assert printed[: len(shown)] == shown, f"docs/tutorial.md:{following.line}"
        pairs = zip(numbers(output), numbers(following.body), strict=False)
        assert all(actual == pytest.approx(said, rel=0.3, abs=0.2) for actual, said in pairs)
        compared += 1
    assert compared == 5
