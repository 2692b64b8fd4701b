"""Findings about what the documents call dangerous, on records with known contents and on real trainings."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import backward, digits_model
from test_report import Script, read_one, rules, steady
from torch.utils.tensorboard import SummaryWriter

from weightflip import Alert, FlipTrackingOptimizer
from weightflip.report import Severity, find


def test_few_weights_with_a_gradient(tmp_path):
    windows = steady()
    for at, window in enumerate(windows):
        # Only in the last quarter.
        window["a"] = {"flip": 0.0001, "updates": 1 / 8192 if at >= 15 else 1.0, "stall": 0.5}
    run = Script(tmp_path / "a.jsonl", size=8192).write(windows)
    found = rules(run)
    assert list(found) == ["few gradients"]
    few = found["few gradients"]
    assert (few.severity, few.layers) == (Severity.WARNING, ("a",))
    assert few.text.startswith("1 of 8,192 weights of a had a gradient per step in the last quarter (0.01 %). ")
    # Like an embedding: a note. More gradients than that, or none, is something else.
    for share, expected in ((0.005, ["few gradients"]), (0.02, ["healthy"]), (0.0, ["dead"])):
        for window in windows:
            window["a"] = {"flip": 0.0 if not share else 0.0001, "updates": share, "stall": 0.5}
        found = rules(Script(tmp_path / f"{share}.jsonl", size=8192).write(windows))
        assert list(found) == expected
        if share == 0.005:
            assert found["few gradients"].severity == Severity.NOTE
            assert found["few gradients"].text.startswith("41 of 8,192 weights of a")


def test_few_weights_with_a_gradient_in_a_training(digits, tmp_path):
    """One weight of 3,072 gets its gradient."""
    model = digits_model()
    with SummaryWriter(tmp_path / "events") as writer:
        sinks = [writer, tmp_path / "jsonl" / "flips.jsonl"]
        optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, sinks=sinks)
        mask = torch.zeros_like(model[0].weight)
        mask[3, 20] = 1
        model[0].weight.register_hook(lambda gradient: mask)
        for step in range(80):
            backward(model, digits, step)
            optimizer.step()
        optimizer.close()
    text = rules(read_one(tmp_path / "jsonl"))["few gradients"].text
    assert text.startswith("1 of 3,072 weights of 0.weight had a gradient per step in the last quarter (0.03 %)")
    # Event files of runs without updated_fraction cannot tell.
    from_events = rules(read_one(tmp_path / "events")).get("few gradients")
    assert from_events is None or from_events.text == text


def test_resting_weights(tmp_path):
    windows = steady(ratios={"travel_ratio": 0.8})
    for window in windows:
        window["c"] = {"flip": 0.01, "ratios": {"travel_ratio": 0.05}}
    found = rules(Script(tmp_path / "a.jsonl").write(windows))
    assert list(found) == ["resting"]
    assert (found["resting"].severity, found["resting"].layers) == (Severity.NOTE, ("c",))
    assert found["resting"].text.startswith("c rests: in the last quarter, the quantized weights of c traveled 5.0 %")
    # Layers without a flip are stuck. The finding is about the last quarter only.
    for at, window in enumerate(windows):
        window["c"] = {"flip": 0.0, "ratios": {"travel_ratio": 0.0}}
        window["d"] = {"flip": 0.1, "ratios": {"travel_ratio": 0.05 if at < 15 else 0.5}}
    assert [*rules(Script(tmp_path / "b.jsonl").write(windows))] == ["stuck"]


def test_resting_weights_in_a_training(tmp_path):
    """Weights in the middle of their cells. One in a hundred crosses a border; the rest do not reach another code."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randint(-10, 10, (64, 64)).float())
    weight.data[:, 0] = 127.0
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD([("a", weight)], lr=1.0),
        quantizer="int8",
        metrics=("flips", "stalls", "travel"),
        sinks=[tmp_path / "flips.jsonl"],
    )
    sign = torch.ones_like(weight)
    big = torch.rand(64, 64) < 0.01
    big[:, 0] = False
    for _ in range(60):
        # Up and down again, by a third of a cell. A few weights move by a whole cell.
        sign = -sign
        weight.grad = sign * torch.where(big, 1.0, 0.3)
        weight.grad[:, 0] = 0
        optimizer.step()
    optimizer.close()
    way = int(big.sum())
    of = way + (64 * 63 - way) * 0.3
    text = rules(read_one(tmp_path))["resting"].text
    (number,) = (float(number) / 100 for number in re.findall(r"traveled ([\d.]+) % of", text))
    assert number == pytest.approx(way / of, abs=0.002)


def test_a_share_at_the_ends_of_the_format_that_grows(tmp_path):
    windows = [
        {
            "a": {"gauges": {"saturated_fraction": 0.002 + 0.001 * at}},
            # Evenly spread weights from the start, little growth, and a format with few codes.
            "b": {"gauges": {"saturated_fraction": 0.035}},
            "c": {"gauges": {"saturated_fraction": 0.0001 * at}},
        }
        for at in range(20)
    ]
    found = rules(Script(tmp_path / "a.jsonl").write(windows))
    assert list(found) == ["saturating"]
    assert (found["saturating"].severity, found["saturating"].layers) == (Severity.WARNING, ("a",))
    assert "for a, from 0.20 % at step 10 to 2.1 % at the end" in found["saturating"].text
    assert [*rules(Script(tmp_path / "b.jsonl", quantizer="int4").write(windows))] == ["healthy"]


def test_flips_that_are_nearly_all_the_scales(tmp_path):
    windows = steady()
    for window in windows:
        window["a"] = {"flip": 0.1, "ratios": {"weight_driven_fraction": 0.03}}
        window["b"] = {"flip": 0.1, "ratios": {"weight_driven_fraction": 0.3}}
        # Few flips in total, or mostly weight-driven ones.
        window["c"] = {"flip": 0.015, "ratios": {"weight_driven_fraction": 0.03}}
        window["d"] = {"flip": 0.1, "ratios": {"weight_driven_fraction": 0.7}}
    found = find([Script(tmp_path / "a.jsonl").write(windows)])
    assert [(finding.rule, finding.severity, finding.layers) for finding in found] == [
        ("scale-driven", Severity.WARNING, ("a",)),
        ("scale-driven", Severity.NOTE, ("b",)),
    ]
    assert found[0].text.startswith("Nearly all flips of a come from a changing scale: in the last quarter, only 3.0 %")
    assert found[1].text.startswith("Most flips of b come from a changing scale: in the last quarter, only 30 %")


def test_steps_below_the_distance_of_two_codes(tmp_path):
    windows = [{"a": {"flip": 0.02}, "b": {"flip": 0.01}, "c": {"flip": 0.04}, "d": {"flip": 0.6}}] * 20
    found = rules(Script(tmp_path / "a.jsonl", "bfloat16", "native").write(windows))
    small = found["small steps"]
    assert (small.severity, small.layers) == (Severity.WARNING, ("a", "b", "c"))
    assert small.text.startswith(
        "The steps of 3 of 4 layers (a, b and c) are small compared with the distance between codes"
    )
    assert "in the last quarter, 2.0 % of their updates moved a weight" in small.text
    assert "Steps at least 25 times as large would move half of them" in small.text
    # Master weights accumulate these updates. That is a finding only if hardly any code changed in the whole run.
    assert [*rules(Script(tmp_path / "b.jsonl").write(windows))] == ["healthy"]
    hardly = [{name: {"flip": 0.00002} for name in "abcd"}] * 20
    small = rules(Script(tmp_path / "c.jsonl", size=10_000).write(hardly))["small steps"]
    assert "Steps at least 25,000 times as large" in small.text


def test_how_large_a_step_moves_half_of_the_weights(tmp_path):
    """With weights spread evenly in their cells, the numbers in the sentence follow from the step size."""
    torch.manual_seed(0)
    moved = {}
    lr = 0.0005 / 127
    for name in ("small", "large"):
        if name == "large":
            text = rules(read_one(tmp_path / "small.jsonl"))["small steps"].text
            (factor,) = (float(number.replace(",", "")) for number in re.findall(r"at least ([\d.,]+) times", text))
            assert factor == pytest.approx(1000, rel=0.2)
            lr *= factor
        weight = torch.nn.Parameter(torch.empty(400, 400).uniform_(-1, 1))
        weight.data[:, 0] = 1.0
        optimizer = FlipTrackingOptimizer(
            torch.optim.SGD([("a", weight)], lr=lr),
            quantizer="int8",
            sinks=[tmp_path / f"{name}.jsonl"],
            log_every=2,
        )
        for _ in range(16):
            # Back and forth: the weights stay evenly spread.
            weight.grad = torch.randint(0, 2, weight.shape).float() * 2 - 1
            weight.grad[:, 0] = 0
            optimizer.step()
        optimizer.close()
        moved[name] = 1 - read_one(tmp_path / f"{name}.jsonl").models[""]["stall_ratio"].summary
    assert moved["large"] == pytest.approx(0.5, abs=0.05)


def test_empty_deltas(tmp_path):
    windows = steady(ratios={"changed_fraction": 0.02})
    assert [*rules(Script(tmp_path / "a.jsonl").write(windows))] == ["healthy"]
    for at in (4, 11):
        windows[at] = {name: {"ratios": {"changed_fraction": 0.0}} for name in "abcd"}
    found = rules(Script(tmp_path / "b.jsonl").write(windows))
    assert list(found) == ["empty deltas"]
    empty = found["empty deltas"]
    assert (empty.severity, empty.layers, empty.step) == (Severity.NOTE, (), 50)
    assert "at 2 of 20 points with a sync, no weight changed its code (float8_e4m3)" in empty.text
    assert "the last such point is at step 120" in empty.text
    # Half of the points.
    for at in range(12, 20):
        windows[at] = {name: {"ratios": {"changed_fraction": 0.0}} for name in "abcd"}
    assert rules(Script(tmp_path / "c.jsonl").write(windows))["empty deltas"].severity == Severity.WARNING
    # A single layer, at all points.
    windows = steady(ratios={"changed_fraction": 0.02})
    for window in windows:
        window["c"] = {"ratios": {"changed_fraction": 0.0}}
    still = rules(Script(tmp_path / "d.jsonl").write(windows))["empty deltas"]
    assert (still.severity, still.layers) == (Severity.NOTE, ("c",))
    assert still.text.startswith("The deltas of c are empty at all points with a sync")


@pytest.mark.parametrize("sink", ["events", "jsonl"])
def test_empty_deltas_of_a_training(sink, digits, tmp_path):
    """Steps too small for 4 bits, and the rule that reports it during training."""
    model, told = digits_model(width=64), []
    with SummaryWriter(tmp_path / "events") as writer:
        optimizer = FlipTrackingOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-9), model, quantizer=["mxfp4", "native"],
            metrics=("flips", "stalls", "sync"), sync_every=2, log_every=2,
            alerts=[Alert("changed_fraction == 0", layers="model", callback=told.append)],
            sinks=[writer if sink == "events" else tmp_path / "jsonl" / "flips.jsonl"],
        )  # fmt: skip
        for step in range(10):
            backward(model, digits, step)
            optimizer.step()
        optimizer.close()
    assert [event.message for event in told] == ["step 2: changed_fraction == 0: model@mxfp4 (0)"]
    empty = [finding for finding in find([read_one(tmp_path / sink)]) if finding.rule == "empty deltas"]
    assert [(finding.severity, finding.step) for finding in empty] == [(Severity.WARNING, 2)]
    assert "at all 5 points with a sync, no weight changed its code (mxfp4)" in empty[0].text
