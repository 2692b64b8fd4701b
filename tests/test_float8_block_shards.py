"""Blocks of 128 x 128 on several processes, gloo on the CPU: the same numbers on one process and on several."""

from __future__ import annotations

import functools
import json
import multiprocessing
from types import SimpleNamespace

import float8_block_shards as shards
import pytest
import torch.multiprocessing

from weightflip.distributed import Layout, span

# Forked from a process that has imported what all of them need.
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
IMPORTS = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.optim"]
IMPORTS += ["torch.distributed.tensor.parallel", "weightflip"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list]:
    """The results of each of 2 and of 4 processes."""
    folder, found = tmp_path_factory.mktemp("shards"), {}
    multiprocessing.set_forkserver_preload(IMPORTS)
    for world in (2, 4):
        torch.multiprocessing.start_processes(shards.work, (world, folder), world, start_method=START_METHOD)
        found[world] = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    return found


@functools.cache
def on_one_process(layers: tuple[str, ...], *before) -> dict:
    return json.loads(json.dumps(shards.run(list(layers), lambda model: None, *before)))


@pytest.mark.parametrize("world", [2, 4])
def test_counts_equal_those_of_one_process(results, world):
    names = [*shards.CASES, *(shards.OF_FOUR if world == 4 else ())]
    for name in names:
        layers, _, *before = (shards.CASES | shards.OF_FOUR)[name]
        expected = on_one_process(tuple(layers), *before)
        for result in results[world]:
            assert result[name] == expected, name
        assert len(expected) == len(layers) * len(shards.FORMATS)
        for layer in expected.values():
            assert layer["flips"] > 0
            assert layer["scale_steps"] > 0
        assert sum(layer["scale_changes"] for layer in expected.values()) > 0


@pytest.mark.parametrize("world", [2, 4])
def test_one_collective_per_step_with_a_number_per_cut_block(results, world):
    # 3 x 2 blocks of one weight, 1 x 2 of another, and a flag for each weight; in two of the formats.
    table = ["allreduce_", 2 * (6 + 1 + 2 + 1)]
    for result in results[world]:
        first, second, third, last = result["calls"]
        assert first.count(table) == 2
        assert [second, third, last[:1]] == [[table], [table], [table]]


@pytest.mark.parametrize(
    ("tile", "rows", "columns", "expected"),
    [
        ((128, 128), {0, 150, 300}, {0, 200}, "block"),
        ((128, 128), {0, 128, 300}, {0, 200}, None),
        ((128, 128), {0, 300}, {0, 128, 200}, None),
        ((128, 128), {0, 150, 300}, {0, 128, 200}, "block"),
        ((128, 128), None, {0, 200}, "block"),
        ((128, 128), {0, 300}, {0, 100, 200}, ValueError),
        ((128, 128), {0, 300}, None, ValueError),
        ((1, 128), {0, 150, 300}, {0, 128, 200}, None),
        ((1, 128), None, {0, 200}, None),
        ((1, 128), {0, 300}, {0, 100, 200}, ValueError),
    ],
)
def test_over_what_statistics_are_combined(tile, rows, columns, expected):
    lies = Layout(
        shape=(300, 200),
        ranks=(0, 1),
        device_type="cpu",
        is_first_copy=True,
        shard=0,
        shards=2,
        offsets=(0, 0),
        boundaries=None if columns is None else frozenset(columns),
        is_partial=False,
        row_boundaries=None if rows is None else frozenset(rows),
    )
    quantizer = SimpleNamespace(scope="block", group=128, tile=tile, has_statistic=True)
    if expected is ValueError:
        with pytest.raises(ValueError, match="shards cut the blocks of"):
            span(lies, quantizer)
    else:
        assert span(lies, quantizer) == expected


@pytest.mark.parametrize("world", [2, 4])
def test_what_cannot_be_exact_is_refused(results, world):
    for result in results[world]:
        assert (
            "shards cut the blocks of 128 x 128 that share a scale in float8_e4m3:128x128"
            in (result["columns that are cut"])
        )
        if world == 4:
            reason = "its blocks are cut by shards in a way that float8_e4m3:128x128 does not support"
            assert reason in result["strided"]
