"""Under which tag each number of a record is shown, wherever there are tags."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from weightflip.overview import Spread, spread
from weightflip.records import MODEL_TAGS, FlipRecord, LayerRecord, printable, split_variant, variant

HISTOGRAMS_OF_ALL = 64


class Point(NamedTuple):
    """One number of a record, where there are tags.

    Attributes:
        tag: Where it is shown; what does not print in a name is escaped.
        number: The number.
        value: What it is, as in ``LayerRecord.values``.
        whose: Of what: the model, a layer, a group of layers, or what of all layers, in a few words.
    """

    tag: str
    number: float
    value: str
    whose: str


def every_layer(value: str, layer: str) -> bool:
    """All numbers of all layers are wanted."""
    return True


def points(record: FlipRecord, is_wanted: Callable[[str, str], bool] = every_layer) -> Iterator[Point]:
    """The numbers that a logging point adds: the model's, then the layers', then the groups'.

    A number ``<value>`` is ``flips/<value>`` for the model, ``<value>/<layer>`` for a layer and
    ``<value>_by_group/<group>`` for a group of layers.

    Args:
        record: The logging point.
        is_wanted: Whether a value of a layer has a tag of its own.
    """
    for quantizer, model in record.models.items():
        for value, number in model.news.items():
            tag = MODEL_TAGS.get(value, f"flips/{value}")
            yield _point(_seen_as(tag, quantizer), number, value, "model")
    for layer in record.layers:
        for value, number in layer.news.items():
            if is_wanted(value, layer.name):
                yield _point(f"{value}/{layer.name}", number, value, layer.name)
        if layer.nonfinite and layer.window.weight_steps:
            yield _point(f"nonfinite_weights/{layer.name}", float(layer.nonfinite), "nonfinite_weights", layer.name)
    for group, summed in record.group_sums.items():
        for value, number in summed.news.items():
            yield _point(f"{value}_by_group/{group}", number, value, f"group {group}")


def model_points(record: FlipRecord) -> Iterator[Point]:
    """The model's numbers once more, as ``Model/<value>``: TensorBoard sorts by tag, and opens what comes first."""
    for quantizer, model in record.models.items():
        for value, number in model.news.items():
            yield _point(_seen_as(f"Model/{value}", quantizer), number, value, "model")


def spread_points(record: FlipRecord) -> Iterator[Point]:
    """How each number is spread over the layers: ``spread/<value>_min``, ``_p25``, ``_median``, ``_p75``, ``_max``."""
    by_quantizer: dict[str, list[LayerRecord]] = {}
    for layer in record.layers:
        by_quantizer.setdefault(split_variant(layer.name)[1], []).append(layer)
    for quantizer, layers in by_quantizer.items():
        news = [layer.news for layer in layers]
        for value in dict.fromkeys(value for of_layer in news for value in of_layer):
            found = spread(of_layer[value] for of_layer in news if value in of_layer)
            assert found is not None
            tags = spread_tags(value, quantizer)
            for which, number in found._asdict().items():
                yield _point(tags[which], number, value, f"{which} of the layers")


def spread_tags(value: str, quantizer: str = "") -> dict[str, str]:
    """The tags of a number's :class:`~weightflip.overview.Spread`, by what of it each is."""
    return {which: printable(_seen_as(f"spread/{value}_{which}", quantizer)) for which in Spread._fields}


def tagged_values(record: FlipRecord) -> dict[str, float]:
    """:func:`points` by tag, of all layers."""
    return {point.tag: point.number for point in points(record)}


def has_histograms(point: int) -> bool:
    """Whether the n-th logging point, from 1, is one at which histograms are written.

    The first 64, then 32 in each doubling: a histogram takes as much room as all the scalars of a layer, and
    TensorBoard shows no more than 500 of a tag.
    """
    return point <= HISTOGRAMS_OF_ALL or point % (1 << (point.bit_length() - HISTOGRAMS_OF_ALL.bit_length() + 1)) == 0


def _seen_as(tag: str, quantizer: str) -> str:
    return variant(tag, quantizer) if quantizer else tag


def _point(tag: str, number: float, value: str, whose: str) -> Point:
    return Point(printable(tag), number, value, whose)
