"""Validate a tracker's saved counts: returns plain data, or raises an error that says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from weightflip.counting.ledger import COLUMNS, NONFINITE, SCALE_CHANGES, SCALE_STEPS, WEIGHT_STEPS
from weightflip.kernels import FLIPS, STALLED, UPDATES

VERSION = 1
_INT64_MAX = 2**63 - 1
# Leaves headroom for later steps.
_MAX_STEPS = 2**53
_COLUMN_NAMES = {
    FLIPS: "flips",
    UPDATES: "updates",
    STALLED: "stalled",
    WEIGHT_STEPS: "weight steps",
    NONFINITE: "non-finite weights",
    SCALE_STEPS: "scale steps",
    SCALE_CHANGES: "scale changes",
}
# In each pair, the first count is part of the second.
_PARTS = ((FLIPS, WEIGHT_STEPS), (UPDATES, WEIGHT_STEPS), (STALLED, UPDATES), (SCALE_CHANGES, SCALE_STEPS))


@dataclass
class SavedLayer:
    """The saved counts of one layer.

    Attributes:
        weights: Number of weights.
        quantizer: Name of its quantizer.
        total: The ledger's columns since tracking began.
        base: The same, at the last record.
        ratios: Name of a metric group's ratio to numerator and denominator, since tracking began and at the last
            record.
        tensors: Name of a metric group to its per-weight state.
    """

    weights: int
    quantizer: str
    total: list[int]
    base: list[int]
    ratios: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def parse(state_dict: Any) -> tuple[int, dict[str, SavedLayer]]:
    """Return the number of steps and the layers by name from what ``WeightFlipTracker.state_dict`` returned.

    Args:
        state_dict: Any object: a checkpoint may come from another program or version, or be damaged.

    Raises:
        TypeError: Not a dictionary.
        ValueError: An entry is missing or invalid.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"expected the dictionary that WeightFlipTracker.state_dict() returns, got {_describe(state_dict)}"
        )
    missing = {"version", "steps", "layers"} - set(state_dict)
    version = state_dict.get("version")
    if missing or type(version) is not int or version != VERSION:
        raise ValueError(
            f"expected a state dict of WeightFlipTracker of version {VERSION}, got "
            + (f"a dictionary without {sorted(missing)}" if missing else f"version {_describe(version)}")
        )
    steps = count(state_dict["steps"], "'steps'")
    if steps > _MAX_STEPS:
        raise ValueError(f"expected at most 2**53 steps, got {_describe(steps)}")
    layers = _layers(_rows(state_dict["layers"], "'layers'"))
    _add_ratios(layers, _rows(state_dict.get("ratios", ()), "'ratios'"))
    _add_tensors(layers, _mapping(state_dict.get("weights", {}), "'weights'"))
    return steps, layers


def _layers(rows: Sequence[Any]) -> dict[str, SavedLayer]:
    layers: dict[str, SavedLayer] = {}
    for row in rows:
        name, weights, quantizer, total, base = _row(row, 5, "a layer")
        where = f"layer {name!r}"
        if not isinstance(name, str) or not isinstance(quantizer, str):
            raise ValueError(
                f"expected strings as names of a layer and its quantizer, got {_describe(name)}, {_describe(quantizer)}"
            )
        if name in layers:
            raise ValueError(f"expected each layer once, got {where} twice")
        layers[name] = SavedLayer(
            count(weights, f"the weights of {where}"),
            quantizer,
            _counts(total, f"the totals of {where}"),
            _counts(base, f"the totals at the last record of {where}"),
        )
        _check_order(layers[name], where)
    return layers


def _add_ratios(layers: Mapping[str, SavedLayer], rows: Sequence[Any]) -> None:
    for row in rows:
        name, ratio, *numbers = _row(row, 6, "a ratio")
        where = f"ratio {_describe(ratio)} of layer {_describe(name)}"
        layer = _find_layer(layers, name, where)
        if not isinstance(ratio, str) or ratio in layer.ratios:
            raise ValueError(f"expected each ratio of a layer once, by name, got {where}")
        numerator, denominator, base_numerator, base_denominator = (_number(number, where) for number in numbers)
        layer.ratios[ratio] = numerator, denominator, base_numerator, base_denominator


def _add_tensors(layers: Mapping[str, SavedLayer], saved: Mapping[Any, Any]) -> None:
    for name, groups in saved.items():
        layer = _find_layer(layers, name, f"the state of layer {_describe(name)}")
        for group, tensors in _mapping(groups, f"the state of layer {name!r}").items():
            where = f"the state of {_describe(group)} for layer {name!r}"
            kept = dict(_mapping(tensors, where))
            if not isinstance(group, str) or not all(isinstance(tensor, Tensor) for tensor in kept.values()):
                raise ValueError(f"expected tensors by name as {where}, got {_describe(tensors)}")
            layer.tensors[group] = kept


def count(value: Any, what: str) -> int:
    """Return the value if it is a valid count.

    Args:
        value: Any object.
        what: What it should be, for the error message.

    Raises:
        ValueError: Not a whole number from 0 to 2**63 - 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _INT64_MAX:
        raise ValueError(f"expected a whole number from 0 to 2**63 - 1 as {what}, got {_describe(value)}")
    return int(value)


def _counts(row: Any, what: str) -> list[int]:
    numbers = _row(row, COLUMNS, what)
    return [count(number, f"{_COLUMN_NAMES[column]} in {what}") for column, number in enumerate(numbers)]


def _check_order(layer: SavedLayer, where: str) -> None:
    """Check that no part exceeds its whole, in total, at the last record and in the window since then."""
    window = [total - base for total, base in zip(layer.total, layer.base, strict=True)]
    for period, numbers in (("in total", layer.total), ("at the last record", layer.base), ("since then", window)):
        for part, whole in _PARTS:
            if not 0 <= numbers[part] <= numbers[whole]:
                raise ValueError(
                    f"expected {_COLUMN_NAMES[part]} between 0 and {_COLUMN_NAMES[whole]} {period} of {where}, got "
                    f"{numbers[part]} and {numbers[whole]}"
                )


def _number(value: Any, what: str) -> float:
    """Return the value if it is a number that float64 holds. Metric groups decide on its meaning and sign."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            float(value)
        except OverflowError:
            pass
        else:
            return value
    raise ValueError(f"expected numbers that float64 can hold as {what}, got {_describe(value)}")


def _find_layer(layers: Mapping[str, SavedLayer], name: Any, what: str) -> SavedLayer:
    if not isinstance(name, str) or name not in layers:
        raise ValueError(f"expected {what} to belong to a layer in 'layers', got {_describe(name)}")
    return layers[name]


def _rows(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list as {what}, got {_describe(value)}")
    return value


def _row(value: Any, length: int, what: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or len(value) != length:
        got = f"{len(value)}" if isinstance(value, (list, tuple)) else _describe(value)
        raise ValueError(f"expected a list of {length} entries as {what}, got {got}")
    return value


def _mapping(value: Any, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a dictionary as {what}, got {_describe(value)}")
    return value


def _describe(value: Any) -> str:
    """Describe a value briefly: it may be a tensor, or a number with 400 digits."""
    if isinstance(value, int) and not -(10**30) < value < 10**30:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return type(value).__name__
