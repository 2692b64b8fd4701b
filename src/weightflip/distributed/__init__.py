"""Many processes: how a weight lies on them, and what they have to tell each other."""

from weightflip.distributed.collectives import add_up, have_all_come, is_any
from weightflip.distributed.groups import is_writer
from weightflip.distributed.layouts import Layout, first_row, layout
from weightflip.distributed.shards import ShardedWeight, ShardedWeights
from weightflip.distributed.statistics import span
from weightflip.distributed.tensors import Identity, is_dtensor, local, local_gradient

__all__ = [
    "Identity",
    "Layout",
    "ShardedWeight",
    "ShardedWeights",
    "add_up",
    "first_row",
    "have_all_come",
    "is_any",
    "is_dtensor",
    "is_writer",
    "layout",
    "local",
    "local_gradient",
    "span",
]
