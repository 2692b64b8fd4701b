"""Sharded weights: how they are laid out over processes, and the collectives that tracking them needs."""

from weightflip.distributed.collectives import all_reduce_sum, is_set_on_any, try_barrier
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
    "all_reduce_sum",
    "first_row",
    "is_dtensor",
    "is_set_on_any",
    "is_writer",
    "layout",
    "local",
    "local_gradient",
    "span",
    "try_barrier",
]
