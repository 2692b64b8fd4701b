"""Layouts built by hand, without processes."""

from __future__ import annotations

from weightflip.distributed import Layout


def layout(shape=(8, 64), **overrides) -> Layout:
    defaults = {
        "shape": shape,
        "ranks": (0, 1),
        "device_type": "cpu",
        "is_first_copy": True,
        "shard": 0,
        "shards": 2,
        "offsets": (0, 0),
        "boundaries": frozenset({0, 64}),
        "is_partial": False,
    }
    return Layout(**{**defaults, **overrides})
