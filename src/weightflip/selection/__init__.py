"""Decide which parameters to track, under which names and with which quantizers, and why the others are skipped."""

from weightflip.selection.choice import QuantizerSources, owner_types
from weightflip.selection.names import is_positional, name_parameters
from weightflip.selection.plan import Plan, make_plan
from weightflip.selection.rules import Selection, make_layer_groups
from weightflip.selection.torchao import quantizes_weights

__all__ = [
    "Plan",
    "QuantizerSources",
    "Selection",
    "is_positional",
    "make_layer_groups",
    "make_plan",
    "name_parameters",
    "owner_types",
    "quantizes_weights",
]
