"""Statistics of whole weights that are needed before their shards can be encoded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from made_layouts import layout

from weightflip.distributed import collectives
from weightflip.distributed.rank_groups import RankGroup
from weightflip.distributed.statistics import Statistic, StatisticsTable, span


@pytest.mark.parametrize(
    ("scope", "group", "boundaries", "expected"),
    [
        ("element", None, {0, 32, 64}, None),
        ("group", 32, {0, 32, 64}, None),
        ("group", 32, {0, 48, 64}, ValueError),
        # Incomplete groups are not checked here: the format itself refuses such a shape.
        ("group", 48, {0, 64}, None),
        ("row", None, {0, 64}, None),
        ("row", None, {0, 32, 64}, "row"),
        ("tensor", None, {0, 64}, "tensor"),
        (None, None, {0, 64}, ValueError),
    ],
)
def test_over_what_statistics_are_combined(scope, group, boundaries, expected):
    quantizer = SimpleNamespace(scope=scope, group=group, has_statistic=True)
    lies = layout(boundaries=frozenset(boundaries))
    if expected is ValueError:
        with pytest.raises(ValueError, match=r"cut|scope"):
            span(lies, quantizer)
    else:
        assert span(lies, quantizer) == expected


def test_a_maximum_keeps_nan(monkeypatch):
    """An integer maximum of the bits equals torch's maximum, unlike the floating-point maximum of some backends."""
    nan, inf = float("nan"), float("inf")
    shards = torch.tensor([[1.0, -nan, inf, 0.0, 3.0], [2.0, 5.0, nan, 0.0, inf]])
    statistics = [Statistic(layout(), "tensor", "max") for _ in range(5)]
    tables = [StatisticsTable(statistics, RankGroup((0, 1), "cpu")) for _ in range(2)]
    for table, values in zip(tables, shards, strict=True):
        for index, value in enumerate(values):
            table.put(index, value, weights=256)
    tables[1].flag(3, 2)

    def all_reduce(numbers, group, operation):
        assert operation == "MAX"
        assert numbers.dtype is torch.int64
        numbers.copy_(torch.maximum(numbers, tables[1].bits))

    monkeypatch.setattr(collectives, "all_reduce_", all_reduce)
    tables[1].bits.bitwise_and_(torch.iinfo(torch.int64).max)
    tables[0].reduce()
    found = torch.stack([tables[0].get(index, shards[0, index]) for index in range(5)])
    assert torch.equal(found.nan_to_num(nan=-1), torch.maximum(*shards).nan_to_num(nan=-1))
    assert tables[0].is_counted.tolist() == [True, True, True, False, True]
