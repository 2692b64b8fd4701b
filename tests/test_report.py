"""``weightflip report`` reads what was recorded, and its statements are true."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import backward, digits_model
from processes import run_python
from torch.utils.tensorboard import SummaryWriter

import weightflip
from weightflip import FlipRecord, FlipTrackingOptimizer
from weightflip.records import Counts, LayerRecord, Quotient, RunInfo
from weightflip.report import ReportError, Severity, cli, find, jsonl, read_runs
from weightflip.report.findings import CHECKS
from weightflip.report.run import EMPTY, Run
from weightflip.sinks import JSONLSink

ALL_METRICS = ("flips", "stalls", "oscillation", "coverage")


def train(digits, steps=40, model=None, lr=1e-3, begin=0, state=None, **options):
    model = model or digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=lr), model, **options)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(begin, begin + steps):
        backward(model, digits, step)
        optimizer.step()
    return optimizer


def read_one(path, **options):
    (run,) = read_runs([path], **options)
    return run


def said(*runs) -> list[tuple[int, str, str]]:
    return [(finding.severity, finding.rule, finding.text) for finding in find(runs)]


# ---------------------------------------------------------------------- reading


def test_jsonl_is_read_as_recorded(digits, tmp_path):
    records = []
    train(
        digits,
        model=digits_model(),
        quantizer=["float8_e4m3", "mxfp8_e4m3"],
        include="0.weight",
        metrics=ALL_METRICS,
        sinks=[tmp_path / "flips.jsonl", records.append],
        log_every=7,
    ).close()
    run = read_one(tmp_path)
    assert run.steps.tolist() == [record.step for record in records] == [7, 14, 21, 28, 35, 40]
    for at, record in enumerate(records):
        for layer in record.layers:
            found = {name: series.values[at] for name, series in run.layers[layer.name].values.items()}
            assert found == layer.values
        for variant, model in record.models.items():
            assert {name: s.values[at] for name, s in run.models[variant].items()} == pytest.approx(model.values)
    layer = run.layers["0.weight@mxfp8_e4m3"]
    assert (layer.weights, layer.dtype, layer.quantizer, layer.weight) == (3072, "float32", "mxfp8_e4m3", "0.weight")
    assert {"oscillation_ratio", "net_flipped", "scale_changes"} <= set(layer.values)
    # Over several windows, counts are summed, then divided.
    windows = [next(x for x in record.layers if x.name == layer.name).window for record in records[3:]]
    assert layer.get("stall_ratio").part(21).summary == sum((w for w in windows), Counts()).stall_ratio
    assert layer.get("net_flipped").part(21).summary == records[-1].layers[1].values["net_flipped"]


@pytest.mark.parametrize("quantizer", ["float8_e4m3", ["float8_e4m3", "int4"]])
def test_event_files_say_the_same_as_jsonl(digits, tmp_path, quantizer):
    with SummaryWriter(tmp_path / "events") as writer:
        writer.add_scalar("loss", 1.0, 5)
        writer.add_scalar("grad_norm/0.weight", 1.0, 5)
        train(digits, quantizer=quantizer, sinks=[writer, tmp_path / "jsonl" / "flips.jsonl"]).close()
        writer.add_scalar("flip_rate/not a layer", 1.0, 5)
    events, jsonl = read_runs([tmp_path / "events", tmp_path / "jsonl"])
    assert (events.name, jsonl.name) == ("events", "jsonl")
    assert list(events.layers) == list(jsonl.layers)
    assert events.info.tracked == jsonl.info.tracked
    assert events.info.settings == jsonl.info.settings
    pairs = [(events.layers[name].values, jsonl.layers[name].values) for name in jsonl.layers]
    pairs += [(events.models[name], jsonl.models[name]) for name in jsonl.models]
    for found, expected in pairs:
        assert {"flip_rate", "stall_ratio", "cumulative_flip_rate"} <= set(found) <= set(expected)
        for value, series in found.items():
            assert series.steps.tolist() == expected[value].steps.tolist()
            assert series.values == pytest.approx(expected[value].values, rel=1e-6)
            # Here each weight has a gradient in most steps, so means over windows are close to the exact ones.
            assert series.part(events.late).summary == pytest.approx(expected[value].part(jsonl.late).summary, rel=0.02)
    for name, layer in jsonl.layers.items():
        other = events.layers[name]
        assert (other.weights, other.dtype, other.quantizer) == (layer.weights, layer.dtype, layer.quantizer)


def test_where_both_are_jsonl_is_read(digits, tmp_path):
    with SummaryWriter(tmp_path) as writer:
        train(digits, 10, sinks=[writer, tmp_path / "flips.jsonl"]).close()
    denominators = read_one(tmp_path).layers["0.weight"].get("flip_rate").denominators
    assert denominators.tolist() == [48 * 64 * 10]
    assert read_one(next(tmp_path.glob("*tfevents*"))).layers["0.weight"].weights == 48 * 64


def test_runs_below_a_directory_are_named_by_their_path(digits, tmp_path):
    for name in ("a/first", "b"):
        train(digits, 10, log_dir=tmp_path / "runs" / name).close()
    train(digits, 10, sinks=[tmp_path / "runs" / "c.jsonl"]).close()
    (tmp_path / "runs" / "others.jsonl").write_text('{"loss": 1}\n')
    with SummaryWriter(tmp_path / "runs" / "d") as writer:
        writer.add_scalar("loss", 1.0, 1)
    assert sorted(run.name for run in read_runs([tmp_path / "runs"])) == ["a/first", "b", "runs"]
    # Another path to the same run does not add a run.
    twice = read_runs([tmp_path / "runs" / "b", tmp_path / "runs" / "a", tmp_path / "runs" / ".." / "runs" / "b"])
    assert [run.name for run in twice] == ["b", "a/first"]
    assert read_one(tmp_path / "runs" / "c.jsonl").name == "c.jsonl"


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ReportError, match="no such file or directory"):
        read_runs([tmp_path / "nothing"])
    with pytest.raises(ReportError, match=r"Expected \.jsonl files .* event files"):
        read_runs([tmp_path])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ReportError, match=r"expected a directory, a \.jsonl file or an event file"):
        read_runs([tmp_path / "notes.txt"])
    # A run that has just started.
    (tmp_path / "flips.jsonl").write_text('{"info": {"tracked": {"a": ["2x2", "float32", "e4m3"]}}, "first_step": 0}\n')
    with pytest.raises(ReportError, match="log_every= steps"):
        read_runs([tmp_path])


KILLED = """
import sys, time, torch
from torch.utils.tensorboard import SummaryWriter
from weightflip import FlipTrackingOptimizer
model = torch.nn.Linear(64, 64)
sinks = [SummaryWriter(sys.argv[1], flush_secs=1), sys.argv[1] + "/jsonl/flips.jsonl"]
optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters()), model, sinks=sinks, log_every=2)
while True:
    optimizer.zero_grad()
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    time.sleep(0.002)
"""


def test_a_killed_run_is_read_up_to_its_last_record(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    path = tmp_path / "jsonl" / "flips.jsonl"
    try:
        deadline = time.monotonic() + 240
        written = 0
        while written < 60:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            written = len(path.read_bytes().splitlines()) if path.exists() else 0
        events = next(tmp_path.glob("*tfevents*"))
        while events.stat().st_size < 8_000:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    records = [json.loads(line)["record"] for line in path.read_text().splitlines()[1:] if line.endswith("}")]
    run = read_one(path)
    assert run.steps.tolist() == [record["step"] for record in records]
    from_events = read_one(events)
    count = len(from_events.steps)
    assert count > 20
    # The event file is written first. The process may be killed between the two writes.
    both = min(count, len(run.steps))
    assert count <= len(run.steps) + 1
    assert from_events.steps.tolist()[:both] == run.steps.tolist()[:both]
    assert from_events.models[""]["flip_rate"].values[:both] == pytest.approx(
        run.models[""]["flip_rate"].values[:both], rel=1e-6
    )

    # The last record may be cut off at any byte.
    size = path.stat().st_size
    for cut in (1, 2, 3, 100):
        os.truncate(path, size - cut)
        shorter = read_one(path)
        assert shorter.steps.tolist() in (run.steps.tolist(), run.steps.tolist()[:-1])
    assert shorter.notes
    os.truncate(events, events.stat().st_size - 11)
    assert len(read_one(events).steps) in (count, count - 1)


@pytest.mark.parametrize("where", ["jsonl", "log_dir", "writer"])
def test_of_a_resumed_run_the_later_points_count(digits, tmp_path, where):
    def sinks():
        return {
            "jsonl": {"sinks": [tmp_path / "flips.jsonl"]},
            "log_dir": {"log_dir": tmp_path},
            "writer": {"sinks": [SummaryWriter(tmp_path)]},
        }[where]

    model = digits_model()
    first = train(digits, 20, model=model, **sinks())
    state = first.state_dict()
    for step in range(20, 50):
        backward(model, digits, step)
        first.step()
    first.close()
    assert read_one(tmp_path).steps.tolist() == [10, 20, 30, 40, 50]
    time.sleep(1.1)  # The name of an event file contains the second in which it was opened.
    records = []
    options = sinks()
    options["sinks"] = [*options.get("sinks", []), records.append] if where != "log_dir" else None
    options = {name: value for name, value in options.items() if value is not None}
    train(digits, 15, model=digits_model(seed=1), begin=20, state=state, **options).close()
    run = read_one(tmp_path)
    assert run.steps.tolist() == [10, 20, 30, 35]
    if records:
        expected = [record.model.stall_ratio for record in records]
        assert run.models[""]["stall_ratio"].values[2:] == pytest.approx(expected, rel=1e-6)


def test_of_a_long_file_windows_are_added_up(digits, tmp_path, monkeypatch):
    train(digits, 60, metrics=ALL_METRICS, sinks=[tmp_path / "flips.jsonl"], log_every=1).close()
    whole = read_one(tmp_path)
    monkeypatch.setattr(jsonl, "_MAX_BYTES_READ", 1000)
    monkeypatch.setattr(jsonl, "_MIN_POINTS_READ", 7)
    part = read_one(tmp_path)
    assert len(part.steps) == 7
    assert part.end == whole.end
    assert "7 of 60 points read" in part.notes[0]
    for name, series in whole.layers["0.weight"].values.items():
        fewer = part.layers["0.weight"].get(name)
        assert fewer.values[-1] == series.values[-1] or not series.gauge
        if not series.gauge:
            assert fewer.numerators.sum() == series.numerators.sum()
            assert fewer.denominators.sum() == series.denominators.sum()
    assert len(read_one(tmp_path, every_record=True).steps) == 60


# ---------------------------------------------------------------------- findings on records with a known truth


class Script:
    """Writes records with known contents: numbers of each window, by layer."""

    def __init__(
        self, path: Path, dtype="float32", quantizer="float8_e4m3", size=1000, every=10, metrics="flips+stalls"
    ):
        self.path, self.size, self.every = path, size, every
        self.dtype, self.quantizer, self.metrics = dtype, quantizer, metrics
        self.totals: dict[str, Counts] = {}

    def write(self, windows: list[dict[str, dict]], alerts=()) -> Run:
        """Per window and layer: fractions (``flip``, ``stall``, ``updates``), ``nonfinite``, ``ratios``, ``gauges``."""
        sink = JSONLSink(str(self.path))
        tracked = {name: (str(self.size), self.dtype, self.quantizer) for name in windows[0]}
        sink.start(RunInfo(tracked, {}, {"metrics": self.metrics, "optimizer": "AdamW"}), 0)
        for at, window in enumerate(windows):
            sink.write(FlipRecord((at + 1) * self.every, tuple(self.layer(n, **row) for n, row in window.items())))
        for alert in alerts:
            sink._append_line({"alert": alert})
        sink.close()
        return read_one(self.path)

    def layer(self, name, flip=0.1, stall=None, updates=1.0, nonfinite=0, ratios=None, gauges=None) -> LayerRecord:
        steps = self.size * self.every
        updated = round(updates * steps)
        stalled = round((1 - flip if stall is None else stall) * updated)
        counts = {name: Quotient(round(1000 * share), 1000) for name, share in (ratios or {}).items()}
        window = Counts(steps, round(flip * steps), updated, stalled, ratios=counts)
        self.totals[name] = self.totals.get(name, Counts()) + window
        values = {name: Quotient(share, 1) for name, share in (gauges or {}).items()}
        return LayerRecord(name, self.size, window, self.totals[name], nonfinite, values)


def steady(count=20, layers=("a", "b", "c", "d"), **row):
    return [{name: dict(row) for name in layers} for _ in range(count)]


def rules(run):
    return {finding.rule: finding for finding in find([run])}


def test_every_check_is_in_the_list():
    files = sorted((Path(weightflip.__file__).parent / "report" / "findings").glob("*.py"))
    written = [
        name for file in files for name in re.findall(r"^def (find_\w+)\(run: Run, layers", file.read_text(), re.M)
    ]
    assert len(written) > 10
    assert sorted(written) == sorted(check.find.__name__ for check in CHECKS)


def test_nothing_stands_out(tmp_path):
    (found,) = find([Script(tmp_path / "a.jsonl").write(steady())])
    assert (found.severity, found.rule) == (Severity.INFO, "healthy")
    assert found.text.startswith("Nothing stands out up to step 200")


def test_a_high_stall_ratio_of_float32_weights_is_healthy(tmp_path):
    windows = [{name: {"flip": 0.04 * (1 - at / 20)} for name in "abcd"} for at in range(20)]
    assert [*rules(Script(tmp_path / "a.jsonl").write(windows))] == ["healthy"]


def test_stuck(tmp_path):
    windows = steady()
    for window in windows[8:]:
        window["b"] = {"flip": 0.0}
    found = rules(Script(tmp_path / "a.jsonl").write(windows))
    assert list(found) == ["stuck"]
    stuck = found["stuck"]
    assert stuck.severity == Severity.WARNING
    assert (stuck.layers, stuck.step) == (("b",), 80)
    assert "in b, no update has moved a weight to another code since step 80 (float8_e4m3)" in stuck.text
    assert "The float32 weights may still move" in stuck.text

    native = rules(Script(tmp_path / "b.jsonl", "bfloat16", "native").write(windows))["stuck"]
    assert native.severity == Severity.SERIOUS
    assert "updates are permanently lost to rounding" in native.text

    # With a single flip in the last quarter, the sentence would be wrong.
    windows[-2]["b"] = {"flip": 0.0001}
    assert "stuck" not in rules(Script(tmp_path / "c.jsonl").write(windows))


def test_stuck_at_the_end_of_a_decayed_learning_rate_is_but_a_note(tmp_path):
    windows = steady(13) + steady(7, flip=0.0)
    stuck = rules(Script(tmp_path / "a.jsonl").write(windows))["stuck"]
    assert stuck.severity == Severity.NOTE
    assert "all 4 layers" in stuck.text
    assert "Check whether the learning rate has reached 0" in stuck.text


def test_dead(tmp_path):
    windows = steady()
    for window in windows:
        window["c"] = {"flip": 0.0, "updates": 0.0}
        window["d"] = {"flip": 0.05, "updates": 0.0}
    found = [finding for finding in find([Script(tmp_path / "a.jsonl").write(windows)]) if finding.rule == "dead"]
    assert [(finding.severity, finding.layers) for finding in found] == [
        (Severity.WARNING, ("c",)),
        (Severity.NOTE, ("d",)),
    ]
    assert "no gradient for c in the whole run, and no weight changed" in found[0].text
    assert "weight decay or momentum" in found[1].text
    # Without the metric, nothing is known.
    for window in windows:
        for row in window.values():
            row.update(flip=0.1, updates=0.0)
    assert [*rules(Script(tmp_path / "b.jsonl", metrics="flips").write(windows))] == ["healthy"]


def test_lagging(tmp_path):
    windows = steady(flip=0.2)
    for window in windows:
        window["d"] = {"flip": 0.005}
    found = rules(Script(tmp_path / "a.jsonl").write(windows))
    assert list(found) == ["lagging"]
    assert "0.50 % of the updates of d changed a code, compared with 20 % in the other layers" in found["lagging"].text


def test_non_finite_weights_hide_what_follows_from_them(tmp_path):
    windows = steady()
    for window in windows[5:]:
        window["a"] = {"flip": 0.0, "nonfinite": 1000}
    for window in windows[7:]:
        window["b"] = {"flip": 0.0, "nonfinite": 10}
    found = rules(Script(tmp_path / "a.jsonl").write(windows))
    assert list(found) == ["non-finite"]
    assert found["non-finite"].severity == Severity.SERIOUS
    assert found["non-finite"].step == 60
    assert "2 of 4 layers (a and b) since step 60, first in a: 1,010 of 2,000 weights" in found["non-finite"].text


def test_oscillation(tmp_path):
    windows = steady()
    for window in windows:
        window["a"] = {"flip": 0.06, "ratios": {"oscillation_ratio": 0.95}, "gauges": {"net_flipped": 0.25}}
        # Few flips are harmless, and so are many flips that do not reverse.
        window["b"] = {"flip": 0.001, "ratios": {"oscillation_ratio": 0.95}}
        window["c"] = {"flip": 0.3, "ratios": {"oscillation_ratio": 0.4}, "gauges": {"oscillating_fraction": 0.5}}
    found = rules(Script(tmp_path / "a.jsonl").write(windows))
    assert found["oscillating"].layers == ("a",)
    assert "95.0 % of its flips reversed the previous flip, 6.0 % of its weights flipped per step" in (
        found["oscillating"].text
    )
    assert "12 flips per weight since the start left 75 % of them on their first code" in found["oscillating"].text


def test_burst(tmp_path):
    windows = steady(flip=0.02)
    windows[11] = {**windows[11], "a": {"flip": 0.15}, "b": {"flip": 0.03}}
    found = rules(Script(tmp_path / "a.jsonl").write(windows))
    assert list(found) == ["burst"]
    assert found["burst"].layers == ("a",)
    assert (
        "between steps 110 and 120: its weights flipped 1.50 times each, compared with 0.20 times"
        in found["burst"].text
    )
    # A warmup and a sudden drop of the learning rate are not bursts.
    steps = [{"a": {"flip": 0.5 if at < 10 else 0.02}, "b": {"flip": 0.05 * at / 20}} for at in range(20)]
    assert [*rules(Script(tmp_path / "b.jsonl").write(steps))] == ["healthy"]


def test_range_scale_and_rank(tmp_path):
    windows = steady()
    for at, window in enumerate(windows):
        window["a"] = {"flip": 0.1, "ratios": {"weight_driven_fraction": 0.1}}
        window["b"] = {"gauges": {"saturated_fraction": 0.2, "underflow_fraction": 0.1, "zero_fraction": 0.1}}
        window["c"] = {"gauges": {"underflow_fraction": 0.7, "zero_fraction": 0.95}}
        window["d"] = {"gauges": {"effective_rank": 100 - 4 * at}}
    found = rules(Script(tmp_path / "a.jsonl").write(windows))
    assert {name: finding.layers for name, finding in found.items()} == {
        "zero": ("c",),
        "underflow": ("c",),
        "saturated": ("b",),
        "scale-driven": ("a",),
        "rank": ("d",),
    }
    assert "only 10 % of those of a" in found["scale-driven"].text
    assert "from 100.0 at step 10 to 24.0" in found["rank"].text
    # By design, coarse formats have many weights at both ends.
    coarse = rules(Script(tmp_path / "b.jsonl", quantizer="ternary").write(windows))
    assert {"saturated", "underflow"}.isdisjoint(coarse)


def test_alerts_are_shown(tmp_path):
    alerts = [{"step": step, "layer": "a", "rule": "stall", "message": "stall ratio above 0.99"} for step in (50, 60)]
    found = rules(Script(tmp_path / "a.jsonl").write(steady(), alerts))
    assert found["alert"].text == "Alert at step 50 for a: stall ratio above 0.99 (and 1 more time, last at step 60)"


def test_the_worst_comes_first(tmp_path):
    windows = steady(flip=0.02)
    windows[11] = {**windows[11], "d": {"flip": 0.15}}
    for window in windows:
        window["a"] = {"flip": 0.0}
        window["c"] = {"nonfinite": 5}
    run = Script(tmp_path / "a.jsonl").write(windows)
    findings = find([run])
    assert [finding.rule for finding in findings] == ["non-finite", "stuck", "burst"]
    from weightflip.report.table import rank_layers

    assert [layer.name for layer in rank_layers(run, findings)] == ["c", "a", "d", "b"]


def test_what_differs_between_runs(tmp_path):
    def run(name, flip, dtype="float32", quantizer="float8_e4m3", **options):
        path = tmp_path / name / "flips.jsonl"
        return Script(path, dtype, quantizer, **options).write(steady(flip=flip))

    def comparison(*runs):
        read_again = read_runs([run.path for run in runs])
        return [f for f in find(read_again) if f.rule in ("comparison", "not compared")]

    pure = run("pure", 0.03, "bfloat16", "native")
    full = run("full", 0.997, "float32", "native")
    (found,) = comparison(pure, full)
    assert found.severity == Severity.SERIOUS
    assert "In pure/flips.jsonl (stored bfloat16 weights), 97.0 % of the updates left the stored weight unchanged" in (
        found.text
    )
    assert "compared with 0.30 % in full/flips.jsonl (stored float32 weights)" in found.text

    # The same format, but only one of them loses stalled updates.
    (found,) = comparison(run("as bfloat16", 0.1, "float32", "bfloat16"), pure)
    assert (
        "In pure/flips.jsonl, 97.0 % of the updates changed no code, compared with 90 % in as bfloat16/flips.jsonl"
        in found.text
    )
    assert "as bfloat16/flips.jsonl accumulates these updates in its float32 weights" in found.text
    assert "pure/flips.jsonl keeps no higher-precision copy and loses them" in found.text

    # One format, one dtype.
    (found,) = comparison(run("slow", 0.01), run("fast", 0.4))
    assert (
        "In slow/flips.jsonl, 99.0 % of the updates changed no code, compared with 60 % in fast/flips.jsonl"
        in found.text
    )
    assert "lose" not in found.text
    (found,) = comparison(run("one", 0.2), run("two", 0.21))
    assert found.severity == Severity.INFO
    assert "differ little: 80 % and 79 %" in found.text

    # Different formats are not compared.
    (found,) = comparison(run("eight", 0.05), run("four", 0.01, quantizer="mxfp4"))
    assert found.rule == "not compared"
    assert "float8_e4m3" in found.text
    assert "mxfp4" in found.text


# ---------------------------------------------------------------------- findings on real trainings


def test_a_healthy_float8_training_raises_no_alarm(digits, tmp_path):
    train(digits, 120, metrics=ALL_METRICS, sinks=[tmp_path / "flips.jsonl"], oscillation_ema=0.01).close()
    assert [(severity, rule) for severity, rule, _ in said(read_one(tmp_path))] == [(0, "healthy")]


def test_pure_bfloat16_against_float32(digits, tmp_path):
    """The sentence names the difference, with the numbers of the trackers."""
    images, labels = digits
    lost = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model = digits_model().to(dtype)
        optimizer = train((images.to(dtype), labels), 60, model, lr=1e-4, quantizer="native", log_dir=tmp_path / name)
        optimizer.close()
        tracker = optimizer.tracker
        lost[name] = sum(tracker.get_stall_counts().values()) / sum(tracker.get_update_counts().values())
    assert lost["bfloat16"] > 0.3 > 0.05 > lost["float32"]
    findings = find(read_runs([tmp_path]))
    (comparison,) = [finding for finding in findings if finding.rule == "comparison"]
    assert comparison is findings[0]
    numbers = [float(number) / 100 for number in re.findall(r"([\d.]+) %", comparison.text)]
    assert comparison.text.startswith("In bfloat16 (stored bfloat16 weights)")
    assert numbers[:2] == pytest.approx([lost["bfloat16"], lost["float32"]], abs=0.02)
    (loss,) = [finding for finding in findings if finding.rule == "lost updates"]
    assert loss.runs == ("bfloat16",)


def test_a_layer_that_is_never_used(digits, tmp_path):
    model = digits_model()
    model.add_module("unused", torch.nn.Linear(8, 8))
    model[2].weight.requires_grad_(True)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    train(digits, 40, model, sinks=[tmp_path / "flips.jsonl"]).close()
    dead = rules(read_one(tmp_path))["dead"]
    assert dead.layers == ("unused.weight",)
    assert dead.severity == Severity.WARNING


# ---------------------------------------------------------------------- what it writes


@pytest.fixture(scope="module")
def two_runs(digits, tmp_path_factory):
    """Three formats and one, with layer names that need escaping."""
    root = tmp_path_factory.mktemp("two")
    for name, quantizer in (("formats", ["bfloat16", "float8_e4m3", "int4"]), ("single", "float8_e4m3")):
        model = digits_model()
        names = {f"a<b>&\"'$x_1$[bold].{at}": p for at, p in enumerate(model.parameters()) if p.ndim > 1}
        optimizer = FlipTrackingOptimizer(
            torch.optim.AdamW([{"params": list(names.items())}], lr=1e-3),
            quantizer=quantizer,
            metrics=ALL_METRICS,
            sinks=[root / name / "flips.jsonl"],
        )
        for step in range(60):
            backward(model, digits, step)
            optimizer.step()
        optimizer.close()
    return root


def run_cli(capsys, *args, expect=0) -> str:
    assert cli.main(["report", *map(str, args)]) == expect
    captured = capsys.readouterr()
    return captured.out if expect == 0 else captured.err


def test_terminal(two_runs, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    out = run_cli(capsys, two_runs / "single")
    assert "\x1b" not in out
    rows = [line for line in out.splitlines() if "$x_1$[bold].0" in line]
    assert re.search(r"3,072 +\d+(\.\d+)? % +[▁-█]{6} ", rows[0])
    assert "Nothing stands out up to step 60" in out
    both = run_cli(capsys, two_runs)
    assert "single: float8_e4m3" in both
    assert "formats: Among the 3 formats tracked in this training, bfloat16 has the fewest stalled updates" in both


@pytest.mark.parametrize("width", [30, 50, 80])
def test_a_narrow_terminal_leaves_out_columns_not_names(two_runs, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for path in (two_runs, two_runs / "single"):
        out = run_cli(capsys, path)
        assert max(map(len, out.splitlines())) <= width
        assert "flip rate" in out
        assert "Columns that do not fit" in " ".join(out.split())


def test_csv_is_every_record(two_runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "_MAX_BYTES_READ", 100)
    monkeypatch.setattr(jsonl, "_MIN_POINTS_READ", 3)
    run_cli(capsys, two_runs, "--csv", tmp_path / "all.csv")
    with open(tmp_path / "all.csv", newline="") as file:
        rows = {(*row[:-1],): float(row[-1]) for row in list(csv.reader(file))[1:]}
    expected = {}
    for name in ("formats", "single"):
        for line in (two_runs / name / "flips.jsonl").read_text().splitlines()[1:]:
            record = FlipRecord.from_dict(json.loads(line)["record"])
            for layer in record.layers:
                of, _, quantizer = layer.name.partition("@")
                for value, number in layer.values.items():
                    expected[name, str(record.step), of, quantizer or "float8_e4m3", value] = number
            for quantizer, model in record.models.items():
                for value, number in model.values.items():
                    expected[name, str(record.step), "", quantizer, value] = number
    assert rows.keys() == expected.keys()
    assert rows == pytest.approx(expected, rel=1e-12)


class Page(HTMLParser):
    """Checks that elements close, and collects everything that could refer to external resources."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1
        for name, value in attributes:
            if name == "id":
                self.ids[value] += 1
            if name.split(":")[-1] in ("href", "src", "srcset", "action", "data"):
                self.references.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_one_page_that_needs_nothing_else(two_runs, capsys, tmp_path):
    run_cli(capsys, two_runs, "--html", tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.references
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    # The only addresses are the names of the SVG namespaces.
    assert set(re.findall(r"https?://[^\s\"'<>)]+", source)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in source
    assert not page.tags.keys() & {"script", "link", "iframe", "b<b", "bold"}
    assert page.ids
    assert max(page.ids.values()) == 1
    assert {reference[1:] for reference in page.references if reference[0] == "#"} <= page.ids.keys()
    assert set(re.findall(r"url\(#([^)]+)\)", source)) <= page.ids.keys()
    text = " ".join(page.text)
    assert "a<b>&\"'$x_1$[bold].0@int4" in text
    # Two sets of curves, one format matrix, and heat maps of three numbers.
    assert page.tags["svg"] == 2 + 1 + 3
    for words in ("What stands out", "Formats compared", "Oscillation", "net flipped"):
        assert words in text


def test_html_of_much_data_stays_small(tmp_path):
    layers = [f"blocks.{at}.weight" for at in range(60)]
    Script(tmp_path / "flips.jsonl", every=1).write([{name: {"flip": 0.1} for name in layers}] * 300)
    run = read_one(tmp_path)
    from weightflip.report.html import write_html
    from weightflip.report.html.bins import bin_edges, bin_series

    edges = bin_edges(run)
    assert len(edges) == 241
    series = run.layers[layers[0]].get("stall_ratio")
    counts = bin_series(series, edges) * bin_series(
        type(series)(series.steps, series.denominators, series.denominators), edges
    )
    assert counts == pytest.approx([0.9] * 240)
    write_html([run], find([run]), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 600_000


def test_exit_codes_and_messages(two_runs, capsys, tmp_path):
    assert "no such file or directory" in run_cli(capsys, tmp_path / "nothing", expect=1)
    for option in ("--csv", "--html"):
        message = run_cli(capsys, two_runs / "single", option, tmp_path / "no" / "file", expect=1)
        assert message.startswith("weightflip: ")
        assert "No such file or directory" in message


def test_as_a_program_without_rich(two_runs):
    """Run as users run it, also with packages of the extra missing."""
    done = run_python("-m", "weightflip.report", str(two_runs / "single"))
    assert done.stderr == ""
    assert "Nothing stands out" in done.stdout
    code = (
        "import sys; sys.modules.update(rich=None, matplotlib=None); from weightflip.report.cli import main; "
        "sys.exit(main(sys.argv[1:]) or main([*sys.argv[1:], '--html', 'x.html']))"
    )
    done = run_python("-c", code, "report", str(two_runs / "single"), check=False)
    assert done.returncode == 1
    assert "pip install 'weightflip[report]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_values_without_a_number_are_left_out():
    layer = LayerRecord("a", 4, Counts(), Counts(), gauges={"x": Quotient(0, 0)})
    assert {name: q.value for name, q in layer.quotients.items()} == layer.values == {"cumulative_flip_rate": 0}
    assert math.isnan(EMPTY.summary)
