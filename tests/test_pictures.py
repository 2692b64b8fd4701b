"""Pictures of all layers: the effect of outliers on colors, and the positions of names."""

from __future__ import annotations

import numpy as np
import pytest
from test_many_layers import NAMES, even_rates, layers_of
from test_sinks import train
from test_tensorboard import cells, events_in, plot_of, record_of, viridis

from weightflip import FlipRecord
from weightflip.records import Counts, LayerRecord, Quotient
from weightflip.sinks import TensorBoardSink, scatter
from weightflip.sinks.colors import ABOVE, BELOW, ColorScale, interpolate_colors
from weightflip.sinks.heatmap import LayerHistory, draw


def history_of(records) -> LayerHistory:
    history = LayerHistory("flip_rate")
    for record in records:
        history.add(record, record.step - 1)
    return history


@pytest.mark.parametrize(("odd", "color"), [(0.000_01, BELOW), (0.9, ABOVE)])
def test_one_outlier_leaves_the_others_their_colors(odd, color):
    """20 layers between 0.1 and 0.2 with one outlier: the others keep their colors."""
    rates = {f"layer{i}": 0.1 + i / 190 for i in range(20)}
    plain = draw(history_of([record_of(step, rates) for step in (1, 2, 3)]), "rates")
    rates["layer20"] = odd
    picture = draw(history_of([record_of(step, rates) for step in (1, 2, 3)]), "rates")
    found = cells(picture, 21, 3)
    assert np.abs(found[:20] - cells(plain, 20, 3)).max() <= 6
    assert (found[20] == color).all()
    # The legend explains it with the same color.
    below_plot = picture[np.flatnonzero((picture == (96, 96, 96)).all(axis=-1).sum(axis=1) > 400)[-1] + 1 :]
    assert (below_plot == color).all(axis=-1).sum() >= 14 * 14
    assert not (plain == color).all(axis=-1).any()
    assert picture.shape[0] > plain.shape[0]


@pytest.mark.parametrize(
    ("values", "low", "high", "is_logarithmic"),
    [
        # A burst in one of 100 steps.
        ([*np.linspace(0.1, 0.2, 99), 0.97], 0.1, 0.2, False),
        # One of 24 layers that does not move.
        ([*np.tile(np.geomspace(0.001, 0.5, 23), 4), *[1e-9] * 4], 0.001, 0.5, True),
        # Half of the layers differ, so they are not outliers.
        ([*np.linspace(0.1, 0.2, 50), *np.linspace(0.001, 0.002, 50)], 0.001, 0.2, True),
        # A decay over all values.
        (np.geomspace(1e-4, 0.5, 200), 1e-4, 0.5, True),
        (np.linspace(0.4, 1, 200), 0.4, 1, False),
        # Nearly all values are equal, so the few others are what matters.
        ([*[0.0] * 95, *np.linspace(0.1, 0.5, 5)], 0.0, 0.5, False),
        ([*[1.0] * 95, *np.linspace(0.1, 0.5, 5)], 0.1, 1.0, False),
    ],
)
def test_what_the_colors_reach_from_and_to(values, low, high, is_logarithmic):
    scale = ColorScale.fit(np.array([values]))
    assert (scale.low, scale.high, scale.is_logarithmic) == (pytest.approx(low), pytest.approx(high), is_logarithmic)
    assert scale.lowest == pytest.approx(min(values))
    assert scale.highest == pytest.approx(max(values))


def test_nothing_and_one_value():
    assert ColorScale.fit(np.array([[np.nan, np.inf]])) == ColorScale(0.0, 0.0, False, 0.0, 0.0)
    assert ColorScale.fit(np.array([[0.25]])) == ColorScale(0.25, 0.25, False, 0.25, 0.25)


def test_palette_is_viridis():
    places = np.linspace(0, 1, 33)
    assert np.abs(interpolate_colors(places).astype(int) - viridis(places)).max() <= 6


def test_many_layers_stand_by_block():
    """A separate param group, as for weight decay, moves a layer to the end."""
    rates = dict.fromkeys(NAMES, 0.1)
    rates["layers.7.mlp.down.weight"] = 0.0
    order = [name for name in NAMES if name != "layers.7.mlp.down.weight"] + ["layers.7.mlp.down.weight"]
    history = history_of([FlipRecord(1, layers_of({name: rates[name] for name in order}))])
    picture = draw(history, "rates")
    found = cells(picture, len(NAMES), 1)[:, 0]
    at = NAMES.index("layers.7.mlp.down.weight")
    assert np.flatnonzero((found != found[0]).any(axis=-1)).tolist() == [at]
    # Its name is red and next to its row. No other name is red.
    red = ((picture[..., 0] > 150) & (picture[..., 1] < 60) & (picture[..., 2] < 80)).any(axis=1)
    plot_top = np.flatnonzero((picture == (96, 96, 96)).all(axis=-1).sum(axis=1) > 400)[0]
    height = plot_of(picture).shape[0] / len(NAMES)
    assert np.abs(np.flatnonzero(red) - plot_top - (at + 0.5) * height).max() < 12


def test_names_do_not_overlap():
    history = history_of([FlipRecord(1, layers_of(even_rates(0)))])
    picture = draw(history, "rates")
    left = np.flatnonzero((picture == (96, 96, 96)).all(axis=-1).sum(axis=0) > 300)[0]
    written = (picture[:, : left - 8] < 128).all(axis=-1).any(axis=1)
    # 24 blocks, the embedding and the head: a gap below each name.
    assert np.count_nonzero(written[1:] & ~written[:-1]) >= 24


# ---------------------------------------------------------------------- flip rate against step size


def layer_of(name: str, flips: float, expected: float, looked: int = 1) -> LayerRecord:
    """Flips and expected flips are measured in every n-th of 4 steps of 1,000,000 weights."""
    weights = 1_000_000
    seen = 4 // looked
    ratios = {"flip_excess": Quotient(flips * weights * seen, expected * weights * seen)}
    window = Counts(4 * weights, round(4 * flips * weights), ratios=ratios)
    return LayerRecord(name, weights, window, window)


@pytest.mark.parametrize("looked", [1, 2, 4])
def test_where_each_layer_lies(looked):
    layers = [layer_of("a", 0.1, 0.1, looked), layer_of("b", 0.02, 0.08, looked)]
    assert [tuple(spot)[:3] for spot in scatter.spots(layers, "flip_excess")] == [
        ("a", pytest.approx(0.1), pytest.approx(0.1)),
        ("b", pytest.approx(0.08), pytest.approx(0.02)),
    ]


def test_layers_without_the_number_and_without_flips():
    plain = LayerRecord("plain", 10, Counts(10, 1), Counts(10, 1))
    (spot,) = scatter.spots([plain, layer_of("still", 0.0, 0.001)], "flip_excess")
    assert spot == ("still", pytest.approx(0.001), 0.0, True, False)
    assert scatter.draw([spot], "step").shape[2] == 3
    assert scatter.spots([], "flip_excess") == []


def test_what_lies_off_the_line_by_chance_is_not_named():
    layers = [
        LayerRecord(name, 1000, Counts(1000, flips), Counts(), gauges={"flip_excess": Quotient(flips, expected)})
        for name, flips, expected in [("few", 3, 0.5), ("many", 300, 50.0), ("near", 300, 290.0), ("none", 0, 40.0)]
    ]
    assert [spot.is_far for spot in scatter.spots(layers, "flip_excess")] == [False, True, False, True]


def centers(picture: np.ndarray, color: tuple[int, int, int], radius: int = 4) -> list[tuple[float, float]]:
    """Erosion: keeps a pixel only if all pixels around it belong to the mask."""
    is_it = (picture == color).all(axis=-1)
    inner = is_it.copy()
    for dy in range(1 - radius, radius):
        for dx in range(1 - radius, radius):
            if dx * dx + dy * dy <= (radius - 2) ** 2:
                inner &= np.roll(is_it, (dy, dx), axis=(0, 1))
    found: list[list[tuple[int, int]]] = []
    for y, x in zip(*np.nonzero(inner), strict=True):
        near = next((group for group in found if abs(group[0][0] - y) < 8 and abs(group[0][1] - x) < 8), None)
        found.append([(y, x)]) if near is None else near.append((y, x))
    return [tuple(np.mean(group, axis=0)[::-1]) for group in found]


def test_points_lie_where_their_numbers_are():
    """The axes range from 0.001 to 1, over a frame of 440 x 380 pixels."""
    even, odd = scatter.Spot("even", 0.1, 0.1), scatter.Spot("odd", 0.3, 0.01, is_far=True)
    low = scatter.Spot("low", 0.002, 0.002)
    picture = scatter.draw([even, odd, low], "step / cell width")
    plot_top, plot_left, width, height = 56, 90, 440, 380

    def place(spot):
        shares = [(np.log10(rate) + 3) / 3 for rate in spot[1:3]]
        return plot_left + shares[0] * width, plot_top + (1 - shares[1]) * height

    # On the line: in the normal color. Far below it: labeled and red.
    found = sorted(centers(picture, (31, 119, 180)))
    assert found == [pytest.approx(place(low), abs=1.5), pytest.approx(place(even), abs=1.5)]
    assert centers(picture, (176, 0, 32)) == [pytest.approx(place(odd), abs=1.5)]


def test_it_is_there_with_the_metric_that_counts_it(digits, tmp_path):
    records = []
    sinks = [TensorBoardSink(str(tmp_path)), records.append]
    train(digits, 20, sinks=sinks, metrics=("flips", "travel"))[0].close()
    tags = events_in(tmp_path).Tags()["images"]
    assert sorted(tags) == ["weightflip/flip_excess", "weightflip/flip_rate"]
    # The metric's own tests use brute force. This one compares the picture with the counts.
    for layer, spot in zip(records[-1].layers, scatter.spots(records[-1].layers, "flip_excess"), strict=True):
        assert spot.flip_rate / spot.expected == pytest.approx(layer.values["flip_excess"])
        assert spot.flip_rate == layer.flip_rate
