"""``print(tracker)`` of a large model: model blocks and layers that stand out instead of 170 rows."""

from __future__ import annotations

from weightflip.counting.summary import as_text
from weightflip.records import Counts

PARTS = ("q", "k", "v", "o", "gate", "up", "down")


def layers(blocks=24, odd=("layers.7.down.weight",), suffix=""):
    names = ["embed.weight", *(f"layers.{i}.{part}.weight" for i in range(blocks) for part in PARTS)]
    found = []
    for at, name in enumerate(names):
        flips = 1 if name in odd else 900 + at % 10
        found.append((name + suffix, "e3m4", 100, Counts(10_000, flips, 10_000, 10_000 - flips, update_steps=10_000)))
    return found


def test_blocks_come_first_then_layers_that_stand_out():
    rows = layers()
    lines = as_text(100, rows).splitlines()
    assert len(lines) == 1 + 1 + 25 + 1 + 1 + 2 + 2
    assert lines[0] == "after step 100, 169 layers"
    assert lines[1].split() == ["block", "quantizer", "weights", "flips", "flips/weight", "stall", "ratio", "updated"]
    of_block = [counts.flips for name, _, _, counts in rows if name.startswith("layers.3.")]
    assert lines[2 + 1 + 3].split() == [
        "layers.3", "e3m4", "700",
        f"{sum(of_block):,}", f"{sum(of_block) / 700:.2f}", f"{1 - sum(of_block) / 70_000:.1%}", "100.0%",
    ]  # fmt: skip
    total = sum(counts.flips for *_, counts in rows)
    assert lines[27].split()[:3] == ["all", "16,900", f"{total:,}"]
    assert lines[29].startswith("layers that stand out")
    assert lines[30].split() == ["layers.7.down.weight", "e3m4", "100", "1", "0.01", "100.0%", "100.0%"]
    assert lines[-1] == "each layer: get_flip_rates(), get_stall_ratios()"


def test_thirty_layers_have_one_row_each():
    lines = as_text(5, layers(4)).splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == [name for name, *_ in layers(4)]


def test_no_blocks_and_nothing_that_stands_out():
    rows = [(f"{i}.weight", "e3m4", 100, Counts(10_000, 900, 10_000, 9_100)) for i in range(40)]
    lines = as_text(5, rows).splitlines()
    assert len(lines) == 5
    assert lines[2].split()[:3] == ["all", "4,000", "36,000"]


def test_blocks_of_several_quantizers():
    rows = layers(suffix="@e3m4") + [(n, "int8", w, c) for n, _, w, c in layers(suffix="@int8", odd=())]
    lines = as_text(5, rows).splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("layers.3 ")] == [
        ["layers.3", "e3m4"],
        ["layers.3", "int8"],
    ]
    assert [line.split()[1] for line in lines if line.startswith("all ")] == ["e3m4", "int8"]
    assert [line.split()[:2] for line in lines if line.startswith("layers.7.down")] == [
        ["layers.7.down.weight", "e3m4"]
    ]


def test_a_block_of_several_formats():
    rows = [(n, "mxfp4" if ".q." in n else q, w, c) for n, q, w, c in layers()]
    lines = as_text(5, rows).splitlines()
    assert {line.split()[1] for line in lines if line.startswith("layers.") and "weight" not in line} == {"several"}
