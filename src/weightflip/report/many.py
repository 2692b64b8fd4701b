"""Runs of many layers: the sums of their blocks, and which layers are worth a row of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from weightflip.overview import MANY_LAYERS, blocks_of, outliers
from weightflip.records import Quotient, variant
from weightflip.report.findings import Finding, Severity
from weightflip.report.run import Layer, Run, sums
from weightflip.report.table import concerns, ranked

_MOST_LAYERS = 12


class Overview(NamedTuple):
    """What is shown of a run of many layers.

    Attributes:
        blocks: The sum of each, in the order of the layers.
        members: Names of the layers of each block, by the block's.
        layers: Those that stand out by their flip rate, and those that a warning names; 12 at most.
    """

    blocks: list[Layer]
    members: dict[str, list[str]]
    layers: list[Layer]


def overview_of(run: Run, findings: Sequence[Finding]) -> Overview | None:
    """What is shown of a run; None where every layer has a row: up to 30, or where no block repeats."""
    names = dict.fromkeys(layer.weight for layer in run.layers.values())
    found = blocks_of(names) if len(names) > MANY_LAYERS else {}
    if not found:
        return None
    block_of = {name: block for block, of in found.items() for name in of}
    members: dict[tuple[str, str], list[Layer]] = {}
    for layer in run.layers.values():
        members.setdefault((block_of[layer.weight], layer.variant), []).append(layer)
    blocks, names_of = [], {}
    for (block, seen_as), layers in members.items():
        name = variant(block, seen_as) if seen_as else block
        blocks.append(_sum(name, layers))
        names_of[name] = [layer.name for layer in layers]
    return Overview(blocks, names_of, _worth_a_row(run, findings))


def _sum(name: str, layers: Sequence[Layer]) -> Layer:
    def common(of: set[str]) -> str:
        return of.pop() if len(of) == 1 else "several"

    dtype, quantizer = common({layer.dtype for layer in layers}), common({layer.quantizer for layer in layers})
    return Layer(name, sum(layer.weights for layer in layers), dtype, quantizer, sums(layers))


def _worth_a_row(run: Run, findings: Sequence[Finding]) -> list[Layer]:
    odd: list[str] = []
    for seen_as in run.models:
        late = {
            layer.name: layer.get("flip_rate").part(run.late)
            for layer in run.layers.values()
            if layer.variant == seen_as
        }
        rates = {name: Quotient(part.numerators.sum(), part.denominators.sum()) for name, part in late.items()}
        odd += outliers(rates)
    serious = [finding for finding in findings if finding.severity >= Severity.WARNING]
    # What a warning says of nearly all layers, it says of the model.
    of_some = [finding for finding in serious if len(finding.layers) <= _MOST_LAYERS]
    named = [
        layer.name for layer in ranked(run, of_some) if any(concerns(finding, run, layer.name) for finding in of_some)
    ]
    return [run.layers[name] for name in list(dict.fromkeys([*named, *odd]))[:_MOST_LAYERS]]
