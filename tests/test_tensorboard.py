"""Groups, charts, histograms and pictures in real event files, read back by TensorBoard's reader."""

from __future__ import annotations

import copy
import io
import math
import pickle

import matplotlib
import numpy as np
import pytest
import torch
from conftest import backward, digits_model
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.data_compat import migrate_value
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util
from test_sinks import scalars, train
from torch.utils.tensorboard import SummaryWriter

from weightflip import FlipRecord, FlipTrackingOptimizer, RunInfo
from weightflip.records import Counts, Histogram, LayerRecord, Quotient
from weightflip.sinks import TensorBoardSink
from weightflip.sinks.heatmap import LayerHistory, draw

MODEL_TAGS = {"flip_rate": "rate", "cumulative_flip_rate": "cumulative_rate", "stall_ratio": "stall_ratio"}
FRAME, NOTHING = (96, 96, 96), (224, 224, 224)


def events_in(log_dir):
    return EventAccumulator(str(log_dir), size_guidance={"images": 0, "tensors": 0, "histograms": 0}).Reload()


def charts(log_dir) -> dict[str, dict[str, list[str]]]:
    """The layout that TensorBoard shows: tag patterns by chart and category."""
    proto = events_in(log_dir).Tensors("custom_scalars__config__")[-1].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(proto).item())
    return {
        category.title: {
            chart.title: list(chart.multiline.tag) or [(x.value, x.lower, x.upper) for x in chart.margin.series]
            for chart in category.chart
        }
        for category in layout.category
    }


def plot_of(picture: np.ndarray) -> np.ndarray:
    """The pixels inside the frame."""
    framed = (picture == FRAME).all(axis=-1)
    (top, *_, bottom) = np.flatnonzero(framed.sum(axis=1) > 400)
    (left, *_, right) = np.flatnonzero(framed[top : bottom + 1].all(axis=0))
    return picture[top + 1 : bottom, left + 1 : right]


def cells(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The colors in the middle of each cell."""
    plot = plot_of(picture)
    y = ((np.arange(rows) + 0.5) * plot.shape[0] / rows).astype(int)
    x = ((np.arange(columns) + 0.5) * plot.shape[1] / columns).astype(int)
    return plot[y][:, x].astype(int)


def viridis(shares: np.ndarray) -> np.ndarray:
    """matplotlib's viridis, for numbers in [0, 1]."""
    return (matplotlib.colormaps["viridis"](shares)[..., :3] * 255).round().astype(int)


def record_of(step: int, rates: dict[str, float | None], weights: int = 100_000) -> FlipRecord:
    """One tracked step for each rate. None for a layer that is missing."""
    layers = []
    for name, rate in rates.items():
        counts = Counts() if rate is None else Counts(weights, round(rate * weights))
        layers.append(LayerRecord(name, weights, counts, counts))
    return FlipRecord(step, tuple(layers))


# ---------------------------------------------------------------------- scalars and charts


def test_every_value_of_every_record_has_its_tag(digits, tmp_path):
    records = []
    options = {
        "metrics": ("flips", "stalls", "oscillation", "coverage"),
        "groups": {"first": "0.*", "both": ["0.*", "2.*"]},
        "sinks": [TensorBoardSink(str(tmp_path)), records.append],
    }
    train(digits, model=digits_model(width=64), **options)[0].close()
    found = {tag: dict(points) for tag, points in scalars(tmp_path).items()}
    expected = {}
    for record in records:
        first, second = record.layers
        for name in record.model.values:
            of_model = record.model.values[name]
            expected.setdefault(f"flips/{MODEL_TAGS.get(name, name)}", {})[record.step] = of_model
            expected.setdefault(f"Model/{name}", {})[record.step] = of_model
            expected.setdefault(f"{name}_by_group/both", {})[record.step] = of_model
            expected.setdefault(f"{name}_by_group/first", {})[record.step] = first.values[name]
            for layer in (first, second):
                expected.setdefault(f"{name}/{layer.name}", {})[record.step] = layer.values[name]
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert found[tag] == pytest.approx(points, rel=1e-6), tag
    assert "oscillation_ratio/2.weight" in found
    assert "flips/net_flipped" in found


def test_several_quantizers_have_their_own_groups(digits, tmp_path):
    train(digits, 10, log_dir=tmp_path, quantizer=["e3m4", "int8"], groups={"first": "0.*"})[0].close()
    found = scalars(tmp_path)
    for quantizer in ("e3m4", "int8"):
        assert found[f"flip_rate_by_group/first@{quantizer}"] == found[f"flip_rate/0.weight@{quantizer}"]


def test_a_frozen_layer_writes_no_more(digits, tmp_path):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters()),
        model,
        log_dir=tmp_path,
        log_every=2,
        metrics=("flips", "stalls", "oscillation", "coverage"),
    )
    for step in range(6):
        model[0].weight.requires_grad_(step < 2)
        backward(model, digits, step)
        optimizer.step()
    optimizer.close()
    found = {tag: [step for step, _ in points] for tag, points in scalars(tmp_path).items()}
    of_first = {tag: steps for tag, steps in found.items() if tag.endswith("/0.weight")}
    assert {"flip_rate/0.weight", "oscillation_ratio/0.weight", "net_flipped/0.weight"} <= of_first.keys()
    assert set(map(tuple, of_first.values())) == {(2,)}
    assert found["net_flipped/2.weight"] == [2, 4, 6]


def test_charts_show_what_there_is(digits, tmp_path):
    train(digits, 10, log_dir=tmp_path / "plain")[0].close()
    plain = charts(tmp_path / "plain")
    assert list(plain) == ["weightflip"]
    assert [tags for _, tags in plain["weightflip"].items()] == [
        ["^flips/rate", "^flips/stall_ratio"],
        ["^flip_rate/.*"],
        ["^stall_ratio/.*"],
        ["^cumulative_flip_rate/.*"],
        ["^updated_fraction/.*"],
    ]
    metrics = ("flips", "stalls", "oscillation")
    train(digits, 10, log_dir=tmp_path / "more", metrics=metrics, groups={"all": "*"})[0].close()
    more = charts(tmp_path / "more")
    assert list(more) == ["weightflip", "weightflip: oscillation", "weightflip: groups of layers"]
    assert more["weightflip"] == plain["weightflip"]
    assert more["weightflip: oscillation"] == {
        "fraction of flips that reverse the weight's previous flip, by layer": ["^oscillation_ratio/.*"]
    }
    assert ["^stall_ratio_by_group/.*"] in more["weightflip: groups of layers"].values()


def test_a_users_own_writer_gets_no_layout(digits, tmp_path):
    with SummaryWriter(tmp_path) as writer:
        train(digits, 10, sinks=[writer])[0].close()
    assert "custom_scalars__config__" not in events_in(tmp_path).Tags()["tensors"]
    assert "weightflip/flip_rate" in events_in(tmp_path).Tags()["images"]


# ---------------------------------------------------------------------- histograms


def test_histograms_are_what_tensorboard_shows(tmp_path):
    sink = TensorBoardSink(str(tmp_path))
    sink.start(RunInfo({}, {}), 0)
    counts = Counts(10, 1)
    histogram = Histogram((-4.0, -1.0, 0.0, 0.5, 2.0, 8.0), (0, 3, 5, 2, 0))
    sink.write(FlipRecord(3, (LayerRecord("fc", 10, counts, counts, histograms={"travel": histogram}),)))
    sink.close()
    events = events_in(tmp_path)
    assert events.Tags()["histograms"] == ["travel/fc"]
    (event,) = events.Histograms("travel/fc")
    assert event.step == 3
    assert event.histogram_value.num == 10
    # As the dashboard gets it: left edge, right edge, count. Empty bins at the ends are dropped.
    raw = next(
        value
        for path in tmp_path.iterdir()
        for summary in summaries(path)
        for value in summary.value
        if value.tag == "travel/fc"
    )
    shown = tensor_util.make_ndarray(migrate_value(raw).tensor).tolist()
    assert shown == [[-1.0, 0.0, 3.0], [0.0, 0.5, 5.0], [0.5, 2.0, 2.0]]


def summaries(path):
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for raw in RawEventFileLoader(str(path)).Load():
        yield Event.FromString(raw).summary


def test_long_runs_write_fewer_histograms(tmp_path):
    sink = TensorBoardSink(str(tmp_path))
    sink.start(RunInfo({}, {}), 0)
    counts = Counts(10, 1)
    layer = LayerRecord("fc", 10, counts, counts, histograms={"travel": Histogram((0.0, 1.0), (10,))})
    for step in range(1, 1001):
        sink.write(FlipRecord(step, (layer,)))
    sink.close()
    steps = [event.step for event in events_in(tmp_path).Histograms("travel/fc")]
    assert steps[:64] == list(range(1, 65))
    assert steps[64:96] == list(range(66, 129, 2))
    assert len(steps) == 64 + 3 * 32 + (1000 - 512) // 16


# ---------------------------------------------------------------------- pictures


def pictures(log_dir, tag) -> list[tuple[int, np.ndarray]]:
    found = events_in(log_dir).Images(f"weightflip/{tag}")
    return [(e.step, np.array(Image.open(io.BytesIO(e.encoded_image_string)).convert("RGB"))) for e in found]


def test_colors_are_the_values(digits, tmp_path):
    records = []
    options = {"metrics": ("flips", "stalls", "oscillation"), "log_every": 2}
    train(digits, 25, sinks=[TensorBoardSink(str(tmp_path)), records.append], **options)[0].close()
    for tag in ("flip_rate", "stall_ratio", "oscillation_ratio"):
        step, picture = pictures(tmp_path, tag)[-1]
        assert step == 25
        # Before its second flip no weight can oscillate, but a ratio of 0 is still a value.
        values = np.array([[record.layers[row].values[tag] for record in records] for row in range(2)])
        low, high = values[values > 0].min(), values.max()
        if high > 50 * low:
            with np.errstate(divide="ignore"):
                shares = np.clip(np.log(values / low) / np.log(high / low), 0, 1)
        else:
            shares = (values - values.min()) / (high - values.min())
        assert np.abs(cells(picture, 2, 13) - viridis(shares)).max() <= 6, tag


def test_pictures_are_drawn_ever_more_seldom(digits, tmp_path):
    optimizer, _ = train(digits, 21, log_dir=tmp_path, log_every=1)
    assert optimizer.tracker.step_count == 21
    optimizer.flush()
    optimizer.flush()
    optimizer.close()
    assert [step for step, _ in pictures(tmp_path, "flip_rate")] == [1, 2, 4, 8, 16, 21]


def test_flushing_after_each_record_draws_few(digits, tmp_path):
    sink = TensorBoardSink(str(tmp_path))
    sink.start(RunInfo({}, {}), 0)
    for step in range(1, 201):
        sink.write(record_of(step, {"fc": step / 300}))
        sink.flush()
    sink.close()
    assert len(pictures(tmp_path, "flip_rate")) < 40


def test_a_logarithmic_scale_and_what_was_not_counted():
    history = LayerHistory("flip_rate")
    rates = [{"a": 0.5, "b": None}, {"a": 0.05, "b": 0.0}, {"a": 0.005, "b": 0.5}]
    for step, rate in enumerate(rates):
        history.add(record_of(10 * step + 10, rate), 10 * step)
    found = cells(draw(history, "rates"), 2, 3)
    expected = viridis(np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    expected[1, 0] = NOTHING
    assert np.abs(found - expected).max() <= 6


def test_one_value_has_one_color_and_no_division_by_nothing():
    history = LayerHistory("flip_rate")
    history.add(record_of(10, {"a": 0.25}), 0)
    assert np.abs(cells(draw(history, "rates"), 1, 1) - viridis(np.array([[0.5]]))).max() <= 6


def test_long_histories_are_sums_of_neighbors():
    history = LayerHistory("stall_ratio")
    torch.manual_seed(0)
    updates = torch.randint(0, 100, (1000, 2))
    stalled = (updates * torch.rand(1000, 2)).long()
    for step, (of, among) in enumerate(zip(stalled.tolist(), updates.tolist(), strict=True)):
        layers = []
        for name, x, y in zip("ab", of, among, strict=True):
            counts = Counts(100, 0, y, x)
            layers.append(LayerRecord(name, 100, counts, counts))
        history.add(FlipRecord(step + 1, tuple(layers)), step)
    # 200 columns of one record become 100 of two, and so on: 8 records per column at record 801.
    expected = stalled.view(125, 8, 2).sum(1).double() / updates.view(125, 8, 2).sum(1)
    assert torch.equal(torch.tensor(history.table, dtype=torch.float64).T, expected)
    assert history.edges == list(range(0, 1001, 8))


def test_many_layers_keep_the_picture_in_bounds():
    history = LayerHistory("flip_rate")
    names = [f"transformer.encoder.layers.{i}.self_attention.query_projection.weight" for i in range(500)]
    for step in range(3):
        history.add(record_of(step + 1, {name: (i + 1) / 501 for i, name in enumerate(names)}), step)
    picture = draw(history, "rates")
    assert picture.shape[0] < 1700
    assert picture.shape[1] < 1100
    shares = (np.log(np.arange(1, 501)) / math.log(500))[:, None].repeat(3, axis=1)
    assert np.abs(cells(picture, 500, 3) - viridis(shares)).max() <= 6


def test_layers_that_come_later_have_their_row(tmp_path):
    history = LayerHistory("flip_rate")
    history.add(record_of(1, {"a": 0.1}), 0)
    history.add(record_of(2, {"a": 0.2, "b": 0.3}), 1)
    assert np.isnan(history.table[1][0])
    assert history.table[1][1] == pytest.approx(0.3)


def test_a_resumed_run_begins_a_new_picture(digits, tmp_path):
    model = digits_model()
    first, _ = train(digits, 6, model=model, log_dir=tmp_path / "first", log_every=1)
    first.close()
    second = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters()), model, log_dir=tmp_path / "second", log_every=1
    )
    second.load_state_dict(first.state_dict())
    for step in range(4):
        backward(model, digits, step)
        second.step()
    second.close()
    found = pictures(tmp_path / "second", "flip_rate")
    assert [step for step, _ in found] == [7, 8, 10]
    rates = dict(scalars(tmp_path / "second")["flip_rate/0.weight"])
    of_first = np.array([rates[step] for step in (7, 8, 9, 10)])
    of_second = np.array([value for _, value in scalars(tmp_path / "second")["flip_rate/2.weight"]])
    values = np.stack([of_first, of_second])
    shares = (values - values.min()) / (values.max() - values.min())
    assert np.abs(cells(found[-1][1], 2, 4) - viridis(shares)).max() <= 6


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_draw_pictures_of_their_own(digits, tmp_path, duplicate):
    optimizer, _ = train(digits, 4, log_dir=tmp_path, log_every=1)
    twin = duplicate(optimizer)
    optimizer.close()
    for p in (p for group in twin.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    twin.step()
    twin.close()
    # TensorBoard reads the two files in the order of their names, which is arbitrary within a second.
    assert sorted(step for step, _ in pictures(tmp_path, "flip_rate")) == [1, 2, 4, 5]


def test_no_picture_costs_no_scalars(digits, tmp_path, monkeypatch):
    # Like a Pillow that was built without font support.
    from PIL import ImageFont

    def fails(size):
        raise OSError("no fonts here")

    monkeypatch.setattr(ImageFont, "load_default", fails)
    with pytest.warns(
        UserWarning, match="drawing pictures failed, so the run has no more of them: OSError: no fonts here"
    ) as caught:
        train(digits, 25, log_dir=tmp_path)[0].close()
    assert len([w for w in caught if "pictures" in str(w.message)]) == 1
    assert len(scalars(tmp_path)["flips/rate"]) == 3


def test_ratios_of_metric_groups_are_added_before_they_are_divided():
    history = LayerHistory("oscillation_ratio")
    for step in range(400):
        counts = Counts(100, 10, ratios={"oscillation_ratio": Quotient(step % 2, 1 + step % 2)})
        history.add(FlipRecord(step + 1, (LayerRecord("a", 100, counts, counts),)), step)
    assert history.table == [[pytest.approx(1 / 3)] * 200]
