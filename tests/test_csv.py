"""The CSV table, read back with the standard library."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from conftest import digits_model
from test_sinks import train

from weightflip import FlipRecord, RunInfo
from weightflip.records import Counts, LayerRecord
from weightflip.sinks import CSVSink

HEADER = "step,layer,quantizer,name,value\n"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_number(digits, tmp_path):
    path, records = tmp_path / "deep" / "flips.csv", []
    train(digits, model=digits_model(width=64), sinks=[path, records.append], quantizer=["e3m4", "mxfp4"])[0].close()
    assert path.read_text().startswith(HEADER)
    found = {(int(r["step"]), r["layer"], r["quantizer"], r["name"]): float(r["value"]) for r in rows(path)}
    assert len(found) == len(rows(path))
    expected = {}
    for record in records:
        for quantizer in ("e3m4", "mxfp4"):
            layers = [layer for layer in record.layers if layer.name.endswith(f"@{quantizer}")]
            window = sum((layer.window for layer in layers), Counts())
            expected[record.step, "model", quantizer, "flip_rate"] = window.flips / window.weight_steps
            for layer in layers:
                at = record.step, layer.name.split("@")[0], quantizer
                expected[(*at, "stall_ratio")] = layer.window.stalled / layer.window.updates
    assert {key: found[key] for key in expected} == expected
    names = {name for *_, quantizer, name in found if quantizer == "e3m4"}
    assert names == {"flip_rate", "cumulative_flip_rate", "stall_ratio", "updated_fraction"}
    assert {name for *_, quantizer, name in found if quantizer == "mxfp4"} == names | {"scale_changes"}


def test_sums_of_different_quantizers_name_none(digits, tmp_path):
    path = tmp_path / "flips.csv"
    options = {"quantizer": {"0.*": "e3m4", "*": "int8"}, "groups": {"first": "0.*", "all": "*"}}
    train(digits, 10, sinks=[path], **options)[0].close()
    assert {(row["layer"], row["quantizer"]) for row in rows(path)} == {
        ("model", ""),
        ("0.weight", "e3m4"),
        ("2.weight", "int8"),
        ("group:first", "e3m4"),
        ("group:all", ""),
    }


def test_resumed_runs_append_and_a_torn_row_is_removed(digits, tmp_path):
    path = tmp_path / "flips.csv"
    train(digits, 10, sinks=[path])[0].close()
    whole = path.read_text()
    # A truncated number would look like a different one.
    path.write_text(whole + "20,0.weight,float8_e4m3,flip_rate,0.1")
    optimizer, _ = train(digits, 10, sinks=[path])
    optimizer.close()
    assert path.read_text() == whole + whole.removeprefix(HEADER)


@pytest.mark.parametrize("left", ["", HEADER[:9], HEADER])
def test_a_run_that_was_killed_at_once(digits, tmp_path, left):
    path = tmp_path / "flips.csv"
    path.write_text(left)
    train(digits, 10, sinks=[path])[0].close()
    assert path.read_text().count(HEADER) == 1
    assert {row["step"] for row in rows(path)} == {"10"}


def test_another_table_is_left_alone(digits, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("name,age\n")
    with pytest.raises(ValueError, match=r"must be a new file or begin with the columns .*, got 'name,age'"):
        train(digits, 10, sinks=[path])
    assert path.read_text() == "name,age\n"


def test_nothing_stands_for_no_value(tmp_path):
    sink, path = CSVSink(str(tmp_path / "flips.csv")), tmp_path / "flips.csv"
    sink.start(RunInfo({"a, b": ("2x2", "float32", "e3m4")}, {}), 0)
    counted = LayerRecord("a, b", 4, Counts(4, 1), Counts(4, 1), nonfinite=1)
    frozen = LayerRecord("c", 4, Counts(), Counts(4, 3))
    sink.write(FlipRecord(1, (counted, frozen)))
    sink.close()
    found = {(r["layer"], r["quantizer"], r["name"]): float(r["value"]) for r in rows(path)}
    assert found == {
        ("model", "e3m4", "flip_rate"): 0.25,
        ("model", "e3m4", "cumulative_flip_rate"): 0.5,
        ("model", "e3m4", "nonfinite_weights"): 1,
        ("a, b", "e3m4", "flip_rate"): 0.25,
        ("a, b", "e3m4", "cumulative_flip_rate"): 0.25,
        ("a, b", "e3m4", "nonfinite_weights"): 1,
    }
    assert not any(math.isnan(value) for value in found.values())


def test_numbers_come_back_as_they_were(tmp_path):
    sink, path = CSVSink(str(tmp_path / "flips.csv")), tmp_path / "flips.csv"
    torch.manual_seed(0)
    flips = torch.randint(1, 10**9, (50,)).tolist()
    sink.start(RunInfo({}, {}), 0)
    for step, count in enumerate(flips):
        counts = Counts(10**9 + 7, count)
        sink.write(FlipRecord(step, (LayerRecord("fc", 10**9 + 7, counts, counts),)))
    sink.close()
    values = [float(r["value"]) for r in rows(path) if (r["layer"], r["name"]) == ("fc", "flip_rate")]
    assert values == [count / (10**9 + 7) for count in flips]
