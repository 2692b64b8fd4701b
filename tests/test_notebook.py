"""Output in notebooks, and the numbers as rows."""

from __future__ import annotations

import builtins
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from weightflip import FlipRecord, FlipTrackingOptimizer, RunInfo, WeightFlipTracker, track_flips
from weightflip.counting.history import History
from weightflip.records import Counts, LayerRecord

VOID = {"br", "hr", "img"}


class Page(HTMLParser):
    """Collects the cells of tables, and checks that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        assert self.open == [], "all tags are closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def trained(model: nn.Module, steps: int = 6, **options) -> FlipTrackingOptimizer:
    torch.manual_seed(0)
    options = {"quantizer": "e3m4", "sinks": [lambda record: None], "log_every": 2, **options}
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return optimizer


def two_layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({part: nn.Linear(4, 4, bias=False) for part in ("a", "b")}) for _ in range(depth)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["b"](layer["a"](x).tanh())
        return x


def test_a_tracker_shows_its_table_and_curves():
    optimizer = trained(two_layers())
    page = Page(optimizer.tracker._repr_html_())
    printed = [re.split(r"  +", line.rstrip()) for line in str(optimizer.tracker).splitlines()[1:]]
    shown = [[cell for cell in row if cell] for row in page.tables[0]]
    assert shown == printed, "the table that print() shows"
    assert page.tags.count("polyline") == 2, "flip rate and stall ratio over three records"
    assert not {"script", "style", "link", "img"} & set(page.tags), "self-contained"


def test_before_the_first_step_there_is_a_table_without_rows():
    for tracker in (WeightFlipTracker(), trained(two_layers(), steps=0).tracker):
        page = Page(tracker._repr_html_())
        assert "svg" not in page.tags
        assert "after step 0" in tracker._repr_html_()
        assert tracker.to_dicts() == []
    assert repr(WeightFlipTracker()) == "<WeightFlipTracker: 0 layers; print() shows what was counted>"


@pytest.mark.filterwarnings("ignore:weightflip. no step")
def test_missed_steps_are_reported():
    model = two_layers()
    optimizer = trained(model, steps=0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.inner.step()
    assert "no step() was tracked" in optimizer.tracker._repr_html_()


def test_names_are_escaped():
    name = "<b>&\x1b[2J"
    layer = LayerRecord(name, 4, Counts(4, 1, 4, 3), Counts(4, 1, 4, 3))
    info = RunInfo({name: ("2x2", "float32", "e3m4")}, {"<i>": "<u>"}, {"<s>": "1"}, ("<em>",))
    tracker, weight = WeightFlipTracker(), torch.ones(2, 2)
    tracker.snapshot_pre_step(name, weight, "e3m4")
    tracker.compute_flips_post_step(name, weight, "e3m4")
    records = FlipRecord(1, (layer, LayerRecord("other", 4, Counts(4, 1), Counts(4, 1))))
    for html in (tracker._repr_html_(), info._repr_html_(), records._repr_html_()):
        page = Page(html)
        assert not {"b", "i", "u", "s", "em"} & set(page.tags)
        assert "\x1b" not in html
        assert page.tables[0][1][0] == "<b>&\\x1b[2J"
    assert "\x1b" not in repr(layer)


def test_a_large_model_shows_its_blocks():
    records = []
    optimizer = trained(Deep(40), sinks=[records.append], steps=2)
    pages = [Page(what._repr_html_()) for what in (optimizer, optimizer.tracker, optimizer.info, records[-1])]
    for page in pages:
        first = [row[0] for row in page.tables[0]]
        assert first[0] == "block"
        assert "layers.3" in first
        assert sum(map(len, page.tables)) < 60, "not a row for each of 80 layers"
    assert pages[-1].tags.count("rect") == 80


def test_layers_that_stand_out_are_named():
    rates = {f"layers.{i}.{part}.weight": 0.1 + 0.001 * i for i in range(20) for part in "ab"}
    rates["layers.7.a.weight"] = 0.9
    layers = tuple(LayerRecord(n, 1000, Counts(1000, round(1000 * r)), Counts()) for n, r in rates.items())
    page = Page(FlipRecord(5, layers)._repr_html_())
    assert [row[0] for row in page.tables[1]] == ["layers that stand out", "layers.7.a.weight"]


def test_several_quantizers_have_a_curve_each():
    optimizer = trained(two_layers(), quantizer=["e3m4", "bfloat16"])
    page = Page(optimizer.tracker._repr_html_())
    assert page.tags.count("polyline") == 4
    assert {row["layer"] for row in optimizer.tracker.to_dicts()} == {"0.weight", "2.weight"}
    assert len({row["quantizer"] for row in optimizer.tracker.to_dicts()}) == 2


def test_what_is_in_a_line():
    records = []
    optimizer = trained(two_layers(), sinks=[records.append])
    model = records[-1].model
    rates = f"flip rate {100 * model.flip_rate:.1f}%, stall ratio {100 * model.stall_ratio:.1f}%"
    assert repr(records[-1]) == f"<FlipRecord: step 6, 2 layers, {rates}>"
    assert repr(FlipRecord(0, ())) == "<FlipRecord: step 0, 0 layers>"
    assert repr(model) == f"<LayerRecord: model, 36 weights, {rates}>"
    assert repr(optimizer.info) == "<RunInfo: 2 weights tracked, 2 skipped; print() lists them>"
    handle = track_flips(torch.optim.SGD(two_layers().parameters(), lr=0.1), sinks=[])
    assert repr(handle).startswith("<FlipTrackingHandle: <RunInfo: 2 weights tracked")
    Page(handle._repr_html_())
    assert repr(optimizer).startswith("FlipTrackingOptimizer(SGD (")


def test_displaying_changes_nothing():
    bare, shown = (trained(two_layers(), steps=0) for _ in range(2))
    for step in range(6):
        for optimizer in (bare, shown):
            for at, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = torch.full_like(parameter, 0.1 * (step - 2 + at))
            optimizer.step()
        before = torch.get_rng_state()
        for what in (shown, shown.tracker, shown.info):
            what._repr_html_(), repr(what)
        shown.tracker.to_dicts()
        assert torch.equal(before, torch.get_rng_state())
    assert bare.tracker.to_dicts() == shown.tracker.to_dicts()
    for a, b in zip(bare.param_groups[0]["params"], shown.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


def test_rows_are_flat_and_have_the_numbers_of_the_accessors():
    tracker = trained(two_layers(), metrics=("flips", "stalls", "oscillation")).tracker
    rows = tracker.to_dicts()
    assert {row["layer"]: row["flips"] for row in rows} == tracker.get_flip_counts()
    assert {row["layer"]: row["cumulative_flip_rate"] for row in rows} == tracker.get_flip_rates()
    assert {row["layer"]: row["stall_ratio"] for row in rows} == tracker.get_stall_ratios()
    assert all(row["flip_rate"] == row["flips"] / (6 * row["weights"]) and row["step"] == 6 for row in rows)
    assert all(list(row) == list(rows[0]) and "oscillation_ratio" in row for row in rows)
    assert {type(value) for row in rows for value in row.values()} == {str, int, float}


def test_pandas():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    tracker = trained(two_layers()).tracker
    frame = tracker.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.set_index("layer")["flips"].to_dict() == tracker.get_flip_counts()
    assert len(WeightFlipTracker().to_pandas()) == 0


def test_without_pandas_the_error_says_what_to_do(monkeypatch):
    """The import fails as if pandas were missing."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs pandas.*pip install 'weightflip\[pandas\]'.*to_dicts\(\)"):
        WeightFlipTracker().to_pandas()


def test_a_long_run_keeps_few_points_and_every_count():
    history = History()
    flips = 0
    for step in range(1, 1004):
        window = Counts(10, step % 7, 10, 10 - step % 7)
        flips += step % 7
        history.add(step, [LayerRecord("w", 10, window, Counts())])
    (points,) = history._points.values()
    assert len(points) <= 200
    assert points[-1].step == 1003
    assert sum(point.flips for point in points) == flips
    assert sum(point.weight_steps for point in points) == 10 * 1003
    assert all(not math.isnan(rate) for _, rate in history.flip_rates()[""])


def test_a_notebook_shows_all_of_it():
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    from nbformat.v4 import new_code_cell, new_notebook

    training = """
import torch
from weightflip import FlipTrackingOptimizer
torch.manual_seed(0)
model, records = torch.nn.Linear(4, 3), []
inner = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = FlipTrackingOptimizer(inner, model, quantizer="e3m4", sinks=[records.append], log_every=2)
for _ in range(6):
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
"""
    shown = ("optimizer", "optimizer.tracker", "optimizer.info", "records[-1]")
    notebook = new_notebook(cells=[new_code_cell(code) for code in (training, *shown)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.outputs)
    for cell in notebook.cells[1:]:
        (output,) = cell.outputs
        html = output.data["text/html"]
        assert any(row[0] == "weight" for row in Page(html).tables[0][1:]), cell.source
        assert "\n" in output.data["text/plain"] or len(output.data["text/plain"]) < 120
