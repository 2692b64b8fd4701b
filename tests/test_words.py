"""Retired words and phrases are gone: CONTRIBUTING.md lists them, next to the word list."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(
    [
        *ROOT.glob("README.md"),
        *ROOT.glob("CONTRIBUTING.md"),
        *ROOT.glob("Makefile"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("docs/**/*.rst"),
        *ROOT.glob("examples/**/*.py"),
        *ROOT.glob("CHANGELOG.md"),
        *ROOT.glob("src/**/*.py"),
        *(path for path in ROOT.glob("tests/**/*.py") if path.name != Path(__file__).name),
        *ROOT.glob("benchmarks/**/*.py"),
    ]
)
TABLE = re.compile(r"^\| retired \| write instead \|\n\|---\|---\|\n((?:\|.*\n)+)", re.MULTILINE)


def retired() -> list[str]:
    table = TABLE.search((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert table is not None
    return [phrase for row in table[1].splitlines() for phrase in re.findall(r"`([^`]+)`", row.split("|")[1])]


def found_in(text: str) -> list[str]:
    """The phrases that a text has, as whole words, also across lines and their comment signs."""
    words = re.sub(r"[\s#]+", " ", TABLE.sub("", text))
    return [phrase for phrase in retired() if re.search(rf"\b{re.escape(phrase)}\b", words, re.IGNORECASE)]


def test_retired_words_are_found():
    assert {"dear", "to and fro", "is told"} <= set(retired())
    assert found_in("It is dear.\n# What a kernel is\n# told") == ["dear", "is told"]
    assert found_in("endearing, at handoff") == []


def test_no_text_has_a_retired_word():
    assert len(FILES) > 30
    found = {path.relative_to(ROOT).as_posix(): found_in(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: phrases for name, phrases in found.items() if phrases} == {}
