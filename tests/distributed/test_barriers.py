"""Barriers in the default process group's store, which may outlive the group."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from made_layouts import layout

from weightflip.distributed import collectives, try_barrier


def test_a_barrier_leaves_no_keys_that_a_later_group_would_misread(monkeypatch):
    monkeypatch.setattr(collectives, "BARRIER_TIMEOUT", timedelta(milliseconds=20))
    store = dist.HashStore()
    for _ in range(2):
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            before = store.num_keys()
            assert try_barrier([layout(ranks=(0,))], "one that arrives")
            assert store.num_keys() == before
            # Without a reset, two arrivals would have been counted the second time, one from each group.
            assert not try_barrier([layout(ranks=(0, 1))], "one that arrives and one that does not")
        finally:
            dist.destroy_process_group()
