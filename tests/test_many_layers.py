"""TensorBoard with many layers: few tags and charts, including those of outliers."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from test_report import run_cli
from test_sinks import scalars
from test_tensorboard import charts, events_in
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from weightflip import FlipRecord, FlipTrackingOptimizer, RunInfo
from weightflip.records import Counts, Histogram, LayerRecord
from weightflip.report import read_runs
from weightflip.report.block_summary import make_overview
from weightflip.sinks import TensorBoardSink

PARTS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
NAMES = ("embed.weight", *(f"layers.{i}.{part}.weight" for i in range(24) for part in PARTS), "head.weight")
WEIGHTS = 100_000


def layers_of(rates: dict[str, float], before: dict[str, int] | None = None) -> tuple[LayerRecord, ...]:
    before = before or {}
    layers = []
    for name, rate in rates.items():
        flips = round(rate * WEIGHTS)
        window = Counts(WEIGHTS, flips, WEIGHTS, WEIGHTS - flips)
        layers.append(LayerRecord(name, WEIGHTS, window, Counts(WEIGHTS, flips + before.get(name, 0))))
    return tuple(layers)


def even_rates(seed: int, names=NAMES) -> dict[str, float]:
    return dict(zip(names, np.random.default_rng(seed).uniform(0.08, 0.12, len(names)), strict=True))


def write(log_dir, records, *, close=True, **options):
    sink = TensorBoardSink(str(log_dir), **options)
    sink.start(RunInfo({}, {}), 0)
    for record in records:
        sink.write(record)
    if close:
        sink.close()
    return sink


def prefixes(tags) -> dict[str, int]:
    found: dict[str, int] = {}
    for tag in tags:
        found[tag.partition("/")[0]] = found.get(tag.partition("/")[0], 0) + 1
    return found


class Repeated(nn.Module):
    """24 blocks of 7 small weights, an embedding and a head: 170 weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn": nn.ModuleDict({name: nn.Linear(4, 4) for name in "qkvo"}),
                    "mlp": nn.ModuleDict({name: nn.Linear(4, 4) for name in ("gate", "up", "down")}),
                }
            )
            for _ in range(24)
        )
        self.head = nn.Linear(4, 4)


def train(log_dir=None, steps=6, **options):
    model = Repeated()
    still = model.layers[7]["mlp"]["down"].weight
    moving = [p for p in model.parameters() if p is not still]
    inner = torch.optim.SGD([{"params": moving}, {"params": [still], "lr": 0.0}], lr=0.05)
    optimizer = FlipTrackingOptimizer(inner, model, log_dir=log_dir, log_every=1, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    optimizer.close()


# ---------------------------------------------------------------------- tags


def test_a_transformer_has_few_tags(tmp_path):
    train(tmp_path)
    found = scalars(tmp_path)
    assert len(found) < 300, "513 with three for each of 170 weights"
    count = prefixes(found)
    assert count["cumulative_flip_rate"] == 170, "what the package is asked for, of every layer, always"
    blocks = [f"layers.{i}" for i in range(24)]
    for value in ("flip_rate", "stall_ratio", "cumulative_flip_rate"):
        assert {f"{value}_by_group/{block}" for block in (*blocks, "embed", "head")} <= set(found)
    # Its learning rate is 0.
    assert "flip_rate/layers.7.mlp.down.weight" in found
    assert "stall_ratio/layers.7.mlp.down.weight" in found
    assert count["flip_rate"] == count["stall_ratio"] <= 12
    # The section that TensorBoard opens first, since it sorts by tag.
    assert {tag for tag in found if tag < "a"} == {
        "Model/flip_rate", "Model/cumulative_flip_rate", "Model/stall_ratio",
    }  # fmt: skip
    assert found["Model/flip_rate"] == found["flips/rate"]
    assert found["Model/stall_ratio"] == found["flips/stall_ratio"]
    assert found["Model/cumulative_flip_rate"] == found["flips/cumulative_rate"]


def test_the_spread_is_that_of_the_layers(tmp_path):
    records = [FlipRecord(step, layers_of(even_rates(step))) for step in (1, 2)]
    write(tmp_path, records)
    found = scalars(tmp_path)
    for value in ("flip_rate", "stall_ratio"):
        for which, share in {"min": 0, "p25": 25, "median": 50, "p75": 75, "max": 100}.items():
            expected = [
                (record.step, np.percentile([layer.values[value] for layer in record.layers], share))
                for record in records
            ]
            assert found[f"spread/{value}_{which}"] == [(step, pytest.approx(number)) for step, number in expected]
    assert "spread/flip_rate_min" not in scalars(write(tmp_path / "few", [record_of_few()]).log_dir)


def record_of_few(step: int = 1) -> FlipRecord:
    return FlipRecord(step, layers_of(even_rates(step, NAMES[:30])))


def test_thirty_layers_are_shown_one_by_one_and_more_are_not(tmp_path):
    for count, each in ((30, 30), (31, 0)):
        write(tmp_path / str(count), [FlipRecord(1, layers_of(even_rates(0, NAMES[:count])))])
        found = prefixes(scalars(tmp_path / str(count)))
        assert found["cumulative_flip_rate"] == count
        assert found.get("flip_rate", 0) == found.get("stall_ratio", 0) == each


def test_what_stands_out_for_a_while_stays(tmp_path):
    records = []
    for step in range(1, 11):
        rates = even_rates(step)
        if step == 2:
            rates["embed.weight"] = 0.9  # A single point is not enough.
        if 4 <= step <= 7:
            rates["head.weight"] = 0.0  # Three consecutive points: an outlier from then on.
        records.append(FlipRecord(step, layers_of(rates)))
    write(tmp_path, records)
    found = scalars(tmp_path)
    assert [tag for tag in found if tag.startswith("flip_rate/")] == ["flip_rate/head.weight"]
    assert [step for step, _ in found["flip_rate/head.weight"]] == [6, 7, 8, 9, 10]
    # The Text tab names it.
    (event,) = events_in(tmp_path).Tensors("weightflip/layers_that_stand_out/text_summary")
    assert event.step == 6
    text = event.tensor_proto.string_val[0].decode()
    median = np.median([layer.flip_rate for layer in records[5].layers])
    assert text == f"- `head.weight`: flip rate 0\n- the median of all layers: {median:.3g}"
    assert "stall_ratio/head.weight" in found


def test_no_more_than_twelve_stand_out(tmp_path):
    rates = even_rates(0)
    odd = NAMES[10:50:2]
    rates.update({name: 0.001 / (i + 1) for i, name in enumerate(odd)})
    write(tmp_path, [FlipRecord(step, layers_of(rates)) for step in range(1, 6)])
    # The farthest outliers.
    assert {tag for tag in scalars(tmp_path) if tag.startswith("flip_rate/")} == {f"flip_rate/{n}" for n in odd[-12:]}


@pytest.mark.parametrize(
    ("layer_values", "flip_rates", "stall_ratios"), [("all", 170, 170), (("stall_ratio",), 0, 170), ((), 0, 0)]
)
def test_asked_for(tmp_path, layer_values, flip_rates, stall_ratios):
    train(tmp_path, layer_values=layer_values)
    count = prefixes(scalars(tmp_path))
    assert count["cumulative_flip_rate"] == 170
    assert (count.get("flip_rate", 0), count.get("stall_ratio", 0)) == (flip_rates, stall_ratios)


def test_asked_for_with_a_writer_of_ones_own(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        train(sinks=[writer], layer_values="flip_rate", steps=1)
    count = prefixes(scalars(tmp_path))
    assert (count["flip_rate"], count.get("stall_ratio", 0)) == (170, 0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_write_what_was_asked_for(tmp_path, duplicate):
    sink = duplicate(write(tmp_path / "first", [record_of_few()], layer_values=("stall_ratio",)))
    sink.log_dir = str(tmp_path / "second")
    sink.start(RunInfo({}, {}), 0)
    sink.write(record_of_few())
    sink.close()
    count = prefixes(scalars(tmp_path / "second"))
    assert (count.get("flip_rate", 0), count["stall_ratio"]) == (0, 30)


def test_several_quantizers_have_their_own_spread_and_outliers(tmp_path):
    records = []
    for step in range(1, 5):
        rates = {
            f"{name}@{q}": rate * scale
            for q, scale in (("e3m4", 1), ("int8", 0.01))
            for name, rate in even_rates(step).items()
        }
        rates["head.weight@int8"] = 0.1  # Normal for the other quantizer.
        records.append(FlipRecord(step, layers_of(rates)))
    write(tmp_path, records)
    found = scalars(tmp_path)
    assert [tag for tag in found if tag.startswith("flip_rate/")] == ["flip_rate/head.weight@int8"]
    assert found["spread/flip_rate_max@int8"][-1][1] == pytest.approx(0.1)
    assert 0.08 < found["spread/flip_rate_min@e3m4"][-1][1] < 0.09
    assert found["Model/flip_rate@e3m4"] == found["flips/rate@e3m4"]


def test_histograms_of_blocks(tmp_path):
    histogram = Histogram((0.0, 1.0, 2.0), (10, 20))
    layers = tuple(
        LayerRecord(name, 30, Counts(30, 1), Counts(30, 1), histograms={"travel": histogram}) for name in NAMES
    )
    groups = {f"layers.{i}": tuple(n for n in NAMES if n.startswith(f"layers.{i}.")) for i in range(24)}
    write(tmp_path, [FlipRecord(1, layers, groups)])
    events = events_in(tmp_path)
    assert set(events.Tags()["histograms"]) == {f"travel_by_group/{block}" for block in groups}
    (event,) = events.Histograms("travel_by_group/layers.3")
    assert event.histogram_value.num == 7 * 30


# ---------------------------------------------------------------------- descriptions


def test_cards_have_a_description(tmp_path):
    train(tmp_path, steps=4)
    multiplexer = EventMultiplexer().AddRun(str(tmp_path), "run").Reload()
    about = {tag: multiplexer.SummaryMetadata("run", tag).summary_description for tag in scalars(tmp_path)}
    assert about["Model/flip_rate"] == "fraction of weights that flip in a step: model"
    assert about["flips/stall_ratio"] == "fraction of updates lost to rounding: model"
    assert about["flip_rate_by_group/layers.3"] == "fraction of weights that flip in a step: group layers.3"
    assert about["spread/flip_rate_min"] == "fraction of weights that flip in a step: min of the layers"
    name = "layers.7.mlp.down.weight"
    assert about[f"cumulative_flip_rate/{name}"] == f"flips since the start / weights: {name}"
    assert all(about.values())


# ---------------------------------------------------------------------- charts


def test_charts_have_no_line_for_each_layer(tmp_path):
    records = []
    for step in range(1, 5):
        rates = {**even_rates(step), "head.weight": 0.0}
        records.append(FlipRecord(step, layers_of(rates), {"layers.0": NAMES[1:8], "layers.1": NAMES[8:15]}))
    write(tmp_path, records)
    found = charts(tmp_path)
    assert list(found) == ["weightflip", "weightflip: groups of layers"]
    parts = ("min", "p25", "median", "p75", "max")
    assert found["weightflip"] == {
        "model": ["^flips/rate", "^flips/stall_ratio"],
        **{
            title: tags
            for name, value in (("flip rate", "flip_rate"), ("stall ratio", "stall_ratio"))
            for title, tags in {
                f"{name}, lowest, quartiles and highest layer": [rf"^spread/{value}_{part}$" for part in parts],
                f"{name}, layers that stand out, and the median": [rf"^{value}/.*", rf"^spread/{value}_median$"],
            }.items()
        },
        "flips/weight, lowest, quartiles and highest layer": [rf"^spread/cumulative_flip_rate_{p}$" for p in parts],
        "flips/weight, layers that stand out, and the median": [
            r"^cumulative_flip_rate/head\.weight$", r"^spread/cumulative_flip_rate_median$",
        ],
    }  # fmt: skip
    assert list(found["weightflip: groups of layers"].values()) == [
        ["^flip_rate_by_group/.*"], ["^stall_ratio_by_group/.*"], ["^cumulative_flip_rate_by_group/.*"],
    ]  # fmt: skip


@pytest.mark.parametrize("count", [3, 40])
def test_what_does_not_vary_has_no_chart_until_it_does(tmp_path, count):
    """For example, a stall ratio of 1 at the start of a warmup, or a fraction that is always 0."""

    def record(step, stalled):
        layers = layers_of(dict.fromkeys(NAMES[:count], 0.0))
        window = Counts(WEIGHTS, 0, WEIGHTS, stalled)
        return FlipRecord(step, tuple(LayerRecord(x.name, WEIGHTS, window, x.total) for x in layers))

    sink = write(tmp_path, [record(1, WEIGHTS), record(2, WEIGHTS)], close=False)
    sink.flush()
    assert [title for title in charts(tmp_path)["weightflip"] if title != "model"] == []
    sink.write(record(3, WEIGHTS - 500))
    sink.close()
    assert [title for title in charts(tmp_path)["weightflip"] if title != "model"] == [
        "fraction of updates lost to rounding, by layer" if count == 3
        else "stall ratio, lowest, quartiles and highest layer"
    ]  # fmt: skip


def test_charts_of_all_layers_do_not_come_back_with_their_tags(tmp_path):
    records = [FlipRecord(step, layers_of({**even_rates(step), "head.weight": 0.0})) for step in range(1, 5)]
    write(tmp_path, records, layer_values="all")
    (tags,) = (tags for title, tags in charts(tmp_path)["weightflip"].items() if title.startswith("flip rate, layers"))
    assert tags == [r"^flip_rate/head\.weight$", "^spread/flip_rate_median$"]


def test_the_layout_is_written_where_it_changes(tmp_path):
    write(tmp_path, [record_of_few(step) for step in range(1, 30)])
    assert len(events_in(tmp_path).Tensors("custom_scalars__config__")) == 1


def test_numbers_of_metric_groups(tmp_path):
    train(tmp_path, metrics=("flips", "stalls", "coverage"))
    count = prefixes(scalars(tmp_path))
    assert count["ever_flipped_by_group"] == 26
    assert count["ever_flipped"] == count["flip_rate"] <= 12
    assert "net flipped, lowest, quartiles and highest layer" in charts(tmp_path)["weightflip: coverage"]


# ---------------------------------------------------------------------- reports of event files alone


@pytest.mark.parametrize("has_panel", [True, False])
def test_a_report_of_event_files_knows_every_layer(tmp_path, has_panel):
    """TensorBoard has only the cumulative flip rate of each layer. Its differences are the flip rates."""
    records = []
    train(sinks=[TensorBoardSink(str(tmp_path / "run")), records.append], steps=6)
    if not has_panel:
        with SummaryWriter(tmp_path / "bare") as writer:
            for tag, points in scalars(tmp_path / "run").items():
                for step, number in points:
                    writer.add_scalar(tag, number, step)
    (run,) = read_runs([tmp_path / ("run" if has_panel else "bare")])
    assert list(run.layers) == [layer.name for layer in records[0].layers]
    for name, layer in run.layers.items():
        series = layer.get("flip_rate")
        of_layer = [next(x for x in record.layers if x.name == name) for record in records]
        assert series.steps.tolist() == [record.step for record in records]
        assert series.values == pytest.approx([x.flip_rate for x in of_layer], abs=1e-5)
        if has_panel:
            assert series.denominators.tolist() == [x.window.weight_steps for x in of_layer]
    assert len(run.layers["layers.7.mlp.down.weight"].get("stall_ratio"))
    assert any("flip rates of" in note for note in run.notes)


def test_a_resumed_run_begins_with_its_second_point(tmp_path):
    """If the first cumulative rate includes the flips of an earlier run, its window is unknown."""
    records = [FlipRecord(step, layers_of(even_rates(step), dict.fromkeys(NAMES, 500_000))) for step in (1010, 1020)]
    write(tmp_path, records)
    (run,) = read_runs([tmp_path])
    assert run.layers["embed.weight"].get("flip_rate").steps.tolist() == [1020]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("many")
    train(sinks=[directory / "a" / "flips.jsonl"], steps=12)
    train(sinks=[directory / "b" / "flips.jsonl"], steps=12, quantizer="int4")
    return directory


class TestReport:
    """Blocks first, outliers below, never 170 rows."""

    def rows(self, text: str) -> list[str]:
        cells = [line.split() for line in text.splitlines() if line.strip()]
        return [row[1] if row[0] in ("!", "!!", "*") else row[0] for row in cells]

    @pytest.mark.parametrize("runs", [("a",), ("a", "b")])
    def test_terminal(self, run_dir, capsys, runs):
        out = run_cli(capsys, *(run_dir / run for run in runs))
        rows = self.rows(out)
        assert {f"layers.{i}" for i in range(24)} | {"embed", "head"} <= set(rows)
        layers = [row for row in rows if row.startswith("layers.") and row.endswith(".weight")]
        assert "layers.7.mlp.down.weight" in layers
        assert len(layers) <= 24
        assert "more layers: use --html or --csv for all" in out

    def test_block_rows_are_sums(self, run_dir):
        (run,) = read_runs([run_dir / "a"])
        overview = make_overview(run, [])
        assert [block.name for block in overview.blocks] == ["embed", *(f"layers.{i}" for i in range(24)), "head"]
        names = [f"layers.3.{part}.weight" for part in PARTS]
        assert sorted(overview.members["layers.3"]) == sorted(names)
        block = next(block for block in overview.blocks if block.name == "layers.3")
        flips = sum(run.layers[name].get("flip_rate").numerators.sum() for name in names)
        assert block.get("flip_rate").numerators.sum() == flips > 0
        assert block.weights == 7 * 16
        assert sum(block.weights for block in overview.blocks) == 170 * 16

    def test_page(self, run_dir, capsys, tmp_path):
        run_cli(capsys, run_dir / "a", "--html", tmp_path / "report.html")
        text = (tmp_path / "report.html").read_text(encoding="utf-8")
        tables = text[text.index("<h2>Layers</h2>") :]
        before, _, folded = tables.partition("<details>")
        assert before.count(">layers.3<") == 1
        assert ">layers.3.mlp.up.weight<" not in before
        assert ">layers.7.mlp.down.weight<" in before
        assert folded.count(".weight</td>") >= 170
        # The heat map is labeled with block names.
        maps = text[text.index("<h2>Layers over time</h2>") : text.index("<h2>Layers</h2>")]
        assert ">layers.23<" in maps
        assert "layers.0.attn.q.weight" not in maps


def test_runs_without_blocks_or_with_few_layers_have_a_row_for_each_layer(tmp_path):
    for names in (NAMES[:30], tuple(f"{i}.weight" for i in range(40))):
        write(tmp_path / str(len(names)), [FlipRecord(1, layers_of(even_rates(0, names)))], layer_values="all")
        (run,) = read_runs([tmp_path / str(len(names))])
        assert make_overview(run, []) is None
