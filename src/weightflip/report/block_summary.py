"""Summaries of runs with many layers: sums per model block, and the layers that deserve their own row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from weightflip.overview import MANY_LAYERS, blocks_of, outliers
from weightflip.records import Quotient, variant
from weightflip.report.findings import Finding, Severity
from weightflip.report.run import Layer, Run, sum_layers
from weightflip.report.table import concerns, rank_layers

_MAX_LAYERS = 12


class Overview(NamedTuple):
    """Summary of a run with many layers.

    Attributes:
        blocks: Sum over each model block, in the order of the layers.
        members: Names of the layers of each block, by block name.
        layers: At most 12 layers whose flip rate stands out or that a warning names.
    """

    blocks: list[Layer]
    members: dict[str, list[str]]
    layers: list[Layer]


def make_overview(run: Run, findings: Sequence[Finding]) -> Overview | None:
    """Summarize a run; None if every layer gets a row, with up to 30 layers or without repeated blocks."""
    names = dict.fromkeys(layer.weight for layer in run.layers.values())
    found = blocks_of(names) if len(names) > MANY_LAYERS else {}
    if not found:
        return None
    block_of = {name: block for block, names_in_block in found.items() for name in names_in_block}
    members: dict[tuple[str, str], list[Layer]] = {}
    for layer in run.layers.values():
        members.setdefault((block_of[layer.weight], layer.variant), []).append(layer)
    blocks, names_of = [], {}
    for (block, quantizer), layers in members.items():
        name = variant(block, quantizer) if quantizer else block
        blocks.append(_sum_block(name, layers))
        names_of[name] = [layer.name for layer in layers]
    return Overview(blocks, names_of, _noteworthy_layers(run, findings))


def _sum_block(name: str, layers: Sequence[Layer]) -> Layer:
    def common(values: set[str]) -> str:
        return values.pop() if len(values) == 1 else "several"

    dtype, quantizer = common({layer.dtype for layer in layers}), common({layer.quantizer for layer in layers})
    return Layer(name, sum(layer.weights for layer in layers), dtype, quantizer, sum_layers(layers))


def _noteworthy_layers(run: Run, findings: Sequence[Finding]) -> list[Layer]:
    outlying: list[str] = []
    for quantizer in run.models:
        late = {
            layer.name: layer.get("flip_rate").part(run.late)
            for layer in run.layers.values()
            if layer.variant == quantizer
        }
        rates = {name: Quotient(part.numerators.sum(), part.denominators.sum()) for name, part in late.items()}
        outlying += outliers(rates)
    serious = [finding for finding in findings if finding.severity >= Severity.WARNING]
    # A warning about nearly all layers is about the model, not about its layers.
    of_some = [finding for finding in serious if len(finding.layers) <= _MAX_LAYERS]
    named = [
        layer.name
        for layer in rank_layers(run, of_some)
        if any(concerns(finding, run, layer.name) for finding in of_some)
    ]
    return [run.layers[name] for name in list(dict.fromkeys([*named, *outlying]))[:_MAX_LAYERS]]
