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
# American spelling throughout. A pattern matches whole words.
BRITISH = (
    r"neighbour\w*|colour\w*|behaviour\w*|favour\w*|honour\w*|labour\w*|flavour\w*|rumour\w*",
    r"grey|whilst|amongst|catalogue\w*|centre[sd]?|fibres?|licence[sd]?|artefacts?|programmes?|towards",
    r"labell\w*|modell\w*|cancell(?:ed|ing)|travell\w*|signall\w*|learnt|spelt|judgement|ageing|defence|analys(?:e|ed|es|ing)",
    r"(?:initial|normal|optim|quant|serial|synchron|summar|recogn|organ|real|random|regular|special|util|minim|maxim|emphas)"
    r"is(?:e|ed|er|ers|es|ing|ation|ations)",
    r"(?:general|parallel|vector|visual|custom|categor|priorit|stabil|token|penal|memor|author|standard|final|local|total)"
    r"is(?:e|ed|er|ers|es|ing|ation|ations)",
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


def british_in(text: str) -> list[str]:
    return [match[0] for pattern in BRITISH for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE)]


def test_spelling_is_american():
    assert british_in("The colours of neighbours, normalised towards the centre") == [
        *("colours", "neighbours"),
        *("towards", "centre"),
        "normalised",
    ]
    assert british_in("colors, noise, raised, precision, otherwise, model.modules, labels, analysis, realism") == []
    found = {path.relative_to(ROOT).as_posix(): british_in(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: words for name, words in found.items() if words} == {}


def test_retired_words_are_found():
    assert {"dear", "to and fro", "is told"} <= set(retired())
    assert found_in("It is dear.\n# What a kernel is\n# told") == ["dear", "is told"]
    assert found_in("endearing, at handoff") == []


def test_no_text_has_a_retired_word():
    assert len(FILES) > 30
    found = {path.relative_to(ROOT).as_posix(): found_in(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: phrases for name, phrases in found.items() if phrases} == {}
