"""Names that a terminal would obey, a spreadsheet would run or a file cannot hold are displayed escaped."""

from __future__ import annotations

import csv
import io
import logging
import math
import unicodedata
import warnings

import torch
from torch import nn

from weightflip import FlipTrackingOptimizer
from weightflip.records import csv_cell, printable
from weightflip.report import cli, find, read_runs
from weightflip.report.table import write_csv

EVIL = [
    "=cmd|' /C calc'!A0",
    "-1+1",
    "+1",
    "@sum",
    "a\x1b[2J",
    "b\u202egnp",
    "c\ud800",
    "\td",
    "\re",
    "f\ng",
    "h\x9b5m",
]


class Evil(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in EVIL:
            self._parameters[name] = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        for weight in self._parameters.values():
            x = x @ weight / 3
        return x


def train_evil(steps=12, **options):
    model = Evil()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, quantizer="int4", **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
    return optimizer


def assert_safe(text: str) -> None:
    """Printability as defined by ``unicodedata``, independent of the implementation."""
    bad = [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert not bad, bad
    text.encode("utf-8")


def test_people_see_names_escaped(tmp_path, caplog):
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO, "weightflip"):
        warnings.simplefilter("always")
        optimizer = train_evil(
            log_dir=tmp_path / "events",
            alerts=["flip_rate >= 0"],
            groups={"g\x1b[2J": "*"},
            metrics=("flips", "stalls"),
        )
        optimizer.close()
    assert not caught, [str(warning.message) for warning in caught]
    for text in (str(optimizer.tracker), str(optimizer.info), optimizer.info.to_markdown(), caplog.text):
        assert_safe(text)
    for text in (str(optimizer.tracker), str(optimizer.info)):
        assert "a\\x1b[2J" in text
        assert "b\\u202egnp" in text
        assert "c\\ud800" in text
    assert caplog.text

    # Counts keep the original names. Event files are for display and have them escaped.
    assert list(optimizer.tracker.get_flip_counts()) == EVIL
    (beside,) = read_runs([tmp_path / "events"])
    assert list(beside.layers) == EVIL
    (run,) = read_runs((tmp_path / "events").glob("*tfevents*"))
    assert list(run.layers) == [printable(name) for name in EVIL]
    for layer in (*run.layers.values(), *beside.layers.values()):
        assert (layer.weights, layer.quantizer) == (64, "int4")


def test_reports_of_such_names(tmp_path, capsys):
    train_evil(sinks=[tmp_path / "flips.jsonl"]).close()
    assert list(read_runs([tmp_path])[0].layers) == EVIL
    assert (
        cli.main(["report", str(tmp_path), "--html", str(tmp_path / "a.html"), "--csv", str(tmp_path / "a.csv")]) == 0
    )
    printed = capsys.readouterr().out
    assert_safe(printed)
    assert "b\\u202egnp" in printed
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert_safe(page)
    assert "c\\ud800" in page
    for finding in find(read_runs([tmp_path])):
        assert_safe(finding.text)


def test_a_spreadsheet_finds_no_formula_and_numbers_stay_numbers(tmp_path):
    train_evil(sinks=[tmp_path / "sink.csv", tmp_path / "flips.jsonl"]).close()
    write_csv(read_runs([tmp_path / "flips.jsonl"]), tmp_path / "report.csv")
    for file, of in (("sink.csv", "value"), ("report.csv", "number")):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert_safe(text)
        rows = list(csv.DictReader(io.StringIO(text)))
        assert {"'=cmd|' /C calc'!A0", "'-1+1", "'+1", "\\td", "\\re"} <= {row["layer"] for row in rows}
        for row in rows:
            assert math.isfinite(float(row[of]))
            assert not [cell for cell in row.values() if cell[:1] in ("=", "+", "-", "@", "\t", "\r")]
    assert [csv_cell(value) for value in (-0.5, -3, "-3", "@a", "a", "")] == [-0.5, -3, "'-3", "'@a", "a", ""]


def test_escaping_is_as_repr_and_can_be_done_twice():
    everything = "".join(map(chr, [*range(0x300), 0x202E, 0x2066, 0xFEFF, 0xD800, 0xE000, 0x1F600, 0x5E9]))
    for char in everything:
        assert printable(char) == (char if char in "'\\" else repr(char)[1:-1])
    assert printable(printable(everything)) == printable(everything)
