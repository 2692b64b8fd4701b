"""Names the tags of all numbers of a record, for TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from weightflip.overview import Spread, spread
from weightflip.records import MODEL_TAGS, FlipRecord, LayerRecord, printable, split_variant, variant

DENSE_HISTOGRAM_POINTS = 64


class Point(NamedTuple):
    """One number of a record with its tag.

    Attributes:
        tag: The tag, with non-printable characters escaped.
        number: The number.
        value: Its name, as in ``LayerRecord.values``.
        subject: What it describes: the model, a layer, a layer group, or a statistic over the layers.
    """

    tag: str
    number: float
    value: str
    subject: str


def accept_all(value: str, layer: str) -> bool:
    """Accepts all numbers of all layers."""
    return True


def points(record: FlipRecord, is_tagged: Callable[[str, str], bool] = accept_all) -> Iterator[Point]:
    """The new numbers of a record: first those of the model, then of the layers, then of the layer groups.

    The tag of a number ``<value>`` is ``flips/<value>`` for the model, ``<value>/<layer>`` for a layer and
    ``<value>_by_group/<group>`` for a layer group.

    Args:
        record: The record.
        is_tagged: Whether a number (name, layer) has its own tag.
    """
    for quantizer, model in record.models.items():
        for value, number in model.new_values.items():
            tag = MODEL_TAGS.get(value, f"flips/{value}")
            yield _point(_with_quantizer(tag, quantizer), number, value, "model")
    for layer in record.layers:
        for value, number in layer.new_values.items():
            if is_tagged(value, layer.name):
                yield _point(f"{value}/{layer.name}", number, value, layer.name)
        if layer.nonfinite and layer.window.weight_steps:
            yield _point(f"nonfinite_weights/{layer.name}", float(layer.nonfinite), "nonfinite_weights", layer.name)
    for group, summed in record.group_sums.items():
        for value, number in summed.new_values.items():
            yield _point(f"{value}_by_group/{group}", number, value, f"group {group}")


def model_points(record: FlipRecord) -> Iterator[Point]:
    """The numbers of the model again, as ``Model/<value>``: TensorBoard sorts by tag and opens the first section."""
    for quantizer, model in record.models.items():
        for value, number in model.new_values.items():
            yield _point(_with_quantizer(f"Model/{value}", quantizer), number, value, "model")


def spread_points(record: FlipRecord) -> Iterator[Point]:
    """The spread of each number over the layers: ``spread/<value>_min``, ``_p25``, ``_median``, ``_p75``, ``_max``."""
    by_quantizer: dict[str, list[LayerRecord]] = {}
    for layer in record.layers:
        by_quantizer.setdefault(split_variant(layer.name)[1], []).append(layer)
    for quantizer, layers in by_quantizer.items():
        of_layers = [layer.new_values for layer in layers]
        for value in dict.fromkeys(value for of_layer in of_layers for value in of_layer):
            distribution = spread(of_layer[value] for of_layer in of_layers if value in of_layer)
            assert distribution is not None
            tags = spread_tags(value, quantizer)
            for statistic, number in distribution._asdict().items():
                yield _point(tags[statistic], number, value, f"{statistic} of the layers")


def spread_tags(value: str, quantizer: str = "") -> dict[str, str]:
    """The tags of a number's :class:`~weightflip.overview.Spread`, by field name."""
    return {field: printable(_with_quantizer(f"spread/{value}_{field}", quantizer)) for field in Spread._fields}


def tagged_values(record: FlipRecord) -> dict[str, float]:
    """:func:`points` of all layers, as a dictionary from tag to number."""
    return {point.tag: point.number for point in points(record)}


def is_histogram_point(point: int) -> bool:
    """Whether histograms are written at the n-th logging point, counted from 1.

    They are written at the first 64, then 32 times per doubling: a histogram takes as much space as all scalars of a
    layer, and TensorBoard shows at most 500 per tag.
    """
    return (
        point <= DENSE_HISTOGRAM_POINTS
        or point % (1 << (point.bit_length() - DENSE_HISTOGRAM_POINTS.bit_length() + 1)) == 0
    )


def _with_quantizer(tag: str, quantizer: str) -> str:
    return variant(tag, quantizer) if quantizer else tag


def _point(tag: str, number: float, value: str, subject: str) -> Point:
    return Point(printable(tag), number, value, subject)
