"""A metric declares its values once, and they appear wherever values are shown."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from conftest import backward, digits_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import Page, read_one, run_cli
from test_tensorboard import charts
from torch.utils.tensorboard import SummaryWriter

from weightflip import FlipTrackingOptimizer
from weightflip.metrics import LayerMetric, Metric, metric_names, register
from weightflip.metrics.base import make_metrics
from weightflip.metrics.oscillation import Oscillation
from weightflip.records import CORE_VALUES, RunInfo, Value
from weightflip.report import events

WIDE = ("flips", "stalls", "wide")


@register
class Wide(Metric):
    """A user's metric: how many flips skip a code, and the range of the weights."""

    name = "wide"
    values = (
        Value(
            "wide_flips", "rate", "wide flips", "fraction of flips over several codes", "share", order=5, heat_map=True
        ),
        Value("reach", "gauge", "reach", "largest weight of a layer, mean over layers", chart="how large", order=6),
    )

    def open(self, name, weight):
        return _LayerWide()


class _LayerWide(LayerMetric):
    def slice(self, part, sums):
        distance = (part.new.int() - part.old.int()).abs()
        sums[0, 0] += (distance > 1).sum()
        sums[0, 1] += (distance > 0).sum()

    def gauge(self, weight, gauges, bins):
        gauges[0, 0] = weight.values.abs().max()
        gauges[0, 1] = 1


def train(digits, steps=40, model=None, **options):
    model = model or digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, metrics=WIDE, **options)
    for step in range(steps):
        backward(model, digits, step)
        optimizer.step()
    optimizer.close()
    return optimizer


@pytest.mark.parametrize("where", ["events", "flips.jsonl"])
def test_a_users_metric_appears_everywhere(digits, tmp_path, capsys, monkeypatch, where):
    monkeypatch.delenv("COLUMNS", raising=False)
    path = tmp_path / where
    options = {"log_dir": path} if where == "events" else {"sinks": [path, tmp_path / "sink.csv"]}
    model = digits_model()
    train(digits, model=model, **options)
    reach = float(model[2].weight.detach().abs().max())

    series = read_one(path).layers["2.weight"]
    assert (series.get("wide_flips").gauge, series.get("reach").gauge) == (False, True)
    assert series.get("reach").summary == pytest.approx(reach)

    out = run_cli(capsys, path, "--html", tmp_path / "report.html", "--csv", tmp_path / "report.csv")
    head = next(line for line in out.splitlines() if "weights" in line and "wide flips" in line)
    assert head.index("stall ratio") < head.index("wide flips") < head.index("reach")
    row = next(line for line in out.splitlines() if "2.weight" in line).split()
    assert row[-5:-3] == ["%", f"{reach:.2f}"], "and flips/weight and the updated fraction after them"

    text = " ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).text)
    assert "Wide flips: fraction of flips over several codes" in text, "the heading of its heat map"
    assert "largest weight of a layer, mean over layers" in text

    tables = [tmp_path / "report.csv"] if where == "events" else [tmp_path / "report.csv", tmp_path / "sink.csv"]
    for table in tables:
        with open(table, newline="") as file:
            rows = list(csv.DictReader(file))
        key, number = ("value", "number") if table.name == "report.csv" else ("name", "value")
        found = [float(row[number]) for row in rows if (row["layer"], row[key]) == ("2.weight", "reach")]
        assert found[-1] == pytest.approx(reach)
        assert len(found) == 4
        assert [row for row in rows if (row["layer"], row[key]) == ("2.weight", "wide_flips")]

    if where == "events":
        layout = charts(path)
        assert layout["weightflip: wide"] == {"fraction of flips over several codes, by layer": ["^wide_flips/.*"]}
        assert layout["how large"] == {"largest weight of a layer, mean over layers, by layer": ["^reach/.*"]}
        tags = EventAccumulator(str(path)).Reload().Tags()
        assert {"wide_flips/2.weight", "reach/2.weight", "flips/reach"} <= set(tags["scalars"])
        assert "weightflip/wide_flips" in tags["images"]


def test_an_undeclared_value_is_shown_under_its_name(digits, tmp_path, capsys):
    class Bare(Wide):
        name = "bare"
        values = ()
        ratios = ("bare_ratio",)
        gauges = ("bare_gauge",)

    model = digits_model()
    with FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters()), model, metrics=("flips", Bare()), log_dir=tmp_path, log_every=1
    ) as optimizer:
        backward(model, digits, 0)
        optimizer.step()
    assert charts(tmp_path)["weightflip: bare"] == {
        "bare gauge, by layer": ["^bare_gauge/.*"],
        "bare ratio, by layer": ["^bare_ratio/.*"],
    }
    assert "bare gauge" in run_cli(capsys, tmp_path)


def test_event_files_alone_identify_gauges(digits, tmp_path):
    train(digits, log_dir=tmp_path)
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    series = read_one(tmp_path).layers["2.weight"]
    assert (series.get("wide_flips").gauge, series.get("reach").gauge) == (False, True)
    value = next(value for value in read_one(tmp_path).info.values if value.name == "wide_flips")
    assert (value.kind, value.unit, value.description) == ("rate", "share", "fraction of flips over several codes")


def test_event_files_alone_head_columns_with_titles(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    model = digits_model()
    options = {"metrics": ("flips", "stalls", "oscillation"), "log_dir": tmp_path}
    with FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, **options) as optimizer:
        for step in range(40):
            backward(model, digits, step)
            optimizer.step()
    with_counts = run_cli(capsys, tmp_path)
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    heads = [
        next(line for line in out.splitlines() if "layer " in line and "weights" in line)
        for out in (with_counts, run_cli(capsys, tmp_path))
    ]
    assert "oscillation" in heads[0]
    assert "oscillation ratio" not in heads[0]
    # Event files do not tell the order.
    assert sorted(heads[1].split()) == sorted(heads[0].split())


def test_text_panels_without_titles_are_still_read():
    value = Value("wide_flips", "rate", "far", "fraction of flips over several codes", "share")
    panel = RunInfo({}, {}, {"track_every": "1"}, values=(value,)).to_markdown()
    earlier = (
        panel.replace("| title |", "|").replace("| far |", "|").replace("|---|---|---|---|---|", "|---|---|---|---|")
    )
    assert earlier != panel
    (read,) = events._info_from_markdown(earlier).values
    assert (read.name, read.title, read.kind, read.unit) == ("wide_flips", "wide flips", "rate", "share")
    assert read.description == value.description
    (read,) = events._info_from_markdown(panel).values
    assert (read.title, read.description) == (value.title, value.description)


def test_runs_of_older_versions_are_read_as_before(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    path = tmp_path / "flips.jsonl"
    model = digits_model()
    metrics = ("flips", "stalls", "oscillation", "coverage", "rank", Wide())
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters()), model, metrics=metrics, sinks=[path])
    for step in range(20):
        backward(model, digits, step)
        optimizer.step()
    optimizer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["writer"], line["time"]
        line.get("info", {}).pop("values", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    layer = read_one(path).layers["0.weight"]
    kinds = {name: series.gauge for name, series in layer.values.items()}
    assert {name for name, gauge in kinds.items() if gauge} == {
        "cumulative_flip_rate", "ever_flipped", "net_flipped", "stable_rank", "effective_rank", "reach",
    }  # fmt: skip
    head = next(line for line in run_cli(capsys, path).splitlines() if "layer " in line and "net flipped" in line)
    assert head.index("oscillation") < head.index("net flipped") < head.index("stable rank")
    with SummaryWriter(tmp_path / "events") as writer:
        for tag in ("flips/rate", "flip_rate/a", "stable_rank/a", "oscillation_ratio/a"):
            writer.add_scalar(tag, 0.5, 1)
    layer = read_one(tmp_path / "events").layers["a"]
    assert [layer.get(name).gauge for name in ("flip_rate", "stable_rank", "oscillation_ratio")] == [False, True, False]


def test_every_value_of_the_library_is_declared():
    """Each value of each metric has a title, a sentence and its own position."""
    metrics = [metric for metric, _ in make_metrics(dict.fromkeys(metric_names()))]
    metrics = [metric for metric in metrics if type(metric).__module__.startswith("weightflip.metrics.")]
    metrics = [Oscillation(ema=0.01) if metric.name == "oscillation" else metric for metric in metrics]
    assert len(metrics) >= 6
    values = [value for metric in metrics for value in metric.declared]
    values += CORE_VALUES
    assert all(value.title and value.description and value.chart for value in values)
    for of in ("name", "title", "order", "description"):
        taken = [getattr(value, of) for value in values]
        assert len(set(taken)) == len(taken), of


def test_mistakes_in_a_declaration_raise_immediately():
    with pytest.raises(ValueError, match=r"kind of Value\('x'\) must be one of rate, gauge, histogram; got 'ratio'"):
        Value("x", "ratio")
    with pytest.raises(ValueError, match=r"unit of Value\('x'\) must be one of share, count, number; got '%'"):
        Value("x", unit="%")
    named = type("Named", (Wide,), {"name": "named", "values": ("x",)})()
    with pytest.raises(TypeError, match=r"values of the group 'named' in metrics= are Value objects, got 'x'"):
        make_metrics({named: None})


def test_values_survive_json():
    info = RunInfo({}, {}, values=(*Wide.values, Value("plain")))
    from weightflip.report.lines import parse_info

    assert parse_info(json.loads(json.dumps(info.to_dict()))) == info
