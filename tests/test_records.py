"""Records: sums are divided last, and records survive plain JSON."""

from __future__ import annotations

import json
import math

import pytest

from weightflip.records import Counts, FlipRecord, Histogram, LayerRecord, Quotient, RunInfo


def layer(name: str, flips: int, oscillations: float, zeros: int, weights: int = 10) -> LayerRecord:
    counts = Counts(
        weights, flips, weights, weights - flips, ratios={"oscillation_ratio": Quotient(oscillations, flips)}
    )
    return LayerRecord(
        name,
        weights,
        counts,
        counts + counts,
        gauges={"zero_fraction": Quotient(zeros, weights)},
        histograms={"travel": Histogram((0.0, 1.0, 2.0), (zeros, weights - zeros))},
    )


RECORD = FlipRecord(
    7,
    (layer("a.attn.q", 4, 1, 2), layer("a.attn.k", 6, 5, 0, weights=30), layer("b.mlp", 0, 0, 10)),
    {"attention": ("a.attn.q", "a.attn.k")},
)


def test_numbers_are_summed_and_then_divided():
    model, attention = RECORD.model, RECORD.group_sums["attention"]
    assert model.values["oscillation_ratio"] == (1 + 5) / (4 + 6)
    assert model.values["zero_fraction"] == (2 + 0 + 10) / (10 + 30 + 10)
    assert model.histograms["travel"].counts == (12, 38)
    assert attention.weights == 40
    assert attention.flip_rate == 10 / 40
    assert attention.values["zero_fraction"] == 2 / 40


def test_what_has_no_value_is_not_among_the_values():
    assert math.isnan(RECORD.layers[2].window.ratios["oscillation_ratio"].value)
    assert set(RECORD.layers[2].values) == {"flip_rate", "cumulative_flip_rate", "stall_ratio", "zero_fraction"}


def test_windows_are_differences():
    now, then = RECORD.layers[1].total, RECORD.layers[1].window
    assert now - then == then


def test_json_there_and_back():
    assert FlipRecord.from_dict(json.loads(json.dumps(RECORD.to_dict()))) == RECORD


def test_a_record_of_an_earlier_version_is_read():
    data = json.loads(json.dumps(RECORD.to_dict()))
    del data["groups"]
    for one in data["layers"]:
        del one["gauges"], one["histograms"], one["window"]["ratios"], one["total"]["ratios"]
    record = FlipRecord.from_dict(data)
    assert record.model.window.flips == 10
    assert record.model.values == pytest.approx({"flip_rate": 0.2, "cumulative_flip_rate": 0.4, "stall_ratio": 0.8})


def test_groups_of_weights_that_are_seen_through_several_quantizers():
    layers = tuple(layer(f"fc@{quantizer}", flips, 0, 0) for quantizer, flips in (("e3m4", 3), ("mxfp4", 1)))
    sums = FlipRecord(1, layers, {"all": ("fc",)}).group_sums
    assert {name: one.window.flips for name, one in sums.items()} == {"all@e3m4": 3, "all@mxfp4": 1}


def test_merged_records_keep_the_groups_of_both():
    other = FlipRecord(9, (layer("c.attn.v", 1, 0, 0),), {"attention": ("c.attn.v",)})
    merged = FlipRecord.merged([RECORD, other])
    assert merged.step == 9
    assert merged.groups == {"attention": ("a.attn.q", "a.attn.k", "c.attn.v")}


def test_the_text_panel_names_a_few_of_many_skipped_weights():
    skipped = {f"layers.{i}.norm.weight": "one dimension" for i in range(98)} | {"frozen": "requires no gradient"}
    rows = [line for line in RunInfo({}, skipped).to_markdown().splitlines() if "one dim" in line or "frozen" in line]
    first = ", ".join(f"`layers.{i}.norm.weight`" for i in range(4))
    assert rows == [f"| {first} and 94 more | one dimension |", "| `frozen` | requires no gradient |"]
    assert len(RunInfo({}, skipped).skipped) == 99
