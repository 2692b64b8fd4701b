"""Which parameters are tracked, under which name, with which quantizer; and why the others are not."""

from weightflip.selection.choice import Sources, owner_types
from weightflip.selection.names import is_by_place, name_parameters
from weightflip.selection.plan import Plan, make_plan
from weightflip.selection.rules import Selection, make_groups
from weightflip.selection.torchao import quantizes_weights

__all__ = [
    "Plan",
    "Selection",
    "Sources",
    "is_by_place",
    "make_groups",
    "make_plan",
    "name_parameters",
    "owner_types",
    "quantizes_weights",
]
